"""Decoding by compiled graphs against decoding without, and how many graphs it takes."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos.generation.sampling import Sampling
from mythos.generation.tokens import Continuation, generate
from mythos.gpu_check.timed_steps import tensor_peak
from mythos.model import rdt
from mythos.model.cache import DecodeCache
from mythos.model.halting import Convergence
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer

Build = Callable[..., RecurrentDepthTransformer]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Graphs:
    """A backend that runs a graph as it was traced, and counts graphs and calls."""

    def __init__(self) -> None:
        self.traced = self.ran = 0
        self.operations: Counter[Any] = Counter()
        """In all graphs, as they were traced."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.traced += 1
        self.operations.update(node.target for node in graph.graph.nodes)

        def run(*arguments: Any) -> Any:
            self.ran += 1
            return graph.forward(*arguments)

        return run


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Counts what decoding compiles; nothing is left from other tests, and a break in a graph is an error."""
    torch.compiler.reset()
    backend = Graphs()
    compiled = torch.compile(RecurrentDepthTransformer.run_packed, dynamic=True, backend=backend, fullgraph=True)
    monkeypatch.setattr(rdt, "_compiled_run_packed", lambda device: compiled)
    yield backend
    torch.compiler.reset()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 128, shape, generator=torch.Generator().manual_seed(seed))


class Pair:
    """One text extended in two caches, with compiled graphs and without."""

    def __init__(self, model: RecurrentDepthTransformer, rows: int, block: int = 8) -> None:
        self.model = model
        self.caches = [DecodeCache(model.config, rows, loops=3, block=block) for _ in range(2)]

    def extend(self, ids: Tensor, **arguments: Any) -> None:
        actual, expected = (
            self.model.extend(ids, cache, compiled=compiled, **arguments)
            for cache, compiled in zip(self.caches, (True, False), strict=True)
        )
        torch.testing.assert_close(actual.logits, expected.logits, **CLOSE)
        assert torch.equal(actual.loops, expected.loops)

    def select(self, rows: list[int]) -> None:
        for cache in self.caches:
            cache.select(rows)


VARIANTS: list[dict[str, Any]] = [
    {
        **{"qk_rope_head_dim": 4, "loop_embedding": True, "router_loop": "embedding", "router_bias_per_loop": True},
        **{"loop_norm": "adaptive", "residual_scale": 0.5, "lanes": 2, "expert_groups": 2},
    },
    {"loop_over": "layer", "core_layers": 2, "injection": "orthogonal"},
    {
        **{"attention": "gqa", "core_ffn": "dense", "injection": "linear", "lora_rank": 0},
        **{"value_embeddings": True, "dense_ffn": "relu2", "qk_bias": True, "block_norm": "sandwich"},
    },
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_graphs_do_not_depend_on_lengths_or_rows(model: Build, graphs: Graphs, changes: dict[str, Any]) -> None:
    """One for a row, two for several of equal or unequal lengths; over the blocks that a cache grows by."""
    pair = Pair(model(**{"core_layers": 1, "loops": 2, **changes}), 4)
    pair.extend(random_ids(4, 5))
    for token in random_ids(20, 4, 1, seed=1):
        pair.extend(token)
    assert (graphs.traced, graphs.ran) == (1, 20)
    pair.extend(random_ids(4, 3), mask=torch.tensor([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1]]).bool())
    for token in random_ids(10, 4, 1, seed=2):
        pair.extend(token)
    pair.select([0, 3])
    for token in random_ids(10, 2, 1, seed=3):
        pair.extend(token)
    assert (graphs.traced, graphs.ran) == (2, 40)
    pair.select([1])
    for token in random_ids(10, 1, 1, seed=4):
        pair.extend(token)
    assert (graphs.traced, graphs.ran) == (3, 50)


def test_a_graph_for_each_depth_and_none_for_another_cache(model: Build, graphs: Graphs) -> None:
    """Shallower calls than the cache is deep leave their entries to deeper ones, in graphs too."""
    built = model(core_layers=1, loops=3)
    for length in (1, 3, 30):
        pair = Pair(built, 2)
        pair.extend(random_ids(2, length), loops=3)
        for loops in (3, 1, 3, 1, 3):
            pair.extend(random_ids(2, 1, seed=loops), loops=loops)
    assert (graphs.traced, graphs.ran) == (2, 15)


def test_calls_that_no_graph_is_for(model: Build, graphs: Graphs) -> None:
    """Rows that halt, that run different loops, that get several tokens, or none."""
    pair = Pair(model(core_layers=1, loops=2), 3)
    pair.extend(random_ids(3, 4))
    pair.extend(random_ids(3, 1), halting=Convergence(0.1))
    pair.extend(random_ids(3, 1), loops=[2, 1, 2])
    pair.extend(random_ids(3, 1), mask=torch.tensor([[True], [False], [True]]))
    assert graphs.traced == 0


def test_rows_that_end_leave_the_batch_of_a_graph(model: Build, graphs: Graphs) -> None:
    built, prompts, lengths = model(core_layers=1, loops=2), [[5, 9, 2, 77], [1], [8, 8]], [12, 4, 7]

    def run(compiled: bool) -> list[Continuation]:
        left = list(lengths)

        def ends(row: int, token: int, loops: int) -> bool:
            left[row] -= 1
            return not left[row]

        return generate(built, prompts, 20, sampling=Sampling(temperature=0), on_token=ends, compiled=compiled).rows

    rows = run(True)
    assert rows == run(False) and [len(row.tokens) for row in rows] == lengths
    assert (graphs.traced, graphs.ran) == (2, 11)


@pytest.mark.parametrize("large", [False, True])
def test_experts_of_one_token(model: Build, graphs: Graphs, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """Multiplied in the graph, or, where the compiler would be slow, by an operator that it does not look into."""
    built = model(core_layers=1, loops=2)
    config = built.config
    size = 4 * config.experts_per_token * 3 * config.dim * config.expert_dim
    monkeypatch.setattr(device_choice, "TOKEN_BYTES", size - large)
    pair = Pair(built, 1)
    pair.extend(random_ids(1, 3))
    for token in random_ids(4, 1, 1, seed=1):
        pair.extend(token)
    operator = torch.ops.mythos.run_experts.default
    assert (graphs.traced, graphs.operations[operator]) == (1, 2 if large else 0)


@pytest.mark.parametrize(("rows", "loops"), [(1, 1), (2, 2)])
def test_compiled_code_equals_none_and_changes_the_cache_in_place(model: Build, rows: int, loops: int) -> None:
    """As it is compiled outside of tests: the cache is neither copied whole nor are the places of a layer."""
    torch.compiler.reset()
    pair = Pair(model(core_layers=1, loops=2), rows, block=4096)
    pair.extend(random_ids(rows, 3))
    for token in random_ids(12, rows, 1, seed=1):
        pair.extend(token, loops=loops)
    cache = pair.caches[0]
    peak = tensor_peak(lambda: pair.model.extend(random_ids(rows, 1), cache, loops=loops, compiled=True))
    assert peak < cache.entries[0].nbytes / 2
    torch.compiler.reset()
