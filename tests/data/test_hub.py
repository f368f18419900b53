"""Hub datasets resolved to files: compared with what ``datasets`` itself finds."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mythos.data import remote
from mythos.data.hub import HubFiles, resolve_hub
from mythos.data.remote import Unreachable, open_remote
from mythos.errors import MythosError

from .hub_server import DATASET, SUBSETS, Faults, StandInHub, use_hub, write_fineweb_edu

ROOT = Path(__file__).parents[2]
DOCUMENTS = [f"{index}: some text" for index in range(120)]

# This project and `datasets` resolve every subset, each with its own requests; prints the paths, sizes and documents.
COMPARISON = """
import json, sys
from pathlib import Path
import datasets
from mythos.data.hub import resolve_hub

dataset, cache, *subsets = sys.argv[1:]
for subset in subsets:
    ours = resolve_hub(dataset, subset, "train", None, Path(cache), 10)
    theirs = datasets.load_dataset_builder(dataset, subset).config.data_files["train"]
    rows = list(datasets.load_dataset(dataset, subset, split="train", streaming=True).select_columns(["text"]))
    print(json.dumps({"ours": ours.files, "theirs": theirs, "documents": [row["text"] for row in rows]}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_fineweb_edu(tmp_path / "repository", DOCUMENTS)
    return tmp_path / "repository"


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub(folder, page=5) as hub:  # a listing of several pages
        use_hub(monkeypatch, hub)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def resolve(cache: Path, dataset: str = DATASET, patience: float = 5, **options: str | None) -> HubFiles:
    options = {"subset": "sample-10BT", "split": "train", "revision": None, **options}
    return resolve_hub(dataset, **options, cache_dir=cache, patience=patience)  # type: ignore[arg-type]


def test_every_subset_is_what_datasets_finds(tmp_path: Path) -> None:
    """In a separate process, with the environment that a user sets, and without the tests' offline mode."""
    written = write_fineweb_edu(tmp_path / "repository", DOCUMENTS)
    with StandInHub(tmp_path / "repository", page=5) as hub:
        done = subprocess.run(
            [sys.executable, "-c", COMPARISON, DATASET, str(tmp_path / "cache"), *SUBSETS],
            env={**hub.environment, "HF_HOME": str(tmp_path / "hf")},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    by_subset = dict(zip(SUBSETS, map(json.loads, done.stdout.splitlines()), strict=True))
    assert len({subset["ours"][0][0] for subset in by_subset.values()}) == 4
    for subset, lists in by_subset.items():
        assert [url for url, _ in lists["ours"]] == lists["theirs"]
        sizes = {f"hf://datasets/{DATASET}@{hub.commit}/{path}": size for path, size in hub.files().items()}
        assert all(sizes[url] == size for url, size in lists["ours"])
        assert lists["documents"] == written[subset]


def test_the_files_can_be_read(hub: StandInHub, cache: Path) -> None:
    resolved = resolve(cache, subset="sample-350BT")
    assert resolved.revision == hub.commit
    read = [pq.read_table(open_remote(url, size, 5))["text"].to_pylist() for url, size in resolved.files]
    assert [document for documents in read for document in documents] == DOCUMENTS[:90]


def test_branches_and_tags_are_pinned(hub: StandInHub, cache: Path) -> None:
    newer = "f" * 40
    hub.refs |= {"main": newer, "refs/convert/parquet": newer}
    assert resolve(cache).revision == newer
    assert resolve(cache, revision="refs/convert/parquet").revision == newer
    assert resolve(cache, revision="v1.0").revision == hub.commit
    pinned = resolve(cache, revision=hub.commit)
    assert pinned.revision == hub.commit
    assert all(f"@{hub.commit}/" in url for url, _ in pinned.files)


def test_a_pinned_list_needs_no_hub(hub: StandInHub, cache: Path) -> None:
    first = resolve(cache)
    requests = sum(hub.counts.values())
    assert resolve(cache, revision=hub.commit) == first
    assert sum(hub.counts.values()) == requests
    hub.stop()
    assert resolve(cache, revision=hub.commit) == first
    with pytest.raises(Unreachable, match="api/datasets"):
        resolve(cache, patience=0.1)
    with pytest.raises(Unreachable):
        resolve(cache, revision=hub.commit, subset="sample-100BT", patience=0.1)


def test_a_damaged_list_is_written_again(hub: StandInHub, cache: Path) -> None:
    first = resolve(cache)
    [kept] = (cache / "hub").iterdir()
    for damage in ("", '{"sample/10BT/0'):
        kept.write_text(damage)
        assert resolve(cache, revision=hub.commit) == first
    assert list((cache / "hub").iterdir()) == [kept]


def test_resolving_through_faults(hub: StandInHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = resolve(cache)
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    remote._session.cache_clear()
    hub.faults = Faults(rate=0.5, retry_after=0)
    for attempt in range(3):
        assert resolve(cache / str(attempt)) == expected
    assert sum(count for name, count in hub.counts.items() if name.startswith("fault")) >= 5


def test_a_hub_that_never_answers(hub: StandInHub, cache: Path) -> None:
    hub.faults = Faults(unreachable=("/tree/",))
    with pytest.raises(Unreachable, match=r"tree.*for 0.3 s: HTTP 503"):
        resolve(cache, patience=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "HuggingFaceFW/fineweb-edv"}, r"data.dataset: .*fineweb-edv.*Repository not found.*HF_TOKEN"),
        ({"dataset": "no folder/at/all"}, r"data.dataset: no folder/at/all is neither a folder nor.*NAMESPACE/NAME"),
        ({"dataset": "fineweb-edu"}, r"data.dataset: fineweb-edu is neither.*NAMESPACE/NAME"),
        ({"revision": "v9"}, r"data.revision: .* no branch, tag or commit v9"),
        ({"revision": "0" * 40}, r"data.revision: .* no branch, tag or commit 0000"),
        ({"subset": "sample-1BT"}, r"data.subset: .* no subset sample-1BT; it has default, sample-10BT, sample-100BT"),
        ({"split": "test"}, r"data.split: .* sample-10BT, has no split test; it has train"),
    ],
)
def test_names_that_do_not_exist(options: dict[str, str], message: str, hub: StandInHub, cache: Path) -> None:
    with pytest.raises(MythosError, match=message) as caught:
        resolve(cache, patience=60, **options)
    assert not isinstance(caught.value, Unreachable)
    assert not list(cache.rglob("*.json")), "nothing is kept of a failure"


def test_a_subset_must_be_chosen_where_none_is_the_default(hub: StandInHub, folder: Path, cache: Path) -> None:
    assert resolve(cache, subset=None) == resolve(cache, subset="default")
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("config_name: default", "config_name: everything"))
    with pytest.raises(MythosError, match=r"data.subset: .*no default subset; it has everything, sample-10BT"):
        resolve(cache / "other", subset=None)


def test_files_that_cannot_be_read_are_refused(hub: StandInHub, folder: Path, cache: Path) -> None:
    shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.csv").write_text("text\nhello\n")
    with pytest.raises(MythosError, match=r"data.dataset: .*data/train.csv; .*\.parquet.*refs/convert/parquet"):
        resolve(cache, subset=None)
    (folder / "data" / "train.csv").rename(folder / "data" / "train.exe")
    with pytest.raises(MythosError, match=r"data.dataset: .*refs/convert/parquet"):
        resolve(cache / "other", subset=None)


def test_files_elsewhere_are_refused(hub: StandInHub, folder: Path, cache: Path, tmp_path: Path) -> None:
    """A header written by a stranger must not choose files of this machine."""
    secret = tmp_path / "private.txt"
    secret.write_text("mine")
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {secret}\n---\n")
    with pytest.raises(MythosError, match=r"data.dataset: .*files elsewhere"):
        resolve(cache, subset=None)


@pytest.mark.parametrize("subset", [None, "default"])
def test_a_repository_without_a_header(subset: str | None, hub: StandInHub, folder: Path, cache: Path) -> None:
    """Splits then follow from the names of the files."""
    shutil.rmtree(folder)
    for name in ("data/train-1.jsonl", "data/train-0.jsonl", "data/test.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "hello"}\n')
    (folder / "dataset_infos.json").write_text("{}")
    root = f"hf://datasets/{DATASET}@{hub.commit}"
    assert resolve(cache, subset=subset).files == [(f"{root}/data/train-{file}.jsonl", 18) for file in (0, 1)]
    assert resolve(cache, subset=subset, split="test").files == [(f"{root}/data/test.jsonl", 18)]


def test_a_local_folder(folder: Path, cache: Path) -> None:
    resolved = resolve(cache, dataset=str(folder))
    expected = sorted((folder / "sample" / "10BT").iterdir())
    assert resolved == HubFiles(None, [(str(path), path.stat().st_size) for path in expected])
    with pytest.raises(MythosError, match=r"data.split: .* it has train"):
        resolve(cache, dataset=str(folder), split="validation")


def test_a_folder_whose_name_has_brackets(tmp_path: Path, cache: Path) -> None:
    """`datasets` reads the folder's name as a pattern."""
    folder = tmp_path / "web[v2]*?"
    (folder / "data").mkdir(parents=True)
    for name in ("train-0.jsonl", "train-[1].jsonl", "test-0.jsonl"):
        (folder / "data" / name).write_text('{"text": "a"}\n')
    resolved = resolve(cache, str(folder), subset=None)
    assert [Path(path).name for path, _ in resolved.files] == ["train-0.jsonl", "train-[1].jsonl"]
    assert all(size == 14 and Path(path).is_file() for path, size in resolved.files)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: data/test-*\n---\n")
    resolved = resolve(cache, str(folder), subset="x")
    assert [Path(path).name for path, _ in resolved.files] == ["test-0.jsonl"]
