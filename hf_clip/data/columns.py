"""Which column holds the images and which the captions, and what a row's captions are.

A column is found by what it holds and by its name. If several are possible, the user has to choose: the error names
them.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

IMAGE_NAMES = (
    "image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_path", "image_file", "image_url",
    "image_bytes", "file_name", "filename", "file_path", "filepath", "path", "file", "url", "bytes",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "text", "texts", "txt", "title", "description", "alt_text", "alt", "sentence", "sentences",
    "prompt",
)  # fmt: skip
"""Names under which a column of texts is taken for images' addresses, or for captions."""


class UnusableRowError(ValueError):
    """A row that cannot be trained on, and why."""


class MissingTextError(UnusableRowError):
    """A row that has no text where one is looked for."""


def describe_feature(feature: Any) -> str:
    """What a column holds: image, stored image, bytes, text, texts, label, or other."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "ClassLabel":
        return "label"
    if kind == "Value":
        names = {"string": "text", "large_string": "text", "binary": "bytes", "large_binary": "bytes"}
        return names.get(feature.dtype, "other")
    if isinstance(feature, Mapping) and "bytes" in feature and set(feature) <= {"bytes", "path"}:
        return "stored image"
    inner = feature[0] if isinstance(feature, list) and len(feature) == 1 else getattr(feature, "feature", None)
    return "texts" if type(inner).__name__ == "Value" and describe_feature(inner) == "text" else "other"


def with_fields(features: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and, by names such as `json.caption`, the fields within those that hold records."""
    found = dict(features)
    for name, feature in features.items():
        if isinstance(feature, Mapping) and describe_feature(feature) == "other":
            found |= {f"{name}.{inner}": kind for inner, kind in with_fields(feature).items() if kind is not None}
    return {**found, **features}


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a field within one; None where there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def column_of(name: str, features: Mapping[str, Any]) -> str:
    """The column that is read for a name that may be a field's."""
    return name if name in features else name.split(".")[0]


class _Record(dict):
    """A record whose fields a template may ask for as `{json.caption}` as well as by `{json[caption]}`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(f"there is no field {name!r}")
        return self[name]


def _as_record(value: Any) -> Any:
    return _Record({key: _as_record(inner) for key, inner in value.items()}) if isinstance(value, Mapping) else value


def _choose(source: str, kind: str, flag: str, candidates: list[str], columns: list[str], advice: str = "") -> str:
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise ValueError(f"{source}: {' and '.join(candidates)} could all be the {kind}; name one with --{flag}.")
    if len(columns) == 1 and (marks := [mark for mark in ";\t|" if mark in columns[0]]):
        advice += f"; or write the table with commas, where it has {marks[0]!r}"
    raise ValueError(
        f"{source}: no column looks like the {kind}; its columns are {', '.join(columns)}. Name one with "
        f"--{flag}{advice}."
    )


def _check_named(source: str, name: str, flag: str, columns: list[str]) -> None:
    if name not in columns:
        raise ValueError(
            f"{source} has no column {name!r}; its columns are {', '.join(columns)}. Name the right one with --{flag}."
        )


def find_image_column(source: str, features: Mapping[str, Any], named: str | None) -> str:
    """The column of images: the one that is named, or the only one that can be it."""
    kinds = {name: describe_feature(feature) for name, feature in features.items()}
    if named is not None:
        fields = with_fields(features)
        _check_named(source, named, "image_column", list(fields))
        # Nothing is known of a column that is empty in all the rows that were looked at.
        kind = describe_feature(fields[named])
        if kind not in ("image", "stored image", "bytes", "text") and fields[named] is not None:
            raise ValueError(
                f"{source}: the column {named!r} holds {fields[named]}, but images are needed: decoded ones, their "
                f"bytes, paths or URLs."
            )
        return named
    for accepted in (("image",), ("stored image",)):
        if found := [name for name, kind in kinds.items() if kind in accepted]:
            return _choose(source, "images", "image_column", found, list(features))
    found = [name for name, kind in kinds.items() if kind in ("bytes", "text") and name.lower() in IMAGE_NAMES]
    return _choose(source, "images", "image_column", found, list(features))


def find_caption_column(
    source: str,
    features: Mapping[str, Any],
    named: str | None,
    image_column: str,
    flag: str = "caption_column",
) -> str:
    """The column of captions, or the template, that is named by `--flag`; or the only column that can be it."""
    others = {name: describe_feature(feature) for name, feature in features.items() if name != image_column}
    if named is None:
        texts = [name for name, kind in others.items() if kind in ("text", "texts") and not name.startswith("__")]
        known = [name for name in texts if name.lower() in CAPTION_NAMES]
        if not texts:  # as in tars whose texts are in .json entries
            inner = with_fields(features).items()
            texts = [name for name, feature in inner if describe_feature(feature) in ("text", "texts") and "." in name]
            texts = [name for name in texts if name.rpartition(".")[2].lower() in CAPTION_NAMES]
        labels = [name for name, kind in others.items() if kind == "label"]
        advice = f', or a template such as --caption_column "a photo of a {{{labels[0]}}}."' if labels else ""
        return _choose(source, "captions", flag, known or texts, list(features), advice)
    if "{" in named:
        return named
    fields = with_fields(features)
    _check_named(source, named, flag, list(fields))
    if named == image_column:
        raise ValueError(f"{source}: image_column and {flag} are both {named!r}; name one for each.")
    if describe_feature(fields[named]) not in ("text", "texts") and fields[named] is not None:
        raise ValueError(
            f"{source}: the column {named!r} holds {fields[named]}, but texts are needed: one for each row, or a "
            f'list of them. Of labels a template makes captions: --{flag} "a photo of a {{{named}}}."'
        )
    return named


def check_label_column(source: str, features: Mapping[str, Any], named: str) -> None:
    """Refuse a column of labels that isn't there, or holds something other than classes or whole numbers."""
    _check_named(source, named, "label_column", list(features))
    if describe_feature(features[named]) != "label" and "int" not in getattr(features[named], "dtype", ""):
        raise ValueError(
            f"{source}: the column {named!r} holds {features[named]}, but labels are needed: whole numbers or classes."
        )


class CaptionReader:
    """Row → its captions, out of a column or a field (`json.caption`) of texts or lists of texts, or by a template over
    the row's columns."""

    def __init__(self, source: str, column: str, features: Mapping[str, Any]):
        self.column = column
        self.is_template = "{" in column
        self.columns = [column] if self.is_template else [column_of(column, features)]
        self.names: dict[str, list[str]] = {}
        if self.is_template:
            try:
                fields = [field for _, field, _, _ in string.Formatter().parse(column) if field is not None]
            except ValueError as error:
                raise ValueError(f"The template {column!r} cannot be read: {error}.") from None
            self.columns = list(dict.fromkeys(re.split(r"[.\[]", field)[0] for field in fields))
            for name in self.columns:
                if name not in features:
                    meant = [field for field in with_fields(features) if field.rpartition(".")[2] == name]
                    hint = f" Did you mean {{{meant[0]}}}?" if meant else ""
                    raise ValueError(
                        f"The template {column!r} asks for {name!r}, but the columns of {source} are "
                        f"{', '.join(features)}. Write columns in braces, and other braces twice.{hint}"
                    )
                if describe_feature(features[name]) == "label":
                    self.names[name] = features[name].names

    def __call__(self, row: Mapping[str, Any]) -> list[str]:
        """The row's captions, stripped of white space, at least one.

        Raises UnusableRowError where there is none: MissingTextError where nothing stands there.
        """
        if not self.is_template:
            value = field_of(row, self.column)
            captions = value if isinstance(value, (list, tuple)) else [value]
            texts = [caption.strip() if isinstance(caption, str) else "" for caption in captions]
            if any(texts):
                return texts  # empty ones keep their places
            raise MissingTextError("its caption is empty")
        values = {name: self._value(name, row.get(name)) for name in self.columns}
        try:
            return [self.column.format(**values).strip()]
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise UnusableRowError(f"its caption cannot be made ({type(error).__name__}: {error})") from None

    def _value(self, name: str, value: Any) -> Any:
        if value is None or (isinstance(value, str) and not value.strip()):
            raise MissingTextError(f"its {name} is empty")
        if name not in self.names:
            return _as_record(value)
        if not 0 <= int(value) < len(self.names[name]):
            raise UnusableRowError(f"its {name} is {value}, which has no name")
        return self.names[name][int(value)]
