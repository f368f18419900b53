"""The memory of a step against what the allocator counts for a real step."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mythos.config.loading import config_from_dict
from mythos.config.presets import preset_config
from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.parallel import prepare_model
from mythos.model.config import ModelConfig
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning import memory
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.fake_step import CHECKPOINTING, Step, fake_model
from mythos.planning.layout import USABLE_SHARE
from mythos.planning.memory import step_activations
from mythos.planning.rank_state import activations
from mythos.planning.search import CONTEXT_STEP, SEARCHED, Search, at_length
from mythos.torch_internals import FakeTensorMode


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
        preset_config("mythos_tiny", vocab_size=1024, core_layers=2, prelude_layers=1, coda_layers=1), 2, 256,
        torch.bfloat16,
    ),
    "passes that differ": (
        preset_config(
            "mythos_nano", vocab_size=512, router_loop="embedding", loop_norm="adaptive", residual_scale=0.125
        ), 4, 128, torch.bfloat16,
    ),
    "lanes": (preset_config("mythos_nano", vocab_size=512, lanes=2, lora_rank=0), 4, 128, torch.bfloat16),
    "layer by layer": (
        preset_config("mythos_nano", vocab_size=512, core_layers=2, loop_over="layer", injection="orthogonal"),
        4, 128, torch.float32,
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


def test_recomputed_layers_keep_only_their_input() -> None:
    """At the peak, in the loop's backward pass, a layer more of the prelude has kept one float32 residual stream."""
    for checkpointing in ("loop", "all"):
        few, many = (preset_config("mythos_nano", vocab_size=512, prelude_layers=n, coda_layers=n) for n in (2, 3))
        step = Step(4, 128, 2, 2, checkpointing, torch.float32, "cpu", True)
        more = step_activations(many, step).peak - step_activations(few, step).peak
        stream = step.rows * step.length * few.dim * torch.float32.itemsize
        assert more == stream if checkpointing == "all" else more > 20 * stream


def test_what_a_gpu_fuses_allocates_its_results_only() -> None:
    with FakeTensorMode(), memory.Ledger([], set()) as ledger:
        x = torch.empty(1000)
        with device_choice.simulated_gpu(ledger.call_fused), torch.no_grad():
            y = device_choice.fused(lambda x: torch.cat((x * 2, x + 1)), x.device)(x)
        del x, y
    assert (ledger.live, ledger.peak()) == (0, 4 * (1000 + 2000))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_divided_shared_experts_keep_no_hidden_activations(checkpointing: str) -> None:
    """However wide they are; and what a recomputed pass leaves behind is freed before the next one is recomputed."""
    kept, peaks = {}, {}
    for width in (64, 1024):
        config = preset_config("mythos_nano", vocab_size=512, shared_expert_dim=width)
        steps = [Step(4, 128, n, n, checkpointing, torch.bfloat16, "cpu", expert=4, sharers=4) for n in (4, 8)]
        estimates = [step_activations(config, step) for step in steps]
        kept[width], peaks[width] = estimates[0].kept // 4, [each.peak for each in estimates]
    assert kept[64] == kept[1024]
    for few, many in peaks.values():
        assert many - few == pytest.approx(4 * kept[64], rel=0.05)


def test_choices_of_a_simulated_gpu_end_with_it() -> None:
    cpu = torch.device("cpu")
    with fake_model(SIZES["experts"][0], Step(1, 8, 1, 1, "none", torch.float32)):
        assert device_choice.device_type(cpu) == "cuda"
        assert not device_choice.causal_by_products(cpu, torch.float32, 8)
    assert device_choice.device_type(cpu) == "cpu"
    assert device_choice.causal_by_products(cpu, torch.float32, 8)


def test_activations_with_fewer_expert_ranks_shrink_at_most_as_rows_do() -> None:
    """Which the search of layouts takes for granted, to leave out layouts."""
    config = preset_config("mythos_nano", vocab_size=128, n_experts=16, experts_per_token=4, dim=256)
    counts = (1, 2, 4, 16)
    peaks = [
        step_activations(config, Step(2, 64, 2, 2, "none", torch.bfloat16, gathered=True, expert=count)).peak
        for count in counts
    ]
    rows = [rows_to_experts(config, count, 1000) for count in counts]
    assert rows == sorted(rows)
    for fewer in range(len(counts)):
        for more in range(fewer, len(counts)):
            assert peaks[fewer] >= peaks[more] * rows[fewer] / rows[more]


def test_the_longest_context_fits_and_one_step_more_does_not() -> None:
    """Traced at the length that was extrapolated from two short ones, with experts that two ranks divide."""
    config = config_from_dict(
        {
            "model": {"preset": "mythos_nano", "context_length": 65_536, "vocab_size": 512},
            "tokenizer": {"vocab_size": 512},
            "data": {"streams": 4, "sequence_length": 2048},
            "train": {"steps": 1, "global_batch": 4, "micro_batch": 1},
            "parallel": {"mode": "fsdp", "expert": 2, "activation_checkpointing": "loop"},
        }
    )
    fixed = frozenset({*SEARCHED, "micro_batch"}) - {"shard", "replicate"}
    search = Search(config, 4, 8, fixed)
    least, memory = search.least(), 2**29
    assert least is not None
    longest = search.longest_context(least, memory)
    assert 8 * CONTEXT_STEP < longest < 65_536
    needed = [
        least.held + activations(at_length(least.candidate.config, length), least.candidate.layout).peak
        for length in (longest, longest + CONTEXT_STEP)
    ]
    print(longest, [size / memory for size in needed])
    assert needed[0] <= USABLE_SHARE * memory < needed[1]
