"""Tokenizers: round trips, exact bytes, what a run keeps, and what is refused."""

import pickle
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mythos.config import TokenizerConfig
from mythos.data import tokenizer as tokenizer_module
from mythos.data.config import DataConfig
from mythos.data.corpus import Corpus, is_held_out, open_corpus
from mythos.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, training_documents
from mythos.errors import MythosError

from .conftest import make_documents, write_parquet

TEXTS = [
    "plain",
    " leading and  double  spaces\n\n\tcode(x) += 1",
    "深い naïve 🙂🙂 e\u0301",
    "a <|endoftext|> b",
    "\x00\x7f",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus" / "x.parquet", make_documents(200))
    return opened(tmp_path / "corpus" / "*.parquet")


def opened(path: Path) -> Corpus:
    config = DataConfig(kind="files", path=str(path), on_error="skip")
    return open_corpus(config, config)


@pytest.mark.parametrize("text", [*TEXTS, *make_documents(5, seed=5)])
def test_bpe_round_trip_and_bytes(text: str, tokenizer: Tokenizer) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids, "text that spells the token is text"
    same_ids, sizes = tokenizer.encode_with_bytes(text)
    assert same_ids == ids and len(sizes) == len(ids)
    assert sum(sizes) == len(text.encode()) and min(sizes) >= 0


def test_bytes_of_ascii_are_those_of_each_token(tokenizer: Tokenizer) -> None:
    ids, sizes = tokenizer.encode_with_bytes("between the garden and the river, 12 letters")
    assert sizes == [len(tokenizer.decode([token])) for token in ids]


def test_bytes_where_text_is_dropped() -> None:
    backend = Backend(models.WordLevel({"a": 0, "bé": 1, "?": 2, "<|endoftext|>": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    dropping = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), {"name": "words"})
    assert dropping.encode_with_bytes("  a  bé \n") == ([0, 1], [3, 7])


def test_sizes(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == 400
    assert tokenizer.padded_size == 512
    assert tokenizer.decode([tokenizer.eos_id]) == "<|endoftext|>"


def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for _ in range(2):  # the second time over an existing one
        tokenizer.save(tmp_path / "saved")
    loaded = Tokenizer.load(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.eos_id == tokenizer.eos_id
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    other = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert other("the river", add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(["the river"])[0]
    assert other.eos_token_id == tokenizer.eos_id
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MythosError, match=r"tokenizer: .* cannot be written"):
        tokenizer.save(tmp_path / "file" / "saved")


def test_bpe_is_trained_on_training_documents_once(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[list[str]] = []
    train_bpe = tokenizer_module.train_bpe

    def train(documents, *arguments, **options):
        trained_on.append(list(documents))
        return train_bpe(iter(trained_on[-1]), *arguments, **options)

    monkeypatch.setattr(tokenizer_module, "train_bpe", train)
    config = TokenizerConfig(name="bpe", vocab_size=390)

    def load(run: str | None, config: TokenizerConfig = config) -> Tokenizer:
        run_dir = tmp_path / run if run else None
        return load_tokenizer(
            config, [(corpus, 1.0)], run_dir=run_dir, cache_dir=tmp_path / "cache", holdout_fraction=0.2, progress=False
        )

    first = load("one")
    assert sorted(trained_on[0]) == sorted(text for text in make_documents(200) if not is_held_out(text, 0.2))
    assert (tmp_path / "one" / "tokenizer" / "tokenizer.json").is_file()
    assert {load(run).fingerprint for run in ("one", "two", None)} == {first.fingerprint}
    assert len(trained_on) == 1, "cached"
    with pytest.raises(MythosError, match=r"one.tokenizer was made for .*390.*asks for .*400.*run\.dir"):
        load("one", TokenizerConfig(name="bpe", vocab_size=400))
    load(None, TokenizerConfig(name="bpe", vocab_size=400))
    assert len(trained_on) == 2


def test_the_whole_corpus_is_read_for_training(corpus: Corpus) -> None:
    assert sorted(training_documents([(corpus, 1.0)], 0.0)) == sorted(make_documents(200))


def test_corpora_are_read_in_proportion_to_their_weights(corpus: Corpus, tmp_path: Path) -> None:
    others = [f"other {text}" for text in make_documents(2000, seed=1)]
    write_parquet(tmp_path / "other.parquet", others)
    documents = training_documents([(corpus, 1.0), (opened(tmp_path / "other.parquet"), 3.0)], 0.0)
    first = list(islice(documents, 400))
    share = sum(len(text) for text in first if text.startswith("other")) / sum(map(len, first))
    assert share == pytest.approx(0.75, abs=0.02)
    assert sorted([*first, *documents]) == sorted(make_documents(200) + others), "then what is left of the longer"


def test_a_copy_for_a_worker_encodes_alike(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (copy.eos_id, copy.fingerprint) == (tokenizer.eos_id, tokenizer.fingerprint)


def test_local_path(corpus: Corpus, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer._fast.save_pretrained(tmp_path / "local")
    config = TokenizerConfig(name=str(tmp_path / "local"))
    for _ in range(2):  # the second time from the run directory
        loaded = load_tokenizer(config, [(corpus, 1.0)], run_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
        assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    with pytest.raises(MythosError, match="was made for"):
        load_tokenizer(
            TokenizerConfig(name="bpe"), [(corpus, 1.0)], run_dir=tmp_path / "run", cache_dir=tmp_path / "cache"
        )


def test_refused_tokenizers(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"tokenizer\.name: nobody/nothing cannot be loaded.*or bpe"):
        load_tokenizer(TokenizerConfig(name="nobody/nothing"), [(corpus, 1.0)], run_dir=None, cache_dir=tmp_path)
    backend = Backend(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "endless")
    with pytest.raises(MythosError, match="has no end-of-document token"):
        Tokenizer.load(tmp_path / "endless")
    write_parquet(tmp_path / "x.parquet", ["", None])
    empty = opened(tmp_path / "x.parquet")
    with pytest.raises(MythosError, match="no document with text"):
        load_tokenizer(TokenizerConfig(name="bpe"), [(empty, 1.0)], run_dir=None, cache_dir=tmp_path, progress=False)
    with pytest.raises(MythosError, match="at least 384"):
        load_tokenizer(TokenizerConfig(name="bpe", vocab_size=300), [(empty, 1.0)], run_dir=None, cache_dir=tmp_path)


def test_vocabulary_must_fit(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, 400)
    check_vocabulary(tokenizer, 385)  # the embedding has 512 rows
    with pytest.raises(
        MythosError, match=r"model\.vocab_size: 384 is smaller .* 400 ids\. Set model\.vocab_size: auto"
    ):
        check_vocabulary(tokenizer, 384)
