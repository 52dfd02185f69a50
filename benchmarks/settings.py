"""What a run of the benchmarks was asked for, and what that means on each device."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from .ceiling import measure_ceiling

T = TypeVar("T")

PRECISIONS_OF = {"cpu": ("float32", "bf16"), "cuda": ("bf16", "fp16")}
"""What is measured unless precisions are named. fp16 is left out on a CPU, which takes hundreds of times as long."""
ALLOWED_ON = {"cpu": ("float32", "bf16"), "cuda": ("float32", "bf16", "fp16")}


@dataclass(frozen=True)
class Settings:
    """None stands for a subcommand's own choice, which is smaller where `quick`.

    seconds: for the rounds of one table, after which no further one begins
    """

    quick: bool = False
    threads: int = 1
    devices: tuple[str, ...] = ("cpu",)
    rounds: int | None = None
    seconds: float = 20.0
    variants: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    prompts: int | None = None
    captions: int | None = None
    is_memory_measured: bool = True
    measure_ceiling: Callable[[str, str], float] = field(default=measure_ceiling, compare=False)

    def choose(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def precisions_on(self, device: str) -> tuple[str, ...]:
        asked = self.precisions or PRECISIONS_OF[device]
        return tuple(precision for precision in asked if precision in ALLOWED_ON[device])

    @cached_property
    def ceilings(self) -> dict[tuple[str, str], float]:
        """FLOP per second by device and precision."""
        return {}

    def ceiling(self, device: str, precision: str, again: bool = False) -> float:
        """The most that was ever measured; `again`: also now, since a machine may be slower at times."""
        if again or (device, precision) not in self.ceilings:
            before = self.ceilings.get((device, precision), 0.0)
            self.ceilings[device, precision] = max(before, self.measure_ceiling(device, precision))
        return self.ceilings[device, precision]
