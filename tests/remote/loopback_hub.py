"""A stand-in for the Hugging Face Hub on 127.0.0.1: what its clients call to create, push, list and download models.

It runs as a process of its own and keeps everything in memory::

    python loopback_hub.py            # prints its address on one line, serves until it is terminated

Reading a private repository and all writing need a token, and `hf_reader` is one that may only read. A test makes
requests fail through `/loopback/failures`, and sees through `/loopback/requests` which ones came.

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
READER = "hf_reader"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".pt", ".png")


@dataclass(frozen=True)
class Commit:
    """A state of a repository: its hash, and the object id of each file by path."""

    sha: str
    files: dict[str, str]


@dataclass
class Repository:
    """The commits of one model repository, and the branches (also `refs/pr/1`) and tags that point at some of them."""

    private: bool
    commits: list[Commit]
    branches: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str | None) -> Commit | None:
        """The commit of a branch, a tag or a hash; that of `main` for None."""
        revision = revision or "main"
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.sha == sha), None)


class RefusalError(Exception):
    """A request that is answered with an error. `code` is the Hub's word for it, of which clients make exceptions."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """Repositories and file contents."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.lfs_objects: set[str] = set()
        self.requests: list[str] = []
        self.failures: list[dict[str, Any]] = []

    def create(self, repo_id: str, private: bool) -> bool:
        """Make an empty repository; False where there is one."""
        if repo_id in self.repositories:
            return False
        first = Commit(_sha1(repo_id.encode()), {})
        self.repositories[repo_id] = Repository(private, [first], {"main": first.sha})
        return True

    def repository(self, repo_id: str) -> Repository:
        """The repository of that id, or RefusalError."""
        if repo_id not in self.repositories:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return self.repositories[repo_id]

    def commit_at(self, repo_id: str, revision: str | None) -> Commit:
        """A commit by branch, tag or hash, or RefusalError."""
        commit = self.repository(repo_id).at(revision)
        if commit is None:
            raise RefusalError(404, "Invalid rev id", "RevisionNotFound")
        return commit

    def commit(self, repo_id: str, branch: str, operations: list[dict[str, Any]], to_branch: str) -> Commit:
        """Apply the operations of a commit request, a header, files, LFS files and deletions, to those of `branch`."""
        repository, parent = self.repository(repo_id), self.commit_at(repo_id, branch)
        files = dict(parent.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "header" and value.get("parentCommit") not in (None, parent.sha):
                raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            elif kind == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = _sha1(b"blob %d\0" % len(content) + content)
                self.contents[files[value["path"]]] = content
            elif kind == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise RefusalError(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        commit = Commit(_sha1(json.dumps([files, len(repository.commits), repo_id]).encode()), files)
        repository.commits.append(commit)
        repository.branches[to_branch] = commit.sha
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
        """Find the method for this request, unless it is to fail, and turn a refusal into the Hub's answer."""
        request = f"{self.command} {urlsplit(self.path).path}"
        if "/loopback/" not in request:
            self.hub.requests.append(request)
        body = self._read_body()
        try:
            if self._hangs_up(request):
                return
            for pattern, answer in ROUTES:
                if match := pattern.fullmatch(request):
                    groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                    self._check_token(groups.get("repo"))
                    answer(self, body, **groups)
                    return
            raise RefusalError(404, f"{request} is not served here")
        except RefusalError as error:
            headers = {"X-Error-Code": error.code} if error.code else {}
            self._reply({"error": str(error)}, status=error.status, headers=headers | {"X-Error-Message": str(error)})

    def _check_token(self, repo: str | None) -> None:
        """As the Hub does: without a token what is private looks like what is not there.

        Over https clients know that from the 401; here, over http, they need the code.
        """
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = self.hub.repositories.get(repo)
        if not token and known is not None and known.private:
            raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
        if not token and self.command == "POST":
            raise RefusalError(401, "Invalid username or password.")
        if token == READER and self.command == "POST":
            raise RefusalError(403, "Forbidden: you may only read this repository.")

    def _hangs_up(self, request: str) -> bool:
        """Fail as `set_failures` was asked to: answer with an error, or leave the client without an answer."""
        failure = next((f for f in self.hub.failures if f["times"] > 0 and re.fullmatch(f["request"], request)), None)
        if failure is None:
            return False
        failure["times"] -= 1
        if failure["status"] is not None:
            raise RefusalError(failure["status"], "Asked to fail")
        self.connection.recv(1)  # returns when the client is gone
        self.close_connection = True
        return True

    def set_failures(self, body: bytes) -> None:
        """A list of `request` (a pattern of method and path), `times` and `status`: null keeps the client waiting."""
        self.hub.failures = json.loads(body)
        self._reply({})

    def list_requests(self, body: bytes) -> None:
        self._reply(self.hub.requests)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""

    def who_am_i(self, body: bytes) -> None:
        token = {"accessToken": {"role": "write", "displayName": "loopback"}}
        self._reply({"type": "user", "name": USER, "auth": token, "orgs": []})

    def create_repository(self, body: bytes) -> None:
        request = json.loads(body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        created = self.hub.create(repo_id, request.get("private") or request.get("visibility") == "private")
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
        if hashlib.sha256(body).hexdigest() != oid:
            raise RefusalError(400, "The object is not complete")
        self.hub.contents[oid] = body
        self.hub.lfs_objects.add(oid)
        self._reply({})

    def make_commit(self, body: bytes, repo: str, revision: str) -> None:
        """A commit to a branch, or, with `create_pr`, to a new pull request."""
        operations = [json.loads(line) for line in body.splitlines() if line]
        branch, answer = revision, {}
        if "create_pr=1" in urlsplit(self.path).query:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.hub.repository(repo).branches)
            branch = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.server.address}/{repo}/discussions/{number}"}
        commit = self.hub.commit(repo, revision, operations, branch)
        address = f"{self.server.address}/{repo}/commit/{commit.sha}"
        self._reply({"success": True, "commitOid": commit.sha, "commitUrl": address, "hookOutput": ""} | answer)

    def make_branch(self, body: bytes, repo: str, revision: str) -> None:
        start = json.loads(body or b"{}").get("startingPoint")
        self._point(self.hub.repository(repo).branches, revision, self.hub.commit_at(repo, start))

    def make_tag(self, body: bytes, repo: str, revision: str) -> None:
        tag = json.loads(body)["tag"]
        self._point(self.hub.repository(repo).tags, tag, self.hub.commit_at(repo, revision))

    def _point(self, names: dict[str, str], name: str, commit: Commit) -> None:
        if name in names:
            raise RefusalError(409, f"Reference {name} exists already")
        names[name] = commit.sha
        self._reply({})

    def list_refs(self, body: bytes, repo: str) -> None:
        repository = self.hub.repository(repo)
        refs = {
            kind: [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": sha} for name, sha in names.items()]
            for kind, where, names in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags))
        }
        self._reply(refs | {"converts": []})

    def model_info(self, body: bytes, repo: str, revision: str | None) -> None:
        commit = self.hub.commit_at(repo, revision)
        siblings = [
            {"rfilename": path, "blobId": oid} | self._size_of(oid, "sha256") for path, oid in commit.files.items()
        ]
        names = {"id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings}
        names["private"] = self.hub.repository(repo).private
        self._reply(names | {"gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0})

    def list_tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.commit_at(repo, revision).files
        self._reply(
            [{"type": "file", "path": path, "oid": oid} | self._size_of(oid, "oid") for path, oid in files.items()]
        )

    def _size_of(self, oid: str, name: str) -> dict[str, Any]:
        """The size of a file, and for LFS its hash under `name`."""
        size = len(self.hub.contents[oid])
        lfs = {"lfs": {name: oid, "size": size, "pointerSize": 130}} if oid in self.hub.lfs_objects else {}
        return {"size": size} | lfs

    def download(self, body: bytes, repo: str, revision: str, path: str) -> None:
        commit = self.hub.commit_at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            headers["X-Error-Code"] = "EntryNotFound"
            self._reply({"error": "Entry not found"}, status=404, headers=headers)
            return
        oid = commit.files[path]
        content, status = self.hub.contents[oid], 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
        headers["ETag"] = f'"{oid}"'
        self._reply(content, status=status, content_type="application/octet-stream", headers=headers)

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
        (r"PUT /loopback/failures", Endpoint.set_failures),
        (r"GET /loopback/requests", Endpoint.list_requests),
        (r"GET /api/whoami-v2", Endpoint.who_am_i),
        (r"POST /api/repos/create", Endpoint.create_repository),
        (r"POST /api/validate-yaml", Endpoint.validate_yaml),
        (rf"POST /api/models/{REPO}/preupload/{REVISION}", Endpoint.choose_upload),
        (rf"POST /{REPO}\.git/info/lfs/objects/batch", Endpoint.lfs_batch),
        (r"PUT /lfs/(?P<oid>[0-9a-f]+)", Endpoint.lfs_upload),
        (rf"POST /api/models/{REPO}/commit/{REVISION}", Endpoint.make_commit),
        (rf"POST /api/models/{REPO}/branch/{REVISION}", Endpoint.make_branch),
        (rf"POST /api/models/{REPO}/tag/{REVISION}", Endpoint.make_tag),
        (rf"GET /api/models/{REPO}/refs", Endpoint.list_refs),
        (rf"GET /api/models/{REPO}/tree/{REVISION}(?:/.*)?", Endpoint.list_tree),
        (rf"(?:GET|HEAD) /api/models/{REPO}(?:/revision/{REVISION})?", Endpoint.model_info),
        (rf"(?:GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Endpoint.download),
    )
]


if __name__ == "__main__":
    server = HubServer()
    print(server.address, flush=True)
    server.serve_forever()
