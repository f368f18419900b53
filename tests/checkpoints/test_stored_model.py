"""Opening trained models: runs, checkpoints and exports, and what cannot be opened."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import fsspec
import pytest
import torch

from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.config.model_paths import run_directory
from mythos.errors import MythosError
from mythos.files.storage import RemoteStorage
from mythos.hf.export import export_model
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.trainer import Trainer
from tests.trainers import copy_of, saved


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_opened_at_its_newest_checkpoint(trained: Trainer, opened: OpenedModel) -> None:
    assert_same(weights(opened.model), weights(trained.model))
    assert not opened.model.training and opened.step == 4 and opened.mean_loops == 2
    assert opened.tokenizer is not None and opened.tokenizer.fingerprint == trained.tokenizer.fingerprint
    assert opened.run is not None and opened.run.model == trained.config.model
    assert opened.source == str(saved(trained, 4))


def test_a_sample_of_training_continues_the_end_of_a_prompt_longer_than_the_context(trained: Trainer) -> None:
    prompt, sample_ids = "The river crosses the garden. " * 15, trained.tokenizer.encode_batch(trained.samples)[0]
    assert len(trained.tokenizer.encode_batch([prompt])[0]) > 64 >= len(sample_ids)
    assert prompt[-50:] in trained.samples[0] and not trained.samples[0].endswith(prompt[-50:])


def test_an_older_checkpoint_is_opened_by_its_path(trained: Trainer, opened: OpenedModel) -> None:
    older = open_model(saved(trained, 2))
    assert older.step == 2 and older.tokenizer is not None
    newer, values = weights(opened.model), weights(older.model)
    assert any(not torch.equal(newer[name], values[name]) for name in newer)
    assert_same(weights(open_model(f"{saved(trained, 4)}/").model), newer)


def test_no_credentials_of_a_url_are_shown(
    trained: Trainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sources are printed, and written to files of results; a run prints what it continues."""
    files = fsspec.filesystem("memory")
    files.put(str(saved(trained, 4)), "/key:secret@bucket/step-00000004", recursive=True)
    assert open_model("memory://key:secret@bucket/step-00000004").source == "memory://***@bucket/step-00000004"
    monkeypatch.setattr(trained, "resumed_from", "memory://key:secret@bucket/step-00000004")
    trained.announce()
    assert "continuing at step 4 from memory://***@bucket/step-00000004\n" in capsys.readouterr().out


def test_a_run_may_be_called_like_a_checkpoint(trained: Trainer, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path / "step-7")
    assert open_model(tmp_path / "step-7").source == str(checkpoint)
    assert run_directory(tmp_path / "step-7") == run_directory(checkpoint) == tmp_path / "step-7"
    assert run_directory(tmp_path) is None and run_directory("memory://a/checkpoints/step-00000004") is None


def test_a_run_that_checkpoints_elsewhere(trained: Trainer, tmp_path: Path) -> None:
    """The path of a checkpoint alone leads to its run's tokenizer; a URL of fsspec is fetched."""
    with far_away(saved(trained, 4)) as url:
        far = open_model(url)
    assert_same(weights(far.model), weights(trained.model))
    assert far.tokenizer is not None

    moved = tmp_path / "copy" / "step-00000004"
    shutil.copytree(saved(trained, 4), moved)
    assert open_model(moved).tokenizer is not None


def test_what_cannot_be_opened(
    trained: Trainer, opened: OpenedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MythosError, match=r"missing: no such file or folder\. Give a run directory"):
        open_model(tmp_path / "missing")
    with pytest.raises(MythosError, match="it is not a model"):
        open_model(tmp_path)
    with pytest.raises(MythosError, match="step-00000003 is no complete checkpoint"):
        open_model(saved(trained, 3))
    with pytest.raises(MythosError, match=r"cannot be read: .*File name too long"):
        open_model(tmp_path / ("a" * 300))
    monkeypatch.setattr(RemoteStorage, "exists", Mock(side_effect=RuntimeError("no permission")))
    with pytest.raises(MythosError, match="step-00000003 cannot be read: no permission"):
        open_model("memory://nowhere/step-00000003")

    checkpoint = copy_of(trained, tmp_path / "run")
    (checkpoint / "committed").unlink()
    with pytest.raises(MythosError, match="the run has no complete checkpoint yet"):
        open_model(tmp_path / "run")


def write_meta(checkpoint: Path, meta: dict[str, object]) -> None:
    """Change meta.json as if it had been written so."""
    text = json.dumps(meta)
    (checkpoint / "meta.json").write_text(text)
    (checkpoint / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(text.encode())}))


@contextlib.contextmanager
def far_away(checkpoint: Path) -> Iterator[str]:
    """A copy in an object store."""
    import fsspec

    memory, root = fsspec.filesystem("memory"), "/elsewhere-generate"
    memory.put(str(checkpoint), f"{root}/{checkpoint.name}", recursive=True)
    try:
        yield f"memory:/{root}/{checkpoint.name}"
    finally:
        memory.rm(root, recursive=True)


def test_no_memory_is_asked_for_before_shapes_are_known_to_fit(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes far beyond any memory, and beyond what a tensor can have at all."""
    monkeypatch.setattr(RecurrentDepthTransformer, "to_empty", None)
    checkpoint, folder = copy_of(trained, tmp_path / "run"), tmp_path / "export"
    export_model(trained.run_dir, folder)
    config, meta = json.loads((folder / "config.json").read_text()), json.loads((checkpoint / "meta.json").read_text())
    for changes, message in [
        ({"ffn_dim": 2**20}, "does not fit its own configuration: .*tensors differ"),
        ({"core_layers": 2**10}, "does not fit its own configuration: .*more layers than"),
        ({"ffn_dim": 2**40}, r"ffn_dim: .*1048576"),
        ({"ffn_dim": 2**62}, r"ffn_dim: .*1048576"),
        ({"dim": 2**40}, r"dim: .*1048576"),
        ({"core_layers": 10**12}, r"core_layers: .*1024"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | changes))
        values = meta["config"] | {"model": meta["config"]["model"] | changes}
        write_meta(checkpoint, meta | {"config": values})
        for path in (folder, checkpoint):
            with pytest.raises(MythosError, match=message):
                open_model(path)


def test_damage_is_detected(trained: Trainer, tmp_path: Path) -> None:
    checkpoint = copy_of(trained, tmp_path / "run")
    [shard] = checkpoint.glob("*.safetensors")
    whole = shard.read_bytes()
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(MythosError, match=f"damaged: {shard.name}: its bytes are not those that were written"):
        open_model(checkpoint)
    with far_away(checkpoint) as url, pytest.raises(MythosError, match=f"{shard.name}: its bytes are not those"):
        open_model(url)
    shard.unlink()
    with pytest.raises(MythosError, match=r"damaged: .*No such file"):
        open_model(checkpoint)
    with far_away(checkpoint) as url, pytest.raises(MythosError, match=r"step-00000004 cannot be fetched: "):
        open_model(url)

    # Where there are no checksums, as in earlier versions.
    meta = json.loads((checkpoint / "meta.json").read_text())
    write_meta(checkpoint, {key: value for key, value in meta.items() if key != "files"})
    with pytest.raises(MythosError, match=r"does not fit its own configuration: .* in the file"):
        open_model(checkpoint)
    for end in (4, len(whole) // 2):
        shard.write_bytes(whole[:end])
        with pytest.raises(MythosError, match="step-00000004 is damaged: "):
            open_model(checkpoint)
