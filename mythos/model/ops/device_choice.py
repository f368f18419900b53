"""Which kernel runs attention and matmuls on which device: CPUs, and GPUs of SM80, SM90 and SM100.

All of these choices are made in this file. SM80 is the A100, SM90 the H100 and H200, SM100 the B200; for torch 2.13
with CUDA 13 and cuDNN 9.20, in bfloat16:

=====================  ====================  =====================  ==========================  =============
operation              CPU                   SM80                   SM90                        SM100
=====================  ====================  =====================  ==========================  =============
causal attention       batched matmuls;      SDPA, flash 2          SDPA, cuDNN                 as SM90
                       SDPA, flash, if long
... with values of     unpadded; padded      zero-padded (flash 2)  unpadded if cuDNN takes     as SM90
another width          for flash                                    them, else padded
documents              SDPA with a mask of   flex, compiled by      as SM80                     as SM80
                       S x S                 Triton, by blocks
experts                a loop of matmuls     `grouped_mm`, a loop   `grouped_mm`, one kernel    as SM90
                                             in torch: waits
float32 matmuls        MKL; oneDNN on AMD    cuBLAS                 cuBLAS                      cuBLAS
                       with AVX-512
=====================  ====================  =====================  ==========================  =============

Reasons and limits (file names are torch's):

- SDPA takes the first backend in order whose conditions hold (`sdp_utils.cpp`). The order is flash, memory-efficient,
  math; on SM90 and SM100 cuDNN comes first if it is newer than 9.15. Flash requires float16 or bfloat16 (CPUs: any
  type), no mask on a GPU, and query, key and value of equal width, on GPUs at most 256. cuDNN requires widths that are
  multiples of 8, at most 128; or keys of 192 with values of 128, as in latent attention of the larger presets, but not
  both of 192 (github.com/NVIDIA/cudnn-frontend/issues/242, github.com/pytorch/pytorch/pull/172621). Both accept fewer
  key heads than query heads. Float32 on a GPU gets the memory-efficient kernel. Math stores all S x S scores. So values
  are padded with zeros to the width of keys, or keys to that of values, unless torch reports that flash or cuDNN takes
  them unpadded.
- A mask rules flash out and makes attention 1.3 to 9 times as slow on SM100
  (github.com/unslothai/unsloth/pull/11102). So documents go to flex attention, which skips blocks of 128 x 128 that are
  wholly masked. It must be compiled, or it stores all scores. It takes any width from 16 on, which it rounds up to a
  power of two internally, and has no backward pass on CPUs. Its flash backend needs another package (flash-attn-4).
  `varlen_attn` skips other documents as well, but is flash: neither float32 nor values of another width.
- `F.grouped_mm` is one kernel, which reads the ends of the groups on the device, for bfloat16 on SM90 and SM100
  (`GroupedBlas.cpp`). Elsewhere (SM80, SM120, and float32 anywhere) torch copies the ends to the host and loops over
  the groups (`GroupedMMUtils.h`): correct, but every matmul waits for the device. No kernel without the wait is planned
  for SM80 (github.com/pytorch/pytorch/issues/186620). Rows must be multiples of 16 bytes, hence widths of 8.
- Flash on a CPU without AMX multiplies bfloat16 at the rate of float32. Batched matmuls by oneDNN are 2.5 times as
  fast at 256 and 512 positions, and as fast at 4,096; in float32 1.3 times at 256, and as fast at 1,024.
- torch's float32 matmuls go to MKL, which on AMD's processors does not use AVX-512: 107 GFLOP/s on a core of Zen 5,
  where oneDNN reaches 180 to 250. torch calls oneDNN for float32 only through operators that its compiler emits;
  `mkldnn::_linear_pointwise` is one. It obeys `torch.backends.mkldnn`. Compiled blocks are left to the compiler.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from mythos.torch_internals import allow_many_graphs, constant_in_graphs, sdpa_backend

PRODUCTS_UP_TO = {torch.float32: 1024, torch.bfloat16: 4096}
"""Longest sequence, by type, for which batched matmuls are faster than SDPA in causal attention on a CPU."""
TOKEN_BYTES = 2**23
"""Largest size of one token's expert matrices that a compiled graph multiplies by its own code on a CPU."""

_simulating_gpu = False
_call_fused: Callable[..., Any] | None = None


@contextmanager
def simulated_gpu(call_fused: Callable[..., Any] | None = None) -> Iterator[None]:
    """Choose attention, float32 matmuls and sizes of logits for CPU tensors as if they were on a GPU.

    `mythos.planning` traces a GPU's step with fake CPU tensors, because torch without CUDA cannot run a backward pass
    over fake CUDA tensors. `call_fused(function, *arguments)` replaces the call of every function that a GPU fuses.
    """
    global _simulating_gpu, _call_fused
    before = _simulating_gpu, _call_fused
    _simulating_gpu, _call_fused = True, call_fused
    try:
        yield
    finally:
        _simulating_gpu, _call_fused = before


def device_type(device: torch.device) -> str:
    """The device's type; "cuda" for every device inside `simulated_gpu`."""
    return "cuda" if _simulating_gpu else device.type


def masks_documents_by_blocks(device: torch.device) -> bool:
    """Whether documents are separated by a block mask for flex attention, rather than a boolean mask for SDPA."""
    return device.type == "cuda"


def flex(device: torch.device) -> Callable[..., Tensor]:
    """Flex attention for a device: compiled on GPUs, unless the caller is being compiled itself.

    Once called, it raises torch._dynamo.exc.FailOnRecompileLimitHit instead of running uncompiled, which would store
    all S x S scores.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return _compiled_flex_attention()
    uncompiled: Callable[..., Tensor] = flex_attention
    return uncompiled


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # With dynamic sizes a model needs 4 graphs: for one row or more, with gradients or without. Sequences of one block
    # need 4 more, and a first number of rows that equals the number of heads, which Dynamo then unifies, 2 more.
    allow_many_graphs()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)  # a whole graph makes the limit an error


def fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """An elementwise function for a device: compiled to one kernel on a GPU, unchanged elsewhere."""
    if _call_fused is not None:
        return partial(_call_fused, function)
    return _compiled(function) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    allow_many_graphs()
    return torch.compile(function, fullgraph=True)


@constant_in_graphs  # evaluated when a block is compiled, not in its graph
def takes_widths(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int) -> bool:
    """Whether SDPA trains by flash or cuDNN with keys `dim` and values `value_dim` wide; if not, one is padded."""
    return _sdpa_backend(device, dtype, dim, value_dim) in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


@cache
def _sdpa_backend(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int) -> SDPBackend:
    with torch.enable_grad():
        key, value = (
            torch.empty(1, 1, 128, width, device=device, dtype=dtype, requires_grad=True) for width in (dim, value_dim)
        )
        return sdpa_backend(key, key, value)


def causal_by_products(device: torch.device, dtype: torch.dtype, length: int) -> bool:
    """Whether causal attention runs as batched matmuls (`causal_attention`) rather than by SDPA."""
    return device_type(device) == "cpu" and length <= _longest_by_products(dtype)


@constant_in_graphs
def _longest_by_products(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bfloat16 and _cpu().get("amx_bf16") else PRODUCTS_UP_TO.get(dtype, 0)


def float32_by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls call oneDNN directly rather than the BLAS that torch calls."""
    return (
        device_type(device) == "cpu"
        and dtype == torch.float32
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
        and bool(_cpu().get("avx512_f"))
        and str(_cpu().get("cpu_name")).startswith("AMD")
    )


@cache
def _cpu() -> dict[str, Any]:
    return dict(torch.cpu.get_capabilities())


def reads_in_graph(device: torch.device, size: int) -> bool:
    """Whether compiled code multiplies a token by its experts' matrices, of `size` bytes, in place and without a BLAS.

    On a CPU the compiler's code reads them by columns: 2 times as fast as BLAS calls at 0.8 MB, 1.3 times at 7 MB, a
    fifth as fast at 50 MB.
    """
    return device.type == "cpu" and size <= TOKEN_BYTES


def groups_on_device(device: torch.device) -> bool:
    """Whether grouped matmuls run by `F.grouped_mm`. On CPUs a loop over the groups is 2 to 3 times as fast."""
    return device.type != "cpu"
