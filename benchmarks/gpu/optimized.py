"""Models after `optimize_for_inference`: the same results call after call, from every thread, and no call that waits.

What is called for the second time with a shape may become a CUDA graph, and later calls are replays of it. So each call
is made several times, with other inputs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..measuring import PRECISIONS, first_line, worst_error
from ..peers import Batch
from .models import Implementations, caption_lengths, make_batch, relative_error, variant_of
from .parity import FLOOR, KINDS, LENGTHS, OF_EACH_KIND, exact_features
from .report import MEASURED, Setup

CALLS = 4
THREADS = 4
MANY, TINY_MANY = 512, 6
SAME = {"float32": 1e-5, "bf16": 6e-2}
"""What two ways of computing may differ by, in the worst row."""


def say(setup: Setup, title: str, lines: list[str]) -> None:
    """What the model says that was done. A graph that could not be made is wrong."""
    for line in lines:
        setup.report.add(title, MEASURED, note=line)
    setup.report.expect(f"{title}: no graph failed", not any("could not be made" in line for line in lines))


def results(setup: Setup) -> None:
    """Features beside float64, in four calls with different inputs; the first outputs stay as they were."""
    for name in OF_EACH_KIND:
        variant = variant_of(name, setup.is_dry)
        found = Implementations(variant, setup.device)
        calls = setup.choose(CALLS, 2)
        batches = [make_batch(variant, 2, LENGTHS, setup.device, seed) for seed in range(1, calls + 1)]
        truths = [exact_features(found, batch) for batch in batches]
        for precision in setup.choose(tuple(PRECISIONS), ("float32",)):
            plain, model = found.ours(precision), found.ours(precision)
            title = f"{name}, optimized, {precision}"
            model.optimize_for_inference()
            for kind in KINDS:
                as_loaded, optimized = (found.encoder(each, kind, precision) for each in (plain, model))
                allowed = max(worst_error(as_loaded(batches[n]), truths[n][kind]) for n in range(calls))
                outputs = [optimized(batch) for batch in batches]
                kept = [output.clone() for output in outputs]
                errors = [worst_error(output, truth[kind]) for output, truth in zip(outputs, truths, strict=True)]
                setup.report.check(f"{title}, {kind}", max(errors), max(FLOOR[precision], 2 * allowed))
                optimized(batches[0])
                setup.synchronize()
                is_kept = all(torch.equal(*pair) for pair in zip(outputs, kept, strict=True))
                setup.report.expect(f"{title}, {kind}: outputs stay as they were", is_kept)
            say(setup, title, list(model.optimizations or []))


def whole_outputs(setup: Setup) -> None:
    """`forward` with images, texts and a mask, four times; a hook that comes later is called."""
    for name in setup.choose(OF_EACH_KIND, OF_EACH_KIND[:1]):
        variant = variant_of(name, setup.is_dry)
        found = Implementations(variant, setup.device)
        plain, model = found.ours("bf16"), found.ours("bf16")
        model.optimize_for_inference()
        errors = []
        for seed in range(setup.choose(CALLS, 1)):
            batch = make_batch(variant, 2, LENGTHS, setup.device, seed)
            given = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")}
            with torch.inference_mode():
                expected, outputs = plain(**given), model(**given)
            for field in ("image_embeds", "text_embeds"):
                errors.append(worst_error(outputs[field], expected[field]))
        setup.report.check(f"{name}, bf16, forward of an optimized model", max(errors), SAME["bf16"])
        seen: list[int] = []
        last = getattr(model.vision_model, "post_layernorm", getattr(model.vision_model, "attnpool", None))
        assert last is not None
        last.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        with torch.inference_mode():
            model.encode_image(batch["pixel_values"])
        setup.report.expect(f"{name}, a hook that came later was called", seen == [1])


def many_texts(setup: Setup) -> None:
    """Texts sorted by length: the same features as unsorted, with the masks of right and of left padding."""
    variant, count = variant_of("ViT-B/32", setup.is_dry), setup.choose(MANY, TINY_MANY)
    found = Implementations(variant, setup.device)
    lengths = (77, *caption_lengths(count - 1))
    batch = make_batch(variant, 1, lengths, setup.device)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shifts = [ids.shape[1] - length for length in lengths]
    left = [torch.stack([row.roll(n) for row, n in zip(part, shifts, strict=True)]) for part in (ids, mask)]
    for precision in setup.choose(("float32", "bf16"), ("float32",)):
        plain, model = found.ours(precision), found.ours(precision)
        model.optimize_for_inference()
        cases: dict[str, Any] = {"no mask": (ids,), "mask": (ids, mask), "left padding": left}
        for what, given in cases.items():
            with torch.inference_mode():
                error = worst_error(model.encode_text(*given), plain.encode_text(*given))
            setup.report.check(f"{count} texts by length, {precision}, {what}", error, SAME[precision])


def threads(setup: Setup) -> None:
    """Threads with streams of their own use one model at once."""
    variant = variant_of("ViT-B/32", setup.is_dry)
    found = Implementations(variant, setup.device)
    model = found.ours("float32")
    model.optimize_for_inference()
    batches = [make_batch(variant, 1, (9,), setup.device, seed) for seed in range(CALLS)]
    with torch.inference_mode():
        expected = [model.encode_image(batch["pixel_values"]) for batch in batches]
    setup.synchronize()
    errors: list[float] = []

    def work() -> None:
        with own_stream(setup), torch.inference_mode():
            for _ in range(setup.choose(20, 2)):
                for batch, wanted in zip(batches, expected, strict=True):
                    errors.append(relative_error(model.encode_image(batch["pixel_values"]), wanted))

    running = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    wanted_count = THREADS * setup.choose(20, 2) * CALLS
    setup.report.expect(f"{THREADS} threads: all calls returned", len(errors) == wanted_count)
    setup.report.check(f"{THREADS} threads with streams of their own", max(errors, default=float("nan")), 1e-5)


@contextmanager
def own_stream(setup: Setup) -> Iterator[None]:
    if not setup.on_gpu:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


def waiting(setup: Setup) -> None:
    """No call makes the program wait for the GPU: torch is told to raise an error where one does."""
    variant = variant_of("ViT-B/32", setup.is_dry)
    found = Implementations(variant, setup.device)
    batch = make_batch(variant, 2, LENGTHS, setup.device)
    model, optimized = found.ours("bf16"), found.ours("bf16")
    optimized.optimize_for_inference()
    for who, each in (("as loaded", model), ("optimized", optimized)):
        for what, call in calls_of(each, batch).items():
            for _ in range(3):
                call()
            setup.synchronize()
            reason = ""
            try:
                with errors_where_it_waits(setup):
                    call()
            except RuntimeError as error:
                reason = first_line(error)
            setup.report.expect(f"{who}, {what}: does not wait for the GPU", not reason, reason)


def calls_of(model: Any, batch: Batch) -> dict[str, Callable[[], Any]]:
    pixels, ids, mask = (batch[name] for name in ("pixel_values", "input_ids", "attention_mask"))
    calls: dict[str, Callable[[], Any]] = {
        "encode_image": partial(model.encode_image, pixels),
        "encode_text": partial(model.encode_text, ids),
        "encode_text with a mask": partial(model.encode_text, ids, mask),
        "forward": partial(model, input_ids=ids, pixel_values=pixels, attention_mask=mask),
    }
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


@contextmanager
def errors_where_it_waits(setup: Setup) -> Iterator[None]:
    if setup.on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if setup.on_gpu:
            torch.cuda.set_sync_debug_mode("default")


def attention_kernels(setup: Setup) -> None:
    """Which of torch's attention kernels can be reached: flash attention wherever no mask is given."""
    variant = variant_of("ViT-B/32", setup.is_dry)
    found = Implementations(variant, setup.device)
    batch = make_batch(variant, 2, LENGTHS, setup.device)
    calls = calls_of(found.ours("bf16"), batch)
    fused = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for what in ("encode_image", "encode_text", "encode_text with a mask"):
        reached = []
        for kernel in setup.choose(fused, (SDPBackend.FLASH_ATTENTION,)):
            try:
                with sdpa_kernel([kernel]):
                    features: Tensor = calls[what]()
                reached += [kernel.name] if features.isfinite().all() else []
            except RuntimeError:  # it cannot be reached
                continue
        title = f"{what}, bf16: kernels of attention"
        has_flash = not setup.on_gpu or torch.cuda.get_device_capability() >= (8, 0)
        if "mask" in what or not has_flash:
            setup.report.add(title, MEASURED, note=", ".join(reached))
        else:
            setup.report.expect(title, "FLASH_ATTENTION" in reached, ", ".join(reached))


PARTS = (
    (results, 15.0),
    (whole_outputs, 8.0),
    (many_texts, 5.0),
    (threads, 5.0),
    (waiting, 5.0),
    (attention_kernels, 3.0),
)
