"""The only place that uses torch's private interfaces, or public ones that differ between torch 2.11 and 2.14.

Every entry gives the reason for it and what happens on a version without it. All of them were run with torch 2.11.0,
2.13.0 and 2.14.1 (docs/status.md). tests/test_torch_internals.py fails if another module uses a private name of torch.
"""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves

# FakeTensorMode runs a step on shapes alone, TorchDispatchMode sees every operator of a step, tree_leaves flattens what
# an operator returns. torch documents all three but exports them from private modules only. No fallback: without them
# `import mythos.trainer` raises ImportError.


# Attention and matrix products


def sdpa_backend(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend:
    """The backend that scaled_dot_product_attention will choose for causal attention of these (B, H, S, d).

    Key and value may have fewer heads than the query. No public function tells before the call. Fallback: MATH, so that
    callers pad as if no fused kernel took the widths.
    """
    choose, fewer = getattr(torch, "_fused_sdp_choice", None), query.shape[1] != key.shape[1]
    return SDPBackend(choose(query, key, value, is_causal=True, enable_gqa=fewer)) if choose else SDPBackend.MATH


ONEDNN_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""Matrix product by oneDNN, which torch's compiler emits: eager torch has no other way to oneDNN in float32.

None where torch was built without oneDNN.
"""


def onednn_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (n, K) times b (K, M), both float32 on the CPU -> (n, M), by oneDNN. No autograd. Fallback: torch.mm."""
    return torch.mm(a, b) if ONEDNN_LINEAR is None else ONEDNN_LINEAR(a, b.T, None, "none", [], "")


def softmax_backward(grad_out: Tensor, probabilities: Tensor) -> Tensor:
    """Gradient of the scores of a softmax over the last dimension, in the type of `probabilities`; any shape.

    The fused ATen kernel that autograd itself calls; the formula in public operators makes two more tensors of this
    size. No fallback: it raises AttributeError.
    """
    return torch._softmax_backward_data(grad_out, probabilities, -1, probabilities.dtype)


# Operators by name, to count FLOPs of; they have no public alias. No fallback: importing this module raises
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


def raw_flop_formula(count: Callable[..., int]) -> Callable[..., int]:
    """A formula for FlopCounterMode's `custom_mapping` that gets an operator's arguments instead of their shapes.

    The public `register_flop_formula(..., get_raw=True)` changes the counts of the whole process. Without this marker a
    formula gets shapes, and fails on them.
    """

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count(*args, **kwargs)

    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


# Several tensors in one kernel. torch.optim is written with these; no public function does the same. No fallback.
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
    """A number for a tensor's storage, unique while it lives.

    The public `data_ptr` is 0 for all fake tensors and all empty ones. No fallback: AttributeError.
    """
    return tensor.untyped_storage()._cdata


# Compilation


def compiler_counters() -> dict[str, Any]:
    """The compiler's counts in this process, by group and name, for instance `["stats"]["unique_graphs"]`; clearable.

    torch documents no way to count graphs and graph breaks. No fallback: ImportError.
    """
    from torch._dynamo.utils import counters

    return counters


def mark_static(tensor: Tensor, dimensions: int | Sequence[int]) -> None:
    """Tell the compiler that these dimensions of an input never change. No public name, no fallback: AttributeError."""
    torch._dynamo.mark_static(tensor, dimensions if isinstance(dimensions, int) else list(dimensions))


def allow_many_graphs() -> None:
    """Let a compiled function have up to 128 graphs in this process, where torch allows 8.

    Growing prefixes of rows, passes without gradient and validation each take some, and all blocks of prelude and coda
    share one limit.
    """
    config = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, 128)


def prepare_compiler() -> None:
    """Set what the compiler does in a process that trains.

    Two of the settings have no public name. No fallback: AttributeError.
    """
    allow_many_graphs()
    # Past the limit torch would run the function operation by operation, and say so in a log line at most.
    torch.compiler.config.fail_on_recompile_limit_hit = True
    # Under DDP torch would cut graphs where its buckets end, so that these are sent early. But a loop's gradients are
    # complete only after its first pass, and graphs that hold attention to documents cannot be cut.
    torch._dynamo.config.optimize_ddp = False
    # Backward passes run without autocast. Traced under the forward pass's autocast, gradients that are formed in
    # float32 (of routers, of the injection) would be rounded to bfloat16.
    torch._functorch.config.backward_pass_autocast = "off"


class PlannedKernel(NamedTuple):
    """A kernel of a compiled graph."""

    extern: bool
    """A call of an operator: a matrix product, attention, or one of ours. Otherwise fused out of several operations."""
    operator: str
    """Name of the operator; of a fused kernel, the operations in it."""
    size: int
    """Bytes that it reads and writes."""


def planning_backend(record: Callable[[bool, list[PlannedKernel]], None]) -> Callable[..., Any]:
    """Backend of torch.compile that plans the kernels of a graph as Inductor does, and writes and builds none.

    `record` is given each graph's kernels, and whether it is a backward pass. Calls run the graphs operation by
    operation, so that fake tensors can pass through. It replaces the step of Inductor that follows the planning, which
    has no hook. No fallback: it raises ImportError or AttributeError.
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
                    kernels.append(PlannedKernel(True, str(node.node.python_kernel_name), size))
            elif not isinstance(node, NopKernelSchedulerNode):
                origins = {str(origin.target) for part in node.get_nodes() for origin in part.node.get_origins()}
                kernels.append(PlannedKernel(False, ", ".join(sorted(origins)), size))
        record(bool(lowering.is_backward), kernels)
        raise Planned

    def plan_graph(graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        runs = copy.deepcopy(graph)  # planning changes it
        with patch.object(GraphLowering, "compile_to_module", plan_kernels):
            try:
                compile_fx_inner(graph, inputs, **options)
            except Exception as error:
                # torch wraps what passes through it.
                if not any(isinstance(cause, Planned) for cause in _causes(error)):
                    raise

        def run(arguments: list[Any]) -> Any:
            results = runs(*arguments)
            arguments.clear()  # as the compiler's own code does, so that memory is freed
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return partial(compile_fx, inner_compile=plan_graph)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or getattr(error, "inner_exception", None)


# Processes


def set_timeout(group: dist.ProcessGroup | None, seconds: float) -> None:
    """Let later collectives of a group (None: the default one) fail after so many seconds.

    torch 2.14 has `dist.set_timeout` and warns of the private function, the only one before it.
    """
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(timedelta(seconds=seconds), group)


def no_buffer_sync() -> dict[str, bool]:
    """Options of DistributedDataParallel so that forward passes do not broadcast buffers.

    torch 2.13 renamed `broadcast_buffers` to `forward_sync_buffers`, and warns of the old name.
    """
    known = signature(nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


def count_ddp_buckets(parameters: Sequence[Tensor], bucket_bytes: int) -> int:
    """How many buckets DDP packs the gradients of `parameters` into, in this order; tensors may be on the meta device.

    The function that DDP itself calls, with its smaller first bucket. No fallback: AttributeError.
    """
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, bucket_bytes]
    buckets, _ = dist._compute_bucket_assignment_by_size([p.detach() for p in parameters], limits)
    return len(buckets)


def fsdp_param_groups(module: nn.Module) -> list[Any]:
    """The FSDPParamGroups of a module that `fully_shard` was applied to; only they know the padded sizes of shards.

    Read of a group: mp_policy, mesh_info, post_forward_mesh_info, fsdp_params. torch 2.11 has one group a module or
    none; later versions have a list.
    """
    state = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []


def init_fake_processes(size: int) -> None:
    """Start a default process group of `size` ranks, this one being 0, whose collectives do nothing.

    torch has the backend for its own tests only. No fallback: ImportError.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())


# Checkpoints


def shard_file_name(shard_index: int) -> str:
    """Name of a rank's file in a checkpoint of `dcp.HuggingFaceStorageWriter`, as its reader expects it."""
    from torch.distributed.checkpoint import _hf_utils as layout

    return layout._gen_file_name(1, 1, shard_index)


def shard_metadata(offsets: dict[str, Sequence[int]]) -> dict[str, str]:
    """Header of such a file: where in the whole tensors its shards begin, by tensor name, one offset a dimension.

    torch's own writer builds files in memory, twice; ours (`mythos.checkpoints.checkpoint`) needs the format, which
    has no public name. No fallback: ImportError.
    """
    from torch.distributed.checkpoint import _hf_utils as layout

    places = {name: {layout.SAVED_OFFSETS_KEY: place} for name, place in offsets.items()}
    return {
        layout.CUSTOM_METADATA_KEY: json.dumps(places),
        layout.DCP_VERSION_KEY: str(layout.HF_DCP_VERSION),
        layout.FORMAT_KEY: layout.FORMAT_VALUE,
    }
