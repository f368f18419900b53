"""The weight of a linear map that every loop uses: cast once a step, its gradients summed in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.torch_internals import backward_pass_number


class SharedWeight:
    """A weight that is cast once to the matmuls' type, with the gradients of all loops summed in float32.

    Autocast would sum the loops' gradients in bfloat16, which is 0.2 to 0.5% off after 8 loops. (Routed experts use
    `ExpertWeights` instead, which also computes the gradient of several loops by one matmul.)

    Args:
        weight: the parameter, of any shape and type.
        dtype: type of the matmuls.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.value = weight.detach().to(dtype)
        self.sum = GradientSum()
        trained = torch.is_grad_enabled() and weight.requires_grad
        self.link = _Parameter.apply(weight, self.sum) if trained else None

    def in_pass(self) -> Tensor:
        """The weight for one pass of the loop: the same memory, with its own gradient where gradients are enabled."""
        if self.link is None or not torch.is_grad_enabled():
            return self.value
        return _InPass.apply(self.value, self.link, self.sum)


class BackwardPass:
    """Checks that gradients which wait to be collected all come from one backward pass."""

    def __init__(self) -> None:
        self._number: int | None = None
        """The pass whose gradients wait; None if none do."""

    def join(self) -> None:
        """Check the current pass before it adds or collects gradients.

        Raises RuntimeError if gradients of an earlier pass wait, because they would be added to this pass's.
        """
        number = backward_pass_number()
        if self._number not in (None, number):
            raise RuntimeError(
                "an earlier backward pass through this forward pass stopped before it reached the parameters of the "
                "loop, and its gradients would be added to this one's: ask for the gradients of the parameters in the "
                "same backward pass as for others, or run the forward pass again"
            )
        self._number = number

    def finish(self) -> None:
        """All gradients are collected."""
        self._number = None


class GradientSum:
    """The sum of gradients in float32."""

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._pass = BackwardPass()

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of any type. Raises RuntimeError if an earlier backward pass was not completed."""
        self._pass.join()
        if self._value is None:
            self._value = gradient.to(torch.float32, copy=True)
        else:
            self._value += gradient

    def take(self) -> Tensor | None:
        """Return the sum and reset it; None if nothing was added. Raises as `add`."""
        self._pass.join()
        self._pass.finish()
        total, self._value = self._value, None
        return total


class _Parameter(torch.autograd.Function):
    """Node between the parameter and the passes; its backward runs once, after the backward of every pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, total: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total, ctx.dtype = total, weight.dtype
        return weight.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_link: None) -> tuple[Tensor | None, None]:
        total = ctx.total.take()
        return None if total is None else total.to(ctx.dtype), None


class _InPass(torch.autograd.Function):
    """The weight in one pass. Its input `link` makes autograd run this backward before that of `_Parameter`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, link: Tensor, total: GradientSum) -> Tensor:
        ctx.total = total
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        ctx.total.add(gradient)
        return None, None, None
