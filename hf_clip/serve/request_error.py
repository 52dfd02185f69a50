"""What a client is told when a request cannot be answered, in the form that its dialect knows."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's names for kinds of errors. The others are a request's fault below 500, and the server's from there on."""

SAID = {
    "model_type": "Input should be an object",
    "dict_type": "Input should be an object",
    "list_type": "Input should be a valid array",
}
"""JSON's words for what Pydantic says in Python's."""


class RequestError(ValueError):
    """A request cannot be answered.

    Attributes:
        status: HTTP status.
        message: What was wrong, and what to do.
        code: A short name for programs.
        param: The field of the request that is wrong, or None.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str = "invalid_value",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, code, param, headers)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def __str__(self) -> str:
        return self.message

    def as_openai(self) -> dict[str, Any]:
        """The body of an answer to OpenAI's clients."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_detail(self) -> dict[str, Any]:
        """The body of an answer to Immich's clients, and what Jina's look for."""
        return {"detail": self.message}


def _place(parts: Iterable[int | str]) -> str:
    """A place in a body as people write it: `input[0].image`. Names of alternatives are left out."""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "list", "int"):
            text += f".{part[:40]}" if text else part[:40]
    return text[:200]


def from_validation(error: ValidationError) -> RequestError:
    """The error for a body that has other fields than are needed. Values of the body are not in it."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    place = _place(found[0]["loc"]) or "the body"
    same = [entry for entry in found if (_place(entry["loc"]) or "the body") == place]
    alternatives = list(dict.fromkeys(SAID.get(entry["type"], entry["msg"]) for entry in same))
    wanted = "; or ".join(alternatives[:3]).removeprefix("Value error, ")
    return RequestError(400, f"{place} cannot be used: {wanted}.", "invalid_type", place.split("[")[0].split(".")[0])


__all__ = ["RequestError", "from_validation"]
