"""Retrofitted dense models, compared with transformers' model of the same layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mythos.checkpoints.stored_model import open_model
from mythos.cli import main
from mythos.config.loading import load_config
from mythos.errors import MythosError
from mythos.hf.retrofit import DECAY
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics
from tests.runs import settings, tiny
from tests.trainers import run

SIZES: dict[str, Any] = {
    "vocab_size": 200,  # not a multiple of 128
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 0,
}
ALL = ["--prelude", "0-1", "--core", "2-4", "--coda", "5"]


def dense(kind: type[PreTrainedModel] = LlamaForCausalLM, config: type = LlamaConfig, **changes: Any) -> Any:
    """A model with noise in all weights, norms included, large enough for every layer to matter."""
    model = kind(config(**{**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **changes}))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = noise + 1 if parameter.ndim == 1 else noise
    return model.eval()


def published(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tokens = {"</s>": 0} | {f"t{n}": n for n in range(1, SIZES["vocab_size"])}
    PreTrainedTokenizerFast(tokenizer_object=Backend(models.WordLevel(tokens, "t1")), eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def logits_at_one_loop(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return open_model(folder).model(ids, loops=1).logits[..., : SIZES["vocab_size"]]


IDS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
        (Qwen3ForCausalLM, Qwen3Config, {}),
    ],
    ids=["llama", "tied", "mistral", "qwen3"],
)
def test_all_layers_at_one_loop_are_the_dense_model(tmp_path: Path, kind: Any, config: Any, changes: Any) -> None:
    model = dense(kind, config, **changes)
    source = published(tmp_path / "dense", model)
    assert main(["retrofit", str(source), str(tmp_path / "looped"), *ALL]) == 0
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(logits_at_one_loop(tmp_path / "looped", IDS), expected, rtol=1e-4, atol=1e-4)
    looped = open_model(tmp_path / "looped").model
    assert looped.spectral_radius().item() == pytest.approx(DECAY, abs=1e-6)
    with torch.no_grad():
        assert (looped(IDS, loops=2).logits[..., :200] - expected).abs().max() > 0.1


@pytest.mark.parametrize("kept", [[0, 1, 4, 5], [0, 2, 3], [1, 3, 4, 5]])
def test_left_out_layers_are_a_dense_model_without_them(
    tmp_path: Path, kept: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = dense()
    source = published(tmp_path / "dense", model)
    parts = [
        "--prelude",
        str(kept[0]),
        "--core",
        f"{kept[1]},{kept[2]}",
        "--coda",
        str(kept[3]) if kept[3:] else "none",
    ]
    assert main(["retrofit", str(source), str(tmp_path / "looped"), *parts]) == 0
    printed = capsys.readouterr().out
    assert "left out: layers " + ", ".join(str(n) for n in range(6) if n not in kept) in printed
    fewer = dense(num_hidden_layers=len(kept))
    fewer.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "layers." not in name}
        | {
            name.replace(f"layers.{layer}.", f"layers.{place}."): tensor
            for place, layer in enumerate(kept)
            for name, tensor in model.state_dict().items()
            if f"layers.{layer}." in name
        }
    )
    with torch.no_grad():
        expected = fewer(IDS).logits
    torch.testing.assert_close(logits_at_one_loop(tmp_path / "looped", IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_plots")
def test_its_own_configuration_trains_it_on(tmp_path: Path) -> None:
    tokenizer = Trainer(tiny(tmp_path))
    tokenizer.resources.close()
    model = dense(vocab_size=384)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.tokenizer.save(tmp_path / "dense" / "aside")
    folder = tmp_path / "it's: looped"
    aside = str(tmp_path / "dense" / "aside")
    arguments = [str(tmp_path / "dense"), str(folder), *ALL, "--loops", "2", "--tokenizer", aside]
    assert main(["retrofit", *arguments]) == 0
    small = settings(tmp_path)
    overrides = ["train.steps=2", "train.global_batch=8", "train.micro_batch=4", "train.device=cpu", "eval.samples=0"]
    overrides += [
        f"run.dir={tmp_path / 'tuned'}",
        "data.kind=files",
        f"data.path={small['data']['path']}",
        "log.every=1",
    ]
    overrides += ["data.sequence_length=32", "data.workers=0", "data.validation.fraction=0.2", "train.dtype=float32"]
    config = load_config(folder / "train.yaml", overrides)
    assert config.run.name == folder.name and config.train.init_from == str(folder)
    assert (config.model.loops, config.model.core_layers, config.model.halting) == (2, 3, "convergence")
    assert (config.optim.name, config.depth.curriculum.shape, config.depth_backprop) == ("muon", "1-sqrt", 4)
    trainer = run(config)
    first = read_metrics(trainer.run_dir / "metrics.jsonl")[0]
    with pytest.raises(MythosError, match="a dense core has no router"):
        load_config(folder / "train.yaml", [*overrides, "model.router_loop=bias"])
    # A norm that depends on the loop starts as one that does not.
    adaptive = [*overrides, f"run.dir={tmp_path / 'adaptive'}", "train.steps=1", "model.loop_norm=adaptive"]
    adaptive_first = read_metrics(run(load_config(folder / "train.yaml", adaptive)).run_dir / "metrics.jsonl")[0]
    for depth in (1, 4):
        assert adaptive_first[f"val/loss@{depth}"] == pytest.approx(first[f"val/loss@{depth}"], abs=1e-6)
    # With lanes, which start from the state of zeros, a single loop is the dense model too.
    lanes = [*overrides, f"run.dir={tmp_path / 'lanes'}", "train.steps=1", "model.lanes=2"]
    lanes_first = read_metrics(run(load_config(folder / "train.yaml", lanes)).run_dir / "metrics.jsonl")[0]
    assert lanes_first["val/loss@1"] == pytest.approx(first["val/loss@1"], abs=1e-5)
    validation = trainer.validation.ids
    with torch.no_grad():
        logits = model(validation[:, :-1]).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, validation[:, 1:].flatten())
    assert first["val/loss@1"] == pytest.approx(expected.item(), abs=1e-4)


def changed(source: Path, **changes: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(source: Path, name: str) -> None:
    path = source / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0}


@pytest.mark.parametrize(
    ("spoil", "arguments", "says"),
    [
        (None, ["--prelude", "0-1", "--core", "2-6", "--coda", "none"], "it has layers 0 to 5, and 6 was requested"),
        (None, ["--prelude", "0-2", "--core", "2-3", "--coda", "5"], "got layer 2 after layer 2; each layer may"),
        (None, ["--prelude", "3", "--core", "1-2", "--coda", "5"], "got layer 1 after layer 3"),
        (None, ["--prelude", "0", "--core", "none", "--coda", "5"], "--core: got no layers"),
        (None, ["--prelude", "0-x", "--core", "2", "--coda", "5"], "--prelude: got '0-x'; give layers counted from 0"),
        (None, [*ALL, "--decay", "1"], "--decay: got 1; allowed: 0.001 to 0.997"),
        (None, [*ALL, "--loops", "0"], "--loops: got 0; give at least 1"),
        ({"model_type": "gpt2"}, ALL, "model_type 'gpt2'; known: llama, mistral, qwen3"),
        ({"rope_parameters": LLAMA3}, ALL, "rope_scaling: got llama3; allowed: none"),
        ({"attention_bias": True}, ALL, "attention_bias: got True; allowed: False"),
        ({"layer_types": ["sliding_attention"] * 6}, ALL, "layer_types: allowed: full_attention only"),
        ({"intermediate_size": None}, ALL, "intermediate_size is missing"),
        ({"num_hidden_layers": 10**12}, ALL, "its config.json says num_hidden_layers 1000000000000, and there are"),
        ({"hidden_size": 64}, ALL, "which does not give our"),
        (
            {"num_hidden_layers": 5},
            ["--prelude", "0", "--core", "1-3", "--coda", "4"],
            "layers.5.input_layernorm.weight is",
        ),
        ("model.layers.3.mlp.up_proj.weight", ALL, "model.layers.3.mlp.up_proj.weight is missing"),
        ("tokenizer.json", ALL, "has no tokenizer.json: give the model's tokenizer by --tokenizer"),
        ("model.safetensors", ALL, "has no weights"),
        ("out", ALL, "exists and is not empty"),
    ],
)
def test_errors_write_nothing(
    tmp_path: Path, spoil: Any, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = published(tmp_path / "dense", dense()), tmp_path / "out"
    if isinstance(spoil, dict):
        changed(source, **spoil)
    elif spoil == "out":
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    elif spoil and spoil.endswith(".weight"):
        without(source, spoil)
    elif spoil:
        (source / spoil).unlink()
    assert main(["retrofit", str(source), str(out), *arguments]) == 1
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"][: 1 + (spoil == "out")]


def test_biases_of_qwen2_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published(tmp_path / "dense", dense(Qwen2ForCausalLM, Qwen2Config))
    assert main(["retrofit", str(source), str(tmp_path / "out"), *ALL]) == 1
    assert "model_type 'qwen2'; known: llama, mistral, qwen3" in capsys.readouterr().err
