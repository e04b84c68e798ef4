"""A Hub on the loopback, which keeps what it is sent and refuses what it is told to; nothing here knows hf_sparse.

It speaks as much of the Hub's protocol as the unchanged client asks for without Xet: information, trees and files of models,
and for a push the account, new repositories, the check of a README, how each file is to be sent, LFS and commits.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

# of a model that is served from a folder
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# whose namespace may be written
OWNER = "ada"
_MODEL = r"(?P<name>[\w.-]+/[\w.-]+)"
# sent by LFS, as the Hub has it: binary files, whatever their size
_LARGE = (".safetensors", ".bin", ".png")
# for a program: note every address outside of the loopback that it connects to in the list ``elsewhere``
WATCH_ADDRESSES = """
import socket
elsewhere, _connect = [], socket.socket.connect
def _watched(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
        elsewhere.append(address)
        raise OSError(f"only the loopback may be asked, not {address}")
    return _connect(self, address)
socket.socket.connect = _watched
"""


@dataclass
class Repository:
    """A model.

    Attributes:
        files: what each path of its one branch holds.
        commit: id of the last commit.
        is_private: whether it is for its owner alone.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    is_private: bool = False


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        models: by id.
        objects: what was sent by LFS, by SHA-256.
        asked: paths that were asked for.
        token: what a push has to come with; None takes anything.
        refusals: maps a pattern of a path to the statuses that the next requests for it get, one after another.
    """

    daemon_threads = True

    def __init__(self, models: dict[str, Path], token: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models = {name: Repository(_contents(folder)) for name, folder in models.items()}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.token = token
        self.refusals: dict[str, list[int]] = {}

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def run(self, program: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a Python program that knows this Hub alone, and its token.

        Args:
            program: its text; it may import ``tests``.
            home: where the client keeps what it fetches.
            arguments: of the program.
        """
        settings = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings |= {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        settings |= {"PYTHONPATH": str(Path(__file__).parents[2]), **({"HF_TOKEN": self.token} if self.token else {})}
        ran = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=settings, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        return ran


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        self._write()

    def do_PUT(self) -> None:
        self._write()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    @property
    def _is_owner(self) -> bool:
        return self.server.token is None or self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _path(self) -> str | None:
        """Return what is asked for, or None after a refusal that was waiting for it."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        for pattern, statuses in self.server.refusals.items():
            if statuses and re.search(pattern, path):
                self._refuse(statuses.pop(0))
                return None
        return path

    def _read(self) -> None:
        path = self._path()
        if path is None:
            return None
        if path == "/api/whoami-v2":
            return self._send({"name": OWNER, "type": "user"}) if self._is_owner else self._refuse(401)
        found = re.match(rf"/api/models/{_MODEL}(/revision/(?P<revision>.+))?$", path)
        found = found or re.match(rf"/api/models/{_MODEL}/tree/(?P<revision>[^/]+)(?P<inside>/.+)?$", path)
        found = found or re.match(rf"/{_MODEL}/resolve/(?P<revision>[^/]+)/(?P<file>.+)$", path)
        model = self.server.models.get(found["name"]) if found else None
        if found is None or model is None or (model.is_private and not self._is_owner):
            return self._refuse(404, "RepoNotFound")
        if (found["revision"] or "main") not in ("main", model.commit):
            return self._refuse(404, "RevisionNotFound")
        if found.groupdict().get("inside"):
            return self._refuse(404, "EntryNotFound", commit=model.commit)
        if path.startswith("/api/") and "/tree/" in path:
            return self._send([_entry(file, held) for file, held in model.files.items()])
        if "file" not in found.groupdict():
            siblings = [{"rfilename": file} for file in model.files]
            return self._send(
                {"id": found["name"], "sha": model.commit, "private": model.is_private, "siblings": siblings}
            )
        held = model.files.get(found["file"])
        if held is None:
            return self._refuse(404, "EntryNotFound", commit=model.commit)
        return self._send(held, {"ETag": f'"{_oid(found["file"], held)}"', "X-Repo-Commit": model.commit})

    def _write(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        path = self._path()
        if path is None:
            return None
        if path.startswith("/objects/"):
            # as on the Hub, what is stored elsewhere has an address of its own and needs no token
            return self._store(path.rpartition("/")[2], body)
        if not self._is_owner:
            return self._refuse(401)
        if path == "/api/validate-yaml":
            return self._check_readme(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.match(rf"/api/models/{_MODEL}/(?P<kind>preupload|commit)/main$", path)
        found = found or re.match(rf"/{_MODEL}\.git/info/lfs/objects/(?P<kind>batch|verify)$", path)
        model = self.server.models.get(found["name"]) if found else None
        if found is None or model is None:
            return self._refuse(404, "RepoNotFound")
        if found["kind"] == "commit":
            return self._commit(found["name"], model, [json.loads(line) for line in body.splitlines()])
        asked = json.loads(body)
        if found["kind"] == "verify":
            held = self.server.objects.get(asked["oid"])
            return self._refuse(400) if held is None or len(held) != asked["size"] else self._send({})
        if found["kind"] == "batch":
            return self._send(
                {"transfer": "basic", "objects": [self._instructions(found["name"], o) for o in asked["objects"]]}
            )
        files = []
        for file in asked["files"]:
            held = model.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            oid = None if held is None else _oid(file["path"], held)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._send({"files": files})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._refuse(400)
        self.server.objects[oid] = body
        return self._send({})

    def _check_readme(self, text: str) -> None:
        held = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        is_right = held is not None and isinstance(yaml.safe_load(held[1]), dict)
        return self._send({}) if is_right else self._send({"errors": [{"message": "no metadata"}]}, status=400)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            return self._refuse(403)
        said = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.models:
            return self._send(said, status=409)
        self.server.models[name] = Repository(is_private=asked.get("visibility") == "private")
        return self._send(said)

    def _instructions(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.server.objects:
            return asked
        actions = {
            "upload": {"href": f"{self.server.address}/objects/{asked['oid']}?signature=secret"},
            "verify": {"href": f"{self.server.address}/{name}.git/info/lfs/objects/verify"},
        }
        return {**asked, "actions": actions}

    def _commit(self, name: str, model: Repository, lines: list[dict[str, Any]]) -> None:
        files = dict(model.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] != "header":
                return self._refuse(400)
        model.files = files
        model.commit = hashlib.sha1(repr((model.commit, lines)).encode(), usedforsecurity=False).hexdigest()
        url = f"{self.server.address}/{name}/commit/{model.commit}"
        return self._send({"commitUrl": url, "commitOid": model.commit, "pullRequestUrl": None})

    def _send(self, body: Any, headers: dict[str, str] | None = None, *, status: int = 200) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(raw))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _refuse(self, status: int, code: str = "", *, commit: str = "") -> None:
        """Refuse, and say it in the worst words: with the token that came."""
        given = {"X-Error-Code": code, "X-Repo-Commit": commit}
        said = {"error": f"refused for {self.headers.get('Authorization')}"}
        self._send(said, {key: value for key, value in given.items() if value}, status=status)


def _contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _oid(path: str, held: bytes) -> str:
    if path.endswith(_LARGE):
        return hashlib.sha256(held).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(held) + held, usedforsecurity=False).hexdigest()


def _entry(path: str, held: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(held), "oid": _oid(path, held)}
    if path.endswith(_LARGE):
        entry["lfs"] = {"oid": _oid(path, held), "size": len(held), "pointerSize": 134}
    return entry


@contextlib.contextmanager
def serving(models: dict[str, Path] | None = None, *, token: str | None = None) -> Iterator[Hub]:
    """Serve folders as models of a Hub, and take pushes.

    Args:
        models: maps an id, such as "ada/tiny", to a folder; it has one commit, ``COMMIT``, which is its branch "main".
        token: what a push has to come with; None takes anything.
    """
    hub = Hub(models or {}, token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
