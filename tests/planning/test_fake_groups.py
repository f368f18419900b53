"""Collectives of a step on groups of 8 to 4,096 fake processes, executed and counted, against the plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.distributed.layout import named_layout
from mythos.distributed.parallel import parallelize
from mythos.distributed.ranks import Ranks, World
from mythos.model.ops.expert_exchange import ExpertExchange, Splits
from mythos.planning.collectives import EXPERT_EXCHANGE, Exchange, collectives, fake_processes
from mythos.planning.flops import build_on_meta
from mythos.planning.rank_state import rank_state
from tests.runs import tiny

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": EXPERT_EXCHANGE,
}
LAYOUTS: dict[int, dict[str, Any]] = {
    8: {"mode": "fsdp", "expert": 8},
    64: {"mode": "hsdp", "shard": 16, "expert": 8, "activation_checkpointing": "loop"},
    512: {"mode": "hsdp", "shard": 64, "expert": 16, "reduce": "step"},
    4096: {"mode": "hsdp", "shard": 64, "expert": 8, "wrap": "block", "activation_checkpointing": "loop"},
}
LOOPS, BACKPROP = 3, 2


class Counter(TorchDispatchMode):
    """Counts collectives; an exchange of tokens by what it sends, others by the larger of input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Exchange] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS[func._schema.name.partition("::")[2]]
            sizes = [value.nbytes for value in tree_leaves(args) if isinstance(value, Tensor)]
            self.seen.setdefault(kind, Exchange()).add(1, args[1].nbytes if kind == EXPERT_EXCHANGE else max(sizes))
        return func(*args, **(kwargs or {}))


def as_if_alike(self: ExpertExchange, sent: Tensor) -> Callable[[], Splits]:
    """Counts, as if every rank sent what this one sends: a fake collective brings nothing."""
    dist.all_to_all_single(torch.empty_like(sent), sent, group=self.group)
    sizes = sent.sum(1).tolist()
    return lambda: Splits(sizes, sizes, sent)


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_plan_counts_what_a_rank_of_many_exchanges(tmp_path: Path, ranks: int) -> None:
    changes = {f"parallel__{name}": value for name, value in LAYOUTS[ranks].items()}
    changes |= {"data__streams": ranks, "data__sequence_length": 16, "train__global_batch": 2 * ranks}
    changes |= {"train__micro_batch": 1, "model__n_experts": 16, "model__vocab_size": 384, "model__core_layers": 2}
    config = tiny(tmp_path, **changes)
    layout = named_layout(config.parallel, ranks, 8)
    state = rank_state(config, layout)
    planned = collectives(config, state, LOOPS, BACKPROP)
    ids = torch.zeros(1, 17, dtype=torch.int64)
    with fake_processes(ranks), patch.object(ExpertExchange, "exchange_counts", as_if_alike), Counter() as counter:
        world = World(torch.device("cpu"), Ranks(dist.group.WORLD), Ranks())
        parallel = parallelize(config, build_on_meta(config.model), layout, world)
        counter.seen.clear()  # what building takes
        for last in (False, True):
            with parallel.accumulating(last):
                parallel(ids[:, :-1], ids[:, 1:], loops=LOOPS, backprop=BACKPROP).objective.backward()
        parallel.finish_gradients()
        world.sum(torch.zeros(state.measured // 8, dtype=torch.float64))
    print(f"{ranks:,} ranks: {counter.seen}")
    assert counter.seen == {kind: exchange for kind, exchange in planned.items() if exchange.count}
