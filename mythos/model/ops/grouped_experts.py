"""The routed experts' arithmetic: grouped matrix products, and one gradient of the weights for many loops."""

from collections.abc import Iterator
from itertools import accumulate, count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.layers import gated, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.matmul import ROWS, multiply


# An operator to torch, so that what traces a step need not look into the loop.
@torch.library.custom_op("mythos::grouped_product", mutates_args=())
def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times its matrix: x (n, K), weights (E, K, M), ends (E,) int32 -> (n, M); no autograd."""
    if device_choice.groups_on_device(x.device):
        return F.grouped_mm(x, weights, offs=ends)
    product = x.new_empty(len(x), weights.shape[2])
    for group, first, whole, last in _groups(ends):
        if whole > first:
            multiply(x[first:whole], weights[group], out=product[first:whole])
        if last > whole:
            torch.mm(x[whole:last], weights[group], out=product[whole:last])
    return product


@grouped_product.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[2])


@torch.library.custom_op("mythos::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """Each group's x^T y: x (n, K), y (n, M), ends (E,) int32 -> (E, K, M); no autograd."""
    if device_choice.groups_on_device(x.device):
        return F.grouped_mm(x.T, y, offs=ends)
    product = x.new_empty(len(ends), x.shape[1], y.shape[1])
    for group, first, whole, last in _groups(ends):
        if whole > first:
            multiply(x[first:whole].T, y[first:whole], out=product[group])
        else:
            product[group].zero_()
        if last > whole:
            product[group].addmm_(x[whole:last].T, y[whole:last])
    return product


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), x.shape[1], y.shape[1])


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Each group's number and first row, where its rows in whole multiples of ROWS end, and where all do."""
    first = 0
    for group, last in enumerate(ends.tolist()):
        yield group, first, last - (last - first) % ROWS, last
        first = last


class ExpertWeights:
    """Routed experts' weights as all loops of a step use them: cast once, with one gradient.

    Attributes:
        gate_up: (E, D, 2 H), without gradient, in the type of the products.
        down: (E, H, D), likewise.
        gradient: what the loops' backward passes add to.
        number: int64 scalar on the CPU: the key of `gradient` in `_GRADIENTS`, by which the operators of compiled
            graphs find it. Reading it does not wait for a GPU. None where the parameters get no gradient.
        link: float32 scalar, through which a backward pass finds the parameters after the last loop; None where they
            get no gradient. A pass that runs through a loop but not to the parameters (torch.autograd.grad of
            something else) leaves its part to the next one: ask for the parameters' gradient in the same pass.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
        self.gate_up, self.down = gate_up.detach().to(dtype), down.detach().to(dtype)
        self.gradient = WeightGradient(4 * (gate_up.numel() + down.numel()))
        # The graph may not hold this object, which holds the graph: memory would wait for the garbage collector.
        trained = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        self.link = _Parameters.apply(gate_up, down, self.gradient) if trained else None
        self.number = self.gradient.register() if trained else None

    def bytes_of_token(self, chosen: int) -> int:
        """Memory of the matrices of `chosen` experts."""
        return chosen * (self.gate_up[0].nbytes + self.down[0].nbytes)


class WeightGradient:
    """The gradient of experts' weights, formed by few products.

    The loops share the weights, and few tokens reach an expert in one pass. So a loop's backward pass only leaves
    behind what the gradient is made of, and the products run over the tokens of as many loops as the memory of the
    gradient itself would hold. Whatever type they are computed in, they are summed in float32.

    Args:
        room: most bytes that wait to be added up, but for one loop's.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._parts: list[_Part] = []
        self._sums: list[Tensor] = []

    def register(self) -> Tensor:
        """Enter it in `_GRADIENTS`; returns its number, an int64 scalar on the CPU."""
        number = next(_NUMBERS)
        _GRADIENTS[number] = self
        return torch.tensor(number, device="cpu")

    def add(self, part: "_Part") -> None:
        """Keep one loop's part, after adding up those kept before if there is no room beside them."""
        if self._parts and sum(held.bytes for held in (*self._parts, part)) > self.room:
            self._add_up()
        self._parts.append(part)

    def take(self) -> list[Tensor]:
        """The gradients of gate_up and down, float32; they are handed over and not kept."""
        if self._parts:
            self._add_up()
        sums, self._sums = self._sums, []
        return sums

    def _add_up(self) -> None:
        part, self._parts = _joined(self._parts), []
        new = (
            grouped_outer(part.x.index_select(0, part.tokens), part.of_gate_up, part.ends),
            grouped_outer(part.activation, part.of_y.index_select(0, part.tokens), part.ends),
        )
        if not self._sums:
            self._sums = [gradient.float() for gradient in new]
            return
        for total, gradient in zip(self._sums, new, strict=True):
            total += gradient


_NUMBERS = count()
_GRADIENTS: WeakValueDictionary[int, WeightGradient] = WeakValueDictionary()
"""Gradients of the steps under way, by number. The autograd graph keeps each alive."""


class _Part(NamedTuple):
    """What the gradient of the weights is made of, from n tokens in n k slots, which are sorted by expert."""

    x: Tensor
    """Input, (n, D)."""
    of_y: Tensor
    """Gradient of the output, (n, D)."""
    activation: Tensor
    """Input of the down-projection, (n k, H)."""
    of_gate_up: Tensor
    """Gradient of the up-projection's output, (n k, 2 H)."""
    experts: Tensor
    """Expert of each slot, (n k,) int64."""
    tokens: Tensor
    """Token of each slot, (n k,) int64."""
    ends: Tensor
    """Where each expert's slots end, (E,) int32."""

    @property
    def bytes(self) -> int:
        """Memory of all."""
        return sum(tensor.nbytes for tensor in self)


def _joined(parts: list[_Part]) -> _Part:
    """Several parts as one."""
    if len(parts) == 1:
        return parts[0]
    begins = [0, *accumulate(len(part.x) for part in parts)]
    experts, order = torch.cat([part.experts for part in parts]).sort(stable=True)
    return _Part(
        torch.cat([part.x for part in parts]),
        torch.cat([part.of_y for part in parts]),
        torch.cat([part.activation for part in parts]).index_select(0, order),
        torch.cat([part.of_gate_up for part in parts]).index_select(0, order),
        experts,
        torch.cat([part.tokens + begin for part, begin in zip(parts, begins, strict=False)])[order],
        torch.stack([part.ends for part in parts]).sum(0, dtype=torch.int32),
    )


def expert_ends(experts: Tensor, count: int) -> Tensor:
    """Where the slots of each of `count` experts end, (count,) int32; experts (n,) int64 ascending."""
    return torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True).int()


class _Parameters(torch.autograd.Function):
    """Stands before all uses of the parameters in a step: its backward pass comes once, after all of theirs."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, down: Tensor, gradient: WeightGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient = gradient
        return gate_up.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, nothing: None) -> tuple[Tensor, Tensor, None]:
        gate_up, down = ctx.gradient.take()
        return gate_up, down, None


class _RunExperts(torch.autograd.Function):
    """`run_experts`; between the passes it keeps the input and the up-projection's output alone."""

    @staticmethod
    def forward(ctx, x: Tensor, gates: Tensor, experts: Tensor, link: Tensor | None, weights: ExpertWeights) -> Tensor:
        ctx.weights, ctx.dtype = weights, x.dtype
        x = x.to(weights.gate_up.dtype)
        output, *sorted_slots = _sorted_products(x, gates, experts, weights.gate_up, weights.down)
        ctx.save_for_backward(x, gates, *sorted_slots)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, of_y: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weights: ExpertWeights = ctx.weights
        gradient = None if weights.link is None else weights.gradient
        of_x, of_gates = _backward(of_y, *ctx.saved_tensors, weights.gate_up, weights.down, gradient)
        return of_x.to(ctx.dtype), of_gates, None, None, None


def _backward(
    of_y: Tensor,
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
    """Gradients of the input, (n, D) float32, and of the gates, (n, k); `gradient` is given the weights' part.

    After the gradient of the output and the input come what `_sorted_products` returned and the weights.
    """
    tokens, ends = order // gates.shape[-1], expert_ends(experts, len(gate_up))
    of_y = of_y.to(x.dtype)
    of_activation = grouped_product(of_y.index_select(0, tokens), down.transpose(1, 2), ends)
    weight = gates.flatten()[order].unsqueeze(1)
    of_gate_up, activation, of_weight = device_choice.fused(_gating_backward, x.device)(
        of_activation, projected, weight
    )
    of_x = _summed(grouped_product(of_gate_up, gate_up.transpose(1, 2), ends), place, gates.shape)
    if gradient is not None:
        # Without its place in the graph, which would keep the graph alive where a backward pass ends half way.
        gradient.add(_Part(x.detach(), of_y, activation, of_gate_up, experts, tokens, ends))
    return of_x, of_weight[place].view_as(gates)


def _gating(projected: Tensor, weight: Tensor) -> Tensor:
    """Input of the down-projection: silu(gate) * up * weight; projected (s, 2 H), weight (s, 1) float32 -> (s, H)."""
    # Weighted before the down-projection and not after: there are fewer numbers, and nothing more to keep.
    return gated(projected).mul_(weight.to(projected.dtype))


def _gating_backward(of_activation: Tensor, projected: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `projected`, the result of `_gating` again, and the gradient of `weight`, (s,) float32."""
    gate, up = projected.chunk(2, dim=-1)
    swish = F.silu(gate)
    activation = swish * up
    of_weight = (of_activation.float() * activation).sum(1)
    weight = weight.to(projected.dtype)
    of_activation = of_activation * weight
    of_gate_up = torch.cat((torch.ops.aten.silu_backward(of_activation * up, gate), of_activation * swish), dim=1)
    return of_gate_up, activation * weight, of_weight


def _sorted_products(
    x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, (n, D) float32; then of the slots, sorted by expert: experts, slots, places, up-projections."""
    experts, order = experts.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    ends = expert_ends(experts, len(gate_up))
    projected = grouped_product(x.index_select(0, order // gates.shape[-1]), gate_up, ends)
    activation = device_choice.fused(_gating, x.device)(projected, gates.flatten()[order].unsqueeze(1))
    return _summed(grouped_product(activation, down, ends), place, gates.shape), experts, order, place, projected


def _summed(slots: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    """Add up each token's slots, which stand at `place`: (n k, D) -> (n, D) float32; `shape` is (n, k)."""
    return device_choice.fused(_sum_of_slots, slots.device)(slots, place, shape)


def _sum_of_slots(slots: Tensor, place: Tensor, shape: torch.Size) -> Tensor:
    # Not by index_add, whose sums on a GPU differ from call to call. On a CPU index_select is ten times as fast as [].
    return slots.index_select(0, place).unflatten(0, shape).sum(1, dtype=torch.float32)


def run_experts(x: Tensor, gates: Tensor, experts: Tensor, weights: ExpertWeights) -> Tensor:
    """Weighted sum of each token's chosen experts: x (n, D), gates (n, k) float32, experts (n, k) -> (n, D) float32.

    Tokens are sorted by expert on the device and multiplied by `grouped_mm`, without a loop over experts of our own;
    where torch has a grouped kernel (on GPUs bfloat16) it has none either, and nothing waits for the host.

    A graph of torch.compile holds it as one operator, forward and backward.
    """
    if torch.is_grad_enabled():
        if torch.compiler.is_compiling():
            x = x.to(weights.gate_up.dtype)
            return train_experts(x, gates, experts, weights.gate_up, weights.down, weights.link, weights.number)[0]
        with without_autocast(x):
            return _RunExperts.apply(x, gates, experts, weights.link, weights)
    x = x.to(weights.gate_up.dtype)
    if not torch.compiler.is_compiling():
        run = _run_without_gradient
    elif len(x) == 1 and device_choice.reads_in_graph(x.device, weights.bytes_of_token(experts.shape[1])):
        run = _run_token
    else:
        run = run_experts_operator
    return run(x, gates, experts, weights.gate_up, weights.down)


# The operators of compiled graphs. They compute what `_RunExperts` does, whose backward pass cannot be traced: it hands
# tensors to a Python object (`WeightGradient`). Operators take tensors only, so they look that object up by its number.
def run_in_graph(
    x: Tensor,
    gates: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    link: Tensor | None,
    number: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The result of `run_experts`, then the tensors that its backward pass needs (see `_sorted_products`).

    The last four arguments are attributes of `ExpertWeights`.
    """
    return _sorted_products(x, gates, experts, gate_up, down)


train_experts = torch.library.custom_op("mythos::train_experts", run_in_graph, mutates_args=())


@train_experts.register_fake
def _(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, link: Any, number: Any) -> Any:
    slots = experts.new_empty(experts.numel())
    projected = x.new_empty(experts.numel(), gate_up.shape[2])
    return x.new_empty(x.shape, dtype=torch.float32), slots, torch.empty_like(slots), torch.empty_like(slots), projected


def run_backward_in_graph(
    of_y: Tensor,
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
    """Gradients of x and gates, and zero for `link`, so that `_Parameters` waits for this call in every loop."""
    gradient = None
    if number is not None:
        # Copies of what is kept: the graph reuses the memory of its tensors, and the weights' gradient comes later.
        gradient = _GRADIENTS[int(number)]
        of_y, x, experts = of_y.to(x.dtype, copy=True), x.clone(), experts.clone()
    of_x, of_gates = _backward(of_y, x, gates, experts, order, place, projected, gate_up, down, gradient)
    return of_x.to(x.dtype), of_gates, of_gates.new_zeros(())


train_experts_backward = torch.library.custom_op(
    "mythos::train_experts_backward", run_backward_in_graph, mutates_args=()
)


@train_experts_backward.register_fake
def _(of_y: Tensor, x: Tensor, gates: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(gates), gates.new_empty(())


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gates, _, gate_up, down, _, number = inputs
    ctx.save_for_backward(x, gates, *output[1:], gate_up, down, number)


def _operator_backward(ctx: Any, of_y: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    of_x, of_gates, of_link = train_experts_backward(of_y, *ctx.saved_tensors)
    number = ctx.saved_tensors[-1]
    return of_x, of_gates, None, None, None, None if number is None else of_link, None


train_experts.register_autograd(_operator_backward, setup_context=_keep_for_backward)


def _run_without_gradient(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    if len(x) > 1 or device_choice.groups_on_device(x.device):
        return _sorted_products(x, gates, experts, gate_up, down)[0]
    # A single token, on a CPU: nothing to sort.
    chosen = experts[0].tolist()
    activation = gated(torch.cat([x @ gate_up[expert] for expert in chosen])).mul_(gates.T.to(x.dtype))
    products = [slot @ down[expert] for slot, expert in zip(activation.split(1), chosen, strict=True)]
    return torch.cat(products).sum(0, keepdim=True, dtype=torch.float32)


def _run_token(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    # To be compiled: then the matrices are read where they are, and not gathered.
    projected = torch.bmm(x.expand(experts.shape[1], 1, -1), gate_up[experts[0]])
    activation = gated(projected) * gates.T.unsqueeze(1).to(x.dtype)
    return torch.bmm(activation, down[experts[0]]).sum(0, dtype=torch.float32)


run_experts_operator = torch.library.custom_op("mythos::run_experts", _run_without_gradient, mutates_args=())


@run_experts_operator.register_fake
def _(x: Tensor, gates: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)
