"""Calls of transformers and torch users work as on a Llama, or raise an error of one line."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Trainer, set_seed

from mythos.hf import MythosConfig, MythosForCausalLM
from mythos.hf.model import CACHE_NAME
from mythos.model.layers import Linear, applied_weight, initialize
from mythos.model.rdt import RecurrentDepthTransformer
from tests.hf.conftest import VOCABULARY
from tests.hf.test_model import CLOSE, random_ids
from tests.hf.test_trainer import ROWS, arguments, collator
from tests.model.conftest import SMALL

BuildModel = Callable[..., MythosForCausalLM]
FIELDS: list[dict[str, Any]] = [
    {},
    {"attention": "gqa", "core_ffn": "dense", "halting": "gate"},
    {"halting": "act", "lanes": 2},
]
SHORT = [torch.bfloat16, torch.float16]


# Types


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("dtype", SHORT)
def test_a_type_asked_for_later_is_one_asked_for_at_loading(
    build_model: BuildModel, fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = build_model(**fields), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    whole = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert whole
    wrapped = nn.Sequential(copy.deepcopy(model))
    for converted in (copy.deepcopy(model).to(dtype), copy.deepcopy(model).to("cpu", dtype), wrapped.to(dtype)[0]):
        for name, tensor in loaded.state_dict().items():
            assert (
                torch.equal(converted.state_dict()[name], tensor) and converted.state_dict()[name].dtype == tensor.dtype
            )
        assert torch.equal(converted(ids).logits, loaded(ids).logits)
        batch = {"input_ids": ids, "max_new_tokens": 5}
        assert torch.equal(converted.generate(**batch), loaded.generate(**batch))
    named = model.half() if dtype == torch.float16 else model.bfloat16()
    assert torch.equal(named(ids).logits, loaded(ids).logits)
    named(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for name, p in named.named_parameters() if "halting" not in name)


def test_float64_is_float32_and_said(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("mythos.hf.model.logger.warning", warnings.append)
    model, ids = build_model(), random_ids(1, 5)
    expected = model(ids).logits
    assert torch.equal(model.double()(ids).logits, expected)
    assert all(tensor.dtype != torch.float64 for tensor in model.state_dict().values())
    assert warnings == ["float64: a mythos model computes in float32, bfloat16 or float16; its weights stay float32"]
    model.model.embedding.weight.data = model.model.embedding.weight.data.double()
    with pytest.raises(ValueError, match=r"weights: got torch\.float64; allowed: float32, bfloat16 or float16"):
        model(ids)


def test_gradients_have_the_types_of_their_parameters(build_model: BuildModel) -> None:
    model, ids = build_model(), random_ids(2, 5)
    for convert in (model.bfloat16, model.float, model.double, model.half):
        model(ids, labels=ids).loss.backward()
        convert()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    assert any(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_validation_in_bfloat16(build_model: BuildModel, tmp_path: Path) -> None:
    model = build_model()
    losses = []
    for options in ({}, {"bf16_full_eval": True}, {"fp16_full_eval": True}):
        settings = arguments(tmp_path, 4, 1, **options)
        trainer = Trainer(copy.deepcopy(model), settings, eval_dataset=ROWS, data_collator=collator("left"))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=0.05) and len(set(losses)) == 3


def test_ways_to_load(build_model: BuildModel, tmp_path: Path) -> None:
    model, ids = build_model(tie_embeddings=False), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    expected = model(ids).logits
    for options in ({"low_cpu_mem_usage": True}, {"dtype": "auto"}, {"attn_implementation": "sdpa"}):
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path, **options)(ids).logits, expected)


# Copies


def logits_of(model: MythosForCausalLM, ids: Tensor) -> Tensor:
    return model(ids).logits.detach()


@pytest.mark.parametrize("fields", [*FIELDS, {"injection": "linear", "loop_embedding": True, "tie_embeddings": False}])
def test_a_model_can_be_pickled(build_model: BuildModel, fields: dict[str, Any]) -> None:
    model, ids = build_model(**fields), random_ids(2, 9)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)]
    for copied in copies:
        assert torch.equal(logits_of(copied, ids), logits_of(model, ids))
        # Initial values are functions of a seed and a name, for every model.
        first = initialize_all(copied.model).state_dict()
        again = initialize_all(RecurrentDepthTransformer(model.model.config)).state_dict()
        assert all(torch.equal(first[name], value) for name, value in again.items())
    cache = pickle.loads(pickle.dumps(model(ids, use_cache=True)[CACHE_NAME]))
    assert cache.get_seq_length() == 9


def initialize_all(model: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    initialize(model, 5)
    return model


def test_a_spawned_process_takes_a_model(build_model: BuildModel) -> None:
    model, ids = build_model(), random_ids(1, 5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.apply(logits_of, (model, ids)), logits_of(model, ids))


# Linear maps


def test_our_linear_is_torchs() -> None:
    set_seed(3)
    expected = torch.rand(1)
    set_seed(3)
    linear = Linear(5, 7)
    assert torch.equal(torch.rand(1), expected)  # building it draws nothing from torch's generator
    assert isinstance(linear, nn.Linear) and linear.bias is None
    assert list(linear.state_dict()) == ["weight"] and (linear.in_features, linear.out_features) == (5, 7)
    nn.init.normal_(linear.weight)
    assert applied_weight(linear) is linear.weight
    plain = nn.Linear(5, 7, bias=False)
    torch.testing.assert_close(applied_weight(plain), plain.weight, **CLOSE)


# Arguments


def test_unknown_arguments_are_ignored_with_a_warning(build_model: BuildModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build_model(), random_ids(2, 6)
    expected = model(ids).logits
    warnings: list[str] = []
    monkeypatch.setattr("mythos.hf.model.logger.warning_once", warnings.append)
    nothing = {"output_attentions": None, "output_hidden_states": False, "inputs_embeds": None, "return_dict": True}
    for options in (nothing, {"token_type_ids": torch.ones_like(ids)}, {"tokenizer": "any", "skip_logits": True}):
        assert torch.equal(model(ids, **options).logits, expected) and not warnings
    assert torch.equal(model(ids, num_loop=2, length=torch.tensor([6, 6])).logits, expected)
    assert [message.split(":")[0] for message in warnings] == ["length", "num_loop"]
    assert torch.equal(model(ids, None, None, None).logits, expected)  # the same order of arguments as Llama
    with pytest.raises(ValueError, match=r"`model_kwargs` are not used by the model: \['num_loop'\]"):
        model.generate(ids, num_loop=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("output_router_logits", True),
        ("inputs_embeds", torch.zeros(1, 4, 32)),
    ],
)
def test_what_is_not_offered_is_refused(build_model: BuildModel, name: str, value: Any) -> None:
    """In a call, in generate and, if it is a field of it, in the configuration."""
    model, ids = build_model(), random_ids(1, 4)
    with pytest.raises(ValueError, match=f"^{name}: a mythos model does not offer it: .*[^\n]*$"):
        model(ids, **{name: value})
    if name.startswith("output_"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **{name: value})
        if name != "output_attentions":  # the configuration itself refuses it
            setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"^{name}: "):
            model(ids, **({} if getattr(model.config, name, False) else {name: value}))
    with pytest.raises(ValueError, match="is_causal: got False; a mythos model is causal"):
        build_model()(ids, is_causal=False)


@pytest.mark.parametrize("fields", [{"coda_layers": 2}, {"attention": "gqa", "coda_layers": 0}, {"halting": "act"}])
def test_hidden_states(build_model: BuildModel, fields: dict[str, Any]) -> None:
    """Compared with calling the model's parts one by one, and the head on the last state."""
    model, ids = build_model(**fields), random_ids(2, 6)
    output = model(ids, output_hidden_states=True)
    own, states = model.model, output.hidden_states
    context = own.context(ids)
    expected = [own.embedding(ids)]
    for index, block in enumerate(own.prelude):
        expected.append(block(expected[-1], context.layer("prelude", index))[0])
    e = own.encode(ids, context)
    own.recurrence(e, torch.zeros_like(e), [4, 4], 4, context, lambda after: expected.append(after.state))
    assert len(states) == 1 + len(own.prelude) + 4 + len(own.coda)
    torch.testing.assert_close(list(states[: len(expected) - 1]), expected[:-1], **CLOSE)
    assert torch.equal(torch.nn.functional.linear(states[-1], own.head_weight[:VOCABULARY]), output.logits)
    assert torch.equal(output.logits, model(ids).logits) and model(ids).hidden_states is None

    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for row, real in enumerate(mask.bool()):
        alone = model(ids[row, real][None], output_hidden_states=True).hidden_states
        torch.testing.assert_close([x[row, real] for x in padded], [x[0] for x in alone], **CLOSE)
    for options in ({"use_cache": True}, {"use_cache": True, "num_loops": 2}):
        with pytest.raises(ValueError, match="output_hidden_states: decoding packs positions"):
            model(ids, output_hidden_states=True, **options)
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="output_hidden_states: decoding packs positions"):
        model.generate(ids, **options)
    assert len(model.generate(ids, use_cache=False, **options).hidden_states) == 2


def test_prompts_that_are_empty(build_model: BuildModel) -> None:
    model, nothing = build_model(), torch.zeros(1, 0, dtype=torch.int64)
    for call in (model, lambda ids: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(
            ValueError, match=r"(input_ids: got ids of shape|attention_mask: row 0 holds no token).* at least"
        ):
            call(nothing)
    with pytest.raises(ValueError, match="input_ids: got none"):
        model()
    ids, mask = random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    for cached in (True, False):
        with pytest.raises(ValueError, match="attention_mask: row 1 holds no token; give every prompt at least one"):
            model.generate(ids, attention_mask=mask, max_new_tokens=2, use_cache=cached)
    # Without a prompt it starts from the token that the configuration names.
    generated = model.generate(max_new_tokens=4, bos_token_id=7)
    assert torch.equal(generated, model.generate(torch.tensor([[7]]), max_new_tokens=4))


def test_stop_strings_and_what_tokenizers_return(build_model: BuildModel) -> None:
    model, tokenizer = build_model(vocab_size=300), text_tokenizer()
    batch = tokenizer("word 7", return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in batch
    start = batch["input_ids"].shape[1]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefgh"]
    options = {"max_new_tokens": 8, "suppress_tokens": sorted(set(range(300)) - set(letters))}
    free = model.generate(**batch, **options)[0, start:].tolist()
    stop = tokenizer.decode(free[2:4])
    first = tokenizer.decode(free).index(stop) + len(stop)
    generated = model.generate(**batch, **options, stop_strings=[stop], tokenizer=tokenizer)[0, start:]
    assert generated.tolist() == free[:first]
    everything = tokenizer("word 7", return_tensors="pt", return_special_tokens_mask=True, return_length=True)
    assert torch.equal(model(**everything).logits, model(batch["input_ids"]).logits)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and some pairs of bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([f"word {n} follows word {n - 1}" for n in range(100)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_generation_that_is_refused(build_model: BuildModel) -> None:
    model, ids = build_model(), random_ids(1, 4)
    settings = GenerationConfig(max_new_tokens=2, eos_token_id=3)
    message = "continuous batching keeps keys and values in pages that have no place for loops"
    for call in (
        lambda: model.generate_batch([[1, 2]], generation_config=settings),
        lambda: model.init_continuous_batching(settings),
        lambda: model.continuous_batching_context_manager(settings),
        lambda: model.generate(ids, cache_implementation="paged"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="assistant_early_exit: a mythos model has no exit after a layer"):
        model.generate(ids, assistant_early_exit=1)
    with pytest.raises(ValueError, match="the embedding of a mythos model cannot become a Embedding"):
        model.set_input_embeddings(nn.Embedding(128, 32))
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))


def test_layers_of_a_configuration_are_set_by_their_parts() -> None:
    config = MythosConfig(**{**SMALL, "num_hidden_layers": 4})
    assert config.num_hidden_layers == 1 + 2 + 1
    config.num_hidden_layers = 4
    message = (
        "num_hidden_layers: got 3, but prelude_layers, core_layers and coda_layers add up to 4; set those three instead"
    )
    with pytest.raises(ValueError, match=message):
        config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=message):
        MythosConfig(**SMALL, num_hidden_layers=3)
    config.hidden_size, config.num_attention_heads, config.max_position_embeddings = 64, 8, 77
    config.intermediate_size, config.num_key_value_heads, config.rms_norm_eps = 96, 4, 1e-5
    section = config.section()
    assert (section.dim, section.n_heads, section.context_length) == (64, 8, 77)
    assert (section.ffn_dim, section.n_kv_heads, section.norm_eps) == (96, 4, 1e-5)
