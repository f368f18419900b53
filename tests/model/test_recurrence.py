"""The loop: per-sequence depth, truncated gradients, adapters, checkpointing, cost."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.parallel import prepare_model
from mythos.model.attention.context import attention_context
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.state import initial_state
from mythos.training.depth_schedule import DepthSchedule
from scripts.benchmarks.products import executed_flops
from tests.training.test_depth_schedule import config_with

DEPTHS = [5, 3, 3, 1]
PUBLISHED: dict[str, Any] = {
    **{"attention": "gqa", "core_ffn": "dense", "value_embeddings": True, "dense_ffn": "relu2", "qk_bias": True},
    **{"block_norm": "sandwich", "readout_norm": True},
}
"""What published looped models have, and ours by itself has not."""
LENGTH = 7


def inputs(
    model: RecurrentDepthTransformer, rows: int = len(DEPTHS), length: int = LENGTH
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 128, (rows, length + 1), generator=generator)
    state = torch.randn(rows, length, model.config.dim, generator=generator)
    return ids[:, :-1], ids[:, 1:], state


def gradients(model: nn.Module) -> dict[str, Tensor]:
    by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return by_name


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        scale = reference.abs().max().clamp_min(1.0)
        torch.testing.assert_close(
            actual[name] / scale, reference / scale, rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "gqa", "core_ffn": "dense", "loop_embedding": True},
        {"injection": "linear", "lora_rank": 0},
        {"injection": "add", "prelude_norm": False, "loop_embedding": True},
        PUBLISHED,
        {"injection": "initial", "block_norm": "peri", "prelude_norm": False},
        {"injection": "orthogonal"},
        {"loop_over": "layer", "loop_embedding": True},
        {"loop_over": "layer", "injection": "initial", "prelude_norm": False, "core_layers": 3},
        {"router_loop": "bias", "loop_norm": "adaptive", "residual_scale": 0.25},
        {"router_loop": "embedding", "router_bias_per_loop": True, "loop_norm": "adaptive"},
        {"lanes": 2},
    ],
    ids=str,
)
def test_rows_together_equal_rows_alone(model, changes):
    """Losses, gradients, expert counts: the moving prefix must not mix rows or loop indices."""
    model = model(**changes)
    ids, targets, state = inputs(model)
    documents = (torch.arange(LENGTH) // 4).int().expand(len(DEPTHS), LENGTH)
    together = model(ids, targets, loops=DEPTHS, backprop=2, state=state, document_ids=documents)
    together.loss.backward()
    together_gradients = gradients(model)
    loss, load, norm, delta = 0.0, 0, 0.0, 0.0
    for row, depth in enumerate(DEPTHS):
        one = slice(row, row + 1)
        alone = model(ids[one], targets[one], loops=depth, backprop=2, state=state[one], document_ids=documents[one])
        alone.loss.backward()
        loss += alone.loss.item()
        load = None if alone.expert_load is None else load + alone.expert_load
        norm += alone.state_norm.item() / len(DEPTHS)
        delta += alone.state_delta.item() / len(DEPTHS)
    assert together.loss.item() == pytest.approx(loss, rel=1e-5)
    assert together.state_norm.item() == pytest.approx(norm, rel=1e-5)
    assert together.state_delta.item() == pytest.approx(delta, rel=1e-5)
    # In torch 2.11's oneDNN (3.10) the order of a sum depends on the number of rows: up to 1.5e-5 in 12 seeds, where
    # oneDNN 3.12 (torch 2.13) and MKL stay below 0.7e-5. Against float64 its products are as exact as theirs.
    tolerance = 2e-5 if torch.__version__.startswith("2.11.") else 1e-5
    assert_same_gradients(together_gradients, gradients(model), tolerance)
    if load is not None:
        assert torch.equal(together.expert_load, load)
        assert together.expert_load.sum() == sum(DEPTHS) * LENGTH * 2 * model.config.core_layers


def unrolled_loss(
    model: RecurrentDepthTransformer, ids: Tensor, targets: Tensor, state: Tensor, loops: int, backprop: int
) -> Tensor:
    """The design's equations, loop by loop, with `detach` where the gradient stops."""
    config = model.config
    context = attention_context(config, ids.shape[1], ids.device, None)
    x = F.embedding(ids, model.embedding.weight) * math.sqrt(config.dim)
    for block in model.prelude:
        x = block(x, context)[0]
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    e = x * model.prelude_norm.weight
    injection, adapter, gates = model.recurrence.injection, model.recurrence.adapter, model.recurrence.lanes
    delta = torch.log(1 + torch.exp(injection.dt))
    a = torch.exp(-delta * torch.exp(injection.log_a))
    blocks, h = list(model.recurrence.blocks), state
    for number, stage in enumerate([blocks] if config.loop_over == "core" else [[block] for block in blocks]):
        if number:
            weight = model.recurrence.stage_norms[number - 1].weight
            e = h / (h.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight
        h, lanes = state, [state] * config.lanes
        for t in range(loops):
            if t == loops - backprop:
                h, lanes = h.detach(), [lane.detach() for lane in lanes]
            if config.lanes == 1:
                kept, added = a * h, delta * (e @ injection.weight.T)
                if config.injection == "orthogonal":
                    along = (kept * added).sum(-1) / ((added * added).sum(-1) + 1e-6)
                    kept = kept - along[..., None] * added
                u = kept + added
            else:
                lanes = [a[k] * lane + delta[k] * (e @ injection.weight.T) for k, lane in enumerate(lanes)]
                norms = [(lane.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() for lane in lanes]
                features = [lane / norm * gates.norm.weight for lane, norm in zip(lanes, norms, strict=True)]
                opened = torch.cat(features, -1) @ gates.weight.T + gates.bias
                read, write = opened[..., : config.lanes].softmax(-1), 2 * opened[..., config.lanes :].sigmoid()
                u = sum(read[..., k : k + 1] * lane for k, lane in enumerate(lanes))
            y = u
            for block in stage:
                y = block(y, context)[0]
            scale = adapter.scale[min(t, config.loops - 1)]
            normed = u / (u.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * adapter.norm.weight
            h = y + ((normed @ adapter.down.weight.T) * scale) @ adapter.up.weight.T
            if config.lanes > 1:
                lanes = [lane + write[..., k : k + 1] * (h - u) for k, lane in enumerate(lanes)]
    x = h @ model.readout.weight.T
    for block in model.coda:
        x = block(x, context)[0]
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * model.norm.weight
    logits = x @ model.head_weight.T
    picked = torch.log_softmax(logits, -1).gather(-1, targets[..., None])
    return -picked.sum()


@pytest.mark.parametrize(("loops", "backprop"), [(1, 1), (3, 3), (6, 2), (6, 6), (2, 5)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"injection": "orthogonal"},
        {"loop_over": "layer"},
        {"lanes": 2},
        {"lanes": 3},
        {"lanes": 2, "loop_over": "layer"},
        {"loop_over": "layer", "injection": "orthogonal", "core_ffn": "dense"},
    ],
    ids=str,
)
def test_truncated_gradient_matches_unrolled_loop(model, loops, backprop, changes):
    model = model(**changes)
    ids, targets, state = inputs(model, rows=2)
    output = model(ids, targets, loops=loops, backprop=backprop, state=state)
    output.loss.backward()
    actual = gradients(model)
    expected_loss = unrolled_loss(model, ids, targets, state, loops, backprop)
    expected_loss.backward()
    assert output.loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert_same_gradients(actual, gradients(model))


@pytest.mark.parametrize("mode", ["selective", "loop", "all"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "gqa", "value_embeddings": True, "prelude_layers": 3},
        {"attention": "gqa", "injection": "linear", "loop_embedding": True},
        {"q_lora_rank": 8, "qk_norm": False},
        PUBLISHED | {"core_ffn": "moe"},
        {"injection": "initial", "block_norm": "peri", "prelude_norm": False},
        {"injection": "orthogonal", "loop_over": "layer"},
        {"lanes": 3},
        {"router_loop": "embedding", "router_bias_per_loop": True, "loop_norm": "adaptive", "residual_scale": 0.25},
        {"router_loop": "bias"},
    ],
    ids=str,
)
def test_checkpointing_changes_nothing_but_memory(model, changes, mode):
    model = model(**changes)
    ids, targets, state = inputs(model)
    plain = model(ids, targets, loops=DEPTHS, backprop=3, state=state)
    plain.loss.backward()
    expected = gradients(model)
    prepare_model(Config(parallel=ParallelConfig(activation_checkpointing=mode)), model, torch.device("cpu"))
    again = model(ids, targets, loops=DEPTHS, backprop=3, state=state)
    again.loss.backward()
    assert again.loss.item() == plain.loss.item()
    assert_same_gradients(gradients(model), expected)
    assert torch.equal(again.expert_load, plain.expert_load), "recomputation must not be counted"


def test_a_step_neither_draws_random_numbers_nor_saves_generators(model, monkeypatch):
    model = model()
    ids, targets, state = inputs(model)
    before = torch.get_rng_state()

    def saved():
        raise AssertionError("the state of the global generator was saved")

    model.recurrence.checkpointing = "loop"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "get_rng_state", saved)
        model(ids, targets, loops=DEPTHS, backprop=3, state=state).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{}, {"loop_over": "layer"}], ids=str)
def test_read_depths_equals_separate_runs(model, changes):
    model = model(**changes).eval()
    ids, targets, _ = inputs(model)
    targets = targets.clone()
    with torch.no_grad():
        targets[0] = model(ids, loops=3).logits[0].argmax(-1)
    targets[:, 2] = -100
    readouts = model.read_depths(ids, targets, [1, 3, 9], judged=True)
    assert [readout.loops for readout in readouts] == [1, 3, 9]
    for readout in readouts:
        with torch.no_grad():
            alone = model(ids, targets, loops=readout.loops)
            logits = model(ids, loops=readout.loops).logits
        assert readout.losses.sum().item() == pytest.approx(alone.loss.item(), rel=1e-5)
        assert readout.state_delta.item() == pytest.approx(alone.state_delta.item(), rel=1e-4)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        torch.testing.assert_close(readout.losses, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(readout.right, logits.argmax(-1) == targets)
    assert readouts[0].depth_overlap is None
    assert 0 < readouts[1].depth_overlap <= 1
    assert readouts[1].right[0].sum() == targets.shape[1] - 1 and not readouts[1].right.all(), "right and wrong ones"
    assert model.read_depths(ids, targets, [1])[0].right is None


@pytest.mark.parametrize("changes", [{}, {"loop_over": "layer"}], ids=str)
def test_overlap_is_that_of_each_layers_passes(model, changes):
    model = model(core_layers=3, **changes).eval()
    ids, targets, _ = inputs(model)
    overlaps = [readout.depth_overlap for readout in model.read_depths(ids, targets, [1, 2, 3, 4])]
    assert overlaps[0] is None
    for depth, overlap in zip((2, 3, 4), overlaps[1:], strict=True):
        chosen: dict[tuple[int, int], Tensor] = {}

        def observe(after: Any, chosen: dict[tuple[int, int], Tensor] = chosen) -> None:
            for layer, experts in enumerate(after.experts, start=after.layer):
                chosen[layer, after.loop] = experts

        with torch.no_grad():
            model.hidden_states(ids, [depth] * len(ids), depth, observe=observe)
        assert chosen.keys() == {(layer, loop) for layer in range(3) for loop in range(1, depth + 1)}
        shares = [
            len(set(new.tolist()) & set(old.tolist())) / len(new)
            for layer in range(3)
            for new, old in zip(chosen[layer, depth].view(-1, 2), chosen[layer, depth - 1].view(-1, 2), strict=True)
        ]
        assert overlap.item() == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_passes_are_observed_once_in_the_deepest_run_layer_by_layer(model):
    model = model(loop_over="layer").eval()
    ids, targets, _ = inputs(model)
    seen: list[tuple[int, int]] = []
    model.read_depths(ids, targets, [1, 3], observe=lambda after: seen.append((after.layer, after.loop)))
    assert seen == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("depths", [[], [0], [-1, 2], [3, 1], [2, 2]])
def test_depths_that_cannot_be_read(model, depths):
    model = model().eval()
    ids, targets, _ = inputs(model)
    with pytest.raises(ValueError, match=r"at least 1|shallowest first"):
        model.read_depths(ids, targets, depths)


def test_ignored_targets_cost_nothing(model):
    model = model()
    ids, targets, state = inputs(model)
    targets = targets.clone()
    targets[:, 3:] = -100
    loss = model(ids, targets, loops=2, state=state).loss
    logits = model(ids, loops=2, state=state).logits[:, :3]
    expected = F.cross_entropy(logits.flatten(0, 1), targets[:, :3].flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loops_beyond_the_trained_reuse_the_last_adapter_scale(model):
    model = model(loops=3)
    ids, targets, state = inputs(model, rows=1)
    before = model(ids, targets, loops=5, state=state).loss
    model.recurrence.adapter.scale.data[2] += 1
    assert model(ids, targets, loops=5, state=state).loss != before
    assert model(ids, targets, loops=2, state=state).loss == unchanged_at_two(model, ids, targets, state)


def unchanged_at_two(model: RecurrentDepthTransformer, ids: Tensor, targets: Tensor, state: Tensor) -> Tensor:
    model.recurrence.adapter.scale.data[2] -= 1
    return model(ids, targets, loops=2, state=state).loss


def test_no_parameter_depends_on_context_or_loops_but_the_adapter(small):
    def shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
        model = RecurrentDepthTransformer(small(**changes))
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    assert shapes() == shapes(context_length=1_000_000)
    changed = {name for name, shape in shapes(loops=9).items() if shape != shapes()[name]}
    assert changed == {"recurrence.adapter.scale"}
    assert shapes(lora_rank=0) == shapes(lora_rank=0, loops=9)


def test_weights_depend_on_seed_and_name_alone(small):
    first = RecurrentDepthTransformer(small()).initialize(1).state_dict()
    with torch.device("meta"):
        other = RecurrentDepthTransformer(small(coda_layers=3, lora_rank=0))
    other = other.to_empty(device="cpu").initialize(1).state_dict()
    for name in first.keys() & other.keys():
        assert torch.equal(first[name], other[name]), name
    reseeded = RecurrentDepthTransformer(small()).initialize(2).state_dict()
    assert not torch.equal(first["embedding.weight"], reseeded["embedding.weight"])
    std = first["recurrence.blocks.0.ffn.gate_up"].std().item()
    assert std == pytest.approx(math.sqrt(2 / (5 * 32)), rel=0.03)
    outputs = ("attention.out.weight", "ffn.down", "ffn.down.weight", "shared.down.weight", "adapter.up.weight")
    for name, tensor in first.items():
        assert (tensor.abs().max() == 0) == name.endswith((*outputs, "bias", "log_a")), name


def test_initial_state_is_a_function_of_seed_step_and_row(small):
    config = small()
    cpu = torch.device("cpu")
    state = initial_state(config, [4, 9, 2], 50, seed=3, step=8, device=cpu)
    assert torch.equal(initial_state(config, [9], 50, seed=3, step=8, device=cpu), state[1:2])
    assert not torch.equal(state[0], state[1])
    assert not torch.equal(initial_state(config, [9], 50, seed=3, step=9, device=cpu), state[1:2])
    assert not torch.equal(initial_state(config, [9], 50, seed=4, step=8, device=cpu), state[1:2])
    assert state.std().item() == pytest.approx(math.sqrt(2 / (5 * 32)), rel=0.03)
    assert initial_state(small(state_init="zero"), [1], 5, seed=0, step=0, device=cpu).abs().max() == 0


@pytest.mark.parametrize("changes", [{}, {"loop_over": "layer", "injection": "orthogonal"}], ids=str)
def test_flops_executed_are_those_the_depths_need(model, changes):
    model = model(**changes)
    depths = [11, 8, 8, 6, 5, 5, 3, 1]
    ids, targets, state = inputs(model, rows=len(depths), length=64)

    def train(rows: slice) -> None:
        model(ids[rows], targets[rows], loops=depths[rows], backprop=3, state=state[rows]).loss.backward()

    executed = executed_flops(lambda: train(slice(None))).total
    needed = sum(executed_flops(lambda row=row: train(slice(row, row + 1))).total for row in range(len(depths)))
    print(f"FLOPs executed / needed: {executed / needed:.4f}")
    assert executed <= 1.02 * needed


def test_executed_mean_depth_is_the_plans(model):
    """1,000 drawn sequences through the model: the rows that the core really computes, against the target."""
    model = model(core_ffn="dense", core_layers=1)
    schedule = DepthSchedule(config_with(mean=6, backprop=4, steps=125))
    executed = carried = 0
    step = model.recurrence.step

    def counting(state: Tensor, *rest: Any) -> Any:
        nonlocal executed, carried
        executed += len(state)
        carried += len(state) * torch.is_grad_enabled()
        return step(state, *rest)

    model.recurrence.step = counting
    planned = planned_backprop = 0.0
    for number in range(125):
        plan = schedule.plan(number)
        loops = sorted(plan.loops, reverse=True)
        ids = torch.zeros(len(loops), 1, dtype=torch.int64)
        model(ids, ids, loops=loops, backprop=plan.backprop)
        planned += sum(loops)
        planned_backprop += plan.mean_backprop * len(loops)
    assert executed == planned
    assert carried == round(planned_backprop)
    print(f"mean depth executed {executed / 1000:.3f}, target 6")
    assert executed / 1000 == pytest.approx(6, rel=0.02)


def peak_bytes(run: Callable[[], Any], trace: Path) -> int:
    """Most bytes of tensors held at once while `run` runs, beyond those held before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return max(totals) - totals[0]


def test_memory_of_a_step_does_not_grow_with_the_loops(model, tmp_path):
    model = model(core_layers=1)
    ids, targets, state = inputs(model, rows=4, length=64)

    def train(loops: int) -> None:
        model(ids, targets, loops=loops, backprop=8, state=state).loss.backward()
        model.zero_grad(set_to_none=True)

    shallow = peak_bytes(lambda: train(8), tmp_path / "8.json")
    deep = peak_bytes(lambda: train(64), tmp_path / "64.json")
    everything = peak_bytes(lambda: model(ids, targets, loops=64, state=state).loss.backward(), tmp_path / "all.json")
    print(
        f"peak at 64 loops with 8 backprop loops / at 8: {deep / shallow:.3f}; with all 64: {everything / shallow:.2f}"
    )
    assert deep <= 1.1 * shallow
    assert everything > 3 * shallow, "the measurement must see what is kept"


@pytest.mark.parametrize("loops", [0, -1, [2, 3, 1, 1], [3, 2, 1], [3, 2, 1, 0]], ids=str)
def test_impossible_loops_are_refused(model, loops):
    model = model()
    ids, targets, state = inputs(model)
    with pytest.raises(ValueError, match="loop"):
        model(ids, targets, loops=loops, state=state)


def test_fixed_depth_model_runs_once(model):
    model = model(injection="none", loops=1, lora_rank=0)
    assert model.readout is None and model.prelude_norm is None
    ids, targets, state = inputs(model)
    assert model(ids, targets).loss == model(ids, targets, state=state).loss
    with pytest.raises(ValueError, match="fixed-depth"):
        model(ids, targets, loops=2)
