"""Tokenizers: round trips, exact bytes, the tokenizer of a run, and invalid ones."""

import json
import os
import pickle
import signal
from itertools import islice, product
from pathlib import Path

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mythos.config.data import DataConfig
from mythos.config.sections import TokenizerConfig
from mythos.data import tokenizer as tokenizer_module
from mythos.data.corpus import Corpus, is_held_out, open_corpus
from mythos.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_bpe, training_documents
from mythos.errors import MythosError

from .conftest import make_documents, text_source, write_parquet

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


def test_a_full_disk_is_reported_in_one_message(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A limit on the size of files makes the tokenizers library fail as a full disk does."""
    resource = pytest.importorskip("resource")
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        with pytest.raises(MythosError, match=r"saved cannot be written: .*File too large.*Fix that"):
            tokenizer.save(tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    tokenizer.save(tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for name in ("notes", "link"):
        with pytest.raises(MythosError, match=f"{name} is in the way: it is not a folder that mythos wrote"):
            tokenizer.save(tmp_path / name)
    assert (tmp_path / "notes" / "a.txt").exists() and (tmp_path / "link").is_symlink()
    (tmp_path / "empty").mkdir()
    tokenizer.save(tmp_path / "empty")
    assert Tokenizer.load(tmp_path / "empty").fingerprint == tokenizer.fingerprint


def test_a_fifo_in_its_folder_is_never_waited_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "saved" / "tokenizer.json")
    with pytest.raises(MythosError, match="it is not a regular file"):
        Tokenizer.load(tmp_path / "saved")


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


CONTROL = ["<|endoftext|>", "<tool>", "<raw>", "[left]", "[right]", "word", "<MiXed>"]


def with_added_tokens(tokenizer: Tokenizer, folder: Path, special: bool, lowercase: bool = False) -> Tokenizer:
    """A copy with control tokens of every kind, and one that is white space, all marked alike."""
    backend = Backend.from_str(tokenizer._fast.backend_tokenizer.to_str())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    add = backend.add_special_tokens if special else backend.add_tokens
    add(
        [
            AddedToken("<tool>", normalized=True),
            AddedToken("<raw>", normalized=False),
            AddedToken("[left]", lstrip=True),
            AddedToken("[right]", rstrip=True),
            AddedToken("word", single_word=True),
            AddedToken("<MiXed>", normalized=True),
        ]
    )
    backend.add_tokens([AddedToken("    ")])
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = special and bool(token["content"].strip())
    PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(description))).save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(("special", "lowercase"), [*product([True, False], repeat=2)])
def test_text_that_spells_an_added_token_is_text(
    special: bool, lowercase: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    added = with_added_tokens(tokenizer, tmp_path / "a", special, lowercase)
    numbers = {added.backend.token_to_id(token) for token in CONTROL}
    assert len(numbers) == len(CONTROL) and added.eos_id in numbers
    texts = [form.format(token) for token in CONTROL for form in ("{}", "a {} b", "a{}b", "{0}{0}", "\n{}\n")]
    for copy in (added, pickle.loads(pickle.dumps(added))):
        for text, ids in zip(texts, copy.encode_batch(texts), strict=True):
            assert numbers.isdisjoint(ids), text
            assert added.decode(ids) == (text.lower() if lowercase else text)
            assert copy.encode_with_bytes(text)[0] == ids
    spaces = added.backend.token_to_id("    ")
    assert added.encode_batch(["a    b"])[0].count(spaces) == 1, "white space is no control token"
    # Saved, the tokenizer is the original one.
    added.save(tmp_path / "saved")
    saved, before = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("saved", "a"))
    assert saved("a <tool> [left] word b").input_ids == before("a <tool> [left] word b").input_ids
    assert added.backend.token_to_id("<tool>") in before("a <tool> b").input_ids
    assert [token.special for token in saved.added_tokens_decoder.values()] == [
        token.special for token in before.added_tokens_decoder.values()
    ]
    assert Tokenizer.load(tmp_path / "saved").fingerprint == added.fingerprint


def test_documents_hold_the_end_of_document_token_at_their_end_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    added = with_added_tokens(tokenizer, tmp_path / "a", special=False)
    write_parquet(tmp_path / "x.parquet", ["one <|endoftext|> two", "<|endoftext|>", "<tool>"])
    source = text_source(tmp_path / "x.parquet", added)
    for _, ids in source.read(0, 0, 1):
        assert list(ids).count(added.eos_id) == 1 and ids[-1] == added.eos_id
        assert added.backend.token_to_id("<tool>") not in ids
    held_out = text_source(tmp_path / "x.parquet", added, holdout_fraction=1.0)
    assert all(added.eos_id not in ids for ids, _ in held_out.held_out())


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_a_model_that_has_the_token_in_its_own_vocabulary(kind: str, special: bool, tmp_path: Path) -> None:
    """The library then matches it in text whatever its settings; it is encoded as its characters instead."""
    letters = ["a", "b", "<", "/", "s", ">"]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in letters)]
    words = {name: index for index, (name, _) in enumerate(pieces)}
    model = models.Unigram(pieces, unk_id=0) if kind == "unigram" else models.WordLevel(words, unk_token="<unk>")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken("</s>", special=special), AddedToken("<unk>", special=special)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "x")
    tokenizer = Tokenizer.load(tmp_path / "x")
    spelled = [words[letter] for letter in "</s>"]
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode_batch(["a </s> b", "a b"]) == [[words["a"], *spelled, words["b"]], [words["a"], words["b"]]]
        assert copy.encode_with_bytes("a </s> b") == ([words["a"], *spelled, words["b"]], [1, 5, 0, 0, 0, 2])
    dropping = Backend(models.BPE({"</s>": 0, "a": 1}, [], ignore_merges=True))
    dropping.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    dropped = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=dropping, eos_token="</s>"), {"name": "x"})
    assert dropped.encode_with_bytes("a </s> a </s>") == ([1, 1], [1, 12]), "no character is in its vocabulary"
    backend = Backend(models.WordLevel({"<unk>": 0, ".": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(MythosError, match=r"has '\.' both as a control token and as a character of text"):
        Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="."), {"name": "x"})


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"name": 1}', b"\xff", b"[" * 100_000, b"{" * 9, b"\0", b'"name"'], ids=repr
)
def test_a_damaged_request(content: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "request.json").write_bytes(content)
    with pytest.raises(MythosError, match=r"tokenizer: .*request\.json cannot be read"):
        Tokenizer.load(tmp_path / "saved")


@pytest.mark.parametrize("place", ["vocab", "added"])
def test_an_id_that_no_vocabulary_has_is_refused(tmp_path: Path, place: str) -> None:
    """The library's table up to this id took 8 GB."""
    train_bpe(iter(["some text and more"]), 384, progress=False).save(tmp_path / "sound")
    Tokenizer.load(tmp_path / "sound")
    file = tmp_path / "sound" / "tokenizer.json"
    content = json.loads(file.read_text())
    if place == "vocab":
        content["model"]["vocab"]["a"] = 2**31
    else:
        content["added_tokens"][0]["id"] = 2**31
    file.write_text(json.dumps(content))
    with pytest.raises(MythosError, match="has a token of id 2147483648; allowed: below 4,194,304"):
        Tokenizer.load(tmp_path / "sound")


def test_a_file_is_a_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "mine.json").write_bytes((tmp_path / "saved" / "tokenizer.json").read_bytes())
    for file in (tmp_path / "mine.json", tmp_path / "saved" / "tokenizer.json"):
        assert Tokenizer.load(file).fingerprint == tokenizer.fingerprint
        config = TokenizerConfig(name=str(file))
        loaded = load_tokenizer(config, [], run_dir=tmp_path / f"run-{file.stem}", cache_dir=tmp_path)
        assert loaded.request == {"name": str(file)}
    backend = Backend(models.WordLevel({"a": 0, "?": 1, "</s>": 2}, unk_token="?"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    fast.save_pretrained(tmp_path / "other")
    # The file alone does not say which token ends a document; the folder around it does.
    assert Tokenizer.load(tmp_path / "other" / "tokenizer.json").eos_id == 2
    (tmp_path / "other" / "tokenizer.json").rename(tmp_path / "alone.json")
    with pytest.raises(MythosError, match=r"no end-of-document token.*tokenizer_config\.json beside"):
        Tokenizer.load(tmp_path / "alone.json")
