"""Fuzzing of everything that reads a file: damaged inputs must give a result or a MythosError, soon.

A target is a folder of valid files and a function that reads it. An input is one of its files with some edits. The test
suite draws edits by hypothesis, `scripts/fuzz.py` by a seed; both apply and judge them here.
"""

import contextlib
import ctypes
import gzip
import json
import os
import random
import re
import shutil
import signal
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple
from unittest import mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file

from mythos.checkpoints.stored_model import open_model
from mythos.claims import definition
from mythos.claims.check import problems
from mythos.claims.costs import cpu_seconds
from mythos.claims.definition import load_claim
from mythos.claims.measures import check_measures
from mythos.claims.results import FILE
from mythos.claims.verdict_page import PICTURE, VERDICT
from mythos.cli import main, tokenize
from mythos.config.data import DataConfig, FilterConfig
from mythos.config.inherited import RUN_FILE, inherited_sections
from mythos.config.loading import config_from_dict, load_config
from mythos.data import embedded
from mythos.data.corpus import open_corpora
from mythos.data.tokenizer import Tokenizer
from mythos.data.tokens import TokenSource
from mythos.distributed.run_lock import LOCK_FILE, RunLock, is_locked
from mythos.errors import MythosError
from mythos.evaluation.choices import read_tasks
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import DepthFit, DepthSweep, HaltingPoint, LoopMeasures
from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, load, save
from mythos.files.storage import MARKER, META
from mythos.hf.importing import import_model
from mythos.planning import trace_cache
from mythos.reports.evaluation_plots import map_panels
from mythos.reports.listing import list_run
from mythos.reports.markup import Pictures
from mythos.reports.page import run_page
from mythos.reports.recorded import open_run
from mythos.trainer import Trainer
from mythos.training.metrics import METRICS_FILE
from tests.hf.published import published
from tests.runs import documents, settings, tiny, write_settings

ROOT = Path(__file__).parents[1]
MOST_SECONDS = 10.0
"""Most processor time (not wall time: the machine may be busy)."""
HANG_SECONDS = 60
"""Wall time after which reading is interrupted."""
MOST_BYTES = 200 * 2**20
"""Most additional memory."""

WORDS = [
    *b"\0 \xff \xef\xbb\xbf \xed\xa0\x80 \\ud800 \\u0000 null ~ true [] {} *a .. / ../x step-1 auto ? ---".split(b" "),
    *b"0 -1 0100 1:30 1e30 1e400 NaN .inf -0.0 18446744073709551616 9223372036854775807 1152921504606846976".split(),
    *(b"\n", b"\r", b"\t", b'""', b" " * 300, b"9" * 400, b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"- " * 2000),
    *(b"&a [*a]", b"!!int ''", b"!!timestamp x", b"!!binary x", b"!!python/name:os.system", b"<<: *a"),
]
"""Byte strings that have crashed other readers."""
VALUES: list[Any] = [
    *(None, True, 0, -1, 1, 3, 2**20, 2**31, 2**40, 2**62, 2**63, 10**30, 0.5, 1e300, float("inf"), float("nan")),
    *("", "x", "\0", "\ud800", "..", "../x", "/etc/hostname", "a" * 5000, [], {}, [[]], {"a": {}}, [None], ["x"] * 100),
]
"""Replacements for a value of JSON or YAML."""

VALUE = re.compile(rb"(?<=: )[^\n,}\]]+|(?<==)[^\n]+")
"""Matches what looks like the value of a key, in YAML, JSON or an override."""


class Edit(NamedTuple):
    """One change of a file."""

    kind: Literal["flip", "insert", "delete", "double", "cut", "word", "value", "key"]
    place: float
    """In [0, 1): position in the file, or in the list of its values."""
    what: int
    """Number of the bit, word or value; number of bytes."""


KINDS = Edit.__annotations__["kind"].__args__


@dataclass(frozen=True)
class Target:
    """A kind of input, and its reader."""

    name: str
    folder: Path
    files: tuple[str, ...]
    """The files that are edited."""
    read: Callable[[Path], object]
    """Reads a copy of the folder."""
    seal: Callable[[Path], None] = lambda folder: None
    """Updates the checksums of a copy; otherwise its damage would be refused before it is read."""


def _interrupt(*_: object) -> None:
    raise TimeoutError(f"it took more than {HANG_SECONDS} s")


class Outcome(contextlib.AbstractContextManager["Outcome"]):
    """The outcome of reading one input. Catches errors of every class (a panic of Rust is no Exception)."""

    def __init__(self) -> None:
        self.kind: Literal["result", "refusal", "fault"] = "result"
        self.message = ""

    def __enter__(self) -> "Outcome":
        self._measured = os.access("/proc/self/clear_refs", os.W_OK)
        if self._measured:
            # Return freed memory to the system first: training keeps it (`keep_freed_memory`), and growth within it
            # would not be seen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of memory
        signal.signal(signal.SIGALRM, _interrupt)
        signal.alarm(HANG_SECONDS)
        self._resident, self._began = psutil.Process().memory_info().rss, time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        signal.alarm(0)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return False
        seconds = time.process_time() - self._began
        peak = 0
        if self._measured:
            peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        if error is not None:
            self.kind, self.message = "refusal", str(error)
            if not isinstance(error, MythosError) or not self.message:
                self.kind, self.message = "fault", "".join(traceback.format_exception(kind, error, trace))
        if seconds > MOST_SECONDS:
            self.kind, self.message = "fault", f"took {seconds:.1f} s\n{self.message}"
        if peak - self._resident > MOST_BYTES:
            self.kind, self.message = "fault", f"took {(peak - self._resident) / 2**20:.0f} MB\n{self.message}"
        return True


def try_input(target: Target, file: str, edits: list[Edit], copy: Path) -> Outcome:
    """Read a target with one of its files edited; the folder `copy` is created for it and deleted afterwards."""
    shutil.copytree(target.folder, copy)
    try:
        (copy / file).write_bytes(edited((copy / file).read_bytes(), edits))
        target.seal(copy)
        with Outcome() as outcome:
            target.read(copy)
        return outcome
    finally:
        shutil.rmtree(copy)


def draw(targets: list[Target], key: str) -> tuple[Target, str, list[Edit]]:
    """An input: a function of the key."""
    generator = random.Random(key)
    target = generator.choice(targets)
    # With changed bytes most JSON is refused for its syntax alone, so values are changed as often as bytes.
    weights = [1, 1, 1, 1, 1, 3, 3, 1]
    edits = [
        Edit(generator.choices(KINDS, weights)[0], generator.random(), generator.randrange(2**16))
        for _ in range(generator.choice((1, 1, 2, 5)))
    ]
    return target, generator.choice(target.files), edits


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Apply edits to a file's bytes. Edits of values apply to JSON and YAML; elsewhere they insert a word."""
    for kind, place, what in edits:
        at = int(place * len(content))
        if kind in ("value", "key"):
            changed = _other_value(content, kind, place, what)
            if changed is not None:
                content = changed
                continue
        if kind == "word" and (spans := [match.span() for match in VALUE.finditer(content)]):
            start, end = spans[int(place * len(spans))]
            content = content[:start] + WORDS[what % len(WORDS)] + content[end:]
        elif kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << what % 8]) + content[at + 1 :]
        elif kind == "delete":
            content = content[:at] + content[at + 1 + what % 64 :]
        elif kind == "double":
            content = content[: at + 1 + what % 64] + content[at:]
        elif kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + WORDS[what % len(WORDS)] + content[at:]
    return content


def _other_value(content: bytes, kind: str, place: float, what: int) -> bytes | None:
    """The content with one of its values replaced or one of its keys renamed; None if it is neither JSON nor YAML."""
    header, rest = False, b""
    size = int.from_bytes(content[:8], "little")
    if size < len(content) and content[8:9] == b"{":  # safetensors
        header, content, rest = True, content[8 : 8 + size], content[8 + size :]
    try:
        data, write = json.loads(content), lambda data: json.dumps(data).encode()
    except (ValueError, RecursionError):
        try:
            if b"\0" in content or len(content) > 20_000:
                return None
            data, write = yaml.safe_load(content), lambda data: yaml.safe_dump(data, allow_unicode=False).encode()
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            return None
    places = _places(data)
    if not places:
        return None
    parent, key = places[int(place * len(places))]
    if kind == "key" and isinstance(parent, dict):
        parent[f"{key}{what}" if what % 2 else "x"] = parent.pop(key)
    else:
        parent[key] = VALUES[what % len(VALUES)]
    try:
        content = write(data)
    except (yaml.YAMLError, TypeError, ValueError):
        return None
    return len(content).to_bytes(8, "little") + content + rest if header else content


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Every list or mapping in a value with each of its keys; of long lists the first 50."""
    places: list[tuple[Any, Any]] = []
    level, visited = [data], set()
    while level:
        outer = level.pop()
        if isinstance(outer, dict | list) and id(outer) not in visited:  # a YAML alias may contain itself
            visited.add(id(outer))
            keys = list(outer) if isinstance(outer, dict) else list(range(len(outer)))[:50]
            places += [(outer, key) for key in keys]
            level += [outer[key] for key in keys]
    return places


# Targets


def build_targets(folder: Path) -> list[Target]:
    """All targets; writes their valid files into a folder, which takes some seconds, and checks that they are read."""
    run = _run(folder / "trained")
    exported = folder / "export"
    assert main(["export", str(run), str(exported)]) == 0
    targets = [*_configurations(folder, exported), *_models(folder, run, exported), *_data(folder, run / "tokenizer")]
    targets += [*_reports(folder, run), *_claims(folder), *_files_of_the_package(folder), *_state(folder, run)]
    for target in targets:
        target.read(shutil.copytree(target.folder, folder / "copy"))
        shutil.rmtree(folder / "copy")
    return targets


def _run(folder: Path) -> Path:
    folder.mkdir()
    trainer = Trainer(tiny(folder, train__steps=1, depth__curriculum={}, eval__batches=1))
    trainer.run()
    return trainer.run_dir


def _configurations(folder: Path, exported: Path) -> list[Target]:
    place = folder / "configuration"
    place.mkdir()
    text = yaml.safe_dump({"train": {"steps": 10, "max_time": "3h"}, **settings(folder)})
    (place / "run.yaml").write_text(text)
    (place / "overrides.txt").write_text(
        "optim.lr=3e-4\neval.loops=[1, 4]\ndata.validation={fraction: 0.1}\nrun.name=x"
    )
    (place / "meta.json").write_text(json.dumps(config_from_dict(settings(folder)).model_dump(mode="json")))
    scores = folder / "scores"
    scores.mkdir()
    save([Result("a", "acc", DepthSetting(8, "convergence", 0.1), 2.5, 0.25, 0.125, 8)], scores / "step-1", {"step": 1})
    start = folder / "start"
    start.mkdir()
    (start / "config.yaml").write_text(text)

    def overridden(copy: Path) -> object:
        text = (copy / "overrides.txt").read_bytes().decode("utf-8", "surrogateescape")
        return load_config("quickstart", text.split("\n"))

    def recorded(copy: Path) -> object:
        with contextlib.suppress(ValueError, RecursionError):  # reading JSON is not under test here
            values = json.loads((copy / "meta.json").read_bytes())
            if isinstance(values, dict):
                return config_from_dict(values, to_train=False)
        return None

    return [
        Target("configuration", place, ("run.yaml",), lambda copy: load_config(copy / "run.yaml")),
        Target("overrides", place, ("overrides.txt",), overridden),
        Target("recorded configuration", place, ("meta.json",), recorded),
        Target("results of an evaluation", scores, ("step-1.json",), lambda copy: load(copy / "step-1.json")),
        Target("init_from (export)", exported, ("config.json",), lambda copy: inherited_sections(str(copy), {})),
        Target("init_from (run)", start, ("config.yaml",), lambda copy: inherited_sections(str(copy), {})),
    ]


class NoPictures(Pictures):
    """Draws nothing: pictures take a second, and no file is read for them alone."""

    def row(self, panels: Iterable[Any], key: Sequence[Any] = ()) -> str:
        """Only prepares the panels."""
        return "".join("" for _ in panels)


def _reports(folder: Path, run: Path) -> list[Target]:
    place, maps = folder / "report", folder / "reasoning"
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoints", "plots"))
    more = {"resumed_from": 0, "skipped_steps": 1, "rollbacks": 1, "mfu": 0.25, "data/document": 3}
    records = [json.loads(line) | more for line in (place / METRICS_FILE).read_text().splitlines()]
    later = [record | {"step": record["step"] + 1, "tokens": 2 * record["tokens"]} for record in records]
    (place / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in [*records, *later]))
    measures = [LoopMeasures(loops, 3.5 - loops / 10, 20.0, 1.5, 0.5, 0.1, 1.25, 0.9) for loops in range(1, 7)]
    points = [HaltingPoint("convergence", 0.1, True, 2.5, 12.5, 1.5, 2.25, 0.25, [1, 2, 3])]
    for name in ("sweep", "evaluation"):
        (place / name).mkdir()
    fit = DepthFit(2.5, 1.5, 0.5, 0.01, [1, 2, 3])
    DepthSweep(3, 4, 32, measures, fit, points).save(place / "sweep" / "step-00000001", {"step": 1})
    scores = [Result("a", "acc", DepthSetting(8, rule, 0.1), 2.5, 0.25, 0.125, 8) for rule in (None, "convergence")]
    save(scores, place / "evaluation" / "step-00000001", {"step": 1, "limit": 5})
    AccuracyMap("a", "hops", 1, (1, 2), [1, 2], [1, 4], 8, [[0.5, 1.0], [0.25, 0.5]]).write(maps / "step-00000001")

    def page(copy: Path) -> object:
        with mock.patch("mythos.reports.page.Pictures", NoPictures):
            return run_page(open_run(copy))

    def accuracies(copy: Path) -> object:
        measured = AccuracyMap.load(copy / "step-00000001.json")
        return measured.table(), map_panels([measured])

    stored = ("sweep/step-00000001.json", "evaluation/step-00000001.json")
    return [
        Target("records of a run", place, (METRICS_FILE,), page),
        Target("stored measurements", place, stored, page),
        Target("run in a list", place, (METRICS_FILE, RUN_FILE), lambda copy: list_run(copy.parent, copy).cells()),
        Target("map of accuracies", maps, ("step-00000001.json",), accuracies),
    ]


def _claims(folder: Path) -> list[Target]:
    results, definitions = folder / "claims", folder / "definitions"
    shutil.copytree(ROOT / "results" / "claims", results)
    shutil.copytree(definition.FOLDER, definitions)

    def defined(copy: Path) -> object:
        with mock.patch.object(definition, "FOLDER", copy):
            claim = load_claim("parameter-efficiency")
            check_measures(claim.measure, claim.definition.once)
            return claim.digest(), claim.runs(1, Path("unused"), None), cpu_seconds(claim)

    files = [f"{name}/{file}" for name in ("memory", "stability") for file in (FILE, VERDICT, PICTURE)]
    return [
        Target("results of a claim", results, tuple(files), lambda copy: list(problems(copy, Path("none")))),
        Target("definition of a claim", definitions, ("parameter-efficiency.yaml",), defined),
    ]


def _files_of_the_package(folder: Path) -> list[Target]:
    texts, traces = folder / "speeches", folder / "traces"
    texts.mkdir()
    for number, text in enumerate(documents(3)):
        (texts / f"18{number:02}-a.txt").write_text(text)
    traces.mkdir()
    shutil.copy(trace_cache.SHIPPED, traces)

    def embedded_text(copy: Path) -> object:
        with mock.patch.object(embedded, "files", lambda: sorted(copy.glob("*.txt"))):
            embedded._hash.cache_clear()
            opened = open_corpora(DataConfig(kind="embedded"))["corpus"]
            return [list(opened.read(shard)) for shard in range(len(opened.shards))]

    def shipped(copy: Path) -> object:
        with mock.patch.object(trace_cache, "SHIPPED", copy / trace_cache.SHIPPED.name):
            trace_cache.shipped_values.cache_clear()
            return trace_cache.shipped_values()

    return [
        Target("embedded text", texts, ("1800-a.txt",), embedded_text),
        Target("traces of the package", traces, (trace_cache.SHIPPED.name,), shipped),
    ]


def _state(folder: Path, run: Path) -> list[Target]:
    """The lock, which every start reads."""
    place = folder / "lock"
    place.mkdir()
    shutil.copy(run / LOCK_FILE, place)

    def locked(copy: Path) -> object:
        with RunLock(copy) as lock:
            return lock.run, is_locked(copy)

    return [Target("lock of a run", place, (LOCK_FILE,), locked)]


def _seal_checkpoint(copy: Path) -> None:
    """Write the checksums of the damaged files, as if they had been saved like this."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
        meta = json.loads((copy / META).read_bytes())
        for file in copy.glob("*.safetensors"):
            content = file.read_bytes()
            if isinstance(meta["files"].get(file.name), dict):
                meta["files"][file.name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (copy / META).write_text(json.dumps(meta))
    if (copy / MARKER).stat().st_size > 40:  # the marker itself was edited
        return
    (copy / MARKER).write_text(json.dumps({"meta_crc32": zlib.crc32((copy / META).read_bytes())}))


def _models(folder: Path, run: Path, exported: Path) -> list[Target]:
    [checkpoint] = (run / "checkpoints").glob("step-*")
    parts = folder / "parts"
    assert main(["export", str(run), str(parts), "--max-shard-size", "60KB"]) == 0
    foreign = folder / "foreign"
    foreign.mkdir()
    targets = []
    for name in ("parcae", "ouro"):
        pickled, place = published(name).save(foreign / f"{name}-bin"), foreign / name
        place.mkdir()
        shutil.copy(pickled / "config.json", place)
        tensors = torch.load(pickled / "pytorch_model.bin")
        save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, place / "model.safetensors")
        targets += [
            Target(f"foreign model ({name})", place, ("config.json", "model.safetensors"), _import),
            Target(f"foreign model ({name}, pickled)", pickled, ("pytorch_model.bin",), _import),
        ]

    def opened(copy: Path) -> object:
        named = copy.parent / "step-00000001"  # the name of a checkpoint's folder is checked too
        copy.rename(named)
        try:
            return open_model(named)
        finally:
            named.rename(copy)

    shard = "shard-00001-model-00001-of-00001.safetensors"
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "request.json")
    return [
        Target("exported model", exported, ("config.json", "model.safetensors"), open_model),
        Target("exported model in parts", parts, ("model.safetensors.index.json",), open_model),
        Target("checkpoint", checkpoint, (META, MARKER, shard), opened, _seal_checkpoint),
        Target("tokenizer", run / "tokenizer", tokenizer, Tokenizer.load),
        *targets,
    ]


def _import(copy: Path) -> object:
    written = copy.with_name("imported")
    try:
        return import_model(copy, written)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _data(folder: Path, tokenizer: Path) -> list[Target]:
    texts, place = documents(12), folder / "data"
    place.mkdir()
    lines = "".join(json.dumps({"text": text, "score": number}) + "\n" for number, text in enumerate(texts))
    (place / "a.jsonl").write_text(lines)
    (place / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (place / "a.txt").write_text("\n\n".join(texts))
    pq.write_table(pa.table({"text": texts, "score": range(12)}), place / "a.parquet", row_group_size=5)
    question = {"query": "The river", "choices": ["crosses", "finds"], "gold": 0}
    (place / "q.jsonl").write_text("".join(json.dumps(question) + "\n" for _ in range(3)))

    def corpus(name: str, on_error: Literal["skip", "fail"]) -> Callable[[Path], object]:
        filters = {} if name == "a.txt" else {"score": FilterConfig(min=0)}

        def read(copy: Path) -> object:
            data = DataConfig(kind="files", path=str(copy / name), on_error=on_error, filters=filters)
            opened = open_corpora(data)["corpus"]
            return [list(opened.read(shard)) for shard in range(len(opened.shards))]

        return read

    shards = folder / "tokens"
    config = write_settings(folder, data__path=str(place / "a.jsonl"), tokenizer__name=str(tokenizer))
    assert tokenize.main([str(config), "--out", str(shards), "--workers", "1"]) == 0
    loaded = Tokenizer.load(tokenizer)

    def tokens(copy: Path) -> object:
        source = TokenSource(copy, loaded, 0.0, "fail")
        return [list(source.read(shard, 0, 1)) for shard in range(len(source.shards))]

    kinds = ("jsonl", "jsonl.gz", "txt", "parquet")
    return [
        *(Target(f"data ({kind})", place, (f"a.{kind}",), corpus(f"a.{kind}", "fail")) for kind in kinds),
        *(Target(f"data ({kind}, skip)", place, (f"a.{kind}",), corpus(f"a.{kind}", "skip")) for kind in kinds),
        Target("questions", place, ("q.jsonl",), lambda copy: read_tasks([str(copy / "q.jsonl")], what="--tasks")),
        Target("token shards", shards, tuple(sorted(p.name for p in shards.iterdir() if p.is_file())), tokens),
    ]
