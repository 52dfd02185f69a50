"""Find where texts begin and end in a batch of token ids.

The text feature is taken at the first end-of-text id. If the configuration has no such id, it is taken at the highest
id of the row, as in OpenAI's code and in stock configurations that say `eos_token_id: 2`.

Padding on the left is all that `attention_mask` hides before the first token that it shows. Positions are counted from
that token, and an end-of-text id before it is padding.

Invariant: a row without an end of text never gets an ordinary feature. On CPUs it raises EndOfTextError. On GPUs, where
a check would have to wait for the device, and in graphs (compiled, exported, traced, vmapped) its feature is NaN.

Dimensions: T texts, L text length, W tower width.
"""

import torch
from torch import Tensor

from .configuration_hf_clip import HfClipTextConfig

MOST_ROWS_NAMED = 5


class EndOfTextError(ValueError):
    """Some texts in a batch of token ids have no end-of-text id, or begin with padding that no mask hides.

    Attributes:
        rows: Places of these texts in the batch, from 0.
    """

    def __init__(self, message: str, rows: list[int]):
        super().__init__(message)
        self.rows = rows

    def __reduce__(self) -> tuple[type, tuple[str, list[int]]]:
        return type(self), (str(self), self.rows)


def find_starts(attention_mask: Tensor | None) -> Tensor | None:
    """Count the positions that a mask (T, L) hides before each text → (T, 1).

    Returns None if there is no mask, or if the mask is known to hide nothing before any text.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    shown = attention_mask.ne(0)
    return None if _rows(~shown[:, 0]) == [] else shown.int().argmax(dim=-1, keepdim=True)


def count_positions(starts: Tensor, length: int) -> Tensor:
    """Count positions (T, L) from each text's first token, which has position 0, like the padding before it."""
    return (torch.arange(length, device=starts.device) - starts).clamp(min=0)


def find_ends(input_ids: Tensor, starts: Tensor | None, config: HfClipTextConfig) -> tuple[Tensor, Tensor | None]:
    """Find the position of each text's feature.

    Args:
        input_ids: (T, L) token ids.
        starts: (T, 1), from `find_starts`. None if every row begins with its text.
        config: Configuration with the ids of start and end.

    Returns:
        The positions (T,). And on GPUs and in graphs, where no error can be raised, which rows have no end (T,), bool;
        else None.

    Raises:
        EndOfTextError: A row has no end of text, or has padding on the left that no mask hides.
    """
    starts = None if starts is None else starts.to(input_ids.device)
    is_text = None if starts is None else torch.arange(input_ids.shape[-1], device=input_ids.device) >= starts
    shown = input_ids if is_text is None else input_ids.where(is_text, -1)
    if config.eos_token_id is None:
        return shown.int().argmax(dim=-1), None
    is_end = shown == config.eos_token_id
    is_endless = ~is_end.any(dim=-1)
    rows = _rows(is_endless)
    if rows:
        raise EndOfTextError(
            f"input_ids hold no end-of-text id {config.eos_token_id} in {_named(rows)}, but the text feature is taken "
            f"there. Tokenize with the tokenizer that was saved with the model; it keeps the end when it truncates.",
            rows,
        )
    # In CLIP's vocabularies the start has the id before the end. Any other start id is a default of some configuration,
    # which may be the id of an ordinary word.
    if config.bos_token_id is not None and config.bos_token_id + 1 == config.eos_token_id:
        is_start = shown == config.bos_token_id
        is_first = is_start[:, 0] if starts is None else is_start.gather(1, starts)[:, 0]
        is_late = is_start.any(dim=-1) & ~is_first
        if late := _rows(is_late):
            raise EndOfTextError(
                f"input_ids begin with other tokens than the start-of-text id {config.bos_token_id} in {_named(late)}: "
                f"padding on the left. Pass the tokenizer's attention_mask too, or pad on the right.",
                late,
            )
        is_endless = is_endless | is_late
    return is_end.int().argmax(dim=-1), is_endless if rows is None else None


def pool_at(hidden: Tensor, ends: Tensor, is_endless: Tensor | None) -> Tensor:
    """Select the hidden state at the end of each text.

    Args:
        hidden: (T, L, W), after the final LayerNorm.
        ends: (T,) positions.
        is_endless: (T,) bool, true for rows without an end. None if there are none.

    Returns:
        Features (T, W), with NaN for rows without an end.
    """
    ends = ends.to(hidden.device)
    pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]
    if is_endless is None:
        return pooled
    return pooled.masked_fill(is_endless.to(hidden.device)[:, None], float("nan"))


def must_wait_for(tensor: Tensor) -> bool:
    """Whether the program would have to wait for another device to read a value of a tensor."""
    return tensor.device.type != "cpu"


def _rows(flags: Tensor) -> list[int] | None:
    """List the places of the flags (T,) that are set. None on a GPU and in a graph, where they cannot be read."""
    if must_wait_for(flags) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    try:
        return flags.nonzero().flatten().tolist() if bool(flags.any()) else []
    except RuntimeError:  # torch.vmap, and tensors without values
        return None


def _named(rows: list[int]) -> str:
    more = f" and {len(rows) - MOST_ROWS_NAMED} more" if len(rows) > MOST_ROWS_NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:MOST_ROWS_NAMED]))}{more}"


__all__ = ["EndOfTextError"]
