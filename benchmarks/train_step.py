"""How fast a training step is: both towers, the loss, backward, AdamW, beside transformers' example and open_clip.

All models are ViT-B/32 with the same weights and pairs; one step of each in turn, round after round, and medians over
the rounds. Captions have about 12 tokens. Each project pads them as it does by itself: hf_clip's collator to a multiple
of 8 beyond the longest, the loop of transformers' contrastive-image-text example and open_clip to 77. All take
torch's fused AdamW. The losses of the first step must agree. Peak memory is that of a process of its own which makes
three steps; on a GPU, what the model takes and a step adds. bf16 is autocast; fp16 wants a loss scale, which makes it
another step, and is not measured.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from conversion.parity import random_texts
from conversion.reference import load_open_clip_module
from hf_clip import HfClipConfig, HfClipModel
from hf_clip.checkpoints.keys import original_names
from hf_clip.model.variants import get_variant
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.optim import clamp_logit_scale_, create_optimizer

from .ceiling import image_flops, text_flops
from .measuring import (
    OURS,
    PRECISIONS,
    Check,
    Contender,
    LeftOutError,
    Table,
    compare,
    memory_of_this_process,
    run_alone,
    say,
)
from .peers import new_open_clip
from .settings import Settings

OPTIONS = ("precision", "batch")
NEEDS_CEILING = True
IS_ON_CPU = False
VARIANT = "ViT-B/32"
PAIRS, QUICK_PAIRS = 64, 16
ROUNDS, QUICK_ROUNDS = 5, 3
TOKENS = 12
END_OF_TEXT = 49407
CONTEXT = 77
STOCK, OPEN_CLIP = "transformers", "open_clip"
LOSS_TOLERANCE = {"float32": 1e-4, "bf16": 3e-2}

Step = Callable[[], float]


def make_batch(pairs: int) -> dict[str, Tensor]:
    lengths = tuple(TOKENS - 2 + index % 5 for index in range(pairs))
    size = get_variant(VARIANT).image_size
    images = torch.randn(pairs, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return {"pixel_values": images, "input_ids": random_texts(lengths, 49408, CONTEXT)}


def autocast(batch: dict[str, Tensor], precision: str) -> torch.autocast:
    dtype = PRECISIONS[precision]
    device = batch["pixel_values"].device.type
    return torch.autocast(device, torch.bfloat16 if precision == "float32" else dtype, enabled=precision != "float32")


def step_of_ours(batch: dict[str, Tensor], precision: str) -> Step:
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig.from_variant(VARIANT)).train().to(batch["pixel_values"].device)
    optimizer = create_optimizer(model)
    longest = int((batch["input_ids"] == END_OF_TEXT).int().argmax(dim=1).max()) + 1
    ids = batch["input_ids"][:, : -(-longest // 8) * 8]
    mask = (ids != 0).long()

    def step() -> float:
        with autocast(batch, precision):
            outputs = model(pixel_values=batch["pixel_values"], input_ids=ids, attention_mask=mask)
        result = global_contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale)
        result.local_loss_to_backpropagate.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)
        return result.global_loss.item()

    return step


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, fused=True)


def step_of_stock(batch: dict[str, Tensor], precision: str) -> Step:
    torch.manual_seed(0)
    config = HfClipConfig.from_variant(VARIANT)
    weights = HfClipModel(config).state_dict()
    model = transformers.CLIPModel(transformers.CLIPConfig(**config.to_dict())).train()
    model.load_state_dict(weights)
    model = model.to(batch["pixel_values"].device)
    optimizer = adamw(model)
    mask = (batch["input_ids"] != 0).long()

    def step() -> float:
        with autocast(batch, precision):
            loss = model(**batch, attention_mask=mask, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def step_of_open_clip(batch: dict[str, Tensor], precision: str) -> Step:
    torch.manual_seed(0)
    config = HfClipConfig.from_variant(VARIANT)
    weights = original_names(HfClipModel(config).state_dict(), config)
    model: Any = new_open_clip(get_variant(VARIANT)).train()
    losses: Any = load_open_clip_module("loss")
    model.load_state_dict(weights)
    model = model.to(batch["pixel_values"].device)
    criterion, optimizer = losses.ClipLoss(), adamw(model)

    def step() -> float:
        with autocast(batch, precision):
            loss = criterion(*model(batch["pixel_values"], batch["input_ids"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


BUILDERS = {OURS: step_of_ours, STOCK: step_of_stock, OPEN_CLIP: step_of_open_clip}


def step_alone(name: str, pairs: int, precision: str, threads: int) -> int | None:
    """The most memory, in bytes, of a process that makes three steps."""
    torch.set_num_threads(threads)
    step = BUILDERS[name](make_batch(pairs), precision)
    for _ in range(3):
        step()
    return memory_of_this_process("VmHWM")


def same_losses(step: Step, expected: list[float], precision: str) -> Check:
    """A check of the losses before and after an update; `expected` gets them from the first contender, ours."""

    def check(loss: float) -> str | None:
        losses = [loss, step()]
        expected.extend(losses)
        for place, (found, known) in enumerate(zip(losses, expected, strict=False)):
            if abs(found - known) > LOSS_TOLERANCE[precision] * known:
                return f"after {place} updates its loss is {found:.4f}, where {OURS} has {known:.4f}"
        return None

    return check


def table_of(device: str, precision: str, pairs: int, settings: Settings) -> tuple[Table, list[Contender]]:
    variant = get_variant(VARIANT)
    where = ", on the GPU" if device == "cuda" else ""
    table = Table(f"training step, {VARIANT}, {precision}, {pairs} pairs{where}", "pairs", device=device)
    batch = {name: tensor.to(device) for name, tensor in make_batch(pairs).items()}
    lengths = ((batch["input_ids"] == END_OF_TEXT).int().argmax(dim=1) + 1).tolist()
    flops = 3 * (pairs * image_flops(variant) + text_flops(variant, lengths))  # backward is twice as much as forward
    expected: list[float] = []
    contenders = []
    for name, builder in BUILDERS.items():
        say(f"building {name}")
        memory = None
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        try:
            if settings.is_memory_measured and device == "cpu":
                memory = run_alone(step_alone, name=name, pairs=pairs, precision=precision, threads=settings.threads)
            step = builder(batch, precision)
            if device == "cuda":
                memory = torch.cuda.memory_allocated() - before
        except LeftOutError as error:
            table.left_out.append(f"{name} is left out: {error}")
            continue
        ceiling = settings.ceiling(device, precision)
        check = same_losses(step, expected, precision)
        contenders.append(Contender(name, step, pairs, precision, check, flops, ceiling, memory))
    return table, contenders


def run(settings: Settings) -> Iterator[Table]:
    for device in settings.devices:
        for precision in settings.precisions_on(device):
            if precision == "fp16":
                continue
            for pairs in settings.batches or (settings.choose(PAIRS, QUICK_PAIRS),):
                table, contenders = table_of(device, precision, pairs, settings)
                rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
                yield compare(table, contenders, rounds=rounds, seconds=settings.seconds)
