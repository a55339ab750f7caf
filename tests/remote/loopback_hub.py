"""A stand-in for the Hugging Face Hub on 127.0.0.1: what its clients call to create, push, list and download models.

It runs as a process of its own and keeps everything in memory::

    python loopback_hub.py            # prints its address on one line, serves until it is terminated

A client finds it through its environment, read when huggingface_hub is imported: `HF_ENDPOINT` is the address, and
`HF_HUB_DISABLE_XET=1` makes it upload by the plain LFS protocol, because xet is a binary service.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt", ".png")


@dataclass(frozen=True)
class Commit:
    """A state of a repository: its hash, and the object id of each file by path."""

    sha: str
    files: dict[str, str]


@dataclass
class Repository:
    """The commits of one model repository, oldest first, and the names that point at some of them."""

    commits: list[Commit]
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str | None) -> Commit | None:
        """The commit of a branch, a tag or a hash; the newest for `main` and None."""
        if revision in (None, "main"):
            return self.commits[-1]
        sha = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)


class NotFoundError(Exception):
    """What was asked for is not here. `code` is the Hub's word for it; the client turns it into its own exception."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


class Hub:
    """Repositories and file contents."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.lfs_objects: set[str] = set()

    def create(self, repo_id: str) -> bool:
        """Make an empty repository; False where there is one."""
        if repo_id in self.repositories:
            return False
        self.repositories[repo_id] = Repository([Commit(_sha1(repo_id.encode()), {})])
        return True

    def repository(self, repo_id: str) -> Repository:
        """The repository of that id, or NotFoundError."""
        if repo_id not in self.repositories:
            raise NotFoundError("RepoNotFound")
        return self.repositories[repo_id]

    def commit_at(self, repo_id: str, revision: str | None) -> Commit:
        """A commit by branch, tag or hash, or NotFoundError."""
        commit = self.repository(repo_id).at(revision)
        if commit is None:
            raise NotFoundError("RevisionNotFound")
        return commit

    def commit(self, repo_id: str, operations: list[dict[str, Any]]) -> Commit:
        """Apply the operations of a commit request: a header, files, LFS files and deletions."""
        repository = self.repository(repo_id)
        files = dict(repository.commits[-1].files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = _sha1(b"blob %d\0" % len(content) + content)
                self.contents[files[value["path"]]] = content
            elif kind == "lfsFile":
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        commit = Commit(_sha1(json.dumps([files, len(repository.commits), repo_id]).encode()), files)
        repository.commits.append(commit)
        return commit


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The Hub on a port of 127.0.0.1; 0 takes a free one."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Endpoint)
        self.hub = Hub()

    @property
    def address(self) -> str:
        """What a client puts into `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"


class Endpoint(BaseHTTPRequestHandler):
    """One request. Each method below answers one kind, listed with its pattern in `ROUTES`."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def handle_any(self) -> None:
        """Find the method for this request, and turn what is missing into the Hub's 404."""
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        body = self._read_body()
        for pattern, answer in ROUTES:
            if match := pattern.fullmatch(request):
                try:
                    answer(self, body, **match.groupdict())
                except NotFoundError as error:
                    self._reply({"error": error.code}, status=404, headers={"X-Error-Code": error.code})
                return
        self._reply({"error": f"{request} is not served here"}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""

    def who_am_i(self, body: bytes) -> None:
        token = {"accessToken": {"role": "write", "displayName": "loopback"}}
        self._reply({"type": "user", "name": USER, "auth": token, "orgs": []})

    def create_repository(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        created = self.hub.create(repo_id)
        address = f"{self.server.address}/{repo_id}"
        self._reply({"url": address, "id": repo_id, "name": repo_id}, status=200 if created else 409)

    def validate_yaml(self, body: bytes) -> None:
        self._reply({"errors": [], "warnings": []})

    def choose_upload(self, body: bytes, repo: str, revision: str) -> None:
        """Say for each file whether it comes inside the commit or by LFS."""
        self.hub.repository(repo)
        modes = {True: "lfs", False: "regular"}
        files = [
            {"path": file["path"], "uploadMode": modes[file["path"].endswith(LFS_SUFFIXES)], "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._reply({"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        """Say where each LFS object is to be sent."""
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.server.address}/lfs/{item['oid']}", "header": {}}}}
            for item in json.loads(body)["objects"]
        ]
        self._reply({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_upload(self, body: bytes, oid: str) -> None:
        self.hub.contents[oid] = body
        self.hub.lfs_objects.add(oid)
        self._reply({})

    def make_commit(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.hub.commit(repo, [json.loads(line) for line in body.splitlines() if line])
        address = f"{self.server.address}/{repo}/commit/{commit.sha}"
        self._reply({"success": True, "commitOid": commit.sha, "commitUrl": address, "hookOutput": ""})

    def make_ref(self, body: bytes, repo: str, revision: str) -> None:
        """A branch is named in the address, a tag in the request."""
        request = json.loads(body or b"{}")
        name, start = (request["tag"], revision) if "tag" in request else (revision, request.get("startingPoint"))
        self.hub.repository(repo).refs[name] = self.hub.commit_at(repo, start).sha
        self._reply({})

    def model_info(self, body: bytes, repo: str, revision: str | None) -> None:
        commit = self.hub.commit_at(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        names = {"id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings}
        self._reply(
            names | {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        )

    def list_tree(self, body: bytes, repo: str, revision: str) -> None:
        commit = self.hub.commit_at(repo, revision)
        entries = []
        for path, oid in commit.files.items():
            size = len(self.hub.contents[oid])
            lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if oid in self.hub.lfs_objects else {}
            entries.append({"type": "file", "path": path, "size": size, "oid": oid} | lfs)
        self._reply(entries)

    def download(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit = self.hub.commit_at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers["X-Error-Code"] = "EntryNotFound"
            self._reply({"error": "Entry not found"}, status=404, headers=headers)
            return
        oid = commit.files[path]
        content = self.hub.contents[oid]
        self._reply(content, content_type="application/octet-stream", headers=headers | {"ETag": f'"{oid}"'})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(
        self,
        body: bytes | dict[str, Any] | list[Any],
        *,
        status: int = 200,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[re.Pattern[str], Callable[..., None]]] = [
    (re.compile(pattern), answer)
    for pattern, answer in (
        (r"GET /api/whoami-v2", Endpoint.who_am_i),
        (r"POST /api/repos/create", Endpoint.create_repository),
        (r"POST /api/validate-yaml", Endpoint.validate_yaml),
        (rf"POST /api/models/{REPO}/preupload/{REVISION}", Endpoint.choose_upload),
        (rf"POST /{REPO}\.git/info/lfs/objects/batch", Endpoint.lfs_batch),
        (r"PUT /lfs/(?P<oid>[0-9a-f]+)", Endpoint.lfs_upload),
        (rf"POST /api/models/{REPO}/commit/{REVISION}", Endpoint.make_commit),
        (rf"POST /api/models/{REPO}/(?:branch|tag)/{REVISION}", Endpoint.make_ref),
        (rf"GET /api/models/{REPO}/tree/{REVISION}(?:/.*)?", Endpoint.list_tree),
        (rf"(?:GET|HEAD) /api/models/{REPO}(?:/revision/{REVISION})?", Endpoint.model_info),
        (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Endpoint.download),
    )
]


if __name__ == "__main__":
    server = HubServer()
    print(server.address, flush=True)
    server.serve_forever()
