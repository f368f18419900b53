"""The whole configuration: one YAML file a run, overridden by key=value, every error reported at once."""

from typing import Annotated, Literal

from pydantic import Field

from mythos.model.config import ModelConfig, NonNegativeInt, PositiveInt, Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class RunConfig(Section):
    """What the run is called, where it writes, and whether it continues."""

    name: str = "debug"
    """Name of the run, also shown in W&B."""
    dir: str | None = None
    """Run directory; null = runs/<name>."""
    seed: NonNegativeInt = 0
    """Seed of the weights, the data order, the depths and the initial states."""
    resume: str = "auto"
    """auto = continue from the run directory's newest complete checkpoint if there is one, never = start anew (refused
    if the directory already has checkpoints), or the path of a checkpoint to continue from."""


class TokenizerConfig(Section):
    """How text becomes token ids."""

    name: str = "bpe"
    """bpe = a byte-level BPE trained on the run's own corpus, or a Hugging Face hub id or local path."""
    vocab_size: PositiveInt = 4096
    """Size of the trained bpe (at least 384); other tokenizers bring their own."""


class ValidationConfig(Section):
    """Documents that are held out of training and that validation loss is measured on."""

    path: str | list[str] | None = None
    """Files of validation documents (glob or list of globs); null = hold out a share of the corpus by content hash."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out by content hash when path is null."""


class DataConfig(Section):
    """Where documents come from and how they become sequences."""

    kind: Literal["embedded", "files", "hub"] = "embedded"
    """embedded = English documentation found on this machine, files = parquet/jsonl/txt, hub = Hugging Face dataset."""
    path: str | list[str] | None = None
    """files: glob or list of globs of .parquet, .jsonl, .jsonl.gz or .txt files."""
    dataset: str | None = None
    """hub: dataset id, e.g. HuggingFaceFW/fineweb-edu."""
    subset: str | None = None
    """hub: configuration of the dataset, e.g. sample-10BT."""
    split: str = "train"
    """hub: split of the dataset."""
    text_column: str = "text"
    """Column (parquet) or key (jsonl) that holds a document's text."""
    streams: PositiveInt = 64
    """Logical streams the corpus is read by. Part of the run's identity: it fixes the global batches at any world size."""
    sequence_length: PositiveInt = 1024
    """Tokens of a training sequence, at most model.context_length."""
    mask_documents: bool = False
    """Keep attention inside each document of a packed sequence."""
    on_error: Literal["skip", "fail"] = "fail"
    """A shard that cannot be read is named and skipped with a count, or ends the run."""
    cache_dir: str | None = None
    """Where gathered corpora and trained tokenizers are kept; null = $MYTHOS_CACHE or ~/.cache/mythos."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out documents."""


class CurriculumConfig(Section):
    """A ramp counted in optimizer steps."""

    shape: Literal["none", "linear", "1-sqrt", "cosine", "steps"] = "none"
    """Form of the ramp; none = the target from the first step. 1-sqrt rises as 1 - sqrt(1 - x); steps in 4 equal stairs."""
    over: Fraction = 0.25
    """Share of the training steps that the ramp takes."""
    start: Annotated[float, Field(ge=1)] = 1.0
    """Value at the first step."""


class DepthConfig(Section):
    """How many loops every sequence runs in training, and how many of them carry gradient."""

    mean: Annotated[float, Field(ge=1)] | None = None
    """Mean loops of a sequence at the end of the curriculum; null = model.loops."""
    backprop: PositiveInt | None = None
    """Last loops that carry gradient; null = half the mean, rounded up."""
    sampling: Literal["poisson", "fixed", "uniform", "lognormal"] = "poisson"
    """Distribution of a sequence's loops: clipped Poisson (arXiv 2604.12946), the mean itself, uniform on
    1..2 mean - 1, or log-normal Poisson (arXiv 2502.05171)."""
    maximum: PositiveInt | None = None
    """Most loops a sequence may draw; null = twice the mean."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the mean."""
    backprop_curriculum: CurriculumConfig = CurriculumConfig()
    """Ramp of the loops that carry gradient."""


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on matrices only; never on norms, biases, embeddings or the injection."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warmup: cosine to min_lr, or stay at lr and go down linearly over the last decay share (wsd)."""
    warmup: Fraction = 0.02
    """Share of the steps over which the learning rate rises from 0."""
    decay: Fraction = 0.2
    """wsd: share of the steps over which the learning rate falls."""
    min_lr: Fraction = 0.1
    """Last learning rate as a share of lr."""


class TrainConfig(Section):
    """How long and in which batches to train."""

    steps: PositiveInt | None = None
    """Optimizer steps. Give steps or tokens, not both."""
    tokens: PositiveInt | None = None
    """Training tokens, rounded up to whole steps."""
    global_batch: PositiveInt = 64
    """Sequences of an optimizer step over all ranks; a multiple of data.streams."""
    micro_batch: PositiveInt = 8
    """Sequences of one forward and backward pass on a rank."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type of matrix products; auto = bfloat16 where the hardware computes it natively (GPU, AMX,
    AVX512-BF16), float32 elsewhere. Parameters, optimizer and the injection stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto = cuda if there is one."""
    compile: bool = False
    """Compile the blocks with torch.compile."""


class EvalConfig(Section):
    """Validation at several depths, and text samples."""

    every: NonNegativeInt = 500
    """Steps between validations; 0 = only at the end."""
    batches: PositiveInt = 16
    """Validation batches of train.micro_batch sequences, the same ones every time."""
    loops: list[PositiveInt] = [1, 4, 8, 16]
    """Loop counts validation loss is measured at."""
    samples: NonNegativeInt = 1
    """Text samples written at each validation."""
    sample_tokens: PositiveInt = 64
    """Tokens of a sample."""
    prompts: list[str] = ["The "]
    """Beginnings of the samples, used in turn."""


class CheckpointConfig(Section):
    """When to save and what to keep."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Also keep each checkpoint whose step is a multiple of this; 0 = none."""


class ParallelConfig(Section):
    """How the model is laid out over devices."""

    mode: Literal["auto", "single"] = "auto"
    """single = one process."""
    activation_checkpointing: Literal["none", "loop"] = "none"
    """loop = keep only the state between loops and recompute each loop in the backward pass."""


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
