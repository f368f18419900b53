"""Rules between fields of the data section: sources, filters, and reasoning tasks.

A rule is a function that yields the paths and an explanation of values that cannot be used together.
"""

from collections.abc import Iterator

from mythos.config.checking import Contradiction, shown
from mythos.config.data import (
    FACT_FIELDS,
    TREE_FIELDS,
    DataConfig,
    FilterConfig,
    SourceConfig,
    TaskConfig,
    reads_text_files,
)
from mythos.config.sections import Config
from mythos.model.config import padded_vocab_size

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


def _sources(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    """Yield the path and the section of everything that describes a source."""
    yield "data", data
    for name, source in data.sources.items():
        yield f"data.sources.{name}", source


def _only_a_mixture_has_sources(config: Config) -> Iterator[Contradiction]:
    data = config.data
    if data.kind == "mixture" and not data.sources:
        yield ("data.kind", "data.sources"), "got mixture and no sources; give some, each with a name and a kind"
    if data.kind != "mixture" and data.sources:
        yield ("data.kind", "data.sources"), f"got {data.kind} and {', '.join(data.sources)}; sources are for a mixture"


def _required_field_is_set(config: Config) -> Iterator[Contradiction]:
    for path, source in _sources(config.data):
        if source.kind in REQUIRED:
            name, remedy = REQUIRED[source.kind]
            if not getattr(source, name):
                yield (f"{path}.kind", f"{path}.{name}"), f"got {source.kind} and no {name}; give {remedy}"


def _fields_of_other_kinds_are_unset(config: Config) -> Iterator[Contradiction]:
    for path, source in _sources(config.data):
        for name, kinds in USED_BY.items():
            value = getattr(source, name)
            used = reads_text_files(source) if name == "txt" else source.kind in kinds
            if not used and value != SourceConfig.model_fields[name].default:
                rule = f"{name} is for kind {' or '.join(kinds)} only"
                yield (f"{path}.kind", f"{path}.{name}"), f"got {source.kind} and {shown(value)}; {rule}"


def _tokens_are_in_one_folder(config: Config) -> Iterator[Contradiction]:
    for path, source in _sources(config.data):
        if source.kind == "tokens" and isinstance(source.path, list):
            rule = "for tokens give one folder, or a mixture of several"
            yield (f"{path}.path",), f"got {shown(source.path)}; {rule}"


def _filters_can_be_met(config: Config) -> Iterator[Contradiction]:
    for path, source in _sources(config.data):
        for column, condition in source.filters.items():
            where = f"{path}.filters.{column}"
            if condition == FilterConfig():
                yield (where,), "got no condition; give min, max or one_of"
            if condition.min is not None and condition.max is not None and condition.min > condition.max:
                yield (f"{where}.min", f"{where}.max"), f"got {condition.min:g} and {condition.max:g}; nothing can pass"


def _tokens_keep_their_tokenizer(config: Config) -> Iterator[Contradiction]:
    kinds = {source.kind for source in config.data.named_sources.values()}
    if config.tokenizer.name == "bpe" and "tokens" in kinds:
        rule = "the tokens have a tokenizer already; leave out tokenizer.name, or give their folder tokenizer/"
        yield ("tokenizer.name", "data.kind"), f"got bpe and tokens; {rule}"


def _validation_has_documents(config: Config) -> Iterator[Contradiction]:
    validation = config.data.validation
    if validation.fraction == 0 and not validation.path:
        rule = "hold out a share of the documents or give files to validate on"
        yield ("data.validation.fraction", "data.validation.path"), f"got 0 and no path; {rule}"


SOURCE_RULES = (
    _only_a_mixture_has_sources,
    _required_field_is_set,
    _fields_of_other_kinds_are_unset,
    _tokens_are_in_one_folder,
    _filters_can_be_met,
    _tokens_keep_their_tokenizer,
    _validation_has_documents,
)


# --- reasoning tasks

TASK_OF_FIELD = {"tell": "hops", "symbols": "hops", "modulus": "mano", "group": "permutations", "digits": "addition"}
TASK_OF_FIELD |= dict.fromkeys(FACT_FIELDS, "facts") | dict.fromkeys(TREE_FIELDS, "trees")
"""The one task that uses a field."""
MOST_CHAINS = 10_000_000
"""Questions of facts that are listed in memory, 8 bytes a token."""


def _sequence_fits_the_difficulty(config: Config) -> Iterator[Contradiction]:
    task, length = config.data.task, config.data.sequence_length
    low, high = task.difficulty
    if low > high:
        yield ("data.task.difficulty",), f"got [{low}, {high}]; the fewest steps must not exceed the most"
    elif length < task.length(high):
        values = f"got {length}, and {task.name} of difficulty {high} takes {task.length(high)} tokens"
        yield ("data.sequence_length", "data.task.difficulty"), f"{values}; raise the first or lower the second"


def _number_of_hops_is_stated(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    low, high = task.difficulty
    if task.name == "hops" and task.tell == "nothing" and config.depth.follow == "none" and low < high:
        rule = (
            "nothing says how many hops to follow; set the first to number or marks, or, if the model loops, the "
            "second to difficulty"
        )
        yield ("data.task.tell", "depth.follow"), f"got nothing and none; {rule}"


def _window_is_stated(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    low, high = task.difficulty
    if task.ask == "windows" and config.depth.follow == "none" and low < high:
        rule = (
            "nothing says how many elements count; set the first to end or steps, or, if the model loops, the second "
            "to difficulty"
        )
        yield ("data.task.ask", "depth.follow"), f"got windows and none; {rule}"


def _difficulty_has_a_number_token(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    low, high = task.difficulty
    if high > task.hardest and task.name == "trees":
        values = f"got {task.levels} and [{low}, {high}]"
        yield ("data.task.levels", "data.task.difficulty"), f"{values}; no node is more levels below the root"
    elif high > task.hardest:
        rule = f"only numbers up to {task.hardest} have a token of their own"
        yield ("data.task.tell", "data.task.difficulty"), f"got {task.tell} and [{low}, {high}]; {rule}"


def _queries_fit_the_task(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    if task.name == "hops" and task.queries > task.symbols:
        values = f"got {task.queries} and {task.symbols}"
        yield ("data.task.queries", "data.task.symbols"), f"{values}; each query starts from a symbol of its own"
    if task.name == "mano" and task.queries > 1:
        yield ("data.task.name", "data.task.queries"), f"got mano and {task.queries}; a sequence has one expression"


def _task_can_be_asked_so(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    if task.ask == "steps" and not (task.name in ("permutations", "addition") or task.tell == "marks"):
        rule = "steps are for permutations, addition, and hops with tell: marks"
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and steps; {rule}"
    if task.ask == "windows" and task.name != "permutations":
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and windows; these are for permutations only"


def _model_has_a_row_for_every_token(config: Config) -> Iterator[Contradiction]:
    size, vocabulary = config.model.vocab_size, config.data.task.vocabulary
    if isinstance(size, int) and padded_vocab_size(size) < vocabulary:
        rule = "the model needs a row for every token id; set the first to auto"
        yield ("model.vocab_size", "data.task.name"), f"got {size} and a task of {vocabulary} tokens; {rule}"


def _fields_of_other_tasks_are_unset(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    for name, only in TASK_OF_FIELD.items():
        value = getattr(task, name)
        if task.name != only and value != TaskConfig.model_fields[name].default:
            rule = f"{name} is for the task {only} only"
            yield ("data.task.name", f"data.task.{name}"), f"got {task.name} and {value}; {rule}"


def _facts_fit(config: Config) -> Iterator[Contradiction]:
    task = config.data.task
    if task.name != "facts":
        return
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


def _task_needs_no_text(config: Config) -> Iterator[Contradiction]:
    if config.data.mask_documents:
        yield ("data.kind", "data.mask_documents"), "got reasoning and true; a task has no documents"
    if config.eval.tasks:
        yield ("data.kind", "eval.tasks"), f"got reasoning and {shown(config.eval.tasks)}; questions are text"


TASK_RULES = (
    _sequence_fits_the_difficulty,
    _number_of_hops_is_stated,
    _window_is_stated,
    _difficulty_has_a_number_token,
    _queries_fit_the_task,
    _task_can_be_asked_so,
    _model_has_a_row_for_every_token,
    _fields_of_other_tasks_are_unset,
    _facts_fit,
    _task_needs_no_text,
)
"""Rules of data.kind reasoning."""
