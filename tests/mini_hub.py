"""A Hugging Face Hub for tests: models only, in memory, on loopback, in a process of its own, with faults on request.

`Hub` starts it as a subprocess, so that a client that blocks or forks shares nothing with it. Standard library only
(and PyYAML for the cards' metadata, which huggingface_hub depends on anyway).

Which files count as LFS is decided by their suffix. Faults are set through `Hub.fault`:

    cut_at=n           the connection of the n-th request from now is closed, and the request is not handled
    cut_reply_at=n     ... is closed after it was handled
    down_from=n        so is that of every request from the n-th on, unhandled
    cut_download=k     of each file that is downloaded at most k bytes are sent, then the connection is closed
    times=m            the last one happens m times
    wrong_bytes=True   what is downloaded of tensor files has the right length and other bytes
    status=s           every request is answered with this status
    slow=t             every request takes t seconds longer
    hold_commits=k     a commit waits until k of them have arrived
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
LFS = (".safetensors", ".bin", ".png")
Tree = dict[str, tuple[bytes, bool]]  # path -> (content, whether it is LFS)


def blob_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repo:
    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.gated: list[str] | None = None  # who may read; None: everybody
        self.commits: dict[str, Tree] = {}
        self.parents: dict[str, str | None] = {}
        self.messages: dict[str, str] = {}
        self.refs = {"main": self.commit({}, None, "initial commit")}
        self.tags: dict[str, str] = {}

    def commit(self, tree: Tree, parent: str | None, message: str) -> str:
        files = sorted((path, blob_sha1(data)) for path, (data, _) in tree.items())
        sha = hashlib.sha1(json.dumps([files, parent, message, len(self.commits)]).encode()).hexdigest()
        self.commits[sha], self.parents[sha], self.messages[sha] = tree, parent, message
        return sha

    def resolve(self, revision: str) -> str | None:
        for table in (self.refs, self.tags):
            if revision in table:
                return table[revision]
        return next((sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)


class RefusedError(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = "error", **headers: str) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *_: Any) -> None:
        pass

    # ------------------------------------------------------------------------------------------------ plumbing

    def reply(
        self, status: int = 200, value: Any = None, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        if value is not None:
            body = json.dumps(value).encode()
        if self.cut_reply:
            raise ConnectionAbortedError
        self.send_response(status)
        kind = "application/json" if value is not None else "application/octet-stream"
        for name, text in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def handle_request(self) -> None:
        server, self.cut_reply = self.server, False
        self.body = self.read_body()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query, keep_blank_values=True)
        segments = [unquote(part) for part in parts.path.strip("/").split("/")]
        if segments == ["_control"]:
            with server.lock:
                return self.reply(value=server.control(json.loads(self.body)))
        with server.lock:
            server.log.append((self.command, parts.path, parts.query))
            server.count += 1
            faults, number = dict(server.faults), server.count
        time.sleep(faults.get("slow", 0))
        if number == faults.get("cut_at") or number >= faults.get("down_from", number + 1):
            return self.cut()
        self.cut_reply = number == faults.get("cut_reply_at")
        try:
            if "status" in faults:
                raise RefusedError(faults["status"])
            if segments[:2] == ["api", "models"] and "commit" in segments and "hold_commits" in faults:
                server.barrier.wait(20)
            with server.lock:
                self.route(segments)
        except ConnectionAbortedError:
            self.cut()
        except RefusedError as error:
            headers = {name.replace("_", "-"): text for name, text in error.headers.items()}
            if error.code:
                headers["X-Error-Code"] = error.code
            headers["X-Error-Message"] = error.message
            self.reply(error.status, {"error": error.message}, headers=headers)

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    # -------------------------------------------------------------------------------------------------- rights

    @property
    def user(self) -> str | None:
        given = self.headers.get("authorization", "")
        if not given:
            return None
        token = given.removeprefix("Bearer ")
        if token not in TOKENS:
            raise RefusedError(401, None, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def repo(self, name: str, write: bool = False, content: bool = False) -> Repo:
        user, owner = self.user, name.split("/")[0]
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and user != owner):
            # the Hub tells a stranger 401 and an account 404, both with the same code
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated is not None and user not in (owner, *repo.gated):
            raise RefusedError(403 if user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if write and user != owner and "create_pr" not in self.query:
            raise RefusedError(403 if user else 401, None, "You don't have the rights to write to this repo")
        return repo

    @staticmethod
    def sha(repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    # ------------------------------------------------------------------------------------------------- routing

    def route(self, s: list[str]) -> None:
        if s[:2] == ["api", "whoami-v2"]:
            return self.reply(value={"type": "user", "name": self.signed_in(), "orgs": []})
        if s[:2] == ["api", "validate-yaml"]:
            return self.reply(value={"errors": [], "warnings": []})
        if s[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(self.body))
        if s[:2] == ["api", "models"] and len(s) >= 4:
            return self.api("/".join(s[2:4]), s[4:])
        if len(s) >= 6 and s[1].endswith(".git") and s[2:] == ["info", "lfs", "objects", "batch"]:
            return self.lfs_batch(f"{s[0]}/{s[1][:-4]}")
        if s[0] == "_lfs":
            return self.lfs_upload(s[1])
        if len(s) >= 5 and s[2] in ("resolve", "raw"):
            return self.download("/".join(s[:2]), s[3], "/".join(s[4:]))
        raise RefusedError(404, None, "Sorry, we can't find the page you are looking for.")

    def signed_in(self) -> str:
        if self.user is None:
            raise RefusedError(401, None, "Invalid username or password.")
        return self.user

    def create(self, asked: dict[str, Any]) -> None:
        user = self.signed_in()
        space = asked.get("organization") or user
        if space != user:
            raise RefusedError(403, None, f'You don\'t have the rights to create a model under "{space}"')
        name = f"{space}/{asked['name']}"
        found = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self.reply(409, {"error": "You already created this model repo", **found})
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        self.reply(value=found)

    def lfs_batch(self, name: str) -> None:
        self.query.setdefault("create_pr", [])  # whoever may propose may upload
        self.repo(name, write=True)
        self.signed_in()
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.lfs:  # no "actions": it is there already
                href = f"{self.server.url}/_lfs/{item['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": href + "/verify"}}
            objects.append(entry)
        self.reply(value={"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise RefusedError(400, None, "sha256 mismatch")
            self.server.lfs[oid] = self.body
        elif oid not in self.server.lfs:
            raise RefusedError(404, None, "not found")
        self.reply(value={})

    def api(self, name: str, rest: list[str]) -> None:
        if not rest or rest[0] == "revision":
            repo = self.repo(name)
            return self.reply(value=self.server.model_info(name, repo, self.sha(repo, "/".join(rest[1:]) or "main")))
        kind = rest[0]
        if kind == "tree":  # what a download of a whole repository asks for
            repo = self.repo(name, content=True)
            listed = []
            for path, (data, lfs) in sorted(repo.commits[self.sha(repo, rest[1])].items()):
                entry = {"type": "file", "path": path, "size": len(data), "oid": blob_sha1(data)}
                if lfs:
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                listed.append(entry)
            return self.reply(value=listed)
        if kind == "refs":
            repo = self.repo(name)
            table = {"branches": ("heads", repo.refs), "tags": ("tags", repo.tags)}
            found = {
                key: [{"name": n, "ref": f"refs/{k}/{n}", "targetCommit": sha} for n, sha in refs.items()]
                for key, (k, refs) in table.items()
            }
            return self.reply(value={**found, "converts": []})
        if kind in ("branch", "tag"):
            repo = self.repo(name, write=True)
            table_ = repo.refs if kind == "branch" else repo.tags
            asked = json.loads(self.body or b"{}")
            ref = rest[1] if kind == "branch" else asked["tag"]
            if ref in table_:
                raise RefusedError(409, None, f"Reference already exists: {ref}")
            table_[ref] = self.sha(repo, asked.get("startingPoint", "main") if kind == "branch" else rest[1])
            return self.reply(value={})
        if kind == "preupload":
            return self.preupload(self.repo(name, write=True), rest[1])
        if kind == "commit":
            return self.commit(name, self.repo(name, write=True), rest[1])
        raise RefusedError(404, None, f"unknown route {kind}")

    def preupload(self, repo: Repo, revision: str) -> None:
        self.signed_in()
        tree, files = repo.commits[self.sha(repo, revision)], []
        for item in json.loads(self.body)["files"]:
            lfs, old = item["path"].endswith(LFS), tree.get(item["path"])
            oid = None if old is None else hashlib.sha256(old[0]).hexdigest() if lfs else blob_sha1(old[0])
            mode = "lfs" if lfs else "regular"
            files.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply(value={"files": files, "commitOid": repo.resolve(revision)})

    def commit(self, name: str, repo: Repo, branch: str) -> None:
        self.signed_in()
        if branch not in repo.refs:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        head, message = repo.refs[branch], ""
        tree = dict(repo.commits[head])
        for line in filter(None, self.body.splitlines()):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message, parent = value["summary"], value.get("parentCommit")
                if parent and not head.startswith(parent):
                    raise RefusedError(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    raise RefusedError(400, None, f"an LFS pointer pointed to a file that is missing: {value['path']}")
                tree[value["path"]] = (self.server.lfs[value["oid"]], True)
            elif key == "deletedFile":
                if value["path"] not in tree:
                    raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
                del tree[value["path"]]
        sha = repo.commit(tree, head, message)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            repo.refs[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        else:
            repo.refs[branch] = sha
        self.reply(value=answer)

    def download(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name, content=True)
        sha = self.sha(repo, revision)
        if path not in repo.commits[sha]:
            raise RefusedError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        data, lfs = repo.commits[sha][path]
        etag = hashlib.sha256(data).hexdigest() if lfs else blob_sha1(data)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return self.reply(body=data, headers=headers)
        faults = self.server.faults
        if faults.get("wrong_bytes") and lfs:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status, asked = 200, self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked[6:].partition("-")
            start, stop = int(first or 0), min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(data)}"
            data, status = data[start : stop + 1], 206
        limit = faults.get("cut_download")
        if limit is not None and faults.get("times", 10**9) > 0 and len(data) > limit:
            faults["times"] = faults.get("times", 10**9) - 1
            self.send_response(status)
            for key, text in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(data[:limit])
            return self.cut()
        self.server.sent += len(data)
        self.reply(status, body=data, headers=headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str]] = []
        self.sent = 0
        self.lock = threading.RLock()
        self.faults: dict[str, Any] = {}
        self.count = 0
        self.barrier = threading.Barrier(1)

    def handle_error(self, *_: Any) -> None:
        pass  # a client that went away

    def control(self, order: dict[str, Any]) -> Any:
        name = order.get("repo", "")
        if order["do"] == "fault":
            self.faults, self.count = order["faults"], 0
            self.barrier = threading.Barrier(self.faults.get("hold_commits", 1))
        elif order["do"] == "set":
            repo = self.repos.setdefault(name, Repo())
            repo.private, repo.gated = order["private"], order["gated"]
            if order["files"] is not None:
                files = {path: base64.b64decode(data) for path, data in order["files"].items()}
                tree = {path: (data, path.endswith(LFS)) for path, data in files.items()}
                repo.refs["main"] = repo.commit(tree, repo.refs["main"], "set by the test")
                self.lfs.clear()  # so that a push uploads again
        elif order["do"] == "tree":
            repo = self.repos.get(name, Repo())
            tree = repo.commits[self.resolved(repo, order["revision"])]
            return {path: base64.b64encode(data).decode() for path, (data, _) in tree.items()}
        elif order["do"] == "commits":
            found = []
            sha = self.resolved(self.repos[name], order["revision"])
            while sha is not None:
                found.append([sha, self.repos[name].messages[sha]])
                sha = self.repos[name].parents[sha]
            return found
        elif order["do"] == "sent":
            sent, self.sent = self.sent, 0
            return sent
        elif order["do"] == "log":
            log, self.log = self.log, []
            return log
        return {}

    @staticmethod
    def resolved(repo: Repo, revision: str) -> Any:
        return repo.resolve(revision)

    @staticmethod
    def model_info(name: str, repo: Repo, sha: str) -> dict[str, Any]:
        import yaml

        tree, card = repo.commits[sha], {}
        if "README.md" in tree and tree["README.md"][0].startswith(b"---\n"):
            try:
                card = yaml.safe_load(tree["README.md"][0][4:].split(b"\n---", 1)[0]) or {}
            except yaml.YAMLError:
                pass
        tags = list(card.get("tags", []))
        if base := card.get("base_model"):
            tags += [f"base_model:{base}", f"base_model:{card.get('base_model_relation')}:{base}"]
        return {
            "id": name,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated is not None else False,
            "tags": tags,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(tree)],
        }


class Hub:
    """The server in its process, and the way to speak to it from a test."""

    def __enter__(self) -> "Hub":
        self.process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(10)

    def _control(self, **order: Any) -> Any:
        request = urllib.request.Request(self.url + "/_control", json.dumps(order).encode(), method="POST")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as answer:
            return json.load(answer)

    def fault(self, **faults: Any) -> None:
        """Set the faults from now on (none by default), and count requests from one again."""
        self._control(do="fault", faults=faults)

    def set(
        self,
        repo: str,
        *,
        private: bool = False,
        gated: list[str] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """Make a repository or change it; `files` replace what its main branch holds."""
        encoded = None if files is None else {name: base64.b64encode(data).decode() for name, data in files.items()}
        self._control(do="set", repo=repo, private=private, gated=gated, files=encoded)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What is visible at a revision; nothing where there is no repository."""
        found = self._control(do="tree", repo=repo, revision=revision)
        return {name: base64.b64decode(data) for name, data in found.items()}

    def commits(self, repo: str, revision: str = "main") -> list[tuple[str, str]]:
        """Commits and messages, the newest first."""
        return [(sha, message) for sha, message in self._control(do="commits", repo=repo, revision=revision)]

    def sent(self) -> int:
        """Bytes of files that were downloaded since the last call."""
        return int(self._control(do="sent"))

    def log(self) -> list[tuple[str, str, str]]:
        """The requests since the last call, as (method, path, query)."""
        return [(method, path, query) for method, path, query in self._control(do="log")]


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """For a process whose only Hub is this one."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [known.get("PYTHONPATH")])])
    return {
        **known,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": paths,
        **more,
    }


if __name__ == "__main__":
    with Server() as server:
        print(server.url, flush=True)
        server.serve_forever(poll_interval=0.05)
