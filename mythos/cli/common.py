"""Shared parts of the commands: parsers, options, checks of their values, and exit statuses."""

import argparse
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mythos.config.checking import shortened, shown
from mythos.config.loading import config_from_dict, load_config, overridden
from mythos.config.model_paths import require_model, run_directory
from mythos.config.sections import Config
from mythos.errors import MythosError, log_messages
from mythos.files.local import is_full
from mythos.files.text import unusable_text
from mythos.hf import SHARD_SIZE
from mythos.progress import discard_output, reader_is_gone
from mythos.section import MOST, MOST_LOOPS

DEVICES = ("auto", "cpu", "cuda")
"""Values of --device; `mythos.distributed.ranks.choose_device` resolves them."""


# argparse rather than click or typer: no further dependency, help in 0.1 s, overrides (key.path=value) may come between
# options (`parse_intermixed_args`), and shtab writes the shell completion.
class CommandParser(argparse.ArgumentParser):
    """Argument parser that reports arguments that are not UTF-8, or contain NUL, as usage errors."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as usual. Exits with status 2 for such an argument and names it in ASCII."""
        for argument in sys.argv[1:] if args is None else args:
            if unusable_text(argument):
                self.error(f"argument {argument!a}: allowed: text in UTF-8, without the character NUL")
        return super().parse_known_args(args, namespace)


def command_parser(name: str, description: str | None, **options: Any) -> CommandParser:
    """Build the parser of `mythos NAME`, which prints the description as it is written."""
    return CommandParser(
        prog=f"mythos {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def set_up_process() -> None:
    """Prepare a process for a command: messages, output encoding, waiting threads. Call before torch is imported."""
    log_messages()
    # Escape characters that the output encoding lacks (LANG=C). Otherwise a run of days could end with a
    # UnicodeEncodeError for one character of its last sample.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    # Let waiting OpenMP threads sleep after some microseconds, unless the user has chosen. By default they spin for
    # milliseconds and take the core from the thread they wait for if another process is busy: training with two threads
    # on two busy cores was 20 times slower (docs/performance.md). OpenMP reads the variables when torch is imported.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "1000"  # read by GNU's OpenMP only, where it overrides the policy


def exit_status(action: Callable[[], None], interrupted: str = "\nstopped") -> int:
    """Run the action of a command and return its exit status; print errors to standard error.

    0 = success; 1 = MythosError; 130 = interrupted, with the text `interrupted` printed. Raises BrokenPipeError if the
    reader of the output has closed it, which `quiet_without_reader` handles.
    """
    set_up_process()
    try:
        action()
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0


def quiet_without_reader(command: Callable[[], int]) -> int:
    """Run a whole command and return its exit status.

    0 if the reader of its output has closed it (`| head -1`), 1 with a message if the disk with its output is full.
    """
    open_closed_streams()
    try:
        try:
            status = command()
        except SystemExit:  # argparse has printed a help text
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not reader_is_gone():  # another pipe's, such as one to a worker
            raise
        discard_output()
        return 0
    except OSError as error:
        if error.filename is not None or not is_full(error):  # an error of writing to an open file has no name
            raise
        discard_output()
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        return 1


def open_closed_streams() -> None:
    """Open standard streams that the caller has closed (`>&-`) on /dev/null.

    Python has None in their place, and the next file that is opened gets the number of the closed stream: what a
    library writes to standard output would go into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the end


class TakesArguments(Protocol):
    """A parser or a group of its options; argparse has no public type for both."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """Add an argument, as `argparse.ArgumentParser.add_argument`."""


def add_device_option(parser: TakesArguments) -> None:
    """Add --device."""
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto (default) = cuda if available")


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that describe a corpus and its tokenizer, for `corpus_config` and `parse_intermixed_args`."""
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="a run's configuration: its data and tokenizer sections"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields to override")
    parser.add_argument(
        "--path", nargs="+", metavar="GLOB", help="instead of CONFIG: parquet, jsonl, jsonl.gz or txt files"
    )
    parser.add_argument("--embedded", action="store_true", help="instead of CONFIG: text that is installed with mythos")
    parser.add_argument("--text-column", default="text", help="column or key of the text in --path (text)")
    parser.add_argument("--vocab-size", type=int, help="tokens of a trained bpe (tokenizer.vocab_size)")


def corpus_config(command: argparse.ArgumentParser, options: argparse.Namespace) -> Callable[[], Config]:
    """Check the arguments of `add_corpus_options`; returns a function that builds the configuration.

    Exits with status 2 unless exactly one of CONFIG, --path and --embedded is set. The function raises MythosError.
    """
    if options.config and "=" in options.config and not Path(options.config).exists():
        options.config, options.overrides = None, [options.config, *options.overrides]
    if sum(map(bool, (options.config, options.path, options.embedded))) != 1:
        command.error("give exactly one of CONFIG.yaml, --path and --embedded")

    def build() -> Config:
        if options.config:
            config = load_config(options.config, options.overrides)
        else:
            files = {"kind": "files", "path": options.path, "text_column": options.text_column}
            data = {"data": files if options.path else {"kind": "embedded"}}
            config = config_from_dict(overridden(data, options.overrides, command.prog), to_train=False)
        size = options.vocab_size
        return config if size is None else config.with_fields("tokenizer", vocab_size=size)

    return build


def add_measuring_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the options of commands that measure a model and write to `folder` in its run directory.

    `mythos.evaluation.text.as_in_training` supplies dtype and micro-batch if they are not set.
    """
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"output folder ({folder}/ in the run directory; without one {folder}/NAME/)",
    )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences per forward pass (as in training)")
    add_device_option(parser)
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help="dtype of matmuls (as in training)")


def measuring_folder(options: argparse.Namespace, folder: str) -> Path:
    """The folder that --out names, or `folder` in the model's run directory.

    For a model without one, such as an export, a folder of its name: exports are uploaded whole, so nothing is written
    into them.
    """
    if options.out is not None:
        return Path(options.out)
    run = run_directory(options.path)
    return Path(folder, Path(os.path.abspath(options.path)).name) if run is None else run / folder


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that write a model's weights."""
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 (default) or bfloat16")
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help="maximum bytes of a file of weights (%(default)s)"
    )


def check_model_path(path: str) -> None:
    """Raise MythosError for a path that is no model, before torch is imported, which takes seconds.

    Not in one of several processes: it may not see the path of another, which would then wait for it.
    """
    if "WORLD_SIZE" not in os.environ:
        require_model(path)


def comma_separated(text: str) -> list[str]:
    """Split `a, b` into its parts, without spaces around them."""
    return [part.strip() for part in text.split(",")]


def whole_numbers(option: str, text: str, besides: str = "") -> list[int]:
    """Parse 4,1,2 in this order. `besides` names further allowed values in the message, e.g. "auto, or ".

    Raises MythosError for anything but numbers from 1 to 65,536, the maximum loops of a configuration.
    """
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise MythosError(
            f"{option}: got {shortened(text)!r}; give {besides}whole numbers of at least 1, e.g. 8 or 1,2,4"
        )
    if max(values) > MOST_LOOPS:
        raise MythosError(f"{option}: got {shortened(text)!r}; give {besides}whole numbers of at most {MOST_LOOPS}")
    return values


def positive_numbers(option: str, text: str) -> list[float]:
    """Parse 0.2,0.1 in this order. Raises MythosError for anything but finite numbers above 0."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise MythosError(f"{option}: got {shortened(text)!r}; give numbers above 0, e.g. 0.2,0.1")
    return values


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Check minimum values of options, e.g. `tokens=1`; options that are not set (None) pass.

    Raises MythosError with the option's name for a smaller number, one above 10**15, and NaN.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value:
            raise MythosError(f"--{name.replace('_', '-')}: got {value}; give at least {bound}")
        if value is not None and value > MOST:
            raise MythosError(f"--{name.replace('_', '-')}: got {shown(value)}; give at most {MOST:,}")
