"""Cached generation compared with calling the model on the whole context, one token and one row at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mythos.generation.sampling import Sampling, uniforms
from mythos.generation.tokens import Continuation, cache_bytes_needed, generate
from mythos.model.halting import Convergence
from mythos.model.rdt import RecurrentDepthTransformer
from tests.model.slow_decode import SlowRow, converged

Build = Callable[..., RecurrentDepthTransformer]

PROMPTS = [[5, 17, 99], [1], [64, 3, 3, 120, 7, 7, 90, 2], [11, 12]]
GREEDY = Sampling(temperature=0)


def by_hand(
    model: RecurrentDepthTransformer,
    prompt: Sequence[int],
    count: int,
    loops: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[int]:
    """`count` ids, each from a forward pass over all ids before it."""
    ids = list(prompt)
    places = uniforms([seed], max(count, 1))
    for n in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), loops=loops).logits[:, -1]
        seen = torch.zeros(1, 128, dtype=torch.bool)
        seen[0, ids] = True
        ids.append(int(sampling.draw(logits, places[:, n], seen if sampling.repetition_penalty != 1 else None)))
    return ids[len(prompt) :]


def greedy(model: RecurrentDepthTransformer, count: int, prompts: Any = PROMPTS, **options: Any) -> list[Continuation]:
    return generate(model, prompts, count, sampling=GREEDY, **options).rows


def tokens(rows: list[Continuation]) -> list[list[int]]:
    return [row.tokens for row in rows]


@pytest.mark.parametrize("attention", ["mla", "gqa"])
@pytest.mark.parametrize("loops", [1, 4, 7])
def test_greedy_takes_what_full_recomputation_finds_likeliest(model: Build, attention: str, loops: int) -> None:
    network = model(attention=attention)
    rows = greedy(network, 8, loops=loops)
    assert tokens(rows) == [by_hand(network, prompt, 8, loops) for prompt in PROMPTS]
    assert all(row.loops == [loops] * 8 and row.end == "length" for row in rows)
    assert len({token for row in rows for token in row.tokens}) > 8, "the model must say different things"
    if loops == 4:
        assert greedy(network, 8) == rows, "the default is the model's"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 100])
def test_prompts_may_be_read_in_pieces(model: Build, chunk: int) -> None:
    network = model()
    assert tokens(greedy(network, 4, prefill_chunk=chunk)) == [by_hand(network, prompt, 4, 4) for prompt in PROMPTS]


def test_pieces_are_no_longer_than_asked_for(model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    network, lengths, original = model(), [], RecurrentDepthTransformer.extend

    def watched(self: RecurrentDepthTransformer, ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        lengths.append(ids.shape[1])
        return original(self, ids, *arguments, **options)

    monkeypatch.setattr(RecurrentDepthTransformer, "extend", watched)
    greedy(network, 3, prefill_chunk=3)
    assert lengths == [3, 3, 2, 1, 1], "the last token needs no pass after it"


def test_rows_of_different_loops_share_a_batch(model: Build) -> None:
    network, loops = model(), [2, 9, 1, 5]
    rows = greedy(network, 6, loops=loops)
    assert tokens(rows) == [by_hand(network, *pair) for pair in zip(PROMPTS, [6] * 4, loops, strict=True)]
    assert [row.loops for row in rows] == [[count] * 6 for count in loops]


def test_a_halting_rule_gives_each_token_its_loops(model: Build) -> None:
    """Compared with decoding position by position; a token's loops are those of the position before it."""
    network, limits = model(), [6, 6, 2, 6]
    rows = greedy(network, 6, loops=limits, halting=Convergence(0.3))
    for prompt, row, limit in zip(PROMPTS, rows, limits, strict=True):
        slow, expected = SlowRow(network, stops=converged(0.3)), []
        for token in prompt:
            logits, loops = slow.append(token, limit)
        for _ in range(6):
            expected.append((int(logits.argmax()), loops))
            logits, loops = slow.append(expected[-1][0], limit)
        assert list(zip(row.tokens, row.loops, strict=True)) == expected
    assert len({loops for row in rows for loops in row.loops}) > 2, "the threshold must matter"


def test_a_stop_id_ends_its_row_and_is_left_out(model: Build) -> None:
    network = model()
    whole = [by_hand(network, prompt, 12, 4) for prompt in PROMPTS]
    stops = {whole[0][4], whole[2][7]}
    rows = greedy(network, 12, stop_ids=stops)
    for row, full in zip(rows, whole, strict=True):
        cut = next((n for n, token in enumerate(full) if token in stops), 12)
        assert row.tokens == full[:cut] and len(row.loops) == cut
        assert row.end == ("stop" if cut < 12 else "length")
    assert len({len(row.tokens) for row in rows}) > 1, "rows must end at different times"
    [row] = greedy(network, 8, [PROMPTS[0]], stop_ids=[whole[0][0]])
    assert row == Continuation([], [], "stop")


def test_the_context_ends_a_row(model: Build) -> None:
    network = model(context_length=8)
    rows = greedy(network, 6)
    assert tokens(rows) == [by_hand(network, prompt, min(6, 8 - len(prompt)), 4) for prompt in PROMPTS]
    assert [row.end for row in rows] == ["context", "length", "context", "length"]
    assert rows[2].tokens == [], "a prompt that fills the context"
    assert [row.end for row in greedy(network, 0)] == ["length"] * 4


def test_the_callback_sees_every_token_as_it_comes_and_may_end_its_row(model: Build) -> None:
    network, calls = model(), []

    def callback(row: int, token: int, loops: int) -> bool:
        calls.append((row, token, loops))
        return row == 1 and sum(other == 1 for other, _, _ in calls) == 3

    rows = greedy(network, 6, loops=[1, 2, 3, 4], on_token=callback)
    assert [row.end for row in rows] == ["length", "callback", "length", "length"]
    assert tokens(rows)[1] == by_hand(network, PROMPTS[1], 3, 2), "the token that ended it is kept"
    assert tokens(rows)[3] == by_hand(network, PROMPTS[3], 6, 4), "others go on"
    for n, row in enumerate(rows):
        assert [(token, loops) for other, token, loops in calls if other == n] == [(t, n + 1) for t in row.tokens]
    assert [row for row, _, _ in calls[:8]] == [0, 1, 2, 3] * 2, "in time, not row after row"


def test_rows_that_end_leave_the_batch(model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    network, sizes, original = model(), [], RecurrentDepthTransformer.extend

    def watched(self: RecurrentDepthTransformer, ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        return original(self, ids, *arguments, **options)

    monkeypatch.setattr(RecurrentDepthTransformer, "extend", watched)
    generate(network, PROMPTS, 6, sampling=GREEDY, on_token=lambda row, *_: row == 2)
    assert sizes == [4, 3, 3, 3, 3, 3]


def test_padding_of_the_table_is_never_drawn(model: Build) -> None:
    network = model()
    highest = max(greedy(network, 8)[0].tokens)
    assert max(greedy(network, 8, [[5, 7]], vocabulary=highest)[0].tokens) < highest
    drawn = generate(network, [[1, 2], [3]], 40, sampling=Sampling(temperature=5.0), vocabulary=8).rows
    assert max(token for row in drawn for token in row.tokens) < 8


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.0, top_k=9), Sampling(temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.5)],
)
def test_a_row_draws_alike_in_any_batch(model: Build, sampling: Sampling) -> None:
    network, seeds = model(), [7, 7, 3, 2**40]
    rows = tokens(generate(network, PROMPTS, 10, sampling=sampling, seed=seeds).rows)
    alone = [by_hand(network, p, 10, 4, sampling, seed) for p, seed in zip(PROMPTS, seeds, strict=True)]
    assert rows == alone
    backwards = generate(network, PROMPTS[::-1], 10, sampling=sampling, seed=seeds[::-1]).rows
    assert tokens(backwards) == rows[::-1]
    stopped = generate(network, PROMPTS, 10, sampling=sampling, seed=seeds, on_token=lambda row, *_: row < 2).rows
    assert tokens(stopped) == [rows[0][:1], rows[1][:1], rows[2], rows[3]], "whatever the others do"


def test_one_seed_gives_rows_their_own(model: Build) -> None:
    network = model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rows = tokens(generate(network, [[4, 4]] * 3, 12, sampling=Sampling(temperature=1.0), seed=10).rows)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is training's"
    assert len({tuple(row) for row in rows}) == 3
    again = generate(network, [[4, 4]] * 3, 12, sampling=Sampling(temperature=1.0), seed=[12, 11, 10]).rows
    assert tokens(again) == rows[::-1]


def test_the_cache_is_as_asked_for(model: Build) -> None:
    network = model()
    whole = generate(network, PROMPTS, 4, loops=8)
    part = generate(network, PROMPTS, 4, loops=8, cache_loops=2)
    assert 0 < part.cache_bytes < whole.cache_bytes
    assert cache_bytes_needed(network.config, len(PROMPTS), 12, 8) == whole.cache_bytes
    assert cache_bytes_needed(network.config, len(PROMPTS), 12, 8, cache_loops=2) == part.cache_bytes
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = generate(network, PROMPTS, 4, loops=8)
    assert half.cache_bytes * 2 == whole.cache_bytes == 2 * cache_bytes_needed(network.config, 4, 12, 8, torch.bfloat16)
    longer = network.config.model_copy(update={"context_length": 700})
    assert cache_bytes_needed(longer, 4, 512, 8) == 3 * whole.cache_bytes, "while two blocks are copied from one"
    assert cache_bytes_needed(longer, 4, 9999, 8) == 5 * whole.cache_bytes, "a context of three blocks"


def test_a_fixed_depth_model_generates_too(model: Build) -> None:
    network = model(injection="none", loops=1, lora_rank=0)
    assert tokens(greedy(network, 5)) == [by_hand(network, prompt, 5, 1) for prompt in PROMPTS]
    with pytest.raises(ValueError, match="fixed-depth"):
        greedy(network, 5, loops=2)


def test_logits_that_are_not_finite_are_reported(model: Build) -> None:
    network = model()
    with torch.no_grad():
        network.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(network, PROMPTS, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "no prompts: give at least one"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1] * 9]}, "prompt 0 has 9 tokens: the model's context is 8"),
        ({"prompts": [[1, 128]]}, "prompt 0 has ids 1 to 128; allowed: 0 to 127"),
        ({"prompts": [[-1, 5]]}, "prompt 0 has ids -1 to 5"),
        ({"prompts": [[60]], "vocabulary": 50}, "prompt 0 has ids 60 to 60; allowed: 0 to 49"),
        ({"max_tokens": -1}, "max_tokens: got -1"),
        ({"loops": 0}, "loops: got 0; every row needs at least 1$"),
        ({"loops": [3, -2]}, "loops: got -2; every row needs at least 1$"),
        ({"loops": [3, 3, 3]}, "loops: 3 values for 2 prompts"),
        ({"seed": [3]}, "seed: 1 values for 2 prompts"),
        ({"seed": -1}, "seed: got -1"),
        ({"sampling": Sampling(top_k=129)}, "top-k: got 129; allowed: at most the vocabulary, 128"),
        ({"sampling": Sampling(top_k=60), "vocabulary": 50}, "top-k: got 60; allowed: at most the vocabulary, 50"),
        ({"vocabulary": 129}, "vocabulary: got 129; allowed: 1 to 128"),
        ({"stop_ids": (128,)}, "stop id 128"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0"),
        ({"cache_loops": 0}, "cache_loops: got 0"),
    ],
)
def test_bad_input_is_refused(model: Build, changes: dict[str, Any], message: str) -> None:
    network = model(context_length=8)
    arguments = {"prompts": [[1], [2, 3]], "max_tokens": 3} | changes
    with pytest.raises(ValueError, match=message):
        generate(network, **arguments)
