"""`hf-clip serve` in a process that does what its test says while it runs.

Its time limits are far away, so that nobody is cut off where a machine lets one of both sides stand still for a while.
A test shortens the one that it is about. Texts of many tokens are encoded when the test lets them.

Each order is a line of JSON at the standard input, the order's name and what it is given, and is answered by a line.
"""

import json
import os
import sys
import threading
import time
from functools import partial
from typing import Any

import uvicorn

from hf_clip.commands.program import main
from hf_clip.serve import server_process
from hf_clip.serve.served_model import ServedModel

FAR = 3600
LONG = 15
"""Tokens of a text that has to wait."""

MOST_CONNECTIONS = 60


class Controls:
    """What is counted and changed while the server runs."""

    def __init__(self) -> None:
        self.parent = os.getppid()
        self.server: Any = None
        self.counts = {"accepted": 0, "begun": 0}
        self.batches: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def limit(self, name: str, seconds: float) -> float:
        """Change a time limit. Returns what it was."""
        place = self.server.options.__dict__ if name == "body_seconds" else vars(server_process)
        before, place[name] = place[name], seconds
        return before

    def hold(self) -> None:
        """Let long texts wait from now on."""
        self.batches.clear()
        self.may_go_on.clear()

    def release(self) -> None:
        """Let them go on."""
        self.may_go_on.set()

    def held(self) -> list[int]:
        """How many texts each batch had that had to wait since `hold`."""
        return self.batches

    def count(self, name: str) -> int:
        """Connections that were accepted, or requests that were begun, since the server's start."""
        return self.counts[name]

    def obey(self) -> None:
        # Not sys.stdin, whose lock this thread would hold when the process ends.
        while asked := os.read(0, 10_000):
            name, *given = json.loads(asked)
            print(json.dumps(getattr(self, name)(*given)), flush=True)
        while os.getppid() == self.parent:
            time.sleep(1)
        os._exit(1)  # whoever started it was killed, and nobody would end it

    def change(self) -> None:
        """Put this in the place of what is counted and changed."""
        encode, serve, accept = ServedModel.encode_texts, server_process.serve_forever, server_process.PatientProtocol

        class Protocol(accept):  # type: ignore[misc, valid-type]
            def connection_made(protocol, transport: Any) -> None:  # noqa: N805
                self.counts["accepted"] += 1
                super().connection_made(transport)

        def encode_texts(served: ServedModel, rows: list[Any]) -> Any:
            if any(len(row) > LONG for row in rows):
                self.batches.append(len(rows))
                self.may_go_on.wait()
            return encode(served, rows)

        def serve_forever(app: Any, taken: Any) -> None:
            async def counted(scope: Any, receive: Any, send: Any) -> None:
                self.counts["begun"] += scope["type"] == "http"
                await app(scope, receive, send)

            self.server = app.state.server
            for name in ("HEAD_SECONDS", "ANSWER_SECONDS", "body_seconds"):
                self.limit(name, FAR)
            threading.Thread(target=self.obey, daemon=True).start()
            serve(counted, taken)

        ServedModel.encode_texts = encode_texts  # type: ignore[method-assign]
        server_process.serve_forever = serve_forever
        server_process.PatientProtocol = Protocol  # type: ignore[misc]
        server_process.MOST_CONNECTIONS, server_process.GRACE_SECONDS = MOST_CONNECTIONS, FAR
        uvicorn.Config = partial(uvicorn.Config, timeout_keep_alive=FAR)  # type: ignore[misc, assignment]


if __name__ == "__main__":
    Controls().change()
    sys.exit(main(sys.argv[1:]))
