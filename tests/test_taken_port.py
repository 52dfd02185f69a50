"""Taking a port before anything slow is done, and the address that people are told."""

import asyncio
import re
import socket

import pytest

from hf_clip.taken_port import PortError, address_of, is_loopback, take_port

from .ports import free_port
from .waiting import LONGEST_WAIT


def skip_without_ipv6(host: str) -> None:
    if ":" in host:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")


def test_second_program_is_told_at_once_and_the_first_keeps_its_connections():
    with take_port("127.0.0.1", free_port()) as taken:
        port = taken.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=LONGEST_WAIT) as waiting:  # nothing is accepted yet
            waiting.sendall(b"question")
            said = f"Port {port} of 127.0.0.1 is taken by another program: end that, or give another port, such as --"
            for host in ("127.0.0.1", "0.0.0.0"):
                with pytest.raises(PortError, match=f"^{said.replace('127.0.0.1', host)}port {port + 1}\\.$"):
                    take_port(host, port)
            connection, _ = taken.accept()
            with connection:
                assert connection.recv(100) == b"question"
                connection.sendall(b"answer")
            assert waiting.recv(100) == b"answer"
    take_port("127.0.0.1", port).close()  # although the last connection has just ended


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_leave_at_once(host: str):
    """With Nagle's algorithm, the body of an answer waits 40 ms for the client to confirm its head."""
    skip_without_ipv6(host)

    async def is_without_delay() -> bool:
        found = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.set_result(bool(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        taken = take_port(host, 0)
        async with await asyncio.start_server(connected, sock=taken):
            _, writer = await asyncio.open_connection(host, taken.getsockname()[1])
            try:
                return await found
            finally:
                writer.close()

    assert asyncio.run(is_without_delay())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 64 + ".example"])
def test_host_that_is_not_this_machine(host: str):
    said = f"^{re.escape(host)} is no name or address of this machine.*: give --host 127.0.0.1 for this machine alone"
    with pytest.raises(PortError, match=said):
        take_port(host, 0)


def test_port_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch):
    def bind(self: object, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    said = "^Port 80 is not allowed for this user: give one above 1023, such as --port 8080.$"
    with pytest.raises(PortError, match=said):
        take_port("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("host", "address", "is_own"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.2", True),
        ("0.0.0.0", "127.0.0.1", False),
        ("::1", "[::1]", True),
        ("::", "[::1]", False),
    ],
)
def test_address_is_one_that_this_machine_can_open(host: str, address: str, is_own: bool):
    skip_without_ipv6(host)
    with take_port(host, 0) as taken:
        assert address_of(taken) == f"http://{address}:{taken.getsockname()[1]}"
        assert is_loopback(taken) == is_own
        socket.create_connection((address.strip("[]"), taken.getsockname()[1]), timeout=LONGEST_WAIT).close()


def test_name_of_this_machine_is_for_it_alone():
    with take_port("localhost", 0) as taken:
        assert is_loopback(taken)
