"""Rules between fields of different sections: one function a section; those of the data section are in `data_rules`.

A rule yields the paths and an explanation of values that cannot be used together.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mythos.config.checking import shown
from mythos.config.data import TaskConfig
from mythos.config.data_rules import source_contradictions, task_contradictions
from mythos.config.sections import Config, CurriculumConfig, DepthConfig, OptimConfig
from mythos.model.config import model_contradictions, model_training_contradictions, padded_vocab_size
from mythos.model.registry import Contradiction, Setting, TrainingDepth


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield all values that cannot be used together in a run, whether it is trained or only used."""
    for names, message in model_contradictions(config.model):
        yield tuple(f"model.{name}" for name in names), message
    yield from _run_and_data(config)
    yield from source_contradictions(config)
    if config.data.kind == "reasoning":
        yield from task_contradictions(config)


def training_contradictions(config: Config, reported: set[str]) -> Iterator[Contradiction]:
    """Yield all further values that a run cannot be trained with.

    Paths in ``reported`` had a bad value; ``config`` has their default instead.
    """
    for rules in (_train, _optim, _parallel, _shared_experts, _eval, _depth):
        yield from rules(config)
    yield from _depths(config, depth_paths(config, reported))


def _run_and_data(config: Config) -> Iterator[Contradiction]:
    kind, injection = config.data.kind, config.model.injection
    if not config.run.name:
        yield ("run.name",), "got an empty name; give the run a name"

    size, rows = config.tokenizer.vocab_size, config.model.vocab_size
    trains_bpe = config.tokenizer.name == "bpe" and kind != "reasoning"
    if trains_bpe and size < 384:
        yield ("tokenizer.vocab_size",), f"got {size}; allowed: at least 384 (256 bytes and some merges)"
    if trains_bpe and rows != "auto" and size > padded_vocab_size(rows):
        rule = "the model needs a row for every token id; lower the first or set the second to auto"
        yield ("tokenizer.vocab_size", "model.vocab_size"), f"got {size} and {rows}; {rule}"

    if kind != "reasoning" and config.data.task != TaskConfig():
        yield ("data.kind", "data.task"), f"got {kind} and a task; tasks are for reasoning"

    length, context = config.data.sequence_length, config.model.context_length
    if length > context:
        values = f"got {length} and {context}"
        yield ("data.sequence_length", "model.context_length"), f"{values}; the first must not exceed the second"

    if config.depth.follow == "difficulty" and (kind != "reasoning" or injection == "none"):
        values = f"got difficulty, {kind} and {injection}"
        rule = "only a model that loops, trained on a reasoning task, can follow its difficulty"
        yield ("depth.follow", "data.kind", "model.injection"), f"{values}; {rule}"


def _train(config: Config) -> Iterator[Contradiction]:
    batch, streams = config.train.global_batch, config.data.streams
    if batch % streams:
        values = f"got {batch} and {streams}"
        yield ("train.global_batch", "data.streams"), f"{values}; the first must be a multiple of the second"

    steps, tokens = config.train.steps, config.train.tokens
    if (steps is None) == (tokens is None):
        values = f"got {shown(steps)} and {shown(tokens)}"
        yield ("train.steps", "train.tokens"), f"{values}; give exactly one of them, null for the other"

    resume, init_from = config.run.resume, config.train.init_from
    if init_from is not None and resume not in ("auto", "never"):
        rule = (
            "the first continues a run, with its optimizer and data, the second starts a new run from weights: give "
            "one of them"
        )
        yield ("run.resume", "train.init_from"), f"got {resume} and {init_from}; {rule}"

    limit = config.train.max_time
    if limit is not None and not any(digit in limit for digit in "123456789"):
        yield ("train.max_time",), f"got {shown(limit)}; allowed: a time such as 90s or 3h30m, or null"


def _optim(config: Config) -> Iterator[Contradiction]:
    optim, train = config.optim, config.train
    if optim.name != "muon" and optim.momentum != OptimConfig.model_fields["momentum"].default:
        rule = "the second is for muon only, adamw has betas"
        yield ("optim.name", "optim.momentum"), f"got {optim.name} and {optim.momentum}; {rule}"

    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1:
        values = f"got {optim.warmup:g} and {optim.decay:g}"
        yield ("optim.warmup", "optim.decay"), f"{values}; together they may take at most all (1) of the steps"

    has_length = (train.steps is None) != (train.tokens is None)
    if optim.min_lr == 0 and has_length and config.schedule_steps < config.train_steps:
        values = f"got {config.schedule_steps} of {config.train_steps} steps and 0"
        rule = "the learning rate of the steps after the schedule would be 0; raise the first or the last"
        length = "train.steps" if train.tokens is None else "train.tokens"
        yield ("optim.schedule_steps", length, "optim.min_lr"), f"{values}; {rule}"


def _parallel(config: Config) -> Iterator[Contradiction]:
    parallel, model, expert = config.parallel, config.model, config.parallel.expert
    for name in ("shard", "replicate"):
        size = getattr(parallel, name)
        if size is not None and parallel.mode != "hsdp":
            values = f"got {parallel.mode} and {size}"
            yield ("parallel.mode", f"parallel.{name}"), f"{values}; the second is for mode hsdp only"

    if expert == 1:
        return
    if model.core_ffn != "moe":
        rule = "there are no experts to divide: set the second to 1, or the first to moe"
        yield ("model.core_ffn", "parallel.expert"), f"got {model.core_ffn} and {expert}; {rule}"
    elif model.n_experts % expert:
        values = f"got {model.n_experts} and {expert}"
        yield ("model.n_experts", "parallel.expert"), f"{values}; the second must divide the first"
    if parallel.mode in ("single", "ddp"):
        rule = "experts are divided in modes fsdp and hsdp: set the first to one of them or auto, or the second to 1"
        yield ("parallel.mode", "parallel.expert"), f"got {parallel.mode} and {expert}; {rule}"
    if parallel.mode == "hsdp" and parallel.shard is not None and parallel.shard % expert:
        rule = "the experts of a copy are divided among its processes, so the second must divide the first"
        yield ("parallel.shard", "parallel.expert"), f"got {parallel.shard} and {expert}; {rule}"


def _shared_experts(config: Config) -> Iterator[Contradiction]:
    parallel, model = config.parallel, config.model
    shared, expert = parallel.shared, parallel.expert
    if shared == 1:
        return
    if expert % shared:
        rule = "processes that share the routed experts divide the shared ones, so the second must divide the first"
        yield ("parallel.expert", "parallel.shared"), f"got {expert} and {shared}; {rule}"
    width = model.n_shared_experts * model.shared_expert_dim
    if model.core_ffn == "moe" and (width == 0 or width % shared):
        fields = ("model.n_shared_experts", "model.shared_expert_dim", "parallel.shared")
        values = f"got {model.n_shared_experts}, {model.shared_expert_dim} and {shared}"
        rule = "the third must divide the product of the others" if width else "there are no shared experts to divide"
        yield fields, f"{values}; {rule}"


def _eval(config: Config) -> Iterator[Contradiction]:
    loops = config.eval.loops
    if not loops or any(left >= right for left, right in itertools.pairwise(loops)):
        yield ("eval.loops",), f"got {shown(loops)}; allowed: at least one loop count, each above the one before"
    if config.eval.samples and not config.eval.prompts:
        yield ("eval.samples", "eval.prompts"), "got no prompts; give at least one, or set eval.samples to 0"


def _depth(config: Config) -> Iterator[Contradiction]:
    for name in ("mean", "maximum", "sampling", "curriculum") if config.depth.follow == "difficulty" else ():
        value = getattr(config.depth, name)
        if value != DepthConfig.model_fields[name].default:
            default = "poisson" if name == "sampling" else "null"
            rule = f"the task's difficulty sets the loops; set the second to {default}"
            yield ("depth.follow", f"depth.{name}"), f"got difficulty and {shown(value)}; {rule}"

    fixed = config.model.injection == "none"
    for name in ("mean", "maximum", "backprop") if fixed else ():
        value = getattr(config.depth, name)
        if value not in (None, 1):
            rule = "without injection the core runs once: null or 1"
            yield ("model.injection", f"depth.{name}"), f"got none and {value:g}; {rule}"
    if fixed and config.eval.loops != [1]:
        rule = "without injection the core runs once: [1]"
        yield ("model.injection", "eval.loops"), f"got none and {shown(config.eval.loops)}; {rule}"

    start = config.depth.backprop_curriculum.start
    if not start.is_integer():
        yield ("depth.backprop_curriculum.start",), f"got {start:g}; allowed: a whole number"


@dataclass(frozen=True)
class DepthPaths:
    """Paths of the fields that set a run's mean, maximum and backpropagated loops.

    They are the fields to name in errors: the default of one may follow from another field.
    """

    mean: str
    maximum: str
    backprop: str


def depth_paths(config: Config, reported: set[str]) -> DepthPaths:
    """Find the fields that set the depths; a field in ``reported`` was set, but to an invalid value."""

    def path(name: str, default: str) -> str:
        is_set = getattr(config.depth, name) is not None or f"depth.{name}" in reported
        return f"depth.{name}" if is_set else default

    if config.depth.follow == "difficulty":
        mean = maximum = "data.task.difficulty"
    else:
        mean = path("mean", "model.loops")
        maximum = path("maximum", mean)
    return DepthPaths(mean, maximum, path("backprop", mean))


def _depths(config: Config, paths: DepthPaths) -> Iterator[Contradiction]:
    depth, mean, maximum = config.depth, config.depth_mean, config.depth_maximum
    if config.model.injection != "none":
        if maximum < mean:
            yield (paths.maximum, paths.mean), f"got {maximum} and {mean:g}; the maximum must not be below the mean"
        elif depth.follow == "none" and depth.sampling == "uniform" and maximum < 2 * mean - 1:
            rule = "uniform draws reach 2 mean - 1, which the maximum must not cut"
            yield (paths.maximum, paths.mean), f"got {maximum} and {mean:g}; {rule}"
        elif config.depth_backprop > maximum:
            values = f"got {config.depth_backprop}, and a sequence runs at most {maximum} loops"
            yield (paths.backprop, paths.maximum), f"{values}; backpropagate through no more"

    backprop = Setting(paths.backprop, config.depth_backprop)
    limits = [Setting("depth.backprop", config.depth_backprop)]
    if depth.backprop_curriculum.shape != "none":
        limits.append(Setting("depth.backprop_curriculum.start", depth.backprop_curriculum.start))
    deepest = Setting(paths.mean if depth.sampling == "fixed" else paths.maximum, config.depth_deepest)
    loops = TrainingDepth(Setting(paths.mean, mean), deepest, backprop, tuple(limits))
    yield from model_training_contradictions(config.model, loops)

    for name, target, path in (
        ("curriculum", mean, paths.mean),
        ("backprop_curriculum", config.depth_backprop, paths.backprop),
    ):
        ramp: CurriculumConfig = getattr(depth, name)
        if ramp.shape != "none" and ramp.start > target:
            rule = "a curriculum starts at or below its target"
            yield (f"depth.{name}.start", path), f"got {ramp.start:g} and a target of {target:g}; {rule}"
