"""Configurations to plan, and the memory table of a plan."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mythos.config.loading import config_from_dict, load_config
from mythos.config.sections import Config
from mythos.distributed.layout import Experts, Layout, build_mesh
from mythos.distributed.sharding import shard_model
from mythos.model.ops.expert_exchange import ExpertExchange, Splits
from mythos.planning.collectives import fake_processes
from mythos.planning.flops import build_on_meta
from mythos.planning.layout import choose_layout
from mythos.planning.rank_state import RankState, Unit, compute_dtype, holders, rank_state
from mythos.training.optim import build_optimizer

GIB = 2**30


def state_on(config: Config, ranks: int) -> RankState:
    return rank_state(config, choose_layout(config, ranks, min(ranks, 8), 80 * GIB))


def preset(name: str, **parallel: Any) -> Config:
    return config_from_dict(
        {
            "model": {"preset": name},
            "data": {"streams": 1024},
            "train": {"steps": 1, "global_batch": 1024},
            "parallel": parallel,
        }
    )


WIDE = {
    "model__dim": 256,
    "model__ffn_dim": 768,
    "model__core_layers": 2,
    "model__prelude_layers": 1,
    "model__coda_layers": 1,
    "model__n_experts": 8,
    "model__expert_dim": 256,
    "model__shared_expert_dim": 256,
    "model__vocab_size": 1024,
    "data__streams": 4,
    "train__micro_batch": 1,
    "train__dtype": "bfloat16",
    "parallel__mode": "fsdp",
    "parallel__activation_checkpointing": "loop",
}


def read_off(config: Config, layout: Layout) -> tuple[int, int, int, list[Unit]]:
    """Measure a model sharded by FSDP2: bytes of parameters, of whole ones, of the optimizer; and its units."""

    def local(tensors: list[Tensor]) -> int:
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    model = build_on_meta(config.model)
    with fake_processes(layout.size):
        shard_model(config.parallel, model, build_mesh(layout, "cpu"), compute_dtype(config))
        parameters = list(model.parameters())
        optimizer = build_optimizer(model, config.optim, compute_dtype(config))
        states = [value for state in optimizer.state.values() for value in state.values()]
        blocks = set(model.recurrence.blocks)
        split = any(isinstance(block, FSDPModule) for block in blocks)
        units = []
        for module in model.modules():
            for group in fsdp_param_groups(module) if isinstance(module, FSDPModule) else ():
                computed = group.mp_policy.param_dtype or torch.float32
                reduced = group.mp_policy.reduce_dtype or computed
                padded = group.mesh_info.shard_mesh_size * sum(
                    p.padded_sharded_param_size.numel() for p in group.fsdp_params
                )
                kind = kind_of(group.fsdp_params[0])
                divided = holders(layout, kind)
                real = sum(p.sharded_param.numel() for p in group.fsdp_params) // divided
                units.append(
                    Unit(
                        gathered=padded * computed.itemsize,
                        gradient=real * computed.itemsize,
                        accumulated=real * reduced.itemsize,
                        reduced=padded * reduced.itemsize,
                        kept=group.post_forward_mesh_info is None,
                        looped=module in blocks,
                        outer=module is model.recurrence and split,
                        injects=module is model.recurrence.injection,
                        experts=kind,
                    )
                )
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        return local(parameters), local(whole), local(states), units


def fsdp_param_groups(module: nn.Module) -> list[Any]:
    """The FSDPParamGroups of a module that `fully_shard` was applied to; only they know the padded sizes of shards.

    torch 2.11 has at most one group per module; later versions have a list.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def kind_of(parameter: Any) -> Experts | None:
    """Kind of the experts that one of FSDP2's parameters belongs to, by the dimension that divides them."""
    if not parameter.is_dtensor:
        return None
    return "routed" if "expert" in parameter._spmd_mesh.mesh_dim_names else "shared"


def as_if_alike(rows: int | None = None) -> Callable[[ExpertExchange, Tensor], Splits]:
    """`ExpertExchange.exchange_counts` as if every rank sent what this one sends: a fake collective brings nothing.

    With `rows`, so many rows leave, evenly.
    """

    def exchange_counts(self: ExpertExchange, sent: Tensor) -> Splits:
        dist.all_to_all_single(torch.empty_like(sent.T), sent.T.contiguous(), group=self.group)
        sizes, slots, most, tokens = sent.tolist()
        if rows is not None:
            sizes = [rows // self.ranks + (rank < rows % self.ranks) for rank in range(self.ranks)]
        return Splits(sizes, sizes, sum(slots), max(most), tokens[: self.sharers] if self.sharers > 1 else [])

    return exchange_counts


def memory_table(text: str) -> dict[str, float]:
    """GiB in the memory table, by line."""
    return {
        what: float(size.replace(",", "")) for size, what in re.findall(r"^ +([\d.,]+)  ([a-z].*)$", text, re.MULTILINE)
    }


def shipped(name: str) -> Config:
    return load_config(str(Path(__file__).parents[2] / "configs" / f"{name}.yaml"), ["model.vocab_size=49152"])
