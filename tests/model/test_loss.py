"""The head's cross-entropy in pieces, against the whole."""

import pytest
import torch
import torch.nn.functional as F

from mythos.model import IGNORE_INDEX, loss
from mythos.model.loss import cross_entropies, summed_cross_entropy


def random_inputs(
    rows: int = 150, dim: int = 16, vocabulary: int = 96
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, rows // 2, dim, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (2, rows // 2), generator=generator)
    targets[0, ::7] = IGNORE_INDEX
    return hidden, weight, targets


def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view_as(targets)


@pytest.fixture(params=[1, 2**40], ids=["pieces of 64", "one piece"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.LOGIT_BYTES, "cpu", request.param)


@pytest.mark.usefixtures("pieces")
def test_equals_the_whole_with_gradients() -> None:
    hidden, weight, targets = random_inputs()
    (whole(hidden, weight, targets).sum() / 7).backward()
    expected = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    total = summed_cross_entropy(hidden, weight, targets)
    (total / 7).backward()
    torch.testing.assert_close(total, whole(hidden, weight, targets).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close((hidden.grad, weight.grad), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("pieces")
def test_each_target_and_without_gradient() -> None:
    hidden, weight, targets = random_inputs()
    expected = whole(hidden, weight, targets)
    torch.testing.assert_close(cross_entropies(hidden, weight, targets), expected.detach(), rtol=1e-5, atol=1e-5)
    assert (cross_entropies(hidden, weight, targets)[0, ::7] == 0).all()
    with torch.no_grad():
        total = summed_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(total, expected.detach().sum(), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("pieces")
def test_bfloat16_products_but_a_float32_sum() -> None:
    hidden, weight, targets = random_inputs(rows=1000, vocabulary=512)
    # Values that bfloat16 holds exactly: what is left is the rounding of the logits, which the whole has as well.
    hidden, weight = (tensor.detach().bfloat16().float().requires_grad_() for tensor in (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = whole(hidden, weight, targets).sum()
        total = summed_cross_entropy(hidden, weight, targets)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-5), "bfloat16 would be off by up to 4e-3"
    expected.backward()
    wanted, weight.grad = weight.grad, None
    total.backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - wanted).norm() < 5e-3 * wanted.norm()


def test_what_is_masked_or_frozen_does_not_count() -> None:
    hidden, weight, targets = random_inputs()
    expected = summed_cross_entropy(hidden, weight, targets).item()
    broken = hidden.detach().clone()
    broken[0, ::7] = float("nan")  # where there is no target
    assert summed_cross_entropy(broken.requires_grad_(), weight, targets).item() == pytest.approx(expected, rel=1e-5)
    whole(hidden, weight, targets).sum().backward()
    wanted, hidden.grad = hidden.grad, None
    summed_cross_entropy(hidden, weight.detach(), targets).backward()
    torch.testing.assert_close(hidden.grad, wanted, rtol=1e-5, atol=1e-5)
    assert not summed_cross_entropy(hidden.detach(), weight.detach(), targets).requires_grad


def test_no_target_at_all_and_only_one_backward_pass() -> None:
    hidden, weight, targets = random_inputs()
    total = summed_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    total.backward()
    assert total == 0 and (weight.grad == 0).all() and (hidden.grad == 0).all()
    total = summed_cross_entropy(hidden, weight, targets)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
