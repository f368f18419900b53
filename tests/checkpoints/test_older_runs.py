"""Runs whose configuration training refuses by now: they are used as they are, and not trained on."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from mythos.checkpoints.init_from import open_start
from mythos.checkpoints.stored_model import open_model
from mythos.cli import generate, main, train
from mythos.config.loading import config_from_dict, load_config
from mythos.errors import MythosError
from mythos.files.storage import MARKER, META
from mythos.reports.recorded import open_run
from mythos.trainer import Trainer
from tests.runs import settings, tiny
from tests.trainers import run

pytestmark = pytest.mark.usefixtures("no_plots")

FIXED = {"depth__curriculum": {}, "train__steps": 2, "checkpoint__every": 1}
RULES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "initial": (
        {"model__injection": "initial", "depth__backprop": None},
        {"depth": {"backprop": 2}},
        "model.injection, depth.backprop",
    ),
    "experts": ({}, {"model": {"experts_per_token": 1}}, "model.experts_per_token"),
    "act": ({"model__halting": "act"}, {"depth": {"backprop": 1}}, "model.halting, depth.backprop"),
    "gate": ({"model__halting": "gate"}, {"depth": {"mean": 1, "backprop": 1}}, "model.halting, depth.mean"),
    "batch": ({}, {"train": {"global_batch": 9}}, "train.global_batch, data.streams"),
    "both": ({}, {"train": {"tokens": 100}}, "train.steps, train.tokens"),
}
"""What trains by today's rules, what an older run may say instead, and the fields that training refuses."""


def record(trainer: Trainer, changes: dict[str, Any]) -> None:
    """Let the run say that it was configured otherwise: in its own file, and in its checkpoints."""
    file = trainer.run_dir / "config.yaml"
    values = yaml.safe_load(file.read_text())
    for section, fields in changes.items():
        values[section] |= fields
    file.write_text(yaml.safe_dump(values))
    for folder in (trainer.run_dir / "checkpoints").glob("step-*"):
        meta = json.loads((folder / META).read_text()) | {"config": values}
        content = json.dumps(meta).encode()
        (folder / META).write_bytes(content)
        (folder / MARKER).write_text(json.dumps({"meta_crc32": zlib.crc32(content)}))


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_training_refuses_is_opened_to_use_it(rule: str, tmp_path: Path, capsys: Any) -> None:
    valid, changes, fields = RULES[rule]
    trainer = run(tiny(tmp_path, **{**FIXED, **valid}))
    record(trainer, changes)
    folder = str(trainer.run_dir)

    for path in (trainer.run_dir, trainer.run_dir / "checkpoints" / "step-00000002"):
        opened = open_model(path)
        assert opened.run is not None
        for section, values in changes.items():
            assert values.items() <= getattr(opened.run, section).model_dump().items()
    assert generate.main([folder, "--prompt", "The", "--tokens", "2"]) == 0
    assert open_run(folder).config == opened.run
    if rule == "initial":  # the other commands open models and records by the same two functions
        assert main(["report", folder]) == 0 and main(["compare", folder, folder, "--out", str(tmp_path / "both")]) == 0
        assert main(["sweep", folder, "--loops", "1,2", "--sequences", "4"]) == 0
        assert main(["export", folder, str(tmp_path / "export")]) == 0
    capsys.readouterr()

    # To train is another matter: a dry run, resuming, and a new run of the same configuration.
    for arguments in (["--dry-run"], [], ["run.dir=elsewhere"]):
        assert train.main([str(trainer.run_dir / "config.yaml"), *arguments]) == 1
        assert fields in capsys.readouterr().err
    with pytest.raises(MythosError, match=fields):
        load_config(trainer.run_dir / "config.yaml")


def test_a_new_run_starts_from_one_that_training_refuses(tmp_path: Path) -> None:
    """Its own configuration is what counts."""
    valid, changes, fields = RULES["act"]
    trainer = run(tiny(tmp_path, **{**FIXED, **valid}))
    record(trainer, changes)
    values = settings(tmp_path, **FIXED, train__init_from=str(trainer.run_dir), run__dir=str(tmp_path / "new"))
    values["model"] = {}
    start = open_start(config_from_dict(values))
    assert start is not None
    start.close()
    values["depth"]["backprop"] = 1
    with pytest.raises(MythosError, match=fields):
        config_from_dict(values)
