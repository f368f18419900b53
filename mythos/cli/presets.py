"""List the named model sizes, from 1M to 1T parameters."""

import argparse

from mythos.cli.common import command_parser, exit_status
from mythos.config.presets import BPE_VOCAB_SIZE, PRESETS, preset_config
from mythos.model.config import CORES
from mythos.progress import aligned

UNITS = (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3))


def parser() -> argparse.ArgumentParser:
    return command_parser(
        "presets", f"{__doc__}\n\nSet one as model.preset; `mythos estimate` computes the cost of its training."
    )


def main(arguments: list[str]) -> int:
    parser().parse_args(arguments)
    return exit_status(lambda: print(preset_table()))


def preset_table() -> str:
    """Describe every preset in a line: dimensions, total parameters, and active parameters per token at one loop."""
    from mythos.planning.flops import count_parameters  # imports torch, which takes seconds

    rows = [("preset", "total", "active", "dim", "layers", "attention", "core", "loops", "context", "vocab")]
    for name in PRESETS:
        config = preset_config(name)
        vocabulary = BPE_VOCAB_SIZE if config.vocab_size == "auto" else config.vocab_size
        count = count_parameters(config.model_copy(update={"vocab_size": vocabulary}))
        rows.append(
            (
                name,
                in_units(count.total),
                in_units(count.active),
                str(config.dim),
                f"{config.prelude_layers}+{config.core_layers}+{config.coda_layers}",
                config.attention,
                CORES.summary(config.core_ffn, config),
                str(config.loops),
                str(config.context_length),
                str(config.vocab_size),
            )
        )
    note = f"active: per token at one loop; layers: prelude+core+coda; vocab auto is counted as {BPE_VOCAB_SIZE}."
    return f"{aligned(rows, left=len(rows[0]))}\n\n{note}"


def in_units(count: int) -> str:
    """Write a count of parameters in three significant digits and a unit: 1.06B."""
    unit, size = next((unit, size) for unit, size in UNITS if count >= 0.9995 * size)  # 0.9995 rounds to 1.00
    return f"{count / size:#.3g}".rstrip(".") + unit
