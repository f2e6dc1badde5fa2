"""A Hub on localhost: the part of its HTTP interface that an upload speaks, with files kept in memory."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_good"


class Hub:
    """repositories: {full name: {"private": bool, "files": {path: bytes}}}. requests: method and path of each.

    cut: cuts so many of the next uploads of large files in their middle, without an answer
    refuse_commits: answers commits with 403
    """

    def __init__(self) -> None:
        self.forget()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def forget(self) -> None:
        """Is as new."""
        self.repositories: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.requests: list[str] = []
        self.cut, self.refuse_commits = 0, False

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to take this for the Hub, by LFS: Xet, which hf_xet speaks, is another protocol."""
        hub = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN}
        return {**hub, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        there = name in self.repositories
        private = asked.get("private", asked.get("visibility") == "private")
        self.repositories.setdefault(name, {"private": private, "files": {}})
        return 409 if there else 200, {"url": f"{self.endpoint}/{name}", "name": name}

    def preupload(self, name: str, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        modes = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["size"] > 50_000 else "regular"}
            for f in asked["files"]
        ]
        return 200, {"files": modes}

    def batch(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.endpoint}/large/{o['oid']}"}}} for o in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuse_commits:
            return 403, {"error": "you may not write here"}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name]["files"][value["path"]] = self.large[value["oid"]]
        return 200, {"success": True, "commitUrl": f"{self.endpoint}/{name}/commit/0", "commitOid": "0" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, value: dict[str, Any] | None = None) -> None:
        body = json.dumps(value or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status >= 400:
            self.send_header("X-Error-Message", str((value or {}).get("error", "refused")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if self.command == "PUT" and hub.cut:
            hub.cut -= 1
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        body = self.body()
        if self.command == "HEAD":
            self.answer(200)
        elif self.command == "PUT":
            digest = path.rpartition("/")[2]
            assert hashlib.sha256(body).hexdigest() == digest
            hub.large[digest] = body
            self.answer(200)
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
        else:
            self.answer(*self.api(path, body))

    def api(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        hub, model = self.hub, re.match(r"/api/models/([^/]+/[^/]+)", path)
        routes: list[tuple[str, Callable[[], tuple[int, dict[str, Any]]]]] = [
            (r"/api/repos/create", lambda: hub.create(json.loads(body))),
            (r"/api/validate-yaml", lambda: (200, {"errors": [], "warnings": []})),
            (r"/api/models/[^/]+/[^/]+/preupload/main", lambda: hub.preupload(model[1], json.loads(body))),
            (r"/api/models/[^/]+/[^/]+/commit/main", lambda: hub.commit(model[1], body)),
            (r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", lambda: hub.batch(json.loads(body))),
            (
                r"/api/models/[^/]+/[^/]+",
                lambda: (
                    (200, {"id": model[1], "private": hub.repositories[model[1]]["private"]})
                    if model[1] in hub.repositories
                    else (404, {"error": "Repository not found"})
                ),
            ),
        ]
        for pattern, respond in routes:
            if re.fullmatch(pattern, path):
                return respond()
        return 404, {"error": f"no such address: {path}"}

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def log_message(self, *_: object) -> None:
        pass
