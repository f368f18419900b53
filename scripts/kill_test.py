"""Kill runs at random moments and compare what they consumed with a run that was never stopped.

python scripts/kill_test.py --kills 50 --seed 0

A run is one or two processes that read their streams as the trainer does, with a pause instead of the model, and commit
checkpoints of the data's position. One process, all of them, or a data worker is killed with SIGKILL while they start,
read or commit; the run then continues from the newest checkpoint with another number of processes and workers. After
every kill, each consumed row must equal the uninterrupted run's. The exit status is 1 if one does not.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from mythos.config.loading import config_from_dict, load_config, save_config
from mythos.config.sections import Config
from mythos.data.corpus import pin_revisions
from mythos.data.loader import Loader
from mythos.data.pipeline import open_data
from mythos.data.stream import count_skipped, merge_states
from mythos.errors import MythosError
from mythos.files.local import replacing

WORLD_SIZES = (1, 2)
WORKERS = (0, 1, 3)
MOST_PREFETCH = 4

STEP_SECONDS = 0.02
STEPS_PER_CHECKPOINT = 10
# The weights of a real checkpoint take seconds to write; writing slowly, in pieces, gives kills as long a target.
COMMIT_PIECES = 10
COMMIT_SECONDS = 0.2
AFTERWARDS_SECONDS = 0.05
"""Duration of work after a commit, such as deleting old checkpoints."""

READING_SECONDS = 1.5
"""Longest time from the first batch to a kill while reading."""
PATIENCE = 120.0
"""Seconds after which a process counts as hanging."""
FINAL_STEPS = 12
"""Steps of the last generation, which is not killed."""

PHASES = ("start-up", "reading", "committing")
TARGETS = ("one rank", "all ranks", "a data worker")
ONLY_RANK = "the only rank"
LIBRARIES = ("torch", "transformers", "tokenizers", "pyarrow")


class Failed(Exception):
    """The run differs from the uninterrupted one, or a process hangs."""


class Shape(NamedTuple):
    """The settings that change from one generation of a run to the next."""

    world_size: int
    workers: int
    prefetch: int


def slots(config: Config) -> int:
    """Sequences of every stream in a step."""
    return config.train.global_batch // config.data.streams


def newest(folder: Path) -> dict[str, Any]:
    """The newest checkpoint: ``step``, the ``lengths`` in bytes of the records, and the ``data`` state."""
    path = folder / "checkpoint.json"
    initial = {"step": 0, "lengths": [0] * max(WORLD_SIZES), "data": None}
    return json.loads(path.read_text()) if path.exists() else initial


def record_path(folder: Path, rank: int) -> Path:
    """The record of the rows that a rank has consumed: int32 (step, global row, ids)."""
    return folder / f"consumed-{rank}.bin"


def consume(folder: Path, generation: Path, rank: int, shape: Shape, last: int | None) -> None:
    """Continue from the newest checkpoint to step ``last``, or until killed."""
    config = load_config(folder / "config.yaml")
    if shape.world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{generation / 'store'}", rank=rank, world_size=shape.world_size
        )
    data = open_data(config, folder, {}, progress=False)
    loader = Loader(
        data.streams(config.run.seed, rank, shape.world_size),
        slots=slots(config),
        workers=shape.workers,
        prefetch=shape.prefetch,
    )
    checkpoint = newest(folder)
    step = checkpoint["step"]
    if checkpoint["data"]:
        loader.load_state_dict(checkpoint["data"])
    loader.start()
    with contextlib.ExitStack() as stack:
        stack.callback(loader.close)
        records: dict[int, IO[bytes]] = {}
        for file in range(rank, max(WORLD_SIZES), shape.world_size):
            records[file] = stack.enter_context(record_path(folder, file).open("ab", buffering=0))
            records[file].truncate(checkpoint["lengths"][file])  # drop rows consumed after the checkpoint
        while last is None or step < last:
            batch = loader.next_batch()
            rows = np.column_stack([np.full(len(batch.rows), step), batch.rows.numpy(), batch.ids.numpy()])
            records[rank].write(rows.astype(np.int32).tobytes())
            report("reading")
            time.sleep(STEP_SECONDS)
            step += 1
            if step % STEPS_PER_CHECKPOINT == 0 or step == last:
                report(f"committing {step}")
                commit(folder, step, loader.state_dict(), records)
                report("reading")


def end_with_harness() -> None:
    """End this process when the harness ends, even if that is killed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def report(event: str) -> None:
    """Write an event for the harness; it stays when this process is killed."""
    print(time.monotonic(), event, flush=True)


def commit(folder: Path, step: int, state: dict[str, Any], records: dict[int, IO[bytes]]) -> None:
    """Gather the state of all ranks and replace the checkpoint with it, atomically."""
    for record in records.values():
        os.fsync(record.fileno())
    mine = (state, {file: os.fstat(record.fileno()).st_size for file, record in records.items()})
    gathered: list[Any] | None = [mine]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, gathered)
    if gathered is not None:
        lengths = {file: length for _, sizes in gathered for file, length in sizes.items()}
        checkpoint = {
            "step": step,
            "lengths": [lengths[file] for file in sorted(lengths)],
            "data": merge_states([state for state, _ in gathered]),
        }
        replace_slowly(folder / "checkpoint.json", json.dumps(checkpoint).encode())
        time.sleep(AFTERWARDS_SECONDS)
    if dist.is_initialized():
        dist.barrier()


def replace_slowly(path: Path, content: bytes) -> None:
    """Replace a file atomically, writing it in pieces with pauses."""
    piece = len(content) // COMMIT_PIECES + 1
    with replacing(path, durable=True) as temporary, temporary.open("wb", buffering=0) as file:
        for start in range(0, len(content), piece):
            file.write(content[start : start + piece])
            time.sleep(COMMIT_SECONDS / COMMIT_PIECES)


class Reference:
    """The uninterrupted run: one process, no workers, no restart; read as far as needed."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.rows = config.train.global_batch
        self._streams = open_data(config, folder, {}, progress=False).streams(config.run.seed)
        self._slots = slots(config)
        self._ids = [np.empty((0, config.data.sequence_length + 1), dtype=np.int32)]
        self._states: list[dict[str, Any]] = [self._streams.state_dict()]

    def ids(self, steps: int) -> np.ndarray:
        """Ids of the first steps or more, int32 (steps * rows, L + 1)."""
        while len(self._states) <= steps:
            batch = self._streams.next_batch(self._slots)
            assert batch.rows.tolist() == list(range(self.rows))
            self._ids.append(batch.ids.numpy().astype(np.int32))
            self._states.append(json.loads(json.dumps(self._streams.state_dict())))
        self._ids = [np.concatenate(self._ids)]
        return self._ids[0]

    def state(self, step: int) -> dict[str, Any]:
        """The data state after a step."""
        self.ids(step)
        return self._states[step]


def check(folder: Path, reference: Reference) -> list[int]:
    """Compare all rows that the run has consumed with the reference.

    Returns:
        for every record, the number of rows consumed after the newest checkpoint.

    Raises:
        Failed: a row differs, is missing, or was consumed twice (the message names the first), or the data state
            differs.
    """
    checkpoint = newest(folder)
    width = reference.ids(0).shape[1] + 2
    kept, beyond = [], []
    for rank, length in enumerate(checkpoint["lengths"]):
        path = record_path(folder, rank)
        content = np.frombuffer(path.read_bytes() if path.exists() else b"", dtype=np.uint8)
        if len(content) < length:
            raise Failed(f"{path} has {len(content)} bytes, fewer than the checkpoint's {length}")
        rows = content[: len(content) // (4 * width) * 4 * width].view(np.int32).reshape(-1, width)
        kept.append(rows[: length // (4 * width)])
        beyond.append(rows[length // (4 * width) :])
    lineage = np.concatenate(kept)
    end = checkpoint["step"]
    counts = np.bincount(lineage[:, 0] * reference.rows + lineage[:, 1], minlength=end * reference.rows)
    wrong = np.flatnonzero(counts != (np.arange(len(counts)) < end * reference.rows))
    if len(wrong):
        step, row = divmod(int(wrong[0]), reference.rows)
        raise Failed(f"step {step}, row {row}: consumed {counts[wrong[0]]} times on the way to step {end}")
    for rows in (lineage, *beyond):
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        ids = reference.ids(int(rows[-1, 0]) + 1 if len(rows) else 0)
        wrong = np.flatnonzero((ids[rows[:, 0] * reference.rows + rows[:, 1]] != rows[:, 2:]).any(1))
        if len(wrong):
            step, row, *got = rows[wrong[0]].tolist()
            want = ids[step * reference.rows + row].tolist()
            raise Failed(f"step {step}, row {row}: consumed {got[:8]}..., the uninterrupted run {want[:8]}...")
    if checkpoint["data"] and checkpoint["data"] != reference.state(end):
        raise Failed(f"step {end}: the data state differs from the uninterrupted run's")
    return [len(rows) for rows in beyond]


class Generation:
    """The processes of a run from one restart to the next kill."""

    def __init__(self, folder: Path, number: int, shape: Shape, last: int | None = None) -> None:
        self.folder = folder / f"generation-{number:03d}"
        self.folder.mkdir()
        self.shape = shape
        self.begun = time.monotonic()
        self.ranks: list[subprocess.Popen] = []
        for rank in range(shape.world_size):
            task = json.dumps([str(folder), str(self.folder), rank, shape, last])
            with self._log(rank, "events").open("wb") as events, self._log(rank, "errors").open("wb") as errors:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--consume", task],
                        stdin=subprocess.PIPE,
                        stdout=events,
                        stderr=errors,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                        start_new_session=True,  # to find its workers by their session, even as orphans
                    )
                )

    def _log(self, rank: int, what: str) -> Path:
        return self.folder / f"rank-{rank}.{what}"

    def events(self, rank: int) -> list[tuple[float, str]]:
        """The rank's events, with their times."""
        lines = self._log(rank, "events").read_text().splitlines()
        return [(float(time), event) for time, _, event in (line.partition(" ") for line in lines)]

    def errors(self) -> str:
        """The end of each rank's standard error."""
        return "\n".join(self._log(rank, "errors").read_text()[-3000:] for rank in range(self.shape.world_size))

    def first_batch(self) -> float | None:
        """Seconds from the start until the last rank had its first batch."""
        by_rank = [self.events(rank) for rank in range(self.shape.world_size)]
        return max(events[0][0] for events in by_rank) - self.begun if all(by_rank) else None

    def wait(self, until: Callable[[], Any]) -> None:
        """Wait for a condition; raises Failed if a rank ends, or after PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        while not until():
            if time.monotonic() > end or any(rank.poll() is not None for rank in self.ranks):
                raise Failed(f"{self.folder}: a rank hangs, or ended without having been killed\n{self.errors()}")
            time.sleep(0.02)

    def run(self, seconds: float) -> None:
        """Let it run for a time; raises Failed if a rank ends."""
        end = time.monotonic() + seconds
        self.wait(lambda: time.monotonic() > end)

    def processes(self) -> list[psutil.Process]:
        """All running processes of this generation, orphans included."""
        sessions = {rank.pid for rank in self.ranks}
        running = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        return running

    def data_workers(self, rank: int) -> list[psutil.Process]:
        """The data workers of a rank."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.ranks[rank].pid).children()
            return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return []

    def end(self) -> float:
        """End the other ranks, as torchrun does when one has failed; return the seconds until no process is left."""
        begin = time.monotonic()
        for rank in self.ranks:
            rank.terminate()
        while left := self.processes():
            if time.monotonic() - begin > 30:
                raise Failed(f"{self.folder}: left after 30 s: {[' '.join(process.cmdline()) for process in left]}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def destroy(self) -> None:
        """Kill all processes that are left."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for rank in self.ranks:
            rank.wait()


@dataclass
class Kill:
    """What one kill hit, and its cost."""

    run: str
    shape: Shape
    target: str
    phase: str
    renamed: bool
    """The new checkpoint was already in place (while committing)."""
    gone: float
    """Seconds until no process was left; after the kill of a data worker, from the end of its rank."""
    noticed: float | None
    """Seconds until the rank of a killed data worker ended by itself; None for other kills."""
    first_batch: float | None
    tokens_again: int


Plan = tuple[Shape, int, str, str]
"""The shape of a generation, and the aim of its kill: rank, phase and target. The phase that it hits may be another."""


def plans(draw: random.Random, kills: int, workers: Sequence[int]) -> Iterator[Plan]:
    """Draw every pair of phase and target equally often, and everything else at random."""
    deck: list[tuple[str, str]] = []
    for _ in range(kills):
        if not deck:
            deck = list(itertools.product(PHASES, TARGETS))
            draw.shuffle(deck)
        phase, target = deck.pop()
        shape = draw_shape(draw, [count for count in workers if count or target != TARGETS[2]])
        yield shape, draw.randrange(shape.world_size), phase, target


def draw_shape(draw: random.Random, workers: Sequence[int]) -> Shape:
    """The shape of the next generation."""
    return Shape(draw.choice(WORLD_SIZES), draw.choice(workers), draw.randint(1, MOST_PREFETCH))


def kill_once(run: str, folder: Path, number: int, plan: Plan, reference: Reference, draw: random.Random) -> Kill:
    """Start a generation, kill it at a random moment of a phase, and check the consumed rows."""
    shape, rank, aim, target = plan
    generation = Generation(folder, number, shape)
    try:
        if aim == "start-up":
            # About the duration of a start on two cores that all processes share.
            seconds = 2.0 + 0.6 * shape.world_size * (1 + shape.workers)
            if target == TARGETS[2]:
                generation.wait(lambda: generation.data_workers(rank))
                seconds /= 2
            generation.run(draw.random() * seconds)
        else:
            generation.wait(lambda: generation.first_batch() is not None)
            generation.run(draw.random() * READING_SECONDS)
        if aim == "reading":
            generation.wait(lambda: generation.events(rank)[-1][1] == "reading")
            generation.run(draw.random() * STEP_SECONDS)
        if aim == "committing":
            before = len(generation.events(rank))
            generation.wait(lambda: any("committing" in event for _, event in generation.events(rank)[before:]))
            generation.run(draw.random() * (COMMIT_SECONDS + AFTERWARDS_SECONDS))

        workers = generation.data_workers(rank) if target == TARGETS[2] else []
        victims = [draw.choice(workers).pid] if workers else [generation.ranks[rank].pid]
        if target == TARGETS[1]:
            victims = [process.pid for process in generation.ranks]
        elif not workers:
            target = TARGETS[0]
        if shape.world_size == 1 and not workers:
            target = ONLY_RANK
        moment = time.monotonic()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        noticed = None
        if workers:
            generation.ranks[rank].wait(PATIENCE)
            noticed = time.monotonic() - moment
        gone = generation.end()

        events = [event for when, event in generation.events(rank) if when <= moment]
        phase = events[-1].split()[0] if events else PHASES[0]
        renamed = phase == "committing" and newest(folder)["step"] == int(events[-1].split()[1])
        rows = check(folder, reference)
        # The record of a rank without a batch yet may still have rows that an earlier generation consumed.
        again = sum(rows[rank] for rank in range(shape.world_size) if generation.events(rank))
        again *= reference.ids(0).shape[1] - 1
        return Kill(run, shape, target, phase, renamed, gone, noticed, generation.first_batch(), again)
    finally:
        generation.destroy()


def kill_run(
    name: str, config: Config, folder: Path, kills: int, draw: random.Random, workers: Sequence[int] = WORKERS
) -> list[Kill]:
    """Kill a run repeatedly, let it end, and compare it with the uninterrupted one.

    Raises:
        Failed: they differ, or a process hangs or outlives its rank.
        MythosError: the configuration's data cannot be read.
    """
    folder.mkdir(parents=True)
    config = config.model_copy(update={"data": pin_revisions(config.data, {})})
    save_config(config, folder / "config.yaml")
    reference = Reference(config, folder)

    hits: list[Kill] = []
    for number, plan in enumerate(plans(draw, kills, workers)):
        kill = kill_once(name, folder, number, plan, reference, draw)
        hits.append(kill)
        shape = f"{kill.shape.world_size} ranks x {kill.shape.workers} workers"
        kept = f"step {newest(folder)['step']} is kept, {kill.tokens_again:,} tokens to read again"
        print(f"{name} {number + 1:3d}/{kills}: {shape}, {kill.target} killed in {kill.phase}; {kept}", flush=True)
    step = newest(folder)["step"] + FINAL_STEPS
    final = Generation(folder, kills, draw_shape(draw, workers), step)
    try:
        for rank in final.ranks:
            if rank.wait(PATIENCE):
                raise Failed(f"{final.folder}: the last generation failed\n{final.errors()}")
        final.end()
    finally:
        final.destroy()
    if any(check(folder, reference)) or newest(folder)["step"] != step:
        raise Failed(f"{folder}: the run ended at step {newest(folder)['step']}, not {step}")
    data = newest(folder)["data"]
    epochs = [position[0] for positions in data["positions"].values() for position in positions.values()]
    where = f"streams in epochs {min(epochs)} to {max(epochs)}, skipped {count_skipped(data) or 'nothing'}"
    print(f"{name}: {step * config.tokens_per_step:,} tokens of {step} steps equal; {where}", flush=True)
    return hits


def summary(kills: list[Kill], seconds: float) -> str:
    """The figures as a Markdown table."""

    def counts(values: list[Any]) -> str:
        return ", ".join(f"{key}: {count}" for key, count in sorted(Counter(values).items()))

    def spread(values: list[float]) -> str:
        return f"{np.median(values):,.1f}, at most {max(values):,.1f}" if values else "none"

    committing = [kill for kill in kills if kill.phase == "committing"]
    again = [kill.tokens_again for kill in kills]
    starts: dict[tuple[int, int], list[float]] = {}
    for kill in kills:
        if kill.first_batch is not None:
            starts.setdefault(kill.shape[:2], []).append(kill.first_batch)
    medians = [f"{ranks} x {workers}: {np.median(taken):.1f}" for (ranks, workers), taken in sorted(starts.items())]
    lines = {
        "kills": counts([kill.run for kill in kills]),
        "phase": counts([kill.phase for kill in kills]),
        "of these in a commit": f"before the new checkpoint was in place: {sum(not k.renamed for k in committing)}, "
        f"after: {sum(k.renamed for k in committing)}",
        "target": counts([kill.target for kill in kills]),
        "processes": counts([kill.shape.world_size for kill in kills]),
        "workers of each": counts([kill.shape.workers for kill in kills]),
        "tokens read again": f"{np.mean(again):,.0f} on average, at most {max(again):,}",
        "restart to first batch, median s": f"processes x workers of each: {', '.join(medians)}",
        "killed worker to end of its rank, s": f"median {spread([k.noticed for k in kills if k.noticed is not None])}",
        "until no process is left, s": f"median {spread([kill.gone for kill in kills])}",
        "differences": "0",
        "total, s": f"{seconds:,.0f}",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{x} {version(x)}" for x in LIBRARIES)]),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())])


def generated_config(folder: Path, mixture: bool) -> Config:
    """A run on a small corpus of parquet, jsonl and txt files, with some rows that cannot be used.

    It is small so that the streams go through many epochs, and uneven so that their epochs end at different times.
    """
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["river", "naïve", "café", "深い", "loop", "the", "of", "between", "🙂", "stone", "signal", "garden"]

    def document(number: int) -> str:
        return f"{number}: " + " ".join(draw.choices(words, k=draw.choice((1, 5, 30, 200))))

    texts: list[str | None] = [None if number % 11 == 0 else document(number) for number in range(200)]
    for file in range(3):
        pq.write_table(pa.table({"text": texts[file::3]}), folder / f"part-{file}.parquet", row_group_size=9)
    lines = [json.dumps({"text": document(1000 + number) if number % 9 else None}).encode() for number in range(60)]
    lines[20], lines[40] = b'{"text": "cut', b'{"text": "\xff\xfe"}'
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "plain.txt").write_text("\n\n".join(document(2000 + number) for number in range(50)), encoding="utf-8")
    data: dict[str, Any] = {"kind": "files", "path": [str(folder / "*")]}
    if mixture:
        tables = {"kind": "files", "path": str(folder / "*.parquet"), "weight": 2}
        lines_and_text = {"kind": "files", "path": [str(folder / "*.jsonl"), str(folder / "*.txt")], "weight": 1}
        data = {"kind": "mixture", "sources": {"tables": tables, "text": lines_and_text}}
    return config_from_dict(
        {
            "data": {**data, "on_error": "skip", "streams": 8, "sequence_length": 64, "cache_dir": str(folder.parent)},
            "tokenizer": {"vocab_size": 400},
            "train": {"steps": 1, "global_batch": 16},
        }
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="number of kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, targets and shapes (%(default)s)")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="read this run's data instead of a generated corpus")
    parser.add_argument("--consume", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.consume:
        threading.Thread(target=end_with_harness, daemon=True).start()
        folder, generation, rank, shape, last = options.consume
        consume(Path(folder), Path(generation), rank, Shape(*shape), last)
        return 0
    if options.kills < 1:
        parser.error(f"--kills: got {options.kills}; give at least 1")
    logging.getLogger("mythos").setLevel(logging.ERROR)  # the corpus has unusable rows on purpose
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    draw = random.Random(options.seed)
    kills: list[Kill] = []
    try:
        if options.config:
            kills = kill_run("run", load_config(options.config), folder / "run", options.kills, draw)
        else:
            half = options.kills // 2
            for name, share in (("files", options.kills - half), ("mixture", half)):
                config = generated_config(folder / f"{name}-corpus", mixture=name == "mixture")
                kills += kill_run(name, config, folder / name, share, draw)
    except (Failed, MythosError, subprocess.TimeoutExpired) as error:
        print(f"FAILED: {error}\nrecords and logs: {folder}", file=sys.stderr)
        return 1
    print(f"\n{summary(kills, time.monotonic() - begun)}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
