"""`POST /v1/search`: images of an index, found by texts and images.

A stranger's filter is no condition in SQL: it names columns that are public, and compares them with values. Paths are
not among them, and stand in no answer, since guesses at a path would tell what lies on the machine.

Dimensions: D embedding.
"""

import asyncio
import base64
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import normalize

from ..search.current_index import CurrentIndex
from ..search.exact_scan import sample_places
from ..search.image_index import SAMPLE, ImageIndex, SearchResult
from ..search.index_table import SearchIndexError
from ..search.query import MINUS_WEIGHT, TEMPLATES, QueryError, combine_parts, is_short_noun
from ..search.row_filter import FilterError
from .encoder import Encoder, ImageItem, Item, TextItem
from .json_values import Several
from .request_error import RequestError

logger = logging.getLogger("hf_clip.serve")

MOST_RESULTS = 200
MOST_PARTS = 16


Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What a column or an id may hold."""

ShortText = Annotated[str, Field(max_length=1000)]


class Comparison(BaseModel):
    """What a column is compared with; all that is given must hold.

    Attributes:
        eq: Equal to.
        gt: Greater than.
        gte: Greater than, or equal to.
        lt: Less than.
        lte: Less than, or equal to.
        contains: Holds this text, in small or capital letters. For captions.
    """

    model_config = ConfigDict(extra="forbid")

    eq: Integer | ShortText | None = None
    gt: Integer | None = None
    gte: Integer | None = None
    lt: Integer | None = None
    lte: Integer | None = None
    contains: ShortText | None = None


class SearchRequest(BaseModel):
    """The body of `POST /v1/search`.

    Attributes:
        model: One of the served model's names.
        query: A text, or several that are added up.
        image: An image, or several: data URIs, base64, or addresses.
        minus: Texts that are subtracted, with half of their weight.
        more_like: Ids of images of the index.
        top: How many results at most.
        filter: Columns and what they are compared with: {"width": {"gte": 1000}, "caption": {"contains": "street"}}.
        templates: Whether a short noun is put into several templates.
        all_copies: Whether near duplicates are results of their own.
        thumbnails: Whether results hold a small JPEG, in base64.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    query: str | Several[str] = Field(default_factory=list)
    image: str | Several[str] = Field(default_factory=list)
    minus: str | Several[str] = Field(default_factory=list)
    more_like: Integer | Several[Integer] = Field(default_factory=list)
    top: int = Field(default=20, ge=1, le=MOST_RESULTS)
    filter: dict[Literal["width", "height", "size", "caption"], Comparison] = Field(default_factory=dict)
    templates: bool = True
    all_copies: bool = False
    thumbnails: bool = False


SIGNS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def _quoted(text: str) -> str:
    if "\0" in text:
        raise RequestError(400, "filter holds a character that no caption has.", param="filter")
    return "'" + text.replace("'", "''") + "'"


def condition_of(filter: dict[Any, Comparison]) -> str | None:
    """The condition on the index's columns that a filter stands for. None: no condition.

    Raises:
        RequestError: A column cannot be compared so.
    """
    found = []
    for column, comparison in filter.items():
        for name, value in comparison.model_dump(exclude_none=True).items():
            is_text = isinstance(value, str)
            if is_text != (column == "caption") or (is_text and name not in ("eq", "contains")):
                allowed = "eq and contains, with texts" if column == "caption" else f"{', '.join(SIGNS)}, with numbers"
                raise RequestError(400, f"filter.{column} takes {allowed}.", param="filter")
            if name == "contains":
                found.append(f"contains(lower(caption), {_quoted(value.lower())})")
            else:
                # In 64 bits: LanceDB reads no number that a column of 32 bits does not hold.
                sides = (column, _quoted(value)) if is_text else (f"CAST({column} AS BIGINT)", str(int(value)))
                found.append(f"{sides[0]} {SIGNS[name]} {sides[1]}")
    return " AND ".join(found) or None


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _prompts_of(text: str, with_templates: bool) -> list[str]:
    """The texts whose mean is searched for, as `encode_text_query` makes them."""
    return (
        [template.replace("{}", text) for template in TEMPLATES] if with_templates and is_short_noun(text) else [text]
    )


class IndexSearch:
    """Searches an index for requests, one after the other.

    Args:
        index: The index, of the served model.
        encoder: Encodes queries.
    """

    def __init__(self, index: ImageIndex, encoder: Encoder):
        self._current, self._encoder = CurrentIndex(index, encoder.served.computing), encoder
        # One after the other, since the index reads itself anew where it has changed. A search whose client is gone
        # may still run when the next one comes, so that a lock in the event loop is not enough. It waits for storage;
        # what takes all cores has its turn in the thread that encodes.
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="hf_clip search", initializer=torch.set_num_threads, initargs=(1,)
        )

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    async def search(self, request: SearchRequest) -> dict[str, Any]:
        """Find images. Returns the body of the answer.

        Raises:
            RequestError: The query is empty or cancels itself, or something in it cannot be used.
        """
        items, groups, weights = self._items_of(request)
        condition = condition_of(request.filter)
        vectors: list[Tensor] = []
        if items:
            features = torch.from_numpy((await self._encoder.encode(items, truncate=True)).features)
            vectors = [normalize(part.mean(dim=0), dim=0) for part in features.split(groups)]
        ids = _listed(request.more_like)
        weights += [1.0] * len(ids)
        found = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._search, vectors, ids, weights, condition, request
        )
        results = [_shown(result, request.thumbnails) for result in found]
        return {"object": "list", "results": results, "model": self._encoder.served.name}

    def _items_of(self, request: SearchRequest) -> tuple[list[Item], list[int], list[float]]:
        """What to encode; how many of it belong to each part of the query; and the weights of the parts."""
        items: list[Item] = []
        groups, weights = [], []
        texts = [("query", text, 1.0) for text in _listed(request.query)]
        texts += [("minus", text, -MINUS_WEIGHT) for text in _listed(request.minus)]
        for name, text, weight in texts:
            prompts = _prompts_of(text, request.templates)
            items += [TextItem(prompt, name) for prompt in prompts]
            groups.append(len(prompts))
            weights.append(weight)
        for image in _listed(request.image):
            items.append(ImageItem(image, "image"))
            groups.append(1)
            weights.append(1.0)
        ids = _listed(request.more_like)
        if not any(weight > 0 for weight in weights) and not ids:
            raise RequestError(400, "There is nothing to look for: send query, image or more_like.", "empty_input")
        if len(groups) + len(ids) > MOST_PARTS:
            raise RequestError(413, f"The query has more than {MOST_PARTS} parts.", "too_many_items", "query")
        return items, groups, weights

    def _search(
        self, vectors: list[Tensor], ids: list[int], weights: list[float], condition: str | None, request: SearchRequest
    ) -> list[SearchResult]:
        try:
            return self._found(self._current.get(), vectors, ids, weights, condition, request)
        except FilterError as error:
            raise RequestError(400, "filter cannot be used with this index.", param="filter") from error
        except SearchIndexError as error:
            # The words of LanceDB may hold a client's filter. These are of the index alone.
            logger.error("The index %s cannot be read, or is of another model.", self._current.place)
            raise RequestError(
                503,
                "The index cannot be read: whoever runs this server has to look after it.",
                "index_unavailable",
            ) from error

    def _found(
        self,
        index: ImageIndex,
        vectors: list[Tensor],
        ids: list[int],
        weights: list[float],
        condition: str | None,
        request: SearchRequest,
    ) -> list[SearchResult]:
        matrix = index.matrix()
        try:
            of_ids = normalize(matrix.of(ids), dim=-1) if ids else torch.empty(0, self._encoder.served.width)
        except KeyError:
            raise RequestError(404, "The index has no image with an id of more_like.", param="more_like") from None
        sample = matrix.embeddings[sample_places(len(matrix), SAMPLE)]
        try:
            direction = combine_parts(torch.stack([*vectors, *of_ids]), weights, sample)
        except QueryError as error:
            raise RequestError(400, str(error), param="query") from None
        return index.search(direction, top=request.top, where=condition, folded=not request.all_copies)


def _shown(result: SearchResult, with_thumbnail: bool) -> dict[str, Any]:
    """A result for strangers: the last part of its path, and nothing else of where it lies."""
    shown: dict[str, Any] = {
        "id": result.id,
        "name": os.path.basename(result.path).encode("utf-8", "replace").decode("utf-8"),
        "score": result.score,
        "width": result.width,
        "height": result.height,
        "caption": result.caption,
        "copies": len(result.duplicates),
    }
    if with_thumbnail:
        shown["thumbnail"] = base64.b64encode(result.thumbnail).decode("ascii")
    return shown


__all__ = ["Comparison", "IndexSearch", "SearchRequest", "condition_of"]
