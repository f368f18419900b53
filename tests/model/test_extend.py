"""Cached decoding against every position run alone (`slow_decode.py`), and against recomputing the whole context."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos.model.cache import DecodeCache
from mythos.model.decoding import Extension
from mythos.model.halting import Convergence, SecondDifference, halting_rule
from mythos.model.rdt import RecurrentDepthTransformer
from tests.model.slow_decode import States, converged, slow_decode, straightened

Build = Callable[..., RecurrentDepthTransformer]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ATTENTIONS = ["mla", "gqa"]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


class Erratic:
    """Stops about every third position after any pass: where is a matter of its state's digits."""

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (after.sum(-1) * 3).remainder(1) < 0.3, None

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        return state


def erratic(states: States) -> bool:
    return bool((states[-1].sum() * 3).remainder(1) < 0.3)


class Averaged(Erratic):
    """Reads out the mean of all states a position went through."""

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        summed, count = (after, torch.ones_like(after)) if memory is None else memory.unbind(1)
        if memory is not None:
            summed, count = summed + after, count + 1
        return super().__call__(loop, before, after, None)[0], torch.stack((summed, count), dim=1)

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        assert memory is not None
        return memory[:, 0] / memory[:, 1]


class Rows:
    """Rows of a batch as they grow, and what decoding said of every position."""

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.limits: list[list[int]] = [[] for _ in range(rows)]
        self.logits: list[list[Tensor]] = [[] for _ in range(rows)]
        self.loops: list[list[int]] = [[] for _ in range(rows)]

    def extend(
        self,
        model: RecurrentDepthTransformer,
        cache: DecodeCache,
        pieces: Sequence[Sequence[int]],
        limits: Sequence[int],
        left: Sequence[bool],
        **arguments: Any,
    ) -> None:
        """Append a piece to each row, padded to the longest, on the left if asked for."""
        longest = max(map(len, pieces))
        ids, mask = random_ids(len(pieces), longest, seed=9), torch.zeros(len(pieces), longest, dtype=torch.bool)
        for row, piece in enumerate(pieces):
            place = slice(longest - len(piece), longest) if left[row] else slice(len(piece))
            ids[row, place], mask[row, place] = torch.tensor(piece, dtype=torch.int64), True
        actual = model.extend(ids, cache, mask=mask, loops=list(limits), logits="all", **arguments)
        assert actual.logits.dtype == torch.float32 and actual.logits.shape == (*ids.shape, model.vocabulary)
        assert not actual.loops[~mask].any() and not actual.logits[~mask].any()
        for row, piece in enumerate(pieces):
            self.tokens[row] += piece
            self.limits[row] += [limits[row]] * len(piece)
            self.logits[row] += actual.logits[row, mask[row]].unbind()
            self.loops[row] += actual.loops[row, mask[row]].tolist()
        assert cache.lengths == [len(tokens) for tokens in self.tokens]

    def depths(self) -> set[int]:
        """All different numbers of loops that were run."""
        return {loops for row in self.loops for loops in row}

    def match(self, model: RecurrentDepthTransformer, **settings: Any) -> None:
        """Compare with every position run alone."""
        for tokens, limits, logits, loops in zip(self.tokens, self.limits, self.logits, self.loops, strict=True):
            if not tokens:
                continue
            expected, expected_loops = slow_decode(model, tokens, limits, **settings)
            assert loops == expected_loops
            torch.testing.assert_close(torch.stack(logits), expected.float(), **CLOSE)


def random_calls(rng: random.Random, rows: int, calls: int) -> list[list[list[int]]]:
    """Pieces of up to 4 tokens for each row, in every other call of at most one; some of none."""
    sizes = [[rng.randint(0, 1 if call % 2 else 4) for _ in range(rows)] for call in range(calls)]
    return [[[rng.randrange(128) for _ in range(size)] for size in call] for call in sizes]


# --- against every position run alone

VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": "gqa"},
    {"core_ffn": "dense"},
    {"attention": "gqa", "core_ffn": "dense", "n_kv_heads": 1},
    {"attention": "gqa", "n_kv_heads": 4, "qk_norm": False},
    {"qk_norm": False, "q_lora_rank": 24},
    {"v_head_dim": 40, "kv_lora_rank": 12},
    {"injection": "linear"},
    {"injection": "add", "attention": "gqa"},
    {"loop_embedding": True, "core_layers": 1},
    {"lanes": 2},
    {"lanes": 3, "lora_rank": 0, "attention": "gqa", "loop_embedding": True},
    {"lora_rank": 0, "prelude_norm": False, "tie_embeddings": False},
    {"prelude_layers": 0},
    {"coda_layers": 0, "attention": "gqa"},
    {"prelude_layers": 2, "coda_layers": 2, "core_layers": 1, "n_shared_experts": 0},
    {"attention": "gqa", "dim": 48, "value_embeddings": True, "dense_ffn": "relu2", "prelude_layers": 2},
    {"attention": "gqa", "core_ffn": "dense", "block_norm": "sandwich", "qk_bias": True, "readout_norm": True},
    {"block_norm": "peri", "injection": "initial", "prelude_layers": 0, "coda_layers": 0},
    {"injection": "orthogonal"},
    {"loop_over": "layer"},
    {"loop_over": "layer", "lanes": 2},
    {
        **{"loop_over": "layer", "core_layers": 3, "injection": "initial", "prelude_norm": False, "attention": "gqa"},
        **{"value_embeddings": True, "lora_rank": 0, "loop_embedding": True},
    },
    {
        **{"router_loop": "bias", "loop_norm": "adaptive", "residual_scale": 0.25, "router_bias_per_loop": True},
        "expert_groups": 2,
    },
    {"router_loop": "embedding", "loop_norm": "adaptive", "block_norm": "peri", "residual_scale": 0.5},
    {"core_ffn": "dense", "loop_norm": "adaptive", "block_norm": "sandwich", "residual_scale": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_position_equals_one_run_alone(model: Build, changes: dict[str, Any]) -> None:
    """Pieces, paddings and depths (below and above the cache's, by row and call) at random; positions halt anywhere."""
    rng = random.Random(str(changes))
    built = model(**changes)
    cache = DecodeCache(built.config, 3, loops=rng.choice([1, 3, 8]), block=rng.choice([1, 3, 256]))
    rows = Rows(3)
    for pieces in random_calls(rng, 3, 5):
        limits = [rng.randint(1, 8) for _ in range(3)]
        rows.extend(built, cache, pieces, limits, [rng.random() < 0.5 for _ in range(3)], halting=Erratic())
    assert len(rows.depths()) > 2 and rows.loops != rows.limits
    rows.match(built, stops=erratic)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_depth_changes_between_calls(model: Build, attention: str) -> None:
    """Without a rule: positions serve their last keys to deeper calls than theirs."""
    built, rng = model(attention=attention), random.Random(1)
    cache, rows = DecodeCache(built.config, 2, loops=2, block=4), Rows(2)
    for limits in ([2, 1], [8, 5], [1, 3], [4, 8], [6, 6]):
        rows.extend(built, cache, [[rng.randrange(128)] * 2, [rng.randrange(128)]], limits, [False, True])
    assert rows.loops == rows.limits
    rows.match(built)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_fixed_depth_model(model: Build, attention: str) -> None:
    built = model(attention=attention, injection="none", loops=1, lora_rank=0)
    cache, rows, rng = DecodeCache(built.config, 3, loops=1), Rows(3), random.Random(2)
    for pieces in random_calls(rng, 3, 4):
        rows.extend(built, cache, pieces, [1, 1, 1], [True, False, True])
    rows.match(built)


@pytest.mark.parametrize(
    "changes",
    [{"attention": "mla"}, {"attention": "gqa"}, {"loop_over": "layer", "core_ffn": "dense"}],
    ids=["mla", "gqa", "by layer"],
)
@pytest.mark.parametrize(
    ("rule", "stops"),
    [(Convergence(0.1), converged(0.1)), (SecondDifference(0.1), straightened(0.1))],
    ids=["convergence", "second_difference"],
)
def test_rules_stop_each_position_where_it_stops_alone(
    model: Build, changes: dict[str, Any], rule: Any, stops: Any
) -> None:
    built, rng = model(**changes), random.Random(3)
    cache, rows = DecodeCache(built.config, 3, loops=8), Rows(3)
    for pieces in random_calls(rng, 3, 4):
        rows.extend(built, cache, pieces, [8, 8, 5], [True, False, True], halting=rule)
    assert len(rows.depths()) > 2
    rows.match(built, stops=stops)


def test_memory_of_a_rule_travels_with_its_position_and_its_result_is_read_out(model: Build) -> None:
    built, rng = model(), random.Random(5)
    cache, rows = DecodeCache(built.config, 3, loops=4), Rows(3)
    for pieces in random_calls(rng, 3, 3):
        rows.extend(built, cache, pieces, [4, 8, 6], [False, True, False], halting=Averaged())
    rows.match(built, stops=erratic, reads=lambda states: torch.stack(states[1:]).mean(0))


# --- against the whole context recomputed


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("loops", range(1, 9))
def test_all_loops_for_all_equal_recomputation(model: Build, attention: str, loops: int) -> None:
    built, ids = model(attention=attention), random_ids(2, 12)
    cache = DecodeCache(built.config, 2, loops=built.config.loops, block=5)
    pieces = [built.extend(part, cache, loops=loops, logits="all") for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    with torch.no_grad():
        expected = built(ids, loops=loops).logits
    torch.testing.assert_close(torch.cat([piece.logits for piece in pieces], dim=1), expected, **CLOSE)
    assert all((piece.loops == loops).all() for piece in pieces)


def test_depth_of_the_model_is_the_default(model: Build) -> None:
    built, ids = model(), random_ids(2, 5)
    actual = built.extend(ids, DecodeCache(built.config, 2, loops=1))
    assert (actual.loops == 4).all()
    with torch.no_grad():
        torch.testing.assert_close(actual.logits, built(ids, loops=4).logits[:, -1], **CLOSE)


@pytest.mark.parametrize(
    "changes", [{"attention": "mla"}, {"attention": "gqa"}, {"loop_over": "layer"}], ids=["mla", "gqa", "by layer"]
)
def test_any_split_of_a_prompt_gives_the_same(model: Build, changes: dict[str, Any]) -> None:
    built, rng, lengths = model(**changes), random.Random(6), [17, 11, 1]
    texts = [random_ids(length, seed=length).tolist() for length in lengths]
    whole = Rows(3)
    whole.extend(built, DecodeCache(built.config, 3, loops=8), texts, [8] * 3, [True] * 3, halting=Erratic())
    for _ in range(5):
        cache, parts = DecodeCache(built.config, 3, loops=rng.randint(1, 8), block=rng.randint(1, 8)), Rows(3)
        while cache.lengths != lengths:
            sizes = [rng.choice([0, 1, 3, 9]) for _ in texts]
            pieces = [text[held : held + size] for text, held, size in zip(texts, cache.lengths, sizes, strict=True)]
            parts.extend(built, cache, pieces, [8] * 3, [rng.random() < 0.5 for _ in texts], halting=Erratic())
        assert parts.loops == whole.loops
        for row in range(3):
            torch.testing.assert_close(torch.stack(parts.logits[row]), torch.stack(whole.logits[row]), **CLOSE)


def test_tokens_may_lie_anywhere_in_a_row(model: Build) -> None:
    built, ids = model(), random_ids(2, 6)
    mask = torch.tensor([[True, False, True, True, False, False], [False, False, False, True, False, True]])
    actual = built.extend(ids, DecodeCache(built.config, 2, loops=4), mask=mask)
    for row in range(2):
        alone = built.extend(ids[row : row + 1, mask[row]], DecodeCache(built.config, 1, loops=4))
        torch.testing.assert_close(actual.logits[row], alone.logits[0], **CLOSE)


def test_last_logits_are_those_of_each_rows_last_token(model: Build) -> None:
    built, ids = model(), random_ids(4, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    every = built.extend(ids, DecodeCache(built.config, 4, loops=4), mask=mask, logits="all").logits
    last = built.extend(ids, DecodeCache(built.config, 4, loops=4), mask=mask).logits
    torch.testing.assert_close(last, torch.stack((every[0, 4], every[1, 4], torch.zeros(128), every[3, 1])))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_is_as_close_as_recomputation_in_bfloat16(model: Build, attention: str) -> None:
    """Both against float32, in root mean squares over all logits; a dense core, whose experts cannot flip."""
    built, ids = model(attention=attention, core_ffn="dense"), random_ids(4, 24)
    with torch.no_grad():
        exact = built(ids, loops=8).logits
    cache = DecodeCache(built.config, 4, loops=8, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        again = built(ids, loops=8).logits
        pieces = [built.extend(part, cache, loops=8, logits="all").logits for part in ids.split([10, 1, 12, 1], dim=1)]

    def distance(logits: Tensor) -> float:
        return ((logits - exact).square().mean() / exact.square().mean()).sqrt().item()

    recomputed, cached = distance(again), distance(torch.cat(pieces, dim=1))
    print(f"off by {cached:.4f} with the cache, {recomputed:.4f} recomputed")
    assert 0 < cached < 1.25 * recomputed < 0.05


# --- cost


class Counted:
    """Positions that the blocks of a model compute."""

    def __init__(self, model: RecurrentDepthTransformer) -> None:
        self.core = self.once = 0
        for block in model.recurrence.blocks:
            block.register_forward_hook(self.count_core)
        for block in (*model.prelude, *model.coda):
            block.register_forward_hook(self.count_once)

    def count_core(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.core += inputs[0].shape[:-1].numel()

    def count_once(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self.once += inputs[0].shape[:-1].numel()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nothing_is_computed_for_padding_or_positions_that_stopped(model: Build, attention: str) -> None:
    built, ids = model(attention=attention), random_ids(4, 9)
    counted, cache = Counted(built), DecodeCache(built.config, 4, loops=8)
    mask = torch.arange(9) >= torch.tensor([[0], [4], [9], [8]])
    for ids_, mask_ in ((ids, mask), (ids[:, :1], torch.tensor([[True], [False], [True], [True]]))):
        counted.core = counted.once = 0
        actual = built.extend(ids_, cache, mask=mask_, loops=[8, 6, 8, 2], halting=Erratic())
        assert counted.core == 2 * actual.loops.sum() < 2 * 8 * mask_.sum()
        assert counted.once == 2 * mask_.sum()


def test_rows_without_tokens_cost_nothing(model: Build) -> None:
    built, ids = model(), random_ids(2, 3)
    counted, cache = Counted(built), DecodeCache(built.config, 2, loops=4)
    for actual in (
        built.extend(ids, cache, mask=torch.zeros(2, 3, dtype=torch.bool)),
        built.extend(ids[:, :0], cache),
    ):
        assert actual.logits.shape == (2, 128) and not actual.logits.any() and not actual.loops.any()
    assert counted.core == counted.once == 0 and cache.lengths == [0, 0] and cache.bytes == 0
    assert built.extend(ids[:, :0], cache, logits="all").logits.shape == (2, 0, 128)


def test_padding_may_be_any_number_and_rows_without_tokens_ask_for_no_depth(model: Build) -> None:
    built, cache = model(), DecodeCache(model().config, 2, loops=4)
    ids, mask = torch.tensor([[-100, 7], [128, -1]]), torch.tensor([[False, True], [False, False]])
    actual = built.extend(ids, cache, mask=mask, loops=[4, 64])
    alone = built.extend(ids[:1, 1:], DecodeCache(built.config, 1, loops=4))
    torch.testing.assert_close(actual.logits[:1], alone.logits)
    assert cache.loops == 4


def test_compiled_blocks_decode_uncompiled(model: Build) -> None:
    """Each call has other shapes: compiled, decoding would never stop compiling."""
    built, ids = model(), random_ids(1, 4)
    expected = built.extend(ids, DecodeCache(built.config, 1, loops=4)).logits

    def compiles(graph: Any, inputs: Any) -> Any:
        raise AssertionError("compiled")

    for block in built.recurrence.blocks:
        block.compile(backend=compiles)
    assert torch.equal(built.extend(ids, DecodeCache(built.config, 1, loops=4)).logits, expected)


# --- bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"loops": 0}, "every row needs at least 1"),
    ({"loops": -3}, "every row needs at least 1"),
    ({"loops": [2, 0]}, "every row needs at least 1"),
    ({"loops": [2]}, "1 loop counts for 2 rows"),
    ({"loops": [2, 2, 2]}, "3 loop counts for 2 rows"),
    ({"ids": torch.tensor([[1, 2], [3, 128]])}, "token ids 1 to 128: the model knows 0 to 127"),
    ({"ids": torch.tensor([[1, 2], [-1, 3]])}, "token ids -1 to 3: the model knows 0 to 127"),
    ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"got torch.bool of shape \(2, 3\) for ids of shape \(2, 2\)"),
    ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: got torch.bool of shape \(2,\)"),
    ({"mask": torch.ones(2, 2)}, r"mask: got torch.float32 of .*; allowed: torch.bool of the shape of ids"),
    ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, "3 rows of ids for a cache of 2 rows"),
    ({"ids": torch.zeros(2, 14, dtype=torch.int64)}, "a row of 17 tokens: the model's context is 16"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_refused_and_the_cache_is_as_before(model: Build, changes: dict[str, Any], message: str) -> None:
    built, ids = model(context_length=16), random_ids(2, 5)
    cache, other = (DecodeCache(built.config, 2, loops=4) for _ in range(2))
    built.extend(ids[:, :3], cache)
    with pytest.raises(ValueError, match=message):
        built.extend(**{"ids": ids[:, 3:], "cache": cache, **changes})
    assert cache.lengths == [3, 3]
    built.extend(ids[:, :3], other)
    assert torch.equal(built.extend(ids[:, 3:], cache).logits, built.extend(ids[:, 3:], other).logits)


def test_rule_that_fails_leaves_the_cache_as_it_was(model: Build) -> None:
    class Fails(Erratic):
        def __call__(self, loop: int, *arguments: Any) -> tuple[Tensor, Tensor | None]:
            if loop == 3:
                raise KeyError("no memory")
            return super().__call__(loop, *arguments)

    built, ids = model(), random_ids(2, 9)
    cache, other = (DecodeCache(built.config, 2, loops=2, block=4) for _ in range(2))
    built.extend(ids[:, :3], cache)
    with pytest.raises(KeyError):
        built.extend(random_ids(2, 6, seed=1), cache, loops=8, halting=Fails())
    assert cache.lengths == [3, 3]
    built.extend(ids[:, :3], other)
    actual, expected = (built.extend(ids[:, 3:], c, loops=8).logits for c in (cache, other))
    torch.testing.assert_close(actual, expected)


def test_cache_of_another_model(model: Build) -> None:
    built, ids = model(), random_ids(2, 3)
    cache = DecodeCache(built.config, 2, loops=4)
    built.extend(ids, cache)
    with pytest.raises(ValueError, match="keys and values of another model: make a new DecodeCache"):
        model().extend(ids, cache)


@pytest.mark.parametrize("threshold", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["convergence", "second_difference"])
def test_threshold_outside_of_its_range(model: Build, name: str, threshold: float) -> None:
    with pytest.raises(ValueError, match=r"exit threshold of \w+: got .*; allowed: a number above 0"):
        halting_rule(model(), name, threshold)


def test_rules_by_name(model: Build) -> None:
    built = model()
    with pytest.raises(ValueError, match="halting: got 'patience'; allowed: none, convergence, "):
        halting_rule(built, "patience")
    assert halting_rule(built, "none") is None
    with pytest.raises(ValueError, match=r"exit threshold 0\.1: halting is none, and a threshold needs a rule"):
        halting_rule(built, "none", 0.1)
    assert isinstance(halting_rule(built, "second_difference"), SecondDifference)
    configured = halting_rule(model(halting="second_difference"), threshold=0.3)
    assert isinstance(configured, SecondDifference) and configured.threshold == 0.3


def test_results_carry_no_gradient(model: Build) -> None:
    actual: Extension = model().extend(random_ids(1, 2), DecodeCache(model().config, 1, loops=4))
    assert not actual.logits.requires_grad
