"""A CLIP as the folder that Immich's machine-learning service loads, with one ONNX graph for each tower.

| file                       | holds                                                                       |
|----------------------------|-----------------------------------------------------------------------------|
| config.json                | open_clip's fields of the model; Immich reads the length of texts           |
| textual/model.onnx         | text (1, L) int32 → embedding (1, D), of length one                         |
| textual/tokenizer.json     | the tokenizer, with tokenizer_config.json, which names the padding          |
| visual/model.onnx          | image (1, C, Y, X) float32 → embedding (1, D), of length one                |
| visual/preprocess_cfg.json | open_clip's fields of the image processor                                   |

The dimensions are fixed, as in the graphs that Immich publishes: it encodes one text or image at a time, and some
engines need to know them. Texts are padded to the greatest length.

Dimensions: L greatest text length, D embedding, C channels, Y × X pixels.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from ..extras import require
from ..model.checked_files import read_object
from ..model.processing_hf_clip import HfClipProcessor
from .onnx_export import Written, load_model, write_precisions
from .onnx_graphs import Graph, random_inputs
from .open_clip import open_clip_config
from .stock import write_tokenizer
from .whole_file import write_json
from .whole_folder import check_destination, whole_folder

CONFIG, GRAPH = "config.json", "model.onnx"


class ImmichText(Graph):
    """Token ids of one text to its embedding."""

    folder = "textual"
    name = "model"
    inputs = ("text",)
    outputs = ("embedding",)

    def random_batch(self, texts: int, length: int, images: int, seed: int = 0) -> dict[str, Tensor]:
        """One text of `length` ids, padded."""
        limit = self.model.config.text_config.max_position_embeddings
        ids = random_inputs(self.model.config, limit, limit, 1, seed)["input_ids"]
        return {"text": ids[limit - length : limit - length + 1].int()}  # row r ends r before the last position

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        return (normalize(self.model.encode_text(text.long()), dim=-1),)


class ImmichImage(Graph):
    """Pixels of one image to its embedding."""

    folder = "visual"
    name = "model"
    inputs = ("image",)
    outputs = ("embedding",)

    def random_batch(self, texts: int, length: int, images: int, seed: int = 0) -> dict[str, Tensor]:
        """One image."""
        return {"image": random_inputs(self.model.config, 1, 1, 1, seed)["pixel_values"]}

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return (normalize(self.model.encode_image(image), dim=-1),)


TOWERS: tuple[type[ImmichText] | type[ImmichImage], ...] = (ImmichText, ImmichImage)


def preprocess_config(values: dict[str, Any], size: int) -> dict[str, Any]:
    """The content of visual/preprocess_cfg.json.

    values: open_clip's `preprocess_cfg`
    size: of the sides in pixels
    """
    return {"size": [size, size], "mode": "RGB", **values, "fill_color": 0}


def check_holds_no_other_model(out: Path) -> None:
    """Raise FileExistsError if `out` holds files of another kind than an earlier export for Immich."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    config = out / CONFIG
    if not config.is_file() or "text_cfg" not in read_object(config):
        raise FileExistsError(
            f"{out} holds other files than an export for Immich, whose {CONFIG} would replace theirs; name a folder "
            f"that is empty or new."
        )


def export_immich(
    source: str | Path,
    out: str | Path | None,
    *,
    precision: str = "fp32",
    force: bool = False,
) -> list[Written]:
    """Export a model into a folder for Immich; see the module.

    Args:
        source: A folder or repository that HfClipModel.from_pretrained reads.
        out: The folder to write to.
        precision: Of the weights, a name of `onnx_export.PRECISIONS`.
        force: Whether graphs smaller than float32 are written that are further from the model than they should be.

    Returns:
        The graphs, and how far each is from the model.

    Raises:
        ImportError: A package of the extra `onnx` is missing.
        OSError: A file or folder is missing, in use or full, or `out` holds another model.
        ValueError: The source is no folder of a whole model, Immich cannot prepare its images, or a graph is too far
            from the model. Nothing is written then.
    """
    require("Exporting to ONNX", "onnx")
    if out is None:
        raise ValueError(
            f"An export for Immich is a folder of its own; name it: hf-clip export-onnx {source} OUT --layout immich"
        )
    out = check_destination(out, overwrite=True)
    check_holds_no_other_model(out)
    model, processor = load_model(source), HfClipProcessor.from_pretrained(source)
    described = open_clip_config(model.config, processor.image_processor)
    written: list[Written] = []
    with whole_folder(out) as folder:
        for kind in TOWERS:
            place = folder / kind.folder
            place.mkdir()
            [graph] = write_precisions(kind(model), place, [precision], force)
            if graph.name != GRAPH:
                os.replace(place / graph.name, place / GRAPH)
            written.append(replace(graph, name=f"{kind.folder}/{GRAPH}"))
        write_json(folder / CONFIG, described["model_cfg"])
        write_tokenizer(folder / ImmichText.folder, processor.tokenizer, "PreTrainedTokenizerFast")
        images = preprocess_config(described["preprocess_cfg"], model.config.vision_config.image_size)
        write_json(folder / ImmichImage.folder / "preprocess_cfg.json", images)
    return written


__all__ = ["export_immich"]
