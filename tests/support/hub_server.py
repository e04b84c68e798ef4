"""A Hub on the loopback, as much of it as fetching a model asks for; nothing here knows hf_sparse."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    server: "_Hub"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        for name, folder in self.server.models.items():
            if path in (
                f"/api/models/{name}",
                f"/api/models/{name}/revision/main",
                f"/api/models/{name}/revision/{COMMIT}",
            ):
                siblings = [{"rfilename": str(file.relative_to(folder))} for file in _files(folder)]
                return self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), with_body)
            if path.startswith(f"/api/models/{name}/revision/"):
                return self._refuse("RevisionNotFound")
            if path in (f"/api/models/{name}/tree/main", f"/api/models/{name}/tree/{COMMIT}"):
                return self._send(json.dumps([_entry(file, folder) for file in _files(folder)]).encode(), with_body)
            for revision in ("main", COMMIT):
                start = f"/{name}/resolve/{revision}/"
                file = folder / path.removeprefix(start)
                if path.startswith(start) and file.is_file():
                    return self._send(file.read_bytes(), with_body, etag=_oid(file))
        return self._refuse("RepoNotFound")

    def _send(self, body: bytes, with_body: bool, etag: str = "") -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Hub(ThreadingHTTPServer):
    models: dict[str, Path]
    asked: list[str]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()


def _entry(file: Path, folder: Path) -> dict[str, object]:
    return {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": _oid(file)}


@contextlib.contextmanager
def serving(models: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as models of a Hub.

    Args:
        models: maps an id, such as "ada/tiny", to a folder; it has one commit, ``COMMIT``, which is its branch "main".

    Yields:
        The address for HF_ENDPOINT, and the paths that were asked for.
    """
    hub = _Hub(("127.0.0.1", 0), _Handler)
    hub.models, hub.asked = models, []
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{hub.server_address[1]}", hub.asked
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
