"""The model that is served: its names, and how texts and images become what it encodes, and features.

Dimensions: B batch, L text length, C channels, Y × X pixels, D embedding.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ..inference.computing_thread import ComputingThread
from ..model.repair_text import TextError
from ..model.variants import VARIANTS
from ..search.index_table import printable
from ..zero_shot.features import encode_pixels, image_processor_of, text_limit, tokenizer_of
from ..zero_shot.text_batches import TextTooLongError, tokenize
from .request_error import RequestError

UNNAMED = "default/not-specified"
"""The name that infinity's clients send where none was chosen."""


def public_name(source: str) -> str:
    """What clients call a model: its name on the Hub or OpenAI's; of a folder or file the last part of its path.

    What JSON cannot hold of a path, or a line of a terminal, is `�`.
    """
    if source in VARIANTS or not (os.path.exists(source) or source.startswith((".", "/", "~"))):
        return source
    path = Path(os.path.abspath(os.path.expanduser(source)))
    return printable(path.stem if path.is_file() else path.name)


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that no client could send, or nobody could read."""
    for name in names:
        if not name.strip() or name != printable(name):
            raise ValueError(
                f"The name {printable(name)!r} is blank, or has characters that cannot be shown: call the model "
                f"otherwise."
            )


class ServedModel:
    """A model in memory.

    Args:
        model: HfClipModel in evaluation mode, optimized or not.
        processor: Its HfClipProcessor.
        names: What clients may call it; answers carry the first.
        computing: The thread that computes with it. None: one of its own.

    Attributes:
        name: The first of its names.
        width: D.
    """

    def __init__(self, model: Any, processor: Any, names: Sequence[str], computing: ComputingThread | None = None):
        self.model, self.processor = model, processor
        self.computing = computing or ComputingThread()
        self.name, self.names = names[0], list(dict.fromkeys(names))
        self.width: int = model.config.projection_dim
        self._tokenizer, self._image_processor = tokenizer_of(processor), image_processor_of(processor)
        self._limit = min(text_limit(model), self._tokenizer.model_max_length)

    def check_name(self, name: str | None) -> None:
        """Raise RequestError for the name of another model. Without a name, this one is meant."""
        if not name or name == UNNAMED or name in self.names:
            return
        others = f" (also as {', '.join(map(repr, self.names[1:]))})" if len(self.names) > 1 else ""
        raise RequestError(
            404,
            f"The model {name[:80]!r} is not served here: ask for {self.name!r}{others}.",
            "model_not_found",
            "model",
        )

    def token_ids(self, texts: list[str], names: Sequence[str], truncate: bool) -> list[np.ndarray]:
        """Tokenize texts.

        Args:
            texts: The texts.
            names: What the request calls each of them.
            truncate: Whether texts that are too long are cut. Otherwise they are an error.

        Returns:
            For each text its ids (L,), with start and end.

        Raises:
            RequestError: A text is too long, or cannot be tokenized.
        """
        try:
            ids, lengths = tokenize(self._tokenizer, self._limit, texts, {"truncation": True} if truncate else {})
        except TextTooLongError as error:
            raise RequestError(
                400,
                f"{names[error.index]} has {error.length} tokens, start and end included, but the model takes "
                f'{error.limit}: shorten it, or send "truncate": true.',
                "context_length_exceeded",
                "input",
            ) from None
        except TextError as error:
            name = names[error.index or 0]
            raise RequestError(400, f"{name} is no text that can be tokenized.", param="input") from None
        return [row[:length] for row, length in zip(ids, lengths.tolist(), strict=True)]

    def check_token_ids(self, ids: Sequence[int], place: int) -> np.ndarray:
        """Check the ids of a text that a client tokenized by itself. Returns them as an array (L,).

        Other models' ids look alike, and their features would mean nothing. Ids must therefore have this model's start
        and end.
        """
        start, end = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        vocabulary = self.model.config.text_config.vocab_size
        is_ours = len(ids) >= 2 and ids[0] == start and ids[-1] == end and all(0 <= id < vocabulary for id in ids)
        if not is_ours:
            raise RequestError(
                400,
                f"input[{place}] holds token ids, but not of this model's tokenizer, which begin with {start} and end "
                f"with {end}: send texts. In LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False) does.",
                "invalid_token_ids",
                "input",
            )
        if len(ids) > self._limit:
            raise RequestError(
                400,
                f"input[{place}] has {len(ids)} tokens, but the model takes {self._limit}.",
                "context_length_exceeded",
                "input",
            )
        return np.asarray(ids, dtype=np.int64)

    def pixels_of(self, image: Image.Image) -> Tensor:
        """Prepare an image, (C, Y, X). Threads may call this at the same time."""
        return self._image_processor([image], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode_texts(self, rows: list[np.ndarray]) -> np.ndarray:
        """Encode texts of any lengths: B rows of ids (L,) → (B, D) float32, of length one."""
        longest = max(map(len, rows))
        ids = torch.empty(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.from_numpy(row)
            ids[place, len(row) :] = int(row[-1])  # the end of text; what stands behind the first of them has no effect
        ids = ids.to(self.model.device)
        # As in `encode_pixels`: an optimized model's `encode_text` does less work than a call.
        is_optimized = "encode_text" in vars(self.model)
        found = self.model.encode_text(ids) if is_optimized else self.model(input_ids=ids).text_embeds
        return normalize(found.float(), dim=-1).cpu().numpy()

    def encode_images(self, pixels: list[Tensor]) -> np.ndarray:
        """Encode images: B × (C, Y, X) → (B, D) float32, of length one."""
        return encode_pixels(self.model, torch.stack(pixels)).cpu().numpy()


def load_served(
    source: str,
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    dtype: str = "float32",
    offline: bool = False,
) -> ServedModel:
    """Load a model to be served, see `load_model`, in the thread that computes with it later.

    Args:
        source: A folder, a repository on the Hub, a checkpoint file, or one of OpenAI's names.
        names: What clients call it. Empty: `public_name`.
        device: Where it computes. None: a GPU if there is one.
        dtype: What it computes in.
        offline: Whether nothing may be downloaded.

    Returns:
        The model, in evaluation mode, with its processor and names.

    Raises:
        OSError: There is no such source, or a download failed.
        ValueError: A file is damaged, or another model's; or a name cannot be used.
    """
    check_names(names)
    from ..checkpoints.in_memory import copy_to_memory, load_model
    from ..zero_shot.pipeline import default_device

    def load() -> tuple[Any, Any]:
        model, processor = load_model(source, dtype=dtype, offline=offline)
        model = model.to(device or default_device())
        copy_to_memory(model)
        return model, processor

    computing = ComputingThread()
    model, processor = computing.run(load)
    own = public_name(source)
    slugs = [VARIANTS[own].slug] if own in VARIANTS else []
    return ServedModel(model, processor, [*names] or [own, *slugs], computing)


__all__ = ["UNNAMED", "ServedModel", "check_names", "load_served", "public_name"]
