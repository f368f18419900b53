"""The sections of a run's configuration, and :class:`Config`, which contains them all."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

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
    """Name, directory and seed of the run, and whether it resumes."""

    name: str = "debug"
    """Name of the run, also shown in W&B."""
    dir: str | None = None
    """Run directory; null = runs/<name>."""
    seed: Seed = 0
    """Seed of the weights, the data order, the depths and the initial states."""
    resume: str = "auto"
    """auto = resume from the newest complete checkpoint of the run directory, if there is one; never = start from step
    0, and refuse if the directory has checkpoints; or the path of a checkpoint to resume from while the directory has
    none."""
    on_change: Literal["warn", "fail"] = "warn"
    """If the configuration differs from that of the checkpoint that the run continues: warn = print every difference
    and continue, fail = print them and stop."""


class TokenizerConfig(Section):
    """How text becomes token ids."""

    name: str = "bpe"
    """bpe = a byte-level BPE trained on the run's own corpus, or a Hugging Face hub id, a folder, or a file such as
    tokenizer.json. Left out with data.kind tokens: the tokenizer in that folder."""
    vocab_size: Identifiers = 4096
    """Size of the trained bpe (at least 384); other tokenizers have their own."""


class CurriculumConfig(Section):
    """A ramp over optimizer steps."""

    shape: Literal["none", "linear", "1-sqrt", "cosine", "steps"] = "none"
    """Shape of the ramp; none = the target from the first step. 1-sqrt rises as 1 - sqrt(1 - x); steps rises in 4 equal
    steps."""
    over: Fraction = 0.25
    """Share of the training steps (optim.schedule_steps) that the ramp takes."""
    start: Mean = 1.0
    """Value at the first step."""


class DepthConfig(Section):
    """Number of loops each sequence runs in training, and number of loops that carry gradient."""

    mean: Mean | None = None
    """Mean loops of a sequence at the end of the curriculum; null = model.loops."""
    backprop: Count | None = None
    """Number of last loops that carry gradient; null = half the mean, rounded up, or all with model.injection initial,
    which reads the input in the first loop only."""
    sampling: Literal["poisson", "fixed", "uniform", "lognormal"] = "poisson"
    """Distribution of a sequence's loops: clipped Poisson (arXiv 2604.12946), the mean itself, uniform on
    1..2 mean - 1, or log-normal Poisson (arXiv 2502.05171)."""
    maximum: Count | None = None
    """Largest number of loops that a sequence may draw; null = twice the mean."""
    follow: Literal["none", "difficulty"] = "none"
    """difficulty = one loop for each step of the task (data.kind reasoning): mean and maximum follow from
    data.task.difficulty, and all loops carry gradient unless backprop is set."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the mean."""
    backprop_curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the number of loops that carry gradient."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon = orthogonalised momentum for the matrices of attention, feed-forward and experts, and AdamW for embedding,
    head, norms, routers, injection, readout, adapter and gates, both with this lr and weight_decay
    (arXiv 2502.16982)."""
    lr: Annotated[float, Field(gt=0, le=1e30)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Small = 1e-8
    """Added to the square root of the second moment."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """muon: decay rate of the matrices' Nesterov momentum."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay, on matrices only; never on norms, biases, embeddings or the injection."""
    clip: Annotated[float, Field(ge=0, le=1e30)] = 1.0
    """Maximum norm of the gradient; 0 = no clipping."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: cosine decay to min_lr, or constant at lr with a linear decay at the end (wsd)."""
    warmup: Fraction = 0.02
    """Share of the steps in which the learning rate rises from 0."""
    decay: Fraction = 0.2
    """wsd: share of the steps in which the learning rate falls."""
    min_lr: Fraction = 0.1
    """Final learning rate as a share of lr."""
    schedule_steps: PositiveInt | None = None
    """Length in steps of the schedule of the learning rate and of all other ramps (depth.curriculum,
    depth.backprop_curriculum, data.task.ramp), whose shares refer to it; null = all steps of the run. Later steps keep
    the final values; a shorter run ends within the schedule."""


class ProfileConfig(Section):
    """A window of steps traced by torch.profiler, written to profile/ in the run directory."""

    start: PositiveInt = 10
    """First traced step, counted from the start of the process."""
    steps: NonNegativeInt = 0
    """Number of traced steps; 0 = no trace."""


class TrainConfig(Section):
    """Length of the training, batches, device and precision."""

    steps: PositiveInt | None = None
    """Optimizer steps. Set steps or tokens, not both."""
    tokens: PositiveInt | None = None
    """Training tokens, rounded up to whole steps."""
    init_from: str | None = None
    """Run directory, checkpoint or exported folder whose weights a new run starts from, with a fresh optimizer, at step
    0 and the beginning of the data; model and tokenizer settings come from there unless the configuration sets
    them."""
    global_batch: Rows = 64
    """Sequences per optimizer step over all ranks; a multiple of data.streams."""
    micro_batch: Rows | Literal["auto"] = 8
    """Sequences per forward and backward pass on a rank; auto (single, ddp) = as many as fit, tried at the start."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of matmuls; auto = bfloat16 if the hardware supports it natively (GPU, AMX, AVX512-BF16), else
    float32. Parameters, optimizer and the injection stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto = cuda if available."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the model with torch.compile: each pass of the loop as one graph, and the blocks of prelude and coda.
    auto = on GPUs, where it takes a minute or two at the start; on a CPU it gains little."""
    max_time: Annotated[str, Field(pattern=DURATION, examples=["90s", "3h30m"])] | None = None
    """Wall-clock limit of this process, e.g. 90s, 3h30m, 1d; then the run saves at the end of a step and exits, and the
    same command continues it. null = no limit."""
    skip_limit: PositiveInt = 5
    """Number of consecutive updates, skipped for a non-finite loss or gradient, that stop the run or roll it back."""
    rollbacks: NonNegativeInt = 0
    """How often, instead of stopping at skip_limit, the run may return to the weights of its newest checkpoint and
    continue with the next data."""
    profile: ProfileConfig = ProfileConfig()
    """Profiler trace of a few steps."""


class EvalConfig(Section):
    """Validation at several depths, and text samples."""

    every: NonNegativeInt = 500
    """Steps between validations; 0 = only at the end."""
    batches: Rows = 4
    """Validation batches of data.streams sequences each, the same every time."""
    loops: list[Count] = [1, 4, 8, 16]
    """Loop counts at which the validation loss is measured, increasing; [1] by default if model.injection is none."""
    samples: CountOrZero = 1
    """Number of text samples written at each validation."""
    sample_tokens: Positions = 64
    """Tokens per sample."""
    prompts: list[str] = ["The "]
    """Prompts of the samples, used in turn."""
    tasks: list[str] = []
    """Files *.jsonl of multiple-choice questions (docs/evaluation.md), scored at each validation with eval.loops."""


class CheckpointConfig(Section):
    """When and where to save checkpoints, and which to keep."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none."""
    asynchronous: bool = True
    """Copy the state and write it while training continues; false = training waits until it is written."""
    dir: str | None = None
    """Directory or fsspec URL (s3://...) for the checkpoints of this run only; null = checkpoints/ in the run
    directory."""


class ParallelConfig(Section):
    """How model and batch are distributed over processes, one per device."""

    mode: Literal["auto", "single", "ddp", "fsdp", "hsdp"] = "auto"
    """single = one process; ddp = a full model on every process; fsdp = parameters, gradients and optimizer state
    sharded over all processes; hsdp = sharded over groups of `shard` processes and replicated across groups; auto
    chooses and prints the reason."""
    shard: Rows | None = None
    """hsdp: processes that share one copy of the model; null = the processes of a node."""
    replicate: Rows | None = None
    """hsdp: copies of the model; null = number of processes / shard."""
    expert: Rows = 1
    """fsdp, hsdp: processes that share the experts of each core block. Each holds model.n_experts / expert of them, and
    tokens are sent to the processes that hold their experts. Must divide model.n_experts and the processes that share
    a copy of the model; needs torch 2.13. 1 = no expert parallelism."""
    shared: Rows = 1
    """fsdp, hsdp with `expert` above 1: processes that divide the shared experts of each core block by their hidden
    width, for models whose shared experts are too large for one GPU. Each computes its part for the tokens of all of
    them. Must divide `expert` and the hidden width; best the GPUs of a machine. 1 = each process computes them
    whole."""
    wrap: Literal["loop", "block"] = "loop"
    """fsdp, hsdp: unit of parameter gathering. loop = the whole core, gathered once whatever the number of loops;
    block = one core block at a time, again in every loop, for a core that does not fit."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free gathered parameters after the forward pass, and gather them again for the backward pass."""
    reduce: Literal["step", "micro_batch"] = "micro_batch"
    """fsdp, hsdp: when gradients are reduced. micro_batch = after each micro-batch, so that processes store only
    shards; step = once, which sends less, but every process stores full float32 gradients between micro-batches."""
    activation_checkpointing: Literal["none", "selective", "loop", "all"] = "none"
    """Recompute parts of the model in the backward pass, to save memory. selective = cheap operations (norms, gates,
    rotations) of the loops; loop = whole loops, which stores only the state between loops; all = also each layer of
    prelude and coda."""
    start_timeout: Seconds = 1800.0
    """Seconds that processes wait for each other until the end of the first step, which may gather data and compile."""
    timeout: Seconds = 300.0
    """Seconds that processes wait for each other after the first step; then the run ends and names the operation."""
    stall_after: Seconds = 120.0
    """Seconds without progress (data, a pass, an update, a save) after which a process writes the stacks of its threads
    to stacks/ in the run directory."""

    @property
    def recomputes_loops(self) -> bool:
        """Whether the backward pass runs whole loops again."""
        return self.activation_checkpointing in ("loop", "all")


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """disabled = wandb is not imported."""
    project: str = "mythos"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; null = your default."""
    tags: list[str] = []
    """W&B tags."""


class LogConfig(Section):
    """Metrics and trackers."""

    every: PositiveInt = 10
    """Steps between records in metrics.jsonl."""
    trackers: list[str] = []
    """Trackers of accelerate besides W&B, e.g. tensorboard or [tensorboard, mlflow]; their packages must be
    installed."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""


class Config(Section):
    """The complete configuration of a run."""

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

    def with_fields(self, section: str, **values: Any) -> "Config":
        """A copy in which fields of a section have other values, which are not checked."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    @property
    def run_dir(self) -> Path:
        """Directory that the run writes to."""
        return Path(self.run.dir if self.run.dir is not None else f"runs/{self.run.name}")

    @property
    def checkpoints_dir(self) -> str | Path:
        """Directory or URL that the checkpoints are in."""
        return self.checkpoint.dir or self.run_dir / "checkpoints"

    @property
    def depth_mean(self) -> float:
        """Mean loops of a sequence at the end of the curriculum."""
        if self.depth.follow == "difficulty":
            return sum(self.data.task.difficulty) / 2
        return float(self.model.loops if self.depth.mean is None else self.depth.mean)

    @property
    def depth_backprop(self) -> int:
        """Maximum number of last loops that carry gradient, at the end of the curriculum."""
        if self.depth.backprop is not None:
            return self.depth.backprop
        if self.depth.follow == "difficulty" or self.model.injection == "initial":
            return self.depth_deepest
        return math.ceil(self.depth_mean / 2)

    @property
    def depth_maximum(self) -> int:
        """Maximum number of loops that a sequence may draw; 1 for a fixed-depth model."""
        if self.depth.follow == "difficulty":
            return max(self.data.task.difficulty)  # max: a wrong order is reported by its own rule
        if self.depth.maximum is not None:
            return self.depth.maximum
        return 1 if self.model.injection == "none" else math.ceil(2 * self.depth_mean)

    @property
    def depth_deepest(self) -> int:
        """Maximum number of loops that a sequence runs; with fixed sampling the mean, rounded up."""
        return math.ceil(self.depth_mean) if self.depth.sampling == "fixed" else self.depth_maximum

    @property
    def depth_summary(self) -> str:
        """The distribution of depths at the end of its ramps, for people."""
        sampling = "those of the task" if self.depth.follow == "difficulty" else self.depth.sampling
        loops = f"{self.depth_mean:g} loops on average ({sampling}, at most {self.depth_maximum})"
        return f"{loops}, gradient through the last {self.depth_backprop}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all ranks."""
        return self.train.global_batch * self.data.sequence_length

    @property
    def train_steps(self) -> int:
        """Optimizer steps of the whole run. Raises MythosError if the configuration sets neither steps nor tokens."""
        if self.train.steps is not None:
            return self.train.steps
        if self.train.tokens is None:
            raise MythosError("train.steps, train.tokens: got null and null; give one of them")
        return math.ceil(self.train.tokens / self.tokens_per_step)

    @property
    def schedule_steps(self) -> int:
        """Length in optimizer steps of the ramps of learning rate, depth and difficulty."""
        return self.train_steps if self.optim.schedule_steps is None else self.optim.schedule_steps
