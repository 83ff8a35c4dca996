"""A hub that goes away in the middle of an upload: the real hub library against a server that stops at every request.

The promise: a repository has the whole artefact or is what it was, because one commit is the last request; and the same
command again sends only the content that the hub does not have.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
import unittest
from typing import Any, ClassVar
from unittest import mock

import huggingface_hub
from huggingface_hub import HfApi, constants

from tests.test_export_cards_and_hub import HUB, TOKEN, HubTest
from utils.exceptions import ArtefactError
from utils.export import hub


class FakeHub:
    """Repositories of one owner as the hub's API shows them; `stop_at` is the request that it dies at, half-way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.uploads: list[str] = []
        self.stop_at = 0
        self.dead = False
        hub_itself = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            taken: ClassVar[FakeHub] = hub_itself

            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                self.taken.requests.append(f"{self.command} {self.path}")
                stopping = len(self.taken.requests) == self.taken.stop_at
                body = self.rfile.read(length // 2 if stopping else length)
                if stopping or self.taken.dead:  # it does not come back within this run of the command
                    self.taken.dead = True
                    self.close_connection = True
                    self.connection.close()
                    return
                status, value = self.taken.serve(self.command, self.path, body)
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = answer

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def serve(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/objects/"):
            self.uploads.append(path)
            self.objects[hashlib.sha256(body).hexdigest()] = body
            return 200, {}
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.action(one) for one in json.loads(body)["objects"]]}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            return 200, {"files": [{"path": n, "uploadMode": modes[n], "shouldIgnore": False} for n in names]}
        if "/commit/" in path:
            return 200, self.commit([json.loads(line) for line in body.splitlines()])
        if "/tree/" in path:
            return 200, [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in self.files.items()]
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {"id": "owner/name", "sha": "0" * 40, "private": True, "siblings": siblings}
        if path == "/api/repos/create":
            return 200, {"url": f"{self.url}/owner/name", "id": "owner/name"}
        return 200, {}

    def action(self, asked: dict[str, Any]) -> dict[str, Any]:
        if asked["oid"] in self.objects:
            return {"oid": asked["oid"], "size": asked["size"]}
        return {**asked, "actions": {"upload": {"href": f"{self.url}/objects/{asked['oid']}"}}}

    def commit(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
        return {"commitUrl": f"{self.url}/owner/name/commit/0123abc", "commitOid": "0123abc", "success": True}


class Interrupted(HubTest):
    def setUp(self) -> None:
        super().setUp()
        self.hub = FakeHub()
        self.addCleanup(self.hub.server.server_close)
        self.addCleanup(self.hub.server.shutdown)
        real = HfApi(endpoint=self.hub.url, token=TOKEN)
        for target, name, value in (
            (huggingface_hub, "HfApi", lambda **_: real),
            (constants, "HF_HUB_OFFLINE", False),
            (constants, "HF_HUB_DISABLE_XET", True),
            (time, "sleep", lambda _: None),
        ):
            self.start(mock.patch.object(target, name, value))
        self.start(mock.patch.object(HfApi, "_validate_yaml"))

    def test_stopped_at_any_request_the_repository_is_whole_or_as_it_was_and_the_same_again_ends_it(self) -> None:
        directory = self.artefact()
        hub.push(directory, HUB, message="m")
        whole, requests = dict(self.hub.files), list(self.hub.requests)
        self.assertEqual(whole["adapter_model.safetensors"], b"weights")
        self.assertIn("provenance.json", whole)
        self.assertIn("/commit/", requests[-1])
        self.assertGreater(len(requests), 4)
        before = {".gitattributes": b"as it was"}
        for number, request in enumerate(requests, 1):
            with self.subTest(stopped_at=request):
                self.hub.files, self.hub.objects, self.hub.requests = dict(before), {}, []
                self.hub.stop_at, self.hub.dead, self.hub.uploads = number, False, []
                self.refused(
                    lambda: hub.push(directory, HUB, message="m"), "the hub did not", "run the same again later"
                )
                self.assertEqual(self.hub.files, before)
                sent = list(self.hub.uploads)
                self.hub.stop_at, self.hub.dead = 0, False
                hub.push(directory, HUB, message="m")
                self.assertEqual(self.hub.files, before | whole)
                self.assertEqual(len(self.hub.uploads), 1, "content that had arrived is sent again")
                self.assertLessEqual(len(sent), 1)

    def test_a_dead_hub_is_an_error(self) -> None:
        self.hub.dead = True
        with self.assertRaises(ArtefactError):
            hub.push(self.artefact(), HUB, message="m")


if __name__ == "__main__":
    unittest.main()
