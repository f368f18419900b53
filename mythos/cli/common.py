"""What the commands have in common: how they end, and how options are read and refused."""

import argparse
import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mythos.config.checking import shortened, shown
from mythos.errors import MythosError
from mythos.files.text import unusable_text
from mythos.hf import SHARD_SIZE
from mythos.section import MOST, MOST_LOOPS

DEVICES = ("auto", "cpu", "cuda")
"""What --device allows; `mythos.distributed.ranks.choose_device` turns it into a device."""


def share_cores() -> None:
    """Let threads that wait for others sleep after some microseconds, unless the environment says how they wait.

    OpenMP's threads spin for milliseconds by default. Beside another busy process the thread that all wait for gets
    no core: training with two threads on two busy cores was 20 times slower (docs/performance.md). OpenMP reads these
    variables when torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's runtime alone; it counts for more than the policy


def accept_any_character() -> None:
    """Let standard output take text in any script: what its encoding does not have (LANG=C) is escaped.

    Otherwise a run of days would end with an error for a character of its last sample.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class CommandParser(argparse.ArgumentParser):
    """A command line of text: an argument that is no UTF-8, or has a NUL in it, is an error like any other."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as usual. Ends the process with status 2 for such an argument, named in ASCII."""
        for argument in sys.argv[1:] if args is None else args:
            if unusable_text(argument):
                self.error(f"argument {argument!a}: allowed: text in UTF-8, without the character NUL")
        return super().parse_known_args(args, namespace)


def exit_status(action: Callable[[], None]) -> int:
    """Run what a command is for and return its exit status, with a line on standard error where it did not succeed.

    0 = done, also where what read the output has read enough; 1 = MythosError; 130 = interrupted.
    """
    accept_any_character()
    share_cores()
    try:
        action()
        sys.stdout.flush()
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends
    return 0


def add_measuring_options(parser: argparse.ArgumentParser, folder: str) -> None:
    """Options of commands that measure a model and write to `folder` in its run directory.

    `mythos.evaluation.text.as_in_training` tells what is meant where dtype and micro-batch are not given.
    """
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write to ({folder}/ in the run directory)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences computed at once (as in training)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto (default) = cuda if there is one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], help="of matrix products (as in training)")


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that write a model's weights."""
    parser.add_argument("--dtype", default="float32", metavar="TYPE", help="float32 (default) or bfloat16")
    parser.add_argument(
        "--max-shard-size", default=SHARD_SIZE, metavar="SIZE", help="most bytes of a file of weights (%(default)s)"
    )


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Tell of an OSError met on writing to a folder as MythosError."""
    try:
        yield
    except OSError as error:
        raise MythosError(f"{folder} cannot be written: {error}. Give another folder with --out.") from error


def whole_numbers(option: str, text: str, besides: str = "") -> list[int]:
    """Parse 4,1,2 in the order given. `besides` is what else the option allows, for the message.

    Raises MythosError for anything but numbers from 1 to 65,536, the most loops of a configuration.
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
    """Parse 0.2,0.1 in the order given. Raises MythosError for anything but finite numbers above 0."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < math.inf for value in values):
        raise MythosError(f"{option}: got {shortened(text)!r}; give numbers above 0, e.g. 0.2,0.1")
    return values


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise MythosError, with the option's name, for a number that is given and below the least: `tokens=1`.

    Also for one above 10**15, and NaN.
    """
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and not bound <= value:
            raise MythosError(f"--{name.replace('_', '-')}: got {value}; give at least {bound}")
        if value is not None and value > MOST:
            raise MythosError(f"--{name.replace('_', '-')}: got {shown(value)}; give at most {MOST:,}")
