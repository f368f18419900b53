"""Optimizer steps of the trainer on random tokens, to be timed; and clocks and counters for memory."""

import contextlib
import gc
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from mythos.config.sections import Config, LogConfig, WandbConfig
from mythos.data.stream import Batch
from mythos.planning.flops import forward_flops
from mythos.trainer import Trainer

DOCUMENTS = 4
"""Documents of a sequence if documents are masked."""

Work = Callable[[], object]


class Seconds(NamedTuple):
    """Duration of one run."""

    cpu: float
    """CPU time of all threads of this process."""
    wall: float


def timed(work: Work, device: torch.device | None = None) -> Seconds:
    """Run `work` once and, if the device is a GPU, wait until it has finished."""
    cuda = device is not None and device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def tensor_peak(work: Work) -> int:
    """Peak growth of CPU tensor memory while `work` runs, in bytes, as torch's allocator counts it.

    What another thread frees is left out, because the profiler sees this thread only. Such are, on a busy machine, some
    buffers of collectives: the last reference is then that of Gloo's thread.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    profiler: Any = trace.profiler
    plain = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    alive = {x.untyped_storage().data_ptr() for x in plain}
    changes = []
    pending: dict[int, tuple[int, int]] = {}
    for event in sorted(
        _memory_events(profiler.kineto_results.experimental_event_tree()), key=lambda event: event.start_time_ns
    ):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            pending[address] = event.start_time_ns, size  # instead of one whose end was not seen
        elif address in pending:
            changes += [pending.pop(address), (event.start_time_ns, size)]
        else:
            changes.append((event.start_time_ns, size))
    changes += [allocated for address, allocated in pending.items() if address in alive]
    allocated = peak = 0
    for _, change in sorted(changes):
        allocated += change
        peak = max(peak, allocated)
    return peak


def _memory_events(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from _memory_events(event.children)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; a shared storage counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Steps:
    """Whole optimizer steps at a run's target depth, all on the same tokens; each call runs one.

    The trainer is built as for a run, on synthetic data, in a temporary folder that :meth:`close` removes.
    """

    def __init__(self, config: Config) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="mythos-steps-")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.trainer = Trainer(_isolated(config, self.folder.name))
        except BaseException:
            self.folder.cleanup()
            raise
        self.trainer.count_targets = lambda config, step: config.tokens_per_step
        self.trainer.step = max(config.train_steps, config.schedule_steps) - 1  # curricula have ended
        self.config, self.device = self.trainer.config, self.trainer.device
        plan = self.trainer.schedule.plan(self.trainer.step)
        self.loops, self.backprop = plan.loops, plan.backprop
        self.batch = random_batch(config)

    def __call__(self) -> None:
        """Run one step."""
        self.trainer.train_step(self.batch)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the trainer's resources and remove its folder."""
        self.trainer.resources.close()
        self.folder.cleanup()

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.tokens_per_step

    @property
    def flops_needed(self) -> float:
        """FLOPs of a step's matmuls, without recomputation."""
        flops = forward_flops(self.config.model, self.config.data.sequence_length)
        return flops.training(self.loops, self.backprop) * self.tokens

    def held_bytes(self) -> int:
        """Bytes of the tensors that exist between steps: weights, buffers, optimizer state."""
        model = self.trainer.model
        moments = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        tensors = [*model.parameters(), *model.buffers(), *(value for value in moments if torch.is_tensor(value))]
        return tensor_bytes(tensors)

    def peak_tensor_bytes(self) -> int:
        """Most bytes of CPU tensors at any moment of a step."""
        return self.held_bytes() + tensor_peak(self)


def random_batch(config: Config) -> Batch:
    """Random ids for a step of one process, with equally long documents if the configuration masks documents."""
    rows, length = config.train.global_batch, config.data.sequence_length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(config.model.vocab_size), (rows, length + 1), generator=generator)
    documents = None
    if config.data.mask_documents:
        documents = (torch.arange(length, dtype=torch.int32) * DOCUMENTS // length).expand(rows, length).contiguous()
    return Batch(ids, documents, torch.arange(rows))


def _isolated(config: Config, folder: str) -> Config:
    """The configuration with synthetic data, and without trackers, profiles and folders of its own."""
    changes: dict[str, Any] = {
        "run": config.run.model_copy(update={"dir": f"{folder}/run", "resume": "never"}),
        "data": config.data.model_copy(update={"kind": "reasoning", "workers": 0}),
        "eval": config.eval.model_copy(update={"batches": 1}),
        "checkpoint": config.checkpoint.model_copy(update={"dir": None}),
        "train": config.train.model_copy(update={"profile": type(config.train.profile)()}),
        "log": LogConfig(wandb=WandbConfig(mode="disabled")),
    }
    return config.model_copy(update=changes)
