"""Changes to a model before it is trained: images of another size, longer texts, another loss.

Invariant: tensors that a change does not concern stay bit-equal. Model, configuration and processor change together,
so that the saved folder works by itself. Change a model before it is locked, adapted, wrapped or given to an optimizer.

Dimensions: P positions, W tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..model.position_table import resize_position_table
from ..zero_shot.features import image_processor_of, tokenizer_of
from .losses import INITIAL_SIGMOID_LOGIT_BIAS, INITIAL_SIGMOID_LOGIT_SCALE

KEPT_POSITIONS = 20
"""Captions were mostly shorter, so that later positions learned little (Zhang et al. 2024, section 3.1)."""


def _replace_parameter(module: nn.Module, name: str, values: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(values.to(old.device, old.dtype).clone(), requires_grad=old.requires_grad))


def _replace_embedding(module: Any, table: Tensor) -> None:
    """Give `module.position_embedding` other rows (P, W)."""
    embedding = module.position_embedding
    _replace_parameter(embedding, "weight", table)
    embedding.num_embeddings = table.shape[0]


@torch.no_grad()
def set_image_size_(model: Any, processor: Any, image_size: int) -> None:
    """Make a model take images of another size, and its processor make them (Touvron et al. 2019, FixRes).

    The position table of a ViT or an attention pool is resampled bicubically. The processor's `size` keeps its ratio to
    the crop.

    Args:
        model: An HfClipModel.
        processor: The model's.
        image_size: In pixels.

    Raises:
        ValueError: The tower's patches or strides do not divide the size.
    """
    vision = model.vision_model
    is_resnet = hasattr(vision, "attnpool")
    unit = vision.config.total_stride if is_resnet else vision.config.patch_size
    if image_size < unit or image_size % unit:
        below, above = max(image_size // unit, 1) * unit, (max(image_size, 0) // unit + 1) * unit
        near = " or ".join(map(str, sorted({below, above})))
        raise ValueError(
            f"image_size is {image_size}, but this image tower divides images by {unit}: take {near}, for example."
        )
    old_size, old_grid, grid = vision.config.image_size, vision.config.grid_size, image_size // unit
    if grid != old_grid:
        holder = vision.attnpool if is_resnet else vision.embeddings
        if is_resnet:
            table = resize_position_table(holder.positional_embedding, old_grid, grid, grid)
            _replace_parameter(holder, "positional_embedding", table)
        else:
            _replace_embedding(holder, resize_position_table(holder.position_embedding.weight, old_grid, grid, grid))
        holder.grid_size = grid
    vision.config.image_size = model.config.vision_config.image_size = image_size
    image_processor = image_processor_of(processor)
    size = {name: round(side * image_size / old_size) for name, side in dict(image_processor.size).items() if side}
    image_processor.size = type(image_processor.size)(**size) if size else image_processor.size
    crop = image_processor.crop_size
    image_processor.crop_size = type(crop)(height=image_size, width=image_size)


def stretch_positions(table: Tensor, length: int, kept: int = KEPT_POSITIONS) -> Tensor:
    """Stretch a position table: the first rows stay, the others are spread out evenly and interpolated.

    New row t ≥ kept stands at kept + (t − kept) / ratio of the old table, where ratio = (length − kept) / (P − kept).
    From 77 to 248 rows that is 4. Behind the last old row the line through the last two goes on.

    Args:
        table: (P, W)
        length: Rows of the new table.
        kept: The first rows, which stay as they are.

    Returns:
        (length, W)
    """
    old = table.shape[0]
    places = kept + torch.arange(length - kept, dtype=torch.float64) * (old - kept) / (length - kept)
    lower = places.floor().long().clamp(max=old - 2)
    weight = (places - lower).to(table.device)[:, None]  # above 1 behind the last row
    wide = table.double()
    stretched = wide[lower] + (wide[lower + 1] - wide[lower]) * weight
    return torch.cat([table[:kept], stretched.to(table.dtype)])


@torch.no_grad()
def set_text_length_(model: Any, processor: Any, length: int) -> None:
    """Make a model and its tokenizer take longer texts (Zhang et al. 2024, Long-CLIP, section 3.1).

    Texts of up to 20 tokens keep their features.

    Args:
        model: An HfClipModel.
        processor: The model's.
        length: In tokens.

    Raises:
        ValueError: The model takes longer texts already, or has too few positions to stretch.
    """
    embeddings = model.text_model.embeddings
    table = embeddings.position_embedding.weight
    if length < len(table):
        raise ValueError(
            f"max_text_length is {length}, but this model takes {len(table)} tokens already: take more, or leave it "
            f"out. To cut texts off, truncate them."
        )
    if length > len(table):
        if len(table) < KEPT_POSITIONS + 2:
            raise ValueError(
                f"This model's position table has {len(table)} rows, of which the first {KEPT_POSITIONS} are kept: too "
                f"few are left to interpolate {length} from. Train a model of that length from scratch."
            )
        _replace_embedding(embeddings, stretch_positions(table, length))
    model.text_model.config.max_position_embeddings = length
    model.config.text_config.max_position_embeddings = length
    tokenizer_of(processor).model_max_length = length


def switch_to_sigmoid_(model: Any) -> None:
    """Give a model the sigmoid loss, with logit scale ln 10 and logit bias −10, with which SigLIP begins.

    The configuration says so. Wherever scores are computed the sigmoid is then taken. A model that has this loss
    already is left as it is.

    Args:
        model: An HfClipModel.
    """
    if model.config.contrastive_loss == "sigmoid":
        return
    model.config.contrastive_loss = "sigmoid"
    model.config.logit_scale_init_value, model.config.logit_bias_init_value = (
        INITIAL_SIGMOID_LOGIT_SCALE,
        INITIAL_SIGMOID_LOGIT_BIAS,
    )
    _replace_parameter(model, "logit_scale", torch.tensor(INITIAL_SIGMOID_LOGIT_SCALE))
    scale = model.logit_scale
    model.logit_bias = nn.Parameter(torch.tensor(INITIAL_SIGMOID_LOGIT_BIAS, device=scale.device, dtype=scale.dtype))
