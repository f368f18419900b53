"""Estimates against a real model: its parameters, FLOPs counted by torch, and memory counted by the allocator."""

import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mythos.cli.estimate import main
from mythos.config.presets import preset_config
from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.parallel import prepare_model
from mythos.model.config import ModelConfig
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning import memory
from mythos.planning.budget import GPUS, optimal_split, training_run
from mythos.planning.fake_step import CHECKPOINTING, Step, recomputed_flops
from mythos.planning.flops import count_parameters, forward_flops
from mythos.planning.memory import step_activations

LENGTH = 64

MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "dim": 64,
    "prelude_layers": 2,
    "core_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 24,
    "kv_lora_rank": 40,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "ffn_dim": 96,
    "n_experts": 8,
    "experts_per_token": 3,
    "expert_dim": 40,
    "n_shared_experts": 2,
    "shared_expert_dim": 24,
    "lora_rank": 4,
}

VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": "gqa", "core_ffn": "dense"},
    {"attention": "gqa", "injection": "linear", "tie_embeddings": False},
    {"core_ffn": "dense", "injection": "add", "lora_rank": 0, "q_lora_rank": 0},
    {"injection": "none", "loops": 1, "lora_rank": 0, "attention": "gqa", "core_ffn": "dense"},
    {"injection": "none", "loops": 1, "lora_rank": 0, "n_shared_experts": 0},
    {
        **{"attention": "gqa", "core_ffn": "dense", "value_embeddings": True, "dense_ffn": "relu2", "qk_bias": True},
        **{"block_norm": "sandwich", "readout_norm": True},
    },
    {"injection": "initial", "block_norm": "peri", "prelude_norm": False},
]


def causal(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of both matmuls of causal attention, whose mask leaves half."""
    rows, heads, length, dim = query
    return 2 * rows * heads * (dim + value[-1]) * length * (length + 1) // 2


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, *shapes, **kwargs: (
        2 * causal(*shapes[:3])
    ),
    torch.ops.mythos.causal_attention: causal,
    torch.ops.mythos.causal_attention_backward: lambda gradient, *shapes, **kwargs: 2 * causal(*shapes[:3]),
    torch.ops.mkldnn._linear_pointwise: lambda x, w, *args, **kwargs: 2 * math.prod(x) * w[0],
    torch.ops.aten.addmm_: lambda total, a, b, **kwargs: 2 * math.prod(a) * b[-1],
    torch.ops.mythos.grouped_product: lambda x, weights, ends, **kwargs: 2 * math.prod(x) * weights[-1],
    torch.ops.mythos.grouped_outer: lambda x, y, ends, **kwargs: 2 * math.prod(x) * y[-1],
}
"""Formulas for operators that torch's counter does not know on a CPU."""


def counted(
    model: RecurrentDepthTransformer, loops: int | Sequence[int], backprop: int | None = None, rows: int = 1
) -> int:
    """FLOPs of a forward pass over `rows` sequences and, with `backprop`, of its backward pass."""
    ids = torch.zeros(rows, LENGTH + 1, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        if backprop is None:
            with torch.no_grad():
                model(ids[:, :-1], loops=loops)
        else:
            model(ids[:, :-1], ids[:, 1:], loops=loops, backprop=backprop).objective.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_forward_flops_are_those_torch_counts(changes):
    config = ModelConfig(**{**MODEL, **changes})
    model = RecurrentDepthTransformer(config).initialize(0)
    flops = forward_flops(config, LENGTH)
    for loops in (1, 5) if config.injection != "none" else (1,):
        needed = (flops.once + loops * flops.loop) * LENGTH
        executed = counted(model, loops)
        print(f"{loops} loops: executed / estimated {executed / needed:.4f}")
        assert executed == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize(("loops", "backprop"), [([3], 1), ([5, 2, 1], 2), ([4, 4], 4)], ids=str)
def test_training_flops_are_those_torch_counts(changes: dict[str, Any], loops: list[int], backprop: int) -> None:
    config = ModelConfig(**{**MODEL, **changes})
    loops = loops if config.injection != "none" else [1] * len(loops)
    model = RecurrentDepthTransformer(config).initialize(0)
    needed = forward_flops(config, LENGTH).training(loops, backprop) * LENGTH * len(loops)
    executed = counted(model, loops, backprop, len(loops))
    print(f"executed / needed {executed / needed:.4f}")
    assert executed == pytest.approx(needed, rel=0.01)


@pytest.mark.parametrize("changes", [*VARIANTS[:2], VARIANTS[-2]], ids=str)
def test_recomputed_flops_are_those_torch_counts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's choice of matmuls; values are as wide as keys, because a GPU's kernel may pad them to that width."""
    monkeypatch.setattr(device_choice, "float32_by_onednn", lambda *_: False)
    config = ModelConfig(**{**MODEL, "v_head_dim": 24, **changes})
    for checkpointing in CHECKPOINTING:
        model = RecurrentDepthTransformer(config).initialize(0)
        plain = counted(model, 4, 3)
        prepare_model(
            Config(parallel=ParallelConfig(activation_checkpointing=checkpointing)), model, torch.device("cpu")
        )
        more = (counted(model, 4, 3) - plain) / LENGTH
        assert 3 * recomputed_flops(config, LENGTH, checkpointing) == pytest.approx(more, rel=0.01), checkpointing


def test_training_flops():
    flops = forward_flops(ModelConfig(**MODEL), LENGTH)
    loops = [8, 3, 1, 4]
    expected = 3 * flops.once + flops.loop * ((8 + 3 + 1 + 4) / 4 + 2 * (3 + 3 + 1 + 3) / 4)
    assert flops.training(loops, 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters(changes):
    config = ModelConfig(**{**MODEL, **changes})
    model = RecurrentDepthTransformer(config).initialize(0)
    parameters = count_parameters(config)
    assert parameters.total == sum(p.numel() for p in model.parameters())
    idle = sum(
        module.gate_up[3:].numel() + module.down[3:].numel()  # 3 of 8 experts are used
        for module in model.modules()
        if isinstance(module, MixtureOfExperts)
    )
    assert parameters.active == parameters.total - idle
    assert (idle > 0) == (config.core_ffn == "moe")


# --- memory


def allocated(config: ModelConfig, step: Step) -> int:
    """Peak bytes that a real step allocates; its gradients count only if it accumulates."""
    assert isinstance(config.vocab_size, int)
    model = RecurrentDepthTransformer(config).initialize(0)
    prepare_model(
        Config(parallel=ParallelConfig(activation_checkpointing=step.checkpointing)), model, torch.device("cpu")
    )
    ids = torch.randint(config.vocab_size, (step.rows, step.length + 1))

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.dtype == torch.bfloat16):
            output = model(ids[:, :-1], ids[:, 1:], loops=step.loops, backprop=step.backprop)
        output.objective.backward()

    run()
    if not step.accumulating:
        model.zero_grad(set_to_none=True)
    gc.disable()  # otherwise objects of earlier tests are freed meanwhile
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak if step.accumulating else peak - sum(p.grad.nbytes for p in model.parameters())


SIZES = {
    "experts": (preset_config("mythos_nano", vocab_size=512), 4, 128, torch.float32),
    "heads": (
        preset_config("mythos_nano", vocab_size=2048, attention="gqa", core_ffn="dense", dim=256), 2, 256,
        torch.bfloat16,
    ),
    "wide": (
        preset_config("mythos_tiny", vocab_size=1024, core_layers=2, prelude_layers=1, coda_layers=1), 2, 512,
        torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("size", SIZES)
def test_activations_are_what_a_step_allocates(size: str, checkpointing: str) -> None:
    config, rows, length, dtype = SIZES[size]
    accumulating = size != "heads"
    step = Step(rows, length, 3, 2, checkpointing, dtype, "cpu", accumulating)
    estimate, measured = step_activations(config, step), allocated(config, step)
    print(f"{estimate.peak:,} bytes estimated, {measured:,} allocated: {estimate.peak / measured:.4f}")
    assert 0.9 < estimate.peak / measured < 1.1
    assert 0 < estimate.kept < estimate.peak


def test_memory_beyond_the_traced_loops_goes_on_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TRACED_LOOPS", 4)
    config, rows, length, _ = SIZES["experts"]
    for checkpointing in CHECKPOINTING:
        step = Step(rows, length, 7, 7, checkpointing, torch.bfloat16, "cpu", True)
        estimate, measured = step_activations(config, step).peak, allocated(config, step)
        assert 0.9 < estimate / measured < 1.1, f"{checkpointing}: {estimate:,} {measured:,}"


# --- time, money, and a budget


def test_time_and_money() -> None:
    run = training_run(tokens=1e9, executed=4e9, peak=1e14, gpus=8, utilisation=0.5, price=3.0)
    assert run.tokens_per_second == pytest.approx(8 * 0.5e14 / 4e9)
    assert run.seconds == pytest.approx(1e4)
    assert run.dollars == pytest.approx(8 * 3 * 1e4 / 3600)


@pytest.mark.parametrize(
    ("name", "ffn_dim", "published"),  # 2/3 of the paper's 3,072 and 4,096: three matrices instead of two
    [
        ("looped_140m", 2048, {1: 2, 2: 2, 4: 4, 8: 6, 16: 8, 64: 10}),
        ("looped_370m", 2728, {32: 4, 64: 6, 128: 6}),
    ],
)
def test_optimal_loops_are_near_the_published_ones(name: str, ffn_dim: int, published: dict[int, int]) -> None:
    """Table 6 of arXiv 2604.12946, whose loops are even numbers; exponents of tokens are from its section 5.2."""
    config = preset_config(name, ffn_dim=ffn_dim, vocab_size=32_768)
    splits = {budget: optimal_split(config, 2048, budget * 1e18) for budget in published}
    for budget, loops in published.items():
        assert splits[budget].loops == pytest.approx(loops, rel=0.45), budget
    for split in splits.values():
        backprop = max(1.0, split.loops / 2)
        flops = forward_flops(config, 2048)
        cost = 3 * flops.once + flops.loop * (split.loops + 2 * backprop)
        assert cost * split.tokens == pytest.approx(split.flops)
    first, last = splits[min(published)], splits[max(published)]
    assert math.log(last.loops / first.loops) / math.log(last.flops / first.flops) == pytest.approx(0.40, abs=1e-6)
    assert math.log(last.tokens / first.tokens) / math.log(last.flops / first.flops) == pytest.approx(0.78, abs=0.06)


# --- the command line


def test_page_and_json_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    small = ["mythos_nano", "model.loops=2", "model.prelude_layers=1", "data.sequence_length=64"]
    small += ["depth.backprop=1", "--gpu", "a100", "--gpus", "16"]
    assert main([*small, "--tokens", "1e9", "--mfu", "0.25", "--price", "2", "--json", str(path)]) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    run, flops = figures["run"], figures["flops_per_token"]
    executed = flops["training_executed"]["none"]
    assert executed == flops["training_needed"]
    assert run["tokens_per_second"] == pytest.approx(16 * 0.25 * GPUS["A100"].peak / executed)
    assert run["tokens"] == pytest.approx(1e9, rel=1e-4)
    assert run["seconds_per_token"] is None and "by --mfu" in text
    assert "25% of 312 TFLOP/s" in text and "$2 an hour" in text and f"{run['tokens_per_second']:,.0f} tokens/s" in text
    assert set(figures["memory"]["activations"]) == set(CHECKPOINTING)


def test_utilisation_comes_from_the_traffic_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["mythos_nano", "model.loops=2", "data.sequence_length=64", "depth.backprop=1"]
    small += ["--tokens", "1e9", "--json", str(tmp_path / "out.json")]
    shares = {}
    for compiled in ("true", "false"):
        assert main([*small, f"train.compile={compiled}"]) == 0
        text, run = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())["run"]
        assert "from a model of a step's traffic" in text and "not measured" in text
        time = run["seconds_per_token"]
        assert run["tokens_per_second"] == pytest.approx(8 / sum(time.values()))
        shares[compiled] = run["utilisation"]
    assert shares["false"] < shares["true"] < 0.7
    assert time["waiting"] > time["products"] + time["elementwise"], "64 tokens do not keep a GPU busy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mythos_nano", "--gpu", "V100"], "--gpu: got V100; known: A100, H100, H200, B200"),
        (["mythos_nan"], "mythos_nan is neither a file nor a preset nor a configuration that comes with mythos"),
        (["mythos_nano", "--gpus", "0"], "--gpus: got 0; give a number above 0"),
        (["mythos_nano", "--mfu", "40"], "--mfu: got 40.0; it is a share of the peak"),
        (["mythos_nano", "--tokens", "nan"], "--tokens: got nan"),
        (["mythos_nano", "model.dimm=3"], "model.dimm: unknown"),
        (["mythos_nano", "train.tokens=5", "--tokens", "9"], "--tokens and train.tokens: both say how long the run is"),
        (["mythos_nano", "train.tokens=5", "train.steps=5"], "give exactly one of them"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
