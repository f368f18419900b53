"""`import mythos` registers our model with transformers' Auto classes in any import order, and imports little."""

import subprocess
import sys

MYTHOS_FIRST = """
import sys
import mythos
assert not {"torch", "transformers", "pydantic"} & set(sys.modules), "import mythos is to be cheap"
from transformers import AutoTokenizer
assert "transformers.modeling_utils" not in sys.modules, "a tokenizer needs no models"
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("mythos", dim=64)
assert config.hidden_size == 64
import torch
with torch.device("meta"):
    model = AutoModelForCausalLM.from_config(config)
assert type(model).__module__ == "mythos.hf.model"
"""
TRANSFORMERS_FIRST = """
from transformers import AutoConfig
import mythos
assert AutoConfig.for_model("mythos", dim=64).hidden_size == 64
"""


def test_registration() -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
        for program in (MYTHOS_FIRST, TRANSFORMERS_FIRST)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
