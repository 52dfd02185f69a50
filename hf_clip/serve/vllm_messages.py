"""vLLM's dialect: `messages` as of a chat, which have one embedding together.

    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/…"}}]}]}

As with CLIP in vLLM, a request holds either texts or one image. Texts are joined; empty ones beside an image are left
out.
"""

from typing import Literal

from pydantic import BaseModel

from .encoder import ImageItem, Item, TextItem
from .json_values import Several
from .request_error import RequestError


class ImageAddress(BaseModel):
    """Where an image is.

    Attributes:
        url: A data URI, or an address.
    """

    url: str


class ContentPart(BaseModel):
    """A part of a message.

    Attributes:
        type: "text" or "image_url".
        text: The text.
        image_url: The image.
    """

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageAddress | str | None = None


class Message(BaseModel):
    """A message of a chat.

    Attributes:
        role: Whose it is; it has no effect.
        content: A text, or parts.
    """

    role: str = "user"
    content: str | Several[ContentPart]


def item_of_messages(messages: list[Message]) -> Item:
    """What to encode for messages.

    Raises:
        RequestError: They hold a text and an image, several images, or nothing.
    """
    texts: list[str] = []
    images: list[str] = []
    for message in messages:
        parts = message.content
        for part in [ContentPart(type="text", text=parts)] if isinstance(parts, str) else parts:
            if part.type == "text":
                texts += [part.text] if part.text and part.text.strip() else []
            elif part.image_url is None:
                raise RequestError(400, "messages has a part of type image_url without image_url.", param="messages")
            else:
                images.append(part.image_url if isinstance(part.image_url, str) else part.image_url.url)
    if images and texts:
        raise RequestError(
            400,
            "messages holds texts and an image, but a request has one embedding: send either, in a request each.",
            param="messages",
        )
    if len(images) > 1:
        raise RequestError(
            400,
            f"messages holds {len(images)} images, but a request has one embedding: send one image in a request, or "
            f"use input.",
            param="messages",
        )
    if images:
        return ImageItem(images[0], "the image of messages")
    if not texts:
        raise RequestError(400, "messages is empty: send a text or an image.", "empty_input", "messages")
    return TextItem("\n".join(texts), "the text of messages")


__all__ = ["Message", "item_of_messages"]
