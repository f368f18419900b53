"""The sections of a run's configuration, and :class:`Config`, which holds them all."""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mythos.config.data import DataConfig
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.section import (
    MOST_LOOPS,
    Count,
    CountOrZero,
    Identifiers,
    NonNegativeInt,
    Positions,
    PositiveInt,
    Rows,
    Section,
    Seed,
    Small,
    Weight,
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
