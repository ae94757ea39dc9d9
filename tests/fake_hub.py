"""A hub on loopback that speaks as much of the Hugging Face hub's protocol as `huggingface_hub` and `datasets` ask for.

Reading: repository info, trees, `resolve`, refusals with the header by which `huggingface_hub` tells them apart.
Writing: `create`, `preupload`, git-LFS's batch, `commit` (ndjson). What it was asked is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets.config
import huggingface_hub.hf_api
import pytest
import transformers.utils.hub

import peftkit.hub

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")
_RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(r"/api/(?P<kind>model|dataset)s/(?P<repo>[^/]+/[^/]+)(?:/(?P<call>\w+(?:-\w+)?))?(?:/(?P<rest>.*))?")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass
class Repo:
    """A repository: files by revision, a branch or a commit.

    Attributes:
        branches: name -> path -> content.
        is_private: whether only tokens of `FakeHub.tokens` may see it.
        is_gated: whether its files are for those alone who have `access`.
        access: users who may read it although it is gated.
    """

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    is_private: bool = False
    is_gated: bool = False
    access: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a branch or commit; None where there is none."""
        for files in self.branches.values():
            if commit_of(files) == revision:
                return revision, files
        files = self.branches.get(revision)
        return None if files is None else (commit_of(files), files)


def commit_of(files: dict[str, bytes]) -> str:
    """A name for these files, of the shape of a git commit."""
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class FakeHub:
    """The server; `with FakeHub() as hub:` runs it at `hub.url`.

    Attributes:
        repos: `models/owner/name` or `datasets/owner/name` -> repository.
        tokens: token -> its user.
        requests: method and path of everything that it was asked.
        failing: status that every answer has, to play an outage.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        self.read_only: set[str] = set()
        self.requests: list[str] = []
        self.failing: int | None = None
        self.blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", **facts: Any) -> Repo:
        """Put a repository there."""
        content = read_folder(files) if isinstance(files, Path) else files
        repo = self.repos[f"{kind}/{name}"] = Repo({"main": content}, **facts)
        return repo


def point_at(hub: FakeHub, patch: pytest.MonkeyPatch, home: Path) -> None:
    """Let this process take the server for the hub, with an empty cache and no token in `home`.

    The libraries read the environment when they are imported, so that what they made of it is replaced.
    """
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
    }
    for name, value in settings.items():
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    patch.setattr(transformers.utils.hub, "_hf_api", None)  # made with the address of its first use
    own = {"HF_ENDPOINT": hub.url, "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"}
    for name, place in (own | {"HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": home / "datasets"}).items():
        patch.setattr(datasets.config, name, place)
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(peftkit.hub, "_outages", [])
    forget()


def forget() -> None:
    """Ask the hub anew, as another process would."""
    peftkit.hub.require.cache_clear()
    peftkit.hub.download_adapter.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing:
            self._send(self.hub.failing, b"out of order")
        elif match := _RESOLVE.fullmatch(path):
            self._resolve("datasets" if match["kind"] else "models", match["repo"], match["revision"], match["file"])
        elif match := _BATCH.fullmatch(path):
            self._batch()
        elif path.startswith("/lfs/"):
            self.hub.blobs[path.removeprefix("/lfs/")] = self.body
            self._send(200)
        elif match := _API.fullmatch(path):
            self._api(f"{match['kind']}s", match["repo"], match["call"], match["rest"] or "")
        else:
            self._account(path)

    @property
    def _user(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _send(self, status: int, content: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, data: Any, status: int = 200, **headers: Any) -> None:
        self._send(status, json.dumps(data).encode(), Content_Type="application/json", **headers)

    def _refuse(self, status: int, code: str, text: str) -> None:
        headers = {"X_Error_Code": code} if code else {}
        self._send_json({"error": text}, status, X_Error_Message=text, **headers)

    def _visible(self, kind: str, name: str) -> Repo | None:
        """The repository, where this user may see it; else the refusal is sent."""
        sent = self.headers.get("Authorization")
        if sent and self._user is None:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.hub.repos.get(f"{kind}/{name}")
        if repo is None or (repo.is_private and self._user is None):
            self._refuse(404 if self._user else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        repo = self._visible(kind, name)
        if repo is None:
            return
        if repo.is_gated and self._user not in repo.access:
            self._refuse(403 if self._user else 401, "GatedRepo", f"Access to {name} is restricted. Visit the page to ask")
            return
        found = repo.files(revision)
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file not in found[1]:
            self._send(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=found[0])
        else:
            self._send_file(found[0], found[1][file])

    def _send_file(self, commit: str, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._send(206, content[start:end], **headers)
        else:
            self._send(200, content, **headers)

    def _api(self, kind: str, name: str, call: str | None, rest: str) -> None:
        if call in ("preupload", "commit"):
            self._write(kind, name, call, rest)
            return
        repo = self._visible(kind, name)
        if repo is None:
            return
        revision, _, place = rest.partition("/")
        found = repo.files(revision or "main")
        if found is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif call in (None, "revision"):
            siblings = [{"rfilename": path} for path in found[1]]
            gated = "auto" if repo.is_gated else False
            facts = {"id": name, "sha": found[0], "private": repo.is_private, "gated": gated, "siblings": siblings}
            self._send_json(facts | {"tags": [], "downloads": 0, "likes": 0})
        elif call == "tree":
            entries = list(_tree(found[1], place, recursive="recursive=True" in self.path or "recursive=true" in self.path))
            if place and not entries:
                self._refuse(404, "EntryNotFound", f"{place} does not exist")
            else:
                self._send_json(entries)
        elif call == "paths-info":
            self._send_json(list(self._paths_info(found[1])))
        else:
            self._refuse(404, "", f"the fake hub does not know {call}")

    def _paths_info(self, files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
        fields = json.loads(self.body) if self.body.startswith(b"{") else dict(_form(self.body.decode()))
        wanted = fields["paths"] if isinstance(fields["paths"], list) else [fields["paths"]]
        for path in wanted:
            if path in files:
                yield _entry(path, files[path])
            elif any(name.startswith(f"{path}/") for name in files):
                yield {"type": "directory", "path": path, "oid": "0" * 40}

    def _account(self, path: str) -> None:
        if path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif self._user is None:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/whoami-v2":
            self._send_json({"name": self._user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        elif path == "/api/repos/create":
            self._create()
        else:
            self._refuse(404, "", f"the fake hub does not know {path}")

    def _create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self._user
        key = f"models/{owner}/{asked['name']}"
        if key in self.hub.repos:
            self._send_json(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{owner}/{asked['name']}"}, 409
            )
        elif owner != self._user or self._user in self.hub.read_only:
            text = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            self._refuse(403, "", text)
        else:
            self.hub.repos[key] = Repo(is_private=asked.get("visibility") == "private" or asked.get("private") is True)
            self._send_json({"url": f"{self.hub.url}/{owner}/{asked['name']}"})

    def _write(self, kind: str, name: str, call: str, revision: str) -> None:
        repo = self._visible(kind, name)
        if repo is None:
            return
        if self._user is None or self._user in self.hub.read_only or self._user != name.partition("/")[0]:
            self._refuse(403, "", "you don't have write access to this repo")
        elif call == "preupload":
            files = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [{"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular"} for path in files]
            self._send_json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        else:
            self._commit(repo, name, revision)

    def _commit(self, repo: Repo, name: str, revision: str) -> None:
        files = dict(repo.branches[revision])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        repo.branches[revision] = files
        commit = commit_of(files)
        self._send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _batch(self) -> None:
        objects = json.loads(self.body)["objects"]
        upload = [entry | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}} for entry in objects]
        self._send_json({"transfer": "basic", "objects": upload})


def _form(text: str) -> Iterator[tuple[str, Any]]:
    """The fields of a form that was posted; those that come twice as lists."""
    for name, values in parse_qs(text).items():
        yield name, values if name == "paths" or len(values) > 1 else values[0]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _tree(files: dict[str, bytes], place: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
    """What is in a folder of a repository, or below it."""
    prefix, folders = f"{place}/" if place else "", set()
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        folder, inner, _ = path.removeprefix(prefix).partition("/")
        if not inner or recursive:
            yield _entry(path, content)
        if inner and folder not in folders:
            folders.add(folder)
            yield {"type": "directory", "path": f"{prefix}{folder}", "oid": "0" * 40}
