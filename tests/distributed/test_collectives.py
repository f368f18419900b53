"""What `--dry-run` says processes exchange in a step, against the collectives that real training steps make."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.config.sections import Config
from mythos.distributed.layout import named_layout
from mythos.planning.collectives import EXPERT_EXCHANGE, Exchange, collectives
from mythos.planning.rank_state import rank_state
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
}

CHANGES: dict[str, Any] = {
    "data__streams": 4,
    "data__sequence_length": 8,
    "train__global_batch": 16,
    "train__micro_batch": 4,
    "model__core_layers": 2,
    "model__prelude_layers": 1,
    "model__coda_layers": 1,
    "depth__sampling": "fixed",
    "depth__curriculum": {"shape": "none"},
    "depth__mean": 4,
    "depth__backprop": 2,
    "parallel__reduce": "step",
}

FSDP, BLOCK = {"parallel__mode": "fsdp"}, {"parallel__mode": "fsdp", "parallel__wrap": "block"}
HSDP = {"parallel__mode": "hsdp", "parallel__shard": 2, "train__micro_batch": 2}
# The number of rows does not depend on the routing: a token reaches one of the two ranks, or both.
EXPERTS = FSDP | {"parallel__expert": 2, "model__expert_groups": 2}
COPIES = HSDP | {"parallel__expert": 2, "model__experts_per_token": 4}
LOOP, SELECTIVE, ALL = ({"parallel__activation_checkpointing": mode} for mode in ("loop", "selective", "all"))
KEPT, ALWAYS = {"parallel__reshard_after_forward": False}, {"parallel__reduce": "micro_batch"}
ONCE, MUON, LAYERS = {"train__micro_batch": 16}, {"optim__name": "muon"}, {"model__loop_over": "layer"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel__mode": "ddp", "model__n_experts": 512, "model__expert_dim": 128}),
    "fsdp": (2, FSDP),
    "fsdp, kept": (2, FSDP | KEPT),
    "fsdp, reduced in each micro-batch": (2, FSDP | ALWAYS),
    "fsdp, one micro-batch": (2, FSDP | ONCE),
    "fsdp, gate": (2, FSDP | {"model__halting": "gate"}),
    "fsdp, blocks": (2, BLOCK),
    "fsdp, blocks kept": (2, BLOCK | KEPT),
    "fsdp, blocks, reduced in each micro-batch": (2, BLOCK | ALWAYS),
    "fsdp, blocks, one micro-batch": (2, BLOCK | ONCE),
    "fsdp, blocks, recomputed": (2, BLOCK | {"parallel__activation_checkpointing": "loop"}),
    "fsdp, one block": (2, BLOCK | {"model__core_layers": 1}),
    "fsdp, blocks, gradient through all loops": (2, BLOCK | {"depth__backprop": 4}),
    "fsdp, blocks, gradient through the last loop": (2, BLOCK | {"depth__backprop": 1}),
    "fsdp, layer by layer": (2, FSDP | LAYERS),
    "fsdp, blocks, layer by layer": (2, BLOCK | LAYERS),
    "fsdp, muon": (2, FSDP | MUON),
    "ddp, muon": (2, {"parallel__mode": "ddp"} | MUON),
    "hsdp 2 x 2, muon, experts cut": (4, HSDP | MUON | {"model__n_experts": 5}),
    "hsdp 2 x 2": (4, HSDP),
    "hsdp 2 x 2, blocks": (4, HSDP | {"parallel__wrap": "block"}),
    "hsdp 2 x 2, reduced in each micro-batch": (4, HSDP | ALWAYS),
    "experts over 2": (2, EXPERTS),
    "experts over 2, what arrived is kept": (2, EXPERTS | SELECTIVE),
    "experts over 2, all recomputed": (2, EXPERTS | ALL),
    "experts over 2, shards over 2, recomputed": (4, EXPERTS | LOOP | {"train__micro_batch": 3}),
    "experts over 2, shards over 2, recomputed blocks": (
        4,
        EXPERTS | LOOP | BLOCK | {"model__block_norm": "peri", "train__micro_batch": 2},
    ),
    "experts over 2, 2 copies, muon": (4, COPIES | MUON),
    "experts over 2, shards over 2, muon": (4, EXPERTS | MUON | {"train__micro_batch": 2}),
}


class Recorder(TorchDispatchMode):
    """Sees every collective, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Exchange] = {kind: Exchange() for kind in KINDS.values()}
        self.updating = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.partition("::")[2], str(func))
            tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
            # The larger of input and output: what is gathered, or what is reduced.
            size = max(t.numel() * t.itemsize for t in tensors)
            if kind == "all-to-all" and not self.updating:
                # What a rank sends, of both directions: how many rows it receives depends on the routing.
                kind, size = EXPERT_EXCHANGE, args[1].numel() * args[1].itemsize
            exchange = self.seen.setdefault(kind, Exchange())
            exchange.count += 1
            exchange.bytes += size
        return func(*args, **(kwargs or {}))


def count(directory: Path, changes: dict[str, Any], first: int, last: int) -> tuple[Config, list[dict[str, Exchange]]]:
    """Collectives of the 0-based steps from `first` to `last`."""
    trainer = Trainer(tiny(directory, run__dir=str(directory / "run"), **{**CHANGES, **changes}))
    recorded = []
    update, recorder = trainer.update, Recorder()

    def updating(*results: Any) -> float:
        recorder.updating = True  # all-to-alls from here on are Muon's
        return update(*results)

    trainer.update = updating  # type: ignore[method-assign]
    for _ in range(last + 1):
        batch, problem = trainer.read_ahead()
        assert batch is not None, problem
        recorder = Recorder()
        with recorder:
            trainer.train_step(batch)
        trainer.step += 1
        recorded.append(recorder.seen)
    trainer.resources.close()
    return trainer.config, recorded[first:]


def planned(config: Config, ranks: int) -> dict[str, Exchange]:
    layout = named_layout(config.parallel, ranks, ranks)
    return collectives(config, rank_state(config, layout), round(config.depth_mean), config.depth_backprop)


@pytest.mark.parametrize("case", CASES)
def test_plan_counts_what_a_step_exchanges(pool: RankPool, tmp_path: Path, case: str) -> None:
    ranks, changes = CASES[case]
    step = 2 if "ddp" in case else 0  # DDP first tries, then agrees on its buckets
    everyone = pool.run(count, tmp_path, changes, step, step, ranks=ranks)
    config, (seen,) = everyone[0]
    expected = planned(config, ranks)
    print(f"{case}: " + ", ".join(f"{e.count} {kind}s of {e.bytes:,} bytes" for kind, e in seen.items()))
    tokens = [of_rank.pop(EXPERT_EXCHANGE, Exchange()) for _, (of_rank,) in everyone]
    if EXPERT_EXCHANGE in expected:  # what some ranks send more than others, these receive less: compare the sums
        exchange = expected.pop(EXPERT_EXCHANGE)
        assert [each.count for each in tokens] == [exchange.count] * ranks
        assert sum(each.bytes for each in tokens) == ranks * exchange.bytes
    assert seen == expected
    for _, (others,) in everyone:  # ranks take different matrices to make whole, the first the largest
        assert others["all-to-all"].bytes <= seen["all-to-all"].bytes
        assert others | {"all-to-all": seen["all-to-all"]} == seen
    assert case != "ddp" or expected["all-reduce"].count > 2, "there must be several buckets"


@pytest.mark.parametrize("changes", [{}, KEPT, {"parallel__expert": 2}], ids=str)
def test_depths_that_are_drawn_change_nothing_when_the_unit_owns_the_loop(
    pool: RankPool, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Except for tokens that are sent to experts, in every loop."""
    drawn = {"depth__sampling": "poisson", "depth__curriculum": {"shape": "linear", "over": 1.0, "start": 1}}
    config, steps = pool.run(count, tmp_path, FSDP | drawn | {"train__steps": 6} | changes, 0, 3, ranks=2)[0]
    counts = [(step["all-gather"].count, step["reduce-scatter"].count) for step in steps]
    print(f"all-gathers and reduce-scatters of four steps: {counts}")
    deeper = config.model_copy(update={"depth": config.depth.model_copy(update={"mean": 9})})
    plans = [planned(config, 2), planned(deeper, 2)]
    tokens = [exchanges.pop(EXPERT_EXCHANGE, None) for exchanges in (*steps, *plans)]
    assert all(seen == plans[0] for seen in (*steps, plans[1]))
    assert tokens[0] is None or len({exchange.count for exchange in tokens if exchange}) > 2
