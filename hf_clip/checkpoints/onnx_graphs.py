"""A CLIP as three ONNX graphs, named as transformers.js and optimum name those of a stock one.

| graph        | inputs                                  | outputs                                        |
|--------------|-----------------------------------------|------------------------------------------------|
| model        | input_ids, pixel_values, attention_mask | logits_per_{image,text}, {text,image}_embeds   |
| text_model   | input_ids                               | text_embeds                                    |
| vision_model | pixel_values                            | image_embeds                                   |

As in the classes that carry these names, the whole model's embeddings have length one and a tower's have not. Batch
sizes and the text length are free, the images' size is the model's. Attention is spelled out, since its mask is
finite: a text of padding alone gives numbers in every engine, in float16 too. A mask changes no feature of a text that
is padded on the right, so the text tower's graph asks for none.

Each graph's metadata says what its towers' embeddings lack to become scores, see `facts_of`.

Dimensions: T texts, L text length, I images, D embedding.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.configuration_hf_clip import HfClipConfig
from ..model.modeling_hf_clip import HfClipModel

OPSET = 18
LARGEST_FILE = 2_000_000_000
"""Bytes of weights that go into the graph's own file. Protocol buffers end at 2 GiB."""

TEXTS, LENGTH, IMAGES = "text_batch_size", "sequence_length", "image_batch_size"
FREE: dict[str, dict[int, str]] = {
    "input_ids": {0: TEXTS, 1: LENGTH},
    "pixel_values": {0: IMAGES},
    "attention_mask": {0: TEXTS, 1: LENGTH},
}


def facts_of(model: HfClipModel) -> dict[str, str]:
    """What turns two embeddings into a score, and the longest text, as the metadata of a graph."""
    bias = getattr(model, "logit_bias", None)
    values = {
        "logit_scale": float(model.logit_scale.detach().float().exp()),
        "logit_bias": 0.0 if bias is None else float(bias.detach()),
        "scores": getattr(model.config, "contrastive_loss", "softmax"),
        "max_position_embeddings": model.config.text_config.max_position_embeddings,
    }
    return {f"hf_clip.{name}": str(value) for name, value in values.items()}


class Graph(nn.Module):
    """What is exported as one file: the inputs by name, the outputs as a tuple."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: HfClipModel):
        super().__init__()
        self.model = model

    def random_batch(self, texts: int, length: int, images: int, seed: int = 0) -> dict[str, Tensor]:
        """Inputs of this graph, as many and as long as it takes."""
        given = random_inputs(self.model.config, texts, length, images, seed)
        return {name: given[name] for name in self.inputs}


class WholeModel(Graph):
    name = "model"
    inputs = ("input_ids", "pixel_values", "attention_mask")
    outputs = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask)
        return tuple(found[name] for name in self.outputs)


class TextTower(Graph):
    name = "text_model"
    inputs = ("input_ids",)
    outputs = ("text_embeds",)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode_text(input_ids),)


class ImageTower(Graph):
    name = "vision_model"
    inputs = ("pixel_values",)
    outputs = ("image_embeds",)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode_image(pixel_values),)


GRAPHS: tuple[type[Graph], ...] = (WholeModel, TextTower, ImageTower)


def random_inputs(config: HfClipConfig, texts: int, length: int, images: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of all three graphs. Texts end at different places, and what follows is padding.

    Returns input_ids (T, L), pixel_values (I, C, Y, X) and attention_mask (T, L).
    """
    random = torch.Generator().manual_seed(seed)
    text, vision = config.text_config, config.vision_config
    input_ids = torch.randint(0, text.vocab_size, (texts, length), generator=random)
    ends = torch.tensor([length - 1 - row % length for row in range(texts)])[:, None]  # (T, 1)
    positions = torch.arange(length)
    end = text.vocab_size - 1 if text.eos_token_id is None else text.eos_token_id
    is_special = input_ids == end
    if text.bos_token_id is not None:  # within a text it would be the start after padding on the left
        is_special |= input_ids == text.bos_token_id
    words = input_ids.where(~is_special, (end + 1) % text.vocab_size)
    return {
        "input_ids": words.where(positions < ends, end),
        "pixel_values": torch.randn(images, vision.num_channels, *[vision.image_size] * 2, generator=random),
        "attention_mask": (positions <= ends).long(),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's warnings and notes, which are about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def free_dimensions(graph: Graph) -> dict[str, dict[int, Any]]:
    """Which dimensions of the graph's inputs are free, for `torch.export` and `torch.onnx.export`.

    An input that `FREE` does not name has fixed dimensions.
    """
    limit = graph.model.config.text_config.max_position_embeddings
    known = {name: torch.export.Dim(name, max=limit if name == LENGTH else None) for name in (TEXTS, LENGTH, IMAGES)}
    return {name: {axis: known[free] for axis, free in FREE.get(name, {}).items()} for name in graph.inputs}


def give_other_names(graph: Any) -> None:
    """Rename values and weights that are called as one of the graph's outputs is, which the exporter leaves so."""
    outputs = {value.name: value for value in graph.outputs}
    for name in outputs.keys() & set(graph.initializers):
        weight = graph.initializers.pop(name)
        weight.name = f"{name}_weight"
        graph.register_initializer(weight)
    for node in graph.all_nodes():
        for value in node.outputs:
            if value is not outputs.get(value.name, value):
                value.name += "_within"


@torch.no_grad()
def write_graph(graph: Graph, path: Path) -> None:
    """Export in float32. Weights beyond what one file can hold lie beside it, in the file named `…_data`."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    limit = graph.model.config.text_config.max_position_embeddings
    given = graph.random_batch(texts=2, length=min(7, limit), images=3)
    with quiet():
        program = torch.onnx.export(
            graph,
            tuple(given[name] for name in graph.inputs),
            dynamo=True,
            dynamic_shapes=free_dimensions(graph),
            input_names=graph.inputs,
            output_names=graph.outputs,
            opset_version=OPSET,
            verbose=False,
        )
        assert program is not None
        exported = program.model
        ClearMetadataAndDocStringPass()(exported)  # stack traces with this machine's paths
        give_other_names(exported.graph)
        exported.metadata_props.update(facts_of(graph.model))
        weights = [value.const_value for value in exported.graph.initializers.values()]
        large = sum(weight.nbytes for weight in weights if weight is not None) > LARGEST_FILE
        onnx_ir.save(exported, path, external_data=f"{path.name}_data" if large else None)
