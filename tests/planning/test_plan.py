"""Plans for many processes: what fits, what is shown, and errors."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from mythos.config.loading import config_from_dict
from mythos.config.presets import PRESETS
from mythos.config.sections import Config
from mythos.distributed import sharding
from mythos.errors import MythosError
from mythos.planning.collectives import fake_processes
from mythos.planning.plan import plan
from mythos.planning.rank_state import Working
from tests.planning.helpers import GIB, memory_table, preset
from tests.runs import tiny


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.usefixtures("no_activations")
def test_every_preset_is_planned_for_1024_processes(name: str) -> None:
    text = plan(preset(name), 1024)
    table = memory_table(text)
    assert re.search(r"^processes +1,024, 8 on a machine: (ddp|hsdp|fsdp)", text, re.MULTILINE)
    assert all(table[what] > 0 for what in ("parameters", "gradients", "optimizer state", "in all, of 80"))
    assert sum(size for what, size in table.items() if "in all" not in what) == pytest.approx(
        table["in all, of 80"], rel=2e-3, abs=0.01
    )
    too_large = name in ("mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t")
    assert (table["in all, of 80"] > 80) == too_large
    assert ("parallel.expert=" in text) == too_large, "with divided experts these fit"
    assert ("parallel.shared=" in text) == (name in ("mythos_500b", "mythos_1t")), "their shared experts are too large"
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("ranks", "memory", "mode", "expected"),
    [
        (1, 80, "auto", "on 8 processes"),  # 149 GiB of state and 18 of weights
        (
            8,
            80,
            "auto",
            "parallel.reduce=micro_batch",
        ),  # sharded over eight it fits, but not with 37 GiB of whole gradients
        (64, 60, "hsdp", "parallel.shard="),  # the eight ranks of a machine do not suffice
    ],
)
@pytest.mark.usefixtures("no_activations")
def test_what_would_fit_does(ranks: int, memory: int, mode: str, expected: str) -> None:
    def config(*parallel: tuple[str, str]) -> Config:
        values = {"reduce": "step", "mode": mode} | {name: yaml.safe_load(value) for name, value in parallel}
        fields = preset("mythos_10b", **values).model_dump(mode="json")
        fields["data"]["streams"] = 64
        fields["train"]["global_batch"] = 64 * 8
        return config_from_dict(fields)

    text = plan(config(), ranks, device_memory=memory * GIB)
    advice = re.search(r"^does not fit; (.*) would, with ([\d.]+) GiB$", text, re.MULTILINE)
    assert advice and expected in advice[1], text[text.index("processes ") :]
    assert float(advice[2]) <= memory
    elsewhere = re.search(r"on ([\d,]+) processes", advice[1])
    there = int(elsewhere[1].replace(",", "")) if elsewhere else ranks
    again = plan(config(*re.findall(r"parallel\.(\w+)=(\w+)", advice[1])), there, device_memory=memory * GIB)
    assert "does not fit" not in again
    assert memory_table(again)[f"in all, of {memory}"] == pytest.approx(float(advice[2]), abs=0.001)


def test_activations_count_against_the_memory(tmp_path: Path) -> None:
    """The figures of the memory table add up, and checkpointing lowers activations."""
    long = {"data__sequence_length": 32768, "model__context_length": 32768, "train__global_batch": 2}
    long |= {"depth__backprop": 2, "depth__maximum": 3}
    none = memory_table(plan(tiny(tmp_path, **long)))
    loop = memory_table(plan(tiny(tmp_path, **long, parallel__activation_checkpointing="loop")))
    kept = "activations that 2 passes of 2 rows keep"
    for table in (none, loop):
        parts = sum(size for what, size in table.items() if "in all" not in what)
        assert parts == pytest.approx(table["in all, of 80"], abs=0.003)
    assert 0 < loop[kept] < none[kept] / 2
    text = plan(tiny(tmp_path, **long), device_memory=16 * 2**20)
    assert re.search(r"does not fit, for activations alone take [\d.]+ GiB, whatever is recomputed: lower train", text)
    whole = "in all, of 80"  # between the two, only recomputation helps
    long |= {"train__global_batch": 64, "train__micro_batch": 2}
    text = plan(tiny(tmp_path, **long), device_memory=int((loop[whole] + none[whole]) / 2 * 2**30))
    assert re.search(r"does not fit; .*parallel\.activation_checkpointing=loop.* would, with [\d.]+ GiB", text)


def test_a_context_of_a_million_tokens_is_planned() -> None:
    """A small model with such a context; an S x S table or mask of bytes would take 931 GiB."""
    fields = preset("mythos_100b", activation_checkpointing="loop", mode="fsdp").model_dump(mode="json")
    fields["data"]["sequence_length"] = fields["model"]["context_length"]
    fields["model"] |= {"dim": 64, "ffn_dim": 64, "expert_dim": 8, "shared_expert_dim": 8, "n_heads": 1, "loops": 2}
    fields["model"] |= {"prelude_layers": 1, "coda_layers": 1, "n_experts": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    fields["train"]["micro_batch"] = 1
    table = memory_table(plan(config_from_dict(fields), 1024))
    assert 0 < table["activations of the rest, at their peak: head, casts, gradients on their way"] < 100


# --- what decoding caches


@pytest.mark.usefixtures("no_activations")
def test_cache_of_a_token_is_shown(tmp_path: Path) -> None:
    """An mla layer caches a latent and one rotated key, a gqa layer keys and values of its kv heads."""
    assert "cache bytes per token in bfloat16: 16,640 (16.25 KiB) at 16 loops\n" in plan(preset("mythos_3b"))
    small = {"train__dtype": "float32", "model__prelude_layers": 2, "model__core_layers": 3, "depth__mean": 5.0}
    entries = 2 + 3 * 5 + 1
    mla = plan(tiny(tmp_path, **small, model__coda_layers=1, model__kv_lora_rank=20, model__qk_rope_head_dim=4))
    assert f"cache bytes per token in float32: {4 * entries * (20 + 4):,} (" in mla and "at 5 loops\n" in mla
    heads = {"model__attention": "gqa", "model__n_heads": 6, "model__n_kv_heads": 3, "model__head_dim": 10}
    gqa = plan(tiny(tmp_path, **small, model__coda_layers=1, **heads))
    assert f"cache bytes per token in float32: {4 * entries * 2 * 3 * 10:,} (" in gqa


# --- collectives, whose counts tests/distributed/test_collectives.py compares with real steps


@pytest.mark.usefixtures("no_activations")
def test_collectives_of_both_wraps_are_shown(tmp_path: Path) -> None:
    text = plan(tiny(tmp_path, data__streams=8, parallel__mode="fsdp", parallel__wrap="block"), 8)
    loop, block = re.findall(r"^  wrap=(?:loop|block) .*$", text, re.MULTILINE)
    assert "configured" in block and "configured" not in loop
    assert int(re.search(r"(\d+) all-gathers", block)[1]) > int(re.search(r"(\d+) all-gathers", loop)[1])
    assert "of 1 micro-batch at 3 loops" in text
    assert "collectives of" not in plan(tiny(tmp_path), 1)


# --- processes


@pytest.mark.usefixtures("no_activations")
def test_processes_are_those_of_the_environment_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "processes       1, 1 on a machine: single" in plan(tiny(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "processes       2, 2 on a machine: ddp" in plan(tiny(tmp_path))
    assert "processes       1, 1 on a machine: single" in plan(tiny(tmp_path), 1)


@pytest.mark.usefixtures("no_activations")
def test_layout_depends_on_machine_and_memory() -> None:
    config = preset("mythos_10b")
    assert "hsdp, 128 x 8" in plan(config, 1024)
    assert ": fsdp" in plan(config, 1024, machine_ranks=4)
    assert ": ddp" in plan(config, 1024, device_memory=500 * GIB)


def test_number_of_processes_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"data\.streams: 2 is not a multiple of the 3 processes"):
        plan(tiny(tmp_path), 3)
    with pytest.raises(MythosError, match=r"single and 2 processes"):
        plan(tiny(tmp_path, parallel__mode="single"), 2)
    with pytest.raises(MythosError, match=r"0 processes.*at least 1"):
        plan(tiny(tmp_path), 0)
    with pytest.raises(MythosError, match=r"--device-memory above 0"):
        plan(tiny(tmp_path), 1, device_memory=0)


@pytest.mark.usefixtures("no_activations")
def test_no_process_group_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the exchanges of Muon need fake processes.
    config = tiny(tmp_path, parallel__mode="fsdp", optim__name="muon")

    def fails(*arguments: Any) -> Working:
        assert dist.is_initialized()
        raise KeyError

    plan(config, 2)
    assert not dist.is_initialized()
    monkeypatch.setattr(sharding, "shard_model", fails)
    with pytest.raises(KeyError):
        plan(config, 2)
    assert not dist.is_initialized()
    with fake_processes(2):
        with pytest.raises(RuntimeError, match="plan before joining it"):
            plan(config, 2)
        assert dist.get_world_size() == 2
