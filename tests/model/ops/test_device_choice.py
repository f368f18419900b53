"""Kernel choices: what torch is asked for on each device, and that it takes it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from mythos.model.attention.context import document_block_mask, document_starts
from mythos.model.ops import device_choice

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten():
    """What was asked of torch is asked again."""
    yield
    device_choice._sdpa_backend.cache_clear()
    device_choice._compiled_flex_attention.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_on_a_cpu_wants_equal_widths(dtype):
    """Torch says so, and it is true: with other widths flash refuses; padded with zeros the result is the same."""
    assert device_choice.takes_widths(CPU, dtype, 6, 6)
    assert not device_choice.takes_widths(CPU, dtype, 6, 4) and not device_choice.takes_widths(CPU, dtype, 4, 6)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 8, width, generator=generator).to(dtype) for width in (6, 6, 4))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="No available kernel"):
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
        padded = F.scaled_dot_product_attention(query, key, F.pad(value, (0, 2)), is_causal=True)[..., :4]
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(padded, F.scaled_dot_product_attention(query, key, value, is_causal=True))


@pytest.mark.parametrize(
    ("backend", "taken"), [("CUDNN_ATTENTION", True), ("FLASH_ATTENTION", True), ("EFFICIENT_ATTENTION", False)]
)
def test_torch_is_asked_once(monkeypatch, backend, taken):
    """As training will ask it: gradients, also where they are off just now, causal, the very widths and type."""
    asked = []

    def choice(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, enable_gqa: bool) -> int:
        assert (
            is_causal
            and not enable_gqa
            and query.shape == key.shape
            and all(x.requires_grad for x in (query, key, value))
        )
        asked.append((query.dtype, query.shape[-1], value.shape[-1]))
        return getattr(SDPBackend, backend).value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choice)
    with torch.no_grad():
        for _ in range(2):
            assert device_choice.takes_widths(CPU, torch.bfloat16, 192, 128) == taken
    assert asked == [(torch.bfloat16, 192, 128)]


def test_torch_is_asked_when_a_block_is_compiled():
    """The answer is a constant of the graph, which stays whole."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    def widened(key: Tensor, value: Tensor) -> Tensor:
        fits = device_choice.takes_widths(key.device, key.dtype, key.shape[-1], value.shape[-1])
        return value if fits else F.pad(value, (0, key.shape[-1] - value.shape[-1]))

    key = torch.randn(1, 1, 4, 8)
    for width in (8, 6):
        assert widened(key, key[..., :width]).shape == key.shape
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("cpu", "by_onednn", "by_products"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, True, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False, True),
        ({"cpu_name": "Intel Xeon", "avx512_f": True, "amx_bf16": True}, False, False),
        ({}, False, True),
    ],
)
def test_choices_by_processor(monkeypatch, cpu, by_onednn, by_products):
    monkeypatch.setattr(device_choice, "_cpu", lambda: cpu)
    assert device_choice.float32_by_onednn(CPU, torch.float32) == by_onednn
    assert device_choice.causal_by_products(CPU, torch.bfloat16, 256) == by_products
    assert device_choice.causal_by_products(CPU, torch.float32, 256)
    assert not device_choice.causal_by_products(CPU, torch.float32, 100_000)
    for device, dtype in ((CPU, torch.bfloat16), (CPU, torch.float64), (GPU, torch.float32)):
        assert not device_choice.float32_by_onednn(device, dtype)
    assert not device_choice.causal_by_products(GPU, torch.bfloat16, 256)


def test_choices_by_device(monkeypatch):
    assert not device_choice.masks_documents_by_blocks(CPU) and device_choice.masks_documents_by_blocks(GPU)
    assert not device_choice.groups_on_device(CPU) and device_choice.groups_on_device(GPU)
    assert device_choice.flex(CPU) is flex_attention
    monkeypatch.setattr(torch, "compile", lambda function, **_: ["compiled", function])
    assert device_choice.flex(GPU) == ["compiled", flex_attention]
    assert device_choice.flex(GPU) is device_choice.flex(GPU), "compiled once"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert device_choice.flex(GPU) is flex_attention, "part of the graph that is being compiled"


@pytest.fixture
def compiled_flex(monkeypatch):
    """Flex attention as GPUs compile it, but by a backend that runs the graphs as they are, and a count of them.

    On a CPU flex attention refuses tensors that want gradients, though it has a backward pass that is not compiled.
    """
    torch.compiler.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile(function, **{"backend": counter, **options})
    )
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield device_choice.flex(GPU), counter
    torch.compiler.reset()


def documents(rows: int, length: int, gradients: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """Query, key and value of two documents a row, and where the document of each position begins."""
    generator = torch.Generator().manual_seed(rows)
    query, key, value = (torch.randn(rows, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    ids = (torch.arange(length) >= torch.randint(1, length, (rows, 1), generator=generator)).long()
    return tuple(tensor.requires_grad_(gradients) for tensor in (query, key, value)), document_starts(ids)


@pytest.mark.parametrize(
    ("lengths", "rows", "graphs"),
    [((384, 300), (5, 3, 1, 7), 4), ((384,), (4, 2, 5, 1), 6), ((128,), (3, 5, 1), 4)],
    ids=["rows", "as many rows as heads", "one block"],
)
def test_flex_attention_takes_few_graphs(compiled_flex, lengths, rows, graphs):
    """However many rows a growing prefix, a smaller last micro-batch and validation have."""
    flex, counter = compiled_flex
    for length, count, gradients in itertools.product(lengths, rows, (False, True)):
        (query, key, value), starts = documents(count, length, gradients)
        position = torch.arange(length)
        visible = (position[:, None] >= position) & (position >= starts[..., None])
        with torch.set_grad_enabled(gradients):
            actual = flex(query, key, value, block_mask=document_block_mask(starts), enable_gqa=True)
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=visible.unsqueeze(1), enable_gqa=True)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == graphs


def test_flex_attention_never_runs_uncompiled(compiled_flex):
    flex, counter = compiled_flex
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        (query, key, value), starts = documents(2, 256, False)
        flex(query, key, value, block_mask=document_block_mask(starts), enable_gqa=True)
        (query, key, value), starts = documents(1, 256, False)
        with pytest.raises(FailOnRecompileLimitHit):
            flex(query, key, value, block_mask=document_block_mask(starts), enable_gqa=True)
    assert counter.frame_count == 1
    other = torch.compile(lambda x: x + 1, dynamic=False)  # a user's: falls back, as torch has it
    with torch._dynamo.config.patch(recompile_limit=1):
        assert [len(other(torch.ones(length))) for length in (2, 3, 4)] == [2, 3, 4]
