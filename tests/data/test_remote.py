"""Reading over a network: the bytes are the file's, whatever faults occur."""

import errno
import gzip
import http.client
import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from huggingface_hub.utils import httpx

from mythos.data import remote
from mythos.data.remote import Unreachable, is_remote, open_remote, persist, remote_files
from mythos.errors import MythosError

from .hub_server import DATASET, FAULTS, Faults, StandInHub, use_hub, write_fineweb_edu

PARQUET = "sample/10BT/001_00000.parquet"
TEXT = "notes.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_fineweb_edu(folder, [f"{index}: " + "some words of it " * (index % 50) for index in range(400)], row_group=2)
    (folder / TEXT).write_bytes(bytes(index * 7 % 251 for index in range(3_000_000)))
    return folder


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub(folder) as hub:
        use_hub(monkeypatch, hub, timeout=0.3)
        yield hub


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry without noticeable waits."""
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(remote, "LONGEST_DELAY", 0.002)


def open_file(hub: StandInHub, path: str, patience: float = 20) -> io.BufferedReader:
    return open_remote(f"hf://datasets/{DATASET}@{hub.commit}/{path}", hub.files()[path], patience)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/a/b/c.parquet", True),
        ("https://host/x", True),
        ("s3://bucket/x", True),
        ("data/*.parquet", False),
        ("/data/a.txt", False),
        ("C:\\data\\a.txt", False),
        ("~/x://y", False),
    ],
)
def test_is_remote(path: str, expected: bool) -> None:
    assert is_remote(path) is expected


def test_reads_like_a_local_file(hub: StandInHub, folder: Path) -> None:
    with open(folder / TEXT, "rb") as expected, open_file(hub, TEXT) as file:
        assert file.seekable() and file.readable() and not file.writable()
        for position, length in (
            (0, 10),
            (5, 0),
            (2_999_990, 100),
            (1_500_000, 70_000),
            (3, 2_500_000),
            (7, 1_048_577),
        ):
            assert file.seek(position) == expected.seek(position)
            assert file.read(length) == expected.read(length)
            assert file.tell() == expected.tell()
        assert file.seek(-5, io.SEEK_END) == expected.seek(-5, io.SEEK_END)
        assert file.read() == expected.read()
        assert file.read() == file.read(5) == b""
        assert file.seek(4_000_000) == 4_000_000 and file.read(5) == b""
        assert file.seek(0) == expected.seek(0) == 0
        assert file.readlines() == expected.readlines()
        assert file.seek(0) == 0
        assert file.read() == (folder / TEXT).read_bytes()


def test_large_reads_are_one_request_and_small_ones_share_one(hub: StandInHub) -> None:
    with open_file(hub, TEXT) as file:
        assert hub.counts["resolve"] == 0, "opening alone must not ask"
        file.seek(17)
        assert len(file.read(2_500_000)) == 2_500_000
        assert hub.counts[f"get {TEXT}"] == 1
        file.seek(0)
        for _ in range(100):
            file.read(1000)
        assert hub.counts[f"get {TEXT}"] == 2


def test_lines_of_a_compressed_file(hub: StandInHub, folder: Path) -> None:
    lines = [f"line {index}\n".encode() for index in range(50_000)]
    (folder / "lines.gz").write_bytes(gzip.compress(b"".join(lines)))
    with gzip.open(open_file(hub, "lines.gz")) as file:
        assert list(file) == lines


def test_an_empty_file(hub: StandInHub, folder: Path) -> None:
    (folder / "empty.txt").write_bytes(b"")
    url = f"{hub.endpoint}/cdn/empty.txt"
    assert remote_files(url, 5) == [(url, 0)]
    assert open_remote(url, 0, 5).read() == b""


@pytest.mark.parametrize("kind", FAULTS)
def test_bytes_are_the_files_with_each_fault(kind: str, hub: StandInHub, folder: Path, quick: None) -> None:
    hub.faults = Faults(rate=0.3, kinds=(kind,), retry_after=0)
    expected = (folder / TEXT).read_bytes()
    with open_file(hub, TEXT) as file:
        for start in range(0, 3_000_000, 250_000):
            file.seek(start)
            assert file.read(1_100_000) == expected[start : start + 1_100_000]
    assert hub.counts[f"fault {kind}"] >= 2


def test_parquet_with_all_faults_at_once(
    hub: StandInHub, folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "BUFFER_BYTES", 256)  # many requests for a small file
    hub.faults = Faults(rate=0.4, retry_after=0)
    with open_file(hub, PARQUET) as file, pq.ParquetFile(file) as parquet:
        groups = [parquet.read_row_group(group, columns=["text"]) for group in range(parquet.num_row_groups)]
    expected = pq.ParquetFile(folder / PARQUET)
    assert [group["text"] for group in groups] == [
        expected.read_row_group(group)["text"] for group in range(expected.num_row_groups)
    ]
    assert sum(hub.counts[f"fault {kind}"] for kind in FAULTS) >= 10
    assert sum(hub.counts[f"fault {kind}"] > 0 for kind in FAULTS) >= 4


def test_a_range_of_another_length_is_asked_for_again(hub: StandInHub, folder: Path, quick: None) -> None:
    """A valid 206 response with fewer bytes than requested, which no library below would notice."""
    hub.faults = Faults(rate=1, kinds=("short",))
    with pytest.raises(Unreachable, match=r"500 of 1000 bytes"):
        open_file(hub, TEXT, patience=0.05).raw.fetch(0, 1000)
    hub.faults = Faults()
    assert open_file(hub, TEXT).raw.fetch(0, 1000) == (folder / TEXT).read_bytes()[:1000]


def test_patience_runs_out_naming_the_file(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.05)
    hub.faults = Faults(unreachable=(PARQUET,))
    began = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        open_file(hub, PARQUET, patience=1).read()
    assert 1 <= time.monotonic() - began < 2
    message = str(caught.value)
    assert f"hf://datasets/{DATASET}@{hub.commit}/{PARQUET}" in message
    assert "for 1 s: HTTP 503" in message
    assert "run the same command" in message
    assert hub.counts["fault unreachable"] >= 4, "it must have tried more than once"
    assert open_file(hub, TEXT, patience=1).read(3) == bytes([0, 7, 14]), "other files are not concerned"


def test_an_outage_comes_through_pyarrow_as_what_it_is(
    hub: StandInHub, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an error of pyarrow an outage would look like corrupt data, which is skipped."""
    monkeypatch.setattr(remote, "BUFFER_BYTES", 256)  # not the whole file with its footer
    with pq.ParquetFile(open_file(hub, PARQUET, patience=0.1)) as parquet:
        hub.faults = Faults(unreachable=(PARQUET,))
        with pytest.raises(Unreachable, match=PARQUET):
            pq.ParquetFile(open_file(hub, PARQUET, patience=0.1))
        with pytest.raises(Unreachable, match=PARQUET):
            parquet.read_row_group(0, columns=["text"])


def test_a_stalled_server_is_abandoned_within_the_patience(hub: StandInHub) -> None:
    hub.faults = Faults(rate=1, kinds=("stall",))
    began = time.monotonic()
    with pytest.raises(Unreachable, match="Timeout"):
        open_file(hub, TEXT, patience=0.6).read(100)
    assert time.monotonic() - began < 2.5  # the patience and three timeouts of 0.3 s, with room


def test_a_server_that_is_down(hub: StandInHub) -> None:
    file = open_file(hub, TEXT, patience=0.3)
    assert file.read(1) == b"\0"
    hub.stop()
    file.seek(2_000_000)
    with pytest.raises(Unreachable, match=TEXT):
        file.read(1)


def test_retry_after_is_honoured(hub: StandInHub, quick: None) -> None:
    hub.faults = Faults(rate=1, kinds=("429",), retry_after=1)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="HTTP 429"):
        open_file(hub, TEXT, patience=1.5).read(10)
    assert 1.5 <= time.monotonic() - began < 2.5
    assert hub.counts["fault 429"] == 3, "at once, after the second asked for, and at the end of the patience"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=12;t=55'}, 0),
        ({}, 0),
    ],
)
def test_waits_that_servers_ask_for(headers: dict[str, str], expected: float) -> None:
    assert remote._asked_wait(status_error(429, headers)) == expected


def test_a_date_in_retry_after() -> None:
    from email.utils import formatdate

    in_a_minute = formatdate(time.time() + 60, usegmt=True)
    assert remote._asked_wait(status_error(503, {"Retry-After": in_a_minute})) == pytest.approx(60, abs=3)


@pytest.mark.parametrize("status", [404, 401, 403, 400, 410])
def test_permanent_errors_fail_at_once(status: int) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        raise status_error(status)

    with pytest.raises(MythosError, match=f"the thing.*HTTP {status}") as caught:
        persist(action, "the thing", 60)
    assert not isinstance(caught.value, Unreachable)
    assert len(calls) == 1


def test_a_missing_file_fails_at_once(hub: StandInHub) -> None:
    began = time.monotonic()
    with pytest.raises(MythosError, match=r"nothing.parquet.*does not exist"):
        open_remote(f"hf://datasets/{DATASET}@{hub.commit}/nothing.parquet", 10, 60).read()
    with pytest.raises(MythosError, match=r"access refused.*HF_TOKEN"):
        open_remote(f"hf://datasets/some/other@{hub.commit}/nothing.parquet", 10, 60).read()
    assert time.monotonic() - began < 2


def test_a_file_of_another_size_is_refused(hub: StandInHub) -> None:
    url = f"hf://datasets/{DATASET}@{hub.commit}/{TEXT}"
    with pytest.raises(MythosError, match=r"3000000 bytes where 12 were listed"):
        open_remote(url, 12, 60).read()


def test_an_expired_address_behind_a_redirect_is_asked_for_again(quick: None) -> None:
    error = status_error(403)
    error.response.history = [httpx.Response(302)]
    assert fails_once(error) == 2
    with pytest.raises(MythosError, match="access refused"):
        fails_once(status_error(403))


def test_offline_says_so(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MythosError, match="HF_HUB_OFFLINE"):
        open_file(hub, TEXT, patience=60).read()


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("no route"),
        httpx.ReadTimeout(""),
        httpx.RemoteProtocolError("closed"),
        ConnectionResetError(),
        TimeoutError(),
        OSError(errno.ENETUNREACH, "network is unreachable"),
        type(
            "ClientPayloadError", (type("ClientError", (Exception,), {"__module__": "aiohttp.client_exceptions"}),), {}
        )(),
    ],
    ids=repr,
)
def test_transient_errors(error: Exception, quick: None) -> None:
    assert fails_once(error) == 2


def test_transient_errors_inside_those_of_libraries(quick: None) -> None:
    wrapped = FileNotFoundError("cannot find it on the hub, nor in the cache")
    wrapped.__cause__ = httpx.ConnectError("no route")
    assert fails_once(wrapped) == 2


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), OSError(errno.ENOSPC, "disk full"), http.client.HTTPException()], ids=repr
)
def test_other_errors_are_not_touched(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        fails_once(error)
    assert caught.value is error


def test_waits_grow_and_are_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With a fake clock: waits from 0.5 s to 30 s, and a message every 30 s."""
    now = [1000.0]
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(remote.time, "sleep", sleep)
    monkeypatch.setattr(remote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(remote, "_last_warning", 0.0)
    with caplog.at_level(logging.WARNING), pytest.raises(Unreachable):
        persist(lambda: (_ for _ in ()).throw(ConnectionResetError("gone")), "the shard", 600)
    assert sum(waits) == pytest.approx(600)
    assert 0.25 <= waits[0] <= 0.5 and max(waits) <= 30
    limits = [min(0.5 * 2**attempt, 30) for attempt in range(len(waits))]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits[:-1], limits, strict=False))
    messages = [record.message for record in caplog.records]
    assert "the shard: ConnectionResetError: gone" in messages[0]
    assert 8 <= len(messages) <= 21


def test_waiting_leaves_the_seeded_generator_alone(quick: None) -> None:
    import random

    state = random.getstate()
    fails_once(ConnectionResetError())
    assert random.getstate() == state


def test_files_of_a_glob_on_the_hub(hub: StandInHub) -> None:
    root = f"hf://datasets/{DATASET}@main"
    expected = {path: size for path, size in hub.files().items() if path.startswith("sample/10BT/")}
    files = remote_files(f"{root}/sample/10BT/*.parquet", 5)
    assert files == [(f"{root}/{path}", size) for path, size in expected.items()]
    assert remote_files(f"hf://datasets/{DATASET}/sample/10BT/*.parquet", 5) == files
    assert remote_files(f"{root}/sample/10BT/000_00000.parquet", 5) == files[:1]
    everything = {path for path in hub.files() if path.endswith(".parquet")}
    assert {url.removeprefix(f"{root}/") for url, _ in remote_files(f"{root}/**/*.parquet", 5)} == everything
    url, size = files[0]
    assert open_remote(url, size, 5).read() == (hub.folder / "sample/10BT/000_00000.parquet").read_bytes()


def test_files_on_a_web_server(hub: StandInHub, folder: Path) -> None:
    url = f"{hub.endpoint}/cdn/{TEXT}"
    assert remote_files(url, 5) == [(url, 3_000_000)]
    assert open_remote(url, 3_000_000, 5).read() == (folder / TEXT).read_bytes()


def test_files_of_fsspec() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/corpus/{name}.txt", name.encode() * 2_000_000)
    files = remote_files("memory://corpus/*.txt", 5)
    assert files == [("memory:///corpus/a.txt", 2_000_000), ("memory:///corpus/b.txt", 2_000_000)]
    file = open_remote(*files[1], 5)
    file.seek(10)
    assert file.read(1_500_000) == b"b" * 1_500_000


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("hf://datasets/HuggingFaceFW/fineweb-edu@main/nothing/*.parquet", "does not exist"),
        ("hf://datasets/HuggingFaceFW/fineweb-edu@main/*.parquet", "matches no file"),
        ("hf://datasets/HuggingFaceFW/fineweb-edu@gone/*.parquet", "does not exist"),
        ("hf://datasets/fineweb-edu", "NAMESPACE/NAME"),
        ("https://host/*.parquet", "does not list"),
        ("nonsense://host/x", "Protocol not known"),
        ("s3://bucket/x.parquet", "s3fs"),
    ],
)
def test_patterns_that_cannot_be(pattern: str, message: str, hub: StandInHub) -> None:
    with pytest.raises(MythosError, match=message):
        remote_files(pattern, 60)


def test_a_server_without_ranges_is_refused(hub: StandInHub) -> None:
    """The API route serves as an example: it answers 200 to any range."""
    url = f"{hub.endpoint}/api/datasets/{DATASET}"
    with pytest.raises(MythosError, match="byte ranges"):
        remote_files(url, 60)
    with pytest.raises(MythosError, match="byte ranges"):
        open_remote(url, 100, 60).read(10)


def status_error(status: int, headers: dict[str, str] | None = None) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://host/file")
    return httpx.HTTPStatusError(
        "no", request=request, response=httpx.Response(status, headers=headers, request=request)
    )


def fails_once(error: Exception) -> int:
    """How many times an action runs that raises the error the first time."""
    calls: list[int] = []
    action: Callable[[], None]

    def action() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise error

    persist(action, "the thing", 60)
    return len(calls)
