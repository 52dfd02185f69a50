"""Images and texts per second, beside OpenAI's code, transformers and open_clip, and as parts of what the GPU can do.

Every implementation computes in the same precision, with the same weights, and has to agree with OpenAI's code in
float32 before it is measured. The fastest matrix product is measured before and after each table.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..ceiling import image_flops, text_flops
from ..measuring import OURS, PRECISIONS, Contender, LeftOutError, Table, agrees_with, first_line
from ..peers import OPEN_CLIP, OPENAI, OPTIMIZED, STOCK, Batch, Encoder
from .models import Implementations, caption_lengths, make_batch, variant_of
from .report import MEASURED, Setup

IMAGES = ("RN50", "ViT-B/32", "ViT-B/16", "ViT-L/14")
TEXTS = ("ViT-B/32", "ViT-L/14")
COMPILED = ("ViT-B/32", "ViT-L/14", "RN50")
TINY = ("RN50", "ViT-B/32")
BATCHES, TINY_BATCHES = (256, 1, 32), (2,)
LARGEST = 256
PRODUCT, TINY_PRODUCT = 8192, 256
GRAPH, WITHOUT_MASK = f"{OURS}, CUDA graph", f"{OURS}, without a mask"
GOALS = {"ViT-L/14": 0.6, "ViT-B/32": 0.45}
"""Of the fastest product, in bfloat16 and batches of 256 images."""
BESIDE_PEERS = 1.2


@torch.inference_mode()
def fastest_product(setup: Setup, precision: str, seconds: float = 0.15) -> float:
    """FLOP per second of a large square matrix product."""
    size = setup.choose(PRODUCT, TINY_PRODUCT)
    left, right = (torch.randn(size, size, device=setup.device, dtype=PRECISIONS[precision]) for _ in range(2))
    best, begun = 0.0, time.perf_counter()
    left @ right
    while True:
        setup.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            left @ right
        setup.synchronize()
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - start))
        if time.perf_counter() - begun > setup.choose(seconds, 0.0):
            return best


class Graphed:
    """An encoder whose kernels are recorded once, and launched together from then on: a CUDA graph.

    Args:
        encode: of a batch. It must not wait for the GPU.
        batch: of the shape that all later ones have. Its tensors are copied.
        setup: where there is no GPU, the encoder is called as it is.
    """

    @torch.inference_mode()
    def __init__(self, encode: Encoder, batch: Batch, setup: Setup):
        self.encode, self.graph = encode, None
        self.inputs = {name: tensor.clone() for name, tensor in batch.items()}
        if not setup.on_gpu:
            return
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                encode(self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = encode(self.inputs)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        for name, tensor in batch.items():
            self.inputs[name].copy_(tensor)
        if self.graph is None:
            return self.encode(self.inputs)
        self.graph.replay()
        return self.output


def encoders_of(
    found: Implementations, kind: str, precision: str, setup: Setup
) -> tuple[dict[str, Encoder], list[str]]:
    """Encoders by name, those of ours first, and lines of what cannot take part."""
    left_out: list[str] = []
    ours = found.ours(precision)
    encoders: dict[str, Encoder] = {OURS: found.encoder(ours, kind, precision)}

    def optimized() -> Encoder:
        model = found.ours(precision)
        for line in model.optimize_for_inference():
            setup.report.add(f"{found.variant.name}, {precision}, optimized", MEASURED, note=line)
        return found.encoder(model, kind, precision) if kind == "image" else without_mask(model)

    if kind == "text":
        encoders[WITHOUT_MASK] = without_mask(ours)
    builders: dict[str, Callable[[], Encoder]] = {
        OPTIMIZED: optimized,
        OPENAI: lambda: found.encoder(found.openai(precision), kind, precision),
        STOCK: lambda: found.encoder(found.stock(precision), kind, precision),
        OPEN_CLIP: lambda: found.encoder(found.open_clip(precision), kind, precision),
    }
    for name, builder in builders.items():
        try:
            encoders[name] = builder()
        except LeftOutError as error:
            left_out.append(f"{name} is left out: {error}")
        except Exception as error:
            left_out.append(f"{name} is left out: {first_line(error)}")
    return encoders, left_out


def without_mask(model: Any) -> Encoder:
    """Texts without a mask: where padding is on the right, their ends are found without it."""
    return torch.inference_mode()(lambda given: model.encode_text(given["input_ids"]))


def calls_of(
    encoders: dict[str, Encoder], kind: str, batch: Batch, setup: Setup
) -> tuple[dict[str, Callable[[], Tensor]], list[str]]:
    """Calls of all encoders with one batch, and of ours in a CUDA graph of its own."""
    calls: dict[str, Callable[[], Tensor]] = {name: partial(encode, batch) for name, encode in encoders.items()}
    needed = {name: batch[name] for name in (["pixel_values"] if kind == "image" else ["input_ids"])}
    try:
        graph = partial(Graphed(encoders[OURS if kind == "image" else WITHOUT_MASK], needed, setup), needed)
    except Exception as error:
        return calls, [f"{GRAPH} is left out: {first_line(error)}"]
    ours = {name: call for name, call in calls.items() if name.startswith(OURS)}
    return ours | {GRAPH: graph} | calls, []


def measured(
    setup: Setup,
    title: str,
    unit: str,
    calls: dict[str, Callable[[], Tensor]],
    left_out: list[str],
    expected: Tensor,
    precision: str,
    flops: float,
) -> Table:
    """A table of calls, beside the fastest product of the time."""
    before = fastest_product(setup, precision)
    check = agrees_with(expected, precision)
    ways = [name for name in calls if name.startswith(OURS)]
    table = Table(title, unit, ours=tuple(ways), device=setup.device)
    contenders = [Contender(name, call, len(expected), precision, check, flops) for name, call in calls.items()]
    table.left_out += left_out
    setup.compare(table, contenders)
    ceiling = max(before, fastest_product(setup, precision))
    for row in table.rows:
        row.ceiling = ceiling
    note = f"of {ceiling / 1e12:,.0f} TFLOP/s"
    for row in table.rows:
        if row.fraction_of_ceiling is not None and row.name in ways:
            setup.report.figure(
                f"{title}: {row.name}", row.per_second, f"{unit}/s", f"{row.fraction_of_ceiling:.2f} {note}"
            )
    return table


def _judge(setup: Setup, table: Table, goal: float | None) -> None:
    """Goals of a table: beside the peers, and of the fastest product."""
    ours = [row for row in table.rows if row.name.startswith(OURS)]
    if setup.is_dry or not ours:
        return
    fastest = max(ours, key=lambda row: row.per_second)
    for row in table.rows:
        if row not in ours:
            ratio = fastest.per_second / row.per_second
            setup.report.goal(f"{table.title}: times {row.name}", ratio, BESIDE_PEERS, fastest.name)
    if goal is not None and fastest.fraction_of_ceiling is not None:
        what = f"{table.title}: of the fastest product"
        setup.report.goal(what, fastest.fraction_of_ceiling, goal, fastest.name)


def images(setup: Setup) -> None:
    """Image towers, largest batches first, since what comes last may find no time."""
    for name in setup.choose(IMAGES, TINY):
        if not setup.report.has_time(name, 15.0):
            return
        variant = variant_of(name, setup.is_dry)
        found = Implementations(variant, setup.device)
        exact = found.encoder(found.openai(), "image", "float32")
        for precision in setup.choose(("bf16", "fp16"), ("bf16",)):
            encoders, left_out = encoders_of(found, "image", precision, setup)
            for count in setup.choose(BATCHES if precision == "bf16" else (LARGEST,), TINY_BATCHES):
                title = f"{name}, {precision}, batch of {count}"
                if not setup.report.has_time(title, 5.0):
                    break
                batch = make_batch(variant, count, (8,), setup.device)
                expected = torch.cat([exact({"pixel_values": part}) for part in batch["pixel_values"].split(64)])
                calls, no_graph = calls_of(encoders, "image", batch, setup)
                flops, lines = count * image_flops(variant), left_out + no_graph
                table = measured(setup, title, "images", calls, lines, expected, precision, flops)
                is_judged = precision == "bf16" and count == LARGEST
                _judge(setup, table, GOALS.get(name) if is_judged else None)
                del calls


def texts(setup: Setup) -> None:
    """Text towers. Ours computes captions as long as the longest, the others 77 columns."""
    for name in setup.choose(TEXTS, TINY[1:]):
        if not setup.report.has_time(f"{name}, texts", 12.0):
            return
        variant = variant_of(name, setup.is_dry)
        found = Implementations(variant, setup.device)
        exact = found.encoder(found.openai(), "text", "float32")
        for precision in setup.choose(("bf16", "fp16"), ("bf16",)):
            encoders, left_out = encoders_of(found, "text", precision, setup)
            for count in setup.choose(BATCHES if precision == "bf16" else (LARGEST,), TINY_BATCHES):
                title = f"{name}, {precision}, {count} captions"
                if not setup.report.has_time(title, 5.0):
                    break
                lengths = caption_lengths(count)
                batch = make_batch(variant, 1, lengths, setup.device)
                calls, no_graph = calls_of(encoders, "text", batch, setup)
                flops, lines = text_flops(variant, lengths), left_out + no_graph
                table = measured(setup, title, "texts", calls, lines, exact(batch), precision, flops)
                _judge(setup, table, None)
                del calls


def why_not_compiled(setup: Setup) -> str | None:
    """What torch's compiler misses here, if anything."""
    if setup.is_dry:
        return None
    if find_spec("triton") is None:
        return "triton is not installed"
    if not any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang")):
        return "triton needs a C compiler, and there is none: apt-get install gcc"
    return None


def compiled(setup: Setup) -> None:
    """Image towers by torch.compile. Each takes half a minute to compile."""
    if reason := why_not_compiled(setup):
        setup.report.add("compiled", "left out", note=reason)
        return
    options: dict[str, Any] = {"backend": "eager"} if setup.is_dry else {}
    for name in setup.choose(COMPILED, TINY[1:]):
        variant, count = variant_of(name, setup.is_dry), setup.choose(LARGEST, 2)
        title = f"{name}, bf16, batch of {count}, compiled"
        if not setup.report.has_time(title, 50.0):
            return
        torch.compiler.reset()
        found = Implementations(variant, setup.device)
        batch = make_batch(variant, count, (8,), setup.device)
        expected = found.encoder(found.openai(), "image", "float32")(batch)
        encoders: dict[str, nn.Module] = {OURS: found.ours("bf16")}
        calls: dict[str, Callable[[], Tensor]] = {}
        for who, model in encoders.items():
            encode = found.encoder(model, "image", "bf16")
            calls[who] = partial(encode, batch)
            work = torch.compile(model.encode_image, dynamic=False, fullgraph=True, **options)  # type: ignore[arg-type]
            dtype = PRECISIONS["bf16"]
            calls[f"{who}, compiled"] = partial(torch.inference_mode()(work), batch["pixel_values"].to(dtype))
        table = measured(setup, title, "images", calls, [], expected, "bf16", count * image_flops(variant))
        _judge(setup, table, GOALS.get(name))


PARTS = ((images, 20.0), (texts, 10.0), (compiled, 50.0))
