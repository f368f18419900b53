"""Small training runs for the tests: a generated corpus, a model of 25,000 parameters, and what a run leaves behind."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from mythos.config.loading import config_from_dict
from mythos.config.sections import Config
from mythos.training.metrics import read_metrics

SUBJECTS = ("river", "garden", "signal", "letter", "number", "morning", "stone", "engine")
VERBS = ("crosses", "finds", "follows", "carries", "repeats")

MEASURED_TIME = {"time", "tokens_per_second", "peak_memory_bytes", "resumed_from"}
"""Keys of a record that are not a function of the configuration."""

SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "dim": 32,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "ffn_dim": 48,
        "n_experts": 4,
        "expert_dim": 16,
        "shared_expert_dim": 16,
        "loops": 3,
        "lora_rank": 2,
        "context_length": 64,
    },
    "tokenizer": {"vocab_size": 384},
    "data": {"kind": "files", "streams": 2, "sequence_length": 32, "workers": 0, "validation": {"fraction": 0.2}},
    "depth": {"backprop": 2, "curriculum": {"shape": "linear", "over": 0.5, "start": 1}},
    "train": {"steps": 4, "global_batch": 8, "micro_batch": 4, "dtype": "float32", "device": "cpu"},
    "eval": {"every": 0, "batches": 4, "loops": [1, 3], "samples": 0, "sample_tokens": 4},
    "checkpoint": {"every": 0},
    "log": {"every": 1},
}


def documents(count: int = 80) -> list[str]:
    """Repetitive English sentences, every document distinct."""
    return [
        f"Page {n}. "
        + " ".join(
            f"The {SUBJECTS[(n + k) % 8]} {VERBS[(3 * n + k) % 5]} the {SUBJECTS[(5 * k + n) % 8]}."
            for k in range(4 + n % 7)
        )
        for n in range(count)
    ]


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    """A complete configuration as plain values, its run and corpus in `directory`; `train__steps=2` changes a field."""
    corpus = directory / "corpus.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    values: dict[str, Any] = copy.deepcopy(SETTINGS)
    values["run"] = {"name": "tiny", "dir": str(directory / "run")}
    values["data"]["path"] = str(corpus)
    for path, value in changes.items():
        *sections, field = path.split("__")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[field] = value
    return values


def tiny(directory: Path, **changes: Any) -> Config:
    """:func:`settings` as a configuration."""
    return config_from_dict(settings(directory, **changes))


def write_settings(directory: Path, **changes: Any) -> Path:
    """:func:`settings` as a YAML file."""
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(directory, **changes)))
    return path


def measurements(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run without what depends on the machine's speed."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in MEASURED_TIME} for record in records]


def losses(run_dir: Path) -> list[float]:
    """The training loss of every record."""
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl")]
