"""A small Hub over HTTP: the requests of `huggingface_hub` and transformers for pushing and loading models.

Contents lie in a folder, each under its own hash; a commit is a list of them, and a branch the name of a commit, given
in one step. It answers as the real one does, with the same statuses, error codes and headers: a private repository is
not there for whoever may not read it, and files for Git LFS are sent to, and fetched from, an address of their own. It
has no Xet storage, which clients leave out by `HF_HUB_DISABLE_XET`.
"""

import base64
import hashlib
import json
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


# What the Hub's own .gitattributes names, of the files that occur here.
LFS_FILES = (".safetensors", ".bin", ".pt", ".pth")
LFS_MEDIA = "application/vnd.git-lfs+json"


class Entry(NamedTuple):
    """A file of a commit: its git hash, and for Git LFS the hash of its content."""

    size: int
    oid: str
    lfs: str | None


class Commit(NamedTuple):
    """A revision of a repository."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, Entry]


@dataclass
class Repository:
    """A repository. Its branches are names of commits."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """A commit by its branch or hash."""
        return self.commits.get(self.branches.get(revision, revision))


class Refusal(Exception):  # noqa: N818  (an answer of the server, not a mistake of it)
    """An error to send as the answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **fields: Any):
        super().__init__(message)
        self.status, self.message, self.code, self.fields = status, message, code, fields


class HubServer:
    """
    Serves on a free port of this machine until the block is left.

    Attributes:
        users: name of the user by token. A user may read and write repositories under the own name.
        drop_upload: how many uploads of LFS files lose their connection half way. After one that did, the address it
            was sent to is no longer good, as of an upload that took too long.
        drop_commit: "before" loses the connection while a commit is received, "after" when it is done and before the
            client hears of it.
        failures: requests to which it has no answer.
    """

    def __init__(self, folder: Path, users: dict[str, str]):
        self.folder, self.users = folder, users
        self.repositories: dict[str, Repository] = {}
        self.lock = threading.Lock()
        self.drop_upload, self.drop_commit = 0, ""
        self.expired: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.failures: list[str] = []

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # To clients another host, as that of large files is on the Hub: a token must not be sent there.
        self.storage = f"http://localhost:{self.server.server_port}/storage"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def content(self, entry: Entry) -> bytes:
        """The bytes of a file."""
        return (self.folder / (entry.lfs or entry.oid)).read_bytes()

    def store(self, name: str, data: bytes) -> None:
        """Stores a content under its hash."""
        (self.folder / name).write_bytes(data)

    def history(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """A branch's commits, the newest first."""
        repository = self.repositories[repo_id]
        commit: Commit | None = repository.find(branch)
        found = []
        while commit:
            found.append(commit)
            commit = repository.commits.get(commit.parent or "")
        return found

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision by their paths."""
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None
        return {path: self.content(entry) for path, entry in commit.files.items()}


def git_hash(data: bytes) -> str:
    """The git hash of a content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """The Git LFS pointer that git stores instead of a file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Logs nothing."""

    def do_GET(self) -> None:
        """Answers with the first matching route."""
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        if path.startswith("/storage/") and "Authorization" in self.headers:
            self.hub.failures.append(f"{self.command} {path} was sent a token")
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                self.hub.requests[answer.__name__] += 1
                try:
                    answer(self, **{name: unquote(value or "") for name, value in match.groupdict().items()})
                except Refusal as refusal:
                    self.refuse(refusal)
                except Exception:
                    self.hub.failures.append(f"{self.command} {path}\n{traceback.format_exc()}")
                    self.refuse(Refusal(400, "The server of the tests is wrong"))
                return
        self.hub.failures.append(f"{self.command} {path}")
        self.refuse(Refusal(404, "Sorry, we can't find the page you are looking for."))

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  (as http.server calls them)

    def body(self) -> bytes:
        """The body of the request, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def drop(self) -> None:
        """Drops the connection after half of the body."""
        self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
        self.close_connection = True

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        """An answer with a body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        """An answer of the API."""
        self.send(json.dumps(value).encode(), status, **{"Content_Type": "application/json", **headers})

    def refuse(self, refusal: Refusal) -> None:
        """An error in the Hub's form. The body of the request may be unread, so the connection ends."""
        headers = {"X_Error_Message": refusal.message, "Connection": "close"}
        if refusal.code:
            headers["X_Error_Code"] = refusal.code
        self.close_connection = True
        self.send_json({"error": refusal.message, **refusal.fields}, refusal.status, **headers)

    def user(self) -> str | None:
        """The user of the request's token."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def repository(self, repo_id: str, write: bool = False) -> Repository:
        """A repository that the client may read, or write."""
        user, owner = self.user(), repo_id.split("/")[0]
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and user != owner):
            # Users who may not read it get 404, and requests without a token 401.
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        if write and user != owner:
            raise Refusal(403 if user else 401, "Forbidden: pass `create_pr=1` as a query parameter to create a PR")
        return found

    def revision(self, repo_id: str, revision: str) -> Commit:
        """A revision of a repository that the client may read."""
        commit = self.repository(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The account, and repositories

    def harnesses(self) -> None:
        """GET /api/agent-harnesses, which every client asks for to describe itself."""
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def whoami(self) -> None:
        """GET /api/whoami-v2"""
        if not (name := self.user()):
            raise Refusal(401, "Invalid username or password.")
        self.send_json({"type": "user", "name": name, "orgs": []})

    def create_repository(self) -> None:
        """POST /api/repos/create: with a first commit, as the Hub makes it."""
        asked, user = json.loads(self.body()), self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if not repo_id.startswith(f"{user}/"):
            owner = repo_id.split("/")[0]
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        with self.hub.lock:
            if repo_id in self.hub.repositories:
                raise Refusal(409, "You already created this model repo", url=url)
            repository = Repository(private=asked.get("visibility") == "private")
            attributes = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_FILES).encode()
            self.hub.store(git_hash(attributes), attributes)
            first = Entry(len(attributes), git_hash(attributes), None)
            add_commit(repository, "main", "initial commit", {".gitattributes": first})
            self.hub.repositories[repo_id] = repository
        self.send_json({"url": url, "name": repo_id})

    def create_branch(self, repo_id: str, branch: str) -> None:
        """POST /api/models/ID/branch/NAME"""
        repository, asked = self.repository(repo_id, write=True), json.loads(self.body())
        with self.hub.lock:
            if branch in repository.branches:
                raise Refusal(409, "Reference already exists")
            start = self.revision(repo_id, asked.get("startingPoint") or "main")
            repository.branches[branch] = start.sha
        self.send_json({"success": True}, 201)

    def model_info(self, repo_id: str, revision: str = "") -> None:
        """GET /api/models/ID[/revision/REVISION], with the metadata of the model's card."""
        repository, commit = self.repository(repo_id), self.revision(repo_id, revision or "main")
        card = ModelCard("---\n{}\n---\n")
        if "README.md" in commit.files:
            card = ModelCard(self.hub.content(commit.files["README.md"]).decode())
        self.send_json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.sha,
                "private": repository.private,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                "tags": card.data.tags or [],
                "pipeline_tag": card.data.pipeline_tag,
                "library_name": card.data.library_name,
            }
        )

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        """GET /api/models/ID/tree/REVISION[/FOLDER]"""
        files = self.revision(repo_id, revision).files
        inside = {path: entry for path, entry in files.items() if not folder or path.startswith(f"{folder}/")}
        if not inside:
            raise Refusal(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        depth = folder.count("/") + 1 if folder else 0
        listed = [describe(path, entry) for path, entry in inside.items() if recursive or path.count("/") == depth]
        self.send_json(listed)

    # Pushing

    def validate_yaml(self) -> None:
        """POST /api/validate-yaml: the card's metadata, by the parser of `huggingface_hub`."""
        try:
            ModelCard(json.loads(self.body())["content"])
        except (ValueError, TypeError, KeyError) as error:
            self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        else:
            self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> None:
        """POST /api/models/ID/preupload/REVISION: which files use LFS, and which exist."""
        self.repository(repo_id, write=True)
        files = self.revision(repo_id, revision).files
        answers = []
        for asked in json.loads(self.body())["files"]:
            path, there = asked["path"], files.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_FILES) else "regular"
            known = {"oid": there.lfs or there.oid} if there else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self.send_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        """POST /ID.git/info/lfs/objects/batch: where to send the LFS files that do not exist yet."""
        self.repository(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body())["objects"]:
            actions = {}
            if not (self.hub.folder / asked["oid"]).exists():
                upload = f"{self.hub.storage}/{asked['oid']}/{len(self.hub.expired)}"
                verify = f"{self.hub.url}/{repo_id}.git/info/lfs/verify"
                actions = {"actions": {"upload": {"href": upload}, "verify": {"href": verify}}}
            objects.append({**asked, **actions})
        self.send_json({"transfer": "basic", "objects": objects}, Content_Type=LFS_MEDIA)

    def upload(self, oid: str, place: str) -> None:
        """PUT /storage/HASH/PLACE: the content must have the announced hash."""
        if self.path in self.hub.expired:
            raise Refusal(403, "Request has expired")
        if self.hub.drop_upload:
            self.hub.drop_upload -= 1
            self.hub.expired.add(self.path)
            self.drop()
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "The content is not what its hash says")
        self.hub.store(oid, data)
        self.send(b"")

    def verify(self, repo_id: str) -> None:
        """POST /ID.git/info/lfs/verify"""
        asked = json.loads(self.body())
        if not (self.hub.folder / asked["oid"]).exists():
            raise Refusal(404, "The file has not been uploaded")
        self.send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        """POST /api/models/ID/commit/BRANCH: lines of JSON, a header and one for each file."""
        repository = self.repository(repo_id, write=True)
        if self.hub.drop_commit == "before":
            self.hub.drop_commit = ""
            self.drop()
            return
        header, *operations = [json.loads(line) for line in self.body().splitlines()]
        with self.hub.lock:
            if revision not in repository.branches:
                raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            files = dict(self.revision(repo_id, revision).files)
            for operation in operations:
                self.apply(files, operation["key"], operation["value"])
            made = add_commit(repository, revision, header["value"]["summary"], files)
        if self.hub.drop_commit == "after":
            self.hub.drop_commit = ""
            self.close_connection = True
            return
        url = f"{self.hub.url}/{repo_id}/commit/{made.sha}"
        self.send_json({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, files: dict[str, Entry], kind: str, value: dict[str, Any]) -> None:
        """One line of a commit."""
        path = value["path"]
        if kind == "file":
            data = base64.b64decode(value["content"])
            self.hub.store(git_hash(data), data)
            files[path] = Entry(len(data), git_hash(data), None)
        elif kind == "lfsFile":
            if not (self.hub.folder / value["oid"]).exists():
                raise Refusal(400, f"{path} has not been uploaded")
            size = (self.hub.folder / value["oid"]).stat().st_size
            files[path] = Entry(size, git_hash(pointer(value["oid"], size)), value["oid"])
        elif kind == "deletedFile":
            del files[path]
        else:
            raise Refusal(400, f"{kind} is unknown")

    # Loading

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """GET or HEAD /ID/resolve/REVISION/PATH: the file, or a redirect to its content."""
        commit = self.revision(repo_id, revision)
        if path not in commit.files:
            self.close_connection = True
            message = {"X_Error_Code": "EntryNotFound", "X_Error_Message": "Entry not found"}
            self.send(b"Entry not found", 404, X_Repo_Commit=commit.sha, Connection="close", **message)
            return
        entry, headers = commit.files[path], {"X_Repo_Commit": commit.sha}
        if entry.lfs is None:
            self.send(self.hub.content(entry), ETag=f'"{entry.oid}"', **headers)
            return
        linked = {"X_Linked_ETag": f'"{entry.lfs}"', "X_Linked_Size": str(entry.size)}
        self.send(b"", 302, Location=f"{self.hub.storage}/{entry.lfs}", **linked, **headers)

    def download(self, oid: str) -> None:
        """GET /storage/HASH, which needs no token."""
        if not (self.hub.folder / oid).exists():
            raise Refusal(404, "Not found")
        self.send((self.hub.folder / oid).read_bytes(), ETag=f'"{oid}"')


def add_commit(repository: Repository, branch: str, title: str, files: dict[str, Entry]) -> Commit:
    """Adds a revision. The branch is moved last."""
    parent = repository.branches.get(branch)
    described = json.dumps([parent, title, sorted(files.items())])
    commit = Commit(hashlib.sha1(described.encode()).hexdigest(), parent, title, files)
    repository.commits[commit.sha] = commit
    repository.branches[branch] = commit.sha
    return commit


def describe(path: str, entry: Entry) -> dict[str, Any]:
    """A file as the API lists it."""
    listed: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
    if entry.lfs:
        listed["lfs"] = {"oid": entry.lfs, "size": entry.size, "pointerSize": len(pointer(entry.lfs, entry.size))}
    return listed


ID = r"(?P<repo_id>[^/]+/[^/]+?)"
API = rf"/api/models/{ID}"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/agent-harnesses", Handler.harnesses),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{API}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    ("POST", rf"{API}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"{API}/commit/{REVISION}", Handler.commit),
    ("GET", rf"{API}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("GET", rf"{API}/revision/{REVISION}", Handler.model_info),
    ("GET", API, Handler.model_info),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", rf"/{ID}\.git/info/lfs/verify", Handler.verify),
    ("GET", rf"/{ID}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})/(?P<place>[0-9]+)", Handler.upload),
    ("GET", "/storage/(?P<oid>[0-9a-f]{64})", Handler.download),
]
