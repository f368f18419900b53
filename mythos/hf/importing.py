"""Published looped models as exports of ours: `mythos.hf.importers` knows the architectures."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import AutoTokenizer

from mythos.checkpoints.stored_model import StoredModel, tensors_of
from mythos.config.inherited import MODEL_TYPE, TOKENIZER_FILE
from mythos.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from mythos.errors import MythosError, short_reason
from mythos.hf.card import model_card
from mythos.hf.export import SHARD_SIZE, Exported, check_destination, write_export
from mythos.hf.foreign import ForeignModel, foreign_model, located, read_values
from mythos.hf.importers import architecture_of
from mythos.hf.importers.architecture import Architecture, Mapped, Read, Values
from mythos.model.rdt import RecurrentDepthTransformer

SMALLEST_SHARE = 0.9
"""Of a model's token ids, those that its tokenizer has at least: tables are padded, but not by more."""


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    exported: Exported
    architecture: str
    tokenizer: bool
    """Whether a tokenizer came with it."""


def import_model(
    source: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = SHARD_SIZE,
) -> Imported:
    """Write a published looped model as `mythos.hf.export.export_model` writes ours, whole or not at all.

    Its weights are read tensor by tensor, and those of one file written are in memory at a time.

    Args:
        source: a folder, or OWNER/NAME of a repository of the hub.
        folder: new or empty.
        revision: commit, branch or tag of the repository.
        tokenizer: folder or repository (default: what lies with the weights; for a repository also the one that the
            architecture's models share).
        dtype: see `export_model`. bfloat16 rounds what the import has scaled.
        max_shard_size: see `export_model`.

    Raises:
        MythosError: the folder has something in it or cannot be written; the source cannot be read, is of an
            architecture that is not known, or of a variant that ours has no equal of; tensors are missing, left over or
            of other shapes; or the tokenizer cannot be used, or is of another model.
    """
    folder = check_destination(folder, dtype)
    place = located(source, revision)
    architecture = _told(place, read_values(place))
    with foreign_model(place) as foreign, TemporaryDirectory() as aside:
        mapped = map_foreign(foreign, architecture)
        found = tokenizer
        if found is None and (place / TOKENIZER_FILE).is_file():
            found = place
        elif found is None and not Path(source).is_dir():
            found = architecture.tokenizer
        prepared = None if found is None else prepare_tokenizer(found, architecture, mapped, Path(aside) / "tokenizer")
        with stored_foreign(foreign, mapped, prepared, str(source)) as stored:
            text = model_card(stored, folder.name, [])
            text += f"\n## Source\n\nImported from `{source if place != Path(source) else place.name}` "
            text += f"({architecture.name}); the results are the same.\n"
            exported = write_export(stored, folder, text, dtype, max_shard_size)
    return Imported(exported, architecture.name, prepared is not None)


def _told(place: Path, values: Values) -> Architecture:
    if values.get("model_type") == MODEL_TYPE:
        raise MythosError(f"{place} is a mythos model already: give it to the other commands as it is")
    try:
        return architecture_of(values)
    except MythosError as error:
        raise MythosError(f"{place} is of {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise MythosError(f"{place}: its config.json has values of other kinds: {error}") from error


def map_foreign(foreign: ForeignModel, architecture: Architecture) -> Mapped:
    """How the model's tensors become ours, if all of them do and none is missing.

    Raises MythosError telling everything that is not as it should be.
    """
    held = len(foreign.shapes)
    for name, count in foreign.values.items():  # before as many names as that are made
        if name.startswith(("n_layers", "num_hidden_layers")) and isinstance(count, int) and count > held:
            raise MythosError(f"{foreign.folder}: its config.json says {name} {count}, and there are {held} tensors")
    try:
        mapped = architecture.map(foreign.values)
    except MythosError as error:
        raise MythosError(f"{foreign.folder}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise MythosError(f"{foreign.folder}: its config.json has values of other kinds: {error}") from error
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in tensors_of(RecurrentDepthTransformer(mapped.config)).items()}
    used = {name for made in mapped.made.values() for name in made.names}
    problems = [f"{name} is not used" for name in sorted(foreign.shapes.keys() - used - mapped.unused)]
    problems += [f"{name} is missing" for name in sorted(used - foreign.shapes.keys())]
    problems += [f"nothing is there for our {name}" for name in sorted(ours.keys() - mapped.made.keys())]
    problems += [f"our model has no {name}" for name in sorted(mapped.made.keys() - ours.keys())]
    for name, made in mapped.made.items():
        if name not in ours or not set(made.names) <= foreign.shapes.keys():
            continue
        given = {part: foreign.shapes[part] for part in made.names}
        try:
            with torch.device("meta"):
                shape = tuple(made.make(*(torch.empty(part) for part in given.values())).shape)
        except (RuntimeError, ValueError, IndexError):
            shape = None
        if shape != ours[name]:
            told = ", ".join(f"{part} is {size}" for part, size in given.items())
            problems.append(f"{told}, which does not make our {name}, {ours[name]}")
    if not problems:
        checks = [check for name, check in mapped.checks.items() if name in foreign.shapes]
        try:
            problems = [told for check in checks if (told := check(_float32(foreign))) is not None]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            problems = [f"a tensor is of another shape: {short_reason(error)}"]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise MythosError(
            f"{foreign.folder} is not the {architecture.name} that its config.json describes: "
            f"{'; '.join(problems[:8])}{more}"
        )
    return mapped


def _float32(foreign: ForeignModel) -> Read:
    return lambda name: foreign.read(name).float()


@contextlib.contextmanager
def stored_foreign(foreign: ForeignModel, mapped: Mapped, tokenizer: Path | None, source: str) -> Iterator[StoredModel]:
    """The model as if it were one of ours on a disk."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(mapped.config).eval()
    read = _float32(foreign)

    def fill(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            made = mapped.made[name]
            tensor.copy_(made.make(*map(read, made.names)))

    yield StoredModel(model, fill, tokenizer, mapped.mean_loops, 0, None, source)


def prepare_tokenizer(name: str | Path, architecture: Architecture, mapped: Mapped, folder: Path) -> Path:
    """Write a tokenizer of somebody else's so that ours loads it, and look whether it is the model's."""
    place = located(name, tokenizer_only=True)
    called = place.name if Path(name).is_dir() else str(name)  # no path of this machine goes into an export
    try:
        fast = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # formats of many kinds share no base class
        raise MythosError(f"tokenizer {name} cannot be loaded: {short_reason(error)}") from error
    vocabulary = fast.get_vocab()
    if fast.eos_token_id is None and END_OF_DOCUMENT not in vocabulary and architecture.end_token in vocabulary:
        fast.eos_token = architecture.end_token
    rows, size = int(mapped.config.vocab_size), max(vocabulary.values(), default=-1) + 1
    if not SMALLEST_SHARE * rows <= size <= rows:
        raise MythosError(
            f"tokenizer {name} has {size} ids, and the model {rows}: it is of another model. Give the model's own by "
            "--tokenizer, a folder or OWNER/NAME on the hub"
        )
    Tokenizer(fast, {"name": called}).save(folder)
    return folder
