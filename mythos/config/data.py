"""Sections of a configuration about data: sources, filters, validation, and reasoning tasks."""

from collections.abc import Iterator
from math import factorial, inf
from typing import Annotated, Literal

from pydantic import Field

from mythos.config.checking import shown
from mythos.model.config import padded_vocab_size
from mythos.section import Count, CountOrZero, Positions, PositiveInt, Section

MOST_TOLD = 64
"""Numbers of hops that have a token of their own where the text tells the number."""

Size = Annotated[int, Field(ge=2, le=200)]


class ValidationConfig(Section):
    """Documents that are held out of training and that validation loss is measured on."""

    path: str | list[str] | None = None
    """Files of validation documents (glob or list of globs); null = hold out a share of the corpus by content hash."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out by content hash when path is null."""


class FilterConfig(Section):
    """What a column must hold for its document to be used; a null never passes."""

    min: float | None = None
    """Smallest number that passes."""
    max: float | None = None
    """Largest number that passes."""
    one_of: list[str | float | bool] | None = None
    """Values that pass."""


class TaskConfig(Section):
    """A task whose difficulty is a number of sequential steps; sequences are made on the way, from the run's seed."""

    name: Literal["hops", "mano", "permutations", "addition"] = "hops"
    """hops = follow a random permutation, given as pairs in the text, so many times from a symbol on; mano = value of a
    prefix expression of so many operations; permutations = product of so many elements of a group; addition = sum of so
    many numbers."""
    difficulty: tuple[Count, Count] = (1, 5)
    """Fewest and most steps of a training sequence; all between are equally frequent."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which the most steps rise evenly from the fewest on; 0 = all from the first step."""
    tell: Literal["nothing", "number", "marks"] = "nothing"
    """hops: how the text says the number of hops. nothing = only the number of loops does (depth.follow); number = a
    token of its own for each number, before the symbol; marks = one mark a hop, after the symbol, the answer being
    asked for at the last one. In the other tasks the text shows it in any case."""
    symbols: Size = 12
    """hops: symbols that are permuted."""
    queries: Count = 1
    """Questions in a sequence, so that it teaches more: in hops different symbols to start from, in permutations and
    addition words and sums one after another; in mano one."""
    ask: Literal["end", "steps", "windows"] = "end"
    """permutations, addition, hops told by marks: end = the result of all elements, numbers or hops; steps = also that
    of the first, of the first two, and so on, so that every loop has to take a step and to leave those before as they
    are. Reports ask for the end. windows = permutations without words: at each of the last `queries` elements the
    product of as many as the difficulty, which, as in hops, the number of loops alone tells (depth.follow)."""
    modulus: Size = 23
    """mano: numbers are 0..modulus - 1."""
    group: Literal["S3", "S5"] = "S3"
    """permutations: the symmetric group on 3 or 5 points, of 6 or 120 elements."""
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """addition: digits of every number; the sum is asked for modulo 10^digits."""

    def targets(self, difficulty: int) -> int:
        """Tokens that are asked for in a sequence of this difficulty."""
        answers = self.queries * (difficulty if self.ask == "steps" else 1)
        return answers * (self.digits if self.name == "addition" else 1)

    @property
    def elements(self) -> int:
        """permutations: elements of the group."""
        return factorial(int(self.group[1]))

    @property
    def vocabulary(self) -> int:
        """Token ids, the one that fills up sequences included."""
        if self.name == "hops":
            return 1 + self.symbols + self.symbols**2 + {"nothing": 0, "number": MOST_TOLD, "marks": 1}[self.tell]
        return {"mano": 5 + self.modulus, "permutations": 2 + self.elements, "addition": 12}[self.name]

    @property
    def hardest(self) -> float:
        """The most steps that a text can ask for."""
        return MOST_TOLD if self.tell == "number" else inf

    def length(self, difficulty: int) -> int:
        """Tokens of the shortest sequence that holds this difficulty.

        In permutations and addition with one in front of the first question: where a step is to look at the token
        before, none may be without, or the longest questions alone would begin a sequence.
        """
        return {
            "hops": self.symbols + self.queries * (1 + difficulty * (self.tell == "marks")) + (self.tell == "number"),
            "mano": 2 * difficulty + 2,
            "permutations": 1 + self.queries * (1 + difficulty) if self.ask != "windows" else self.queries + difficulty,
            "addition": 1 + self.queries * (1 + self.digits * difficulty),
        }[self.name]


class SourceConfig(Section):
    """Where documents come from."""

    kind: Literal["embedded", "files", "hub", "tokens"] = "embedded"
    """embedded = English documentation found on this machine, files = parquet/jsonl/txt, hub = Hugging Face dataset,
    tokens = what `mythos tokenize` wrote."""
    path: str | list[str] | None = None
    """files: glob, URL, or list of them, of .parquet, .jsonl, .jsonl.gz or .txt files; tokens: the folder."""
    dataset: str | None = None
    """hub: dataset id, e.g. HuggingFaceFW/fineweb-edu, or a local folder in the layout of one."""
    subset: str | None = None
    """hub: configuration of the dataset, e.g. sample-10BT."""
    split: str = "train"
    """hub: split of the dataset."""
    revision: str | None = None
    """hub: branch, tag or commit; null = the newest. The run's config.yaml pins the commit it was started with."""
    text_column: str = "text"
    """Column (parquet) or key (jsonl) that holds a document's text."""
    filters: dict[str, FilterConfig] = {}
    """Documents to use, by column: {int_score: {min: 3}, language: {one_of: [en]}, length: {max: 100000}}; length is
    the number of characters of the text."""


class MixtureSourceConfig(SourceConfig):
    """One source of a mixture."""

    weight: Annotated[float, Field(gt=0, le=1e15)] = 1.0
    """Share of the sequences that come from this source, relative to the other sources' weights."""


class DataConfig(SourceConfig):
    """Where documents come from and how they become sequences."""

    kind: Literal["embedded", "files", "hub", "tokens", "mixture", "reasoning"] = "embedded"
    """embedded = English documentation found on this machine, files = parquet/jsonl/txt, hub = Hugging Face dataset,
    tokens = what `mythos tokenize` wrote, mixture = several of these; reasoning = no text but a task, whose
    vocabulary takes the tokenizer's place."""
    task: TaskConfig = TaskConfig()
    """reasoning: what is asked for."""
    sources: dict[str, MixtureSourceConfig] = {}
    """mixture: sources by a name of your choice, each with kind, path, dataset, ..., filters and weight."""
    streams: Count = 64
    """Logical streams the corpus is read by. Part of the run's identity: they fix the global batches at any world
    size."""
    sequence_length: Positions = 1024
    """Tokens of a training sequence, at most model.context_length."""
    mask_documents: bool = False
    """Keep attention inside each document of a packed sequence, and count positions from its beginning."""
    workers: CountOrZero = 1
    """Processes of each rank that read and tokenize ahead of training; 0 = none, in between the steps. They change
    nothing in what is read."""
    prefetch: Count = 2
    """Steps that the workers are ahead."""
    on_error: Literal["skip", "fail"] = "fail"
    """A document or shard that cannot be used is left out, counted and reported, or ends the run."""
    max_document_bytes: PositiveInt = 10_000_000
    """Longest document in bytes of UTF-8; longer ones cannot be used (see on_error)."""
    patience: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    """Seconds that a remote file may stay unreachable, or come too slowly, before the run saves and stops."""
    on_mismatch: Literal["fail", "restart"] = "fail"
    """When a checkpoint's position is in other data (another corpus, tokenizer, seed or number of streams): refuse,
    or start the data again."""
    cache_dir: str | None = None
    """Where gathered corpora, file lists, validation sets and trained tokenizers are kept; null = $MYTHOS_CACHE or
    ~/.cache/mythos."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out documents."""

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources by name: those of a mixture, or the one that this section describes, named corpus."""
        return dict(self.sources) if self.kind == "mixture" else {"corpus": self}


def task_contradictions(
    task: TaskConfig, sequence_length: int, vocab_size: int | str, follow: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths and the explanation of all values of a run on data.task that cannot hold together.

    `follow` is depth.follow.
    """
    low, high = task.difficulty
    if low > high:
        yield ("data.task.difficulty",), f"got [{low}, {high}]; the fewest steps must not exceed the most"
    elif sequence_length < task.length(high):
        given = f"got {sequence_length}, and {task.name} of difficulty {high} takes {task.length(high)} tokens"
        yield ("data.sequence_length", "data.task.difficulty"), f"{given}; raise the first or lower the second"
    if task.name == "hops" and task.tell == "nothing" and follow == "none" and low < high:
        rule = "nothing says how many hops to follow; set the first to number or marks"
        rule += ", or, where there are loops, the second to difficulty"
        yield ("data.task.tell", "depth.follow"), f"got nothing and none; {rule}"
    if high > task.hardest:
        rule = f"only numbers up to {task.hardest} have a token of their own"
        yield ("data.task.tell", "data.task.difficulty"), f"got {task.tell} and [{low}, {high}]; {rule}"
    if task.name == "hops" and task.queries > task.symbols:
        given = f"got {task.queries} and {task.symbols}"
        yield ("data.task.queries", "data.task.symbols"), f"{given}; there are only so many symbols to start from"
    if task.ask == "steps" and not (task.name in ("permutations", "addition") or task.tell == "marks"):
        rule = "the steps of permutations and addition can be asked for, and those of hops that marks tell"
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and steps; {rule}"
    if task.ask == "windows" and task.name != "permutations":
        yield ("data.task.name", "data.task.ask"), f"got {task.name} and windows; these are for permutations only"
    if task.ask == "windows" and follow == "none" and low < high:
        rule = "nothing says how many elements count; set the first to end or steps"
        rule += ", or, where there are loops, the second to difficulty"
        yield ("data.task.ask", "depth.follow"), f"got windows and none; {rule}"
    if task.name == "mano" and task.queries > 1:
        yield ("data.task.name", "data.task.queries"), f"got mano and {task.queries}; a sequence holds one expression"
    if isinstance(vocab_size, int) and padded_vocab_size(vocab_size) < task.vocabulary:
        rule = "the model needs a row for every token id; set the first to auto"
        yield ("model.vocab_size", "data.task.name"), f"got {vocab_size} and a task of {task.vocabulary} tokens; {rule}"
    used_by = {"tell": "hops", "symbols": "hops", "modulus": "mano", "group": "permutations", "digits": "addition"}
    for name, of in used_by.items():
        value = getattr(task, name)
        if task.name != of and value != TaskConfig.model_fields[name].default:
            rule = f"{name} is for the task {of} only"
            yield ("data.task.name", f"data.task.{name}"), f"got {task.name} and {value}; {rule}"


def source_contradictions(data: DataConfig, tokenizer: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths and the explanation of all values of the sources that cannot hold together.

    `tokenizer` is tokenizer.name.
    """
    if data.kind == "mixture" and not data.sources:
        yield ("data.kind", "data.sources"), "got mixture and no sources; give some, each with a name and a kind"
    if data.kind != "mixture" and data.sources:
        yield ("data.kind", "data.sources"), f"got {data.kind} and {', '.join(data.sources)}; sources are for a mixture"
    needed = {"files": ("path", "a glob or a list of globs"), "tokens": ("path", "the folder of the token shards")}
    needed["hub"] = ("dataset", "a dataset id, e.g. HuggingFaceFW/fineweb-edu")
    used_by = {"path": ("files", "tokens"), "text_column": ("files", "hub"), "filters": ("files", "hub", "embedded")}
    used_by |= dict.fromkeys(("dataset", "subset", "split", "revision"), ("hub",))
    described = {"data": data} | {f"data.sources.{name}": source for name, source in data.sources.items()}
    for prefix, source in described.items():
        kind = source.kind
        if kind in needed and not getattr(source, needed[kind][0]):
            name, what = needed[kind]
            yield (f"{prefix}.kind", f"{prefix}.{name}"), f"got {kind} and no {name}; give {what}"
        for name, kinds in used_by.items():
            value = getattr(source, name)
            if kind not in kinds and value != SourceConfig.model_fields[name].default:
                rule = f"{name} is for kind {' or '.join(kinds)} only"
                yield (f"{prefix}.kind", f"{prefix}.{name}"), f"got {kind} and {shown(value)}; {rule}"
        if kind == "tokens" and isinstance(source.path, list):
            yield (f"{prefix}.path",), f"got {shown(source.path)}; for tokens give one folder, or a mixture of several"
        for column, rule in source.filters.items():
            where = f"{prefix}.filters.{column}"
            if rule == FilterConfig():
                yield (where,), "got no condition; give min, max or one_of"
            if rule.min is not None and rule.max is not None and rule.min > rule.max:
                yield (f"{where}.min", f"{where}.max"), f"got {rule.min:g} and {rule.max:g}; nothing can pass"
    kinds = {source.kind for source in data.named_sources.values()}
    if tokenizer == "bpe" and "tokens" in kinds:
        rule = "the tokens have a tokenizer already; set tokenizer.name to the folder tokenizer/ beside them"
        yield ("tokenizer.name", "data.kind"), f"got bpe and tokens; {rule}"
