"""Read files from strangers within limits, before a library makes anything from them.

A JSON file in a repository may hold any value, of any depth and size. On unexpected values transformers and tokenizers
end in a traceback, or never end. Here they raise an error of one line that names the file.

Invariant: a file name in such a file never leads out of the folder that contains the file.
"""

import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20
"""Largest JSON file. A configuration with the labels of ImageNet-21k takes 2 MB."""

MOST_BYTES_OF_TOKENIZER = 64 << 20
"""Largest tokenizer.json. OpenAI's takes 3.6 MB, those of the largest multilingual vocabularies 35 MB."""

MOST_DEPTH = 32
"""Most levels of nested lists and objects. A tokenizer.json has about 8. Rust reads 128, Python writes about 1,000."""

MOST_IDS = 1 << 24

MOST_READINGS = 10

WRITTEN_LAST = ("config.json", "open_clip_config.json")

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

LONGEST_MESSAGE = 400
"""Longest quotation of another library's message, in characters; and longest line that a program prints:"""
LONGEST_LINE = 990

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git-LFS pointer. A clone without Git LFS has such a pointer in place of each large file."""


class FolderReplacedError(OSError):
    """A folder was replaced while it was read.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: object):
        self.folder = folder
        super().__init__(f"{folder} was replaced by another model while it was being read; load it again.")

    def __reduce__(self) -> tuple[type, tuple[object]]:
        return type(self), (self.folder,)


class DamagedWeightsError(OSError):
    """A file of weights is damaged or cut off.

    Attributes:
        source: The folder or repository.
        reason: What was found.
    """

    def __init__(self, source: object, reason: object):
        self.source, self.reason = source, one_line(reason)
        super().__init__(f"The weights in {source} are damaged or cut off ({self.reason}); copy them again.")

    def __reduce__(self) -> tuple[type, tuple[object, str]]:
        return type(self), (self.source, self.reason)


def one_line(message: object, most: int = LONGEST_MESSAGE) -> str:
    """Return the text of an error, or of a value from a file, as one printable line of at most `most` characters."""
    text = str(message)
    text = " ".join(text[: 8 * most].split()) + (" …" if len(text) > 8 * most else "")
    text = printable(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def printable(text: str) -> str:
    """A text in one line of a terminal. What would not be seen as itself is `�`; spaces of every width stay.

    `str.isprintable` knows one space only. Names in Japanese often have the full-width one.
    """
    return "".join(letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else "�" for letter in text)


def check_no_pointer(path: str | Path) -> None:
    """Raise ValueError for a Git-LFS pointer, which stands for a large file that was not downloaded."""
    path = Path(path)
    with path.open("rb") as file:
        _refuse_pointer(path, file.read(len(LFS_POINTER)))


def _refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(LFS_POINTER):
        raise ValueError(
            f"{path} is a Git-LFS pointer, not the file itself: the repository was cloned without its large files. "
            f"Run `git lfs pull` in {path.parent}, or download the repository with `hf download`."
        )


def nested_depth(values: Any) -> int:
    """Count the levels of nested lists and objects, without recursion."""
    depth, level = 0, [values]
    while not {dict, list}.isdisjoint(map(type, level)):  # most of a tokenizer's hundred thousand values are neither
        depth += 1
        if depth > MOST_DEPTH:
            break
        held = [item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)]
        level = list(chain.from_iterable(held))
    return depth


def read_json(path: str | Path, most_bytes: int = MOST_BYTES) -> Any:
    """Read the value in a JSON file.

    Args:
        path: The file.
        most_bytes: Size of the largest file that is read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON, too large, nested too deeply, or a Git-LFS pointer.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{path} has {size:,} bytes, but at most {most_bytes:,} are read of a file of its kind.")
    content = path.read_bytes()
    _refuse_pointer(path, content)
    try:
        values = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({one_line(error)}); save or download it again.") from None
    except RecursionError:
        values = None
        depth = MOST_DEPTH + 1
    else:
        depth = nested_depth(values)
    if depth > MOST_DEPTH:
        raise ValueError(
            f"{path} nests lists or objects more than {MOST_DEPTH} deep, which no file of a model does; save or "
            f"download it again."
        )
    return values


def read_object(path: str | Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises like `read_json`, and ValueError for another value."""
    values = read_json(path, most_bytes)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object of fields; save or download it again.")
    return values


def leads_outside(name: Any) -> bool:
    """Whether a file name from a stranger is more than a plain name, and so may lead out of the file's folder."""
    return not isinstance(name, str) or name in ("", ".", "..") or bool(re.search(r"[/\\:\0]", name))


def check_names(path: str | Path, values: dict[str, Any], fields: tuple[str, ...]) -> None:
    """Raise ValueError if a file name in one of `fields` leads out of the folder of `path`."""
    for field in fields:
        names = values.get(field)
        for name in names if isinstance(names, list) else [names]:
            if name is not None and leads_outside(name):
                raise ValueError(
                    f"{path} is refused: its {field} names the file {one_line(repr(name), 80)}, which doesn't lie "
                    f"beside it."
                )


def writing_of(source: Any, subfolder: str | None = None) -> tuple[Any, ...] | None:
    """Return a value that changes whenever a model is written into a folder. None if `source` is no folder.

    It is made of the files in `WRITTEN_LAST`. The package's writer removes them before all others and adds them after
    all others. While they are unchanged, so are all files beside them.
    """
    if source is None or not os.path.isdir(source):
        return None
    found = []
    for name in WRITTEN_LAST:
        try:
            state = os.stat(os.path.join(source, subfolder or "", name))
        except OSError:
            continue
        found.append((name, state.st_ino, state.st_mtime_ns, state.st_size))
    return tuple(found)


def read_unchanged(source: Any, read: Callable[[], Any], subfolder: str | None = None) -> Any:
    """Return the result of `read()`, which reads files of a folder. It is called again if the folder was replaced.

    All files that the result is made of are then from one writing of the folder.

    Raises:
        FolderReplacedError: The folder was replaced during each of several attempts.
        Exception: Errors of `read`.
    """
    for _ in range(MOST_READINGS):
        before = writing_of(source, subfolder)
        try:
            result = read()
        except Exception:
            if writing_of(source, subfolder) == before:
                raise
            continue
        if writing_of(source, subfolder) == before:
            return result
    raise FolderReplacedError(source)


def check_no_methods(kind: type, values: Any, path: object) -> None:
    """Raise ValueError for a field with the name of a method: transformers would replace the method by its value."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} is refused: it describes a {kind.__name__} with a {type(values).__name__}.")
    if methods := [name for name in values if callable(getattr(kind, name, None))]:
        raise ValueError(f"{path} is refused: its field {one_line(methods[0], 80)} is the name of a method.")


def find_file(source: Any, name: str, hub: dict[str, Any]) -> Path | None:
    """Find a file in a folder or repository, or download it.

    Args:
        source: A folder, or the name of a repository.
        name: Name of the file.
        hub: The Hub's arguments of `from_pretrained`.

    Returns:
        Its path, or None if the folder or repository has no such file.

    Raises:
        OSError: The repository does not exist, or cannot be reached.
    """
    from transformers.utils import cached_file  # here, so that files are read without transformers too

    # The argument is private, but without it a missing file and a missing repository raise the same error.
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    return None if found is None else Path(found)


def find_files(source: Any, names: Iterable[str], hub: dict[str, Any]) -> list[Path]:
    """Find files in a folder or repository.

    Args:
        source: A folder, the name of a repository, or a file, which is returned itself.
        names: Names of the files.
        hub: The Hub's arguments of `from_pretrained`.

    Returns:
        The files that exist.
    """
    if os.path.isfile(source):
        return [Path(source)]
    try:
        found = [find_file(source, name, hub) for name in names]
    except OSError:
        return []  # transformers looks for the files next, and reports this error itself
    return [path for path in found if path is not None]


def list_shards(index: str | Path) -> list[str]:
    """List the files that an index of weights names. Raises ValueError unless all of them lie beside the index."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is no index of weights: it has no weight_map; download it again.")
    for name in weight_map.values():
        if leads_outside(name):
            raise ValueError(
                f"{index} is refused: it names the file {one_line(repr(name), 80)}, which doesn't lie beside it."
            )
    return sorted(set(weight_map.values()))


def check_weights(source: Any, subfolder: str | None = None) -> None:
    """Raise ValueError for a folder whose weights are Git-LFS pointers, or whose index leads out of it."""
    if source is None or not os.path.isdir(source):
        return
    folder = Path(source, subfolder or "")
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            check_no_pointer(folder / name)
        elif (index := folder / f"{name}.index.json").is_file():
            for shard in list_shards(index):
                if (folder / shard).is_file():
                    check_no_pointer(folder / shard)


def _check_vocabulary(path: Path, vocabulary: Any) -> None:
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{path} holds no vocabulary: an object of tokens and their numbers is needed.")
    numbers = vocabulary.values()
    if set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < MOST_IDS:
        return
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(
                f"{path} numbers the token {one_line(repr(token), 80)} {one_line(repr(number), 80)}; whole numbers "
                f"from 0 to {MOST_IDS:,} are needed."
            )


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """Read a vocab.json, which maps tokens to ids. Raises like `read_json`."""
    vocabulary = read_object(path, MOST_BYTES_OF_TOKENIZER)
    _check_vocabulary(Path(path), vocabulary)
    return vocabulary


def _are_merges(values: Any) -> bool:
    """Whether this is a list of merges: each two tokens, in one text or in a list."""
    if not isinstance(values, list):
        return False
    pairs = [value for value in values if type(value) is not str]
    return (
        set(map(type, pairs)) <= {list}
        and set(map(len, pairs)) <= {2}
        and set(map(type, chain.from_iterable(pairs))) <= {str}
    )


def check_tokenizer_file(path: str | Path) -> None:
    """Raise ValueError for a tokenizer.json that is no byte-pair encoding, or whose ids would exhaust the memory."""
    path = Path(path)
    values = read_object(path, MOST_BYTES_OF_TOKENIZER)
    model, added = values.get("model"), values.get("added_tokens", [])
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path} holds no byte-pair encoding, which CLIP's tokenizer is.")
    _check_vocabulary(path, model.get("vocab"))
    if not _are_merges(model.get("merges")):
        raise ValueError(f"{path} holds no list of merges, each of two tokens.")
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in added
    ):
        raise ValueError(f"{path} holds added_tokens that are no list of tokens with their content.")
    _check_vocabulary(path, {"": 0} | {token["content"]: token.get("id") for token in added})


def check_tokenizer_config(path: str | Path) -> None:
    """Raise ValueError for a tokenizer_config.json that names files outside its folder, or has no usable length."""
    values = read_object(path)
    check_names(path, values, ("fast_tokenizer_files", "gguf_file"))
    if not isinstance(length := values.get("model_max_length", 1), (int, float)) or not length >= 1:
        raise ValueError(f"{path}: model_max_length is {length!r:.80}, but a positive number is needed.")


TOKENIZER_CHECKS: dict[str, Callable[[str | Path], Any]] = {
    "tokenizer_config.json": check_tokenizer_config,
    "special_tokens_map.json": read_object,
    "added_tokens.json": read_vocabulary,
    "tokenizer.json": check_tokenizer_file,
    "vocab.json": read_vocabulary,
}
"""The check of each file of a tokenizer, done before transformers reads the file."""


@contextmanager
def in_one_kind(name: object) -> Iterator[None]:
    """Turn the many kinds of errors that libraries raise for damaged files into ValueError, within a `with` block.

    Args:
        name: Name of the folder or repository that is read, for the message.
    """
    from huggingface_hub.errors import HTTPError, StrictDataclassError

    try:
        yield
    except (OSError, ValueError, ImportError, MemoryError, HTTPError, StrictDataclassError):
        raise
    except BaseException as error:
        # Rust's libraries raise a PanicException, which is no subclass of Exception and which no module exports.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{one_line(name, 200)} is damaged: one of its files holds what no such file does ({type(error).__name__}: "
            f"{one_line(error)}); save or download it again."
        ) from error


__all__ = [
    "LONGEST_LINE",
    "MOST_DEPTH",
    "TOKENIZER_CHECKS",
    "WEIGHT_FILES",
    "DamagedWeightsError",
    "FolderReplacedError",
    "check_names",
    "check_no_methods",
    "check_no_pointer",
    "check_tokenizer_file",
    "check_weights",
    "find_file",
    "find_files",
    "in_one_kind",
    "leads_outside",
    "list_shards",
    "nested_depth",
    "one_line",
    "printable",
    "read_json",
    "read_object",
    "read_unchanged",
    "read_vocabulary",
    "writing_of",
]
