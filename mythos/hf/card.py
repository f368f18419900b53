"""The model card of an export, from what the run's configuration and metrics say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mythos.checkpoints.stored_model import StoredModel
from mythos.config.data import DataConfig, MixtureSourceConfig
from mythos.config.sections import Config
from mythos.evaluation.validation import losses_by_depth
from mythos.model.config import ModelConfig
from mythos.model.halting import default_threshold
from mythos.planning.flops import count_parameters

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mythos, recurrent-depth, looped-transformer]
---
"""


def model_card(stored: StoredModel, name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the model `name`; `records` are the lines of its run's metrics.jsonl, none if that is not known.

    What the run did after the step that is exported is not told.
    """
    sections = [HEADER + f"# {name}", _what(stored), _use(stored, name)]
    before = [record for record in records if record["step"] <= stored.step]
    curve = next((found for record in reversed(before) if (found := losses_by_depth(record))), {})
    if curve:
        sections.append(_depth(curve, stored.mean_loops))
    if stored.run is not None:
        sections.append(_training(stored.run, stored.step, before))
    return "\n\n".join(sections) + "\n"


def _what(stored: StoredModel) -> str:
    config = stored.model.config
    parameters = count_parameters(config)
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} of them active at a token"
    depth = f"Loops are chosen at inference; training ran {stored.mean_loops} on average."
    return (
        f"A recurrent-depth transformer of {parameters.total:,} parameters{active}, {config.dim} wide. "
        f"Layers: {config.prelude_layers} before the loop, {_core(config)}, {config.coda_layers} after. {depth} "
        f"The context is {config.context_length:,} tokens, the vocabulary {config.vocab_size:,}."
    )


def _core(config: ModelConfig) -> str:
    text = f"{config.core_layers} in it ({config.attention}"
    if config.core_ffn == "moe":
        text += f", {config.n_experts} experts of which a token is sent to {config.experts_per_token}"
        text += f", {config.n_shared_experts} shared" if config.n_shared_experts else ""
    return text + ")"


def _use(stored: StoredModel, name: str) -> str:
    if stored.tokenizer is None:
        return "It was trained on token ids and has no tokenizer. `import mythos` (`pip install mythos-rdt`) lets " + (
            "`AutoModelForCausalLM.from_pretrained` load it."
        )
    text = f"""```python
import mythos  # pip install mythos-rdt
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, num_loops={stored.mean_loops})[0]))
```"""
    if stored.model.config.halting != "none":
        rule = stored.model.config.halting
        threshold = f"{default_threshold(rule):g}"
        text += f"\n\n`generate(..., exit_threshold={threshold})` lets tokens stop earlier, by the rule `{rule}`."
    return "## Use\n\n" + text


def _depth(curve: Mapping[int, float], mean_loops: int) -> str:
    lines = [f"| {loops} | {loss:.4f} | {math.exp(min(loss, 700)):.2f} |" for loops, loss in curve.items()]
    table = "\n".join(["| loops | loss (nats per token) | perplexity |", "|---|---|---|", *lines])
    told = f"Validation with every position run for so many loops; training ran {mean_loops} on average."
    return f"## Depth\n\n{told}\n\n{table}"


def _training(run: Config, step: int, records: Sequence[Mapping[str, Any]]) -> str:
    data, depth, optim = run.data, run.depth, run.optim
    rows = {
        "steps": f"{step:,}",
        "tokens": f"{step * run.tokens_per_step:,}",
        "data": _data(data),
        "sequences": f"{run.train.global_batch:,} a step, of {data.sequence_length:,} tokens",
        "loops": f"{run.depth_mean:g} on average ({depth.sampling}), the last {run.depth_backprop} with gradient",
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}, weight decay {optim.weight_decay:g}",
        "type of products": run.train.dtype,
        "seed": str(run.run.seed),
    }
    measured = {
        "val/bits_per_byte": "bits per byte",
        "val/auto_loss": "loss where the halting rule stops",
        "val/auto_loops": "loops where the halting rule stops",
        "val/accuracy": "accuracy",
    }
    for key, label in measured.items():
        value = next((record[key] for record in reversed(records) if record.get(key) is not None), None)
        if value is not None:
            rows[label] = f"{value:.4f}"
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "## Training\n\n" + "\n".join(["| | |", "|---|---|", *lines])


def _data(data: DataConfig) -> str:
    """Where the text came from; of files on somebody's machine no more than that they are."""
    if data.kind == "reasoning":
        return f"the task {data.task.name}, difficulty {data.task.difficulty[0]} to {data.task.difficulty[1]}"
    told = []
    for name, source in data.named_sources.items():
        text = {"embedded": "documentation that comes with Python packages", "hub": source.dataset}.get(
            source.kind, "files of its own"
        )
        text += f" ({source.subset})" if source.subset else ""
        told.append(f"{name}: {text}, weight {source.weight:g}" if isinstance(source, MixtureSourceConfig) else text)
    return "; ".join(told)
