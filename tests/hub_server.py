"""A Hub for tests: the part of its protocol that pushing and pulling models uses, on this machine, in memory.

Tokens: "writer" may do everything with repositories of `org`; all others are unknown. Repositories of `others` are
forbidden; those named `org/answers-403` and so on answer with that status. A Space is a repository named `spaces/…`.
`fail_after` uploads of large files the connection is cut, once.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "writer-of-secrets"

REPO = r"((?:spaces/)?[^/]+/[^/]+?)"

README_OF_SPACES = b"---\nsdk: gradio\n---\n\nSee https://huggingface.co/docs/hub/spaces-config-reference\n"
"""What a new Space has, as on the Hub."""


def as_of_models(path: str) -> str:
    """The path of a request for a Space, as if it were one for a model that is named `spaces/…`."""
    return path.replace("/api/spaces/", "/api/models/spaces/", 1)


@dataclass
class Repository:
    """commits: sha → files by path. refs: branch or tag → sha."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Everything that the server knows, for tests to look at."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fail_after: int | None = None
        self.uploads = 0
        self.lock = threading.Lock()

    def uploaded(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.refs[revision]]


def git_sha(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        length = headers.pop("length", str(len(body)))
        for name, value in {"Content-Type": kind, "Content-Length": length, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str = "", **more: str) -> None:
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.answer({"error": message} | more, status, **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = as_of_models(unquote(urlparse(self.path).path))
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.match(r"/(?:api/models/)?org/answers-(\d+)/", f"{path}/"):
            return self.refuse(int(match[1]), "Not now")
        if match := re.fullmatch(rf"/{REPO}/resolve/([^/]+)/(.+)", path):
            return self.send_file(*match.groups())
        if match := re.fullmatch(rf"/api/models/{REPO}(?:/revision/([^/]+))?", path):
            return self.describe(match[1], match[2] or "main")
        if match := re.fullmatch(rf"/api/models/{REPO}/tree/([^/]+)(?:/.*)?", path):
            return self.list_tree(match[1], match[2])
        if path == "/api/whoami-v2":
            return self.answer({"name": "org", "type": "user", "orgs": []})
        return self.refuse(404, f"No such path: {path}")

    def find(self, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.may_write()):
            self.refuse(404 if self.may_write() else 401, "Repository not found", "RepoNotFound")
            return None
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return repository, sha

    def describe(self, repo_id: str, revision: str) -> None:
        if (found := self.find(repo_id, revision)) is None:
            return
        repository, sha = found
        names = [{"rfilename": name} for name in repository.commits[sha]]
        self.answer(
            {"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private}
            | {"siblings": names, "tags": [], "downloads": 0, "likes": 0, "cardData": {}}
        )

    def list_tree(self, repo_id: str, revision: str) -> None:
        if (found := self.find(repo_id, revision)) is None:
            return
        repository, sha = found
        self.answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": git_sha(content)}
                for name, content in repository.commits[sha].items()
            ]
        )

    def send_file(self, repo_id: str, revision: str, name: str) -> None:
        if (found := self.find(repo_id, revision)) is None:
            return None
        repository, sha = found
        content = repository.commits[sha].get(name)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        headers = {"X_Repo_Commit": sha, "ETag": etag, "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.answer(content[start:], 206 if start else 200, length=str(len(content) - start), **headers)
        return None

    def do_POST(self) -> None:
        path, content = as_of_models(unquote(urlparse(self.path).path)), self.body()
        self.hub.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not self.may_write():
            return self.refuse(401, "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self.create(json.loads(content))
        if match := re.fullmatch(rf"/api/models/{REPO}/preupload/([^/]+)", path):
            return self.preupload(match[1], match[2], json.loads(content))
        if match := re.fullmatch(rf"/api/models/{REPO}/commit/([^/]+)", path):
            return self.commit(match[1], match[2], content)
        if match := re.fullmatch(rf"/api/models/{REPO}/(tag|branch)/([^/]+)", path):
            repository = self.hub.repositories[match[1]]
            named = json.loads(content or b"{}")
            name = named["tag"] if match[2] == "tag" else match[3]
            start = match[3] if match[2] == "tag" else named.get("startingPoint", "main")
            repository.refs[name] = str(repository.resolve(start))
            return self.answer({})
        if re.fullmatch(rf"/{REPO}\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(content))
        return self.refuse(404, f"No such path: {path}")

    def create(self, asked: dict) -> None:
        owner, name = asked.get("organization") or "org", asked["name"]
        kind = asked.get("type", "model")
        if owner == "others":
            return self.refuse(403, f"You don't have the rights to create a {kind} under the namespace others")
        if kind == "space" and asked.get("sdk") != "gradio":
            return self.refuse(400, "A Space needs an sdk")
        repo_id = f"{'spaces/' if kind == 'space' else ''}{owner}/{name}"
        url = f"http://{self.headers['Host']}/{repo_id}"
        if repo_id in self.hub.repositories or name == "taken":
            return self.refuse(409, "You already created this repo", url=url)
        repository = Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        repository.commit({"README.md": README_OF_SPACES} if kind == "space" else {}, "main", "initial commit")
        self.hub.repositories[repo_id] = repository
        return self.answer({"url": url, "name": repo_id})

    def preupload(self, repo_id: str, revision: str, asked: dict) -> None:
        if (found := self.find(repo_id, revision)) is None:
            return
        present = found[0].commits[found[1]]
        answers = []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".bin", ".png")) else "regular"
            known = present.get(file["path"])
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if mode == "lfs" else git_sha(known)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    def lfs_batch(self, asked: dict) -> None:
        objects = []
        for item in asked["objects"]:
            upload = {"href": f"http://{self.headers['Host']}/lfs/{item['oid']}"}
            actions = {} if item["oid"] in self.hub.blobs else {"actions": {"upload": upload}}
            objects.append({"oid": item["oid"], "size": item["size"]} | actions)
        self.answer({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        oid = self.path.rpartition("/")[2]
        self.hub.requests.append(f"PUT {self.path}")
        with self.hub.lock:
            is_cut = self.hub.fail_after is not None and self.hub.uploads >= self.hub.fail_after
            self.hub.uploads += not is_cut
        if is_cut:
            self.close_connection = True
            self.connection.close()
            return
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self.answer(b"")

    def commit(self, repo_id: str, branch: str, content: bytes) -> None:
        if (found := self.find(repo_id, branch)) is None:
            return
        repository, parent = found
        files, message = dict(repository.commits[parent]), ""
        for line in content.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                raise AssertionError(entry["key"])
        sha = repository.commit(files, branch, message)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{sha}"
        self.answer({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


class HubServer:
    """`with HubServer() as server`: the Hub at `server.url`, what it knows in `server.hub`."""

    def __init__(self) -> None:
        self.hub = Hub()
        handler = type("HandlerOfThisHub", (Handler,), {"hub": self.hub})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
