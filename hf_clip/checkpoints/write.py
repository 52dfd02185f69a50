"""Write a model into a folder in the layout of a library: `write(model, processor, out, layout)`.

| layout       | what is written                                               | who loads it                     |
|--------------|---------------------------------------------------------------|----------------------------------|
| hf_clip      | config, model.safetensors, tokenizer, processor               | this package, all nine           |
| transformers | the same under stock names (ViTs)                             | CLIPModel, AutoModel, servers    |
| open_clip    | open_clip_config.json, open_clip_model.safetensors, tokenizer | open_clip                        |
| openai       | model.pt, a state dict with OpenAI's names                    | OpenAI's `build_model`           |
| diffusers    | text_encoder/ and tokenizer/                                  | diffusion pipelines              |
| comfyui      | clip_l.safetensors: text tower of ViT-L/14 or RN50x16         | ComfyUI                          |

Tensors are written as they are stored, so every layout holds the same bits. The folder appears only when it is
complete.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from ..model.configuration_hf_clip import HfClipTextConfig
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import OPENAI_VOCAB_SIZE
from .download import byte_progress
from .folders import DESCRIPTIONS
from .keys import original_names
from .open_clip import CONFIG_FILE, open_clip_config
from .open_clip import WEIGHT_FILES as OPEN_CLIP_WEIGHT_FILES
from .read import PUBLISHED_KEY, StoredModel
from .remote_code import add_remote_code
from .safetensors_stream import write_safetensors
from .stock import TOWER_FIELDS, stock_special_ids, write_stock_files, write_tokenizer
from .whole_file import write_json
from .whole_folder import check_destination, whole_folder

AfterEach = Callable[[int], None]
Writer = Callable[[Path, StoredModel, HfClipProcessor, AfterEach], None]

LAYER_NORM_EPS = 1e-5
CLIP_L = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": LAYER_NORM_EPS,
    "eos_token_id": 49407,
}
"""The text tower that goes by the name of clip_l."""


def _metadata(model: StoredModel) -> dict[str, str]:
    return {PUBLISHED_KEY: model.published} if model.published else {}


def write_hf_clip(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    write_safetensors(folder / "model.safetensors", model.tensors, after_each, _metadata(model))
    config = copy.deepcopy(model.config)
    config.architectures = ["HfClipModel"]
    config.dtype = "float32"  # what to compute in; the file keeps what was stored
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_transformers(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    write_stock_files(folder, model.config, processor.tokenizer, processor.image_processor)
    write_safetensors(folder / "model.safetensors", model.tensors, after_each, _metadata(model))


def check_pooling(config: HfClipTextConfig, program: str) -> None:
    """Refuse a text tower whose end of text is not its last id. Those programs take the feature at the highest id."""
    if config.eos_token_id not in (None, config.vocab_size - 1):
        raise ValueError(
            f"{program} takes a text's feature at its largest id, but this model's end of text is "
            f"{config.eos_token_id} of {config.vocab_size} ids; its features would be wrong there."
        )


def write_open_clip(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    check_pooling(model.config.text_config, "open_clip")
    values = open_clip_config(model.config, processor.image_processor)
    if model.config.text_config.vocab_size != OPENAI_VOCAB_SIZE:
        # Without a name open_clip takes OpenAI's vocabulary. For a folder it then reads the files beside; for a
        # repository on the Hub the name must be the repository's, which isn't known here.
        values["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "write-the-name-of-this-repository-here"
    write_json(folder / CONFIG_FILE, values)
    write_tokenizer(folder, processor.tokenizer, "PreTrainedTokenizerFast")
    write_safetensors(folder / OPEN_CLIP_WEIGHT_FILES[0], original_names(model.tensors, model.config), after_each)


def write_openai(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    config = model.config
    check_pooling(config.text_config, "OpenAI's code")
    towers = [config.text_config, config.vision_config]
    activations = {tower.hidden_act for tower in towers if hasattr(tower, "hidden_act")}
    if activations != {"quick_gelu"} or config.contrastive_loss != "softmax":
        raise ValueError(
            f"OpenAI's code has QuickGELU and the softmax loss, but this model has "
            f"{', '.join(sorted(activations))} and the {config.contrastive_loss} loss; its features would be wrong "
            f"there."
        )
    for tower in towers:
        if getattr(tower, "layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
            raise ValueError(
                f"OpenAI's code has LayerNorms of eps {LAYER_NORM_EPS}, but {tower.model_type} has "
                f"{tower.layer_norm_eps}; its features would be wrong there."
            )
        if tower.hidden_size != 64 * tower.num_attention_heads:
            raise ValueError(
                f"OpenAI's code takes heads for 64 wide, but {tower.model_type} has {tower.num_attention_heads} heads "
                f"in {tower.hidden_size}; its features would be wrong there."
            )
    state = {}
    for name, tensor in original_names(model.tensors, config).items():
        state[name] = tensor.contiguous().clone()  # not the whole mapped file behind a view
        after_each(tensor.nbytes)
    torch.save(state, folder / "model.pt")


def _text_tower(model: StoredModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.tensors.items() if name.startswith("text_model.")}


def write_diffusers(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    values = model.config.text_config.to_dict()
    kept = {name: value for name, value in values.items() if name not in TOWER_FIELDS}
    config = CLIPTextConfig(**stock_special_ids(kept))
    config.architectures = ["CLIPTextModel"]
    config.dtype = "float32"
    config.save_pretrained(folder / "text_encoder")
    write_safetensors(folder / "text_encoder" / "model.safetensors", _text_tower(model), after_each)
    write_tokenizer(folder / "tokenizer", processor.tokenizer, "CLIPTokenizer")


def check_clip_l(config: HfClipTextConfig) -> None:
    """Raise ValueError for a text tower of another shape than ComfyUI's `clip_l`."""
    other = {name: value for name, value in CLIP_L.items() if getattr(config, name) != value}
    if other:
        listed = ", ".join(f"{name} {getattr(config, name)} instead of {value}" for name, value in other.items())
        raise ValueError(
            f"ComfyUI's clip_l is the text tower of ViT-L/14 and RN50x16, but this model's has {listed}; use --format "
            f"diffusers."
        )


def write_comfyui(folder: Path, model: StoredModel, processor: HfClipProcessor, after_each: AfterEach) -> None:
    check_clip_l(model.config.text_config)
    tensors = _text_tower(model) | {"text_projection.weight": model.tensors["text_projection.weight"]}
    write_safetensors(folder / "clip_l.safetensors", tensors, after_each)


WRITERS: dict[str, Writer] = {
    "hf_clip": write_hf_clip,
    "transformers": write_transformers,
    "open_clip": write_open_clip,
    "openai": write_openai,
    "diffusers": write_diffusers,
    "comfyui": write_comfyui,
}
LAYOUTS = tuple(WRITERS)


def check_layout(layout: str, remote_code: bool = False) -> None:
    """Raise ValueError for an unknown layout, or for code beside a layout that needs none."""
    if layout not in WRITERS:
        raise ValueError(f"format is {layout!r}, but must be one of {', '.join(LAYOUTS)}.")
    if remote_code and layout != "hf_clip":
        raise ValueError(f"--remote-code is for this package's own layout; --format {layout} needs no code.")


def check_leftovers(out: Path, folder: Path) -> None:
    """Refuse to write over a model of another layout: one of its files would go on to describe the old one.

    Args:
        out: The folder to write to.
        folder: What is about to be moved into it.

    Raises:
        FileExistsError: `out` holds such a file.
    """
    written = [name for name in DESCRIPTIONS if (folder / name).is_file()]
    left = [name for name in DESCRIPTIONS if name not in written and (out / name).is_file()]
    if written and left:
        raise FileExistsError(
            f"{out} holds {', '.join(left)} of a model in another layout, which would be read with the new one's "
            f"files; name another folder, or remove it."
        )


def print_note(line: str) -> None:
    """Print a line for the user on stderr, where the progress bars are."""
    print(f"note: {line}", file=sys.stderr)  # noqa: T201


def write(
    model: StoredModel | HfClipModel,
    processor: HfClipProcessor,
    out: str | Path,
    layout: str = "hf_clip",
    *,
    overwrite: bool = False,
    remote_code: bool = False,
    note: Callable[[str], None] = print_note,
) -> None:
    """Write a model into the folder `out`, whole or not at all.

    Args:
        model: What `read` returned, or a model in memory, which is written in the dtype that it has.
        processor: Its processor.
        out: The folder.
        layout: One of `LAYOUTS`.
        overwrite: Whether `out` may hold files. Those of the same names are replaced, the others stay.
        remote_code: Whether to put the code beside the model that loads it where this package isn't installed.
        note: Called with a line that the user should read.

    Raises:
        FileExistsError: `out` is a file, or holds files that are not to be replaced.
        FolderInUseError: Another program writes to `out`.
        DiskFullError: There is no room.
        OSError: `out` cannot be written.
        ValueError: The layout cannot express this model.
    """
    check_layout(layout, remote_code)
    out = check_destination(out, overwrite)
    stored = model if isinstance(model, StoredModel) else StoredModel.of(model)
    with (
        whole_folder(out, overwrite=overwrite, needed=stored.nbytes) as folder,
        byte_progress(f"Writing {out.name}", stored.nbytes) as bar,
    ):

        def after_each(written: int) -> None:
            bar.update(written)
            stored.forget_read_pages()

        WRITERS[layout](folder, stored, processor, after_each)
        if layout == "open_clip" and stored.config.text_config.vocab_size != OPENAI_VOCAB_SIZE:
            note(
                "the vocabulary is not OpenAI's. open_clip finds it in a folder; before a push, write the "
                "repository's name for hf_tokenizer_name into open_clip_config.json."
            )
        if remote_code:
            add_remote_code(folder)
        check_leftovers(out, folder)


__all__ = ["LAYOUTS", "StoredModel", "check_layout", "print_note", "write"]
