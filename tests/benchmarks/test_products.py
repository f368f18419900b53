"""Counting the matmuls of a step, and replaying them alone."""

import pytest
import torch
import torch.nn.functional as F

from mythos.gpu_check.timed_steps import Steps
from scripts.benchmarks.products import Flops, Like, executed_flops, record_products, replay_cost
from tests.runs import tiny


def test_products_and_their_gradients():
    x, w = torch.randn(6, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    assert executed_flops(lambda: x @ w) == Flops(2 * 6 * 5 * 7, 0, 0)
    assert executed_flops(lambda: (x @ w).sum().backward()) == Flops(3 * 2 * 6 * 5 * 7, 0, 0)


def test_products_in_place_are_counted():
    total, a, b = torch.zeros(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    assert executed_flops(lambda: (total.addmm_(a, b), torch.mm(a, b, out=total))).gemms == 2 * 2 * 3 * 5 * 4


def test_grouped_products_cost_a_matrix_a_row_whatever_the_groups():
    x = torch.randn(32, 8, requires_grad=True)
    w = torch.randn(3, 8, 16, requires_grad=True)
    ends = torch.tensor([4, 4, 32], dtype=torch.int32)
    one = 2 * 32 * 8 * 16
    assert executed_flops(lambda: F.grouped_mm(x, w, offs=ends)).gemms == one
    assert executed_flops(lambda: F.grouped_mm(x, w, offs=ends).square().sum().backward()).gemms == 3 * one


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_counted_as_far_as_the_mask_lets_it_look(causal):
    rows, heads, length, dim = 2, 3, 64, 16
    query, key, value = (torch.randn(rows, heads, length, dim, requires_grad=True) for _ in range(3))
    pairs = rows * heads * sum(1 for i in range(length) for j in range(length) if j <= i or not causal)

    def attend():
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)

    assert executed_flops(attend) == Flops(0, 2 * 2 * dim * pairs, 0)
    # Backward: scores again, then gradients of weights, values, queries and keys.
    again = 2 * dim * pairs
    assert executed_flops(lambda: attend().sum().backward()) == Flops(0, (2 + 5) * again, again)


def steps(tmp_path, checkpointing: str) -> Steps:
    """Steps with gradient through all loops; keys and values have the same width, so kernels need not pad them."""
    return Steps(
        tiny(
            tmp_path, model__attention="gqa", model__vocab_size=384, depth={"sampling": "fixed", "backprop": 3},
            parallel__activation_checkpointing=checkpointing,
        )
    )  # fmt: skip


def test_a_step_executes_what_it_needs_and_checkpointing_the_loops_once_more(tmp_path):
    with steps(tmp_path, "none") as plain, steps(tmp_path, "loop") as again:
        needed = plain.flops_needed
        once, twice = executed_flops(plain), executed_flops(again)
    assert (once.total - once.recomputed) / needed == pytest.approx(1, abs=0.02)
    # Recomputation ends with the last value that the backward pass needs: before the outputs of the routed experts.
    model = again.config.model
    outputs = 3 * 2 * model.dim * model.experts_per_token * model.expert_dim
    recomputed = (core_flops(again.config) - outputs) * again.tokens
    assert twice.total - once.total == pytest.approx(recomputed, rel=0.001)


def core_flops(config) -> float:
    """FLOPs per token of three forward passes of the core, added up from its matrices."""
    m = config.model
    projections = m.dim * m.head_dim * (2 * m.n_heads + 2 * m.n_kv_heads)
    attention = m.n_heads * 2 * m.head_dim * (config.data.sequence_length + 1) / 2
    hidden = m.experts_per_token * m.expert_dim + m.n_shared_experts * m.shared_expert_dim
    return 3 * 2 * (projections + attention + m.dim * m.n_experts + 3 * m.dim * hidden + 2 * m.dim * m.lora_rank)


def test_products_are_recorded_with_their_layout_and_counted():
    x, w = torch.randn(6, 5), torch.randn(7, 5)
    products = record_products(lambda: [x @ w.T for _ in range(4)])
    ((product, count),) = products.items()
    assert count == 4
    assert product.arguments == (
        Like((6, 5), (5, 1), torch.float32, None), Like((5, 7), (1, 5), torch.float32, None),
    )  # fmt: skip
    assert product.prepare(torch.device("cpu"))().shape == (6, 7)


def test_a_likeness_keeps_groups_and_layout():
    ends = torch.tensor([2, 9], dtype=torch.int32)
    assert torch.equal(Like.of(ends).make(torch.device("cpu")), ends)
    turned = torch.empty(3, 4, dtype=torch.bfloat16).T
    copy = Like.of(turned).make(torch.device("cpu"))
    assert (copy.shape, copy.stride(), copy.dtype) == (turned.shape, turned.stride(), turned.dtype)


def test_the_replay_takes_each_product_as_often_as_the_step_does(tmp_path):
    with steps(tmp_path, "none") as plain:
        products = record_products(plain)
    timed = []

    def clock(work):
        shape = tuple(work().shape)
        timed.append(shape)
        return 0.5 if len(timed) % 2 else 0.25  # the better of two counts

    assert replay_cost(products, torch.device("cpu"), clock) == 0.25 * products.total()
    assert len(timed) == 2 * len(products)
