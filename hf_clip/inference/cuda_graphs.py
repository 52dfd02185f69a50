"""CUDA graphs: the kernels of a call are recorded once for each shape of the input, and launched together after that.

A GPU computes a small batch in less time than Python needs to launch its kernels one by one.

1. The first call with a shape runs as without graphs. Most shapes come once.
2. At the second call the kernels are recorded. They are not if the GPU, and not Python, takes most of the time. A graph
   is kept if it gives the same output in at most 1 / LEAST_GAIN of the time.
3. Each later call copies its input to where the graph reads it, launches the graph, and returns a copy of the output.

Invariants: a tensor that a caller holds is never overwritten. No call waits for the GPU, but for the one that records.
All graphs of a model use the same memory, so the GPU runs them one after the other, whichever threads and streams
launch them.
"""

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.linear_map import has_global_hooks
from .gpu_times import gain_of, share_of_launching
from .measure import LEAST_GAIN
from .replace import LEFT, has_hooks

MOST_GRAPHS = 32
"""Graphs of one model. When there are so many, no more shapes are recorded, so that memory has a bound."""

MOST_LINES = 64
"""Lines that are said in all, about graphs that were made and that were not."""

MOST_NOTED = 256
"""Shapes that are remembered to have come once."""

WARM_UP_CALLS = 3
LEAST_SHARE = 0.5
"""Least part of a call's time that Python must take for launching. Below it a graph would gain little."""

Outputs = tuple[Tensor, ...]
Key = tuple[Any, ...]

_recording = threading.Lock()
"""Held while kernels are recorded: torch allows one recording at a time in a process."""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Free nothing within this block that was left earlier: freeing tensors or graphs may disturb a recording."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


class Entry:
    """A computation that may become graphs, one for each shape of its inputs.

    Args:
        name: What is computed, for reports.
        compute: From tensors to tensors. It must not read values of tensors.
        roots: The modules that it uses.
    """

    def __init__(self, name: str, compute: Callable[..., Outputs], roots: tuple[nn.Module, ...]):
        self.name, self.compute = name, compute
        self.modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        self.handles, self.is_hooked = -1, False
        # Somebody replaced the `forward` of a module. A graph might leave out what it does.
        self.is_patched = any("forward" in vars(module) for module in self.modules)
        self.parts: list[tuple[nn.Module, dict[str, Any], Any]] = []

    def watch(self) -> None:
        """Remember of what modules the computation consists. A graph computes with those that it was recorded with."""
        parents = [module for module in self.modules if module._modules]
        self.parts = [(module, dict(module._modules), vars(module).get("forward")) for module in parents]

    def is_as_recorded(self) -> bool:
        """Whether no module has hooks, and none was replaced. It is asked in every call, so it takes microseconds."""
        if self.is_patched:
            return False
        if self.is_hooked or self.handles != RemovableHandle.next_id:  # which counts the hooks of this process
            self.handles = RemovableHandle.next_id
            self.is_hooked = has_global_hooks() or any(map(has_hooks, self.modules))
        return not self.is_hooked and all(
            module._modules == modules and vars(module).get("forward") is forward
            for module, modules, forward in self.parts
        )


@dataclass(frozen=True)
class Recorded:
    """A graph, and the tensors whose places in memory it has recorded."""

    graph: Any
    inputs: Outputs
    outputs: Outputs
    weights: Outputs


class Graphs:
    """The graphs of one model.

    Args:
        device: The model's GPU.
        say: Takes a line about each graph, and about a failure.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self.device, self.say = device, say
        self.recorded: dict[Key, Recorded] = {}
        self.noted: OrderedDict[Key, bool] = OrderedDict()  # whether a graph of this shape gains nothing
        self.is_given_up, self.lines = False, 0
        self.lock = threading.Lock()
        self.thread = threading.local()
        self.stream: Any = None
        self.pool: Any = None
        self.last_use: Any = None

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Within this block, and in this thread, kernels are launched one by one."""
        before = getattr(self.thread, "is_one_by_one", False)
        self.thread.is_one_by_one = True
        try:
            yield
        finally:
            self.thread.is_one_by_one = before

    def run(self, entry: Entry, *inputs: Tensor) -> Outputs:
        """Compute `entry.compute(*inputs)`, by a graph if there is one for these shapes."""
        if not self._is_possible(inputs) or not entry.is_as_recorded():
            return entry.compute(*inputs)
        key = (entry.name, *((tuple(input.shape), input.dtype) for input in inputs))
        with self.lock:
            recorded = self.recorded.get(key)
            if recorded is None and self.noted.get(key) is False and not self._is_full():
                recorded = self._record(key, entry, inputs)
            if recorded is not None:
                return self._launch(recorded, inputs)
        with self.one_by_one():  # and not by graphs of its parts
            outputs = entry.compute(*inputs)
        with self.lock:
            self._note(key)
        return outputs

    def _is_possible(self, inputs: tuple[Tensor, ...]) -> bool:
        is_eager = not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if not is_eager or getattr(self.thread, "is_one_by_one", False):
            return False
        if torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
            return False
        needs_gradients = torch.is_grad_enabled() and any(input.requires_grad for input in inputs)
        return not needs_gradients and all(map(self.is_ordinary, inputs))

    def is_ordinary(self, input: Tensor) -> bool:
        """Whether an input lies on the model's GPU and has numbers of its own, which torch.vmap's have not."""
        if type(input) not in (Tensor, nn.Parameter) or input.device != self.device or not input.numel():
            return False
        try:
            return bool(input.data_ptr())
        except RuntimeError:
            return False

    def _is_full(self) -> bool:
        return self.is_given_up or len(self.recorded) >= MOST_GRAPHS

    def _note(self, key: Key, *, gains_nothing: bool = False) -> None:
        self.noted[key] = gains_nothing or self.noted.get(key, False)
        if len(self.noted) > MOST_NOTED:
            self.noted.popitem(last=False)

    def _record(self, key: Key, entry: Entry, inputs: tuple[Tensor, ...]) -> Recorded | None:
        """Record the kernels of a call, and keep the graph if it is faster."""
        shapes = ", ".join(" x ".join(map(str, input.shape)) for input in inputs)
        what = f"CUDA graph of {entry.name} for {shapes} ({str(inputs[0].dtype).removeprefix('torch.')})"
        self._note(key, gains_nothing=True)  # unless it is found to gain
        try:
            # Tensors that are made within inference mode could not be written to outside of it.
            place, modes = torch.cuda.device(self.device), (torch.inference_mode(False), torch.no_grad())
            with _recording, self.one_by_one(), place, modes[0], modes[1]:
                recorded = self._capture(entry, inputs)
                if recorded is None:
                    self._say(f"{what}: {LEFT}; the GPU takes longer to compute than Python to launch")
                    return None
                gain = self._check(recorded, entry, inputs)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._say(f"{what}: {LEFT}; there is not enough memory")
            return None
        except RuntimeError as error:
            self.is_given_up = True
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            self._say(f"{what}: {LEFT}, and so is every later one; it could not be made: {reason:.160}")
            warnings.warn(f"{what} could not be made; results are the same without it: {reason:.160}", stacklevel=4)
            return None
        if gain < LEAST_GAIN:
            self._say(f"{what}: {LEFT}; it is {gain:.2f} times as fast")
            return None
        self.recorded[key] = recorded
        self._say(f"{what}: {gain:.2f} times as fast here")
        return recorded

    def _say(self, line: str) -> None:
        self.lines += 1
        if self.lines <= MOST_LINES:
            self.say(line)

    def _capture(self, entry: Entry, inputs: tuple[Tensor, ...]) -> Recorded | None:
        """Record the kernels of a call. None: the GPU takes most of the time, so that a graph would gain little."""
        if self.stream is None:
            self.stream, self.last_use = torch.cuda.Stream(), torch.cuda.Event()
            self.pool = torch.cuda.graph_pool_handle()
        given = tuple(torch.empty_like(input, memory_format=torch.contiguous_format) for input in inputs)
        for copy, input in zip(given, inputs, strict=True):
            copy.copy_(input)
        present, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(present)
        try:
            # Libraries set up what they need in the first calls, which must not be recorded. They keep it for the
            # stream, so all happens in the same one.
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP_CALLS):
                    entry.compute(*given)
                if share_of_launching(lambda: entry.compute(*given)) < LEAST_SHARE:
                    return None
                # Other threads may go on to use the GPU meanwhile.
                how: dict[str, Any] = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
                with no_garbage_collection(), torch.cuda.graph(graph, **how):
                    outputs = entry.compute(*given)
        finally:
            present.wait_stream(self.stream)
        # Should somebody give a module other weights, those that the graph reads are not freed.
        weights = (weight.detach() for module in entry.modules for weight in module.parameters(recurse=False))
        buffers = (buffer.detach() for module in entry.modules for buffer in module.buffers(recurse=False))
        return Recorded(graph, given, outputs, (*weights, *buffers))

    def _check(self, recorded: Recorded, entry: Entry, inputs: tuple[Tensor, ...]) -> float:
        """Return how many times as fast a graph is. Raises RuntimeError if it gives another output."""
        for found, expected in zip(self._launch(recorded, inputs), entry.compute(*inputs), strict=True):
            found, expected = (output.float().nan_to_num() for output in (found, expected))
            if not (found - expected).norm() <= 1e-2 * expected.norm():
                raise RuntimeError("its output differs from that of the kernels")
        return gain_of(lambda: entry.compute(*inputs), lambda: self._launch(recorded, inputs))

    def _launch(self, recorded: Recorded, inputs: tuple[Tensor, ...]) -> Outputs:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.last_use)  # the GPU waits for this, Python does not
            with torch.inference_mode(False), torch.no_grad():
                for place, input in zip(recorded.inputs, inputs, strict=True):
                    place.copy_(input)
                recorded.graph.replay()
            outputs = tuple(output.clone() for output in recorded.outputs)
            self.last_use.record(stream)
        return outputs
