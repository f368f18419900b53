"""Attention against softmax written out position by position."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from mythos.model.attention.base import build_attention
from mythos.model.attention.context import (
    AttentionContext,
    attend,
    attention_context,
    document_block_mask,
    document_starts,
)
from tests.model.conftest import scrambled

LENGTH = 13
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 6 + [2] * 6], dtype=torch.int32)


def naive_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_rope(x: Tensor, theta: float) -> Tensor:
    """Rotate pair i of position p by p * theta^(-2 i / d), as complex numbers; x is (S, d)."""
    length, dim = x.shape
    rows = []
    for position in range(length):
        turns = [cmath.exp(1j * position * theta ** (-2 * i / dim)) for i in range(dim // 2)]
        pairs = torch.complex(x[position, : dim // 2], x[position, dim // 2 :]) * torch.tensor(turns)
        rows.append(torch.cat((pairs.real, pairs.imag)))
    return torch.stack(rows).float()


def naive_softmax_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """One head of one sequence: (S, d), (S, d), (S, v) -> (S, v)."""
    rows = []
    for i in range(len(query)):
        seen = [j for j in range(i + 1) if documents is None or documents[i] == documents[j]]
        weights = torch.softmax(query[i] @ key[seen].T / math.sqrt(query.shape[1]), dim=-1)
        rows.append(weights @ value[seen])
    return torch.stack(rows)


def naive_attention(module, config, x: Tensor, documents: Tensor | None) -> Tensor:
    outputs = []
    for row, sequence in enumerate(x):
        heads = []
        for head in range(config.n_heads):
            query, key, value = naive_heads(module, config, sequence, head)
            heads.append(naive_softmax_attention(query, key, value, None if documents is None else documents[row]))
        outputs.append(torch.cat(heads, -1) @ module.out.weight.T)
    return torch.stack(outputs)


def naive_heads(module, config, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one head of one sequence (S, D), rotated."""
    eps, theta = config.norm_eps, config.rope_theta
    if config.attention == "gqa":
        dim, shared = config.head_dim, head // (config.n_heads // config.n_kv_heads)
        query = x @ module.query.weight[head * dim : (head + 1) * dim].T
        key = x @ module.key.weight[shared * dim : (shared + 1) * dim].T
        value = x @ module.value.weight[shared * dim : (shared + 1) * dim].T
        if config.qk_norm:
            query = naive_norm(query, module.query_norm.weight, eps)
            key = naive_norm(key, module.key_norm.weight, eps)
        return naive_rope(query, theta), naive_rope(key, theta), value
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    source = x
    if config.q_lora_rank:
        source = naive_norm(x @ module.query_down.weight.T, module.query_latent_norm.weight, eps)
    query = source @ module.query.weight[head * (nope + rope) : (head + 1) * (nope + rope)].T
    down = x @ module.key_value_down.weight.T
    latent = naive_norm(down[:, : config.kv_lora_rank], module.latent_norm.weight, eps)
    rope_key = down[:, config.kv_lora_rank :]
    if config.qk_norm:
        query = naive_norm(query, module.query_norm.weight, eps)
        rope_key = naive_norm(rope_key, module.rope_key_norm.weight, eps)
    expanded = latent @ module.key_value_up.weight[head * (nope + v) : (head + 1) * (nope + v)].T
    query = torch.cat((query[:, :nope], naive_rope(query[:, nope:], theta)), -1)
    return query, torch.cat((expanded[:, :nope], naive_rope(rope_key, theta)), -1), expanded[:, nope:]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "gqa"},
        {"attention": "gqa", "qk_norm": False, "n_kv_heads": 1},
        {"attention": "gqa", "n_kv_heads": 4},
        {"attention": "mla"},
        {"attention": "mla", "q_lora_rank": 24, "v_head_dim": 24},
        {"attention": "mla", "qk_norm": False, "v_head_dim": 40},
    ],
    ids=str,
)
def test_matches_naive_softmax(small, changes, documents):
    config = small(**changes)
    module = scrambled(build_attention(config))
    x = torch.randn(2, LENGTH, config.dim, generator=torch.Generator().manual_seed(0))
    expected = naive_attention(module, config, x, documents)
    actual = module(x, attention_context(config, LENGTH, x.device, documents))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
def test_masked_documents_equal_documents_alone(small, attention):
    config = small(attention=attention)
    module = scrambled(build_attention(config))
    x = torch.randn(1, LENGTH, config.dim, generator=torch.Generator().manual_seed(1))
    packed = module(x, attention_context(config, LENGTH, x.device, DOCUMENTS[:1]))
    alone = [module(part, attention_context(config, part.shape[1], x.device, None)) for part in (x[:, :5], x[:, 5:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [256, 300])  # flex attention works in blocks of 128
def test_block_mask_of_gpus_agrees_with_boolean_mask(small, length):
    """What flex attention computes where it is not compiled; the blocks it visits are counted in test_documents."""
    position = torch.arange(length)
    documents = torch.stack((position // 50, position // 170)).int()
    generator = torch.Generator().manual_seed(2)
    boolean = attention_context(small(), length, torch.device("cpu"), documents)
    blocks = AttentionContext(boolean.cos, boolean.sin, document_block_mask(document_starts(documents)))
    for query_heads, key_heads, dim, value_dim in ((4, 2, 16, 16), (4, 4, 24, 16)):
        query, key, value = (
            torch.randn(2, length, heads, width, generator=generator)
            for heads, width in ((query_heads, dim), (key_heads, dim), (key_heads, value_dim))
        )
        with torch.no_grad():
            expected = attend(query, key, value, boolean)
            torch.testing.assert_close(attend(query, key, value, blocks), expected, rtol=1e-5, atol=1e-5)
            prefix = attend(query[:1], key[:1], value[:1], blocks.first_rows(1))
            torch.testing.assert_close(prefix, expected[:1], rtol=1e-5, atol=1e-5)


def test_future_is_unseen(small):
    config = small()
    module = scrambled(build_attention(config))
    context = attention_context(config, LENGTH, torch.device("cpu"), None)
    x = torch.randn(1, LENGTH, config.dim, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[:, 7:] += 1
    torch.testing.assert_close(module(x, context)[:, :7], module(changed, context)[:, :7], rtol=0, atol=0)


def test_rotation_stays_exact_at_a_million_positions(small):
    config = small(rope_theta=1e6)
    context = attention_context(config, 2**20, torch.device("cpu"), None)
    dim = config.qk_rope_head_dim
    for position in (1, 65_537, 2**20 - 1):
        angles = [position * 1e6 ** (-2 * i / dim) for i in range(dim // 2)]
        torch.testing.assert_close(
            context.cos[position], torch.tensor([math.cos(a) for a in angles]), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            context.sin[position], torch.tensor([math.sin(a) for a in angles]), rtol=0, atol=1e-6
        )
