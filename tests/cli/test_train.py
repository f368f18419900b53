"""The command line: what a run leaves behind, what is printed, and what is said about bad input."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.image import imread
from transformers import AutoTokenizer

from mythos.checkpoints.failed_start import removed_if_it_fails
from mythos.cli.train import main
from mythos.config.loading import load_config
from mythos.config.presets import PRESETS
from mythos.distributed.run_lock import RunLock
from mythos.errors import MythosError
from mythos.trainer import Trainer
from tests.runs import documents, losses, measurements, write_settings

RUN = {"train__steps": 6, "eval__every": 3, "eval__samples": 2, "eval__prompts": ["The river", "Page"]}
COMMAND = {**RUN, "checkpoint__every": 3, "checkpoint__keep": 1}


class Finished:
    """A run from the command line, for tests that only read it."""

    def __init__(self, directory: Path) -> None:
        self.yaml = write_settings(directory, **COMMAND)
        self.dir = directory / "run"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            self.status = main([str(self.yaml)])
        self.printed = printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return Finished(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Run a command that must fail with one message, and return the message."""

    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr().err
        assert len(re.findall("^error: ", printed, re.MULTILINE)) == 1
        assert "Traceback" not in printed
        return printed[printed.index("error: ") :]

    yield command


# --- a finished run


def test_run_directory(finished):
    assert finished.status == 0
    assert {path.name for path in finished.dir.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "plots",
        "samples",
        "tokenizer",
    }
    assert {path.name for path in (finished.dir / "checkpoints").iterdir()} == {"latest", "step-00000006"}
    assert (finished.dir / "checkpoints" / "latest").read_text() == "step-00000006"
    meta = json.loads((finished.dir / "checkpoints" / "step-00000006" / "meta.json").read_text())
    assert meta["step"] == 6 and meta["tokens"] == 6 * 8 * 32
    tokenizer = AutoTokenizer.from_pretrained(finished.dir / "tokenizer")
    assert len(tokenizer) == 384
    assert tokenizer.decode(tokenizer("The river finds")["input_ids"]) == "The river finds"


def test_metrics_of_the_contract(finished):
    lines = (finished.dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    every_step = {"step", "tokens", "loss", "lr", "grad_norm", "loops", "backprop_loops", "state_norm", "state_delta"}
    every_step |= {"tokens_per_second", "peak_memory_bytes", "rho_a", "time", "skipped_steps", "rollbacks"}
    every_step |= {"moe/load_max_over_mean", "moe/dead_experts"}
    validated = {"val/loss", "val/loss@1", "val/loss@3", "val/bits_per_byte", "val/state_delta", "moe/depth_overlap"}
    validated |= {"val/auto_loss", "val/auto_loops", "val/auto_saved"}
    validated |= {f"moe/load_max_over_mean@{loop}" for loop in (1, 2, 3)}
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert set(record) == every_step | (validated if record["step"] in (3, 6) else set())
        assert all(isinstance(value, int | float) for value in record.values())


def test_plots_are_pictures(finished):
    assert {path.name for path in (finished.dir / "plots").iterdir()} == {"loss.png", "depth.png"}
    for path in (finished.dir / "plots").iterdir():
        height, width, _ = imread(path).shape
        assert 400 <= height <= 2000 and 600 <= width <= 3000
        assert path.stat().st_size > 5_000


def test_samples(finished):
    texts = {path.name: path.read_text() for path in (finished.dir / "samples").iterdir()}
    assert texts.keys() == {"step-00000003.txt", "step-00000006.txt"}
    for text in texts.values():
        assert re.match(r"The river.*\n\nPage.*\n$", text, re.DOTALL)


def test_printed_summary(finished):
    last = measurements(finished.dir)[-1]
    for loops, mark in ((1, ""), (3, "  <- training mean")):
        loss = last[f"val/loss@{loops}"]
        assert re.search(rf"^ +{loops} +{loss:.4f} +{2.718281828459045**loss:.2f}{mark}$", finished.printed, re.M)
    for path in ("plots/loss.png", "plots/depth.png", "metrics.jsonl", "checkpoints/step-00000006"):
        assert str(finished.dir / path) in finished.printed
    assert f"{last['val/bits_per_byte']:.3f} bits per byte" in finished.printed
    assert "\nSample\n\n  The river" in finished.printed
    assert "6 steps of 8 x 32 = 256 tokens, 1,536 in all" in finished.printed


def test_written_configuration_trains_the_same(finished, tmp_path):
    written = finished.dir / "config.yaml"
    config = load_config(written)
    original = load_config(finished.yaml)
    assert config.model.vocab_size == 384 and original.model.vocab_size == "auto"
    resolved = original.model.model_copy(update={"vocab_size": 384})
    assert config == original.model_copy(update={"model": resolved})
    assert main([str(written), f"run.dir={tmp_path / 'again'}"]) == 0
    assert measurements(tmp_path / "again") == measurements(finished.dir)
    assert load_config(tmp_path / "again" / "config.yaml").model == config.model


def test_written_configuration_of_a_small_corpus_reloads(tmp_path):
    """The corpus has text for fewer tokens than were asked for."""
    path = write_settings(tmp_path, tokenizer__vocab_size=4000, train__steps=1)
    assert main([str(path)]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")) < 1000
    assert main([str(tmp_path / "run" / "config.yaml"), "train.steps=2"]) == 0
    assert len(losses(tmp_path / "run")) == 2


# --- continuing


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """A moved run: its configuration names the directory where it was."""
    return Path(shutil.copytree(finished.dir, tmp_path / "moved"))


def tree(directory: Path) -> dict[Path, bytes]:
    """Every file but the lock, which names its newest holder."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_directory_continues(finished, copy, tmp_path):
    before = tree(finished.dir)
    assert main([str(copy), "train.steps=8", "optim.schedule_steps=6"]) == 0
    assert [record["step"] for record in measurements(copy)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert measurements(copy)[:6] == measurements(finished.dir)
    assert load_config(copy).run_dir == copy
    assert tree(finished.dir) == before
    # Named by its configuration, the run is where that says.
    assert load_config(finished.dir / "config.yaml").run_dir == load_config(finished.dir).run_dir == finished.dir
    assert load_config(copy, [f"run.dir={tmp_path / 'fork'}"]).run_dir == tmp_path / "fork"


def test_a_relative_run_directory_is_resolved_from_elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: mine}\ntrain: {steps: 7}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("runs/mine/").run.dir is None
    monkeypatch.chdir(tmp_path / "runs")
    assert load_config("mine").run_dir == Path("mine")


def test_a_run_directory_continues_a_run_that_began_afresh(copy):
    text = (copy / "config.yaml").read_text()
    assert "resume: auto" in text
    (copy / "config.yaml").write_text(text.replace("resume: auto", "resume: never"))
    assert load_config(copy).run.resume == "auto"
    assert load_config(copy, ["run.resume=never"]).run.resume == "never"
    assert load_config(copy / "config.yaml").run.resume == "never"


def test_a_run_that_is_not_there(finished, refused):
    message = refused(finished.dir.with_name(f"{finished.dir.name}s"))
    assert "no such file or folder; give the path of a YAML file, or the directory of a run to continue." in message
    assert message.rstrip().endswith(f"Did you mean {finished.dir}?")


def test_folders_that_are_no_runs(finished, tmp_path, refused):
    checkpoint = finished.dir / "checkpoints" / "step-00000006"
    message = refused(checkpoint)
    assert f"a checkpoint, not a configuration. `mythos train {finished.dir}` continues its run" in message
    assert f"train.init_from={checkpoint}" in message and f"run.resume={checkpoint}" in message
    assert "a folder without config.yaml; give a YAML file, or the directory of a run" in refused(tmp_path)
    (tmp_path / "config.json").touch()
    message = refused(tmp_path)
    assert (
        f"a model, not a configuration. To start from its weights, give one with train.init_from={tmp_path}" in message
    )


def test_a_changed_configuration_keeps_the_former(finished, copy, caplog):
    former = (copy / "config.yaml").read_bytes()
    assert main([str(copy), "train.steps=8", "optim.lr=0.01", "log.every=2"]) == 0
    text = caplog.text
    for change in ("train.steps 6 -> 8", "optim.lr 0.003 -> 0.01", "log.every 1 -> 2"):
        assert f"\n  {change}\n" in text
    assert "learning rate: the next step takes" in text and "the schedule took 6 steps" in text
    assert (copy / "config.step-00000006.yaml").read_bytes() == former
    assert load_config(copy).optim.lr == 0.01
    caplog.clear()
    assert main([str(copy)]) == 0  # the configuration of the newest checkpoint
    assert "differs" not in caplog.text
    assert sorted(path.name for path in copy.glob("config*")) == ["config.step-00000006.yaml", "config.yaml"]


def test_a_changed_configuration_can_be_refused(copy, refused):
    before = tree(copy)
    message = refused(copy, "train.steps=8", "run.on_change=fail")
    assert "run.on_change is fail" in message and "\n  train.steps 6 -> 8\n" in message
    assert tree(copy) == before
    assert main([str(copy), "run.on_change=fail"]) == 0


# --- starts that fail


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, refused):
    path = write_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    nothing = f"data.path={tmp_path}/none-*.txt"
    refused(path, nothing, "run.dir=new/runs/x", "checkpoint.dir=new/elsewhere/x")
    refused(path, nothing, "run.dir=new/runs/x")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "there").mkdir()
    refused(path, nothing, "run.dir=there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_start_that_fails_leaves_what_was_there(tmp_path, copy, refused):
    path = write_settings(tmp_path)
    lock = (copy / ".lock").read_text()
    before = tree(copy)
    refused(path, f"data.path={tmp_path}/none-*.txt", f"run.dir={copy}")
    assert tree(copy) == before and json.loads((copy / ".lock").read_text())["run"] == json.loads(lock)["run"]


def test_the_lock_of_another_job_stays(tmp_path, monkeypatch):
    """Even where that job is new as well: its directory has the lock and nothing else."""
    path = write_settings(tmp_path)
    (tmp_path / "run").mkdir()
    program = "import sys; from mythos.distributed.run_lock import RunLock; from pathlib import Path\n"
    program += "with RunLock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    monkeypatch.setattr(RunLock.__init__, "__defaults__", (0.2,))  # seconds of patience
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "locked\n"
        (tmp_path / "run" / ".lock").rename(tmp_path / "kept")  # as if it was created after the other start had looked
        with pytest.raises(MythosError, match="is in use by"), removed_if_it_fails(load_config(path)):
            (tmp_path / "kept").rename(tmp_path / "run" / ".lock")
            Trainer(load_config(path))
        job.stdin.close()
    assert (tmp_path / "run" / ".lock").exists()


# --- information


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in (
        "mythos train CONFIG [key.path=value ...]",
        "--dry-run",
        "--list-presets",
        "mythos/config/sections.py",
    ):
        assert part in text
    for section in ("run", "model", "tokenizer", "data", "depth", "optim", "train", "eval", "checkpoint", "log"):
        assert re.search(rf"^  {section} ", text, re.MULTILINE)
    assert main(["-h", "depth"]) == 0
    text = capsys.readouterr().out
    for field in ("depth.mean", "depth.curriculum.shape", "depth.backprop_curriculum.over"):
        assert f"{field}: " in text


def test_list_presets(capsys):
    assert main(["--list-presets"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ *{name}\b", text, re.MULTILINE) for name in PRESETS)


def test_dry_run_builds_nothing(tmp_path, capsys):
    path = write_settings(tmp_path, **RUN)
    assert main([str(path), "train.steps=7", "--dry-run", "-v", "eval.loops=[1,5]"]) == 0
    text = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    shown = yaml.safe_load(text[text.index("\nrun:\n") :])
    assert shown["train"]["steps"] == 7 and shown["eval"]["loops"] == [1, 5]
    assert "7 steps of 256 tokens, 1,792 in all" in text
    assert re.search(r"^ +5  \d\.\d+e\+\d\d$", text, re.MULTILINE)


# --- bad input


def test_configuration_errors(tmp_path, refused):
    path = write_settings(tmp_path)
    assert "no configuration given" in refused()
    assert "nowhere.yaml" in refused(tmp_path / "nowhere.yaml")
    message = refused(path, "train.step=3", "model.preset=mythos_1bb", "optim.lr=-1")
    assert "3 problems" in message
    assert re.search(r"train\.step: .*did you mean steps\?", message)
    assert re.search(r"model\.preset: .*mythos_1b", message)
    assert "optim.lr: " in message
    assert "dept" in refused("--help", "dept")
    assert not (tmp_path / "run").exists()


def test_corpus_errors(tmp_path, refused):
    path = write_settings(tmp_path)
    message = refused(path, f"data.path={tmp_path}/none-*.txt")
    assert "data.path" in message and "none-*.txt matches no file" in message
    (tmp_path / "empty.txt").touch()
    assert "the corpus is empty" in refused(path, f"data.path={tmp_path}/empty.txt")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n{"text": null}\n')
    blank = f"data.path={tmp_path}/blank.jsonl"
    assert "row 1 cannot be used: its text is null" in refused(path, blank)
    assert "no document with text" in refused(path, blank, "data.on_error=skip")
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": documents()[0]}) + "\n")
    message = refused(path, f"data.validation.path={tmp_path}/short.jsonl", "data.sequence_length=64")
    assert "does not fill one sequence of 64" in message
    assert "data.text_column" in refused(path, "data.text_column=body")


def test_tokenizer_does_not_fit(tmp_path, finished, refused):
    path = write_settings(tmp_path)
    message = refused(path, "model.vocab_size=256")
    assert "tokenizer.vocab_size, model.vocab_size: got 384 and 256" in message
    message = refused(path, "model.vocab_size=256", f"tokenizer.name={finished.dir}/tokenizer")
    assert "model.vocab_size: 256 is smaller than the tokenizer" in message and "384 ids" in message
    message = refused(path, "tokenizer.name=nosuch", f"run.dir={tmp_path / 'other'}")
    assert "tokenizer.name: nosuch cannot be loaded" in message
    assert "asks for" in refused(finished.yaml, "tokenizer.vocab_size=500"), "the run has another one already"


@pytest.mark.parametrize(
    ("override", "before", "here"),
    [("model.dim=64", 32, 64), ("model.rope_theta=500.0", 10000.0, 500.0), ("model.experts_per_token=3", 2, 3)],
)
def test_checkpoint_of_another_model(finished, refused, override, before, here):
    contents = (finished.dir / "metrics.jsonl").read_text(), (finished.dir / "config.yaml").read_text()
    message = refused(finished.yaml, override, "train.steps=7")
    name = override.split("=")[0]
    assert "step-00000006 is of another model" in message
    assert f"{name}: {before} in the checkpoint, {here} here" in message
    assert ((finished.dir / "metrics.jsonl").read_text(), (finished.dir / "config.yaml").read_text()) == contents


def test_checkpoint_of_another_optimizer(finished, refused):
    message = refused(finished.yaml, "optim.name=muon", "train.steps=7")
    assert "step-00000006 is of another optimizer" in message
    assert "optim.name: 'adamw' in the checkpoint, 'muon' here" in message


def test_checkpoint_of_other_data(finished, refused):
    message = refused(finished.yaml, "run.seed=1", "train.steps=7")
    assert "the checkpoint's position is in other data: seed was 0, is 1" in message
    assert "data.on_mismatch=restart" in message


@pytest.mark.parametrize("part", ["meta.json", "*.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_damaged_checkpoint(finished, tmp_path, refused, part, keep):
    shutil.copytree(finished.dir, tmp_path / "run")
    (file,) = (tmp_path / "run" / "checkpoints" / "step-00000006").glob(part)
    os.truncate(file, int(keep * file.stat().st_size))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    message = refused(finished.yaml, f"run.dir={tmp_path / 'run'}", "train.steps=7")
    assert "step-00000006 is damaged" in message
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_resume_errors(finished, tmp_path, refused):
    assert "run.resume is never, but" in refused(finished.yaml, "run.resume=never")
    assert "no complete checkpoint" in refused(finished.yaml, f"run.resume={tmp_path}")


def test_run_directory_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").touch()
    message = refused(write_settings(tmp_path), f"run.dir={tmp_path / 'file' / 'run'}")
    assert f"{tmp_path / 'file' / 'run'} cannot be written" in message and "run.dir" in message


def test_several_processes(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(write_settings(tmp_path))
    assert "WORLD_SIZE is set (2), but RANK, MASTER_ADDR, MASTER_PORT not: start several" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path, refused):
    assert "no CUDA GPU: set train.device=auto or cpu" in refused(write_settings(tmp_path), "train.device=cuda")


def test_full_disk_at_a_checkpoint(tmp_path, finished, monkeypatch, refused):
    """The one before survives, and the same command continues once there is room."""
    usage = shutil.disk_usage(tmp_path)
    first = tmp_path / "run" / "checkpoints" / "step-00000003"
    path = write_settings(tmp_path, **COMMAND)
    with monkeypatch.context() as patch:
        patch.setattr(
            shutil, "disk_usage", lambda _: usage._replace(free=1000 if (first / "committed").exists() else 1 << 40)
        )
        message = refused(path)
    assert "checkpoint of step 6 could not be written" in message
    assert f"the newest complete checkpoint is {first}" in message
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").glob("step-*")] == [first.name]
    assert main([str(path)]) == 0
    assert measurements(tmp_path / "run") == measurements(finished.dir)


def test_divergence(tmp_path, refused):
    message = refused(write_settings(tmp_path, train__steps=30, optim__clip=0, optim__warmup=0), "optim.lr=1e30")
    assert "training has diverged" in message and "not yet written" in message


def test_interrupt(tmp_path, monkeypatch, capsys):
    def pressed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mythos.trainer.Trainer.train_step", pressed)
    assert main([str(write_settings(tmp_path))]) == 130
    assert "the same command continues" in capsys.readouterr().err
