"""Starting a run from another model's weights (train.init_from), and reporting which tensors are taken."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mythos.checkpoints.preflight import FREE_MODEL_FIELDS, model_differences, resolve_vocabulary
from mythos.checkpoints.shards import in_one_piece, spread
from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.checkpoints.stored_model import StoredModel, stored_model, tensors_of
from mythos.config.sections import Config
from mythos.data.tokenizer import Tokenizer, check_vocabulary
from mythos.distributed.ranks import Ranks
from mythos.errors import MythosError, without_credentials
from mythos.model.config import padded_vocab_size
from mythos.model.injection import spread_lanes
from mythos.model.layers import is_loop_table, place, starting_value
from mythos.model.rdt import RecurrentDepthTransformer

CHANGEABLE = FREE_MODEL_FIELDS | {
    *("vocab_size", "halting", "lora_rank", "loop_embedding", "router_loop", "loop_norm", "rope_theta"),
}
"""Fields of the model that may differ from the source's. So may `lanes` if the source has one."""
UNREPORTED = {"preset", "vocab_size", "router_bias_rate", "router_loop_start", "state_init", "ponder_weight"}
"""Fields of these whose difference is not printed: no tensor depends on it, or it is reported otherwise."""
SCALES = "recurrence.adapter.scale"
RATES = ("recurrence.injection.dt", "recurrence.injection.log_a")
"""Parameters of which every lane has a row, and a model of one lane only that."""
LEAST_SHARED = 0.1
"""Smallest share of a tokenizer's tokens that the source's tokenizer must have; with fewer its rows are of no use."""
BATCH_BYTES = 2**28
"""Bytes of tensors that are read at once; a larger tensor is read alone."""


class Rows(NamedTuple):
    """The source of each row of a table of token ids. Rows without one start as in a new model."""

    source: Tensor
    """(rows,) int64: the row of the source's table, or -1."""
    at_mean: Tensor
    """(rows,) bool: rows that start at the mean of the source's tokens."""
    used: Tensor
    """(n,) int64: the rows of the source's table that belong to a token, as opposed to padding."""


@dataclass
class Start:
    """A stored model whose weights a run takes. Close it after :meth:`fill`."""

    stored: StoredModel
    files: contextlib.ExitStack
    changes: list[str]
    """Lines for people: which tensors are taken, changed and new."""
    rows: Rows | None = None
    """None if both vocabularies have the same tokens and the same size."""

    def close(self) -> None:
        """Close the model's files."""
        self.files.close()

    def match(self, config: Config, tokenizer: Tokenizer | None) -> None:
        """Compare with the run's model, whose vocabulary is known now, and add to :attr:`changes`.

        Raises MythosError for tokenizers that have too few tokens in common, and for other shapes.
        """
        source = None if self.stored.tokenizer is None else Tokenizer.load(self.stored.tokenizer)
        self.rows = self._match_rows(source, tokenizer, int(config.model.vocab_size))
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        here, there = tensors_of(model), tensors_of(self.stored.model)
        taken = self._taken(model)
        resized = [name for name in taken if here[name].shape != there[name].shape]
        differing = [n for n in resized if not _has_row_per_loop(n, here[n]) and not _is_table(n) and n not in RATES]
        if differing:
            first = differing[0]
            raise MythosError(
                f"train.init_from: {self.stored.source} has other shapes: {first} is {tuple(there[first].shape)} "
                f"there, {tuple(here[first].shape)} here"
            )
        count = sum(there[name].numel() for name in taken)
        values = f"{count:,} values of {len(taken)} tensors"
        self.changes.insert(0, f"{without_credentials(self.stored.source)} at step {self.stored.step}: {values}")
        for name in resized:
            if _has_row_per_loop(name, here[name]):
                old, new = len(there[name]), len(here[name])
                part, row = ("depth-wise adapter", "scale") if name == SCALES else (name, "row")
                what = f"the last {row} is repeated" if new > old else f"the {row}s of the first are kept"
                self.changes.append(f"{part}: {old} -> {new} loops; {what}")
        for what, names in (("new", here.keys() - taken), ("not taken", there.keys() - taken)):
            if names:
                self.changes.append(f"{what}: {_shortened(names)}")

    @torch.no_grad()
    def fill(self, model: RecurrentDepthTransformer, seed: int) -> None:
        """Copy the source's values into the model, which has its starting values. Each rank reads; none sends.

        Beside the model a rank needs memory for about BATCH_BYTES, or the largest tensor that is no stack of experts.
        Raises MythosError if a file cannot be read.
        """
        here, there = tensors_of(model), tensors_of(self.stored.model)
        for names in _batches(self._taken(model), there):
            # Of experts that ranks share, each reads its own part: all of them may be more than a machine's memory.
            shared = {name: in_one_piece(here[name]) for name in names if _is_divided(here[name])}
            values = {name: torch.empty_like(there[name], device="cpu") for name in names if name not in shared}
            self.stored.read(shared | values)
            for name, piece in shared.items():
                spread(piece, here[name])
            for name in list(values):
                value = values.pop(name)
                if _has_row_per_loop(name, here[name]):
                    value = value[torch.arange(len(here[name])).clamp(max=len(value) - 1)]
                elif name in RATES and value.ndim < here[name].ndim:
                    value = spread_lanes(name.rpartition(".")[2], value, len(here[name]))
                elif _is_table(name) and self.rows is not None:
                    value = _with_rows(value, starting_value(model, name, seed), self.rows)
                place(value, here[name])
        # A new table of the loop starts at zero, where it changes nothing, even if a new model would start with noise.
        for name in here.keys() - there.keys():
            if is_loop_table(name):
                here[name].zero_()

    def _taken(self, model: RecurrentDepthTransformer) -> list[str]:
        """Names of the tensors whose values come from the source."""
        source, target = self.stored.model.config, model.config
        new: tuple[str, ...] = ("halting.",) if source.halting != target.halting else ()
        new += ("recurrence.adapter.",) if source.lora_rank != target.lora_rank else ()
        there = tensors_of(self.stored.model)
        return [name for name in tensors_of(model) if name in there and not name.startswith(new)]

    def _match_rows(self, source: Tokenizer | None, target: Tokenizer | None, size: int) -> Rows | None:
        """The source rows of the run's tables of `size` token ids, padded; None if the tables correspond row by row."""
        old, new = self.stored.model.vocabulary, padded_vocab_size(size)
        if (source is None) != (target is None):
            has_one = "the run has one" if source is None else "it has one"
            lacks_one = "the model has no tokenizer" if source is None else "the run has no tokenizer"
            raise MythosError(
                f"train.init_from: {self.stored.source}: {lacks_one}, and {has_one}: their token ids have nothing in "
                "common. Start from a model of the same kind of data"
            )
        known = {} if source is None else source.backend.get_vocab()
        wanted = {} if target is None else target.backend.get_vocab()
        if known == wanted:
            if old == new:
                return None
            places = torch.arange(new)
            self.changes.append(f"vocabulary: {old:,} -> {new:,} rows of the same tokens; further ones are new")
            return Rows(places.where(places < old, -1), torch.zeros(new, dtype=torch.bool), places[:0])
        assert source is not None and target is not None
        places, at_mean = torch.full((new,), -1), torch.zeros(new, dtype=torch.bool)
        for token, row in wanted.items():
            places[row] = known.get(token, -1)
        if places[target.eos_id] < 0:
            places[target.eos_id] = source.eos_id  # both end a document, whatever their names
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
        self.changes.append(
            f"vocabulary: {shared:,} of the tokenizer's {len(wanted):,} tokens are the model's and keep their rows"
            + (others if shared < len(wanted) else "")
        )
        return Rows(places, at_mean, torch.tensor(sorted(set(known.values()))))


def open_start(config: Config, source: str | None = None) -> Start | None:
    """Open the model of train.init_from (or `source`, a checkpoint of it); None if the field is null.

    Raises MythosError if it is not a model, is damaged, or cannot become the configured model; the message names every
    field that would have to be the same.
    """
    if config.train.init_from is None:
        return None
    with contextlib.ExitStack() as files:
        try:
            stored = files.enter_context(stored_model(source or config.train.init_from))
        except MythosError as error:
            raise MythosError(f"train.init_from: {error}") from error
        there, here = stored.model.config.model_dump(mode="json"), config.model.model_dump(mode="json")
        changeable = CHANGEABLE | ({"lanes"} if there["lanes"] == 1 else set())
        if differences := model_differences(there, config.model, changeable, "in the model"):
            raise MythosError(
                f"train.init_from: {config.train.init_from} is of another model:\n{differences}\n"
                "Leave these fields out, and model.preset too: then they are the model's own."
            )
        reported = sorted(changeable - UNREPORTED)
        changes = [f"{name}: {there[name]} -> {here[name]}" for name in reported if here[name] != there[name]]
        return Start(stored, files.pop_all(), changes)


def agreed_start(config: Config, ranks: Ranks) -> Start | None:
    """:func:`open_start` on all ranks. All open the checkpoint that rank 0 finds, because the source may still train.

    Raises MythosError on all of them if one does.
    """
    first = ranks.agreed(lambda: open_start(config) if ranks.main else None)
    source = ranks.broadcast(first and first.stored.source)
    return ranks.agreed(lambda: first if ranks.main or source is None else open_start(config, source))


def planned_start(config: Config) -> list[str]:
    """`Start.changes` of a run, as far as they are known before its data is opened; [] without train.init_from.

    Raises MythosError as `open_start` and `Start.match`.
    """
    if config.train.init_from is None:
        return []
    if complete_checkpoints(config.checkpoints_dir):
        return ["the run continues from its own checkpoints; train.init_from is not read"]
    start = open_start(config)
    assert start is not None
    with start.files:
        text, name = config.data.kind != "reasoning", config.tokenizer.name
        if text and name == "bpe":
            later = "vocabulary: compared once the tokenizer has been trained"
            return [without_credentials(start.stored.source), *start.changes, later]
        tokenizer = Tokenizer.load(name) if text else None
        if tokenizer is not None:
            config = resolve_vocabulary(config, tokenizer.padded_size)
            check_vocabulary(tokenizer, int(config.model.vocab_size))
        start.match(config, tokenizer)
        return start.changes


def _is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a stack of experts that FSDP2 or ranks divide, or is cut in both dimensions."""
    if not isinstance(tensor, DTensor):
        return False
    return tensor.ndim == 3 or sum(not placement.is_replicate() for placement in tensor.placements) > 1


def _has_row_per_loop(name: str, tensor: Tensor) -> bool:
    """Whether a tensor has a row for each trained loop."""
    return name == SCALES or is_loop_table(name) or (name.endswith("router.bias") and tensor.ndim > 1)


def _is_table(name: str) -> bool:
    """Whether a tensor has a row for every token id."""
    return name in ("embedding.weight", "head.weight") or name.startswith("value_embeddings.")


def _with_rows(old: Tensor, new: Tensor, rows: Rows) -> Tensor:
    """`new`, a table (rows, n) of a new model, with the source's rows of `old`, or their mean, filled in."""
    kept = rows.source >= 0
    new[kept] = old[rows.source[kept]]
    if rows.at_mean.any():
        # A new token's logits are then similar to other tokens' (Hewitt 2021, "Initializing New Word Embeddings for
        # Pretrained Language Models").
        new[rows.at_mean] = old[rows.used].mean(0)
    return new


def _batches(names: list[str], tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names in groups of at most BATCH_BYTES, or a single tensor."""
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
