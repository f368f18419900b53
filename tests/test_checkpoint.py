"""Checkpoints: complete or not there, refused when they do not fit, never lost to a failing one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mythos import checkpoint
from mythos.config import OptimConfig
from mythos.errors import MythosError
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.optim import build_optimizer
from mythos.presets import preset_config


def tensors() -> dict[str, torch.Tensor]:
    return {"model.a": torch.arange(6.0).view(2, 3), "optim.a.step": torch.tensor(3.0), "model.n": torch.arange(4)}


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors().items()}


def test_round_trip_and_layout(tmp_path):
    path = checkpoint.save(tmp_path, 100, tensors(), {"tokens": 7})
    assert path == tmp_path / "step-00000100"
    assert (path / "committed").exists()
    assert (tmp_path / "latest").read_text() == "step-00000100"
    assert json.loads((path / "meta.json").read_text()) == {"step": 100, "tokens": 7}
    loaded = blank()
    checkpoint.load(path, loaded)
    for name, value in tensors().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    # Readable without this project, and without unpickling anything.
    stored = load_file(next(path.glob("*.safetensors")))
    assert torch.equal(stored["model.a"], tensors()["model.a"])
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ""}


def test_everything_that_trains_is_saved(tmp_path):
    def build(seed: int) -> tuple[RecurrentDepthTransformer, torch.optim.Optimizer]:
        model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128)).initialize(seed)
        return model, build_optimizer(model, OptimConfig())

    model, optimizer = build(0)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        output = model(ids[:, :-1], ids[:, 1:], loops=3)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.rebalance(output.expert_load)
    path = checkpoint.save(tmp_path, 3, checkpoint.training_state(model, optimizer), {})
    other, other_optimizer = build(1)
    checkpoint.load(path, checkpoint.training_state(other, other_optimizer))
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert any("router.bias" in name and tensor.abs().max() > 0 for name, tensor in other.state_dict().items())
    for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_incomplete_directories_do_not_count(tmp_path):
    first = checkpoint.save(tmp_path, 1, tensors(), {})
    second = checkpoint.save(tmp_path, 2, tensors(), {})
    (second / "committed").unlink()
    (tmp_path / "step-00000003.tmp").mkdir()
    assert checkpoint.complete_checkpoints(tmp_path) == [first]
    assert checkpoint.find(tmp_path, "auto") == first
    with pytest.raises(MythosError, match=r"no complete checkpoint.*step-00000001"):
        checkpoint.find(tmp_path, str(second))


def test_find(tmp_path):
    assert checkpoint.find(tmp_path / "none", "auto") is None
    assert checkpoint.find(tmp_path, "never") is None
    path = checkpoint.save(tmp_path, 5, tensors(), {})
    assert checkpoint.find(tmp_path, str(path)) == path
    with pytest.raises(MythosError, match=r"never, but .*step-00000005"):
        checkpoint.find(tmp_path, "never")


def test_prune_keeps_the_newest_and_the_milestones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        checkpoint.save(tmp_path, step, {"model.a": torch.zeros(1)}, {})
    (tmp_path / "step-00000060.tmp").mkdir()
    checkpoint.prune(tmp_path, keep=2, keep_every=20)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000020",
        "step-00000040",
        "step-00000050",
    ]


def test_another_model_is_refused_before_anything_changes(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), {})
    here = blank()
    here["model.a"] = torch.zeros(2, 4)
    here["model.extra"] = torch.zeros(1)
    del here["model.n"]
    with pytest.raises(MythosError) as caught:
        checkpoint.load(path, here)
    message = str(caught.value)
    assert "another model: 3 tensors differ" in message
    assert "model.a: (2, 3) in the checkpoint, (2, 4) in the model" in message
    assert "model.extra: absent in the checkpoint" in message
    assert "model.n: (4,) in the checkpoint, absent in the model" in message
    assert all(value.abs().max() == 0 for value in here.values())


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_truncated_file_is_named(tmp_path, keep):
    path = checkpoint.save(tmp_path, 1, {"model.a": torch.arange(1000.0)}, {})
    file = next(path.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(MythosError, match=r"step-00000001 is damaged"):
        checkpoint.load(path, {"model.a": torch.zeros(1000)})


def test_damaged_meta_is_named(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), {})
    (path / "meta.json").write_text("{")
    with pytest.raises(MythosError, match=r"step-00000001 is damaged: meta.json"):
        checkpoint.read_meta(path)


def assert_first_survives(directory: Path, first: Path) -> None:
    assert checkpoint.complete_checkpoints(directory) == [first]
    assert (directory / "latest").read_text() == first.name
    loaded = blank()
    checkpoint.load(first, loaded)
    assert torch.equal(loaded["model.a"], tensors()["model.a"])
    assert not list(directory.glob("*.tmp"))


def test_full_disk_known_beforehand_leaves_the_previous_one(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, tensors(), {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MythosError, match=r"1,000 are free.*newest complete checkpoint is .*step-00000001"):
        checkpoint.save(tmp_path, 2, tensors(), {})
    assert_first_survives(tmp_path, first)


def test_full_disk_met_while_writing_leaves_the_previous_one(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, tensors(), {})
    # A limit on the size of a file fails a write half-way, as a full disk does.
    resource = pytest.importorskip("resource")
    import signal

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(MythosError, match=r"could not be written.*newest complete checkpoint is .*step-00000001"):
            checkpoint.save(tmp_path, 2, {"model.a": torch.zeros(1 << 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_first_survives(tmp_path, first)
