"""What `hf-clip serve` keeps in memory over 100,000 mixed requests, of which every seventh is bad.

    python -m benchmarks.serve.memory
    python -m benchmarks.serve.memory --requests 5000 --every 500

The requests are those of `mixed_requests`: all dialects, texts of any length, images of many sizes and formats, labels
that are new each time, broken bodies and images, and clients that leave in the middle. Every answer is looked at: a bad
request must get an error of its own, and a good one must not. By default the model is a small one with random weights,
since what is looked for does not depend on the model.

The slope is that of a straight line through the readings of the second half. In the first half, memory that is kept on
purpose fills up: the tokenizer's words, the last 32 classifiers, and what glibc keeps of freed memory.
"""

import argparse
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import torch
import transformers

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer
from hf_clip.checkpoints.vocabulary import find_vocabulary

from ..__main__ import at_least_one
from ..machine import describe, headline
from ..measuring import LeftOutError, first_line, memory_of_process
from .mixed_requests import MixedRequests, Sent
from .servers import hf_clip_process

REQUESTS, EVERY, CLIENTS = 100_000, 5_000, 8
IMAGE_SIZE = 64


@dataclass(frozen=True)
class Reading:
    """What was read of a server.

    Attributes:
        requests: How many it had answered.
        seconds: Since the first one.
        whole: Bytes of it in memory.
        own: Of these, bytes in no file.
    """

    requests: int
    seconds: float
    whole: int
    own: int


def write_small_model(folder: Path) -> Path:
    """A small ViT and a small text tower with random weights, and OpenAI's vocabulary."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = HfClipConfig(
        text_config=layers,
        vision_config=layers | {"image_size": IMAGE_SIZE, "patch_size": 16},
        projection_dim=64,
    )
    torch.manual_seed(0)
    HfClipModel(config).eval().save_pretrained(folder)
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    HfClipProcessor(HfClipImageProcessor.for_image_size(IMAGE_SIZE), tokenizer).save_pretrained(folder)
    return folder


class Clients:
    """Threads, each with a connection of its own, that send requests until there are no more.

    Args:
        host: The server's.
        port: The server's.
        requests: What to send.

    Attributes:
        sent: How many of each name were sent.
        wrong: What should not have been answered, with the beginning of the answer.
    """

    def __init__(self, host: str, port: int, requests: Iterator[Sent]):
        self._host, self._port, self._requests = host, port, requests
        self._lock = threading.Lock()
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []

    def send(self, count: int) -> None:
        """Send so many requests, and wait for all answers."""
        with self._lock:
            self._left = count
        threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> Sent | None:
        with self._lock:
            if self._left == 0 or self.wrong:
                return None
            self._left -= 1
            found = next(self._requests)
            self.sent[found.name] += 1
            return found

    def _work(self) -> None:
        connection = HTTPConnection(self._host, self._port, timeout=60.0)
        while (sent := self._next()) is not None:
            try:
                if sent.leaves_after is not None:
                    self._leave(sent, sent.leaves_after)
                    continue
                connection.request("POST", sent.path, sent.body, {"Content-Type": sent.content_type})
                answer = connection.getresponse()
                content = answer.read()
            except Exception as error:  # that a thread should not end with alone
                self.wrong.append(f"{sent.name}: {first_line(error)}")
                return
            if answer.status != sent.status:
                said = content[:200].decode(errors="replace")
                self.wrong.append(f"{sent.name}: {answer.status}, not {sent.status}: {said}")
        connection.close()

    def _leave(self, sent: Sent, after: float) -> None:
        """Send a part of a request, and close the connection."""
        head = f"POST {sent.path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: {sent.content_type}\r\n"
        whole = f"{head}Content-Length: {len(sent.body)}\r\n\r\n".encode() + sent.body
        with socket.create_connection((self._host, self._port)) as connection:
            connection.sendall(whole[: int(after * len(whole))])


def read_memory(process: int, requests: int, start: float) -> Reading:
    """Read the memory of a server."""
    whole, own = memory_of_process(process, "VmRSS"), memory_of_process(process, "RssAnon")
    if whole is None or own is None:
        raise LeftOutError("this system does not tell the memory of a process: Linux is needed")
    return Reading(requests, time.perf_counter() - start, whole, own)


def slope(readings: Sequence[Reading]) -> float:
    """Bytes of its own memory that a server gains for each request, by the readings of the second half."""
    half = readings[len(readings) // 2 :]
    return float(np.polyfit([each.requests for each in half], [each.own for each in half], 1)[0])


def measure(model: Path, count: int, every: int, threads: int) -> tuple[list[Reading], Counter[str]]:
    """Send requests, and read the memory every so many; how many of each name were sent."""
    readings: list[Reading] = []
    with hf_clip_process(model, threads) as (process, host, port):
        clients, start = Clients(host, port, iter(MixedRequests(random.Random(26)))), time.perf_counter()
        for done in range(0, count + 1, every):
            if done:
                clients.send(every)
            if clients.wrong:
                raise LeftOutError(f"after {done:,} requests, {clients.wrong[0]}")
            readings.append(read_memory(process, done, start))
            last = readings[-1]
            print(f"| {done:,} | {last.seconds:.0f} | {last.whole / 2**20:.1f} | {last.own / 2**20:.1f} |", flush=True)
    return readings, clients.sent


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="FOLDER", help="any model (default: a small one with random weights)")
    parser.add_argument("--requests", type=at_least_one, default=REQUESTS, help=f"(default {REQUESTS:,})")
    parser.add_argument("--every", type=at_least_one, default=EVERY, help=f"requests to a reading (default {EVERY:,})")
    parser.add_argument(
        "--threads", type=at_least_one, default=torch.get_num_threads(), help="and cores, of the server"
    )
    options = parser.parse_args(arguments)
    if options.requests < 4 * options.every:
        parser.error(f"--requests {options.requests} gives fewer than four readings with --every {options.every}")
    transformers.logging.disable_progress_bar()
    print(headline(describe(options.threads)))
    print("\n| requests | seconds | in memory, MiB | of these in no file, MiB |\n|---|---|---|---|", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as work:
            model = Path(options.model).resolve() if options.model else write_small_model(Path(work) / "model")
            readings, sent = measure(model, options.requests, options.every, options.threads)
    except (LeftOutError, OSError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    print(f"\nSent: {', '.join(f'{count:,} {name}' for name, count in sent.most_common())}.")
    print(f"Slope of the second half: {1000 * slope(readings) / 1024:.1f} KiB for 1,000 requests.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
