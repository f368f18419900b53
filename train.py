"""Train a recurrent-depth transformer: python train.py CONFIG.yaml [key.path=value ...]."""

import argparse
import errno
import logging
import sys

from mythos.config import describe, load_config
from mythos.errors import MythosError

USAGE = "python train.py CONFIG.yaml [key.path=value ...]"


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    parser = argparse.ArgumentParser(prog="train.py", usage=USAGE, description=__doc__, add_help=False)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--help", "-h", nargs="?", const="", metavar="SECTION")
    parser.add_argument("--list-presets", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
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
        config = load_config(options.config, options.overrides)
        # Only now: torch takes seconds to import, and a misspelt key should be told at once.
        if options.dry_run:
            from mythos.estimate import plan

            print(plan(config))
        else:
            from mythos.trainer import Trainer

            Trainer(config).run()
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {error}. Free some space and run the same command again; checkpoints are intact", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command continues from the newest checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0


OPTIONS = """
  --help, -h [SECTION]  this text, or every field of a section
  --list-presets        the named model sizes
  --dry-run             check the configuration, print what it amounts to, and stop

Fields of the YAML file are overridden by key.path=value, e.g. model.preset=mythos_tiny train.steps=100."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
