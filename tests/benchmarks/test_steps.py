"""Configurations of the steps to measure, by name."""

import pytest

from mythos.config.presets import preset_config
from mythos.errors import MythosError
from scripts.benchmarks.steps import SHAPES, configuration
from tests.runs import write_settings


def test_sizes_presets_and_files(tmp_path):
    reference = configuration("reference", ["train.dtype=float32"])
    assert (reference.model.dim, reference.model.n_experts, reference.train.dtype) == (256, 16, "float32")
    assert (reference.tokens_per_step, reference.depth_mean, reference.depth_backprop) == (4 * 256, 8, 8)
    nano = configuration("mythos_nano")
    assert nano.model == preset_config("mythos_nano", vocab_size=4096)
    assert configuration(str(write_settings(tmp_path)), ["model.dim=64"]).model.dim == 64


def test_the_sizes_that_the_documentation_compares():
    reference, wider = (SHAPES[name]["model"] for name in ("reference", "reference-64"))
    assert {name for name in reference if reference[name] != wider[name]} == {
        "n_experts", "experts_per_token", "shared_expert_dim",
    }  # fmt: skip
    wide = configuration("wide")
    assert (wide.model.dim, wide.model.expert_dim, wide.model.loops, wide.tokens_per_step) == (1024, 512, 2, 1024)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("refrence", [], "refrence: neither a YAML file nor a known size; did you mean reference"),
        ("missing.yaml", [], r"missing\.yaml: cannot be read"),
        ("reference", ["model.dmi=1"], "model.dmi: unknown; did you mean dim"),
        ("reference", ["dim"], "dim: not an override"),
        ("mythos_nano", ["tokenizer.name=gpt2"], r"model\.vocab_size: got auto, and the tokenizer is gpt2"),
    ],
)
def test_what_cannot_be_measured(name, overrides, message):
    with pytest.raises(MythosError, match=message):
        configuration(name, overrides)
