"""What a contrastive batch costs that is embedded by micro-batches: the time of a pair, and the memory.

Time: a step (both towers, the loss, backward, AdamW) of ViT-B/32 by micro-batches, beside the same step with the whole
batch in memory, and beside a step that has no more pairs than a micro-batch. The first two must agree in their losses.

Memory: one step with few pairs and one with many, at the same micro-batch, each in a process of its own. A small model
takes seconds for very many pairs, ViT-B/32 minutes for four times as many. Images are made when they are read, since
those of a whole batch would be larger than all else. What is counted is above what the process had before it built its
model.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_clip import HfClipConfig, HfClipModel
from hf_clip.training.gradient_caching import MicroBatches, backpropagate
from hf_clip.training.losses import ContrastiveResult, global_contrastive_loss
from hf_clip.training.optim import clamp_logit_scale_, create_optimizer

from .measuring import OURS, Contender, LeftOutError, Row, Table, compare, memory_of_this_process, run_alone, say
from .settings import Settings
from .train_step import LOSS_TOLERANCE, Step, autocast, make_batch

OPTIONS = ("precision", "batch")
NEEDS_CEILING = False
IS_ON_CPU = False
VARIANT = "ViT-B/32"
PAIRS, QUICK_PAIRS = 64, 16
PARTS = 4
ROUNDS, QUICK_ROUNDS = 5, 3
SMALL_MODEL = "a small model"
MICRO_BATCH = {SMALL_MODEL: 64, VARIANT: 32}
FEW = 256
MANY = {SMALL_MODEL: 8192, VARIANT: 1024}
QUICK_MANY = 1024
SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL_IMAGE, SMALL_TOKENS, SMALL_WIDTH = 96, 24, 512


def loss_of(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor | None) -> ContrastiveResult:
    return global_contrastive_loss(images, texts, scale)


def make_step(model: Any, batch: Mapping[str, Tensor] | MicroBatches, precision: str, size: int | None = None) -> Step:
    """A training step of `batch`, `size` pairs of which are in memory at once."""
    optimizer = create_optimizer(model)
    example = batch if isinstance(batch, Mapping) else next(iter(batch))

    def step() -> float:
        with autocast(dict(example), precision):
            result = backpropagate(model, batch, loss_of, micro_batch_size=size)
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)
        return result.global_loss.item()

    return step


def step_of(batch: dict[str, Tensor], precision: str, size: int | None) -> Step:
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig.from_variant(VARIANT)).train().to(batch["pixel_values"].device)
    return make_step(model, batch, precision, size)


def time_table(device: str, precision: str, pairs: int) -> tuple[Table, list[Contender]]:
    size = max(1, pairs // PARTS)
    where = ", on the GPU" if device == "cuda" else ""
    ours = f"{OURS}, {pairs} pairs by {size}"
    title = f"time of a step by micro-batches, {VARIANT}, {precision}{where}"
    table = Table(title, "pairs", ours=(ours,), device=device)
    batch = {name: tensor.to(device) for name, tensor in make_batch(pairs).items()}
    expected: list[float] = []

    def check(loss: float) -> str | None:
        expected.append(loss)
        is_same = abs(loss - expected[0]) <= LOSS_TOLERANCE[precision] * expected[0]
        return None if is_same else f"its loss is {loss:.4f}, where the other has {expected[0]:.4f}"

    few = {name: tensor[:size] for name, tensor in batch.items()}
    return table, [
        Contender(ours, step_of(batch, precision, size), pairs, precision, check),
        Contender(f"{pairs} pairs at once", step_of(batch, precision, None), pairs, precision, check),
        Contender(f"{size} pairs at once", step_of(few, precision, None), size, precision),
    ]


class RandomPairs:
    """Micro-batches of random images and texts for a model, made when they are read and the same every time."""

    def __init__(self, config: HfClipConfig, pairs: int, size: int):
        self.pairs, self.size, self.side = pairs, size, config.vision_config.image_size
        self.end = int(config.text_config.eos_token_id or 0)

    def __len__(self) -> int:
        return -(-self.pairs // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(self._make, range(len(self)))

    def _make(self, number: int) -> dict[str, Tensor]:
        generator, count = torch.Generator().manual_seed(number), min(self.size, self.pairs - number * self.size)
        ids = torch.randint(1000, (count, SMALL_TOKENS), generator=generator)
        ids[:, -1] = self.end
        shape = (count, 3, self.side, self.side)
        return {"pixel_values": torch.rand(shape, generator=generator), "input_ids": ids}


def config_of(name: str) -> HfClipConfig:
    """The small model's, or one of the nine's."""
    if name != SMALL_MODEL:
        return HfClipConfig.from_variant(name)
    vision = SMALL | {"model_type": "hf_clip_vit", "image_size": SMALL_IMAGE, "patch_size": 16}
    text = SMALL | {"vocab_size": 1002, "max_position_embeddings": SMALL_TOKENS, "bos_token_id": 1000}
    text |= {"eos_token_id": 1001, "pad_token_id": 1001}
    return HfClipConfig(projection_dim=SMALL_WIDTH, vision_config=vision, text_config=text)


def step_alone(name: str, pairs: int, size: int, precision: str, threads: int, device: str) -> tuple[float, int | None]:
    """Seconds of one step, and the most memory of a process that makes it after one with two micro-batches."""
    torch.set_num_threads(threads)
    before, config = memory_of_this_process("VmHWM"), config_of(name)
    torch.manual_seed(0)
    model = HfClipModel(config).train().to(device)
    make_step(model, RandomPairs(config, 2 * size, size), precision)()
    step = make_step(model, RandomPairs(config, pairs, size), precision)
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated()
    after = memory_of_this_process("VmHWM")
    seconds = time.perf_counter() - started
    return seconds, None if before is None or after is None else after - before


def memory_table(name: str, device: str, precision: str, settings: Settings) -> Table:
    size, many = MICRO_BATCH[name], settings.choose(MANY[name], QUICK_MANY)
    ours = f"{OURS}, {FEW:,} pairs by {size}"
    table = Table(f"memory of a step by micro-batches, {name}, {precision}", "pairs", ours=(ours,), device=device)
    chosen: dict[str, Any] = {"size": size, "precision": precision, "threads": settings.threads, "device": device}
    for pairs in (FEW, many):
        row = f"{OURS}, {pairs:,} pairs by {size}"
        say(f"{row} in a process of its own")
        try:
            seconds, memory = run_alone(step_alone, name=name, pairs=pairs, **chosen)
        except LeftOutError as error:
            table.left_out.append(f"{row} is left out: {error}")
            continue
        table.rows.append(Row(row, precision, pairs, [seconds], peak_memory=memory))
    say("")
    if len(table.rows) == 2 and None not in (memories := [row.peak_memory for row in table.rows]):
        features = 2 * (many - FEW) * config_of(name).projection_dim * 4
        more = (memories[1] or 0) - (memories[0] or 0)
        table.notes.append(
            f"{many:,} pairs take {more / 1e6:,.0f} MB more than {FEW:,}, of which {features / 1e6:,.0f} MB are their "
            f"embeddings"
        )
    return table


def run(settings: Settings) -> Iterator[Table]:
    for device in settings.devices:
        for precision in settings.precisions_on(device):
            if precision == "fp16":
                continue
            for pairs in settings.batches or (settings.choose(PAIRS, QUICK_PAIRS),):
                table, contenders = time_table(device, precision, pairs)
                rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
                yield compare(table, contenders, rounds=rounds, seconds=settings.seconds)
            for name in MANY if settings.is_memory_measured else ():
                yield memory_table(name, device, precision, settings)
