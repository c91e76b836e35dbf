"""A Hub on loopback: repositories of models and datasets behind the Hub's HTTP API, and faults on demand.

Large files lie behind a redirect to another host (here: another name of loopback), as they do on the real Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import HfFileSystem, constants

LARGE = (".safetensors", ".bin", ".parquet", ".pt", ".pth")  # what the Hub keeps outside git


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" holds `part`."""

    part: str
    status: int = 200
    code: str | None = None  # X-Error-Code
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # the connection ends after so many bytes of the body
    reset: bool = False  # ... with a reset, not with an orderly end
    short: int = 0  # so many bytes fewer are announced and sent
    times: int = 1


@dataclass
class Repository:
    """Files at one commit; `served` holds bytes that are sent in place of those the commit promises."""

    files: dict[str, bytes]
    token: str | None = None  # who does not send it does not see the repository
    gated: bool = False  # the files, not their names, are refused to everybody
    branches: tuple[str, ...] = ("main",)
    served: dict[str, bytes] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(sorted((n, oid(b)) for n, b in self.files.items())).encode()).hexdigest()


@dataclass
class Request:
    """One request as it came in."""

    line: str  # method and path
    host: str
    range: str | None
    token: str | None


def oid(content: bytes) -> str:
    """The name that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(name: str, content: bytes) -> str:
    """The name that the Hub gives to a file."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else oid(content)


class Hub:
    """The server; use it as a context."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # "models/owner/name", "datasets/owner/name"
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, content: Path | dict[str, bytes], **more: Any) -> Repository:
        """Publish a folder, or files by their names, as `models/owner/name` or `datasets/owner/name`."""
        if isinstance(content, Path):
            content = {str(p.relative_to(content)): p.read_bytes() for p in content.rglob("*") if p.is_file()}
        self.repositories[name] = repository = Repository(content, **more)
        return repository

    def fail(self, part: str, **more: Any) -> None:
        """Put a fault in the way."""
        self.faults.append(Fault(part, **more))

    def lines(self, pattern: str) -> list[str]:
        """The requests that a regular expression is found in, in order."""
        return [request.line for request in self.requests if re.search(pattern, request.line)]

    def fetched(self) -> set[str]:
        """The names of the files whose content was asked for."""
        return {unquote(line.split("/resolve/")[1].partition("/")[2]) for line in self.lines("^GET .*/resolve/")} | {
            parse_qs(urlsplit(line).query)["name"][0] for line in self.lines("^GET /cdn/")
        }

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process whose Hub this is, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), **more}


def point_here(patch: pytest.MonkeyPatch, url: str, home: Path, *, offline: bool = False) -> None:
    """What HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE do, for libraries that read them long ago."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(datasets.config, "HF_ENDPOINT", url)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    patch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", home / "datasets" / "downloads")
    HfFileSystem.clear_instance_cache()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self._posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        line = f"{self.command} {self.path}"
        host = (self.headers.get("Host") or "").partition(":")[0]
        self.hub.requests.append(Request(line, host, self.headers.get("Range"), token))
        self._fault = next((f for f in self.hub.faults if f.times and f.part in line), Fault(""))
        self._fault.times -= 1
        if self._fault.status != 200:
            return self._refuse(self._fault.status, self._fault.code)
        parts = urlsplit(self.path)
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, parts.path):
                return method(self, token, *map(unquote, found.groups()))
        return self._refuse(404, None)

    def _find(self, token: str | None, name: str, revision: str) -> Repository | None:
        """The repository, or None where the answer was given already."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.token is not None and repository.token != token):
            return self._refuse(404 if token else 401, "RepoNotFound")
        if revision not in (*repository.branches, repository.commit):
            return self._refuse(404, "RevisionNotFound")
        return repository

    def _info(self, token: str | None, kind: str, name: str, revision: str = "main") -> None:
        if repository := self._find(token, f"{kind}/{name}", revision):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            self._json({"id": name, "sha": repository.commit, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, token: str | None, kind: str, name: str, revision: str, folder: str = "") -> None:
        if repository := self._find(token, f"{kind}/{name}", revision):
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = [p for p in _entries(repository) if not folder or p.startswith(folder + "/")]
            depth = folder.count("/") + 1 if folder else 0
            if folder and not inside:
                self._refuse(404, "EntryNotFound")
            else:
                self._json([_entry(repository, p) for p in inside if recursive or p.count("/") == depth])

    def _paths(self, token: str | None, kind: str, name: str, revision: str) -> None:
        if repository := self._find(token, f"{kind}/{name}", revision):
            body = self._posted.decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self._json([_entry(repository, path) for path in asked if path in _entries(repository)])

    def _resolve(self, token: str | None, kind: str, name: str, revision: str, path: str) -> None:
        if repository := self._find(token, f"{kind.strip('/') or 'models'}/{name}", revision):
            commit = {"X-Repo-Commit": repository.commit}
            if repository.gated:
                return self._refuse(403 if token else 401, "GatedRepo")
            if path not in repository.files:
                return self._refuse(404, "EntryNotFound", commit)
            content = repository.files[path]
            about = {**commit, "X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag(path, content)}"'}
            if path.endswith(LARGE):
                query = f"repo={kind.strip('/') or 'models'}/{name}&name={path}"
                about["Location"] = f"http://localhost:{self.hub.port}/cdn/{etag(path, content)}?{query}"
                return self._send(302, b"", about)
            self._content(repository.served.get(path, content), {**about, "ETag": f'"{oid(content)}"'})
        return None

    def _cdn(self, token: str | None, blob: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        repository, path = self.hub.repositories[query["repo"][0]], query["name"][0]
        self._content(repository.served.get(path, repository.files[path]), {"ETag": f'"{blob}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {**headers, "Accept-Ranges": "bytes"}
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        more = {**self._fault.headers, **(headers or {})} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": code or "no"}).encode(), {**more, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        body = body[: len(body) - self._fault.short]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: self._fault.cut])
        if self._fault.cut is not None:
            self.close_connection = True
            if self._fault.reset:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.connection.close()


def _entries(repository: Repository) -> list[str]:
    folders = {str(p) for name in repository.files for p in Path(name).parents if str(p) != "."}
    return sorted({*repository.files, *folders})


def _entry(repository: Repository, path: str) -> dict[str, Any]:
    if path not in repository.files:
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
    content = repository.files[path]
    entry = {"type": "file", "oid": oid(content), "size": len(content), "path": path}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 130}
    return entry


_ID = r"([\w.\-]+(?:/[\w.\-]+)?)"
_ROUTES: list[tuple[str, Callable[..., None]]] = [
    (rf"/api/(models|datasets)/{_ID}/revision/([^/]+)", _Handler._info),
    (rf"/api/(models|datasets)/{_ID}/tree/([^/]+)", _Handler._tree),
    (rf"/api/(models|datasets)/{_ID}/tree/([^/]+)/(.+)", _Handler._tree),
    (rf"/api/(models|datasets)/{_ID}/paths-info/([^/]+)", _Handler._paths),
    (rf"/api/(models|datasets)/{_ID}", _Handler._info),
    (rf"/(datasets/|){_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (r"/cdn/(\w+)", _Handler._cdn),
]
