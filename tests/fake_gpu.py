"""What torch.cuda offers for graphs, streams and times, played by the CPU, with the rules of a GPU.

A graph is recorded as CUDA does it: operators run on tensors whose places in memory are kept, and a replay runs them
on the same places. So what is copied to the graph's input changes its output, and what Python computed only once shows.
While a graph is recorded, no value of a tensor may be read. Streams and events keep account of what waits for what.
Time passes when somebody says so.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hf_clip.inference import cuda_graphs
from hf_clip.model import text_ends, text_tower

READING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim"}


def name_of(func: Any) -> str:
    return func.name().removeprefix("aten::").partition(".")[0]


class Reads(TorchDispatchMode):
    """Counts operators within this block for which a program has to wait for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.methods = Methods(self.found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [name_of(func)] if name_of(func) in READING else []
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Reads":
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.methods.__exit__(*error)


class Methods(TorchFunctionMode):
    """The same for lists of numbers, which are made without an operator."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "tolist":
            self.found.append("tolist")
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """Keeps every operator that runs, with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if name_of(func) in READING:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        output = func(*args, **(kwargs or {}))
        # A graph reads a parameter where it lies now, whatever the module is given later.
        places = tree_map(lambda arg: arg.detach() if isinstance(arg, nn.Parameter) else arg, (args, kwargs or {}))
        self.calls.append((func, *places, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self.calls:
            again = func(*args, **kwargs)
            for place, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != new.data_ptr():
                    place.copy_(new)


class Event:
    def __init__(self, gpu: "FakeGpu", enable_timing: bool = False):
        self.gpu, self.time, self.after = gpu, 0.0, frozenset()

    def record(self, stream: Any = None) -> None:
        self.time, self.after = self.gpu.clock, frozenset((stream or self.gpu.current).done)

    def synchronize(self) -> None:
        self.gpu.waits += 1

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.time - self.time)


class Stream:
    """`done` holds the numbers of the replays that are over when something that is launched now begins."""

    def __init__(self) -> None:
        self.done: set[int] = set()

    def wait_stream(self, other: "Stream") -> None:
        self.done |= other.done

    def wait_event(self, event: Event) -> None:
        self.done |= event.after


class Graph:
    def __init__(self, gpu: "FakeGpu"):
        self.gpu = gpu
        self.recording: Recording | None = None

    def replay(self) -> None:
        assert self.recording is not None
        assert torch.is_inference_mode_enabled() is False
        number = next(self.gpu.numbers)
        missing = set(range(number)) - self.gpu.current.done
        assert not missing, f"replay {number} may run at the same time as {missing}, in the same memory"
        self.recording.replay()
        self.gpu.current.done.add(number)
        self.gpu.replays += 1


class FakeGpu:
    """Stands for torch.cuda.

    Attributes:
        replays: Graphs that were launched.
        recorded: Graphs that were recorded.
        waits: How often the program waited for the GPU.
        clock: Seconds.
    """

    def __init__(self) -> None:
        self.replays = self.recorded = self.waits = 0
        self.clock = 0.0
        self.numbers = itertools.count()
        self.thread = threading.local()
        self.default = Stream()
        self.is_broken = False
        self.warm: set[Stream] = set()

    @property
    def current(self) -> Stream:
        return getattr(self.thread, "stream", self.default)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.thread.stream = self.current, stream
        self.warm.add(stream)
        try:
            yield
        finally:
            self.thread.stream = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        assert stream in self.warm, "the calls before did not warm up this stream"
        assert not self.is_capturing()
        if self.is_broken:
            raise RuntimeError("CUDA error: the driver has no graphs\nmore lines")
        self.thread.is_capturing, graph.recording = True, Recording()
        try:
            with graph.recording:
                yield
        finally:
            self.thread.is_capturing = False
        self.recorded += 1

    def is_capturing(self) -> bool:
        return getattr(self.thread, "is_capturing", False)

    def synchronize(self) -> None:
        assert not self.is_capturing()
        self.waits += 1


def replace_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Let a model on the CPU be taken for one on a GPU."""
    gpu = FakeGpu()
    parts: dict[str, Callable[..., Any]] = {
        "Stream": Stream,
        "Event": lambda enable_timing=False: Event(gpu, enable_timing),
        "CUDAGraph": lambda: Graph(gpu),
        "graph": gpu.graph,
        "graph_pool_handle": lambda: "pool",
        "stream": gpu.stream,
        "current_stream": lambda *_: gpu.current,
        "device": lambda *_: contextlib.nullcontext(),
        "synchronize": lambda *_: gpu.synchronize(),
        "empty_cache": lambda: None,
        "is_current_stream_capturing": gpu.is_capturing,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    for module in (text_ends, text_tower):
        monkeypatch.setattr(module, "must_wait_for", lambda tensor: True)
    # A replay takes this CPU as long as what was recorded.
    monkeypatch.setattr(cuda_graphs, "gain_of", lambda *_: 2.0)
    monkeypatch.setattr(cuda_graphs, "share_of_launching", lambda work: (work(), 0.9)[1])
    return gpu
