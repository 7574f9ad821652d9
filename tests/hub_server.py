"""The Hugging Face hub's protocol for one dataset repository on loopback: what `hf://` needs to list and to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/texts"


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    """Serve a folder as the files of `datasets/owner/texts`; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
                below = folder.joinpath(*path.split("/tree/")[1].split("/")[1:])
                found = below.rglob("*") if "recursive=True" in self.path else below.glob("*")
                self._answer(200, json.dumps([_entry(each, folder) for each in sorted(found)]).encode())
            elif path.startswith(f"/api/datasets/{REPOSITORY}"):
                self._answer(200, json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
            else:
                self._send_file(folder.joinpath(*path.split("/")[6:]))

        def do_POST(self) -> None:
            wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
            found = [_entry(folder / name, folder) for name in wanted if (folder / name).exists()]
            self._answer(200, json.dumps(found).encode())

        def _send_file(self, file: Path) -> None:
            if not file.is_file():
                self._answer(404, b"{}")
                return
            data = file.read_bytes()
            asked = self.headers.get("Range")
            if not asked:
                self._answer(200, data)
                return
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last or len(data)) + 1]
            self._answer(206, part, f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")

        def _answer(self, status: int, body: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{COMMIT}"')
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _entry(path: Path, folder: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    oid = hashlib.sha1(name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "oid": oid, "size": 0, "path": name}
    return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}
