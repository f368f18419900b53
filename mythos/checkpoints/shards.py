"""Which rank writes which tensor of a checkpoint, and how a rank writes its file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor, Shard
from torch.futures import Future

from mythos.distributed.ranks import Ranks
from mythos.files.tensors import save_file
from mythos.torch_internals import interleaved_parts, shard_file_name, shard_metadata

SHARD_PREFIX = "shard-{:05d}-"
"""How torch.distributed.checkpoint begins the names of a rank's files, counted from 1."""


def in_one_piece(tensor: Tensor) -> Tensor:
    """A tensor whose shards are rectangles of the whole: `tensor` itself, or a copy if its shards interleave.

    Collective. Only such shards can be written and read. A slice of shared experts has rows of the gates and of the
    up-projections; its copy takes a little memory, because FSDP2 cuts the slices too.
    """
    if not isinstance(tensor, DTensor) or all(interleaved_parts(placement) == 1 for placement in tensor.placements):
        return tensor
    placements: list[Any] = list(tensor.placements)
    return tensor.redistribute(placements=[Shard(p.dim) if interleaved_parts(p) > 1 else p for p in placements])


@torch.no_grad()
def spread(piece: Tensor, tensor: Tensor) -> None:
    """Copy what :func:`in_one_piece` returned for `tensor`, and was filled since, into it. Collective."""
    if piece is not tensor:
        assert isinstance(piece, DTensor) and isinstance(tensor, DTensor), "others are their own piece"
        tensor.copy_(piece.redistribute(placements=tensor.placements))


def rank_share(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors of which this rank writes its shard. Tensors that several ranks have are divided among these, evenly.

    torch.distributed.checkpoint deduplicates too, but only after everything is copied to the host.
    """
    share = {}
    written: dict[int, list[int]] = {}  # by number of copies: bytes that each of the copies' ranks writes
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        copies, mine = _copies(tensors[name], ranks)
        sizes = written.setdefault(copies, [0] * copies)
        chosen = sizes.index(min(sizes))
        sizes[chosen] += tensors[name].nbytes
        if chosen == mine:
            share[name] = tensors[name]
    return share


def _copies(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    """How many ranks have the same bytes, and which of them this one is."""
    if not isinstance(tensor, DTensor):
        return ranks.size, ranks.rank
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    copies, mine = 1, 0
    for placement, size, position in zip(tensor.placements, mesh.shape, coordinate, strict=True):
        if placement.is_replicate():
            copies, mine = copies * size, mine * size + position
    return copies, mine


class HostPlanner(dcp.DefaultSavePlanner):
    """Plans by the layout of the live tensors and returns their copies on the host, `host` by name."""

    def __init__(self, host: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.host = host

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The host's copy of a tensor."""
        return self.host[index.fqn]


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes a file directly from the tensors.

    torch's writer builds the file in memory, twice, and blocks all other threads meanwhile (seconds a gigabyte).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, if it has any tensors."""
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, Sequence[int]] = {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None, "checkpoints have tensors only"
            tensors[item.index.fqn] = tensor.contiguous()
            offsets[item.index.fqn] = item.tensor_data.chunk.offsets
        if tensors:
            file = Path(self.path) / shard_file_name(plan.storage_data["shard_index"])
            save_file(tensors, file, metadata=shard_metadata(offsets))
        done: Future[list[WriteResult]] = Future()
        done.set_result([])  # only a consolidated index would need them
        return done
