"""Tasks of lm-evaluation-harness that read a file of questions."""

from pathlib import Path

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
test_split: test
output_type: {kind}
"""
CHOICES = """
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
doc_to_text: ""
doc_to_target: "{{query}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
CONTINUATION = """
doc_to_text: query
doc_to_target: " crosses"
generation_kwargs: {until: ["the"], max_gen_toks: 6}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path, file: Path) -> None:
    """Write a YAML file for each kind of request; the tasks are named local_<kind>."""
    folder.mkdir()
    kinds = {"multiple_choice": CHOICES, "loglikelihood_rolling": PERPLEXITY, "generate_until": CONTINUATION}
    for kind, rest in kinds.items():
        text = TASK.format(name=f"local_{kind}", file=file, kind=kind, cache=folder / "cache") + rest
        (folder / f"{kind}.yaml").write_text(text)
