"""The only module that uses torch's private interfaces, or public ones that differ between torch 2.11 and 2.14.

Every entry says why it is needed, and what happens in a version of torch without it. A public function replaces it once
all supported versions have one. All entries were run with torch 2.11.0, 2.13.0 and 2.14.1 (docs/status.md).
tests/test_torch_internals.py fails if another module uses a private name.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

P = ParamSpec("P")
T = TypeVar("T")

# FakeTensorMode runs a step on shapes alone, TorchDispatchMode sees every operator of a step, tree_leaves flattens an
# operator's results. torch documents all three but exports them from private modules only. No fallback: without them
# `import mythos.trainer` raises ImportError. A public export replaces them.


# Attention and matmuls


def sdpa_backend(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend:
    """The backend that scaled_dot_product_attention will choose for causal attention of these (B, H, S, K).

    Key and value may have fewer heads than the query. No public function answers this before the call. Fallback: MATH,
    so that callers pad as if no fused kernel took the widths.
    """
    choose, grouped = getattr(torch, "_fused_sdp_choice", None), query.shape[1] != key.shape[1]
    return SDPBackend(choose(query, key, value, is_causal=True, enable_gqa=grouped)) if choose else SDPBackend.MATH


ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's matmul as Inductor emits it: the only way to oneDNN in float32 from eager torch.

None if torch was built without oneDNN.
"""


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, K) times b (K, M), both float32 on the CPU -> (n, M), by oneDNN. No autograd. Fallback: torch.mm."""
    return torch.mm(a, b) if ONEDNN_LINEAR is None else ONEDNN_LINEAR(a, b.T, None, "none", [], "")


def softmax_backward(grad_out: Tensor, probabilities: Tensor) -> Tensor:
    """Gradient of the scores of a softmax over the last dimension, in the type of `probabilities`; any shape.

    This is the fused ATen kernel that autograd itself calls. The same formula in public operators allocates two more
    tensors of this size. No fallback: AttributeError.
    """
    return torch._softmax_backward_data(grad_out, probabilities, -1, probabilities.dtype)


# Operators whose FLOPs are counted, by name; they have no public alias. No fallback: importing this module raises
# AttributeError.
GROUPED_MM: Any = torch.ops.aten._grouped_mm
CPU_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FUSED_ATTENTION: tuple[Any, ...] = tuple(
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{direction}")
    for kernel in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    for direction in ("", "_backward")
)


def argument_names(operator: Any) -> list[str]:
    """Names of the parameters of an ATen operator's default overload, in order. No fallback: AttributeError."""
    return [argument.name for argument in operator.default._schema.arguments]


# Updates of many tensors in one kernel, with which torch.optim is written; no public function does this. No fallback.
foreach_copy_: Callable[..., None] = torch._foreach_copy_
foreach_div_: Callable[..., None] = torch._foreach_div_
foreach_lerp_: Callable[..., None] = torch._foreach_lerp_
foreach_mul_: Callable[..., None] = torch._foreach_mul_


def backward_pass_number() -> int:
    """A number for the backward pass that is running, different for every call of the engine; -1 outside of one.

    Public functions tell neither. No fallback: AttributeError.
    """
    return torch._C._current_graph_task_id()


def storage_address(tensor: Tensor) -> int:
    """A number that identifies a tensor's storage, unique while the storage is alive.

    The public `data_ptr` is 0 for every fake tensor and every empty one. No fallback: AttributeError.
    """
    return tensor.untyped_storage()._cdata


# Compilation


def compiler_counters() -> dict[str, Any]:
    """Dynamo's counters in this process, by group and name, such as `["stats"]["unique_graphs"]`; they can be cleared.

    torch documents no way to count graphs and graph breaks. No fallback: ImportError.
    """
    from torch._dynamo.utils import counters

    return counters


def constant_in_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that is called when a graph is traced, and whose result is a constant in the graph.

    The public `torch.compiler.assume_constant_result` sets the same attribute, but imports Dynamo first, which takes
    half a second at the start of every command. In a torch that ignores the attribute the function is traced.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_static(tensor: Tensor, dimensions: int | Sequence[int]) -> None:
    """Tell Dynamo that these dimensions of an input never change. No public name, no fallback: AttributeError."""
    torch._dynamo.mark_static(tensor, dimensions if isinstance(dimensions, int) else list(dimensions))


def allow_many_graphs() -> None:
    """Raise the number of graphs that a compiled function may have in this process from 8 to 128.

    Growing prefixes of rows, passes without gradient and validation each need some, and all blocks of prelude and coda
    share one limit.
    """
    config = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, 128)


def prepare_compiler() -> None:
    """Configure the compiler in a process that trains.

    Two of the settings have no public name. No fallback: AttributeError.
    """
    allow_many_graphs()
    # Past the limit torch would fall back to eager mode, with a log line at most.
    torch.compiler.config.fail_on_recompile_limit_hit = True
    # Under DDP torch would split graphs at the ends of its buckets, to send them early. But a loop's gradients are
    # complete only when the backward pass has reached its first pass, and graphs with flex attention cannot be split.
    torch._dynamo.config.optimize_ddp = False
    # Backward passes run without autocast. If they were traced under the forward pass's autocast, gradients that are
    # computed in float32 (of routers, of the injection) would be rounded to bfloat16.
    torch._functorch.config.backward_pass_autocast = "off"


class PlannedKernel(NamedTuple):
    """A kernel of a compiled graph."""

    extern: bool
    """True if it calls an operator (a matmul, attention, or one of ours), false if it fuses several operators."""
    operator: str
    """Name of the operator, or names of the fused operators."""
    size: int
    """Bytes read and written."""


def planning_backend(record: Callable[[bool, list[PlannedKernel]], None]) -> Callable[..., Any]:
    """Backend of torch.compile that plans a graph's kernels as Inductor does, but generates no code.

    `record(backward, kernels)` is called for each graph. Calls of the compiled function run the graphs operator by
    operator, so that fake tensors pass through. `compile_to_module`, the step of Inductor that follows the planning, is
    replaced meanwhile, because Inductor has no hook there. No fallback: ImportError or AttributeError.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    class Planned(Exception):
        pass

    def plan_kernels(lowering: Any) -> None:
        lowering.init_wrapper_code()
        lowering._update_scheduler()
        kernels = []
        for node in lowering.scheduler.nodes:
            size = int(node.get_read_write_buffers_sizes())
            if isinstance(node, ExternKernelSchedulerNode):
                if size:  # 0: one of several results of an operator
                    operator: Any = node.node
                    kernels.append(PlannedKernel(True, str(operator.python_kernel_name), size))
            elif not isinstance(node, NopKernelSchedulerNode):
                origins = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}
                kernels.append(PlannedKernel(False, ", ".join(sorted(origins)), size))
        record(bool(lowering.is_backward), kernels)
        raise Planned

    def plan_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        unplanned = copy.deepcopy(graph)  # planning changes the graph
        compile_to_module = GraphLowering.compile_to_module
        GraphLowering.compile_to_module = plan_kernels  # type: ignore[method-assign, assignment]
        try:
            compile_fx_inner(graph, inputs, **options)
        except Exception as error:
            # torch wraps exceptions that pass through it.
            if not any(isinstance(cause, Planned) for cause in _causes(error)):
                raise
        finally:
            GraphLowering.compile_to_module = compile_to_module  # type: ignore[method-assign]

        def run(arguments: list[Any]) -> Any:
            results = unplanned(*arguments)
            arguments.clear()  # frees memory, as Inductor's generated code does
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return partial(compile_fx, inner_compile=plan_graph)  # type: ignore[arg-type] # a private class as result


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)


# Processes


def set_timeout(group: dist.ProcessGroup | None, seconds: float) -> None:
    """Set the timeout of later collectives of a group (None: the default group).

    torch 2.14 has `dist.set_timeout` and warns of the private function, the only one in earlier versions.
    """
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(timedelta(seconds=seconds), group)


def no_buffer_sync() -> dict[str, bool]:
    """Options that keep DistributedDataParallel from broadcasting buffers in forward passes.

    torch 2.13 renamed `broadcast_buffers` to `forward_sync_buffers`, and warns of the old name.
    """
    parameters = signature(nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


def count_ddp_buckets(parameters: Sequence[Tensor], bucket_bytes: int) -> int:
    """Number of buckets that DDP packs the gradients of `parameters` into, in this order; meta tensors are allowed.

    Calls the function that DDP itself calls, with its smaller first bucket. No fallback: AttributeError.
    """
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_bytes]
    buckets, _ = dist._compute_bucket_assignment_by_size([p.detach() for p in parameters], limits)
    return len(buckets)


def mesh_placements(mesh: DeviceMesh) -> Callable[[Any], Any]:
    """How a `shard_placement_fn` of `fully_shard` tells that a parameter is sharded over another mesh than its unit.

    `mesh` is (shard,), or (replicate, shard). Returns a function from a parameter's placement to the result. Earlier
    versions than 2.13, in which all parameters of a unit share a mesh, raise AttributeError: see `has_mesh_placements`.
    This entry was run with torch 2.13.0 only.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

    # One object for all parameters, by whose identity torch groups them.
    info = fsdp.HSDPMeshInfo(mesh, 1, 0) if mesh.ndim == 2 else fsdp.FSDPMeshInfo(mesh, 0)
    return lambda placement: fsdp.ShardPlacementResult(placement, info)


def has_mesh_placements() -> bool:
    """Whether this version of torch has what `mesh_placements` needs.

    By version: plans ask, and importing FSDP2 to look takes half a second.
    """
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)


def interleaved_shard(dimension: int, parts: int) -> Any:
    """Placement of a tensor that is `parts` matrices side by side along a dimension, each cut evenly: (gate, up).

    torch uses it where FSDP2 and tensor parallelism cut one dimension. `distribute_tensor`, `redistribute` and
    `full_tensor` handle it; checkpoints and `Placement.is_shard` do not. No fallback: ImportError. This entry was run
    with torch 2.13.0 only.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dimension, split_factor=parts)


def interleaved_parts(placement: Any) -> int:
    """The `parts` of an :func:`interleaved_shard`; 1 for other placements."""
    return int(getattr(placement, "split_factor", 1))


def init_fake_processes(size: int) -> None:
    """Start a default process group as rank 0 of `size`, whose collectives do nothing.

    torch has this backend for its own tests only. No fallback: ImportError.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


# Checkpoints


def shard_file_name(shard_index: int) -> str:
    """Name of a rank's file in a checkpoint, as the reader of `dcp.HuggingFaceStorageWriter` expects it.

    The format has no public name. No fallback: ImportError.
    """
    from torch.distributed.checkpoint import _hf_utils as layout

    return layout._gen_file_name(1, 1, shard_index)


def shard_metadata(offsets: dict[str, Sequence[int]]) -> dict[str, str]:
    """Header of such a file: by tensor name, the offset of its shard in each dimension of the whole tensor.

    torch's own writer builds the file in memory twice; ours (`mythos.checkpoints.shards`) needs the format, which
    has no public name. No fallback: ImportError.
    """
    from torch.distributed.checkpoint import _hf_utils as layout

    shards = {name: {layout.SAVED_OFFSETS_KEY: offset} for name, offset in offsets.items()}
    return {
        layout.CUSTOM_METADATA_KEY: json.dumps(shards),
        layout.DCP_VERSION_KEY: str(layout.HF_DCP_VERSION),
        layout.FORMAT_KEY: layout.FORMAT_VALUE,
    }
