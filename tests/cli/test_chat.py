"""A text written in turns: its context, its commands, and what it looks like on a terminal."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.cli import chat
from mythos.cli import generate as generate_command
from mythos.errors import MythosError
from mythos.generation.conversation import Conversation
from mythos.generation.depth_view import PALETTE
from mythos.generation.sampling import Sampling
from mythos.generation.text import Piece, choose_depth
from mythos.generation.tokens import generate
from tests.runs import tiny
from tests.terminal import Terminal
from tests.trainers import run

Chatting = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Path:
    return run(tiny(tmp_path_factory.mktemp("chat"), optim__lr=0.02, depth__mean=2)).run_dir


@pytest.fixture(scope="module")
def opened(trained: Path) -> OpenedModel:
    return open_model(trained)


class Keyboard(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chatting:
    """Run the command on lines of standard input; returns status, standard output and standard error."""

    def call(lines: str, *arguments: str, path: Path | str = trained, by_hand: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Keyboard(lines) if by_hand else io.StringIO(lines))
        status = chat.main([str(path), *arguments])
        return status, *capsys.readouterr()

    return call


def test_what_was_written_is_the_context_of_the_next_turn(
    talk: Chatting, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each turn is what `mythos generate` makes of the whole text before it; an empty line adds nothing."""
    options = ["--tokens", "5", "--temperature", "0", "--loops", "2"]
    text, expected = "", []
    for line in ("The river", "Page 7", ""):
        text += f"\n{line}" if text and line else line
        assert generate_command.main([str(trained), "--prompt", text, *options]) == 0
        continued = capsys.readouterr().out.removesuffix("\n")
        assert generate_command.main([str(trained), "--prompt", text, *options, "--show-depth"]) == 0
        expected.append(capsys.readouterr().out.removesuffix("\n").removeprefix(text))
        text = continued
    status, out, err = talk("The river\nPage 7\n\n", *options)
    assert status == 0
    assert out == "".join(f"{turn}\n" for turn in expected) and "[2]" in out
    assert err.count("(ended: the requested number of tokens; 2.00 loops per token on average)") == 3


def test_a_turn_sees_the_end_of_a_long_text(opened: OpenedModel) -> None:
    """The model's context is 64 tokens: 44 of the text, and 20 for the turn."""
    conversation = Conversation(opened, 20, sampling=Sampling(temperature=0))
    line = "The garden follows the stone. " * 12
    ids = conversation.tokenizer.encode_batch([line])[0]
    pieces: list[Piece] = []
    conversation.turn(line, choose_depth(opened, [2]), pieces.append)
    assert conversation.left_out == len(ids) - 44 > 0
    [row], _ = generate(
        opened.model,
        [ids[-44:]],
        20,
        sampling=Sampling(temperature=0),
        loops=2,
        vocabulary=conversation.tokenizer.size,
        stop_ids=(conversation.tokenizer.eos_id,),
    )
    continued = conversation.tokenizer.decode(ids + row.tokens).removeprefix(line)
    assert "".join(piece.text for piece in pieces) == continued and conversation.text == line + continued


def test_turns_have_seeds_of_their_own(opened: OpenedModel) -> None:
    def turns(seed: int) -> list[str]:
        conversation, texts = Conversation(opened, 8, seed=seed, sampling=Sampling(temperature=2.0)), []
        for _ in range(2):
            conversation.begin()
            conversation.turn("The", choose_depth(opened, [1]), lambda piece: None)
            texts.append(conversation.text)
        return texts

    first, second = turns(0)
    assert first != second and turns(1)[0] == second


def test_an_interrupted_turn_keeps_its_text(opened: OpenedModel) -> None:
    conversation, pieces = Conversation(opened, 20, sampling=Sampling(temperature=0)), []

    def interrupt(piece: Piece) -> None:
        pieces.append(piece.text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.turn("The", choose_depth(opened, [1]), interrupt)
    assert conversation.text == "The" + "".join(pieces)


def test_commands(talk: Chatting) -> None:
    """/new forgets the text: the same line is continued as before. /loops changes the loops of later turns."""
    options = ["--tokens", "4", "--temperature", "0", "--loops", "1"]
    status, out, err = talk("The\n/new\nThe\n/loops 3\n/new\nThe\n/loops auto\n\n", *options, by_hand=True)
    turns = out.replace("> ", "").splitlines()
    assert status == 0 and turns[0] == turns[1] and turns[0].count("[1]") == 4 and turns[2].count("[3]") == 4
    assert "Type the beginning of a text" in err and "/new begins a new text" in err and "\n(ended: " in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/loops", "/loops: got ''; give auto, or whole numbers of at least 1"),
        ("/loops 0", "/loops: got '0'; give auto, or whole numbers"),
        ("/loops 1,2", "/loops: got 1,2; give one number, or auto"),
        ("/quit", "/quit: no such command; give /new, /loops N or /loops auto. A text that begins with /"),
        ("a\udce9", "the line is not text in UTF-8, or has the character NUL"),
        ("a\0", "the line is not text in UTF-8, or has the character NUL"),
    ],
)
def test_a_line_that_is_refused(talk: Chatting, line: str, message: str) -> None:
    """A person reads one message and goes on; a program's input ends there."""
    status, out, err = talk(f"{line}\nThe\n", "--tokens", "2", by_hand=True)
    errors = [one for one in err.splitlines() if one.startswith("error: ")]
    assert status == 0 and len(errors) == 1 and errors[0].startswith(f"error: {message}") and "\n(ended: " in err
    status, out, err = talk(f"{line}\nThe\n", "--tokens", "2")
    assert status == 1 and out == "" and err.startswith(f"error: {message}") and len(err.splitlines()) == 1


def test_a_stream_without_line_breaks_is_not_read_to_its_end(talk: Chatting) -> None:
    status, out, err = talk("a" * 2**20 + "\nThe\n", "--tokens", "2")
    assert (status, out) == (1, "") and err == "error: a line has more than 1,048,576 characters; give shorter ones\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loops", "1,2"], "--loops: got 1,2; give one number, or auto"),
        (["--tokens", "64"], "--tokens: got 64; give less than the model's context, 64 tokens"),
        (["--tokens", "0"], "--tokens: got 0; give at least 1"),
        (["--halting", "boredom"], "--halting: got 'boredom'; allowed: none, "),
    ],
)
def test_bad_options_are_refused_before_the_first_line(talk: Chatting, arguments: list[str], message: str) -> None:
    status, out, err = talk("The\n", *arguments, by_hand=True)
    assert status == 1 and out == "" and err.startswith(f"error: {message}") and len(err.splitlines()) == 1


def test_a_path_that_is_no_model(talk: Chatting, tmp_path: Path) -> None:
    status, _, err = talk("", path=tmp_path / "nope")
    assert status == 1 and "nope: no such file or folder. Give a run directory" in err


def test_a_turn_that_fails_leaves_the_text(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(opened, 4, sampling=Sampling())
    conversation.turn("The", choose_depth(opened, [1]), lambda piece: None)
    text = conversation.text
    monkeypatch.setattr("mythos.generation.text.available_memory", lambda device: 1)
    with pytest.raises(MythosError, match="of memory are free"):
        conversation.turn("A", choose_depth(opened, [1]), lambda piece: None)
    assert conversation.text == text


def coloured_cells(terminal: Terminal) -> set[str]:
    """The colours of the characters on the screen."""
    return {cell.fg for line in terminal.emulated.buffer.values() for cell in line.values()} - {"default"}


def wait_for_prompt(terminal: Terminal) -> None:
    terminal.until(lambda text: text.splitlines()[-1:] == [">"])


@pytest.mark.slow
def test_chat_on_a_terminal(trained: Path) -> None:
    """A legend and tokens in colour; Ctrl-C stops the model, Ctrl-D leaves."""
    command = [sys.executable, "-m", "mythos", "chat", str(trained), "--tokens", "63"]
    with Terminal([*command, "--loops", "5000", "--cache-loops", "1"], 100, warm=True) as terminal:
        wait_for_prompt(terminal)
        assert "Type the beginning of a text" in terminal.text and "loops: 1 " in terminal.text
        terminal.send("The river\r")
        terminal.until(lambda text: len(text.partition("> The river\n")[2].strip()) > 2)
        terminal.send("\x03")
        terminal.until(lambda text: "(stopped)" in text)
        wait_for_prompt(terminal)
        terminal.send("a line\x03")  # at the prompt it only discards the line
        terminal.until(lambda text: "(Ctrl-D leaves)" in text)
        wait_for_prompt(terminal)
        terminal.send("/loops 2\r")
        terminal.until(lambda text: "loops: 1 2" in text)
        wait_for_prompt(terminal)
        terminal.send("\r")
        terminal.until(lambda text: "loops per token on average" in text)
        wait_for_prompt(terminal)
        assert len(coloured_cells(terminal)) == len(PALETTE)
        terminal.send("\x04")
        assert terminal.end() == 0
    assert "Traceback" not in terminal.text


@pytest.mark.slow
def test_chat_without_colours(trained: Path) -> None:
    command = [sys.executable, "-m", "mythos", "chat", str(trained), "--tokens", "4", "--loops", "2"]
    with Terminal(command, 100, warm=True, NO_COLOR="1") as terminal:
        wait_for_prompt(terminal)
        terminal.send("The river\r")
        terminal.until(lambda text: "loops per token on average" in text)
        wait_for_prompt(terminal)
        terminal.send("\x04")
        assert terminal.end() == 0
    assert terminal.text.count("[2]") == 4
    assert "follows each token in brackets" in terminal.text and not coloured_cells(terminal)
