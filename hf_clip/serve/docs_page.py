"""`GET /docs`: how the server is used, as a page that is made of its OpenAPI schema.

The page is HTML alone. It has no script, and asks no other server for anything, so that it is there on closed networks
too. Its commands hold the address by which it was asked for, and the model's name: they work as they are copied.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.875rem; overflow-wrap: anywhere; }
h1 code, h2 code { font-size: 1em; }
pre { background: var(--soft); padding: 0.75rem 1rem; border-radius: 6px; white-space: pre-wrap; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.75rem 0.4rem 0; border-top: 1px solid var(--line); }
td:first-child { white-space: nowrap; }
@media (max-width: 40rem) {
  th { display: none; } tr { display: block; border-top: 1px solid var(--line); padding: 0.4rem 0; }
  td { display: block; border: 0; padding: 0; }
}
"""

POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: the page's own style, and nothing else."""

HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Example(NamedTuple):
    """A command, with what it does, and an answer.

    ADDRESS, KEY and MODEL are filled in; MODEL stands within JSON that is in single quotes.
    """

    title: str
    command: str
    answer: str


JSON_HEADER = 'KEY -H "Content-Type: application/json"'
IMAGE = r"""$(base64 < cats.jpg | tr -d '\n')"""

EXAMPLES: dict[str, list[Example]] = {
    "/v1/embeddings": [
        Example(
            "Texts:",
            f"""curl ADDRESS/v1/embeddings{JSON_HEADER} \\
  -d '{{"model": MODEL, "input": ["a photo of a cat", "a photo of a dog"]}}'""",
            '{"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.0123, …]}, …], '
            '"model": MODEL, "usage": {"prompt_tokens": 14, "total_tokens": 14}}',
        ),
        Example(
            "A file with an image:",
            f"""printf '{{"input": "data:image/jpeg;base64,%s"}}' "{IMAGE}" |
  curl ADDRESS/v1/embeddings{JSON_HEADER} -d @-""",
            "",
        ),
    ],
    "/v1/classify": [
        Example(
            "Which label fits:",
            f"""printf '{{"labels": ["a cat", "a dog"], "images": "%s"}}' "{IMAGE}" |
  curl ADDRESS/v1/classify{JSON_HEADER} -d @-""",
            '{"object": "list", "data": [{"index": 0, "labels": [{"label": "a cat", "score": 0.98}, …]}], '
            '"model": MODEL, "scores": "softmax"}',
        )
    ],
    "/v1/search": [
        Example(
            "Five images for a text:",
            f"""curl ADDRESS/v1/search{JSON_HEADER} \\
  -d '{{"query": "a dog on a beach", "top": 5}}'""",
            '{"object": "list", "results": [{"id": 17, "name": "beach.jpg", "score": 0.31, "width": 4032, '
            '"height": 3024, "caption": null, "copies": 0}, …], "model": MODEL}',
        )
    ],
    "/predict": [
        Example(
            "As Immich sends it:",
            """curl ADDRESS/predictKEY -F image=@cats.jpg \\
  -F 'entries={"clip": {"visual": {"modelName": MODEL}}}'""",
            '{"clip": "[0.0123, …]", "imageHeight": 480, "imageWidth": 640}',
        )
    ],
    "/v1/models": [Example("", "curl ADDRESS/v1/modelsKEY", "")],
    "/metrics": [Example("", "curl ADDRESS/metricsKEY", "")],
    "/health": [Example("", "curl ADDRESS/health", '{"status": "ok", "unix": 1790000000.0}')],
}


def type_in_words(schema: dict[str, Any], plural: str = "") -> str:
    """What a field holds. `plural` is "s" for what a list holds."""
    if alternatives := schema.get("anyOf"):
        words = [type_in_words(each, plural) for each in alternatives if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if values := schema.get("enum"):
        return " or ".join(map(json.dumps, values))
    kind = schema.get("type")
    if kind == "array":
        return f"list{plural} of {type_in_words(schema.get('items', {}), 's')}"
    if kind == "object" and "properties" in schema:
        return "{" + ", ".join(map(json.dumps, schema["properties"])) + "}"
    if kind == "boolean":
        return "true or false"
    names = {"string": "text", "integer": "whole number", "number": "number", "object": "object"}
    return f"{names.get(str(kind), 'value')}{plural}"


def _fields(schema: dict[str, Any]) -> str:
    """A table of a body's fields."""
    required = schema.get("required", ())
    rows = []
    for name, field in schema["properties"].items():
        default = field.get("default")
        usual = "required" if name in required else "" if default is None else json.dumps(default)
        holds = "file" if field.get("format") == "binary" else type_in_words(field)
        cells = (
            f"<code>{escape(name)}</code>",
            escape(holds),
            escape(usual),
            escape(field.get("description", "").replace("`", "")),
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr><th>field<th>holds<th>default<th></tr>{''.join(rows)}</table>"


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Method, paths and description of each operation; an operation may have several paths."""
    found: dict[tuple[str, str], tuple[list[str], dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            found.setdefault((method.upper(), operation.get("description", "")), ([], operation))[0].append(path)
    for (method, _), (paths, operation) in found.items():
        yield method, paths, operation


def make_page(schema: dict[str, Any], address: str, names: list[str], width: int, has_key: bool) -> str:
    """The page.

    Args:
        schema: The app's OpenAPI schema.
        address: Of the server, without a slash at its end.
        names: What clients may call the model.
        width: How many numbers an embedding has.
        has_key: Whether clients must send a key.
    """
    quoted = json.dumps(names[0], ensure_ascii=False)
    in_shell = quoted.replace("'", "'\\''")
    key = ' -H "Authorization: Bearer $HF_CLIP_API_KEY"' if has_key else ""
    sections = []
    for method, paths, operation in _operations(schema):
        parts = [f"<h2><code>{method} {escape(', '.join(paths))}</code></h2>"]
        parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
        for example in EXAMPLES.get(paths[0], ()):
            command = example.command.replace("ADDRESS", address).replace("KEY", key).replace("MODEL", in_shell)
            title = f"<p>{escape(example.title)}</p>" if example.title else ""
            parts.append(f'{title}<pre class="command">{escape(command)}</pre>')
            if example.answer:
                parts.append(f"<p>answers</p><pre>{escape(example.answer.replace('MODEL', quoted))}</pre>")
        for content in operation.get("requestBody", {}).get("content", {}).values():
            parts.append(_fields(content["schema"]))
        sections.append("".join(parts))
    keys = "Requests need a key: <code>export HF_CLIP_API_KEY=…</code> before the commands." if has_key else ""
    known = ", ".join(f"<code>{escape(name)}</code>" for name in names)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>hf_clip: {escape(names[0])}</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>hf_clip serves {known}</h1>
<p>Embeddings have {width} numbers and length one, so that the product of two is their cosine similarity. Texts and
images are compared with each other. {keys}</p>
<p>Clients of OpenAI take <code>{escape(address)}/v1</code> as their base URL. The same as <a href="openapi.json">
OpenAPI</a>, for programs. An error is <code>{{"error": {{"message", "type", "param", "code"}}}}</code>; a server that
is busy answers 429 and says in <code>Retry-After</code> when to ask again.</p>
{"".join(sections)}
</body></html>"""


def address_in(scheme: str, host: str, root_path: str) -> str:
    """The address by which a server was asked for. What is not plainly one does not come into commands.

    Args:
        scheme: "http" or "https".
        host: The header Host of the request.
        root_path: Where the app is mounted in another, or "".
    """
    found = f"{scheme}://{host}{root_path}".rstrip("/")
    return (
        found
        if re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d+)?(/[A-Za-z0-9._/-]*)?", found)
        else "http://localhost"
    )


__all__ = ["EXAMPLES", "HEADERS", "address_in", "make_page"]
