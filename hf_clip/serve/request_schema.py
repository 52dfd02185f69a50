"""What `/openapi.json` and `/docs` say of the bodies of requests: the fields of the classes that read them."""

import re
from typing import Any

from pydantic import BaseModel

FORM = {
    "type": "object",
    "required": ["entries"],
    "properties": {
        "entries": {"type": "string", "description": "The task and the model, as JSON."},
        "image": {"type": "string", "format": "binary", "description": "A file, for the task clip.visual."},
        "text": {"type": "string", "description": "A text, for the task clip.textual."},
    },
}
"""The form of `POST /predict`."""


def described(body: type[BaseModel] | None) -> dict[str, Any]:
    """The part of an operation in OpenAPI that is about its body. None: Immich's form."""
    if body is None:
        return {"requestBody": {"content": {"multipart/form-data": {"schema": FORM}}, "required": True}}
    schema = _inlined(body.model_json_schema())
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema with its definitions in their places, since OpenAPI looks for them elsewhere."""
    definitions = schema.pop("$defs", {})

    def replaced(part: Any) -> Any:
        if isinstance(part, dict):
            name = str(part.get("$ref", "")).rpartition("/")[2]
            if name:
                return replaced(definitions[name])
            return _with_field_texts({key: replaced(value) for key, value in part.items()})
        return [replaced(entry) for entry in part] if isinstance(part, list) else part

    found: dict[str, Any] = replaced(schema)
    return found


def _with_field_texts(schema: dict[str, Any]) -> dict[str, Any]:
    """A class's schema with its docstring's lines on attributes at the fields themselves."""
    said, properties = schema.get("description"), schema.get("properties")
    if not isinstance(said, str) or not isinstance(properties, dict):
        return schema
    said, _, attributes = said.partition("\n\nAttributes:\n")
    texts = re.findall(r"^ {4}(\w+): ((?:.|\n(?= {5}))+)", attributes, flags=re.MULTILINE)
    for name, text in texts:
        properties[name]["description"] = re.sub(r"\s+", " ", text)
    return schema | {"description": said}


__all__ = ["FORM", "described"]
