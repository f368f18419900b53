"""A training step on fake tensors, which have shapes, types and lifetimes but no data; and its FLOPs."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.layout import float32_parameters
from mythos.distributed.parallel import prepare_model
from mythos.model.config import ModelConfig
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops import device_choice
from mythos.model.ops.expert_exchange import Dispatch, ExpertExchange, Splits
from mythos.model.ops.shared_experts import SharedExpertGroup
from mythos.model.ops.transfer import Transfer
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.trace_cache import remembered
from mythos.torch_internals import CPU_FLASH, CPU_FLASH_BACKWARD, FakeTensorMode

CHECKPOINTING: tuple[str, ...] = get_args(ParallelConfig.model_fields["activation_checkpointing"].annotation)
"""All modes of parallel.activation_checkpointing."""


@dataclass(frozen=True)
class Step:
    """The forward and backward pass of one micro-batch whose rows all have the same depth."""

    rows: int
    length: int
    loops: int
    backprop: int
    """Loops that carry gradient, at most `loops`."""
    checkpointing: str
    dtype: torch.dtype
    """Type of matmuls."""
    device: str = "cuda"
    """Type of the device the step is planned for, cpu or cuda."""
    accumulating: bool = False
    """Gradients of earlier micro-batches exist, and this step adds to them."""
    gathered: bool = False
    """FSDP2 gathers the weights in `dtype` and reduces the gradients. The caller counts those bytes, not the trace."""
    shared: bool = True
    """All loops share what is derived from the weights. False if FSDP2 gathers the core's blocks one by one."""
    expert: int = 1
    """Ranks that share the experts. The step runs on one of them, and every expert gets equally many tokens."""
    sharers: int = 1
    """Ranks among these that divide the shared experts. All have as many tokens as this one."""


@contextmanager
def fake_model(config: ModelConfig, step: Step) -> Iterator[RecurrentDepthTransformer]:
    """Build the model of a rank from fake tensors; code that runs inside makes the choices of `step.device`."""
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    frozen = gc.get_freeze_count()
    if not frozen:
        gc.freeze()  # Ledger collects garbage often; exclude the objects that exist already.
    try:
        # Fake tensors stay on the CPU: torch without CUDA cannot run a backward pass over fake CUDA tensors.
        with device_choice.simulated_gpu() if step.device == "cuda" else nullcontext(), FakeTensorMode():
            model = RecurrentDepthTransformer(config)
            parallel = ParallelConfig.model_validate({"activation_checkpointing": step.checkpointing})
            prepare_model(Config(parallel=parallel), model, torch.device("cpu"))
            if step.expert > 1:
                hold_share_of_experts(model, step.expert, step.sharers)
            if not step.shared:
                model.recurrence.share_weights = False
            if step.gathered:
                in_float32 = set(float32_parameters(model))
                for parameter in model.parameters():
                    if parameter not in in_float32:
                        parameter.data = parameter.data.to(step.dtype)
            yield model
    finally:
        if not frozen:
            gc.unfreeze()


class BalancedExchange(ExpertExchange):
    """Stands for the exchange of tokens in a plan: sends nothing, and as many rows arrive as leave."""

    def __init__(self, config: ModelConfig, ranks: int, sharers: int) -> None:
        super().__init__(None, ranks, sharers)
        self.config = config

    def start(self, experts: Tensor, held: int) -> Dispatch:
        """As if every rank's share of the chosen experts (N, k) were equally large."""
        tokens, choices = experts.shape
        rows = rows_to_experts(self.config, self.ranks, tokens)
        evenly = [rows // self.ranks + (rank < rows % self.ranks) for rank in range(self.ranks)]
        most = min(choices, held)
        self.balanced = Splits(evenly, evenly, tokens * choices, most, [tokens] * self.sharers)
        return super().start(experts, held)

    def exchange_counts(self, sent: Tensor) -> Splits:
        """The same counts as leave."""
        return self.balanced

    def send(self, rows: Tensor, leaving: list[int], coming: list[int]) -> Transfer:
        """Rows without values."""
        return Transfer(rows.new_empty(sum(coming), *rows.shape[1:]), rows, None)


class BalancedGroup(SharedExpertGroup):
    """Stands for the ranks that divide the shared experts: sends nothing, and as much arrives as from equal ranks."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None, ranks)

    def gather(self, rows: Tensor, most: int) -> Transfer:
        """Rows without values."""
        return Transfer(rows.new_empty(self.ranks * most, *rows.shape[1:]), rows, None)

    def give_back(self, rows: Tensor) -> Transfer:
        """Rows without values."""
        return Transfer(torch.empty_like(rows), rows, None)


def hold_share_of_experts(model: RecurrentDepthTransformer, ranks: int, sharers: int) -> None:
    """Leave a model the experts of one of `ranks` ranks, and the part of the shared ones of one of `sharers`."""
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        for name in ("gate_up", "down"):
            setattr(module, name, _share(getattr(module, name), 0, ranks))
        module.exchange = BalancedExchange(model.config, ranks, sharers)
        if sharers > 1 and module.shared is not None:
            linears = module.shared.gate_up, module.shared.down
            for dimension, linear in enumerate(linears):
                linear.weight = _share(linear.weight, dimension, sharers)
            module.shared_group = BalancedGroup(sharers)
            model.recurrence.exclude(linears)


def _share(whole: Tensor, dimension: int, ranks: int) -> nn.Parameter:
    shape = list(whole.shape)
    shape[dimension] //= ranks
    return nn.Parameter(whole.new_empty(shape))


def run_forward(model: RecurrentDepthTransformer, step: Step) -> Tensor:
    """Run the step's forward pass; returns the objective to differentiate."""
    ids = torch.zeros(step.rows, step.length + 1, dtype=torch.int64)
    # Passes without gradient leave nothing behind, so one of them stands for all.
    loops = step.backprop if step.loops <= step.backprop else step.backprop + 1
    early = range(step.rows) if loops > 1 else ()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.dtype == torch.bfloat16):
        output = model(ids[:, :-1], ids[:, 1:], loops=loops, backprop=step.backprop, early_rows=early, early_by=1)
    return output.objective


# --- FLOPs that checkpointing computes again


class RecomputedFlops(NamedTuple):
    """FLOPs per token that the backward pass computes again."""

    once: float
    """Prelude and coda."""
    loop: float
    """One loop with gradient."""


def recomputed_flops(config: ModelConfig, length: int, checkpointing: str) -> RecomputedFlops:
    """What a checkpointing mode computes again."""
    if checkpointing == "none":
        return RecomputedFlops(0.0, 0.0)
    # The core is traced with one layer or none of prelude and coda. Their number stays odd or even, because every
    # second layer of a model has a value embedding.
    outside = {name: getattr(config, name) % 2 for name in ("prelude_layers", "coda_layers")}
    short = config.model_copy(update=outside)
    loop = _difference(short, length, "loop" if checkpointing == "all" else checkpointing, "none")
    once = _difference(config, length, "all", "loop") if checkpointing == "all" else 0.0
    return RecomputedFlops(once, loop)


def _difference(config: ModelConfig, length: int, mode: str, other: str) -> float:
    """FLOPs per token that one loop has more under `mode` than under another mode."""
    more, less = (_step_flops(config, Step(1, length, 1, 1, each, torch.bfloat16)) for each in (mode, other))
    return (more - less) / length


@remembered(int)
def _step_flops(config: ModelConfig, step: Step) -> int:
    with fake_model(config, step) as model, FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        run_forward(model, step).backward()
    return counter.get_total_flops()


# FlopCounterMode calls a formula with the shapes of the operator's tensors.
Shape = Sequence[int]


def _attention_flops(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Causal attention, query (B, H, S, K): the half of both matmuls that the mask leaves."""
    rows, heads, length, dim = query
    return rows * heads * (dim + value[-1]) * length * (length + 1)


def _attention_backward_flops(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any
) -> int:
    """Two matmuls for each of the forward pass; the scores that a kernel computes again are not counted."""
    return 2 * _attention_flops(query, key, value)


def _grouped_flops(a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    """Grouped matmul: each row of a (n, K) times its group's (K, M), or transposed times the same row of b (n, M)."""
    return 2 * math.prod(a) * b[-1]


def _addmm_flops(total: Shape, a: Shape, b: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


FLOP_FORMULAS = {
    CPU_FLASH: _attention_flops,
    CPU_FLASH_BACKWARD: _attention_backward_flops,
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.mythos.grouped_product: _grouped_flops,
    torch.ops.mythos.grouped_outer: _grouped_flops,
}
"""Formulas for operators that torch.utils.flop_counter does not know."""
