"""GPUs with their prices, mean depths of a run, and how to split a budget of FLOPs between loops and tokens."""

from dataclasses import dataclass

from mythos.config.presets import BPE_VOCAB_SIZE
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.planning.flops import forward_flops
from mythos.training.depth_schedule import DepthSchedule
from mythos.training.measurements import PEAK_BF16_FLOPS


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet and its price."""

    peak: float
    """Dense bfloat16 matmuls, FLOP/s."""
    memory: int
    """Bytes."""
    price: float
    """US dollars per hour."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    nvlink: float
    """To other GPUs of the machine, bytes/s in each direction."""
    infiniband: float
    """To other machines, bytes/s in each direction: one network card per GPU."""


GPUS = {
    name: Gpu(PEAK_BF16_FLOPS[name], memory * 2**30, price, bandwidth, nvlink, infiniband)
    for name, memory, price, bandwidth, nvlink, infiniband in (
        ("A100", 80, 1.5, 2.0e12, 300e9, 25e9),
        ("H100", 80, 3.0, 3.35e12, 450e9, 50e9),
        ("H200", 141, 4.0, 4.8e12, 450e9, 50e9),
        ("B200", 180, 6.0, 8.0e12, 900e9, 50e9),
    )
}
"""SXM modules of 80, 80, 141 and 180 GB, with bandwidths from NVIDIA's data sheets: NVLink has 600, 900, 900 and 1,800
GB/s in both directions together, and DGX machines have one card of 200 Gb/s (A100) or 400 Gb/s (others) for each of 8
GPUs. Prices are on-demand prices of specialised clouds in spring 2026: an order of magnitude, to be replaced by your
own."""


def sized(config: Config) -> Config:
    """A configuration with a definite vocabulary: that of a trained tokenizer, or the usual size."""
    if config.model.vocab_size != "auto":
        return config
    size = config.tokenizer.vocab_size if config.tokenizer.name == "bpe" else BPE_VOCAB_SIZE
    return config.with_fields("model", vocab_size=size)


def named_gpu(name: str) -> Gpu:
    """Look up a GPU by name, in any case. Raises MythosError for an unknown one."""
    if name.upper() not in GPUS:
        raise MythosError(f"--gpu: got {name}; known: {', '.join(GPUS)}")
    return GPUS[name.upper()]


@dataclass(frozen=True)
class DepthMeans:
    """Mean depths of a run over its steps and rows, curricula included."""

    loops: float
    backprop: float
    """Loops with gradient."""


def mean_depths(config: Config) -> DepthMeans:
    """Average the depths over 32 steps spread evenly over the run."""
    schedule, steps = DepthSchedule(config), config.train_steps
    plans = [schedule.plan(step) for step in sorted({i * steps // 32 for i in range(32)})]
    rows = [sum(plan.loops) / len(plan.loops) for plan in plans]
    return DepthMeans(sum(rows) / len(plans), sum(plan.mean_backprop for plan in plans) / len(plans))


LOOPS_EXPONENT = 0.40
"""mu* ~ C^0.40, the fit to six budgets at 140M parameters (arXiv 2604.12946, section 5.2)."""
ANCHOR_PARAMETERS, ANCHOR_FLOPS, ANCHOR_LOOPS = 68.8e6, 1e18, 2.12
"""The law's factor: mean of mu* / C^0.40 over the six rows of the 140M model in the paper's table 6 (2, 2, 4, 6, 8 and
10 loops at 1, 2, 4, 8, 16 and 64 x 10^18 FLOPs). 68.8M of that model's parameters are matrices that every token is
multiplied by in one loop: six layers, the head, the injection and its readout. Most others are embeddings."""


@dataclass(frozen=True)
class Split:
    """A budget of FLOPs, split between loops and tokens."""

    flops: float
    loops: float
    """Mean loops."""
    tokens: float


def optimal_split(config: ModelConfig, length: int, flops: float) -> Split:
    """Mean loops and tokens at which a budget of FLOPs gives this model the lowest loss (arXiv 2604.12946).

    mu* = 2.12 (C / 10^18 (68.8M / N)^2)^0.40, where N is the number of parameters that a token is multiplied by in one
    loop. The budget then pays for the tokens, with gradient through half of the loops (all with injection initial).

    The exponent is the paper's, the factor comes from its table 6. The paper fits each size separately; that the factor
    scales with C / N^2 (the budget's tokens per parameter) is our reading. At the paper's other size, 370M, it gives
    3.8, 5.0 and 6.6 loops where the table has 4, 6 and 6. The tokens nearly follow the paper's D* ~ C^0.78, measured
    from 10^18 to 1.3 x 10^20 FLOPs; beyond that it is extrapolation.
    """
    one = forward_flops(config, 1)
    budget = flops / ANCHOR_FLOPS * (2 * ANCHOR_PARAMETERS / (one.once + one.loop)) ** 2
    loops = 1.0 if config.injection == "none" else max(1.0, ANCHOR_LOOPS * budget**LOOPS_EXPONENT)
    backprop = loops if config.injection == "initial" else max(1.0, loops / 2)
    return Split(flops, loops, flops / forward_flops(config, length).training_at(loops, backprop))
