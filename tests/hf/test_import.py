"""Imports of published looped models: logits equal their equations, and errors."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mythos.checkpoints.stored_model import open_model
from mythos.cli import main
from mythos.config.presets import preset_config
from mythos.errors import MythosError
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate
from mythos.hf import foreign, importing
from mythos.hf.importers import KNOWN, architecture_of
from mythos.hf.importers.ouro import map_ouro
from mythos.hf.importers.parcae import map_parcae, within_bounds
from mythos.hf.importing import import_model
from mythos.model.cache import DecodeCache
from mythos.model.config import ModelConfig
from mythos.model.injection import DT_BOUNDS, LOG_A_BOUNDS
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.flops import count_parameters
from tests.hf.published import OURO, PARCAE, PUBLISHED, Published, published

LENGTH = 9


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Published, Path]]:
    """Every published model and its folder."""
    folder = tmp_path_factory.mktemp("published")
    models = {name: published(name) for name in PUBLISHED}
    return {name: (model, model.save(folder / str(place))) for place, (name, model) in enumerate(models.items())}


@pytest.fixture
def parcae(sources: dict[str, tuple[Published, Path]], tmp_path: Path) -> Path:
    """A copy of one folder, for tests that damage it."""
    shutil.copytree(sources["parcae"][1], tmp_path / "source")
    return tmp_path / "source"


def some_ids(size: int) -> list[int]:
    return torch.randint(size, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_those_of_the_equations(
    sources: dict[str, tuple[Published, Path]], tmp_path: Path, name: str
) -> None:
    reference, source = sources[name]
    import_model(source, tmp_path / "out")
    opened = open_model(tmp_path / "out")
    size = int(opened.model.config.vocab_size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = some_ids(size)
    for loops in (1, 4, 8):
        expected = reference.logits(ids, loops)[:, :size]
        rows = torch.tensor([ids])
        with torch.no_grad():
            full = opened.model(rows, loops=loops).logits[0, :, :size]
            by_transformers = loaded(rows, num_loops=loops).logits[0]
        cache = DecodeCache(opened.model.config, 1, loops=loops)
        pieces = [
            opened.model.extend(piece, cache, loops=loops, logits="all").logits for piece in rows.split((5, 1, 3), 1)
        ]
        cached = torch.cat(pieces, dim=1)[0, :, :size]
        print(f"{name}, {loops} loops: {(full - expected).abs().max():.1e} of {expected.std():.2f}")
        for output in (full, by_transformers, cached):
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-4)
    assert (opened.mean_loops, opened.step, opened.tokenizer) == (reference_loops(reference), 0, None)


def reference_loops(reference: Published) -> int:
    return reference.values.get("mean_recurrence") or reference.values["total_ut_steps"]


@pytest.mark.parametrize("size", ["140m", "370m", "770m", "1b3"])
def test_published_sizes_of_parcae_are_presets(size: str) -> None:
    layers, dim = {"140m": (2, 768), "370m": (4, 1024), "770m": (6, 1280), "1b3": (8, 1536)}[size]
    values = PARCAE | {"block_size": 2048, "vocab_size": 32768, "padded_vocab_size": 32768, "n_embd": dim}
    values |= {"num_attention_heads": dim // 128, "num_key_value_heads": dim // 128, "intermediate_size": 4 * dim}
    values |= {"recurrent_embedding_dimension": dim, "recurrent_intermediation_embedding_dimension": 4 * dim}
    values |= {f"n_layers_in_{part}": layers for part in ("prelude", "recurrent_block", "coda")}
    config = map_parcae(values).config
    assert config == preset_config(f"parcae_{size}")
    if size == "370m":  # from the parameter count of a port that has no weights for query and key norms
        assert count_parameters(config).total - 3 * layers * 2 * 128 == 388_003_328


def test_value_embeddings_that_no_gate_reads_are_left_out() -> None:
    """Parcae counts layers for gates and for tables differently, so some variants have no value embeddings."""
    mapped = map_parcae(PARCAE | {"n_layers_in_recurrent_block": 1, "mean_recurrence": 7})
    assert not mapped.config.value_embeddings
    assert {name for name in mapped.unused if "value" in name or "gate" in name} == {
        *(f"value_embeds.{layer}.weight" for layer in (0, 2, 4)),
        *(f"transformer.{place}.attn.ve_gate.weight" for place in ("prelude.1", "coda.0")),
    }


def test_against_their_own_code(tmp_path: Path) -> None:
    """The PyPI package parcae-lm contains no code: put a checkout of github.com/SandyResearch/parcae on PYTHONPATH."""
    parcae = pytest.importorskip(
        "parcae_lm.models.parcae.parcae", reason="needs the code of github.com/SandyResearch/parcae, which PyPI lacks"
    )
    config = __import__("parcae_lm.models.parcae.config", fromlist=["ParcaeConfig"]).ParcaeConfig
    values = {name: value for name, value in PARCAE.items() if name not in ("_class_name", "rope_settings")}
    theirs = parcae.Parcae(config(**{**values, "state_init": "zero"})).eval()
    ours = published("parcae")
    theirs.load_state_dict(ours.tensors | ours.extra(), strict=True)
    import_model(ours.save(tmp_path / "source"), tmp_path / "out")
    model = open_model(tmp_path / "out").model
    ids = torch.randint(200, (3, 40), generator=torch.Generator().manual_seed(0))
    for loops in (1, 4, 8):
        with torch.no_grad():
            expected = theirs(ids, return_logits=True, num_steps_pair=torch.tensor([loops]))["logits"]
            output = model(ids, loops=loops).logits
        print(f"{loops} loops: {(output[..., :200] - expected[..., :200]).abs().max():.1e}")
        torch.testing.assert_close(output[..., :200], expected[..., :200], rtol=0, atol=1e-4)


def test_injection_out_of_our_bounds_is_the_same() -> None:
    dt, log_a = torch.meshgrid(torch.linspace(-9, 9, 13), torch.linspace(-4, 4, 9), indexing="ij")
    dt, log_a = dt.flatten(), log_a.flatten()
    weight = torch.randn(len(dt), 5)
    new_dt, new_log_a, new_weight = within_bounds(dt, log_a, weight)
    assert torch.equal(new_dt, new_dt.clamp(*DT_BOUNDS)) and torch.equal(new_log_a, new_log_a.clamp(*LOG_A_BOUNDS))
    inside = (dt.abs() <= 6) & (log_a <= 2)
    assert torch.equal(new_dt[inside], dt[inside]) and torch.equal(new_weight[inside], weight[inside])

    def means(dt: Tensor, log_a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        delta = torch.log1p(torch.exp(dt.double()))
        return torch.exp(-delta * torch.exp(log_a.double())), delta.unsqueeze(1) * weight.double()

    for new, old in zip(means(new_dt, new_log_a, new_weight), means(dt, log_a, weight), strict=True):
        torch.testing.assert_close(new, old, rtol=2e-5, atol=1e-6)


# --- files, tokenizers


def test_files_of_several_kinds(parcae: Path, tmp_path: Path) -> None:
    tensors = torch.load(parcae / "pytorch_model.bin", weights_only=True)
    tensors.pop("lm_head.weight")  # safetensors stores no tensor twice
    (parcae / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    for file, part in (("model-1.safetensors", names[::2]), ("model-2.safetensors", names[1::2])):
        save_file({name: tensors[name].contiguous() for name in part}, parcae / file)
    index = {name: f"model-{1 + place % 2}.safetensors" for place, name in enumerate(names)}
    (parcae / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    import_model(parcae, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3

    for file in parcae.glob("model*"):
        file.unlink()
    torch.save(tensors, parcae / "model.pt", _use_new_zipfile_serialization=False)
    import_model(parcae, tmp_path / "whole")
    one, other = (open_model(tmp_path / folder).model.state_dict() for folder in ("sharded", "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_tokenizer(folder: Path, size: int, special: list[str]) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    text = "the loop turns the state"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: letter not in f"{text}Ġ")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet[: size - len(special)],
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_tokenizer_that_does_not_say_what_ends_a_document(parcae: Path, tmp_path: Path) -> None:
    """Like SandyResearch/parcae-tokenizer, which is a tokenizer.json only."""
    make_tokenizer(parcae, 200, ["<|bos|>", "<|eos|>", "<|pad|>"])
    import_model(parcae, tmp_path / "out")
    opened = open_model(tmp_path / "out")
    assert opened.tokenizer is not None and opened.tokenizer.eos_id == 1 and opened.tokenizer.size == 200
    fast = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast("the loop").input_ids == opened.tokenizer.encode_batch(["the loop"])[0]
    assert fast.eos_token == "<|eos|>" and fast.model_max_length == 64
    assert not [file for file in (tmp_path / "out").glob("*.json") if str(tmp_path) in file.read_text()]
    assert json.loads((tmp_path / "out" / "request.json").read_text()) == {"name": "source"}
    generation = generate(opened.model, [[5, 6, 7]], 4, sampling=Sampling(temperature=0), loops=3, stop_ids=[1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = loaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, num_loops=3, do_sample=False)
    assert ids[0, 3:].tolist()[: len(generation.rows[0].tokens)] == generation.rows[0].tokens


@pytest.mark.parametrize("size", [120, 260])
def test_tokenizer_of_another_model(parcae: Path, tmp_path: Path, size: int) -> None:
    other = make_tokenizer(tmp_path / "tokenizer", size, ["<|endoftext|>"])
    with pytest.raises(
        MythosError, match=rf"tokenizer .*tokenizer has {size} ids, and the model 200: it belongs to another"
    ):
        import_model(parcae, tmp_path / "out", tokenizer=other)
    with pytest.raises(MythosError, match="has no end-of-document token"):
        import_model(parcae, tmp_path / "out", tokenizer=make_tokenizer(tmp_path / "plain", 200, []))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "source", "tokenizer"]


# --- the hub


def test_from_the_hub(parcae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the files that are read are downloaded; the architecture's tokenizer is another repository."""
    make_tokenizer(tmp_path / "tokenizer", 200, ["<|bos|>", "<|eos|>", "<|pad|>"])
    asked: list[tuple[str, str | None, list[str]]] = []

    class Hub:
        def list_repo_files(self, name: str, revision: str | None) -> list[str]:
            return ["config.json", "pytorch_model.bin", "model.pt", "README.md"]

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(parcae if name == "SandyResearch/parcae-140m" else tmp_path / "tokenizer")

    monkeypatch.setattr(foreign, "HfApi", Hub)
    monkeypatch.setattr(foreign, "snapshot_download", download)
    import_model("SandyResearch/parcae-140m", tmp_path / "out", revision="v1")
    assert [(name, revision) for name, revision, _ in asked] == [
        ("SandyResearch/parcae-140m", "v1"),
        ("SandyResearch/parcae-tokenizer", None),
    ]
    assert "*.bin" in asked[0][2] and "*.pt" not in asked[0][2] and "*.py" not in asked[0][2]
    assert not any("*" in pattern for pattern in asked[1][2])
    assert "`SandyResearch/parcae-140m`" in (tmp_path / "out" / "README.md").read_text()


def test_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr(foreign, "HfApi", fail)
    with pytest.raises(
        MythosError, match="somebody/model: there is no such folder, and the hub does not provide it: 401"
    ):
        import_model("somebody/model", tmp_path / "out")


# --- what is refused

Spoil = Callable[[Path], None]


def values(**changes: Any) -> Spoil:
    def spoil(source: Path) -> None:
        values = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}, default=str))

    return spoil


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(source: Path) -> None:
        state_dict = torch.load(source / "pytorch_model.bin", weights_only=True)
        change(state_dict)
        torch.save(state_dict, source / "pytorch_model.bin")

    return spoil


def without(source: Path) -> None:
    (source / "pytorch_model.bin").unlink()


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


REFUSED: dict[str, tuple[Spoil, str]] = {
    "unknown": (
        values(_class_name="GPTConfig"),
        "source is of an architecture that is not known: _class_name 'GPTConfig'; known: parcae (SandyResearch/",
    ),
    "ours": (values(model_type="mythos"), "source is a mythos model already: give it to the other commands as it is"),
    "no name": (values(_class_name=""), "not known: its config.json names none; known: parcae"),
    "no configuration": (lambda source: (source / "config.json").unlink(), "config.json cannot be read"),
    "a list": (lambda source: (source / "config.json").write_text("[]"), "config.json cannot be read: it is no object"),
    "variants": (
        values(logit_softcap=15.0, nonlin_name="GELU", rope_settings={"rope_condense_ratio": 2}),
        "nonlin_name: got 'GELU'; allowed: 'ReLU2'; rope_condense_ratio: got 2; allowed: 1",
    ),
    "fewer heads in the prelude": (values(num_key_value_heads=1), "num_key_value_heads: got 1; allowed: 3 or None"),
    "values of some layers": (values(n_layers_in_recurrent_block=1), "value embeddings: got layers"),
    "absent": (values(qk_norm=...), "qk_norm: got False; allowed: True"),
    "kinds": (values(n_layers_in_coda="two"), "config.json has values of unexpected types"),
    "more kinds": (values(block_size="long"), "context_length Input should be a valid integer"),
    "far too many layers": (
        values(n_layers_in_coda=10**12),
        "its config.json says n_layers_in_coda 1000000000000, and there are",
    ),
    "no layers": (values(n_layers_in_recurrent_block=0), "core_layers"),
    "no weights": (without, "has no weights: none of model.safetensors, pytorch_model.bin, model.pt"),
    "one missing": (
        tensors(lambda state_dict: state_dict.pop("transformer.C.weight")),
        "is not the parcae that its config.json describes: transformer.C.weight is missing",
    ),
    "one left over": (tensors(lambda state_dict: state_dict.update(more=torch.ones(1))), "describes: more is not used"),
    "many": (
        tensors(lambda state_dict: state_dict.update({f"more.{n}": torch.ones(1) for n in range(9)})),
        "more.7 is not used and 1 more",
    ),
    "a shape": (
        tensors(lambda state_dict: state_dict.update({"transformer.C.weight": torch.ones(48, 40)})),
        "transformer.C.weight is (48, 40), which does not give our readout.weight, (48, 48)",
    ),
    "fewer rows": (
        tensors(lambda state_dict: state_dict.update({"value_embeds.1.weight": torch.ones(150, 48)})),
        "value_embeds.1.weight is (150, 48), which does not give our value_embeddings.prelude_1.weight, (256, 48)",
    ),
    "a head of its own": (
        tensors(lambda state_dict: state_dict.update({"lm_head.weight": state_dict["lm_head.weight"] + 1})),
        "lm_head.weight should equal transformer.wte.weight, and does not",
    ),
    "other rotations": (
        tensors(lambda state_dict: state_dict.update({"freqs_cis": state_dict["freqs_cis"].flip(1)})),
        "freqs_cis is not the table of rotations of base 50000",
    ),
    "a state kept whole": (
        tensors(lambda state_dict: state_dict["transformer.adapter.A_log"].fill_(-20.0)),
        "keeps 1.00000000 of a state; allowed: at most 0.99999",
    ),
    "no tensors": (
        lambda source: torch.save({"model": {"a": torch.ones(1)}}, source / "pytorch_model.bin"),
        "pytorch_model.bin cannot be read: it contains other things than tensors by name",
    ),
    "code": (lambda source: torch.save({"a": Harmful()}, source / "pytorch_model.bin"), "bin cannot be read"),
    "damage": (lambda source: (source / "pytorch_model.bin").write_bytes(b"PK\3\4"), "bin cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(
    parcae: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, message = REFUSED[case]
    spoil(parcae)
    before = sorted(path.name for path in parcae.iterdir())
    assert main(["import", str(parcae), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.match("error: .*\n$", error) and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert sorted(path.name for path in parcae.iterdir()) == before


def test_an_ouro_whose_gate_ends_loops() -> None:
    with pytest.raises(MythosError, match=r"early_exit_threshold: got 0.9; allowed: None or 1.0"):
        map_ouro({**OURO, "early_exit_threshold": 0.9})


def test_other_refusals(parcae: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, folder, options, message in (
        (parcae, "full", {}, "full exists and is not empty"),
        (parcae, "out", {"dtype": "int8"}, "dtype: got 'int8'; allowed: float32, bfloat16"),
        (parcae, "out", {"revision": "main"}, "--revision: got main, but .* is a folder"),
        (parcae, "out", {"max_shard_size": "big"}, "max_shard_size: got 'big'"),
        (parcae, "out", {"tokenizer": tmp_path / "none"}, "none is not a folder; give one, or OWNER/NAME"),
        (parcae / "config.json", "out", {}, "config.json is not a folder; give one, or OWNER/NAME"),
    ):
        with pytest.raises(MythosError, match=message):
            import_model(source, tmp_path / folder, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "source"]


def test_failing_half_way_leaves_nothing(parcae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    map_foreign = importing.map_foreign

    def broken(*arguments: Any) -> Any:
        mapped = map_foreign(*arguments)
        mapped.tensors["norm.weight"] = replace(mapped.tensors["norm.weight"], sources=("gone",))
        return mapped

    monkeypatch.setattr(importing, "map_foreign", broken)
    with pytest.raises(KeyError):
        import_model(parcae, tmp_path / "out", max_shard_size="20KB")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_command_tells_what_it_did(parcae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(parcae), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "parcae, 1 file of weights" in printed and "without a tokenizer" in printed
    opened = open_model(tmp_path / "out").model
    assert opened.config.dense_ffn == "relu2" and opened.config.value_embeddings
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Imported from `source` (parcae)" in card and str(tmp_path) not in card


def test_every_known_architecture_is_recognised() -> None:
    assert [architecture_of(values).name for _, values in list(PUBLISHED.values())[::2]] == [a.name for a in KNOWN]
    with pytest.raises(MythosError, match=r"model_type 'llama'; known: parcae .*; huginn .*; ouro"):
        architecture_of({"model_type": "llama"})


@pytest.mark.parametrize("name", ["value_embeddings", "qk_bias"])
def test_initial_values(name: str) -> None:
    """At the start of training gates are 1 and biases 0."""
    config = ModelConfig(vocab_size=128, attention="gqa", core_ffn="dense", **{name: True})
    model = RecurrentDepthTransformer(config).initialize(0)
    parameters = [p for n, p in model.named_parameters() if n.endswith(("value_gate.weight", "query_bias", "key_bias"))]
    assert len(parameters) == {"value_embeddings": 2, "qk_bias": 6}[name] and not any(p.any() for p in parameters)
