"""Train a recurrent-depth transformer, or continue a run."""

import argparse
import os
import signal
import sys

from mythos.cli.common import CommandParser, accept_any_character, check_least, share_cores
from mythos.config.loading import describe, load_config
from mythos.distributed.launch_status import (
    STATUS_FILE,
    LaunchStatus,
    end_launch,
    exit_status_of_ended_launch,
    launch_status,
)
from mythos.errors import MythosError, TransientError, log_messages
from mythos.files.local import advise, is_full


def parser(prog: str = "mythos train") -> argparse.ArgumentParser:
    """The command line, to be parsed intermixed: options may stand between the overrides."""
    made = CommandParser(
        prog=prog,
        usage="%(prog)s CONFIG [key.path=value ...] [options]",
        description=__doc__,
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    made.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, or a name that `mythos configs` lists")
    made.add_argument("overrides", nargs="*", metavar="key.path=value", help="fields to override, e.g. train.steps=100")
    made.add_argument(
        "--help", "-h", nargs="?", const="", metavar="SECTION", help="this text, or the fields of a section"
    )
    made.add_argument("--list-presets", action="store_true", help="the named model sizes, as `mythos presets`")
    dry = made.add_argument_group("what a run amounts to, on other processes than these too")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration, print size, FLOPs, memory and collectives, and stop",
    )
    dry.add_argument(
        "--ranks", type=int, metavar="N", help="processes of --dry-run (one, or as many as torchrun starts)"
    )
    dry.add_argument("--machine-ranks", type=int, metavar="M", help="of them on each machine (8)")
    dry.add_argument("--device-memory", type=float, metavar="GIB", help="memory of a device (80)")
    return made


def main(arguments: list[str], prog: str = "mythos train") -> int:
    """Run the command line; returns the exit status."""
    log_messages()
    accept_any_character()
    share_cores()
    if launch_status() is not LaunchStatus.RUNNING:  # torchrun has started this process once more
        return exit_status_of_ended_launch()
    if STATUS_FILE in os.environ:
        signal.signal(signal.SIGTERM, stop_before_training)
    options = parser(prog).parse_intermixed_args(arguments)
    try:
        if options.help is not None:
            print(describe(options.help) if options.help else parser(prog).format_help(), end="\n" * bool(options.help))
            return 0
        if options.list_presets:
            from mythos.config.presets import preset_table

            print(preset_table())
            return 0
        if options.config is None:
            raise MythosError(
                f"no configuration given; usage: {prog} CONFIG [key.path=value ...]\nTry quickstart, or --help."
            )
        imagined = {name: getattr(options, name) for name in ("ranks", "machine_ranks", "device_memory")}
        given = [f"--{name.replace('_', '-')}" for name, value in imagined.items() if value is not None]
        if given and not options.dry_run:
            raise MythosError(f"{', '.join(given)}: only for --dry-run; ./launch.sh starts several processes")
        check_least(options, ranks=1, machine_ranks=1, device_memory=0)
        config = load_config(options.config, options.overrides)
        # Only now: torch takes seconds to import, and a misspelt key should be told at once.
        if options.dry_run:
            from mythos.planning.plan import plan

            machine_ranks = 8 if options.machine_ranks is None else options.machine_ranks
            memory = 80.0 if options.device_memory is None else options.device_memory
            print(plan(config, options.ranks, machine_ranks, int(memory * 2**30)))
        else:
            from mythos.trainer import Trainer

            Trainer(config).run()
    except TransientError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            os._exit(1)  # threads that still wait for lost processes would keep this one, and so the restart
        return 1
    except MythosError as error:
        return end(str(error))
    except OSError as error:
        if error.filename is None and not is_full(error):
            raise
        # Writing to a file that is open tells no name; the files that a run keeps open are in its directory.
        return end(advise(error) if error.filename else f"run directory {config.run_dir}: {advise(error)}")
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    return 0


STOPPED = "stopped; the same command continues from the newest checkpoint, if there is one"


def stop_before_training(number: int, _: object) -> None:
    """Handle SIGTERM outside of training, where nothing needs saving: with status 0 if launch.sh was asked to stop."""
    if launch_status() is not LaunchStatus.RUNNING and exit_status_of_ended_launch() == 0:
        if os.environ.get("RANK") == "0":
            print(STOPPED, file=sys.stderr, flush=True)
        os._exit(0)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end(message: str) -> int:
    """Print an error that would be met again; under torchrun once for all processes, which are not restarted."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return end_launch(message)
    print(f"error: {message}", file=sys.stderr)
    return 1
