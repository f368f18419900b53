"""Memory traffic of a training step beside its matrix products, counted over fake tensors as a GPU runs it.

Every elementwise operation, reduction, copy and lookup reads its inputs from memory and writes its result. Matrix
products, attention and grouped products are left out: they are limited by arithmetic, and `mythos.planning.estimate`
counts their FLOPs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mythos.model.config import ModelConfig
from mythos.model.layers import RMSNorm, autocast_dtype
from mythos.model.ops import device_choice
from mythos.model.ops.grouped_experts import ExpertWeights, run_backward_in_graph, run_in_graph
from mythos.planning.estimate import FLOP_FORMULAS, Step, fake_model, run_forward
from mythos.torch_internals import (
    FakeTensorMode,
    PlannedKernel,
    TorchDispatchMode,
    planning_backend,
    storage_address,
    tree_leaves,
)

DEPTHS = (2, 6)
"""Loops of the two traces whose difference is divided by 4. The experts' weight gradients are formed once for several
loops, so the first loops of a step cost less than the mean loop."""


@dataclass(frozen=True)
class Traffic:
    """Kernels and memory traffic of one forward and one backward pass. Bytes are per token, kernels per micro-batch."""

    kernels_forward: float
    """Launches that are neither matrix products nor attention."""
    products_forward: float
    """Launches of matrix products and attention."""
    bytes_forward: float
    """Read and written by the former, per token."""
    kernels_backward: float
    products_backward: float
    bytes_backward: float


@dataclass(frozen=True)
class StepTraffic:
    """Traffic of a micro-batch: `once` (embedding, prelude, coda, head, casts of weights) and each `loop` of the core.

    A loop without gradient costs the forward part of `loop`.
    """

    once: Traffic
    loop: Traffic


def step_traffic(
    config: ModelConfig,
    length: int,
    rows: int = 1,
    checkpointing: str = "none",
    dtype: torch.dtype = torch.bfloat16,
) -> StepTraffic:
    """Count the traffic of micro-batches of `rows` sequences of `length` tokens, products in `dtype` by autocast.

    `checkpointing` is a value of parallel.activation_checkpointing: what it recomputes counts as backward. The bytes
    per token include work that grows with the weights and not with the tokens (casts, sums of weight gradients), so
    they fall as the micro-batch grows.
    """
    shallow, deep = DEPTHS if config.injection != "none" else (1, 1)
    first = _trace(config, Step(rows, length, shallow, shallow, checkpointing, dtype))
    if deep == shallow:
        return StepTraffic(first, Traffic(0, 0, 0, 0, 0, 0))
    last = _trace(config, Step(rows, length, deep, deep, checkpointing, dtype))
    loop = _combined(lambda a, b: (b - a) / (deep - shallow), first, last)
    return StepTraffic(_combined(lambda a, each: a - shallow * each, first, loop), loop)


def compiled_pass_traffic(config: ModelConfig, length: int, rows: int = 1) -> Traffic:
    """Traffic of one loop of the core under train.compile, without checkpointing and in bfloat16.

    The graphs' kernels are those that torch's compiler plans for a CPU, whose vector code it does not write. (For an
    SM90, its plan of a forward pass of mythos_1b has 2 kernels and 2% of the bytes less.) Beside them: what the
    operators of the routed experts do, whose fused parts count as one kernel each, and what forms the weights' gradient
    after the backward passes.
    """
    step = Step(rows, length, 1, 1, "none", torch.bfloat16)
    planned: dict[bool, list[PlannedKernel]] = {}
    with fake_model(config, step) as model:
        model.recurrence.compile(backend=planning_backend(planned.__setitem__))
        # Not to the experts' weights: the operators, which are not run here, would leave the gradient for them.
        torch.autograd.grad(run_forward(model, step), [model.embedding.weight])
    experts = _expert_traffic(config, rows * length) if config.core_ffn == "moe" else Traffic(0, 0, 0, 0, 0, 0)
    figures = []
    for backward in (False, True):
        fused = [kernel.size for kernel in planned[backward] if not kernel.extern]
        calls = [
            kernel for kernel in planned[backward] if kernel.extern and "mythos.train_experts" not in kernel.operator
        ]
        figures += [len(fused), len(calls), sum(fused) / (rows * length)]
    return _combined(lambda graph, each: graph + config.core_layers * each, Traffic(*figures), experts)


def _expert_traffic(config: ModelConfig, tokens: int) -> Traffic:
    """What the operators of a layer's routed experts do in one loop of a compiled pass, of 8 loops."""
    loops, count, width, hidden = 8, config.n_experts, config.dim, config.expert_dim
    forward, backward = TrafficCounter(), TrafficCounter()
    with FakeTensorMode(), patch.object(device_choice, "groups_on_device", lambda device: True):
        shapes = ((count, width, 2 * hidden), (count, hidden, width))
        gate_up, down = (torch.empty(shape, requires_grad=True) for shape in shapes)
        weights = ExpertWeights(gate_up, down, torch.bfloat16)
        x = torch.empty(tokens, width, dtype=torch.bfloat16)
        gates, of_y = torch.empty(tokens, config.experts_per_token), torch.empty(tokens, width)
        experts = torch.zeros(tokens, config.experts_per_token, dtype=torch.int64)
        for _ in range(loops):
            with forward, forward.fused_functions():
                _, *kept = run_in_graph(x, gates, experts, weights.gate_up, weights.down, None, weights.number)
            with backward, backward.fused_functions():
                run_backward_in_graph(of_y, x, gates, *kept, weights.gate_up, weights.down, weights.number)
        with backward:
            weights.gradient.take()
    figures = [
        f for c in (forward, backward) for f in (c.kernels / loops, c.products / loops, c.bytes / loops / tokens)
    ]
    return Traffic(*figures)


def _combined(combine: Any, first: Traffic, second: Traffic) -> Traffic:
    return Traffic(*(combine(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True)))


def _trace(config: ModelConfig, step: Step) -> Traffic:
    tokens = step.rows * step.length
    with fake_model(config, step) as model:
        with TrafficCounter() as forward, forward.fused_norms():
            objective = run_forward(model, step)
        with TrafficCounter() as backward, backward.fused_norms():
            objective.backward()
    return Traffic(
        forward.kernels,
        forward.products,
        forward.bytes / tokens,
        backward.kernels,
        backward.products,
        backward.bytes / tokens,
    )


# --- from traffic to time

PRODUCT_EFFICIENCY = 0.55
"""Share of the dense bfloat16 peak that matrix products and attention are assumed to reach. The best shapes reach 0.80
on H100 and H200 and 0.78 on B200 (MAMF tables of github.com/stas00/ml-engineering). A model's shapes are not the best,
and attention reaches less: an assumption until `mythos gpu-check` has measured them."""
COMPILED_BYTES = 0.47
"""Bytes of a compiled step over those of an eager one, as `compiled_pass_traffic` counts the loops of mythos_1b, half
of them with gradient (0.44 in mythos_small). Prelude, coda and head are assumed to gain as much."""
LAUNCH_SECONDS = 5e-6
"""Time in which the host starts one eager kernel: an assumption. It counts only where the GPU waits for the host."""
OPTIMIZER_BYTES = 32
"""Per parameter and step: AdamW reads weight, gradient and two moments and writes three of them; clipping reads the
gradient once more; all float32."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a GPU for a token in training, by what they are spent on; a model of the time, not a measurement."""

    products: float
    """Matrix products and attention, recomputation included."""
    elementwise: float
    """Memory traffic of everything else, the optimizer included."""
    waiting: float
    """For the host, where it starts eager kernels more slowly than the GPU runs them."""

    @property
    def total(self) -> float:
        """All of them. Communication is left out, so this is the least that the other assumptions allow."""
        return self.products + self.elementwise + self.waiting


def step_time(
    traffic: StepTraffic,
    *,
    executed: float,
    loops: float,
    backprop: float,
    tokens: int,
    optimizer: float,
    peak: float,
    bandwidth: float,
    compiled: bool,
) -> StepTime:
    """Time of a token on one GPU of `peak` FLOP/s and `bandwidth` bytes/s.

    `executed` are its FLOPs, `loops` and `backprop` the mean loops and loops with gradient, `tokens` those of a
    micro-batch, and `optimizer` the bytes per token that the optimizer moves.
    """
    once, loop = traffic.once, traffic.loop
    moved = once.bytes_forward + once.bytes_backward + loops * loop.bytes_forward + backprop * loop.bytes_backward
    moved = moved * (COMPILED_BYTES if compiled else 1) + optimizer
    products, elementwise = executed / (PRODUCT_EFFICIENCY * peak), moved / bandwidth
    launches = sum(
        share * (getattr(part, f"kernels_{name}") + getattr(part, f"products_{name}"))
        for part, name, share in (
            (once, "forward", 1.0),
            (once, "backward", 1.0),
            (loop, "forward", loops),
            (loop, "backward", backprop),
        )
    )
    host = 0.0 if compiled else launches * LAUNCH_SECONDS / tokens
    return StepTime(products, elementwise, max(0.0, host - products - elementwise))


LOOKUPS = (torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.gather, torch.ops.aten.embedding)
"""Operations that read at most as many elements of a table as they return."""
WITHOUT_KERNEL = (torch.ops.prim.device, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty)
PRODUCTS = (torch.ops.aten.mv, torch.ops.aten.dot)
"""Products that torch.utils.flop_counter does not know."""


class TrafficCounter(TorchDispatchMode):
    """Kernels that operations launch, and bytes that those which are no matrix products read and write.

    One operation of eager torch counts as one kernel. Views and empty tensors cost nothing. A tensor that is broadcast
    counts with the elements it has in memory, and one that is changed in place is read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.products = self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        packet = operation.overloadpacket
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        held = {storage_address(x) for x in inputs}
        # torch names operations that change an argument with a trailing underscore.
        changes = packet.__name__.endswith("_") or "out" in kwargs
        is_view = not changes and all(storage_address(x) in held for x in outputs)
        if packet in WITHOUT_KERNEL or is_view:
            return result
        if packet in flop_registry or packet in FLOP_FORMULAS or packet in PRODUCTS:
            self.products += 1
            return result
        written = sum(map(_distinct_bytes, outputs))
        overwritten = [kwargs["out"]] if "out" in kwargs else args[:1] if packet is torch.ops.aten.copy_ else []
        read = [_distinct_bytes(x) for x in inputs if not any(x is other for other in overwritten)]
        if packet in LOOKUPS:
            read[0] = min(read[0], written)
        self.count(1, sum(read) + written)
        return result

    def count(self, kernels: int, size: int) -> None:
        """Add kernels and the bytes that they read and write."""
        self.kernels += kernels
        self.bytes += size

    @contextmanager
    def fused_functions(self) -> Iterator[None]:
        """Count what `device_choice.fused` compiles as one kernel, which reads its arguments once."""

        def fused(function: Any, device: torch.device) -> Any:
            def call(*arguments: Any) -> Any:
                before = self.kernels, self.products, self.bytes
                results = function(*arguments)
                self.kernels, self.products, self.bytes = before
                moved = [x for x in tree_leaves((arguments, results)) if isinstance(x, Tensor)]
                self.count(1, sum(map(_distinct_bytes, moved)))
                return results

            return call

        with patch.object(device_choice, "fused", fused):
            yield

    @contextmanager
    def fused_norms(self) -> Iterator[None]:
        """Count norms as F.rms_norm on a GPU runs them: in one kernel forward and two backward (input and weight)."""

        def normed(norm: RMSNorm, x: Tensor) -> Tensor:
            dtype = autocast_dtype(x) if norm.cast else torch.float32
            return _FusedNorm.apply(x.float(), norm.weight).to(dtype)

        with patch.object(RMSNorm, "normed", normed), patch.object(_FusedNorm, "counter", self):
            yield


class _FusedNorm(torch.autograd.Function):
    """Shapes and traffic of F.rms_norm on float32 tensors."""

    counter: TrafficCounter | None = None

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        assert _FusedNorm.counter is not None
        _FusedNorm.counter.count(1, 2 * _distinct_bytes(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        assert _FusedNorm.counter is not None
        _FusedNorm.counter.count(2, 5 * _distinct_bytes(x))
        return torch.empty_like(x), torch.empty_like(weight)


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements in memory: a dimension of stride 0 counts once."""
    sizes = (size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = 1
    for size in sizes:
        count *= size
    return count * tensor.element_size()
