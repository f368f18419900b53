"""The kernels that `mythos.model.ops.device_choice` chooses, forward and backward, against float64 on the CPU."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mythos.gpu_check import references
from mythos.gpu_check.catalog import TOLERANCES
from mythos.gpu_check.result import Result, Setting, judged
from mythos.model import layers
from mythos.model import loss as model_loss
from mythos.model.attention import context as model_attention
from mythos.model.config import ModelConfig
from mythos.model.ops import device_choice
from mythos.model.ops import grouped_experts as model_experts
from mythos.torch_internals import sdpa_backend

SIZES = {True: {"length": 1000, "rows": 2, "tokens": 1024}, False: {"length": 200, "rows": 2, "tokens": 48}}
"""Sizes with and without a GPU. Lengths are not multiples of flex attention's blocks."""
GROUPS = (0, 1, 0, 3, 0.6, 0, 17, 1.0)
"""Rows of each expert: an int is a number of rows, a float a share of the rows that are left."""
KEEPS_SCORES = ("math", "error")
"""Suffixes of the names of SDPA's backends that keep all S x S scores, or do not run."""


def attention(
    setting: Setting, *, kind: str, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: str
) -> Iterator[Result]:
    """Check attention, causal or within documents, with gradients of queries, keys and values."""
    sizes = SIZES[setting.cuda]
    rows, length = sizes["rows"], sizes["length"]
    shapes = [(rows, length, heads, dim), (rows, length, kv_heads, dim), (rows, length, kv_heads, value_dim)]
    inputs = [random_values(shape, dtype, seed) for seed, shape in enumerate(shapes)]
    upstream = random_values((rows, length, heads, value_dim), dtype, 3)

    position = torch.arange(length)
    visible = (position[:, None] >= position).unsqueeze(0)
    documents = None
    if kind == "documents":
        # Each row has other boundaries, within flex attention's blocks and on their edges.
        documents = torch.stack([(position * (row + 3) // length + position // 128) for row in range(rows)]).int()
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    context = model_attention.attention_context(
        ModelConfig(attention="gqa", head_dim=dim),
        length,
        setting.device,
        None if documents is None else documents.to(setting.device),
    )
    device_inputs = on_device(setting, inputs)
    expected = references.with_gradients(references.attention, doubles(inputs), upstream.double(), [visible])
    measured = references.with_gradients(model_attention.attend, device_inputs, upstream.to(setting.device), [context])
    if documents is not None:  # a loop passes only its first, active rows
        query, key, value = (tensor[:1] for tensor in device_inputs)
        measured.append(model_attention.attend(query, key, value, context.first_rows(1)))
        expected.append(expected[0][:1])

    if isinstance(context.mask, BlockMask):
        yield compared(measured, expected, dtype, "flex attention")
        return
    chosen = "SDPA with a mask" if kind == "documents" else choice(setting, shapes, dtype)
    result = compared(measured, expected, dtype, chosen)
    slow = setting.cuda and chosen.endswith(KEEPS_SCORES)
    yield judged(result.verdict == "ok" and not slow, result.measured)


def choice(setting: Setting, shapes: Sequence[tuple[int, ...]], dtype: str) -> str:
    """The kernel that `attend` chooses for causal attention of query, key and value of these shapes (B, S, H, K)."""
    device, kind = setting.device, getattr(torch, dtype)
    (_, length, heads, dim), (*_, kv_heads, _), (*_, value_dim) = shapes
    if device_choice.causal_by_products(device, kind, length):
        return "batched products"
    padded = dim != value_dim and not device_choice.takes_widths(device, kind, dim, value_dim)
    widths = (max(dim, value_dim),) * 3 if padded else (dim, dim, value_dim)
    with torch.enable_grad():
        query, key, value = (
            torch.empty(1, count, length, width, device=device, dtype=kind, requires_grad=True)
            for count, width in zip((heads, kv_heads, kv_heads), widths, strict=True)
        )
        backend = sdpa_backend(query, key, value)
    where = "SM{}{}".format(*torch.cuda.get_device_capability(device)) if setting.cuda else "CPU"
    return f"SDPA on {where}{', padded' * padded}: {backend.name.lower().removesuffix('_attention')}"


def grouped(setting: Setting, *, dtype: str) -> Iterator[Result]:
    """Check the grouped matmuls of experts, and those of their weights' gradient."""
    counts = group_sizes(SIZES[setting.cuda]["tokens"])
    width, hidden = 64, 96
    ends = torch.tensor(counts).cumsum(0).int()
    x, y = random_values((sum(counts), width), dtype, 0), random_values((sum(counts), hidden), dtype, 1)
    weights = random_values((len(counts), width, hidden), dtype, 2)
    device_x, device_y, device_weights, device_ends = on_device(setting, [x, y, weights, ends])

    pieces = [piece.double() for piece in x.split(counts)]
    expected = torch.cat([piece @ weight for piece, weight in zip(pieces, weights.double(), strict=True)])
    yield compared([model_experts.grouped_product(device_x, device_weights, device_ends)], [expected], dtype)
    outer = torch.stack([one.T @ other.double() for one, other in zip(pieces, y.split(counts), strict=True)])
    measured = model_experts.grouped_outer(device_x, device_y, device_ends)
    empty = [number for number, count in enumerate(counts) if count == 0]
    clean = not measured[empty].any()
    result = compared([measured], [outer], dtype)
    note = "" if clean else "; empty experts are not zero"
    yield judged(result.verdict == "ok" and clean, result.measured + note)


def experts(setting: Setting, *, dtype: str) -> Iterator[Result]:
    """Check routed experts: output, and gradients of the input, the gates and both weights; all choices, and some."""
    kind = getattr(torch, dtype)
    tokens, width, hidden = SIZES[setting.cuda]["tokens"] // 2, 32, 48
    counts = group_sizes(tokens)
    # Each token has two experts: the first by the counts above, the second is the next that is not empty.
    first = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    used = [number for number, count in enumerate(counts) if count]
    following = torch.tensor([used[(used.index(number) + 1) % len(used)] for number in first.tolist()])
    chosen = torch.stack((first, following), dim=1)
    x = random_values((tokens, width), dtype, 0)
    gates = random_values((tokens, 2), dtype, 1).abs()
    gate_up = random_values((len(counts), width, 2 * hidden), dtype, 2) / width**0.5
    down = random_values((len(counts), hidden, width), dtype, 3) / hidden**0.5
    upstream = random_values((tokens, width), "float32", 4)
    inputs = [x.float(), gates.float(), gate_up.to(kind).float(), down.to(kind).float()]

    def run(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, slots: int | None) -> Tensor:
        weights = model_experts.ExpertWeights(gate_up, down, kind)
        return model_experts.run_experts(x, gates, chosen, weights, slots)

    # Under expert parallelism the choices of other ranks' experts are left out.
    some = chosen.clone()
    some[::3, 1] = len(counts)
    for choices, slots in ((chosen, None), (some, int((some < len(counts)).sum()))):
        expected = references.with_gradients(references.experts, doubles(inputs), upstream.double(), [choices])
        arguments = [choices.to(setting.device), slots]
        measured = references.with_gradients(run, on_device(setting, inputs), upstream.to(setting.device), arguments)
        yield compared(measured, expected, dtype)


def part(setting: Setting, *, what: str, dtype: str) -> Iterator[Result]:
    """Check RMSNorm, the gated unit, rotary positions or the head's loss."""
    parts = {"RMSNorm": _norm, "gated": _gated, "rotary positions": _rope, "cross-entropy": _loss}
    yield parts[what](setting, dtype)


def _norm(setting: Setting, dtype: str) -> Result:
    norm = layers.RMSNorm(256, 1e-6).to(setting.device)
    x, weight = random_values((4, 64, 256), dtype, 0).float(), 1 + random_values((256,), dtype, 1).float() / 4
    upstream = random_values((4, 64, 256), dtype, 2)
    expected = references.with_gradients(references.rms_norm, doubles([x, weight]), upstream.double(), [1e-6])
    leaf = x.to(setting.device).requires_grad_()
    norm.weight = torch.nn.Parameter(weight.to(setting.device))
    with layers.autocast_to(getattr(torch, dtype), setting.device):
        output = norm(leaf)
    output.backward(upstream.to(setting.device, output.dtype))
    return compared([output.detach(), *references.gradients([leaf, norm.weight])], expected, dtype)


def _gated(setting: Setting, dtype: str) -> Result:
    x, upstream = random_values((256, 192), dtype, 0), random_values((256, 96), dtype, 1)
    expected = references.with_gradients(references.gated, doubles([x]), upstream.double())
    measured = references.with_gradients(layers.gated, on_device(setting, [x]), upstream.to(setting.device))
    return compared(measured, expected, dtype)


def _rope(setting: Setting, dtype: str) -> Result:
    x, upstream = (random_values((2, 100, 4, 64), dtype, seed) for seed in (0, 1))
    table = layers.rope_table(100, 64, 10_000.0, setting.device)
    expected = references.with_gradients(references.rotated, doubles([x]), upstream.double(), [10_000.0])
    measured = references.with_gradients(layers.apply_rope, on_device(setting, [x]), upstream.to(setting.device), table)
    return compared(measured, expected, dtype)


def _loss(setting: Setting, dtype: str) -> Result:
    tokens, vocabulary = SIZES[setting.cuda]["tokens"], 640
    hidden = random_values((tokens, 64), dtype, 0).float()
    weight = random_values((vocabulary, 64), dtype, 1).float() / 8
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(2))
    targets[::3] = -100
    expected = references.with_gradients(references.cross_entropy, doubles([hidden, weight]), None, [targets])
    inputs, on_targets = on_device(setting, [hidden, weight]), on_device(setting, [targets])
    with layers.autocast_to(getattr(torch, dtype), setting.device):
        measured = references.with_gradients(model_loss.summed_cross_entropy, inputs, None, on_targets)
    return compared(measured, expected, dtype)


def group_sizes(rows: int) -> list[int]:
    """The rows of each expert, by GROUPS; they add up to `rows`."""
    sizes, left = [], rows - sum(size for size in GROUPS if isinstance(size, int))
    for size in GROUPS:
        sizes.append(size if isinstance(size, int) else round(left * size))
        left -= 0 if isinstance(size, int) else sizes[-1]
    return sizes


def random_values(shape: Sequence[int], dtype: str, seed: int) -> Tensor:
    """Normal values on the CPU, rounded to `dtype`, so that kernel and reference start from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in float64."""
    return [tensor.double() for tensor in tensors]


def on_device(setting: Setting, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the device."""
    return [tensor.to(setting.device) for tensor in tensors]


def compared(measured: Sequence[Tensor], expected: Sequence[Tensor], dtype: str, how: str = "") -> Result:
    """Judge output and gradients against the reference by TOLERANCES."""
    errors = references.errors(measured, expected)
    gradients = f", gradients {', '.join(f'{error:.1e}' for error in errors[1:])}" if len(errors) > 1 else ""
    text = f"output {errors[0]:.1e}{gradients}{f'; {how}' if how else ''}"
    return judged(max(errors) <= TOLERANCES[dtype], text)
