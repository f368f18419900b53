"""transformers' `Trainer` in two processes: the loss and weights of one, whatever padding falls to which."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import set_seed

from mythos.hf import MythosConfig, MythosForCausalLM
from tests.distributed.pool import RankPool
from tests.hf.conftest import CONTEXT, VOCABULARY
from tests.hf.test_trainer import collator, trained
from tests.model.conftest import SMALL, scrambled


def train(folder: Path, size: int, halting: str, options: dict[str, object]) -> tuple[list[float], dict[str, Tensor]]:
    set_seed(0)
    config = MythosConfig(**{**SMALL, "vocab_size": VOCABULARY, "context_length": CONTEXT, "halting": halting})
    model = scrambled(MythosForCausalLM(config), 0.15)
    more = {"ddp_backend": "gloo", **options} if size < 4 else options
    losses = trained(model, folder, size, 1, collator("left"), more)
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("halting", "options"),
    [
        ("convergence", {}),
        ("convergence", {"label_smoothing_factor": 0.1}),
        ("gate", {"gradient_checkpointing": True}),  # a gate gets no gradient here, and DDP would wait for one
    ],
)
def test_two_processes_train_as_one(pool: RankPool, tmp_path: Path, halting: str, options: dict[str, object]) -> None:
    expected, weights = train(tmp_path, 4, halting, options)
    for losses, weights in pool.run(train, tmp_path, 2, halting, options, ranks=2):
        assert losses == pytest.approx(expected, abs=2e-4)
        for name, value in weights.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
