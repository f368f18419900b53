"""Products in float32 by oneDNN and by torch, against double precision."""

import pytest
import torch

from mythos.model.ops import device_choice
from mythos.model.ops.matmul import float32_linear, linear, multiply


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch"])
def chosen(request, monkeypatch):
    """Either library, whatever the processor."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(
        device_choice, "float32_by_onednn", lambda device, dtype: request.param and dtype == torch.float32
    )


@pytest.mark.parametrize("turned", [False, True])
def test_products(chosen, turned):
    a, b = (torch.randn(9, 33).T, torch.randn(17, 9).T) if turned else (torch.randn(33, 9), torch.randn(9, 17))
    right = (a.double() @ b.double()).float()
    torch.testing.assert_close(multiply(a, b), right, rtol=1e-5, atol=1e-5)
    written = torch.full((40, 17), float("nan"))
    assert multiply(a, b, out=written[3:36]).data_ptr() == written[3:36].data_ptr()
    torch.testing.assert_close(written[3:36], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 8), (8, 24)])
def test_linear_and_its_gradients(chosen, inputs, outputs):
    x, weight = torch.randn(2, 5, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    gradient = torch.randn(2, 5, outputs)
    y = linear(x, weight)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), gradient)
    torch.testing.assert_close(y, torch.einsum("bsk,mk->bsm", x, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_x, torch.einsum("bsm,mk->bsk", gradient, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_weight, torch.einsum("bsm,bsk->mk", gradient, x), rtol=1e-5, atol=1e-5)


def test_autocast_decides_the_type_of_linear_and_not_of_float32_linear(chosen):
    x, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    y = float32_linear(x, weight)
    of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.dtype, of_x.dtype, of_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, x.float() @ weight.T, rtol=1e-5, atol=1e-5)
