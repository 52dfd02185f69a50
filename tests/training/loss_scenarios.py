"""What the processes of test_losses.py run: a small model of two towers, batches split unevenly, real DDP over gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

import hf_clip  # noqa: F401  (registers the classes)
from hf_clip.training import tiles
from hf_clip.training.distillation import add_distillation, distillation_loss
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import ContrastiveResult, global_contrastive_loss
from hf_clip.training.matryoshka_loss import matryoshka_contrastive_loss

from ..largest_tensor import LargestTensor
from ..small import random_images, texts

EVEN, UNEVEN, EMPTY = {2: [4, 4], 3: [3, 3, 3]}, {2: [5, 2], 3: [4, 3, 1]}, {2: [0, 3], 3: [3, 0, 2]}


@dataclass(frozen=True)
class Scenario:
    """One call of the loss. `counts`, `negatives`: for each number of processes, the pairs and negatives of each."""

    counts: dict[int, list[int]]
    has_image_ids: bool = False
    has_text_ids: bool = False
    negatives: dict[int, list[int]] = field(default_factory=dict)
    has_teacher: bool = False
    options: dict[str, Any] = field(default_factory=dict)


BOTH_IDS = {"has_image_ids": True, "has_text_ids": True}
SIGMOID: dict[str, Any] = {"kind": "sigmoid"}
RING: dict[str, Any] = {"ring": True}
WIDTHS: dict[str, Any] = {"dims": [4, 3, 1], "weights": [1.0, 0.5, 2.0]}
NEGATIVES = {2: [0, 7], 3: [4, 0, 3]}
SCENARIOS = {
    "softmax": Scenario(EVEN),
    "softmax, uneven": Scenario(UNEVEN),
    "softmax, a process without pairs": Scenario(EMPTY),
    "softmax, equal captions": Scenario(UNEVEN, has_text_ids=True),
    "softmax, smoothing": Scenario(UNEVEN, options={"label_smoothing": 0.1}),
    "softmax, duplicates and smoothing": Scenario(UNEVEN, **BOTH_IDS, options={"label_smoothing": 0.1}),
    "sigmoid": Scenario(EVEN, options=SIGMOID),
    "sigmoid, uneven": Scenario(UNEVEN, options=SIGMOID),
    "sigmoid, a process without pairs": Scenario(EMPTY, options=SIGMOID),
    "sigmoid, duplicates": Scenario(UNEVEN, **BOTH_IDS, options=SIGMOID),
    "softmax, ring": Scenario(UNEVEN, options=RING),
    "softmax, ring, a process without pairs": Scenario(EMPTY, options=RING),
    "softmax, ring, duplicates and smoothing": Scenario(UNEVEN, **BOTH_IDS, options=RING | {"label_smoothing": 0.1}),
    "softmax, a teacher": Scenario(UNEVEN, has_teacher=True),
    "sigmoid, ring, a teacher, a process without pairs": Scenario(EMPTY, has_teacher=True, options=SIGMOID | RING),
    "sigmoid, ring, duplicates": Scenario(UNEVEN, **BOTH_IDS, options=SIGMOID | RING),
    "softmax, widths": Scenario(UNEVEN, has_text_ids=True, options=WIDTHS | {"label_smoothing": 0.1}),
    "sigmoid, ring, widths": Scenario(EMPTY, options=SIGMOID | RING | WIDTHS),
    "softmax, negatives": Scenario(UNEVEN, negatives=NEGATIVES),
    "softmax, negatives, a process without pairs": Scenario(EMPTY, negatives=NEGATIVES, **BOTH_IDS),
    "softmax, negatives, smoothing, ring": Scenario(
        UNEVEN, negatives=NEGATIVES, **BOTH_IDS, options=RING | {"label_smoothing": 0.1}
    ),
    "sigmoid, negatives, widths": Scenario(UNEVEN, negatives=NEGATIVES, has_text_ids=True, options=SIGMOID | WIDTHS),
    "sigmoid, negatives, ring": Scenario(UNEVEN, negatives=NEGATIVES, **BOTH_IDS, options=SIGMOID | RING),
}

IMAGE_IDS = torch.tensor([7, 8, 9, 7, 10, 11, 7, 12, 13])
TEXT_IDS = torch.tensor([1, 2, 2, 3, 4, 1, 5, 6, 7])
"""Equal ones stand on one process and on several."""
NEGATIVE_IDS = torch.tensor([2, 8, 3, 9, 4, 8, 5])
"""Some are captions of the pairs, and 3 and 5 of equal images."""


@contextmanager
def small_tiles(rows: int, columns: int) -> Iterator[None]:
    """Within this block a tile of logits has at most so many rows and columns."""
    kept = tiles.TILE_ROWS, tiles.TILE_LOGITS
    tiles.TILE_ROWS, tiles.TILE_LOGITS = {"cpu": rows}, {"cpu": rows * columns}
    yield
    tiles.TILE_ROWS, tiles.TILE_LOGITS = kept


class TwoTowers(nn.Module):
    def __init__(self, has_bias: bool):
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.text_tower = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0)) if has_bias else None

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return normalize(self.image_tower(images), dim=-1), normalize(self.text_tower(texts), dim=-1)


def record_of(result: ContrastiveResult, model: nn.Module) -> dict[str, Any]:
    return {
        "loss": result.global_loss,
        "accuracy": result.global_accuracy,
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


def with_teacher(
    result: ContrastiveResult, images: Tensor, captions: Tensor, scale: Tensor, mine: slice, ring: bool
) -> ContrastiveResult:
    """The sum of a loss and twice the distance from a teacher of other dimensions."""
    generator = torch.Generator().manual_seed(2)
    of_images, of_texts = (normalize(torch.randn(9, 7, generator=generator), dim=-1)[mine] for _ in range(2))
    found = distillation_loss(
        images,
        captions,
        scale,
        local_teacher_images=of_images,
        local_teacher_texts=of_texts,
        teacher_scale=5.0,
        ring=ring,
    )
    distilled = add_distillation(result, found, 2.0)
    return replace(distilled, global_loss=distilled.global_loss + 2 * distilled.global_distillation)


def run_scenario(scenario: Scenario, counts: list[int], process: int, wrap: bool) -> dict[str, Any]:
    """Loss, accuracy and gradients, of the pairs of one process out of len(counts)."""
    model = TwoTowers(has_bias=scenario.options.get("kind") == "sigmoid")
    generator = torch.Generator().manual_seed(1)
    images, captions = torch.randn(9, 6, generator=generator), torch.randn(9, 5, generator=generator)
    wrong = torch.randn(7, 5, generator=generator)
    mine = slice(sum(counts[:process]), sum(counts[: process + 1]))
    local_pairs = mine.stop - mine.start
    towers = DistributedDataParallel(model) if wrap else model
    more: dict[str, Any] = {}
    if scenario.negatives:
        of_each = scenario.negatives[len(counts)] if len(counts) > 1 else [7]
        wrong_mine = slice(sum(of_each[:process]), sum(of_each[: process + 1]))
        captions = torch.cat([captions[mine], wrong[wrong_mine]])
        if scenario.has_text_ids:
            more["local_negative_text_ids"] = NEGATIVE_IDS[wrong_mine]
    else:
        captions = captions[mine]
    image_embeds, text_embeds = towers(images[mine], captions)
    if len(text_embeds) > local_pairs:  # a process without any passes none
        more["local_negative_text_embeds"] = text_embeds[local_pairs:]
    result = matryoshka_contrastive_loss(
        image_embeds,
        text_embeds[:local_pairs],
        model.logit_scale,
        logit_bias=model.logit_bias,
        local_image_ids=IMAGE_IDS[mine] if scenario.has_image_ids else None,
        local_text_ids=TEXT_IDS[mine] if scenario.has_text_ids else None,
        **more,
        **scenario.options,
    )
    if scenario.has_teacher:
        ring = scenario.options.get("ring", False)
        result = with_teacher(result, image_embeds, text_embeds, model.logit_scale, mine, ring)
    result.local_loss_to_backpropagate.backward()
    return record_of(result, model)


def run_model(folder: Path, tower: str, kind: str, process: int) -> dict[str, Any]:
    """Three pairs on process 0 and one on process 1, through a whole model."""
    model = AutoModel.from_pretrained(folder, contrastive_loss=kind).eval()
    mine = slice(0, 3) if process == 0 else slice(3, 4)
    towers = DistributedDataParallel(model)
    outputs = towers(input_ids=texts()[mine], pixel_values=random_images(tower)[mine])
    result = global_contrastive_loss(
        outputs.image_embeds, outputs.text_embeds, model.logit_scale, logit_bias=model.logit_bias, kind=kind
    )
    result.local_loss_to_backpropagate.backward()
    return record_of(result, model)


def micro_batch_loss(images: Tensor, captions: Tensor, scale: Tensor, _: Tensor | None) -> ContrastiveResult:
    return matryoshka_contrastive_loss(images, captions, scale, dims=[images.shape[1], 5], label_smoothing=0.1)


def run_micro_batches(folder: Path, tower: str, process: int, wrap: bool = True) -> dict[str, Any]:
    """Two steps by micro-batches of 2: of four pairs on process 0 and three on process 1, or of all seven on one.

    `exchanged`: how many gradients DDP has exchanged in each step.
    """
    model = AutoModel.from_pretrained(folder).eval()
    exchanged: list[int] = []
    wrapped = DistributedDataParallel(model) if wrap else model
    if wrap:

        def count(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            exchanged[-1] += bucket.buffer().numel()
            return allreduce_hook(dist.group.WORLD, bucket)

        wrapped.register_comm_hook(None, count)
    mine = slice(0, 7) if not wrap else slice(0, 4) if process == 0 else slice(4, 7)
    batch = {"pixel_values": random_images(tower, 7)[mine], "input_ids": texts((5, 9, 3, 12, 7, 4, 6))[mine]}
    for _ in range(2):  # DDP puts its buckets into another order after the first step
        model.zero_grad()
        exchanged.append(0)
        result = backpropagate(model, batch, micro_batch_loss, micro_batch_size=2 if wrap else None, wrapped=wrapped)
    return record_of(result, model) | {"exchanged": exchanged}


def largest_tensor(local: int, kind: str, width: int = 4, ring: bool = False) -> int:
    embeds = [torch.randn(local, width, requires_grad=True) for _ in range(2)]
    ids = torch.arange(local)
    with LargestTensor() as largest:
        bias = torch.tensor(0.0) if kind == "sigmoid" else None
        result = global_contrastive_loss(
            *embeds, torch.tensor(1.0), logit_bias=bias, kind=kind, local_image_ids=ids, local_text_ids=ids, ring=ring
        )
        result.local_loss_to_backpropagate.backward()
    return largest.elements


def refusals(process: int, processes: int) -> list[str]:
    """What each process is told where only the last one's arguments are wrong."""
    is_last = process == processes - 1
    vectors, ids = torch.ones(3, 4), torch.arange(3)
    one = vectors[: 1 if is_last else 0]
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (vectors, vectors[: 2 if is_last else 3], {}),
        (vectors, vectors, {"local_text_ids": ids[: 1 if is_last else 3]}),
        (vectors, vectors, {"local_image_ids": None if is_last else ids}),
        (one, one, {}),
        (vectors, vectors, {"local_negative_text_embeds": one, "local_text_ids": ids}),
    ]
    messages = []
    for image_embeds, text_embeds, options in calls:
        try:
            global_contrastive_loss(image_embeds, text_embeds, torch.tensor(1.0), **options)
        except ValueError as error:
            messages.append(str(error))
    return messages


def run_process(process: int, processes: int, folder: Path, repositories: dict[str, Path]) -> None:
    """One of several processes: everything above, into a file of its own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=process,
        world_size=processes,
        timeout=timedelta(minutes=10),  # for one that waits for another which has stopped
    )
    with small_tiles(2, 3):
        record: dict[str, Any] = {
            name: run_scenario(scenario, scenario.counts[processes], process, wrap=True)
            for name, scenario in SCENARIOS.items()
        }
    for tower, repository in repositories.items():
        for kind in ("softmax", "sigmoid"):
            record[f"{tower}, {kind}"] = run_model(repository, tower, kind, process)
        record[f"{tower}, micro-batches"] = run_micro_batches(repository, tower, process)
    record["largest"] = {kind: largest_tensor(100, kind) for kind in ("softmax", "sigmoid")}
    with small_tiles(10, 10):
        record["largest in a ring"] = largest_tensor(100, "softmax", width=64, ring=True)
    record["refusals"] = refusals(process, processes)
    torch.save(record, folder / f"{process}.pt")
    dist.barrier()
    dist.destroy_process_group()
