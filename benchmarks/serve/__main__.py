"""Texts and images per second over HTTP, and how long an answer takes, with 1 to 64 clients: whole processes, in turn.

    python -m benchmarks.serve --quick
    python -m benchmarks.serve --model clip-vit-b32/ --infinity infinity-venv/bin/python

Every client keeps its connection open, sends one text or image, reads the whole answer, and sends the next: texts of
many lengths, and JPEGs of several sizes. All clients are one process. It has the cores that no server uses, or else
those of the server, of which it takes little; how much is printed. By default the model is ViT-B/32 with random
weights.

A process without any server does the same: it calls the same optimized model with one text or image at a time, JPEG
decoding and tokenizing included, on the same cores with as many threads. It and a lone client take turns, so that both
meet the same state of the machine. What it gains from 16 at once is the most that a server can gain from many clients.
The embeddings of each server are compared with its own before anything is said of speed.

infinity gets the same weights in transformers' layout, if --infinity names a Python that has it. Version 0.0.77 needs
older packages than hf_clip:

    infinity-venv/bin/pip install "infinity_emb[all]==0.0.77" "transformers<4.49" "optimum<2"
"""

import argparse
import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, convert
from hf_clip.checkpoints.stock import why_not_stock
from hf_clip.checkpoints.vocabulary import find_vocabulary

from ..__main__ import at_least_one, positive_seconds
from ..machine import describe, headline
from ..measuring import OURS, LeftOutError, first_line
from .direct_call import Direct, direct_process
from .sent_items import KINDS, MODEL_NAME, make_bodies
from .servers import cores_for, hf_clip_server, infinity_server

LEAST_COSINE = {OURS: 0.9999, "infinity": 0.99}
"""Of an embedding and that of a direct call. transformers resizes and crops images in a slightly other way."""

LEAST_PASSES = 2
"""Turns of a lone client and of direct calls, in each of which everything is sent once."""

AT_ONCE = 16

Server = Callable[[], AbstractContextManager[tuple[str, int]]]


@dataclass(frozen=True)
class Point:
    """What was measured with so many clients.

    Attributes:
        server: Its name.
        kind: "text" or "image".
        clients: How many.
        seconds: How long they were counted.
        latencies: Seconds of each answer.
        cpu: Seconds of the clients' process for an answer.
        direct: Seconds of direct calls that took turns with a lone client.
    """

    server: str
    kind: str
    clients: int
    seconds: float
    latencies: list[float]
    cpu: float
    direct: list[float] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds

    def milliseconds(self, share: float) -> float:
        """The latency that so many of the answers did not exceed."""
        return 1e3 * float(np.quantile(self.latencies, share))


def write_model(folder: Path) -> Path:
    """ViT-B/32 with random weights, always the same."""
    torch.manual_seed(0)
    HfClipModel(HfClipConfig.from_variant("ViT-B/32")).eval().save_pretrained(folder)
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    HfClipProcessor(HfClipImageProcessor.for_image_size(224), tokenizer).save_pretrained(folder)
    return folder


def ask_once(host: str, port: int, body: bytes) -> np.ndarray:
    """The embedding that a server answers, (D,)."""
    connection = HTTPConnection(host, port, timeout=60.0)
    try:
        connection.request("POST", "/embeddings", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise LeftOutError(f"it answered {answer.status}: {content[:150].decode(errors='replace')}")
    return np.frombuffer(base64.b64decode(json.loads(content)["data"][0]["embedding"]), dtype="<f4")


def check_features(server: str, kind: str, found: np.ndarray, expected: Sequence[float]) -> None:
    """Raise LeftOutError if an embedding is not that of a direct call."""
    direct = np.asarray(expected, dtype=np.float32)
    cosine = float(found @ direct / np.linalg.norm(found)) if found.shape == direct.shape else 0.0
    if not cosine >= LEAST_COSINE[server]:
        raise LeftOutError(f"its embedding of the {kind} has a cosine similarity of {cosine:.4f} with a direct call's")


def load_with(
    host: str, port: int, bodies: Sequence[bytes], clients: int, threads: int, **until: Any
) -> dict[str, Any]:
    """What the load generator found, see `generate` there. `until` says for how many seconds, or answers."""
    head = f"POST /embeddings HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]
    asked = {"host": host, "port": port, "requests": [each.decode() for each in requests], "clients": clients} | until
    _, cores = cores_for(threads)
    done = subprocess.run(
        [sys.executable, "-S", str(Path(__file__).with_name("load_generator.py"))],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=until.get("seconds", 0) + 120,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or ["the load generator failed"])[-1][:200])
    return json.loads(done.stdout)


def alone_in_turn(name: str, kind: str, load: Callable[..., dict[str, Any]], direct: Direct, seconds: float) -> Point:
    """A lone client and direct calls in turn: everything is sent once, and encoded once. The first turn is warm-up."""
    found, taken, passes = Point(name, kind, 1, 0.0, [], 0.0), 0.0, 0
    while passes <= LEAST_PASSES or taken < 2 * seconds:
        calls, answers = direct.measure(kind, 1), load(1, answers=len(direct.features[kind]))
        passes, taken = passes + 1, taken + sum(calls) + answers["seconds"]
        if passes > 1:
            found = Point(
                *(name, kind, 1, found.seconds + answers["seconds"], found.latencies + answers["latencies"]),
                *(max(found.cpu, answers["cpu"]), found.direct + calls),
            )
    return found


def say_point(point: Point) -> None:
    """Tell what was just measured, since the tables come at the end."""
    direct = f", a direct call {1e3 * statistics.median(point.direct):.1f} ms" if point.direct else ""
    print(
        f"{point.server}: {point.kind}s, clients: {point.clients}, {point.per_second:.1f} per second, p50 "
        f"{point.milliseconds(0.5):.1f} ms{direct}",
        file=sys.stderr,
        flush=True,
    )


def measure_server(
    name: str, server: Server, direct: Direct, clients: Sequence[int], seconds: float, threads: int
) -> list[Point]:
    """All points of one server."""
    points = []
    with server() as (host, port):
        for kind in KINDS:
            bodies = make_bodies(kind)
            for body, expected in zip(bodies, direct.features[kind], strict=True):
                check_features(name, kind, ask_once(host, port, body), expected)
            load = partial(load_with, host, port, bodies, threads=threads)
            load(max(clients), seconds=min(seconds, 1.0))  # batches of every size are met once
            points.append(alone_in_turn(name, kind, load, direct, seconds))
            say_point(points[-1])
            for count in clients[1:]:
                points.append(Point(name, kind, count, **load(count, seconds=seconds)))
                say_point(points[-1])
    return points


def gain_of_batches(direct: Direct, kind: str, seconds: float) -> float:
    """How many times as many per second direct calls encode with `AT_ONCE` in a call, beside one in a call, in turn."""
    taken: dict[int, list[float]] = {1: [], AT_ONCE: []}
    while len(taken[1]) < LEAST_PASSES or sum(map(sum, taken.values())) < 2 * seconds:
        for at_once, passes in taken.items():
            passes.append(sum(direct.measure(kind, at_once)))
    return statistics.median(taken[1]) / statistics.median(taken[AT_ONCE])


def format_points(points: Sequence[Point], gains: dict[str, float], threads: int) -> str:
    """A table of Markdown for each kind."""
    lines = []
    for kind in KINDS:
        lines += ["", f"One {kind} in a request:", ""]
        lines += [
            f"| server | clients | {kind}s per second | times those of one client | p50, ms | p95, ms "
            f"| direct call, p50, ms | p50 by a direct call |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        own = [point for point in points if point.kind == kind]
        for point in own:
            alone = next(other for other in own if other.server == point.server)
            cells = [point.server, str(point.clients), f"{point.per_second:.1f}"]
            cells += [f"{point.per_second / alone.per_second:.2f}" if point is not alone else ""]
            cells += [f"{point.milliseconds(share):.1f}" for share in (0.5, 0.95)]
            direct = 1e3 * statistics.median(point.direct) if point.direct else None
            cells += ["", ""] if direct is None else [f"{direct:.1f}", f"{point.milliseconds(0.5) / direct:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"Direct calls of {AT_ONCE} {kind}s encode {gains[kind]:.2f} times as many as calls of one."]
    where = "the servers' cores" if cores_for(threads)[0] == cores_for(threads)[1] else "cores of their own"
    most = max((point.cpu for point in points), default=0.0)
    return "\n".join([*lines, "", f"The clients ran on {where}, and took at most {1e3 * most:.2f} ms for an answer."])


def why_no_infinity(python: str | None, config: HfClipConfig) -> str | None:
    """Why infinity is left out. None if it can be measured."""
    if python is None:
        return "name the Python that has it with --infinity"
    if reason := why_not_stock(config):
        return reason
    asked = subprocess.run([python, "-c", "import infinity_emb.cli"], capture_output=True, text=True, check=False)
    return (asked.stderr.strip().splitlines() or ["it failed"])[-1][:200] if asked.returncode else None


def measure(options: argparse.Namespace, work: Path) -> tuple[list[Point], dict[str, float], list[str]]:
    """The points of both servers, what direct calls gain from batches, and who is left out."""
    model = Path(options.model).resolve() if options.model else write_model(work / MODEL_NAME)
    config = HfClipConfig.from_pretrained(model)
    servers: dict[str, Server] = {OURS: lambda: hf_clip_server(model, options.threads)}
    left_out = []
    reason = why_no_infinity(options.infinity, config)
    if reason is None:
        stock = work / "stock"
        convert(model, stock, layout="transformers")
        servers["infinity"] = lambda: infinity_server(stock, options.infinity, options.threads)
    else:
        left_out.append(f"infinity is left out: {reason}")
    points: list[Point] = []
    with direct_process(model, options.threads) as direct:
        for name, server in servers.items():
            try:
                points += measure_server(name, server, direct, options.clients, options.seconds, options.threads)
            except LeftOutError as error:
                if name == OURS:
                    raise
                left_out.append(f"{name} is left out: {error}")
        gains = {kind: gain_of_batches(direct, kind, options.seconds) for kind in KINDS}
    return points, gains, left_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="FOLDER", help="any model (default: ViT-B/32 with random weights)")
    parser.add_argument("--infinity", metavar="PYTHON", help="the Python that has infinity_emb (default: only hf_clip)")
    parser.add_argument("--clients", type=at_least_one, nargs="+", help="at the same time (default 1 4 16 64)")
    parser.add_argument("--seconds", type=positive_seconds, help="for each number of clients (default 6)")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="and cores, of everyone")
    parser.add_argument("--quick", action="store_true", help="1 and 16 clients, 2 seconds each: a first look")
    options = parser.parse_args(arguments)
    options.clients = sorted({1, *(options.clients or ([16] if options.quick else [4, 16, 64]))})
    options.seconds = options.seconds or (2.0 if options.quick else 6.0)
    options.infinity = options.infinity and os.path.abspath(options.infinity)
    transformers.logging.disable_progress_bar()
    print(headline(describe(options.threads)))
    try:
        with tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as work:
            points, gains, left_out = measure(options, Path(work))
    except (LeftOutError, OSError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    print("\n".join([format_points(points, gains, options.threads), *left_out]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
