"""Remote files, read by byte ranges, with retries for transient network faults.

This module sends its own requests. Those of fsspec and huggingface_hub retry a fixed number of times whatever the
patience, list repositories without a timeout, and return a body that is shorter than requested as if it were complete.
"""

import errno
import glob
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import constants, get_token, hf_hub_url, parse_hf_uri
from huggingface_hub.errors import HfUriError
from huggingface_hub.utils import httpx, parse_ratelimit_headers

from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.text import parse_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY = 0.5  # seconds
LONGEST_DELAY = 30.0  # seconds
WARN_EVERY = 30.0  # seconds
BUFFER_BYTES = 2**20
LEAST_RATE = 2**15  # bytes a second; a server below it is treated as unreachable: another attempt may be faster
PAGE_BYTES = 2**17  # typical page of a listing, 1,000 files
MOST_PAGE_BYTES = 2**26  # a longer answer is not a listing
MOST_REDIRECTS = 5  # the hub needs two: a renamed repository, then the store of its large files
LONGEST_ASKED_WAIT = 10.0**6  # seconds; larger requests are cut to this, before they overflow arithmetic

_TRANSIENT_STATUS = (408, 425, 429)  # and 500 and above
# Network errors of other libraries' file systems, which share no base class: (module, class).
_FOREIGN = {
    ("aiohttp", "ClientError"),
    ("botocore", "HTTPClientError"),
    ("httpx", "TransportError"),
    ("urllib3", "HTTPError"),
}
_LOCAL_FAULTS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_LOCAL_CODES = (errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.ENFILE)

# Not the global generator: a retry must not change what a seeded run draws.
_jitter = random.SystemRandom()
_last_warning = -WARN_EVERY


class Unreachable(MythosError):
    """A server stayed unreachable for longer than the patience; nothing is wrong with the data."""


def is_remote(path: str) -> bool:
    """Whether a path has a scheme, such as hf://, https:// or s3://."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", path) is not None


def persist(action: Callable[[], T], what: str, patience: float) -> T:
    """Run an action, and retry it after transient network faults.

    Waits grow from 0.5 to 30 s, with jitter, and are at least as long as the server asks for (Retry-After, the hub's
    RateLimit).

    Args:
        action: the action; a retry runs it from its start.
        what: its name in messages, with its URL.
        patience: seconds from the start of the first failed attempt to the last retry.

    Raises:
        Unreachable: the last retry failed.
        MythosError: it cannot succeed (not found, access refused).
    """
    what = without_credentials(what)
    first_failure: float | None = None
    delay = FIRST_DELAY
    while True:
        began = time.monotonic()
        try:
            return action()
        except Exception as error:
            if not _is_transient(error):
                _raise_permanent(error, what)
                raise
            now = time.monotonic()
            first_failure = began if first_failure is None else first_failure
            left = first_failure + patience - now
            if left <= 0:
                raise Unreachable(
                    f"{what} stayed unreachable for {patience:g} s: {_reason(error)}. When the network answers again, "
                    "run the same command: it continues from the newest checkpoint."
                ) from error
            wait = min(_asked_wait(error) + delay * _jitter.uniform(0.5, 1.0), left)
            delay = min(2 * delay, LONGEST_DELAY)
            _warn(f"{what}: {_reason(error)}; trying again in {wait:.1f} s, giving up in {left:.0f} s")
        time.sleep(wait)


def remote_files(pattern: str, patience: float, extensions: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """Expand a URL or a glob of URLs to sorted (url, size in bytes).

    Globs work for hf:// and the file systems of fsspec (s3://, gs://, ...); http(s):// names one file. A folder stands
    for the files in it and below it that have one of the ``extensions``.

    Raises:
        MythosError: nothing matches, the URL is malformed, or the package that reads its scheme is not installed.
        Unreachable: the server gave no answer within ``patience`` seconds.
    """
    scheme = pattern.partition("://")[0].lower()
    if scheme in ("http", "https"):
        if "*" in pattern:
            raise MythosError(
                f"{pattern}: a web server does not list its files. Give the URL of every file instead (%2A for a * in "
                "a name)."
            )
        return [(pattern, persist(lambda: _http_size(pattern, patience), pattern, patience))]
    find = _hub_glob if scheme == "hf" else _fsspec_glob
    files = find(pattern, patience)
    if not files and extensions and not re.search(r"[*?\[]", pattern):
        within = find(pattern.rstrip("/") + "/**", patience)
        files = [file for file in within if file[0].endswith(extensions)]
        if files and len(files) < len(within):
            where, others = without_credentials(pattern), len(within) - len(files)
            logger.warning("%s: reading %d files, leaving out %d with other extensions", where, len(files), others)
    if not files:
        raise MythosError(
            f"{pattern} matches no file. Check the names; a glob looks like hf://datasets/a/b/data/*.parquet"
        )
    return sorted(files)


def open_remote(url: str, size: int, patience: float) -> io.BufferedReader:
    """Open a remote file of known size for reading. It is seekable; the first request is that of the first read.

    A read of more than 1 MiB is one request for exactly these bytes; smaller ones go through a buffer of 1 MiB.

    Reading raises Unreachable if a range did not arrive within ``patience`` seconds, and MythosError if the file is
    missing, access is refused, or its size has changed.
    """
    return _RemoteReader(_RemoteFile(url, size, patience))


def hub_tree(repo_type: str, repo: str, revision: str, folder: str, patience: float) -> dict[str, int]:
    """List the files of a hub repository below a folder ("" for all): path in the repository -> bytes.

    Raises:
        MythosError: there is no such repository, revision or folder, or no access to it.
        Unreachable: the hub gave no answer within ``patience`` seconds.
    """
    inside = f"/{quote(folder)}" if folder else ""
    url = f"/api/{repo_type}s/{repo}/tree/{quote(revision, safe='')}{inside}?recursive=true"
    files: dict[str, int] = {}
    asked: set[str] = set()
    while url and url not in asked:
        asked.add(url)
        entries, url = hub_json(url, patience)
        try:
            files |= {str(entry["path"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}
        except (TypeError, KeyError, ValueError) as error:
            raise MythosError(f"{repo}: the answer of {constants.ENDPOINT} is no list of files: {error!r}") from error
    return files


def hub_json(route: str, patience: float) -> tuple[Any, str]:
    """Ask the hub's API; return the decoded answer and the URL of its next page ("" for none).

    Args:
        route: begins with a slash, or is the URL of a next page.
        patience: seconds.

    Raises:
        MythosError: it does not exist or is not accessible; the ``response`` of ``__cause__`` is the answer.
        Unreachable: no answer within ``patience`` seconds.
    """
    url = constants.ENDPOINT + route if route.startswith("/") else route
    # The next page may be on another host, which must not get the hub's token.
    is_hub = _origin(httpx.URL(url)) == _origin(httpx.URL(constants.ENDPOINT))

    def ask() -> tuple[Any, str]:
        def read(response: httpx.Response) -> tuple[Any, str]:
            response.raise_for_status()
            data = _body(response, response.iter_bytes(), MOST_PAGE_BYTES, patience)
            if len(data) > MOST_PAGE_BYTES:
                raise MythosError(f"{url}: the answer has more than {MOST_PAGE_BYTES} bytes; this is no hub")
            following = response.links.get("next", {}).get("url", "")
            try:
                return parse_json(data), str(response.url.join(following)) if following else ""
            except ValueError as error:  # a truncated answer, or the page of a proxy
                raise OSError(f"the answer is not JSON: {short_reason(error)}") from error

        return _get(url, _headers(is_hub), PAGE_BYTES, patience, read)

    return persist(ask, url, patience)


class _RemoteFile(io.RawIOBase):
    """An unbuffered reader of byte ranges."""

    def __init__(self, url: str, size: int, patience: float) -> None:
        self.name = url
        self.size = size
        self._patience = patience
        self._position = 0
        self._fetch = _range_reader(url, size, patience)

    def fetch(self, start: int, length: int) -> bytes:
        """Exactly these bytes, with retries."""

        def action() -> bytes:
            data = self._fetch(start, length)
            if len(data) != length:
                raise OSError(f"the answer has {len(data)} of {length} bytes")
            return data

        return persist(action, f"{self.name}, bytes {start} to {start + length}", self._patience)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self.size - self._position))
        if length:
            buffer[:length] = self.fetch(self._position, length)
            self._position += length
        return length


class _RemoteReader(io.BufferedReader):
    """Sends one request for a large read; the base class would send a second for the rest beyond whole buffers."""

    raw: _RemoteFile

    def __init__(self, raw: _RemoteFile) -> None:
        super().__init__(raw, BUFFER_BYTES)

    def read(self, size: int | None = -1, /) -> bytes:
        start = self.tell()
        left = max(0, self.raw.size - start)
        length = left if size is None or size < 0 else min(size, left)
        if length <= BUFFER_BYTES:
            return super().read(length)
        data = self.raw.fetch(start, length)
        self.seek(start + length)
        return data


def _range_reader(url: str, size: int, patience: float) -> Callable[[int, int], bytes]:
    """A function that reads ``length`` bytes from ``start`` on, in one attempt."""
    scheme = url.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return lambda start, length: _http_range(url, url, size, start, length, _headers(), patience)
    if scheme == "hf":
        place = parse_hf_uri(url)
        address = hf_hub_url(place.id, place.path_in_repo, repo_type=place.type, revision=place.revision)
        return lambda start, length: _http_range(url, address, size, start, length, _headers(is_hub=True), patience)
    filesystem, path = _fsspec(url)

    def read(start: int, length: int) -> bytes:
        # Only file systems that run on an event loop take a timeout, and only these talk to servers.
        limit = {"timeout": _limit(length, patience)} if filesystem.async_impl else {}
        return filesystem.cat_file(path, start=start, end=start + length, **limit)

    return read


def _http_range(
    url: str, address: str, size: int, start: int, length: int, headers: dict[str, str], patience: float
) -> bytes:
    headers["Range"] = f"bytes={start}-{start + length - 1}"

    def read(response: httpx.Response) -> bytes:
        response.raise_for_status()
        place = re.fullmatch(
            r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", response.headers.get("Content-Range", "")
        )
        if response.status_code != 206 or place is None:
            raise MythosError(
                f"{url}: the server does not serve byte ranges. Download the file and give its path instead."
            )
        if int(place[2]) != size:
            raise MythosError(
                f"{url} has {place[2]} bytes where {size} were listed: it was changed on the server. Restore it, or "
                "start a new run (another run.name)."
            )
        if int(place[1]) != start:
            raise OSError(f"the answer begins at byte {place[1]}")
        return _body(response, response.iter_raw(), length, patience)

    return _get(address, headers, length, patience, read)


def _http_size(url: str, patience: float) -> int:
    def read(response: httpx.Response) -> int:
        total = re.fullmatch(r"bytes (?:0-0|\*)/([0-9]{1,18})", response.headers.get("Content-Range", ""))
        if response.status_code in (206, 416) and total:  # an empty file answers 416
            return int(total[1])
        response.raise_for_status()
        raise MythosError(f"{url}: the server does not serve byte ranges. Download the file and give its path instead.")

    return _get(url, {**_headers(), "Range": "bytes=0-0"}, 1, patience, read)


def _get(url: str, headers: dict[str, str], length: int, patience: float, read: Callable[[httpx.Response], T]) -> T:
    """Send one request for about ``length`` bytes and return ``read`` of the response.

    httpx's timeouts restart with each byte that arrives, in headers and body. So the exchange runs in a thread, for
    which this one waits a limited time; closing the connection then ends that thread. Raises TimeoutError.
    """
    session = _session(os.getpid())

    def exchange() -> T:
        with _answer(session, url, headers, patience) as response:
            return read(response)

    limit = _limit(length, patience)
    executor = ThreadPoolExecutor(1)
    future = executor.submit(exchange)
    executor.shutdown(wait=False)
    try:
        if wait([future], limit).not_done:
            raise TimeoutError(f"no whole answer in {limit:.0f} s")
        return future.result()
    finally:
        if not future.done():
            session.close()
            _session.cache_clear()


def _grace(patience: float) -> float:
    """Seconds that a server may take to accept a connection, or to begin to answer."""
    return max(min(constants.HF_HUB_DOWNLOAD_TIMEOUT, patience), 0.5)


def _limit(length: int, patience: float) -> float:
    """Seconds that an exchange may take: a grace for connection, redirect and answer each, and time for the data."""
    return 3 * _grace(patience) + length / LEAST_RATE


@contextmanager
def _answer(session: httpx.Client, url: str, headers: dict[str, str], patience: float) -> Iterator[httpx.Response]:
    """The response after all redirects, its body not yet read.

    Raises MythosError for a redirect from https to anything else, and for too many.
    """
    request = session.build_request("GET", url, headers=headers)
    history: list[httpx.Response] = []
    while len(history) <= MOST_REDIRECTS:
        response = session.send(request, stream=True)
        try:
            following = response.next_request
            if following is None:
                response.history = history
                yield response
                return
            _body(response, response.iter_raw(), BUFFER_BYTES, patience)  # so that the connection can be reused
        finally:
            response.close()
        history.append(response)
        if request.url.scheme == "https" != following.url.scheme:
            raise MythosError(
                f"{url} redirects from https to {following.url}, which others on the network could read and change. "
                "Give the address of the file itself."
            )
        if _origin(request.url) != _origin(following.url):
            following.headers.pop("Authorization", None)
        request = following
    raise MythosError(f"{url} redirects more than {MOST_REDIRECTS} times, at last to {request.url}. Check the URL.")


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _body(response: httpx.Response, chunks: Iterable[bytes], most: int, patience: float) -> bytes:
    """The body, cut after the chunk that exceeds ``most`` bytes; raises OSError if it arrives too slowly."""
    began = time.monotonic()
    grace = _grace(patience)
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > most:
            break
        seconds = time.monotonic() - began
        if len(data) < LEAST_RATE * (seconds - grace):
            raise OSError(f"{len(data)} bytes came in {seconds:.1f} s; at least {LEAST_RATE} a second are expected")
    return bytes(data)


def _hub_glob(pattern: str, patience: float) -> list[tuple[str, int]]:
    from fsspec.utils import glob_translate

    try:
        place = parse_hf_uri(pattern)
    except HfUriError as error:
        raise MythosError(
            f"{pattern}: {short_reason(error)}. Write hf://datasets/NAMESPACE/NAME@REVISION/PATH; PATH may be a glob."
        ) from error
    if place.type == "bucket":
        return _fsspec_glob(pattern, patience)
    revision = place.revision or constants.DEFAULT_REVISION
    folder = re.split(r"[*?\[]", place.path_in_repo)[0].rpartition("/")[0]
    tree = hub_tree(place.type, place.id, revision, folder, patience)
    paths = {place.path_in_repo} & tree.keys() or [
        path
        for reading in readings(place.path_in_repo, lambda start: any(path.startswith(start) for path in tree))
        for path in filter(re.compile(glob_translate(reading)).match, tree)
    ]
    return [(hub_url(place.type, place.id, revision, path), tree[path]) for path in sorted(set(paths))]


def readings(pattern: str, exists: Callable[[str], bool]) -> list[str]:
    """The globs for which a pattern may stand: leading folders that exist are literal, even with a glob's characters.

    Args:
        pattern: a path with or without characters of a glob.
        exists: whether there is a folder of this path, which ends with a slash.
    """
    literal, rest = "", pattern
    while "/" in rest and exists(start := literal + rest[: rest.index("/") + 1]):
        literal, rest = start, pattern[len(start) :]
    # After the first folder that does not exist, a bracket may be a glob or literal.
    return [glob.escape(literal) + reading for reading in {rest, rest.replace("[", "[[]")}]


def hub_url(repo_type: str, repo: str, revision: str, path: str) -> str:
    """The hf:// URL of a file in a hub repository."""
    kind = "" if repo_type == "model" else f"{repo_type}s/"
    return f"hf://{kind}{repo}@{quote(revision, safe='')}/{path}"


def _fsspec_glob(pattern: str, patience: float) -> list[tuple[str, int]]:
    filesystem, path = _fsspec(pattern)

    def ask() -> list[tuple[str, int]]:
        filesystem.invalidate_cache()
        entries: dict[str, Any] = {}
        for reading in readings(path, filesystem.exists) if "[" in path else [path]:
            entries |= filesystem.glob(reading, detail=True)
        files = {name: info["size"] for name, info in entries.items() if info["type"] == "file"}
        return [(filesystem.unstrip_protocol(name), size) for name, size in files.items()]

    return persist(ask, pattern, patience)


def _fsspec(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise MythosError(
            f"{url} cannot be read: {short_reason(error)}. Install the package that this names, or copy the files to a "
            "local folder."
        ) from error


@cache
def _session(process: int) -> httpx.Client:
    """One pool of connections per process; a forked one must not use its parent's."""
    return httpx.Client(timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _headers(is_hub: bool = False) -> dict[str, str]:
    if is_hub and constants.is_offline_mode():
        raise MythosError(
            "HF_HUB_OFFLINE is set, so the hub is not used. Unset it, or use local files (data.kind: files)."
        )
    headers = {"Accept-Encoding": "identity"}  # a compressed body would not have the length of the range
    if is_hub:
        # Not huggingface_hub's build_hf_headers: it requests a list of agents from the hub, without a timeout.
        headers["User-Agent"] = f"mythos; hf_hub/{huggingface_hub.__version__}"
        if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
            headers["Authorization"] = f"Bearer {token}"
    return headers


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes: libraries wrap network errors in their own."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    chain = _chain(error)
    if any(isinstance(link, MythosError) for link in chain):
        return False
    for link in chain:
        if status := _status(link):
            # After a redirect 403 means that the signed address has expired; the next attempt gets a fresh one.
            expired = status == 403 and getattr(getattr(link, "response", None), "history", None)
            return status >= 500 or status in _TRANSIENT_STATUS or bool(expired)
    if any(type(link).__name__ == "OfflineModeIsEnabled" for link in chain):
        return False
    return any(_is_network_fault(link) for link in chain)


def _is_network_fault(error: BaseException) -> bool:
    if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError):
        return False
    if isinstance(error, httpx.TransportError):
        return True
    if isinstance(error, OSError):
        return not isinstance(error, _LOCAL_FAULTS) and error.errno not in _LOCAL_CODES
    return any((kind.__module__.partition(".")[0], kind.__name__) in _FOREIGN for kind in type(error).__mro__)


def _raise_permanent(error: BaseException, what: str) -> None:
    """Raise a MythosError with advice for known errors that no retry cures; return for others."""
    status = next(filter(None, map(_status, _chain(error))), None)
    if isinstance(error, MythosError):
        return
    if status in (401, 403) or isinstance(error, PermissionError):
        raise MythosError(
            f"{what}: access refused ({_reason(error)}). It is private, gated or misspelt: check the name, accept its "
            "terms on its page, and log in (hf auth login, or set HF_TOKEN; for object stores, their credentials)."
        ) from error
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        raise MythosError(f"{what} does not exist ({_reason(error)}). Check the name and the revision.") from error
    if status is not None or isinstance(error, httpx.HTTPError | httpx.InvalidURL):
        raise MythosError(f"{what} cannot be read: {_reason(error)}. Check the URL.") from error


def _reason(error: BaseException) -> str:
    for link in _chain(error):
        if status := _status(link):
            response = getattr(link, "response", None)
            headers = getattr(response, "headers", {})
            detail = headers.get("X-Error-Message") or getattr(response, "reason_phrase", "")
            return f"HTTP {status} {detail}".strip()
    reason = short_reason(error)
    return reason if type(error) is OSError else f"{type(error).__name__}: {reason}"


def _asked_wait(error: BaseException) -> float:
    """Seconds that the server asks to wait before a retry; 0 if it does not ask."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None) or getattr(link, "headers", None)
        if not headers:
            continue
        try:
            limit = parse_ratelimit_headers(headers) if _status(link) == 429 else None
            if limit is not None and limit.remaining == 0:
                return float(min(limit.reset_in_seconds, LONGEST_ASKED_WAIT))
            value = headers.get("Retry-After", "").strip()
            if re.fullmatch("[0-9]+", value):
                return min(float(value), LONGEST_ASKED_WAIT)
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else 0.0
        except (ValueError, TypeError, OverflowError, OSError):  # neither a number nor a possible date
            return 0.0
    return 0.0


def _warn(message: str) -> None:
    global _last_warning
    if time.monotonic() - _last_warning >= WARN_EVERY:
        _last_warning = time.monotonic()
        logger.warning("%s", without_credentials(message))
