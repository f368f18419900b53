"""Tokenizers: any fast Hugging Face tokenizer, or a byte-level BPE trained on the corpus."""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set before the library is imported: otherwise the first fork after a batch warns and disables its threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mythos.config.inherited import TOKENIZER_FILE
from mythos.config.sections import TokenizerConfig
from mythos.data.corpus import Corpus, in_fixed_order, is_held_out
from mythos.data.json_cache import digest
from mythos.errors import MythosError, short_reason
from mythos.files.local import check_regular_files, remedy, replacing_folder
from mythos.files.text import read_json, unusable_text
from mythos.model.config import padded_vocab_size
from mythos.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_DOCUMENT = "<|endoftext|>"
MINIMUM_BPE_SIZE = 384
MOST_IDS = 2**22
"""Upper bound of token ids; the largest published tokenizers have about a million."""

# Text to train a BPE on; more changes the merges of a small vocabulary very little.
BPE_TRAINING_BYTES = 20 * 10**6

# The configuration that a saved tokenizer was made for, to refuse a run directory of another configuration.
REQUEST_FILE = "request.json"

# Part of the fingerprint: distinguishes tokenizers that share a vocabulary but split text differently.
PROBE = "The loop's depth, 12345.678 times; naïve café 深い\n\n    return x += 1\tEND don't STOP"


class Tokenizer:
    """A fast tokenizer that adds no special tokens, truncation or padding, and has one end-of-document id.

    Text that spells a control token (the end-of-document token or another added token, marked as special or not) is
    encoded as ordinary text, so that the ids of control tokens occur only where this project puts them. Added tokens of
    white space (runs of spaces, say) are ordinary text and are encoded as the tokenizer does it.

    Attributes:
        eos_id: the end-of-document token: ``<|endoftext|>`` if the tokenizer has it, else its eos token.
        size: highest id + 1.
        backend: the tokenizer of the library ``tokenizers``, set up for encoding data.
        padded_size: ``size`` rounded up to a multiple of 128.
        fingerprint: identifies vocabulary, end-of-document token and segmentation.
        request: the configuration that the tokenizer was made for.

    Raises MythosError without a fast implementation or an end-of-document token, and for one that is a character of
    ordinary text.
    """

    def __init__(self, fast: "PreTrainedTokenizerBase", request: dict[str, Any]) -> None:
        from transformers import PreTrainedTokenizerFast

        name = request["name"]
        if not isinstance(fast, PreTrainedTokenizerFast):
            raise MythosError(f"tokenizer.name: {name} has no fast implementation. Use one that has a tokenizer.json.")
        self.request = request
        self._fast: PreTrainedTokenizerFast = fast
        self.backend: Backend = _with_added_tokens_special(fast.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab()
        eos_id = vocabulary.get(END_OF_DOCUMENT, fast.eos_token_id)
        if eos_id is None:
            raise MythosError(
                f"tokenizer.name: {name} has no end-of-document token (neither {END_OF_DOCUMENT} nor an eos token). "
                f"Use a tokenizer that has one (a {TOKENIZER_CONFIG} beside its {TOKENIZER_FILE} names it), or "
                "tokenizer.name: bpe."
            )
        self.eos_id: int = eos_id
        self._spelled = self._spelled_out(name)
        self.size: int = max(vocabulary.values()) + 1
        self.padded_size: int = padded_vocab_size(self.size)
        identity = [sorted(vocabulary.items(), key=lambda item: item[1]), eos_id, self.encode_batch([PROBE])]
        self.fingerprint: str = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process only encodes, which saves it the import of transformers, of seconds."""
        return {**self.__dict__, "_fast": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self.backend.encode_special_tokens = True

    def _spelled_out(self, name: str) -> dict[int, list[int]]:
        """Control tokens that are encoded as such in text after all, each with the ids of its single characters.

        That happens if the model's own vocabulary has the token: no setting of the library keeps a Unigram or
        word-level model from matching it. Raises MythosError if a single character is such a token.
        """
        # The token for unknown text is not a control token, although it may be marked as one.
        model = json.loads(self.backend.to_str())["model"]
        unknown = (model.get("unk_token"), model.get("unk_id"))
        control: dict[int, str] = {
            number: token.content
            for number, token in self.backend.get_added_tokens_decoder().items()
            if not _is_ordinary(token.content) and token.content not in unknown and number not in unknown
        }
        control[self.eos_id] = str(self.backend.id_to_token(self.eos_id))
        in_text = [
            number
            for form in ("{}", " {} ", "a{}a", "{0}{0}")
            for number, ids in zip(control, self._encode([form.format(text) for text in control.values()]), strict=True)
            if number in ids
        ]
        spelled = {number: list(chain.from_iterable(self._encode(list(control[number])))) for number in in_text}
        for ids in spelled.values():
            for number in ids:
                if number in spelled:
                    raise MythosError(
                        f"tokenizer.name: {name} has {control[number]!r} both as a control token and as a character of "
                        "text, which could not be told apart. Use another tokenizer, or tokenizer.name: bpe."
                    )
        return spelled

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, no special tokens added."""
        encoded = self._encode(list(texts))
        if not self._spelled:
            return encoded
        return [[part for number in ids for part in self._spelled.get(number, [number])] for ids in encoded]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids, and the number of UTF-8 bytes of ``text`` for which each accounts; they add up to the whole text.

        A character that spans several tokens counts for the first of them; text that the tokenizer drops counts for the
        next token, or for the last one. A text without any token has no bytes.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        ends: list[int] = []  # bytes of text up to the end of each token
        done = 0  # characters counted
        total = 0  # their bytes
        for _, end in encoding.offsets:
            if end > done:
                total += len(text[done:end].encode())
                done = end
            ends.append(total)
        total = len(text.encode())
        if ends:
            ends[-1] = total
        ids: list[int] = []
        sizes: list[int] = []
        counted = 0
        for number, end in zip(encoding.ids, ends, strict=True):
            if parts := self._spelled.get(number, [number]):
                ids += parts
                sizes += [end - counted, *[0] * (len(parts) - 1)]
                counted = end
        if sizes:
            sizes[-1] += total - counted
        return ids, sizes

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        text = self._fast.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list of texts only for lists of lists
        return text

    def save(self, directory: Path | str) -> None:
        """Write the tokenizer as a folder that Hugging Face and :meth:`load` can read; replaces an existing tokenizer.

        Raises MythosError if the folder cannot be written, or is not a tokenizer that this project has written.
        """
        directory = Path(directory)
        if os.path.lexists(directory) and not _replaceable(directory):
            raise MythosError(
                f"tokenizer: {directory} is in the way: it is not a folder that mythos wrote (with {REQUEST_FILE}). "
                "Move it away, or give another folder (run.dir, data.cache_dir or $MYTHOS_CACHE)."
            )
        # A setting for encoding data in this process, not a part of the tokenizer that others load.
        self.backend.encode_special_tokens = False
        try:
            with replacing_folder(directory) as temporary:
                # Written here first, because the library reports a full disk as a plain Exception.
                (temporary / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
                self._fast.save_pretrained(str(temporary))
                (temporary / REQUEST_FILE).write_text(json.dumps(self.request))
                if directory.exists():
                    shutil.rmtree(directory)
        except OSError as error:
            raise MythosError(
                f"tokenizer: {directory} cannot be written: {error}. {remedy(error)} or give another folder (run.dir, "
                "data.cache_dir or $MYTHOS_CACHE)."
            ) from error
        finally:
            self.backend.encode_special_tokens = True

    @classmethod
    def load(cls, name: Path | str) -> "Tokenizer":
        """Load a saved or any Hugging Face tokenizer by folder, file or hub id; code from the hub is never run.

        Raises MythosError if it cannot be found, reached or used.
        """
        # Imported late because it takes a second or more.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(name)
        if path.name == TOKENIZER_FILE and (path.parent / TOKENIZER_CONFIG).is_file():
            path = path.parent  # whose files also say which token ends a document
        if path.is_dir():
            try:
                check_regular_files(path)
            except OSError as error:
                raise MythosError(f"tokenizer: {name} cannot be read: {error}") from error
        saved = path / REQUEST_FILE
        request = _read_request(saved) if saved.is_file() else {"name": str(name)}
        try:
            _check_ids(path)
            fast: PreTrainedTokenizerBase
            if path.is_file():
                fast = PreTrainedTokenizerFast(tokenizer_file=str(path))
            else:
                # Without trust_remote_code the library would ask on the terminal.
                fast = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
            return cls(fast, request)
        except MythosError:
            raise
        except Exception as error:  # errors of the hub, the network and the format share no base class
            reason = short_reason(error)
            raise MythosError(
                f"tokenizer.name: {name} cannot be loaded: {reason}. Give a Hugging Face id (needs the network or its "
                "cache), the path of a saved tokenizer, or bpe to train one on the corpus."
            ) from error


def _replaceable(directory: Path) -> bool:
    """Whether a folder is a tokenizer that this project has written, or empty."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    return (directory / REQUEST_FILE).is_file() or not any(directory.iterdir())


def load_tokenizer(
    config: TokenizerConfig,
    corpora: Sequence[tuple[Corpus, float]],
    *,
    run_dir: Path | None,
    cache_dir: Path,
    holdout_fraction: float = 0.0,
    progress: bool = True,
) -> Tokenizer:
    """The tokenizer of a run: the one saved in ``run_dir`` if there is one, else trained (bpe) or loaded by name.

    With a ``run_dir`` the tokenizer is also written to ``run_dir/tokenizer``. A bpe is trained on the documents of the
    corpora, in proportion to their weights, that are not held out (:func:`mythos.data.corpus.is_held_out`); it is
    cached by corpora, size and share held out. Raises MythosError if the run directory's tokenizer is not the
    configured one, or none can be trained or loaded.
    """
    request: dict[str, Any] = {"name": config.name}
    if config.name == "bpe":
        request["vocab_size"] = config.vocab_size
    saved = run_dir / "tokenizer" if run_dir else None
    if saved and saved.is_dir():
        tokenizer = Tokenizer.load(saved)
        # Another name may stand for the same tokenizer: the copy beside pre-tokenized text, for example.
        if tokenizer.request != request and (
            config.name == "bpe" or Tokenizer.load(config.name).fingerprint != tokenizer.fingerprint
        ):
            raise MythosError(
                f"tokenizer: {saved} was made for {tokenizer.request}, the configuration asks for {request}. Give the "
                "run another run.dir, or the former tokenizer settings."
            )
        return tokenizer
    if config.name != "bpe":
        tokenizer = Tokenizer.load(config.name)
        tokenizer.request = request
    else:
        identity = [[corpus.fingerprint, weight] for corpus, weight in corpora]
        cached = cache_dir / f"bpe-{config.vocab_size}-{digest([identity, config.vocab_size, holdout_fraction])[:16]}"
        if cached.is_dir():
            tokenizer = Tokenizer.load(cached)
        else:
            documents = training_documents(corpora, holdout_fraction)
            tokenizer = train_bpe(documents, config.vocab_size, progress=progress)
            tokenizer.save(cached)
    if saved:
        tokenizer.save(saved)
    return tokenizer


def training_documents(corpora: Sequence[tuple[Corpus, float]], holdout_fraction: float) -> Iterator[str]:
    """Documents that are not held out, interleaved so that each corpus has its weight's share of the characters.

    Within a corpus they come shard by shard, in an order that does not depend on names.
    """
    readers = [_documents(corpus, holdout_fraction) for corpus, _ in corpora]
    shares = {index: 0.0 for index in range(len(readers))}  # characters so far / weight
    while shares:
        index = min(shares, key=shares.__getitem__)
        document = next(readers[index], None)
        if document is None:
            del shares[index]
        else:
            shares[index] += len(document) / corpora[index][1]
            yield document


def _documents(corpus: Corpus, holdout_fraction: float) -> Iterator[str]:
    for shard in in_fixed_order(len(corpus.shards)):
        for _, document in corpus.read(shard):
            if isinstance(document, str) and not is_held_out(document, holdout_fraction):
                yield document


def train_bpe(documents: Iterator[str], vocab_size: int, *, progress: bool = True) -> Tokenizer:
    """Train a byte-level BPE (every byte has a token, so any text round-trips) on about 20 MB of documents.

    Raises MythosError if ``vocab_size`` is below 384, or there is no text.
    """
    if vocab_size < MINIMUM_BPE_SIZE:
        raise MythosError(
            f"tokenizer.vocab_size: {vocab_size} is too small for a byte-level bpe; give at least {MINIMUM_BPE_SIZE}."
        )
    from transformers import PreTrainedTokenizerFast

    texts: list[str] = []
    read = 0
    with progress_bar(
        total=BPE_TRAINING_BYTES, unit="B", unit_scale=True, desc="reading text for the tokenizer", disable=not progress
    ) as bar:
        for document in documents:
            texts.append(document)
            size = len(document.encode())
            read += size
            bar.update(size)
            if read >= BPE_TRAINING_BYTES:
                break
        bar.total = read
        bar.refresh()
    if not texts:
        raise MythosError("data: the corpus has no document with text to train a tokenizer on.")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),  # into a file its bars are empty lines
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_DOCUMENT)
    tokenizer = Tokenizer(fast, {"name": "bpe", "vocab_size": vocab_size})
    if tokenizer.size < vocab_size:
        logger.warning("tokenizer.vocab_size: the corpus has text for %d of %d tokens", tokenizer.size, vocab_size)
    return tokenizer


def _with_added_tokens_special(backend: Backend) -> Backend:
    """The tokenizer, or a copy in which every added token but white space is marked as special.

    Needed because ``encode_special_tokens``, which encodes tokens spelled in text as text, applies to special tokens
    only. A copy, because the marks would be saved with the tokenizer.
    """
    plain = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    if all(map(_is_ordinary, plain)):
        return backend
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] or not _is_ordinary(token["content"])
    return Backend.from_str(json.dumps(description))


def _is_ordinary(token: str) -> bool:
    return not token.strip()


def _read_request(path: Path) -> dict[str, Any]:
    try:
        request = read_json(path)
        if not isinstance(request, dict) or not isinstance(request.get("name"), str) or unusable_text(request):
            raise ValueError("it names no tokenizer")
    except (OSError, ValueError) as error:
        raise MythosError(
            f"tokenizer: {path} cannot be read: {short_reason(error)}. Restore it, or delete it if the folder is a "
            "tokenizer from elsewhere."
        ) from error
    return request


def _check_ids(path: Path) -> None:
    """Raise ValueError for an absurdly high token id: the library allocates a table up to the highest id."""
    file = path if path.is_file() else path / TOKENIZER_FILE
    if not file.is_file():
        return
    content = read_json(file)
    vocabulary = content["model"].get("vocab")
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ())]
    ids += [token["id"] for token in content.get("added_tokens") or ()]
    highest = max((number for number in ids if isinstance(number, int)), default=0)
    if highest >= MOST_IDS:
        raise ValueError(f"{file} has a token of id {highest}; allowed: below {MOST_IDS:,}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise MythosError if ``vocab_size``, padded to a multiple of 128, is smaller than the tokenizer.

    The model's embedding would have no row for some tokens.
    """
    if padded_vocab_size(vocab_size) < tokenizer.size:
        raise MythosError(
            f"model.vocab_size: {vocab_size} is smaller than the tokenizer ({tokenizer.request['name']}), which has "
            f"{tokenizer.size} ids. Set model.vocab_size: auto, or use another tokenizer."
        )
