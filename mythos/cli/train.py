"""Train a recurrent-depth transformer, or continue a run."""

import argparse
import os
import signal
import sys

from mythos.checkpoints.failed_start import removed_if_it_fails
from mythos.cli.common import check_least, command_parser, set_up_process
from mythos.config.loading import describe, dump_config, load_config
from mythos.config.sections import Config
from mythos.distributed.launch_status import (
    STATUS_FILE,
    LaunchStatus,
    end_launch,
    exit_status_of_ended_launch,
    launch_status,
)
from mythos.errors import MythosError, TransientError, without_credentials
from mythos.files.local import advise, is_full

STOPPED = "stopped; the same command continues from the newest checkpoint, if there is one"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command, for `parse_intermixed_args`: options may stand between the overrides."""
    parser = command_parser(
        "train",
        __doc__,
        usage="%(prog)s CONFIG [key.path=value ...] [options]",
        epilog=describe(),
        add_help=False,
    )
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="YAML file, a run directory to continue, or a name from `mythos configs`",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields to override, e.g. train.steps=100"
    )
    parser.add_argument(
        "--help", "-h", nargs="?", const="", metavar="SECTION", help="show this text, or the fields of a section"
    )
    parser.add_argument("--list-presets", action="store_true", help="list the model sizes, as `mythos presets`")
    dry_run = parser.add_argument_group("plan a run, also for other processes than these")
    dry_run.add_argument(
        "--dry-run",
        action="store_true",
        help="check the configuration, print size, FLOPs, memory and collectives, and stop (-v: the configuration too)",
    )
    dry_run.add_argument(
        "--ranks", type=int, metavar="N", help="processes of --dry-run (one, or as many as torchrun starts)"
    )
    dry_run.add_argument("--machine-ranks", type=int, metavar="M", help="processes per machine (8)")
    dry_run.add_argument(
        "--device-memory", type=float, metavar="GIB", help="memory of a device (this one's; 80 with --ranks)"
    )
    dry_run.add_argument("-v", "--verbose", action="store_true", help="also print the whole configuration as YAML")
    return parser


def main(arguments: list[str]) -> int:
    set_up_process()
    if launch_status() is not LaunchStatus.RUNNING:  # torchrun has started this process once more
        return exit_status_of_ended_launch()
    if STATUS_FILE in os.environ:
        signal.signal(signal.SIGTERM, stop_before_training)
    options = parser().parse_intermixed_args(arguments)
    try:
        run(options)
    except TransientError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            os._exit(1)  # threads that wait for lost processes would keep this one alive and delay the restart
        return 1
    except MythosError as error:
        return end(str(error))
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Print help or a plan, or train. Raises MythosError for bad input and files that cannot be read or written."""
    if options.help is not None:
        print(describe(options.help) if options.help else parser().format_help().rstrip("\n"))
        return
    if options.list_presets:
        from mythos.cli.presets import preset_table

        print(preset_table())
        return
    if options.config is None:
        raise MythosError(
            "no configuration given; usage: mythos train CONFIG [key.path=value ...]\nTry quickstart, or --help."
        )
    planned = {name: getattr(options, name) for name in ("ranks", "machine_ranks", "device_memory")}
    planned["verbose"] = options.verbose or None
    planned_options = [f"--{name.replace('_', '-')}" for name, value in planned.items() if value is not None]
    if planned_options and not options.dry_run:
        raise MythosError(f"{', '.join(planned_options)}: only for --dry-run; ./launch.sh starts several processes")
    check_least(options, ranks=1, machine_ranks=1, device_memory=0)
    config = load_config(options.config, options.overrides)
    # torch is imported after these checks: it takes seconds, and a misspelt key is reported at once.
    try:
        if options.dry_run:
            print_plan(config, options)
        else:
            from mythos.trainer import Trainer

            with removed_if_it_fails(config):
                trainer = Trainer(config)
            trainer.run()
    except OSError as error:
        if error.filename is None and not is_full(error):
            raise
        # An error of writing to an open file has no name; the files that a run keeps open are in its directory.
        raise MythosError(
            advise(error) if error.filename else f"run directory {config.run_dir}: {advise(error)}"
        ) from error


def print_plan(config: Config, options: argparse.Namespace) -> None:
    """Print the plan: for the device that is there, unless the options describe other devices."""
    from mythos.planning.plan import DEVICE_MEMORY, device_here, plan
    from mythos.planning.trace_cache import kept_on_disk

    machine_ranks = 8 if options.machine_ranks is None else options.machine_ranks
    memory, name = DEVICE_MEMORY, ""
    shown = config
    if options.device_memory is not None:
        memory = int(options.device_memory * 2**30)
    elif options.ranks is None:
        config, memory, name = device_here(config)
    with kept_on_disk():
        print(plan(config, options.ranks, machine_ranks, memory, device=name))
    if options.verbose:
        print("\n" + without_credentials(dump_config(shown)), end="")


def stop_before_training(number: int, _: object) -> None:
    """Handle SIGTERM outside of training, where nothing needs saving: with status 0 if launch.sh was asked to stop."""
    if launch_status() is not LaunchStatus.RUNNING and exit_status_of_ended_launch() == 0:
        if os.environ.get("RANK") == "0":
            print(STOPPED, file=sys.stderr, flush=True)
        os._exit(0)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end(message: str) -> int:
    """Print an error that a restart would meet again; under torchrun once for all processes, and without a restart."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return end_launch(message)
    print(f"error: {message}", file=sys.stderr)
    return 1
