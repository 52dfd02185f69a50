"""Texts and images per second over HTTP, and how long an answer takes, with 1 to 64 clients: whole processes, in turn.

    python -m benchmarks.serve --quick
    python -m benchmarks.serve --model clip-vit-b32/ --infinity infinity-venv/bin/python

Every client keeps its connection open, sends one text or image, reads the whole answer, and sends the next. The
clients are one process, which runs beside the server on the same cores and takes little of them; how much is printed.
First a process without any server calls the model itself, one text and one image at a time, and has the machine for
itself. The embeddings of each server are compared with its own before anything is said of speed. By default the model
is ViT-B/32 with random weights.

infinity gets the same weights in transformers' layout, if --infinity names a Python that has it. Version 0.0.77 needs
older packages than hf_clip:

    infinity-venv/bin/pip install "infinity_emb[all]==0.0.77" "transformers<4.49" "optimum<2"
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
from ..measuring import OURS, LeftOutError, first_line, run_alone
from .direct_call import TEXT, call_directly, make_image
from .servers import MODEL_NAME, hf_clip_server, infinity_server

KINDS = ("text", "image")
LEAST_COSINE = {OURS: 0.9999, "infinity": 0.99}
"""Of an embedding and that of a direct call. transformers resizes and crops images in a slightly other way."""

Server = Callable[[], AbstractContextManager[tuple[str, int]]]


@dataclass(frozen=True)
class Point:
    """What was measured with so many clients."""

    server: str
    kind: str
    clients: int
    per_second: float
    latencies: list[float]
    cpu: float

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


def body_of(kind: str) -> bytes:
    """The request of a text or an image, which both servers understand."""
    given = TEXT if kind == "text" else f"data:image/jpeg;base64,{base64.b64encode(make_image()).decode()}"
    body = {"model": MODEL_NAME, "input": [given], "modality": kind, "encoding_format": "base64"}
    return json.dumps(body).encode()


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


def load_with(host: str, port: int, body: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """What the load generator found, see `generate` there."""
    head = f"POST /embeddings HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    asked = {"host": host, "port": port, "request": request.decode(), "clients": clients, "seconds": seconds}
    program = Path(__file__).with_name("load_generator.py")
    done = subprocess.run(
        [sys.executable, "-S", str(program)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds + 120,
    )
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or ["the load generator failed"])[-1][:200])
    return json.loads(done.stdout)


def measure_server(
    name: str, server: Server, expected: dict[str, Any], clients: Sequence[int], seconds: float
) -> list[Point]:
    """All points of one server."""
    points = []
    with server() as (host, port):
        for kind in KINDS:
            body = body_of(kind)
            check_features(name, kind, ask_once(host, port, body), expected[kind]["features"])
            load_with(host, port, body, max(clients), min(seconds, 1.0))  # batches of every size are met once
            for count in clients:
                print(f"{name}: {kind}s, {count} clients", file=sys.stderr, flush=True)
                found = load_with(host, port, body, count, seconds)
                points.append(Point(name, kind, count, **found))
    return points


def format_points(points: Sequence[Point], expected: dict[str, Any]) -> str:
    """A table of Markdown for each kind."""
    lines = []
    for kind in KINDS:
        own = [point for point in points if point.kind == kind]
        direct = expected[kind]["seconds"]
        lines += ["", f"One {kind} in a request; a direct call takes {1e3 * direct:.1f} ms:", ""]
        lines += [
            f"| server | clients | {kind}s per second | times those of one client | p50, ms | p95, ms "
            f"| p50 by a direct call |"
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for point in own:
            alone = next(other for other in own if other.server == point.server)
            ratio = f"{point.per_second / alone.per_second:.2f}" if point is not alone else ""
            by_direct = f"{point.milliseconds(0.5) / 1e3 / direct:.2f}" if point.clients == 1 else ""
            lines.append(
                f"| {point.server} | {point.clients} | {point.per_second:.1f} | {ratio} | "
                f"{point.milliseconds(0.5):.1f} | {point.milliseconds(0.95):.1f} | {by_direct} |"
            )
    most = max((point.cpu for point in points), default=0.0)
    return "\n".join([*lines, "", f"The clients took at most {1e3 * most:.2f} ms of a core for an answer."])


def why_no_infinity(python: str | None, config: HfClipConfig) -> str | None:
    """Why infinity is left out. None if it can be measured."""
    if python is None:
        return "name the Python that has it with --infinity"
    if reason := why_not_stock(config):
        return reason
    asked = subprocess.run([python, "-c", "import infinity_emb.cli"], capture_output=True, text=True, check=False)
    return (asked.stderr.strip().splitlines() or ["it failed"])[-1][:200] if asked.returncode else None


def measure(options: argparse.Namespace, work: Path) -> tuple[list[Point], dict[str, Any], list[str]]:
    """The points of both servers, what a direct call found, and who is left out."""
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
    expected = run_alone(call_directly, folder=str(model), seconds=options.seconds, threads=options.threads)
    points: list[Point] = []
    for name, server in servers.items():
        try:
            points += measure_server(name, server, expected, options.clients, options.seconds)
        except LeftOutError as error:
            if name == OURS:
                raise
            left_out.append(f"{name} is left out: {error}")
    return points, expected, left_out


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
            points, expected, left_out = measure(options, Path(work))
    except (LeftOutError, OSError, ValueError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    print("\n".join([format_points(points, expected), *left_out]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
