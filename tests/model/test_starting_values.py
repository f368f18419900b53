"""Starting values: their distribution, their streams, and what a rank draws."""

from hashlib import blake2b
from math import erf, exp, pi, sqrt

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mythos.model import layers
from mythos.model.config import ModelConfig
from mythos.model.layers import random_stream, skip_numbers, truncated_normal
from mythos.model.rdt import RecurrentDepthTransformer

EXPERTS = {"dim": 32, "n_experts": 6, "expert_dim": 48, "vocab_size": 128, "core_layers": 2}


def reference(seed: int, text: str, shape: tuple[int, ...]) -> Tensor:
    """A truncated normal of fan-in 32 by the definition, in float64: uniform draws through the inverse distribution."""
    key = int.from_bytes(blake2b(f"{seed}/{text}".encode(), digest_size=16).digest(), "big")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(shape, dtype=np.float32)
    probability = torch.from_numpy(uniform).double() + 2**-25
    tail = (1 - erf(3 / sqrt(2))) / 2
    return torch.special.ndtri(tail + probability * (1 - 2 * tail)) * sqrt(2 / (5 * 32))


def test_every_expert_is_drawn_by_itself_from_its_name() -> None:
    model = RecurrentDepthTransformer(ModelConfig(**EXPERTS)).initialize(3)
    state = model.state_dict()
    for layer in range(2):
        name = f"recurrence.blocks.{layer}.ffn.gate_up"
        experts = [reference(3, f"{name}/{expert}", (32, 96)) for expert in range(6)]
        torch.testing.assert_close(state[name].double(), torch.stack(experts), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        state["embedding.weight"].double(), reference(3, "embedding.weight", (128, 32)), rtol=1e-5, atol=1e-7
    )


def test_experts_do_not_depend_on_how_many_there_are() -> None:
    few, more = (
        RecurrentDepthTransformer(ModelConfig(**{**EXPERTS, "n_experts": count})).initialize(0).state_dict()
        for count in (6, 9)
    )
    name = "recurrence.blocks.1.ffn.gate_up"
    assert torch.equal(few[name], more[name][:6])


def test_truncated_normal_is_one() -> None:
    """Mean, variance, kurtosis and extremes of two million values, against those of the distribution."""
    values = torch.empty(2**21)
    truncated_normal(10)(values, random_stream(0, "values"))
    scaled = values.double() * 5  # std sqrt(2 / 50)
    density = 2 * 3 * exp(-9 / 2) / sqrt(2 * pi) / erf(3 / sqrt(2))  # 2 c phi(c) / P, c = 3
    variance = 1 - density
    fourth = 3 * variance - 9 * density
    assert abs(scaled.mean()) < 4 * sqrt(variance / 2**21)
    assert scaled.square().mean().item() == pytest.approx(variance, rel=4e-3)
    assert scaled.pow(4).mean().item() == pytest.approx(fourth, rel=1e-2)
    assert 2.99 < scaled.max() < 3.0001 and -3.0001 < scaled.min() < -2.99


def test_streams_differ_by_seed_name_and_expert() -> None:
    streams = [
        (0, "a", None),
        (1, "a", None),
        (0, "b", None),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", 2**32),
        (2**32, "a", 0),
    ]
    first = {random_stream(*stream).bit_generator.random_raw(2).tobytes() for stream in streams}
    assert len(first) == len(streams)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns and that is not one of the model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.own:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


def test_no_tensor_is_larger_than_one_expert_or_matrix() -> None:
    config = ModelConfig(**{**EXPERTS, "n_experts": 64, "tie_embeddings": True})
    model = RecurrentDepthTransformer(config)
    matrices = max(p.numel() for p in model.parameters() if p.ndim < 3)
    with Largest(model) as largest:
        model.initialize(0)
    assert largest.elements == max(matrices, 32 * 96) < 64 * 32 * 96


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 800])
def test_skipped_numbers_are_those_that_would_have_been_drawn(count: int) -> None:
    whole = random_stream(2, "a").random(count + 20, dtype=np.float32)
    generator = random_stream(2, "a")
    skip_numbers(generator, count)
    assert np.array_equal(generator.random(20, dtype=np.float32), whole[count:])


def test_matrices_are_drawn_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(**{**EXPERTS, "attention": "gqa", "lora_rank": 3})
    expected = RecurrentDepthTransformer(config).initialize(1).state_dict()
    monkeypatch.setattr(layers, "DRAWN_AT_ONCE", 100)  # rows of 3 to 96 numbers: one row or several at a time
    model = RecurrentDepthTransformer(config)
    with Largest(model) as largest:
        model.initialize(1)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert largest.elements == 32 * 32, "the identity of the injection is not drawn"
