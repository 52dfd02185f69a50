"""Clients with connections that stay open, in a process of its own, which imports nothing but the standard library.

Each client sends a request, reads the whole answer, and sends the next. Bodies are made before, and answers are not
decoded, so that the process takes little of the cores that the server needs.
"""

import json
import selectors
import socket
import sys
import time
from itertools import cycle
from typing import Any

WARM_UP = 0.25
"""Share of the time that is not counted, nor are as many answers as there are clients: they have to fall into step, and
those who ask first meet an empty queue."""


class Client:
    """One connection, and what has arrived of its answer."""

    def __init__(self, host: str, port: int):
        self.connection = socket.create_connection((host, port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.start = 0.0

    def send(self, request: bytes) -> None:
        self.arrived, self.needed = bytearray(), -1
        self.start = time.perf_counter()
        self.connection.sendall(request)

    def receive(self) -> bool:
        """Take what has arrived. Returns whether it is the whole answer. Raises RuntimeError for an error."""
        part = self.connection.recv(1 << 18)
        if not part:
            raise RuntimeError("the server closed a connection")
        self.arrived += part
        end = self.arrived.find(b"\r\n\r\n")
        if self.needed < 0 and end >= 0:
            head = bytes(self.arrived[:end]).lower()
            self.needed = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if self.needed < 0 or len(self.arrived) < self.needed:
            return False
        if self.arrived[9:12] != b"200":
            said = bytes(self.arrived[end + 4 : end + 200]).decode(errors="replace")
            raise RuntimeError(f"the server answered {self.arrived[9:12].decode()}: {' '.join(said.split())}")
        return True


def generate(
    host: str, port: int, requests: list[bytes], clients: int, seconds: float = 0.0, answers: int | None = None
) -> dict[str, Any]:
    """Send requests, one after the other, each time the next one of a list.

    Args:
        host: The server's.
        port: The server's.
        requests: Heads and bodies.
        clients: How many connections, each with one request under way.
        seconds: How long, a quarter of it uncounted; longer until as many answers as there are clients are counted.
        answers: How many to count, from the first on, in place of `seconds`.

    Returns:
        `latencies` in seconds, one for each answer that was counted, the `seconds` in which as many clients wait for
        that long, and `cpu`, the seconds of this process for an answer.
    """
    given = cycle(requests)
    everyone = [Client(host, port) for _ in range(clients)]
    found: list[float] = []
    with selectors.DefaultSelector() as selector:
        begin = time.perf_counter()
        for client in everyone:
            selector.register(client.connection, selectors.EVENT_READ, client)
            client.send(next(given))
        is_counting, is_ending, left, received = answers is not None, False, clients, 0
        cpu = time.process_time()
        while left:
            ready = selector.select(timeout=60.0)
            if not ready:
                raise RuntimeError("no answer came within 60 s")
            for key, _ in ready:
                client = key.data
                if not client.receive():
                    continue
                now, received = time.perf_counter(), received + 1
                if is_counting and not is_ending:
                    found.append(now - client.start)
                elif not is_counting and received >= clients and now - begin >= WARM_UP * seconds:
                    is_counting = True
                is_ending = is_ending or (now - begin >= seconds and len(found) >= (answers or clients))
                if is_ending:
                    left -= 1  # what is under way is finished, and not counted
                    selector.unregister(client.connection)
                    client.connection.close()
                else:
                    client.send(next(given))
    taken = (time.process_time() - cpu) / received
    # Answers come many at once, so that a clock would count a batch more or less. Each client always waits for one.
    return {"seconds": sum(found) / clients, "latencies": found, "cpu": taken}


def main() -> None:
    """Read what to do from standard input, and print what was found; both as JSON."""
    asked = json.load(sys.stdin)
    asked["requests"] = [request.encode() for request in asked["requests"]]
    print(json.dumps(generate(**asked)))


if __name__ == "__main__":
    main()
