"""A stand-in for the Hugging Face hub on loopback: FineWeb-Edu's layout, the hub's routes, and injected faults.

    folder = tmp_path / "hub"
    write_fineweb_edu(folder, documents)
    with StandInHub(folder, Faults(rate=0.2)) as hub:
        subprocess.run([...], env=hub.environment)
    assert hub.counts["fault 503"]

Like the real hub it serves small files itself and redirects to another path (its "CDN") for large ones.
"""

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

DATASET = "HuggingFaceFW/fineweb-edu"
REVISION = "main"
# Subset -> (path of its files, its share of the documents).
SUBSETS = {
    "default": ("data/*/*", 1.0),
    "sample-10BT": ("sample/10BT/*", 0.25),
    "sample-100BT": ("sample/100BT/*", 0.5),
    "sample-350BT": ("sample/350BT/*", 0.75),
}
FAULTS = ("503", "429", "reset", "stall", "truncated", "short")


def write_fineweb_edu(folder: Path, documents: list[str], files: int = 3, row_group: int = 10) -> dict[str, list[str]]:
    """Write the repository; return the documents of every subset in the order of its sorted files and their rows."""
    configs = []
    written: dict[str, list[str]] = {}
    for subset, (pattern, share) in SUBSETS.items():
        configs.append(f"- config_name: {subset}\n  data_files:\n  - split: train\n    path: {pattern}\n")
        chosen = documents[: round(share * len(documents))]
        written[subset] = []
        for file in range(files):
            part = chosen[file * len(chosen) // files : (file + 1) * len(chosen) // files]
            if subset == "default":
                dump = f"CC-MAIN-20{13 + 2 * file // files}-20"  # two dumps
                path = folder / "data" / dump / f"train-{file:05d}-of-{files:05d}.parquet"
            else:
                path = folder / pattern.replace("*", f"{file:03d}_00000.parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_table(part, f"{subset}-{file}"), path, row_group_size=row_group)
            written[subset] += part
    (folder / "README.md").write_text(
        "---\nlicense: odc-by\nlanguage:\n- en\npretty_name: FineWeb-Edu\nconfigs:\n"
        + "".join(configs)
        + "---\n# FineWeb-Edu\n"
    )
    return written


def _table(documents: list[str], name: str) -> pa.Table:
    count = len(documents)
    return pa.table(
        {
            "text": pa.array(documents, pa.string()),
            "id": [f"<urn:uuid:{name}-{index}>" for index in range(count)],
            "dump": ["CC-MAIN-2013-20"] * count,
            "url": [f"http://example.org/{name}/{index}" for index in range(count)],
            "file_path": ["s3://commoncrawl/crawl-data/CC-MAIN-2013-20"] * count,
            "language": ["en"] * count,
            "language_score": pa.array([0.9] * count, pa.float64()),
            "token_count": pa.array([len(document) // 4 for document in documents], pa.int64()),
            "score": pa.array([2.5 + index % 20 / 10 for index in range(count)], pa.float64()),
            "int_score": pa.array([3 + index % 3 for index in range(count)], pa.int64()),
        }
    )


@dataclass
class Faults:
    """Injected faults: with probability ``rate`` (0 to 1), one of ``kinds``, drawn by a seed for every request.

    The n-th request for the same bytes gets the same fault in every run, whatever the order of requests.

    Attributes:
        kinds: ``503``; ``429`` with Retry-After; ``reset`` of the connection; ``stall`` in the middle of the body;
            ``truncated`` (a body shorter than its Content-Length); ``short`` (a valid answer with a smaller range).
        retry_after: seconds that 429 asks for.
        stall: seconds of silence before the connection is closed.
        unreachable: parts of paths; requests for paths that contain one always get 503.
    """

    rate: float = 0.0
    kinds: tuple[str, ...] = FAULTS
    seed: int = 0
    retry_after: int = 1
    stall: float = 30.0
    unreachable: tuple[str, ...] = ()


class StandInHub:
    """Serves a folder as one dataset repository while the context is open.

    Attributes:
        refs: branches and tags -> commit.
        commit: the commit that the folder's files are; refs may be moved, files are the same at every commit.
        counts: requests by route (``info``, ``tree``, ``resolve``, ``cdn``, ...) and ``fault <kind>``; ``get <path>``
            counts the file's requests.
        faults: may be replaced while it serves.
        page: entries a page of the tree route.
    """

    def __init__(self, folder: Path, faults: Faults | None = None, dataset: str = DATASET, page: int = 1000) -> None:
        self.folder = folder
        self.faults = faults or Faults()
        self.dataset = dataset
        self.page = page
        self.commit = hashlib.sha1(json.dumps(self.files()).encode()).hexdigest()
        self.refs = {REVISION: self.commit, "v1.0": self.commit}
        self.counts: Counter[str] = Counter()
        self.stopping = threading.Event()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self

    def __enter__(self) -> "StandInHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server, and close the connections that are kept alive."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this process, with the hub at this stand-in and offline mode off."""
        ours = {"HF_ENDPOINT": self.endpoint, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
        return {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **ours,
        }

    def files(self) -> dict[str, int]:
        """Path in the repository -> bytes."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def count(self, what: str) -> None:
        """Count an event."""
        with self._lock:
            self.counts[what] += 1

    def fault(self, path: str, span: str) -> str | None:
        """The fault that this request meets, if any."""
        faults = self.faults
        if any(part in path for part in faults.unreachable):
            return "unreachable"
        request = f"{path} {span}".replace(self.commit, "")  # draws must not depend on the bytes that pyarrow writes
        with self._lock:
            self._seen[request] += 1
            draw = random.Random(f"{faults.seed} {request} {self._seen[request]}")
        return draw.choice(faults.kinds) if draw.random() < faults.rate else None


def use_hub(patch: pytest.MonkeyPatch, hub: StandInHub, timeout: float = 1) -> None:
    """Point this process at the stand-in; huggingface_hub read the environment when it was imported."""
    from huggingface_hub import constants

    from mythos.data import remote

    patch.setenv("NO_PROXY", "127.0.0.1")
    patch.setenv("no_proxy", "127.0.0.1")
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", timeout)
    remote._session.cache_clear()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: StandInHub

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # closed by its other end in the meantime
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: clients hang up on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # headers and body are sent separately: Nagle's algorithm would delay the body by 40 ms
    )
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        dataset = self.server.hub.dataset
        routes = {
            f"/api/datasets/{dataset}": self._api,
            f"/datasets/{dataset}/resolve": self._resolve,
            "/cdn": self._cdn,
        }
        for prefix, route in routes.items():
            if path == prefix or path.startswith(prefix + "/"):
                return route(path[len(prefix) + 1 :], parse_qs(url.query))
        self.server.hub.count("unknown")
        if path.startswith(("/api/datasets/", "/datasets/")):  # the hub's answer without a login
            return self._refuse(401, "RepoNotFound", "Repository not found")
        return self._refuse(404, "NotFound", "no such route")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server.hub
        prefix = f"/api/datasets/{hub.dataset}/paths-info/"
        if not self.path.startswith(prefix) or not self._is_commit(unquote(self.path[len(prefix) :])):
            return self._refuse(404, "RevisionNotFound", "no such route or revision")
        asked = (
            json.loads(body)["paths"]
            if "json" in self.headers.get("Content-Type", "")
            else parse_qs(body.decode())["paths"]
        )
        files = hub.files()
        return self._answer("paths-info", json.dumps([_entry(path, files[path]) for path in asked if path in files]))

    def _api(self, rest: str, query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        kind, _, rest = rest.partition("/")
        if kind in ("", "revision"):
            commit = self._commit(rest or REVISION)
            if commit is None:
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest}")
            siblings = [{"rfilename": path} for path in hub.files()]
            info = {"id": hub.dataset, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
            return self._answer("info", json.dumps({**info, "gated": False, "siblings": siblings}))
        revision, _, folder = rest.partition("/")
        if kind != "tree" or not self._is_commit(revision):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = hub.files()
        below = {path: size for path, size in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if not below:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        entries = _tree(below, folder, query.get("recursive", ["false"])[0].lower() == "true")
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + hub.page < len(entries):
            following = {**{key: values[0] for key, values in query.items()}, "cursor": str(start + hub.page)}
            parameters = "&".join(f"{key}={quote(value)}" for key, value in following.items())
            headers["Link"] = f'<{hub.endpoint}{urlsplit(self.path).path}?{parameters}>; rel="next"'
        return self._answer("tree", json.dumps(entries[start : start + hub.page]), headers)

    def _resolve(self, rest: str, query: dict[str, list[str]]) -> None:
        hub = self.server.hub
        revision, _, path = rest.partition("/")
        commit = self._commit(revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if path not in hub.files():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        size = hub.files()[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(f"{path} {size}".encode()).hexdigest()}"'}
        if not path.endswith((".parquet", ".gz")):
            return self._send_file("resolve", path, headers)
        headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": headers["ETag"]}
        headers["Location"] = f"{hub.endpoint}/cdn/{quote(path)}?signature=of-this-request"
        return self._answer("resolve", f"Found. Redirecting to {path}", headers, status=302)

    def _cdn(self, path: str, query: dict[str, list[str]]) -> None:
        self._send_file("cdn", path, {})

    def _send_file(self, route: str, path: str, headers: dict[str, str]) -> None:
        hub = self.server.hub
        hub.count(f"get {path}")
        data = (hub.folder / path).read_bytes()
        headers = {**headers, "Accept-Ranges": "bytes"}
        span = self.headers.get("Range")
        if span is None:
            return self._answer(route, data, headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self._answer(route, b"", {"Content-Range": f"bytes */{len(data)}"}, status=416)
        return self._answer(route, data[start:end], headers, status=206, span=(start, len(data)))

    def _answer(
        self,
        route: str,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        status: int = 200,
        span: tuple[int, int] | None = None,
    ) -> None:
        """Send an answer, or this request's fault."""
        hub = self.server.hub
        hub.count(route)
        data = body.encode() if isinstance(body, str) else body
        path = unquote(self.path)
        fault = hub.fault(f"{self.command} {path}", self.headers.get("Range", ""))
        if fault:
            hub.count(f"fault {fault}")
        if fault in ("503", "unreachable"):
            return self._refuse(503, "ServiceUnavailable", "the stand-in is out of order")
        if fault == "429":
            return self._refuse(429, "TooManyRequests", "slow down", {"Retry-After": str(hub.faults.retry_after)})
        if fault == "reset":
            # With a linger time of 0 s, closing sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return None
        if fault == "short" and span:
            data = data[: len(data) // 2]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if span:
            self.send_header("Content-Range", f"bytes {span[0]}-{span[0] + len(data) - 1}/{span[1]}")
        self.send_header("Content-Type", "application/json" if isinstance(body, str) else "application/octet-stream")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("truncated", "stall") or (fault == "short" and not span):
            data = data[: len(data) // 2]
            self.close_connection = True
        self.wfile.write(data)
        if fault == "stall":
            self.wfile.flush()
            hub.stopping.wait(hub.faults.stall)
        return None

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _commit(self, revision: str) -> str | None:
        """The commit of a branch, tag or commit."""
        refs = self.server.hub.refs
        return refs.get(revision) or (revision if revision in {*refs.values(), self.server.hub.commit} else None)

    def _is_commit(self, revision: str) -> bool:
        return self._commit(revision) is not None

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


def _entry(path: str, size: int) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(path.encode()).hexdigest()}


def _tree(files: dict[str, int], folder: str, recursive: bool) -> list[dict[str, Any]]:
    depth = len(folder.split("/")) if folder else 0
    folders = {"/".join(path.split("/")[:level]) for path in files for level in range(depth + 1, path.count("/") + 1)}
    entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    entries += [_entry(path, size) for path, size in files.items()]
    return entries if recursive else [entry for entry in entries if entry["path"].count("/") == depth]
