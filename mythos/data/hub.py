"""Hub datasets: find the commit and the files of a subset and split."""

import glob
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import constants

from mythos.data.formats import EXTENSIONS
from mythos.data.json_cache import digest, load_cached, store_cached
from mythos.data.remote import Unreachable, hub_json, hub_tree, hub_url, open_remote
from mythos.errors import MythosError, import_optional, short_reason

# Files in which a dataset declares the files of its subsets and splits.
DECLARATIONS = ("README.md", ".huggingface.yaml")
# Declares no files, and `datasets` fails on an empty one.
LEGACY = "dataset_infos.json"
CONVERTED = "The hub may hold a conversion to parquet: data.revision=refs/convert/parquet."


@dataclass(frozen=True)
class HubFiles:
    """The files of a subset and split.

    Attributes:
        revision: the commit; None for a local folder.
        files: (hf:// URL or local path, size in bytes), sorted.
    """

    revision: str | None
    files: list[tuple[str, int]]


def resolve_hub(
    dataset: str, subset: str | None, split: str, revision: str | None, cache_dir: Path, patience: float
) -> HubFiles:
    """Find the files of a hub dataset, or of a local folder with the layout of one, by the rules of ``datasets``.

    The list is cached in ``cache_dir``; for a ``revision`` that is a commit this saves all requests.

    Args:
        dataset: NAMESPACE/NAME on the hub, or a folder.
        subset: name of a configuration; None for the default.
        split: such as train.
        revision: branch, tag or commit; None for the main branch. Ignored for a folder.
        cache_dir: folder of cached lists.
        patience: seconds without an answer after which to give up.

    Raises:
        MythosError: no such dataset, revision, subset or split, or files of other formats; it names the field.
        Unreachable: the hub gave no answer within ``patience`` seconds.
    """
    if os.path.isdir(os.path.expanduser(dataset)):
        folder = Path(dataset).expanduser().resolve()
        if glob.escape(str(folder)) == str(folder):
            paths = _select(folder, dataset, subset, split)
        else:  # `datasets` reads the folder's name as a glob, so it gets a copy of the tree under another name
            tree = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            declarations = {name: (folder / name).read_bytes() for name in DECLARATIONS if name in tree}
            paths = _select_of(tree, declarations, dataset, subset, split)
        return HubFiles(None, [(str(folder / path), (folder / path).stat().st_size) for path in paths])
    if revision is None or not re.fullmatch("[0-9a-f]{40}", revision):
        revision = _commit(dataset, revision, patience)
    path = cache_dir / "hub" / f"{digest([dataset, subset, split, revision])}.json"
    sizes = load_cached(path)
    if sizes is None:
        sizes = _list(dataset, subset, split, revision, patience)
        store_cached(path, sizes)
    return HubFiles(revision, [(hub_url("dataset", dataset, revision, path), size) for path, size in sizes.items()])


def _commit(dataset: str, revision: str | None, patience: float) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(dataset)
        if "/" not in dataset:
            raise HFValidationError("it has no namespace")
    except HFValidationError as error:
        raise MythosError(
            f"data.dataset: {dataset} is neither a folder nor the id of a hub dataset. Give a folder that exists, or "
            "NAMESPACE/NAME, such as HuggingFaceFW/fineweb-edu."
        ) from error
    revision = revision or constants.DEFAULT_REVISION
    with _naming_fields(dataset, revision):
        answer, _ = hub_json(f"/api/datasets/{dataset}/revision/{quote(revision, safe='')}", patience)
    if not isinstance(answer, dict) or not isinstance(answer.get("sha"), str):
        raise MythosError(
            f"data.dataset: the answer of {constants.ENDPOINT} names no commit of {dataset}: {answer!r:.80}"
        )
    return answer["sha"]


def _list(dataset: str, subset: str | None, split: str, revision: str, patience: float) -> dict[str, int]:
    """Path in the repository -> bytes, for the files of the subset and split."""
    with _naming_fields(dataset, revision):
        tree = hub_tree("dataset", dataset, revision, "", patience)
        declarations = {
            path: open_remote(hub_url("dataset", dataset, revision, path), tree[path], patience).read()
            for path in DECLARATIONS
            if path in tree
        }
    # `datasets` itself would ask the hub with its own retries and timeouts, whatever the patience. It applies the same
    # rules to a local folder, so it gets one.
    return {path: tree[path] for path in _select_of(tree, declarations, dataset, subset, split)}


def _select_of(
    tree: Iterable[str], declarations: Mapping[str, bytes], dataset: str, subset: str | None, split: str
) -> list[str]:
    """Apply :func:`_select` to a temporary folder with these paths; all files but the declarations are empty."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for path in tree:
            file = folder / path
            if ".." in file.parts or not file.is_relative_to(folder):
                raise MythosError(f"data.dataset: {dataset} contains a file {path}, outside of its own folder.")
            if path == LEGACY:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(declarations.get(path, b""))
        return _select(folder, dataset, subset, split)


def _select(folder: Path, dataset: str, subset: str | None, split: str) -> list[str]:
    """Paths in a folder of the files that ``datasets`` assigns to the subset and split, sorted."""
    datasets = import_optional("datasets", "data.kind: hub")  # imported late: it takes a second

    with tempfile.TemporaryDirectory() as cache:
        try:
            subsets = datasets.get_dataset_config_names(str(folder))
            chosen = subset or datasets.get_dataset_default_config_name(str(folder))
            if chosen in subsets:
                splits = datasets.load_dataset_builder(str(folder), chosen, cache_dir=cache).config.data_files or {}
        except Exception as error:  # errors of datasets, fsspec and the YAML header share no base class
            raise MythosError(
                f"data.dataset: the files of {dataset} cannot be determined: {short_reason(error)}. Check its "
                f"README.md, or name the files with data.kind: files. {CONVERTED}"
            ) from error
    if chosen not in subsets:
        problem = f"no subset {subset}" if subset else "no default subset"
        raise MythosError(f"data.subset: {dataset} has {problem}; it has {_some(subsets)}. Choose one of them.")
    if split not in splits:
        raise MythosError(
            f"data.split: {dataset}, subset {chosen}, has no split {split}; it has {_some(map(str, splits))}. "
            "Choose one of them."
        )
    files = sorted({Path(file) for file in splits[split]})
    for file in files:
        if not file.is_relative_to(folder):
            raise MythosError(
                f"data.dataset: {dataset}, subset {chosen}, refers to files elsewhere ({file}). Name them with "
                "data.kind: files."
            )
        if not file.name.endswith(EXTENSIONS):
            raise MythosError(
                f"data.dataset: {dataset}, subset {chosen}, contains {file.relative_to(folder).as_posix()}; "
                f"readable formats are {', '.join(EXTENSIONS)}. {CONVERTED}"
            )
    return [file.relative_to(folder).as_posix() for file in files]


@contextmanager
def _naming_fields(dataset: str, revision: str) -> Iterator[None]:
    """Name the wrong field in errors of the hub."""
    try:
        yield
    except Unreachable:
        raise
    except MythosError as error:
        response = getattr(error.__cause__, "response", None)
        if response is not None and response.headers.get("X-Error-Code") == "RevisionNotFound":
            raise MythosError(
                f"data.revision: {dataset} has no branch, tag or commit {revision}. Give one that it has, or null for "
                "the newest."
            ) from error
        raise MythosError(f"data.dataset: {error}") from error


def _some(names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
