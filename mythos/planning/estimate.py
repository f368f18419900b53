"""What a model costs before it is built: parameters, FLOPs by depth, memory of a step, time and money on GPUs."""

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mythos.config.sections import Config, ParallelConfig
from mythos.errors import MythosError
from mythos.model import loss
from mythos.model.attention.base import attention_class
from mythos.model.attention.value_embeddings import GATE_INPUTS, value_embedding_layers
from mythos.model.config import FEED_FORWARDS, INJECTIONS, ModelConfig, padded_vocab_size
from mythos.model.injection import Injection
from mythos.model.moe import MixtureOfExperts, core_class
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.torch_internals import (
    CPU_FLASH,
    CPU_FLASH_BACKWARD,
    FakeTensorMode,
    TorchDispatchMode,
    storage_address,
    tree_leaves,
)
from mythos.training.depth_schedule import DepthSchedule
from mythos.training.measurements import PEAK_BF16_FLOPS


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Those a token passes through at one loop: all but the routed experts it is not sent to."""


def build_on_meta(config: ModelConfig) -> RecurrentDepthTransformer:
    """The model on the meta device, where nothing is allocated; `vocab_size: auto` is built as 128."""
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def count_parameters(config: ModelConfig) -> Parameters:
    """Count on the meta device; `vocab_size: auto` counts as no vocabulary beyond 128."""
    model = build_on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.modules() if isinstance(m, MixtureOfExperts))
    idle = routed * (config.n_experts - config.experts_per_token) // config.n_experts
    return Parameters(total, total - idle)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs (two per multiply-add) of the matrix products in a forward pass, per token."""

    once: float
    """Embedding to loop and loop to logits."""
    loop: float
    """One pass of the core."""

    def training(self, loops: Sequence[float], backprop: float) -> float:
        """Mean FLOPs per token of a training step: every pass forward, and twice that backward where gradient flows."""
        forward = sum(loops) / len(loops)
        backward = sum(min(row, backprop) for row in loops) / len(loops)
        return 3 * self.once + self.loop * (forward + 2 * backward)


def forward_flops(config: ModelConfig, length: int) -> ForwardFlops:
    """FLOPs per token of sequences of `length` tokens, attention's causal half included."""
    dim, attention_type = config.dim, attention_class(config)
    pairs = (length + 1) / 2  # keys that a query sees on average
    attention = attention_type.token_products(config) + attention_type.pair_products(config) * pairs
    dense = attention + FEED_FORWARDS[config.dense_ffn].token_products(dim, config.ffn_dim)
    core = attention + core_class(config).token_products(config)
    injection: type[Injection] | None = INJECTIONS[config.injection]
    looped = injection is not None
    inject_once, inject_loop = (0, 0) if injection is None else injection.products(config)
    vocab = padded_vocab_size(config.vocab_size) if isinstance(config.vocab_size, int) else 0
    once = (config.prelude_layers + config.coda_layers) * dense + inject_once + looped * dim * dim + dim * vocab
    loop = config.core_layers * core + inject_loop + 2 * dim * config.lora_rank
    gated = [part for part, _ in value_embedding_layers(config)]
    gate = min(GATE_INPUTS, dim) * config.n_kv_heads
    once, loop = once + gate * (len(gated) - gated.count("core")), loop + gate * gated.count("core")
    return ForwardFlops(2.0 * once, 2.0 * loop)


# --- the memory of a step, and what checkpointing computes again: read off the model itself

CHECKPOINTING: tuple[str, ...] = get_args(ParallelConfig.model_fields["activation_checkpointing"].annotation)
"""All modes of parallel.activation_checkpointing."""
TRACED_LOOPS = 16
"""Most passes with gradient that are traced; a pass takes a tenth of a second."""


@dataclass(frozen=True)
class Step:
    """The forward and backward pass of a micro-batch whose rows are all as deep."""

    rows: int
    length: int
    loops: int
    backprop: int
    """Passes that carry gradient, at most `loops`."""
    checkpointing: str
    dtype: torch.dtype
    """Of matrix products."""
    device: str = "cuda"
    """The type of device it runs on, cpu or cuda."""
    accumulating: bool = False
    """Gradients of earlier micro-batches are there, and these are added to them."""
    gathered: bool = False
    """FSDP2 holds weights in `dtype` and reduces gradients: neither copies of the one nor the other are counted."""
    shared: bool = True
    """The loops share what they make of the weights; not where FSDP2 gathers the blocks of the core one by one."""


@dataclass(frozen=True)
class Activations:
    """What a step allocates beyond weights, gradients and optimizer state, in bytes at its peak."""

    kept: int
    """What the passes of the core leave behind for the backward pass."""
    peak: int
    """All of it: also the prelude's, the coda's and the head's, one pass at work, weights cast for the products, and
    gradients that are not yet added to those of earlier micro-batches."""


@lru_cache(64)  # of pure arguments; a plan asks more than once, and a trace takes seconds
def step_activations(config: ModelConfig, step: Step) -> Activations:
    """Bytes at the peak of a step, read off the model's own forward and backward pass over fake tensors.

    Nothing is computed and nothing allocated: fake tensors have shapes, types and lifetimes only. So the figure follows
    the model's code, whatever that does. Beyond TRACED_LOOPS passes with gradient each adds as much as the last
    of those, or what a pass keeps if that is more.
    """
    rise = 0
    if config.injection != "none":
        rise = _trace_memory(config, replace(step, backprop=2), forward=True)
        rise -= _trace_memory(config, replace(step, backprop=1), forward=True)
    depth = min(step.backprop, TRACED_LOOPS)
    peak = _trace_memory(config, replace(step, backprop=depth))
    if step.backprop > depth:
        half = _trace_memory(config, replace(step, backprop=depth // 2))
        peak += (step.backprop - depth) * max(rise, (peak - half) // (depth - depth // 2))
    return Activations(rise * step.backprop, peak)


def recomputed_flops(config: ModelConfig, length: int, checkpointing: str) -> float:
    """FLOPs per token and pass with gradient that are computed again in the backward pass, counted on fake tensors."""
    if checkpointing == "none":
        return 0.0
    again, once = (
        _trace_flops(config, Step(1, length, 1, 1, mode, torch.bfloat16)) for mode in (checkpointing, "none")
    )
    return (again - once) / length


def _trace_memory(config: ModelConfig, step: Step, forward: bool = False) -> int:
    """Bytes at the peak of a step, or those that its forward pass leaves."""
    with fake_model(config, step) as model:
        weights = [*model.parameters(), *model.buffers()]
        if step.accumulating and not step.gathered:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                weights.append(parameter.grad)
        shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        with Ledger(weights, shapes) as ledger:
            objective = run_forward(model, step)
            if forward:
                return ledger.live
            ledger.collecting = step.checkpointing != "none"
            objective.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        peak = ledger.peak(without=gradients if step.gathered else ())
        if not (step.gathered or step.accumulating):
            peak -= sum(gradient.nbytes for gradient in gradients)  # counted with the state
    return max(0, peak)


def _trace_flops(config: ModelConfig, step: Step) -> int:
    with (
        fake_model(config, step) as model,
        Ledger((), set()),
        FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter,
    ):
        run_forward(model, step).backward()
    return counter.get_total_flops()


@contextmanager
def fake_model(config: ModelConfig, step: Step) -> Iterator[RecurrentDepthTransformer]:
    """The model made of fake tensors, as a rank holds it, and the choices of its code that depend on the device."""
    from mythos.distributed.layout import float32_parameters
    from mythos.distributed.parallel import prepare_model

    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()  # so that collecting what a step leaves in cycles is quick
    try:
        # torch without CUDA cannot take fake tensors of its device type through a backward pass.
        with ExitStack() as stack:
            stack.enter_context(patch.dict(loss.LOGIT_BYTES, cpu=loss.LOGIT_BYTES[step.device]))
            if step.device != "cpu":
                for choice in ("causal_by_products", "float32_by_onednn"):
                    stack.enter_context(patch.object(device_choice, choice, lambda *_: False))
            stack.enter_context(FakeTensorMode())
            model = RecurrentDepthTransformer(config)
            parallel = ParallelConfig(activation_checkpointing=step.checkpointing)
            prepare_model(Config(parallel=parallel), model, torch.device("cpu"))
            if not step.shared:
                model.recurrence.share_weights = False
            if step.gathered:
                whole = set(float32_parameters(model))
                for parameter in model.parameters():
                    if parameter not in whole:
                        parameter.data = parameter.data.to(step.dtype)
            yield model
    finally:
        if not frozen:
            gc.unfreeze()


def run_forward(model: RecurrentDepthTransformer, step: Step) -> Tensor:
    """The step's objective."""
    ids = torch.zeros(step.rows, step.length + 1, dtype=torch.int64)
    # The passes without gradient leave nothing behind: one of them stands for all.
    loops = step.backprop if step.loops <= step.backprop else step.backprop + 1
    early = range(step.rows) if loops > 1 else ()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        output = model(ids[:, :-1], ids[:, 1:], loops=loops, backprop=step.backprop, early_rows=early, early_by=1)
    return output.objective


class Ledger(TorchDispatchMode):
    """Bytes of the tensors that operations make, from their birth to their death, weights not included.

    What torch does otherwise with fake tensors than with real ones is done here as with real ones: the gradient of silu
    in one operation, and gradients of weights added up in place.
    """

    def __init__(self, known: Sequence[Tensor], weight_shapes: set[torch.Size]) -> None:
        super().__init__()
        self.live = 0
        self.weight_shapes = weight_shapes
        self.numbers: dict[int, int] = {storage_address(tensor): -1 for tensor in known}
        """Of the storages that live, by address."""
        self.changes: list[tuple[int, int]] = []
        """Number of a storage, and the bytes it adds (born) or takes away (dead), in order."""
        self.highest = 0
        self.born = 0
        self.collecting = False
        """Where fake tensors die in cycles, which real ones do not: when passes are computed again."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.stand_in(operation, args)
        if result is None:
            result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value)
        return result

    def stand_in(self, operation: Any, args: Any) -> Any:
        """What a real tensor's operation would give; None = what the fake one's gives."""
        aten = torch.ops.aten
        if operation is aten.silu_backward.default:
            return torch.empty_like(args[0])
        adds = operation is aten.add.Tensor and not torch.is_grad_enabled() and isinstance(args[1], Tensor)
        if adds and args[0].shape == args[1].shape and args[0].shape in self.weight_shapes:
            return args[0]
        return None

    def note(self, tensor: Tensor) -> None:
        """Count the tensor's storage, if it is new."""
        storage = tensor.untyped_storage()
        address, size = storage_address(tensor), storage.nbytes()
        if address not in self.numbers:
            if self.collecting and self.live + size > self.highest:
                gc.collect()
            self.highest = max(self.highest, self.live + size)
            self.born += 1
            self.numbers[address] = self.born
            self.change(self.born, size)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address: int, size: int) -> None:
        """A storage has died."""
        self.change(self.numbers.pop(address), -size)

    def change(self, number: int, size: int) -> None:
        """Write down a birth or a death."""
        self.changes.append((number, size))
        self.live += size

    def peak(self, without: Sequence[Tensor] = ()) -> int:
        """Most bytes that lived at once, but for some tensors that still live."""
        left_out = {self.numbers.get(storage_address(tensor)) for tensor in without}
        now = highest = 0
        for number, size in self.changes:
            now += 0 if number in left_out else size
            highest = max(highest, now)
        return highest


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> float:
    """Of causal attention: the half of the products that its mask leaves."""
    rows, heads, length, dim = query
    return rows * heads * (dim + value[-1]) * length * (length + 1)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> float:
    """Two for each of the forward pass; a kernel also computes the scores again, which nobody needs."""
    return 2 * _attention_flops(query, key, value)


def _grouped_flops(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Every row of a by its group's matrix b, or transposed by the row of b in the same place."""
    return 2 * math.prod(a) * b[-1]


def _added_flops(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """A product that is added to something in place."""
    return 2 * math.prod(a) * b[-1]


FLOP_FORMULAS = {
    CPU_FLASH: _attention_flops,
    CPU_FLASH_BACKWARD: _attention_backward_flops,
    torch.ops.aten.addmm_: _added_flops,
    torch.ops.mythos.grouped_product: _grouped_flops,
    torch.ops.mythos.grouped_outer: _grouped_flops,
}
"""What torch.utils.flop_counter does not know."""


# --- time and money


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and the market have it."""

    peak: float
    """Dense matrix products in bfloat16, FLOP/s."""
    memory: int
    """Bytes."""
    price: float
    """US dollars for an hour."""
    bandwidth: float
    """Of its memory, bytes/s."""


GPUS = {
    name: Gpu(PEAK_BF16_FLOPS[name], memory * 2**30, price, bandwidth)
    for name, memory, price, bandwidth in (
        ("A100", 80, 1.5, 2.0e12),
        ("H100", 80, 3.0, 3.35e12),
        ("H200", 141, 4.0, 4.8e12),
        ("B200", 180, 6.0, 8.0e12),
    )
}
"""SXM modules of 80, 80, 141 and 180 GB; bandwidths are those of NVIDIA's data sheets. Prices are those of specialised
clouds, on demand, in spring 2026: an order of magnitude, to be replaced by one's own."""


def named_gpu(name: str) -> Gpu:
    """Look a GPU up, whatever its case. Raises MythosError for one that is not known."""
    if name.upper() not in GPUS:
        raise MythosError(f"--gpu: got {name}; known: {', '.join(GPUS)}")
    return GPUS[name.upper()]


@dataclass(frozen=True)
class Run:
    """How long a training run takes, and what it costs."""

    tokens_per_second: float
    seconds: float
    dollars: float


def training_run(tokens: float, executed: float, peak: float, gpus: int, utilisation: float, price: float = 0.0) -> Run:
    """Time and cost of `tokens` at `executed` FLOPs each on `gpus` of `peak` FLOP/s and `price` dollars an hour."""
    rate = gpus * peak * utilisation / executed
    seconds = tokens / rate
    return Run(rate, seconds, gpus * price * seconds / 3600)


@dataclass(frozen=True)
class DepthMeans:
    """A run's depths, mean over its steps and rows, curriculum included."""

    loops: float
    backprop: float


def mean_depths(config: Config, samples: int = 32) -> DepthMeans:
    """Loops and loops with gradient of a row, mean over `samples` steps that are spread over the run."""
    schedule, steps = DepthSchedule(config), config.train_steps
    plans = [schedule.plan(step) for step in sorted({i * steps // samples for i in range(samples)})]
    rows = [sum(plan.loops) / len(plan.loops) for plan in plans]
    return DepthMeans(sum(rows) / len(plans), sum(plan.mean_backprop for plan in plans) / len(plans))


# --- a budget of FLOPs shared between loops and tokens

LOOPS_EXPONENT = 0.40
"""mu* ~ C^0.40, the fit to six budgets at 140M parameters (arXiv 2604.12946, section 5.2)."""
ANCHOR_PARAMETERS, ANCHOR_FLOPS, ANCHOR_LOOPS = 68.8e6, 1e18, 2.12
"""The law's factor: mean of mu* / C^0.40 over the six rows of the 140M model in the paper's table 6 (2, 2, 4, 6, 8 and
10 loops at 1, 2, 4, 8, 16 and 64 x 10^18 FLOPs). Of that model's parameters so many are matrices that every token is
multiplied by at one loop: six layers, the head, the injection and its readout; most others are embeddings."""


@dataclass(frozen=True)
class Split:
    """A budget of FLOPs, shared between loops and tokens."""

    flops: float
    loops: float
    """Mean loops."""
    tokens: float


def optimal_split(config: ModelConfig, length: int, flops: float) -> Split:
    """Mean loops and tokens of the lowest loss that a budget of FLOPs buys this model, after arXiv 2604.12946.

    mu* = 2.12 (C / 10^18 (68.8M / N)^2)^0.40, and the tokens are what the budget then pays for, half of the loops
    with gradient (all with injection initial). The exponent is the paper's, the factor from its table 6. The paper fits
    every size for itself; that the factor goes with C / N^2, the budget's tokens per parameter, is read off here: at
    its other size, 370M, that gives 3.8, 5.0 and 6.6 loops where the table has 4, 6 and 6. N is the number of
    parameters that a token is multiplied by at one loop. The tokens follow D* ~ C^0.78 nearly, as measured from 10^18
    to 1.3 x 10^20 FLOPs; beyond is extrapolation.
    """
    one = forward_flops(config, 1)
    budget = flops / ANCHOR_FLOPS * (2 * ANCHOR_PARAMETERS / (one.once + one.loop)) ** 2
    loops = 1.0 if config.injection == "none" else max(1.0, ANCHOR_LOOPS * budget**LOOPS_EXPONENT)
    cost = forward_flops(config, length)
    backprop = loops if config.injection == "initial" else max(1.0, loops / 2)
    return Split(flops, loops, flops / (3 * cost.once + cost.loop * (loops + 2 * backprop)))
