"""Lays a model out over the processes: activation checkpointing -> compilation -> DDP, FSDP2 or HSDP, in that order."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.model.halting import HaltingGate
from mythos.model.layers import autocast_to
from mythos.model.rdt import RDTOutput, RecurrentDepthTransformer
from mythos.torch_internals import no_buffer_sync, prepare_compiler


class Layout(NamedTuple):
    """How the processes share the model."""

    mode: Literal["single", "ddp", "fsdp", "hsdp"]
    replicate: int
    """Copies of the model."""
    shard: int
    """Processes that share a copy."""
    why: str
    """For people, in a few words."""
    fits: bool = True
    """Whether the plan of `parallel.mode: auto` fits in the device's memory; modes that are named are not planned."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards (FSDP2)."""
        return self.mode in ("fsdp", "hsdp")


def named_layout(settings: ParallelConfig, size: int, local_size: int) -> Layout:
    """What `parallel.mode` means for `size` processes, `local_size` of them on each machine; not for auto and several.

    `mythos.planning.layout.choose_layout` resolves auto. Raises MythosError for a mode that does not fit the number of
    processes.
    """
    mode = settings.mode
    if mode == "single" and size > 1:
        raise MythosError(
            f"parallel.mode: got single and {size} processes, each of which would train alone: start one process, or "
            "set parallel.mode to auto, ddp, fsdp or hsdp"
        )
    if size == 1:
        return Layout("single", 1, 1, "one process")
    if mode == "hsdp":
        shard = settings.shard or (size // settings.replicate if settings.replicate else local_size)
        replicate = settings.replicate or size // shard
        if replicate * shard != size:
            raise MythosError(
                f"parallel.replicate, parallel.shard: {replicate} x {shard} is not the {size} processes: give numbers "
                "whose product is, or only one of them"
            )
        return Layout("hsdp", replicate, shard, f"{replicate} copies, each over {shard} processes")
    return Layout("ddp", size, 1, "a copy each") if mode == "ddp" else Layout("fsdp", 1, size, "one copy over all")


def memory_of_device(world: World) -> int:
    """Bytes that a process can use: its GPU's, or its share of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return psutil.virtual_memory().total // world.local_size


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast type that `train.dtype` names; auto is bfloat16 only where the hardware multiplies it natively.

    Elsewhere it is emulated: on an AVX2 core a bfloat16 product ran 50 times slower than a float32 one.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


class ParallelModel:
    """A model that trains on all processes as one: called like it, with gradients averaged over the processes.

    `model` is the model itself, for everything but training steps; under FSDP2 its forward passes are collective.
    """

    def __init__(
        self,
        model: RecurrentDepthTransformer,
        layout: Layout,
        world: World,
        config: ParallelConfig,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.layout = layout
        self.world = world
        self.dtype = dtype
        self.reduce_always = config.reduce == "micro_batch"
        self.ddp: DistributedDataParallel | None = None
        if layout.mode == "ddp":
            ids = [world.device.index] if world.device.type == "cuda" else None
            # Buffers are the router's biases, which all ranks move alike.
            self.ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **no_buffer_sync())
        parameters = list(model.parameters())
        self.shards = [p for p in parameters if isinstance(p, DTensor)]
        self.wholes = [p for p in parameters if not isinstance(p, DTensor)]
        # A gate is trained beside the model: its gradient may not change how much the model's is clipped.
        self.beside = set(model.halting.parameters()) if isinstance(model.halting, HaltingGate) else set()

    def __call__(self, *inputs: Any, **options: Any) -> RDTOutput:
        """The model's forward pass."""
        return (self.ddp or self.model)(*inputs, **options)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """Matrix products in the run's dtype."""
        return autocast_to(self.dtype, self.world.device)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward pass of a micro-batch; gradients are reduced in the last one."""
        if self.ddp is not None and not last:
            return self.ddp.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.reduce_always)
            self.model.set_requires_all_reduce(last)
        return nullcontext()

    def finish_gradients(self) -> None:
        """Average what FSDP2 does not manage, in one all-reduce; to be called after the last micro-batch."""
        if self.layout.sharded:
            gradients = [p.grad for p in self.wholes]
            average = self.world.sum(torch.cat([g.flatten() for g in gradients])) / self.layout.size
            for gradient, part in zip(gradients, average.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        # What is trained beside the model has no say in whether a step is skipped, and must not become NaN for ever.
        for parameter in self.beside:
            parameter.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def reshard(self) -> None:
        """Free what FSDP2 has kept gathered after a forward pass, so that the parameters are the shards again."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared 2-norm of the gradient: float64 scalar; the ranks' parts add up to it.

        A halting gate is left out.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for parameters, copies in ((self.shards, self.layout.replicate), (self.wholes, self.layout.size)):
            of_model = [p.grad for p in parameters if p not in self.beside]
            gradients = [g.to_local() if isinstance(g, DTensor) else g for g in of_model]
            if gradients:
                total += get_total_norm(gradients).double().square() / copies
        return total


def parallelize(config: Config, model: RecurrentDepthTransformer, layout: Layout, world: World) -> ParallelModel:
    """Turn a model on the meta device into one that trains: laid out, on the device, at its starting values.

    The values are a function of (seed, parameter name), whatever the layout.
    """
    prepare_model(config, model, world.device)
    dtype = choose_dtype(config.train.dtype, world.device)
    if layout.sharded:
        mesh = build_mesh(layout, world.device.type)
        world.add_groups([mesh.get_group(dimension) for dimension in range(mesh.ndim)], config.parallel.start_timeout)
        shard_model(config.parallel, model, mesh, dtype)
    model.to_empty(device=world.device).initialize(config.run.seed)
    parallel = ParallelModel(model, layout, world, config.parallel, dtype)
    if parallel.ddp is not None:
        # DDP orders its buckets anew after its first backward pass, and with three ranks or more the last bit of a sum
        # depends on its place: done here, the first step after a restart rounds like that of a run that went on.
        ids = torch.zeros(1, 3, dtype=torch.int64, device=world.device)
        with parallel.autocast, torch.compiler.set_stance("force_eager"):
            parallel(ids[:, :-1], ids[:, 1:], loops=1, backprop=1).objective.backward()
        model.zero_grad(set_to_none=True)
    return parallel


def choose_micro_batch(config: Config, parallel: ParallelModel) -> int:
    """train.micro_batch, or the most rows, tried from all of them down, whose deepest step fits on every rank.

    Raises MythosError for auto under FSDP, and where not one row fits.
    """
    world, layout, length = parallel.world, parallel.layout, config.data.sequence_length
    rows = config.train.global_batch // world.size
    if config.train.micro_batch != "auto":
        return min(config.train.micro_batch, rows)
    if layout.sharded:  # a rank that runs out of memory alone would leave the others in a collective
        raise MythosError(
            f"train.micro_batch: got auto, and parallel.mode is {layout.mode}; auto is for single and ddp. Give "
            "a number: 1 needs the least memory"
        )

    def attempt(batch_size: int) -> int:
        ids = torch.zeros(batch_size, length + 1, dtype=torch.int64, device=world.device)
        with parallel.autocast:
            # The model itself, not DDP around it: nothing is exchanged.
            output = parallel.model(ids[:, :-1], ids[:, 1:], loops=config.depth_maximum, backprop=config.depth_backprop)
        output.objective.backward()
        return batch_size

    def find() -> int:
        try:
            return find_executable_batch_size(attempt, starting_batch_size=rows)()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise MythosError(
                f"not one sequence of {length} tokens fits in memory: lower data.sequence_length, set "
                "parallel.activation_checkpointing=loop, or share the model by parallel.mode=fsdp"
            ) from error

    fitting = world.ranks.agreed(find)
    parallel.model.zero_grad(set_to_none=True)
    return min(world.ranks.gather(fitting))


def prepare_model(config: Config, model: RecurrentDepthTransformer, device: torch.device) -> None:
    """Apply parallel.activation_checkpointing and train.compile, in that order."""
    recurrence = model.recurrence
    recurrence.checkpointing = config.parallel.activation_checkpointing
    if not compiles(config, device):
        return
    prepare_compiler()
    # FSDP2 that gathers every block for itself has hooks around them, which no graph can hold.
    looped = list(recurrence.blocks) if config.parallel.wrap == "block" else [recurrence]
    for part in (*model.prelude, *looped, *model.coda):
        part.compile()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether train.compile means that the model is compiled on this device."""
    return device.type == "cuda" if config.train.compile == "auto" else config.train.compile


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The processes in one row, or in replicate rows of shard; expert parallelism would add a dimension here."""
    if layout.mode == "hsdp":
        return init_device_mesh(device_type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (layout.size,), mesh_dim_names=("shard",))


class FsdpUnit(NamedTuple):
    """A module whose parameters FSDP2 gathers and reduces together."""

    module: nn.Module
    parameters: list[nn.Parameter]
    """Those that no unit inside of the module has, without what stays whole."""
    policy: MixedPrecisionPolicy
    reshard: bool
    """Free the gathered weights after the forward pass."""


def fsdp_units(settings: ParallelConfig, model: RecurrentDepthTransformer, dtype: torch.dtype) -> Iterator[FsdpUnit]:
    """The units that the model is sharded in, from the inside out: blocks, injection, the core as a whole, the rest.

    The unit of the core is the module that owns the loop: it is gathered once before the first loop and reduced once
    after the last, however many there are. Parameters are gathered in `dtype` and gradients reduced in float32. What is
    never computed with in bfloat16 is small and stays whole on every rank (see `ParallelModel.finish_gradients`), but
    for the injection's matrix, which is a unit of its own.
    """
    taken = set(float32_parameters(model))
    mixed = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    recurrence, reshard = model.recurrence, settings.reshard_after_forward
    # A gate reads out twice in steps that vary; the backward pass begins with the coda anyway.
    twice = isinstance(model.halting, HaltingGate)
    modules: list[tuple[nn.Module, MixedPrecisionPolicy, bool]] = [(block, mixed, reshard) for block in model.prelude]
    if recurrence.injection is not None:
        # Its result may be the matrix itself, which the loops then use: it stays until the backward pass is over.
        modules.append((recurrence.injection, MixedPrecisionPolicy(cast_forward_inputs=False), False))
    if settings.wrap == "block":
        modules += [(block, mixed, reshard) for block in recurrence.blocks]
    modules.append((recurrence, mixed, reshard))
    modules += [(block, mixed, reshard and not twice) for block in model.coda]
    # Its parameters (embedding, head) are used at both ends of the forward pass, and by what follows it at once.
    modules.append((model, mixed, False))
    whole = frozenset(taken)  # taken grows
    for module, policy, frees in modules:
        if module is model or any(p not in whole for p in module.parameters()):
            own = [p for p in module.parameters() if p not in taken]
            taken.update(own)
            yield FsdpUnit(module, own, policy, frees)


def shard_model(
    settings: ParallelConfig, model: RecurrentDepthTransformer, mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Apply `fully_shard` to the units of :func:`fsdp_units`."""
    common: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": set(float32_parameters(model)),
        "shard_placement_fn": partial(shard_placement, shards=mesh.size(mesh.ndim - 1)),
    }
    if settings.wrap == "block":
        model.recurrence.share_weights = False
    # As a list: fully_shard replaces the parameters that the units are told apart by.
    for unit in list(fsdp_units(settings, model, dtype)):
        fully_shard(unit.module, mp_policy=unit.policy, reshard_after_forward=unit.reshard, **common)
    for module, method in ((model, "read_depths"), (model, "extend"), (model.recurrence, "extend")):
        register_fsdp_forward_method(module, method)


def shard_placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """The dimension to cut: the first that divides evenly; None = the first of all, padded to a multiple.

    64 experts on 1,024 ranks, cut along the first dimension, would be stored and sent 16 times over.
    """
    dimension = next((d for d, size in enumerate(parameter.shape) if size % shards == 0), 0)
    return Shard(dimension) if dimension else None


def shard_numel(parameter: nn.Parameter, shards: int) -> int:
    """Elements of the largest of a parameter's shards, to which FSDP2 pads the others; rank 0 has it."""
    placement = shard_placement(parameter, shards)
    shape = list(parameter.shape)
    dimension = 0 if placement is None else placement.dim
    shape[dimension] = -(-shape[dimension] // shards)
    return prod(shape)


def float32_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """What modules declare as `float32`: norms, routers, decay and step size of the injection, per-loop scales."""
    for module in model.modules():
        names: Iterable[str] = getattr(module, "float32", ())
        for name in names:
            yield getattr(module, name)
