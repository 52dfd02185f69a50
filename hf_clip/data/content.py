"""What an image or a caption is, as one number: rows that show the same thing are known by it in every process."""

import hashlib
from collections.abc import Sequence

import numpy as np


def content_id(content: bytes | str) -> int:
    """A non-negative number below 2⁶³ that names an image's bytes or a caption; equal in all processes and runs."""
    if isinstance(content, str):
        content = content.encode("utf-8", errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def tokens_id(input_ids: Sequence[int]) -> int:
    """The number of a caption by its tokens, not padded: equal where the model reads the same."""
    return content_id(np.asarray(input_ids, dtype="<i8").tobytes())
