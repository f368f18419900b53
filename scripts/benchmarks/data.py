"""Reading and tokenizing without a model: the loader against the tokenizer alone, late starts, memory of workers."""

import argparse
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any

import psutil

from mythos.cli.common import check_least
from mythos.config.loading import load_config
from mythos.data.corpus import Skipped, holdout_fraction
from mythos.data.loader import Loader
from mythos.data.pipeline import Data, open_data
from mythos.data.processes import START_METHOD
from mythos.data.source import Source, TextSource
from mythos.data.stream import Part, Walk
from mythos.data.tokenizer import Tokenizer, training_documents
from mythos.errors import MythosError
from mythos.progress import progress_bar
from scripts.benchmarks.timing import usable_cores

REPEATS = 11

# For the tokenizer alone: documents per call, and bytes in total.
CALL_DOCUMENTS = 1000
TEXT_BYTES = 40 * 10**6

WARM_UP_DOCUMENTS = 20_000
"""Documents before memory is measured, which fill pools, the tokenizer's caches and prefetched batches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run whose data is read")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of workers to measure (1 up to the cores)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (1.5)")
    parser.add_argument("--documents", type=int, default=0, help="measure the workers' memory over so many documents")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print each figure when it is measured; return all."""
    check_least(options, documents=0)
    if options.seconds <= 0:
        raise MythosError(f"--seconds: got {options.seconds:g}; give a number above 0")
    if options.workers and min(options.workers) < 1:
        raise MythosError(f"--workers: got {min(options.workers)}; give at least 1")
    return DataBenchmark(options).run()


class DataBenchmark:
    """Measures the loader, the tokenizer alone, the cost of resuming late in a shard, and memory of workers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = load_config(options.config, options.overrides)
        if self.config.data.kind == "reasoning":
            raise MythosError(f"{options.config}: got data.kind reasoning; the benchmark is for text")
        data = open_data(self.config, None, {})
        assert isinstance(data, Data) and data.tokenizer is not None
        self.data, self.tokenizer = data, data.tokenizer
        self.texts: list[str] = []
        size = 0
        opened = self.data.sources.values()
        corpora = [(source.corpus, weight) for source, weight in opened if isinstance(source, TextSource)]
        for text in training_documents(corpora, holdout_fraction(self.data.config)):
            self.texts.append(text)
            size += len(text.encode())
            if size > TEXT_BYTES:
                break
        self.cores = usable_cores()

    def run(self) -> dict[str, Any]:
        """Measure everything that the options ask for."""
        numbers = self.options.workers or range(1, len(self.cores) + 1)
        results: dict[str, Any] = {
            "workers": {workers: self.throughput(workers) for workers in numbers},
            "resume": {name: self.resume(name, source) for name, (source, _) in self.data.sources.items()},
        }
        if self.options.documents:
            results["memory"] = self.memory((self.options.workers or [1])[-1])
        return results

    def loader(self, workers: int) -> Loader:
        """A loader at the beginning of the data, as in a run."""
        config = self.config
        slots = config.train.global_batch // config.data.streams
        return Loader(self.data.streams(config.run.seed), slots=slots, workers=workers, prefetch=config.data.prefetch)

    def throughput(self, workers: int) -> dict[str, Any]:
        """Tokens per second of the loader and of the tokenizer alone, measured in turns on the same cores."""
        cores = self.cores[:workers]
        loaded, alone = [], []
        # The tokenizer gets its own process, because it creates its threads once, one per core at that time.
        with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as other:
            os.sched_setaffinity(0, cores)
            loader = self.loader(workers)
            for _ in range(REPEATS):
                loaded.append(_loader_speed(loader, self.options.seconds))
                if self.texts:
                    work = other.submit(_tokenizer_speed, self.tokenizer, self.texts, cores, self.options.seconds)
                    alone.append(work.result())
            loader.close()
            os.sched_setaffinity(0, self.cores)
        print(
            f"{workers} workers on {len(cores)} cores: {_median(loaded, 0):,.0f} tokens/s, {_median(loaded, 1):,.0f} a "
            "CPU second"
        )
        result: dict[str, Any] = {"loader": _speeds(loaded)}
        if alone:
            wall, cpu = (
                statistics.median(ours[unit] / theirs[unit] for ours, theirs in zip(loaded, alone, strict=True))
                for unit in (0, 1)
            )
            print(
                f"  the tokenizer alone: {_median(alone, 0):,.0f} tokens/s, {_median(alone, 1):,.0f} a CPU second\n"
                f"  the loader reaches {wall:.1%} of it by the clock, {cpu:.1%} by CPU time (medians of {REPEATS})"
            )
            result |= {"tokenizer": _speeds(alone), "share": {"wall": wall, "cpu": cpu}}
        return result

    def resume(self, name: str, source: Source) -> dict[str, float]:
        """Seconds to a stream's first batch at the start of a shard and at 90% of it."""
        tokens = self.loader(0).slots * self.config.data.sequence_length
        shard = max(range(min(len(source.shards), 100)), key=lambda index: sum(1 for _ in source.read(index, 0, 1)))
        rows = [row for row, document in source.read(shard, 0, 1) if not isinstance(document, Skipped)]
        seconds = {}
        for row in (rows[0], rows[int(0.9 * len(rows))]):
            walk_seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                Walk(name, 0, [Part(shard, row, 1)], source, 0).take(tokens)
                walk_seconds.append(time.perf_counter() - started)
            seconds[row] = min(walk_seconds)
        first, late = seconds.values()
        print(
            f"{name}: first batch of a stream ({tokens:,} tokens) in {1000 * first:.1f} ms at the start of "
            f"{source.shards[shard]}, in {1000 * late:.1f} ms from row {list(seconds)[1]:,} of {rows[-1] + 1:,}: "
            f"{late / first:.2f} times"
        )
        return {"first_row_seconds": first, "late_row_seconds": late}

    def memory(self, workers: int) -> list[dict[str, int]]:
        """Measure the growth of each worker's resident memory over many documents."""
        loader = self.loader(workers)
        before = {process.pid for process in psutil.Process().children()}
        loader.start()
        processes = [process for process in psutil.Process().children() if process.pid not in before]
        start: list[int] = []
        seen = 0
        total = WARM_UP_DOCUMENTS + self.options.documents
        bar: Any
        with progress_bar(total=total, unit="doc", desc="measuring memory") as bar:
            while seen < total:
                documents = int(loader.next_batch().ids[:, :-1].eq(self.tokenizer.eos_id).sum())
                seen += documents
                bar.update(documents)
                if not start and seen >= WARM_UP_DOCUMENTS:
                    start = [process.memory_info().rss for process in processes]
        growth = [process.memory_info().rss - size for process, size in zip(processes, start, strict=True)]
        loader.close()
        print(
            f"memory over {self.options.documents:,} documents: "
            + ", ".join(f"{size / 1e6:.0f} MB {more / 1e6:+.1f} MB" for size, more in zip(start, growth, strict=True))
        )
        return [{"bytes": size, "growth": more} for size, more in zip(start, growth, strict=True)]


def _median(speeds: list[tuple[float, float]], unit: int) -> float:
    return statistics.median(speed[unit] for speed in speeds)


def _speeds(speeds: list[tuple[float, float]]) -> dict[str, float]:
    return {
        f"tokens_per_{clock}_second{which}": value(speed[unit] for speed in speeds)
        for unit, clock in enumerate(("wall", "cpu"))
        for which, value in (("", statistics.median), ("_best", max))
    }


def _cpu_seconds() -> float:
    """CPU time of this process and its workers."""
    workers = (process.cpu_times() for process in psutil.Process().children())
    return time.process_time() + sum(spent.user + spent.system for spent in workers)


def _loader_speed(loader: Loader, seconds: float) -> tuple[float, float]:
    """Tokens per second of wall time and of CPU time."""
    warm = time.perf_counter() + seconds / 3
    while time.perf_counter() < warm:  # use up what was prefetched while the tokenizer ran
        loader.next_batch()
    started, spent = time.perf_counter(), _cpu_seconds()
    tokens = 0
    while (elapsed := time.perf_counter() - started) < seconds:
        tokens += loader.next_batch().ids[:, 1:].numel()
    return tokens / elapsed, tokens / (_cpu_seconds() - spent)


def _tokenizer_speed(tokenizer: Tokenizer, texts: list[str], cores: list[int], seconds: float) -> tuple[float, float]:
    """Tokens per second of wall time and of CPU time, encoding text in memory to lists of ids."""
    os.sched_setaffinity(0, cores)
    os.environ["RAYON_NUM_THREADS"] = str(len(cores))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if len(cores) > 1 else "false"
    encode = tokenizer.backend.encode_batch_fast
    encode(texts[:CALL_DOCUMENTS], add_special_tokens=False)
    started, spent = time.perf_counter(), time.process_time()
    tokens = 0
    while True:
        documents = iter(texts)
        while call := list(islice(documents, CALL_DOCUMENTS)):
            tokens += sum(len(encoding.ids) + 1 for encoding in encode(call, add_special_tokens=False))
            if (elapsed := time.perf_counter() - started) >= seconds:
                return tokens / elapsed, tokens / (time.process_time() - spent)
