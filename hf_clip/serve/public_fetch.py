"""Fetch an image from an address that a stranger named, and from public addresses only.

A name is looked up once, and the connection goes to the very address that was checked: a second look-up might return
another one. Redirects are followed one by one, each checked in the same way. Neither cookies nor the system's proxies
are used.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from .request_error import RequestError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MOST_REDIRECTS = 3
CONNECT_SECONDS = 5.0

EMBEDDING = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "::/96", "::ffff:0:0:0/96")))
"""IPv6 networks whose last 32 bits are an IPv4 address that is reached in the end."""


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and so does any IPv4 address inside of it."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(address in network for network in EMBEDDING):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(found is not None and not is_public(found) for found in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast and not address.is_reserved


async def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a name."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]


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
        is_allowed: Callable[[Address], bool] = is_public,
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
        except (self._httpx.HTTPError, self._httpx.InvalidURL, OSError, UnicodeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise refused("there is no such address, or it does not answer") from None

    async def _follow(self, url: str, refused: Callable[[str], RequestError]) -> bytes:
        httpx = self._httpx
        timeout = httpx.Timeout(self._seconds, connect=CONNECT_SECONDS)
        # A client for each image: none shares cookies, or a connection that was checked for another name.
        async with httpx.AsyncClient(trust_env=False, timeout=timeout, verify=self._certificates) as client:
            target = httpx.URL(url)
            for _ in range(MOST_REDIRECTS + 1):
                request = await self._request(client, target, refused)
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        return await self._content(response, refused)
                    target = target.join(response.headers["location"])
                finally:
                    await response.aclose()
        raise refused(f"it is redirected more than {MOST_REDIRECTS} times")

    async def _request(self, client: Any, target: Any, refused: Callable[[str], RequestError]) -> Any:
        """A request to the address that a name has now, if that is allowed."""
        if target.scheme not in ("http", "https") or not target.host:
            raise refused("only http and https are fetched")
        if target.userinfo:
            raise refused("it holds a user or a password")
        port = target.port or (443 if target.scheme == "https" else 80)
        addresses = await self._resolve(target.host, port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise refused("it does not lead to the public internet")
        headers = {"Host": target.netloc.decode("ascii"), "User-Agent": "hf_clip", "Accept-Encoding": "identity"}
        extensions = {"sni_hostname": target.raw_host.decode("ascii")}
        return client.build_request(
            "GET", target.copy_with(host=str(addresses[0])), headers=headers, extensions=extensions
        )

    async def _content(self, response: Any, refused: Callable[[str], RequestError]) -> bytes:
        if response.status_code != 200:
            raise refused(f"the server answered {response.status_code}")
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise refused("it is compressed, which was not asked for")
        content = bytearray()
        async for chunk in response.aiter_raw():
            if len(content) + len(chunk) > self._most_bytes:
                raise refused(f"it is larger than {self._most_bytes:,} bytes")
            content += chunk
        return bytes(content)


__all__ = ["PublicFetcher", "is_public", "look_up"]
