"""Learned positions on a square grid. They fit images of one size; for other sizes the table is resampled on request.

Dimensions: B batch, C channels, Y × X pixels, W tower width.
"""

import torch
from torch import Tensor, nn

from .configuration_hf_clip import HfClipResNetConfig, HfClipViTConfig


def check_image_size(
    pixel_values: Tensor | None, config: HfClipViTConfig | HfClipResNetConfig, interpolate: bool, smallest: int
) -> Tensor:
    """Return the images (B, C, Y, X). Raises ValueError for images that the tower does not take.

    Args:
        pixel_values: The images.
        config: Configuration of the image tower.
        interpolate: Whether the positions will be resampled, so that images of any size fit.
        smallest: Least number of pixels each way.
    """
    if not isinstance(pixel_values, Tensor):
        raise ValueError(
            f"The image tower needs pixel_values as a tensor, but got {type(pixel_values).__name__}: pass what "
            f'HfClipImageProcessor returns with return_tensors="pt".'
        )
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, but (batch, {config.num_channels}, height, width) "
            f"is needed. Preprocess with HfClipImageProcessor."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, but the tower takes normalised floating-point images. "
            f"Preprocess with HfClipImageProcessor."
        )
    height, width = pixel_values.shape[-2:]
    size = config.image_size
    if not interpolate and (height, width) != (size, size):
        raise ValueError(
            f"pixel_values are {height}x{width}, but this checkpoint's position table fits only {size}x{size}. "
            f"Preprocess with HfClipImageProcessor, or pass interpolate_pos_encoding=True."
        )
    if min(height, width) < smallest:
        raise ValueError(
            f"pixel_values are {height}x{width}, but this image tower needs at least {smallest} pixels each way."
        )
    return pixel_values


def resize_position_table(table: Tensor, old_grid: int, new_height: int, new_width: int) -> Tensor:
    """Resample a table of learned positions from a square grid to another grid, bicubically.

    Args:
        table: (1 + old_grid², W). The first row belongs to the class token, or the mean, which has no place on the
            grid; it stays as it is.
        old_grid: Cells along a side of the square grid.
        new_height: Rows of the new grid.
        new_width: Columns of the new grid.

    Returns:
        The new table (1 + new_height · new_width, W), in the dtype of the old one.
    """
    first, grid = table[:1], table[1:]
    grid = grid.T.reshape(1, -1, old_grid, old_grid).float()  # (1, W, old, old); bicubic needs float32
    grid = nn.functional.interpolate(grid, size=(new_height, new_width), mode="bicubic", align_corners=False)
    return torch.cat([first, grid[0].flatten(1).T.to(table.dtype)])
