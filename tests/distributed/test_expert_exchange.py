"""Experts over several ranks against the same experts on one, and what the exchange sends and waits for."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from mythos.config.presets import preset_config
from mythos.distributed.sharding import divide_experts
from mythos.model.cache import DecodeCache
from mythos.model.config import ModelConfig
from mythos.model.decoding import Extension
from mythos.model.halting import halting_rule
from mythos.model.layers import truncated_normal
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops import expert_exchange
from mythos.model.ops.expert_exchange import CheckpointedPass, ExpertExchange, Transfer
from mythos.model.ops.grouped_experts import ExpertWeights, run_experts
from mythos.model.rdt import RecurrentDepthTransformer
from tests.distributed.pool import RankPool

EXPERTS, DIM, HIDDEN, CHOSEN = 8, 16, 24, 3
ROUTINGS = {
    "even": range(EXPERTS),
    "all to the last rank": range(EXPERTS - CHOSEN, EXPERTS),
    "all to the first rank": range(CHOSEN),
    "some experts idle": range(0, EXPERTS, 2),
}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(rank: int, tokens: int, routing: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A rank's tokens, gates, chosen experts, and gradient of the result."""
    generator = torch.Generator().manual_seed(rank)
    allowed = torch.tensor(list(ROUTINGS[routing]))
    chosen = allowed[torch.rand(tokens, len(allowed), generator=generator).argsort(1)[:, :CHOSEN]]
    return draw(tokens, DIM, seed=rank), draw(tokens, CHOSEN, seed=9 + rank).abs(), chosen, draw(tokens, DIM, seed=99)


def stacks(first: int, count: int) -> tuple[Tensor, Tensor]:
    whole = draw(EXPERTS, DIM, 2 * HIDDEN, seed=1), draw(EXPERTS, HIDDEN, DIM, seed=2)
    gate_up, down = (part[first : first + count].clone().requires_grad_() for part in whole)
    return gate_up, down


def results(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, y: Tensor, grad: Tensor) -> list[Tensor]:
    y.backward(grad)
    return [tensor for tensor in (y.detach(), x.grad, gates.grad, gate_up.grad, down.grad) if tensor is not None]


def alone(rank: int, tokens: int, routing: str, dtype: torch.dtype) -> list[Tensor]:
    x, gates, chosen, grad = problem(rank, tokens, routing)
    gate_up, down = stacks(0, EXPERTS)
    x, gates = x.to(dtype).requires_grad_(), gates.requires_grad_()
    y = run_experts(x, gates, chosen, ExpertWeights(gate_up, down, dtype))
    return results(x, gates, gate_up, down, y, grad)


def together(tokens: list[int], routing: str, dtype: torch.dtype) -> list[Tensor]:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, gates, chosen, grad = problem(rank, tokens[rank], routing)
    held = EXPERTS // ranks
    gate_up, down = stacks(rank * held, held)
    x, gates = x.to(dtype).requires_grad_(), gates.requires_grad_()
    weights = ExpertWeights(gate_up, down, dtype)
    exchange = ExpertExchange(None, ranks)
    y = exchange.start(chosen, held).run(x, gates, weights)
    with torch.no_grad():
        assert torch.equal(exchange.start(chosen, held).run(x, gates, weights), y)
    found = results(x, gates, gate_up, down, y, grad)
    dist.barrier()
    return found


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "dtype"), [([40, 33], torch.float32), ([17, 0, 5, 1], torch.bfloat16), ([1, 0], torch.float32)], ids=str
)
def test_equals_one_rank_with_all_experts(pool: RankPool, tokens: list[int], routing: str, dtype: torch.dtype) -> None:
    """Results and gradients of tokens, gates and weights. In bfloat16 matmuls of other sizes round differently."""
    everyone = pool.run(together, tokens, routing, dtype, ranks=len(tokens))
    expected = [alone(rank, count, routing, dtype) for rank, count in enumerate(tokens)]
    held = EXPERTS // len(tokens)
    for rank, (mine, whole) in enumerate(zip(everyone, expected, strict=True)):
        of_weights = [
            torch.stack([other[index] for other in expected]).sum(0)[rank * held : (rank + 1) * held]
            for index in (3, 4)
        ]
        for actual, reference in zip(mine, whole[:3] + of_weights, strict=True):
            assert actual.dtype == reference.dtype and actual.shape == reference.shape
            error = (actual.float() - reference.float()).norm()
            assert error <= (1e-6 if dtype == torch.float32 else 5e-3) * reference.float().norm()


def counted(recomputed: bool) -> tuple[list[tuple[str, int]], list[Tensor]]:
    """All-to-alls of a call in order, by the type of what they send, and its elements; outputs and gradients."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, gates, chosen, grad = problem(rank, 6, "even")
    gate_up, down = stacks(rank * EXPERTS // ranks, EXPERTS // ranks)
    x, gates = x.requires_grad_(), gates.requires_grad_()
    weights, exchange = ExpertWeights(gate_up, down, torch.float32), ExpertExchange(None, ranks)
    sent: list[tuple[str, int]] = []
    all_to_all = dist.all_to_all_single

    def recorded(output: Tensor, tensor: Tensor, *sizes: Any, **options: Any) -> Any:
        sent.append((str(tensor.dtype).removeprefix("torch."), tensor.numel()))
        return all_to_all(output, tensor, *sizes, **options)

    def run(x: Tensor, gates: Tensor) -> Tensor:
        return exchange.start(chosen, EXPERTS // ranks).run(x, gates, weights) * 2  # `*` needs nothing of the result

    with patch.object(dist, "all_to_all_single", recorded):
        if recomputed:
            y = checkpoint(run, x, gates, use_reentrant=False, context_fn=CheckpointedPass.contexts)
        else:
            y = run(x, gates)
        found = results(x, gates, gate_up, down, y, grad)
    dist.barrier()
    return sent, found


def test_a_recomputation_exchanges_no_counts(pool: RankPool) -> None:
    """It knows the sizes, so it waits for nothing; and stops before the results, which no gradient needs."""
    plain, again = pool.run(counted, False, ranks=2), pool.run(counted, True, ranks=2)
    assert CheckpointedPass.current is None
    counts = [("int64", 2 * 4)]
    for rank, ((sent, found), (sent_again, found_again)) in enumerate(zip(plain, again, strict=True)):
        # What a rank's tokens send: a row to each rank that holds experts of a token, with three gates and experts.
        reached = sum(
            len({expert // (EXPERTS // 2) for expert in token}) for token in problem(rank, 6, "even")[2].tolist()
        )
        assert 6 < reached < 12
        rows, values = ("float32", reached * (DIM + 2 * CHOSEN)), ("float32", reached * DIM)
        assert [kind for kind, _ in sent] == ["int64", "float32", "float32", "float32", "float32"]
        assert sent[:1] == counts and sent[1] == rows and sent[3] == values
        assert sent_again == [*sent[:4], rows, sent[4]]  # once the gradient of the results is here
        assert all(torch.equal(one, other) for one, other in zip(found, found_again, strict=True))


def order_of_calls(recomputed: bool) -> list[str]:
    """Starts and ends of transfers, and when a block's shared and routed experts run, forward and backward."""
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128, context_length=32))
    divide_experts(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "expert")))
    ffn = experts_are_used(model).recurrence.blocks[0].ffn
    calls: list[str] = []
    send, wait, start = ExpertExchange.send, Transfer.wait, expert_exchange.start_experts

    def sends(self: ExpertExchange, *arguments: Any) -> Transfer:
        calls.append("send")
        return send(self, *arguments)

    def waits(self: Transfer) -> Tensor:
        calls.append("wait")
        return wait(self)

    def starts(rows: Tensor, *arguments: Any) -> Callable[[], Tensor]:
        calls.append("experts")
        if rows.requires_grad:
            rows.register_hook(lambda gradient: calls.append("experts backward"))
        return start(rows, *arguments)

    for name, linear in (("up", ffn.shared.gate_up), ("down", ffn.shared.down)):
        linear.register_forward_hook(lambda *_, name=name: calls.append(name))
        linear.register_full_backward_hook(lambda *_, name=name: calls.append(f"{name} backward"))
    x = draw(1, 6, model.config.dim, seed=dist.get_rank()).requires_grad_()
    with (
        patch.object(ExpertExchange, "send", sends),
        patch.object(Transfer, "wait", waits),
        patch.object(expert_exchange, "start_experts", starts),
    ):
        if recomputed:
            options: dict[str, Any] = {"use_reentrant": False, "context_fn": CheckpointedPass.contexts}
            output = checkpoint(lambda value: ffn(value)[0], x, **options)
        else:
            output = ffn(x)[0]
        calls.append("|")
        output.square().sum().backward()
    dist.barrier()
    return calls


def test_shared_experts_run_while_rows_travel(pool: RankPool) -> None:
    """Forward between sending and waiting for tokens, backward between sending and waiting for their gradients.

    Their last matmul too, unless the pass is recomputed: then it comes later, so that the recomputation ends before it.
    """
    for calls in pool.run(order_of_calls, False, ranks=2):
        forward = ["send", "up", "down", "wait", "experts", "send", "wait"]
        backward = ["send", "wait", "experts backward", "send", "down backward", "up backward", "wait"]
        assert calls == [*forward, "|", *backward]
    for calls in pool.run(order_of_calls, True, ranks=2):
        again = ["send", "up", "wait", "experts"]
        # The recomputation begins once the gradient of the results is here.
        backward = ["send", "wait", *again, "down backward", "experts backward", "send", "up backward", "wait"]
        assert calls == [*again, "down", "send", "wait", "|", *backward]


PROMPTS = [[[3, 4, 5, 6, 7, 8, 9]], [[40, 41, 42]]]
"""A rank's rows of token ids."""


def experts_are_used(model: RecurrentDepthTransformer) -> RecurrentDepthTransformer:
    """Starting values, but with other down-projections than zeros, which would make experts do nothing."""
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.initializers["down"] = truncated_normal(4)
            module.shared.down.initializers["weight"] = truncated_normal(4)
    return model.to_empty(device="cpu").initialize(5)


def extend(model: RecurrentDepthTransformer, ids: list[list[int]], threshold: float | None) -> Extension:
    cache = DecodeCache(model.config, len(ids), loops=12)
    rule = None if threshold is None else halting_rule(model, "convergence", threshold)
    return model.extend(torch.tensor(ids), cache, loops=12, halting=rule, logits="all")


def extend_here(config: ModelConfig, threshold: float | None, shared: bool) -> Extension:
    dist.init_process_group("gloo")
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    mesh, of_shared = (init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", name)) for name in ("expert", "shared"))
    divide_experts(model, mesh, of_shared if shared else None)
    result = extend(experts_are_used(model), PROMPTS[dist.get_rank()], threshold)
    dist.barrier()
    return result


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_ranks_decode_to_different_depths(pool: RankPool, threshold: float | None, shared: bool) -> None:
    """A rank whose positions have halted computes for the others until the last one has."""
    config = preset_config("mythos_nano", vocab_size=128, core_layers=2, context_length=32)
    expected = [extend(experts_are_used(RecurrentDepthTransformer(config)), ids, threshold) for ids in PROMPTS]
    for actual, reference in zip(pool.run(extend_here, config, threshold, shared, ranks=2), expected, strict=True):
        assert torch.equal(actual.loops, reference.loops)
        torch.testing.assert_close(actual.logits, reference.logits, rtol=1e-5, atol=1e-5)
    assert threshold is None or expected[0].loops.max() != expected[1].loops.max()
