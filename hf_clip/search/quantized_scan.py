"""Embeddings in fewer bits, compared with a query one by one, and the best of them compared again in float16.

int8   Each dimension is centred and divided by its largest value: x ≈ m + s ∘ c with c from -127 to 127. So
       q·x ≈ q·m + (q ∘ s)·c, and the error is at most Σ |q| s / 2. A few dimensions of CLIP are large in all images;
       centring takes that out, where one scale for a vector would spend its bits on them.
bits   Each vector is centred and rotated at random, and the signs are kept: one bit for a number. With the factor
       f = |x - m|² / Σ |R (x - m)| the sum f · Σ ± (R q) is an estimate of q·(x - m) without bias (Gao & Long 2024,
       "RaBitQ"). The query's part along m is compared exactly, by one number for each image, and the rest is rounded to
       four bits, so that the sum is made of AND and counts of ones.

Codes are in memory. The float16 embeddings, of which each query needs the best few hundred, are mapped from the file.

Dimensions: I images, D embedding, Q queries, W words of 64 bits, K results.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.whole_file import whole_file
from ..model.checked_files import one_line
from .exact_scan import EmbeddingMatrix, sample_places
from .set_bits import count_ones, count_ones_by_table

KINDS = ("int8", "bits")
RESCORED = {"int8": 200, "bits": 1000}
"""How many of the best images by their codes are compared again."""

ROWS_AT_ONCE = 16_384
"""Images that are encoded, or whose bits are compared, at once: their words are in the processor's cache."""

INT8_ROWS_AT_ONCE = 2048
QUERY_BITS = 4
WORD = 64
FORMAT = "1"


class QuantizedFileError(ValueError):
    """A file of quantized embeddings is missing, damaged, or of another state.

    Attributes:
        path: The file.
    """

    def __init__(self, message: str, path: str = ""):
        super().__init__(message, path)
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class Int8Codes:
    """Embeddings as 8-bit numbers.

    Attributes:
        codes: (I, D) int8.
        scales: (D,) float32, what a code of 1 stands for.
        mean: (D,) float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor, mean: Tensor):
        self.codes, self.scales, self.mean = codes, scales, mean

    @classmethod
    def encode(cls, embeddings: Tensor) -> "Int8Codes":
        """Encode embeddings (I, D)."""
        mean = _mean_of(embeddings)
        largest = torch.zeros(embeddings.shape[1])
        for part in embeddings.split(ROWS_AT_ONCE):
            largest = torch.maximum(largest, (part.float() - mean).abs().amax(0))
        scales = largest.clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
        codes = torch.empty(embeddings.shape, dtype=torch.int8)
        for first in range(0, len(embeddings), ROWS_AT_ONCE):
            part = embeddings[first : first + ROWS_AT_ONCE].float()
            codes[first : first + len(part)] = ((part - mean) / scales).round_().clamp_(-127, 127)
        return cls(codes, scales, mean)

    def similarities(self, queries: Tensor) -> Tensor:
        """Estimate the similarities of queries (Q, D) with all images: (Q, I) float32."""
        found = torch.empty(len(queries), len(self.codes))
        wide = torch.empty(min(INT8_ROWS_AT_ONCE, len(self.codes)), self.codes.shape[1])
        scaled = queries * self.scales
        for first in range(0, len(self.codes), INT8_ROWS_AT_ONCE):
            part = self.codes[first : first + INT8_ROWS_AT_ONCE]
            block = wide[: len(part)]
            block.copy_(part)
            torch.mm(scaled, block.T, out=found[:, first : first + len(part)])
        return found.add_((queries @ self.mean)[:, None])

    def tensors(self) -> dict[str, Tensor]:
        """All that a file has to keep."""
        return {"codes": self.codes, "scales": self.scales, "mean": self.mean}


class BitCodes:
    """Embeddings as one bit for a number.

    Attributes:
        words: (W, I) int64, the signs of 64 numbers of each image in each.
        ones: (I,) int16, how many bits are set.
        factors: (I,) float32, see the module.
        along: (I,) float32, the dot product of the centred embedding with the mean.
        rotation: (D, D) float32.
        mean: (D,) float32.
    """

    def __init__(self, words: Tensor, ones: Tensor, factors: Tensor, along: Tensor, rotation: Tensor, mean: Tensor):
        self.words, self.ones, self.factors, self.along = words, ones, factors, along
        self.rotation, self.mean = rotation, mean

    @classmethod
    def encode(cls, embeddings: Tensor, seed: int = 0) -> "BitCodes":
        """Encode embeddings (I, D). `seed` is of the rotation."""
        count, width = embeddings.shape
        random = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
        rotation, mean = torch.linalg.qr(random)[0].contiguous(), _mean_of(embeddings)
        words = np.zeros((-(-width // WORD), count), dtype=np.uint64)
        ones = torch.empty(count, dtype=torch.int16)
        factors, along = torch.empty(count), torch.empty(count)
        for first in range(0, count, ROWS_AT_ONCE):
            part = embeddings[first : first + ROWS_AT_ONCE].float() - mean
            places = slice(first, first + len(part))
            rotated = part @ rotation.T
            is_positive = rotated > 0
            words[:, places] = _as_words(is_positive.numpy()).T
            ones[places] = is_positive.sum(1)
            # An embedding that is the mean itself has the factor 0.
            factors[places] = part.square().sum(1) / rotated.abs().sum(1).clamp_min(torch.finfo(torch.float32).tiny)
            along[places] = part @ mean
        return cls(torch.from_numpy(words.view(np.int64)), ones, factors, along, rotation, mean)

    def similarities(self, queries: Tensor) -> Tensor:
        """Estimate the similarities of queries (Q, D) with all images: (Q, I) float32."""
        share = queries @ self.mean / self.mean.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
        rest = (queries - share[:, None] * self.mean) @ self.rotation.T
        found = torch.empty(len(queries), len(self.ones))
        for row, (query, part) in enumerate(zip(queries, rest, strict=True)):
            low = part.min()
            step = ((part.max() - low) / (2**QUERY_BITS - 1)).clamp_min(torch.finfo(torch.float32).tiny)
            rounded = ((part - low) / step).round().to(torch.int64).numpy()
            sums = 2 * (step * self._sums(rounded) + low * self.ones) - (step * rounded.sum() + low * len(part))
            found[row] = sums * self.factors + share[row] * self.along + query @ self.mean
        return found

    def _sums(self, rounded: np.ndarray) -> Tensor:
        """The sum of a query's whole numbers (D,) over the bits that are set, for each image: (I,) float32."""
        planes = _as_words((rounded[None] >> np.arange(QUERY_BITS)[:, None]) & 1)
        words = self.words.numpy().view(np.uint64)
        found = np.zeros(words.shape[1], dtype=np.float32)
        both = np.empty(min(ROWS_AT_ONCE, words.shape[1]), dtype=np.uint64)
        for first in range(0, words.shape[1], ROWS_AT_ONCE):
            part = words[:, first : first + ROWS_AT_ONCE]
            masked = both[: part.shape[1]]
            for bit, plane in enumerate(planes):
                counts = np.zeros(part.shape[1], dtype=np.uint16)
                for word, mask in zip(part, plane, strict=True):
                    np.bitwise_and(word, mask, out=masked)
                    counts += count_ones(masked)
                found[first : first + part.shape[1]] += counts * np.float32(2**bit)
        return torch.from_numpy(found)

    def tensors(self) -> dict[str, Tensor]:
        """All that a file has to keep."""
        names = ("words", "ones", "factors", "along", "rotation", "mean")
        return {name: getattr(self, name) for name in names}


CODES: dict[str, Any] = {"int8": Int8Codes, "bits": BitCodes}


def _mean_of(embeddings: Tensor) -> Tensor:
    total = torch.zeros(embeddings.shape[1], dtype=torch.float64)
    for part in embeddings.split(ROWS_AT_ONCE):
        total += part.double().sum(0)
    return (total / max(1, len(embeddings))).float()


def _as_words(bits: np.ndarray) -> np.ndarray:
    """Bits (I, D) as words (I, W) uint64. What is missing to whole words is 0."""
    padded = np.zeros((len(bits), -(-bits.shape[1] // WORD) * WORD), dtype=np.uint8)
    padded[:, : bits.shape[1]] = bits
    return np.packbits(padded, axis=1).view(np.uint64)


class QuantizedMatrix(EmbeddingMatrix):
    """Embeddings with their codes, in place of an `EmbeddingMatrix`: what it finds is nearly the same, and sooner.

    Args:
        kind: "int8" or "bits".
        codes: The codes.
        ids: (I,) int64.
        embeddings: (I, D) float16, by which the best are compared again.
        version: Of the table that they were read of.

    Attributes:
        rescored: How many of the best images by their codes are compared again.
        metadata: What the file says of itself.
    """

    def __init__(self, kind: str, codes: Any, ids: Tensor, embeddings: Tensor, version: int = 0):
        super().__init__(ids, embeddings, version)
        self.kind, self.codes, self.rescored = kind, codes, RESCORED[kind]
        self.metadata: dict[str, str] = {}

    @classmethod
    def quantize(cls, matrix: EmbeddingMatrix, kind: str) -> "QuantizedMatrix":
        """Quantize embeddings.

        Args:
            matrix: The embeddings.
            kind: "int8" or "bits".

        Returns:
            The same embeddings, with their codes.

        Raises:
            ValueError: `kind` is neither "int8" nor "bits", or there are no embeddings.
        """
        if kind not in KINDS:
            raise ValueError(f"Embeddings cannot be quantized to {kind!r}; choose {' or '.join(KINDS)}.")
        if not len(matrix):
            raise ValueError("There are no embeddings to quantize.")
        return cls(kind, CODES[kind].encode(matrix.embeddings), matrix.ids, matrix.embeddings, matrix.version)

    @property
    def code_bytes(self) -> int:
        """How much memory the codes take, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.codes.tensors().values())

    def similarities(self, queries: Any) -> Tensor:
        """Cosine similarities of queries with all images: of the best `rescored` by float16, of others by their codes.

        All others are below these.

        Args:
            queries: (Q, D) float32, of length one; a tensor or an array.

        Returns:
            (Q, I) float32.
        """
        queries = torch.as_tensor(queries)
        return self.refine(self.codes.similarities(queries), queries)

    def refine(self, scores: Tensor, queries: Tensor) -> Tensor:
        """Compare the best of estimates (Q, I) again. Those of -inf stay what they are."""
        found, is_out = scores, scores == -torch.inf
        scores, places = self._rescore(found, queries, min(self.rescored, len(self)))
        scores = scores.masked_fill(is_out.gather(1, places), torch.inf)
        worst = scores.amin(1, keepdim=True)
        found = torch.minimum(found, worst.nextafter(torch.full_like(worst, -torch.inf)))
        return found.scatter_(1, places, scores).masked_fill_(is_out, -torch.inf)

    def nearest(self, queries: Tensor, top: int, oversample: int | None = None) -> tuple[Tensor, Tensor]:
        """The most similar images.

        Args:
            queries: (Q, D) float32, of length one.
            top: K, how many images.
            oversample: How many times as many are compared again. None: as many as `rescored` says.

        Returns:
            Similarities (Q, K) float32, and places (Q, K) int64, best first.
        """
        count = max(top, self.rescored if oversample is None else top * oversample)
        scores, places = self._rescore(self.codes.similarities(queries), queries, min(count, len(self)))
        best = scores.topk(min(top, len(self)))
        return best.values, places.gather(1, best.indices)

    def _rescore(self, estimates: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        places = estimates.topk(count, sorted=False).indices.sort().values  # in the order in which they lie in the file
        rows = self.embeddings[places.reshape(-1)].float().view(*places.shape, -1)
        return torch.einsum("qd,qkd->qk", queries, rows), places

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write a file: codes, ids, and the float16 embeddings. An existing one is replaced when it is whole.

        Args:
            path: The file.
            metadata: What else it is to say of itself.
        """
        tensors = {**self.codes.tensors(), "ids": self.ids}
        values = {**(metadata or {}), "kind": self.kind, "version": str(self.version), "format": FORMAT}
        values["checksum"] = _checksum(tensors, values)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with whole_file(path) as unfinished:
            save_file({**tensors, "embeddings": self.embeddings.contiguous()}, unfinished, values)
        self.metadata = values

    @classmethod
    def open(cls, path: str | Path) -> "QuantizedMatrix":
        """Open a file that `save` wrote. The float16 embeddings stay on disk until they are needed.

        Args:
            path: The file.

        Returns:
            The embeddings and their codes.

        Raises:
            QuantizedFileError: There is no such file, or it is damaged.
        """
        path = str(path)
        try:
            with safe_open(path, "pt") as file:
                values = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if values["format"] != FORMAT:
                raise QuantizedFileError(f"{path} is of another version of hf_clip: quantize again.", path)
            embeddings = tensors.pop("embeddings")
            if _checksum(tensors, values) != values["checksum"]:
                raise QuantizedFileError(f"{path} is damaged: quantize again.", path)
            ids = tensors.pop("ids")
            found = cls(values["kind"], CODES[values["kind"]](**tensors), ids, embeddings, int(values["version"]))
        except FileNotFoundError:
            raise QuantizedFileError(f"There is no file {path}: make it with `hf-clip quantize`.", path) from None
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise QuantizedFileError(
                f"{path} is no whole file of quantized embeddings ({one_line(error)}): quantize again.", path
            ) from error
        found.metadata = values
        return found


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all but the float16 embeddings, which would have to be read for it."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(metadata.items()):
        if name != "checksum":
            state.update(f"{name}={value}\0".encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tuple(tensor.shape)}\0".encode())
        content: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        state.update(content)
    return state.hexdigest()


def kept_recall(matrix: QuantizedMatrix, top: int = 10, queries: int = 256, seed: int = 1) -> float:
    """What part of the exact scan's best images a quantized scan finds, on average over images as queries.

    Each query is an image of the matrix, and is no result of its own.

    Args:
        matrix: Quantized embeddings.
        top: How many images of the exact scan are looked for.
        queries: Largest number of queries.
        seed: Of the choice of queries.

    Returns:
        The part, from 0 to 1.
    """
    places = sample_places(len(matrix), queries, seed)
    vectors = torch.nn.functional.normalize(matrix.embeddings[places].float(), dim=1)
    top = min(top, len(matrix) - 1)
    if top < 1:
        return 1.0
    found = 0
    for part, own in zip(vectors.split(16), places.split(16), strict=True):
        exact = EmbeddingMatrix.similarities(matrix, part).scatter_(1, own[:, None], -torch.inf)
        near = matrix.similarities(part).scatter_(1, own[:, None], -torch.inf)
        best, others = exact.topk(top).indices, near.topk(top).indices
        found += int((best[:, :, None] == others[:, None, :]).sum())
    return found / (top * len(places))


__all__ = ["BitCodes", "Int8Codes", "QuantizedFileError", "QuantizedMatrix", "count_ones_by_table", "kept_recall"]
