"""A hub on loopback: the endpoints that `huggingface_hub` uploads to and downloads from.

Regular files go into the commit, others by the LFS batch endpoint, as on the hub without Xet. It
keeps all in memory, tells what it was asked, and answers 404 to what it does not know.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits, the newest last, as content by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        self.messages.append(message)
        told = f"{len(self.commits)} {message} {sorted(files)}"
        name = hashlib.sha1(told.encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    @property
    def head(self) -> str:
        return self.branches["main"]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        name = self.branches.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    url: str = ""
    token: str = "hf_loopback"
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve a hub on loopback while the block runs."""
    hub = Hub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, verb: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.held.asked.append(f"{verb} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        writes = verb in ("POST", "PUT") and not path.startswith("/lfs/")
        if writes and self.headers.get("Authorization") != f"Bearer {self.held.token}":
            return self._json({"error": "Invalid username or password."}, status=401)
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, f"{verb} {path}"):
                return answer(self, **match.groupdict())
        return self._json({"error": "Not found"}, status=404)

    def _json(self, value: object, *, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status=status, **headers)

    def _send(self, content: bytes, *, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.held.repositories.get(repo)
        found = None if repository is None else repository.at(revision)
        if found is None:
            code = "RepoNotFound" if repository is None else "RevisionNotFound"
            self._json({"error": code}, status=404, X_Error_Code=code)
        return found

    def create(self) -> None:
        asked = json.loads(self.body)
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        status = 409 if name in self.held.repositories else 200
        if status == 200:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.held.repositories[name] = Repository(private=private)
            self.held.repositories[name].commit({}, "initial commit")
        self._json({"url": f"{self.held.url}/{name}", "name": name}, status=status)

    def tree(self, repo: str, revision: str) -> None:
        if (found := self._found(repo, revision)) is None:
            return
        entries = []
        for path, content in sorted(found[1].items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": _git(content)}
            if path in self.held.lfs:
                oid = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def info(self, repo: str, revision: str | None = None) -> None:
        if (found := self._found(repo, revision or "main")) is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.held.repositories[repo].private
            about = {"id": repo, "sha": found[0], "siblings": siblings, "private": private}
            self._json(about)

    def branch(self, repo: str, revision: str) -> None:
        repository = self.held.repositories[repo]
        status = 409 if revision in repository.branches else 200
        repository.branches.setdefault(revision, repository.head)
        self._json({}, status=status)

    def preupload(self, repo: str, revision: str) -> None:
        if self._found(repo, revision) is None:
            return
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": modes})

    def batch(self, repo: str) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            found = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.held.objects:
                href = f"{self.held.url}/lfs/{entry['oid']}"
                found["actions"] = {"upload": {"href": href}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json({"error": "wrong hash"}, status=422)
        self.held.objects[oid] = self.body
        return self._json({})

    def commit(self, repo: str, revision: str) -> None:
        if (found := self._found(repo, revision)) is None:
            return
        files, message = dict(found[1]), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    self.held.lfs.discard(value["path"])
                case "lfsFile":
                    files[value["path"]] = self.held.objects[value["oid"]]
                    self.held.lfs.add(value["path"])
                case "deletedFile":
                    del files[value["path"]]
        name = self.held.repositories[repo].commit(files, message, revision)
        url = f"{self.held.url}/{repo}/commit/{name}"
        self._json({"commitUrl": url, "commitOid": name, "success": True})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._found(repo, revision)) is None:
            return
        if path not in found[1]:
            code = "EntryNotFound"
            self._json({"error": code}, status=404, X_Error_Code=code, X_Repo_Commit=found[0])
            return
        content = found[1][path]
        etag = hashlib.sha256(content).hexdigest() if path in self.held.lfs else _git(content)
        self._send(content, X_Repo_Commit=found[0], ETag=f'"{etag}"')

    def validate(self) -> None:
        self._json({"errors": [], "warnings": []})


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>[\w]+)", _Handler.tree),
    (rf"GET /api/models/{_REPO}(/revision/(?P<revision>\w+))?", _Handler.info),
    (rf"POST /api/models/{_REPO}/branch/(?P<revision>\w+)", _Handler.branch),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>\w+)", _Handler.preupload),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>\w+)", _Handler.commit),
    (rf"POST /{_REPO}.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", _Handler.upload),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>\w+)/(?P<path>.+)", _Handler.resolve),
)
