"""A run, its checkpoint, its export, and the export as transformers loads it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from mythos.checkpoints.stored_model import StoredModel, open_model
from mythos.cli import main
from mythos.errors import MythosError
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate
from mythos.hf import export
from mythos.hf.export import export_model
from mythos.trainer import Trainer
from tests.runs import tiny
from tests.trainers import run, saved

pytestmark = pytest.mark.usefixtures("no_plots")
TEXTS = ["The river crosses", "The garden"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Trainer:
    """A run of four steps."""
    folder = tmp_path_factory.mktemp("export")
    return run(tiny(folder, checkpoint__every=2, optim__lr=0.02, depth__mean=2, eval__every=2))


@pytest.fixture(scope="module")
def exported(trained: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in shards of 30 kB."""
    folder = tmp_path_factory.mktemp("deep") / "folder" / "model"
    export_model(trained.run_dir, folder, max_shard_size="30KB")
    return folder


def test_run_checkpoint_export_and_transformers_agree_to_the_bit(trained: Trainer, exported: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.randint(0, trained.tokenizer.size, (2, 32), generator=torch.Generator().manual_seed(0))
    for loops in (1, 2, 5):
        with torch.no_grad():
            logits = [
                open_model(path).model(ids, loops=loops).logits
                for path in (trained.run_dir, saved(trained, 4), exported)
            ]
            logits.append(loaded(ids, num_loops=loops).logits)
        assert all(
            torch.equal(logits[0][..., : trained.tokenizer.size], other[..., : trained.tokenizer.size])
            for other in logits
        )
    assert loaded.config.mean_loops == 2 and torch.equal(loaded(ids).logits, loaded(ids, num_loops=2).logits)
    opened = open_model(exported)
    assert opened.model.config == trained.config.model and opened.run is None and not opened.model.training
    assert (opened.step, opened.mean_loops, opened.source) == (4, 2, str(exported))
    assert opened.sequence_length == trained.config.data.sequence_length == 32
    assert opened.tokenizer is not None and opened.tokenizer.fingerprint == trained.tokenizer.fingerprint


def test_files_of_an_export(trained: Trainer, exported: Path) -> None:
    values = json.loads((exported / "config.json").read_text())
    assert values["architectures"] == ["MythosForCausalLM"] and values["dtype"] == "float32" and values["dim"] == 32
    # CUDA wheels have their build (+cu130) in torch.__version__ only, not in the metadata.
    assert values["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    module = "modeling_mythos.MythosForCausalLM"
    assert values["auto_map"] == {"AutoConfig": "modeling_mythos.MythosConfig", "AutoModelForCausalLM": module}
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == trained.tokenizer.eos_id
    assert "suppress_tokens" not in generation
    shards = sorted(exported.glob("model-*.safetensors"))
    assert len(shards) > 3 and not (exported / "model.safetensors").exists()
    assert set(load_file(shards[0])) < {f"model.{name}" for name in trained.model.state_dict()}
    assert {file.suffix for file in exported.iterdir()} == {".json", ".safetensors", ".md", ".py"}
    assert str(trained.run_dir.parent) not in "".join(
        p.read_text() for p in exported.iterdir() if p.suffix != ".safetensors"
    )


def test_the_tokenizer_encodes_as_in_training(trained: Trainer, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert tokenizer(TEXTS).input_ids == trained.tokenizer.encode_batch(TEXTS)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 64
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    model = AutoModelForCausalLM.from_pretrained(exported)
    texts = tokenizer.batch_decode(model.generate(**batch, max_new_tokens=8)[:, -8:])
    opened = open_model(exported)
    prompts = trained.tokenizer.encode_batch(TEXTS)
    own = generate(opened.model, prompts, 8, sampling=Sampling(temperature=0), loops=2).rows
    assert texts == [trained.tokenizer.decode(row.tokens) for row in own]

    generator = pipeline("text-generation", model=str(exported))
    [[said], _] = generator(TEXTS, max_new_tokens=8, do_sample=False, num_loops=2)
    assert said["generated_text"] == TEXTS[0] + texts[0]


def test_the_examples_of_the_documentation(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2 and all("exported/quickstart" in block for block in blocks)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block.replace("exported/quickstart", str(exported)), {})
    tuned = open_model(tmp_path / "tuned" / "model")
    assert not torch.equal(tuned.model.norm.weight, open_model(exported).model.norm.weight)


def test_tokens_around_a_text_that_training_never_saw_are_left_out(trained: Trainer, tmp_path: Path) -> None:
    """A tokenizer that adds a token at the start of every text."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    fast = AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    around = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    fast.backend_tokenizer.post_processor = around
    fast.save_pretrained(tmp_path / "run" / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")(TEXTS[0]).input_ids[0] == 0
    export_model(tmp_path / "run", tmp_path / "out")
    back = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back(TEXTS).input_ids == trained.tokenizer.encode_batch(TEXTS) and back.eos_token_id == 0
    assert isinstance(back, PreTrainedTokenizerFast) and open_model(tmp_path / "out").tokenizer is not None


def test_the_card(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    """The card has the losses by depth of the exported step, from metrics.jsonl."""
    [*_, last] = [json.loads(line) for line in (trained.run_dir / "metrics.jsonl").read_text().splitlines()]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    for loops in (1, 2, 3):
        assert f"| {loops} | {last[f'val/loss@{loops}']:.4f} | " in card
    assert "training ran 2 on average" in card and "| steps | 4 |" in card and "| tokens | 1,024 |" in card
    assert f"of {sum(p.numel() for p in trained.model.parameters()):,} parameters" in card
    assert "2 of 4 experts per token, 1 shared" in card and "| data | local files |" in card

    export_model(saved(trained, 2), tmp_path / "earlier")
    earlier = (tmp_path / "earlier" / "README.md").read_text()
    assert "| steps | 2 |" in earlier and f"| 3 | {last['val/loss@3']:.4f} |" not in earlier and "| 3 | " in earlier


def test_no_more_than_a_file_is_in_memory(trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    write = export._write_weights

    def watched(stored: StoredModel, *rest: Any) -> int:
        def read(tensors: dict[str, torch.Tensor]) -> None:
            sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
            stored.read(tensors)

        return write(replace(stored, read=read), *rest)

    monkeypatch.setattr(export, "_write_weights", watched)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # the whole model is never allocated
    result = export_model(trained.run_dir, tmp_path / "out", max_shard_size=30_000)
    largest = max(p.nbytes for p in trained.model.parameters())
    assert len(sizes) == result.files > 4 and all(size <= max(30_000, largest) for size in sizes)
    assert sum(sizes) == sum(tensor.nbytes for tensor in trained.model.state_dict().values())


def test_bfloat16_and_an_export_of_an_export(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    export_model(trained.run_dir, tmp_path / "short", dtype="bfloat16")
    tensors, whole = load_file(tmp_path / "short" / "model.safetensors"), trained.model.state_dict()
    short = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
    for name, tensor in tensors.items():
        assert torch.equal(tensor, whole[name.removeprefix("model.")].to(tensor.dtype))
    assert "model.embedding.weight" in short and "model.recurrence.injection.weight" not in short
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.bfloat16} == short
    opened = open_model(tmp_path / "short").model.state_dict()
    assert all(torch.equal(opened[name.removeprefix("model.")], tensor.float()) for name, tensor in tensors.items())

    (tmp_path / "again").mkdir()  # an empty folder is allowed
    assert main(["export", str(exported), str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[f"model.{name}"], x) for name, x in whole.items())
    assert (tmp_path / "again" / "README.md").read_text() == (exported / "README.md").read_text()


def test_a_fine_tuned_model_is_opened_and_exported(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    """A folder that transformers' save_pretrained wrote."""
    model = AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(exported).save_pretrained(tmp_path / "tuned")
    opened = open_model(tmp_path / "tuned")
    assert torch.equal(opened.model.norm.weight, trained.model.norm.weight + 1) and opened.mean_loops == 2
    assert opened.tokenizer is not None and opened.tokenizer.encode_batch(TEXTS) == trained.tokenizer.encode_batch(
        TEXTS
    )


def test_exports_of_earlier_versions_are_opened(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    """One file, names without prefix, and a configuration without transformers' fields."""
    folder = tmp_path / "old"
    export_model(exported, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    for key in ("architectures", "dtype", "transformers_version", "sequence_length"):
        del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").unlink()
    opened, loaded = open_model(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert opened.sequence_length is None
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor)
        assert torch.equal(loaded.state_dict()[f"model.{name}"], tensor)


def test_ids_beyond_the_tokenizer_are_not_drawn(tmp_path: Path) -> None:
    """For a model whose vocabulary is larger than its tokenizer's."""
    trainer = run(tiny(tmp_path, model__vocab_size=400, train__steps=1))
    export_model(trainer.run_dir, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    size = trainer.tokenizer.size
    assert size < 400 == model.config.vocab_size
    with torch.no_grad():
        model.model.embedding.weight[size:] *= 100
    ids = torch.tensor([[1, 2, 3]])
    assert model(ids).logits[0, -1].argmax() >= size
    assert model.generate(ids, max_new_tokens=8, do_sample=True).max() < size


# Errors, and leftover files


def test_an_export_that_fails_leaves_nothing(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    with pytest.raises(MythosError, match="full exists and is not empty"):
        export_model(trained.run_dir, full)
    with pytest.raises(MythosError, match="dtype: got 'float8'; allowed: float32, bfloat16"):
        export_model(trained.run_dir, tmp_path / "new", dtype="float8")
    with pytest.raises(MythosError, match="max_shard_size: got 'big'; allowed: such as 500MB or 5GB"):
        export_model(trained.run_dir, tmp_path / "new", max_shard_size="big")
    with pytest.raises(MythosError, match="step-00000003 is no complete checkpoint"):
        export_model(saved(trained, 3), tmp_path / "new")
    assert main(["export", str(full), str(tmp_path / "new")]) == 1
    assert "full: it is not a model. Give a run directory" in capsys.readouterr().err

    shutil.copytree(saved(trained, 4), tmp_path / "cut" / "step-00000004")
    (tmp_path / "cut" / "step-00000004" / "committed").unlink()
    with pytest.raises(MythosError, match="step-00000004 is no complete checkpoint"):
        export_model(tmp_path / "cut" / "step-00000004", tmp_path / "new")
    shutil.rmtree(tmp_path / "cut")

    def fail(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(MythosError, match="cannot be written: No space left"):
        export_model(trained.run_dir, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in full.iterdir()] == ["note"]


def test_damage_is_detected(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in [
        ({"model_type": "llama"}, "model_type is 'llama'; only models of type 'mythos'"),
        ({"dim": "wide"}, "cannot be read as the configuration of a model: dim: "),
        ({"sequence_length": 65}, "sequence_length is 65, context_length 64"),
        ({"mask_documents": 1}, "mask_documents is 1"),
        ({"depth_of_field": 3}, "depth_of_field: Extra inputs are not permitted"),
        ({"ffn_dim": 64}, r"does not fit its own configuration: .* tensors differ"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(MythosError, match=message):
            open_model(folder)
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "mean_loops"})
    )
    with pytest.raises(MythosError, match="'mean_loops' is missing"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for content in ("{", "[]", whole.replace("model-00001", "../model-00001")):
        index.write_text(content)
        with pytest.raises(MythosError, match=r"index\.json cannot be read: "):
            open_model(folder)
    index.write_text(whole)
    shard = min(folder.glob("model-*.safetensors"))
    shard.write_bytes(b"\x08")
    with pytest.raises(MythosError, match=f"{shard.name} cannot be read"):
        open_model(folder)
    shard.unlink()
    with pytest.raises(MythosError, match=f"{shard.name} cannot be read"):
        export_model(folder, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_push(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a hub that records its requests, and one that refuses."""
    api = Mock()
    api.create_repo.return_value = "https://hub/somebody/small"
    monkeypatch.setattr(export, "HfApi", lambda: api)
    folder = tmp_path / "out"
    assert main(["export", str(trained.run_dir), str(folder), "--push", "somebody/small"]) == 0
    api.create_repo.assert_called_once_with("somebody/small", private=True, exist_ok=True)
    [call] = api.upload_folder.call_args_list
    assert call.kwargs["repo_id"] == "somebody/small" and Path(call.kwargs["folder_path"]) == folder
    assert 'from_pretrained("somebody/small")' in (folder / "README.md").read_text()
    assert "https://hub/somebody/small" in capsys.readouterr().out

    api.upload_folder.side_effect = RuntimeError("401 Unauthorized\nmore")
    shutil.rmtree(folder)
    assert main(["export", str(trained.run_dir), str(folder), "--push", "somebody/small"]) == 1
    error = capsys.readouterr().err
    assert "out is exported, but the upload to somebody/small failed: 401 Unauthorized. Log in by" in error
    assert (folder / "config.json").is_file()


def test_others_can_read_what_the_umask_lets_them(trained: Trainer, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    permissions = (tmp_path / "new").stat().st_mode
    folders = (exported, saved(trained, 4))
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files)
    assert {file.name: file.stat().st_mode for file in files if file.stat().st_mode != permissions} == {}


def test_the_exported_tokenizer_pads_a_batch(trained: Trainer, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert trained.tokenizer is not None
    assert tokenizer.pad_token_id == trained.tokenizer.eos_id
    batch = tokenizer(TEXTS, padding=True)
    long, short = (trained.tokenizer.encode_batch([text])[0] for text in TEXTS)
    padding = len(long) - len(short)
    assert padding > 0
    assert batch["input_ids"] == [long, [trained.tokenizer.eos_id] * padding + short]
    assert batch["attention_mask"] == [[1] * len(long), [0] * padding + [1] * len(short)]
