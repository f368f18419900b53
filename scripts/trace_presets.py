"""Trace the training steps of some presets and of the shipped configurations; write mythos/planning/traces.json.

`mythos estimate PRESET` and `mythos train CONFIG --dry-run` then need no trace. Run it before a release, and after
changes to the model or to the code that traces it; until then plans are traced anew, which takes ten seconds. Takes
two minutes on one core; started again, it goes on with what it has written.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from mythos.cli.estimate import estimate, parser
from mythos.config.loading import load_config, packaged_configs
from mythos.files.local import write_whole
from mythos.planning.plan import DEVICE_MEMORY, plan
from mythos.planning.trace_cache import SHIPPED, made_with, recorded, shipped_values

PRESETS = ("mythos_nano", "mythos_tiny", "mythos_small", "mythos_1b", "mythos_3b")
CONFIGS = tuple(packaged_configs())
"""What is planned without a trace."""
MACHINES = (
    ["train.device=cuda"],
    ["train.device=cpu", "train.dtype=bfloat16"],
    ["train.device=cpu", "train.dtype=float32"],
)


def shipped_plans() -> Iterator[tuple[str, Callable[[], object]]]:
    """What is planned without a trace: a name, and a function that plans it."""
    for preset in PRESETS:
        yield preset, partial(estimate, parser().parse_args([preset]))
    for name in CONFIGS:
        for machine in MACHINES:
            config = load_config(name, machine)
            fewest = config.parallel.expert
            if config.train.device == "cuda":
                sizes = {ranks for ranks in (fewest, max(8, fewest)) if config.data.streams % ranks == 0}
                memory = DEVICE_MEMORY
            else:  # on too small a machine: then the layouts that would fit are planned too
                sizes, memory = {1} if fewest == 1 else set(), 2**20
            for ranks in sorted(sizes):
                yield f"{name} {' '.join(machine)} on {ranks}", partial(plan, config, ranks, 8, memory)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file after every plan."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    with recorded(shipped_values()) as values:
        for name, plan_it in shipped_plans():
            plan_it()
            entry = {"made_with": made_with(), "values": dict(sorted(values.items()))}
            write_whole(SHIPPED, json.dumps(entry, indent=0) + "\n")
            print(f"{name}: {len(values)} traces", flush=True)


if __name__ == "__main__":
    main()
