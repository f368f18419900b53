"""Training as a whole: against a loop written out, and under other layouts of the same work."""

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos.checkpoints.stored_checkpoint import read_meta
from mythos.config.sections import Config
from mythos.data.pipeline import open_data
from mythos.distributed.parallel import choose_dtype
from mythos.model.halting import HaltingGate
from mythos.model.injection import LTIInjection
from mythos.model.layers import RMSNorm
from mythos.model.moe import Router
from mythos.model.ops import grouped_experts
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.state import initial_state
from mythos.trainer import Trainer
from mythos.training.depth_schedule import DepthSchedule
from mythos.training.lr import learning_rate
from tests.runs import losses, measurements, tiny
from tests.trainers import assert_identical, run, saved, state_of, take_step

pytestmark = pytest.mark.usefixtures("no_plots")


# --- against a reference


def reference_run(config: Config, trainer: Trainer, steps: int) -> tuple[RecurrentDepthTransformer, list[float]]:
    """AdamW over whole batches, written out: same data, depths and initial states; loss from the logits."""
    model = RecurrentDepthTransformer(trainer.config.model).initialize(config.run.seed)
    streams = open_data(config, trainer.run_dir, {}).streams(config.run.seed)
    schedule = DepthSchedule(config)
    optim = config.optim
    tables = ("embedding.weight", "readout.weight", "recurrence.injection.weight", "recurrence.adapter.scale")
    decay = {
        name: 0.0 if parameter.ndim == 1 or name in tables else optim.weight_decay
        for name, parameter in model.named_parameters()
    }
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    history = []
    for step in range(steps):
        plan, batch = schedule.plan(step), streams.next_batch(schedule.slots)
        order = sorted(range(len(plan.loops)), key=lambda row: -plan.loops[row])
        assert batch.rows.tolist() == list(range(len(order)))
        ids = batch.ids[order]
        output = model(
            ids[:, :-1],
            loops=[plan.loops[row] for row in order],
            backprop=plan.backprop,
            state=initial_state(
                config.model, order, ids.shape[1] - 1, seed=config.run.seed, step=step, device=torch.device("cpu")
            ),
        )
        loss = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
        history.append(loss.item())
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
        scale = min(1.0, optim.clip / norm)
        lr = learning_rate(optim, step, config.train_steps)
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                first.lerp_(p.grad * scale, 1 - optim.betas[0])
                second.lerp_((p.grad * scale).square(), 1 - optim.betas[1])
                corrected = (second / (1 - optim.betas[1] ** (step + 1))).sqrt() + optim.eps
                p.mul_(1 - lr * decay[name])
                p.sub_(lr * (first / (1 - optim.betas[0] ** (step + 1))) / corrected)
            for block, load in zip(model.recurrence.blocks, output.expert_load.sum(1), strict=True):
                away = (load.double().mean() - load).sign()
                block.ffn.router.bias.add_(config.model.router_bias_rate * away.float())
    return model, history


def test_steps_equal_a_loop_written_out(tmp_path):
    """Data, depths, accumulation, normalisation by tokens, clipping, learning rate, decay, AdamW, router biases."""
    config = tiny(
        tmp_path,
        train__global_batch=10,
        train__micro_batch=4,  # does not divide the batch
        train__steps=4,
        optim__clip=0.7,
        optim__lr=1e-3,
        optim__warmup=0.3,
        optim__eps=1e-5,  # an element's first update is lr x sign otherwise, and rounding decides signs near zero
        optim__weight_decay=1.0,
        model__router_bias_rate=0.01,
    )
    trainer = Trainer(config)
    results = []
    for _ in range(4):
        results.append(take_step(trainer))
    assert len({tuple(result.plan.loops) for result in results}) > 1, "the curriculum must show"
    assert any(len(set(result.plan.loops)) > 1 for result in results), "rows of one step must differ in depth"
    model, history = reference_run(config, trainer, 4)
    for result, expected in zip(results, history, strict=True):
        assert result.loss.item() == pytest.approx(expected, rel=1e-5)
        assert result.grad_norm > 0.7, "clipping must act"
    for (name, actual), expected in zip(trainer.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert trainer.model.recurrence.blocks[0].ffn.router.bias.abs().max() > 0.009


@pytest.mark.parametrize(
    "changes",
    [
        {"train__micro_batch": 2},
        {"parallel__activation_checkpointing": "selective"},
        {"parallel__activation_checkpointing": "loop"},
    ],
    ids=str,
)
def test_layout_of_the_work_changes_nothing(tmp_path, changes):
    """Accumulation in more micro-batches, or recomputation: same losses, gradients and expert counts."""
    layout = {"train__micro_batch": 8, "optim__eps": 1e-5, **changes}
    trainer = Trainer(tiny(tmp_path, train__micro_batch=8, optim__eps=1e-5))
    other = Trainer(tiny(tmp_path, run__dir=str(tmp_path / "other"), **layout))
    for _ in range(4):
        one, two = take_step(trainer), take_step(other)
        for name in ("loss", "grad_norm", "state_norm", "state_delta"):
            assert getattr(two, name).item() == pytest.approx(getattr(one, name).item(), rel=1e-5), name
        assert torch.equal(one.expert_load, two.expert_load)
    for (name, actual), expected in zip(
        other.model.state_dict().items(), trainer.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointing_recomputes(tmp_path):
    """The switch reaches the model: with loop every pass that carries gradient is computed twice, else none is.

    With all so is each layer of the prelude and the coda.
    """
    calls, outside = [], []
    for mode in ("none", "selective", "loop", "all"):
        directory = str(tmp_path / mode)
        trainer = Trainer(
            tiny(tmp_path, run__dir=directory, parallel__activation_checkpointing=mode, depth__sampling="fixed")
        )
        trainer.step = 3  # past the curriculum
        model = trainer.model
        watched = [part[0].attention.out for part in (model.recurrence.blocks, model.prelude, model.coda)]
        hooks = [Mock(return_value=None) for _ in watched]
        for module, hook in zip(watched, hooks, strict=True):
            module.register_forward_hook(hook)
        take_step(trainer)
        in_core, *others = (hook.call_count for hook in hooks)
        calls.append(in_core)
        outside.append(others)
    micro_batches, loops, carried = 2, 3, 2
    recomputed = micro_batches * (loops + carried)
    assert calls == [micro_batches * loops, micro_batches * loops, recomputed, recomputed]
    assert outside == [[micro_batches] * 2] * 3 + [[2 * micro_batches] * 2]


# --- learning and measuring


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Trainer:
    directory = tmp_path_factory.mktemp("learned")
    return run(tiny(directory, train__steps=40, optim__lr=1e-2, data__mask_documents=True, eval__every=20))


def test_loss_falls(learned):
    records = measurements(learned.run_dir)
    assert [record["step"] for record in records] == list(range(1, 41))
    assert records[0]["loss"] == pytest.approx(math.log(384), abs=0.4)
    assert records[-1]["loss"] < 2.5
    validations = [record["val/loss"] for record in records if "val/loss" in record]
    assert len(validations) == 2 and validations[1] < validations[0] - 0.1


def test_record_of_a_step(learned):
    for number, record in enumerate(measurements(learned.run_dir), start=1):
        plan = learned.schedule.plan(number - 1)
        assert record["tokens"] == number * 8 * 32
        assert record["loops"] == sum(plan.loops) / 8
        assert record["backprop_loops"] == sum(min(row, 2) for row in plan.loops) / 8
        assert record["lr"] == learning_rate(learned.config.optim, number - 1, 40)
        assert 0 < record["rho_a"] < 1
    assert record["rho_a"] == learned.model.recurrence.injection.decay().max().item()
    timed = [json.loads(line) for line in (learned.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 and line["peak_memory_bytes"] > 1e7 for line in timed)
    assert abs(timed[-1]["time"] - time.time()) < 600


def test_router_biases_follow_the_load(tmp_path):
    """Counts by hand, from what every router call of the step chose, all micro-batches and loops."""
    trainer = Trainer(tiny(tmp_path, model__core_layers=2, model__router_bias_rate=0.25))
    trainer.step = 3
    chosen: dict[int, list[Tensor]] = {0: [], 1: []}
    hooks = [
        block.ffn.router.register_forward_hook(lambda _, __, out, k=number: chosen[k].append(out[1].flatten()))
        for number, block in enumerate(trainer.model.recurrence.blocks)
    ]
    result = take_step(trainer)
    for hook in hooks:
        hook.remove()
    record = trainer.measure(result)
    counts = torch.stack([torch.cat(calls).bincount(minlength=4) for calls in chosen.values()])
    assert counts.sum() == 2 * sum(result.plan.loops) * 32 * 2
    assert record["moe/load_max_over_mean"] == pytest.approx(
        max(row.max().item() / (row.sum().item() / 4) for row in counts), rel=1e-12
    )
    assert record["moe/dead_experts"] == (counts == 0).sum()
    for block, row in zip(trainer.model.recurrence.blocks, counts.tolist(), strict=True):
        expected = [0.25 * ((sum(row) / 4 > count) - (sum(row) / 4 < count)) for count in row]
        assert block.ffn.router.bias.tolist() == expected
        assert max(expected) > 0 > min(expected)


def test_answer_does_not_depend_on_the_draw_of_the_state(learned):
    """Draws of training change the loss by less than 0.001 nats, and even a start 30 times as large is forgotten."""
    model, data = learned.model.eval(), learned.validation
    ids, targets = data.ids[:, :-1], data.ids[:, 1:]

    def loss(loops: int, state: Tensor | None) -> float:
        with torch.no_grad():
            output = model(ids, targets, loops=loops, state=state, document_ids=data.document_ids)
        return output.loss.item() / targets.numel()

    cpu = torch.device("cpu")
    draws = [initial_state(learned.config.model, range(8), 32, seed=seed, step=0, device=cpu) for seed in range(4)]
    for loops in (3, 12):
        assert max(abs(loss(loops, draw) - loss(loops, None)) for draw in draws) < 1e-3
    once, often = (abs(loss(loops, 30 * draws[0]) - loss(loops, None)) for loops in (1, 12))
    assert often < 0.1 * once


def test_validation_equals_runs_by_hand(learned):
    """Each depth run alone, row by row; bits over the bytes of the text that the targets spell."""
    record = measurements(learned.run_dir)[-1]
    model, data = learned.model.eval(), learned.validation
    assert data.document_ids is not None and len(data.ids) == 8
    totals = dict.fromkeys((1, 3), 0.0)
    with torch.no_grad():
        for ids, documents in zip(data.ids, data.document_ids, strict=True):
            for depth in totals:
                logits = model(ids[None, :-1], loops=depth, document_ids=documents[None]).logits[0]
                totals[depth] += F.cross_entropy(logits, ids[1:], reduction="sum").item()
    tokens = 8 * 32
    assert record["val/loss@1"] == pytest.approx(totals[1] / tokens, rel=1e-5)
    assert record["val/loss@3"] == pytest.approx(totals[3] / tokens, rel=1e-5)
    assert record["val/loss"] == record["val/loss@3"], "the mean depth is 3"
    text = "".join(learned.tokenizer.decode(ids[1:].tolist()).replace("<|endoftext|>", "") for ids in data.ids)
    assert record["val/bits_per_byte"] == pytest.approx(totals[3] / math.log(2) / len(text.encode()), rel=1e-5)


def test_validation_and_samples_change_nothing(tmp_path):
    changes = {"train__steps": 5, "log__every": 1}
    silent = run(tiny(tmp_path, run__dir=str(tmp_path / "silent"), **changes))
    looked = run(tiny(tmp_path, run__dir=str(tmp_path / "looked"), eval__every=1, eval__samples=2, **changes))
    assert sum("val/loss" in record for record in measurements(looked.run_dir)) == 5
    assert sum("val/loss" in record for record in measurements(silent.run_dir)) == 1
    assert losses(looked.run_dir) == losses(silent.run_dir)
    assert_identical(silent, looked)
    assert looked.model.training


# --- number formats and compilation


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_tile": True}, torch.float32),
        ({}, torch.float32),
    ],
    ids=str,
)
def test_automatic_dtype_on_a_cpu(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == expected
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16


class ProductTypes(TorchDispatchMode):
    """Types of the arguments of every matrix product, by the part of the model that is running."""

    PRODUCTS = frozenset({"mm", "addmm", "bmm", "_linear_pointwise", "causal_attention", "grouped_product", "addcmul"})

    def __init__(self) -> None:
        super().__init__()
        self.part = "elsewhere"
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.PRODUCTS:
            tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
            self.seen.setdefault(self.part, set()).update(tensor.dtype for tensor in tensors)
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def inside(self, part: str) -> Iterator[None]:
        outer, self.part = self.part, part
        yield
        self.part = outer


def test_bfloat16_run(tmp_path, monkeypatch):
    """Finite, near the float32 run; injection, router, the state between loops and the norm before it stay float32."""
    full = run(tiny(tmp_path, run__dir=str(tmp_path / "full"), train__steps=3))
    trainer = Trainer(tiny(tmp_path, run__dir=str(tmp_path / "half"), train__steps=3, train__dtype="bfloat16"))
    types = ProductTypes()

    def traced(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def inside(*args):
            with types.inside(part):
                return function(*args)

        monkeypatch.setattr(owner, name, inside)

    traced(LTIInjection, "forward", "injection")
    traced(LTIInjection, "combine", "injection")
    traced(Router, "forward", "router")
    traced(grouped_experts, "_sorted_projections", "experts")
    traced(grouped_experts, "_products", "experts")
    outputs: dict[str, set[torch.dtype]] = {}

    def record(part: str, *tensors: Tensor) -> None:
        outputs.setdefault(part, set()).update(tensor.dtype for tensor in tensors)

    for module in trainer.model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(lambda norm, _, out: record("norm for products" if norm.cast else "norm", out))
        elif isinstance(module, Router):
            module.register_forward_hook(lambda _, __, out: record("gates", out[0]))
        elif isinstance(module, LTIInjection):
            module.register_forward_hook(lambda _, inputs, out: record("state", *inputs, *out))
    trainer.model.prelude[0].ffn.gate_up.register_forward_hook(lambda _, __, out: record("product", out))
    with types:
        trainer.run()
    assert outputs == {
        "norm for products": {torch.bfloat16},
        "norm": {torch.float32},
        "gates": {torch.float32},
        "state": {torch.float32},
        "product": {torch.bfloat16},
    }
    assert types.seen["injection"] == types.seen["router"] == {torch.float32}
    assert types.seen["experts"] == {torch.bfloat16}
    assert torch.bfloat16 in types.seen["elsewhere"]
    assert all(tensor.dtype == torch.float32 for tensor in state_of(trainer).values())
    assert losses(trainer.run_dir) == pytest.approx(losses(full.run_dir), rel=0.02)
    assert losses(trainer.run_dir) != losses(full.run_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "model__attention": "gqa",
            "model__core_ffn": "dense",
            "model__prelude_layers": 0,
            "model__coda_layers": 0,
            "parallel__activation_checkpointing": "selective",
        },
        # One shape, for time's sake: the curriculum and the growing prefix are above.
        {
            "train__dtype": "bfloat16",
            "model__prelude_layers": 0,
            "model__coda_layers": 0,
            "model__lanes": 2,
            "depth": {"sampling": "fixed", "backprop": 3},
        },
        {
            "train__dtype": "bfloat16",
            "model__prelude_layers": 0,
            "model__coda_layers": 0,
            "model__core_layers": 2,
            "model__loop_over": "layer",
            "model__injection": "orthogonal",
            "depth": {"sampling": "fixed", "backprop": 3},
        },
        {
            "model__prelude_layers": 0,
            "model__coda_layers": 0,
            "model__router_loop": "embedding",
            "model__router_bias_per_loop": True,
            "model__loop_norm": "adaptive",
            "model__residual_scale": 0.25,
            "depth": {"sampling": "fixed", "backprop": 3},
        },
    ],
    ids=["dense", "moe-bfloat16", "layer by layer", "passes that differ"],
)
def test_compiled_model(tmp_path, monkeypatch, changes):
    """Traced and differentiated ahead of time; the code generator itself takes a minute on a CPU and is left out."""
    compiled = []
    original = torch.compile

    def compile_quickly(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(function)
        return original(function, **options, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch.compiler.reset()
    plain = Trainer(tiny(tmp_path, train__micro_batch=8, **changes))
    assert not compiled, "on a CPU auto means not"
    trainer = Trainer(
        tiny(tmp_path, train__micro_batch=8, train__compile=True, run__dir=str(tmp_path / "compiled"), **changes)
    )
    model = trainer.model
    blocks = [block._call_impl for block in (*model.prelude, *model.coda)]
    assert sorted(map(str, compiled)) == sorted(map(str, [model.recurrence.step, *blocks]))
    for _ in range(3):
        assert take_step(trainer).loss.item() == pytest.approx(take_step(plain).loss.item(), rel=1e-4)
    assert trainer.model.state_dict().keys() == plain.model.state_dict().keys()
    torch.compiler.reset()


def test_number_of_graphs(tmp_path, monkeypatch):
    """Depths that change in every step, rows that join, truncation and validation: all graphs come early, and are few.

    A graph of a pass in full: fullgraph raises at a break.
    """
    graphs: list[int] = []
    trainer: Trainer | None = None

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(trainer.step if trainer else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    torch.compiler.reset()
    changes = {"model__prelude_layers": 1, "train__global_batch": 16, "train__micro_batch": 6, "train__steps": 50}
    trainer = Trainer(tiny(tmp_path, train__compile=True, depth__mean=4, data__mask_documents=True, **changes))
    depths = set()
    for step in range(50):
        depths.add(take_step(trainer).plan.loops)
        if step % 10 == 0:
            trainer.validate()
    torch.compiler.reset()
    assert len(depths) > 40
    print(graphs)
    assert len(graphs) <= 12 and max(graphs) < 20


def test_gate_that_cannot_learn_is_left_as_it_is(tmp_path, monkeypatch):
    """A loss of the gate that is not a number changes neither gate nor model, and skips no step."""
    trainer = Trainer(tiny(tmp_path, model__halting="gate", train__steps=3, depth__curriculum={"shape": "none"}))
    before = {name: p.clone() for name, p in trainer.model.halting.named_parameters()}
    monkeypatch.setattr(HaltingGate, "loss", lambda self, *_: sum(p.sum() for p in self.parameters()) * float("nan"))
    for _ in range(3):
        assert take_step(trainer).loss.isfinite()
    assert int(trainer.skipped) == 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    for name, parameter in trainer.model.halting.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0.01, atol=1e-6)  # but for weight decay
    trainer.resources.close()


def test_checkpoint_names_the_versions_of_what_is_installed(tmp_path, monkeypatch):
    """A run whose data needs no `datasets` saves without it."""
    original = metadata.version

    def version(name: str) -> str:
        if name == "datasets":
            raise metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(metadata, "version", version)
    trainer = Trainer(tiny(tmp_path))
    trainer.save(wait=True)
    trainer.resources.close()
    versions = read_meta(saved(trainer, 0))["versions"]
    assert versions["torch"] == original("torch") and versions["python"] == platform.python_version()
    assert "datasets" not in versions


def test_longer_run_warns_or_keeps_its_schedule(tmp_path, caplog):
    run(tiny(tmp_path, train__steps=4))
    for schedule_steps, warned in ((None, True), (4, False)):
        caplog.clear()
        longer = Trainer(tiny(tmp_path, train__steps=12, optim__schedule_steps=schedule_steps))
        said = [record.getMessage() for record in caplog.records if "the schedule took" in record.getMessage()]
        assert len(said) == warned
        optim = longer.config.optim
        share = 0.1 if schedule_steps else 0.1 + 0.9 * (1 + math.cos(math.pi * (4 - 0.24) / (11 - 0.24))) / 2
        after = optim.lr * share
        if warned:
            moved = f"the learning rate from {optim.lr / 10:.3g} to {after:.3g}, the mean depth from 3 to 2.33"
            assert f"at step 4 this moves {moved}" in said[0]
        assert take_step(longer).lr == pytest.approx(after)
        longer.resources.close()
