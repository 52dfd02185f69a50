"""Object storage on this machine: the part of S3 that LanceDB speaks, with its objects in memory.

    PUT, GET (whole, or a range), HEAD and DELETE of an object; a copy of one; uploads in parts
    listing by prefix and delimiter, in pages; deleting many at once
    `If-None-Match: *`: an object is written only if there is none of its name, which is how two writers meet

Who asks must sign with the known key; the signature itself is not computed again.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

KEY, SECRET = "a-key", "a-secret"
PAGE = 50
"""Names in one answer; few, so that listings have several pages."""

DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class Answer:
    """What a request is answered with."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ObjectStore:
    """Objects by `bucket/key`, uploads in parts, and how often each method was called.

    Attributes:
        before: Called with method and name before a request is carried out. What it returns is answered instead.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    before: Callable[[str, str], Answer | None] = lambda method, name: None
    calls: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    address: str = ""

    def environment(self) -> dict[str, str]:
        """The variables by which clients find it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": self.address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Carry out one request."""
        address = urlsplit(target)
        name = unquote(address.path).lstrip("/")
        query = {key: values[0] for key, values in parse_qs(address.query, keep_blank_values=True).items()}
        if f"Credential={KEY}/" not in headers.get("authorization", ""):
            return _error(403, "InvalidAccessKeyId")
        with self.lock:
            self.calls.append((method, name))
        instead = self.before(method, name)
        if instead is not None:
            return instead
        with self.lock:
            if method in ("GET", "HEAD"):
                return self._list(name, query) if "list-type" in query else self._get(name, headers)
            if method == "PUT":
                return self._put(name, query, headers, body)
            if method == "POST":
                return self._post(name, query, headers, body)
            self.parts.pop(query.get("uploadId", ""), None)
            if "uploadId" not in query:
                self.objects.pop(name, None)
            return Answer(204)

    def _get(self, name: str, headers: dict[str, str]) -> Answer:
        content = self.objects.get(name)
        if content is None:
            return _error(404, "NoSuchKey")
        found = {"ETag": _tag(content), "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Accept-Ranges": "bytes"}
        wanted = headers.get("range", "").removeprefix("bytes=")
        if not wanted:
            return Answer(200, content, found)
        first_text, _, last_text = wanted.partition("-")
        first = int(first_text) if first_text else max(0, len(content) - int(last_text))
        last = min(int(last_text), len(content) - 1) if first_text and last_text else len(content) - 1
        if first >= len(content):
            return _error(416, "InvalidRange")
        found["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Answer(206, content[first : last + 1], found)

    def _write(self, name: str, headers: dict[str, str], content: bytes, body: str = "") -> Answer:
        if headers.get("if-none-match") == "*" and name in self.objects:
            return _error(412, "PreconditionFailed")
        self.objects[name] = content
        return Answer(200, body.encode(), {"ETag": _tag(content)})

    def _put(self, name: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if "uploadId" in query:
            self.parts[query["uploadId"]][int(query["partNumber"])] = body
            return Answer(200, b"", {"ETag": _tag(body)})
        if source := headers.get("x-amz-copy-source"):
            content = self.objects.get(unquote(source).lstrip("/"))
            if content is None:
                return _error(404, "NoSuchKey")
            return self._write(
                name, headers, content, f"<CopyObjectResult><ETag>{_tag(content)}</ETag></CopyObjectResult>"
            )
        return self._write(name, headers, body)

    def _post(self, name: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        bucket = name.partition("/")[0]
        if "delete" in query:
            keys = [
                element.text or "" for element in ElementTree.fromstring(body).iter() if element.tag.endswith("Key")
            ]
            for key in keys:
                self.objects.pop(f"{bucket}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
            return Answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())
        if "uploads" in query:
            upload = f"upload-{len(self.calls)}"
            self.parts[upload] = {}
            found = f"<Bucket>{bucket}</Bucket><Key>{escape(name)}</Key><UploadId>{upload}</UploadId>"
            return Answer(200, f"<InitiateMultipartUploadResult>{found}</InitiateMultipartUploadResult>".encode())
        parts = self.parts.pop(query["uploadId"])
        content = b"".join(parts[number] for number in sorted(parts))
        found = f"<ETag>{_tag(content)}</ETag><Key>{escape(name)}</Key><Bucket>{bucket}</Bucket>"
        return self._write(
            name, headers, content, f"<CompleteMultipartUploadResult>{found}</CompleteMultipartUploadResult>"
        )

    def _list(self, bucket: str, query: dict[str, str]) -> Answer:
        bucket, prefix, delimiter = bucket.strip("/"), query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        found: dict[str, str] = {}
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if name == key or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                common = prefix + rest.partition(delimiter)[0] + delimiter
                found[common] = f"<CommonPrefixes><Prefix>{escape(common)}</Prefix></CommonPrefixes>"
            else:
                content = self.objects[name]
                found[key] = (
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{DATE}</LastModified><ETag>{_tag(content)}</ETag>"
                    f"<Size>{len(content)}</Size></Contents>"
                )
        names = [name for name in sorted(found) if name > after]
        page = names[:PAGE]
        more = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if len(names) > PAGE else ""
        body = (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{''.join(found[name] for name in page)}"
            f"</ListBucketResult>"
        )
        return Answer(200, body.encode())


def _tag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _error(status: int, code: str) -> Answer:
    return Answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())


@contextmanager
def serve_object_store() -> Iterator[ObjectStore]:
    """An object store at an address of this machine, while the block runs."""
    store = ObjectStore()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def carry_out(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found = store.answer(self.command, self.path, headers, body)
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(found.body)

        def log_message(self, *arguments: object) -> None:
            pass

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.carry_out)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """A client that was killed closes its connection."""

    server = Server(("127.0.0.1", 0), Handler)
    store.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


__all__ = ["Answer", "ObjectStore", "serve_object_store"]
