"""What is measured: configurations by name, and the trainer's own steps."""

from pathlib import Path

import pytest
import torch

from mythos.benchmarks.steps import SHAPES, Steps, configuration, made_up_batch
from mythos.config.presets import preset_config
from mythos.errors import MythosError
from tests.runs import tiny, write_settings


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


def test_a_step_is_the_trainers_at_its_target_depth(tmp_path):
    config = tiny(tmp_path, model__vocab_size=384)  # a curriculum that starts at one loop
    with Steps(config) as steps:
        trainer, folder = steps.trainer, Path(steps.folder.name)
        before = [parameter.clone() for parameter in trainer.model.parameters()]
        steps()
        changed = sum(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
        assert changed > len(before) // 2 and int(trainer.skipped) == 0
        assert max(steps.loops) > 1 and steps.loops == trainer.schedule.plan(config.train_steps - 1).loops
        # Between steps: weights, two moments and a counter for each, and the router's bias.
        weights = sum(parameter.nbytes for parameter in before)
        assert steps.held_bytes() == 3 * weights + 4 * len(before) + 4 * config.model.n_experts
        assert steps.peak_tensor_bytes() > steps.held_bytes() + weights
        assert folder.exists()
    assert not folder.exists()
    assert not (tmp_path / "run").exists()


def test_made_up_tokens(tmp_path):
    config = tiny(tmp_path, model__vocab_size=384, data__mask_documents=True)
    batch = made_up_batch(config)
    assert batch.ids.shape == (8, 33) and batch.rows.tolist() == list(range(8))
    assert batch.ids.min() >= 0 and batch.ids.max() < 384
    assert batch.document_ids is not None and batch.document_ids[3].unique_consecutive().tolist() == [0, 1, 2, 3]
    with Steps(config) as steps:
        steps()
        assert int(steps.trainer.skipped) == 0
