"""Greedy generation: tokens per second and bytes of the cache, by loops, batch and halting."""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos.checkpoints.stored_model import open_model
from mythos.cli.common import check_least, whole_numbers
from mythos.errors import MythosError
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import Generation, generate
from mythos.gpu_check.timed_steps import Work
from mythos.model.config import HALTING_RULES, ModelConfig
from mythos.model.halting import HaltingRule, default_threshold, halting_rule
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.progress import aligned
from scripts.benchmarks import open_mythos
from scripts.benchmarks.steps import configuration
from scripts.benchmarks.timing import (
    Memory,
    Ratio,
    in_fresh_process,
    in_turns,
    mebibytes,
    peak_memory,
    resident_bytes,
)

PROMPT = 64
"""Tokens of a prompt."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument(
        "config",
        metavar="RUN | CONFIG.yaml | SIZE",
        help="a trained model; or a run, a preset or a size of this benchmark, with untrained weights",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of CONFIG.yaml or SIZE")
    parser.add_argument("--batch", default="8", metavar="N,N,...", help="rows (8)")
    parser.add_argument("--loops", metavar="N,N,...", help="most loops (the mean of training)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens generated in each row (128)")
    parser.add_argument("--halting", help="rule (the model's; all loops only for untrained weights)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of matrix products (float32)")
    parser.add_argument("--compile", action="store_true", help="all loops also as a compiled graph")
    parser.add_argument("--repeats", type=int, default=5, help="turns (5)")
    parser.add_argument("--against", choices=["open-mythos"], help="compare with that package, without halting")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print a table; return the figures."""
    check_least(options, repeats=1, tokens=1)
    batches = whole_numbers("--batch", options.batch)
    if Path(options.config).is_dir():
        if options.overrides:
            raise MythosError(f"{options.overrides[0]}: a trained model is measured as it is; give no overrides")
        opened = open_model(options.config)
        model, mean, trained = opened.model, opened.mean_loops, True
    else:
        config = configuration(options.config, options.overrides)
        model = untrained(config.model)
        mean, trained = round(config.depth_mean), False
    loops = whole_numbers("--loops", options.loops) if options.loops else [mean]
    if PROMPT + options.tokens > model.config.context_length:
        raise MythosError(
            f"--tokens: got {options.tokens}; with a prompt of {PROMPT} the model's context has room for "
            f"{model.config.context_length - PROMPT} (model.context_length)"
        )
    if max(loops) > 1 and model.config.injection == "none":
        raise MythosError(f"--loops: got {options.loops}; without injection the core runs once: 1")
    print(f"{PROMPT} tokens of prompt, {options.tokens} more in each row, {options.dtype}")
    if options.against:
        return {"rows": [against(model, count, batch, options) for count in loops for batch in batches]}
    rules = halting_rules(model, options.halting, trained)
    return {"rows": [row for count in loops for batch in batches for row in table(model, count, batch, rules, options)]}


def untrained(config: ModelConfig) -> RecurrentDepthTransformer:
    """A model with random weights, to be timed."""
    return RecurrentDepthTransformer(config).initialize(0).eval()


def halting_rules(model: RecurrentDepthTransformer, name: str | None, trained: bool) -> dict[str, HaltingRule | None]:
    """Rules to compare: all loops, and several thresholds of the named rule or of a trained model's own.

    Raises MythosError for an unknown rule, and for one that the model cannot use.
    """
    rules: dict[str, HaltingRule | None] = {"all loops": None}
    rule = name or (model.config.halting if trained else "none")
    if rule == "none":
        return rules
    if rule not in HALTING_RULES.names:
        raise MythosError(f"--halting: got {rule}; allowed: {', '.join(HALTING_RULES.names)}")
    for factor in (0.5, 1, 2) if rule != "act" else (1,):
        threshold = factor * default_threshold(rule)
        try:
            rules[f"{rule} at {threshold:g}"] = halting_rule(model, rule, threshold)
        except ValueError as error:
            raise MythosError(f"--{error}") from error
    return rules


def prompts_of(vocabulary: int, batch: int) -> Tensor:
    """Random ids (batch, PROMPT): time does not depend on them, and most halting rules find them no easier."""
    return torch.randint(vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0))


def decode(
    model: RecurrentDepthTransformer,
    batch: int,
    tokens: int,
    loops: int,
    rule: HaltingRule | None,
    dtype: str,
    compiled: bool = False,
) -> Generation:
    """Generate greedily after random prompts."""
    prompts, greedy = prompts_of(int(model.config.vocab_size), batch).tolist(), Sampling(temperature=0)
    with torch.autocast("cpu", dtype=DTYPES[dtype], enabled=dtype != "float32"):
        return generate(model, prompts, tokens, sampling=greedy, loops=loops, halting=rule, compiled=compiled)


def table(
    model: RecurrentDepthTransformer,
    loops: int,
    batch: int,
    rules: dict[str, HaltingRule | None],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time the rules in turns; ratios compare each rule with all loops in the same turn."""
    generations: dict[str, Generation] = {}

    def work(name: str, rule: HaltingRule | None, compiled: bool = False) -> Work:
        return lambda: generations.update(
            {name: decode(model, batch, options.tokens, loops, rule, options.dtype, compiled)}
        )

    works = {name: work(name, rule) for name, rule in rules.items()}
    if options.compile:
        works["all loops, compiled"] = work("all loops, compiled", None, compiled=True)
    timings = in_turns(works, options.repeats, warm_up=1)
    results = []
    for name, times in timings.items():
        ratio = Ratio.of(timings["all loops"], times)
        results.append({
            "most_loops": loops,
            "batch": batch,
            "halting": name,
            **times.record(),
            "tokens_per_cpu_second": batch * options.tokens / times.median,
            "tokens_per_second": batch * options.tokens / times.wall,
            "loops": statistics.mean(count for row in generations[name].rows for count in row.loops),
            "speed_ratio": ratio._asdict(),
            "cache_bytes": generations[name].cache_bytes,
        })  # fmt: skip
    rows = [
        [f"{loops} loops, {batch} rows", "tokens/CPU s", "tokens/s", "loops", "speed", "cache"],
        *([r["halting"], f"{r['tokens_per_cpu_second']:,.0f}", f"{r['tokens_per_second']:,.0f}", f"{r['loops']:.2f}",
           f"{r['speed_ratio']['median']:.2f} x", f"{r['cache_bytes'] / 2**20:.1f} MiB"]
          for r in results),
    ]  # fmt: skip
    print(aligned(rows, left=1))
    return results


def against(model: RecurrentDepthTransformer, loops: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time our decoding and the other package's in turns, with all loops, then measure the memory of each."""
    tokens, config = options.tokens, model.config
    theirs = open_mythos.Decoder(config, PROMPT + tokens, loops, DTYPES[options.dtype])
    prompts = prompts_of(int(config.vocab_size), batch)
    works: dict[str, Work] = {
        "mythos": lambda: decode(model, batch, tokens, loops, None, options.dtype),
        "open-mythos": lambda: theirs(prompts, tokens),
    }
    if options.compile:
        works["compiled"] = lambda: decode(model, batch, tokens, loops, None, options.dtype, compiled=True)
    timings = in_turns(works, options.repeats, warm_up=1)
    sizes = (config, batch, tokens, loops, options.dtype)
    memory = {name: in_fresh_process(memory_of_decoding, name, *sizes) for name in timings}
    ratios = {name: Ratio.of(timings["open-mythos"], times) for name, times in timings.items() if name != "open-mythos"}
    rows = [
        [f"{loops} loops, {batch} rows", "tokens/CPU s", "tokens/s", "peak memory"],
        *([name, f"{batch * tokens / times.median:,.0f}", f"{batch * tokens / times.wall:,.0f}",
           mebibytes(memory[name].peak)]
          for name, times in timings.items()),
    ]  # fmt: skip
    print(aligned(rows, left=1))
    print("\n".join(f"{name} is {ratio} times as fast" for name, ratio in ratios.items()) + "\n")
    return {
        "most_loops": loops,
        "batch": batch,
        "speed_ratio": ratios["mythos"]._asdict(),
        **({"compiled_speed_ratio": ratios["compiled"]._asdict()} if options.compile else {}),
        **{name: {**times.record(), "tokens_per_cpu_second": batch * tokens / times.median,
                  "memory": memory[name]._asdict()} for name, times in timings.items()},
    }  # fmt: skip


def memory_of_decoding(name: str, config: ModelConfig, batch: int, tokens: int, loops: int, dtype: str) -> Memory:
    """Measure the memory of a decoding process; call it in a fresh process."""
    device = torch.device("cpu")
    if name != "open-mythos":
        start, compiled = resident_bytes(), name == "compiled"
        model = untrained(config)
        return peak_memory(device, start, lambda: decode(model, batch, tokens, loops, None, dtype, compiled), runs=1)
    open_mythos.package()  # count its imports as imports
    start = resident_bytes()
    theirs = open_mythos.Decoder(config, PROMPT + tokens, loops, DTYPES[dtype])
    prompts = prompts_of(int(config.vocab_size), batch)
    return peak_memory(device, start, lambda: theirs(prompts, tokens), runs=1)
