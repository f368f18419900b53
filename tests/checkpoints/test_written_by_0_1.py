"""A run and an export of version 0.1, written before the package had its present layout, still open and train on.

`tests/fixtures/written_by_0_1` has the corpus, a run stopped after 2 of 4 steps, an export of it, and the logits and
losses that version 0.1 computed with them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mythos.checkpoints.stored_model import open_model
from mythos.config.loading import load_config
from mythos.trainer import Trainer
from tests.runs import losses

FIXTURE = Path(__file__).parents[1] / "fixtures" / "written_by_0_1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.mark.parametrize("name", ["run", "export"])
def test_weights_compute_the_same(name: str) -> None:
    opened = open_model(FIXTURE / name)
    with torch.no_grad():
        logits = opened.model(torch.arange(3, 27).reshape(2, 12), loops=5).logits
    expected = torch.tensor(EXPECTED["logits"])
    torch.testing.assert_close(logits[:, -1, :4], expected, rtol=1e-5, atol=1e-6)


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Trainer(load_config("run/config.yaml", ["train.steps=4"])).train()
    assert losses(tmp_path / "run") == pytest.approx(EXPECTED["losses"], rel=1e-6)
