"""Shared experts that ranks divide against whole ones: a layer, its order of calls, and training in one process."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mythos.model.ops import shared_experts
from mythos.model.ops.expert_exchange import CheckpointedPass
from mythos.model.ops.shared_experts import SharedExpertGroup, SliceWeights
from mythos.model.ops.transfer import Transfer
from tests.distributed.pool import RankPool
from tests.distributed.test_expert_exchange import draw
from tests.distributed.test_expert_parallel import ALL, FSDP, GATE, HSDP, LOOP, MUON, SELECTIVE, memory
from tests.distributed.test_parallel import CHANGES, Trained, assert_same, train
from tests.runs import tiny

DIM, HIDDEN = 16, 24
SMALL_BLOCKS = {"LEAST_TOKENS": 16, "BLOCK_ELEMENTS": 1}
"""So that tokens are computed 16 at a time, in several blocks."""


def problem(rank: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A rank's tokens, and the gradient of the result."""
    return draw(tokens, DIM, seed=rank).to(dtype).requires_grad_(), draw(tokens, DIM, seed=99)


def whole_weights() -> tuple[Tensor, Tensor]:
    """gate_up (2 H, D) and down (D, H)."""
    return draw(2 * HIDDEN, DIM, seed=1).requires_grad_(), draw(DIM, HIDDEN, seed=2).requires_grad_()


def alone(rank: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Result of two uses, and gradients of tokens and weights, by torch's operators."""
    x, grad = problem(rank, tokens, dtype)
    gate_up, down = whole_weights()
    for _ in range(2):
        gate, up = F.linear(x, gate_up.to(dtype)).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down.to(dtype)).float()
        y.backward(grad)
    return [tensor for tensor in (y.detach(), x.grad, gate_up.grad, down.grad) if tensor is not None]


def together(tokens: list[int], dtype: torch.dtype) -> list[Tensor]:
    """The same by ranks that divide the hidden units; gradients of weights are those of this rank's slice."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, grad = problem(rank, tokens[rank], dtype)
    mine = slice(rank * HIDDEN // ranks, (rank + 1) * HIDDEN // ranks)
    gates, ups = (part[mine] for part in whole_weights()[0].detach().chunk(2))
    gate_up, down = torch.cat((gates, ups)).requires_grad_(), whole_weights()[1].detach()[:, mine].requires_grad_()
    group = SharedExpertGroup(None, ranks)
    with patch.multiple(shared_experts, **SMALL_BLOCKS):
        weights = SliceWeights(gate_up, down, dtype)
        results = []
        for _ in range(2):
            call = group.call(tokens, weights)
            results.append(call.total(call.compute(call.send(x)), len(x)))
        torch.autograd.backward(results, [grad, grad])
    dist.barrier()
    found = (results[-1].detach(), x.grad, gate_up.grad, down.grad)
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize(
    ("tokens", "dtype"), [([40, 33], torch.float32), ([17, 0, 5, 1], torch.bfloat16), ([0, 0], torch.float32)], ids=str
)
def test_a_layer_equals_whole_experts(pool: RankPool, tokens: list[int], dtype: torch.dtype) -> None:
    """With numbers of tokens that differ, and ranks without any."""
    everyone = pool.run(together, tokens, dtype, ranks=len(tokens))
    expected = [alone(rank, count, dtype) for rank, count in enumerate(tokens)]
    gate_up, down = (torch.stack([each[place] for each in expected]).sum(0) for place in (2, 3))
    for rank, (mine, reference) in enumerate(zip(everyone, expected, strict=True)):
        part = slice(rank * HIDDEN // len(tokens), (rank + 1) * HIDDEN // len(tokens))
        of_slice = torch.cat([half[part] for half in gate_up.chunk(2)]), down[:, part]
        for actual, wanted in zip(mine, (*reference[:2], *of_slice), strict=True):
            assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
            error = (actual.float() - wanted.float()).norm()
            assert error <= (1e-6 if dtype == torch.float32 else 1e-2) * wanted.float().norm()


def noted(calls: list[str]) -> ExitStack:
    """Context in which collectives and waits are written to `calls`."""
    contexts = ExitStack()

    def note(owner: type, method: str, name: str) -> None:
        function = getattr(owner, method)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        contexts.enter_context(patch.object(owner, method, call))

    note(SharedExpertGroup, "gather", "gather")
    note(SharedExpertGroup, "give_back", "give back")
    note(Transfer, "wait", "wait")
    return contexts


def order_of_calls() -> list[str]:
    """Collectives and waits of a layer, forward and backward, with the places where other work can go."""
    dist.init_process_group("gloo")
    calls: list[str] = []
    group, (x, grad) = SharedExpertGroup(None, 2), problem(dist.get_rank(), 3, torch.float32)
    weights = SliceWeights(*whole_weights(), torch.float32)

    def elsewhere(y: Tensor) -> Tensor:
        calls.append("other")
        y.register_hook(lambda _: calls.append("other"))
        return y

    with noted(calls):
        call = group.call([3, 3], weights)
        sent = call.send(x)
        first = elsewhere(x * 2)
        results = call.compute(sent)
        second = elsewhere(x * 3)
        total = call.total(results, len(x))
        calls.append("|")
        (total + first + second).backward(grad)
    dist.barrier()
    return calls


def recomputed(needed: bool, checkpointed: bool) -> tuple[list[str], list[Tensor]]:
    """Collectives and waits of the backward pass, and gradients; `needed`: the results, in a recomputation."""
    dist.init_process_group("gloo")
    calls: list[str] = []
    group, (x, grad) = SharedExpertGroup(None, 2), problem(dist.get_rank(), 3, torch.float32)
    leaves = whole_weights()
    weights = SliceWeights(*leaves, torch.float32)

    def run(x: Tensor) -> Tensor:
        call = group.call([3, 3], weights)
        total = call.total(call.compute(call.send(x)), len(x))
        return total.sin() if needed else 2 * total

    options: dict[str, Any] = {"use_reentrant": False, "context_fn": CheckpointedPass.contexts}
    y = checkpoint(run, x, **options) if checkpointed else run(x)
    with noted(calls):
        y.backward(grad)
    dist.barrier()
    return calls, [leaf.grad for leaf in (x, *leaves) if leaf.grad is not None]


@pytest.mark.parametrize("needed", [False, True])
def test_a_recomputation_sends_back_only_results_that_are_needed(pool: RankPool, needed: bool) -> None:
    """It computes the slice in that case, too."""
    way, again = ["gather", "wait", "give back", "wait"], ["gather", "wait"]
    order = [*way, *way] if needed else [*way[:2], *again, *way[2:]]
    plain = pool.run(recomputed, needed, False, ranks=2)
    for (before, expected), (calls, gradients) in zip(plain, pool.run(recomputed, needed, True, ranks=2), strict=True):
        assert before == way and calls == order
        assert len(gradients) == 3 and all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


def test_other_work_runs_while_tokens_and_results_travel(pool: RankPool) -> None:
    way = ["gather", "other", "wait", "give back", "other", "wait"]
    for calls in pool.run(order_of_calls, ranks=2):
        assert calls == [*way, "|", *way]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep 2, shared 2": (2, FSDP | GATE | {"parallel__expert": 2, "parallel__shared": 2}),
    "ep 4, shared 2, recomputed in part": (4, FSDP | GATE | SELECTIVE | {"parallel__expert": 4, "parallel__shared": 2}),
    "ep 2 x fsdp 2, shared 2, recomputed": (4, FSDP | GATE | LOOP | {"parallel__expert": 2, "parallel__shared": 2}),
    "ep 2 x replicate 2, shared 2, reduced once": (
        4,
        HSDP | GATE | {"parallel__expert": 2, "parallel__shared": 2, "parallel__reduce": "step"},
    ),
    "ep 4, shared 4, blocks, all recomputed": (
        4,
        FSDP | GATE | ALL | {"parallel__expert": 4, "parallel__shared": 4, "parallel__wrap": "block"},
    ),
}


def train_here(directory: Path, name: str, changes: dict[str, Any]) -> Trained:
    """Four steps."""
    with patch.multiple(shared_experts, **SMALL_BLOCKS):
        return train(directory, name, {**CHANGES, **changes})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    directory = tmp_path_factory.mktemp("shared")
    return directory, train_here(directory, "single", GATE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(pool: RankPool, single: tuple[Path, Trained], layout: str) -> None:
    """Depths that change every step, truncated gradient, documents, idle experts, accumulation, clipping, a gate."""
    directory, expected = single
    ranks, changes = LAYOUTS[layout]
    assert min(expected.norms) > 0.7, "clipping must act"
    for trained in pool.run(train_here, directory, layout, changes, ranks=ranks):
        assert_same(trained, expected)


def test_muon_makes_matrices_whole(pool: RankPool, single: tuple[Path, Trained]) -> None:
    """Matrices of shared experts are cut by two dimensions of the mesh, those of routed ones by one."""
    changes = {**MUON, "train__micro_batch": 8, "model__core_layers": 1}
    expected = train_here(single[0], "single, muon", changes)
    for layout in ("ep 2 x fsdp 2, shared 2, recomputed", "ep 4, shared 2, recomputed in part"):
        ranks, options = LAYOUTS[layout]
        for trained in pool.run(train_here, single[0], f"{layout}, muon", options | changes, ranks=ranks):
            assert_same(trained, expected)


@pytest.mark.parametrize("layout", ["ep 2, shared 2", "ep 2 x fsdp 2, shared 2, recomputed"])
def test_memory_of_a_rank_is_planned(pool: RankPool, tmp_path: Path, layout: str) -> None:
    """The hidden activations of this rank's slice are not kept, so the plan would be exceeded if they were."""
    tiny(tmp_path)
    ranks, changes = LAYOUTS[layout]
    sizes = pool.run(memory, tmp_path, layout, {"model__shared_expert_dim": 512, **changes}, ranks=ranks)
    planned, mean = sizes[0][1], sum(peak for peak, _ in sizes) / ranks
    print(layout, f"{planned:,} planned", [f"{peak:,} allocated" for peak, _ in sizes])
    assert 1.0 <= planned / mean <= 1.25
