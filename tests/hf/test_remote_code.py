"""Programs that do not import mythos load an export with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from mythos.checkpoints.stored_model import open_model
from mythos.hf.export import export_model
from tests.runs import tiny
from tests.trainers import run

pytestmark = pytest.mark.usefixtures("no_plots")

LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
assert "mythos" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code of a folder ran without consent")
AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__ == "mythos.hf.model", type(model).__module__
model.save_pretrained(out)
shallow = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, mean_loops=1)
ids = torch.arange(24).reshape(2, 12)
with torch.no_grad():
    save_file({"deep": model(ids).logits, "shallow": shallow(ids).logits}, out + "/logits.safetensors")
"""
WITHOUT_PACKAGE = """
import sys
from transformers import AutoConfig
sys.modules["mythos"] = None  # any import of it now fails
try:
    AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    assert "pip install mythos-rdt" in str(error), error
else:
    raise AssertionError
"""


def python(program: str, *arguments: str, home: Path) -> None:
    variables = {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=os.environ | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    trainer = run(tiny(folder, train__steps=2, optim__lr=0.02, depth__mean=2))
    export_model(trainer.run_dir, folder / "model")
    return folder / "model"


def test_loading_with_consent(exported: Path, tmp_path: Path) -> None:
    """Logits are those of our own loader, and a model that transformers saves can be loaded in the same way."""
    python(LOAD, str(exported), str(tmp_path / "saved"), home=tmp_path / "home")
    logits = load_file(tmp_path / "saved" / "logits.safetensors")
    opened = open_model(exported)
    ids = torch.arange(24).reshape(2, 12)
    size = logits["deep"].shape[-1]
    with torch.no_grad():
        for name, loops in (("deep", 2), ("shallow", 1)):
            assert torch.equal(logits[name], opened.model(ids, loops=loops).logits[..., :size]), name
    code = {file.name for file in (tmp_path / "saved").glob("*.py")}
    assert code == {"modeling_mythos.py"}, "transformers copies no file of the package"
    values = [json.loads((folder / "config.json").read_text()) for folder in (exported, tmp_path / "saved")]
    assert values[0]["auto_map"] == values[1]["auto_map"]
    assert open_model(tmp_path / "saved").mean_loops == 2


def test_nothing_is_executed_where_mythos_is_imported(exported: Path) -> None:
    for trust in (None, True):
        config = AutoConfig.from_pretrained(exported, trust_remote_code=trust)
        assert type(config).__module__ == "mythos.hf.config"
    code = exported / "modeling_mythos.py"
    text = code.read_text()
    code.write_text("raise AssertionError")
    try:
        AutoConfig.from_pretrained(exported, trust_remote_code=True)
    finally:
        code.write_text(text)


def test_without_the_package(exported: Path, tmp_path: Path) -> None:
    python(WITHOUT_PACKAGE, str(exported), home=tmp_path)
