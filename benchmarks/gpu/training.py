"""Training steps on the GPU: beside the peers; by micro-batches, with the same gradients in the memory of one.

Dimensions: B pairs of a batch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conversion.reference import load_open_clip_module
from hf_clip import HfClipModel
from hf_clip.evaluation.embedder import Embedder
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import ContrastiveResult, global_contrastive_loss
from hf_clip.training.optim import clamp_logit_scale_, create_optimizer
from hf_clip.training.patch_dropout import drop_patches_
from hf_clip.training.trainable import freeze_batch_norm_

from ..ceiling import image_flops, text_flops
from ..measuring import OURS, Contender, LeftOutError, Table
from ..peers import OPEN_CLIP, STOCK, Batch
from ..train_step import adamw
from .models import (
    Implementations,
    caption_lengths,
    gradients_of,
    make_batch,
    relative_error,
    variant_of,
    worst_gradient,
)
from .report import Setup
from .speed import fastest_product

VARIANT = "ViT-B/32"
PAIRS, TINY_PAIRS = 256, 8
COMPARED, TINY_COMPARED = 64, 8
FEW, MANY, MICRO = 256, 8192, 64
TINY_FEW, TINY_MANY, TINY_MICRO = 8, 16, 4
CACHED, TINY_CACHED = 1024, 16
INPUTS = ("pixel_values", "input_ids", "attention_mask")
SAME = 1e-4
"""What gradients by micro-batches may differ from those of whole batches. In bfloat16: as much as bfloat16 does."""


def contrast(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None) -> ContrastiveResult:
    return global_contrastive_loss(images, texts, scale)


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in INPUTS}


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor], device: str) -> float:
    """One step within autocast to bfloat16. loss_of: backpropagates nothing. Returns the loss."""
    with torch.autocast(device, torch.bfloat16):
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_of_ours(found: Implementations, batch: Batch) -> Callable[[], float]:
    model = found.ours().train()
    freeze_batch_norm_(model)
    optimizer = create_optimizer(model)

    def loss_of() -> Tensor:
        outputs = model(**inputs_of(batch))
        return contrast(outputs.image_embeds, outputs.text_embeds, model.logit_scale, None).local_loss_to_backpropagate

    def step() -> float:
        loss = take_step(model, optimizer, loss_of, found.device)
        clamp_logit_scale_(model)
        return loss

    return step


def step_of_stock(found: Implementations, batch: Batch) -> Callable[[], float]:
    model = found.stock().train()
    given = {"input_ids": batch["padded"], "attention_mask": (batch["padded"] != 0).long()}
    given["pixel_values"] = batch["pixel_values"]
    return partial(take_step, model, adamw(model), lambda: model(**given, return_loss=True).loss, found.device)


def step_of_open_clip(found: Implementations, batch: Batch) -> Callable[[], float]:
    model = found.open_clip().train()
    losses: Any = load_open_clip_module("loss")
    criterion = losses.ClipLoss()
    return partial(
        take_step,
        model,
        adamw(model),
        lambda: criterion(*model(batch["pixel_values"], batch["padded"])),
        found.device,
    )


def steps(setup: Setup) -> None:
    """Both towers, the loss, backward and the fused AdamW, in bfloat16, beside transformers and open_clip."""
    variant, pairs = variant_of(VARIANT, setup.is_dry), setup.choose(PAIRS, TINY_PAIRS)
    found = Implementations(variant, setup.device)
    lengths = caption_lengths(pairs)
    batch = make_batch(variant, pairs, lengths, setup.device)
    table = Table(f"training step, {VARIANT}, bf16, {pairs} pairs", "pairs")
    flops = 3 * (pairs * image_flops(variant) + text_flops(variant, lengths))
    ceiling, losses, contenders = fastest_product(setup, "bf16"), [], []

    def check(loss: float) -> str | None:
        losses.append(loss)
        is_same = abs(loss - losses[0]) <= 3e-2 * losses[0]
        return None if is_same else f"its loss is {loss:.4f}, where {OURS} has {losses[0]:.4f}"

    builders = {OURS: step_of_ours, STOCK: step_of_stock, OPEN_CLIP: step_of_open_clip}
    for name, builder in builders.items():
        before = torch.cuda.memory_allocated() if setup.on_gpu else 0
        try:
            step = builder(found, batch)
        except LeftOutError as error:
            table.left_out.append(f"{name} is left out: {error}")
            continue
        memory = torch.cuda.memory_allocated() - before if setup.on_gpu else None
        contenders.append(Contender(name, step, pairs, "bf16", check, flops, ceiling, memory))
    setup.compare(table, contenders)
    if (ours := table.row(OURS)) is None:
        return
    note = f"{ours.fraction_of_ceiling:.2f} of the fastest product" if setup.on_gpu else ""
    setup.report.figure(table.title, ours.per_second, "pairs/s", note)
    for row in table.rows[1:]:
        setup.report.goal(f"{table.title}: times {row.name}", ours.per_second / row.per_second, 1.2)


def is_fused(setup: Setup) -> None:
    """The optimizer's step is one kernel for all parameters, and its states lie on the GPU."""
    model = Implementations(variant_of(VARIANT, True), setup.device).ours().train()
    optimizer = create_optimizer(model)
    outputs = model(**inputs_of(make_batch(variant_of(VARIANT, True), 4, (8, 9, 10, 11), setup.device)))
    contrast(outputs.image_embeds, outputs.text_embeds, model.logit_scale, None).local_loss_to_backpropagate.backward()
    optimizer.step()
    places = {str(value.device) for state in optimizer.state.values() for value in state.values()}
    fused = all(group.get("fused") for group in optimizer.param_groups)
    setup.report.expect("AdamW is fused", fused and len(places) == 1, f"states on {', '.join(sorted(places))}")


def cached_gradients(setup: Setup) -> None:
    """By micro-batches as with the whole batch, for both kinds of towers, from inputs that lie on the CPU."""
    pairs, size = setup.choose(COMPARED, TINY_COMPARED), setup.choose(16, 3)
    for name in ("RN50", VARIANT):
        variant = variant_of(name, setup.is_dry)
        model = Implementations(variant, setup.device).ours().train()
        freeze_batch_norm_(model)
        batch = inputs_of(make_batch(variant, pairs, caption_lengths(pairs), "cpu"))
        found = {}
        for precision in ("float32", "bf16"):
            for at_once in (None, size):
                with torch.autocast(setup.device, torch.bfloat16, enabled=precision == "bf16"):
                    backpropagate(model, batch, contrast, micro_batch_size=at_once)
                found[precision, at_once] = gradients_of(model)
            limit, _ = worst_gradient(found[precision, None], found["float32", None])
            error, where = worst_gradient(found[precision, size], found[precision, None])
            setup.report.check(f"{name}, {precision}, gradients by micro-batches", error, max(SAME, limit), where)


def replayed_numbers(setup: Setup) -> None:
    """A micro-batch drops the same patches when it is embedded again, though the GPU draws which."""
    variant, pairs = variant_of(VARIANT, setup.is_dry), setup.choose(COMPARED, TINY_COMPARED)
    model = Implementations(variant, setup.device).ours().train()
    drop_patches_(model, 0.5)
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *given: seen.append(given[2].image_embeds.detach().clone()))
    batch = inputs_of(make_batch(variant, pairs, caption_lengths(pairs), setup.device))
    backpropagate(model, batch, contrast, micro_batch_size=pairs // 4)
    hook.remove()
    errors = [relative_error(second, first) for first, second in zip(seen[:4], seen[4:], strict=True)]
    setup.report.check("patches dropped again as before", max(errors), 1e-5)
    with torch.no_grad():
        other = model(**{name: tensor[: pairs // 4] for name, tensor in batch.items()}).image_embeds
    setup.report.expect("and others in the next step", relative_error(other, seen[0]) > 1e-3)


class RandomPairs:
    """Micro-batches of random images and texts, made on the device when they are read, the same every time."""

    def __init__(self, found: Implementations, pairs: int, size: int):
        self.found, self.pairs, self.size = found, pairs, size
        self.texts = make_batch(found.variant, 1, caption_lengths(size), found.device)

    def __len__(self) -> int:
        return -(-self.pairs // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        side = self.found.variant.image_size
        for number in range(len(self)):
            generator = torch.Generator(self.found.device).manual_seed(number)
            images = torch.randn(self.size, 3, side, side, device=self.found.device, generator=generator)
            yield {"pixel_values": images} | {name: self.texts[name] for name in INPUTS[1:]}


def cached_memory(setup: Setup) -> None:
    """A batch 32 times as large takes the memory of its embeddings more. And what a pair costs more in time."""
    variant = variant_of(VARIANT, setup.is_dry)
    few, many, size = setup.choose((FEW, MANY, MICRO), (TINY_FEW, TINY_MANY, TINY_MICRO))
    found = Implementations(variant, setup.device)
    model = found.ours().train()
    optimizer = create_optimizer(model)

    def step(batch: Any, micro_batch_size: int | None = None) -> float:
        with torch.autocast(setup.device, torch.bfloat16):
            result = backpropagate(model, batch, contrast, micro_batch_size=micro_batch_size)
        optimizer.step()
        optimizer.zero_grad()
        return result.global_loss.item()

    peaks = []
    step(RandomPairs(found, 2 * size, size))  # makes the optimizer's states
    for pairs in (few, many):
        setup.forget_peak()
        step(RandomPairs(found, pairs, size))
        setup.synchronize()
        peaks.append(setup.peak())
    features = 2 * 2 * (many - few) * variant.embed_dim * 4  # two modalities; embeddings and their gradients; float32
    if setup.on_gpu:
        what = f"{VARIANT}, bf16, by {size}: memory of {many:,} pairs by {few}'s"
        note = f"{peaks[0] / 2**20:,.0f} and {peaks[1] / 2**20:,.0f} MiB, embeddings {features / 2**20:,.0f} MiB"
        setup.report.check(what, (peaks[1] - features) / peaks[0], 1.1, note)
    pairs = setup.choose(CACHED, TINY_CACHED)
    batch = inputs_of(make_batch(variant, pairs, caption_lengths(pairs), setup.device))
    at_once = pairs // setup.choose(8, 2)
    parts, whole = f"{OURS}, by {at_once}", f"{pairs} pairs at once"
    title = f"{VARIANT}, bf16, {pairs} pairs by micro-batches"
    contenders = [
        Contender(parts, partial(step, batch, at_once), pairs),
        Contender(whole, partial(step, batch), pairs),
    ]
    table = setup.compare(Table(title, "pairs", ours=(parts,)), contenders)
    if (row := table.row(parts)) and (other := table.row(whole)):
        setup.report.goal(f"{title}: speed by the whole batch's", row.per_second / other.per_second, 1 / 1.4)


def divided_encoding(setup: Setup) -> None:
    """A batch that does not fit the GPU's memory is encoded in parts, with the same features."""
    variant = variant_of(VARIANT, setup.is_dry)
    found = Implementations(variant, setup.device)
    model: HfClipModel = found.ours()
    count = setup.choose(1024, 4)
    pixels = make_batch(variant, count, (8,), "cpu")["pixel_values"]
    expected = torch.cat([Embedder(model, None).encode(part) for part in pixels.split(64)])
    embedder = Embedder(model, None)
    if setup.on_gpu:
        torch.cuda.empty_cache()
        room = pixels.numel() * 4 + 256 * 2**20  # for the images, and little more
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + room) / total))
    try:
        features = embedder.encode(pixels)
    finally:
        if setup.on_gpu:
            torch.cuda.set_per_process_memory_fraction(1.0)
    setup.report.check(f"features of {count} images in little memory", relative_error(features, expected), 1e-5)
    if setup.on_gpu:
        at_once = embedder.at_once.get("images", count)
        setup.report.expect("a batch was divided when memory ran out", at_once < count, f"into {at_once} at once")


PARTS = (
    (is_fused, 5.0),
    (cached_gradients, 10.0),
    (replayed_numbers, 5.0),
    (steps, 12.0),
    (cached_memory, 20.0),
    (divided_encoding, 10.0),
)
