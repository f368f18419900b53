"""Rules between fields of the data section: sources, filters, and reasoning tasks.

A rule yields the paths and an explanation of values that cannot be used together.
"""

from collections.abc import Iterator

from mythos.config.checking import shown
from mythos.config.data import (
    FACT_FIELDS,
    TREE_FIELDS,
    FilterConfig,
    SourceConfig,
    TaskConfig,
    reads_text_files,
)
from mythos.config.sections import Config
from mythos.model.config import padded_vocab_size
from mythos.model.registry import Contradiction

# --- sources

REQUIRED = {
    "files": ("path", "a glob or a list of globs"),
    "tokens": ("path", "the folder of the token shards"),
    "hub": ("dataset", "a dataset id, e.g. HuggingFaceFW/fineweb-edu"),
}
"""The field that each kind of source requires, and what to give there."""
USED_BY = {
    "path": ("files", "tokens"),
    "text_column": ("files", "hub"),
    "txt": ("files", "hub"),
    "filters": ("files", "hub", "embedded"),
    "revision": ("hub", "embedded"),
    **dict.fromkeys(("dataset", "subset", "split"), ("hub",)),
}
"""The kinds of source that use a field; others must leave it at its default."""


def source_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield all values of sources, tokenizer and validation that cannot be used together."""
    data = config.data
    if data.kind == "mixture" and not data.sources:
        yield ("data.kind", "data.sources"), "got mixture and no sources; give some, each with a name and a kind"
    if data.kind != "mixture" and data.sources:
        yield ("data.kind", "data.sources"), f"got {data.kind} and {', '.join(data.sources)}; sources are for a mixture"
    yield from _source("data", data)
    for name, source in data.sources.items():
        yield from _source(f"data.sources.{name}", source)

    kinds = {source.kind for source in data.named_sources.values()}
    if config.tokenizer.name == "bpe" and "tokens" in kinds:
        rule = "the tokens have a tokenizer already; leave out tokenizer.name, or give their folder tokenizer/"
        yield ("tokenizer.name", "data.kind"), f"got bpe and tokens; {rule}"

    if data.validation.fraction == 0 and not data.validation.path:
        rule = "hold out a share of the documents or give files to validate on"
        yield ("data.validation.fraction", "data.validation.path"), f"got 0 and no path; {rule}"


def _source(path: str, source: SourceConfig) -> Iterator[Contradiction]:
    """Yield contradictions of the section at this path, which describes a source."""
    if source.kind in REQUIRED:
        name, remedy = REQUIRED[source.kind]
        if not getattr(source, name):
            yield (f"{path}.kind", f"{path}.{name}"), f"got {source.kind} and no {name}; give {remedy}"

    for name, kinds in USED_BY.items():
        value = getattr(source, name)
        used = reads_text_files(source) if name == "txt" else source.kind in kinds
        if not used and value != SourceConfig.model_fields[name].default:
            rule = f"{name} is for kind {' or '.join(kinds)} only"
            yield (f"{path}.kind", f"{path}.{name}"), f"got {source.kind} and {shown(value)}; {rule}"

    if source.kind == "tokens" and isinstance(source.path, list):
        rule = "for tokens give one folder, or a mixture of several"
        yield (f"{path}.path",), f"got {shown(source.path)}; {rule}"

    for column, condition in source.filters.items():
        where = f"{path}.filters.{column}"
        if condition == FilterConfig():
            yield (where,), "got no condition; give min, max or one_of"
        if condition.min is not None and condition.max is not None and condition.min > condition.max:
            yield (f"{where}.min", f"{where}.max"), f"got {condition.min:g} and {condition.max:g}; nothing can pass"


# --- reasoning tasks

TASK_OF_FIELD = {"tell": "hops", "symbols": "hops", "modulus": "mano", "digits": "addition"}
TASK_OF_FIELD |= dict.fromkeys(("group", "letters"), "permutations")
TASK_OF_FIELD |= dict.fromkeys(FACT_FIELDS, "facts") | dict.fromkeys(TREE_FIELDS, "trees")
"""The one task that uses a field."""
MOST_CHAINS = 10_000_000
"""Questions of facts that are listed in memory, 8 bytes a token."""


def task_contradictions(config: Config) -> Iterator[Contradiction]:
    """Yield all values of a run on a reasoning task that cannot be used together."""
    task, size = config.data.task, config.model.vocab_size
    yield from _difficulty(config)
    yield from _questions(config)
    if isinstance(size, int) and padded_vocab_size(size) < task.vocabulary:
        rule = "the model needs a row for every token id; set the first to auto"
        yield ("model.vocab_size", "data.task.name"), f"got {size} and a task of {task.vocabulary} tokens; {rule}"
    for name, only in TASK_OF_FIELD.items():
        value = getattr(task, name)
        if task.name != only and value != TaskConfig.model_fields[name].default:
            rule = f"{name} is for the task {only} only"
            yield ("data.task.name", f"data.task.{name}"), f"got {task.name} and {value}; {rule}"
    if task.name == "facts":
        yield from _facts(task)
    if config.data.mask_documents:
        yield ("data.kind", "data.mask_documents"), "got reasoning and true; a task has no documents"
    if config.eval.tasks:
        yield ("data.kind", "eval.tasks"), f"got reasoning and {shown(config.eval.tasks)}; questions are text"


def _difficulty(config: Config) -> Iterator[Contradiction]:
    """The text has room for every difficulty and, unless the loops do, states it."""
    task, length = config.data.task, config.data.sequence_length
    low, high = task.difficulty
    if low > high:
        yield ("data.task.difficulty",), f"got [{low}, {high}]; the fewest steps must not exceed the most"
    elif length < task.length(high):
        values = f"got {length}, and {task.name} of difficulty {high} takes {task.length(high)} tokens"
        yield ("data.sequence_length", "data.task.difficulty"), f"{values}; raise the first or lower the second"

    differs = config.depth.follow == "none" and low < high
    if differs and task.name == "hops" and task.tell == "nothing":
        rule = (
            "nothing says how many hops to follow; set the first to number or marks, or, if the model loops, the "
            "second to difficulty"
        )
        yield ("data.task.tell", "depth.follow"), f"got nothing and none; {rule}"
    if differs and task.ask == "windows":
        rule = (
            "nothing says how many elements or numbers count; set the first to end or steps, or, if the model loops, "
            "the second to difficulty"
        )
        yield ("data.task.ask", "depth.follow"), f"got windows and none; {rule}"

    if high > task.hardest and task.name == "trees":
        values = f"got {task.levels} and [{low}, {high}]"
        yield ("data.task.levels", "data.task.difficulty"), f"{values}; no node is more levels below the root"
    elif high > task.hardest:
        rule = f"only numbers up to {task.hardest} have a token of their own"
        yield ("data.task.tell", "data.task.difficulty"), f"got {task.tell} and [{low}, {high}]; {rule}"


def _questions(config: Config) -> Iterator[Contradiction]:
    """The task can be asked so many questions, and in this way."""
    task = config.data.task
    if task.name == "hops" and task.queries > task.symbols:
        values = f"got {task.queries} and {task.symbols}"
        yield ("data.task.queries", "data.task.symbols"), f"{values}; each query starts from a symbol of its own"
    if task.letters is not None and task.letters > task.elements:
        values = f"got {task.letters} and {task.group}, which has {task.elements} elements"
        yield ("data.task.letters", "data.task.group"), f"{values}; lower the first, or null for all elements"
    if task.name == "mano" and task.queries > 1:
        yield ("data.task.name", "data.task.queries"), f"got mano and {task.queries}; a sequence has one expression"
    if task.ask == "steps" and not (task.name in ("permutations", "addition") or task.tell == "marks"):
        rule = "steps are for permutations, addition, and hops with tell: marks"
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and steps; {rule}"
    if task.ask == "windows" and task.name not in ("permutations", "addition"):
        rule = "windows are for permutations and addition"
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and windows; {rule}"


def _facts(task: TaskConfig) -> Iterator[Contradiction]:
    """The graph can be drawn, and its questions be listed."""
    if task.graph == "random" and task.facts_per_entity > task.relations:
        values = f"got {task.facts_per_entity} and {task.relations}"
        yield (
            ("data.task.facts_per_entity", "data.task.relations"),
            f"{values}; an entity has each relation at most once: lower the first or raise the second",
        )
    chains = task.entities * task.relations_per_entity ** task.difficulty[1]
    if chains > MOST_CHAINS:
        yield (
            ("data.task.entities", "data.task.difficulty"),
            f"got {task.entities} entities and {task.difficulty[1]} relations in a question: {chains:,} questions; at "
            f"most {MOST_CHAINS:,} are listed: lower entities, facts_per_entity (relations) or difficulty",
        )
    elif task.unseen * task.entities * task.relations_per_entity < 1:
        yield ("data.task.unseen",), f"got {task.unseen}: less than one fact; raise it, or have more facts"
