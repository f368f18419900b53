"""PEFT's LoRA: an adapted linear map is adapted everywhere the model uses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mythos.hf import MythosForCausalLM
from tests.hf.test_generate import padded
from tests.hf.test_model import CLOSE, random_ids
from tests.hf.test_trainer import FIELDS, SPLITS, collator, trained
from tests.noise import name_generator

peft = pytest.importorskip("peft")
BuildModel = Callable[..., MythosForCausalLM]

# Latent attention decodes with the weight of key_value_up itself, and the loss uses the weight of the head.
MODELS: dict[str, dict[str, Any]] = {
    "mla": {"q_lora_rank": 8},
    "gqa": {"attention": "gqa", "core_ffn": "dense", "value_embeddings": True},
    "untied": {"tie_embeddings": False, "injection": "linear", "dense_ffn": "relu2"},
}
TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("mla", {"target_modules": "all-linear"}),
    ("mla", {"target_modules": ["key_value_up"]}),
    ("mla", {"target_modules": ["query"], "target_parameters": ["ffn.gate_up", "ffn.down"]}),
    ("gqa", {"target_modules": "all-linear"}),
    ("gqa", {"target_modules": ["query", "out"]}),
    ("untied", {"target_modules": "all-linear"}),
    ("untied", {"target_modules": ["head"]}),
    ("untied", {"target_modules": ["query"], "modules_to_save": ["head"]}),
]


def adapted(model: MythosForCausalLM, options: dict[str, Any], **more: Any) -> Any:
    """A LoRA of the model, with seeded noise in every adapter in place of the initial zeros."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options, **more)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=name_generator(1, name)) * 0.1)
    return wrapped


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "options"), TARGETS, ids=[f"{kind}-{options}" for kind, options in TARGETS])
def test_an_adapter_is_the_merged_model(
    build_model: BuildModel, kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Compared in training, decoding and generation, after saving, loading and merging."""
    model, ids = build_model(**MODELS[kind]), random_ids(2, 9)
    before = model(ids).logits
    model = adapted(model, options)
    logits = model(ids).logits
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(model(ids, use_cache=True).logits, logits, rtol=1e-4, atol=1e-4)
    batch = {**padded([[5, 9, 2, 71, 33], [17]]), "max_new_tokens": 6}
    generated = model.generate(**batch)
    assert torch.equal(generated, model.generate(**batch, use_cache=False))
    loss = model(ids, labels=ids).loss

    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(build_model(**MODELS[kind]), tmp_path).eval()
    assert torch.equal(back(ids).logits, logits)
    merged = back.merge_and_unload()
    assert type(merged) is MythosForCausalLM
    torch.testing.assert_close(merged(ids).logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged(ids, labels=ids).loss, loss, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**batch), generated)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)

    # Gradients by the chain rule from those of the merged weights W + s B A.
    of_merged = gradients(merged.requires_grad_(True), ids)
    scaling = 8 / 4
    for name, gradient in gradients(model, ids).items():
        merged_name = (
            name.removeprefix("base_model.model.").replace(".lora_A.default", "").replace(".lora_B.default", "")
        )
        if ".lora_A." in name and merged_name in of_merged:
            other = model.get_parameter(name.replace("lora_A", "lora_B"))
            torch.testing.assert_close(gradient, scaling * other.T @ of_merged[merged_name], rtol=1e-3, atol=1e-4)
        elif ".lora_B." in name and merged_name in of_merged:
            other = model.get_parameter(name.replace("lora_B", "lora_A"))
            torch.testing.assert_close(gradient, scaling * of_merged[merged_name] @ other.T, rtol=1e-3, atol=1e-4)
        else:
            assert "ffn" in name or "modules_to_save" in name


def test_checkpoints_of_an_adapter_with_dropout(build_model: BuildModel) -> None:
    """Recomputation drops the same elements."""
    model, ids = adapted(build_model(), {"target_modules": "all-linear"}, lora_dropout=0.3).train(), random_ids(2, 9)
    torch.manual_seed(0)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_an_adapter_in_bfloat16(build_model: BuildModel) -> None:
    model, ids = adapted(build_model(core_ffn="dense"), {"target_modules": "all-linear"}), random_ids(2, 9)
    expected = model(ids).logits
    short = model.to(torch.bfloat16)
    for options in ({}, {"use_cache": True}):
        torch.testing.assert_close(
            short(ids, **options).logits, expected, rtol=0, atol=0.05 * expected.std().item() + 0.1
        )


def test_trainer_trains_the_adapter_alone(build_model: BuildModel, tmp_path: Path) -> None:
    """With the model's own objective and padding on either side."""
    losses = []
    for side, size, accumulated in SPLITS:
        model = adapted(build_model(**FIELDS), {"target_modules": "all-linear"})
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses.append(trained(model, tmp_path, size, accumulated, collator(side)))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed and all("lora_" in name for name in changed)
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and losses[0] == pytest.approx(losses[2], abs=2e-4)
    assert losses[0][2] < losses[0][0]
