"""A stand-in for the Hub on loopback: it answers the calls that huggingface_hub's client makes for models.

Repositories live in memory. What the client does not call is not there; xet, which is not HTTP of the Hub, is
switched off by `Hub.environment`, so that large files go by git LFS.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

Files = dict[str, bytes]
_RESOLVE = "{repo_id}/resolve/{revision}/{filename}"


@dataclass
class Commit:
    """A state of a repository: all files, the message, and the commit before."""

    files: Files
    message: str
    parent: str | None


@dataclass
class Repo:
    """A repository: whether it is private, its commits by number, its branches and tags."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = self.add(Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial", None))

    def add(self, commit: Commit) -> str:
        digest = hashlib.sha1(f"{len(self.commits)} {commit.parent} {commit.message}".encode())
        for name, content in sorted(commit.files.items()):
            digest.update(name.encode() + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = commit
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a number stands for."""
        actual = self.branches.get(revision) or self.tags.get(revision)
        return actual or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.find(revision) or ""].files

    def history(self, revision: str = "main") -> list[str]:
        """The messages of a branch's commits, the oldest first, without the empty first one."""
        messages, at = [], self.find(revision)
        while at is not None and self.commits[at].parent is not None:
            messages.append(self.commits[at].message)
            at = self.commits[at].parent
        return messages[::-1]


@dataclass
class Fault:
    """What the Hub does wrong.

    Args:
        request: a regular expression of the requests that it hits, such as `POST /api/models/.*/commit/`.
        status: answered instead; None cuts the connection in the middle of the body, the request's or the answer's.
        skip: number of such requests that succeed first.
        times: number of requests that fail.
        message: text of the answer.
    """

    request: str
    status: int | None = 500
    skip: int = 0
    times: int = 10**9
    message: str = "the Hub is unwell"

    def matches(self, request: str) -> bool:
        if not re.match(self.request, request) or self.times == 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class Hub:
    """The server, to be used in a `with`.

    Args:
        user: whose token is the right one.
        token: that token; who comes with another gets 401, who comes without sees public repositories only.
        part_size: files in LFS larger than this go up in parts of this many bytes; None: all in one.
    """

    def __init__(self, user: str = "me", token: str = "hf_RightTokenOfThisTest", part_size: int | None = None):
        self.user, self.token, self.part_size = user, token, part_size
        self.repos: dict[str, Repo] = {}
        self.objects: Files = {}  # of LFS, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # method and path, in the order they came
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        self.server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, token: bool = True) -> dict[str, str]:
        """For a process whose Hub this is. `home` gets its cache; without `token` it is nobody's."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": self.token if token else "",
            "NO_PROXY": "127.0.0.1",
        }

    @contextlib.contextmanager
    def use_in_process(self) -> Iterator[Self]:
        """Meanwhile it is this process's Hub, where the right user is logged in, and no retry is waited for."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
            patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{self.url}/{_RESOLVE}")
            patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
            patch.setenv("HF_TOKEN", self.token)
            yield self

    def asked(self, pattern: str) -> list[str]:
        """The requests that came and match."""
        return [request for request in self.requests if re.match(pattern, request)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Connections break here because the tests want it."""


class _HttpResponse(Exception):
    """Ends a request."""

    def __init__(self, content: Any = None, status: int = 200, **headers: str):
        self.content, self.status, self.headers = content, status, headers


def _refusal(status: int, code: str, message: str) -> _HttpResponse:
    return _HttpResponse({"error": message}, status, **{"X-Error-Code": code, "X-Error-Message": message})


def _is_large(path: str, size: int, sample: bytes) -> bool:
    return path.endswith((".safetensors", ".pt", ".pth", ".bin")) or size > 5 * 2**20 or b"\0" in sample


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # ---- one request

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        request = f"{self.command} {unquote(url.path)}"
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if fault.matches(request)), None)
        size = int(self.headers.get("Content-Length") or 0)
        cut = fault is not None and fault.status is None
        if cut and (size > 1 or self.headers.get("Transfer-Encoding")):
            self.rfile.read(max(size // 2, 1))
            return self.drop_connection()
        self.body = self.read_body(size)
        try:
            if fault is not None and fault.status is not None:
                raise _refusal(fault.status, "", fault.message)
            with self.hub.lock:
                self.route(url.path)
            raise _refusal(404, "", f"this stand-in knows no {request}")
        except _HttpResponse as answer:
            return self.send(answer, cut)

    def read_body(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(size)
        content = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, answer: _HttpResponse, cut: bool) -> None:
        content = answer.content if isinstance(answer.content, bytes) else json.dumps(answer.content).encode()
        begin, total = 0, len(content)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            begin, answer.status = int(match.group(1)), 206
            content = content[begin : int(match.group(2)) + 1 if match.group(2) else None]
            answer.headers["Content-Range"] = f"bytes {begin}-{begin + len(content) - 1}/{total}"
        self.send_response(answer.status)
        kind = "application/octet-stream" if isinstance(answer.content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.drop_connection()

    def drop_connection(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    # ---- who asks for what

    def signed_in(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {self.hub.token}"):
            raise _refusal(401, "", "Invalid credentials in Authorization header")
        return given is not None

    def must_be_signed_in(self) -> None:
        if not self.signed_in():
            raise _refusal(401, "", "Invalid username or password.")

    def repo(self, name: str, write: bool = False) -> Repo:
        signed_in, repo = self.signed_in(), self.hub.repos.get(name)
        if repo is None or (repo.private and not signed_in):
            raise _refusal(404 if signed_in else 401, "RepoNotFound", "Repository not found")
        if write and not (signed_in and name.startswith(f"{self.hub.user}/")):
            raise _refusal(403, "", f"You don't have write access to {name}.")
        return repo

    def commit(self, repo: Repo, revision: str) -> str:
        actual = repo.find(unquote(revision))
        if actual is None:
            raise _refusal(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return actual

    def json(self) -> Any:
        return json.loads(self.body)

    def route(self, path: str) -> None:
        for pattern, method in _ROUTES:
            verb, _, place = pattern.partition(" ")
            if self.command in verb.split("|") and (match := re.fullmatch(place, path)):
                method(self, *match.groups())

    # ---- the calls

    def whoami(self) -> None:
        self.must_be_signed_in()
        raise _HttpResponse({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_card(self) -> None:
        try:
            ModelCard(self.json()["content"], ignore_metadata_errors=False)
        except ValueError as error:
            raise _HttpResponse({"errors": [{"message": str(error)}]}, 400) from None
        raise _HttpResponse({"errors": [], "warnings": []})

    def create(self) -> None:
        self.must_be_signed_in()
        wanted = self.json()
        name = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
        if not name.startswith(f"{self.hub.user}/"):
            raise _refusal(403, "", f'You don\'t have the rights to create a model under "{name.split("/")[0]}".')
        exists = name in self.hub.repos
        if not exists:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repos[name] = Repo(bool(private))
        raise _HttpResponse({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def info(self, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        sha = self.commit(repo, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha].files]
        content = {"_id": "1", "id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": []}
        raise _HttpResponse({**content, "siblings": siblings, "downloads": 0, "likes": 0})

    def refs(self, name: str) -> None:
        repo = self.repo(name)
        kinds = {"branches": ("heads", repo.branches), "tags": ("tags", repo.tags)}
        raise _HttpResponse(
            {"converts": []}
            | {
                kind: [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha} for name, sha in refs.items()]
                for kind, (where, refs) in kinds.items()
            }
        )

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        if unquote(branch) in repo.branches:
            raise _refusal(409, "", "Reference already exists")
        repo.branches[unquote(branch)] = self.commit(repo, (self.json() or {}).get("startingPoint", "main"))
        raise _HttpResponse({})

    def tag(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        if self.json()["tag"] in repo.tags:
            raise _refusal(409, "", "Tag already exists")
        repo.tags[self.json()["tag"]] = self.commit(repo, revision)
        raise _HttpResponse({})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)].files
        begin = f"{unquote(folder)}/" if folder else ""
        entries = {}
        for path, content in files.items():
            if path.startswith(begin):
                below = path.removeprefix(begin).split("/")
                if len(below) == 1 or self.query.get("recursive", "").lower() in ("true", "1"):
                    entries[path] = self.entry(path, content)
                for depth in range(1, len(below)):
                    place = begin + "/".join(below[:depth])
                    if depth == 1 or "recursive" in self.query:
                        entries[place] = {"type": "directory", "path": place, "size": 0, "oid": _git_hash(b"")}
        if not entries:
            raise _refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        raise _HttpResponse(list(entries.values()))

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        if _is_large(path, len(content), content[:512]):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def paths_info(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo.commits[self.commit(repo, revision)].files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        raise _HttpResponse([self.entry(path, files[path]) for path in wanted if path in files])

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        files = repo.commits[self.commit(repo, revision)].files
        modes = []
        for file in self.json()["files"]:
            large = _is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
            known = files.get(file["path"])
            hashed = (lambda content: hashlib.sha256(content).hexdigest()) if large else _git_hash
            modes.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": None if known is None else hashed(known),
                }
            )
        raise _HttpResponse({"files": modes})

    def lfs_batch(self, name: str) -> None:
        self.repo(name, write=True)
        objects = []
        for wanted in self.json()["objects"]:
            described = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.url}/_lfs/{wanted['oid']}"}
                if self.hub.part_size and wanted["size"] > self.hub.part_size:
                    upload["href"] += "/complete"
                    count = -(-wanted["size"] // self.hub.part_size)
                    urls = {
                        f"{part:05d}": f"{self.hub.url}/_lfs/{wanted['oid']}/{part}" for part in range(1, count + 1)
                    }
                    upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                described["actions"] = {"upload": upload, "verify": verify}
            objects.append(described)
        raise _HttpResponse({"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects})

    def lfs_verify(self, name: str) -> None:
        self.repo(name, write=True)
        known = self.hub.objects.get(self.json()["oid"])
        full = known is not None and len(known) == self.json()["size"]
        raise _HttpResponse({}) if full else _refusal(404, "", "the object is not there")

    # A store of its own, as on the Hub: its addresses are signed and take no token.

    def put_object(self, oid: str) -> None:
        self.keep(oid, self.body)
        raise _HttpResponse({})

    def put_part(self, oid: str, part: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        raise _HttpResponse({}, ETag=hashlib.md5(self.body).hexdigest())

    def complete_object(self, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self.keep(oid, b"".join(parts[part["partNumber"]] for part in self.json()["parts"]))
        raise _HttpResponse({})

    def keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _refusal(400, "", "the object is not what was announced")
        self.hub.objects[oid] = content

    def make_commit(self, name: str, revision: str) -> None:
        repo, branch = self.repo(name, write=True), unquote(revision)
        if branch not in repo.branches:
            raise _refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.files(branch))
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise _refusal(400, "", f"{value['path']} was not uploaded")
                    files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise _refusal(404, "EntryNotFound", "A file with this name doesn't exist")
                case "deletedFolder":
                    begin = value["path"].rstrip("/") + "/"
                    files = {path: content for path, content in files.items() if not path.startswith(begin)}
        sha = repo.add(Commit(files, lines[0]["value"]["summary"], repo.branches[branch]))
        repo.branches[branch] = sha
        raise _HttpResponse({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        sha = self.commit(repo, revision)
        content = repo.commits[sha].files.get(unquote(path))
        if content is None:
            raise _refusal(404, "EntryNotFound", "Entry not found")
        described = self.entry(unquote(path), content)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{described["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in described:
            headers |= {"X-Linked-ETag": f'"{described["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        raise _HttpResponse(content, **headers)


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("GET /api/whoami-v2", _Handler.whoami),
    ("POST /api/validate-yaml", _Handler.validate_card),
    ("POST /api/repos/create", _Handler.create),
    (f"GET /api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    (f"GET /api/models/{_NAME}/refs", _Handler.refs),
    (f"POST /api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    (f"POST /api/models/{_NAME}/tag/([^/]+)", _Handler.tag),
    (f"GET /api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (f"POST /api/models/{_NAME}/paths-info/([^/]+)", _Handler.paths_info),
    (f"POST /api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (f"POST /{_NAME}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (f"POST /{_NAME}.git/info/lfs/objects/verify", _Handler.lfs_verify),
    ("PUT /_lfs/([0-9a-f]+)", _Handler.put_object),
    (r"PUT /_lfs/([0-9a-f]+)/(\d+)", _Handler.put_part),
    ("POST /_lfs/([0-9a-f]+)/complete", _Handler.complete_object),
    (f"POST /api/models/{_NAME}/commit/([^/]+)", _Handler.make_commit),
    (f"GET|HEAD /{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
