"""The contrastive loss on the GPU: exact, in linear memory, and how fast for 8k to 128k pairs.

Exactness is against the loss as it is written down, with all logits, in float64 on the same GPU.

Dimensions: N pairs, D = 512.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_clip.training import tiles
from hf_clip.training.losses import global_contrastive_loss

from ..loss import ON_A_GPU, PLAIN, WIDTH, leaves_of, same_values, step_of
from ..measuring import OURS, Contender, Table
from .models import relative_error
from .report import LEFT_OUT, Setup
from .speed import fastest_product

EXACT, TINY_EXACT = 12288, 96
PAIRS, TINY_PAIRS = tuple(1024 * 2**power for power in range(3, 8)), (64, 128)
SWEPT, TINY_SWEPT = 32768, 128
ROWS, COLUMNS = (2048, 4096, 8192, 16384), (2048, 4096, 8192)
TINY_ROWS, TINY_COLUMNS = (32, 64), (32,)
LIMIT = 1e-5
TENSORS_OF_PLAIN = 5
FIELDS = ("images", "texts", "logit scale", "logit bias")


@contextmanager
def tiles_of(device: str, rows: int, columns: int) -> Iterator[None]:
    """Within this block the loss takes tiles of another size."""
    kind = torch.device(device).type
    before = tiles.TILE_ROWS[kind], tiles.TILE_LOGITS[kind]
    tiles.TILE_ROWS[kind], tiles.TILE_LOGITS[kind] = rows, rows * columns
    try:
        yield
    finally:
        tiles.TILE_ROWS[kind], tiles.TILE_LOGITS[kind] = before


def whole_loss(leaves: Sequence[Tensor], kind: str, smoothing: float, ids: Tensor | None) -> Tensor:
    """The loss with all logits, (N, N). ids: (N,) of the captions; equal ones are no negatives of each other."""
    images, texts, scale, bias = leaves
    own = torch.eye(len(images), dtype=torch.bool, device=images.device)
    left_out = torch.zeros_like(own) if ids is None else (ids[:, None] == ids) & ~own
    logits = scale.exp() * images @ texts.T
    if kind == "sigmoid":
        terms = logsigmoid(torch.where(own, logits + bias, -logits - bias))
        return -terms.masked_fill(left_out, 0.0).sum() / len(images)
    total = logits.new_zeros(())
    for lines in (logits, logits.T):
        log_p = lines.masked_fill(left_out, -torch.inf).log_softmax(1)
        means = log_p.masked_fill(left_out, 0.0).sum(1) / (~left_out).sum(1)
        total = total - ((1 - smoothing) * log_p.diagonal() + smoothing * means).sum()
    return total / (2 * len(images))


def exactness(setup: Setup) -> None:
    """Loss and all gradients beside float64: two kinds, smoothing, duplicates, within autocast, several tiles."""
    pairs = setup.choose(EXACT, TINY_EXACT)
    if 16 * 8 * pairs**2 > setup.free_memory():
        pairs = 4096
    repeated = torch.arange(pairs, device=setup.device) // 2 * 2
    cases: dict[str, dict[str, Any]] = {
        "softmax": {},
        "softmax, smoothed, duplicates": {"smoothing": 0.1, "ids": repeated},
        "sigmoid, duplicates": {"kind": "sigmoid", "ids": repeated},
    }
    for name, case in cases.items():
        kind, smoothing, ids = case.get("kind", "softmax"), case.get("smoothing", 0.0), case.get("ids")
        wanted = [leaf.detach().double().requires_grad_() for leaf in leaves_of(pairs, setup.device)]
        expected = whole_loss(wanted, kind, smoothing, ids)
        expected.backward()
        leaves = leaves_of(pairs, setup.device)
        options: dict[str, Any] = {"kind": kind, "label_smoothing": smoothing, "local_text_ids": ids}
        options["logit_bias"] = leaves[3] if kind == "sigmoid" else None
        with (
            tiles_of(setup.device, *setup.choose((4096, 4096), (32, 64))),
            torch.autocast(setup.device, torch.bfloat16),
        ):
            result = global_contrastive_loss(*leaves[:3], **options)
            result.local_loss_to_backpropagate.backward()
        errors = {"loss": relative_error(result.global_loss, expected)}
        for field, leaf, want in zip(FIELDS, leaves, wanted, strict=True):
            if want.grad is not None:
                assert leaf.grad is not None
                errors[field] = relative_error(leaf.grad, want.grad)
        del expected, wanted
        where = max(errors, key=lambda field: errors[field])
        setup.report.check(f"{name}, {pairs:,} pairs: loss and gradients", errors[where], LIMIT, f"worst: {where}")


def present(setup: Setup, pairs: int) -> list[str]:
    """The losses that can be computed here."""
    found = [OURS]
    if TENSORS_OF_PLAIN * 4 * pairs**2 < 0.8 * setup.free_memory():
        found.append(PLAIN)
    return found + [name for name in ON_A_GPU if setup.on_gpu and find_spec(name) is not None]


def speed(setup: Setup) -> None:
    """Forward and backward, beside the plain loss and the nearest peers."""
    for name in ON_A_GPU:
        if find_spec(name) is None:
            setup.report.add(f"beside {name}", LEFT_OUT, note=f"it is not installed: pip install {name}")
    for pairs in setup.choose(PAIRS, TINY_PAIRS):
        title = f"loss and gradients, {pairs:,} pairs"
        if not setup.report.has_time(title, 12.0 if pairs > 65536 else 5.0):
            return
        leaves, before = leaves_of(pairs, setup.device), fastest_product(setup, "float32")
        expected: list[float] = []
        flops = 3 * 2 * WIDTH * pairs**2  # of the plain one: logits, and two gradients
        memory = 0 if setup.on_gpu else None  # to which the measuring adds what a step takes
        contenders = [
            Contender(
                name, step_of(name, "softmax", leaves), pairs, "", same_values(expected, name), flops, before, memory
            )
            for name in present(setup, pairs)
        ]
        table = setup.compare(Table(title, "pairs"), contenders)
        if (ours := table.row(OURS)) is None:
            continue
        fraction = f"{ours.fraction_of_ceiling:.2f} of {before / 1e12:,.0f} TFLOP/s" if setup.on_gpu else ""
        setup.report.figure(title, 1000 * pairs / ours.per_second, "ms", fraction)
        if ours.peak_memory is not None:
            setup.report.figure(f"{title}: memory", ours.peak_memory / 2**20, "MiB")
        for peer in ON_A_GPU:
            if row := table.row(peer):
                times = ours.per_second / row.per_second
                setup.report.goal(f"{title}: times as fast as {peer}", times, 1 / 1.2, "which multiplies in TF32")


def tile_sizes(setup: Setup) -> None:
    """Whether other tiles would be faster."""
    kind, pairs = torch.device(setup.device).type, setup.choose(SWEPT, TINY_SWEPT)
    leaves = leaves_of(pairs, setup.device)
    own = f"{OURS}, {tiles.TILE_ROWS[kind]} x {tiles.TILE_LOGITS[kind] // tiles.TILE_ROWS[kind]}"
    contenders = [Contender(own, step_of(OURS, "softmax", leaves), pairs)]
    for rows in setup.choose(ROWS, TINY_ROWS):
        for columns in setup.choose(COLUMNS, TINY_COLUMNS):
            contenders.append(
                Contender(f"{rows} x {columns}", partial(in_tiles, setup.device, rows, columns, leaves), pairs)
            )
    table = setup.compare(Table(f"sizes of tiles, {pairs:,} pairs", "pairs", ours=(own,)), contenders)
    if (mine := table.row(own)) is not None:
        best = max(table.rows, key=lambda row: row.per_second)
        setup.report.goal("speed of the chosen tiles by the best", mine.per_second / best.per_second, 0.95, best.name)


def in_tiles(device: str, rows: int, columns: int, leaves: Any) -> list[float]:
    with tiles_of(device, rows, columns):
        return step_of(OURS, "softmax", leaves)()


def in_tf32(setup: Setup) -> None:
    """What TF32 does to the loss, for those who allow it."""
    if not setup.on_gpu:
        return
    pairs = 8192
    leaves = leaves_of(pairs, setup.device)
    step = step_of(OURS, "softmax", leaves)
    step()
    exact = [leaf.grad.clone() for leaf in leaves[:3] if leaf.grad is not None]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        step()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    error = max(
        relative_error(leaf.grad, want) for leaf, want in zip(leaves, exact, strict=False) if leaf.grad is not None
    )
    setup.report.figure("gradients in TF32 beside float32: relative error", error, "")


PARTS = ((exactness, 10.0), (speed, 12.0), (tile_sizes, 10.0), (in_tf32, 2.0))
