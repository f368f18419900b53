"""What the cache keeps, in bytes by formula; cropping, selection, growth, and the kept loops."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos.config.presets import PRESETS
from mythos.model.cache import DecodeCache, cache_bytes_per_token
from mythos.model.config import ModelConfig
from mythos.model.halting import Convergence
from mythos.model.rdt import RecurrentDepthTransformer
from tests.model.slow_decode import slow_decode

Build = Callable[..., RecurrentDepthTransformer]
ATTENTIONS = ["mla", "gqa"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


def new(model: RecurrentDepthTransformer, rows: int = 2, **changes: Any) -> DecodeCache:
    return DecodeCache(model.config, rows, **{"loops": 4, "block": 4, **changes})


def ragged(texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Arguments of a call that extends each row by a text."""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    return {"ids": ids, "mask": mask}


# --- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"attention": "mla"}, 16 + 8),
        ({"attention": "mla", "n_heads": 8}, 16 + 8),
        ({"attention": "gqa"}, 2 * 2 * 8),
        ({"attention": "gqa", "n_heads": 8}, 2 * 2 * 8),
        ({"attention": "gqa", "n_kv_heads": 4}, 2 * 4 * 8),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_formula(
    model: Build, changes: dict[str, Any], numbers: int, dtype: torch.dtype
) -> None:
    """Latent and rotated key, or keys and values of each kv head; in prelude, coda and the core's layers of each loop.

    All tensors that the cache holds are counted; capacity grows in blocks of 4 positions.
    """
    built = model(**changes, prelude_layers=3, coda_layers=1)
    cache = new(built, loops=5, dtype=dtype)
    per_token = (3 + 1 + 2 * 5) * numbers * dtype.itemsize
    assert cache_bytes_per_token(built.config, 5, dtype) == per_token
    for count, capacity in ((0, 0), (3, 4), (2, 8), (3, 8), (9, 20)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            built.extend(random_ids(2, count), cache)
        tensors = [value for value in vars(cache).values() if isinstance(value, Tensor)]
        assert cache.bytes == sum(t.untyped_storage().nbytes() for t in tensors) == 2 * capacity * per_token
        assert {t.dtype for t in tensors} == {dtype}
    built.extend(random_ids(2, 1), cache, loops=7)
    assert cache.loops == 7
    assert cache.bytes == 2 * 20 * cache_bytes_per_token(built.config, 7, dtype)


def test_mythos_3b_takes_16_kib_a_token() -> None:
    config = ModelConfig(**PRESETS["mythos_3b"])
    assert cache_bytes_per_token(config, 16, torch.bfloat16) == 16.25 * 1024
    cache = DecodeCache(config, 3, loops=16, dtype=torch.bfloat16, device="meta")
    cache.reserve(1000, 16)
    assert cache.bytes == 3 * 1024 * 16.25 * 1024


# --- cropping and selection


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [6, 0, [9, 3], [4, 0]], ids=str)
def test_cropped_rows_never_saw_what_was_cropped(model: Build, attention: str, lengths: int | list[int]) -> None:
    """Tokens that are tried run deeper than those that replace them."""
    built, texts = model(attention=attention), [random_ids(9, seed=1), random_ids(7, seed=2)]
    halting, kept = Convergence(0.1), [lengths, lengths] if isinstance(lengths, int) else lengths
    cache, fresh = new(built), new(built)
    built.extend(**ragged(texts), cache=cache, loops=6, halting=halting)
    built.extend(random_ids(2, 5, seed=3), cache, loops=8)
    cache.crop(lengths)
    assert cache.lengths == kept
    if any(kept):
        pieces = [text[:length] for text, length in zip(texts, kept, strict=True)]
        built.extend(**ragged(pieces), cache=fresh, loops=6, halting=halting)
    for seed, loops in ((4, 2), (5, 8)):
        ids = random_ids(2, 4, seed=seed)
        actual, expected = (built.extend(ids, c, loops=loops, logits="all").logits for c in (cache, fresh))
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("lengths", [4, -1, [3, 4], [3], [3, 3, 3], [-1, 0]], ids=str)
def test_lengths_that_rows_do_not_have(model: Build, lengths: int | list[int]) -> None:
    built = model()
    cache = new(built)
    built.extend(random_ids(2, 3), cache)
    with pytest.raises(ValueError, match=r"cannot crop rows of \[3, 3\] positions to"):
        cache.crop(lengths)
    assert cache.lengths == [3, 3]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2], [0]], ids=str)
def test_selected_rows_go_on_by_themselves(model: Build, attention: str, rows: list[int]) -> None:
    built, texts = model(attention=attention), [random_ids(length, seed=length) for length in (6, 2, 9)]
    cache, fresh = new(built, 3), new(built, len(rows))
    built.extend(**ragged(texts), cache=cache, loops=3)
    cache.select(rows)
    assert cache.lengths == [len(texts[row]) for row in rows]
    assert cache.bytes == len(rows) * 12 * cache_bytes_per_token(built.config, 4, torch.float32)
    built.extend(**ragged([texts[row] for row in rows]), cache=fresh, loops=3)
    for seed in (1, 2):
        ids = random_ids(len(rows), 3, seed=seed)
        actual, expected = (built.extend(ids, c, loops=5, logits="all").logits for c in (cache, fresh))
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_no_rows_are_left(model: Build) -> None:
    built = model()
    cache = new(built)
    built.extend(random_ids(2, 3), cache)
    for rows in ([], [2], [0, -1]):
        with pytest.raises(ValueError, match=r"cannot select rows .* of a cache of 2 rows"):
            cache.select(rows)
    assert cache.lengths == [3, 3]


# --- growth


def test_size_of_blocks_changes_nothing(model: Build) -> None:
    built, ids = model(), random_ids(2, 13)
    expected = built.extend(ids, new(built, block=256), logits="all").logits
    for block in (1, 3, 13):
        cache = new(built, block=block)
        pieces = [built.extend(part, cache, logits="all").logits for part in ids.split([4, 1, 6, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)
        assert cache.entries.shape[2] == -(-13 // block) * block


def test_the_cache_is_allocated_once(model: Build) -> None:
    """Reserved room is not allocated again."""
    built, ids = model(), random_ids(2, 10)
    cache = new(built)
    cache.reserve(10, 6)
    place = cache.entries.data_ptr()
    for part in ids.split([3, 1, 6], dim=1):
        built.extend(part, cache, loops=6)
    assert cache.entries.data_ptr() == place and cache.loops == 6 and cache.entries.shape[2] == 12


# --- fewer loops than are run


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_as_many_kept_loops_as_are_run_change_nothing(model: Build, attention: str) -> None:
    built, ids = model(attention=attention), random_ids(2, 9)
    whole, kept = new(built, loops=2), new(built, loops=2, cache_loops=6)
    for part, loops in zip(ids.split([3, 1, 5], dim=1), (3, 6, 5), strict=True):
        actual, expected = (built.extend(part, c, loops=loops, logits="all").logits for c in (kept, whole))
        assert torch.equal(actual, expected)
    assert kept.bytes == whole.bytes


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_kept_loops_serve_their_newest_entry(model: Build, attention: str, kept: int) -> None:
    """One token a call, of any number of loops; a loop reads the slot of its index modulo the kept loops."""
    built, ids = model(attention=attention), random_ids(1, 10)
    cache = new(built, 1, loops=5, cache_loops=kept)
    limits = [4, 1, 7, 2, 3, 8, 5, 2, 6, 7]
    actual = [built.extend(ids[:, at : at + 1], cache, loops=loops).logits[0] for at, loops in enumerate(limits)]
    expected, _ = slow_decode(built, ids[0].tolist(), limits, cache_loops=kept)
    torch.testing.assert_close(torch.stack(actual), expected.float(), **CLOSE)
    exact, _ = slow_decode(built, ids[0].tolist(), limits)
    assert (exact - expected).abs().max() > 0.01
    assert cache.bytes == 12 * cache_bytes_per_token(built.config, kept, torch.float32)


# --- types


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bfloat16_entries_of_a_float32_model(model: Build, attention: str) -> None:
    """Rounded entries move logits by about what rounding (1 / 512) moves keys and values."""
    built, ids = model(attention=attention, core_ffn="dense"), random_ids(2, 12)
    exact, rounded = new(built), new(built, dtype=torch.bfloat16)
    pairs = [
        [built.extend(part, c, logits="all").logits for c in (exact, rounded)] for part in ids.split([8, 1, 3], dim=1)
    ]
    expected, actual = (torch.cat(pieces, dim=1) for pieces in zip(*pairs, strict=True))
    off = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    print(f"off by {off:.5f}")
    assert 1e-5 < off < 0.01
    assert rounded.bytes == exact.bytes // 2


@pytest.mark.parametrize("name", ["rows", "loops", "block", "cache_loops"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one(small: Callable[..., ModelConfig], name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {size}; allowed: at least 1"):
        DecodeCache(small(), **{"rows": 1, "loops": 1, name: size})


def test_model_that_failed_does_not_own_the_cache(model: Build) -> None:
    """An empty cache is bound by the first call that succeeds, and only to a model of its own configuration."""
    built, other = model(), model()
    cache = new(built)
    with pytest.raises(ValueError, match="the model knows"):
        other.extend(torch.full((2, 1), 500), cache)
    with pytest.raises(ValueError, match="another model"):
        model(kv_lora_rank=8).extend(random_ids(2, 1), cache)
    built.extend(random_ids(2, 1), cache)
    with pytest.raises(ValueError, match="another model"):
        other.extend(random_ids(2, 1), cache)
