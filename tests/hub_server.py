"""A local HTTP server that plays the hub, for the real huggingface_hub to download from."""

import hashlib
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")
"""Endings of files that the hub keeps in LFS, under their SHA-256."""


@dataclass
class HubServer:
    """Repositories by name, each one a map from a revision to a folder. `sha_of` gives a revision's commit."""

    endpoint: str = ""
    repositories: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    served: list[str] = field(default_factory=list)
    """Files whose content was sent."""

    def sha_of(self, name: str, revision: str) -> str:
        return hashlib.sha1(f"{name}@{self.repositories[name][revision]}".encode()).hexdigest()

    def folder(self, name: str, revision: str) -> tuple[str, Path] | None:
        """The commit and the folder of a revision, which may be a commit itself."""
        for known, folder in self.repositories[name].items():
            sha = self.sha_of(name, known)
            if revision in (known, sha):
                return sha, folder
        return None


def _names(path: Path) -> tuple[str, str]:
    """Git's id of a file's content, and its SHA-256."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    oid, sha256 = _names(path)
    entry: dict[str, Any] = {
        "type": "file",
        "path": path.relative_to(folder).as_posix(),
        "size": path.stat().st_size,
        "oid": oid,
    }
    if path.suffix in LARGE:
        entry["lfs"] = {"oid": sha256, "size": path.stat().st_size, "pointerSize": 134}
    return entry


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            owner, repository, kind, revision, *rest = (parts[2:] if api else parts) + [""] * 4
            name = f"{owner}/{repository}"
            if name not in hub.repositories:
                return self.refuse(404, "RepoNotFound")
            if name in hub.gated:
                return self.refuse(403, "GatedRepo")
            found = hub.folder(name, revision or "main")
            if found is None:
                return self.refuse(404, "RevisionNotFound")
            sha, folder = found
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if api and kind == "tree":
                assert parse_qs(urlsplit(self.path).query).get("recursive"), "the tree is asked for as a whole"
                return self.answer(200, json.dumps([_entry(folder, path) for path in files]).encode())
            if api:
                names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
                return self.answer(200, json.dumps({"id": name, "sha": sha, "siblings": names}).encode())
            path = folder / "/".join(part for part in rest if part)
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            if self.command == "GET":
                hub.served.append(path.relative_to(folder).as_posix())
            oid, sha256 = _names(path)
            etag = f'"{sha256 if path.suffix in LARGE else oid}"'
            size = str(path.stat().st_size)
            return self.answer(
                200, path.read_bytes(), ETag=etag, X_Linked_ETag=etag, X_Linked_Size=size, X_Repo_Commit=sha
            )

        do_HEAD = do_GET

    return Handler


@contextmanager
def playing_hub(repositories: dict[str, dict[str, Path]]) -> Generator[HubServer, None, None]:
    """A hub with these repositories, reachable while the block runs."""
    hub = HubServer(repositories=repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
