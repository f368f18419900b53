"""Imports published looped models as exports of ours; `mythos.hf.importers` has the architectures."""

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
from mythos.hf import SHARD_SIZE
from mythos.hf.card import model_card
from mythos.hf.export import Exported, check_destination, write_export
from mythos.hf.foreign import ForeignModel, foreign_model, local_folder, read_values
from mythos.hf.importers import architecture_of
from mythos.hf.importers.architecture import Architecture, MappedModel, Read, Values
from mythos.model.rdt import RecurrentDepthTransformer

SMALLEST_SHARE = 0.9
"""Smallest share of a model's vocabulary that its tokenizer covers: tables are padded, but never by a tenth."""
MOST_PROBLEMS = 8
"""Problems listed in an error message."""


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    exported: Exported
    architecture: str
    tokenizer: bool
    """Whether a tokenizer was imported too."""


def import_model(
    source: str | Path,
    folder: str | Path,
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: str = "float32",
    max_shard_size: int | str = SHARD_SIZE,
) -> Imported:
    """Write a published looped model in the format of `mythos.hf.export.export_model`.

    The folder appears complete or not at all. Weights are read tensor by tensor; at most one written file is in memory.

    Args:
        source: a folder, or OWNER/NAME of a hub repository.
        folder: new or empty.
        revision: commit, branch or tag of the repository.
        tokenizer: folder or repository (default: the one beside the weights; for a repository, otherwise the one that
            all models of the architecture share).
        dtype: see `export_model`. bfloat16 rounds weights that the import has scaled.
        max_shard_size: see `export_model`.

    Raises:
        MythosError: the folder is not empty or cannot be written; the source cannot be read, is of an unknown
            architecture or of a variant that our model cannot represent; tensors are missing, left over or of another
            shape; or the tokenizer cannot be loaded or belongs to another model.
    """
    folder = check_destination(folder, dtype)
    source_folder = local_folder(source, revision)
    architecture = recognised(source_folder, read_values(source_folder))
    if tokenizer is None and (source_folder / TOKENIZER_FILE).is_file():
        tokenizer = source_folder
    elif tokenizer is None and not Path(source).is_dir():
        tokenizer = architecture.tokenizer
    with foreign_model(source_folder) as foreign, TemporaryDirectory() as temporary:
        mapped = map_foreign(foreign, architecture)
        prepared = None
        if tokenizer is not None:
            prepared = prepare_tokenizer(tokenizer, architecture, mapped, Path(temporary) / "tokenizer")
        stored = stored_foreign(foreign, mapped, prepared, str(source))
        card = model_card(stored, folder.name, [])
        card += f"\n## Source\n\nImported from `{public_name(source)}` ({architecture.name}); it computes the same.\n"
        exported = write_export(stored, folder, card, dtype, max_shard_size)
    return Imported(exported, architecture.name, prepared is not None)


def public_name(source: str | Path) -> str:
    """A source as an export may name it: of a folder the name only, no path of this machine."""
    return Path(source).name if Path(source).is_dir() else str(source)


def recognised(folder: Path, values: Values) -> Architecture:
    """The architecture of a model in `folder`. Raises MythosError for a mythos model and unknown architectures."""
    if values.get("model_type") == MODEL_TYPE:
        raise MythosError(f"{folder} is a mythos model already: give it to the other commands as it is")
    try:
        return architecture_of(values)
    except MythosError as error:
        raise MythosError(f"{folder} is of {error}") from error
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise MythosError(f"{folder}: its config.json has values of unexpected types: {error}") from error


def map_foreign(foreign: ForeignModel, architecture: Architecture) -> MappedModel:
    """How to compute our tensors from a foreign model.

    Raises MythosError listing tensors that are missing, left over, of another shape or with other contents.
    """
    count = len(foreign.shapes)
    # A damaged config.json may ask for billions of layers: check before listing their names.
    for name, layers in foreign.values.items():
        if name.startswith(("n_layers", "num_hidden_layers")) and isinstance(layers, int) and layers > count:
            raise MythosError(f"{foreign.folder}: its config.json says {name} {layers}, and there are {count} tensors")
    try:
        mapped = architecture.map(foreign.values)
    except MythosError as error:
        raise MythosError(f"{foreign.folder}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise MythosError(f"{foreign.folder}: its config.json has values of unexpected types: {error}") from error
    problems = tensor_problems(foreign, mapped)
    if not problems:
        checks = [check for name, check in mapped.checks.items() if name in foreign.shapes]
        try:
            problems = [problem for check in checks if (problem := check(_float32(foreign))) is not None]
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            problems = [f"a tensor has another shape: {short_reason(error)}"]
    if problems:
        more = f" and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise MythosError(
            f"{foreign.folder} is not the {architecture.name} that its config.json describes: "
            f"{'; '.join(problems[:MOST_PROBLEMS])}{more}"
        )
    return mapped


def tensor_problems(foreign: ForeignModel, mapped: MappedModel) -> list[str]:
    """Names and shapes that do not match, from shapes alone."""
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in tensors_of(RecurrentDepthTransformer(mapped.config)).items()}
    used = {name for derived in mapped.tensors.values() for name in derived.sources}
    problems = [f"{name} is not used" for name in sorted(foreign.shapes.keys() - used - mapped.unused)]
    problems += [f"{name} is missing" for name in sorted(used - foreign.shapes.keys())]
    problems += [f"nothing corresponds to our {name}" for name in sorted(ours.keys() - mapped.tensors.keys())]
    problems += [f"our model has no {name}" for name in sorted(mapped.tensors.keys() - ours.keys())]
    for name, derived in mapped.tensors.items():
        if name not in ours or not set(derived.sources) <= foreign.shapes.keys():
            continue
        shapes = {source: foreign.shapes[source] for source in derived.sources}
        try:
            with torch.device("meta"):
                shape = tuple(derived.compute(*(torch.empty(size) for size in shapes.values())).shape)
        except (RuntimeError, ValueError, IndexError):
            shape = None
        if shape != ours[name]:
            sizes = ", ".join(f"{source} is {size}" for source, size in shapes.items())
            problems.append(f"{sizes}, which does not give our {name}, {ours[name]}")
    return problems


def _float32(foreign: ForeignModel) -> Read:
    return lambda name: foreign.read(name).float()


def stored_foreign(foreign: ForeignModel, mapped: MappedModel, tokenizer: Path | None, source: str) -> StoredModel:
    """The foreign model with the interface of a stored model of ours."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(mapped.config).eval()
    read = _float32(foreign)

    def fill(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            derived = mapped.tensors[name]
            tensor.copy_(derived.compute(*map(read, derived.sources)))

    return StoredModel(model, fill, tokenizer, mapped.mean_loops, 0, None, source)


def prepare_tokenizer(source: str | Path, architecture: Architecture, mapped: MappedModel, folder: Path) -> Path:
    """Write a foreign tokenizer to `folder` in our format and return the folder.

    Raises MythosError if it cannot be loaded, or if its size shows that it belongs to another model.
    """
    source_folder = local_folder(source, tokenizer_only=True)
    try:
        fast = AutoTokenizer.from_pretrained(source_folder, trust_remote_code=False)
    except Exception as error:  # the many formats share no base class of errors
        raise MythosError(f"tokenizer {source} cannot be loaded: {short_reason(error)}") from error
    vocabulary = fast.get_vocab()
    if fast.eos_token_id is None and END_OF_DOCUMENT not in vocabulary and architecture.end_token in vocabulary:
        fast.eos_token = architecture.end_token
    rows, size = int(mapped.config.vocab_size), max(vocabulary.values(), default=-1) + 1
    if not SMALLEST_SHARE * rows <= size <= rows:
        raise MythosError(
            f"tokenizer {source} has {size} ids, and the model {rows}: it belongs to another model. Give the model's "
            "own by --tokenizer, a folder or OWNER/NAME on the hub"
        )
    # `Tokenizer` itself refuses tokenizers that are not fast.
    Tokenizer(fast, {"name": public_name(source)}).save(folder)
    return folder
