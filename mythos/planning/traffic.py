"""Memory traffic of a training step on a GPU beside its matmuls, counted over fake tensors.

Every elementwise operation, reduction, copy and lookup reads its inputs from memory and writes its result. Matmuls,
attention and grouped matmuls are left out: arithmetic limits them, and `mythos.planning.flops` counts their FLOPs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from mythos.model.config import ModelConfig, loop_stages
from mythos.model.layers import RMSNorm, autocast_dtype
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops import device_choice
from mythos.model.ops.grouped_experts import ExpertWeights, run_backward_in_graph, run_in_graph
from mythos.planning.fake_step import FLOP_FORMULAS, Step, fake_model, run_forward
from mythos.planning.trace_cache import remembered
from mythos.torch_internals import (
    FakeTensorMode,
    PlannedKernel,
    TorchDispatchMode,
    planning_backend,
    storage_address,
    tree_leaves,
)

DEPTHS = (2, 6)
"""Loops of the two traces whose difference, divided by 4, is the cost of a loop. The gradients of experts' weights are
formed once for several loops, so the first loops of a step cost less than the mean loop."""


@dataclass(frozen=True)
class Traffic:
    """Kernels and memory traffic of one forward and one backward pass. Kernels are per micro-batch, bytes per token."""

    kernels_forward: float
    """Kernels other than matmuls and attention."""
    products_forward: float
    """Kernels of matmuls and attention."""
    bytes_forward: float
    """Bytes that `kernels_forward` read and write."""
    kernels_backward: float
    products_backward: float
    bytes_backward: float


NO_TRAFFIC = Traffic(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class StepTraffic:
    """Traffic of a micro-batch: `once` (embedding, prelude, coda, head, casts of weights), and each `loop` of the core.

    A loop without gradient costs the forward part of `loop`.
    """

    once: Traffic
    loop: Traffic

    def minus(self, share: float, larger: "StepTraffic", smaller: "StepTraffic") -> "StepTraffic":
        """This traffic with fewer bytes, by `share` of what `larger` has more than `smaller`."""

        def part(own: Traffic, of_larger: Traffic, of_smaller: Traffic) -> Traffic:
            return replace(
                own,
                bytes_forward=own.bytes_forward - share * (of_larger.bytes_forward - of_smaller.bytes_forward),
                bytes_backward=own.bytes_backward - share * (of_larger.bytes_backward - of_smaller.bytes_backward),
            )

        return StepTraffic(part(self.once, larger.once, smaller.once), part(self.loop, larger.loop, smaller.loop))


def step_traffic(config: ModelConfig, length: int, rows: int = 1, checkpointing: str = "none") -> StepTraffic:
    """Count the traffic of micro-batches of `rows` sequences of `length` tokens, with bfloat16 matmuls under autocast.

    `checkpointing` is a mode of parallel.activation_checkpointing; what it computes again counts as backward. Some of
    the work grows with the weights and not with the tokens (casts, sums of weight gradients), so the bytes per token
    fall as the micro-batch grows.
    """
    shallow, deep = DEPTHS if config.injection != "none" else (1, 1)
    first = _trace(config, Step(rows, length, shallow, shallow, checkpointing, torch.bfloat16))
    if deep == shallow:
        return StepTraffic(first, NO_TRAFFIC)
    last = _trace(config, Step(rows, length, deep, deep, checkpointing, torch.bfloat16))
    loop = _combined(lambda a, b: (b - a) / (deep - shallow), first, last)
    return StepTraffic(_combined(lambda total, each: total - shallow * each, first, loop), loop)


def compiled_pass_traffic(config: ModelConfig, length: int, rows: int = 1) -> Traffic:
    """Traffic of one loop of the core under train.compile, without checkpointing and in bfloat16.

    The kernels are those that Inductor plans for a CPU, without writing their code. (For an SM90, its plan of a forward
    pass of mythos_1b has 2 kernels and 2% of the bytes less.) Added to them are the operators of the routed experts,
    whose fused functions count as one kernel each, and the weight gradients formed after the backward passes.
    """
    step = Step(rows, length, 1, 1, "none", torch.bfloat16)
    planned: dict[bool, list[PlannedKernel]] = {}
    with fake_model(config, step) as model:
        model.recurrence.compile(backend=planning_backend(planned.__setitem__))
        # Differentiate with respect to the embedding only: the experts' operators do not run here, so the gradients of
        # experts' weights that they would leave behind do not exist.
        torch.autograd.grad(run_forward(model, step), [model.embedding.weight])
    routed = any(isinstance(module, MixtureOfExperts) for module in model.modules())
    experts = _expert_traffic(config, rows * length) if routed else NO_TRAFFIC
    figures = []
    for backward in (False, True):
        fused = [kernel.size for kernel in planned[backward] if not kernel.extern]
        calls = [
            kernel for kernel in planned[backward] if kernel.extern and "mythos.train_experts" not in kernel.operator
        ]
        figures += [len(fused), len(calls), sum(fused) / (rows * length)]
    stages = len(loop_stages(config))  # the graph runs once in each
    return _combined(lambda graph, each: stages * graph + config.core_layers * each, Traffic(*figures), experts)


def _expert_traffic(config: ModelConfig, tokens: int) -> Traffic:
    """Traffic of the operators of one layer's routed experts in one loop, mean over 8 loops of a compiled step."""
    loops, count, width, hidden = 8, config.n_experts, config.dim, config.expert_dim
    counter = TrafficCounter()
    with FakeTensorMode(), device_choice.simulated_gpu(counter.call_fused), counter:
        shapes = ((count, width, 2 * hidden), (count, hidden, width))
        gate_up, down = (torch.empty(shape, requires_grad=True) for shape in shapes)
        weights = ExpertWeights(gate_up, down, torch.bfloat16)
        x = torch.empty(tokens, width, dtype=torch.bfloat16)
        gates, of_y = torch.empty(tokens, config.experts_per_token), torch.empty(tokens, width)
        experts = torch.zeros(tokens, config.experts_per_token, dtype=torch.int64)
        counter.take()
        forward, backward = [], []
        for _ in range(loops):
            _, *sorted_slots = run_in_graph(x, gates, experts, weights.gate_up, weights.down, None, weights.number)
            forward.append(counter.take())
            slots, order, place, projected = sorted_slots
            run_backward_in_graph(
                of_y, x, gates, slots, order, place, projected, weights.gate_up, weights.down, weights.number
            )
            backward.append(counter.take())
        weights.gradient.take()
        backward.append(counter.take())
    figures = []
    for counts in (forward, backward):
        kernels, products, size = map(sum, zip(*counts, strict=True))
        figures += [kernels / loops, products / loops, size / loops / tokens]
    return Traffic(*figures)


def _combined(combine: Callable[[float, float], float], first: Traffic, second: Traffic) -> Traffic:
    return Traffic(*(combine(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True)))


@remembered(lambda value: Traffic(**value))
def _trace(config: ModelConfig, step: Step) -> Traffic:
    tokens = step.rows * step.length
    with fake_model(config, step) as model, TrafficCounter() as counter:
        counter.fuse_norms(model.modules())
        objective = run_forward(model, step)
        kernels, products, size = counter.take()
        objective.backward()
        kernels_backward, products_backward, size_backward = counter.take()
    return Traffic(kernels, products, size / tokens, kernels_backward, products_backward, size_backward / tokens)


# --- from traffic to time

PRODUCT_EFFICIENCY = 0.55
"""Share of the dense bfloat16 peak that matmuls and attention are assumed to reach. The best shapes reach 0.80 on H100
and H200 and 0.78 on B200 (MAMF tables of github.com/stas00/ml-engineering). A model's shapes are not the best, and
attention reaches less: an assumption until `mythos gpu-check` has measured them."""
COMPILED_BYTES = 0.47
"""Bytes of a compiled step over those of an eager one. `compiled_pass_traffic` gives this ratio for the loops of
mythos_1b, half of them with gradient (0.44 for mythos_small). Prelude, coda and head are assumed to gain as much."""
LAUNCH_SECONDS = 5e-6
"""Time that the host takes to launch an eager kernel (an assumption). It counts only if the GPU waits for the host."""
OPTIMIZER_BYTES = 32
"""Per parameter and step, all float32: AdamW reads weight, gradient and two moments and writes all but the gradient;
clipping reads the gradient once more."""


@dataclass(frozen=True)
class StepTime:
    """GPU seconds per token of training, by what they are spent on: a model of the time, not a measurement."""

    products: float
    """Matmuls and attention, recomputation included."""
    elementwise: float
    """Memory traffic of all other kernels, the optimizer included."""
    waiting: float
    """Idle time, if the host launches eager kernels more slowly than the GPU runs them."""
    communication: float = 0.0
    """Collectives, none of which is assumed to overlap with computation."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.products + self.elementwise + self.waiting + self.communication


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
    compiled_loop: bool | None = None,
) -> StepTime:
    """Model the time of a token on one GPU of `peak` FLOP/s and `bandwidth` bytes/s, without communication.

    `executed` is FLOPs per token, `loops` and `backprop` are mean loops and mean loops with gradient, `tokens` is the
    size of a micro-batch, and `optimizer` is bytes per token that the optimizer moves. `compiled_loop` is given if the
    core is not compiled like the rest.
    """
    once, loop = traffic.once, traffic.loop
    moved = launches = 0.0
    for part, whether, name, share in (
        (once, compiled, "forward", 1.0),
        (once, compiled, "backward", 1.0),
        (loop, compiled if compiled_loop is None else compiled_loop, "forward", loops),
        (loop, compiled if compiled_loop is None else compiled_loop, "backward", backprop),
    ):
        moved += share * getattr(part, f"bytes_{name}") * (COMPILED_BYTES if whether else 1)
        kernels = getattr(part, f"kernels_{name}") + getattr(part, f"products_{name}")
        launches += 0.0 if whether else share * kernels
    products, elementwise = executed / (PRODUCT_EFFICIENCY * peak), (moved + optimizer) / bandwidth
    host = launches * LAUNCH_SECONDS / tokens
    return StepTime(products, elementwise, max(0.0, host - products - elementwise))


# --- counting

LOOKUPS = (torch.ops.aten.index_select, torch.ops.aten.index, torch.ops.aten.gather, torch.ops.aten.embedding)
"""Operators that read at most as many elements of a table as they return."""
WITHOUT_KERNEL = (torch.ops.prim.device, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty)
PRODUCTS = (torch.ops.aten.mv, torch.ops.aten.dot)
"""Matmuls that torch.utils.flop_counter does not know."""


class TrafficCounter(TorchDispatchMode):
    """Counts the kernels that operators launch, and the bytes that all kernels except matmuls read and write.

    One eager operator counts as one kernel. Views and empty tensors cost nothing. A broadcast tensor counts with the
    elements it has in memory; a tensor that is changed in place is read and written.
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
        input_storages = {storage_address(x) for x in inputs}
        # The names of operators that change an argument end in an underscore.
        changes = packet.__name__.endswith("_") or "out" in kwargs
        is_view = not changes and all(storage_address(x) in input_storages for x in outputs)
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
        """Add kernels, and bytes that they read and write."""
        self.kernels += kernels
        self.bytes += size

    def take(self) -> tuple[int, int, int]:
        """Return kernels, matmul kernels and bytes since the last call."""
        counts = self.kernels, self.products, self.bytes
        self.kernels = self.products = self.bytes = 0
        return counts

    def call_fused(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that a GPU runs as one kernel, which reads its arguments and writes its results once."""
        before = self.kernels, self.products, self.bytes
        results = function(*arguments)
        self.kernels, self.products, self.bytes = before
        moved = [x for x in tree_leaves((arguments, results)) if isinstance(x, Tensor)]
        self.count(1, sum(map(_distinct_bytes, moved)))
        return results

    def fuse_norms(self, modules: Iterable[nn.Module]) -> None:
        """Count these modules' norms as F.rms_norm runs on a GPU: one kernel forward, two backward (input, weight).

        The modules can be used for counting only from then on.
        """
        for module in modules:
            if isinstance(module, RMSNorm):
                module.normed = _CountedNorm(module, self)  # type: ignore[method-assign]


class _CountedNorm:
    """Replaces `RMSNorm.normed` of one module, whose result has its shape and type but no values."""

    def __init__(self, norm: RMSNorm, counter: TrafficCounter) -> None:
        self.norm, self.counter = norm, counter

    def __call__(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x) if self.norm.cast else torch.float32
        return _FusedNorm.apply(x.float(), self.norm.weight, self.counter).to(dtype)


class _FusedNorm(torch.autograd.Function):
    """Shapes and traffic of F.rms_norm on float32 tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counter: TrafficCounter) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counter = counter
        counter.count(1, 2 * _distinct_bytes(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        ctx.counter.count(2, 5 * _distinct_bytes(x))
        return torch.empty_like(x), torch.empty_like(weight), None


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements in memory: a dimension of stride 0 counts once."""
    sizes = (size if stride else min(size, 1) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return math.prod(sizes) * tensor.element_size()
