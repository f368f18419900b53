"""Rules between fields of different sections, grouped by section; rules of the data section are in `data_rules`.

A rule is a function that yields the paths and an explanation of values that cannot be used together.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mythos.config.checking import Contradiction, shown
from mythos.config.data import TaskConfig
from mythos.config.data_rules import SOURCE_RULES, TASK_RULES
from mythos.config.sections import Config, CurriculumConfig, DepthConfig, OptimConfig
from mythos.model.config import model_contradictions, model_training_contradictions, padded_vocab_size
from mythos.model.registry import Setting, TrainingDepth


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield all values that cannot be used together in a run, whether it is trained or only used."""
    for rule in (*RULES, *SOURCE_RULES, *(TASK_RULES if config.data.kind == "reasoning" else ())):
        yield from rule(config)


def training_contradictions(config: Config, reported: set[str]) -> Iterator[Contradiction]:
    """Yield all further values that a run cannot be trained with.

    Paths in ``reported`` had a bad value; ``config`` has their default instead.
    """
    for rule in TRAINING_RULES:
        yield from rule(config)
    paths = depth_paths(config, reported)
    for depth_rule in DEPTH_RULES:
        yield from depth_rule(config, paths)


# --- model, tokenizer, data


def _model_fields(config: Config) -> Iterator[Contradiction]:
    for names, message in model_contradictions(config.model):
        yield tuple(f"model.{name}" for name in names), message


def _run_has_a_name(config: Config) -> Iterator[Contradiction]:
    if not config.run.name:
        yield ("run.name",), "got an empty name; give the run a name"


def _bpe_vocabulary(config: Config) -> Iterator[Contradiction]:
    if config.tokenizer.name != "bpe" or config.data.kind == "reasoning":
        return
    size, rows = config.tokenizer.vocab_size, config.model.vocab_size
    if size < 384:
        yield ("tokenizer.vocab_size",), f"got {size}; allowed: at least 384 (256 bytes and some merges)"
    if rows != "auto" and size > padded_vocab_size(rows):
        rule = "the model needs a row for every token id; lower the first or set the second to auto"
        yield ("tokenizer.vocab_size", "model.vocab_size"), f"got {size} and {rows}; {rule}"


def _only_reasoning_has_a_task(config: Config) -> Iterator[Contradiction]:
    if config.data.kind != "reasoning" and config.data.task != TaskConfig():
        yield ("data.kind", "data.task"), f"got {config.data.kind} and a task; tasks are for reasoning"


def _sequence_fits_the_context(config: Config) -> Iterator[Contradiction]:
    length, context = config.data.sequence_length, config.model.context_length
    if length > context:
        values = f"got {length} and {context}"
        yield ("data.sequence_length", "model.context_length"), f"{values}; the first must not exceed the second"


def _only_loops_follow_a_difficulty(config: Config) -> Iterator[Contradiction]:
    kind, injection = config.data.kind, config.model.injection
    if config.depth.follow == "difficulty" and (kind != "reasoning" or injection == "none"):
        values = f"got difficulty, {kind} and {injection}"
        rule = "only a model that loops, trained on a reasoning task, can follow its difficulty"
        yield ("depth.follow", "data.kind", "model.injection"), f"{values}; {rule}"


RULES = (
    _model_fields,
    _run_has_a_name,
    _bpe_vocabulary,
    _only_reasoning_has_a_task,
    _sequence_fits_the_context,
    _only_loops_follow_a_difficulty,
)


# --- train


def _streams_share_the_batch(config: Config) -> Iterator[Contradiction]:
    batch, streams = config.train.global_batch, config.data.streams
    if batch % streams:
        values = f"got {batch} and {streams}"
        yield ("train.global_batch", "data.streams"), f"{values}; the first must be a multiple of the second"


def _run_has_one_length(config: Config) -> Iterator[Contradiction]:
    steps, tokens = config.train.steps, config.train.tokens
    if (steps is None) == (tokens is None):
        values = f"got {shown(steps)} and {shown(tokens)}"
        yield ("train.steps", "train.tokens"), f"{values}; give exactly one of them, null for the other"


def _run_has_one_start(config: Config) -> Iterator[Contradiction]:
    resume, init_from = config.run.resume, config.train.init_from
    if init_from is not None and resume not in ("auto", "never"):
        rule = (
            "the first continues a run, with its optimizer and data, the second starts a new run from weights: give "
            "one of them"
        )
        yield ("run.resume", "train.init_from"), f"got {resume} and {init_from}; {rule}"


def _time_limit_is_positive(config: Config) -> Iterator[Contradiction]:
    limit = config.train.max_time
    if limit is not None and not any(digit in limit for digit in "123456789"):
        yield ("train.max_time",), f"got {shown(limit)}; allowed: a time such as 90s or 3h30m, or null"


# --- optim


def _momentum_is_for_muon(config: Config) -> Iterator[Contradiction]:
    optim = config.optim
    if optim.name != "muon" and optim.momentum != OptimConfig.model_fields["momentum"].default:
        rule = "the second is for muon only, adamw has betas"
        yield ("optim.name", "optim.momentum"), f"got {optim.name} and {optim.momentum}; {rule}"


def _warmup_and_decay_fit(config: Config) -> Iterator[Contradiction]:
    optim = config.optim
    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1:
        values = f"got {optim.warmup:g} and {optim.decay:g}"
        yield ("optim.warmup", "optim.decay"), f"{values}; together they may take at most all (1) of the steps"


def _learning_rate_stays_above_zero(config: Config) -> Iterator[Contradiction]:
    train = config.train
    if config.optim.min_lr != 0 or (train.steps is None) == (train.tokens is None):
        return
    if config.schedule_steps < config.train_steps:
        values = f"got {config.schedule_steps} of {config.train_steps} steps and 0"
        rule = "the learning rate of the steps after the schedule would be 0; raise the first or the last"
        length = "train.steps" if train.tokens is None else "train.tokens"
        yield ("optim.schedule_steps", length, "optim.min_lr"), f"{values}; {rule}"


# --- parallel, eval


def _hsdp_sizes(config: Config) -> Iterator[Contradiction]:
    parallel = config.parallel
    for name in ("shard", "replicate"):
        size = getattr(parallel, name)
        if size is not None and parallel.mode != "hsdp":
            values = f"got {parallel.mode} and {size}"
            yield ("parallel.mode", f"parallel.{name}"), f"{values}; the second is for mode hsdp only"


def _experts_can_be_divided(config: Config) -> Iterator[Contradiction]:
    parallel, model = config.parallel, config.model
    expert = parallel.expert
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


def _shared_experts_can_be_divided(config: Config) -> Iterator[Contradiction]:
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


def _evaluated_loops_increase(config: Config) -> Iterator[Contradiction]:
    loops = config.eval.loops
    if not loops or any(left >= right for left, right in itertools.pairwise(loops)):
        yield ("eval.loops",), f"got {shown(loops)}; allowed: at least one loop count, each above the one before"


def _samples_have_prompts(config: Config) -> Iterator[Contradiction]:
    if config.eval.samples and not config.eval.prompts:
        yield ("eval.samples", "eval.prompts"), "got no prompts; give at least one, or set eval.samples to 0"


# --- depth


def _difficulty_sets_the_loops(config: Config) -> Iterator[Contradiction]:
    if config.depth.follow != "difficulty":
        return
    for name in ("mean", "maximum", "sampling", "curriculum"):
        value = getattr(config.depth, name)
        if value != DepthConfig.model_fields[name].default:
            default = "poisson" if name == "sampling" else "null"
            rule = f"the task's difficulty sets the loops; set the second to {default}"
            yield ("depth.follow", f"depth.{name}"), f"got difficulty and {shown(value)}; {rule}"


def _fixed_depth_runs_the_core_once(config: Config) -> Iterator[Contradiction]:
    if config.model.injection != "none":
        return
    for name in ("mean", "maximum", "backprop"):
        value = getattr(config.depth, name)
        if value not in (None, 1):
            rule = "without injection the core runs once: null or 1"
            yield ("model.injection", f"depth.{name}"), f"got none and {value:g}; {rule}"
    if config.eval.loops != [1]:
        rule = "without injection the core runs once: [1]"
        yield ("model.injection", "eval.loops"), f"got none and {shown(config.eval.loops)}; {rule}"


def _backprop_curriculum_starts_whole(config: Config) -> Iterator[Contradiction]:
    start = config.depth.backprop_curriculum.start
    if not start.is_integer():
        yield ("depth.backprop_curriculum.start",), f"got {start:g}; allowed: a whole number"


TRAINING_RULES = (
    _streams_share_the_batch,
    _run_has_one_length,
    _run_has_one_start,
    _time_limit_is_positive,
    _momentum_is_for_muon,
    _warmup_and_decay_fit,
    _learning_rate_stays_above_zero,
    _hsdp_sizes,
    _experts_can_be_divided,
    _shared_experts_can_be_divided,
    _evaluated_loops_increase,
    _samples_have_prompts,
    _difficulty_sets_the_loops,
    _fixed_depth_runs_the_core_once,
    _backprop_curriculum_starts_whole,
)


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


def _depths_are_in_order(config: Config, paths: DepthPaths) -> Iterator[Contradiction]:
    depth, mean, maximum = config.depth, config.depth_mean, config.depth_maximum
    if config.model.injection == "none":
        return
    if maximum < mean:
        yield (paths.maximum, paths.mean), f"got {maximum} and {mean:g}; the maximum must not be below the mean"
    elif depth.follow == "none" and depth.sampling == "uniform" and maximum < 2 * mean - 1:
        rule = "uniform draws reach 2 mean - 1, which the maximum must not cut"
        yield (paths.maximum, paths.mean), f"got {maximum} and {mean:g}; {rule}"
    elif config.depth_backprop > maximum:
        values = f"got {config.depth_backprop}, and a sequence runs at most {maximum} loops"
        yield (paths.backprop, paths.maximum), f"{values}; backpropagate through no more"


def _model_can_be_trained(config: Config, paths: DepthPaths) -> Iterator[Contradiction]:
    depth = config.depth
    backprop = Setting(paths.backprop, config.depth_backprop)
    limits = [Setting("depth.backprop", config.depth_backprop)]
    if depth.backprop_curriculum.shape != "none":
        limits.append(Setting("depth.backprop_curriculum.start", depth.backprop_curriculum.start))
    deepest = Setting(paths.mean if depth.sampling == "fixed" else paths.maximum, config.depth_deepest)
    loops = TrainingDepth(Setting(paths.mean, config.depth_mean), deepest, backprop, tuple(limits))
    yield from model_training_contradictions(config.model, loops)


def _curricula_start_below_their_target(config: Config, paths: DepthPaths) -> Iterator[Contradiction]:
    for name, target, path in (
        ("curriculum", config.depth_mean, paths.mean),
        ("backprop_curriculum", config.depth_backprop, paths.backprop),
    ):
        ramp: CurriculumConfig = getattr(config.depth, name)
        if ramp.shape != "none" and ramp.start > target:
            rule = "a curriculum starts at or below its target"
            yield (f"depth.{name}.start", path), f"got {ramp.start:g} and a target of {target:g}; {rule}"


DEPTH_RULES = (
    _depths_are_in_order,
    _model_can_be_trained,
    _curricula_start_below_their_target,
)
