"""A small Hugging Face Hub on loopback: the HTTP API as huggingface_hub, transformers and datasets use it.

    with serve_hub() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(token="hf_owner")})
        hub.files("owner/name")  # {path: content} of the newest commit

By hand: `python tests/hub_server.py` prints the variables to set in another terminal.

The clients are the real ones: they read `HF_ENDPOINT` when they are imported, so they run in processes of their own.
Everything is kept in memory. Weights go the LFS way (batch, upload, verify, then a commit that names them), small text
files inside the commit, as on the real Hub where Xet is off; `environment` therefore sets `HF_HUB_DISABLE_XET`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import yaml


LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".gz")  # as in the .gitattributes of a new repository
DATASET_NAME = re.compile(r"^(?:[\w-]+/)?[\w.-]+$")


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n".encode()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()

    def listing(self, path: str) -> dict:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id, **lfs}


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # oid -> the whole tree
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return {**{oid: oid for oid in self.commits}, **self.tags, **self.branches}.get(revision)


class Refused(Exception):
    """An answer other than success, with the headers from which the client makes its error."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        self.status, self.body = status, {"error": message, **(body or {})}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class Hub(ThreadingHTTPServer):
    daemon_threads = True
    accepts_commits = True
    token_role = "write"  # "read", or "fineGrained"

    def __init__(self, tokens: dict[str, str], lfs_suffixes: tuple[str, ...]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = tokens  # token -> user
        self.lfs_suffixes = lfs_suffixes
        self.repositories: dict[tuple[str, str], Repository] = {}  # (type, id)
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "METHOD path", in order
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.cdn_url = f"http://localhost:{self.server_port}"  # another host: the client stops at the redirect to it

    def environment(self, token: str | None = None) -> dict[str, str]:
        """What a client process needs to use this Hub and no other."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return values if token is None else {**values, "HF_TOKEN": token}

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", private: bool = False) -> None:
        repository = self.repositories[repo_type, repo_id] = Repository(private)
        repository.commit("main", "initial", {path: self.as_file(path, data) for path, data in files.items()})

    def as_file(self, path: str, content: bytes) -> File:
        return File(content, is_lfs=path.endswith(self.lfs_suffixes))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        repository = self.repositories[repo_type, repo_id]
        return {path: file.content for path, file in repository.commits[repository.resolve(revision)].items()}


@contextmanager
def serve_hub(tokens: dict[str, str] | None = None, lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES):
    hub = Hub(tokens or {"hf_owner": "owner"}, lfs_suffixes)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


@contextmanager
def hub_in_this_process(tokens: dict[str, str], monkeypatch):
    """The same for clients in the test's own process, which have read `HF_ENDPOINT` long ago."""
    with serve_hub(tokens) as hub:
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield hub


REPO = r"/api/(?P<repo_type>model|dataset)s/(?P<repo_id>[\w.-]+/[\w.-]+)"
PAGE = r"/(?:(?P<prefix>datasets)/)?(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_card"),
    ("GET", REPO + r"(?:/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "tree"),
    ("POST", REPO + r"/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", REPO + r"/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", REPO + r"/tag/(?P<revision>[^/]+)", "create_tag"),
    ("GET", REPO + r"/refs", "refs"),
    ("POST", REPO + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", REPO + r"/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", PAGE + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    ("GET", PAGE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.requests.append(f"{self.command} {url.path}")
        self.body = self.read_body()
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for route_method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, url.path) if route_method == method else None
                if match:
                    return getattr(self, name)(**{k: v and unquote(v) for k, v in match.groupdict().items()})
            raise Refused(404, f"The stand-in knows no {method} {url.path}")
        except Refused as refusal:
            self.answer(refusal.body, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do

    def log_message(self, *args):
        """Silent: `Hub.requests` has it all."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: dict | list | bytes = b"", status: int = 200, headers: dict | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_range(self, content: bytes, headers: dict) -> None:
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1) + 1
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(content[start:stop], 206, headers)

    # ---- who may do what ----

    def user(self) -> str | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.server.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def writer(self, namespace: str) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != namespace:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {namespace!r}")

    def repository(self, repo_type: str, repo_id: str) -> Repository:
        repository, user = self.server.repositories.get((repo_type, repo_id)), self.user()
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def files(self, repo_type: str, repo_id: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self.repository(repo_type, repo_id)
        oid = repository.resolve(revision)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # ---- accounts and repositories ----

    def whoami(self):
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        token = {"displayName": "test", "role": self.server.token_role}
        self.answer({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self):
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.user()
        self.writer(namespace)
        repo_type, repo_id = asked.get("type") or "model", f"{namespace}/{asked['name']}"
        url = f"{self.server.url}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
        if (repo_type, repo_id) in self.server.repositories:
            raise Refused(409, "You already created this model repo", body={"url": url})
        self.server.add(repo_id, {".gitattributes": b""}, repo_type, private=asked.get("visibility") == "private")
        self.answer({"url": url, "name": repo_id, "id": "0"})

    def validate_card(self):
        card = json.loads(self.body)
        errors = card_errors(card["content"]) if card["repoType"] == "model" else []
        self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def info(self, repo_type, repo_id, revision):
        oid, files = self.files(repo_type, repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.repository(repo_type, repo_id).private
        self.answer({"_id": "0", "id": repo_id, "sha": oid, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo_type, repo_id, revision, folder):
        oid, files = self.files(repo_type, repo_id, revision)
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {path[: path.index("/", len(prefix))] for path in inside if "/" in path[len(prefix) :]}
        rows = [{"type": "directory", "path": path, "oid": oid, "size": 0} for path in sorted(folders)]
        rows += [file.listing(path) for path, file in inside.items() if recursive or "/" not in path[len(prefix) :]]
        self.answer(rows)

    def paths_info(self, repo_type, repo_id, revision):
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        oid, files = self.files(repo_type, repo_id, revision)
        rows = [files[path].listing(path) for path in paths if path in files]
        folders = [p for p in paths if any(path.startswith(f"{p}/") for path in files)]
        self.answer(rows + [{"type": "directory", "path": path, "oid": oid, "size": 0} for path in folders])

    def create_branch(self, repo_type, repo_id, branch):
        self.writer(repo_id.split("/")[0])
        branches = self.repository(repo_type, repo_id).branches
        if branch in branches:
            raise Refused(409, f"Reference already exists: {branch}")
        branches[branch] = branches["main"]
        self.answer({})

    def create_tag(self, repo_type, repo_id, revision):
        self.writer(repo_id.split("/")[0])
        tags, tag = self.repository(repo_type, repo_id).tags, json.loads(self.body)["tag"]
        if tag in tags:
            raise Refused(409, f"Reference already exists: {tag}")
        tags[tag] = self.files(repo_type, repo_id, revision)[0]
        self.answer({})

    def refs(self, repo_type, repo_id):
        repository = self.repository(repo_type, repo_id)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        refs = {
            kind: [{"name": n, "ref": f"refs/{place}/{n}", "targetCommit": oid} for n, oid in names.items()]
            for kind, (place, names) in kinds.items()
        }
        self.answer({**refs, "converts": []})

    # ---- uploads ----

    def preupload(self, repo_type, repo_id, revision):
        self.writer(repo_id.split("/")[0])
        _, files = self.files(repo_type, repo_id, revision)
        rows = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if path.endswith(self.server.lfs_suffixes) else "regular"
            present = files.get(path)
            oid = {"oid": present.sha256 if present.is_lfs else present.blob_id} if present else {}
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": rows})

    def lfs_batch(self, prefix, repo_id):
        self.writer(repo_id.split("/")[0])
        objects = json.loads(self.body)["objects"]
        for row in objects:
            if row["oid"] not in self.server.lfs_objects:
                url = f"{self.server.url}/lfs/{row['oid']}"
                row["actions"] = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):  # the address is signed on the real Hub: no token comes with it
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "content and oid do not match")
        self.server.lfs_objects[oid] = self.body
        self.answer()

    def lfs_verify(self, oid):
        if len(self.server.lfs_objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "object not found")
        self.answer({})

    def commit(self, repo_type, repo_id, revision):
        self.writer(repo_id.split("/")[0])
        repository = self.repository(repo_type, repo_id)
        if not self.server.accepts_commits:
            raise Refused(403, "You have exceeded your storage quota")
        files = dict(self.files(repo_type, repo_id, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.lfs_objects:
                    raise Refused(400, f"{value['path']} was not uploaded before the commit")
                files[value["path"]] = File(self.server.lfs_objects[value["oid"]], is_lfs=True)
            else:  # deletedFile, deletedFolder
                prefix = value["path"].rstrip("/") + "/"
                files = {p: f for p, f in files.items() if p != value["path"] and not p.startswith(prefix)}
        oid = repository.commit(revision, message, files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}"})

    # ---- downloads ----

    def resolve(self, prefix, repo_id, revision, path):
        oid, files = self.files("dataset" if prefix else "model", repo_id, revision)
        if path not in files:
            refusal = Refused(404, "Entry not found", "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = oid
            raise refusal
        file = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.blob_id}"'}
        if not file.is_lfs:
            return self.answer_range(file.content, headers)
        self.server.lfs_objects[file.sha256] = file.content
        headers |= {"X-Linked-Size": len(file.content), "X-Linked-ETag": f'"{file.sha256}"'}
        self.answer(status=302, headers={**headers, "Location": f"{self.server.cdn_url}/cdn/{file.sha256}"})

    def cdn(self, oid):
        self.answer_range(self.server.lfs_objects[oid], {"ETag": f'"{oid}"'})


def card_errors(content: str) -> list[str]:
    """The rules of the Hub's card validation that a model card like ours can break."""
    parts = content.split("---\n")
    try:
        metadata = yaml.safe_load(parts[1]) if content.startswith("---\n") and len(parts) > 2 else {}
    except yaml.YAMLError as error:
        return [str(error)]
    errors = [f'"{key}" must be a string' for key in ("license", "library_name", "pipeline_tag") if
              key in metadata and not isinstance(metadata[key], str)]  # fmt: skip
    for name in metadata.get("datasets") or []:
        if not DATASET_NAME.match(name):
            errors.append(f'"datasets" with value {name!r} fails to match the required pattern')
    for model in metadata.get("model-index") or []:
        if not isinstance(model.get("name"), str) or not model.get("results"):
            errors.append('"model-index" needs "name" and "results"')
        for result in model.get("results") or []:
            if not DATASET_NAME.match(str(result["dataset"].get("type", ""))) or not result["dataset"].get("name"):
                errors.append(f'"dataset" {result["dataset"]} needs "type" (a dataset id) and "name"')
            if not result["task"].get("type") or not all({"type", "value"} <= set(m) for m in result["metrics"]):
                errors.append('"task" needs "type", "metrics" need "type" and "value"')
    return errors


if __name__ == "__main__":
    with serve_hub({"hf_stand_in": "me"}) as hub:
        variables = hub.environment(token="hf_stand_in").items()
        print("export " + " ".join(f"{name}={value}" for name, value in variables), flush=True)
        threading.Event().wait()
