"""A folder's tokenizer and image processor without transformers, for programs that import neither it nor torch.

Invariant: ids and pixels equal those of `HfClipTokenizer` and `HfClipImageProcessor` of the same folder. The code that
makes them is the same; what is done here anew is to read the settings from the files.

Dimensions: T texts, L text length, A ids of all texts together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..model.checked_files import TOKENIZER_CHECKS, one_line, read_object
from ..model.chunk_memory import ChunkMemory
from ..model.image_steps import OPENAI_SETTINGS, PillowSteps
from ..model.repair_text import prepare_each
from ..model.token_layout import Layout
from ..model.words import WordEncoder

SPECIAL = {"bos_token": "start_id", "eos_token": "end_id", "pad_token": "pad_id"}
"""What the files call a special token, and what `Layout` calls its id."""


@dataclass(frozen=True)
class Sides:
    """A size in an image processor's file, like SizeDict of transformers."""

    shortest_edge: int | None = None
    height: int | None = None
    width: int | None = None

    def __iter__(self) -> Iterator[tuple[str, int]]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, value) for name, value in named if value is not None)

    @classmethod
    def read(cls, value: Any, is_square: bool) -> "Sides":
        """Read a size as old and new files write it: a number, height and width in a list, or an object."""
        if isinstance(value, int):
            return cls(height=value, width=value) if is_square else cls(shortest_edge=value)
        if isinstance(value, list) and len(value) == 2:
            return cls(height=value[0], width=value[1])
        if not isinstance(value, dict):
            raise ValueError(f"a size is {value!r:.80}, but a number of pixels or an object of sides is needed.")
        return cls(**{field.name: value.get(field.name) for field in fields(cls)})


def read_image_steps(folder: Path) -> PillowSteps:
    """Read the settings of a folder's image processor.

    Raises:
        FileNotFoundError: There is no image processor.
        ValueError: A file is damaged, or a setting has a value that cannot be used.
    """
    values: Any = None
    whole, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    if whole.is_file():
        values = read_object(whole).get("image_processor")
    if values is None and alone.is_file():
        values = read_object(alone)
    if values is None:
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json, which says how images are prepared; save the model's processor "
            f"into it."
        )
    try:
        if not isinstance(values, dict):
            raise ValueError(f"it is a {type(values).__name__}, but an object of settings is needed.")
        settings = OPENAI_SETTINGS | {name: value for name, value in values.items() if name in OPENAI_SETTINGS}
        for name, is_square in (("size", False), ("crop_size", True)):
            settings[name] = Sides.read(settings[name], is_square)
        return PillowSteps(**settings)
    except ValueError as error:
        raise ValueError(f"The image processor of {one_line(folder, 200)} is refused: {error}") from error


class PlainTokenizer:
    """The tokenizer of a folder with a tokenizer.json; a call gives the arrays that `HfClipTokenizer` gives.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: It has no tokenizer.json.
        ValueError: A file is damaged, or its special tokens are unknown.
    """

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no tokenizer.json; save the model's processor into it.")
        for name, check in TOKENIZER_CHECKS.items():
            if (folder / name).is_file():
                check(folder / name)
        self.backend = Tokenizer.from_file(str(path))
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                settings |= read_object(folder / name)
        self.model_max_length = int(min(settings.get("model_max_length") or 1e9, 1e9))
        contents = {name: _content(settings.get(name)) for name in SPECIAL}
        ids = {SPECIAL[name]: content and self.backend.token_to_id(content) for name, content in contents.items()}
        if None in ids.values():
            named = ", ".join(f"{name} {content!r}" for name, content in contents.items())
            raise ValueError(
                f"The tokenizer of {folder} has {named}, but needs all three as tokens: they mark start and end of a "
                f"text and fill up shorter ones."
            )
        self.special: dict[str, Any] = ids | {"pad_token": contents["pad_token"]}
        added = settings.get("added_tokens_decoder") or {}
        for token in map(_content, added.values() if isinstance(added, dict) else ()):
            if token is not None and self.backend.token_to_id(token) is None:
                raise ValueError(
                    f"{folder}/tokenizer_config.json adds the token {token!r:.80}, which tokenizer.json lacks; save "
                    f"the tokenizer anew."
                )
        self.encoder = WordEncoder(self.backend)
        self.memory = ChunkMemory(self.encoder.merger)

    def __call__(
        self,
        texts: list[str],
        *,
        add_special_tokens: bool = True,
        padding: bool = True,
        padding_side: str = "right",
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str = "np",
    ) -> dict[str, np.ndarray]:
        """Tokenize texts. Returns `input_ids` and `attention_mask` (T, L), int64; see `HfClipTokenizer`."""
        layout = Layout(
            add_special_tokens=add_special_tokens,
            limit=(max_length or self.model_max_length) if truncation else None,
            truncation_side="right",
            is_padded=padding,
            to_length=0,
            multiple=1,
            padding_side=padding_side,
            **self.special,
        )
        return layout.arrange(*self._ids_of(texts))

    def _ids_of(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts one after the other (A,), without special tokens, and each text's number (T,)."""
        if not self.encoder.contents:
            return self.memory.ids_of(texts)
        whole = Layout(False, None, "right", False, 0, 1, "right", **self.special)
        parts = whole.encode(self.encoder, prepare_each(self.encoder.words_of, texts))
        rows = [first.ids for first, *_ in parts]
        return np.array([token for row in rows for token in row], dtype=np.int64), np.array(list(map(len, rows)))


def _content(token: Any) -> str | None:
    """A token of a file, which is a text or an object with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


__all__ = ["PlainTokenizer", "read_image_steps"]
