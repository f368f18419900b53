"""Text samples while a model is sharded, and what several processes saved, opened and exported by one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from mythos.checkpoints.stored_model import open_model
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate
from mythos.hf.export import export_model
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny
from tests.trainers import take_step

Sampled = tuple[list[str], list[int], dict[str, Tensor]]


def train_and_sample(directory: Path) -> Sampled:
    """Three steps sharded over the ranks; the samples of the last validation, ids, and whole weights."""
    config = tiny(
        directory,
        data__streams=4,
        parallel__mode="fsdp",
        train__steps=3,
        optim__lr=0.02,
        eval__samples=2,
        eval__sample_tokens=12,
    )
    trainer = Trainer(config)
    for _ in range(3):
        take_step(trainer)
    trainer.validate()
    trainer.save(wait=True)
    trainer.model.eval()
    [row], _ = generate(trainer.model, [[5, 9, 2]], 10, sampling=Sampling(temperature=1.0), seed=3, loops=5)
    trainer.parallel.reshard()
    tensors = trainer.model.state_dict()
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    trainer.resources.close()
    return trainer.samples, row.tokens, whole


@pytest.fixture(scope="module")
def ranks(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sampled]]:
    directory = tmp_path_factory.mktemp("sampling")
    tiny(directory)  # writes the corpus
    return directory, pool.run(train_and_sample, directory, ranks=2)


def test_ranks_say_the_same(ranks: tuple[Path, list[Sampled]]) -> None:
    _, [(texts, ids, _), (other_texts, other_ids, _)] = ranks
    assert texts == other_texts and len(texts) == 2 and all(text.startswith("The ") for text in texts)
    assert ids == other_ids and len(ids) == 10


def test_one_process_opens_and_exports_what_two_saved_and_says_the_same(
    ranks: tuple[Path, list[Sampled]], tmp_path: Path
) -> None:
    directory, [(_, ids, tensors), _] = ranks
    opened = open_model(directory / "run")
    assert len(list(Path(opened.source).glob("*.safetensors"))) == 2
    own = opened.model.state_dict()
    assert own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)
    [row], _ = generate(opened.model, [[5, 9, 2]], 10, sampling=Sampling(temperature=1.0), seed=3, loops=5)
    assert row.tokens == ids

    trainer = export_model(directory / "run", tmp_path / "exported", max_shard_size="30KB")
    loaded = AutoModelForCausalLM.from_pretrained(trainer.folder).model.state_dict()
    assert trainer.files > 2 and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
