"""`POST /v1/classify`: the labels of images. Labels are encoded once, and kept for the next request that has them.

Dimensions: K labels, U background labels, D embedding.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable
from hashlib import sha256
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field
from torch.nn.functional import normalize

from ..zero_shot.label_matrix import default_scores
from ..zero_shot.matrix import ClassifierMatrix
from ..zero_shot.prompts import DEFAULT_TEMPLATE, read_labels, read_templates
from ..zero_shot.template_sets import TEMPLATE_SETS
from .encoder import Encoder, ImageItem, Item, TextItem
from .json_values import Several
from .request_error import RequestError

First = TypeVar("First")
Second = TypeVar("Second")

MOST_KEPT = 32
"""How many classifiers are kept, those used last."""


class ClassifyRequest(BaseModel):
    """The body of `POST /v1/classify`.

    Attributes:
        model: One of the served model's names.
        images: An image or several: data URIs, base64, or addresses.
        labels: Labels; or labels with several names each.
        templates: A text with {} where the label belongs, several, or the name of a set such as "imagenet_7".
        background: Further labels for everything else; together they are one entry, whose label is null.
        scores: "softmax", "sigmoid" or "cosine". null: as the model was trained.
        top_k: Labels for each image. null: all.
        threshold: Least score of a label that is returned.
    """

    model: str | None = None
    images: str | Several[str]
    labels: Several[str] | dict[str, str | Several[str]]
    templates: str | Several[str] = DEFAULT_TEMPLATE
    background: Several[str] = Field(default_factory=list)
    scores: Literal["softmax", "sigmoid", "cosine"] | None = None
    top_k: int | None = Field(default=None, ge=1)
    threshold: float | None = None


def images_of(request: ClassifyRequest) -> list[Item]:
    """The images to encode."""
    if isinstance(request.images, str):
        return [ImageItem(request.images, "images")]
    return [ImageItem(image, f"images[{place}]") for place, image in enumerate(request.images)]


def check_templates(templates: str | list[str]) -> None:
    """Refuse templates that could do more than put a label into a text.

    A template is filled in by `str.format`, whose placeholders may ask for a gigabyte of spaces; and in other places a
    text without a placeholder may be the path of a file.
    """
    if isinstance(templates, str) and templates in TEMPLATE_SETS:
        return
    for template in [templates] if isinstance(templates, str) else templates:
        if "{}" not in template or set(template.replace("{}", "")) & {"{", "}"}:
            raise RequestError(
                400,
                f'A template must hold {{}} where the label belongs, such as "a photo of a {{}}.", and no other '
                f"braces; or be the name of a set: {', '.join(TEMPLATE_SETS)}.",
                param="templates",
            )


class Classifiers:
    """Makes classifiers of labels, and keeps those that were used last.

    Args:
        encoder: Encodes the labels.
    """

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._kept: OrderedDict[bytes, ClassifierMatrix] = OrderedDict()

    async def of(self, request: ClassifyRequest) -> ClassifierMatrix:
        """The classifier of a request's labels.

        Raises:
            RequestError: Labels or templates cannot be used, or are too many.
        """
        check_templates(request.templates)
        used = request.model_dump_json(include={"labels", "templates", "background", "scores"})
        key = sha256(used.encode()).digest()  # labels may have megabytes
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found
        try:
            functions, texts = read_templates(request.templates)
            names = read_labels(request.labels)
            others = read_labels(request.background) if request.background else {}
        except ValueError as error:
            raise RequestError(400, str(error)[:300], param="labels") from None
        if both := names.keys() & others.keys():
            raise RequestError(400, f"{min(both)[:60]!r} is both a label and a background label.", param="background")
        columns = [*names.values(), *others.values()]
        self._check_prompts([name for column in columns for name in column], texts or [])
        prompts = [function(name) for column in columns for name in column for function in functions]
        counts = [len(column) * len(functions) for column in columns]
        items = [TextItem(prompt, "a label in its template") for prompt in prompts]
        features = torch.from_numpy((await self._encoder.encode(items)).features)
        sums = torch.stack([part.sum(dim=0) for part in features.split(counts)])
        model = self._encoder.served.model
        bias = getattr(model, "logit_bias", None)
        made = ClassifierMatrix(
            weights=normalize(sums, dim=-1).T.contiguous(),
            labels=list(names),
            scores=request.scores or default_scores(model),
            logit_scale=float(model.logit_scale.detach().float().exp()),
            logit_bias=0.0 if bias is None else float(bias.detach()),
            templates=texts,
        )
        self._kept[key] = made
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return made

    def _check_prompts(self, names: list[str], templates: list[str]) -> None:
        """Refuse more prompts, or longer ones, than are allowed before they are made: a name in each placeholder."""
        options, count = self._encoder.options, len(names) * len(templates)
        if count > options.most_items:
            raise RequestError(
                413,
                f"labels and templates make {count:,} prompts, but at most {options.most_items:,} are allowed.",
                "too_many_items",
                "labels",
            )
        placeholders = sum(template.count("{}") for template in templates)
        around = sum(map(len, templates)) - 2 * placeholders
        letters = around * len(names) + placeholders * sum(map(len, names))
        if letters > options.most_letters:
            raise RequestError(
                413,
                f"labels and templates make prompts with {letters:,} letters together, but at most "
                f"{options.most_letters:,} are allowed.",
                "too_many_letters",
                "labels",
            )


async def both(first: Awaitable[First], second: Awaitable[Second]) -> tuple[First, Second]:
    """Await both of two. If one of them fails, its error is raised at once, and the other one is cancelled."""
    one, other = asyncio.ensure_future(first), asyncio.ensure_future(second)
    try:
        done, _ = await asyncio.wait({one, other}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (one, other):
            if task in done:
                task.result()
        return one.result(), other.result()
    finally:
        one.cancel()
        other.cancel()
        await asyncio.gather(one, other, return_exceptions=True)


async def classify(request: ClassifyRequest, encoder: Encoder, classifiers: Classifiers) -> dict[str, Any]:
    """Classify the images of a request. Returns the body of the answer.

    Raises:
        RequestError: An image, the labels or the templates cannot be used.
    """
    matrix, encoded = await both(classifiers.of(request), encoder.encode(images_of(request)))
    ranked = matrix.rank(torch.from_numpy(encoded.features), request.top_k)
    least = request.threshold
    data = [
        {
            "index": index,
            "labels": [entry for entry in entries if least is None or entry["score"] >= least],
        }
        for index, entries in enumerate(ranked)
    ]
    return {"object": "list", "data": data, "model": encoder.served.name, "scores": matrix.scores}


__all__ = ["Classifiers", "ClassifyRequest", "check_templates", "classify", "images_of"]
