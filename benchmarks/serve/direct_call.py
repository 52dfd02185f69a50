"""A process that encodes without any server, for comparison: the same optimized model, on the same cores.

    python -m benchmarks.serve.direct_call FOLDER

Its first line holds the embeddings of all texts and images. Then it reads lines such as `{"kind": "text", "at_once":
1}`. For each it encodes all texts, or opens and encodes all images, once, and prints the seconds of each call. Between
them it does nothing, so that a server can be measured in turn.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import transformers

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.zero_shot.features import encode_images, encode_texts

from ..measuring import LeftOutError
from .sent_items import KINDS, make_images, make_texts
from .servers import last_words, pinned_process


class Direct(Protocol):
    """What encodes without a server.

    Attributes:
        features: By kind, the embeddings of all texts or images.
    """

    features: dict[str, list[list[float]]]

    def measure(self, kind: str, at_once: int) -> list[float]:
        """Encode everything once, so many in a call. Returns the seconds of each call."""


class DirectHere:
    """Encodes in this process.

    Args:
        folder: The model's.
    """

    def __init__(self, folder: str):
        self.model, self.processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
        self.model.optimize_for_inference()
        self.items: dict[str, Sequence[Any]] = {"text": make_texts(), "image": make_images()}
        self.features = {kind: [self._encode(kind, [item])[0].tolist() for item in self.items[kind]] for kind in KINDS}

    def _encode(self, kind: str, items: Sequence[Any]) -> Any:
        if kind == "text":
            return encode_texts(self.model, self.processor, items, truncation=True)
        return encode_images(self.model, self.processor, items)

    def measure(self, kind: str, at_once: int) -> list[float]:
        """As `Direct.measure`."""
        taken, items = [], self.items[kind]
        for first in range(0, len(items), at_once):
            start = time.perf_counter()
            self._encode(kind, items[first : first + at_once])
            taken.append(time.perf_counter() - start)
        return taken


class _DirectThere:
    """Asks a process that encodes."""

    def __init__(self, process: "subprocess.Popen[str]", log: IO[bytes]):
        self._process, self._log = process, log
        self.features: dict[str, list[list[float]]] = self._next()

    def _next(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(20)
            raise LeftOutError(f"the direct call failed: {last_words(self._log)}")
        return json.loads(line)

    def measure(self, kind: str, at_once: int) -> list[float]:
        """As `Direct.measure`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"kind": kind, "at_once": at_once}) + "\n")
        self._process.stdin.flush()
        return self._next()


@contextmanager
def direct_process(folder: Path, threads: int) -> Iterator[Direct]:
    """A process that encodes with as many threads as a server, on the same cores, and ends with the block."""
    command = [sys.executable, "-W", "ignore", "-m", __name__, os.path.abspath(folder)]
    with pinned_process(command, threads) as (process, log):
        yield _DirectThere(process, log)


def main() -> None:
    transformers.logging.disable_progress_bar()
    direct = DirectHere(sys.argv[1])
    print(json.dumps(direct.features), flush=True)
    for line in sys.stdin:
        print(json.dumps(direct.measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
