"""Servers that drip bytes, send false headers or redirect elsewhere; and URLs with credentials in messages."""

import asyncio
import contextlib
import json
import logging
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import fsspec
import pytest
from fsspec.asyn import AsyncFileSystem
from huggingface_hub import constants
from huggingface_hub.utils import httpx

from mythos.config.data import DataConfig
from mythos.data import remote
from mythos.data.corpus import Corpus, open_corpus
from mythos.data.formats import File
from mythos.data.remote import Unreachable, hub_json, hub_tree, open_remote, remote_files
from mythos.errors import MythosError, TransientError, short_reason

SIZE = 100_000
HEAD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/100000\r\nContent-Length: 1000\r\n\r\n"
Answer = Callable[[Callable[[bytes], None], int], None]
"""Answers a request by calling the function with bytes to send; the number counts requests from 1."""


@contextlib.contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Run a server that answers every request with the function; yields its address."""
    count = iter(range(1, 10**6))

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client hangs up
                while b"\r\n\r\n" not in self.request.recv(65536):
                    pass
                answer(self.request.sendall, next(count))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "_last_warning", -100.0)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    remote._session.cache_clear()
    yield
    remote._session.cache_clear()


def drip(send: Callable[[bytes], None], data: bytes) -> None:
    """Send a byte every 50 ms, so that no single read of the client times out."""
    for byte in data:
        send(bytes([byte]))
        time.sleep(0.05)


def drip_body(send: Callable[[bytes], None], _: int) -> None:
    send(HEAD)
    drip(send, bytes(1000))


def drip_headers(send: Callable[[bytes], None], _: int) -> None:
    send(b"HTTP/1.1 206 Partial Content\r\nX-Filler: ")
    drip(send, b"x" * 1000)


def drip_redirect(send: Callable[[bytes], None], _: int) -> None:
    send(b"HTTP/1.1 302 Found\r\nLocation: /other\r\nContent-Length: 1000\r\n\r\n")
    drip(send, bytes(1000))


def drip_chunks(send: Callable[[bytes], None], _: int) -> None:
    send(b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-999/100000\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(1000):
        send(b"1\r\nx\r\n")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [drip_body, drip_headers, drip_redirect, drip_chunks])
@pytest.mark.parametrize("what", ["range", "size", "listing"])
def test_a_server_that_drips_is_abandoned_within_the_patience(
    answer: Answer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "size" and answer in (drip_body, drip_chunks):
        pytest.skip("the size is in the headers")
    with serving(answer) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            if what == "range":
                open_remote(f"{address}/x.txt", SIZE, 0.5).raw.fetch(0, 1000)
            elif what == "size":
                remote_files(f"{address}/x.txt", 0.5)
            else:
                hub_json("/api/datasets/a/b", 0.5)
        # The patience, and a last attempt: three waits of half a second, for a listing also 4 s for its page.
        assert time.monotonic() - began < (14 if what == "listing" else 5)
    assert threading.active_count() < 50


def test_a_large_range_that_drips_is_noticed_before_its_whole_time() -> None:
    """At the least rate 30 MB may take a quarter of an hour."""

    def answer(send: Callable[[bytes], None], _: int) -> None:
        send(HEAD.replace(b"0-999/100000", b"0-29999999/30000000").replace(b"1000", b"30000000"))
        drip(send, bytes(1000))

    with serving(answer) as address:
        began = time.monotonic()
        with pytest.raises(Unreachable, match=r"bytes came in .* s; at least 32768 a second are expected"):
            open_remote(f"{address}/x.txt", 30_000_000, 0.5).read()
        assert time.monotonic() - began < 5


def test_a_slow_connection_is_replaced_by_another() -> None:
    def answer(send: Callable[[bytes], None], count: int) -> None:
        if count == 1:
            drip_body(send, count)
        else:
            send(HEAD + b"y" * 1000)

    with serving(answer) as address:
        assert open_remote(f"{address}/x.txt", SIZE, 20).raw.fetch(0, 1000) == b"y" * 1000


def test_a_steady_answer_may_take_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LEAST_RATE", 50)

    def answer(send: Callable[[bytes], None], _: int) -> None:
        send(HEAD)
        for _ in range(20):
            send(b"z" * 50)
            time.sleep(0.1)

    with serving(answer) as address:
        began = time.monotonic()
        assert open_remote(f"{address}/x.txt", SIZE, 0.5).raw.fetch(0, 1000) == b"z" * 1000
        assert time.monotonic() - began > 1.5


def test_file_systems_on_an_event_loop_have_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(AsyncFileSystem):
        protocol = "hanging"

        async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: object) -> bytes:
            await asyncio.sleep(60)
            return b""

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="FSTimeoutError"):
        open_remote("hanging://bucket/x.txt", SIZE, 0.5).raw.fetch(0, 1000)
    assert time.monotonic() - began < 10  # fsspec counts whole seconds


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"Content-Range: bytes \xb2-3/\xb2", "byte ranges"),
        (b"Content-Range: bytes 0-0/-5", "byte ranges"),
        (b"Content-Range: bytes 0-0/" + b"9" * 5000, "byte ranges"),
        (b"Content-Range: bytes 0-0/1e3", "byte ranges"),
        (b"Content-Range: bytes -1-0/5", "byte ranges"),
        (b"Content-Range: ", "byte ranges"),
        (b"Content-Range: bytes 0-0/5\r\nContent-Length: \xb2", "unreachable"),
        (b"Content-Range: bytes 0-0/5\r\nContent-Length: -5", "unreachable"),
        (b"Content-Range: bytes 0-0/5\r\nContent-Length: " + b"9" * 30, "unreachable"),
    ],
    ids=range(9),
)
def test_headers_that_are_no_numbers(header: bytes, message: str) -> None:
    def answer(send: Callable[[bytes], None], _: int) -> None:
        send(b"HTTP/1.1 206 Partial Content\r\n" + header + b"\r\n\r\nx")

    with serving(answer) as address:
        with pytest.raises(MythosError, match=message):
            remote_files(f"{address}/x.txt", 0.3)
        with pytest.raises(MythosError, match=f"{message}|bytes where"):
            open_remote(f"{address}/x.txt", SIZE, 0.3).read(10)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("²", 0),
        ("٣", 0),
        ("-5", 0),
        ("1e3", 0),
        ("nan", 0),
        ("inf", 0),
        ("9" * 400, 10**6),
        ("9" * 5000, 10**6),
        ("Wed, 99 Jan 2020 00:00:00 GMT", 0),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 -9999", 0),
        (", :", 0),
        ("\x00", 0),
    ],
)
def test_waits_that_no_server_means(value: str, expected: float) -> None:
    def error(headers: dict[str, str]) -> Exception:
        error = TransientError("refused")
        error.response = type("Answer", (), {"status_code": 429, "headers": headers})()  # type: ignore[attr-defined]
        return error

    assert remote._asked_wait(error({"Retry-After": value})) == expected
    assert 0 <= remote._asked_wait(error({"RateLimit": f'"api";r=0;t={value}'})) <= 10**6


class Site:
    """Answers requests by URL without a network, and records them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: dict[str, httpx.Response | str]) -> None:
        self.pages = pages
        self.requests: list[httpx.Request] = []
        client = httpx.Client(transport=httpx.MockTransport(self.answer))
        monkeypatch.setattr(remote, "_session", cache(lambda _: client))
        monkeypatch.setattr(constants, "ENDPOINT", "https://hub.test")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "https://hub.test/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(remote, "get_token", lambda: "hf_secret")

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        page = self.pages[str(request.url.copy_with(query=None))]
        if isinstance(page, str):
            return httpx.Response(302, headers={"Location": page}, stream=httpx.ByteStream(b""))
        return httpx.Response(page.status_code, headers=page.headers, stream=httpx.ByteStream(page.content))

    def authorizations(self) -> list[str | None]:
        return [request.headers.get("Authorization") for request in self.requests]


def page(data: bytes = b"0123456789") -> httpx.Response:
    headers = {"Content-Range": f"bytes 0-{len(data) - 1}/{len(data)}"}
    return httpx.Response(206, headers=headers, content=data)


FILE = "https://hub.test/datasets/a/b/resolve/main/x.txt"


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("/other", True),
        ("https://hub.test/other", True),
        ("https://hub.test:443/other", True),
        ("https://hub.test:444/other", False),
        ("https://store.test/other", False),
        ("//store.test/other", False),
        ("https://hub.test.store.test/other", False),
        ("https://sub.hub.test/other", False),
    ],
)
def test_the_token_stays_with_its_host(target: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(httpx.URL(FILE).join(target).copy_with(port=None)) if kept else str(httpx.URL(FILE).join(target))
    site = Site(monkeypatch, {FILE: target, place: page()})
    assert open_remote("hf://datasets/a/b@main/x.txt", 10, 0.3).read() == b"0123456789"
    assert site.authorizations() == ["Bearer hf_secret", "Bearer hf_secret" if kept else None]
    assert site.requests[1].headers["Range"] == "bytes=0-9"


def test_a_token_does_not_come_back_after_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {FILE: "https://store.test/x", "https://store.test/x": "https://hub.test/y", "https://hub.test/y": page()}
    site = Site(monkeypatch, pages)
    open_remote("hf://datasets/a/b@main/x.txt", 10, 0.3).read()
    assert site.authorizations() == ["Bearer hf_secret", None, None]


def test_passwords_in_urls_stay_with_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = "https://user:secret@files.test/x", "https://other.test/x"
    site = Site(monkeypatch, {own: other, other: page()})
    assert open_remote(own, 10, 0.3).read() == b"0123456789"
    first, second = site.authorizations()
    assert first is not None and first.startswith("Basic ") and second is None
    site = Site(
        monkeypatch, {"http://user:secret@files.test/x": "https://files.test/x", "https://files.test/x": page()}
    )
    open_remote("http://user:secret@files.test/x", 10, 0.3).read()
    assert site.authorizations()[1] is None, "another scheme and port"


@pytest.mark.parametrize(
    "target", ["http://hub.test/x", "http://store.test/x", "ftp://store.test/x", "file:///etc/hosts"]
)
def test_redirects_from_https_to_anything_else_are_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, {FILE: target})
    with pytest.raises(MythosError, match="redirects from https to "):
        open_remote("hf://datasets/a/b@main/x.txt", 10, 60).read()
    assert len(site.requests) == 1


def test_redirects_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, {FILE: FILE})
    with pytest.raises(MythosError, match="redirects more than 5 times"):
        open_remote("hf://datasets/a/b@main/x.txt", 10, 60).read()
    assert len(site.requests) == 6


def test_listings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next page may be on another host, which does not get the token, or be the same page again and again."""
    entry = {"type": "file", "path": "x.txt", "size": 3}
    first, second = "https://hub.test/api/datasets/a/b/tree/main", "https://mirror.test/page"

    def listing(following: str, entries: object) -> httpx.Response:
        headers = {"Link": f'<{following}>; rel="next"'} if following else {}
        return httpx.Response(200, headers=headers, content=json.dumps(entries).encode())

    pages: dict[str, httpx.Response | str] = {first: listing(second, [entry]), second: listing("/page", [])}
    site = Site(monkeypatch, pages)
    assert hub_tree("dataset", "a/b", "main", "", 0.3) == {"x.txt": 3}
    assert site.authorizations() == ["Bearer hf_secret", None], "its own page is not asked for again"
    for wrong in ({"a": 1}, [1], [{"type": "file"}], [entry | {"size": None}], "text", None):
        site.pages = {first: listing("", wrong)}
        with pytest.raises(MythosError, match="is no list of files"):
            hub_tree("dataset", "a/b", "main", "", 0.3)
    site.pages = {first: httpx.Response(200, content=b"[" * 100_000)}
    with pytest.raises(Unreachable, match="not JSON"):
        hub_tree("dataset", "a/b", "main", "", 0.05)
    monkeypatch.setattr(remote, "MOST_PAGE_BYTES", 100)
    site.pages = {first: listing("", [entry] * 10)}
    with pytest.raises(MythosError, match="more than 100 bytes"):
        hub_tree("dataset", "a/b", "main", "", 0.3)


def test_names_with_brackets_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["web[v2]/a.txt", "web[v2]/b[1].txt", "webv/a.txt", "part1.txt"]
    entries = [{"type": "file", "path": path, "size": 1} for path in paths]
    content = httpx.Response(200, content=json.dumps(entries).encode())
    Site(monkeypatch, {"https://hub.test/api/datasets/a/b/tree/main": content})

    def matches(pattern: str) -> list[str]:
        files = remote_files(f"hf://datasets/a/b@main/{pattern}", 0.3)
        return [url.removeprefix("hf://datasets/a/b@main/") for url, _ in files]

    assert matches("web[v2]/a.txt") == ["web[v2]/a.txt"]
    assert matches("web[v2]/b[1].txt") == ["web[v2]/b[1].txt"]
    assert matches("web[v2]/*.txt") == paths[:2]
    assert matches("part[12].txt") == ["part1.txt"]


def test_names_with_brackets_in_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    for path in ("/web[v2]/a[1].txt", "/webv/a1.txt"):
        memory.pipe(path, b"x")
    for pattern in ("web[v2]/*.txt", "web[v2]/a[1].txt", "web[v2]/a[[]1].txt"):
        assert remote_files(f"memory://{pattern}", 0.3) == [("memory:///web[v2]/a[1].txt", 1)], pattern
    assert remote_files("memory://webv/a[12].txt", 0.3) == [("memory:///webv/a1.txt", 1)]


SECRETS = ["pass-word", "sig-nature", "to-ken"]
SECRET_URL = "http://us-er:pass-word@127.0.0.1:9/x.jsonl?X-Amz-Signature=sig-nature&token=to-ken"


def without_secrets(text: str) -> None:
    assert text and not any(secret in text for secret in [*SECRETS, "us-er"]), text


def test_credentials_are_in_no_message(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = DataConfig(kind="files", path=SECRET_URL, patience=0.05, cache_dir=str(tmp_path))
    with caplog.at_level(logging.DEBUG, logger="mythos"):
        for action in (
            lambda: remote_files(SECRET_URL, 0.05),
            lambda: open_remote(SECRET_URL, 100, 0.05).read(),
            lambda: open_corpus(config, config),
            lambda: list(Corpus([File(SECRET_URL, 100)], patience=0.05).read(0)),
            lambda: Corpus([File(SECRET_URL.replace(".jsonl", ".csv"), 100)]),
            lambda: remote_files(SECRET_URL.replace("http", "no-such-scheme"), 0.05),
        ):
            with pytest.raises(MythosError) as caught:
                action()
            without_secrets(str(caught.value))
            without_secrets(repr(caught.value))
    without_secrets(caplog.text)
    without_secrets(short_reason(OSError(f"Client error for url '{SECRET_URL}'")))


def test_credentials_are_in_no_name_of_a_shard(caplog: pytest.LogCaptureFixture) -> None:
    def answer(send: Callable[[bytes], None], _: int) -> None:
        content = b'{"text": "a"}\nnonsense\n'
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{len(content) - 1}/{len(content)}\r\n"
        send(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)

    with serving(answer) as address, caplog.at_level(logging.DEBUG, logger="mythos"):
        url = (
            SECRET_URL.replace("127.0.0.1:9", address.removeprefix("http://"))
            .replace(".jsonl?", "?")
            .replace("to-ken", "to-ken&x=.jsonl")
        )
        corpus = Corpus([File(url, 23)], on_error="skip", patience=0.3)
        assert [str(text) for _, text in corpus.read(0)] == ["a", "Skipped.DOCUMENT"]
        without_secrets(" ".join(corpus.shards))
    without_secrets(caplog.text)
