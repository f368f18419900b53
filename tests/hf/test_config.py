"""The configuration: its fields, their names in transformers, invalid values, and its file."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from mythos.checkpoints.stored_model import HEADER
from mythos.hf import MythosConfig
from mythos.model.config import ModelConfig
from tests.model.conftest import SMALL


def test_every_field_of_the_model_section_comes_back_from_json(tmp_path: Path) -> None:
    changed = {"loops": 5, "attention": "gqa", "halting": "gate", "rope_theta": 5e4, "tie_embeddings": False}
    section = ModelConfig(**{**SMALL, **changed})
    config = MythosConfig(**section.model_dump(), mean_loops=7, step=12, versions={"torch": "2"})
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.keys() >= set(ModelConfig.model_fields) and values["model_type"] == "mythos"
    assert values.keys() - set(ModelConfig.model_fields) <= HEADER  # the keys that open_model skips
    back = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(back, MythosConfig) and back.section() == section
    assert (back.mean_loops, back.step, back.versions) == (7, 12, {"torch": "2"})


def test_names_that_transformers_uses() -> None:
    config = MythosConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, prelude_layers=3)
    section = config.section()
    assert (section.dim, section.n_heads, section.context_length) == (64, 4, 256)
    assert config.hidden_size == 64 and config.max_position_embeddings == 256 and config.vocab_size == 32_000
    assert config.num_hidden_layers == 3 + 1 + 1 and config.mean_loops == config.loops == 8
    assert config.tie_word_embeddings is True and config.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": "wide"}, "dim: Input should be a valid integer"),
        ({"hidden_size": 0, "loops": 0}, r"dim: .*; loops: .*greater than or equal to 1"),
        ({"attention": "gqa", "n_heads": 4, "n_kv_heads": 3}, "n_heads, n_kv_heads: got 4 and 3"),
        ({"vocab_size": "auto"}, "vocab_size: got auto; allowed: the number of token ids"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters: got {'rope_type': 'linear'"),
        ({"attention_dropout": 0.1}, r"attention_dropout: got 0\.1; a mythos model has no such option: leave it out"),
        ({"mean_loops": 0}, "mean_loops: got 0; allowed: a whole number, at least 1"),
    ],
)
def test_what_is_no_configuration(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"no valid configuration of a mythos model: {message}"):
        MythosConfig(**fields)
