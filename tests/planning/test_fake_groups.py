"""Collectives of a step on groups of 8 to 4,096 fake processes, executed and counted, against the plan."""

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
from mythos.model.ops.expert_exchange import ExpertExchange
from mythos.planning.collectives import EXPERT_EXCHANGE, TOKEN_GATHER, Exchange, collectives, fake_processes
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.flops import build_on_meta
from mythos.planning.rank_state import rank_state
from tests.planning.helpers import as_if_alike
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
    128: {"mode": "fsdp", "expert": 16, "shared": 4},
    256: {"mode": "hsdp", "shard": 32, "expert": 8, "shared": 8, "activation_checkpointing": "loop", "reduce": "step"},
    1024: {"mode": "hsdp", "shard": 64, "expert": 8, "shared": 2, "wrap": "block", "activation_checkpointing": "loop"},
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
            exchange = self.seen.setdefault(kind, Exchange())
            exchange.count += 1
            exchange.bytes += args[1].nbytes if kind == EXPERT_EXCHANGE else max(sizes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("ranks", "loop_over"), [*((ranks, "core") for ranks in LAYOUTS), (64, "layer"), (256, "layer")]
)
def test_plan_counts_what_a_rank_of_many_exchanges(tmp_path: Path, ranks: int, loop_over: str) -> None:
    changes = {f"parallel__{name}": value for name, value in LAYOUTS[ranks].items()}
    changes |= {} if loop_over == "core" else {"model__loop_over": "layer", "model__halting": "none"}
    changes |= {"data__streams": ranks, "data__sequence_length": 16, "train__global_batch": 2 * ranks}
    changes |= {"train__micro_batch": 1, "model__n_experts": 16, "model__vocab_size": 384, "model__core_layers": 2}
    config = tiny(tmp_path, **changes)
    layout = named_layout(config.parallel, ranks, 8)
    state = rank_state(config, layout)
    planned = collectives(config, state, LOOPS, BACKPROP)
    if (tokens := planned.pop(TOKEN_GATHER, None)) is not None:  # the counter sees all-gathers of both kinds
        planned["all-gather"].count += tokens.count
        planned["all-gather"].bytes += tokens.bytes
    ids = torch.zeros(1, 17, dtype=torch.int64)
    rows = rows_to_experts(config.model, layout.expert, 16)  # of a micro-batch
    alike = as_if_alike(rows)
    with fake_processes(ranks), patch.object(ExpertExchange, "exchange_counts", alike), Counter() as counter:
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


@pytest.mark.parametrize("expert", [1, 4])
def test_each_unit_is_gathered_while_the_one_before_runs(tmp_path: Path, expert: int) -> None:
    """The core is gathered before the last block of the prelude runs, and the coda before the core does."""
    changes = {"data__streams": 8, "train__global_batch": 8, "model__prelude_layers": 2, "model__coda_layers": 2}
    changes |= {"model__vocab_size": 384, "parallel__expert": expert}
    config = tiny(tmp_path, parallel__mode="fsdp", **changes)
    layout = named_layout(config.parallel, 8, 8)
    ids = torch.zeros(1, 17, dtype=torch.int64)
    gathered: dict[str, int] = {}
    with fake_processes(8), Counter() as counter:
        world = World(torch.device("cpu"), Ranks(dist.group.WORLD), Ranks())
        model = parallelize(config, build_on_meta(config.model), layout, world).model
        modules = {"prelude 0": model.prelude[0], "prelude 1": model.prelude[1]}
        modules |= {"core": model.recurrence.blocks[0], "coda 0": model.coda[0], "coda 1": model.coda[1]}
        for name, module in modules.items():  # these hooks run after those of FSDP2

            def note(*_: Any, name: str = name) -> None:
                gathered.setdefault(name, counter.seen["all-gather"].count)

            module.register_forward_pre_hook(note)
        counter.seen.clear()
        model(ids[:, :-1], ids[:, 1:], loops=LOOPS, backprop=BACKPROP)
    # The root, then each block with the one after it; the injection is a unit of its own within the core, and divided
    # experts are gathered among the ranks that hold the same ones.
    core = 1 if expert == 1 else 2
    assert gathered == {"prelude 0": 3, "prelude 1": 3 + core, "core": 5 + core, "coda 0": 6 + core, "coda 1": 6 + core}
