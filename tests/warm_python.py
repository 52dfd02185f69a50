"""`python -W ignore -c` in a process that has imported torch already.

To import torch takes three seconds, and some twenty programs of the tests begin with it. Here a server imports it once,
and is forked for each program. What looks at a process's environment, as huggingface_hub and transformers do, is not
imported by the server: a program imports that itself.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LONGEST_SECONDS = 600
"""A program that runs longer is ended by SIGALRM."""


class _Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


_servers: list[_Server] = []


def run_warm(
    code: str, *arguments: object, cwd: Path, environment: dict[str, str] | None = None, given: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own.

    Args:
        code: The program, which does not find torch's import slow.
        arguments: Its `sys.argv[1:]`.
        cwd: The folder that it runs in.
        environment: Variables of its environment beside those of this process.
        given: What it reads from its standard input.

    Returns:
        Its status, which is -14 if it ran too long, and what it printed.
    """
    if not _servers:
        _servers.append(_Server())
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        streams[0].write_text(given, encoding="utf-8")
        request = {"code": code, "arguments": words, "cwd": str(cwd), "streams": [str(path) for path in streams]}
        status = _servers[0].ask(request | {"environment": os.environ | (environment or {})})
        printed = [path.read_text(encoding="utf-8") for path in streams[1:]]
    return subprocess.CompletedProcess(["python", "-c", *words], status, *printed)


def _serve() -> dict[str, Any]:
    """Fork for each request and tell its process's status. Returns the request, in that process."""
    import gc

    gc.disable()
    import torch._dynamo
    import torch.distributed.tensor  # noqa: F401

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            gc.enable()
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(request: dict[str, Any]) -> None:
    """Make this process what `python -c` would have been."""
    signal.alarm(LONGEST_SECONDS)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, (path, flags) in enumerate(zip(request["streams"], ("r", "w", "w"), strict=True)):
        with open(path, flags) as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0:1] = ["", *filter(None, request["environment"].get("PYTHONPATH", "").split(os.pathsep))]


if __name__ == "__main__":
    found = _serve()
    _become(found)
    program = compile(found["code"], "<string>", "exec")
    names = type(sys)("__main__")
    sys.modules["__main__"] = names
    exec(program, names.__dict__)
