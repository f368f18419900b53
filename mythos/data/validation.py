"""The validation set: held-out documents, packed identically at every start of every run on the same data."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mythos.data.json_cache import digest
from mythos.data.source import Source
from mythos.data.stream import number_documents
from mythos.errors import MythosError
from mythos.files.local import replacing
from mythos.files.tensors import save_file
from mythos.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSet:
    """Sequences in a fixed order, packed like training batches.

    Attributes:
        ids: int64 (n, sequence_length + 1).
        document_ids: int32 (n, sequence_length) or None, see :class:`mythos.data.stream.Batch`.
        bytes: int64 (n,), UTF-8 bytes of each row's targets; end-of-document tokens count 0.
    """

    ids: Tensor
    document_ids: Tensor | None
    bytes: Tensor


def validation_set(
    sources: Mapping[str, tuple[Source, float]],
    *,
    sequences: int,
    sequence_length: int,
    eos_id: int,
    mask_documents: bool = False,
    cache_dir: Path | None = None,
    option: str | None = None,
) -> ValidationSet:
    """Pack the first held-out documents of every source, in an order that depends on the source alone.

    Args:
        sources: sources and their weights by name; each contributes sequences in proportion to its weight.
        sequences: number of sequences; fewer are returned if there is not enough text.
        sequence_length: inputs of a sequence.
        eos_id: end-of-document token.
        mask_documents: number the documents of every sequence.
        cache_dir: where the packed set is cached, because collecting it means reading 1 / fraction times as much text.
        option: the command-line option that named the text, for messages; None for the configuration.

    Raises:
        MythosError: there is not enough text for one sequence.
    """
    identity = {name: [source.identity, weight] for name, (source, weight) in sources.items()}
    key = digest([identity, sequences, sequence_length, eos_id])
    cached = cache_dir / f"validation-{key}.safetensors" if cache_dir else None
    tensors = _load(cached)
    if tensors is None:
        tensors = _pack(sources, sequences, sequence_length, eos_id, option)
        if cached:
            _save(cached, tensors)
    ids, sizes = tensors["ids"].long(), tensors["bytes"]
    return ValidationSet(ids, number_documents(ids, eos_id) if mask_documents else None, sizes)


def _pack(
    sources: Mapping[str, tuple[Source, float]], sequences: int, length: int, eos_id: int, option: str | None
) -> dict[str, Tensor]:
    shares = _shares(sequences, [weight for _, weight in sources.values()])
    rows, sizes = [], []
    for (source, _), share in zip(sources.values(), shares, strict=True):
        source_rows, source_sizes = _pack_source(source, share, length, eos_id)
        rows += source_rows
        sizes += source_sizes
    if not rows and option is not None:
        raise MythosError(f"{option}: the text does not fill one sequence of {length} tokens. Give files with more.")
    if not rows:
        raise MythosError(
            f"data.validation: the validation text does not fill one sequence of {length} tokens. Raise "
            "data.validation.fraction, give files in data.validation.path, or lower data.sequence_length."
        )
    if len(rows) < sequences:
        field = option or "data.validation"
        logger.warning("%s: text for %d of %d sequences; using these", field, len(rows), sequences)
    return {"ids": torch.tensor(rows, dtype=torch.int32), "bytes": torch.tensor(sizes)}


def _shares(sequences: int, weights: list[float]) -> list[int]:
    """Integers in proportion to the weights that add up to the sequences."""
    ends = [round(sequences * end / sum(weights)) for end in accumulate(weights)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _pack_source(source: Source, sequences: int, length: int, eos_id: int) -> tuple[list[list[int]], list[int]]:
    """Rows of ids (length + 1), and the bytes of each row's targets.

    Row n starts at token n * length of the concatenated documents, so neighbouring rows share one token.
    """
    wanted = sequences * length + 1
    ids: list[int] = []
    sizes: list[int] = []
    if sequences:
        # Fast for local files; collecting a small share of a large hub dataset takes a while.
        with progress_bar(
            total=wanted, desc="collecting validation text", unit="token", unit_scale=True, delay=3
        ) as bar:
            for document, document_bytes in source.held_out():
                ids += [*document, eos_id]
                sizes += [*document_bytes, 0]
                bar.update(len(document) + 1)
                if len(ids) >= wanted:
                    break
    starts = range(0, min(sequences * length, len(ids) - length), length)
    rows = [ids[start : start + length + 1] for start in starts]
    return rows, [sum(sizes[start + 1 : start + length + 1]) for start in starts]


def _load(path: Path | None) -> dict[str, Tensor] | None:
    if path is None or not path.is_file():
        return None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged (%s) and is packed again", path, error)
        return None


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, unique=True) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:  # the next start packs it again
        logger.warning("data.cache_dir: %s could not be written: %s", path, error)
