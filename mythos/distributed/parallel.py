"""Applies a layout to a model: activation checkpointing -> compilation -> DDP, FSDP2 or HSDP, in that order."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.layout import Layout, build_mesh, divided_experts
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.model.halting import HaltingGate
from mythos.model.layers import autocast_to, is_dtensor, local_part
from mythos.model.rdt import RDTOutput, RecurrentDepthTransformer
from mythos.torch_internals import no_buffer_sync, prepare_compiler


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast type that `train.dtype` names; auto is bfloat16 only if the hardware multiplies it natively.

    Other hardware emulates it: on an AVX2 core a bfloat16 matmul was 50 times slower than a float32 one.
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
    """A model that trains on all processes as one: called like the model, with gradients averaged over processes.

    `model` is the model itself, for everything but training steps. Under FSDP2 its forward passes are collective.
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
            # The only buffers are the routers' biases, which all ranks update alike.
            options: dict[str, Any] = dict(no_buffer_sync())
            self.ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **options)
        parameters = list(model.parameters())
        self.unsharded = [p for p in parameters if not is_dtensor(p)]
        self.shards = [p for p in parameters if is_dtensor(p)]
        # A gate is trained beside the model: its gradient must not change how much the model's is clipped.
        gate = model.halting
        self.gate_parameters: set[nn.Parameter] = set(gate.parameters()) if isinstance(gate, HaltingGate) else set()

    def __call__(self, *inputs: Any, **options: Any) -> RDTOutput:
        """The model's forward pass."""
        return (self.ddp or self.model)(*inputs, **options)

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """Run matmuls in the run's dtype."""
        return autocast_to(self.dtype, self.world.device)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward pass. Gradients are reduced in the last one."""
        if self.ddp is not None and not last:
            return self.ddp.no_sync()
        if self.layout.sharded:
            from mythos.distributed.sharding import reduce_gradients

            reduce_gradients(self.model, last or self.reduce_always, over_copies=last)
        return nullcontext()

    def finish_gradients(self) -> None:
        """Average the gradients that FSDP2 does not manage, in one all-reduce. Call it after the last micro-batch."""
        # A divided expert has the gradient of all ranks' tokens, but FSDP2 divides it only by the ranks that reduce it.
        holders = {"routed": self.layout.expert, "shared": self.layout.shared}
        divided = divided_experts(self.model, self.layout)
        for kind, gradient in zip(divided.values(), _gradients(divided), strict=True):
            local_part(gradient).div_(holders[kind])
        if self.layout.sharded:
            gradients = _gradients(self.unsharded)
            average = self.world.sum(torch.cat([g.flatten() for g in gradients])) / self.layout.size
            for gradient, part in zip(gradients, average.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        # The gate does not decide whether a step is skipped, so its weights must not become NaN for ever.
        for gradient in _gradients(self.gate_parameters):
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def reshard(self) -> None:
        """Free weights that FSDP2 kept gathered after a forward pass, so that parameters are shards again."""
        if self.layout.sharded:
            from mythos.distributed.sharding import reshard

            reshard(self.model)

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared 2-norm of the gradient: float64 scalar. The ranks' parts add up to it.

        A halting gate's gradient is not included.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for parameters, copies in ((self.shards, self.layout.replicate), (self.unsharded, self.layout.size)):
            gradients = _gradients(p for p in parameters if p not in self.gate_parameters)
            gradients = [local_part(g) for g in gradients]
            if gradients:
                total += get_total_norm(gradients).double().square() / copies
        return total


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Gradients of parameters, all of which must have one."""
    gradients = []
    for parameter in parameters:
        assert parameter.grad is not None, "every parameter takes part in every step"
        gradients.append(parameter.grad)
    return gradients


def parallelize(config: Config, model: RecurrentDepthTransformer, layout: Layout, world: World) -> ParallelModel:
    """Lay out a model on the meta device, allocate it and fill it with its starting values.

    The values are a function of (seed, parameter name), whatever the layout.
    """
    prepare_model(config, model, world.device, layout.expert)
    dtype = choose_dtype(config.train.dtype, world.device)
    if layout.sharded:
        from mythos.distributed.sharding import shard_model

        meshes = build_mesh(layout, world.device.type)
        world.add_groups(meshes.groups, config.parallel.start_timeout)
        shard_model(config.parallel, model, meshes, dtype)
    model.to_empty(device=world.device).initialize(config.run.seed)
    parallel = ParallelModel(model, layout, world, config.parallel, dtype)
    if parallel.ddp is not None:
        # DDP reorders its buckets after its first backward pass, and with three ranks or more the last bit of a sum
        # depends on its place in a bucket. Run that pass here, so that the first step after a restart rounds like the
        # same step of a run that was not interrupted.
        ids = torch.zeros(1, 3, dtype=torch.int64, device=world.device)
        with parallel.autocast, torch.compiler.set_stance("force_eager"):
            parallel(ids[:, :-1], ids[:, 1:], loops=1, backprop=1).objective.backward()
        model.zero_grad(set_to_none=True)
    return parallel


def choose_micro_batch(config: Config, parallel: ParallelModel) -> int:
    """train.micro_batch; auto: the largest number of rows whose deepest step fits in memory on every rank.

    auto tries a rank's whole batch first, then less. Raises MythosError for auto under FSDP, and if not one row fits.
    """
    world, layout, length = parallel.world, parallel.layout, config.data.sequence_length
    rows = config.train.global_batch // world.size
    if config.train.micro_batch != "auto":
        return min(config.train.micro_batch, rows)
    if layout.sharded:  # a rank that runs out of memory alone would leave the others waiting in a collective
        raise MythosError(
            f"train.micro_batch: got auto, and parallel.mode is {layout.mode}; auto is for single and ddp. Give "
            "a number: 1 needs the least memory"
        )

    def attempt(batch_size: int) -> int:
        ids = torch.zeros(batch_size, length + 1, dtype=torch.int64, device=world.device)
        with parallel.autocast:
            # The model itself, not DDP around it, which would all-reduce.
            output = parallel.model(ids[:, :-1], ids[:, 1:], loops=config.depth_maximum, backprop=config.depth_backprop)
        output.objective.backward()
        return batch_size

    def find() -> int:
        try:
            from accelerate.utils import find_executable_batch_size  # accelerate takes half a second to import

            return find_executable_batch_size(attempt, starting_batch_size=rows)()
        except RuntimeError as error:
            if "No executable batch size" not in str(error):
                raise
            raise MythosError(
                f"not one sequence of {length} tokens fits in memory: lower data.sequence_length, set "
                "parallel.activation_checkpointing=all, or share the model by parallel.mode=fsdp"
            ) from error

    fitting = world.ranks.agreed(find)
    parallel.model.zero_grad(set_to_none=True)
    return min(world.ranks.gather(fitting))


def prepare_model(config: Config, model: RecurrentDepthTransformer, device: torch.device, expert: int = 1) -> None:
    """Apply parallel.activation_checkpointing and train.compile, in that order.

    `expert` is the number of processes that share the experts.
    """
    recurrence = model.recurrence
    mode = config.parallel.activation_checkpointing
    recurrence.checkpointing = "loop" if mode == "all" else mode
    model.recompute_layers = mode == "all"
    if not compiles(config, device):
        return
    prepare_compiler()
    if expert > 1:
        looped = []  # a graph cannot contain an exchange, whose sizes are known only once tokens have been routed
    elif config.parallel.wrap == "block":
        # With a unit for each block FSDP2 adds hooks around the blocks, which cannot be inside a graph.
        looped = list(recurrence.blocks)
    else:
        looped = [recurrence]
    for part in (*model.prelude, *looped, *model.coda):
        part.compile()


def compiles(config: Config, device: torch.device) -> bool:
    """Whether train.compile means that the model is compiled on this device."""
    return device.type == "cuda" if config.train.compile == "auto" else config.train.compile
