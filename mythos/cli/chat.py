"""Write a text in turns with a trained model, coloured by loops.

The model continues what you type; all that was written before is its context. It was trained on text, not to answer
questions. Without a terminal every line of standard input is a turn.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mythos.cli.common import check_model_path, command_parser, exit_status
from mythos.cli.generate import (
    add_computation_options,
    add_depth_options,
    add_length_options,
    add_sampling_options,
    check_compilable,
    check_values,
    parse_loops,
    piece_format,
    set_up,
    warn_of_many_loops,
)
from mythos.errors import MythosError
from mythos.files.text import unusable_text
from mythos.progress import can_colour

if TYPE_CHECKING:
    from mythos.generation.conversation import Conversation
    from mythos.generation.text import Depth, Piece

MOST_LINE = 2**20
"""Longest line that is read; longer ones than a model's context are cut at their beginning anyway."""

EXAMPLES = """
examples:
  %(prog)s runs/quickstart                       loops per token as the halting rule decides
  %(prog)s runs/quickstart --loops 16            16 loops for every token
  printf 'The river\\n\\n' | %(prog)s runs/quickstart   two turns; an empty line lets the model go on

The text goes to standard output, everything else to standard error.
"""
HELP = """Type the beginning of a text; an empty line lets the model go on.
/new begins a new text; /loops N or /loops auto sets the depth.
Ctrl-C stops the model, Ctrl-D leaves."""


def parser() -> argparse.ArgumentParser:
    parser = command_parser("chat", __doc__, epilog=EXAMPLES, usage="%(prog)s PATH [--loops N|auto] [options]")
    parser.add_argument("path", metavar="PATH", help="run directory, checkpoint step-XXXXXXXX, or exported folder")
    add_length_options(parser.add_argument_group("length of a turn"), tokens=64)
    add_depth_options(parser.add_argument_group("depth"))
    add_sampling_options(parser.add_argument_group("sampling"))
    add_computation_options(parser.add_argument_group("device"))
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal's encoding lacks
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are refused line by line
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Open the model and take turns until the end of standard input. Raises MythosError for bad input."""
    loops = one_depth("--loops", options.loops)
    check_values(options)
    check_model_path(options.path)
    from mythos.generation.conversation import Conversation

    opened, depth, settings = set_up(options, loops)
    conversation = Conversation(opened, options.tokens, seed=options.seed, **settings)
    Chat(conversation, depth, options).run()


def one_depth(option: str, text: str) -> list[int] | None:
    """Parse a depth, with None for auto. Raises MythosError for anything else, and for several depths."""
    loops = parse_loops(text, option)
    if loops is not None and len(loops) > 1:
        raise MythosError(f"{option}: got {text}; give one number, or auto")
    return loops


class Chat:
    """Takes lines from standard input, and prints what the model makes of them."""

    def __init__(self, conversation: Conversation, depth: Depth, options: argparse.Namespace) -> None:
        self.conversation, self.depth, self.options = conversation, depth, options
        self.by_hand = sys.stdin.isatty()  # whether a person types the lines
        self.shown = piece_format(max(depth.limits), show_depth=True)

    def run(self) -> None:
        """Take turns until the input ends. Raises MythosError for a line that is refused, unless a person typed it."""
        opened = self.conversation.opened
        if self.by_hand:
            if sys.stdout.isatty():
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401 - gives `input` its editing keys and a history
            print(f"{opened.source}\n{HELP}", file=sys.stderr)
        self.print_legend()
        for line in self.lines():
            try:
                if unusable_text(line):
                    raise MythosError("the line is not text in UTF-8, or has the character NUL; type it again")
                if line.startswith("/"):
                    self.obey(line)
                else:
                    self.turn(line)
            except MythosError as error:
                if not self.by_hand:
                    raise
                print(f"error: {error}", file=sys.stderr)

    def lines(self) -> Iterator[str]:
        """Lines of standard input, without their ends. Ctrl-C discards a line that is being typed."""
        while True:
            try:
                if not self.by_hand:
                    line = sys.stdin.readline(MOST_LINE)
                    if not line:
                        return
                    if len(line) == MOST_LINE:  # a stream without line breaks would be read until memory is full
                        raise MythosError(f"a line has more than {MOST_LINE:,} characters; give shorter ones")
                    yield line.removesuffix("\n")
                else:
                    yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not self.by_hand:
                    raise
                print("\n(Ctrl-D leaves)", file=sys.stderr)

    def turn(self, line: str) -> None:
        """Let the model continue the text after this line; Ctrl-C stops it."""

        def show(piece: Piece) -> None:
            print(self.shown(piece), end="", flush=True)

        try:
            generation = self.conversation.turn(line, self.depth, show)
        except KeyboardInterrupt:
            if not self.by_hand:
                raise
            print(flush=True)
            print("(stopped)", file=sys.stderr)
            return
        print(flush=True)
        print(f"({generation.ending()}; {generation.loops_summary()})", file=sys.stderr)
        if generation.untrained:
            print(f"({generation.beyond_training()})", file=sys.stderr)
        if left_out := self.conversation.left_out:
            print(f"(the context is full; tokens left out at the beginning: {left_out:,})", file=sys.stderr)

    def obey(self, line: str) -> None:
        """Follow a command. Raises MythosError for an unknown one, and for a depth that the model cannot run."""
        name, _, value = line.partition(" ")
        if name == "/new" and not value:
            self.conversation.begin()
        elif name == "/loops":
            self.set_depth(value)
        else:
            raise MythosError(
                f"{line}: no such command; give /new, /loops N or /loops auto. A text that begins with / needs a space "
                "before it"
            )

    def set_depth(self, text: str) -> None:
        """Change the loops of the turns to come."""
        from mythos.generation.text import choose_depth

        options, opened = self.options, self.conversation.opened
        depth = choose_depth(opened, one_depth("/loops", text.strip()), options.halting, options.exit_threshold)
        if options.compile:
            check_compilable(depth)
        self.depth = depth
        self.shown = piece_format(max(depth.limits), show_depth=True)
        warn_of_many_loops(opened, max(depth.limits))
        self.print_legend()

    def print_legend(self) -> None:
        """Print the colours of the loops, or how loops are written without colours."""
        from mythos.generation.depth_view import terminal_legend

        if can_colour(sys.stdout):
            print(terminal_legend(max(self.depth.limits)), file=sys.stderr)
        elif self.by_hand:
            print("The number of loops follows each token in brackets.", file=sys.stderr)
