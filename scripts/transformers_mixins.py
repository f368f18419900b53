"""Run transformers' own common tests on our class: `ModelTesterMixin` and, if it exists, `GenerationTesterMixin`.

The wheel of transformers does not contain them. Its source distribution has the former, a clone of the repository both:

    pip download --no-binary :all: --no-deps transformers==VERSION
    tar xzf transformers-*.tar.gz && pip install parameterized
    python scripts/transformers_mixins.py transformers-*/ [pytest's options]

`SKIPPED` and docs/huggingface.md say which tests are skipped, and why. Exits with pytest's status.
"""

import importlib
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

import mythos  # noqa: F401
from mythos.hf import MythosConfig, MythosForCausalLM

FIELDS: dict[str, Any] = {
    "vocab_size": 128,
    "dim": 32,
    "ffn_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "attention": "gqa",
    "core_ffn": "dense",
    "prelude_layers": 1,
    "core_layers": 1,
    "coda_layers": 0,
    "loops": 2,
    "lora_rank": 2,
    "context_length": 128,
    "halting": "none",
}
"""Fields of the small model."""

CASES: dict[str, dict[str, Any]] = {
    "TestDense": {},
    "TestMixture": {
        "attention": "mla",
        "kv_lora_rank": 16,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "core_ffn": "moe",
        "n_experts": 4,
        "expert_dim": 24,
        "shared_expert_dim": 24,
        "tie_embeddings": False,
    },
}
"""Test classes, and the fields in which their models differ from `FIELDS`."""

NOT_EMBEDDED = "the decode cache and value embeddings need token ids: no inputs_embeds"
NOT_A_LAYER = "checkpointing recomputes a pass of the loop, not a GradientCheckpointingLayer (tests/hf/test_model.py)"
CACHED_STATES = "it asks for hidden states together with a cache (assisted decoding: tests/hf/test_generate.py)"
SKIPPED: dict[str, str] = {
    "test_generate_from_inputs_embeds_0_greedy": NOT_EMBEDDED,
    "test_generate_from_inputs_embeds_1_beam_search": NOT_EMBEDDED,
    "test_generate_from_random_inputs_embeds": NOT_EMBEDDED,
    "test_gradient_checkpointing_enable_disable": NOT_A_LAYER,
    "test_training_gradient_checkpointing": NOT_A_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_false": NOT_A_LAYER,
    "test_training_gradient_checkpointing_use_reentrant_true": NOT_A_LAYER,
    "test_assisted_decoding_matches_greedy_search_0_random": CACHED_STATES,
    "test_assisted_decoding_matches_greedy_search_1_same": CACHED_STATES,
    "test_assisted_decoding_sample": CACHED_STATES,
    "test_beam_search_generate_dict_outputs_use_cache": CACHED_STATES,
    "test_greedy_generate_dict_outputs_use_cache": CACHED_STATES,
    "test_past_key_values_format": "a MythosCache keeps all layers and loops in one tensor",
    "test_model_get_set_embeddings": "the embedding scales its rows, so it is not an nn.Embedding",
}
"""Tests of features that a mythos model does not have."""

WITHOUT_ATTENTIONS = (
    "test_attention_outputs",
    "test_beam_sample_generate_dict_output",
    "test_beam_search_generate_dict_output",
    "test_greedy_generate_dict_outputs",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_sample_generate_dict_output",
)
"""Tests that ask for attention weights if `has_attentions` is true."""


class ModelTester:
    """Provides the small model and the batch that the mixins use."""

    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = FIELDS["dim"], 2, FIELDS["n_heads"]
    expected_num_hidden_layers = 4  # hidden states: the embedding, one prelude block, two loops
    vocab_size = FIELDS["vocab_size"]

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = {**FIELDS, **fields}

    def get_config(self) -> MythosConfig:
        """The configuration of the small model."""
        config = MythosConfig(**self.fields, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        config.use_cache = True  # unused by mythos, but without it tests of caches are skipped
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[MythosConfig, dict[str, torch.Tensor]]:
        """Configuration and arguments of `forward`."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def import_or_replace(module: str, mixin: str) -> bool:
    """Import a module of transformers' tests; if it is missing, register a module with an empty mixin instead.

    Returns whether the module exists.
    """
    try:
        importlib.import_module(module)
        return True
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
    package, _, _ = module.rpartition(".")
    for name in (package, module):
        sys.modules.setdefault(name, types.ModuleType(name))
    setattr(sys.modules[module], mixin, type(mixin, (), {}))
    return False


def build(sources: Path) -> dict[str, type[unittest.TestCase]]:
    """Create the test classes from the mixins in `sources`; returns them by name."""
    sys.path.insert(0, str(sources.resolve()))
    import_or_replace("tests.exporters.test_export", "ExportTesterMixin")
    generation = import_or_replace("tests.generation.test_utils", "GenerationTesterMixin")
    common = importlib.import_module("tests.test_modeling_common")
    mixins = [common.ModelTesterMixin]
    if generation:
        mixins.append(importlib.import_module("tests.generation.test_utils").GenerationTesterMixin)
    else:
        print(f"{sources} has no tests/generation/test_utils.py: the tests of generation are left out", flush=True)

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(CASES[type(self).__name__])
        self.has_attentions = not self._testMethodName.startswith(WITHOUT_ATTENTIONS)

    body: dict[str, Any] = {
        "all_model_classes": (MythosForCausalLM,),
        "test_resize_embeddings": False,
        "setUp": set_up,
    }
    if not generation:
        body["all_generative_model_classes"] = ()
    for name, why in SKIPPED.items():
        body[name] = unittest.skip(why)(lambda self: None)
    return {name: type(name, (*mixins, unittest.TestCase), dict(body)) for name in CASES}


class Plugin:
    """Adds the test classes to this file when pytest collects it."""

    def __init__(self, cases: dict[str, type[unittest.TestCase]]) -> None:
        self.cases = cases

    def pytest_pycollect_makemodule(self, module_path: Path, parent: Any) -> None:
        """Add the classes to the module that pytest imports."""
        vars(importlib.import_module(module_path.stem)).update(self.cases)


def main() -> int:
    """Run the tests; returns pytest's status."""
    sources, *options = sys.argv[1:]
    sys.modules["transformers_mixins"] = sys.modules["__main__"]
    cases = build(Path(sources))
    here = Path(__file__).resolve()
    return pytest.main(
        ["-c", "/dev/null", "--rootdir", str(here.parent), "-p", "no:cacheprovider", "-q", "-rs", *options, str(here)],
        plugins=[Plugin(cases)],
    )


if __name__ == "__main__":
    sys.exit(main())
