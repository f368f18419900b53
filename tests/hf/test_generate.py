"""transformers' `generate` with the depth-aware cache, against our own decoding and beam search written out."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, set_seed

from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate
from mythos.hf import MythosCache, MythosForCausalLM
from mythos.hf.model import CACHE_NAME
from mythos.model.halting import halting_rule
from tests.hf.conftest import CONTEXT, VOCABULARY
from tests.hf.test_model import random_ids

BuildModel = Callable[..., MythosForCausalLM]
PROMPTS = [[5, 9, 2, 71, 33], [17], [60, 4, 8]]


def padded(prompts: list[list[int]], right: bool = False) -> dict[str, Tensor]:
    """Prompts as a padded batch of ids and mask."""
    longest = max(map(len, prompts))
    gaps = [[0] * (longest - len(prompt)) for prompt in prompts]
    ids = [prompt + gap if right else gap + prompt for prompt, gap in zip(prompts, gaps, strict=True)]
    ones = [[1] * len(prompt) for prompt in prompts]
    mask = [one + gap if right else gap + one for one, gap in zip(ones, gaps, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def own(model: MythosForCausalLM, prompts: list[list[int]], tokens: int, **options: Any) -> list[list[int]]:
    """The prompts continued by our own greedy decoding."""
    return [
        row.tokens for row in generate(model.model, prompts, tokens, sampling=Sampling(temperature=0), **options).rows
    ]


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("fields", [{}, {"attention": "gqa"}])
def test_greedy_is_our_own(build_model: BuildModel, fields: dict[str, Any], right: bool) -> None:
    model, batch = build_model(**fields), padded(PROMPTS, right)
    for options in ({}, {"num_loops": 6}, {"num_loops": 6, "exit_threshold": 0.4}):
        rule = halting_rule(model.model, threshold=0.4) if "exit_threshold" in options else None
        expected = own(model, PROMPTS, 12, loops=options.get("num_loops"), halting=rule)
        for cached in (True, False):
            generated = model.generate(**batch, max_new_tokens=12, use_cache=cached, **options)
            assert generated[:, 5:].tolist() == expected
        if not right:  # otherwise the last piece has no token of the shorter rows
            chunked = model.generate(**batch, max_new_tokens=12, prefill_chunk_size=2, **options)
            assert chunked[:, 5:].tolist() == expected
    assert max(map(max, expected)) < VOCABULARY


def test_depth_is_a_part_of_the_generation_configuration(build_model: BuildModel) -> None:
    model, batch = build_model(), padded(PROMPTS)
    deep, shallow = (own(model, PROMPTS, 8, loops=loops) for loops in (6, 1))
    rule = halting_rule(model.model, threshold=0.4)
    halted = own(model, PROMPTS, 8, loops=6, halting=rule)
    assert deep != shallow and deep != halted
    config = GenerationConfig(num_loops=1, max_new_tokens=8)
    assert model.generate(**batch, generation_config=config)[:, 5:].tolist() == shallow
    model.generation_config = GenerationConfig(num_loops=6)
    assert model.generate(**batch, max_new_tokens=8)[:, 5:].tolist() == deep
    assert model.generate(**batch, max_new_tokens=8, num_loops=1)[:, 5:].tolist() == shallow
    assert model.generate(**batch, max_new_tokens=8, exit_threshold=0.4)[:, 5:].tolist() == halted
    model.generation_config.exit_threshold = -1.0
    with pytest.raises(ValueError, match="exit threshold of convergence: got -1; allowed: a number above 0"):
        model.generate(**batch, max_new_tokens=8)
    with pytest.raises(ValueError, match="halting is none, and a threshold needs a rule"):
        build_model(halting="none").generate(**batch, exit_threshold=0.1)


def slow_beams(model: MythosForCausalLM, prompt: list[int], beams: int, tokens: int) -> list[int]:
    """Beam search without cache and end token; returns the likeliest beam."""
    kept = [(0.0, prompt)]
    for _ in range(tokens):
        extended = []
        for score, row in kept:
            logs = model.model(torch.tensor([row])).logits[0, -1, :VOCABULARY].log_softmax(-1)
            extended += [(score + log, [*row, token]) for token, log in enumerate(logs.tolist())]
        kept = sorted(extended, reverse=True)[:beams]
    return kept[0][1][len(prompt) :]


def test_beam_search(model: MythosForCausalLM) -> None:
    """With four beams and left padding; and with one beam per id of the vocabulary, which is an exhaustive search."""
    expected = [slow_beams(model, prompt, 4, 6) for prompt in PROMPTS]
    assert expected != own(model, PROMPTS, 6)
    generated = model.generate(**padded(PROMPTS), num_beams=4, max_new_tokens=6)
    assert generated[:, 5:].tolist() == expected
    assert (
        model.generate(**padded(PROMPTS), num_beams=4, max_new_tokens=6, use_cache=False).tolist() == generated.tolist()
    )

    [prompt] = PROMPTS[:1]
    first = model.model(torch.tensor([prompt])).logits[0, -1, :VOCABULARY].log_softmax(-1)
    after = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
    second = model.model(after).logits[:, -1, :VOCABULARY].log_softmax(-1)
    best = divmod((first[:, None] + second).argmax().item(), VOCABULARY)
    generated = model.generate(**padded([prompt]), num_beams=VOCABULARY, max_new_tokens=2)
    assert tuple(generated[0, 5:].tolist()) == best


def test_an_end_of_text(model: MythosForCausalLM) -> None:
    rows = own(model, PROMPTS, 12)
    stop = rows[0][4]
    expected = [
        row.tokens for row in generate(model.model, PROMPTS, 12, sampling=Sampling(temperature=0), stop_ids=[stop]).rows
    ]
    generated = model.generate(**padded(PROMPTS), max_new_tokens=12, eos_token_id=stop, pad_token_id=stop)
    for row, tokens in zip(generated[:, 5:].tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {stop}


def test_sampling_does_not_depend_on_the_cache(model: MythosForCausalLM) -> None:
    drawn = []
    for cached in (True, False):
        set_seed(3)
        options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3, "use_cache": cached}
        drawn.append(model.generate(**padded(PROMPTS), max_new_tokens=10, **options))
    assert torch.equal(*drawn) and len(drawn[0]) == 9
    assert not torch.equal(drawn[0][0], drawn[0][1]) and drawn[0].max() < VOCABULARY


def test_assisted_decoding_is_greedy_decoding(build_model: BuildModel, model: MythosForCausalLM) -> None:
    """Draft tokens from a shallower model, right and wrong, and from prompt lookup."""
    prompt = [[5, 9, 2, 71, 33, 5, 9, 2]]
    expected = own(model, prompt, 14)
    batch = padded(prompt)
    assistant = copy.deepcopy(model)
    assistant.config.mean_loops = 2
    # Prompt lookup of transformers 5.10 needs an end token: use one that is never generated.
    end = next(token for token in range(128) if token not in expected)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3, "eos_token_id": end}):
        cache = Watched()
        generated = model.generate(**batch, max_new_tokens=14, **{CACHE_NAME: cache}, **options)
        assert generated[:, 8:].tolist() == expected
        assert max(cache.cut) > 0  # some draft tokens were rejected


class Watched(MythosCache):
    """A cache that records how many columns every crop removed."""

    def __init__(self) -> None:
        super().__init__()
        self.cut: list[int] = []

    def crop(self, tokens_to_remove: int) -> None:
        before = self.columns
        super().crop(tokens_to_remove)
        self.cut.append(before - self.columns)


def test_a_cached_prompt_is_continued(model: MythosForCausalLM) -> None:
    """A shared prefix is computed once and continued twice; caches of transformers are refused."""
    start = random_ids(1, 6)
    cache = model(start, use_cache=True)[CACHE_NAME]
    for seed in (1, 2):
        whole = torch.cat((start, random_ids(1, 3, seed=seed)), 1)
        generated = model.generate(whole, max_new_tokens=5, **{CACHE_NAME: copy.deepcopy(cache)})
        assert generated[:, 9:].tolist() == own(model, whole.tolist(), 5)
    with pytest.raises(ValueError, match="got a DynamicCache; allowed: the MythosCache of a forward pass"):
        model.generate(start, max_new_tokens=2, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation: got 'static'; a mythos model has its own cache"):
        model.generate(start, cache_implementation="static")
    with pytest.raises(ValueError, match=f"a row of {CONTEXT + 1} tokens: the model's context is {CONTEXT}"):
        model.generate(start, max_new_tokens=CONTEXT)
