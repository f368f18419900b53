"""Muon: momentum made orthogonal, for the matrices of hidden layers; AdamW for all else."""

from collections import deque
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mythos.torch_internals import foreach_copy_, foreach_div_, foreach_lerp_, foreach_mul_

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial x (a + b x^2 + c x^4), Jordan's: steep at 0, and after five times near 1 for what is above 0.01."""
ITERATIONS = 5
TOGETHER = 2**24
"""Elements of the matrices that are multiplied together: enough for a GPU, little beside a model."""
SENT = 2**26
"""Elements of a rank's shards that are sent together, or of whole matrices that are gathered together: buffers of them
are all that an exchange takes."""
SMALLEST_NORM = 1e-7
"""What a matrix is divided by at least."""
UPDATE_RMS = 0.2
"""Root mean square of AdamW's updates at a learning rate of 1, which those of matrices get (arXiv 2502.16982)."""


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for groups with a `momentum`, AdamW for the others.

    A matrix moves along its Nesterov momentum, made orthogonal and multiplied by 0.2 sqrt(max(rows, columns)), so that
    AdamW's learning rate and weight decay fit it (arXiv 2502.16982). Parameters of these groups are matrices (n, m) or
    stacks of them (E, n, m); `parts` of the group says how many lie side by side along a layer's outputs, which are the
    rows of a matrix and the columns of a stack.

    Products are in `dtype`, all else in the parameters' type. A step takes `found_inf` and `grad_scale` as a fused
    AdamW does, waits for nothing, needs a gradient of every matrix and uses it up. Matrices that FSDP2 has cut are put
    together, each on one of the ranks that share it, about `elements` of a rank's shards at a time. Matrices that are
    not DTensors must have the same gradients on all the `ranks` processes of the run, as under DDP: each rank makes its
    share of them orthogonal, and all gather the results, about `elements` at a time.

    torch.optim.Muon knows no stacks and no `found_inf` or `grad_scale`, takes one matrix after the other, always in
    bfloat16, and would do the same work on all ranks.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        dtype: torch.dtype,
        elements: int = SENT,
        *,
        ranks: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.dtype = dtype
        matrices = [p for group in self._matrix_groups for p in group["params"]]
        for parameter in matrices:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        rounds: list[list[DTensor]] = []
        room = 0.0
        for parameter in sorted(filter(_is_cut, matrices), key=lambda p: p.shape):
            share = parameter.numel() / parameter.device_mesh.shape[-1]
            if not rounds or share > room:
                rounds.append([])
                room = elements
            rounds[-1].append(parameter)
            room -= share
        self.exchanges = [Exchange(cut, dtype) for cut in rounds]
        parts = {p: group["parts"] for group in self._matrix_groups for p in group["params"]}
        alike = {p: parts[p] for p in matrices if not isinstance(p, DTensor)}
        self.sharing = Sharing(alike, ranks, dtype, elements) if alike and ranks > 1 else None

    @property
    def _matrix_groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if "momentum" in group]

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters; the gradients of matrices are turned into what moves them, and let go of."""
        for group in self._matrix_groups:
            self._follow_momentum(group)
        self._orthogonalize()
        for group in self._matrix_groups:
            self._apply(group)
        super().step()

    def _follow_momentum(self, group: dict[str, Any]) -> None:
        gradients = [_local(p.grad) for p in group["params"]]
        momenta = [_local(self.state[p]["momentum_buffer"]) for p in group["params"]]
        if getattr(self, "grad_scale", None) is not None:
            foreach_div_(gradients, self.grad_scale)
        if getattr(self, "found_inf", None) is not None:
            skip = self.found_inf > 0
            for gradient, momentum in zip(gradients, momenta, strict=True):
                torch.where(skip, momentum, gradient, out=gradient)  # moved towards itself, it stays what it was
        foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        foreach_lerp_(gradients, momenta, group["momentum"])

    def _orthogonalize(self) -> None:
        parts = {p: group["parts"] for group in self._matrix_groups for p in group["params"]}
        cut = {p for exchange in self.exchanges for p in exchange.parameters}
        if self.sharing is not None:
            matrices = self.sharing.matrices()
            orthogonalize_([matrices[index] for index in self.sharing.shares[dist.get_rank()]], self.dtype)
            self.sharing.gather(matrices)
            cut |= self.sharing.parts.keys()
        here = [(_local(p.grad), count) for p, count in parts.items() if p not in cut]
        orthogonalize_([matrix for update, count in here for matrix in _matrices(update, count)], self.dtype)
        for exchange in self.exchanges:
            gathered = exchange.gather()
            matrices = [matrix for p, whole in gathered for matrix in _matrices(whole, parts[p])]
            orthogonalize_(matrices, self.dtype)
            exchange.scatter([whole for _, whole in gathered])

    def _apply(self, group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", None)
        applied = 1.0 if found_inf is None else 1 - found_inf
        weights = [_local(p) for p in group["params"]]
        foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * applied)
        for parameter, weight in zip(group["params"], weights, strict=True):
            outputs, inputs = parameter.shape if parameter.ndim == 2 else parameter.shape[:0:-1]
            scale = UPDATE_RMS * sqrt(max(outputs // group["parts"], inputs))
            weight.sub_(_local(parameter.grad).mul_(applied), alpha=group["lr"] * scale)
            parameter.grad = None  # AdamW passes over what has none


def orthogonalize_(matrices: list[Tensor], dtype: torch.dtype) -> None:
    """Make matrices (n, m) orthogonal in place, many of one shape in the same products, which are in `dtype`."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        shapes.setdefault(wide.shape, []).append(wide)
    for shape, alike in shapes.items():
        most = max(1, TOGETHER // shape.numel())
        for start in range(0, len(alike), most):
            some = alike[start : start + most]
            foreach_copy_(some, newton_schulz(torch.stack(some).to(dtype)).unbind())


def newton_schulz(x: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T: singular values become 0.7 to 1.2. (N, n, m), n <= m, of any float type."""
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Sharing:
    """Shares out matrices that are the same on all ranks, and gathers what each rank has made of its share.

    The costliest matrix goes first, each to the rank that has least to do. The all-gathers are in `dtype`, of about
    `elements` of all ranks, and padded to the rank that sends most.
    """

    def __init__(self, parts: dict[Tensor, int], ranks: int, dtype: torch.dtype, elements: int) -> None:
        self.parts, self.dtype = parts, dtype
        shapes = [m.shape for parameter, count in parts.items() for m in _matrices(parameter.detach(), count)]
        costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]  # halves of newton_schulz's FLOPs
        self.shares: list[list[int]] = [[] for _ in range(ranks)]
        """Of each rank, which matrices."""
        loads = [0] * ranks
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            rank = loads.index(min(loads))
            loads[rank] += costs[index]
            self.shares[rank].append(index)
        self.rounds: list[list[list[Rows]]] = []
        """Of each all-gather, what each rank sends."""
        room = max(1, elements // ranks)
        waiting = [
            deque(rows for index in share for rows in _in_rows(index, shapes[index], room)) for share in self.shares
        ]
        while any(waiting):
            self.rounds.append([_take(share, room) for share in waiting])

    @property
    def bytes(self) -> tuple[int, ...]:
        """What each all-gather brings to a rank."""
        return tuple(_longest(taken) * len(taken) * self.dtype.itemsize for taken in self.rounds)

    def matrices(self) -> list[Tensor]:
        """Views of the gradients' matrices."""
        return [m for parameter, count in self.parts.items() for m in _matrices(parameter.grad, count)]

    def gather(self, matrices: list[Tensor]) -> None:
        """Bring every rank's share of the matrices into the gradients of all ranks."""
        rank = dist.get_rank()
        for taken in self.rounds:
            mine = torch.empty(_longest(taken), dtype=self.dtype, device=matrices[0].device)
            for rows, part in zip(taken[rank], _split(mine, taken[rank]), strict=True):
                part.copy_(rows.of(matrices).flatten())
            gathered = mine.new_empty(len(taken), len(mine))
            dist.all_gather_into_tensor(gathered.flatten(), mine)
            for some, sent in zip(taken, gathered, strict=True):
                for rows, part in zip(some, _split(sent, some), strict=True):
                    target = rows.of(matrices)
                    target.copy_(part.view(target.shape))


class Rows(NamedTuple):
    """Some rows of a matrix."""

    matrix: int
    start: int
    stop: int
    size: int
    """Elements."""

    def of(self, matrices: list[Tensor]) -> Tensor:
        """A view of them."""
        return matrices[self.matrix][self.start : self.stop]


def _in_rows(index: int, shape: torch.Size, room: int) -> list[Rows]:
    """A matrix, cut into as many rows as there is room for, at least one."""
    count = max(1, room // shape[1])
    stops = [min(start + count, shape[0]) for start in range(0, shape[0], count)]
    return [
        Rows(index, start, stop, (stop - start) * shape[1]) for start, stop in zip([0, *stops], stops, strict=False)
    ]


def _take(waiting: deque[Rows], room: int) -> list[Rows]:
    """The foremost that there is room for, at least one."""
    taken: list[Rows] = []
    while waiting and (not taken or waiting[0].size <= room):
        taken.append(waiting.popleft())
        room -= taken[-1].size
    return taken


def _longest(taken: list[list[Rows]]) -> int:
    return max(sum(rows.size for rows in some) for some in taken)


def _split(buffer: Tensor, some: list[Rows]) -> list[Tensor]:
    """The part of a rank's buffer that each takes; the rest of it is padding."""
    sizes = [rows.size for rows in some]
    return list(buffer.split([*sizes, len(buffer) - sum(sizes)])[:-1])


class Exchange:
    """Brings matrices that FSDP2 has cut together, each on one of the ranks that share it, and the results back.

    Each way is one all-to-all, in `dtype`. The ranks take turns, the largest matrices first.
    """

    def __init__(self, parameters: list[DTensor], dtype: torch.dtype) -> None:
        self.parameters, self.dtype = set(parameters), dtype
        mesh = parameters[0].device_mesh
        self.group, self.ranks = mesh.get_group(mesh.ndim - 1), mesh.shape[-1]
        rank = mesh.get_local_rank(mesh.ndim - 1)
        pieces = [Piece(p, place, self.ranks) for p in parameters for place in range(len(p) if p.ndim == 3 else 1)]
        pieces.sort(key=lambda piece: -piece.numel())
        self.pieces = [piece for owner in range(self.ranks) for piece in pieces[owner :: self.ranks]]
        self.mine = pieces[rank :: self.ranks]
        self.leaving = [[piece.numel(rank) for piece in pieces[owner :: self.ranks]] for owner in range(self.ranks)]
        self.coming = [[piece.numel(source) for piece in self.mine] for source in range(self.ranks)]

    @property
    def bytes(self) -> int:
        """What this rank sends, or receives if that is more, in either of the two all-to-alls."""
        return max(sum(map(sum, self.leaving)), sum(map(sum, self.coming))) * self.dtype.itemsize

    def gather(self) -> list[tuple[DTensor, Tensor]]:
        """The parameters whose matrices fall to this rank, and these, whole, made of all ranks' gradients.

        They are (n, m), or (1, n, m) out of a stack.
        """
        received = self._all_to_all([piece.shard() for piece in self.pieces], self.leaving, self.coming)
        gathered = []
        for index, piece in enumerate(self.mine):
            shards = [received[index + source * len(self.mine)] for source in range(self.ranks)]
            shaped = [shard.view(shape) for shard, shape in zip(shards, piece.shapes, strict=True)]
            gathered.append((piece.parameter, torch.cat(shaped, piece.dim)))
        return gathered

    def scatter(self, wholes: list[Tensor]) -> None:
        """Put the matrices that :meth:`gather` gave into the ranks' gradients."""
        cut = [whole.split(piece.sizes, piece.dim) for piece, whole in zip(self.mine, wholes, strict=True)]
        sent = [shards[target] for target in range(self.ranks) for shards in cut]
        for piece, values in zip(self.pieces, self._all_to_all(sent, self.coming, self.leaving), strict=True):
            shard = piece.shard()
            shard.copy_(values.view_as(shard))

    def _all_to_all(self, tensors: list[Tensor], leaving: list[list[int]], coming: list[list[int]]) -> list[Tensor]:
        """Send tensors, ordered by rank, and return those that came, flat; the lists say their sizes for each rank."""
        nothing = torch.empty(0, dtype=self.dtype, device=self.pieces[0].shard().device)
        sent = torch.cat([nothing, *(tensor.to(self.dtype).flatten() for tensor in tensors)])
        received = sent.new_empty(sum(map(sum, coming)))
        dist.all_to_all_single(received, sent, list(map(sum, coming)), list(map(sum, leaving)), group=self.group)
        return list(received.split([size for sizes in coming for size in sizes]))


class Piece:
    """A matrix, or one of a stack, whose shards ranks hold."""

    def __init__(self, parameter: DTensor, place: int, ranks: int) -> None:
        self.parameter, self.place, self.dim = parameter, place, parameter.placements[-1].dim
        whole = list(parameter.shape if parameter.ndim == 2 else (1, *parameter.shape[1:]))
        # As torch.chunk cuts, with nothing for the last ranks where it does not come out even.
        size, most = whole[self.dim], -(-whole[self.dim] // ranks)
        self.sizes = [max(0, min(most, size - rank * most)) for rank in range(ranks)]
        self.shapes = [[*whole[: self.dim], size, *whole[self.dim + 1 :]] for size in self.sizes]

    def numel(self, rank: int | None = None) -> int:
        """Elements of a rank's shard, or of the whole."""
        return sum(map(prod, self.shapes)) if rank is None else prod(self.shapes[rank])

    def shard(self) -> Tensor:
        """This rank's part of the gradient."""
        local = _local(self.parameter.grad)
        return local if local.ndim == 2 else local[self.place : self.place + 1]


def _matrices(tensor: Tensor, parts: int) -> list[Tensor]:
    """Views of the matrices of a parameter's shape."""
    stack = tensor.unsqueeze(0) if tensor.ndim == 2 else tensor
    return [half for one in stack for half in one.chunk(parts, dim=0 if tensor.ndim == 2 else 1)]


def _is_cut(parameter: Tensor) -> bool:
    """Whether ranks hold parts of matrices, not some of a stack each."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.shape[-1] == 1:
        return False
    return parameter.ndim == 2 or parameter.placements[-1] != Shard(0)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
