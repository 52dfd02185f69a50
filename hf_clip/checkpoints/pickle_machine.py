"""Read the pickles of checkpoints with a machine that can do nothing else.

A pickle is a program for a stack machine. Python's own machine imports and calls what the program names, and a subclass
that forbids names still hashes, compares and builds what it is told to. This one knows the opcodes that `torch.save`
and TorchScript write, and the names of `stored_values`. All that its stack can hold is numbers, texts, tuples, lists,
and the inert records of that module.

Invariants:
1. Nothing that a file names is imported or called, and no tensor is built.
2. No value is hashed, compared or printed here: values may share their parts, so that a few bytes describe a tree
   without end. A `Table` is a list of pairs for that reason.
3. An opcode costs as much as the bytes that it is written with and the values that it takes from the stack, and the
   opcodes of a file are counted.
"""

import struct
from collections.abc import Callable
from mmap import mmap
from typing import Any

from ..model.checked_files import one_line
from .errors import MOST_SHOWN, CheckpointError, NoCheckpointsPickleError
from .stored_values import GLOBALS, LARGEST_COUNT, Call, Record, ScriptClass, Storage, StorageType, Table

MOST_PICKLED_BYTES = 1 << 25
MOST_OPCODES = 1_500_000
"""Bounds that no checkpoint of a CLIP comes near: with its optimizer it has 40 kilobytes and 15,000 opcodes a layer."""

LONGEST_NAME = 500
LONGEST_INTEGER = 16

UNSAFE = (
    "which is neither a tensor nor a plain container and could run code. Take the checkpoint from a source you trust, "
    "or save its state dict anew."
)


class OpcodeBudget:
    """How many opcodes a file's pickles may still have, all of them together."""

    def __init__(self, most: int = MOST_OPCODES):
        self.most = self.left = most


class PickleMachine:
    """The state of one pickle's reading.

    data:     where the pickle lies; it is read from `start` to its STOP, which is before `position` afterwards
    entry:    what messages call it
    storages: those that it names, by their keys
    """

    def __init__(self, data: bytes | mmap, entry: str, budget: OpcodeBudget, start: int = 0):
        self.data, self.entry, self.budget, self.position = data, entry, budget, start
        self.end = min(len(data), start + MOST_PICKLED_BYTES)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        while self.budget.left > 0:
            self.budget.left -= 1
            if self.position >= self.end:
                self.take(1)  # raises
            opcode = self.data[self.position]
            self.position += 1
            if opcode == STOP:
                value = self.pop()
                if self.stack:
                    raise NoCheckpointsPickleError("values are left over at its end")
                return value
            operation = OPERATIONS.get(opcode)
            if operation is None:
                raise NoCheckpointsPickleError(f"the opcode 0x{opcode:02x}")
            operation(self)
        most = self.budget.most
        raise CheckpointError(
            f"is refused: its pickles have more than {most} opcodes, far more than a checkpoint needs."
        )

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            if self.end < len(self.data):
                raise CheckpointError(f"is refused: its {self.entry} has more bytes than a checkpoint needs.")
            raise CheckpointError(f"is truncated or damaged: its {self.entry} ends early; copy or download it again.")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> None:
        try:
            self.stack.append(str(self.take(self.number(layout)), "utf-8", "surrogatepass"))
        except UnicodeDecodeError:
            raise NoCheckpointsPickleError("a text that is no UTF-8") from None

    def line(self) -> str:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + LONGEST_NAME))
        if stop < 0:
            raise NoCheckpointsPickleError("a name without an end")
        return self.take(stop + 1 - self.position)[:-1].decode("utf-8", "replace")

    def pop(self, kind: type = object) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise NoCheckpointsPickleError("a value is missing")
        value = self.stack.pop()
        if not isinstance(value, kind):
            raise NoCheckpointsPickleError(f"a {type(value).__name__} in a wrong place")
        return value

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise NoCheckpointsPickleError("a mark is missing")
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind: type) -> Any:
        value = self.pop(kind)
        self.stack.append(value)
        return value

    # --- what the opcodes do ---

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def protocol(self) -> None:
        if (number := self.number("B")) > 5:
            raise NoCheckpointsPickleError(f"protocol {number}")

    def integer(self) -> None:
        length = self.number("B")
        if length > LONGEST_INTEGER:
            raise NoCheckpointsPickleError(f"an integer of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise NoCheckpointsPickleError("a key without a value")
        self.top(Table).pairs.extend(zip(values[::2], values[1::2], strict=True))

    def memoize(self, index: int | None = None) -> None:
        """Python and TorchScript number what they remember one by one; any other number only serves to fill memory."""
        if index is not None and index != len(self.memo):
            raise NoCheckpointsPickleError(f"a memo index of {index}")
        self.memo.append(self.top(object))

    def recall(self, index: int) -> None:
        if index >= len(self.memo):
            raise NoCheckpointsPickleError(f"a memo index of {index}")
        self.stack.append(self.memo[index])

    def name(self, module: str, name: str) -> None:
        if module == "__torch__" or module.startswith("__torch__."):
            self.stack.append(ScriptClass())
            return
        known = GLOBALS.get((module, name))
        shown = one_line(f"{module}.{name}", MOST_SHOWN)
        if known is None and module == "torch" and name.endswith("Storage"):
            raise CheckpointError(
                f"refused: its {self.entry} asks for {shown}, but plain tensors of numbers are needed."
            )
        if known is None:
            raise CheckpointError(f"refused: its {self.entry} asks for {shown}, {UNSAFE}")
        self.stack.append(known)

    def name_from_stack(self) -> None:
        name = self.pop(str)
        self.name(self.pop(str), name)

    def reduce(self) -> None:
        args = self.pop(tuple)
        self.stack.append(self.pop(Call).make(args))

    def new_object(self) -> None:
        args = self.pop(tuple)
        self.pop(ScriptClass)
        if args:
            raise NoCheckpointsPickleError("a script class with arguments")
        self.stack.append(Record())

    def build(self) -> None:
        state, target = self.pop(Table), self.top(object)
        if isinstance(target, Record) and target.attributes is None:
            target.attributes = state
        elif not (isinstance(target, Table) and target.is_ordered):  # whose only attribute, _metadata, says nothing
            raise NoCheckpointsPickleError(f"a state for a {type(target).__name__}")

    def persistent(self) -> None:
        """("storage", type, key, location, number of elements[, None]); the last is there in old files alone."""
        reference = self.pop(tuple)
        if len(reference) == 6 and reference[5] is None:
            reference = reference[:5]
        if [type(part) for part in reference] != [str, StorageType, str, str, int] or reference[0] != "storage":
            raise NoCheckpointsPickleError("an unknown kind of stored object")
        _, kind, key, _, count = reference
        if not 0 <= count < LARGEST_COUNT:
            raise CheckpointError(f"is refused: it has a storage of {count} elements.")
        if len(key) > LONGEST_NAME:
            raise NoCheckpointsPickleError("a storage of a long name")
        storage = Storage(key, kind.dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise CheckpointError(f"is refused: its storage {one_line(key, MOST_SHOWN)} is of two dtypes or sizes.")
        self.stack.append(storage)


def _constant(value: Any) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.stack.append(value)


def _number(layout: str) -> Callable[[PickleMachine], None]:
    return lambda machine: machine.stack.append(machine.number(layout))


STOP = ord(".")
OPERATIONS: dict[int, Callable[[PickleMachine], None]] = {
    ord("\x80"): PickleMachine.protocol,
    ord("\x95"): lambda machine: machine.number("<Q"),  # FRAME: how much could be read at once
    ord("N"): _constant(None),
    ord("\x88"): _constant(True),
    ord("\x89"): _constant(False),
    ord(")"): _constant(()),
    ord("]"): lambda machine: machine.stack.append([]),
    ord("}"): lambda machine: machine.stack.append(Table()),
    ord("K"): _number("B"),
    ord("M"): _number("<H"),
    ord("J"): _number("<i"),
    ord("\x8a"): PickleMachine.integer,
    ord("G"): _number(">d"),
    ord("X"): lambda machine: machine.text("<I"),
    ord("\x8c"): lambda machine: machine.text("B"),
    ord("("): PickleMachine.mark,
    ord("t"): lambda machine: machine.stack.append(tuple(machine.pop_to_mark())),
    ord("\x85"): lambda machine: machine.tuple_of(1),
    ord("\x86"): lambda machine: machine.tuple_of(2),
    ord("\x87"): lambda machine: machine.tuple_of(3),
    ord("a"): lambda machine: machine.append([machine.pop()]),
    ord("e"): lambda machine: machine.append(machine.pop_to_mark()),
    ord("s"): lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    ord("u"): lambda machine: machine.set_items(machine.pop_to_mark()),
    ord("q"): lambda machine: machine.memoize(machine.number("B")),
    ord("r"): lambda machine: machine.memoize(machine.number("<I")),
    ord("\x94"): PickleMachine.memoize,
    ord("h"): lambda machine: machine.recall(machine.number("B")),
    ord("j"): lambda machine: machine.recall(machine.number("<I")),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    ord("\x93"): PickleMachine.name_from_stack,
    ord("R"): PickleMachine.reduce,
    ord("\x81"): PickleMachine.new_object,
    ord("b"): PickleMachine.build,
    ord("Q"): PickleMachine.persistent,
}
"""The opcodes of protocol 2 that `torch.save` and TorchScript write, and those that its later protocols add."""
