"""A small Hub on 127.0.0.1, kept in memory, for the unmodified clients: huggingface_hub, transformers, peft, datasets,
`hf`.

    with Hub() as hub:                       # or: python tests/support/hub_server.py --port 8000
        environment = hub.environment()      # HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET, for a process that is to use it
        hub.faults.append(Fault(r"POST .*/commit/", 503, times=2))

Files of the kinds that the Hub keeps in LFS go through LFS (batch, PUT, verify), the rest into the commit's body, as
there.
"""

import argparse
import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time
from datetime import UTC, datetime
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.npy", "*.parquet", "*.zst", "*.gz", "*.gguf", "*.msgpack", "*.png")
LFS_ABOVE = 10 * 2**20  # bytes
PAGE = 1000  # entries of a tree in one answer
TOKENS = {  # token -> (user, role, organisations that it may write to)
    "hf_owner": ("owner", "write", ("org",)),
    "hf_other": ("other", "write", ()),
    "hf_reader": ("owner", "read", ()),
}
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS).encode()


@dataclasses.dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path` matches.

    `what`: a status to answer with; `drop`, no answer and nothing done; `cut`, the same after half of the body was
    read; `lose`, everything done and then no answer; `garble`, an answer with one wrong byte.
    """

    match: str
    what: int | str
    times: int = 10**9
    headers: dict = dataclasses.field(default_factory=dict)


class Error(Exception):
    def __init__(self, status: int, message: str, code: str = "", **answer):
        super().__init__(message)
        self.status, self.code, self.answer = status, code, answer


class Repo:
    """Commits, branches and tags of one repository. A commit's files: {path: (sha256, size, in LFS)}."""

    def __init__(self, private: bool):
        self.private, self.commits, self.branches, self.tags = private, {}, {}, {}
        self.uploaded: set[str] = set()  # LFS objects, as the Hub knows them: by repository
        self.branches["main"] = None

    def resolve(self, revision: str) -> str:
        found = (
            self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)
        )
        if found is None:
            raise Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def last_commit(self, oid: str, path: str) -> dict:
        """The commit, at or before this one, that made a file what it is."""
        commit = self.commits[oid]
        while (parent := self.commits.get(commit["parent"])) and parent["files"].get(path) == commit["files"][path]:
            oid, commit = commit["parent"], parent
        return {"id": oid, "title": commit["title"], "date": commit["date"]}

    def commit(self, branch: str, files: dict, title: str, message: str = "") -> str:
        parent = self.branches[branch]
        content = json.dumps([parent, sorted(files.items()), title, time.time_ns()])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = {"parent": parent, "files": files, "title": title, "message": message, "date": _now()}
        self.branches[branch] = oid
        return oid


class Hub:
    """The server; `with` starts and stops it. `repos` and `requests` (`METHOD /path`) are there to look at."""

    def __init__(self, port: int = 0, rate: float | None = None):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.jobs: list[dict] = []  # specifications of `hf jobs run`; nothing runs them
        self.rate = rate  # bytes a second of uploads
        self.lock, self.server = threading.RLock(), None
        self.reserved = socket.socket()  # never listens, and keeps the port from other processes during an outage
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", port))
        self.port = self.reserved.getsockname()[1]

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *_):
        self.down()

    def up(self) -> None:
        """Listen; always on the same port, so that an outage can end."""
        self.server = _Server(("127.0.0.1", self.port), _Handler)
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """End all connections and refuse new ones."""
        if self.server:
            self.server.shutdown()
            self.server.socket.shutdown(socket.SHUT_RDWR)  # processes that were forked meanwhile hold it open
            self.server.server_close()
            for one in list(self.server.sockets):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self.server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, token: str | None = "hf_owner") -> dict:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            **({"HF_TOKEN": token} if token else {}),
        }

    def store(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        self.objects[key] = data
        return key

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """{path: bytes} of a revision."""
        repo = self.repos[kind, name]
        return {path: self.objects[key] for path, (key, _, _) in repo.commits[repo.resolve(revision)]["files"].items()}


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sockets: set = set()

    def process_request(self, request, client_address):
        self.sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # a client that was killed


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


KIND = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
FILE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
ROUTES = [  # (method, path, handler, whether it writes)
    ("GET", r"/api/whoami-v2", "whoami", False),
    ("POST", r"/api/repos/create", "create", True),
    ("POST", r"/api/validate-yaml", "validate_yaml", False),
    ("GET", KIND + r"(?:/revision/(?P<rev>[^/]+))?", "info", False),
    ("GET", KIND + r"/refs", "refs", False),
    ("GET", KIND + r"/commits/(?P<rev>[^/]+)", "commits", False),
    ("GET", KIND + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", "tree", False),
    ("POST", KIND + r"/paths-info/(?P<rev>[^/]+)", "paths_info", False),
    ("POST", KIND + r"/branch/(?P<rev>[^/]+)", "branch", True),
    ("POST", KIND + r"/tag/(?P<rev>[^/]+)", "tag", True),
    ("POST", KIND + r"/preupload/(?P<rev>[^/]+)", "preupload", True),
    ("POST", KIND + r"/commit/(?P<rev>[^/]+)", "commit", True),
    ("POST", FILE + r"\.git/info/lfs/objects/batch", "lfs_batch", True),
    ("POST", FILE + r"\.git/info/lfs/verify", "lfs_verify", True),
    ("PUT", r"/lfs/(?P<key>[0-9a-f]{64})", "lfs_put", False),
    ("POST", r"/api/jobs/(?P<owner>[^/]+)", "job", True),
    ("GET", FILE + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "file", False),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # an answer goes out in two writes, and the second would wait 40 ms for the client's acknowledgement
    )

    def log_message(self, *_):
        pass

    def do(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        line = f"{self.command} {unquote(parts.path)}"
        with hub.lock:
            hub.requests.append(line)
            fault = next((f for f in hub.faults if f.times > 0 and re.search(f.match, line)), None)
            if fault:
                fault.times -= 1
        what = fault.what if fault else None
        length = int(self.headers.get("Content-Length") or 0)
        if what in ("drop", "cut"):
            if what == "cut":
                self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self._read(length, hub.rate)
        try:
            if isinstance(what, int):
                raise Error(what, "the test asked for this")
            status, answer, headers = self._route(parts.path, parse_qs(parts.query))
        except Error as error:
            status, answer = error.status, {"error": str(error), **error.answer}
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            headers |= fault.headers if fault else {}
        if what == "lose":
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if what == "garble":
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response(status)
        headers.setdefault(
            "Content-Type", "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        )
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def _read(self, length: int, rate: float | None) -> bytes:
        if not rate:
            return self.rfile.read(length)
        parts = []
        while length > 0:
            parts.append(self.rfile.read(min(length, 2**16)))
            length -= len(parts[-1])
            time.sleep(len(parts[-1]) / rate)
        return b"".join(parts)

    def _route(self, path: str, query: dict):
        for method, pattern, name, writes in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                values = {key: unquote(value) if value else value for key, value in match.groupdict().items()}
                user = self._user()
                with self.server.hub.lock:
                    if "name" in values:
                        values["repo"] = self._repo(values, user, writes)
                    elif writes and (user is None or user[1] != "write"):
                        raise Error(401 if user is None else 403, "a token with write access is needed")
                    answer = getattr(self, name)(user=user, query=query, **values)
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Error(404, f"no such address: {path}")

    def _user(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Error(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def _repo(self, values: dict, user, writes: bool) -> Repo:
        kind, name = values.pop("kind", None) or "models", values["name"]
        repo = self.server.hub.repos.get((kind, name))
        mine = user and name.split("/")[0] in (user[0], *user[2])
        if repo is None or (repo.private and not mine):
            raise Error(404 if user else 401, f"Repository not found: {name}", "RepoNotFound")
        if writes and not (mine and user[1] == "write"):
            raise Error(403, f"You don't have the rights to write to {name}")
        values["kind"] = kind
        return repo

    # ---- accounts and repositories ----

    def whoami(self, user, query):
        if user is None:
            raise Error(401, "Invalid username or password.")
        name, role, organisations = user
        orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in organisations]
        return {
            "type": "user",
            "name": name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}},
        }

    def job(self, user, query, owner):
        """Write down what a job is to run, as Jobs does before it runs it."""
        self.server.hub.jobs.append(json.loads(self.body))
        job = f"job-{len(self.server.hub.jobs)}"
        return {"id": job, "owner": {"id": "1", "name": owner, "type": "user"}, "status": {"stage": "SCHEDULING"}}

    def create(self, user, query):
        wanted = json.loads(self.body)
        owner, kind = wanted.get("organization") or user[0], wanted.get("type", "model") + "s"
        if owner not in (user[0], *user[2]):
            raise Error(
                403,
                f'You don\'t have the rights to create a {wanted.get("type", "model")} under the namespace "{owner}"',
            )
        name, hub = f"{owner}/{wanted['name']}", self.server.hub
        url = f"{hub.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in hub.repos:
            raise Error(409, "You already created this repo", url=url)
        repo = hub.repos[kind, name] = Repo(bool(wanted.get("private") or wanted.get("visibility") == "private"))
        repo.commit("main", {".gitattributes": (hub.store(GITATTRIBUTES), len(GITATTRIBUTES), False)}, "initial commit")
        return {"url": url, "name": name, "id": name}

    def validate_yaml(self, user, query):
        return {"errors": [], "warnings": []}

    def info(self, user, query, repo, kind, name, rev):
        oid = repo.resolve(rev or "main")
        files = repo.commits[oid]["files"]
        siblings = [
            {"rfilename": path, **({} if "blobs" not in query else _entry(self.server.hub, path, files[path]))}
            for path in sorted(files)
        ]
        return {
            "_id": oid,
            "id": name,
            "sha": oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "siblings": siblings,
        }

    def refs(self, user, query, repo, kind, name):
        def listed(refs, kind):
            return [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": oid} for key, oid in refs.items()]

        return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}

    def commits(self, user, query, repo, kind, name, rev):
        found, oid = [], repo.resolve(rev)
        while oid:
            commit = repo.commits[oid]
            found.append(
                {
                    "id": oid,
                    "title": commit["title"],
                    "message": commit["message"],
                    "date": commit["date"],
                    "authors": [{"user": "owner"}],
                }
            )
            oid = commit["parent"]
        return found

    def branch(self, user, query, repo, kind, name, rev):
        if rev in repo.branches:
            raise Error(409, f"Reference already exists: {rev}")
        if rev.startswith("refs/"):
            raise Error(400, f"Invalid branch name: {rev}")
        repo.branches[rev] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        return {}

    def tag(self, user, query, repo, kind, name, rev):
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Error(409, f"Tag reference exists already: {tag}")
        repo.tags[tag] = repo.resolve(rev)
        return {}

    # ---- reading ----

    def tree(self, user, query, repo, kind, name, rev, path):
        files, prefix = repo.commits[repo.resolve(rev)]["files"], f"{path}/" if path else ""
        inside = {there: entry for there, entry in files.items() if there.startswith(prefix)}
        if prefix and not inside:
            raise Error(404, f"{path} does not exist on {rev}", "EntryNotFound")
        folders = {
            prefix + "/".join(parts[:n])
            for there in inside
            for parts in [there[len(prefix) :].split("/")]
            for n in range(1, len(parts))
        }
        entries = [
            {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
            for folder in folders
        ]
        entries += [_entry(self.server.hub, there, entry) for there, entry in inside.items()]
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        entries.sort(key=lambda entry: entry["path"])
        begin = int(query.get("cursor", ["0"])[0])
        headers = {}
        if len(entries) > begin + PAGE:
            address = urlsplit(self.path).path
            headers["Link"] = (
                f"<{self.server.hub.url}{address}?recursive={query.get('recursive', ['false'])[0]}&cursor={begin + PAGE}>;"
                ' rel="next"'
            )
        return 200, entries[begin : begin + PAGE], headers

    def paths_info(self, user, query, repo, kind, name, rev):
        if self.headers.get("Content-Type", "").startswith("application/json"):
            asked = json.loads(self.body)
            wanted, expand = asked["paths"], asked.get("expand", False)
        else:
            asked = parse_qs(self.body.decode())
            wanted, expand = asked.get("paths", []), asked.get("expand", ["false"])[0].lower() in ("true", "1")
        oid, found = repo.resolve(rev), []
        files = repo.commits[oid]["files"]
        for path in wanted:
            if path in files:
                found.append(
                    _entry(self.server.hub, path, files[path])
                    | ({"lastCommit": repo.last_commit(oid, path)} if expand else {})
                )
            elif any(there.startswith(f"{path.rstrip('/')}/") for there in files):
                found.append(
                    {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
                )
        return found

    def file(self, user, query, repo, kind, name, rev, path):
        oid = repo.resolve(rev)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in repo.commits[oid]["files"]:
            raise Error(404, "Entry not found", "EntryNotFound")
        key, size, lfs = repo.commits[oid]["files"][path]
        data = self.server.hub.objects[key]
        etag = key if lfs else _blob_id(data)
        headers |= {"ETag": f'"{etag}"', **({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)} if lfs else {})}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and size:
            begin, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            if begin >= size:
                return 416, b"", {"Content-Range": f"bytes */{size}"}
            return 206, data[begin : end + 1], {**headers, "Content-Range": f"bytes {begin}-{end}/{size}"}
        return 200, data, headers

    # ---- writing ----

    def preupload(self, user, query, repo, kind, name, rev):
        there = repo.commits[repo.resolve(rev)]["files"]

        def answer(file):
            path, known = file["path"], there.get(file["path"])
            lfs = any(fnmatch(path.split("/")[-1], pattern) for pattern in LFS) or file["size"] > LFS_ABOVE
            oid = (known[0] if known[2] else _blob_id(self.server.hub.objects[known[0]])) if known else None
            return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

        return {"files": [answer(file) for file in json.loads(self.body)["files"]]}

    def lfs_batch(self, user, query, repo, kind, name):
        hub, wanted, found = self.server.hub, json.loads(self.body), []
        prefix = "" if kind == "models" else f"{kind}/"
        for entry in wanted["objects"]:
            actions = {
                "upload": {"href": f"{hub.url}/lfs/{entry['oid']}"},
                "verify": {"href": f"{hub.url}/{prefix}{name}.git/info/lfs/verify"},
            }
            found.append(
                {
                    "oid": entry["oid"],
                    "size": entry["size"],
                    **({} if entry["oid"] in repo.uploaded else {"actions": actions}),
                }
            )
        return {"transfer": "basic", "objects": found}

    def lfs_put(self, user, query, key):
        if hashlib.sha256(self.body).hexdigest() != key:
            raise Error(400, "content does not match its sha256")
        self.server.hub.store(self.body)
        return {}

    def lfs_verify(self, user, query, repo, kind, name):
        oid = json.loads(self.body)["oid"]
        if oid not in self.server.hub.objects:
            raise Error(404, "no such object")
        repo.uploaded.add(oid)
        return {}

    def commit(self, user, query, repo, kind, name, rev):
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if rev not in repo.branches:
            raise Error(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        head, hub = repo.branches[rev], self.server.hub
        if header.get("parentCommit") and not head.startswith(header["parentCommit"]):
            raise Error(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[head]["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                data = (
                    base64.b64decode(value["content"])
                    if value.get("encoding") == "base64"
                    else value["content"].encode()
                )
                files[value["path"]] = (hub.store(data), len(data), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.uploaded:
                    raise Error(422, f"no such LFS object: {value['oid']}")
                files[value["path"]] = (value["oid"], len(hub.objects[value["oid"]]), True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif line["key"] == "deletedFolder":
                files = {
                    path: entry for path, entry in files.items() if not path.startswith(value["path"].rstrip("/") + "/")
                }
        oid = repo.commit(rev, files, header["summary"], header.get("description", ""))
        return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}


def _entry(hub: Hub, path: str, file: tuple[str, int, bool]) -> dict:
    key, size, lfs = file
    entry = {
        "type": "file",
        "path": path,
        "size": size,
        "oid": _blob_id(hub.objects[key]),
        "blobId": _blob_id(hub.objects[key]),
    }
    return entry | ({"lfs": {"oid": key, "sha256": key, "size": size, "pointerSize": 130}} if lfs else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, help="bytes a second of uploads")
    arguments = parser.parse_args()
    with Hub(arguments.port, arguments.rate) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
