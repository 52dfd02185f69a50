"""OpenAI's tensor names and ours: one table, read in both directions.

A row says which original tensor becomes which of ours, and how: as it is, transposed (the original keeps its
projections as inputs × outputs), or split into q, k and v. `{n}` stands for a layer's number and `{p}` for
`weight` or `bias`. Names that no row matches are errors in either direction, and so are names that are missing.

The configuration is derived from tensor shapes alone, as OpenAI's own `build_model` derives it, and then
compared with the table of the nine published models.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.checked_files import one_line
from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from ..model.modeling_hf_clip import HfClipModel
from ..model.stock_config import last_special_ids
from ..model.variants import VARIANTS, Variant
from .errors import MOST_SHOWN, CheckpointError

HEAD_WIDTH = 64
"""All of OpenAI's towers, and the attention pools, have heads of this width; no tensor tells it."""

TENSORS_OF_A_LAYER = 12
"""The least that a layer of any tower has: weight and bias of two norms, of q, k and v, of three linear maps."""

DESCRIPTIVE_SCALARS = ("input_resolution", "context_length", "vocab_size")
"""Original archives store these three beside the weights; shapes say the same."""

OPENAI_ACTIVATION = "quick_gelu"
WRAPPERS = re.compile(r"^(?:module\.)+|(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What data parallelism, compilation, sharding and checkpointing put into names."""

BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class Row:
    """original: the pattern of an original name. ours: the patterns of the tensors that it becomes."""

    original: str
    ours: tuple[str, ...]
    transposed: bool = False

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor of this shape can be transposed or split as the row says."""
        if self.transposed:
            return tensor.ndim == 2
        return len(self.ours) == 1 or (tensor.ndim > 0 and len(tensor) > 0 and len(tensor) % len(self.ours) == 0)

    def forward(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if self.transposed:
            return (tensor.T,)
        return (tensor,) if len(self.ours) == 1 else tensor.chunk(len(self.ours))

    def backward(self, tensors: list[Tensor]) -> Tensor:
        if self.transposed:
            return tensors[0].T
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _layer_rows(original: str, ours: str) -> list[Row]:
    """The rows of one residual attention layer; the two transformers share them."""
    attention = f"{ours}.self_attn"
    return [
        Row(f"{original}.ln_1.{{p}}", (f"{ours}.layer_norm1.{{p}}",)),
        Row(f"{original}.attn.in_proj_{{p}}", tuple(f"{attention}.{name}_proj.{{p}}" for name in "qkv")),
        Row(f"{original}.attn.out_proj.{{p}}", (f"{attention}.out_proj.{{p}}",)),
        Row(f"{original}.ln_2.{{p}}", (f"{ours}.layer_norm2.{{p}}",)),
        Row(f"{original}.mlp.c_fc.{{p}}", (f"{ours}.mlp.fc1.{{p}}",)),
        Row(f"{original}.mlp.c_proj.{{p}}", (f"{ours}.mlp.fc2.{{p}}",)),
    ]


TEXT_ROWS = [
    Row("logit_scale", ("logit_scale",)),
    Row("logit_bias", ("logit_bias",)),  # of models trained with the sigmoid loss
    Row("text_projection", ("text_projection.weight",), transposed=True),
    Row("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
    Row("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    Row("ln_final.{p}", ("text_model.final_layer_norm.{p}",)),
    *_layer_rows("transformer.resblocks.{n}", "text_model.encoder.layers.{n}"),
]
VIT_ROWS = [
    Row("visual.class_embedding", ("vision_model.embeddings.class_embedding",)),
    Row("visual.positional_embedding", ("vision_model.embeddings.position_embedding.weight",)),
    Row("visual.conv1.weight", ("vision_model.embeddings.patch_embedding.weight",)),
    Row("visual.ln_pre.{p}", ("vision_model.pre_layrnorm.{p}",)),
    Row("visual.ln_post.{p}", ("vision_model.post_layernorm.{p}",)),
    Row("visual.proj", ("visual_projection.weight",), transposed=True),
    *_layer_rows("visual.transformer.resblocks.{n}", "vision_model.encoder.layers.{n}"),
]
RESNET_ROWS = [
    Row("visual.attnpool.c_proj.{p}", ("visual_projection.{p}",)),
    Row("visual.attnpool.positional_embedding", ("vision_model.attnpool.positional_embedding",)),
    *(Row(f"visual.attnpool.{q}_proj.{{p}}", (f"vision_model.attnpool.{q}_proj.{{p}}",)) for q in "qkv"),
    *(
        Row(f"visual.{stage}{conv}.weight", (f"vision_model.{stage}{conv}.weight",))
        for stage in ("", "layer{s}.{n}.")
        for conv in ("conv1", "conv2", "conv3")
    ),
    *(
        Row(f"visual.{stage}{norm}.{{b}}", (f"vision_model.{stage}{norm}.{{b}}",))
        for stage in ("", "layer{s}.{n}.")
        for norm in ("bn1", "bn2", "bn3")
    ),
    Row("visual.layer{s}.{n}.downsample.0.weight", ("vision_model.layer{s}.{n}.downsample.0.weight",)),
    Row("visual.layer{s}.{n}.downsample.1.{b}", ("vision_model.layer{s}.{n}.downsample.1.{b}",)),
]

_FIELDS = {
    "n": r"\d+",
    "p": "weight|bias",
    "s": "[1-4]",
    "b": "weight|bias|running_mean|running_var|num_batches_tracked",
}


def rows_for(config: HfClipConfig) -> list[Row]:
    """The rows that a model of this configuration needs."""
    return TEXT_ROWS + (RESNET_ROWS if isinstance(config.vision_config, HfClipResNetConfig) else VIT_ROWS)


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.sub(r"\\\{(\w)\\\}", lambda match: f"(?P<{match[1]}>{_FIELDS[match[1]]})", re.escape(template))
    return re.compile(escaped)


def _lookup(names: Iterable[str], rows: list[Row], templates_of: Callable[[Row], tuple[str, ...]]) -> dict[str, tuple]:
    """Find the row that matches each name, and the values of its placeholders. Names without a row are left out."""
    patterns = [(row, _pattern(template)) for row in rows for template in templates_of(row)]
    found = {}
    for name in names:
        for row, pattern in patterns:
            if match := pattern.fullmatch(name):
                found[name] = (row, match.groupdict())
                break
    return found


def _in_short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return one_line(lines[-1].strip(), MOST_SHOWN)


def _list_names(names: Iterable[str], most: int = 6) -> str:
    names = sorted(one_line(name, MOST_SHOWN) for name in names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them: without a training program's wrappers, and without open_clip's `text.`.

    Raises CheckpointError when two tensors would come to bear one name.
    """
    bare: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "n_averaged":  # torch's AveragedModel counts its updates
            continue
        own = name
        while (shorter := WRAPPERS.sub("", own)) != own:
            own = shorter
        own = own.removeprefix("text.")  # where open_clip keeps the text tower of its CustomTextCLIP
        if own in bare:
            raise CheckpointError(
                f"holds two tensors for {one_line(own, MOST_SHOWN)}, one of them as {one_line(name, MOST_SHOWN)}."
            )
        bare[own] = tensor
    return bare


def expected_shapes(config: HfClipConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model with this configuration; nothing is allocated."""
    with torch.device("meta"):
        model = HfClipModel(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not floating-point numbers: the bits of some read as integers are those of no model.

    Raises CheckpointError.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"has {one_line(name, MOST_SHOWN)} of dtype {tensor.dtype}, but weights are floating-point numbers."
            )


def convert_names(state: Mapping[str, Tensor], config: HfClipConfig) -> dict[str, Tensor]:
    """Convert original names to ours. The tensors of the result are views of the given ones.

    Raises CheckpointError that names every unknown or missing tensor, or one of a wrong shape or dtype.
    """
    weights = without_descriptions(state)
    rows = _lookup(weights, rows_for(config), lambda row: (row.original,))
    if unknown := weights.keys() - rows.keys():
        raise CheckpointError(f"holds tensors that no CLIP of this kind has: {_list_names(unknown)}.")
    check_dtypes(weights)
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        row, values = rows[name]
        if not row.fits(tensor):
            raise CheckpointError(
                f"has {one_line(name, MOST_SHOWN)} of shape {tuple(tensor.shape)}, which no CLIP has."
            )
        converted |= zip((ours.format(**values) for ours in row.ours), row.forward(tensor), strict=True)
    expected = expected_shapes(config)
    if unknown := converted.keys() - expected.keys():
        raise CheckpointError(f"holds tensors beyond the model's layers, which become: {_list_names(unknown)}.")
    # Files of before PyTorch 0.4.1 have no counters of batches; nothing in CLIP reads them.
    missing = {name for name in expected.keys() - converted.keys() if not name.endswith("num_batches_tracked")}
    if missing:
        raise CheckpointError(f"lacks tensors of the model: {_list_names(original_names_of(missing, config))}.")
    for name, tensor in converted.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"has {one_line(name, MOST_SHOWN)} of shape {tuple(tensor.shape)} where {expected[name]} is needed."
            )
    return converted


def original_names_of(names: Iterable[str], config: HfClipConfig) -> set[str]:
    """The original tensors that hold these of ours."""
    found = _lookup(names, rows_for(config), lambda row: row.ours)
    return {row.original.format(**values) for row, values in found.values()}


def original_names(state: Mapping[str, Tensor], config: HfClipConfig) -> dict[str, Tensor]:
    """Convert our names to the original's; the exact inverse of `convert_names`.

    Raises CheckpointError that names every unknown or missing tensor.
    """
    rows = _lookup(state, rows_for(config), lambda row: row.ours)
    if unknown := state.keys() - rows.keys():
        raise CheckpointError(f"holds tensors that no original has: {_list_names(unknown)}.")
    originals: dict[str, Tensor] = {}
    for row, values in rows.values():
        original = row.original.format(**values)
        if original in originals:
            continue
        parts = [ours.format(**values) for ours in row.ours]
        if missing := set(parts) - state.keys():
            raise CheckpointError(f"lacks tensors of the model: {_list_names(missing)}.")
        originals[original] = row.backward([state[part] for part in parts])
    expected = original_names_of(expected_shapes(config), config)
    if missing := {name for name in expected - originals.keys() if not name.endswith("num_batches_tracked")}:
        raise CheckpointError(f"lacks what becomes the original's {_list_names(missing)}.")
    return originals


def without_descriptions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone: without the three scalars, and without causal masks, which are constants."""
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in DESCRIPTIVE_SCALARS and not name.endswith(".attn_mask")
    }


def _heads(name: str, width: int) -> int:
    if width % HEAD_WIDTH:
        raise CheckpointError(f"has a {name} of width {width}, but CLIP's widths are multiples of {HEAD_WIDTH}.")
    return width // HEAD_WIDTH


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the layers that the names belong to. Raises CheckpointError if the file has too few tensors for so many."""
    count = len({match[1] for name in state if (match := re.match(pattern, name))})
    if count * TENSORS_OF_A_LAYER > len(state):
        raise CheckpointError(f"names {count} layers, but its {len(state)} tensors are too few for these.")
    return count


def _square_root(cells: int, name: str) -> int:
    side = math.isqrt(max(cells, 0))
    if side**2 != cells or side == 0:
        raise CheckpointError(f"has {cells} positions in {name}, but a square grid is needed.")
    return side


def _vit_config(state: Mapping[str, Tensor], activation: str) -> HfClipViTConfig:
    width, channels, patch_size, _ = state["visual.conv1.weight"].shape
    grid = _square_root(state["visual.positional_embedding"].shape[0] - 1, "visual.positional_embedding")
    return HfClipViTConfig(
        hidden_size=width,
        intermediate_size=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=_count(state, r"visual\.transformer\.resblocks\.(\d+)\."),
        num_attention_heads=_heads("ViT", width),
        num_channels=channels,
        patch_size=patch_size,
        image_size=grid * patch_size,
        hidden_act=activation,
    )


def _resnet_config(state: Mapping[str, Tensor]) -> HfClipResNetConfig:
    stem_width = state["visual.layer1.0.conv1.weight"].shape[0]
    positions = state["visual.attnpool.positional_embedding"].shape[0]
    grid = _square_root(positions - 1, "visual.attnpool.positional_embedding")
    return HfClipResNetConfig(
        depths=[_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)],
        stem_width=stem_width,
        num_attention_heads=_heads("attention pool", 32 * stem_width),
        num_channels=state["visual.conv1.weight"].shape[1],
        image_size=grid * HfClipResNetConfig.total_stride,
    )


def config_from_shapes(state: Mapping[str, Any], activation: str = OPENAI_ACTIVATION) -> HfClipConfig:
    """Derive the configuration from the shapes of tensors with OpenAI's names.

    activation: `hidden_act` of the transformers, which no tensor tells; OpenAI's have QuickGELU

    Raises CheckpointError when these are not the tensors of a CLIP.
    """
    if "text_model.final_layer_norm.weight" in state:
        raise CheckpointError(
            "has been converted already: its tensors have transformers' names. Load its folder with AutoModel."
        )
    try:
        width = state["ln_final.weight"].shape[0]
        vocab_size = state["token_embedding.weight"].shape[0]
        text = HfClipTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            num_hidden_layers=_count(state, r"transformer\.resblocks\.(\d+)\."),
            num_attention_heads=_heads("text tower", width),
            max_position_embeddings=state["positional_embedding"].shape[0],
            **last_special_ids(vocab_size),
            hidden_act=activation,
        )
        vision = _resnet_config(state) if "visual.layer1.0.conv1.weight" in state else _vit_config(state, activation)
        return HfClipConfig(
            text_config=text,
            vision_config=vision,
            projection_dim=state["text_projection"].shape[1],
            contrastive_loss="sigmoid" if "logit_bias" in state else "softmax",
        )
    except KeyError as error:
        names = _list_names(state, most=3) or "none at all"
        raise CheckpointError(
            f"is the checkpoint of another model: OpenAI's CLIP has a tensor {error}, this file has {names}."
        ) from None
    except CheckpointError:
        raise
    except (IndexError, ValueError, StrictDataclassError) as error:
        raise CheckpointError(f"has tensors of shapes that no CLIP has ({_in_short(error)}).") from error


def _architecture(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that describe the architecture: all but those about a file or a class."""
    return {
        name: _architecture(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in BOOKKEEPING
    }


def identify_variant(config: HfClipConfig) -> Variant | None:
    """Find the published model that has this architecture. None if it is none of the nine."""
    architecture = _architecture(config.to_dict())
    for variant in VARIANTS.values():
        if _architecture(HfClipConfig.from_variant(variant.name).to_dict()) == architecture:
            return variant
    return None
