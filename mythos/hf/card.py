"""The model card of an export, from the run's configuration and metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mythos.checkpoints.stored_model import StoredModel
from mythos.config.data import DataConfig, MixtureSourceConfig
from mythos.config.sections import Config
from mythos.model.config import CORES
from mythos.model.halting import default_threshold
from mythos.planning.flops import count_parameters
from mythos.training.metrics import losses_by_depth

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [mythos, recurrent-depth, looped-transformer]
---
"""


def model_card(stored: StoredModel, name: str, records: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the model `name`; `records` are the lines of its run's metrics.jsonl, empty if unknown.

    Records after the exported step are left out.
    """
    sections = [HEADER + f"# {name}", _description(stored), _usage(stored, name)]
    before = [record for record in records if record["step"] <= stored.step]
    losses = next((curve for record in reversed(before) if (curve := losses_by_depth(record))), {})
    if losses:
        sections.append(_depth_table(losses, stored.mean_loops))
    if stored.run is not None:
        sections.append(_training_table(stored.run, stored.step, before))
    return "\n\n".join(sections) + "\n"


def _description(stored: StoredModel) -> str:
    config = stored.model.config
    parameters = count_parameters(config)
    active = "" if parameters.active == parameters.total else f", {parameters.active:,} of them active per token"
    depth = f"Loops are chosen at inference; training ran {stored.mean_loops} on average."
    describe = CORES.entries[config.core_ffn].summary
    core = config.attention if describe is None else f"{config.attention}, {describe(config)}"
    length = stored.sequence_length
    trained = "" if length is None else f" (training sequences had {length:,})"
    layers = f"{config.prelude_layers} before the loop, {config.core_layers} in it ({core}), {config.coda_layers} after"
    return (
        f"A recurrent-depth transformer of {parameters.total:,} parameters{active}, {config.dim} wide. "
        f"Layers: {layers}. {depth} "
        f"The context is {config.context_length:,} tokens{trained}, the vocabulary {config.vocab_size:,}."
    )


def _usage(stored: StoredModel, name: str) -> str:
    if stored.tokenizer is None:
        return (
            "It was trained on token ids and has no tokenizer. After `import mythos` (`pip install mythos-rdt`), "
            "`AutoModelForCausalLM.from_pretrained` loads it."
        )
    text = f"""```python
import mythos  # pip install mythos-rdt
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("The river", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, num_loops={stored.mean_loops})[0]))
```"""
    rule = stored.model.config.halting
    if rule != "none":
        threshold = f"{default_threshold(rule):g}"
        text += f"\n\n`generate(..., exit_threshold={threshold})` lets tokens stop earlier, by the rule `{rule}`."
    return "## Use\n\n" + text


def _depth_table(losses: Mapping[int, float], mean_loops: int) -> str:
    # exp overflows a float64 above 709 nats.
    lines = [f"| {loops} | {loss:.4f} | {math.exp(min(loss, 700)):.2f} |" for loops, loss in losses.items()]
    table = "\n".join(["| loops | loss (nats per token) | perplexity |", "|---|---|---|", *lines])
    intro = f"Validation with every position run for the same number of loops; training ran {mean_loops} on average."
    return f"## Depth\n\n{intro}\n\n{table}"


def _training_table(run: Config, step: int, records: Sequence[Mapping[str, Any]]) -> str:
    data, depth, optim = run.data, run.depth, run.optim
    rows = {
        "steps": f"{step:,}",
        "tokens": f"{step * run.tokens_per_step:,}",
        "data": _data_sources(data),
        "sequences": f"{run.train.global_batch:,} a step, of {data.sequence_length:,} tokens",
        "loops": f"{run.depth_mean:g} on average ({depth.sampling}), the last {run.depth_backprop} with gradient",
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}, weight decay {optim.weight_decay:g}",
        "matmul type": run.train.dtype,
        "seed": str(run.run.seed),
    }
    labels = {
        "val/bits_per_byte": "bits per byte",
        "val/auto_loss": "loss with the halting rule",
        "val/auto_loops": "mean loops with the halting rule",
        "val/accuracy": "accuracy",
    }
    for key, label in labels.items():
        value = next((record[key] for record in reversed(records) if record.get(key) is not None), None)
        if value is not None:
            rows[label] = f"{value:.4f}"
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "## Training\n\n" + "\n".join(["| | |", "|---|---|", *lines])


def _data_sources(data: DataConfig) -> str:
    """Where the text came from. Local paths are left out: a card is published."""
    if data.kind == "reasoning":
        return f"the task {data.task.name}, difficulty {data.task.difficulty[0]} to {data.task.difficulty[1]}"
    descriptions = []
    for name, source in data.named_sources.items():
        # Before there was a revision, embedded text was gathered from installed packages.
        messages = "messages of the presidents of the United States to Congress, 1790 to 1945"
        prose = messages if source.revision else "documentation that comes with Python packages"
        kinds = {"embedded": prose, "hub": str(source.dataset)}
        text = kinds.get(source.kind, "local files")
        text += f" ({source.subset})" if source.subset else ""
        if isinstance(source, MixtureSourceConfig):
            text = f"{name}: {text}, weight {source.weight:g}"
        descriptions.append(text)
    return "; ".join(descriptions)
