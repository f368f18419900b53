"""The routed experts' arithmetic: grouped matmuls, and one gradient of the weights for many loops."""

from collections.abc import Callable, Iterator
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.layers import gated, gated_backward, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.matmul import ROWS, multiply
from mythos.model.ops.shared_weight import BackwardPass

if TYPE_CHECKING:
    from mythos.model.ops.shared_experts import SliceWeights


# Custom operators, so that tracing a step does not enter the loop.
@torch.library.custom_op("mythos::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times its matrix: x (n, K), weights (E, K, M), ends (E,) int32 -> (n, M); no autograd."""
    if len(x) == 0:  # a rank that no token reached, under expert parallelism
        return x.new_empty(0, weights.shape[2])
    if device_choice.groups_on_device(x.device):
        return F.grouped_mm(x, weights, offs=ends)
    product = x.new_empty(len(x), weights.shape[2])
    for group, first, multiple_end, last in _groups(ends):
        if multiple_end > first:
            multiply(x[first:multiple_end], weights[group], out=product[first:multiple_end])
        if last > multiple_end:
            torch.mm(x[multiple_end:last], weights[group], out=product[multiple_end:last])
    return product


@grouped_product.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[2])


@torch.library.custom_op("mythos::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Each group's x^T y: x (n, K), y (n, M), ends (E,) int32 -> (E, K, M); no autograd."""
    if len(x) == 0:
        return x.new_zeros(len(ends), x.shape[1], y.shape[1])
    if device_choice.groups_on_device(x.device):
        return F.grouped_mm(x.T, y, offs=ends)
    product = x.new_empty(len(ends), x.shape[1], y.shape[1])
    for group, first, multiple_end, last in _groups(ends):
        if multiple_end > first:
            multiply(x[first:multiple_end].T, y[first:multiple_end], out=product[group])
        else:
            product[group].zero_()
        if last > multiple_end:
            product[group].addmm_(x[multiple_end:last].T, y[multiple_end:last])
    return product


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.shape[1], y.shape[1])


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Each group's index, its first row, the end of its largest multiple of ROWS rows, and the end of all its rows."""
    first = 0
    for group, last in enumerate(ends.tolist()):
        yield group, first, last - (last - first) % ROWS, last
        first = last


class ExpertWeights:
    """Routed experts' weights for all loops of a step: cast once, with one gradient.

    A backward pass that runs through a loop but not to the parameters (torch.autograd.grad of something else) makes a
    later one through the same forward pass raise RuntimeError: its share of the gradient cannot be told apart.

    Attributes:
        gate_up: (E, D, 2 H), without gradient, in the type of the matmuls.
        down: (E, H, D), likewise.
        gradient: collects the gradients of the loops.
        number: int64 scalar on the CPU, the key of `gradient` in `_GRADIENTS` for the operators of compiled graphs.
            Reading it does not wait for a GPU. None if the parameters get no gradient.
        link: float32 scalar that connects the loops to the parameters in the autograd graph, so that the backward pass
            reaches the parameters after the last loop; None if they get no gradient.
        shared: this rank's slice of the block's shared experts; None if they are not divided.
    """

    shared: "SliceWeights | None" = None

    def __init__(self, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
        self.gate_up, self.down = gate_up.detach().to(dtype), down.detach().to(dtype)
        self.gradient = WeightGradient(4 * (gate_up.numel() + down.numel()))
        # The graph must not reference this object, which references the graph: a cycle keeps memory until the garbage
        # collector runs.
        trained = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        self.link = ParameterLink.apply(gate_up, down, self.gradient) if trained else None
        self.number = self.gradient.register() if trained else None

    def bytes_of_token(self, chosen: int) -> int:
        """Bytes of the matrices of `chosen` experts."""
        return chosen * (self.gate_up[0].nbytes + self.down[0].nbytes)


class WeightGradient:
    """The gradient of experts' weights, computed by few matmuls.

    The loops share the weights, and few tokens reach an expert in one pass. So the backward of a loop only stores the
    factors of the gradient. The matmuls then run over the tokens of as many loops as fit into `room`. Whatever type
    they are computed in, results are summed in float32.

    Args:
        room: most bytes of stored factors; a single loop's may be more.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._factors: list[_Factors] = []
        self._sums: list[Tensor] = []
        self._pass = BackwardPass()

    def register(self) -> Tensor:
        """Enter this object in `_GRADIENTS`; return its number, an int64 scalar on the CPU."""
        number = next(_NUMBERS)
        _GRADIENTS[number] = self
        return torch.tensor(number, device="cpu")

    def add(self, factors: "_Factors") -> None:
        """Store one loop's factors; multiply those stored before first if there is no room for both.

        Raises RuntimeError if an earlier backward pass was not completed.
        """
        self._pass.join()
        if self._factors and sum(stored.bytes for stored in (*self._factors, factors)) > self.room:
            self._multiply()
        self._factors.append(factors)

    def take(self) -> list[Tensor]:
        """Return the gradients of gate_up and down, float32, and reset them. Raises as `add`."""
        self._pass.join()
        self._pass.finish()
        if self._factors:
            self._multiply()
        sums, self._sums = self._sums, []
        return sums

    def _multiply(self) -> None:
        factors, self._factors = _joined(self._factors), []
        gradients = (
            grouped_outer(factors.x.index_select(0, factors.tokens), factors.grad_gate_up, factors.ends),
            grouped_outer(factors.activation, factors.grad_y.index_select(0, factors.tokens), factors.ends),
        )
        if not self._sums:
            self._sums = [gradient.float() for gradient in gradients]
            return
        for total, gradient in zip(self._sums, gradients, strict=True):
            total += gradient


_NUMBERS = count()
_GRADIENTS: WeakValueDictionary[int, WeightGradient] = WeakValueDictionary()
"""Gradients of the steps under way, by number. The autograd graph keeps each alive."""


class _Factors(NamedTuple):
    """Factors of the weights' gradient, for N tokens and their s slots, which are sorted by expert."""

    x: Tensor
    """Input, (N, D)."""
    grad_y: Tensor
    """Gradient of the output, (N, D)."""
    activation: Tensor
    """Input of the down-projection, (s, H)."""
    grad_gate_up: Tensor
    """Gradient of the up-projection's output, (s, 2 H)."""
    experts: Tensor
    """Expert of each slot, (s,) int64."""
    tokens: Tensor
    """Token of each slot, (s,) int64."""
    ends: Tensor
    """End of each expert's slots, (E,) int32."""

    @property
    def bytes(self) -> int:
        """Memory of all factors."""
        return sum(tensor.nbytes for tensor in self)


def _joined(parts: list[_Factors]) -> _Factors:
    """Concatenate the factors of several loops and sort their slots by expert."""
    if len(parts) == 1:
        return parts[0]
    begins = [0, *accumulate(len(part.x) for part in parts)]
    experts, order = torch.cat([part.experts for part in parts]).sort(stable=True)
    return _Factors(
        torch.cat([part.x for part in parts]),
        torch.cat([part.grad_y for part in parts]),
        torch.cat([part.activation for part in parts]).index_select(0, order),
        torch.cat([part.grad_gate_up for part in parts]).index_select(0, order),
        experts,
        torch.cat([part.tokens + begin for part, begin in zip(parts, begins, strict=False)])[order],
        torch.stack([part.ends for part in parts]).sum(0, dtype=torch.int32),
    )


def expert_ends(experts: Tensor, count: int) -> Tensor:
    """End of the slots of each of `count` experts, (count,) int32; experts (n,) int64 ascending."""
    return torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True).int()


class TakenOnce(Protocol):
    """Collects the gradient of two weights over the loops of a step."""

    def take(self) -> list[Tensor]:
        """Return both gradients, float32, and reset them."""
        ...


class ParameterLink(torch.autograd.Function):
    """Node between the parameters and their uses in a step; its backward runs once, after the backward of every use."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor, gradient: TakenOnce) -> Tensor:
        """A scalar that the loops depend on."""
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return gate_up.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: None) -> tuple[Tensor, Tensor, None]:
        """The gradients that the loops have left."""
        gate_up, down = ctx.gradient.take()
        return gate_up, down, None


class _ExpertProjections(torch.autograd.Function):
    """The up-projections of `run_experts` outside of compiled graphs, and the backward pass of all of it.

    Saves only the input and the up-projections, and hands them to `call`. Returns a tensor without values, of the
    shape of the output, for `_ExpertOutput`. So a recomputation, which ends with the last tensor that is saved, need
    not compute the output.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gates: Tensor, experts: Tensor, link: Tensor | None, call: "_ExpertCall"
    ) -> Tensor:
        weights = ctx.weights = call.weights
        ctx.dtype = x.dtype
        x = x.to(weights.gate_up.dtype)
        call.sorted = _sorted_projections(x, experts, weights.gate_up, call.slots)
        call.gates = gates
        ctx.save_for_backward(x, gates, *call.sorted)
        return without_values(x.shape, torch.float32, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weights: ExpertWeights = ctx.weights
        gradient = None if weights.link is None else weights.gradient
        x, gates, experts, order, place, projected = ctx.saved_tensors
        grad_x, grad_gates = _backward(
            grad_y, x, gates, experts, order, place, projected, weights.gate_up, weights.down, gradient
        )
        return grad_x.to(ctx.dtype), grad_gates, None, None, None


class _ExpertOutput(torch.autograd.Function):
    """The output of `run_experts`, (N, D) float32; saves nothing."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, call: "_ExpertCall") -> Tensor:
        assert call.sorted is not None and call.gates is not None, "finished once"
        output = _products(call.gates, call.sorted, call.weights.down)
        call.sorted = call.gates = None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y, None  # `_ExpertProjections` goes on


class _ExpertCall:
    """What `_ExpertProjections` leaves to `_ExpertOutput`."""

    def __init__(self, weights: ExpertWeights, slots: int | None) -> None:
        self.weights, self.slots = weights, slots
        self.gates: Tensor | None = None
        self.sorted: _Sorted | None = None


def _backward(
    grad_y: Tensor,
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    order: Tensor,
    place: Tensor,
    projected: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gradient: WeightGradient | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input, (N, D) float32, and of the gates, (N, k); adds the weights' factors to `gradient`.

    `experts` to `projected` are those of `_Sorted`.
    """
    tokens, ends = order // gates.shape[-1], expert_ends(experts, len(gate_up))
    grad_y = grad_y.to(x.dtype)
    grad_activation = grouped_product(grad_y.index_select(0, tokens), down.transpose(1, 2), ends)
    weight = gates.flatten()[order].unsqueeze(1)
    grad_gate_up, activation, grad_weight = device_choice.fused(_gating_backward, x.device)(
        grad_activation, projected, weight
    )
    grad_x = sum_slots(grouped_product(grad_gate_up, gate_up.transpose(1, 2), ends), place, gates.shape)
    if gradient is not None:
        # Detached: if the backward pass fails half way, the stored factors must not keep the graph alive.
        gradient.add(_Factors(x.detach(), grad_y, activation, grad_gate_up, experts, tokens, ends))
    return grad_x, _at(grad_weight, place).view_as(gates)


def _gating(projected: Tensor, weight: Tensor) -> Tensor:
    """Input of the down-projection: silu(gate) * up * weight; projected (s, 2 H), weight (s, 1) float32 -> (s, H)."""
    # Apply the gate's weight before the down-projection: there are fewer numbers, and nothing more to save.
    return gated(projected).mul_(weight.to(projected.dtype))


def _gating_backward(grad_activation: Tensor, projected: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `projected`, the recomputed result of `_gating`, and the gradient of `weight`, (s,) float32."""
    factor = weight.to(projected.dtype)
    grad_projected, activation = gated_backward(grad_activation * factor, projected)
    grad_weight = (grad_activation.float() * activation).sum(1)
    return grad_projected, activation * factor, grad_weight


class _Sorted(NamedTuple):
    """Slots sorted by expert, s of them, and their up-projections."""

    experts: Tensor
    """Expert of each slot, (s,) int64."""
    order: Tensor
    """Its index before sorting, (s,) int64."""
    place: Tensor
    """The inverse of that order, (N k,) int64; s or more for choices that are left out."""
    projected: Tensor
    """(s, 2 H)."""


def _sorted_projections(x: Tensor, experts: Tensor, gate_up: Tensor, slots: int | None = None) -> _Sorted:
    ids, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ids, order = ids[:slots], order[:slots]
    tokens = order // experts.shape[-1]
    projected = grouped_product(x.index_select(0, tokens), gate_up, expert_ends(ids, len(gate_up)))
    return _Sorted(ids, order, place, projected)


def _products(gates: Tensor, slots: _Sorted, down: Tensor) -> Tensor:
    """Output (N, D) float32 of gates (N, k) and the up-projections."""
    weight = gates.flatten()[slots.order].unsqueeze(1)
    activation = device_choice.fused(_gating, slots.projected.device)(slots.projected, weight)
    results = grouped_product(activation, down, expert_ends(slots.experts, len(down)))
    return sum_slots(results, slots.place, gates.shape)


def sum_slots(slots: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """Sum each token's slots, found at `place` (N k,): (s, D) -> (N, D) float32; `shape` is (N, k).

    A place of s or more adds nothing.
    """
    return device_choice.fused(_sum_of_slots, slots.device)(slots, place, shape)


def _sum_of_slots(slots: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    # Not index_add, whose sums on a GPU differ from call to call.
    return _at(slots, place).unflatten(0, shape).sum(1, dtype=torch.float32)


def _at(slots: Tensor, place: Tensor) -> Tensor:
    """The slots at `place` (n,), or zeros if it is beyond the last: (s, ...) -> (n, ...)."""
    # On a CPU index_select is ten times as fast as [].
    if len(slots) == len(place):
        return slots.index_select(0, place)
    beyond = (place >= len(slots)).view(-1, *[1] * (slots.ndim - 1))
    return slots.index_select(0, place.clamp(max=len(slots) - 1)).masked_fill(beyond, 0)


def run_experts(x: Tensor, gates: Tensor, experts: Tensor, weights: ExpertWeights, slots: int | None = None) -> Tensor:
    """Weighted sum of each token's chosen experts: x (N, D), gates (N, k) float32, experts (N, k) -> (N, D) float32.

    A choice of E, the number of experts, is left out. `slots`: how many choices are not; None = all N k. Graphs of
    torch.compile take None only.

    Tokens are sorted by expert on the device. On a GPU `grouped_mm` multiplies all groups; in bfloat16 on SM90 and
    SM100 it is one kernel, without a loop over experts and without waiting for the host.

    In a graph of torch.compile this is one operator, forward and backward.
    """
    return start_experts(x, gates, experts, weights, slots)()


def start_experts(
    x: Tensor, gates: Tensor, experts: Tensor, weights: ExpertWeights, slots: int | None = None
) -> Callable[[], Tensor]:
    """The first part of `run_experts`, and a function for the rest.

    If nothing that is computed in between or after it is saved for a backward pass, a recomputation ends before the
    rest: a third of the FLOPs.
    """
    if torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            assert slots is None, "under expert parallelism the core is not compiled"
            x = x.to(weights.gate_up.dtype)
            y = train_experts(x, gates, experts, weights.gate_up, weights.down, weights.link, weights.number)[0]
            return lambda: y
        with without_autocast(x):
            call = _ExpertCall(weights, slots)
            handle = _ExpertProjections.apply(x, gates, experts, weights.link, call)
            return lambda: _ExpertOutput.apply(handle, call)
    x = x.to(weights.gate_up.dtype)
    if slots is not None:
        return lambda: _products(gates, _sorted_projections(x, experts, weights.gate_up, slots), weights.down)
    if not torch.compiler.is_compiling():
        run = _run_without_gradient
    elif len(x) == 1 and device_choice.reads_in_graph(x.device, weights.bytes_of_token(experts.shape[1])):
        run = _run_token
    else:
        run = run_experts_operator
    return lambda: run(x, gates, experts, weights.gate_up, weights.down)


def without_values(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that takes no memory: all its elements are one zero."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


# The operators of compiled graphs. They compute the same as `_ExpertProjections` and `_ExpertOutput`, whose backward
# pass cannot be traced because it passes tensors to a Python object (`WeightGradient`). Operators take tensors only and
# look that object up by number.
def run_in_graph(
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    link: Tensor | None,
    number: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result of `run_experts`, and the tensors that its backward pass needs: those of `_Sorted`.

    The last four arguments are attributes of `ExpertWeights`; `link` and `number` only enter the autograd graph.
    """
    slots = _sorted_projections(x, experts, gate_up)
    return _products(gates, slots, down), *slots


train_experts = torch.library.custom_op("mythos::train_experts", run_in_graph, mutates_args=())


@train_experts.register_fake
def _(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, link: Any, number: Any) -> Any:
    slots = experts.new_empty(experts.numel())
    projected = x.new_empty(experts.numel(), gate_up.shape[2])
    return x.new_empty(x.shape, dtype=torch.float32), slots, torch.empty_like(slots), torch.empty_like(slots), projected


def run_backward_in_graph(
    grad_y: Tensor,
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    order: Tensor,
    place: Tensor,
    projected: Tensor,
    gate_up: Tensor,
    down: Tensor,
    number: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and gates, and zero for `link`, so that `ParameterLink` waits for this call in every loop."""
    gradient = None
    if number is not None:
        # Copy the factors: the graph reuses the memory of its tensors before the weights' gradient is computed.
        gradient = _GRADIENTS[int(number)]
        grad_y, x, experts = grad_y.to(x.dtype, copy=True), x.clone(), experts.clone()
    grad_x, grad_gates = _backward(grad_y, x, gates, experts, order, place, projected, gate_up, down, gradient)
    return grad_x.to(x.dtype), grad_gates, grad_gates.new_zeros(())


train_experts_backward = torch.library.custom_op(
    "mythos::train_experts_backward", run_backward_in_graph, mutates_args=()
)


@train_experts_backward.register_fake
def _(grad_y: Tensor, x: Tensor, gates: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gates), gates.new_empty(())


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gates, _, gate_up, down, _, number = inputs
    ctx.save_for_backward(x, gates, *output[1:], gate_up, down, number)


def _operator_backward(ctx: Any, grad_y: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    grad_x, grad_gates, grad_link = train_experts_backward(grad_y, *ctx.saved_tensors)
    number = ctx.saved_tensors[-1]
    return grad_x, grad_gates, None, None, None, None if number is None else grad_link, None


train_experts.register_autograd(_operator_backward, setup_context=_keep_for_backward)


def _run_without_gradient(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    if len(x) != 1 or device_choice.groups_on_device(x.device):
        return _products(gates, _sorted_projections(x, experts, gate_up), down)
    # A single token on a CPU needs no sorting.
    chosen = experts[0].tolist()
    activation = gated(torch.cat([x @ gate_up[expert] for expert in chosen])).mul_(gates.T.to(x.dtype))
    products = [slot @ down[expert] for slot, expert in zip(activation.split(1), chosen, strict=True)]
    return torch.cat(products).sum(0, keepdim=True, dtype=torch.float32)


def _run_token(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    # For compiled code, which reads the chosen experts' matrices in place instead of gathering them.
    projected = torch.bmm(x.expand(experts.shape[1], 1, -1), gate_up[experts[0]])
    activation = gated(projected) * gates.T.unsqueeze(1).to(x.dtype)
    return torch.bmm(activation, down[experts[0]]).sum(0, dtype=torch.float32)


run_experts_operator = torch.library.custom_op("mythos::run_experts", _run_without_gradient, mutates_args=())


@run_experts_operator.register_fake
def _(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)
