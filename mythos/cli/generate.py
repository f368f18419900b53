"""Continue text with a trained model."""

import argparse
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

from mythos.cli.common import DEVICES, CommandParser, check_least, exit_status, whole_numbers
from mythos.errors import MythosError, log_messages

EXAMPLES = """
examples:
  %(prog)s runs/quickstart --prompt "The river"           as deep as the model finds useful, token by token
  %(prog)s runs/quickstart --prompt "2 + 2 =" --loops 16  16 loops for every token
  %(prog)s runs/quickstart --prompt "I" --loops 1,4,16    the same prompt at three depths, in one batch
  %(prog)s runs/quickstart --prompt "A" --prompt "B"      two prompts in one batch
  %(prog)s runs/quickstart --prompt-file book.txt --show-depth --html depth.html
  echo "Once upon a time" | %(prog)s runs/quickstart --prompt-file -

Text goes to standard output, all else to standard error.
"""


def parser(prog: str = "mythos generate") -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(
        prog=prog,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s PATH [--prompt TEXT] [--loops N|auto] [options]",
    )
    made.add_argument("path", metavar="PATH", help="run directory, checkpoint step-XXXXXXXX, or exported folder")
    what = made.add_argument_group("what to continue (without any, the model begins a new document)")
    # One list for both, so that prompts keep the order that they were given in.
    what.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        type=lambda text: ("--prompt", text),
        default=[],
        metavar="TEXT",
        help="beginning of a text; repeatable",
    )
    what.add_argument(
        "--prompt-file",
        dest="prompts",
        action="append",
        type=lambda name: ("--prompt-file", name),
        default=[],
        metavar="FILE",
        help="the same from a file, its last line break left out; - is standard input; repeatable",
    )
    what.add_argument("--tokens", type=int, default=128, metavar="N", help="most tokens to generate (%(default)s)")
    what.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")

    depth = made.add_argument_group("depth")
    depth.add_argument(
        "--loops",
        default="auto",
        metavar="N|auto",
        help="loops of every token; auto (default) = at most the training mean, as the halting rule decides; N,M,... = "
        "one per prompt, or one prompt at each",
    )
    depth.add_argument(
        "--halting", metavar="RULE", help="stop a token before its last loop by this rule (default: the model's)"
    )
    depth.add_argument("--exit-threshold", type=float, metavar="X", help="of the halting rule (default: the rule's)")
    depth.add_argument(
        "--cache-loops", type=int, metavar="M", help="keep keys and values of the last M loops only (all)"
    )

    how = made.add_argument_group("sampling")
    how.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 = the likeliest (%(default)s)")
    how.add_argument("--top-k", type=int, metavar="K", help="of the K likeliest; 0 = of all (40, or all there are)")
    how.add_argument("--top-p", type=float, metavar="P", help="of the likeliest that hold this share (off)")
    how.add_argument("--min-p", type=float, metavar="P", help="of those at least P times the likeliest's share (off)")
    how.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repetitions (%(default)s)"
    )
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first prompt, then N + 1, ... (%(default)s)"
    )

    where = made.add_argument_group("output and device")
    where.add_argument(
        "--show-depth", action="store_true", help="colour the text by the loops of each token (in brackets without)"
    )
    where.add_argument("--html", metavar="FILE", help="write the text, coloured by loops, as a web page")
    where.add_argument("--device", choices=DEVICES, default="auto", help="auto (default) = cuda if there is one")
    where.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products; auto = bfloat16 on GPUs that have it, float32 elsewhere",
    )
    where.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N", help="prompt tokens computed at once (%(default)s)"
    )
    where.add_argument(
        "--compile",
        action="store_true",
        help="first compile the step from token to token, about a minute; for one number of loops without halting",
    )
    return made


def main(arguments: list[str], prog: str = "mythos generate") -> int:
    """Run the command line; returns the exit status."""
    log_messages()
    options = parser(prog).parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal's encoding lacks
    return exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    """Open the model, generate, print and write. Raises MythosError for bad input."""
    loops = parse_loops(options.loops)
    check_values(options)
    prompts = read_prompts(options.prompts)
    # Only now: torch takes seconds to import, and a misspelt option should be told at once.
    import torch

    from mythos.checkpoints.stored_model import open_model
    from mythos.distributed.parallel import choose_dtype
    from mythos.distributed.ranks import choose_device
    from mythos.generation import depth_view
    from mythos.generation.depth_view import coloured, harmless, in_loops, numbered
    from mythos.generation.sampling import Sampling
    from mythos.generation.text import Piece, check_counts, choose_depth, generate_text
    from mythos.model.config import HALTING_RULES

    try:
        sampling = Sampling(
            repetition_penalty=options.repetition_penalty,
            temperature=options.temperature,
            top_k=options.top_k or None,
            top_p=options.top_p,
            min_p=options.min_p,
        )
    except ValueError as error:
        raise MythosError(str(error)) from error
    if options.halting is not None and options.halting not in HALTING_RULES.names:
        raise MythosError(f"--halting: got {options.halting!r}; allowed: {', '.join(HALTING_RULES.names)}")
    if loops is not None:
        check_counts(len(loops), len(prompts))
    device = choose_device(options.device, option="--device")
    automatic = options.dtype == "auto" and device.type == "cpu"  # small products, that a cast makes slower
    dtype = torch.float32 if automatic else choose_dtype(options.dtype, device)
    opened = open_model(options.path, device)
    if options.top_k is None and opened.tokenizer is not None:
        sampling = replace(sampling, top_k=min(40, opened.tokenizer.size))
    depth = choose_depth(opened, loops, options.halting, options.exit_threshold)
    most = max(depth.limits)
    if options.compile and (depth.rule is not None or len(set(depth.limits)) > 1):
        given = "a halting rule that stops tokens" if depth.rule is not None else "several depths"
        raise MythosError(f"--compile: got {given}; allowed: as many loops for all (--loops N, --halting none)")
    if most > 8 * opened.mean_loops:
        print(
            f"warning: {in_loops(most)} for a model trained with {opened.mean_loops} on average: time and cache grow "
            "with every loop",
            file=sys.stderr,
        )

    terminal = sys.stdout.isatty()
    colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    streaming = len(prompts) == len(depth.limits) == 1
    unsaid = [prompts[0] or ""] if streaming else []

    def shown(piece: Piece) -> str:
        if terminal:
            piece = Piece(harmless(piece.text), piece.loops)
        if options.show_depth:
            return coloured(piece, most) if colours else numbered(piece)
        return piece.text

    def on_piece(row: int, piece: Piece) -> None:
        if streaming:
            print("".join(unsaid) + shown(piece), end="", flush=True)
            unsaid.clear()

    if options.show_depth and colours:
        print(depth_view.terminal_legend(most) + "\n", file=sys.stderr)
    made = generate_text(
        opened,
        prompts,
        options.tokens,
        depth,
        sampling=sampling,
        seed=options.seed,
        stops=options.stop,
        dtype=dtype,
        on_piece=on_piece,
        prefill_chunk=options.prefill_chunk,
        cache_loops=options.cache_loops,
        compiled=options.compile,
    )
    if streaming:
        print("".join(unsaid))
    else:
        for number, row in enumerate(made.rows, start=1):
            deep = f", {in_loops(row.limit)}" if len(depth.limits) > 1 else ""
            print(f"== {number} of {len(made.rows)}{deep}\n{row.prompt}{''.join(map(shown, row.pieces))}\n")
    sys.stdout.flush()
    print(f"\n{made.summary()}", file=sys.stderr)
    if options.show_depth:
        print(depth_view.histogram(made), file=sys.stderr)
    if options.html:
        name = opened.run.run.name if opened.run else Path(opened.source).name
        depth_view.write_page(Path(options.html), depth_view.html_page(made, f"{name}, step {opened.step}"))
        print(f"page: {options.html}", file=sys.stderr)


def parse_loops(text: str) -> list[int] | None:
    """The numbers of --loops, or None for auto. Raises MythosError for anything else."""
    return None if text == "auto" else whole_numbers("--loops", text, besides="auto, or ")


def check_values(options: argparse.Namespace) -> None:
    """Raise MythosError for values that no model could take, before one is loaded."""
    check_least(options, tokens=1, top_k=0, seed=0, cache_loops=1, prefill_chunk=1)
    threshold = options.exit_threshold
    if threshold is not None:
        if options.halting == "none":
            raise MythosError(f"--exit-threshold {threshold:g}: there is no halting rule that it could be for (none)")
        if not 0 < threshold < float("inf"):
            raise MythosError(f"--exit-threshold: got {threshold:g}; allowed: a number above 0 (act: at most 1)")
        if options.halting == "act" and threshold > 1:
            raise MythosError(f"--exit-threshold: got {threshold:g}; allowed for act: above 0 and at most 1")
    if "" in options.stop:
        raise MythosError("--stop: the text is empty; give at least one character")
    if options.html is not None:
        if not options.html:
            raise MythosError("--html: got no name; give a file to write")
        page = Path(options.html).resolve()
        if page.is_dir():
            raise MythosError(f"--html: {options.html} is a folder; give a file in it")
        if not page.parent.is_dir():
            raise MythosError(f"--html: there is no folder {page.parent}")


def read_prompts(given: list[tuple[str, str]]) -> list[str | None]:
    """The prompts of (option, value) in their order, files read; [None] where there are none.

    Raises MythosError for a file that cannot be read, and for an empty prompt.
    """
    prompts: list[str | None] = []
    for option, value in given:
        source, text = option, value
        if option == "--prompt-file":
            try:
                data = sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()
                text = data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
            except (OSError, UnicodeDecodeError) as error:
                raise MythosError(f"--prompt-file: {value} cannot be read as UTF-8 text: {error}") from error
            source = f"{option} {value}"
        if not text:
            raise MythosError(f"{source}: the prompt is empty; give some text, or no prompt to begin a new document")
        prompts.append(text)
    return prompts or [None]
