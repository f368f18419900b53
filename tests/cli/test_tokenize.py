"""The command: the same folder however it is made, what is finished stays, and no process is left."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mythos.cli.tokenize import main
from mythos.cli.tokenizer import main as tokenizer_main
from mythos.config.data import DataConfig
from mythos.config.loading import load_config
from mythos.data.corpus import cache_directory, holdout_fraction, open_corpora, weighted
from mythos.data.source import TextSource
from mythos.data.tokenizer import Tokenizer, load_tokenizer
from mythos.data.tokens import TokenSource
from tests.runs import documents, losses, write_settings
from tests.warm import WarmPopen

PARTS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a corpus of 120 shards."""
    directory = tmp_path_factory.mktemp("text")
    texts = [f"{row} {text}" for row in range(PARTS // 4) for text in documents(40)]
    pq.write_table(pa.table({"text": texts}), directory / "a.parquet", row_group_size=10)
    path = write_settings(directory, data__path=str(directory / "a.parquet"))
    run = load_config(path)
    # transformers writes a tokenizer that was loaded a little otherwise than one that was trained: load it every time.
    load_tokenizer(
        run.tokenizer,
        weighted(run.data, open_corpora(run.data)),
        run_dir=None,
        cache_dir=cache_directory(run.data),
        holdout_fraction=holdout_fraction(run.data),
    )
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes of it."""
    out = tmp_path_factory.mktemp("undisturbed") / "tokens"
    assert main([str(config), "--out", str(out), "--workers", "1"]) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """The files of finished parts, and what would change if one were written again."""
    parts = [path.stem for path in folder.glob("0*.json")]
    paths = [path for path in folder.glob("*.npy") if path.name.partition(".")[0] in parts]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command in a process group of its own, as a terminal does."""
    processes = []

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mythos", "tokenize", *map(str, arguments)]
        process = WarmPopen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_any_number_of_workers_makes_the_same(
    config: Path, undisturbed: Path, tmp_path: Path, warm_workers: None
) -> None:
    assert main([str(config), "--out", str(tmp_path / "three"), "--workers", "3"]) == 0
    assert contents(tmp_path / "three") == contents(undisturbed)
    assert {name.partition(".")[2] for name in contents(undisturbed) if "/" not in name} == {
        "json",
        "tokens.npy",
        "documents.npy",
        "bytes.npy",
    }


def test_tokens_are_those_of_the_run(config: Path, undisturbed: Path) -> None:
    (corpus,) = open_corpora(load_config(config).data).values()
    tokenizer = Tokenizer.load(undisturbed / "tokenizer")
    text, tokens = TextSource(corpus, tokenizer, 0.2), TokenSource(undisturbed, tokenizer, 0.2, "fail")
    for shard in range(PARTS):
        for (row, ids), (text_row, text_ids) in zip(tokens.read(shard, 0, 1), text.read(shard, 0, 1), strict=True):
            assert row == text_row and ids.tolist() == text_ids.tolist()
    assert list(tokens.held_out()) == list(text.held_out())


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_goes_on_where_it_stopped(
    config: Path, undisturbed: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]], how: str
) -> None:
    out = tmp_path / "tokens"
    process = started(config, "--out", out, "--workers", 2)
    wait_until(lambda: len(list(out.glob("0*.json"))) >= 5 or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    family = psutil.Process(process.pid).children(recursive=True)
    if how == "killed":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert family
    wait_until(lambda: all(map(is_gone, family)), 10)
    if how == "interrupted":
        assert process.returncode == 130
        assert "Traceback" not in errors and "the same command continues" in errors
    before = finished(out)
    assert 15 <= len(before) < 3 * PARTS and not (out / "index.json").exists()
    assert main([str(config), "--out", str(out), "--workers", "1"]) == 0
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.npy")}
    assert {name: after[name] for name in before} == before
    assert contents(out) == contents(undisturbed)


def test_interrupts_do_not_reach_the_workers(
    config: Path, undisturbed: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """Not even while they start; it is their parent that ends them, and here it is not asked to."""
    out = tmp_path / "tokens"
    process = started(config, "--out", out, "--workers", 2)
    workers: list[psutil.Process] = []

    def spawned() -> bool:
        children = psutil.Process(process.pid).children()
        workers[:] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return len(workers) == 2

    wait_until(spawned)
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    wait_until(lambda: list(out.glob("0*.json")))
    for worker in workers:
        worker.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
    assert contents(out) == contents(undisturbed)


def test_full_disk(tmp_path: Path, started: Callable[..., subprocess.Popen[str]], warm_workers: None) -> None:
    """One message; with room, the same command goes on."""
    (tmp_path / "a.txt").write_text("\n\n".join(documents(3000)))
    path = write_settings(tmp_path, data__path=str(tmp_path / "a.txt"), data__txt="paragraph")
    arguments = path, "--out", tmp_path / "tokens", "--workers", 2
    limit = 150_000

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = started(*arguments, preexec_fn=small_disk)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(re.findall(r"^error: ", errors, re.MULTILINE)) == 1 and "Traceback" not in errors
    assert re.search(r"error: --out: .*tokens cannot be written: .*Fix that or give another folder", errors)
    assert not list((tmp_path / "tokens").glob("*.tmp")) and not (tmp_path / "tokens" / "index.json").exists()
    assert main(list(map(str, arguments))) == 0


def test_what_is_printed(config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(undisturbed)
    assert main([str(config), "--out", str(undisturbed)]) == 0
    assert contents(undisturbed) == before, "nothing to do"
    printed = capsys.readouterr().out
    totals = json.loads(before["index.json"])["totals"]
    assert f"{totals['documents']:,} documents, {totals['tokens']:,} tokens; left out: 0" in printed
    shown = yaml.safe_load(printed.partition("gives:\n")[2])
    assert shown == {
        "data": {"kind": "tokens", "path": str(undisturbed)},
        "tokenizer": {"name": f"{undisturbed}/tokenizer"},
    }
    settings = yaml.safe_load(config.read_text())
    for section, values in shown.items():
        settings[section] |= values
    (tmp_path / "tokens.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path / "tokens.yaml").data.kind == "tokens"


def test_training_on_tokens_is_training_on_the_text(undisturbed: Path, config: Path, tmp_path: Path) -> None:
    from mythos.cli.train import main as train

    tokenizer = f"tokenizer.name={undisturbed}/tokenizer"
    assert train([str(config), tokenizer, f"run.dir={tmp_path / 'text'}"]) == 0
    tokens = ["data.kind=tokens", f"data.path={undisturbed}", f"run.dir={tmp_path / 'tokens'}"]
    assert train([str(config), tokenizer, *tokens]) == 0
    assert losses(tmp_path / "tokens") == losses(tmp_path / "text")


def test_a_run_on_text_goes_on_with_its_tokens(undisturbed: Path, config: Path, tmp_path: Path) -> None:
    from mythos.cli.train import main as train

    tokens = ["data.kind=tokens", f"data.path={undisturbed}", f"tokenizer.name={undisturbed}/tokenizer"]
    for name, continued in (("text", []), ("tokens", tokens)):
        run = [str(config), f"run.dir={tmp_path / name}"]
        assert train([*run, "train.steps=2"]) == 0
        assert train([*run, *continued]) == 0
    assert len(losses(tmp_path / "text")) > 2
    assert losses(tmp_path / "tokens") == losses(tmp_path / "text")


def test_a_source_of_a_mixture(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(documents(20)))
    settings = yaml.safe_load(config.read_text())
    settings["data"] |= {
        "kind": "mixture",
        "sources": {
            "web": {"kind": "files", "path": settings["data"].pop("path")},
            "books": {
                "kind": "files",
                "path": str(tmp_path / "b.txt"),
                "txt": "paragraph",
                "filters": {"length": {"min": 100}},
            },
        },
    }
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(settings))
    out = tmp_path / "tokens"
    assert main([str(path), "--out", str(out)]) == 1
    assert "--source: got none; give one of books, web" in capsys.readouterr().err
    assert main([str(path), "--out", str(out), "--source", "book"]) == 1
    assert "--source: got book; give one of books, web" in capsys.readouterr().err
    assert main([str(path), "--out", str(out), "--source", "books", "--workers", "1"]) == 0
    index = json.loads((out / "index.json").read_text())
    assert index["totals"]["documents"] + index["totals"]["skipped"].get("filtered_documents", 0) == 20
    assert index["source"]["path"] == str(tmp_path / "b.txt")
    assert index["source"]["filters"]["length"]["min"] == 100


def test_what_is_refused(config: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: object) -> str:
        assert main(list(map(str, arguments))) == 1
        errors = capsys.readouterr().err
        assert len(re.findall(r"^error: ", errors, re.MULTILINE)) == 1 and "Traceback" not in errors
        return errors

    out = tmp_path / "tokens"
    assert "matches no file" in message(config, "--out", out, "data.path=nowhere/*.txt")
    assert "unknown" in message(config, "--out", out, "data.pat=x")
    assert "another tokenizer" in message(config, "--out", undisturbed, "tokenizer.vocab_size=400")
    assert "another validation share" in message(config, "--out", undisturbed, "--validation-share", 0.5)
    assert "contains something else" in message(config, "--out", config.parent)
    again = [f"data.path={undisturbed}", "data.kind=tokens", f"tokenizer.name={undisturbed}/tokenizer"]
    assert "tokenized already" in message(config, "--out", out, *again)
    (tmp_path / "bad.jsonl").write_text('{"text": "good and long enough"}\n{"text": null}\n')
    bad = f"data.path={tmp_path}/bad.jsonl"
    assert re.search(
        r"bad\.jsonl.*row 1", message(config, "--out", out, bad, f"tokenizer.name={undisturbed}/tokenizer")
    )
    for arguments in (["--workers", "0"], ["--validation-share", "1.5"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(config), "--out", str(out), *arguments])


def test_arguments_are_those_of_the_command_tokenizer(tmp_path: Path) -> None:
    """Files instead of a configuration: the tokens are those of a run on these files."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"words": text}) + "\n" for text in documents(60)))
    corpus = ["--path", str(tmp_path / "a*.jsonl"), "--text-column", "words", "--vocab-size", "384"]
    workers = ["--workers", "1"]
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    assert tokenizer_main([*corpus, "--out", str(tmp_path / "bpe"), cache]) == 0
    assert main([*corpus, "--out", str(tmp_path / "tokens"), *workers, cache]) == 0
    named = f"tokenizer.name={tmp_path / 'bpe'}"
    assert main([named, *corpus, "--out", str(tmp_path / "named"), *workers, cache]) == 0
    path = write_settings(tmp_path, data__path=str(tmp_path / "a.jsonl"), data__text_column="words")
    # The tokenizer is trained on what is not held out, of which the files' share is the default.
    share = f"data.validation.fraction={DataConfig().validation.fraction}"
    assert main([str(path), "--out", str(tmp_path / "of_run"), *workers, cache, share, "--vocab-size", "384"]) == 0
    written = [contents(tmp_path / name) for name in ("tokens", "named", "of_run")]
    arrays = [{name: file for name, file in files.items() if name.endswith(".npy")} for files in written]
    assert arrays[0] and arrays[0] == arrays[1] == arrays[2]


@pytest.mark.parametrize("command", [main, tokenizer_main])
def test_one_corpus_is_allowed(
    command: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ([], ["quickstart", "--embedded"], ["train.steps=3"]):
        with pytest.raises(SystemExit) as exited:
            command([*arguments, "--out", str(tmp_path / "out")])
        assert exited.value.code == 2
        assert "give exactly one of CONFIG.yaml, --path and --embedded" in capsys.readouterr().err
