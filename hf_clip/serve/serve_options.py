"""What a server allows, and how much of it."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class ServeOptions:
    """What a server allows.

    Attributes:
        api_key: What clients have to send. None: no key is needed.
        only_local_names: Whether requests must name this machine by `localhost` or a numeric address. A web page that
            a browser shows can point a name of its own at 127.0.0.1, and ask a server there that needs no key.
        allow_urls: Whether images are fetched from addresses that clients send.
        truncate: Whether texts that are too long are cut. Otherwise they are an error.
        most_items: Texts and images in one request.
        most_images: Images in one request.
        most_letters: Letters of all texts of one request, which are tokenized before they are cut.
        most_bytes: Bytes of one request's body.
        most_pixels: Pixels of one image. Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`, is raised to it. While
            images are decoded, they may take eight bytes for each of these pixels, all of them together.
        most_waiting_texts: Texts of all requests that may wait. A request that would make more is refused.
        most_waiting_images: Images of all requests that may wait.
        held_bytes: Bytes of all requests' bodies together. The last quarter is kept for small ones, so that these are
            at least four thirds of `most_bytes`.
        body_seconds: How long a client may take to send a request.
        url_seconds: How long an address may take to send an image, redirects included.
        url_bytes: Largest image that is fetched.
        text_batch: Texts encoded at once, at most.
        image_batch: Images encoded at once, at most.
        threads: How many threads open images. None: one for each core, at most 8.
    """

    api_key: str | None = None
    only_local_names: bool = False
    allow_urls: bool = False
    truncate: bool = False
    most_items: int = 2048
    most_images: int = 64
    most_letters: int = 1_000_000
    most_bytes: int = 32 * MIB
    most_pixels: int = 64_000_000
    most_waiting_texts: int = 8192
    most_waiting_images: int = 256
    held_bytes: int = 512 * MIB
    body_seconds: float = 30.0
    url_seconds: float = 10.0
    url_bytes: int = 20 * MIB
    text_batch: int = 64
    image_batch: int = 16
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse a key that no client could send, and memory in which the largest request would never have room."""
        least = -(-4 * self.most_bytes // 3)
        if self.held_bytes < least:
            raise ValueError(
                f"held_bytes is {self.held_bytes:,}, in three quarters of which a request of most_bytes, "
                f"{self.most_bytes:,}, would never have room: at least {least:,} are needed."
            )
        key = self.api_key
        if key is not None and (not key.strip() or key != key.strip()):
            raise ValueError(
                "The API key is empty, or has spaces at an end, which no header can hold: choose another one, or leave "
                "api_key (--api-key, HF_CLIP_API_KEY) out."
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError(
                "The API key has other characters than ASCII's letters, digits and signs, which clients of OpenAI "
                "cannot send in a header: choose another one."
            )

    def most_values(self, *, takes_ids: bool) -> int:
        """Values in one request's JSON: for each item its keys, or up to a hundred token ids."""
        return 1000 + self.most_items * (100 if takes_ids else 4)

    @property
    def most_lists(self) -> int:
        """Lists and objects in one request's JSON, which take more memory and time than other values."""
        return 1000 + self.most_items * 4


__all__ = ["MIB", "ServeOptions"]
