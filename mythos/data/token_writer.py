"""Tokenize a corpus into a folder of token shards; :mod:`mythos.data.tokens` describes the format."""

import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mythos.config.data import SourceConfig
from mythos.data.corpus import Corpus, Skipped, content_hash, holdout_limit
from mythos.data.text_files import Part
from mythos.data.tokenizer import Tokenizer
from mythos.data.tokens import (
    ENTRY,
    FORMAT,
    INDEX,
    LAST_PART,
    PART,
    PLAN,
    STATUS,
    TOKENIZER,
    Shard,
    array_path,
    read_checked,
    read_header,
    read_index,
    write_checked,
)
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.local import remedy, replacing

LEFT_FILE = re.compile(r"((plan|index|\d{5,})\.json|\d{5,}\.(tokens|documents|bytes)\.npy)\.\d+\.tmp")
LEFT_FOLDER = re.compile(rf"\.{TOKENIZER}\.\d+")
"""Names of the temporary files and folders that a killed process leaves; the number is arbitrary."""

# The parts must be the same after a restart with another number of workers, so their size depends on the corpus alone:
# about WANTED_PARTS parts, and at most LARGEST_PART shards in a part, so that an interruption loses little work.
WANTED_PARTS = 256
LARGEST_PART = 64

# Tokenized by one call: enough to be fast, and little memory.
BATCH_ROWS = 256
BATCH_CHARACTERS = 2**20


class TokenWriter:
    """Writes a corpus as token shards, part by part, in any order and by any number of processes.

    All files are written atomically, ``index.json`` after all others. It contains the format's version, the corpus'
    fingerprint and description, the tokenizer, the dtype of tokens, the validation share, totals, and a :class:`Shard`
    for every shard of the corpus.

    `source` describes the corpus in the index, `validation_share` is the share of the documents that can be held out
    later.

    Attributes:
        parts: the shards of every part.

    Every method raises MythosError if the folder cannot be written.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, directory: Path, source: SourceConfig, validation_share: float
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.directory = directory
        self.dtype = np.dtype("<u2" if max(tokenizer.size - 1, tokenizer.eos_id) < 2**16 else "<u4")
        shards = len(corpus.shards)
        size = min(max(-(-shards // WANTED_PARTS), 1), LARGEST_PART)
        self.parts = [range(first, min(first + size, shards)) for first in range(0, shards, size)]
        self._limit = holdout_limit(validation_share)
        self._header = {
            "format": FORMAT,
            "corpus": corpus.fingerprint,
            "source": without_credentials(
                source.model_dump(
                    mode="json", include={"kind", *(source.model_fields_set & SourceConfig.model_fields.keys())}
                )
            ),
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "name": tokenizer.request["name"],
                "eos_id": tokenizer.eos_id,
            },
            "dtype": self.dtype.name,
            "validation_share": validation_share,
        }

    def begin(self) -> list[int]:
        """Prepare the folder and return the unfinished parts; none if the folder is complete.

        Raises MythosError if the folder contains something else, or was begun with another corpus, tokenizer or share.
        """
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            before = read_header(self.directory)
            if before is None:
                if set(self.directory.iterdir()) - set(self.directory.glob(f"{PLAN}.*.tmp")):
                    raise MythosError(f"--out: {self.directory} contains something else. Give a new or empty folder.")
                write_checked(self.directory / PLAN, self._header)
            else:
                self._require_same(before)
                self._header |= {"source": before["source"]}
            for path in self.directory.iterdir():  # what a killed process left
                if LEFT_FILE.fullmatch(path.name) and path.is_file():
                    path.unlink()
                elif LEFT_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
            if (self.directory / INDEX).exists():
                self._reopen()
            if not (self.directory / TOKENIZER).is_dir():
                self.tokenizer.save(self.directory / TOKENIZER)
            parts = range(len(self.parts))
            return [part for part in parts if not (self._part_path(part).exists() and self._has_arrays(part))]

    def write_part(self, part: int, report: Callable[[int, int, int], None] = lambda *_: None) -> None:
        """Tokenize the shards of a part; ``report`` gets the shards, documents and tokens done since its last call.

        Raises MythosError as :meth:`mythos.data.corpus.Corpus.read`.
        """
        with self._writing():
            shards = []
            with ExitStack() as stack:
                tokens, entries, sizes = (
                    stack.enter_context(_open_array(array_path(self.directory, part, kind), dtype))
                    for kind, dtype in (("tokens", self.dtype), ("documents", ENTRY), ("bytes", np.dtype("<u4")))
                )
                for shard in self.parts[part]:
                    shards.append(self._write_shard(shard, part, tokens, entries, sizes, report)._asdict())
                    report(1, 0, 0)
            write_checked(self._part_path(part), {"shards": shards})

    def finish(self) -> dict[str, Any]:
        """Write the index of the finished parts and return it."""
        with self._writing():
            if not (self.directory / INDEX).exists():
                paths = map(self._part_path, range(len(self.parts)))
                shards = [shard for path in paths for shard in read_checked(path)["shards"]]
                skipped: Counter[str] = Counter()
                for shard in shards:
                    skipped.update(shard["skipped"])
                totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
                index = {**self._header, "totals": {**totals, "skipped": dict(skipped)}, "shards": shards}
                write_checked(self.directory / INDEX, index)
            for path in (self.directory / PLAN, *map(self._part_path, range(len(self.parts)))):
                path.unlink(missing_ok=True)
            return read_index(self.directory)

    def _require_same(self, before: dict[str, Any]) -> None:
        for what, old, new in (
            ("corpus", before["corpus"], self.corpus.fingerprint),
            ("tokenizer", before["tokenizer"]["fingerprint"], self.tokenizer.fingerprint),
            ("validation share", before["validation_share"], self._header["validation_share"]),
        ):
            if old != new:
                raise MythosError(
                    f"--out: {self.directory} was begun with another {what} ({old}, now {new}). Give the "
                    "configuration and options with which it was begun, or another folder."
                )

    def _reopen(self) -> None:
        """Turn a complete folder that lacks files into an unfinished one, so that only its lost parts are rewritten."""
        shards = read_index(self.directory)["shards"]
        missing = [part for part in range(len(self.parts)) if not self._has_arrays(part)]
        for part in range(len(self.parts)):
            if part not in missing:
                kept = [shard for shard in shards if shard["part"] == part]
                write_checked(self._part_path(part), {"shards": kept})
        if missing:
            write_checked(self.directory / PLAN, self._header)
            (self.directory / INDEX).unlink()

    def _has_arrays(self, part: int) -> bool:
        return all(array_path(self.directory, part, kind).exists() for kind in ("tokens", "documents", "bytes"))

    def _part_path(self, part: int) -> Path:
        return self.directory / f"{part:05}.json"

    def _write_shard(
        self,
        shard: int,
        part: int,
        tokens: "_ArrayFile",
        entries: "_ArrayFile",
        sizes: "_ArrayFile",
        report: Callable[[int, int, int], None],
    ) -> Shard:
        first_row, first_token, first_size = entries.count, tokens.count, sizes.count
        entries.crc32 = sizes.crc32 = documents = 0
        skipped: Counter[str] = Counter()
        for batch in self._batches(shard):
            start, written = tokens.count, 0
            encoded = self._encoded([text for text, _ in batch if isinstance(text, str)])
            values: list[tuple[int, int, int, int, int]] = []  # as ENTRY
            for document, broke_at in batch:
                if isinstance(document, Skipped):
                    # A break counts once, however many rows it costs.
                    row = entries.count + len(values) - first_row
                    skipped[document.value] += document is not Skipped.SHARD or row == broke_at
                    values.append((tokens.count, 0, 0, broke_at, STATUS[document]))
                    continue
                key, ids, token_bytes = next(encoded)
                status = 0 if not isinstance(document, Part) else PART if document.continues else LAST_PART
                array = np.array(ids if status == PART else [*ids, self.tokenizer.eos_id], self.dtype)
                values.append((tokens.count, len(array), zlib.crc32(array.data), key, status))
                tokens.append(array)
                if token_bytes is not None:
                    sizes.append(np.array(token_bytes, sizes.dtype))
                written += 1
            entries.append(np.array(values, ENTRY))
            documents += written
            report(0, written, tokens.count - start)
        return Shard(
            name=self.corpus.shards[shard],
            part=part,
            first_row=first_row,
            rows=entries.count - first_row,
            crc32=entries.crc32,
            first_size=first_size,
            sizes=sizes.count - first_size,
            sizes_crc32=sizes.crc32,
            documents=documents,
            tokens=tokens.count - first_token,
            skipped=dict(skipped),
            size=self.corpus.sizes[shard],
            ordered=self.corpus.ordered[shard],
        )

    def _batches(self, shard: int) -> Iterator[list[tuple[str | Skipped, int]]]:
        batch: list[tuple[str | Skipped, int]] = []
        characters = 0
        for document, broke_at in self._rows(shard):
            batch.append((document, broke_at))
            characters += len(document) if isinstance(document, str) else 0
            if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _rows(self, shard: int) -> Iterator[tuple[str | Skipped, int]]:
        """Every row in order; for rows lost to a break in the shard, also the row of the break."""
        done = broke_at = 0
        for row, document in self.corpus.read(shard):
            for _ in range(done, row):
                yield Skipped.SHARD, broke_at
            if document is Skipped.SHARD:
                broke_at = row
            yield document, broke_at if document is Skipped.SHARD else 0
            done = row + 1

    def _encoded(self, texts: list[str]) -> Iterator[tuple[int, list[int], list[int] | None]]:
        """Content hash, ids and, where the document may be held out, the bytes of every token."""
        hashes = [content_hash(text) for text in texts]
        others = iter(
            self.tokenizer.encode_batch([text for text, key in zip(texts, hashes, strict=True) if key >= self._limit])
        )
        for text, key in zip(texts, hashes, strict=True):
            yield (key, *self.tokenizer.encode_with_bytes(text)) if key < self._limit else (key, next(others), None)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MythosError(
                f"--out: {self.directory} cannot be written: {short_reason(error)}. {remedy(error)} or give another "
                "folder; the same command continues after the finished parts."
            ) from error


class _ArrayFile:
    """A one-dimensional .npy file that grows.

    Attributes:
        count: items so far.
        crc32: checksum of the items appended since it was last set to 0.
    """

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file = file
        self.dtype = dtype
        self.count = self.crc32 = 0

    def append(self, items: np.ndarray) -> None:
        data = items.tobytes()
        self.file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self.count += len(items)

    def write_header(self) -> None:
        # NumPy pads headers, so that one with a larger number of items has the same size.
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.count,)}
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)


@contextmanager
def _open_array(path: Path, dtype: np.dtype) -> Iterator[_ArrayFile]:
    """Write an array atomically; it appears under its name at the end of the block."""
    with replacing(path, unique=True, durable=True) as temporary, temporary.open("wb") as file:
        array = _ArrayFile(file, dtype)
        array.write_header()
        yield array
        array.write_header()  # with the final number of items
