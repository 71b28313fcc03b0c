"""A hub on localhost: as much of its protocol as loading models and datasets asks for."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
"""The one commit of every repository here."""
REVISIONS = ("main", "v1", COMMIT)


@dataclass
class FakeHub:
    """Repositories `{"models/owner/name": folder, "datasets/owner/name": folder}`, served while it is entered."""

    repositories: dict[str, Path]
    requests: list[str] = field(default_factory=list)
    """What was asked for: "METHOD path status"."""
    uploads: Path | None = None
    """Folder of what is uploaded: OWNER/NAME/file, and OWNER/NAME.json of what was said of the repository."""

    def __enter__(self) -> "FakeHub":
        hub = self

        class Handler(_Handler):
            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                hub.requests.append(f"{self.command} {self.path} {status}")
                self.send_body(status, body, headers)

            def repository(self, kind: str, name: str) -> Path | None:
                uploaded = None if hub.uploads is None else hub.uploads / name
                is_uploaded = uploaded is not None and uploaded.is_dir() and kind == "models"
                return uploaded if is_uploaded else hub.repositories.get(f"{kind}/{name}")

            def stop(self) -> None:
                hub.close()

            def uploads(self) -> Path | None:
                return hub.uploads

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening: from now on the hub cannot be reached."""
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


def run_with_hub(
    repositories: dict[str, Path], root: Path, script: str, *arguments: str, uploads: Path | None = None
) -> dict[str, Any]:
    """What a script prints as JSON in its last line, run in `root/desk` with a hub, and under "requests" what it asked.

    It needs a process of its own: the hub's address is read when huggingface_hub is imported.
    """
    (root / "desk").mkdir()
    with FakeHub(repositories, uploads=uploads) as hub:
        address = {"HF_ENDPOINT": hub.url, "HF_HOME": str(root / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env={key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | address,
            cwd=root / "desk",
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"requests": hub.requests}


class _Handler(BaseHTTPRequestHandler):
    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        raise NotImplementedError

    def repository(self, kind: str, name: str) -> Path | None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if path == "__stop__":
            self.answer(200)
            threading.Thread(target=self.stop).start()
        elif parts[0] == "api":
            self._api(parts[1], parts[2:])
        elif "resolve" in parts:
            self._resolve(parts)
        else:
            self.answer(404)

    do_HEAD = do_GET

    def uploads(self) -> Path | None:
        raise NotImplementedError

    def do_PUT(self) -> None:
        """A large file, under the name that the batch call gave it."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        folder, oid = self.uploads(), self.path.rpartition("/")[2]
        if folder is None or hashlib.sha256(body).hexdigest() != oid:
            self.answer(400)
            return
        (folder / oid).write_bytes(body)
        self.answer(200)

    def _upload(self, folder: Path, path: str, body: bytes) -> None:
        """A new repository, what is wanted of its files, and a commit; a stranger's space is closed."""
        if path == "api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            if owner == "stranger":
                self.answer(403, b'{"error":"you may not write here"}')
                return
            name = f"{owner}/{asked['name']}"
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.json").write_text(json.dumps(asked))
            self._json({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            place = f"http://{self.headers['Host']}/large/"
            actions = [each | {"actions": {"upload": {"href": place + each["oid"]}}} for each in objects]
            self._json({"transfer": "basic", "objects": actions})
        elif "/preupload/" in path:
            files = [each["path"] for each in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in files}
            self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
        elif "/commit/" in path:
            name = "/".join(path.split("/")[2:4])
            place, address = folder / name, f"http://{self.headers['Host']}/{name}"
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    (place / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                    (place / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "deletedFile":
                    (place / value["path"]).unlink()
                elif line["key"] == "lfsFile":
                    (place / value["path"]).parent.mkdir(parents=True, exist_ok=True)
                    (place / value["path"]).write_bytes((folder / value["oid"]).read_bytes())
            self._json({"commitOid": COMMIT, "commitUrl": f"{address}/commit/{COMMIT}"})
        else:
            self.answer(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        parts, uploads = path.split("/"), self.uploads()
        if uploads is not None and not path.endswith("paths-info"):
            self._upload(uploads, path, body)
            return
        folder = self.repository(parts[1], "/".join(parts[2:4])) if len(parts) > 4 else None
        if folder is None or parts[4] != "paths-info":
            self.answer(404)
            return
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
        self._json([_entry(folder, folder / path) for path in wanted if (folder / path).exists()])

    def _api(self, kind: str, rest: list[str]) -> None:
        name, rest = "/".join(rest[:2]), rest[2:]
        folder = self.repository(kind, name)
        if folder is None:
            self.answer(404, b'{"error":"Repository not found"}', **{"X-Error-Code": "RepoNotFound"})
            return
        if len(rest) > 1 and rest[1] not in REVISIONS:
            self.answer(404, b'{"error":"Revision not found"}', **{"X-Error-Code": "RevisionNotFound"})
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": entry["path"]} for entry in _tree(folder) if entry["type"] == "file"]
            self._json(
                {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
                | {"siblings": siblings}
            )
        elif rest[0] == "tree":
            below = "/".join(rest[2:])
            is_deep = "recursive=true" in urlsplit(self.path).query.lower()
            found = [entry for entry in _tree(folder) if entry["path"].startswith(f"{below}/" if below else "")]
            shallow = [entry for entry in found if "/" not in entry["path"][len(below) :].strip("/")]
            self._json(found if is_deep else shallow)
        else:
            self.answer(404)

    def _resolve(self, parts: list[str]) -> None:
        at = parts.index("resolve")
        kind = parts[0] if parts[0] == "datasets" else "models"
        folder = self.repository(kind, "/".join(parts[at - 2 : at]))
        if folder is None:
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})
        elif parts[at + 1] not in REVISIONS:
            self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
        elif not (file := folder / "/".join(parts[at + 2 :])).is_file():
            self.answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._file(file.read_bytes())

    def _file(self, body: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if not wanted:
            self.answer(200, body, **headers)
            return
        start, _, end = wanted.partition("-")
        first, last = int(start), min(int(end), len(body) - 1) if end else len(body) - 1
        self.answer(206, body[first : last + 1], **headers, **{"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def _json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def send_body(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


def _tree(folder: Path) -> list[dict[str, object]]:
    return [_entry(folder, path) for path in sorted(folder.rglob("*"))]


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    data = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
