# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face Hub on 127.0.0.1 for tests with the real client: repositories in memory, faults on demand.

It answers what huggingface-hub 2.4 asks for to create a repository, push to it and load from it. The client reads
HF_ENDPOINT when it is imported, so tests run it in processes of their own, with `LoopbackHub.environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

USER = "user"
GOOD_TOKEN = "hf_goodTokenOfTheLoopbackHub0123456789"

# Name of an endpoint -> method and pattern of its path.
ENDPOINTS = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate-yaml": ("POST", r"/api/validate-yaml"),
    "auth-check": ("GET", r"/api/models/([^/]+/[^/]+)/auth-check/write"),
    "preupload": ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main"),
    "lfs-batch": ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "lfs-put": ("PUT", r"/lfs/([0-9a-f]{64})"),
    "lfs-verify": ("POST", r"/lfs/([0-9a-f]{64})/verify"),
    "commit": ("POST", r"/api/models/([^/]+/[^/]+)/commit/main"),
    "info": ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?"),
    "tree": ("GET", r"/api/models/([^/]+/[^/]+)/tree/[^/]+"),
    "head": ("HEAD", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)"),
    "get": ("GET", r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)"),
    "dataset-head": ("HEAD", r"/(?:datasets|raw)/([^/]+/[^/]+)/(?:resolve/)?([0-9a-f]{40})/(.+)"),
    "dataset-get": ("GET", r"/(?:datasets|raw)/([^/]+/[^/]+)/(?:resolve/)?([0-9a-f]{40})/(.+)"),
}
READING = ("info", "tree", "head", "get", "dataset-head", "dataset-get")
# Requests of a push, in its order.
PUSH_ENDPOINTS = ["create", "validate-yaml", "preupload", "lfs-batch", "lfs-put", "lfs-verify", "commit"]


@dataclass
class Repository:
    """A repository: the files of its only branch, the ids of its commits, and who sees it."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    private: bool = False

    def object_id(self, name: str) -> str | None:
        """The id that the client compares with its own: SHA-256 for LFS, git's SHA-1 for others."""
        data = self.files.get(name)
        if data is None:
            return None
        if is_lfs(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What an endpoint does in place of its answer: a status, or the connection cut `before` or `after` its work."""

    status: int | None
    cut: str | None
    headers: dict[str, str]
    times: float


def is_lfs(name: str) -> bool:
    """Whether a file is stored through LFS."""
    return name.endswith(".safetensors")


class LoopbackHub:
    """The server.

    Attributes:
        repositories: of models, by `user/name`.
        datasets: of datasets, and of files of GitHub below `/raw`.
        objects: LFS data by SHA-256.
        counts: requests by endpoint, failed ones included; `unknown` for others.
        read_only: whether the token may write to no repository.
        role: of the token, as `whoami` tells it.
        put_tokens: Authorization headers that came with `lfs-put`: the storage is another machine, so none must.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.datasets: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.counts: Counter[str] = Counter()
        self.read_only, self.role = False, "write"
        self.put_tokens: list[str] = []
        self.faults: dict[str, Fault] = {}
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            owner = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def fail(
        self,
        endpoint: str,
        status: int | None = 503,
        times: float = 1,
        cut: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Let the next `times` requests of an endpoint fail, with a status or, with `cut`, without an answer."""
        assert endpoint in ENDPOINTS and cut in (None, "before", "after")
        self.faults[endpoint] = Fault(None if cut else status, cut, headers or {}, times)

    def environment(self, home: Path, token: str | None = GOOD_TOKEN) -> dict[str, str]:
        """Variables of a process whose client talks to this server alone and finds no login but `token`."""
        root = Path(__file__).parents[2]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        paths = [
            str(root / "pipelines"),
            str(root / "tests" / "support"),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        variables = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        return {**kept, **variables, **({} if token is None else {"HF_TOKEN": token})}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running server."""
    hub = LoopbackHub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """No log."""

    def _handle(self) -> None:
        hub, path = self.owner, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, words = "unknown", ()
        for candidate, (method, pattern) in ENDPOINTS.items():
            found = re.fullmatch(pattern, path)
            if found and method == self.command:
                name, words = candidate, found.groups()
                break
        with hub.lock:
            hub.counts[name] += 1
            fault = hub.faults.get(name)
            if fault is not None and fault.times > 0:
                fault.times -= 1
            else:
                fault = None
            if fault is None or fault.cut == "after":
                status, answer, headers = self._answer(name, words, body)
            elif fault.status is not None:
                status, answer, headers = fault.status, {"error": "a fault of the test"}, fault.headers
        if fault is not None and fault.cut:
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, name: str, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Status, body and headers of an endpoint's answer; called with the lock held."""
        hub = self.owner
        if name == "lfs-put":
            hub.put_tokens += filter(None, [self.headers.get("Authorization")])
            if hashlib.sha256(body).hexdigest() != words[0]:
                return 400, {"error": "other data than announced"}, {}
            hub.objects[words[0]] = body
            return 200, {}, {}
        token = self.headers.get("Authorization")
        if token != f"Bearer {GOOD_TOKEN}" and (token is not None or name not in READING):
            message = "Invalid credentials in Authorization header" if token else "Invalid username or password."
            return 401, {"error": message}, {"X-Error-Message": message}
        if hub.read_only and name in ("create", "auth-check", "preupload", "lfs-batch", "commit"):
            return 403, {"error": "the token may only read"}, {"X-Error-Message": "the token may only read"}
        if name == "whoami":
            orgs = [{"name": "team", "roleInOrg": "contributor"}, {"name": "readers", "roleInOrg": "read"}]
            auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": hub.role}}
            return 200, {"type": "user", "name": USER, "orgs": orgs, "auth": auth}, {}
        if name == "create":
            content = json.loads(body)
            repo_id = f"{content['organization'] or USER}/{content['name']}"
            exists = repo_id in hub.repositories
            hub.repositories.setdefault(repo_id, Repository(private=content.get("visibility") == "private"))
            return 409 if exists else 200, {"url": f"{hub.url}/{repo_id}"}, {}
        if name == "validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if name == "lfs-verify":
            return (200 if words[0] in hub.objects else 404), {}, {}
        known = hub.datasets if name.startswith("dataset-") else hub.repositories
        repository = known.get(words[0]) if words else None
        if repository is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return getattr(self, "_" + name.replace("-", "_"))(repository, words, body)

    def _auth_check(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        return 200, {}, {}

    def _preupload(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [
            {
                "path": name,
                "uploadMode": "lfs" if is_lfs(name) else "regular",
                "shouldIgnore": False,
                "oid": repository.object_id(name),
            }
            for name in names
        ]
        return 200, {"files": modes}, {}

    def _lfs_batch(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        objects = []
        for item in json.loads(body)["objects"]:
            link = f"{self.owner.url}/lfs/{item['oid']}"
            actions = {"upload": {"href": link}, "verify": {"href": link + "/verify"}}
            objects.append({**item} if item["oid"] in self.owner.objects else {**item, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _commit(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.owner.objects[value["oid"]]
        number = len(repository.commits) + 1
        repository.commits.append(hashlib.sha1(b"%d" % number + body).hexdigest())
        commit = repository.commits[-1]
        return 200, {"commitOid": commit, "commitUrl": f"{self.owner.url}/{words[0]}/commit/{commit}"}, {}

    def _info(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        siblings = [{"rfilename": name} for name in sorted(repository.files)]
        commit = repository.commits[-1] if repository.commits else "0" * 40
        return (
            200,
            {"id": words[0], "modelId": words[0], "sha": commit, "siblings": siblings, "private": repository.private},
            {},
        )

    def _tree(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        files = [
            {"type": "file", "path": name, "size": len(data), "oid": repository.object_id(name)}
            for name, data in sorted(repository.files.items())
        ]
        return 200, files, {}

    def _get(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        name = unquote(words[-1])
        if name not in repository.files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        headers = {"ETag": f'"{repository.object_id(name)}"', "X-Repo-Commit": repository.commits[-1]}
        return 200, repository.files[name], headers

    def _dataset_get(self, repository: Repository, words: tuple[str, ...], body: bytes) -> tuple[int, Any, dict]:
        if words[1] not in repository.commits:
            return 404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"}
        return self._get(repository, words, body)

    _head, _dataset_head = _get, _dataset_get
