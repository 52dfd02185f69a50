"""OpenAI's dialect, with what infinity, Jina and vLLM add to it: `POST /v1/embeddings`.

Dimensions: I items, D embedding.
"""

import base64
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from ..zero_shot.features import truncated
from .encoder import Encoded, ImageItem, Item, TextItem, TokensItem, check_count
from .jina_items import JinaItem, item_of
from .json_values import Several
from .request_error import RequestError
from .untrusted_image import is_data_uri
from .vllm_messages import Message, item_of_messages


class EmbeddingRequest(BaseModel):
    """The body of `POST /v1/embeddings`. Other fields have no effect.

    Attributes:
        model: One of the served model's names.
        input: Texts, images, objects with "text" or "image", or token ids of this model's tokenizer.
        messages: A text or an image in vLLM's form, in place of `input`.
        modality: What texts of `input` are. "auto": a data URI is an image, and all else a text.
        encoding_format: Lists of numbers, or base64 of little-endian float32.
        embedding_type: Jina's name for `encoding_format`.
        dimensions: How many of the first numbers to return, normalised anew. 0: all.
        truncate: Whether texts that are too long are cut.
        truncate_prompt_tokens: vLLM's name for it: -1.
        normalized: Embeddings have length one; false is refused.
        user: Has no effect.
    """

    model: str | None = None
    input: str | Several[int] | Several[str] | Several[Several[int]] | Several[JinaItem | str] | JinaItem | None = (
        Field(default=None)
    )
    messages: Several[Message] | None = None
    modality: Literal["text", "image", "auto"] = "auto"
    encoding_format: Literal["float", "base64"] | None = None
    embedding_type: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None
    normalized: bool = True
    user: str | None = None

    @property
    def is_truncated(self) -> bool | None:
        """Whether texts that are too long are cut. None: as the server was told."""
        if self.truncate is not None or self.truncate_prompt_tokens is None:
            return self.truncate
        if self.truncate_prompt_tokens != -1:
            raise RequestError(
                400,
                f"truncate_prompt_tokens is {str(self.truncate_prompt_tokens)[:20]}, but only -1 is known: "
                f"to what the model takes.",
                param="truncate_prompt_tokens",
            )
        return True


def items_of(request: EmbeddingRequest, most_items: int) -> list[Item]:
    """What to encode for a request.

    Args:
        request: The request.
        most_items: Texts and images that are allowed.

    Raises:
        RequestError: It holds nothing, too much, or what has no embedding.
    """
    if not request.normalized:
        raise RequestError(
            400, "normalized is false, but embeddings of this server have length one.", param="normalized"
        )
    if request.messages is not None:
        if request.input is not None:
            raise RequestError(400, "input and messages are both given: send one of them.", param="messages")
        return [item_of_messages(request.messages)]
    given: Any = request.input
    if given is None:
        raise RequestError(400, "input is missing: send a text, an image, or a list of them.", "empty_input", "input")
    if isinstance(given, list) and given and isinstance(given[0], int):
        return [TokensItem(given)]
    if not isinstance(given, list):
        return [_item(given, "input", request.modality)]
    check_count(len(given), most_items)  # before an object is made of each
    return [_item(item, f"input[{place}]", request.modality) for place, item in enumerate(given)]


def _item(given: Any, name: str, modality: str) -> Item:
    if isinstance(given, JinaItem):
        return item_of(given, name)
    if isinstance(given, list):
        return TokensItem(given)
    is_image = modality == "image" or (modality == "auto" and is_data_uri(given))
    return ImageItem(given, name) if is_image else TextItem(given, name)


def check_dimensions(dimensions: int | None, full: int) -> None:
    """Raise RequestError if embeddings of `full` numbers have not so many."""
    if dimensions and not 0 < dimensions <= full:  # infinity's clients send 0 for all
        raise RequestError(
            400,
            f"dimensions is {str(dimensions)[:20]}, but embeddings of this model have {full} numbers: "
            f"a number from 1 to {full} is needed.",
            param="dimensions",
        )


def as_base64(row: np.ndarray) -> str:
    """A feature as base64 of little-endian float32."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")


def answer(request: EmbeddingRequest, encoded: Encoded, name: str) -> dict[str, Any]:
    """The body of the answer. Its numbers are rows of an array, which become lists when they are written.

    Args:
        request: The request.
        encoded: Its features.
        name: The model's name.
    """
    features = truncated(torch.from_numpy(encoded.features), request.dimensions or None).numpy()
    in_base64 = (request.encoding_format or request.embedding_type) == "base64"
    rows: list[Any] = [as_base64(row) if in_base64 else row for row in features]
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "model": name,
        "usage": {"prompt_tokens": encoded.tokens, "total_tokens": encoded.tokens},
    }


def list_models(name: str, names: list[str], created: int) -> dict[str, Any]:
    """The body of `GET /v1/models`: the model by each of its names.

    `stats` and `owned_by` are what infinity's own client insists on.
    """
    models = [
        {"id": each, "object": "model", "created": created, "owned_by": "infinity", "root": name, "stats": {}}
        | {"backend": "hf_clip", "capabilities": ["embed", "image_embed"]}
        for each in names
    ]
    return {"object": "list", "data": models}


__all__ = ["EmbeddingRequest", "answer", "as_base64", "check_dimensions", "items_of", "list_models"]
