"""Muon: orthogonalised momentum for the matrices of hidden layers, AdamW for all other parameters."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, product
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mythos.model.layers import is_dtensor, local_part
from mythos.torch_internals import foreach_copy_, foreach_div_, foreach_lerp_, foreach_mul_, interleaved_parts
from mythos.training.adamw import FusedAdamW

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""(a, b, c) of the polynomial a x + b x^3 + c x^5, from Keller Jordan: steep at 0, and after five iterations near 1 for
every x above 0.01."""
ITERATIONS = 5
BATCH_ELEMENTS = 2**24
"""Most elements of matrices that are multiplied in one batch: enough for a GPU, little memory beside a model."""
EXCHANGE_ELEMENTS = 2**26
"""Elements of a rank's shards that are sent in one exchange, or of whole matrices that are gathered at once. Buffers of
this size are all the memory that an exchange takes."""
SMALLEST_NORM = 1e-7
"""Lower bound of the norm by which a matrix is divided."""
UPDATE_RMS = 0.2
"""Root mean square of AdamW's updates at a learning rate of 1, to which updates of matrices are scaled (arXiv
2502.16982)."""


class Muon(FusedAdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with a `momentum`, AdamW for the others.

    A matrix moves along its Nesterov momentum, orthogonalised and multiplied by 0.2 sqrt(max(rows, columns)), so that
    AdamW's learning rate and weight decay fit it (arXiv 2502.16982). Parameters of these groups are matrices (n, m) or
    stacks of them (E, n, m). The group's `parts` is the number of matrices that are concatenated along a layer's
    outputs: the rows of a matrix, the columns of a stack.

    Matmuls are in `dtype`, everything else is in the parameters' type. A step reads `found_inf` and `grad_scale` like
    fused AdamW, waits for nothing, needs a gradient for every matrix and overwrites it.

    Matrices that FSDP2 has sharded are gathered, each on one of the ranks that share it, about `elements` of a rank's
    shards at a time. Matrices that are not DTensors must have the same gradients on all the `ranks` processes, as under
    DDP: each rank orthogonalises its share of them, and all gather the results, about `elements` at a time.

    torch.optim.Muon has no stacks and no `found_inf` or `grad_scale`, handles one matrix after the other, always in
    bfloat16, and would repeat the same work on all ranks.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        dtype: torch.dtype,
        elements: int = EXCHANGE_ELEMENTS,
        *,
        ranks: int = 1,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.dtype = dtype
        self.parts: dict[Tensor, int] = {p: group["parts"] for group in self._matrix_groups for p in group["params"]}
        for parameter in self.parts:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        sharded: dict[tuple[DeviceMesh, tuple[int, ...]], list[DTensor]] = {}
        for parameter in self.parts:
            if is_dtensor(parameter) and (dimensions := _cut_along(parameter)):
                sharded.setdefault((parameter.device_mesh, dimensions), []).append(parameter)
        meshes = {mesh for mesh, _ in sharded}
        self.exchanges = [
            Exchange(parameters, _group(mesh, dimensions, meshes), dtype)
            for (mesh, dimensions), members in sharded.items()
            for parameters in _in_rounds(members, elements)
        ]
        replicated = {p: parts for p, parts in self.parts.items() if not is_dtensor(p)}
        self.sharing = Sharing(replicated, ranks, dtype, elements) if replicated and ranks > 1 else None

    @property
    def _matrix_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if "momentum" in group]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # returns no loss
        """Update all parameters once. Gradients of matrices become their updates and are then freed; no `closure`."""
        assert closure is None
        for group in self._matrix_groups:
            self._follow_momentum(group)
        self._orthogonalize()
        for group in self._matrix_groups:
            self._apply(group)
        super().step()

    def _follow_momentum(self, group: dict[str, Any]) -> None:
        """Move the momenta towards the gradients; the gradients become Nesterov momenta."""
        gradients = [_local_gradient(p) for p in group["params"]]
        momenta = [local_part(self.state[p]["momentum_buffer"]) for p in group["params"]]
        if self.grad_scale is not None:
            foreach_div_(gradients, self.grad_scale)
        if self.found_inf is not None:
            skip = self.found_inf > 0
            for gradient, momentum in zip(gradients, momenta, strict=True):
                torch.where(skip, momentum, gradient, out=gradient)  # moved towards itself, a momentum does not change
        foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        foreach_lerp_(gradients, momenta, group["momentum"])

    def _orthogonalize(self) -> None:
        """Orthogonalise the matrices in the gradients: replicated ones, whole ones of this rank, then sharded ones."""
        elsewhere: set[Tensor] = {p for exchange in self.exchanges for p in exchange.parameters}
        if self.sharing is not None:
            matrices = self.sharing.matrices()
            orthogonalize_([matrices[index] for index in self.sharing.shares[dist.get_rank()]], self.dtype)
            self.sharing.gather(matrices)
            elsewhere |= self.sharing.parts.keys()
        local = [(_local_gradient(p), count) for p, count in self.parts.items() if p not in elsewhere]
        orthogonalize_([matrix for update, count in local for matrix in _matrices(update, count)], self.dtype)
        for exchange in self.exchanges:
            gathered = exchange.gather()
            matrices = [matrix for p, whole in gathered for matrix in _matrices(whole, self.parts[p])]
            orthogonalize_(matrices, self.dtype)
            exchange.scatter([whole for _, whole in gathered])

    def _apply(self, group: dict[str, Any]) -> None:
        """Decay the weights and subtract the updates in the gradients; nothing moves if `found_inf` is 1."""
        applied: Tensor | float = 1.0 if self.found_inf is None else 1 - self.found_inf
        weights = [local_part(p) for p in group["params"]]
        foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * applied)
        for parameter, weight in zip(group["params"], weights, strict=True):
            outputs, inputs = parameter.shape if parameter.ndim == 2 else parameter.shape[:0:-1]
            scale = UPDATE_RMS * sqrt(max(outputs // group["parts"], inputs))
            weight.sub_(_local_gradient(parameter).mul_(applied), alpha=group["lr"] * scale)
            parameter.grad = None  # AdamW skips parameters without a gradient


def orthogonalize_(matrices: list[Tensor], dtype: torch.dtype) -> None:
    """Orthogonalise matrices (n, m) in place; those of one shape in batched matmuls, which are in `dtype`."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        shapes.setdefault(wide.shape, []).append(wide)
    for shape, same_shape in shapes.items():
        count = max(1, BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(same_shape), count):
            batch = same_shape[start : start + count]
            foreach_copy_(batch, newton_schulz(torch.stack(batch).to(dtype)).unbind())


def newton_schulz(x: Tensor) -> Tensor:
    """About U V^T for matrices U S V^T: singular values become 0.7 to 1.2. (N, n, m), n <= m, of any float type."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        square = x @ x.mT  # (N, n, n)
        # a x + (b x x^T + c (x x^T)^2) x
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Sharing:
    """Divides matrices that all ranks have over the ranks, and gathers the results.

    Matrices are assigned by decreasing cost, each to the rank with the least work so far. The all-gathers are in
    `dtype`, of about `elements` over all ranks, and padded to the rank that sends most.
    """

    def __init__(self, parts: dict[Tensor, int], ranks: int, dtype: torch.dtype, elements: int) -> None:
        self.parts, self.dtype = parts, dtype
        shapes = [m.shape for parameter, count in parts.items() for m in _matrices(parameter.detach(), count)]
        costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]  # half of newton_schulz's FLOPs
        self.shares: list[list[int]] = [[] for _ in range(ranks)]
        """For each rank, the indices of its matrices."""
        loads = [0] * ranks
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            self.shares[rank].append(index)
        self.rounds: list[list[list[Rows]]] = []
        """For each all-gather, the rows that each rank sends."""
        room = max(1, elements // ranks)
        waiting = [
            deque(rows for index in share for rows in _in_rows(index, shapes[index], room)) for share in self.shares
        ]
        while any(waiting):
            self.rounds.append([_take(share, room) for share in waiting])

    @property
    def bytes(self) -> tuple[int, ...]:
        """Bytes that a rank receives in each all-gather."""
        return tuple(_longest(sent) * len(sent) * self.dtype.itemsize for sent in self.rounds)

    def matrices(self) -> list[Tensor]:
        """Views of the matrices in the gradients."""
        return [m for parameter, count in self.parts.items() for m in _matrices(_local_gradient(parameter), count)]

    def gather(self, matrices: list[Tensor]) -> None:
        """Copy every rank's share of the matrices into the gradients of all ranks."""
        rank = dist.get_rank()
        for sent in self.rounds:
            mine = torch.empty(_longest(sent), dtype=self.dtype, device=matrices[0].device)
            for rows, part in zip(sent[rank], _split(mine, sent[rank]), strict=True):
                part.copy_(rows.of(matrices).flatten())
            received = mine.new_empty(len(sent), len(mine))
            dist.all_gather_into_tensor(received.flatten(), mine)
            for rank_rows, buffer in zip(sent, received, strict=True):
                for rows, part in zip(rank_rows, _split(buffer, rank_rows), strict=True):
                    target = rows.of(matrices)
                    target.copy_(part.view(target.shape))


class Rows(NamedTuple):
    """Consecutive rows of a matrix."""

    matrix: int
    start: int
    stop: int
    size: int
    """Elements."""

    def of(self, matrices: list[Tensor]) -> Tensor:
        """A view of them."""
        return matrices[self.matrix][self.start : self.stop]


def _in_rows(index: int, shape: torch.Size, room: int) -> list[Rows]:
    """A matrix, cut into groups of as many rows as fit into `room` elements, at least one."""
    count = max(1, room // shape[1])
    starts = range(0, shape[0], count)
    stops = [min(start + count, shape[0]) for start in starts]
    return [Rows(index, start, stop, (stop - start) * shape[1]) for start, stop in zip(starts, stops, strict=True)]


def _take(waiting: deque[Rows], room: int) -> list[Rows]:
    """Remove the first rows that fit into `room` elements, at least one group."""
    taken: list[Rows] = []
    while waiting and (not taken or waiting[0].size <= room):
        taken.append(waiting.popleft())
        room -= taken[-1].size
    return taken


def _longest(sent: list[list[Rows]]) -> int:
    """Elements of the rank that sends most."""
    return max(sum(rows.size for rows in rank_rows) for rank_rows in sent)


def _split(buffer: Tensor, rank_rows: list[Rows]) -> list[Tensor]:
    """The part of a rank's buffer for each group of rows; what remains of it is padding."""
    sizes = [rows.size for rows in rank_rows]
    return list(buffer.split([*sizes, len(buffer) - sum(sizes)])[:-1])


class Exchange:
    """Gathers matrices that FSDP2 has sharded, each on one of the ranks that share it, and scatters the results.

    Each direction is one all-to-all, in `dtype`. Ranks are assigned in turn, largest matrices first.
    """

    def __init__(self, parameters: list["DTensor"], group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        """`parameters` are on one mesh; the ranks of `group` together have their matrices."""
        self.parameters, self.group, self.dtype = set(parameters), group, dtype
        members, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        mesh = parameters[0].device_mesh.mesh
        places = [tuple((mesh == member).nonzero()[0].tolist()) for member in members]
        self.ranks = len(places)
        counts = [(p, len(p.to_local()) if p.ndim == 3 else 1) for p in parameters]
        pieces = [Piece(parameter, index, places) for parameter, count in counts for index in range(count)]
        pieces.sort(key=lambda piece: -piece.numel())
        self.pieces = [piece for owner in range(self.ranks) for piece in pieces[owner :: self.ranks]]
        self.mine = pieces[rank :: self.ranks]
        # Elements of each shard, by the rank that it goes to or comes from.
        self.leaving = [[piece.numel(rank) for piece in pieces[owner :: self.ranks]] for owner in range(self.ranks)]
        self.coming = [[piece.numel(source) for piece in self.mine] for source in range(self.ranks)]

    @property
    def bytes(self) -> int:
        """Bytes that this rank sends or receives, the larger of both, in either of the two all-to-alls."""
        return max(sum(map(sum, self.leaving)), sum(map(sum, self.coming))) * self.dtype.itemsize

    def gather(self) -> list[tuple["DTensor", Tensor]]:
        """This rank's matrices, whole, made of all ranks' gradients, with the parameters that they belong to.

        A matrix is (n, m), or (1, n, m) if it is one of a stack.
        """
        received = self._all_to_all([piece.shard() for piece in self.pieces], self.leaving, self.coming)
        gathered = []
        for index, piece in enumerate(self.mine):
            whole = torch.empty(piece.shape, dtype=self.dtype, device=piece.shard().device)
            for source in range(self.ranks):
                shard = received[index + source * len(self.mine)]
                for place, part in piece.parts(source, shard):
                    whole[place] = part
            gathered.append((piece.parameter, whole))
        return gathered

    def scatter(self, wholes: list[Tensor]) -> None:
        """Copy the matrices that :meth:`gather` returned into the ranks' gradients."""
        sent = []
        for target in range(self.ranks):
            for piece, whole in zip(self.mine, wholes, strict=True):
                shard = whole.new_empty(piece.numel(target))
                for place, part in piece.parts(target, shard):
                    part.copy_(whole[place])
                sent.append(shard)
        for piece, values in zip(self.pieces, self._all_to_all(sent, self.coming, self.leaving), strict=True):
            shard = piece.shard()
            shard.copy_(values.view_as(shard))

    def _all_to_all(self, tensors: list[Tensor], leaving: list[list[int]], coming: list[list[int]]) -> list[Tensor]:
        """Send tensors, ordered by target rank, and return those received, flat; the lists give sizes by rank."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.pieces[0].shard().device)
        sent = torch.cat([nothing, *(tensor.to(self.dtype).flatten() for tensor in tensors)])
        received = sent.new_empty(sum(map(sum, coming)))
        dist.all_to_all_single(received, sent, list(map(sum, coming)), list(map(sum, leaving)), group=self.group)
        return list(received.split([size for sizes in coming for size in sizes]))


class Piece:
    """A sharded matrix, or one of a sharded stack: that with `index` among those of this rank."""

    def __init__(self, parameter: "DTensor", index: int, places: list[tuple[int, ...]]) -> None:
        """`places` are the coordinates, in the parameter's mesh, of the ranks that together have the matrix."""
        self.parameter, self.index = parameter, index
        self.shape = list(parameter.shape if parameter.ndim == 2 else (1, *parameter.shape[1:]))
        self.runs = [self._runs(place) for place in places]
        """For each rank and dimension, the ranges that its shard covers, one after the other."""

    def _runs(self, place: tuple[int, ...]) -> list[list[slice]]:
        runs = [[slice(0, size)] for size in self.shape]
        placed = zip(self.parameter.placements, self.parameter.device_mesh.shape, place, strict=True)
        for placement, ranks, rank in placed:
            dim = getattr(placement, "dim", None)
            if dim is None or (dim == 0 and self.parameter.ndim == 3):  # copies, or other matrices of the stack
                continue
            # Cut like torch.chunk: the last ranks have less, or nothing, if the size is not a multiple. Parts that lie
            # side by side are cut one by one.
            size = self.shape[dim] // interleaved_parts(placement)
            most = -(-size // ranks)
            starts = range(0, self.shape[dim], size)
            bounds = min(size, rank * most), min(size, (rank + 1) * most)
            runs[dim] = [slice(start + bounds[0], start + bounds[1]) for start in starts]
        return runs

    def numel(self, rank: int | None = None) -> int:
        """Elements of a rank's shard; None: of the whole matrix."""
        if rank is None:
            return prod(self.shape)
        return prod(sum(run.stop - run.start for run in runs) for runs in self.runs[rank])

    def parts(self, rank: int, shard: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Places in the matrix, and the views of a rank's flat shard that belong there."""
        by_dim, shape = [], []
        for runs in self.runs[rank]:
            ends = list(accumulate(run.stop - run.start for run in runs))
            here = [slice(end - (run.stop - run.start), end) for run, end in zip(runs, ends, strict=True)]
            by_dim.append(list(zip(runs, here, strict=True)))
            shape.append(ends[-1])
        shaped = shard.view(shape)
        for combination in product(*by_dim):
            yield tuple(there for there, _ in combination), shaped[tuple(here for _, here in combination)]

    def shard(self) -> Tensor:
        """This rank's part of the gradient."""
        local = _local_gradient(self.parameter)
        return local if local.ndim == 2 else local[self.index : self.index + 1]


def _in_rounds(parameters: list["DTensor"], elements: int) -> list[list["DTensor"]]:
    """Group parameters, smallest shapes first, so that a rank's shards of a group are about so many elements."""
    rounds: list[list[DTensor]] = []
    room = 0.0
    for parameter in sorted(parameters, key=lambda p: p.shape):
        share = parameter.to_local().numel()
        if not rounds or share > room:
            rounds.append([])
            room = elements
        rounds[-1].append(parameter)
        room -= share
    return rounds


def _matrices(tensor: Tensor, parts: int) -> list[Tensor]:
    """Views of the matrices of a parameter's shape."""
    stack = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor
    return [part for matrix in stack for part in matrix.chunk(parts, dim=0 if tensor.ndim == 2 else 1)]


def _cut_along(parameter: "DTensor") -> tuple[int, ...]:
    """The dimensions of the mesh whose ranks hold parts of the same matrices; none if each matrix is on one rank.

    Ranks along other dimensions have copies, or other matrices of a stack.
    """
    inside = (0, 1) if parameter.ndim == 2 else (1, 2)
    cuts = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return tuple(d for d, (cut, ranks) in enumerate(cuts) if ranks > 1 and getattr(cut, "dim", None) in inside)


def _group(mesh: DeviceMesh, dimensions: tuple[int, ...], meshes: Iterable[DeviceMesh]) -> dist.ProcessGroup:
    """The ranks of this one's row along one dimension of a mesh, or of its plane along several.

    Those of a plane share a copy of the model, so they are a row of the mesh of another matrix, one of `meshes`.
    """
    if len(dimensions) == 1:
        return mesh.get_group(dimensions[0])
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every rank is in the mesh"
    plane = mesh.mesh[tuple(slice(None) if d in dimensions else place for d, place in enumerate(coordinate))]
    ranks = sorted(plane.flatten().tolist())
    groups = [other.get_group(dimension) for other in meshes for dimension in range(other.ndim)]
    return next(group for group in groups if sorted(dist.get_process_group_ranks(group)) == ranks)


def _local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter's gradient."""
    assert parameter.grad is not None, "Muon needs a gradient of every matrix"
    return local_part(parameter.grad)
