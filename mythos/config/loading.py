"""The whole configuration: one YAML file a run, overridden by key=value, every error reported at once."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from mythos.config.checking import (
    Problems,
    allowed,
    apply_override,
    read_yaml,
    sections,
    shown,
    suggestion,
    valid_values,
)
from mythos.config.data import DataConfig, TaskConfig, source_contradictions, task_contradictions
from mythos.config.inherited import inherited
from mythos.config.presets import PRESETS
from mythos.errors import MythosError
from mythos.model.config import (
    MOST_LOOPS,
    Count,
    CountOrZero,
    Identifiers,
    ModelConfig,
    NonNegativeInt,
    Positions,
    PositiveInt,
    Rows,
    Section,
    Seed,
    Small,
    Weight,
    model_contradictions,
    padded_vocab_size,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
DURATION = "^" + "".join(f"([0-9]{{1,9}}{unit})?" for unit in "dhms") + "$"
Mean = Annotated[float, Field(ge=1, le=MOST_LOOPS)]
Seconds = Annotated[float, Field(gt=0, le=1e9)]


class RunConfig(Section):
    """What the run is called, where it writes, and whether it continues."""

    name: str = "debug"
    """Name of the run, also shown in W&B."""
    dir: str | None = None
    """Run directory; null = runs/<name>."""
    seed: Seed = 0
    """Seed of the weights, the data order, the depths and the initial states."""
    resume: str = "auto"
    """auto = continue from the run directory's newest complete checkpoint if there is one, never = start anew (refused
    if the directory already has checkpoints), or the path of a checkpoint to start from while it has none."""


class TokenizerConfig(Section):
    """How text becomes token ids."""

    name: str = "bpe"
    """bpe = a byte-level BPE trained on the run's own corpus, or a Hugging Face hub id or local path."""
    vocab_size: Identifiers = 4096
    """Size of the trained bpe (at least 384); other tokenizers bring their own."""


class CurriculumConfig(Section):
    """A ramp counted in optimizer steps."""

    shape: Literal["none", "linear", "1-sqrt", "cosine", "steps"] = "none"
    """Form of the ramp; none = the target from the first step. 1-sqrt rises as 1 - sqrt(1 - x); steps in 4 equal
    stairs."""
    over: Fraction = 0.25
    """Share of the training steps (optim.schedule_steps) that the ramp takes."""
    start: Mean = 1.0
    """Value at the first step."""


class DepthConfig(Section):
    """How many loops every sequence runs in training, and how many of them carry gradient."""

    mean: Mean | None = None
    """Mean loops of a sequence at the end of the curriculum; null = model.loops."""
    backprop: Count | None = None
    """Last loops that carry gradient; null = half the mean, rounded up, or all of them with model.injection initial,
    which reads the input in the first loop only."""
    sampling: Literal["poisson", "fixed", "uniform", "lognormal"] = "poisson"
    """Distribution of a sequence's loops: clipped Poisson (arXiv 2604.12946), the mean itself, uniform on
    1..2 mean - 1, or log-normal Poisson (arXiv 2502.05171)."""
    maximum: Count | None = None
    """Most loops a sequence may draw; null = twice the mean."""
    follow: Literal["none", "difficulty"] = "none"
    """difficulty = with data.kind reasoning, a loop for each step of the task: mean and maximum follow from
    data.task.difficulty, and all loops carry gradient unless backprop says otherwise."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the mean."""
    backprop_curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the loops that carry gradient."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon = orthogonalised momentum for the matrices of attention, feed-forward and experts, and AdamW for embedding,
    head, norms, routers, injection, readout, adapter and gates; both share lr and weight_decay (arXiv 2502.16982)."""
    lr: Annotated[float, Field(gt=0, le=1e30)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Small = 1e-8
    """Added to the root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon: decay of the matrices' momentum, applied as Nesterov's."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay, on matrices only; never on norms, biases, embeddings or the injection."""
    clip: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: cosine to min_lr, or stay at lr and go down linearly over the last decay share (wsd)."""
    warmup: Fraction = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: Fraction = 0.2
    """wsd: share of the steps over which the learning rate falls."""
    min_lr: Fraction = 0.1
    """Last learning rate as a share of lr."""
    schedule_steps: PositiveInt | None = None
    """Length of the schedule: the steps that the learning rate and all other ramps (depth.curriculum,
    depth.backprop_curriculum, data.task.ramp) are shares of; null = all steps of the run. Steps beyond it keep the last
    values; a run of fewer steps ends before its schedule does."""


class ProfileConfig(Section):
    """A window of steps traced by torch.profiler, written to the run directory's profile/."""

    start: PositiveInt = 10
    """First step of the window, counted from the start of the process."""
    steps: NonNegativeInt = 0
    """Steps traced; 0 = no trace."""


class TrainConfig(Section):
    """How long and in which batches to train."""

    steps: PositiveInt | None = None
    """Optimizer steps. Give steps or tokens, not both."""
    tokens: PositiveInt | None = None
    """Training tokens, rounded up to whole steps."""
    init_from: str | None = None
    """Run directory, checkpoint or exported folder whose weights a new run starts from, with a fresh optimizer, at step
    0 and the beginning of the data; model and tokenizer are its own where the configuration names none."""
    global_batch: Rows = 64
    """Sequences of an optimizer step over all ranks; a multiple of data.streams."""
    micro_batch: Rows | Literal["auto"] = 8
    """Sequences of one forward and backward pass on a rank; auto (single, ddp) = the most that fit, tried at the
    start."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of matrix products; auto = bfloat16 where the hardware computes it natively (GPU, AMX,
    AVX512-BF16), float32 elsewhere. Parameters, optimizer and the injection stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = cuda if there is one."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model with torch.compile: a pass of the loop as one graph, and the blocks of prelude and coda. auto =
    on GPUs, where it takes a minute or two at the start; on a CPU it brings little."""
    max_time: Annotated[str, Field(pattern=DURATION, examples=["90s", "3h30m"])] | None = None
    """Wall-clock limit of this process, e.g. 90s, 3h30m, 1d, after which the run saves at the end of a step and ends;
    the same command continues it. null = none."""
    skip_limit: PositiveInt = 5
    """Updates skipped in a row, because loss or gradient was not finite, after which the run stops or rolls back."""
    rollbacks: NonNegativeInt = 0
    """How often the run may go back to its newest checkpoint's weights, and on with the data that comes next, instead
    of stopping at skip_limit."""
    profile: ProfileConfig = ProfileConfig()
    """Trace of a few steps."""


class EvalConfig(Section):
    """Validation at several depths, and text samples."""

    every: NonNegativeInt = 500
    """Steps between validations; 0 = only at the end."""
    batches: Rows = 4
    """Validation batches, each of data.streams sequences; the same ones every time."""
    loops: list[Count] = [1, 4, 8, 16]
    """Loop counts validation loss is measured at, increasing; [1] unless given where model.injection is none."""
    samples: CountOrZero = 1
    """Text samples written at each validation."""
    sample_tokens: Positions = 64
    """Tokens of a sample."""
    prompts: list[str] = ["The "]
    """Beginnings of the samples, used in turn."""
    tasks: list[str] = []
    """Files *.jsonl of multiple-choice questions (docs/evaluation.md), scored at each validation at eval.loops."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none."""
    asynchronous: bool = True
    """Copy what is saved and write it while training goes on; false = training waits until it is written."""
    dir: str | None = None
    """Where checkpoints of this run, and no other, are kept: a directory or a URL of fsspec (s3://...); null =
    checkpoints/ in the run directory."""


class ParallelConfig(Section):
    """How model and work are laid out over processes, one per device."""

    mode: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    """single = one process; ddp = every process holds the model; fsdp = parameters, gradients and optimizer are sharded
    over all processes; hsdp = sharded over `shard` of them, replicated over the groups; auto chooses and says why."""
    shard: Rows | None = None
    """hsdp: processes that share one copy of the model; null = those of a node."""
    replicate: Rows | None = None
    """hsdp: copies of the model; null = as many as there are processes for."""
    wrap: Literal["loop", "block"] = "loop"
    """fsdp, hsdp: what is gathered at once. loop = the whole core, once whatever the number of loops; block = one
    core block at a time, in every loop again, where the core does not fit."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free gathered parameters after the forward pass and gather them again for the backward pass."""
    reduce: Literal["step", "micro_batch"] = "micro_batch"
    """fsdp, hsdp: when gradients are reduced. micro_batch = after each, keeping shards; step = once, which sends less,
    each process keeping whole float32 gradients between micro-batches."""
    activation_checkpointing: Literal["none", "selective", "loop"] = "none"
    """What of the loops is computed again in the backward pass, to take less memory. selective = what is cheap: norms,
    gates, rotations; loop = each loop as a whole: only the state between loops is kept."""
    start_timeout: Seconds = 1800.0
    """Seconds that processes wait for each other until the first step is done (it may gather data and compile)."""
    timeout: Seconds = 300.0
    """Seconds that processes wait for each other after it; then the run ends, naming what it waited for."""
    stall_after: Seconds = 120.0
    """Seconds without a finished step after which every process writes its stacks to the run directory's stacks/."""


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled = not even imported."""
    project: str = "mythos"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null = your default."""
    tags: list[str] = []
    """W&B tags."""


class LogConfig(Section):
    """Metrics."""

    every: PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    trackers: list[str] = []
    """Trackers of accelerate beside W&B, e.g. [tensorboard]; their packages must be installed."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class Config(Section):
    """Everything a run is defined by."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    depth: DepthConfig = DepthConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()

    @property
    def run_dir(self) -> Path:
        """Directory the run writes to."""
        return Path(self.run.dir if self.run.dir is not None else f"runs/{self.run.name}")

    @property
    def depth_mean(self) -> float:
        """Mean loops of a sequence at the end of the curriculum."""
        if self.depth.follow == "difficulty":
            return sum(self.data.task.difficulty) / 2
        return float(self.model.loops if self.depth.mean is None else self.depth.mean)

    @property
    def depth_backprop(self) -> int:
        """Most last loops that carry gradient at the end of the curriculum."""
        if self.depth.backprop is not None:
            return self.depth.backprop
        if self.depth.follow == "difficulty" or self.model.injection == "initial":
            return self.depth_deepest
        return math.ceil(self.depth_mean / 2)

    @property
    def depth_maximum(self) -> int:
        """Most loops a sequence may draw; 1 for a fixed-depth model."""
        if self.depth.follow == "difficulty":
            return max(self.data.task.difficulty)  # whose order is checked by itself
        if self.depth.maximum is not None:
            return self.depth.maximum
        return 1 if self.model.injection == "none" else math.ceil(2 * self.depth_mean)

    @property
    def depth_deepest(self) -> int:
        """Most loops a sequence runs: the maximum, or the mean, rounded up, where every sequence runs the mean."""
        return math.ceil(self.depth_mean) if self.depth.sampling == "fixed" else self.depth_maximum

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all ranks."""
        return self.train.global_batch * self.data.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run. Raises MythosError if the configuration gives neither steps nor tokens."""
        if self.train.steps is not None:
            return self.train.steps
        if self.train.tokens is None:
            raise MythosError("train.steps, train.tokens: got null and null; give one of them")
        return math.ceil(self.train.tokens / self.tokens_per_step)

    @property
    def schedule_steps(self) -> int:
        """Optimizer steps that learning rate, depth and difficulty follow their ramps over; then they stay."""
        return self.train_steps if self.optim.schedule_steps is None else self.optim.schedule_steps


def packaged_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name: the files of configs/."""
    folder = Path(__file__).parent / "configs"  # in a checkout a link to configs/, which an installation has itself
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def config_file(name: str) -> Path:
    """The file that `name` means: a path, or the name of a packaged configuration where there is no such file.

    Raises MythosError for a name, without a folder or an ending, that is neither.
    """
    path, packaged = Path(name), packaged_configs()
    if path.exists() or path.name != name or path.suffix:
        return path
    if name not in packaged:
        raise MythosError(
            f"{name}: neither a file nor a configuration that comes with mythos ({', '.join(packaged)}); give one of "
            "these, or the path of a YAML file"
        )
    return packaged[name]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, to_train: bool = True) -> Config:
    """Read a YAML file, apply ``key.path=value`` overrides, fill in the preset, and check everything.

    ``path`` may be the name of a packaged configuration instead (:func:`config_file`).

    Values of overrides are YAML (``eval.loops=[1,4]``, ``depth.mean=null``); ``3e-4`` and ``1e9`` are numbers.
    With ``to_train`` false, for a run that has been trained and is to be used, rules that only training needs are not
    applied: the run may be older than they are.

    Raises MythosError with one line for every problem found.
    """
    problems = Problems(str(path), Config)
    data = read_yaml(config_file(str(path)), problems)
    for override in overrides:
        data = apply_override(data, override, problems)
    return _build(data, problems, to_train)


def config_from_dict(data: Mapping[str, Any], *, to_train: bool = True) -> Config:
    """Build the configuration from plain values, as ``load_config`` does from a file.

    Raises MythosError with one line for every problem found.
    """
    return _build(dict(data), Problems("configuration", Config), to_train)


def dump_config(config: Config) -> str:
    """Every field as YAML that ``load_config`` reads back as an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: str | Path) -> None:
    """Write :func:`dump_config` to a file."""
    aside = Path(path).with_suffix(".yaml.tmp")
    aside.write_text(dump_config(config), encoding="utf-8")
    aside.replace(path)


def describe(section: str | None = None) -> str:
    """Explain the configuration: its sections, or every field of one section with type, default and meaning.

    ``section`` is a name such as ``model`` or ``depth.curriculum``. Raises MythosError if there is none of that name.
    """
    known = dict(sections(Config))
    if section is None:
        lines = [f"  {name:<12} {_summary(kind)}" for name, kind in known.items() if "." not in name]
        where = "Fields are declared and explained in mythos/config/loading.py, mythos/model/config.py and mythos/config/data.py."
        return "\n".join(
            ["Sections:", *lines, "", "mythos train --help SECTION prints every field of a section.", where]
        )
    if section not in known:
        raise MythosError(f"{section}: unknown section; {suggestion(section, list(known))}")
    lines = [f"{section}: {_summary(known[section])}"]
    schemas = known[section].model_json_schema()["properties"]
    for name, field in known[section].model_fields.items():
        path = f"{section}.{name}"
        if path in known:
            lines += ["", describe(path)]
        else:
            lines += ["", f"{path}: {allowed(schemas[name])} (default {shown(field.get_default())})"]
            lines += [f"    {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _build(data: dict[str, Any], problems: Problems, to_train: bool) -> Config:
    """Check every field alone, complete the valid ones from preset and defaults, and check them together."""
    values = valid_values(Config, data, problems)
    model = values.setdefault("model", {})
    preset = model.get("preset", ModelConfig.model_fields["preset"].default)
    start, unknown = values.get("train", {}).get("init_from"), False
    if start is not None and "preset" not in model:
        try:
            values |= inherited(start, values)
        except MythosError as error:
            problems.add("train.init_from", str(error))
            unknown = True
    elif preset in PRESETS:
        values["model"] = {**PRESETS[preset], **model}
    else:
        problems.add("model.preset", f"got {shown(preset)}; {suggestion(preset, list(PRESETS))}")
        unknown = True
    if unknown:  # what would have been set, so nothing left at a default may count as a contradiction
        problems.paths |= {f"model.{name}" for name in ModelConfig.model_fields if name not in model}
    if values["model"].get("injection") == "none":
        values.setdefault("eval", {}).setdefault("loops", [1])
    try:
        config = Config.model_validate(values)
    except ValidationError as error:  # of what is inherited: all else has been validated
        for one in error.errors():
            problems.add(".".join(map(str, one["loc"])), f"of {start}: {one['msg']}")
        problems.raise_any()
        raise
    if config.data.kind == "reasoning" and config.model.vocab_size == "auto":
        model = config.model.model_copy(update={"vocab_size": config.data.task.vocabulary})
        config = config.model_copy(update={"model": model})
    for paths, message in _contradictions(config):
        problems.add_contradiction(paths, message)
    if to_train:
        for paths, message in _training_contradictions(config, problems.paths):
            problems.add_contradiction(paths, message)
    problems.raise_any()
    return config


def _contradictions(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
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


def _training_contradictions(config: Config, reported: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
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
