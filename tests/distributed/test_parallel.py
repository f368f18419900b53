"""Training on several processes against training in one: same losses, gradients and weights under every layout."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.tensor import DTensor

from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny

CHANGES: dict[str, Any] = {
    "data__streams": 4,
    "data__sequence_length": 8,
    "data__mask_documents": True,
    "train__global_batch": 16,
    "train__micro_batch": 3,  # leaves a smaller one, and accumulates on four ranks, too
    "train__steps": 6,
    "model__n_experts": 16,
    "model__expert_groups": 4,
    "model__groups_per_token": 2,
    "model__core_layers": 2,
    "model__prelude_layers": 1,
    "model__coda_layers": 1,
    "model__tie_embeddings": False,
    "model__router_bias_rate": 0.01,
    "depth__mean": 4,
    "depth__backprop": 2,
    "optim__clip": 0.7,
    "optim__lr": 3e-3,
    "optim__warmup": 0.0,
    "optim__eps": 1e-5,  # an element's first update is lr x sign otherwise, and rounding decides signs near zero
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp on 2": (2, {"parallel__mode": "ddp"}),
    "ddp on 4": (4, {"parallel__mode": "ddp"}),
    "fsdp on 2": (2, {"parallel__mode": "fsdp"}),
    "fsdp on 4, kept after forward": (4, {"parallel__mode": "fsdp", "parallel__reshard_after_forward": False}),
    "fsdp on 2, blocks": (2, {"parallel__mode": "fsdp", "parallel__wrap": "block"}),
    "fsdp on 2, reduced once": (2, {"parallel__mode": "fsdp", "parallel__reduce": "step"}),
    "fsdp on 2, recomputed": (2, {"parallel__mode": "fsdp", "parallel__activation_checkpointing": "all"}),
    "ddp on 2, recomputed in part": (2, {"parallel__mode": "ddp", "parallel__activation_checkpointing": "selective"}),
    "fsdp on 2, blocks, recomputed in part": (
        2,
        {"parallel__mode": "fsdp", "parallel__wrap": "block", "parallel__activation_checkpointing": "selective"},
    ),
    "hsdp 2 x 2": (4, {"parallel__mode": "hsdp", "parallel__shard": 2}),
    "hsdp 2 x 2, reduced once": (
        4,
        {"parallel__mode": "hsdp", "parallel__replicate": 2, "parallel__reduce": "step"},
    ),
}


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    depths: list[tuple[int, ...]]
    loads: list[Tensor]
    idle_experts: int
    """(micro-batch, layer, expert) triples that got no token on this rank, over all steps."""
    weights: dict[str, Tensor]


def train(directory: Path, name: str, changes: dict[str, Any], steps: int = 4) -> Trained:
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), **{**CHANGES, **changes}))
    idle = 0
    forward = trainer.forward

    def counted(*inputs: Any) -> Any:
        nonlocal idle
        output = forward(*inputs)
        idle += int((output.expert_load.sum(1) == 0).sum())
        return output

    trainer.forward = counted
    results = []
    for _ in range(steps):
        batch, problem = trainer.read_ahead()
        assert batch is not None, problem
        results.append(trainer.train_step(batch))
        trainer.step += 1
    weights = {name: whole(tensor) for name, tensor in trainer.state().items()}
    trainer.resources.close()
    return Trained(
        [result.loss.item() for result in results],
        [result.grad_norm.item() for result in results],
        [result.plan.loops for result in results],
        [result.expert_load for result in results],
        idle,
        weights,
    )


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    directory = tmp_path_factory.mktemp("parity")
    return directory, train(directory, "single", {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(pool: RankPool, single: tuple[Path, Trained], layout: str) -> None:
    """Per-sequence depths that change every step, truncated gradient, experts, accumulation, clipping."""
    directory, expected = single
    ranks, changes = LAYOUTS[layout]
    everyone: list[Trained] = pool.run(train, directory, layout, changes, ranks=ranks)
    assert len(set(expected.depths)) == 4 and sum(len(set(depths)) > 1 for depths in expected.depths) > 2
    assert min(expected.norms) > 0.7, "clipping must act"
    assert all(trained.idle_experts for trained in everyone), "some experts must be idle on every rank"
    for trained in everyone:
        assert_same(trained, expected)


def assert_same(trained: Trained, expected: Trained) -> None:
    assert trained.depths == expected.depths
    torch.testing.assert_close(trained.losses, expected.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(trained.norms, expected.norms, rtol=1e-5, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(trained.loads, expected.loads, strict=True))
    assert trained.weights.keys() >= expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(trained.weights[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


def train_compiled(directory: Path, name: str, changes: dict[str, Any]) -> tuple[Trained, int]:
    """Three steps by `train`, with graphs that torch traces, differentiates and runs as they are; how many of them."""
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)

    compile_by = partial(torch.compile, backend=backend)
    torch.compiler.reset()
    with patch.object(torch, "compile", compile_by):
        trained = train(directory, name, {"train__compile": True, **changes}, 3)
    torch.compiler.reset()
    return trained, graphs


@pytest.mark.parametrize("layout", ["ddp on 2", "fsdp on 2, recomputed", "fsdp on 2, blocks"])
def test_compiled_equals_one_process(pool: RankPool, single: tuple[Path, Trained], layout: str) -> None:
    """Gradients, which are formed out of what graphs leave behind, are those of one process that runs none."""
    directory, _ = single
    ranks, changes = LAYOUTS[layout]
    # Few graphs, for time's sake: tests/trainer/test_trainer.py compiles for rows that join.
    small = {"model__prelude_layers": 0, "model__coda_layers": 0, "model__core_layers": 1, "train__micro_batch": 8}
    changes = small | {"depth": {"sampling": "fixed", "mean": 3, "backprop": 2}} | changes
    expected = train(directory, f"{layout}, not compiled", changes | {"parallel__mode": "single"}, 3)
    for trained, graphs in pool.run(train_compiled, directory, f"{layout}, compiled", changes, ranks=ranks):
        assert graphs
        assert_same(trained, expected)


GATE = {"model__halting": "gate"}


@pytest.fixture(scope="module")
def gated(single: tuple[Path, Trained]) -> Trained:
    return train(single[0], "gated", GATE)


def test_gate_changes_no_bit_of_the_model(single: tuple[Path, Trained], gated: Trained) -> None:
    _, expected = single
    assert gated.losses == expected.losses and gated.norms == expected.norms
    for name, weight in expected.weights.items():
        assert torch.equal(gated.weights[name], weight), name
    added = {name for name in gated.weights if name not in expected.weights}
    assert added and all("halting." in name for name in added)
    assert any(gated.weights[name].any() for name in added if name.endswith("halting.out")), "it has learned"


@pytest.mark.parametrize("layout", ["ddp on 2", "fsdp on 2, recomputed", "hsdp 2 x 2, reduced once"])
def test_gate_learns_alike(pool: RankPool, single: tuple[Path, Trained], gated: Trained, layout: str) -> None:
    """The same rows teach it under every layout; the model is that of one process without a gate."""
    directory, expected = single
    ranks, changes = LAYOUTS[layout]
    for trained in pool.run(train, directory, layout + ", gate", GATE | changes, ranks=ranks):
        assert_same(trained, expected)
        assert_same(trained, gated)


# Six experts, which four ranks cut and two share out.
MUON = {"optim__name": "muon", "model__n_experts": 6, "model__expert_groups": 3}


@pytest.fixture(scope="module")
def by_muon(single: tuple[Path, Trained]) -> Trained:
    return train(single[0], "muon", MUON, steps=4)


@pytest.mark.parametrize("layout", ["ddp on 2", "fsdp on 2", "fsdp on 4, kept after forward", "hsdp 2 x 2"])
def test_muon_equals_one_process(pool: RankPool, single: tuple[Path, Trained], by_muon: Trained, layout: str) -> None:
    """Each matrix is made orthogonal as a whole, wherever its parts lie."""
    ranks, changes = LAYOUTS[layout]
    for trained in pool.run(train, single[0], layout + ", muon", MUON | changes, 4, ranks=ranks):
        assert_same(trained, by_muon)


OPTIONS: dict[str, dict[str, Any]] = {
    "parcae and huginn": {
        **{"model__attention": "gqa", "model__value_embeddings": True, "model__dense_ffn": "relu2"},
        **{"model__qk_bias": True, "model__block_norm": "sandwich", "model__readout_norm": True},
    },
    "two lanes": {"model__lanes": 2},
    "ouro": {
        **{"model__injection": "initial", "model__block_norm": "peri", "model__prelude_norm": False},
        # All loops carry gradient: up to 4, for rounding grows with their number.
        **{"depth__mean": 2, "depth__backprop": None},
    },
    "layer by layer": {"model__loop_over": "layer", "model__injection": "orthogonal"},
    "passes that differ": {
        **{"model__router_loop": "bias", "model__loop_norm": "adaptive", "model__residual_scale": 0.25},
        **{"model__router_bias_per_loop": True, "optim__name": "muon"},
    },
}
"""What published looped models have, and ours by itself has not; lanes; and options by which loops differ."""


@pytest.fixture(scope="module")
def with_options(single: tuple[Path, Trained]) -> dict[str, Trained]:
    return {name: train(single[0], name, changes, steps=3) for name, changes in OPTIONS.items()}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("ddp on 2", "parcae and huginn"),
        ("fsdp on 2, blocks, recomputed in part", "parcae and huginn"),
        ("hsdp 2 x 2", "parcae and huginn"),
        ("fsdp on 2, recomputed", "ouro"),
        ("ddp on 2", "layer by layer"),
        ("fsdp on 2, recomputed", "layer by layer"),
        ("fsdp on 2, blocks", "layer by layer"),
        ("ddp on 2", "two lanes"),
        ("hsdp 2 x 2", "two lanes"),
        ("ddp on 2", "passes that differ"),
        ("fsdp on 2, blocks, recomputed in part", "passes that differ"),
    ],
)
def test_options_of_models_equal_one_process(
    pool: RankPool, single: tuple[Path, Trained], with_options: dict[str, Trained], layout: str, options: str
) -> None:
    """Tables that every layer and loop reads rows of, biases, and norms wherever they may be."""
    ranks, changes = LAYOUTS[layout]
    for trained in pool.run(train, single[0], f"{layout}, {options}", OPTIONS[options] | changes, 3, ranks=ranks):
        assert_same(trained, with_options[options])


def dtypes_in_forward(
    directory: Path, changes: dict[str, Any]
) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype], float]:
    """Every parameter's type while its module computes and while it rests, and the loss of the first step."""
    changes |= {"parallel__mode": "fsdp", "train__dtype": "bfloat16", "run__dir": str(directory / "bfloat16")}
    trainer = Trainer(tiny(directory, **{**CHANGES, **changes}))
    seen: dict[str, torch.dtype] = {}
    resting = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    for prefix, module in trainer.model.named_modules():

        def note(module: torch.nn.Module, _: Any, prefix: str = prefix) -> None:
            seen.update({f"{prefix}.{name}": p.dtype for name, p in module.named_parameters(recurse=False)})

        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(note)
    batch, _ = trainer.read_ahead()
    assert batch is not None
    loss = trainer.train_step(batch).loss.item()
    trainer.resources.close()
    return seen, resting, loss


@pytest.mark.parametrize("options", [None, "parcae and huginn"])
def test_what_stays_float32_under_bfloat16(
    pool: RankPool, single: tuple[Path, Trained], with_options: dict[str, Trained], options: str | None
) -> None:
    directory, expected = single
    changes = {}
    if options is not None:
        changes, expected = dict(OPTIONS[options]), with_options[options]
    for seen, resting, loss in pool.run(dtypes_in_forward, directory, changes, ranks=2):
        assert set(resting.values()) == {torch.float32}
        precise = ("norm", "router", "recurrence.injection", "adapter.scale", "_bias")
        for name in resting.keys() - {"head.weight"}:  # which is used as a matrix, not called
            assert seen[name] == (torch.float32 if any(part in name for part in precise) else torch.bfloat16), name
        assert loss == pytest.approx(expected.losses[0], rel=2e-3)


def accumulation_error(directory: Path, name: str, changes: dict[str, Any]) -> tuple[float, set[torch.dtype]]:
    """How far gradients accumulated over micro-batches in bfloat16 are from the sum of those of each, and their types.

    The largest of any parameter, relative to its gradient's norm.
    """
    bfloat16 = {"train__dtype": "bfloat16", "run__dir": str(directory / name)}
    trainer = Trainer(tiny(directory, **{**CHANGES, **bfloat16, **changes}))
    batch, _ = trainer.read_ahead()
    assert batch is not None
    plan, rows = trainer.schedule.plan(0), batch.rows.tolist()
    order = sorted(range(len(rows)), key=lambda place: -plan.loops[rows[place]])
    micro_batches = [order[start : start + 2] for start in range(0, len(order), 2)]
    types: set[torch.dtype] = set()

    def gradients(passes: list[list[int]]) -> dict[str, Tensor]:
        for micro in passes:
            with trainer.parallel.accumulating(micro is passes[-1]):
                trainer.forward(batch, micro, plan).objective.backward()
        trainer.parallel.finish_gradients()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        types.update(gradient.dtype for gradient in gradients.values())
        result = {n: whole(gradient).double() for n, gradient in gradients.items()}
        trainer.optimizer.zero_grad(set_to_none=True)
        return result

    accumulated = gradients(micro_batches)
    one_by_one = [gradients([micro]) for micro in micro_batches]
    trainer.resources.close()
    errors = []
    for parameter, gradient in accumulated.items():
        total = torch.stack([each[parameter] for each in one_by_one]).sum(0)
        errors.append(((gradient - total).norm() / total.norm().clamp_min(1e-12)).item())
    return max(errors), types


@pytest.mark.parametrize(
    "layout", ["single", "ddp on 2", "fsdp on 2", "fsdp on 2, reduced once", "hsdp 2 x 2, reduced once"]
)
def test_gradients_of_micro_batches_are_added_up_in_float32(pool: RankPool, tmp_path: Path, layout: str) -> None:
    """Added up in bfloat16 they would be off by a thousandth."""
    ranks, changes = LAYOUTS.get(layout, (1, {}))
    everyone = pool.run(accumulation_error, tmp_path, layout, changes, ranks=ranks)
    print([error for error, _ in everyone])
    for error, types in everyone:
        assert error < 1e-5 and types == {torch.float32}
