"""A stand-in for the W&B server on 127.0.0.1: what the real client (wandb 0.31) asks, answered from memory.

It keeps every row at the offset that the client named and counts what it overwrites, so that tests can tell "once, in order"
from "twice". Its `mode` is changed while clients talk to it: good, ``500``, ``401`` and ``silent`` (accepts, never answers).
"""

from __future__ import annotations

import gzip
import json
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self

Mode = Literal["good", "500", "401", "silent"]
ENTITY = "students"
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StoredRun:
    """A run as the server knows it. `overwritten` counts rows that arrived at an offset which was taken."""

    name: str
    rows: list[str] = field(default_factory=list)
    overwritten: int = 0
    events: list[str] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    preempting: int = 0
    streams: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows, parsed."""
        return [json.loads(row) for row in self.rows]

    @property
    def steps(self) -> list[int]:
        """The step of every row, in order of arrival."""
        return [row["_step"] for row in self.history]

    @property
    def config(self) -> dict[str, Any]:
        """What the client sent as configuration, without W&B's own entry."""
        sent = json.loads(self.fields.get("config") or "{}")
        return {key: value["value"] for key, value in sent.items() if key != "_wandb"}


class WandbServer:
    """The server; a context manager that listens while it is open.

    `requests` counts the queries by name; `most_at_once` is the most runs that were opened and had not ended at the same time.
    Runs in `refused` cannot be opened, as one that its user deleted.
    """

    def __init__(self) -> None:
        self.mode: Mode = "good"
        self.runs: dict[str, StoredRun] = {}
        self.refused: set[str] = set()
        self.uploads: list[str] = []
        self.requests: Counter[str] = Counter()
        self.views: list[dict[str, Any]] = []
        self.lock = threading.RLock()
        self.under_way, self.most_at_once = set[str](), 0
        self._wake = threading.Event()
        self._port = 0
        self._httpd: ThreadingHTTPServer | None = None

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._httpd is not None

    @property
    def url(self) -> str:
        """Where it listens; the same after a `stop` and a `start`."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the former port after a stop."""
        self._wake.clear()
        self._httpd = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._httpd.server_address[1]
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Go down: connections are refused from now on."""
        self._wake.set()
        if self._httpd is not None:
            self._httpd.shutdown()
            self._httpd.server_close()
            self._httpd = None

    def wait_silently(self) -> None:
        """Keep a client waiting for as long as the mode is silent."""
        while self.mode == "silent" and not self._wake.wait(0.1):
            continue

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer one query."""
        name = query.replace("{", "(").split("(")[0].split()[-1] if query.split() else ""
        self.requests[name] += 1
        with self.lock:
            return _ANSWERS.get(name, _nothing)(self, variables)

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Take rows, events and the end of a run."""
        with self.lock:
            stored = self.runs.setdefault(run, StoredRun(run))
            stored.streams += 1
            for file, chunk in (body.get("files") or {}).items():
                if file == "wandb-history.jsonl":
                    stored.overwritten += _put(stored.rows, chunk)
                elif file == "wandb-events.jsonl":
                    _put(stored.events, chunk)
                elif file == "wandb-summary.json":
                    stored.summary = json.loads(chunk["content"][-1])
            stored.preempting += bool(body.get("preempting"))
            if body.get("complete"):
                stored.ends.append(body["exitcode"])
                self.under_way.discard(run)


def _put(lines: list[str], chunk: dict[str, Any]) -> int:
    """Write the lines of a chunk from its offset on; how many were there already."""
    offset = chunk["offset"]
    taken = max(0, min(len(lines), offset + len(chunk["content"])) - offset)
    lines.extend([""] * (offset - len(lines)))
    lines[offset : offset + len(chunk["content"])] = chunk["content"]
    return taken


def _viewer(_server: WandbServer, _variables: dict[str, Any]) -> dict[str, Any]:
    viewer = {
        "id": "u1",
        "entity": ENTITY,
        "username": "student",
        "email": "s@example.org",
        "flags": "{}",
        "admin": False,
    }
    return {"viewer": viewer | {"teams": {"edges": [{"node": {"name": ENTITY}}]}}}


def _resume_status(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    server.under_way.add(variables["name"])
    server.most_at_once = max(server.most_at_once, len(server.under_way))
    stored = server.runs.get(variables["name"])
    if stored is None:
        return {"model": {"id": "p1", "name": "p", "entity": {"id": "e1", "name": ENTITY}, "bucket": None}}
    bucket = {
        "id": stored.name,
        "name": stored.name,
        "summaryMetrics": json.dumps(stored.summary),
        "displayName": stored.fields.get("displayName"),
        "historyLineCount": len(stored.rows),
        "eventsLineCount": len(stored.events),
        "logLineCount": 0,
        "historyTail": json.dumps(stored.rows[-1:]),
        "eventsTail": json.dumps(stored.events[-1:]),
        "config": stored.fields.get("config") or "{}",
        "tags": stored.fields.get("tags") or [],
        "wandbConfig": json.dumps({"t": 1}),
    }
    return {"model": {"id": "p1", "name": "p", "entity": {"id": "e1", "name": ENTITY}, "bucket": bucket}}


def _upsert(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables["name"]
    inserted = name not in server.runs
    stored = server.runs.setdefault(name, StoredRun(name))
    stored.fields |= {key: value for key, value in variables.items() if value is not None}
    if variables.get("summaryMetrics"):
        stored.summary = json.loads(variables["summaryMetrics"])
    project = {"id": "p1", "name": variables.get("project") or "p", "entity": {"id": "e1", "name": ENTITY}}
    bucket = {"id": name, "name": name, "displayName": variables.get("displayName") or name, "sweepName": None}
    bucket |= {"config": stored.fields.get("config") or "{}", "project": project, "historyLineCount": len(stored.rows)}
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _create_files(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = variables["run"]
    files = [{"name": file, "uploadUrl": f"{server.url}/upload/{run}/{file}"} for file in variables["files"]]
    server.runs.setdefault(run, StoredRun(run)).files += variables["files"]
    return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}


def _upsert_view(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    server.views.append(variables)
    view = {"id": variables.get("id") or f"v{len(server.views)}", "name": variables["name"]}
    return {"upsertView": {"view": view, "inserted": "id" not in variables}}


def _nothing(_server: WandbServer, _variables: dict[str, Any]) -> dict[str, Any]:
    return {}


_ANSWERS = defaultdict(
    lambda: _nothing,
    {
        "Viewer": _viewer,
        "RunResumeStatus": _resume_status,
        "UpsertBucket": _upsert,
        "CreateRunFiles": _create_files,
        "UpsertView2": _upsert_view,
    },
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is none of our errors."""


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            return

        def do_POST(self) -> None:
            body = self._body()
            if self._refused():
                return
            if self.path == "/graphql":
                request = json.loads(body)
                query, variables = request.get("query") or "", request.get("variables") or {}
                if "upsertBucket" in query and variables.get("name") in server.refused:
                    self._answer(403, {"errors": [{"message": "as the test wants it"}]})
                else:
                    self._answer(200, {"data": server.graphql(query, variables)})
            elif self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
                self._answer(200, {"exitcode": None, "limits": {}})
            else:
                self._answer(404, {})

        def do_PUT(self) -> None:
            body = self._body()
            if not self._refused():
                server.uploads.append(body.decode(errors="replace"))
                self._answer(200, {})

        def do_GET(self) -> None:
            if not self._refused():
                self._answer(200, {})

        def _refused(self) -> bool:
            """Whether the mode has dealt with the request."""
            # An open connection outlives the socket that took it.
            if not server.is_up:
                self.close_connection = True
                return True
            if server.mode == "silent":
                server.wait_silently()
                self.close_connection = True
                return True
            if server.mode != "good":
                self._answer(int(server.mode), {"error": "as the test wants it"})
                return True
            return False

        def _answer(self, status: int, document: dict[str, Any]) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    return Handler
