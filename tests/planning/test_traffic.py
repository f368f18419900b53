"""The traffic counter against bytes counted by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mythos.config.presets import preset_config
from mythos.model.config import ModelConfig
from mythos.model.ops.grouped_experts import _gating, _gating_backward, _sum_of_slots
from mythos.planning.traffic import (
    StepTraffic,
    Traffic,
    TrafficCounter,
    compiled_pass_traffic,
    step_time,
    step_traffic,
)
from mythos.torch_internals import FakeTensorMode, PlannedKernel, planning_backend

N, D = 6, 8
FLOAT, HALF = 4 * N * D, 2 * N * D
"""Bytes of an (N, D) tensor in float32 and bfloat16."""

OPERATIONS = {
    "reads one, writes one": (lambda x, w: torch.sigmoid(x), 1, 0, 2 * FLOAT),
    "reads two": (lambda x, w: x * x.clone(), 2, 0, 2 * FLOAT + 3 * FLOAT),
    "a row that is broadcast is read once": (lambda x, w: x * w[0], 1, 0, 2 * FLOAT + 4 * D),
    "an expanded tensor has few elements": (lambda x, w: x + w[:1].expand(N, D), 1, 0, 2 * FLOAT + 4 * D),
    "in place": (lambda x, w: x.mul_(2), 1, 0, 2 * FLOAT),
    "a copy does not read what it overwrites": (lambda x, w: x.copy_(w[:N]), 1, 0, 2 * FLOAT),
    "nor does an out argument": (lambda x, w: torch.mul(x, x, out=w[:N]), 1, 0, 3 * FLOAT),
    "cast": (lambda x, w: x.bfloat16(), 1, 0, FLOAT + HALF),
    "no cast": (lambda x, w: x.float(), 0, 0, 0),
    "views": (lambda x, w: x.view(D, N).t()[1:].unsqueeze(0), 0, 0, 0),
    "nothing is written to an empty tensor": (lambda x, w: torch.empty_like(x), 0, 0, 0),
    "lookup reads rows, not the table": (
        lambda x, w: w.index_select(0, torch.zeros(N, dtype=torch.int64)),
        2,  # torch.zeros is the other
        0,
        8 * N + (8 * N + 2 * FLOAT),
    ),
    "matrix products are left out": (lambda x, w: x @ w.T, 0, 1, 0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_count_as_by_hand(name):
    operation, kernels, products, size = OPERATIONS[name]
    with FakeTensorMode():
        x, w = torch.zeros(N, D), torch.zeros(1000, D)
        with TrafficCounter() as counter:
            operation(x, w)
    assert (counter.kernels, counter.products, counter.bytes) == (kernels, products, size)


def test_norms_count_as_one_kernel_forward_and_two_backward():
    from mythos.model.layers import RMSNorm

    with FakeTensorMode():
        norm, x = RMSNorm(D, 1e-6, cast=False), torch.zeros(N, D, requires_grad=True)
        with TrafficCounter() as counter:
            counter.fuse_norms([norm])
            y = norm(x)
            assert (counter.kernels, counter.bytes) == (1, 2 * FLOAT)
            y.backward(torch.zeros(N, D))
    # The backward pass reads x and the gradient for each of two results, one of which is as large as x.
    assert (counter.kernels, counter.bytes) == (1 + 2 + 1, 2 * FLOAT + 5 * FLOAT + FLOAT)  # and zeros


def dense() -> ModelConfig:
    return ModelConfig(
        vocab_size=128,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        attention="gqa",
        core_ffn="dense",
        ffn_dim=96,
        prelude_layers=1,
        core_layers=1,
        coda_layers=1,
        loops=4,
        lora_rank=0,
    )


def test_loops_and_the_rest_add_up_to_steps_of_any_depth():
    from mythos.planning.fake_step import Step, fake_model, run_forward

    counted = step_traffic(dense(), 16, rows=2)
    for loops in (3, 9):
        step = Step(2, 16, loops, loops, "none", torch.bfloat16)
        with fake_model(dense(), step) as model, TrafficCounter() as counter:
            counter.fuse_norms(model.modules())
            objective = run_forward(model, step)
            forward = counter.take()
            objective.backward()
            backward = counter.take()
        for name, (kernels, _, size) in (("forward", forward), ("backward", backward)):
            for what, value in (("kernels", kernels), ("bytes", size / 32)):
                key = f"{what}_{name}"
                assert value == pytest.approx(getattr(counted.once, key) + loops * getattr(counted.loop, key))


def test_recomputation_adds_a_forward_pass_to_the_backward_pass():
    plain, again = (step_traffic(preset_config("mythos_nano"), 64, 2, mode).loop for mode in ("none", "loop"))
    assert again.bytes_forward == plain.bytes_forward
    # Recomputation ends with the last tensor that the backward pass needs: before the outputs of the routed experts,
    # and all that is added up from there on.
    assert 0.7 * plain.bytes_forward < again.bytes_backward - plain.bytes_backward <= plain.bytes_forward


def test_weight_gradients_are_summed_once_a_micro_batch_so_large_ones_move_less_per_token():
    few, many = (step_traffic(preset_config("mythos_small"), 256, rows).loop for rows in (1, 16))
    assert many.bytes_forward == pytest.approx(few.bytes_forward, rel=0.01)
    assert many.bytes_backward < few.bytes_backward


def test_a_model_of_fixed_depth_has_no_loop():
    fixed = ModelConfig(**{**dense().model_dump(), "injection": "none", "loops": 1})
    counted = step_traffic(fixed, 16)
    assert counted.loop.kernels_forward == 0 and counted.loop.bytes_backward == 0
    assert counted.once.bytes_forward > 0


def planned(function: Callable[..., Any], *inputs: torch.Tensor) -> dict[bool, list[PlannedKernel]]:
    """The kernels of a function's graphs, forward and backward (True)."""
    kernels: dict[bool, list[PlannedKernel]] = {}
    torch.compiler.reset()
    output = torch.compile(function, backend=planning_backend(kernels.__setitem__))(*inputs)
    if output.requires_grad if isinstance(output, torch.Tensor) else False:
        output.sum().backward()
    torch.compiler.reset()
    return kernels


def test_planned_kernels_against_bytes_by_hand():
    rows, width = 128, 64
    size, matrix = 4 * rows * width, 4 * width**2
    with FakeTensorMode():
        x, w = torch.zeros(rows, width, requires_grad=True), torch.zeros(width, width)
        kernels = planned(lambda x, w: torch.sigmoid(torch.exp(x) @ w) * 2, x, w)
    assert [(kernel.extern, kernel.size) for kernel in kernels[False]] == [
        (False, 2 * size),  # exp reads x and writes its result
        (True, 2 * size + matrix),
        (False, 2 * size),  # sigmoid and the factor, fused
    ]
    # sigmoid's backward kernel also reads the matmul's result, exp's reads exp(x).
    assert [(kernel.extern, kernel.size) for kernel in kernels[True]] == [
        (False, 3 * size),
        (True, 2 * size + matrix),
        (False, 3 * size),
    ]


@pytest.mark.parametrize("function", [_gating, _gating_backward, _sum_of_slots])
def test_fused_functions_are_one_kernel(function):
    """Inductor plans one kernel that reads the arguments and writes the results once, as the counter assumes."""
    slots, hidden, chosen = 256, 64, 4
    half = {"dtype": torch.bfloat16}
    with FakeTensorMode():
        weight = torch.zeros(slots, 1)
        inputs = {
            _gating: (torch.zeros(slots, 2 * hidden, **half), weight),
            _gating_backward: (torch.zeros(slots, hidden, **half), torch.zeros(slots, 2 * hidden, **half), weight),
            _sum_of_slots: (
                torch.zeros(slots, hidden, **half),
                torch.zeros(slots, dtype=torch.int64),
                torch.Size((slots // chosen, chosen)),
            ),
        }[function]
        with torch.no_grad():
            [kernel] = planned(function, *inputs)[False]
            results = function(*inputs)
    moved = [*inputs, *(results if isinstance(results, tuple) else (results,))]
    assert not kernel.extern
    assert kernel.size == pytest.approx(sum(x.nbytes for x in moved if isinstance(x, torch.Tensor)), rel=0.01)


def test_a_compiled_loop_moves_half_of_what_an_eager_one_does():
    config = preset_config("mythos_small").model_copy(update={"core_layers": 1})
    eager, compiled = step_traffic(config, 512, 8).loop, compiled_pass_traffic(config, 512, 8)
    assert compiled.bytes_forward < 0.5 * eager.bytes_forward
    assert compiled.bytes_backward < 0.5 * eager.bytes_backward
    assert compiled.kernels_forward < 0.5 * eager.kernels_forward
    assert compiled.kernels_backward < 0.5 * eager.kernels_backward
    products = (compiled.products_forward, eager.products_forward)
    assert abs(products[0] - products[1]) <= 2, "the same products"


def test_time_of_a_token_by_hand():
    once = Traffic(10, 5, 1000.0, 20, 10, 2000.0)
    loop = Traffic(4, 1, 100.0, 8, 2, 300.0)
    arguments: dict[str, Any] = {
        "executed": 7e6,
        "loops": 6.0,
        "backprop": 2.0,
        "optimizer": 800.0,
        "peak": 1e12,
        "bandwidth": 1e9,
    }
    eager = step_time(StepTraffic(once, loop), tokens=10**6, compiled=False, **arguments)
    assert eager.products == pytest.approx(7e6 / 0.55e12)
    assert eager.elementwise == pytest.approx((3000 + 6 * 100 + 2 * 300 + 800) / 1e9)
    assert eager.waiting == 0
    compiled = step_time(StepTraffic(once, loop), tokens=10**6, compiled=True, **arguments)
    assert compiled.elementwise == pytest.approx((0.47 * 4200 + 800) / 1e9)
    # 45 launches, 6 loops of 5 forward and 2 of 10 backward take 475 us, longer than the work of a token.
    few = step_time(StepTraffic(once, loop), tokens=1, compiled=False, **arguments)
    assert few.total == pytest.approx(95 * 5e-6)
    assert step_time(StepTraffic(once, loop), tokens=1, compiled=True, **arguments).waiting == 0
