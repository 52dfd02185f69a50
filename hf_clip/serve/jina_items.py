"""Jina's dialect: items of a request are objects that hold a text or an image.

{"input": [{"text": "a dog on a beach"}, {"image": "data:image/jpeg;base64,…"}, "a text"]}
"""

from pydantic import BaseModel

from .encoder import ImageItem, Item, TextItem
from .request_error import RequestError


class JinaItem(BaseModel):
    """A text or an image.

    Attributes:
        text: A text.
        image: A data URI, base64, or an address.
    """

    text: str | None = None
    image: str | None = None


def item_of(item: JinaItem, name: str) -> Item:
    """What to encode for an item.

    Args:
        item: The item.
        name: Where in the request it was, for messages.

    Raises:
        RequestError: It holds both a text and an image, or neither.
    """
    if (item.text is None) == (item.image is None):
        raise RequestError(
            400,
            f'{name} must hold one of "text" and "image": a text and an image together have no embedding of their own.',
            param="input",
        )
    return ImageItem(item.image, name) if item.image is not None else TextItem(item.text or "", name)


__all__ = ["JinaItem", "item_of"]
