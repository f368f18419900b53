"""Rules that tie several configuration fields together."""

import itertools
from collections.abc import Iterator

from mythos.config.checking import shown
from mythos.config.data import TaskConfig, source_contradictions, task_contradictions
from mythos.config.sections import Config, CurriculumConfig, DepthConfig, OptimConfig
from mythos.model.config import model_contradictions, padded_vocab_size


def contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths and the explanation of all values that cannot hold together in a run, whatever it is used for."""
    for names, message in model_contradictions(config.model):
        yield tuple(f"model.{name}" for name in names), message
    run, data, depth = config.run, config.data, config.depth
    if not run.name:
        yield ("run.name",), "got an empty name; give the run a name"

    model_vocabulary = config.model.vocab_size
    if config.tokenizer.name == "bpe" and data.kind != "reasoning":
        size = config.tokenizer.vocab_size
        if size < 384:
            yield ("tokenizer.vocab_size",), f"got {size}; allowed: at least 384 (256 bytes and some merges)"
        if model_vocabulary != "auto" and size > padded_vocab_size(model_vocabulary):
            rule = "the model needs a row for every token id; lower the first or set the second to auto"
            yield ("tokenizer.vocab_size", "model.vocab_size"), f"got {size} and {model_vocabulary}; {rule}"

    yield from source_contradictions(data, config.tokenizer.name)
    if data.kind == "reasoning":
        yield from task_contradictions(data.task, data.sequence_length, model_vocabulary, depth.follow)
        if data.mask_documents:
            yield ("data.kind", "data.mask_documents"), "got reasoning and true; a task has no documents"
        if config.eval.tasks:
            yield ("data.kind", "eval.tasks"), f"got reasoning and {shown(config.eval.tasks)}; questions are text"
    elif data.task != TaskConfig():
        yield ("data.kind", "data.task"), f"got {data.kind} and a task; tasks are for reasoning"
    if data.validation.fraction == 0 and not data.validation.path:
        rule = "hold out a share of the documents or give files to validate on"
        yield ("data.validation.fraction", "data.validation.path"), f"got 0 and no path; {rule}"
    if data.sequence_length > config.model.context_length:
        given = f"got {data.sequence_length} and {config.model.context_length}"
        yield ("data.sequence_length", "model.context_length"), f"{given}; the first must not exceed the second"
    if depth.follow == "difficulty" and (data.kind != "reasoning" or config.model.injection == "none"):
        given = f"got difficulty, {data.kind} and {config.model.injection}"
        rule = "loops can follow the difficulty of a reasoning task only, and where there are loops"
        yield ("depth.follow", "data.kind", "model.injection"), f"{given}; {rule}"


def training_contradictions(config: Config, reported: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths and the explanation of all values that no run can be trained with.

    A path in ``reported`` had a bad value, for which its default stands in ``config``.
    """
    run, data, depth, train = config.run, config.data, config.depth, config.train
    if train.global_batch % data.streams:
        given = f"got {train.global_batch} and {data.streams}"
        yield ("train.global_batch", "data.streams"), f"{given}; the first must be a multiple of the second"
    if (train.steps is None) == (train.tokens is None):
        given = f"got {shown(train.steps)} and {shown(train.tokens)}"
        yield ("train.steps", "train.tokens"), f"{given}; give exactly one of them, null for the other"

    if train.init_from is not None and run.resume not in ("auto", "never"):
        given = f"got {run.resume} and {train.init_from}"
        rule = "the first goes on with a run, its optimizer and data, the second starts a new one: give one of them"
        yield ("run.resume", "train.init_from"), f"{given}; {rule}"
    if train.max_time is not None and not any(digit in train.max_time for digit in "123456789"):
        yield ("train.max_time",), f"got {shown(train.max_time)}; allowed: a time such as 90s or 3h30m, or null"
    if config.optim.name != "muon" and config.optim.momentum != OptimConfig.model_fields["momentum"].default:
        given = f"got {config.optim.name} and {config.optim.momentum}"
        yield ("optim.name", "optim.momentum"), f"{given}; the second is for muon only, adamw has betas"
    parallel = config.parallel
    for name in ("shard", "replicate"):
        if getattr(parallel, name) is not None and parallel.mode != "hsdp":
            given = f"got {parallel.mode} and {getattr(parallel, name)}"
            yield ("parallel.mode", f"parallel.{name}"), f"{given}; the second is for mode hsdp only"

    if depth.follow == "difficulty":
        for name in ("mean", "maximum", "sampling", "curriculum"):
            if getattr(depth, name) != DepthConfig.model_fields[name].default:
                default = "poisson" if name == "sampling" else "null"
                rule = f"the task's difficulty gives the loops; set the second to {default}"
                yield ("depth.follow", f"depth.{name}"), f"got difficulty and {shown(getattr(depth, name))}; {rule}"

    def source(name: str, otherwise: str) -> str:
        given = getattr(depth, name) is not None or f"depth.{name}" in reported
        return f"depth.{name}" if given else otherwise

    followed = "data.task.difficulty" if depth.follow == "difficulty" else None
    mean_path = followed or source("mean", "model.loops")
    maximum_path, backprop_path = followed or source("maximum", mean_path), source("backprop", mean_path)
    if config.model.injection == "none":
        for name in ("mean", "maximum", "backprop"):
            if getattr(depth, name) not in (None, 1):
                given = f"got none and {getattr(depth, name):g}"
                yield ("model.injection", f"depth.{name}"), f"{given}; without injection the core runs once: null or 1"
        if config.eval.loops != [1]:
            given = f"got none and {shown(config.eval.loops)}"
            yield ("model.injection", "eval.loops"), f"{given}; without injection the core runs once: [1]"
    elif config.depth_maximum < config.depth_mean:
        given = f"got {config.depth_maximum} and {config.depth_mean:g}"
        yield (maximum_path, mean_path), f"{given}; the maximum must not be below the mean"
    elif not followed and depth.sampling == "uniform" and config.depth_maximum < 2 * config.depth_mean - 1:
        given = f"got {config.depth_maximum} and {config.depth_mean:g}"
        yield (maximum_path, mean_path), f"{given}; uniform draws reach 2 mean - 1, which the maximum must not cut"
    elif config.depth_backprop > config.depth_maximum:
        given = f"got {config.depth_backprop}, and at most {config.depth_maximum} loops are run"
        yield (backprop_path, maximum_path), f"{given}; backpropagate through no more"
    if config.model.injection == "initial":
        deepest, deepest_path = config.depth_deepest, mean_path if depth.sampling == "fixed" else maximum_path
        carrying = {"depth.backprop": float(config.depth_backprop)}
        if depth.backprop_curriculum.shape != "none":
            carrying["depth.backprop_curriculum.start"] = depth.backprop_curriculum.start
        for path, least in carrying.items():
            if least < deepest:
                given = f"got initial, {least:g} and sequences of up to {deepest} loops"
                rule = (
                    "initial reads the input in the first loop only, so embedding and prelude learn nothing from a "
                    "sequence whose first loop carries no gradient: set depth.backprop to null (all loops) and "
                    "depth.backprop_curriculum.shape to none"
                )
                yield ("model.injection", path, deepest_path), f"{given}; {rule}"
    if config.model.halting in ("gate", "act") and config.depth_mean == 1:
        given = f"got {config.model.halting} and a mean of 1 loop"
        rule = "it learns from loops before the last, and there are none: set the first to none or convergence"
        yield ("model.halting", mean_path), f"{given}; {rule}"
    elif config.model.halting == "act" and config.depth_backprop == 1:
        given = "got act and gradient through 1 loop"
        rule = "the last loop takes whatever probability is left, so act learns from the loops before it alone"
        yield ("model.halting", backprop_path), f"{given}; {rule}: set depth.backprop to 2 or more"
    if config.model.core_ffn == "moe" and config.model.experts_per_token == 1:
        rule = "the weights of a token's experts add up to 1, so from a single one the router would learn nothing"
        yield ("model.experts_per_token",), f"got 1; {rule}: give 2 or more, or set model.core_ffn to dense"
    for name, target, path in (
        ("curriculum", config.depth_mean, mean_path),
        ("backprop_curriculum", config.depth_backprop, backprop_path),
    ):
        ramp: CurriculumConfig = getattr(depth, name)
        if ramp.shape != "none" and ramp.start > target:
            given = f"got {ramp.start:g} and a target of {target:g}"
            yield (f"depth.{name}.start", path), f"{given}; a curriculum starts at or below its target"
    if not depth.backprop_curriculum.start.is_integer():
        yield ("depth.backprop_curriculum.start",), f"got {depth.backprop_curriculum.start:g}; allowed: a whole number"

    optim = config.optim
    if optim.schedule == "wsd" and optim.warmup + optim.decay > 1:
        given = f"got {optim.warmup:g} and {optim.decay:g}"
        yield ("optim.warmup", "optim.decay"), f"{given}; together they may take at most all (1) of the steps"
    one_length = (train.steps is None) != (train.tokens is None)
    if optim.min_lr == 0 and one_length and config.schedule_steps < config.train_steps:
        given = f"got {config.schedule_steps} of {config.train_steps} steps and 0"
        rule = "the learning rate of the steps after the schedule would be 0; raise the first or the last"
        length = "train.steps" if train.tokens is None else "train.tokens"
        yield ("optim.schedule_steps", length, "optim.min_lr"), f"{given}; {rule}"
    loops = config.eval.loops
    if not loops or any(left >= right for left, right in itertools.pairwise(loops)):
        yield ("eval.loops",), f"got {shown(loops)}; allowed: at least one loop count, each above the one before"
    if config.eval.samples and not config.eval.prompts:
        yield ("eval.samples", "eval.prompts"), "got no prompts; give at least one, or set eval.samples to 0"
