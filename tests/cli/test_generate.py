"""`mythos generate`: what it prints, and its errors."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from mythos.checkpoints.stored_model import OpenedModel
from mythos.cli import generate as command
from mythos.generation.depth_view import PALETTE
from mythos.model import rdt
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.trainer import Trainer
from tests.generation.page import Page


@pytest.fixture
def generate(trained: Trainer, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command on the run; returns status, standard output and standard error."""

    def call(*arguments: str, path: Path | str = trained.run_dir) -> tuple[int, str, str]:
        status = command.main([str(path), *arguments])
        return status, *capsys.readouterr()

    return call


def test_text_goes_to_standard_output_and_nothing_else(generate: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = generate("--prompt", "The river", "--tokens", "9", "--loops", "3")
    assert status == 0 and out.startswith("The river") and out.endswith("\n")
    assert "9 tokens at" in err and "3.00 loops per token" in err and "tokens/s" in err and "cache" in err
    assert generate("--prompt", "The river", "--tokens", "9", "--loops", "3")[1] == out
    assert generate("--prompt", "The river", "--tokens", "9", "--loops", "3", "--seed", "1")[1] != out


def test_what_the_command_prints_is_what_the_model_says(
    generate: Callable[..., tuple[int, str, str]], opened: OpenedModel
) -> None:
    """Greedy text against forward passes over the whole context."""
    tokenizer = opened.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode_batch(["The garden"])[0]
    for _ in range(8):
        with torch.no_grad():
            logits = opened.model(torch.tensor([ids]), loops=3).logits[0, -1, : tokenizer.size]
        ids.append(int(logits.argmax()))
    out = generate("--prompt", "The garden", "--tokens", "8", "--loops", "3", "--temperature", "0")[1]
    assert out == tokenizer.decode(ids) + "\n"


def test_several_prompts_and_depths(generate: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("A letter\r\n", newline="")
    single = ("--tokens", "5", "--top-k", "0", "--loops")
    status, out, err = generate("--prompt", "The", "--prompt-file", str(tmp_path / "p.txt"), *single, "1,4")
    assert status == 0 and "2 x the requested number of tokens" in err and "2.50 loops per token" in err
    first, second = out.split("== ")[1:]
    assert first.startswith("1 of 2, 1 loop\nThe") and second.startswith("2 of 2, 4 loops\nA letter")
    assert first.partition("\n")[2].strip("\n") == generate("--prompt", "The", *single, "1")[1].strip("\n")

    out = generate("--prompt-file", str(tmp_path / "p.txt"), "--prompt", "The", *single, "4,1")[1]
    assert [part.splitlines()[1][:3] for part in out.split("== ")[1:]] == ["A l", "The"], (
        "in the order of the command line"
    )

    out = generate("--prompt", "The", *single, "1,1,6")[1].split("== ")[1:]
    texts = [part.partition("\n")[2] for part in out]
    assert len(texts) == 3 and texts[0] == texts[1], "one prompt at several depths has the same draws"


def test_a_prompt_from_standard_input_or_none(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode("utf-8-sig"))))
    assert generate("--prompt-file", "-", "--tokens", "2")[1].startswith("naïve"), "without the byte order mark"
    status, out, err = generate("--tokens", "3")
    assert status == 0 and out.strip() and "after 1 prompt tokens" in err


def test_a_stop_string_ends_the_text(generate: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ("--prompt", "The", "--tokens", "30", "--loops", "2")
    whole = generate(*arguments)[1].removesuffix("\n")
    stop = whole[8:10]
    status, out, err = generate(*arguments, "--stop", "never said", "--stop", stop)
    assert status == 0 and out == whole[: 3 + whole[3:].index(stop)] + "\n" and "ended: stop string" in err


def test_depth_is_shown_without_colours_where_there_is_no_terminal(
    generate: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    page = tmp_path / "depth.html"
    halting = ("--halting", "convergence", "--exit-threshold", "1e9")
    arguments = ("--prompt", "The", "--tokens", "6", "--loops", "5", *halting)
    plain = generate(*arguments)[1]
    picture = tmp_path / "depth.svg"
    status, out, err = generate(*arguments, "--show-depth", "--html", str(page), "--picture", str(picture))
    assert picture.read_text().startswith("<?xml") and f"picture: {picture}" in err
    assert status == 0 and "\x1b" not in out
    assert out.replace("[1]", "") == plain and "[1]" in out, "so high a threshold stops all after the first loop"
    assert "1.00 loops per token on average of 5 (80% saved)" in err and "1 loop        6" in err
    assert plain.strip() in Page(page.read_text()).text


def test_colours_are_for_terminals(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    arguments = ("--prompt", "The", "--tokens", "4", "--loops", "4", "--show-depth")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, err = generate(*arguments)
    assert f"\x1b[38;5;{PALETTE[-1][0]}m" in out and "loops: \x1b[" in err
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    plain = generate(*arguments)[1]
    # Tokens that only together make a character are shown as one, and which these are depends on the text.
    assert "\x1b" not in plain and 1 <= plain.count("[4]") == out.count("\x1b[0m") <= 4


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    out = capsys.readouterr().out
    for option in ("--loops", "--exit-threshold", "--show-depth", "--cache-loops", "--stop", "examples:"):
        assert option in out


def test_compiled_text_is_the_same(
    generate: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Mock(wraps=RecurrentDepthTransformer.run_packed)
    monkeypatch.setattr(rdt, "_compiled_run_packed", lambda device: step)
    arguments = ("--prompt", "The river", "--tokens", "9", "--loops", "3")
    assert generate(*arguments, "--compile")[1] == generate(*arguments)[1]
    assert step.call_count == 8, "the first token comes with the prompt"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "0"], "--loops: got '0'; give auto, or whole numbers of at least 1"),
        (["--loops", "-4"], "--loops: got '-4'"),
        (["--loops", "many"], "--loops: got 'many'"),
        (["--halting", "gate"], "halting: got 'gate', and this model was trained with model.halting=convergence"),
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt", "word " * 80], "tokens, and the model's context is 64: shorten it"),
        (["--prompt-file", "no/such/file"], "--prompt-file: no/such/file cannot be read as UTF-8 text"),
        (["--prompt-file", "/dev/zero"], "--prompt-file /dev/zero: it has more than 67,108,864 bytes"),
        (["--top-k", "385"], "top-k: got 385; allowed: at most the vocabulary, "),
        (
            ["--loops", "65536", "--tokens", "10000"],
            "GiB of memory are free: give fewer --loops, or keep fewer of them (--cache-loops)",
        ),
        (["--top-p", "0"], "top-p: got 0.0; allowed: above 0 and at most 1"),
        (["--min-p", "1.5"], "min-p: got 1.5"),
        (["--temperature", "-1"], "temperature: got -1.0; allowed: at least 0"),
        (["--repetition-penalty", "0"], "repetition penalty: got 0.0"),
        (["--compile"], "--compile: got a halting rule that stops tokens; allowed: as many loops for all"),
        (["--compile", "--loops", "1,2"], "--compile: got several depths; allowed: as many loops for all"),
    ],
)
def test_bad_input_is_reported_in_a_line(
    generate: Callable[..., tuple[int, str, str]], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos.generation.text.available_memory", lambda device: 2**30)
    status, out, err = generate("--prompt", "a", *arguments)
    assert status == 1 and message in err and out == ""
    errors = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "1,2,3", "--prompt", "b"], "3 loop counts for 2 prompts"),
        (["--tokens", "0"], "--tokens: got 0; give at least 1"),
        (["--exit-threshold", "0"], "--exit-threshold: got 0; allowed: a number above 0"),
        (["--exit-threshold", "nan"], "--exit-threshold: got nan; allowed: a number above 0"),
        (["--exit-threshold", "1.5", "--halting", "act"], "got 1.5; allowed for act: above 0 and at most 1"),
        (["--halting", "boredom"], "--halting: got 'boredom'; allowed: none, "),
        (["--halting", "none", "--exit-threshold", "0.1"], "got 0.1 and --halting none, which has no threshold"),
        (["--stop", ""], "--stop: the text is empty"),
        (["--top-k", "-1"], "--top-k: got -1; give at least 0"),
        (["--seed", "-1"], "--seed: got -1; give at least 0"),
        (["--prefill-chunk", "0"], "--prefill-chunk: got 0; give at least 1"),
        (["--cache-loops", "0"], "--cache-loops: got 0; give at least 1"),
        (["--html", "no/such/folder/a.html"], "--html: there is no folder"),
        (["--html", ""], "--html: got no name; give a file"),
        (["--picture", "no/such/folder/a.svg"], "--picture: there is no folder"),
        (["--picture", "a.pdf"], "--picture: got a.pdf; give a file that ends in .svg or .png"),
        (["--html", "."], "--html: . is a folder; give a file in it"),
        (["--html", "/dev/null"], "--html: /dev/null is not a regular file; give another name"),
        (["--html", "/dev/stdout"], "--html: /dev/stdout is a link, which would be replaced; give the file"),
        (["--picture", "a" * 300 + ".png"], "cannot be written: File name too long; give another file"),
        (["--device", "cuda"], "--device is cuda, but torch finds no CUDA GPU: set --device=auto or cpu"),
    ],
)
def test_impossible_options_are_reported_before_a_model_is_loaded(
    generate: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.yaml").touch()
    status, out, err = generate("--prompt", "a", *arguments, path=str(tmp_path))
    assert status == 1 and err.startswith("error: ") and message in err and out == ""
    assert len(err.splitlines()) == 1


def test_tokens_beyond_the_length_of_training_are_counted(
    generate: Callable[..., tuple[int, str, str]], opened: OpenedModel
) -> None:
    assert opened.tokenizer is not None and opened.sequence_length == 32
    prompts = ["The river", "The garden crosses the river " * 9]
    lengths = [len(ids) for ids in opened.tokenizer.encode_batch(prompts)]
    assert lengths[0] + 6 <= 32 < lengths[1], lengths
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    options = ("--tokens", "6", "--loops", "1", "--repetition-penalty", "1")
    assert "beyond" not in generate(*arguments[:2], *options)[2]
    err = generate(*arguments, *options)[2]
    assert "\n6 of the 12 tokens lie beyond 32, the length of the training sequences" in err
    within = 32 - lengths[0]
    err = generate(*arguments[:2], "--tokens", str(within + 2), "--loops", "1")[2]
    assert f"\n2 of the {within + 2} tokens lie beyond 32" in err


def test_far_more_loops_than_trained_are_warned_of(generate: Callable[..., tuple[int, str, str]]) -> None:
    arguments = ("--prompt", "The", "--tokens", "1", "--loops")
    assert "warning" not in generate(*arguments, "16")[2]
    status, _, err = generate(*arguments, "17")
    assert status == 0 and "warning: 17 loops for a model trained with 2 on average" in err


def test_a_path_that_is_no_model(generate: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    status, _, err = generate("--prompt", "a", path=tmp_path)
    assert status == 1 and "it is not a model. Give a run directory" in err
