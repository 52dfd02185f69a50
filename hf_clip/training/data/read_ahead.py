"""Read a stream in a thread of its own, so that waiting for the disk or the network does not hold up the training."""

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

LOOK_UP = 0.1
"""Seconds after which a reader that is held up looks whether anyone still wants its items."""


def read_ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """The same items in the same order, at most `depth` of them read before they are asked for.

    The thread starts with the first item, and ends with the iterator, or when that is closed.
    """
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(kind: str, item: Any) -> bool:
        while not unwanted.is_set():
            try:
                waiting.put((kind, item), timeout=LOOK_UP)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    reader = threading.Thread(target=read, name="hf_clip reader", daemon=True)
    reader.start()
    try:
        while True:
            kind, item = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        unwanted.set()
        reader.join()
