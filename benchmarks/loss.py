"""How fast the contrastive loss is, and how much memory it takes: forward and backward, for batches of 1k to 32k pairs.

Features are random, 512 wide, float32. hf_clip's loss is called as the trainer calls it: with the ids of images and
captions, so that it looks for duplicates, of which there are none. `plain` is the loss as it is written down, with all
logits; it is left out where these take more than half of the machine's memory. memeff and inf_cl have kernels for a GPU
alone, which multiply in TF32, and memeff gives no gradient of the temperature. Memory is what comes on top of features
and gradients, of a process of its own that does it once.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from hf_clip.training.losses import global_contrastive_loss

from .machine import memory_gigabytes
from .measuring import (
    OURS,
    Check,
    Contender,
    LeftOutError,
    Row,
    Table,
    compare,
    forget_peak_memory,
    memory_of_this_process,
    run_alone,
    say,
)
from .ratio_chart import GREY, MARKS, import_pyplot, save
from .settings import Settings

OPTIONS = ("batch",)
NEEDS_CEILING = True
IS_ON_CPU = False
PAIRS, QUICK_PAIRS = tuple(1024 * 2**power for power in range(6)), (1024, 2048)
SIGMOID_PAIRS = 8192
WIDTH = 512
ROUNDS, ROUNDS_OF_LARGE, LARGE = 5, 1, 32768
PLAIN, MEMEFF, INF_CL = "plain", "memeff", "inf_cl"
ON_A_GPU = (MEMEFF, INF_CL)
TENSORS_OF_PLAIN = 5
"""How many tensors of all logits, (N, N), the plain loss has at one time, at least."""
TOLERANCE, TOLERANCE_OF_TF32 = 1e-4, 2e-3

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Leaves, str], Tensor]


def leaves_of(pairs: int, device: str) -> Leaves:
    """Images, texts, (N, D), logit scale and logit bias, as training begins."""
    generator = torch.Generator().manual_seed(0)
    features = [normalize(torch.randn(pairs, WIDTH, generator=generator), dim=-1) for _ in range(2)]
    images, texts, scale, bias = (
        value.to(device).requires_grad_() for value in (*features, torch.tensor(1 / 0.07).log(), torch.tensor(-10.0))
    )
    return images, texts, scale, bias


def loss_of_ours(leaves: Leaves, kind: str) -> Tensor:
    images, texts, scale, bias = leaves
    ids = torch.arange(len(images), device=images.device)
    return global_contrastive_loss(
        images,
        texts,
        scale,
        logit_bias=bias if kind == "sigmoid" else None,
        kind=kind,  # type: ignore[arg-type]
        local_image_ids=ids,
        local_text_ids=ids,
    ).local_loss_to_backpropagate


def plain_loss(leaves: Leaves, kind: str) -> Tensor:
    images, texts, scale, bias = leaves
    logits = scale.exp() * images @ texts.T
    if kind == "sigmoid":
        signs = 2 * torch.eye(len(images), device=images.device) - 1
        return -logsigmoid(signs * (logits + bias)).sum() / len(images)
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    return -(rows.mean() + columns.mean()) / 2


def loss_of_inf_cl(leaves: Leaves, kind: str) -> Tensor:
    images, texts, scale, _ = leaves
    one_way: Any = importlib.import_module("inf_cl").cal_flash_loss
    return (one_way(images, texts, scale=scale.exp()) + one_way(texts, images, scale=scale.exp())).mean() / 2


def loss_of_memeff(leaves: Leaves, kind: str) -> Tensor:
    images, texts, scale, _ = leaves
    loss: Any = importlib.import_module("memeff").MemoryEfficientCLIPLoss
    return loss(1 / scale.exp().item(), normalized_inputs=True, stable=False)(images, texts)


LOSSES: dict[str, Loss] = {
    OURS: loss_of_ours,
    PLAIN: plain_loss,
    MEMEFF: loss_of_memeff,
    INF_CL: loss_of_inf_cl,
}


def check_fit(name: str, kind: str, pairs: int, device: str) -> None:
    """Raises LeftOutError where a loss cannot be computed here."""
    if name in ON_A_GPU:
        if device != "cuda" or kind != "softmax":
            raise LeftOutError("it has the softmax loss on a GPU alone")
        if importlib.util.find_spec(name) is None:
            raise LeftOutError(f"it is not installed: pip install {name}")
    if name == PLAIN:
        is_gpu = device == "cuda"
        there = torch.cuda.get_device_properties(0).total_memory / 1e9 if is_gpu else memory_gigabytes() or 8.0
        needed = TENSORS_OF_PLAIN * 4 * pairs**2 / 1e9
        if needed > there / 2:
            raise LeftOutError(f"its logits take {needed:.0f} GB and more, of {there:.0f} GB")


def step_of(name: str, kind: str, leaves: Leaves) -> Callable[[], list[float]]:
    """Forward and backward; returns the loss, and the gradient of the scale."""

    def step() -> list[float]:
        for leaf in leaves:
            leaf.grad = None
        loss = LOSSES[name](leaves, kind)
        loss.backward()
        return [loss.item(), leaves[2].grad.item() if leaves[2].grad is not None else float("nan")]

    return step


def memory_alone(name: str, kind: str, pairs: int, threads: int) -> int | None:
    """Bytes that a process needs above features and gradients, at most. None where the system does not tell."""
    torch.set_num_threads(threads)
    step_of(name, kind, leaves_of(64, "cpu"))()  # libraries, threads
    leaves = leaves_of(pairs, "cpu")
    gradients = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    forget_peak_memory()
    before = memory_of_this_process("VmRSS")
    step_of(name, kind, leaves)()
    after = memory_of_this_process("VmHWM")
    return None if before is None or after is None else after - before - gradients


def same_values(expected: list[float], name: str = "") -> Check:
    """A check of a contender's loss and gradient; `expected` gets them from the first one, ours."""
    tolerance = TOLERANCE_OF_TF32 if name in ON_A_GPU else TOLERANCE

    def check(found: list[float]) -> str | None:
        expected.extend(found if not expected else ())
        for what, value, known in zip(("loss", "gradient of the scale"), found, expected, strict=True):
            if name == MEMEFF and what != "loss":
                continue
            if not abs(value - known) <= tolerance * abs(known):
                return f"its {what} is {value:.6g}, where {OURS} has {known:.6g}"
        return None

    return check


def table_of(device: str, kind: str, pairs: int, settings: Settings) -> Table:
    where = ", on the GPU" if device == "cuda" else ""
    table = Table(f"contrastive loss, {kind}, {pairs:,} pairs{where}", "pairs", device=device)
    leaves, ceiling = leaves_of(pairs, device), settings.ceiling(device, "float32")
    expected: list[float] = []
    flops = 3 * 2 * WIDTH * pairs**2  # of the plain one: logits, and two gradients
    contenders = []
    for name in LOSSES:
        memory = None
        try:
            check_fit(name, kind, pairs, device)
            if settings.is_memory_measured and device == "cpu":
                say(f"memory of {name}")
                memory = run_alone(memory_alone, name=name, kind=kind, pairs=pairs, threads=settings.threads)
        except LeftOutError as error:
            table.left_out.append(f"{name} is left out: {error}")
            continue
        if device == "cuda":
            memory = 0  # to which the measuring adds what a step takes
        check = same_values(expected, name)
        contenders.append(Contender(name, step_of(name, kind, leaves), pairs, "", check, flops, ceiling, memory))
    rounds = settings.rounds or (ROUNDS_OF_LARGE if pairs >= LARGE else ROUNDS)
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def run(settings: Settings) -> Iterator[Table]:
    sizes = settings.batches or settings.choose(PAIRS, QUICK_PAIRS)
    for device in settings.devices:
        for pairs in sizes:
            yield table_of(device, "softmax", pairs, settings)
        for pairs in sizes:
            if pairs == SIGMOID_PAIRS or settings.quick:
                yield table_of(device, "sigmoid", pairs, settings)


def draw(path: Path, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """Draw time and memory of the softmax loss over the number of pairs; nothing where there is no such table."""
    tables = [table for table in tables if "softmax" in table.title]
    rows = [(table.device, row) for table in tables for row in table.rows]
    if not rows:
        return
    plt = import_pyplot()
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("seconds, forward and backward", lambda row: row.amount / row.per_second),
        ("MiB above features and gradients", lambda row: None if row.peak_memory is None else row.peak_memory / 2**20),
    ]
    panels = [(title, value) for title, value in panels if any((value(row) or 0) > 0 for _, row in rows)]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(10, 4.2), layout="constrained", squeeze=False)
    contenders = list(dict.fromkeys((row.name, device) for device, row in rows))
    sizes = sorted({row.amount for _, row in rows})
    for axes, (title, value) in zip(all_axes[0], panels, strict=True):
        for contender, (colour, shape) in zip(contenders, MARKS, strict=False):
            points = [(row.amount, value(row)) for device, row in rows if (row.name, device) == contender]
            known = [(pairs, figure) for pairs, figure in points if figure is not None and figure > 0]
            label = contender[0] if contender[1] == "cpu" else f"{contender[0]}, on the GPU"
            axes.plot(*zip(*known, strict=True), color=colour, marker=shape, markersize=5, linewidth=1.4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
        axes.set_xlabel("pairs in the batch", fontsize=9)
        axes.set_title(title, fontsize=10, loc="left")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].legend(frameon=False, fontsize=9)
    machine = f"{facts['machine']['processor']}, {facts['threads']} threads, {facts['date'][:10]}"
    figure.suptitle(f"The softmax loss, {WIDTH} wide, float32   ({machine})", fontsize=11)
    save(figure, path)
