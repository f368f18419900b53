"""Train a recurrent-depth transformer: python train.py CONFIG.yaml [key.path=value ...]."""

import argparse
import errno
import logging
import os
import signal
import sys

from mythos.config import describe, load_config
from mythos.errors import MythosError, TransientError

USAGE = "python train.py CONFIG.yaml [key.path=value ...]"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if ended := os.environ.get("MYTHOS_ENDED"):  # launch.sh's: see mythos/faults.py
        if os.path.exists(ended):
            return 0 if os.environ.get("GROUP_WORLD_SIZE") == "1" else 1
        signal.signal(signal.SIGTERM, stop_before_training)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        from mythos.faults import refuse_restart

        if refuse_restart():
            return 1
    parser = argparse.ArgumentParser(prog="train.py", usage=USAGE, description=__doc__, add_help=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", nargs="?", const="", metavar="SECTION")
    parser.add_argument("--list-presets", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--machine-ranks", type=int)
    parser.add_argument("--device-memory", type=float, metavar="GIB")
    options = parser.parse_intermixed_args(arguments)  # options may stand between the overrides
    try:
        if options.help is not None:
            print(describe(options.help) if options.help else f"{USAGE}\n{OPTIONS}\n\n{describe()}")
            return 0
        if options.list_presets:
            from mythos.presets import preset_table

            print(preset_table())
            return 0
        if options.config is None:
            raise MythosError(f"no configuration given; usage: {USAGE}\nTry configs/quickstart.yaml, or --help.")
        imagined = {name: getattr(options, name) for name in ("ranks", "machine_ranks", "device_memory")}
        given = [f"--{name.replace('_', '-')}" for name, value in imagined.items() if value is not None]
        if given and not options.dry_run:
            raise MythosError(f"{', '.join(given)}: only for --dry-run; ./launch.sh starts several processes")
        config = load_config(options.config, options.overrides)
        # Only now: torch takes seconds to import, and a misspelt key should be told at once.
        if options.dry_run:
            from mythos.plan import plan

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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return end(f"{error}. Free some space and run the same command again; checkpoints are intact")
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130
    return 0


STOPPED = "stopped; the same command continues from the newest checkpoint, if there is one"


def stop_before_training(number: int, _: object) -> None:
    """Handle SIGTERM outside of training, where nothing needs saving: with status 0 if launch.sh was asked to stop."""
    if os.path.exists(os.environ["MYTHOS_ENDED"]) and os.environ.get("GROUP_WORLD_SIZE") == "1":
        if os.environ.get("RANK") == "0":
            print(STOPPED, file=sys.stderr, flush=True)
        os._exit(0)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end(message: str) -> int:
    """Print an error that would be met again; under torchrun once for all processes, which are not restarted."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from mythos.faults import exit_for_good

        return exit_for_good(message)
    print(f"error: {message}", file=sys.stderr)
    return 1


OPTIONS = """
  --help, -h [SECTION]  this text, or every field of a section
  --list-presets        the named model sizes
  --dry-run             check the configuration, print what it amounts to, and stop; for other processes than these:
    --ranks N             so many (default: one, or as many as torchrun starts)
    --machine-ranks M     so many on each machine (default 8)
    --device-memory GIB   on devices of so much memory (default 80)

Fields of the YAML file are overridden by key.path=value, e.g. model.preset=mythos_tiny train.steps=100."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
