"""The validation set is held out, fixed, exact in bytes, and cached."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mythos.data.corpus import is_held_out
from mythos.data.source import Source
from mythos.data.tokenizer import Tokenizer
from mythos.data.validation import ValidationSet, validation_set
from mythos.errors import MythosError

from .conftest import make_documents, text_source, write_parquet


def make(sources: Source | dict[str, tuple[Source, float]], tokenizer: Tokenizer, **changes) -> ValidationSet:
    named = sources if isinstance(sources, dict) else {"files": (sources, 1.0)}
    arguments = {"sequences": 7, "sequence_length": 32, "mask_documents": True, **changes}
    return validation_set(named, eos_id=tokenizer.eos_id, **arguments)


def texts(rows: torch.Tensor, tokenizer: Tokenizer) -> list[str]:
    return tokenizer.decode(rows[:, :-1].flatten().tolist()).split("<|endoftext|>")


def test_only_held_out_documents(parquet_folder: Callable[..., str], tokenizer: Tokenizer) -> None:
    documents = make_documents(150)
    source = text_source(parquet_folder(documents + documents[:20], 2), tokenizer, 0.2)
    held_out = {text for text in documents if is_held_out(text, 0.2)}
    validation = make(source, tokenizer, sequences=10**6, sequence_length=16)
    *whole, cut = texts(validation.ids, tokenizer)
    assert set(whole) <= held_out and len(set(whole)) >= len(held_out) - 1
    assert any(document.startswith(cut) for document in held_out)


def test_fixed_and_exact_in_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = make_documents(60)
    write_parquet(tmp_path / "x.parquet", documents, row_group=100)
    source = text_source(tmp_path / "x.parquet", tokenizer, 1.0)
    validation, again, more = make(source, tokenizer), make(source, tokenizer), make(source, tokenizer, sequences=12)
    assert validation.ids.shape == (7, 33) and validation.ids.dtype == validation.bytes.dtype == torch.int64
    assert torch.equal(validation.ids, again.ids) and torch.equal(more.ids[:7], validation.ids)
    assert torch.equal(validation.bytes, more.bytes[:7])
    # The vocabulary is byte-level, so a token's own bytes are known; characters count where they begin, which moves
    # at most 3 bytes over a row's edge, and nothing over the whole.
    whole = make(source, tokenizer, sequences=10**6)
    targets = whole.ids[:, 1:].reshape(-1)
    text = tokenizer.decode(targets.tolist()).replace("<|endoftext|>", "")
    first_token = tokenizer.decode(whole.ids[0, :1].tolist())
    assert abs(int(whole.bytes.sum()) - len(text.encode())) <= 3
    assert documents[0].encode().startswith((first_token + text[:20]).encode())
    for ids, size in zip(whole.ids, whole.bytes.tolist(), strict=True):
        row = tokenizer.decode(ids[1:].tolist()).replace("<|endoftext|>", "")
        assert abs(size - len(row.replace("\N{REPLACEMENT CHARACTER}", "").encode())) <= 6
    assert validation.document_ids is not None and make(source, tokenizer, mask_documents=False).document_ids is None
    for ids, document_ids in zip(validation.ids.tolist(), validation.document_ids.tolist(), strict=True):
        assert document_ids == [ids[:place].count(tokenizer.eos_id) for place in range(32)]


def test_sources_give_their_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources: dict[str, tuple[Source, float]] = {}
    for name, weight in (("web", 3.0), ("books", 1.0)):
        write_parquet(tmp_path / f"{name}.parquet", [f"{name} {text}" for text in make_documents(60)])
        sources[name] = (text_source(tmp_path / f"{name}.parquet", tokenizer, 1.0), weight)
    validation = make(sources, tokenizer, sequences=8)
    for rows, name, other in ((validation.ids[:6], "web", "books"), (validation.ids[6:], "books", "web")):
        assert name in "".join(texts(rows, tokenizer)) and other not in "".join(texts(rows, tokenizer))


def test_cached_and_packed_again_when_damaged(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(200))

    def once(**changes) -> ValidationSet:
        return make(text_source(tmp_path / "x.parquet", tokenizer, 0.3), tokenizer, **{"cache_dir": cache, **changes})

    cache = tmp_path / "cache"
    first = once()
    (kept,) = cache.iterdir()
    source = text_source(tmp_path / "x.parquet", tokenizer, 0.3)
    source.held_out = lambda: pytest.fail("read again")  # type: ignore[method-assign]
    second = make(source, tokenizer, cache_dir=cache)
    assert torch.equal(first.ids, second.ids) and torch.equal(first.bytes, second.bytes)
    kept.write_bytes(kept.read_bytes()[:50])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(once().ids, first.ids) and "is damaged" in caplog.text
    once(sequences=3), once(sequence_length=16)
    assert len(list(cache.iterdir())) == 3, "another set, another file"


def test_too_little_text(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(tmp_path / "x.parquet", make_documents(3))
    source = text_source(tmp_path / "x.parquet", tokenizer, 1.0)
    with pytest.raises(MythosError, match=r"data\.validation.*Raise data\.validation\.fraction"):
        make(source, tokenizer, sequence_length=4096)
    with caplog.at_level(logging.WARNING):
        assert 0 < len(make(source, tokenizer, sequences=10**6).ids) < 100
    assert "of 1000000 sequences" in caplog.text
