"""Sections of a configuration about data: sources, filters, validation, and reasoning tasks."""

from math import factorial, inf
from typing import Annotated, Literal

from pydantic import Field

from mythos.section import Count, CountOrZero, Positions, PositiveInt, Section

MOST_NUMBER_TOKENS = 64
"""Largest number of hops with a token of its own (tell: number)."""

TREE_FIELDS = ("branches", "levels")
"""Fields of a task that only trees use."""
FACT_FIELDS = ("entities", "relations", "facts_per_entity", "graph", "ratio", "unseen")
"""Fields of a task that only facts use."""

SourceKind = Literal["embedded", "files", "hub", "tokens"]
DataKind = Literal[SourceKind, "mixture", "reasoning"]
Size = Annotated[int, Field(ge=2, le=200)]


class ValidationConfig(Section):
    """Held-out documents for the validation loss."""

    path: str | list[str] | None = None
    """Files of validation documents (glob or list of globs); null = hold out a share of the corpus by content hash."""
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of documents held out by content hash if path is null."""


class FilterConfig(Section):
    """Condition on a column that a document must meet; a null value never meets it."""

    min: float | None = None
    """Smallest accepted number."""
    max: float | None = None
    """Largest accepted number."""
    one_of: list[str | float | bool] | None = None
    """Accepted values."""


class TaskConfig(Section):
    """A reasoning task whose difficulty is a number of sequential steps; the run's seed generates its sequences."""

    name: Literal["hops", "mano", "permutations", "addition", "facts", "trees"] = "hops"
    """hops = follow a random permutation, listed as pairs in the text, for a number of steps from a start symbol;
    mano = value of a prefix expression with that number of operations; permutations = product of that number of group
    elements; addition = sum of that number of numbers; facts = questions about a fixed graph of facts, which must be
    memorised: the entity at the end of that number of relations (arXiv 2405.15071, 2604.07822); trees = which of two
    nodes is that many edges below the root, given the edges of two trees (after arXiv 2412.06769)."""
    difficulty: tuple[Count, Count] = (1, 5)
    """Fewest and most steps of a training sequence; every number between is equally frequent."""
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the training over which the largest difficulty rises evenly from the smallest; 0 = full range from the
    first step."""
    tell: Literal["nothing", "number", "marks"] = "nothing"
    """hops: how the text states the number of hops. nothing = it does not, only the number of loops does
    (depth.follow); number = one token for the number, before the symbol; marks = one mark per hop, after the symbol,
    with the answer at the last mark. In the other tasks the text always shows it."""
    symbols: Size = 12
    """hops: number of permuted symbols."""
    queries: Count = 1
    """Questions in a sequence; more give more training signal. hops: different start symbols; permutations and
    addition: one word or sum after another; mano: always 1."""
    ask: Literal["end", "steps", "windows"] = "end"
    """permutations, addition, and hops with marks: end = the result of all elements, numbers or hops; steps = also
    every partial result (the first, the first two, ...), so that each loop must take one step and keep the earlier
    results. Reports ask for the end. windows = permutations and addition without words and sums: at each of the last
    `queries` elements or numbers, the product or sum of the last `difficulty` of them; only the number of loops states
    the difficulty (depth.follow)."""
    modulus: Size = 23
    """mano: numbers are 0..modulus - 1."""
    group: Literal["S3", "S5"] = "S3"
    """permutations: the symmetric group on 3 or 5 points, with 6 or 120 elements."""
    letters: Size | None = None
    """permutations: only so many elements of the group are in the text, the same ones in every run; products can be
    any element. A step then has 120 * letters products of S5 to learn and not 14,400. null = all."""
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """addition: digits of every number; the answer is the sum modulo 10^digits."""

    entities: Annotated[int, Field(ge=2, le=65536)] = 200
    """facts: number of entities."""
    relations: Size = 40
    """facts: number of relations."""
    facts_per_entity: Size = 20
    """facts: relations that each entity has, at most `relations`."""
    graph: Literal["random", "permutations"] = "random"
    """facts: random = relations and targets are drawn for each entity; permutations = every relation permutes the
    entities, and every entity has all relations (facts_per_entity is not used)."""
    ratio: Annotated[float, Field(gt=0, le=1000)] = 7.2
    """facts: questions of training of each difficulty above 1, for each fact."""
    unseen: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """facts: share of the facts that no question of training composes. They are trained as facts only; questions made
    of nothing else are the test out of distribution."""

    branches: Annotated[int, Field(ge=2, le=4)] = 2
    """trees: children of every inner node."""
    levels: Annotated[int, Field(ge=1, le=5)] = 3
    """trees: edges from the root to a leaf."""

    def targets(self, difficulty: int) -> int:
        """Count the answer tokens of a sequence of this difficulty."""
        answers = self.queries * (difficulty if self.ask == "steps" else 1)
        return answers * (self.digits if self.name == "addition" else 1)

    @property
    def elements(self) -> int:
        """permutations: order of the group."""
        return factorial(int(self.group[1]))

    @property
    def vocabulary(self) -> int:
        """Number of token ids, including padding."""
        if self.name == "hops":
            return (
                1
                + self.symbols
                + self.symbols**2  # a token for each pair
                + {"nothing": 0, "number": MOST_NUMBER_TOKENS, "marks": 1}[self.tell]
            )
        if self.name == "facts":
            return 1 + self.entities + self.relations
        if self.name == "trees":
            return 1 + self.nodes + self.nodes**2  # a token for each pair
        return {"mano": 5 + self.modulus, "permutations": 2 + self.elements, "addition": 12}[self.name]

    @property
    def hardest(self) -> float:
        """Largest difficulty that a text can state.

        Of trees, their levels; of facts, the largest of training, because their questions are listed.
        """
        if self.name == "trees":
            return self.levels
        if self.name == "facts":
            return self.difficulty[1]
        return MOST_NUMBER_TOKENS if self.tell == "number" else inf

    @property
    def nodes(self) -> int:
        """trees: nodes of both trees together."""
        return 2 * sum(self.branches**level for level in range(self.levels + 1))

    @property
    def relations_per_entity(self) -> int:
        """facts: relations of every entity."""
        return self.relations if self.graph == "permutations" else self.facts_per_entity

    def length(self, difficulty: int) -> int:
        """Tokens of the shortest sequence that fits this difficulty.

        permutations and addition start with one extra token, of windows one extra element or number: a step that looks
        at the one before then has one even in the longest question.
        """
        if self.ask == "windows":
            return (self.queries + difficulty) * (1 + self.digits if self.name == "addition" else 1)
        return {
            "hops": self.symbols + self.queries * (1 + difficulty * (self.tell == "marks")) + (self.tell == "number"),
            "mano": 2 * difficulty + 2,
            "permutations": 1 + self.queries * (1 + difficulty),
            "facts": self.queries * (1 + difficulty),
            "trees": self.nodes - 2 + 3 * self.queries,
            "addition": 1 + self.queries * (1 + self.digits * difficulty),
        }[self.name]


class SourceConfig(Section):
    """Where documents come from."""

    kind: DataKind = "embedded"  # narrowed in a mixture's sources
    path: str | list[str] | None = None
    """files: folder, glob, URL, or list of them, of .parquet, .jsonl, .jsonl.gz, .txt or .txt.gz files; tokens: the
    folder."""
    dataset: str | None = None
    """hub: dataset id, e.g. HuggingFaceFW/fineweb-edu, or a local folder with the layout of one."""
    subset: str | None = None
    """hub: configuration of the dataset, e.g. sample-10BT."""
    split: str = "train"
    """hub: split of the dataset."""
    revision: str | None = None
    """hub: branch, tag or commit; null = the newest. The run's config.yaml pins the commit it started with. embedded:
    hash of the text; the run fills it in."""
    text_column: str = "text"
    """Column (parquet) or key (jsonl) of a document's text."""
    txt: Literal["file", "paragraph", "line"] = "file"
    """Document of a .txt file: the whole file (long ones are read in parts, in order), each paragraph between blank
    lines, or each line. Also for the files of data.validation.path."""
    filters: dict[str, FilterConfig] = {}
    """Conditions on documents, by column: {int_score: {min: 3}, language: {one_of: [en]}, length: {max: 100000}};
    length is the number of characters of the text."""


def reads_text_files(source: SourceConfig) -> bool:
    """Whether a source's field `txt` has an effect: it may name text files, or have validation files of its own."""
    validation = source.validation.path if isinstance(source, DataConfig) else None
    return source.kind in ("files", "hub") or validation is not None


class MixtureSourceConfig(SourceConfig):
    """One source of a mixture."""

    kind: SourceKind = "embedded"
    """embedded = English prose that is installed with mythos, files = parquet/jsonl/txt, hub = Hugging Face dataset,
    tokens = output of `mythos tokenize`."""
    weight: Annotated[float, Field(gt=0, le=1e15)] = 1.0
    """Share of the sequences from this source, relative to the other sources' weights."""


class DataConfig(SourceConfig):
    """Where documents come from and how they become sequences."""

    kind: DataKind = "embedded"
    """embedded = English prose that is installed with mythos, files = parquet/jsonl/txt, hub = Hugging Face dataset,
    tokens = output of `mythos tokenize`, mixture = several of these; reasoning = a generated task instead of text,
    whose vocabulary replaces the tokenizer."""
    task: TaskConfig = TaskConfig()
    """reasoning: the task."""
    sources: dict[str, MixtureSourceConfig] = {}
    """mixture: sources by a name of your choice, each with kind, path, dataset, ..., filters and weight."""
    streams: Count = 64
    """Logical streams that read the corpus. Part of the run's identity: they fix the global batches at any world
    size."""
    sequence_length: Positions = 1024
    """Tokens of a training sequence, at most model.context_length."""
    mask_documents: bool = False
    """Restrict attention to each document of a packed sequence, and count positions from its beginning."""
    workers: CountOrZero = 1
    """Processes per rank that read and tokenize ahead of training; 0 = read between the steps, in the training process.
    The batches are the same at any number."""
    prefetch: Count = 2
    """Steps that the workers read ahead."""
    on_error: Literal["skip", "fail"] = "fail"
    """A document or shard that cannot be used is skipped, counted and reported, or ends the run."""
    max_document_bytes: PositiveInt = 10_000_000
    """Longest usable document in bytes of UTF-8; for longer ones see on_error."""
    patience: Annotated[float, Field(gt=0, le=1e9)] = 600.0
    """Seconds that a remote file may be unreachable or too slow before the run saves and stops."""
    on_mismatch: Literal["fail", "restart"] = "fail"
    """If a checkpoint's data position belongs to other data (another corpus, tokenizer, seed or number of streams):
    fail, or restart the data from its beginning."""
    cache_dir: str | None = None
    """Folder for file lists, validation sets and trained tokenizers; null = $MYTHOS_CACHE or
    ~/.cache/mythos."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out documents."""

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources of a mixture by name; otherwise this section itself, named corpus."""
        return dict(self.sources) if self.kind == "mixture" else {"corpus": self}
