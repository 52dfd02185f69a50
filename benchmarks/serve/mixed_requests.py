"""Requests of every kind that a server meets, good and bad, each with the status that it must get."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from .sent_items import MODEL_NAME

WORDS, IMAGES = 20_000, 300
"""How many there are. A word that no request had before would be remembered by the tokenizer, of which it has up to
262,144: about 60 MB, which take more requests to fill."""

FORMATS = ("JPEG", "JPEG", "JPEG", "PNG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SMALLEST, LARGEST = 6, 500
"""Pixels of a side. What is more than a hundred times as long as wide would be refused."""

JSON = "application/json"
FORM = "multipart/form-data; boundary=part"


@dataclass(frozen=True)
class Sent:
    """A request.

    Attributes:
        name: What kind it is.
        path: Where it goes.
        body: Its body.
        status: The status that it must get.
        content_type: Of the body.
        leaves_after: After which share of the request the client leaves. None: it stays.
    """

    name: str
    path: str
    body: bytes
    status: int = 200
    content_type: str = JSON
    leaves_after: float | None = None


def as_uri(content: bytes) -> str:
    """The bytes of a file as a data URI."""
    return f"data:image/x;base64,{base64.b64encode(content).decode()}"


def form_of(**fields: bytes) -> bytes:
    """A multipart body."""
    parts = [
        b'--part\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
        % (name.encode(), b'; filename="x"' if name == "image" else b"", content)
        for name, content in fields.items()
    ]
    return b"".join(parts) + b"--part--\r\n"


class MixedRequests:
    """Makes requests without end.

    Args:
        chance: Chooses them.
    """

    def __init__(self, chance: random.Random):
        self.chance = chance
        letters = "abcdefghijklmnopqrstuvwxyzäöüé"
        self.words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(WORDS)]
        self.images = [self._make_image(number) for number in range(IMAGES)]
        self.kinds: dict[Callable[[], Sent], int] = {
            self.texts: 30,
            self.many_texts: 3,
            self.image: 20,
            self.items: 5,
            self.message: 3,
            self.form: 12,
            self.labels: 10,
            self.bad_body: 8,
            self.bad_image: 6,
            self.leaving: 3,
        }
        """How many of each there are in a hundred."""

    def __iter__(self) -> Iterator[Sent]:
        while True:
            yield self.chance.choices([*self.kinds], [*self.kinds.values()])[0]()

    def _make_image(self, number: int) -> bytes:
        """Smooth noise of any size in one of the formats."""
        chance = self.chance
        size = tuple(int(SMALLEST * (LARGEST / SMALLEST) ** chance.random()) for _ in range(2))
        levels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
        file, kind = BytesIO(), FORMATS[number % len(FORMATS)]
        image.convert(chance.choice(["RGB", "L"])).save(file, kind)
        return file.getvalue()

    def _text(self, most: int = 60) -> str:
        return " ".join(self.chance.choices(self.words, k=self.chance.randint(1, most)))

    def _uri(self) -> str:
        return as_uri(self.chance.choice(self.images))

    def _asked(self, name: str, **fields: Any) -> Sent:
        body = {"model": MODEL_NAME, "encoding_format": self.chance.choice(["float", "base64"]), "truncate": True}
        return Sent(name, "/v1/embeddings", json.dumps(body | fields).encode())

    def texts(self) -> Sent:
        """One to three texts."""
        return self._asked("texts", input=[self._text() for _ in range(self.chance.randint(1, 3))])

    def many_texts(self) -> Sent:
        """A list of texts."""
        return self._asked("lists of texts", input=[self._text(20) for _ in range(self.chance.randint(16, 64))])

    def image(self) -> Sent:
        """One or two images."""
        return self._asked("images", input=[self._uri() for _ in range(self.chance.randint(1, 2))])

    def items(self) -> Sent:
        """Jina's items."""
        return self._asked("Jina's items", input=[{"text": self._text()}, {"image": self._uri()}])

    def message(self) -> Sent:
        """A message as vLLM takes it."""
        part = {"type": "image_url", "image_url": {"url": self._uri()}}
        return self._asked("messages", messages=[{"role": "user", "content": [part]}])

    def form(self) -> Sent:
        """A form of Immich."""
        kind = self.chance.choice(["visual", "visual", "textual"])
        entries = json.dumps({"clip": {kind: {"modelName": f"any-{self.chance.randrange(10**9)}"}}}).encode()
        given = {"image": self.chance.choice(self.images)} if kind == "visual" else {"text": self._text().encode()}
        return Sent("forms", "/predict", form_of(entries=entries, **given), content_type=FORM)

    def labels(self) -> Sent:
        """An image to be classified, by labels that no request had before."""
        labels = [f"{self._text(1)} {self._text(1)} {self._text(1)}" for _ in range(self.chance.randint(2, 6))]
        body = {"images": [self._uri()], "labels": labels, "templates": ["a photo of a {}", "a {}"]}
        return Sent("new labels", "/v1/classify", json.dumps(body).encode())

    def bad_body(self) -> Sent:
        """A body that is refused."""
        ours: dict[str, Any] = {"model": MODEL_NAME, "input": self._text()}
        found: list[tuple[str, bytes | dict[str, Any], int, str]] = [
            ("/v1/embeddings", json.dumps(ours).encode()[: self.chance.randint(0, 20)], 400, JSON),
            ("/v1/embeddings", ours | {"input": []}, 400, JSON),
            ("/v1/embeddings", ours | {"model": self._text(2)}, 404, JSON),
            ("/v1/embeddings", ours | {"input": {"text": 3}}, 400, JSON),
            ("/v1/embeddings", ours | {"input": [self._text(1)] * 2049}, 413, JSON),
            ("/v1/embeddings", ours | {"input": " ".join(self.words[:200]), "truncate": False}, 400, JSON),
            ("/v1/embeddings", ours | {"dimensions": -1}, 400, JSON),
            ("/v1/embeddings", ours, 415, "text/plain"),
            (f"/{self.chance.randrange(10**9)}", ours, 404, JSON),
            ("/v1/search", ours, 404, JSON),
            ("/v1/classify", {"images": self._uri(), "labels": ["a"], "templates": "{:>9}"}, 400, JSON),
            ("/predict", form_of(text=self._text().encode()), 422, FORM),
        ]
        path, body, status, content_type = self.chance.choice(found)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Sent("bad bodies", path, content, status, content_type)

    def bad_image(self) -> Sent:
        """An image that is refused: cut off, too large, no image, or an address."""
        content, status = self.chance.choice(self.images), 400
        way = self.chance.randrange(4)
        if way == 0:
            given = as_uri(content[: len(content) // self.chance.randint(3, 9)])
        elif way == 1:
            given, status = as_uri(self._large()), 413
        elif way == 2:
            given = as_uri(self.chance.randbytes(self.chance.randint(0, 5000)))
        else:
            given = f"http://{self._text(1)}/x.jpg"
        body = {"model": MODEL_NAME, "input": [self._uri(), given], "modality": "image"}
        return Sent("bad images", "/v1/embeddings", json.dumps(body).encode(), status)

    def _large(self) -> bytes:
        """A GIF that claims to have more pixels than are allowed."""
        return b"GIF89a" + b"\x20\x4e\x20\x4e" + b"\x00\x00\x00\x2c" + bytes(4) + b"\x20\x4e\x20\x4e" + b"\x00\x02\x00;"

    def leaving(self) -> Sent:
        """A request whose client leaves before all of it is sent, or before it is answered."""
        found = self.chance.choice([self.image, self.many_texts])()
        after = self.chance.choice([0.5, 1.0])
        return Sent("requests whose client left", found.path, found.body, leaves_after=after)
