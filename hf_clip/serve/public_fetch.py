"""Fetch an image from an address that a stranger named, and from public addresses only.

A name is looked up once, and connections go to the very addresses that were checked, one after the other until one
answers: a second look-up might return others. Redirects are followed one by one, each checked in the same way. Neither
cookies nor the system's proxies are used.
"""

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from .request_error import RequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MOST_REDIRECTS = 3
CONNECT_SECONDS = 5.0

MOST_ADDRESSES = 4
"""Addresses of a name that are tried one after the other: of IPv6 and IPv4 in turn, since this machine may not reach
one of them."""

MOST_PARTS = 50_000
"""Parts in which an image may arrive. A server can send each byte as a part of its own."""

TURN = 64
"""Parts after which the event loop turns. What was received is taken apart without a pause otherwise."""

UNICAST = ipaddress.IPv6Network("2000::/3")
"""The IPv6 addresses of the public internet, and those that stand for IPv4 addresses."""

NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # protocols; one cloud's metadata. Python 3.11 takes most of them for public
            "192.88.99.0/24",  # relays of 6to4
            "168.63.129.16/32",  # Azure's own service for the machines in it
            "3fff::/20",  # documentation
        ),
    )
)

ISATAP = (0x00005EFE, 0x02005EFE)
"""Third quarters of IPv6 addresses whose last one is an IPv4 address that is reached in the end."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and so does any IPv4 address inside of it."""
    if any(address.version == network.version and address in network for network in NOT_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        inner = [address.sixtofour, *(address.teredo or ())]
        if int(address) >> 32 & 0xFFFFFFFF in ISATAP:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST or any(found is not None and not is_public(found) for found in inner):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def is_own(address: Address) -> bool:
    """Whether an address is one of this machine's, where a firewall would not be asked. Only those can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as trial:
            trial.bind((str(address), 0))
    except OSError:
        return False
    return True


def is_elsewhere(address: Address) -> bool:
    """Whether an address is public, and not this machine's."""
    return is_public(address) and not is_own(address)


async def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


def in_turn(addresses: list[Address]) -> list[Address]:
    """Addresses of both kinds in turn, and else in their order. Some names have eight of IPv6."""
    places = Counter[int]()
    ranked = []
    for address in addresses:
        ranked.append((places[address.version], address))
        places[address.version] += 1
    return [address for _, address in sorted(ranked, key=lambda pair: pair[0])]


class PublicFetcher:
    """Fetches images within limits.

    Args:
        seconds: How long one may take, redirects included.
        most_bytes: Bytes that one may have.
        is_allowed: Which addresses may be connected to.
        resolve: Function from a host and a port to its addresses.
    """

    def __init__(
        self,
        seconds: float,
        most_bytes: int,
        is_allowed: Callable[[Address], bool] = is_elsewhere,
        resolve: Callable[[str, int], Awaitable[list[Address]]] = look_up,
    ):
        from huggingface_hub.utils import httpx  # httpx, or its successor, as in `model.fetch`

        self._httpx = httpx
        self._certificates = httpx.create_ssl_context()
        self._seconds, self._most_bytes = seconds, most_bytes
        self._is_allowed, self._resolve = is_allowed, resolve

    async def fetch(self, url: str, name: str) -> bytes:
        """Fetch the content of an http or https address.

        Args:
            url: The address.
            name: Where in the request it was, for messages.

        Raises:
            RequestError: It is not public, too slow or too large, or does not answer.
        """

        def refused(why: str) -> RequestError:
            return RequestError(400, f"{name} cannot be fetched: {why}.", "image_fetch_failed", "input")

        try:
            return await asyncio.wait_for(self._follow(url.strip(), refused), self._seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise refused(f"it did not arrive within {self._seconds:g} s") from None
        except RequestError:
            raise
        except Exception:  # of what a stranger named and another stranger sent; it is none of ours
            raise refused("there is no such address, or it does not answer") from None

    async def _follow(self, url: str, refused: Callable[[str], RequestError]) -> bytes:
        httpx = self._httpx
        # A client for each image: none shares cookies, or a connection that was checked for another name.
        async with httpx.AsyncClient(trust_env=False, verify=self._certificates) as client:
            target = httpx.URL(url)
            for _ in range(MOST_REDIRECTS + 1):
                response = await self._ask(client, target, refused)
                try:
                    if not response.has_redirect_location:
                        return await self._content(response, refused)
                    target = target.join(response.headers["location"])
                finally:
                    await response.aclose()
        raise refused(f"it is redirected more than {MOST_REDIRECTS} times")

    async def _ask(self, client: Any, target: Any, refused: Callable[[str], RequestError]) -> Any:
        """The answer of the first address of a name that can be connected to. Each of them must be allowed."""
        addresses = await self._addresses_of(target, refused)
        connect = min(CONNECT_SECONDS, self._seconds / (len(addresses) + 1))  # time is left for the last one's answer
        failed: Exception | None = None
        for address in addresses:
            request = client.build_request(
                "GET",
                target.copy_with(host=str(address)),
                headers={"Host": target.netloc.decode("ascii"), "User-Agent": "hf_clip", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": target.raw_host.decode("ascii")},
                timeout=self._httpx.Timeout(self._seconds, connect=connect),
            )
            try:
                return await client.send(request, stream=True)
            except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
                failed = error
        assert failed is not None
        raise failed

    async def _addresses_of(self, target: Any, refused: Callable[[str], RequestError]) -> list[Address]:
        """Those addresses of a name that are tried, in their order. Each that it has now must be allowed."""
        if target.scheme not in ("http", "https") or not target.host:
            raise refused("only http and https are fetched")
        if target.userinfo:
            raise refused("it holds a user or a password")
        port = target.port if target.port is not None else 443 if target.scheme == "https" else 80
        if not 0 < port < 2**16:
            raise refused(f"there is no port {str(port)[:10]}")
        addresses = list(dict.fromkeys(await self._resolve(target.host, port)))
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise refused("it does not lead to the public internet")
        return in_turn(addresses)[:MOST_ADDRESSES]

    async def _content(self, response: Any, refused: Callable[[str], RequestError]) -> bytes:
        if response.status_code != 200:
            raise refused(f"the server answered {response.status_code}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise refused("it is compressed, which was not asked for")
        content, parts = bytearray(), 0
        async for chunk in response.aiter_raw():
            parts += 1
            if parts > MOST_PARTS:
                raise refused("it comes in too many parts")
            if parts % TURN == 0:
                await asyncio.sleep(0)
            if len(content) + len(chunk) > self._most_bytes:
                raise refused(f"it is larger than {self._most_bytes:,} bytes")
            content += chunk
        return bytes(content)


__all__ = ["PublicFetcher", "is_elsewhere", "is_own", "is_public", "look_up"]
