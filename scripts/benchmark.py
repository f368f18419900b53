"""Measure what this machine reaches.

python scripts/benchmark.py data CONFIG.yaml [key.path=value ...]
python scripts/benchmark.py checkpoint [--preset NAME] [--vocabulary N] [--directory DIR]
python scripts/benchmark.py decode RUN [--batch N] [--tokens N] [--halting RULE]
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

import psutil
import torch
from tqdm import tqdm

from mythos.checkpoint import Checkpoints, training_state
from mythos.config import OptimConfig, load_config
from mythos.data.corpus import Skipped, holdout_fraction
from mythos.data.loader import Loader
from mythos.data.pipeline import open_data
from mythos.data.processes import START_METHOD
from mythos.data.source import Source, TextSource
from mythos.data.stream import Part, Walk
from mythos.data.tokenizer import Tokenizer, training_documents
from mythos.errors import MythosError
from mythos.model.generate import Generation, generate
from mythos.model.halting import THRESHOLDS, HaltingRule, halting_rule
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.sampling import Sampling
from mythos.model_files import open_model
from mythos.optim import build_optimizer
from mythos.presets import preset_config
from mythos.ranks import Ranks

REPEATS = 11
SAVES = 5
TURNS = 5

PROMPT = 64
"""Tokens of a prompt that decoding starts from."""

# Of what is given to the tokenizer alone: documents a call, and bytes in all.
CALL_DOCUMENTS = 1000
TEXT_BYTES = 40 * 10**6

WARM_UP_DOCUMENTS = 20_000
"""Documents before memory is measured: pools, caches of the tokenizer and prefetched batches have filled by then."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        choices=list(BENCHMARKS),
        help="data: reading and tokenizing, without a model; checkpoint: how long training stands still for one; "
        "decode: generation with all loops and where positions halt",
    )
    parser.add_argument("config", metavar="CONFIG.yaml | RUN", nargs="?", help="data: the run; decode: a trained model")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--workers", type=int, nargs="+", help="numbers of workers to measure (1 up to the cores)")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one measurement (1.5)")
    parser.add_argument("--documents", type=int, default=0, help="measure the workers' memory over so many documents")
    parser.add_argument("--preset", default="dense_140m", help="checkpoint: the model (dense_140m)")
    parser.add_argument("--vocabulary", type=int, default=19008, help="checkpoint: its tokens (19008)")
    parser.add_argument("--directory", help="checkpoint: where to write (a temporary directory)")
    parser.add_argument("--batch", type=int, default=8, help="decode: rows (8)")
    parser.add_argument("--tokens", type=int, default=128, help="decode: tokens generated in each row (128)")
    parser.add_argument("--halting", help="decode: rule (the model's)")
    options = parser.parse_intermixed_args(arguments)
    if (options.what == "checkpoint") == (options.config is not None):
        parser.error("data needs CONFIG.yaml, decode a trained model; checkpoint takes neither")
    try:
        BENCHMARKS[options.what](options).run()
    except MythosError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


class DataBenchmark:
    """Throughput of the loader beside the tokenizer's own, the cost of resuming late in a shard, and memory."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = load_config(options.config, options.overrides)
        if self.config.data.kind == "reasoning":
            raise MythosError(f"{options.config}: got data.kind reasoning; the benchmark is for text")
        self.data = open_data(self.config, None, {})
        self.texts: list[str] = []
        size = 0
        opened = self.data.sources.values()
        corpora = [(source.corpus, weight) for source, weight in opened if isinstance(source, TextSource)]
        for text in training_documents(corpora, holdout_fraction(self.data.config)):
            self.texts.append(text)
            size += len(text.encode())
            if size > TEXT_BYTES:
                break
        self.cores = sorted(os.sched_getaffinity(0))

    def run(self) -> None:
        """Print every figure as it is measured."""
        for workers in self.options.workers or range(1, len(self.cores) + 1):
            self.throughput(workers)
        for name, (source, _) in self.data.sources.items():
            self.resume(name, source)
        if self.options.documents:
            self.memory((self.options.workers or [1])[-1])

    def loader(self, workers: int) -> Loader:
        """A loader at the beginning of the data, as a run has it."""
        config = self.config
        slots = config.train.global_batch // config.data.streams
        return Loader(self.data.streams(config.run.seed), slots=slots, workers=workers, prefetch=config.data.prefetch)

    def throughput(self, workers: int) -> None:
        """Tokens per second of the loader and of the tokenizer alone, in turns, on the same cores."""
        cores = self.cores[:workers]
        loaded, alone = [], []
        # Its own process, because the threads of the tokenizer are made once, as many as there are cores then.
        with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as other:
            os.sched_setaffinity(0, cores)
            loader = self.loader(workers)
            for _ in range(REPEATS):
                loaded.append(_loader_speed(loader, self.options.seconds))
                if self.texts:
                    work = other.submit(_tokenizer_speed, self.data.tokenizer, self.texts, cores, self.options.seconds)
                    alone.append(work.result())
            loader.close()
            os.sched_setaffinity(0, self.cores)
        print(
            f"{workers} workers on {len(cores)} cores: {_median(loaded, 0)} tokens/s, {_median(loaded, 1)} a CPU second"
        )
        if alone:
            wall, cpu = (
                statistics.median(ours[unit] / theirs[unit] for ours, theirs in zip(loaded, alone, strict=True))
                for unit in (0, 1)
            )
            print(f"  the tokenizer alone: {_median(alone, 0)} tokens/s, {_median(alone, 1)} a CPU second")
            print(f"  the loader reaches {wall:.1%} of it by the clock, {cpu:.1%} by CPU time (medians of {REPEATS})")

    def resume(self, name: str, source: Source) -> None:
        """Seconds to a stream's first batch at the start of a shard and at nine tenths of it."""
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
            f"{source.shards[shard]}, in {1000 * late:.1f} ms from row {list(seconds)[1]} of {len(rows)}: "
            f"{late / first:.2f} times"
        )

    def memory(self, workers: int) -> None:
        """Growth of each worker's resident memory over many documents."""
        loader = self.loader(workers)
        before = {process.pid for process in psutil.Process().children()}
        loader.start()
        processes = [process for process in psutil.Process().children() if process.pid not in before]
        start: list[int] = []
        seen = 0
        total = WARM_UP_DOCUMENTS + self.options.documents
        with tqdm(total=total, unit="doc", desc="measuring memory") as bar:
            while seen < total:
                documents = int((loader.next_batch().ids[:, :-1] == self.data.tokenizer.eos_id).sum())
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


class CheckpointBenchmark:
    """Time that saving and loading take of training, and how a loop of small products slows while bytes are written."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.set_num_threads(1)
        model = RecurrentDepthTransformer(preset_config(options.preset, vocab_size=options.vocabulary)).initialize(0)
        self.state = training_state(model, build_optimizer(model, OptimConfig()))
        size = sum(tensor.nbytes for tensor in self.state.values())
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{options.preset}: {count:,} parameters, with AdamW {size / 1e9:.2f} GB in {len(self.state)} tensors")

    def run(self) -> None:
        """Print every figure as it is measured."""
        with tempfile.TemporaryDirectory(prefix="mythos-benchmark-", dir=self.options.directory) as directory:
            waiting, background = (
                Checkpoints(f"{directory}/{name}", Ranks(), keep=1, keep_every=0, asynchronous=name == "background")
                for name in ("waiting", "background")
            )
            save = [self.seconds(lambda: waiting.save(1, self.state, {})) for _ in range(SAVES)]
            stall, whole, pace, longest = [], [], [], []
            for _ in range(SAVES + 1):
                alone = _products(lambda started: time.perf_counter() - started < 1)
                started = time.perf_counter()
                stall.append(self.seconds(lambda: background.save(1, self.state, {})))
                beside = _products(lambda _: background.saving)
                background.wait()
                whole.append(time.perf_counter() - started)
                pace.append(beside[0] / alone[0])
                longest.append(beside[1])
            for tensor in self.state.values():
                tensor.zero_()
            load = [self.seconds(lambda: background.load(background.newest, self.state)) for _ in range(SAVES)]
            find = [self.seconds(lambda: background.find("auto")) for _ in range(SAVES)]
        first, later = stall[0], statistics.median(stall[1:])
        share = later / statistics.median(save)
        print(f"save and wait: {_seconds(save)}")
        print(
            f"save while training goes on: training stands still for {later:.3f} s, {share:.1%} of that "
            f"(the first time, memory is allocated: {first:.3f} s); on disk after {_seconds(whole[1:])}"
        )
        print(
            f"meanwhile: small products on the same cores at {statistics.median(pace[1:]):.0%} of their speed, "
            f"longest pause {1000 * max(longest[1:]):.0f} ms"
        )
        print(f"checksums at the start: {_seconds(find)}; load: {_seconds(load)}")
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")

    @staticmethod
    def seconds(work: Callable[[], object]) -> float:
        """How long something takes."""
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


class DecodeBenchmark:
    """Tokens per second of greedy generation: all loops of the training mean against thresholds of a halting rule."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        torch.set_num_threads(1)
        opened = open_model(options.config)
        self.model, self.loops = opened.model, opened.mean_loops
        rule = options.halting or self.model.config.halting
        if rule not in THRESHOLDS:
            raise MythosError(f"--halting: got {rule}; allowed: {', '.join(THRESHOLDS)}")
        self.rules: dict[str, HaltingRule | None] = {f"all {self.loops} loops": None}
        for factor in (0.5, 1, 2) if rule != "act" else (1,):
            threshold = factor * THRESHOLDS[rule]
            try:
                self.rules[f"{rule} at {threshold:g}"] = halting_rule(self.model, rule, threshold)
            except ValueError as error:
                raise MythosError(str(error)) from error

    def run(self) -> None:
        """Print the median of runs that take turns, and each rule's ratio to all loops in the same turn."""
        options, config = self.options, self.model.config
        # Random ids: what is decoded after them is as good as any for the time, and for most rules no easier.
        prompts = torch.randint(
            int(config.vocab_size), (options.batch, PROMPT), generator=torch.Generator().manual_seed(0)
        )
        seconds: dict[str, list[float]] = {name: [] for name in self.rules}
        made: dict[str, Generation] = {}
        turns = [(name, rule) for _ in range(TURNS) for name, rule in self.rules.items()]
        for name, rule in tqdm(turns, desc="decoding", unit="run"):
            started = time.perf_counter()
            made[name] = generate(
                self.model, prompts.tolist(), options.tokens, sampling=Sampling(temperature=0),
                loops=self.loops, halting=rule,
            )  # fmt: skip
            seconds[name].append(time.perf_counter() - started)
        base = next(iter(seconds.values()))
        print(f"{options.batch} rows, {PROMPT} tokens each, {options.tokens} more, float32, one thread")
        for name, times in seconds.items():
            rate = options.batch * options.tokens / statistics.median(times)
            depth = statistics.mean(loops for row in made[name].rows for loops in row.loops)
            ratio = statistics.median(full / own for full, own in zip(base, times, strict=True))
            size = made[name].cache_bytes / 2**20
            print(f"{name:24} {rate:8.0f} tokens/s  {depth:5.2f} loops  {ratio:5.2f} x  cache {size:.1f} MiB")


BENCHMARKS = {"data": DataBenchmark, "checkpoint": CheckpointBenchmark, "decode": DecodeBenchmark}


def _products(going: Callable[[float], bool]) -> tuple[float, float]:
    """Products of 128 x 128 matrices: how many a second, and the longest time between two, seconds."""
    matrix = torch.randn(128, 128)
    started = last = time.perf_counter()
    count, longest = 0, 0.0
    while going(started):
        matrix @ matrix
        count += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return count / (last - started), longest


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def _median(speeds: list[tuple[float, float]], unit: int) -> str:
    return f"{statistics.median(speed[unit] for speed in speeds):,.0f}"


def _cpu_seconds() -> float:
    """CPU time of this process and the workers it has."""
    workers = (process.cpu_times() for process in psutil.Process().children())
    return time.process_time() + sum(spent.user + spent.system for spent in workers)


def _loader_speed(loader: Loader, seconds: float) -> tuple[float, float]:
    """Tokens per second by the clock and by CPU time."""
    warm = time.perf_counter() + seconds / 3
    while time.perf_counter() < warm:  # what was prefetched while the tokenizer ran
        loader.next_batch()
    started, spent = time.perf_counter(), _cpu_seconds()
    tokens = 0
    while (elapsed := time.perf_counter() - started) < seconds:
        tokens += loader.next_batch().ids[:, 1:].numel()
    return tokens / elapsed, tokens / (_cpu_seconds() - spent)


def _tokenizer_speed(tokenizer: Tokenizer, texts: list[str], cores: list[int], seconds: float) -> tuple[float, float]:
    """Tokens per second by the clock and by CPU time, of turning text in memory into lists of ids."""
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


if __name__ == "__main__":
    sys.exit(main())
