"""Generation against the model called by hand, token by token."""

import pytest
import torch
from torch import Tensor

from mythos.model.generate import generate
from mythos.model.rdt import RecurrentDepthTransformer

PROMPT = torch.tensor([[5, 17, 99]])


def by_hand(model: RecurrentDepthTransformer, count: int, loops: int, context: int) -> Tensor:
    """The likeliest token after the last `context` ids, `count` times."""
    ids = PROMPT[0].tolist()
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids[-context:]]), loops=loops).logits
        ids.append(max(range(logits.shape[-1]), key=logits[0, -1].tolist().__getitem__))
    return torch.tensor([ids])


def greedy(model: RecurrentDepthTransformer, count: int, **options) -> Tensor:
    return generate(model, PROMPT, count, generator=torch.Generator(), temperature=0, **options)


@pytest.mark.parametrize("loops", [1, 4, 9])
def test_greedy_takes_the_likeliest(model, loops):
    model = model()
    expected = by_hand(model, 8, loops, 1024)
    assert torch.equal(greedy(model, 8, loops=loops), expected)
    assert len(set(expected[0].tolist())) > 4, "the model must say different things"
    assert torch.equal(greedy(model, 8), by_hand(model, 8, model.config.loops, 1024))


def test_context_is_cut_from_the_left(model):
    short = model(context_length=4)
    expected = by_hand(short, 10, 4, 4)
    assert torch.equal(greedy(short, 10), expected)
    assert not torch.equal(expected, by_hand(short, 10, 4, 1024)), "the cut must matter"


def test_stop_token_ends_and_is_left_out(model):
    model = model()
    whole = greedy(model, 8)[0].tolist()
    stop = whole[6]
    cut = whole[: whole.index(stop, 3)]
    assert greedy(model, 8, stop_id=stop)[0].tolist() == cut
    assert greedy(model, 8, stop_id=whole[3])[0].tolist() == whole[:3]
    assert greedy(model, 0)[0].tolist() == whole[:3]


def test_padding_of_the_table_is_never_drawn(model):
    model = model()
    highest = max(greedy(model, 8)[0, 3:].tolist())
    assert highest > 8
    assert max(greedy(model, 8, vocabulary=highest)[0, 3:].tolist()) < highest
    assert torch.equal(greedy(model, 8, vocabulary=highest + 1), greedy(model, 8))
    assert max(sampled(model, 0, vocabulary=8, temperature=5.0)[3:]) < 8


def sampled(model: RecurrentDepthTransformer, seed: int, count: int = 12, **options) -> list[int]:
    ids = generate(model, PROMPT, count, generator=torch.Generator().manual_seed(seed), **options)
    return ids[0].tolist()


def test_sampling_is_a_function_of_the_seed(model):
    model = model()
    torch.manual_seed(1)
    first = sampled(model, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert sampled(model, 3) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator is training's"
    assert sampled(model, 4) != first
    assert len(first) == 15 and first[:3] == PROMPT[0].tolist()


def test_sampling_follows_the_distribution(model):
    """Frequencies of the first token against softmax(logits / temperature) over the top k."""
    model = model(core_ffn="dense", core_layers=1)
    with torch.no_grad():
        logits = model(PROMPT, loops=1).logits[0, -1].double()
    kept = logits.argsort(descending=True)[:3]
    expected = torch.zeros(128, dtype=torch.float64)
    expected[kept] = torch.exp(logits[kept] / 0.2) / torch.exp(logits[kept] / 0.2).sum()
    assert (expected[kept] - logits[kept].softmax(0)).abs().max() > 0.2, "the temperature must matter"
    generator = torch.Generator().manual_seed(0)
    drawn = [
        generate(model, PROMPT, 1, generator=generator, loops=1, temperature=0.2, top_k=3)[0, -1].item()
        for _ in range(300)
    ]
    observed = torch.tensor(drawn).bincount(minlength=128) / 300
    assert set(drawn) == set(kept.tolist())
    torch.testing.assert_close(observed.double(), expected, rtol=0, atol=0.08)
    assert sampled(model, 5, top_k=1) == greedy(model, 12)[0].tolist()
    assert min(sampled(model, 5, top_k=1_000_000)) >= 0
