"""Export of a trained model as a folder that transformers loads, and upload to the Hugging Face hub."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, split_state_dict_into_shards_factory
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from mythos.checkpoints.stored_model import INDEX_FILE, PREFIX, StoredModel, stored_model, tensors_of
from mythos.config.model_paths import run_directory
from mythos.data.tokenizer import PROBE, REQUEST_FILE, TOKENIZER_CONFIG, Tokenizer
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.local import remedy, replacing_folder
from mythos.files.storage import require_space
from mythos.files.tensors import save_file
from mythos.hf import SHARD_SIZE
from mythos.hf.card import model_card
from mythos.hf.config import MythosConfig
from mythos.hf.model import MythosForCausalLM, float32_tensors
from mythos.training.metrics import METRICS_FILE, read_metrics
from mythos.versions import installed_versions

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARD_NAMES = "model{suffix}.safetensors"
CARD_FILE = "README.md"
LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path")
"""Keys of a tokenizer's configuration that describe how it was loaded on this machine."""
PACKAGES = ("mythos-rdt", "torch", "safetensors", "transformers")
"""Packages whose versions are recorded in an export."""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    folder: Path
    source: str
    step: int
    files: int
    """Number of weight files."""


def export_model(
    path: str | Path,
    folder: str | Path,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = SHARD_SIZE,
    name: str | None = None,
) -> Exported:
    """Write a run, checkpoint or export as a folder for transformers; the folder appears complete or not at all.

    At most one weight file is in memory at a time.

    Args:
        path: anything that `mythos.checkpoints.stored_model.open_model` opens.
        folder: new or empty.
        dtype: type of the stored weights, `float32` or `bfloat16`; see `mythos.hf.model.float32_tensors` for those
            that stay float32.
        max_shard_size: maximum size of a weight file, in bytes or as text: `500MB`, `5GB`. A larger tensor gets its
            own file.
        name: name of the model in its card (default: the folder's name).

    Raises:
        MythosError: the folder is not empty or cannot be written, the type or size is invalid, or `open_model` fails.
    """
    folder = check_destination(folder, dtype)
    with stored_model(path) as stored:
        return write_export(stored, folder, _card(stored, path, name or folder.name), dtype, max_shard_size)


def check_destination(folder: str | Path, dtype: str) -> Path:
    """The folder as a path; call it before anything is read.

    Raises MythosError if the folder is not empty or has no name, or the type is invalid.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise MythosError(f"dtype: got {dtype!r}; allowed: {', '.join(DTYPES)}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise MythosError(f"{folder} exists and is not empty; give a folder that is new or empty.")
    if not folder.name:  # "."
        raise MythosError(f"{folder} has no name; give a folder that is new or empty.")
    return folder


def write_export(
    stored: StoredModel,
    folder: Path,
    card: str,
    dtype: str,
    max_shard_size: int | str,
    texts: Mapping[str, str] | None = None,
) -> Exported:
    """Write a stored model to a new or empty folder, with this card and further text files by name.

    See `export_model`. Raises MythosError if the folder cannot be written, or the size is invalid.
    """
    try:
        with replacing_folder(folder) as temporary:
            tokenizer = None if stored.tokenizer is None else _write_tokenizer(stored.tokenizer, stored, temporary)
            _config(stored, DTYPES[dtype]).save_pretrained(temporary)
            _generation_config(stored, tokenizer).save_pretrained(temporary)
            for file, text in {CARD_FILE: card, **(texts or {})}.items():
                (temporary / file).write_text(text, encoding="utf-8")
            files = _write_weights(stored, temporary, DTYPES[dtype], max_shard_size)
    except (OSError, SafetensorError) as error:
        raise MythosError(f"{folder} cannot be written: {error}. {remedy(error)} or give another folder.") from error
    return Exported(folder, without_credentials(stored.source), stored.step, files)


def push(folder: str | Path, repository: str) -> str:
    """Upload an exported folder to the hub repository OWNER/NAME and return its URL.

    A repository that does not exist is created as a private one. Raises MythosError if the hub cannot be reached or
    refuses.
    """
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export")
        return str(url)
    except Exception as error:  # network, hub and name errors share no base class
        raise MythosError(
            f"{folder} is exported, but the upload to {repository} failed: {short_reason(error)}. Log in by `hf auth "
            f"login` or $HF_TOKEN, then run `hf upload {repository} {folder}`."
        ) from error


def _write_weights(stored: StoredModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> int:
    """Read and write the tensors one file at a time; returns the number of files."""
    whole = float32_tensors(stored.model)
    planned = {
        name: torch.empty(tensor.shape, dtype=torch.float32 if name in whole else dtype, device="meta")
        for name, tensor in tensors_of(stored.model).items()
    }
    try:
        plan = split_state_dict_into_shards_factory(
            planned,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=SHARD_NAMES,
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise MythosError(f"max_shard_size: got {max_shard_size!r}; allowed: such as 500MB or 5GB") from error
    require_space(folder, sum(tensor.nbytes for tensor in planned.values()))
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: torch.empty(planned[name].shape) for name in names}
        stored.read(tensors)
        for name in names:  # one by one, so that only one tensor is in memory in both types
            tensors[name] = tensors[name].to(planned[name].dtype)
        save_file({PREFIX + name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        del tensors  # free them before the next file's are allocated
    if plan.is_sharded:
        weight_map = {PREFIX + name: file for name, file in plan.tensor_to_filename.items()}
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def _write_tokenizer(source: Path, stored: StoredModel, folder: Path) -> Tokenizer:
    """Write the tokenizer so that AutoTokenizer encodes as in training, pads on the left and knows the context.

    A tokenizer without a pad token pads with the end-of-document token, like the generation configuration.
    """
    tokenizer = Tokenizer.load(source)
    temporary = folder / "tokenizer"
    tokenizer.save(temporary)
    fast = AutoTokenizer.from_pretrained(temporary, trust_remote_code=False)
    if fast(PROBE).input_ids != tokenizer.encode_batch([PROBE])[0]:
        # It adds tokens before or after a text, which training did not.
        backend = fast.backend_tokenizer
        backend.post_processor = None
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, **fast.special_tokens_map)
    if fast.pad_token is None:  # batches need one; attention masks keep it from being read
        fast.pad_token = str(fast.backend_tokenizer.id_to_token(tokenizer.eos_id))
    fast.save_pretrained(folder)
    shutil.copy(temporary / REQUEST_FILE, folder)
    shutil.rmtree(temporary)
    values = json.loads((folder / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    for key in LOCAL_KEYS:
        values.pop(key, None)
    values |= {"padding_side": "left", "model_max_length": stored.model.config.context_length}
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def _card(stored: StoredModel, path: str | Path, name: str) -> str:
    """The card: generated from the run, or copied if an export is exported again."""
    if stored.run is None:
        card = Path(stored.source) / CARD_FILE
        return card.read_text(encoding="utf-8") if card.is_file() else model_card(stored, name, [])
    # A checkpoint may be outside of its run directory, or the run directory may have been moved.
    candidates = (run_directory(path), run_directory(stored.source), run_directory(stored.run.run_dir))
    run_dir = next((directory for directory in candidates if directory is not None), None)
    return model_card(stored, name, [] if run_dir is None else read_metrics(run_dir / METRICS_FILE))


def _config(stored: StoredModel, dtype: torch.dtype) -> MythosConfig:
    return MythosConfig(
        **stored.model.config.model_dump(),
        mean_loops=stored.mean_loops,
        sequence_length=stored.sequence_length,
        mask_documents=stored.mask_documents,
        step=stored.step,
        versions=installed_versions(PACKAGES),
        architectures=[MythosForCausalLM.__name__],
        dtype=dtype,
    )


def _generation_config(stored: StoredModel, tokenizer: Tokenizer | None) -> GenerationConfig:
    if tokenizer is None:
        return GenerationConfig()
    # The model's vocabulary may be larger than the tokenizer's: the extra ids have no text.
    unused = list(range(tokenizer.size, int(stored.model.config.vocab_size)))
    # An empty prompt starts a new document, which in training follows the end of another.
    end = tokenizer.eos_id
    return GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, suppress_tokens=unused or None)
