"""Continue text with a trained model."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos.cli.common import (
    TakesArguments,
    add_device_option,
    check_least,
    check_model_path,
    command_parser,
    exit_status,
    whole_numbers,
)
from mythos.config.checking import shortened
from mythos.errors import MythosError
from mythos.files.local import writing
from mythos.files.text import MOST_BYTES
from mythos.progress import can_colour

if TYPE_CHECKING:
    from mythos.checkpoints.stored_model import OpenedModel
    from mythos.generation.sampling import Sampling
    from mythos.generation.text import Depth, Piece, TextGeneration

EXAMPLES = """
examples:
  %(prog)s runs/quickstart --prompt "The river"           loops per token as the halting rule decides
  %(prog)s runs/quickstart --prompt "2 + 2 =" --loops 16  16 loops for every token
  %(prog)s runs/quickstart --prompt "I" --loops 1,4,16    the same prompt at three depths, in one batch
  %(prog)s runs/quickstart --prompt "A" --prompt "B"      two prompts in one batch
  %(prog)s runs/quickstart --prompt-file book.txt --show-depth --html depth.html
  echo "Once upon a time" | %(prog)s runs/quickstart --prompt-file -

Text goes to standard output, everything else to standard error.
"""


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "generate", __doc__, epilog=EXAMPLES, usage="%(prog)s PATH [--prompt TEXT] [--loops N|auto] [options]"
    )
    parser.add_argument("path", metavar="PATH", help="run directory, checkpoint step-XXXXXXXX, or exported folder")
    prompts = parser.add_argument_group("prompts (without any, the model begins a new document)")
    _add_prompt_options(prompts)
    add_length_options(prompts, tokens=128)
    add_depth_options(parser.add_argument_group("depth"), "; N,M,... = one per prompt, or one prompt at each")
    add_sampling_options(parser.add_argument_group("sampling"))
    output = parser.add_argument_group("output and device")
    _add_output_options(output)
    add_computation_options(output)
    return parser


def _add_prompt_options(group: TakesArguments) -> None:
    # Both options append to one list, which keeps the order of the command line.
    group.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        type=lambda text: ("--prompt", text),
        default=[],
        metavar="TEXT",
        help="beginning of a text; repeatable",
    )
    group.add_argument(
        "--prompt-file",
        dest="prompts",
        action="append",
        type=lambda name: ("--prompt-file", name),
        default=[],
        metavar="FILE",
        help="prompt from a file, without its last line break; - is standard input; repeatable",
    )


def add_length_options(group: TakesArguments, tokens: int) -> None:
    """Add --tokens, with its default, and --stop."""
    group.add_argument("--tokens", type=int, default=tokens, metavar="N", help="maximum new tokens (%(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def add_depth_options(group: TakesArguments, several_loops: str = "") -> None:
    """Add the options that choose the loops of a token; `several_loops` explains values such as 1,4 of --loops."""
    group.add_argument(
        "--loops",
        default="auto",
        metavar="N|auto",
        help=f"loops of every token; auto (default) = up to the training mean, by the halting rule{several_loops}",
    )
    group.add_argument(
        "--halting", metavar="RULE", help="stop a token before its last loop by this rule (default: the model's)"
    )
    group.add_argument(
        "--exit-threshold", type=float, metavar="X", help="threshold of the halting rule (default: the rule's)"
    )
    group.add_argument(
        "--cache-loops", type=int, metavar="M", help="cache keys and values of the last M loops only (all)"
    )


def add_sampling_options(group: TakesArguments) -> None:
    """Add the options that choose the next token."""
    group.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 = most likely (%(default)s)")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely; 0 = all (40)")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely with total share P (off)")
    group.add_argument("--min-p", type=float, metavar="P", help="minimum share, relative to the most likely (off)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repetitions (%(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first prompt; N + 1, ... of the next (%(default)s)"
    )


def _add_output_options(group: TakesArguments) -> None:
    group.add_argument(
        "--show-depth",
        action="store_true",
        help="colour the text by the loops of each token (or write them in brackets)",
    )
    group.add_argument("--html", metavar="FILE", help="write the text, coloured by loops, as a web page")
    group.add_argument("--picture", metavar="FILE", help="the same as a picture, .svg or .png")


def add_computation_options(group: TakesArguments) -> None:
    """Add the options that choose device, dtype and kernels."""
    add_device_option(group)
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of matmuls; auto = bfloat16 on GPUs that support it, float32 elsewhere",
    )
    group.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens per forward pass (%(default)s)"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the decoding step first, about a minute; for one number of loops without halting",
    )


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal's encoding lacks
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Open the model, generate, print and write. Raises MythosError for bad input."""
    # Check the options before importing torch, which takes seconds.
    loops = parse_loops(options.loops)
    check_values(options)
    check_files(options)
    check_model_path(options.path)
    prompts = read_prompts(options.prompts)
    from mythos.generation.depth_view import histogram, html_page, write_page
    from mythos.generation.text import check_counts, generate_text

    if loops is not None:
        check_counts(len(loops), len(prompts))
    opened, depth, settings = set_up(options, loops)
    output = TextOutput(prompts, depth, options.show_depth)
    generation = generate_text(
        opened, prompts, options.tokens, depth, seed=options.seed, on_piece=output.on_piece, **settings
    )
    output.finish(generation)
    print(f"\n{generation.summary()}", file=sys.stderr)
    if options.show_depth:
        print(histogram(generation), file=sys.stderr)
    if options.html:
        name = opened.run.run.name if opened.run else Path(opened.source).name
        write_page(Path(options.html), html_page(generation, f"{name}, step {opened.step}"))
        print(f"page: {options.html}", file=sys.stderr)
    if options.picture:
        from mythos.reports.text_picture import draw_text

        with writing(Path(options.picture), "; give another file"):
            draw_text(generation, Path(options.picture))
        print(f"picture: {options.picture}", file=sys.stderr)


def set_up(options: argparse.Namespace, loops: list[int] | None) -> tuple[OpenedModel, Depth, dict[str, Any]]:
    """Open the model; returns it, its depth, and further arguments of `mythos.generation.text.generate_text`.

    `loops` is the result of `parse_loops`. Raises MythosError for options that do not fit the model.
    """
    import torch

    from mythos.checkpoints.stored_model import open_model
    from mythos.distributed.parallel import choose_dtype
    from mythos.distributed.ranks import choose_device
    from mythos.generation.text import choose_depth

    sampling = chosen_sampling(options)
    check_halting(options.halting, options.exit_threshold)
    device = choose_device(options.device, option="--device")
    # On a CPU decoding's small matmuls are slower in bfloat16, with its casts, than in float32.
    use_float32 = options.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if use_float32 else choose_dtype(options.dtype, device)
    opened = open_model(options.path, device)
    if options.top_k is None and opened.tokenizer is not None:
        sampling = replace(sampling, top_k=min(40, opened.tokenizer.size))
    depth = choose_depth(opened, loops, options.halting, options.exit_threshold)
    if options.compile:
        check_compilable(depth)
    warn_of_many_loops(opened, max(depth.limits))
    settings = {
        "sampling": sampling,
        "stops": options.stop,
        "dtype": dtype,
        "prefill_chunk": options.prefill_chunk,
        "cache_loops": options.cache_loops,
        "compiled": options.compile,
    }
    return opened, depth, settings


class TextOutput:
    """Print generated text: a single row piece by piece as it is generated, several rows at the end."""

    def __init__(self, prompts: list[str | None], depth: Depth, show_depth: bool) -> None:
        """Choose the form of the text; print the legend of the colours, if they are used."""
        from mythos.generation.depth_view import terminal_legend

        most_loops = max(depth.limits)
        if show_depth and can_colour(sys.stdout):
            print(terminal_legend(most_loops) + "\n", file=sys.stderr)
        self.several_depths = len(depth.limits) > 1
        self.streams = len(prompts) == len(depth.limits) == 1
        # Printed with the first piece, so that standard output stays empty if generation is refused.
        self.pending_prompt = (prompts[0] or "") if self.streams else ""
        self.shown = piece_format(most_loops, show_depth)

    def on_piece(self, row: int, piece: Piece) -> None:
        """Print a piece, if text is streamed."""
        if self.streams:
            print(self.pending_prompt + self.shown(piece), end="", flush=True)
            self.pending_prompt = ""

    def finish(self, generation: TextGeneration) -> None:
        """End the streamed text, or print all rows."""
        from mythos.generation.depth_view import in_loops

        if self.streams:
            print(self.pending_prompt)
        else:
            for number, row in enumerate(generation.rows, start=1):
                loops = f", {in_loops(row.limit)}" if self.several_depths else ""
                text = row.prompt + "".join(map(self.shown, row.pieces))
                print(f"== {number} of {len(generation.rows)}{loops}\n{text}\n")
        sys.stdout.flush()


def piece_format(most_loops: int, show_depth: bool) -> Callable[[Piece], str]:
    """Return a function that writes a piece of text for standard output.

    With `show_depth` it has the colour of its loops, on a scale up to `most_loops`, or without colours their number in
    brackets.
    """
    from mythos.generation.depth_view import coloured, harmless, numbered
    from mythos.generation.text import Piece

    is_terminal, colours = sys.stdout.isatty(), can_colour(sys.stdout)

    def shown(piece: Piece) -> str:
        if is_terminal:
            piece = Piece(harmless(piece.text), piece.loops)
        if show_depth:
            return coloured(piece, most_loops) if colours else numbered(piece)
        return piece.text

    return shown


def chosen_sampling(options: argparse.Namespace) -> Sampling:
    """Return the sampling settings. Raises MythosError for values out of range."""
    from mythos.generation.sampling import Sampling

    try:
        return Sampling(
            repetition_penalty=options.repetition_penalty,
            temperature=options.temperature,
            top_k=options.top_k or None,
            top_p=options.top_p,
            min_p=options.min_p,
        )
    except ValueError as error:
        raise MythosError(str(error)) from error


def check_compilable(depth: Depth) -> None:
    """Raise MythosError unless all tokens run the same number of loops, as the compiled decoding step does."""
    if depth.rule is not None or len(set(depth.limits)) > 1:
        cause = "a halting rule that stops tokens" if depth.rule is not None else "several depths"
        raise MythosError(f"--compile: got {cause}; allowed: as many loops for all (--loops N, --halting none)")


def warn_of_many_loops(opened: OpenedModel, most_loops: int) -> None:
    """Warn of more than 8 times the training mean."""
    from mythos.generation.depth_view import in_loops

    if most_loops > 8 * opened.mean_loops:
        print(
            f"warning: {in_loops(most_loops)} for a model trained with {opened.mean_loops} on average: time and cache "
            "grow with every loop",
            file=sys.stderr,
        )


def parse_loops(text: str, option: str = "--loops") -> list[int] | None:
    """Parse --loops, with None for auto. Raises MythosError for anything else."""
    return None if text == "auto" else whole_numbers(option, text, besides="auto, or ")


def check_values(options: argparse.Namespace) -> None:
    """Raise MythosError for values that no model accepts, before one is loaded."""
    check_least(options, tokens=1, top_k=0, seed=0, cache_loops=1, prefill_chunk=1)
    threshold = options.exit_threshold
    if threshold is not None:
        if options.halting == "none":
            raise MythosError(
                f"--exit-threshold: got {threshold:g} and --halting none, which has no threshold; leave out one of them"
            )
        if not 0 < threshold < float("inf"):
            raise MythosError(f"--exit-threshold: got {threshold:g}; allowed: a number above 0 (act: at most 1)")
    if "" in options.stop:
        raise MythosError("--stop: the text is empty; give at least one character")


def check_files(options: argparse.Namespace) -> None:
    """Raise MythosError for names of --html and --picture that no file to write can have."""
    check_new_file("--html", options.html)
    check_new_file("--picture", options.picture)
    if options.picture is not None and Path(options.picture).suffix not in (".svg", ".png"):
        raise MythosError(f"--picture: got {options.picture}; give a file that ends in .svg or .png")


def check_new_file(option: str, name: str | None) -> None:
    """Raise MythosError for a name that no file to write can have."""
    if name is None:
        return
    if not name:
        raise MythosError(f"{option}: got no name; give a file to write")
    path = Path(os.path.abspath(name))
    try:
        if path.is_symlink():
            raise MythosError(f"{option}: {name} is a link, which would be replaced; give the file that it points to")
        if path.is_dir():
            raise MythosError(f"{option}: {name} is a folder; give a file in it")
        if not path.parent.is_dir():
            raise MythosError(f"{option}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            raise MythosError(f"{option}: {name} is not a regular file; give another name")
    except OSError as error:  # a name that is too long, or a folder that cannot be entered
        reason = f"{shortened(name)} cannot be written: {error.strerror}"
        raise MythosError(f"{option}: {reason}; give another file") from error


def check_halting(name: str | None, threshold: float | None) -> None:
    """Raise MythosError for a rule that does not exist, or a threshold that is too high for it."""
    from mythos.model.config import HALTING_RULES

    if name is None:
        return
    if name not in HALTING_RULES.names:
        raise MythosError(f"--halting: got {name!r}; allowed: {', '.join(HALTING_RULES.names)}")
    rule = HALTING_RULES[name]
    if rule is not None and threshold is not None and threshold > rule.highest_threshold:
        bound = f"above 0 and at most {rule.highest_threshold:g}"
        raise MythosError(f"--exit-threshold: got {threshold:g}; allowed for {name}: {bound}")


def read_prompt(file: str) -> bytes:
    """Read a file, or standard input if it is -, to its end or one byte beyond the limit."""
    if file == "-":
        return sys.stdin.buffer.read(MOST_BYTES + 1)
    with open(file, "rb") as stream:
        return stream.read(MOST_BYTES + 1)


def read_prompts(values: list[tuple[str, str]]) -> list[str | None]:
    """Read the prompts from pairs of option and value, in order; return [None] if there are none.

    Raises MythosError for a file that cannot be read, and for an empty prompt.
    """
    prompts: list[str | None] = []
    for option, value in values:
        source, text = option, value
        if option == "--prompt-file":
            try:
                data = read_prompt(value)
                if len(data) > MOST_BYTES:
                    raise MythosError(f"{option} {value}: it has more than {MOST_BYTES:,} bytes; give a shorter text")
                text = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
            except (OSError, UnicodeDecodeError) as error:
                raise MythosError(f"--prompt-file: {value} cannot be read as UTF-8 text: {error}") from error
            source = f"{option} {value}"
        if not text:
            raise MythosError(f"{source}: the prompt is empty; give some text, or no prompt to begin a new document")
        prompts.append(text)
    return prompts or [None]
