"""Runs that start from the weights of another (train.init_from)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from mythos.checkpoints.init_from import open_start
from mythos.checkpoints.stored_model import open_model, tensors_of
from mythos.config.loading import config_from_dict, load_config
from mythos.config.sections import Config
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError
from mythos.hf.export import export_model
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.plan import plan
from mythos.reports.recorded import open_run
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics
from tests.runs import settings, tiny
from tests.trainers import run, saved

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Trainer:
    return run(tiny(tmp_path_factory.mktemp("source"), optim__lr=0.02))


def started(trained: Trainer, directory: Path, source: Path | None = None, **changes: Any) -> dict[str, Any]:
    """A configuration that starts from a run on the same corpus, and of the model names only what is changed."""
    values = settings(trained.run_dir.parent, train__init_from=str(source or trained.run_dir), **changes)
    values["run"] = {"name": "tuned", "dir": str(directory / "tuned")}
    inner = {path.removeprefix("model__"): value for path, value in changes.items() if path.startswith("model__")}
    values["model"] = inner
    if not any(path.startswith("tokenizer__") for path in changes):
        del values["tokenizer"]
    return values


def tensors(trained: Trainer) -> dict[str, torch.Tensor]:
    return tensors_of(trained.model)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_a_run_starts_with_the_loss_of_what_it_starts_from(trained: Trainer, tmp_path: Path, kind: str) -> None:
    source = {"run": trained.run_dir, "checkpoint": saved(trained, 4), "export": tmp_path / "exported"}[kind]
    if kind == "export":
        export_model(trained.run_dir, source)
    config = config_from_dict(started(trained, tmp_path, source, train__steps=1))
    assert config.model == trained.config.model
    trainer = run(config)
    first, last = read_metrics(trainer.run_dir / "metrics.jsonl")
    before = read_metrics(trained.run_dir / "metrics.jsonl")[-1]
    assert (first["step"], first["tokens"], last["step"]) == (0, 0, 1)
    for depth in (1, 3):
        assert first[f"val/loss@{depth}"] == pytest.approx(before[f"val/loss@{depth}"], abs=1e-5)
    assert trainer.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert [bool(flops) for flops in open_run(trainer.run_dir).flops] == [False, True]


def test_optimizer_and_data_are_those_of_a_new_run(trained: Trainer, tmp_path: Path) -> None:
    trainer = Trainer(config_from_dict(started(trained, tmp_path)))
    new = Trainer(tiny(trained.run_dir.parent, run__dir=str(tmp_path / "new")))
    assert all(not value.any() for state in trainer.optimizer.state.values() for value in state.values())
    batches = [either.loader.next_batch().ids for either in (trainer, new)]
    assert trainer.step == 0 and torch.equal(*batches)
    assert all(torch.equal(tensor, tensors(trained)[name]) for name, tensor in tensors(trainer).items())
    for either in (trainer, new):
        either.resources.close()


def test_it_is_continued_by_the_same_command_without_its_source(trained: Trainer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained.run_dir, source)
    values = started(trained, tmp_path, source, train__steps=2)
    run(config_from_dict(values))
    assert load_config(tmp_path / "tuned" / "config.yaml").train.init_from == str(source)
    shutil.rmtree(source)
    values["train"]["steps"] = 3
    config = config_from_dict(values)
    assert "continues from its own checkpoints" in plan(config)
    again = run(config)
    assert again.step == 3 and again.start is None
    assert [record["step"] for record in read_metrics(again.run_dir / "metrics.jsonl")] == [0, 1, 2, 3]


def test_depth_context_halting_and_adapter_may_change(trained: Trainer, tmp_path: Path) -> None:
    changes = {"model__loops": 5, "model__context_length": 128, "data__sequence_length": 128, "model__halting": "gate"}
    trainer = Trainer(config_from_dict(started(trained, tmp_path, **changes)))
    scale, old = tensors(trainer)["recurrence.adapter.scale"], tensors(trained)["recurrence.adapter.scale"]
    assert torch.equal(scale, torch.cat((old, old[2:], old[2:])))  # as the model does beyond its trained loops
    fresh = tensors_of(RecurrentDepthTransformer(trainer.config.model).initialize(0))
    for name, tensor in tensors(trainer).items():
        expected = fresh if name.startswith("halting.") else tensors(trained)
        assert name.endswith("adapter.scale") or torch.equal(tensor, expected[name]), name
    changes = "\n".join(trainer.start.changes)
    for line in ("context_length: 64 -> 128", "adapter: 3 -> 5 loops", "halting: convergence -> gate", "new: halting."):
        assert line in changes
    trainer.resources.close()

    trainer = Trainer(config_from_dict(started(trained, tmp_path, model__loops=2)))
    assert torch.equal(tensors(trainer)["recurrence.adapter.scale"], old[:2])
    trainer.resources.close()
    trainer = Trainer(config_from_dict(started(trained, tmp_path, model__lora_rank=0)))
    assert "not taken: recurrence.adapter.down.weight" in "\n".join(trainer.start.changes)
    trainer.resources.close()


def test_passes_may_differ_from_a_start_at_which_they_do_not(trained: Trainer, tmp_path: Path) -> None:
    """New tables of the loop start at zero, whatever a new model starts them with."""
    changes = {"model__router_loop": "embedding", "model__loop_norm": "adaptive", "model__router_loop_start": 2.0}
    trainer = Trainer(config_from_dict(started(trained, tmp_path, **changes)))
    ids = trainer.validation.ids[:2, :-1]
    with torch.no_grad():
        assert torch.equal(trainer.model(ids, loops=5).logits, trained.model(ids, loops=5).logits)
    printed = "\n".join(trainer.start.changes)
    for line in ("router_loop: none -> embedding", "loop_norm: none -> adaptive", "new: recurrence.blocks.0."):
        assert line in printed
    trainer.resources.close()


def test_lanes_start_from_the_one_lane(trained: Trainer, tmp_path: Path) -> None:
    """From zeros the first pass computes what it did; lane k decays by A^(1/(k+1)), and all have the same step."""
    trainer = Trainer(config_from_dict(started(trained, tmp_path, model__lanes=3, model__state_init="zero")))
    one, three = trained.model.recurrence.injection.rates(), trainer.model.recurrence.injection.rates()
    torch.testing.assert_close(three[0], torch.stack([one[0] ** (1 / power) for power in (1, 2, 3)]))
    torch.testing.assert_close(three[1], one[1].expand(3, -1))
    ids = trainer.validation.ids[:2, :-1]
    with torch.no_grad():
        source = RecurrentDepthTransformer(trained.config.model.model_copy(update={"state_init": "zero"}))
        source.load_state_dict(trained.model.state_dict())
        torch.testing.assert_close(trainer.model(ids, loops=1).logits, source.eval()(ids, loops=1).logits)
    printed = "\n".join(trainer.start.changes)
    for line in ("lanes: 1 -> 3", "new: recurrence.lanes."):
        assert line in printed
    export_model(run(config_from_dict(started(trained, tmp_path / "two", model__lanes=2))).run_dir, tmp_path / "out")
    with pytest.raises(MythosError, match="lanes: 2 in the model, 3 here"):
        Trainer(config_from_dict(started(trained, tmp_path / "three", tmp_path / "out", model__lanes=3)))
    trainer.resources.close()


def test_tables_of_the_loop_follow_the_number_of_loops(tmp_path: Path) -> None:
    changes = {"model__router_loop": "bias", "model__router_bias_per_loop": True, "model__loop_norm": "adaptive"}
    source = run(tiny(tmp_path, **changes, optim__lr=0.02, model__router_bias_rate=0.1))
    names = [
        f"recurrence.blocks.0.{name}" for name in ("ffn.router.loop_bias", "ffn.router.bias", "ffn_norm.loop_scale")
    ]
    for loops in (5, 2):
        values = started(source, tmp_path / str(loops), model__loops=loops)
        trainer = Trainer(config_from_dict(values))
        for name in names:
            old = tensors(source)[name]
            assert old.any() and torch.equal(tensors(trainer)[name], old[[0, 1, 2, 2, 2][:loops]])
        assert f"{names[0]}: 3 -> {loops} loops" in "\n".join(trainer.start.changes)
        trainer.resources.close()


def test_options_that_change_what_weights_compute_are_refused(trained: Trainer, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"model__residual_scale": 0.25, "model__router_bias_per_loop": True}
    changes |= {"model__injection": "orthogonal", "model__loop_over": "layer", "model__core_layers": 2}
    with pytest.raises(MythosError) as refused:
        Trainer(config_from_dict(started(trained, tmp_path, **changes)))
    for line in (
        "residual_scale: 1.0 in the model, 0.25 here",
        "router_bias_per_loop: False in the model, True here",
        "injection: 'lti' in the model, 'orthogonal' here",
        "loop_over: 'core' in the model, 'layer' here",
    ):
        assert line in str(refused.value)


def with_tokens(folder: Path, vocabulary: dict[str, int], end: str = "<|endoftext|>") -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE(vocabulary, [])), eos_token=end)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_shared_tokens_are_kept_by_another_tokenizer(
    trained: Trainer, tmp_path: Path, tied: bool, no_plots: None
) -> None:
    if not tied:
        trained = run(tiny(tmp_path, train__steps=1, model__tie_embeddings=False))
    known = trained.tokenizer.backend.get_vocab()
    order = sorted(known, key=known.__getitem__)
    wanted = {token: row for row, token in enumerate(["<end>", *reversed(order[1:300]), "river", "stone"])}
    changed = with_tokens(tmp_path / "tokens", wanted, "<end>")
    trainer = Trainer(config_from_dict(started(trained, tmp_path, tokenizer__name=str(changed))))
    assert trainer.model.vocabulary == 384 and trainer.config.model.vocab_size == 384
    fresh = tensors_of(RecurrentDepthTransformer(trainer.config.model).initialize(0))
    for name in ("embedding.weight",) if tied else ("embedding.weight", "head.weight"):
        old, new = tensors(trained)[name], tensors(trainer)[name]
        for token in order[1:300]:
            assert torch.equal(new[wanted[token]], old[known[token]])
        assert torch.equal(new[0], old[trained.tokenizer.eos_id])
        for token in ("river", "stone"):
            torch.testing.assert_close(new[wanted[token]], old[: len(known)].mean(0))
        assert torch.equal(new[len(wanted) :], fresh[name][len(wanted) :])
    assert "300 of the tokenizer's 302 tokens" in "\n".join(trainer.start.changes)
    trainer.resources.close()


def test_tokenizers_with_nothing_in_common_are_refused(trained: Trainer, tmp_path: Path) -> None:
    strange = with_tokens(tmp_path / "tokens", {"<end>": 0} | {f"strange{n}": n for n in range(1, 200)}, "<end>")
    with pytest.raises(MythosError, match=r"has 1 of the 200 tokens .* tokenizer.name to .*tokenizer"):
        Trainer(config_from_dict(started(trained, tmp_path, tokenizer__name=str(strange))))
    assert not (tmp_path / "tuned" / "config.yaml").exists()
    with pytest.raises(MythosError, match="has 1 of the 200 tokens"):
        plan(config_from_dict(started(trained, tmp_path, tokenizer__name=str(strange))))


def test_another_model_is_refused_by_every_field_before_the_data_is_opened(trained: Trainer, tmp_path: Path) -> None:
    values = started(trained, tmp_path, model__dim=64, model__n_experts=8, data__path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(MythosError) as caught:
        Trainer(config_from_dict(values))
    for line in ("model.dim: 32 in the model, 64 here", "model.n_experts: 4 in the model, 8 here", "Leave these"):
        assert line in str(caught.value)


def test_dry_run_tells_what_is_taken(trained: Trainer, tmp_path: Path) -> None:
    text = plan(config_from_dict(started(trained, tmp_path, model__loops=4)))
    assert f"{saved(trained, 4)} at step 4" in text and "3 -> 4 loops" in text
    trains_bpe = started(trained, tmp_path, tokenizer__vocab_size=400)
    assert "compared once the tokenizer has been trained" in plan(config_from_dict(trains_bpe))


def damaged(trained: Trainer, directory: Path) -> Path:
    path = directory / "step-00000004"
    shutil.copytree(saved(trained, 4), path)
    shard = next(path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-8])
    return path


def test_what_is_no_model_is_refused(trained: Trainer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    cases = {
        "nowhere": "neither a run directory",
        "empty": "neither a run directory",
        "llama": "'llama', not of mythos: .*mythos retrofit",
    }
    for name, says in cases.items():
        with pytest.raises(MythosError, match=f"1 problem in the configuration\n  train.init_from: .*{says}"):
            config_from_dict(started(trained, tmp_path, tmp_path / name))
    config = config_from_dict(started(trained, tmp_path, damaged(trained, tmp_path)))
    with pytest.raises(MythosError, match=r"train\.init_from: checkpoint .* is damaged"):
        open_start(config)
    complete = config_from_dict(started(trained, tmp_path, model__preset="mythos_nano"))
    assert complete.model.dim == 128  # a preset that is named counts, and nothing is read for it
    with pytest.raises(MythosError, match=r"run.resume, train.init_from: got .* one of them"):
        config_from_dict(started(trained, tmp_path) | {"run": {"resume": "runs/x/checkpoints/step-00000001"}})


def test_what_is_inherited_is_its_own_unless_it_is_named(trained: Trainer, tmp_path: Path) -> None:
    def configuration(**changes: Any) -> Config:
        return config_from_dict(started(trained, tmp_path, **changes))

    config = configuration(model__loops=7)
    assert config.model == trained.config.model.model_copy(update={"loops": 7})
    assert Tokenizer.load(config.tokenizer.name).fingerprint == trained.tokenizer.fingerprint
    assert configuration(tokenizer__name="other").model.vocab_size == "auto"
    assert open_model(trained.run_dir).model.config == configuration().model
