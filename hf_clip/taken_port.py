"""The port of a server: taken before anything slow is done, and named for people.

A port is listened on at once. Of two programs that only bind a port, both succeed, and the second one fails when it
listens, which may be after minutes of loading. Whoever connects before the server answers waits.
"""

import errno
import ipaddress
import os
import socket

WAITING = 2048
"""Connections that may wait until they are accepted; the system may allow fewer."""


class PortError(OSError):
    """A server cannot start: its port is taken or not allowed, or its address is none of this machine's."""


def take_port(host: str, port: int) -> socket.socket:
    """Take a port, and listen on it.

    Args:
        host: Name or address of this machine.
        port: The port. 0: any that is free.

    Returns:
        A socket that listens. Connections wait until a server accepts them.

    Raises:
        PortError: The port is taken or not allowed, or the host is not of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):  # a name that is too long for DNS is a UnicodeError
        raise PortError(_no_address(host, "")) from None
    try:
        has_both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        taken = socket.create_server(address, family=family, backlog=WAITING, dualstack_ipv6=has_both)
        # asyncio lets answers leave at once, and not 40 ms later, only where the protocol has its number.
        return socket.socket(taken.family, taken.type, socket.IPPROTO_TCP, fileno=taken.detach())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortError(
                f"Port {port} of {host} is taken by another program: end that, or give another port, such as --port "
                f"{port + 1 if port < 65535 else port - 1}."
            ) from None
        if error.errno == errno.EACCES:
            raise PortError(
                f"Port {port} is not allowed for this user: give one above 1023, such as --port {port + 8000}."
            ) from None
        raise PortError(_no_address(host, f" ({os.strerror(error.errno or 0)})")) from None


def _no_address(host: str, why: str) -> str:
    return (
        f"{host} is no name or address of this machine{why}: give --host 127.0.0.1 for this machine alone, or --host "
        f"0.0.0.0 for its networks."
    )


def address_of(taken: socket.socket) -> str:
    """The address at which programs of this machine find a server."""
    host, port = taken.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(taken: socket.socket) -> bool:
    """Whether only programs of this machine reach a server."""
    host = taken.getsockname()[0].partition("%")[0]  # an IPv6 address may name an interface
    return ipaddress.ip_address(host).is_loopback


__all__ = ["PortError", "address_of", "is_loopback", "take_port"]
