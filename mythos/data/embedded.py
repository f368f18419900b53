"""The embedded corpus: English documentation that is already on the machine, so that a first run needs no network.

It consists of Python's help topics and of the docstrings of the standard library and of this project's installed
dependencies. Files are read as text, never imported. A lexer of string literals extracts the docstrings: it yields the
same text as Python's parser in a tenth of the time.
"""

import ast
import hashlib
import inspect
import multiprocessing
import os
import platform
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePath

from packaging.requirements import Requirement

from mythos.errors import MythosError
from mythos.files.local import replacing
from mythos.progress import progress_bar

VERSION = 1
"""Part of the cache key: increase it when the gathered text changes."""

# This project's requirements, from which all dependencies are followed. Not read from its metadata, so that the text
# is the same whether the project is installed or run from a checkout.
ROOTS = [
    "torch",
    "datasets",
    "transformers",
    "accelerate",
    "wandb",
    "pyyaml",
    "tqdm",
    "pydantic",
    "safetensors",
    "matplotlib",
    "tokenizers",
    "pyarrow",
    "numpy",
]

ROW_GROUPS = 128
# In characters.
MINIMUM_DOCSTRING = 120
MINIMUM_DOCUMENT = 500
MAXIMUM_DOCUMENT = 4000
MINIMUM_PARAGRAPH = 50

# Tests contain text that is input, not documentation; vendored copies repeat other packages.
SKIPPED_FOLDERS = {"tests", "test", "testing", "_vendor", "vendor", "vendored", "site-packages", "dist-packages"}

# Comments, triple-quoted strings, other strings. Every alternative begins with a fixed character, so that the search is
# fast. Comments and short strings are matched so that quotes inside them do not open a string.
STRINGS = re.compile(
    r"""\#[^\n]*"""
    r"""|(?P<long>\"{3}(?:[^"\\]++|\\.|"(?!""))*+"{3}|'{3}(?:[^'\\]++|\\.|'(?!''))*+'{3})"""
    r"""|"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+'""",
    re.DOTALL,
)
PREFIX = re.compile(r"\b[rRbBuUfF]{1,2}$")

STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a all also an and any are as at be because been both but by can do does each for from had has have how if in
        into is it its may more must no not of on one only or other same should so some such than that the their them
        then there these they this those to used using was we when where which while will with would you your between
        """,
    )
)

# (text that a paragraph must contain for the pattern to be tried, pattern, replacement)
MARKUP = (
    (":`~", re.compile(r":[a-z:+-]+:`~[^`]*?([^`.]+)`"), r"`\1`"),  # :class:`~torch.nn.Linear` -> `Linear`
    (":`", re.compile(r":[a-z:+-]+:`([^`<]*?)\s*(?:<[^`>]*>)?`"), r"`\1`"),  # :func:`text <target>` -> `text`
    (">`_", re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `text <target>`_ -> text
    ("[`~", re.compile(r"\[`~[^`\]]*?([^`\].]+)`\]"), r"`\1`"),  # [`~Trainer.train`] -> `train`
    ("](", re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](target) -> text
    ("[`", re.compile(r"\[`([^`\]]+)`\]"), r"`\1`"),
    ("``", re.compile(r"``([^`]+)``"), r"`\1`"),
    ("`_", re.compile(r"`([^`]+)`__?(?=\W|$)"), r"`\1`"),
    ("**", re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    ("*", re.compile(r"(?<![\w*])\*([A-Za-z][^*]*?)\*(?![\w*])"), r"\1"),
    ("]_", re.compile(r"\s*\[\d+\]_"), ""),
)
SPACES = re.compile(r"\s+")
ENDINGS = ".!?\"'`)_*]"

BULLET = re.compile(r"\s*(?:[-*+•]|\d+[.)]|\(\w\))\s+")
UNDERLINE = re.compile(r"\s*([=\-~^\"'*#`+.])\1{2,}\s*$")
FIELD = re.compile(r"\s*(?::\w[^:`]*:\s|\*{0,2}[\w.`*\[\], ]{1,40}\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?:(?:\s|$))")
SENTENCE = re.compile(r"[\"'`(]*[A-Z`].*[.!?][\"'`)]*$", re.DOTALL)
WORDS = re.compile(r"[A-Za-z]+")
PLAIN = re.compile(r"[^\W\d_ ]+| +")
ODD = re.compile(r"https?:|\\[a-z]|[{}|<>=_#@]{2}|\$\w|::|\bTODO\b|\bFIXME\b|>>>|\bself\.|\.\.\s")


def gather(cache_dir: Path, progress: bool = True) -> list[Path]:
    """Gather the text, or find it in the cache; return the parquet files (columns ``text``, ``source``).

    They have at least 64 row groups. The cached file's name depends on the versions of Python, of the packages and of
    this module. It is written atomically.

    Raises:
        MythosError: the cache folder cannot be written, or there is almost no text.
    """
    packages = dependencies()
    versions = [platform.python_version(), str(VERSION), *(f"{name}=={metadata.version(name)}" for name in packages)]
    key = hashlib.blake2b("\n".join(versions).encode(), digest_size=8).hexdigest()
    target = cache_dir / f"embedded-{key}.parquet"
    if target.is_file():
        return [target]
    documents = collect(packages, progress)
    if len(documents) < ROW_GROUPS:
        raise MythosError(
            f"data.kind: embedded: the {len(packages)} installed packages contain {len(documents)} documents, "
            "too few to train on. Use data.kind: files."
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Shuffled, so that all row groups, and with them all streams, get the same mixture of text.
    random.Random(0).shuffle(documents)
    table = pa.table({"text": [text for text, _ in documents], "source": [source for _, source in documents]})
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with replacing(target, unique=True) as temporary:
            pq.write_table(table, temporary, compression="zstd", row_group_size=-(-len(documents) // ROW_GROUPS))
    except OSError as error:
        raise MythosError(
            f"data.cache_dir: {cache_dir} cannot be written: {error}. Set data.cache_dir or $MYTHOS_CACHE to another "
            "folder."
        ) from error
    return [target]


def dependencies() -> list[str]:
    """Names of the installed distributions that this project needs, directly and indirectly, sorted."""
    installed: set[str] = set()
    wanted = list(ROOTS)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in installed:
            continue
        try:
            requirements = [Requirement(line) for line in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        installed.add(name)
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return sorted(installed)


def collect(packages: list[str], progress: bool = True) -> list[tuple[str, str]]:
    """Documents with their sources ("package module"), without repeated paragraphs, in a fixed order."""
    from pydoc_data.topics import topics

    seen: set[bytes] = set()
    files = [*_standard_library(), *(file for package in packages for file in _package_files(package))]
    documents = [
        (text, "python topics") for text in _merge(_unseen(list(prose(topic)), seen) for topic in topics.values())
    ]
    # Spawned, not forked: the caller may have started threads.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        by_file = pool.map(_docstrings, [path for _, _, path in files], chunksize=128)
        bar = progress_bar(
            by_file, total=len(files), desc="gathering documentation text", unit="file", disable=not progress
        )
        for (package, module, _), docstrings in zip(files, bar, strict=True):
            new = (_unseen(paragraphs, seen) for paragraphs in docstrings)
            documents += [(text, f"{package} {module}") for text in _merge(new)]
    return documents


def _docstrings(path: Path) -> list[list[str]]:
    """The paragraphs of every docstring of a file."""
    return [list(prose(text)) for text in literals(_read(path))]


def literals(source: str) -> Iterator[str]:
    """Values of the triple-quoted strings in Python source: docstrings and documentation tables."""
    for match in STRINGS.finditer(source):
        token = match["long"]
        if token is None or len(token) < MINIMUM_DOCSTRING:
            continue
        prefix = PREFIX.search(source, max(0, match.start() - 3), match.start())
        kind = prefix[0].lower() if prefix else ""
        if "b" in kind or "f" in kind:
            continue
        if "r" in kind or "\\" not in token:
            yield token[3:-3]
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes, common in docstrings with formulas
                yield ast.literal_eval(token)
        except (SyntaxError, ValueError):
            continue


def _standard_library() -> list[tuple[str, str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        ("python", _module(p.relative_to(root)), p) for p in sorted(root.rglob("*.py")) if _wanted(p.relative_to(root))
    ]


def _package_files(package: str) -> list[tuple[str, str, Path]]:
    files = [file for file in metadata.files(package) or [] if file.suffix == ".py" and _wanted(file)]
    return [(package, _module(file), Path(str(file.locate()))) for file in sorted(files)]


def _wanted(path: PurePath) -> bool:
    return not SKIPPED_FOLDERS.intersection(path.parts) and path.parts[0] != "pydoc_data"


def _module(path: PurePath) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # in a package's list of files but missing
        return ""


def _unseen(paragraphs: list[str], seen: set[bytes]) -> list[str]:
    """A docstring's paragraphs without those seen before; empty if little remains."""
    kept = []
    for paragraph in paragraphs:
        digest = hashlib.blake2b("".join(WORDS.findall(paragraph.lower())).encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return kept if sum(map(len, kept)) >= MINIMUM_DOCSTRING else []


def prose(docstring: str) -> Iterator[str]:
    """English paragraphs of a docstring, one line each, markup reduced; no code, tables, signatures, formulas."""
    for lines in _units(inspect.cleandoc(docstring).splitlines()):
        paragraph = " ".join(line.strip() for line in lines)
        if len(paragraph) >= MINIMUM_PARAGRAPH and paragraph[-1] in ENDINGS and (text := _clean(paragraph)):
            yield text


@lru_cache(maxsize=2**16)  # packages repeat the descriptions of their parameters hundreds of times
def _clean(paragraph: str) -> str:
    """The paragraph without markup; empty if it is not prose."""
    for trigger, pattern, replacement in MARKUP:
        if trigger in paragraph:
            paragraph = pattern.sub(replacement, paragraph)
    paragraph = SPACES.sub(" ", paragraph).strip()
    return paragraph if is_prose(BULLET.sub("", paragraph, count=1)) else ""


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences: length, ending, function words, and few symbols."""
    if len(paragraph) < MINIMUM_PARAGRAPH or not SENTENCE.match(paragraph) or ODD.search(paragraph):
        return False
    words = WORDS.findall(paragraph.lower())
    common = sum(word in STOPWORDS for word in words)
    symbols = len(PLAIN.sub("", paragraph))
    return len(words) >= 8 and common >= 0.25 * len(words) and symbols <= 0.12 * len(paragraph)


def _units(lines: list[str]) -> Iterator[list[str]]:
    """Cut lines into paragraphs, list items and descriptions; drop fenced code, literal blocks and headings."""
    unit: list[str] = []
    indent = 0
    literal: int | None = None  # lines indented deeper than this belong to a literal block
    fenced = False
    example = False  # inside an interactive session and its output, up to a blank line
    for line in [*lines, ""]:
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            stripped = ""
        if literal is not None and stripped and depth <= literal:
            literal = None
        example = bool(stripped) and (example or stripped.startswith(">>>"))
        if fenced or literal is not None:
            continue
        if UNDERLINE.match(line):
            unit = []  # the line above is a heading
            continue
        starts_new = depth != indent or bool(BULLET.match(line)) or (":" in line and bool(FIELD.match(line)))
        # The lines of a list item are indented like its text.
        if unit and depth > indent and BULLET.match(unit[0]) and not BULLET.match(line):
            starts_new = False
        if unit and (not stripped or starts_new or example):
            yield unit
            unit = []
        if stripped.startswith(".. "):  # a directive and the indented lines below it
            literal = depth
            continue
        if example or stripped.startswith(("+--", "|")):
            continue
        if stripped:
            if not unit:
                indent = depth
            unit.append(line)
            if stripped.endswith("::"):
                unit = []  # a sentence that only introduces the literal block
                literal = depth


def _merge(docstrings: Iterable[list[str]]) -> Iterator[str]:
    """Join the docstrings of one module into documents of 500 to 4,000 characters; a shorter remainder is dropped."""
    pending = ""
    for paragraphs in docstrings:
        for paragraph in paragraphs:
            if len(pending) + len(paragraph) > MAXIMUM_DOCUMENT - 2 and len(pending) >= MINIMUM_DOCUMENT:
                yield pending
                pending = ""
            pending = f"{pending}\n\n{paragraph}" if pending else paragraph
        if len(pending) >= MINIMUM_DOCUMENT:
            yield pending
            pending = ""
