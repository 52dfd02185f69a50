"""Clients with connections that stay open, in a process of its own, which imports nothing but the standard library.

Each client sends a request, reads the whole answer, and sends the next. Bodies are made before, and answers are not
decoded, so that the process takes little of the cores that the server needs.
"""

import json
import selectors
import socket
import sys
import time
from typing import Any

WARM_UP = 0.25
"""Share of the time that is not counted: the clients have to fall into step."""


class Client:
    """One connection: the request under way, and what has arrived of its answer."""

    def __init__(self, host: str, port: int, request: bytes):
        self.request = request
        self.connection = socket.create_connection((host, port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.start = 0.0

    def send(self) -> None:
        self.arrived, self.needed = bytearray(), -1
        self.start = time.perf_counter()
        self.connection.sendall(self.request)

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


def generate(host: str, port: int, request: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Send requests for some seconds.

    Args:
        host: The server's.
        port: The server's.
        request: Head and body.
        clients: How many connections, each with one request under way.
        seconds: How long, a quarter of it uncounted.

    Returns:
        `per_second` answers, `latencies` in seconds, one for each answer that was counted, and `cpu`, the seconds of
        this process for an answer.
    """
    everyone = [Client(host, port, request) for _ in range(clients)]
    found: list[float] = []
    with selectors.DefaultSelector() as selector:
        for client in everyone:
            selector.register(client.connection, selectors.EVENT_READ, client)
            client.send()
        begin = time.perf_counter()
        counted_from, end = begin + WARM_UP * seconds, begin + seconds
        last, is_ending, left, cpu, answers = begin, False, clients, time.process_time(), 0
        while left:
            ready = selector.select(timeout=60.0)
            if not ready:
                raise RuntimeError("no answer came within 60 s")
            for key, _ in ready:
                client = key.data
                if not client.receive():
                    continue
                now, answers = time.perf_counter(), answers + 1
                if now >= counted_from and not is_ending:
                    found.append(now - client.start)
                    last = now
                is_ending = now >= end
                if is_ending:
                    left -= 1  # what is under way is finished, and not counted
                    selector.unregister(client.connection)
                    client.connection.close()
                else:
                    client.send()
    if not found:
        raise RuntimeError(f"no answer could be counted in {seconds:g} s: give it more seconds")
    taken = (time.process_time() - cpu) / max(answers, 1)
    return {"per_second": len(found) / (last - counted_from), "latencies": found, "cpu": taken}


def main() -> None:
    """Read what to do from standard input, and print what was found; both as JSON."""
    asked = json.load(sys.stdin)
    asked["request"] = asked["request"].encode()
    print(json.dumps(generate(**asked)))


if __name__ == "__main__":
    main()
