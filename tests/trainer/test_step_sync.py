"""A training step never waits for the device: what would is refused, also on a CPU, where nothing waits.

Copies between host and device cannot be seen where both are one: `tests/model/test_gpu_readiness.py` looks at them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.model.ops import grouped_experts
from mythos.trainer import StepResult, Trainer
from tests.runs import tiny

TO_HOST = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__repr__, Tensor.__format__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.__reduce_ex__),
}
"""What reads values, or copies them to the host; some of it does nothing on a CPU that a dispatch mode would see."""
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
SIZED_BY_DATA = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
"""Operations whose result's shape is known only once the device has computed."""
INDEXED = {"index", "index_put", "_unsafe_index", "_index_put_impl"}


class Waits(Exception):
    """An operation that waits for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses what reads values and what gives shapes that depend on them, in both passes; counts what ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self.reads = NoReading()

    def __enter__(self) -> "NoWaiting":
        self.reads.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.reads.__exit__(*exception)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if name in READS | SIZED_BY_DATA:
            raise Waits(name)
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Waits("repeat_interleave without output_size")
        indices = tree_leaves(args[1]) if name.removesuffix("_") in INDEXED else []
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise Waits(f"{name} by a mask")
        self.ran.add(name)
        return function(*args, **kwargs)


class NoReading(TorchFunctionMode):
    """The part of `NoWaiting` that sees calls which on a CPU become no operation; not those of a backward pass."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in TO_HOST:
            raise Waits(function.__name__)
        if function is Tensor.to and "cpu" in args[1:]:
            raise Waits("to('cpu')")
        return function(*args, **kwargs)


class HostRows(list):
    """The numbers of a batch's rows, which are on the host on every device: not a tensor, so that all others are."""

    def __getitem__(self, chosen: Any) -> "HostRows":
        return HostRows(list.__getitem__(self, place) for place in chosen)

    def tolist(self) -> list[int]:
        return list(self)


def step_without_waiting(trainer: Trainer) -> tuple[StepResult, set[str]]:
    """A step, and the operations that it ran."""
    batch = trainer.loader.next_batch()
    batch = batch._replace(rows=HostRows(batch.rows.tolist()))
    with NoWaiting() as waiting:
        result = trainer.train_step(batch)
    trainer.step += 1
    return result, waiting.ran


@pytest.mark.parametrize(
    "changes",
    [
        {"model__halting": "gate", "model__core_layers": 2},
        {"model__halting": "act", "model__attention": "gqa", "model__core_ffn": "dense", "data__mask_documents": True},
        {"train__dtype": "bfloat16", "parallel__activation_checkpointing": "loop", "model__loop_embedding": True}
        | {"model__router_loop": "embedding", "model__router_bias_per_loop": True, "model__loop_norm": "adaptive"},
        {"optim__name": "muon", "model__core_layers": 2},
        {"train__dtype": "bfloat16", "parallel__activation_checkpointing": "selective", "model__lanes": 2},
    ],
    ids=["gate", "act", "recomputation", "muon", "selective recomputation"],
)
def test_step_waits_for_nothing(tmp_path, monkeypatch, changes):
    """Micro-batches, rows that join, passes without gradient, clipping, a skipped update, routers' biases."""
    # The grouped products of a GPU: those of a CPU read where groups end, which there is on the host.
    monkeypatch.setattr(
        grouped_experts, "grouped_product", lambda x, weights, ends: F.grouped_mm(x, weights, offs=ends)
    )
    monkeypatch.setattr(grouped_experts, "grouped_outer", lambda x, y, ends: F.grouped_mm(x.T, y, offs=ends))
    trainer = Trainer(tiny(tmp_path, optim__clip=0.1, depth__curriculum={"shape": "none"}, **changes))
    trainer.resources.close()
    weight = trainer.model.norm.weight
    for skipped in (False, True, False):
        kept = weight.detach().clone()
        if skipped:
            weight.data[0] = float("nan")
        result, ran = step_without_waiting(trainer)
        assert result.loss.isnan() == skipped and (skipped or result.grad_norm > 0.1)
        assert len(set(result.plan.loops)) > 1 and max(result.plan.loops) > result.plan.backprop
        weight.data.copy_(kept if skipped else weight)
    assert int(trainer.skipped) == 1
    assert "_fused_adamw_" in ran
    assert ("baddbmm" in ran) == (trainer.config.optim.name == "muon")
    assert ("_grouped_mm" in ran) == (trainer.config.model.core_ffn == "moe")


OPERATIONS = [
    lambda x: x.sum().item(),
    lambda x: bool(x.any()),
    lambda x: int(x.sum()),
    lambda x: float(x.sum()),
    lambda x: [0, 1][x.sum().long() * 0],
    lambda x: f"{x.sum()}",
    lambda x: torch.arange(3)[x.sum() > 5 :],
    lambda x: torch.equal(x, x),
    lambda x: x.nonzero(),
    lambda x: torch.where(x > 0),
    lambda x: x.masked_select(x > 0),
    lambda x: x[x > 0],
    lambda x: x.index_put((x > 0,), x.new_ones(())),
    lambda x: x.unique(),
    lambda x: torch.unique_consecutive(x),
    lambda x: x.long().bincount(),
    lambda x: x.repeat_interleave(x.long()),
]
CALLS = [lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x.cpu(), lambda x: x.to("cpu")]


@pytest.mark.parametrize("waits", [*OPERATIONS, *CALLS])
def test_waiting_is_seen(waits):
    """Each way to wait, planted, is refused."""
    with NoWaiting(), pytest.raises(Waits):
        waits(torch.ones(4))


@pytest.mark.parametrize("waits", OPERATIONS)
def test_waiting_is_seen_in_a_backward_pass(waits):
    x = torch.ones(4, requires_grad=True)

    def hook(gradient: Tensor) -> None:
        waits(gradient)

    y = x * 2
    y.register_hook(hook)
    with NoWaiting(), pytest.raises(Waits):
        y.sum().backward()


def test_other_work_is_let_through():
    x = torch.ones(4)
    with NoWaiting() as waiting:
        x[torch.tensor([0, 1])] + x[:2].to(torch.float64).topk(2).values
        x.repeat_interleave(torch.tensor([1, 0, 2, 1]), output_size=4).masked_fill(x > 0, 0.0)
    assert waiting.ran >= {"index", "topk", "repeat_interleave", "masked_fill"}
