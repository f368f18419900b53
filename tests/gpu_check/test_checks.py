"""The checks detect faults and report them."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from mythos.gpu_check import kernels, ranks, stage, steps, traces, training
from mythos.gpu_check.catalog import STAGES, Task
from mythos.gpu_check.result import Result, Setting
from mythos.gpu_check.traces import Span
from mythos.model import layers, loss
from mythos.model.attention import context as attention
from mythos.model.ops import grouped_experts


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(torch.device("cpu"), tmp_path, time.time() + 600)


def results(setting: Setting, task: Task) -> list[Result]:
    return list(stage.results(setting, task))


def kernel_task(part: str, dtype: str) -> Task:
    tasks = next(stage.tasks for stage in STAGES if stage.name == "kernels")
    return next(task for task in tasks if part in task.checks[0].name and task.checks[0].name.endswith(dtype))


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.05


WRONG = {
    "too large": lambda output: output * 1.05,
    "gradient too large": Scaled.apply,
    "not a number": lambda output: output * float("nan"),
    "rows swapped": lambda output: output.flip(0) if output.dim() else output * 2,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("part", "module", "name"),
    [
        ("causal, gqa", attention, "attend"),
        ("documents, mla", attention, "attend"),
        ("routed experts", grouped_experts, "run_experts"),
        ("gated", layers, "gated"),
        ("rotary", layers, "apply_rope"),
        ("cross-entropy", loss, "summed_cross_entropy"),
    ],
)
def test_a_wrong_kernel_is_off(setting, monkeypatch, part, module, name, dtype):
    task = kernel_task(part, dtype)
    assert {result.verdict for result in results(setting, task)} == {"ok"}
    right = getattr(module, name)
    for what, change in WRONG.items():
        monkeypatch.setattr(module, name, lambda *args, change=change: change(right(*args)))
        found = [*results(setting, task)]
        assert {result.verdict for result in found} == {"off"}, (what, found)


@pytest.mark.parametrize("name", ["grouped_product", "grouped_outer"])
def test_a_wrong_grouped_product_is_off(setting, monkeypatch, name):
    task = kernel_task("grouped_product", "float32")
    assert [result.verdict for result in results(setting, task)] == ["ok", "ok"]
    right = getattr(grouped_experts, name)
    monkeypatch.setattr(grouped_experts, name, lambda *args: right(*args) * 1.01)
    assert [result.verdict for result in results(setting, task)].count("off") == 1
    # The gradient of an empty expert must be zero, not uninitialised memory.
    if name == "grouped_outer":
        monkeypatch.setattr(grouped_experts, name, lambda *args: right(*args) + 1e-6)
        assert "empty experts are not zero" in results(setting, task)[1].measured


def test_group_sizes_are_empty_tiny_and_large():
    for rows in (24, 1024):
        sizes = kernels.group_sizes(rows)
        assert sum(sizes) == rows and sizes.count(0) == 3 and {1, 3, 17} <= set(sizes)


def test_losses_that_drift_are_off():
    curve = [3 - 0.01 * step for step in range(40)]
    assert training.close(curve, curve, 1e-3, 0.03).verdict == "ok"
    assert training.close([loss * 1.002 for loss in curve], curve, 1e-3, 0.03).verdict == "off"
    late = curve[:30] + [loss * 1.1 for loss in curve[30:]]
    assert training.close(late, curve, 1e-3, 0.03).verdict == "off"
    assert training.close(curve[:30] + [loss * 1.01 for loss in curve[30:]], curve, 1e-3, 0.03).verdict == "ok"
    assert training.close(curve[:-1], curve, 1e-3, 0.03).verdict == "off"
    assert training.close([*curve[:-1], float("nan")], curve, 1e-3, 0.03).verdict == "off"
    assert training.close([*curve[:-1], None], curve, 1e-3, 0.03).verdict == "off"


def test_where_a_step_waits_is_named():
    try:
        layers.rope_table(4, 3, 10.0, "nowhere")
    except RuntimeError as error:
        place, by_experts = steps.where(error)
    assert place.startswith("mythos/model/layers.py:") and not by_experts
    x = torch.ones(2, 4)
    try:
        grouped_experts.grouped_product(x, torch.ones(2, 3, 4), torch.tensor([1, 2]).int())
    except RuntimeError as error:
        place, by_experts = steps.where(error)
    assert "mythos/model/" in place and by_experts


def test_several_gpus_are_needed_for_several_ranks(setting, monkeypatch):
    cuda = Setting(torch.device("cuda", 0), setting.out, setting.deadline)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks.size_of(cuda) == 1 and ranks.size_of(setting) == 2
    for check in (ranks.gathers, ranks.overlap):
        assert list(check(cuda)) == [Result("not run", "one GPU")]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert ranks.size_of(cuda) == 4


# --- traces


def test_shares_of_kernels():
    spans = [
        Span("sm90_xmma_gemm_bf16", 0, 40),
        Span("flash_fwd_kernel", 40, 60),
        Span("vectorized_elementwise_kernel", 70, 80),
        Span("vectorized_elementwise_kernel", 90, 100),
    ]
    assert traces.shares(spans) == pytest.approx({"products": 0.4, "attention": 0.2, "others": 0.2, "gaps": 0.2})


def test_overlap_of_communication():
    spans = [
        Span("ncclDevKernel_AllGather", 0, 10),
        Span("ncclDevKernel_ReduceScatter", 20, 30),
        Span("gemm", 5, 12),
        Span("gemm", 11, 22),
        Span("elementwise", 40, 50),
    ]
    assert traces.overlap(spans) == (20, 7)
    assert traces.overlap(spans[2:]) == (0, 0)


def test_kernels_of_a_trace():
    def event(name: str, device: DeviceType, **more: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=1, end=2), **more)

    events = [
        event("aten::mm", DeviceType.CPU),
        event("gemm", DeviceType.CUDA, is_user_annotation=False),
        event("Optimizer.step", DeviceType.CUDA, is_user_annotation=True),
        event("ProfilerStep#2", DeviceType.CUDA),
    ]
    assert traces.kernels(events) == [Span("gemm", 1, 2)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "products"),
        (
            "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape",
            "products",
        ),
        ("triton_tem_fused_mm_3", "products"),
        ("aten::addmm", "products"),
        ("mythos::grouped_product", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel", "attention"),
        ("triton_tem_fused_flex_attention_backward_1", "attention"),
        ("triton_poi_fused__to_copy_mm_silu_4", "others"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>", "others"),
        ("Memcpy HtoD (Pinned -> Device)", "others"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert traces.kind(name) == kind
