"""The command line: every benchmark on a model of 25,000 parameters, whatever its speed."""

import contextlib
import json
import os
import re
import sys
from dataclasses import asdict
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from mythos.errors import MythosError
from mythos.planning import traffic
from scripts.benchmark import main
from scripts.benchmarks import checkpoint, decode, open_mythos, scaling, train
from scripts.benchmarks import model as parts
from scripts.benchmarks import traffic as traffic_benchmark
from scripts.benchmarks.steps import configuration
from tests.runs import write_settings

FIXED = ["depth={sampling: fixed, backprop: 3}", "model.vocab_size=384"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Write reports to a temporary folder, measure in this process, and restore its cores afterwards."""
    monkeypatch.chdir(tmp_path)
    for module in (train, decode):
        monkeypatch.setattr(module, "in_fresh_process", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(train, "OwnProcess", lambda make, *arguments: contextlib.nullcontext(make(*arguments)))
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)


def results(tmp_path, what: str) -> dict:
    report = json.loads((tmp_path / "benchmarks" / f"{what}.json").read_text())
    assert report["benchmark"] == what
    return report["results"]


def test_train(tmp_path, capsys):
    config = str(write_settings(tmp_path))
    assert main(["train", config, "--repeats", "1", *FIXED]) == 0  # overrides after options too
    figures = results(tmp_path, "train")
    none, loop = figures["modes"]["none"], figures["modes"]["loop"]
    assert set(figures["modes"]) == set(train.MODES)
    assert loop["flops_executed"]["gemms"] > none["flops_executed"]["gemms"] > 0
    assert loop["memory"]["tensors"] < none["memory"]["tensors"] <= none["memory"]["peak"]
    assert none["executed_over_needed"] == pytest.approx(
        (none["flops_executed"]["gemms"] + none["flops_executed"]["attention"]) / figures["flops_needed"]
    )
    # utilisation = FLOPs needed / time of the step / rate, where rate = FLOPs of the matmuls / their time
    assert none["utilisation"] > 0 and figures["gemm_flops_per_second"]["best"] > 0
    printed = capsys.readouterr().out
    assert "loop" in printed and "benchmarks/train.json" in printed and "bfloat16" not in printed


def test_model(tmp_path, capsys):
    config = str(write_settings(tmp_path))
    assert main(["model", config, *FIXED, "--repeats", "1", "--json", "parts.json"]) == 0
    figures = json.loads((tmp_path / "parts.json").read_text())["results"]
    seconds = {part: entry["cpu_seconds"] for part, entry in figures["parts"].items()}
    assert {
        "attention", "dense and shared feed-forward", "norms", "injection", "depth-wise adapter", "head and loss",
        "embedding", "optimizer", "experts: router", "experts: sort", "experts: gather and scatter",
        "experts: grouped products", parts.REST, parts.OUTSIDE,
    } <= set(seconds)  # fmt: skip
    assert sum(seconds.values()) == pytest.approx(figures["step"]["cpu_seconds"]["median"])
    everything = figures["products"] + figures["fused_attention"] + sum(figures["other_operators"].values())
    assert everything == pytest.approx(sum(seconds.values()))
    # Backward passes are counted with their parts: only attention has a softmax.
    softmax = [part for part, entry in figures["parts"].items() if "aten::_softmax_backward_data" in entry["operators"]]
    assert softmax == ["attention"]
    assert "everything else" in capsys.readouterr().out


def test_scaling(tmp_path):
    config = str(write_settings(tmp_path))
    arguments = ["--axes", "loops", "experts", "--loops", "1,2", "--experts", "4,8", "--repeats", "1"]
    assert main(["scaling", config, *arguments, "model.vocab_size=384"]) == 0
    figures = results(tmp_path, "scaling")
    assert set(figures) == {"loops", "experts"} and figures["loops"]["values"] == [1, 2]
    shallow, deep = figures["loops"]["tensor_bytes_at_fixed_backprop"]
    assert abs(deep - shallow) < 0.05 * shallow
    growing = figures["loops"]["step"]["tensor_bytes"]
    assert growing[1] > 1.05 * growing[0]


def test_slopes():
    assert scaling.slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert scaling.slope([1, 10], [5, 500]) == pytest.approx(2)


def test_decode(tmp_path, capsys):
    config = str(write_settings(tmp_path, model__context_length=128))
    arguments = ["--batch", "1,2", "--loops", "1,2", "--tokens", "1", "--repeats", "1", "--halting", "convergence"]
    assert main(["decode", config, "model.vocab_size=384", *arguments]) == 0
    rows = results(tmp_path, "decode")["rows"]
    assert [(row["most_loops"], row["batch"]) for row in rows[::4]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert rows[0]["halting"] == "all loops"
    assert rows[0]["loops"] == 1 and rows[8]["loops"] == 2
    assert rows[0]["cache_bytes"] < rows[4]["cache_bytes"] and rows[0]["cache_bytes"] < rows[8]["cache_bytes"]
    assert "2 loops, 2 rows" in capsys.readouterr().out
    arguments = ["--loops", "2", "--tokens", "1", "--repeats", "1", "--compile"]
    assert main(["decode", config, "model.vocab_size=384", *arguments]) == 0
    assert [row["halting"] for row in results(tmp_path, "decode")["rows"]] == ["all loops", "all loops, compiled"]


def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVES", 1)
    assert main(["checkpoint", "--preset", "mythos_nano", "--vocabulary", "128"]) == 0
    figures = results(tmp_path, "checkpoint")
    assert figures["tensor_bytes"] > 0 and figures["load_seconds"]["median"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "nothing: neither a YAML file nor a known size"),
        (["train", "reference", "--repeats", "0"], "--repeats: got 0; give at least 1"),
        (["train", "reference", "--cores", "first"], "--cores: got 'first'; give numbers of cores"),
        (["train", "reference", "--json", "."], r". cannot be written: it is a folder"),
        (["model", "reference", "train.compile=true"], "train.compile: got true"),
        (["scaling", "reference", "--axes", "loops", "--loops", "4"], "--loops: got '4'; a slope takes at least two"),
        (["scaling", "reference", "--axes", "batch", "--batch", "a,b"], "--batch: got 'a,b'; give whole numbers"),
        (["decode", "reference", "--tokens", "2000"], "--tokens: got 2000; with a prompt of 64"),
        (["decode", "reference", "--halting", "never"], "--halting: got never; allowed: none, convergence"),
        (["decode", "reference", "--halting", "gate"], "--halting: .*gate"),
        (["decode", "reference", "--batch", "0"], "--batch: got '0'; give whole numbers of at least 1"),
        (["data", "none.yaml"], r"none\.yaml: cannot be read"),
        (["data", "none.yaml", "--seconds", "0"], "--seconds: got 0; give a number above 0"),
        (["checkpoint", "--directory", "none"], "--directory: got none; give a folder"),
        (["checkpoint", "--preset", "none"], "preset 'none' does not exist"),
    ],
)
def test_bad_input_is_explained(arguments, message, capsys):
    assert main(arguments) == 1
    assert re.search(f"error: {message}", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "reference", "--checkpointing", "every"]])
def test_what_argparse_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


class OpenMythos(nn.Module):
    """Replaces the package's model by a cheap one, which records its arguments."""

    asked: SimpleNamespace

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        OpenMythos.asked = config
        self.embedding = nn.Embedding(config.vocab_size, 4)
        self.loops: list[int] = []

    def forward(self, ids, n_loops):
        self.loops.append(n_loops)
        return self.embedding(ids) @ self.embedding.weight.T

    def generate(self, ids, max_new_tokens, n_loops, top_k):
        assert top_k == 1
        return torch.cat((ids, ids[:, :max_new_tokens]), dim=1)


@pytest.fixture
def installed(monkeypatch):
    """Install a fake package named open_mythos."""
    package = ModuleType("open_mythos.main")
    package.OpenMythos, package.MythosConfig = OpenMythos, SimpleNamespace
    monkeypatch.setitem(sys.modules, "open_mythos", ModuleType("open_mythos"))
    monkeypatch.setitem(sys.modules, "open_mythos.main", package)


SAME = ["model.q_lora_rank=8", "model.shared_expert_dim=32", "model.ffn_dim=40", *FIXED]


def test_against_open_mythos(tmp_path, capsys, installed):
    config = str(write_settings(tmp_path, model__context_length=128))
    assert main(["train", config, *SAME, "--against", "open-mythos", "--repeats", "1"]) == 0
    figures = results(tmp_path, "train")
    assert OpenMythos.asked.act_threshold == float("inf") and OpenMythos.asked.max_loop_iters == 3
    assert figures["speed_ratio"]["median"] > 0
    assert figures["memory_ratio"]["tensors"] == (
        figures["mythos"]["memory"]["tensors"] / figures["open-mythos"]["memory"]["tensors"]
    )
    arguments = ["--against", "open-mythos", "--batch", "1,2", "--tokens", "1", "--repeats", "1", "--compile"]
    assert main(["decode", config, *SAME, *arguments]) == 0
    rows = results(tmp_path, "decode")["rows"]
    assert [row["batch"] for row in rows] == [1, 2] and rows[0]["compiled_speed_ratio"]["median"] > 0
    assert "times as fast" in capsys.readouterr().out


def test_open_mythos_runs_as_many_loops_in_every_micro_batch(tmp_path, installed):
    steps = open_mythos.Steps(configuration(str(write_settings(tmp_path)), SAME))
    steps()
    assert steps.model.loops == [3, 3]  # 8 rows in micro-batches of 4


def test_only_the_same_work_is_compared(tmp_path, capsys, installed):
    config = str(write_settings(tmp_path))
    assert main(["train", config, *SAME[:3], "model.vocab_size=384", "--against", "open-mythos"]) == 1
    assert "runs all loops with gradient" in capsys.readouterr().err


def test_open_mythos_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_mythos", None)
    assert main(["train", "reference", "--against", "open-mythos"]) == 1
    assert "pip install --no-deps open-mythos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.core_layers=2", r"model\.core_layers: got 2; open-mythos has 1"),
        ("model.ffn_dim=512", r"model\.ffn_dim: got 512; open-mythos has 341, or at most 5% from it"),
        ("model.shared_expert_dim=128", r"model\.shared_expert_dim: got 128; .* = 256"),
        ("model.q_lora_rank=0", r"model\.q_lora_rank: got 0; open-mythos has at least 1"),
    ],
)
def test_sizes_that_open_mythos_has_not(override, message):
    open_mythos.check_sizes(configuration("reference").model)
    with pytest.raises(MythosError, match=message):
        open_mythos.check_sizes(configuration("reference", [override]).model)


def test_traffic(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(traffic, "DEPTHS", (1, 2))  # fewer loops to trace
    compiled = traffic.Traffic(1, 2, 3000.0, 4, 5, 6000.0)  # tests/planning/test_traffic.py plans real graphs
    monkeypatch.setattr(traffic_benchmark, "compiled_pass_traffic", lambda *arguments: compiled)
    assert main(["traffic", "mythos_nano", "--rows", "2", "--length", "64"]) == 0
    figures = results(tmp_path, "traffic")
    counted = traffic.step_traffic(configuration("mythos_nano").model, 64, 2)
    assert figures["loop"] == asdict(counted.loop) and figures["once"] == asdict(counted.once)
    assert figures["compiled_loop"] == asdict(compiled)
    assert f"{counted.loop.bytes_backward / 1000:,.0f}" in capsys.readouterr().out
