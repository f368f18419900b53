"""Sampling compared with transformers' logits processors, and draws with their probabilities."""

from math import log

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mythos.generation.sampling import Sampling, uniforms

VOCABULARY = 50
PROMPTS = torch.tensor([[1, 2, 3, 2], [4, 4, 4, 49], [7, 8, 9, 10]])

SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1.7, top_k=5),
    Sampling(temperature=1.0, top_p=0.5),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=1.3, min_p=0.2),
    Sampling(temperature=1.0, repetition_penalty=1.8),
    Sampling(temperature=0.9, top_k=20, top_p=0.7, min_p=0.1, repetition_penalty=1.4),
    Sampling(temperature=2.0, top_k=3, top_p=0.01),
]


def logits() -> Tensor:
    return torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 2


def seen() -> Tensor:
    return torch.zeros(3, VOCABULARY, dtype=torch.bool).scatter_(1, PROMPTS, True)


def published(sampling: Sampling) -> Tensor:
    """Probabilities of every id by transformers' sampler."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(PROMPTS, logits()).double().softmax(-1)


def test_the_lowest_temperatures_take_the_likeliest_token() -> None:
    """Quotients by them are not finite."""
    for temperature in (5e-324, 1e-300, 1e-30):
        drawn = Sampling(temperature=temperature).draw(logits(), torch.full((3,), 0.9, dtype=torch.float64))
        assert drawn.tolist() == logits().argmax(-1).tolist()


@pytest.mark.parametrize("penalty", [1e-320, 1e-10, 1e10, float("inf"), float("nan")])
def test_penalties_that_overflow_are_refused(penalty: float) -> None:
    with pytest.raises(ValueError, match=r"repetition penalty: got .*; allowed: 1e-09 to 1e"):
        Sampling(repetition_penalty=penalty)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_every_id_is_drawn_as_often_as_published_samplers_do(sampling: Sampling) -> None:
    count = 4000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row, expected in enumerate(published(sampling)):
        mask = seen()[row].expand(count, -1) if sampling.repetition_penalty != 1 else None
        drawn = sampling.draw(logits()[row].expand(count, -1), grid, mask)
        observed = drawn.bincount(minlength=VOCABULARY) / count
        torch.testing.assert_close(observed.double(), expected, rtol=0, atol=1.1 / count)
        assert set(drawn.tolist()) <= set(expected.nonzero().flatten().tolist())


def test_greedy_is_the_likeliest_after_the_penalty() -> None:
    values = torch.tensor([[3.0, 2.0, -1.0], [-1.0, -1.1, -3.0]])
    mask = torch.tensor([[True, False, False], [True, False, False]])
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert greedy.draw(values, torch.zeros(2), mask).tolist() == [1, 1]
    assert greedy.draw(values, torch.zeros(2)).tolist() == [0, 0]


def test_ends_of_the_unit_interval_stay_among_what_is_kept() -> None:
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    values = logits()[:1].expand(2, -1)
    best = values[0].argsort(descending=True).tolist()
    assert Sampling(temperature=1.0, top_k=4).draw(values, ends).tolist() == [best[0], best[3]]
    assert Sampling(temperature=1.0, top_p=1e-9).draw(values, ends).tolist() == [best[0]] * 2
    assert Sampling(temperature=1e-4).draw(values, ends).tolist() == [best[0]] * 2


def test_the_tail_of_a_large_vocabulary_is_drawn() -> None:
    """With 2,000,000 ids that share 1%, a float32 sum would never draw most of them."""
    logits = torch.zeros(1, 2_000_001)
    logits[0, 0] = log(99 * 2_000_000)
    for share in (0.123456, 0.5, 0.999):
        place = torch.tensor([0.99 + 0.01 * share], dtype=torch.float64)
        drawn = Sampling(temperature=1.0).draw(logits, place).item()
        assert drawn == pytest.approx(1 + share * 2_000_000, abs=2)


def test_uniforms_depend_on_seed_and_number_alone() -> None:
    values = uniforms([5, 0, 2**40], 100)
    assert values.shape == (3, 100) and values.dtype == torch.float64
    assert torch.equal(uniforms([2**40], 100)[0], values[2])
    assert torch.equal(uniforms([5, 7], 40)[0], values[0, :40])
    assert not torch.equal(uniforms([2**40 + 2**33], 100)[0], values[2]), "all bits of a seed count"
    many = uniforms([1], 20_000)[0]
    assert many.min() >= 0 and many.max() < 1
    torch.testing.assert_close(many.histc(10, 0, 1) / 20_000, torch.full((10,), 0.1).double(), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="seed: got -1"):
        uniforms([3, -1], 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1; allowed: at least 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_k": 0}, "top-k: got 0; allowed: at least 1"),
        ({"top_p": 0.0}, "top-p: got 0.0; allowed: above 0 and at most 1"),
        ({"top_p": 1.1}, "top-p: got 1.1"),
        ({"min_p": 0.0}, "min-p: got 0.0"),
        ({"min_p": 2}, "min-p: got 2"),
        ({"min_p": float("nan")}, "min-p: got nan"),
        ({"repetition_penalty": 0.0}, "repetition penalty: got 0.0; allowed: 1e-09 to"),
        ({"repetition_penalty": 1e10}, "repetition penalty: got 10000000000.0; allowed: 1e-09 to"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_more_ids_than_there_are_cannot_be_kept() -> None:
    Sampling(top_k=VOCABULARY).check_vocabulary(VOCABULARY)
    with pytest.raises(ValueError, match="top-k: got 51; allowed: at most the vocabulary, 50"):
        Sampling(top_k=51).check_vocabulary(VOCABULARY)
