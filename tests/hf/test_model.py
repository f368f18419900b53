"""The transformers model: logits, loss, padding, caches, loading and saving, and fine-tuning."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Trainer, TrainingArguments, set_seed

from mythos.hf import MythosCache, MythosConfig, MythosForCausalLM
from mythos.hf.model import CACHE_NAME
from tests.hf.conftest import CONTEXT, VOCABULARY
from tests.model.conftest import SMALL
from tests.model.slow_decode import SlowRow, converged

BuildModel = Callable[..., MythosForCausalLM]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


# One forward pass


@pytest.mark.parametrize("fields", [{}, {"attention": "gqa", "tie_embeddings": False}, {"halting": "act"}])
def test_logits_are_the_models_own(build_model: BuildModel, fields: dict[str, Any]) -> None:
    model, ids = build_model(**fields), random_ids(3, 9)
    for loops in (1, 4, 6):
        own = model.model(ids, loops=loops).logits
        assert torch.equal(model(ids, num_loops=loops).logits, own[..., :VOCABULARY])
    assert own.shape[-1] == 128  # includes the rows that pad the embedding
    assert torch.equal(model(ids).logits, model.model(ids, loops=model.config.mean_loops).logits[..., :VOCABULARY])
    assert isinstance(model(ids, return_dict=False), tuple)


def test_loss_and_gradients_are_those_of_pretraining(build_model: BuildModel) -> None:
    """Compared with the sum of -log p(next token) and with the trainer's objective."""
    ids = random_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    for vocabulary in (VOCABULARY, 128):  # with and without rows that pad the embedding
        model = build_model(vocab_size=vocabulary)
        output = model(ids, labels=labels)
        logs = model.model(ids).logits[..., :vocabulary].log_softmax(-1)
        places = [(row, at) for row in range(2) for at in range(8) if labels[row, at + 1] != -100]
        expected = -sum(logs[row, at, labels[row, at + 1]] for row, at in places) / len(places)
        torch.testing.assert_close(output.loss, expected, **CLOSE)
        torch.testing.assert_close(model(ids, labels=labels, use_cache=True).loss, expected, **CLOSE)
        assert output.logits.shape == (2, 9, vocabulary)
        torch.testing.assert_close(
            model(ids, labels=labels, num_items_in_batch=5).loss, expected * len(places) / 5, **CLOSE
        )

    output.loss.backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters()}
    model.zero_grad()
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    (model.model(ids, targets).loss / len(places)).backward()
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"exit_threshold": 0.3}])
@pytest.mark.parametrize("fields", [{}, {"attention": "gqa", "core_ffn": "dense"}])
def test_padding_changes_nothing(build_model: BuildModel, fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Padding on the left, on the right and in between, compared with every row by itself."""
    model = build_model(**fields)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1, 0], [1] * 7])
    ids = random_ids(4, 7)
    labels = ids.masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, **options).logits
    last = model(ids, attention_mask=mask, logits_to_keep=1, **options).logits
    losses = []
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None], labels=ids[row, real][None], **options)
        torch.testing.assert_close(output[row, real], alone.logits[0], **CLOSE)
        torch.testing.assert_close(last[row, 0], alone.logits[0, -1], **CLOSE)
        losses.append(alone.loss * (real.sum() - 1))
    padded = [0, 1, 3]  # in a row with gaps, nothing predicts the label after a gap
    loss = model(ids[padded], attention_mask=mask[padded], labels=labels[padded], **options).loss
    torch.testing.assert_close(loss, sum(losses[row] for row in padded) / (3 + 3 + 6), **CLOSE)


def test_positions_stop_at_the_threshold(build_model: BuildModel) -> None:
    """Compared with every position run by itself, in order, in float64."""
    model, ids = build_model(), random_ids(1, 6)
    slow = SlowRow(model.model, converged(0.4))
    expected, taken = zip(*(slow.append(token, 5) for token in ids[0].tolist()), strict=True)
    assert len(set(taken)) > 1
    output = model(ids, num_loops=5, exit_threshold=0.4)
    torch.testing.assert_close(output.logits[0].double(), torch.stack(expected)[:, :VOCABULARY], **CLOSE)
    assert output.get(CACHE_NAME) is None


def test_logits_to_keep(model: MythosForCausalLM) -> None:
    ids = random_ids(2, 6)
    whole = model(ids).logits
    for keep, kept in ((1, whole[:, -1:]), (3, whole[:, -3:]), (torch.tensor([0, 4]), whole[:, [0, 4]])):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, kept, **CLOSE)
        torch.testing.assert_close(model(ids, logits_to_keep=keep, use_cache=True).logits, kept, **CLOSE)


# Caches


def test_a_cache_continues_at_its_length(model: MythosForCausalLM) -> None:
    """Caches filled in pieces, copied, cropped, reordered and repeated; `past_key_values` is an older name."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :2] = 0
    whole = model(ids, attention_mask=mask).logits
    first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
    cache = first[CACHE_NAME]
    assert isinstance(cache, MythosCache) and cache.get_seq_length() == 4 and cache.get_max_length() == CONTEXT
    kept = copy.deepcopy(cache)
    second = model(ids[:, 4:], attention_mask=mask, cache=cache)
    assert second[CACHE_NAME] is cache and cache.get_seq_length() == 9
    joined = torch.cat((first.logits, second.logits), 1)
    torch.testing.assert_close(joined[mask.bool()], whole[mask.bool()], **CLOSE)
    assert kept.get_seq_length() == 4
    model(random_ids(2, 5, seed=5), cache=copy.deepcopy(kept))  # must not change the original
    cache.crop(-1)
    torch.testing.assert_close(model(ids[:, 8:], cache=cache).logits, whole[:, 8:], **CLOSE)
    assert torch.equal(model(ids[:, 4:], past_key_values=kept, attention_mask=mask).logits, second.logits)

    kept.crop(-3)
    again = model(ids[:, 6:], attention_mask=mask, cache=kept).logits
    torch.testing.assert_close(again, whole[:, 6:], **CLOSE)
    kept.crop(6)  # the length to keep, as in older versions of transformers
    kept.reorder_cache(torch.tensor([1, 0]))
    kept.batch_repeat_interleave(2)
    kept.batch_select_indices(torch.tensor([0, 2, 3]))
    rows = [1, 0, 0]
    torch.testing.assert_close(model(ids[rows, 6:], cache=kept).logits, whole[rows, 6:], **CLOSE)
    kept.crop(-2)
    torch.testing.assert_close(model(ids[rows, 7:], cache=kept).logits, whole[rows, 7:], **CLOSE)
    with pytest.raises(ValueError, match="cannot crop a cache of 9 columns to -1"):
        kept.crop(-10)
    kept.reset()
    assert kept.get_seq_length() == 0
    torch.testing.assert_close(model(ids[:1], cache=kept).logits, whole[:1], **CLOSE)


def test_padding_may_come_later(model: MythosForCausalLM) -> None:
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 3:5] = 0
    cache = model(ids[:, :3], use_cache=True)[CACHE_NAME]
    output = model(ids[:, 3:], attention_mask=mask, cache=cache).logits
    alone = model(ids[1:, [0, 1, 2, 5]]).logits
    torch.testing.assert_close(output[1, -1], alone[0, -1], **CLOSE)
    cache.crop(-3)
    torch.testing.assert_close(model(ids[:, 3:], cache=cache).logits, model(ids).logits[:, 3:], **CLOSE)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_loops": 0}, "num_loops: got 0; allowed: a whole number, at least 1"),
        ({"num_loops": 2.0}, r"num_loops: got 2\.0"),
        ({"exit_threshold": 0.0}, "exit threshold of convergence: got 0; allowed: a number above 0"),
        ({"exit_threshold": "low"}, "exit_threshold: got 'low'"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: got shape \(1, 3\); allowed: \(1, 4\)"),
        ({"past_key_values": DynamicCache()}, "got a DynamicCache; allowed: the MythosCache of a forward pass"),
    ],
)
def test_arguments_that_are_refused(model: MythosForCausalLM, options: dict[str, Any], message: str) -> None:
    for call in (model, model.generate):
        if call is model or not isinstance(next(iter(options.values())), Tensor | DynamicCache):
            with pytest.raises(ValueError, match=message):
                call(random_ids(1, 4), **options)


def test_what_is_refused(build_model: BuildModel, model: MythosForCausalLM) -> None:
    long, ids = random_ids(1, CONTEXT + 1), random_ids(1, 4)
    with pytest.raises(ValueError, match=f"an input of {CONTEXT + 1} tokens: the model's context is {CONTEXT} "):
        model(long)
    cache = model(long[:, :CONTEXT], use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=f"a row of {CONTEXT + 1} tokens: the model's context is {CONTEXT} "):
        model(long[:, CONTEXT:], cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1\); .* the 40 of the cache included"):
        model(long[:, CONTEXT:], cache=cache, attention_mask=torch.ones(1, 1))
    for other in (build_model(), build_model(loops=2)):
        with pytest.raises(ValueError, match="this cache holds the keys and values of another model"):
            other(ids, cache=model(ids, use_cache=True)[CACHE_NAME])
    with pytest.raises(ValueError, match="2 rows of ids for a cache of 1 rows"):
        model(random_ids(2, 1), cache=model(ids, use_cache=True)[CACHE_NAME])
    with pytest.raises(ValueError, match=r"exit threshold 0\.1: halting is none, and a threshold needs a rule"):
        build_model(halting="none")(ids, exit_threshold=0.1)
    with pytest.raises(ValueError, match=r"exit threshold of act: got 1\.5; allowed: above 0 and at most 1"):
        build_model(halting="act")(ids, exit_threshold=1.5)
    with pytest.raises(ValueError, match="loops 2: a fixed-depth model"):
        build_model(injection="none", loops=1, lora_rank=0)(ids, num_loops=2)
    with pytest.raises(ValueError, match="the vocabulary of a mythos model cannot be resized: it has 100 token ids"):
        model.resize_token_embeddings(200)
    with pytest.raises(ValueError, match="the weights are on no device: a mythos model is not offloaded"):
        MythosForCausalLM(model.config).to("meta")(ids)
    training = build_model().train()
    for options in ({"use_cache": True}, {"exit_threshold": 0.1}):
        with pytest.raises(ValueError, match=r"carry no gradient: .*, or call model\.eval\(\) before"):
            training(ids, **options)
    with torch.no_grad():
        assert training(ids, use_cache=True)[CACHE_NAME] is not None


# Loading and saving


BY_LOOP = {"router_loop": "bias", "router_bias_per_loop": True, "loop_norm": "adaptive", "residual_scale": 0.25}


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_embeddings": False, "halting": "gate", "loop_embedding": True, "lanes": 2}, {**BY_LOOP, "loops": 3}],
)
def test_saved_in_shards_and_loaded_alike(build_model: BuildModel, fields: dict[str, Any], tmp_path: Path) -> None:
    model, ids = build_model(**fields), random_ids(2, 9)
    model.generation_config = GenerationConfig(num_loops=3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(back) is MythosForCausalLM and not back.training and back.generation_config.num_loops == 3
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert (back.get_output_embeddings() is None) == fields.get(
        "tie_embeddings", True
    ) and back.get_input_embeddings() is back.model.embedding
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(placed(ids).logits, model(ids).logits)


def test_in_bfloat16_what_must_not_be_rounded_is_not(build_model: BuildModel, tmp_path: Path) -> None:
    model, ids = build_model(halting="gate"), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    short = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    whole = {name for name, tensor in short.state_dict().items() if tensor.dtype == torch.float32}
    for name, tensor in short.state_dict().items():
        rounded = model.state_dict()[name].to(torch.bfloat16 if name not in whole else torch.float32)
        assert torch.equal(tensor, rounded)
    float32_parts = ("norm.weight", "router.", "injection.", "adapter.scale", "halting.")
    assert whole == {name for name in model.state_dict() if any(part in name for part in float32_parts)}

    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).state_dict()
    assert {name for name, tensor in fresh.items() if tensor.dtype == torch.float32} == whole

    rounded = copy.deepcopy(model)
    rounded.load_state_dict(short.state_dict())  # into float32
    with torch.autocast("cpu", torch.bfloat16):
        expected = rounded(ids).logits
        continued = rounded(ids, use_cache=True).logits
    assert torch.equal(short(ids).logits, expected)
    cached = short(ids, use_cache=True)
    assert torch.equal(cached.logits, continued) and cached[CACHE_NAME].decode.entries.dtype == torch.bfloat16
    short(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for name, p in short.named_parameters() if "halting" not in name)


def test_new_weights_are_those_of_pretraining(tmp_path: Path) -> None:
    """Initial values from a configuration, and of tensors missing in a file: their spread, and zeros."""
    config = MythosConfig(**{**SMALL, "dim": 64, "vocab_size": 1024})
    state_dicts = {}
    for seed in (0, 0, 1):
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        state_dicts.setdefault(seed, []).append(model.state_dict())
    first, again = state_dicts[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    own = {f"model.{name}": p for name, p in model.model.initialize(3).state_dict().items()}
    for name, value in first.items():
        spread = [x.std().item() if x.numel() > 1 else 0.0 for x in (value, own[name])]
        assert spread[0] == pytest.approx(spread[1], rel=0.25, abs=1e-7), name
        torch.testing.assert_close(value.mean(), own[name].mean(), rtol=0, atol=max(0.3 * spread[1], 1e-6))
    name = "model.prelude.0.attention.query.weight"
    assert not torch.equal(state_dicts[1][0][name], first[name])

    model.save_pretrained(tmp_path)
    save_file({key: x for key, x in load_file(tmp_path / "model.safetensors").items() if key != name}, tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "model.safetensors")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    filled = back.state_dict()
    assert filled[name].std().item() == pytest.approx(first[name].std().item(), rel=0.2)
    assert all(torch.equal(filled[key], x) for key, x in model.state_dict().items() if key != name)


# Fine-tuning


def test_gradient_checkpointing_is_that_of_the_loop(build_model: BuildModel) -> None:
    model, ids = build_model().train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.model.recurrence.checkpointing == "loop" and model.is_gradient_checkpointing
    steps = []
    step = model.model.recurrence.step
    model.model.recurrence.step = lambda *args: steps.append(0) or step(*args)
    model(ids, labels=ids).loss.backward()
    assert len(steps) == 2 * model.config.mean_loops  # once forward, once recomputed in the backward pass
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], **CLOSE)
    model.gradient_checkpointing_disable()
    assert model.model.recurrence.checkpointing == "none" and not model.is_gradient_checkpointing


def test_trainer(build_model: BuildModel, tmp_path: Path) -> None:
    """Three steps of two micro-batches each, compared with plain gradient descent on the inner model."""
    model = build_model(vocab_size=128)
    reference = copy.deepcopy(model.model)
    rows = [
        {"input_ids": row, "labels": row.where(torch.arange(9) > n, -100)} for n, row in enumerate(random_ids(4, 9))
    ]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        gradient_checkpointing=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()

    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses = []
    for _ in range(3):
        loss = reference(ids, targets, loops=4).loss / (targets != -100).sum()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert logged == pytest.approx(losses, abs=2e-4) and losses[2] < losses[0] - 0.01
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(model.model.get_parameter(name), parameter, **CLOSE)
