"""What the image and the text benchmark share: everyone built for one tower, checked, measured on several workloads.

All contenders must agree with the float32 features of OpenAI's code. Tables of another precision show its float32 speed
too. Peak memory is measured in a process of its own, which encodes twice; counting begins after loading. On a GPU it is
the weights and the most that a call takes on top. On a CPU all contenders compute in one process, which keeps freed
memory for the next layer: `optimize_for_inference` asks for that, and the peers gain from it too.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hf_clip import Variant

from .measuring import (
    Contender,
    LeftOutError,
    Table,
    agrees_with,
    compare,
    forget_peak_memory,
    memory_of_this_process,
    run_alone,
    say,
)
from .peers import COMPILED, IN_INT8, ON_CPU, ON_GPU, OPENAI, OURS, Batch, Case, Encoder, build
from .settings import Settings

Extra = Callable[[Case, Tensor], Contender]
"""Another way of ours to the same features, given those that are expected."""


@dataclass(frozen=True)
class Workload:
    """One batch. On a CPU, contenders that are compiled for a batch take part in the main workload only."""

    title: str
    batch: Batch
    flops: float
    is_main: bool = True
    extras: Sequence[Extra] = ()

    @property
    def amount(self) -> int:
        return len(next(iter(self.batch.values())))


def encode_alone(
    name: str, variant: dict, folder: str, kind: str, precision: str, threads: int, inputs: str
) -> int | None:
    """The most memory, in bytes, of a process that encodes twice and does nothing else; inputs is a file of tensors."""
    torch.set_num_threads(threads)
    encode = build(name, Case(Variant(**variant), Path(folder), kind, precision, "cpu", threads))
    batch = torch.load(inputs, weights_only=True)
    gc.collect()
    forget_peak_memory()
    for _ in range(2):
        encode(batch)
    return memory_of_this_process("VmHWM")


def peak_memories(names: Sequence[str], case: Case, batch: Batch) -> dict[str, int]:
    """Bytes by implementation; of one that can't be built, it is said where it is built to be timed."""
    inputs, found = case.folder / "inputs.pt", {}
    torch.save(batch, inputs)
    arguments = asdict(case) | {"folder": str(case.folder), "inputs": str(inputs)}
    del arguments["device"]
    for name in names:
        say(f"memory of {name}")
        try:
            peak = run_alone(encode_alone, name=name, **arguments)
        except LeftOutError:
            continue
        if peak is not None:
            found[name] = peak
    return found


def build_all(names: Sequence[str], case: Case, memories: dict[str, int]) -> tuple[dict[str, Encoder], list[str]]:
    """The implementations that can be built, and a line for each that can't. On a GPU, `memories` gets the weights."""
    encoders, left_out = {}, []
    for name in names:
        say(f"building {name}")
        before = torch.cuda.memory_allocated() if case.device == "cuda" else 0
        try:
            encoders[name] = build(name, case)
        except LeftOutError as error:
            left_out.append(str(error))
        else:
            if case.device == "cuda":
                memories[name] = torch.cuda.memory_allocated() - before
    return encoders, left_out


def implementations(case: Case, is_compiled: bool) -> list[str]:
    """Integers stand beside bfloat16 alone."""
    names = [name for name in (ON_GPU if case.device == "cuda" else ON_CPU) if is_compiled or COMPILED not in name]
    return [name for name in names if case.precision == "bf16" or name not in IN_INT8]


def encoder_tables(
    case: Case, unit: str, workloads: Sequence[Workload], settings: Settings, rounds: int, ours: Sequence[str]
) -> Iterator[Table]:
    """A table for each precision and workload of the case's tower and device."""
    device = case.device
    if device == "cuda":
        ours = (*ours, f"{OURS}, {COMPILED}")
    exact = build(OPENAI, Case(case.variant, case.folder, case.kind, device=device, threads=settings.threads))
    for precision in settings.precisions_on(device):
        case = Case(case.variant, case.folder, case.kind, precision, device, settings.threads)
        names = implementations(case, is_compiled=not settings.quick)
        memories: dict[str, int] = {}
        if settings.is_memory_measured and device == "cpu":
            memories = peak_memories([name for name in names if COMPILED not in name], case, workloads[0].batch)
        encoders, left_out = build_all(names, case, memories)
        for workload in workloads:
            batch = {name: tensor.to(device) for name, tensor in workload.batch.items()}
            expected = exact(batch)
            where = ", on the GPU" if device == "cuda" else ""
            table = Table(f"{case.variant.name}, {precision}, {workload.title}{where}", unit, ours=ours, device=device)
            table.left_out += left_out
            check = agrees_with(expected, precision)
            contenders = [
                Contender(name, partial(encode, batch), workload.amount, precision, check)
                for name, encode in encoders.items()
                if device == "cuda" or workload.is_main or COMPILED not in name
            ]
            place = sum(contender.name.startswith(OURS) for contender in contenders)
            contenders[place:place] = [extra(case, expected) for extra in workload.extras]
            if precision != "float32":
                contenders.append(
                    Contender(
                        f"{OPENAI}, float32",
                        partial(exact, batch),
                        workload.amount,
                        "float32",
                        agrees_with(expected, "float32"),
                    )
                )
            for precision_of_row in {contender.precision for contender in contenders}:
                settings.ceiling(device, precision_of_row, again=True)
            for contender in contenders:
                contender.flops = workload.flops
                contender.ceiling = settings.ceiling(device, contender.precision)
                if device == "cuda" or workload is workloads[0]:
                    contender.peak_memory = memories.get(contender.name)
            yield compare(table, contenders, rounds=settings.rounds or rounds, seconds=settings.seconds)
            del contenders, contender
        del encoders
        gc.collect()
        torch.compiler.reset()  # graphs of models that are gone would count towards the limit of new ones
