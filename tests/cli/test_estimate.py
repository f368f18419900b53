"""`mythos estimate`."""

import json
from pathlib import Path

import pytest

from mythos.cli import main
from mythos.cli.estimate import page
from mythos.planning.budget import GPUS
from mythos.planning.fake_step import CHECKPOINTING


def test_page_and_json_of_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    shipped = ["mythos_nano", "--gpu", "a100", "--gpus", "4"]  # whose traces come with the package
    assert main(["estimate", *shipped, "--tokens", "1e9", "--mfu", "0.25", "--price", "2", "--json", str(path)]) == 0
    text, figures = capsys.readouterr().out, json.loads(path.read_text())
    run, flops = figures["run"], figures["flops_per_token"]
    executed = flops["training_executed"]["none"]
    assert executed == flops["training_needed"]
    assert run["tokens_per_second"] == pytest.approx(4 * 0.25 * GPUS["A100"].peak / executed)
    assert run["tokens"] == pytest.approx(1e9, rel=1e-4)
    assert run["seconds"] == pytest.approx(run["tokens"] * executed / (4 * 0.25 * 312e12))
    assert run["dollars"] == pytest.approx(4 * 2 * run["seconds"] / 3600)
    assert run["seconds_per_token"] is None and "by --mfu" in text
    assert "25% of 312 TFLOP/s" in text and "$2 an hour" in text and f"{run['tokens_per_second']:,.0f} tokens/s" in text
    assert set(figures["memory"]["activations"]) == set(CHECKPOINTING)
    fastest = figures["fastest"]
    assert fastest["fits"] and fastest["needed"] < 0.95 * GPUS["A100"].memory
    assert f"fastest of {fastest['tried']:,} layouts on 4 A100" in text and " ".join(fastest["overrides"]) in text
    assert figures["longest_context"]["tokens"] == {"80": 1024, "141": 1024}, "the model's context"
    assert "of a context of 1,024: 1,024 on 80 GiB, 1,024 on 141 GiB" in text
    assert " FLOPs) on 4 A100\n" in text
    figures["cache_bytes_per_token"] = {}  # JSON made text of its keys
    figures["memory"]["activations"]["none"] |= {"fits": False, "total": 108.25 * 2**30}
    assert " FLOPs) on 4 A100, if each had 108.2 GiB of memory\n" in page(figures), "a speed that it cannot have"


def test_utilisation_comes_from_the_traffic_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["mythos_nano", "model.loops=2", "data.sequence_length=64", "depth.backprop=1"]
    small += ["parallel.mode=ddp", "parallel.activation_checkpointing=none", "train.micro_batch=1"]  # one layout
    small += ["--tokens", "1e9", "--json", str(tmp_path / "out.json")]
    shares = {}
    for compiled in ("true", "false"):
        assert main(["estimate", *small, f"train.compile={compiled}"]) == 0
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
        (
            ["mythos_nano", "train.tokens=5", "--tokens", "9"],
            "--tokens and train.tokens: both set the length of the run",
        ),
        (["mythos_nano", "train.tokens=5", "train.steps=5"], "give exactly one of them"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *arguments]) == 1
    assert message in capsys.readouterr().err
