"""What a picture or a caption is, as one number: rows that show the same thing are known by it in every process."""

import hashlib


def content_id(content: bytes | str) -> int:
    """A non-negative number below 2⁶³ that names a picture's bytes or a caption; equal in all processes and runs."""
    if isinstance(content, str):
        content = content.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
