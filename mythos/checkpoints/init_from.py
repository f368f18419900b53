"""The weights that a new run starts from (train.init_from): what fits is taken, and all else is told."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mythos.checkpoints.checkpoint import complete_checkpoints
from mythos.checkpoints.preflight import FREE_MODEL_FIELDS
from mythos.checkpoints.stored_model import StoredModel, stored_model, tensors_of
from mythos.config.sections import Config
from mythos.data.tokenizer import Tokenizer, check_vocabulary
from mythos.distributed.ranks import Ranks
from mythos.errors import MythosError
from mythos.model.config import padded_vocab_size
from mythos.model.layers import place, starting_value
from mythos.model.rdt import RecurrentDepthTransformer

CHANGEABLE = FREE_MODEL_FIELDS | {"vocab_size", "halting", "lora_rank", "loop_embedding", "rope_theta"}
"""Fields of the model that may differ from those of the model that a run starts from."""
SCALES = "recurrence.adapter.scale"
LEAST_SHARED = 0.1
"""Share of a tokenizer's tokens that the source's has at least; with fewer its rows are of no use."""
BATCH_BYTES = 2**28
"""Of tensors that are read at once; a larger one is read alone."""


class Rows(NamedTuple):
    """Where the rows of a table of token ids come from."""

    source: Tensor
    """(rows,) int64: the row of the source's table, or -1."""
    at_mean: Tensor
    """(rows,) bool: rows that start at the mean of the source's tokens; what is neither starts as in a new model."""
    meant: Tensor
    """(n,) int64: the source's rows that mean a token."""


@dataclass
class Start:
    """A model on a disk whose weights a run takes. Close it once they are taken."""

    stored: StoredModel
    files: contextlib.ExitStack
    told: list[str]
    """What is taken, changed and started anew, for people."""
    rows: Rows | None = None
    """None where token ids mean the same and are as many."""

    def close(self) -> None:
        """Let go of the model's files."""
        self.files.close()

    def match(self, config: Config, tokenizer: Tokenizer | None) -> None:
        """Compare with the run's model, whose vocabulary is known by now, and tell what becomes of which tensor.

        Raises MythosError for tokenizers that have too little in common.
        """
        source = None if self.stored.tokenizer is None else Tokenizer.load(self.stored.tokenizer)
        self.rows = self._match_rows(source, tokenizer, int(config.model.vocab_size))
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        here, there = tensors_of(model), tensors_of(self.stored.model)
        taken = self._taken(model)
        differing = [n for n in taken if here[n].shape != there[n].shape and n != SCALES and not _is_table(n)]
        if differing:
            first = differing[0]
            raise MythosError(
                f"train.init_from: {self.stored.source} is of another shape: {first} is {tuple(there[first].shape)} "
                f"there, {tuple(here[first].shape)} here"
            )
        count = sum(there[name].numel() for name in taken)
        self.told.insert(
            0, f"{self.stored.source} at step {self.stored.step}: {count:,} values of {len(taken)} tensors"
        )
        if SCALES in taken and (old := len(there[SCALES])) != (new := len(here[SCALES])):
            what = "the last scale is repeated" if new > old else "the scales of the first are kept"
            self.told.append(f"depth-wise adapter: {old} -> {new} loops; {what}")
        for what, names in (("new", here.keys() - taken), ("not taken", there.keys() - taken)):
            if names:
                self.told.append(f"{what}: {_shortened(names)}")

    @torch.no_grad()
    def fill(self, model: RecurrentDepthTransformer, seed: int) -> None:
        """Give the model, which has its starting values, the source's. Each rank reads, and nothing is sent.

        Beside the model a rank holds some tensors at a time, whole. Raises MythosError if a file cannot be read.
        """
        here, there = tensors_of(model), tensors_of(self.stored.model)
        for names in _batches(self._taken(model), there):
            read = {name: torch.empty_like(there[name], device="cpu") for name in names}
            self.stored.read(read)
            for name in names:
                value = read.pop(name)
                if name == SCALES:
                    value = value[torch.arange(len(here[name])).clamp(max=len(value) - 1)]
                elif _is_table(name) and self.rows is not None:
                    value = _with_rows(value, starting_value(model, name, seed), self.rows)
                place(value, here[name])

    def _taken(self, model: RecurrentDepthTransformer) -> list[str]:
        """The tensors whose values are the source's, or made of them."""
        source, target = self.stored.model.config, model.config
        left = ("halting.",) if source.halting != target.halting else ()
        left += ("recurrence.adapter.",) if source.lora_rank != target.lora_rank else ()
        there = tensors_of(self.stored.model)
        return [name for name in tensors_of(model) if name in there and not name.startswith(left)]

    def _match_rows(self, source: Tokenizer | None, target: Tokenizer | None, size: int) -> Rows | None:
        """Rows of the run's tables of `size` ids, padded, by those of the source's."""
        old, new = self.stored.model.vocabulary, padded_vocab_size(size)
        if (source is None) != (target is None):
            lacking = (
                "the model has no tokenizer, and the run" if source is None else "the run has no tokenizer, and it"
            )
            raise MythosError(
                f"train.init_from: {self.stored.source}: {lacking} has one: their token ids have nothing in common. "
                "Start from a model of the same kind of data"
            )
        known = {} if source is None else source.backend.get_vocab()
        wanted = {} if target is None else target.backend.get_vocab()
        if known == wanted:
            if old == new:
                return None
            places = torch.arange(new)
            self.told.append(f"vocabulary: {old:,} -> {new:,} rows of the same tokens; further ones are new")
            return Rows(places.where(places < old, -1), torch.zeros(new, dtype=torch.bool), places[:0])
        assert source is not None and target is not None
        places, at_mean = torch.full((new,), -1), torch.zeros(new, dtype=torch.bool)
        for token, row in wanted.items():
            places[row] = known.get(token, -1)
        if places[target.eos_id] < 0:
            places[target.eos_id] = source.eos_id  # by whatever name, it ends a document
        at_mean[list(wanted.values())] = True
        at_mean &= places < 0
        shared = len(wanted) - int(at_mean.sum())
        if shared < LEAST_SHARED * len(wanted):
            raise MythosError(
                f"train.init_from: {self.stored.source}: its tokenizer has {shared:,} of the {len(wanted):,} tokens of "
                f"this run's ({target.request['name']}), too few for its embedding to be of use. Set tokenizer.name to "
                f"{self.stored.tokenizer}, or extend that tokenizer"
            )
        others = f"; those of the {len(wanted) - shared:,} others start at the mean of the model's"
        self.told.append(
            f"vocabulary: {shared:,} of the tokenizer's {len(wanted):,} tokens are the model's and keep their rows"
            + (others if shared < len(wanted) else "")
        )
        return Rows(places, at_mean, torch.tensor(sorted(set(known.values()))))


def open_start(config: Config, source: str | None = None) -> Start | None:
    """What train.init_from names (or `source`, a checkpoint of it), its files open; None where that is null.

    Raises MythosError where that is no model, where it is damaged, and where it cannot become the configured one,
    naming every field that would have to be the same.
    """
    if config.train.init_from is None:
        return None
    with contextlib.ExitStack() as files:
        try:
            stored = files.enter_context(stored_model(source or config.train.init_from))
        except MythosError as error:
            raise MythosError(f"train.init_from: {error}") from error
        there, here = stored.model.config.model_dump(mode="json"), config.model.model_dump(mode="json")
        differing = [name for name in here if name not in CHANGEABLE and here[name] != there[name]]
        if differing:
            lines = [f"  model.{name}: {there[name]!r} in the model, {here[name]!r} here" for name in differing]
            raise MythosError(
                f"train.init_from: {config.train.init_from} is of another model:\n"
                + "\n".join(lines)
                + "\nLeave these fields out, and model.preset too: then they are the model's own."
            )
        changed = sorted(CHANGEABLE - {"preset", "vocab_size", "router_bias_rate", "state_init", "ponder_weight"})
        told = [f"{name}: {there[name]} -> {here[name]}" for name in changed if here[name] != there[name]]
        return Start(stored, files.pop_all(), told)


def agreed_start(config: Config, ranks: Ranks) -> Start | None:
    """:func:`open_start` by all ranks, which take the checkpoint that rank 0 finds: a source may be training on.

    Raises MythosError on all of them if one does.
    """
    first = ranks.agreed(lambda: open_start(config) if ranks.main else None)
    source = ranks.broadcast(first and first.stored.source)
    return ranks.agreed(lambda: first if ranks.main or source is None else open_start(config, source))


def told_before(config: Config) -> list[str]:
    """What is known of the start of a run before it has opened its data; nothing where train.init_from is not given.

    Raises MythosError as `open_start` and `Start.match` do.
    """
    if config.train.init_from is None:
        return []
    if complete_checkpoints(config.checkpoint.dir or config.run_dir / "checkpoints"):
        return ["the run continues from its own checkpoints; train.init_from is not read"]
    start = open_start(config)
    assert start is not None
    with start.files:
        text, name = config.data.kind != "reasoning", config.tokenizer.name
        if text and name == "bpe":
            return [f"{start.stored.source}", *start.told, "vocabulary: compared once the tokenizer has been trained"]
        tokenizer = Tokenizer.load(name) if text else None
        if config.model.vocab_size == "auto":
            assert tokenizer is not None
            sized = config.model.model_copy(update={"vocab_size": tokenizer.padded_size})
            config = config.model_copy(update={"model": sized})
        if tokenizer is not None:
            check_vocabulary(tokenizer, int(config.model.vocab_size))
        start.match(config, tokenizer)
        return start.told


def _is_table(name: str) -> bool:
    """Whether a tensor has a row for every token id."""
    return name in ("embedding.weight", "head.weight") or name.startswith("value_embeddings.")


def _with_rows(old: Tensor, new: Tensor, rows: Rows) -> Tensor:
    """A table (rows, n) of the source's rows, their mean, and the rows of a new model."""
    kept = rows.source >= 0
    new[kept] = old[rows.source[kept]]
    if rows.at_mean.any():
        # Logits of a new token are then like those of others (Hewitt 2021, "Initializing New Word Embeddings for
        # Pretrained Language Models").
        new[rows.at_mean] = old[rows.meant].mean(0)
    return new


def _batches(names: list[str], tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    batch: list[str] = []
    for name in names:
        if batch and sum(tensors[n].nbytes for n in [*batch, name]) > BATCH_BYTES:
            yield batch
            batch = []
        batch.append(name)
    yield batch


def _shortened(names: set[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")
