"""Search for the fastest layout, for the least memory that training needs, and for the longest context that fits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from mythos.config.sections import Config
from mythos.distributed.layout import Layout, named_layout
from mythos.errors import MythosError
from mythos.planning.budget import Gpu
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.fake_step import CHECKPOINTING
from mythos.planning.layout import USABLE_SHARE, expert_counts, shared_counts
from mythos.planning.memory import Activations
from mythos.planning.rank_state import RankState, activations, micro_batches, rank_state, working_memory
from mythos.planning.speed import TimeModel
from mythos.planning.traffic import StepTraffic, step_traffic

SEARCHED = ("mode", "shard", "replicate", "expert", "shared", "wrap", "reduce", "activation_checkpointing")
"""Fields of `parallel` that are chosen, beside train.micro_batch."""
MOST_GPUS = 4096
"""Largest number of GPUs that `fewest_gpus` tries, or 4 times as many as the run has."""
SHARED_LEVELS = 3
"""Most values of `shared_counts`."""
CONTEXT_STEP = 1024
"""Longest contexts are multiples of this many tokens."""


class Candidate(NamedTuple):
    """A layout, and settings of a step under it."""

    config: Config
    state: RankState

    @property
    def layout(self) -> Layout:
        """The layout."""
        return self.state.layout

    @property
    def held(self) -> int:
        """Bytes of a rank without activations."""
        return self.state.total + working_memory(self.config, self.state).total

    @property
    def overrides(self) -> list[str]:
        """What to write on the command line."""
        values = {f"parallel.{name}": getattr(self.config.parallel, name) for name in SEARCHED}
        values["train.micro_batch"] = self.config.train.micro_batch
        unset = {"parallel.shard": None, "parallel.replicate": None, "parallel.shared": 1}
        return [f"{name}={value}" for name, value in values.items() if name not in unset or value != unset[name]]


@dataclass(frozen=True)
class Found:
    """The fastest candidate that fits."""

    candidate: Candidate
    needed: int
    """Bytes of a rank."""
    tried: int
    """Candidates that were compared."""


@dataclass(frozen=True)
class Least:
    """The candidate that needs least memory."""

    candidate: Candidate
    held: int
    """Bytes of a rank without activations."""
    activations: int

    @property
    def needed(self) -> int:
        """Bytes of a rank."""
        return self.held + self.activations


class LongestContext(NamedTuple):
    """The longest sequence that a layout can train on."""

    tokens: int
    overrides: list[str]
    """The layout's fields, as on a command line."""


class Kind(NamedTuple):
    """Layouts whose activations differ only by the experts and rows of a rank."""

    checkpointing: str
    sharded: bool
    wrap: str
    shared: int


class Traced(NamedTuple):
    """What the activations of a step depend on, in a search."""

    kind: Kind
    expert: int
    rows: int


class Search:
    """Candidates for a run on `gpus` GPUs, `machine_gpus` of them on a machine.

    Candidates have every mode, parallel.expert (powers of 2 that divide the experts), parallel.shard (that, times a
    power of 2), time of reduction, micro-batch (powers of 2) and activation checkpointing. If none fits,
    parallel.shared above 1 is tried where shared experts are large, and then parallel.wrap=block. Fields of SEARCHED
    and "micro_batch" that are in `fixed` keep the values that `config` has.
    """

    def __init__(self, config: Config, gpus: int, machine_gpus: int, fixed: frozenset[str] = frozenset()) -> None:
        self.config, self.gpus, self.machine_gpus, self.fixed = config, gpus, machine_gpus, fixed
        self.models: dict[Gpu, TimeModel] = {}
        self.states: dict[tuple[Layout, str], RankState | None] = {}
        self.traced: dict[Traced, Activations] = {}

    def values(self, name: str, allowed: tuple[Any, ...]) -> tuple[Any, ...]:
        """Values of a field of `parallel` to try."""
        return (getattr(self.config.parallel, name),) if name in self.fixed else allowed

    def state(self, config: Config, layout: Layout) -> RankState | None:
        """The training state; None if the experts' matrices cannot be divided so."""
        key = layout._replace(why=""), config.parallel.wrap
        if key not in self.states:
            try:
                self.states[key] = rank_state(config, layout)
            except MythosError:
                self.states[key] = None
        return self.states[key]

    @property
    def ways(self) -> list[tuple[str, int]]:
        """parallel.wrap, and the place of parallel.shared among the values to try, in the order in which they are.

        wrap=block is last, because it gathers weights in every loop.
        """
        levels = 1 if "shared" in self.fixed else SHARED_LEVELS
        return [*product(self.values("wrap", ("loop", "block")), range(levels))]

    def settings(self, gpus: int, wrap: str, level: int) -> Iterator[tuple[Config, RankState]]:
        """Configurations whose `parallel` has modes, sizes and `wrap`; and their training states.

        `level` is the place of parallel.shared among the values to try; layouts that have fewer are left out.
        """
        whole = self.config.with_fields("parallel", expert=1)
        counts = self.values("expert", tuple(sorted({1, *expert_counts(whole)})))
        if gpus == 1:
            layouts: list[dict[str, Any]] = [{"mode": "single", "expert": 1}]
        else:
            layouts = [{"mode": "ddp", "expert": 1}] if 1 in counts else []
            shards = [n for n in range(2, gpus) if gpus % n == 0]
            for expert in (n for n in counts if gpus % n == 0):
                sizes = [n for n in shards if n % expert == 0 and _is_power_of_2(n // expert)]
                layouts += [{"mode": "hsdp", "shard": shard, "expert": expert} for shard in sizes]
                layouts.append({"mode": "fsdp", "expert": expert})
        chosen = self.config.parallel
        for layout in layouts:
            if any(name in self.fixed and layout.get(name) != getattr(chosen, name) for name in ("mode", "shard")):
                continue
            if "replicate" in self.fixed and chosen.replicate != gpus // layout.get("shard", gpus):
                continue
            config = self.config.with_fields("parallel", **{"shard": None, "replicate": None, "wrap": wrap, **layout})
            if "shared" not in self.fixed:
                counts_of_shared = shared_counts(config.with_fields("parallel", shared=1), self.machine_gpus)
                if level >= len(counts_of_shared):
                    continue
                config = config.with_fields("parallel", shared=counts_of_shared[level])
            elif config.parallel.expert % config.parallel.shared:
                continue
            state = self.state(config, named_layout(config.parallel, gpus, min(gpus, self.machine_gpus)))
            if state is not None:
                yield config, state

    def candidates(self, wrap: str, level: int = 0) -> Iterator[Candidate]:
        """All candidates with that value of parallel.wrap; `level` as in `settings`."""
        rows = max(1, self.config.train.global_batch // self.gpus)
        sizes: tuple[Any, ...] = tuple(2**power for power in range(rows.bit_length()))
        if "micro_batch" in self.fixed:
            sizes = (self.config.train.micro_batch,)
        yield from self.combined(self.gpus, wrap, level, sizes, self.values("activation_checkpointing", CHECKPOINTING))

    def combined(
        self, gpus: int, wrap: str, level: int, sizes: Sequence[Any], modes: Sequence[str]
    ) -> Iterator[Candidate]:
        """All layouts of `settings` with these values of train.micro_batch and of activation checkpointing."""
        for config, state in self.settings(gpus, wrap, level):
            for size, mode in product(sizes, modes):
                sized = config.with_fields("train", micro_batch=size)
                several = state.layout.sharded and micro_batches(sized, gpus) > 1
                for reduce in self.values("reduce", ("micro_batch", "step") if several else ("micro_batch",)):
                    yield Candidate(sized.with_fields("parallel", activation_checkpointing=mode, reduce=reduce), state)

    def trace(self, candidate: Candidate) -> int:
        """Bytes of activations of a candidate at their peak."""
        key = self._key(candidate)
        if key not in self.traced:
            self.traced[key] = activations(candidate.config, candidate.layout)
        return self.traced[key].peak

    def _key(self, candidate: Candidate) -> Traced:
        rows = candidate.config.train.micro_batch
        size = max(1, self.config.train.global_batch // candidate.layout.size) if rows == "auto" else rows
        layout, parallel = candidate.layout, candidate.config.parallel
        kind = Kind(parallel.activation_checkpointing, layout.sharded, parallel.wrap, layout.shared)
        return Traced(kind, layout.expert, size)

    def at_least(self, candidate: Candidate) -> int:
        """A lower bound of `trace`, from traces of fewer rows and of as many or more expert ranks.

        With fewer expert ranks a rank holds more experts, and fewer tokens come to it, at worst in proportion.
        """
        key = self._key(candidate)
        bounds = [
            (traced.peak + traced.kept * (key.rows - other.rows) // other.rows)
            * self.tokens_of_experts(key.expert)
            // self.tokens_of_experts(other.expert)
            for other, traced in self.traced.items()
            if other.kind == key.kind and other.expert >= key.expert and other.rows <= key.rows
        ]
        return max(bounds, default=0)

    def tokens_of_experts(self, expert: int) -> int:
        """Tokens that come to the experts of a rank, for a million tokens of each rank."""
        return rows_to_experts(self.config.model, expert, 10**6)

    def fastest(self, gpu: Gpu) -> Found | None:
        """The fastest candidate whose memory is within USABLE_SHARE of the GPU's; None if none is.

        Speed is that of :class:`TimeModel` without Muon's collectives, which hardly differ between layouts. The memory
        traffic of micro-batches is interpolated between those of one and of two rows.
        """
        usable = int(USABLE_SHARE * gpu.memory)
        model, tried = self.model(gpu), 0
        for wrap, level in self.ways:
            every = list(self.candidates(wrap, level))
            tried += len(every)
            fitting = [candidate for candidate in every if candidate.held < usable]
            # Equal times are ordered by memory: the first of them leaves most free.
            fitting.sort(key=lambda each: (model.time(each.config, each.state).total, each.held))
            for candidate in fitting:
                if self._fits(candidate, usable, fitting):
                    return Found(candidate, candidate.held + self.trace(candidate), tried)
        return None

    def model(self, gpu: Gpu) -> TimeModel:
        """The time of candidates."""
        if gpu not in self.models:
            self.models[gpu] = TimeModel(self.config, gpu, self.machine_gpus, self._traffic())
        return self.models[gpu]

    def _traffic(self) -> Callable[[str, int], StepTraffic]:
        """Traffic by checkpointing mode and rows: what weights cause is shared by the rows of a micro-batch."""
        model, length = self.config.model, self.config.data.sequence_length

        @cache
        def of_one(mode: str) -> StepTraffic:
            return step_traffic(model, length, 1, mode)

        @cache
        def traffic(mode: str, rows: int) -> StepTraffic:
            if rows == 1:
                return of_one(mode)
            saved = 2 * (1 - 1 / rows)  # of the difference between one row and two
            return of_one(mode).minus(saved, of_one("none"), step_traffic(model, length, 2, "none"))

        return traffic

    def _fits(self, candidate: Candidate, memory: int, others: list[Candidate]) -> bool:
        """Whether a candidate needs at most `memory` bytes.

        A trace takes seconds. So before its own come two of the `others`, which may rule out many: of its kind the one
        with most expert ranks and fewest rows, and of those with as many rows the one with most expert ranks.
        """
        if candidate.held + self.at_least(candidate) > memory:
            return False
        key = self._key(candidate)
        alike = [each for each in others if self._key(each).kind == key.kind]
        smallest = min(alike, key=lambda each: (-each.layout.expert, self._key(each).rows))
        as_many_rows = (each for each in alike if self._key(each).rows == key.rows)
        for each in (smallest, max(as_many_rows, key=lambda each: each.layout.expert), candidate):
            self.trace(each)
            if candidate.held + self.at_least(candidate) > memory:
                return False
        return True

    def least(self, gpus: int | None = None, level: int | None = None) -> Least | None:
        """The candidate that needs least memory, with micro-batches of one row and everything recomputed, or as fixed.

        `gpus` instead of the search's number may exceed the global batch; `level` as in `settings`, by default all.
        None if no layout is possible.
        """
        gpus = self.gpus if gpus is None else gpus
        best: Least | None = None
        smallest: list[Candidate] = []
        modes = self.values("activation_checkpointing", ("all",))
        rows = self.config.train.micro_batch if "micro_batch" in self.fixed else 1
        for wrap, each in self.ways:
            if level is None or each == level:
                smallest += self.combined(gpus, wrap, each, (rows,), modes)
        for candidate in sorted(smallest, key=lambda each: each.held):
            if best is None or self._fits(candidate, best.needed - 1, smallest):
                best = Least(candidate, candidate.held, self.trace(candidate))
        return best

    @property
    def most_gpus(self) -> int:
        """Largest number that `fewest_gpus` tries."""
        return max(MOST_GPUS, 4 * self.gpus)

    def fewest_gpus(self, memory: int) -> Least | None:
        """The least memory on the first of 2, 4, 8... times as many GPUs where that fits; None if it never does."""
        gpus = 2 * self.gpus
        while gpus <= self.most_gpus:
            least = self.least(gpus)
            if least is None:
                return None
            if least.needed <= USABLE_SHARE * memory:
                return least
            gpus *= 2
        return None

    def longest_contexts(self, memories: Sequence[int]) -> list[LongestContext]:
        """The longest sequence for each size of memory, with the layout that allows it; [] if no layout is possible.

        For each value of `parallel.shared` the layout is tried that needs least memory: the more ranks divide the
        shared experts, the less memory the weights take, and the more each token.
        """
        levels = sorted({level for _, level in self.ways})
        leasts = [least for level in levels if (least := self.least(level=level)) is not None]
        if not leasts:
            return []

        def longest(memory: int) -> LongestContext:
            found = [LongestContext(self.longest_context(least, memory), least.candidate.overrides) for least in leasts]
            return max(found, key=lambda each: each.tokens)

        return [longest(memory) for memory in memories]

    def longest_context(self, least: Least, memory: int) -> int:
        """Tokens of the longest sequence that fits with the settings of `least`; 0 if not even CONTEXT_STEP do.

        Activations are traced at two lengths and extrapolated: they are linear in the length, because attention keeps
        no scores. At most the model's `context_length`.
        """
        usable, context = int(USABLE_SHARE * memory), self.config.model.context_length
        if self.config.data.sequence_length >= context and least.needed <= usable:
            return context
        if least.held >= usable:
            return 0
        lengths = (2 * CONTEXT_STEP, 4 * CONTEXT_STEP)
        short, long = (
            activations(at_length(least.candidate.config, length), least.candidate.layout).peak for length in lengths
        )
        free = usable - least.held
        per_token = (long - short) / (lengths[1] - lengths[0])
        tokens = int((free - short) / per_token) + lengths[0]
        return context if tokens >= context else max(0, tokens // CONTEXT_STEP * CONTEXT_STEP)


def at_length(config: Config, length: int) -> Config:
    """The configuration with sequences of `length` tokens."""
    return config.with_fields("data", sequence_length=length)


def _is_power_of_2(number: int) -> bool:
    return number & (number - 1) == 0
