"""A training step on a GPU, walked without one: the trainer's own step over fake tensors of device type cuda.

Fake tensors have shapes, types and devices but no values, and refuse what needs one (`item`, `nonzero`, lengths that
depend on data). So the walk shows what a step does on a GPU up to the kernels: which branches it takes, what it
multiplies in which type, what crosses between host and device, and how. What torch 2.13 does not walk, and what stands
in for it here:

- A torch without CUDA has no device guard for it, and indexing, autograd's nodes and the engine ask for one. The guard
  of the meta device, which does nothing, is lent: `FakeTensorMode` itself does so in builds with CUDA.
- The engine asks for the streams of an accelerator that is there. `backward` calls the same nodes in its place.
- Attention decomposes to the kernel that keeps all scores, because no GPU is there to choose a fused one. The walk
  takes the flash kernel, and checks what it and cuDNN ask for: `flash` below.
- Flex attention traces its mask function on the accelerator. Its call is checked; the result is the flash kernel's.
- Pinned memory and the generator of the initial states belong to a driver: copies are checked as the step asks for
  them, and states start at zero.
- `grouped_mm` in float32 is refused by its shape function, though GPUs run it: the walk is in bfloat16.
"""

import ctypes
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos import trainer as trainer_module
from mythos.config.presets import preset_config
from mythos.distributed.parallel import ParallelModel
from mythos.model.halting import GATE_WIDTH
from mythos.model.ops import device_choice, grouped_experts
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.trainer import StepResult, Trainer
from mythos.training.optim import build_optimizer
from tests.model.conftest import scrambled
from tests.runs import tiny

CUDA = torch.device("cuda", 0)
DEVICE_TYPES = {"cuda": 1, "meta": 14}  # c10/core/DeviceType.h
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_dot_product_flash_attention"})


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch finds where it finds no CUDA: a device guard, autocast, and a stand-in for flex attention."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(device_choice, "_compiled_flex_attention", lambda: flex)
    monkeypatch.setattr(device_choice, "_compiled", lambda function: function)
    monkeypatch.setattr(device_choice, "takes_widths", lambda device, dtype, dim, value_dim: dim == value_dim)
    # As they are within an operator of our own, whose fake result would hide what torch's asks of types and strides.
    monkeypatch.setattr(
        grouped_experts, "grouped_product", lambda x, weights, ends: F.grouped_mm(x, weights, offs=ends)
    )
    monkeypatch.setattr(grouped_experts, "grouped_outer", lambda x, y, ends: F.grouped_mm(x.T, y, offs=ends))
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[DEVICE_TYPES["cuda"]] = guards[DEVICE_TYPES["meta"]]
    yield
    gc.collect()  # fake tensors and their graphs go before the guard does
    guards[DEVICE_TYPES["cuda"]] = None


class Transfers(Exception):
    """The step moved data between host and device in a way that waits, or mixed the two."""


class OnDevice(TorchDispatchMode):
    """Refuses operations over host and device tensors, and copies that wait; counts what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.uploading = False
        self.uploads = 0
        self.largest = 0
        """Bytes of the largest tensor."""
        self.products: Counter[tuple[str, torch.dtype]] = Counter()
        self.float32_sizes: set[int] = set()
        """Sizes of all dimensions of the matrices that were multiplied in float32."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        sources, targets = ({tensor.device.type for tensor in tensors} for tensors in (inputs, outputs))
        if name in ("_to_copy", "copy_") and sources | targets == {"cpu", "cuda"}:
            if not self.uploading:
                raise Transfers(f"{name} from {sources} to {targets}, not from pinned memory without waiting")
            self.uploads += 1
        elif len(sources | targets) > 1:
            raise Transfers(f"{name} takes tensors on {sources} and gives some on {targets}")
        self.largest = max([self.largest, *(tensor.untyped_storage().nbytes() for tensor in outputs)])
        if name in PRODUCTS:
            floating = [tensor for tensor in inputs if tensor.is_floating_point()]
            self.products.update((name, tensor.dtype) for tensor in floating)
            self.float32_sizes.update(size for tensor in floating if tensor.dtype == FLOAT32 for size in tensor.shape)
        return result


class Kernels(TorchFunctionMode):
    """Stands in for kernels that only a GPU chooses, and for pinned memory, which only a driver has."""

    def __init__(self, device: OnDevice) -> None:
        super().__init__()
        self.device = device
        self.pinned: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is F.scaled_dot_product_attention:
            return flash(*args, **kwargs)
        if function is Tensor.pin_memory or (function is torch.tensor and kwargs.pop("pin_memory", False)):
            result = args[0] + 0 if function is Tensor.pin_memory else function(*args, **kwargs)
            self.pinned.append(result)
            return result
        if function is Tensor.to and any(args[0] is tensor for tensor in self.pinned) and kwargs.get("non_blocking"):
            self.device.uploading = True
            try:
                return function(*args, **kwargs)
            finally:
                self.device.uploading = False
        return function(*args, **kwargs)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    enable_gqa: bool,
) -> Tensor:
    """The flash kernel, given what it and cuDNN take on SM80, SM90 and SM100 (sdp_utils.cpp of torch)."""
    assert attn_mask is None and is_causal, "a mask would fall back to a slower kernel"
    assert {tensor.dtype for tensor in (query, key, value)} == {BFLOAT16}
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    assert enable_gqa == (query.shape[1] != key.shape[1]) and query.shape[1] % key.shape[1] == 0
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[0]


def flex(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
    """A call of compiled flex attention, checked; its result has the shape of the flash kernel's."""
    rows, _, length, dim = query.shape
    assert block_mask.shape == (rows, 1, length, length) and block_mask.kv_num_blocks.device == CUDA
    padded = F.pad(value, (0, dim - value.shape[-1]))
    output = flash(query, key, padded, attn_mask=None, is_causal=True, scale=dim**-0.5, enable_gqa=enable_gqa)
    return output[..., : value.shape[-1]]


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """What the engine does: calls every node once its gradients are complete, and adds up what parameters get."""
    order: list[Any] = []
    seen, stack = set(), [(loss.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack += [(node, True), *((following, False) for following, _ in node.next_functions)]
    waiting: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        received = waiting.pop(node, {})
        if hasattr(node, "variable"):
            parameter = node.variable
            parameter.grad = received[0] if parameter.grad is None else parameter.grad + received[0]
            continue
        gradients = [received.get(place) for place in range(len(node._input_metadata))]
        results = node.apply(*gradients) if isinstance(node, BackwardCFunction) else node(*gradients)
        results, edges = results if isinstance(results, tuple) else (results,), node.next_functions
        if isinstance(node, BackwardCFunction):  # one result for each argument, of which some are no tensors
            results = tuple(result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed)
            edges = tuple(edge for edge in edges if edge[0] is not None)
        for (following, place), result in zip(edges, results, strict=True):
            if following is None or result is None:
                continue
            expected = following._input_metadata[place]
            result = result.sum_to_size(expected.shape).to(expected.dtype)
            places = waiting.setdefault(following, {})
            places[place] = places[place] + result if place in places else result


class HostRows(list):
    """The numbers of a batch's rows: host values, whatever the mode."""

    def __getitem__(self, chosen: Any) -> "HostRows":
        return HostRows(list.__getitem__(self, place) for place in chosen)

    def tolist(self) -> list[int]:
        return list(self)


def walk(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Trainer, StepResult, OnDevice]:
    """A step of a trainer whose model, optimizer and counters were put on a fake GPU; one that trains the gate."""
    trainer = Trainer(tiny(directory, **changes))
    batch = trainer.loader.next_batch()
    trainer.resources.close()
    trainer.step = next(step for step in range(99) if trainer.schedule.plan(step).early)
    monkeypatch.setattr(Tensor, "backward", backward)
    monkeypatch.setattr(
        trainer_module,
        "initial_state",
        lambda config, rows, length, *, device, **_: torch.zeros(len(rows), length, config.dim, device=device),
    )
    watch = OnDevice()
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer.device, trainer.world = CUDA, replace(trainer.world, device=CUDA)
        with CUDA:
            trainer.model = RecurrentDepthTransformer(trainer.config.model)
            trainer.skipped, trainer.skipped_in_a_row = torch.zeros(2, dtype=torch.int64).unbind()
        trainer.parallel = ParallelModel(
            trainer.model, trainer.layout, trainer.world, trainer.config.parallel, BFLOAT16
        )
        trainer.optimizer = build_optimizer(trainer.model, trainer.config.optim, BFLOAT16)
        with watch, Kernels(watch):
            result = trainer.train_step(batch._replace(rows=HostRows(batch.rows.tolist())))
    return trainer, result, watch


LENGTH = 128
WALKED: dict[str, Any] = {
    "model__halting": "gate",
    "model__n_heads": 4,
    "model__n_kv_heads": 2,
    "model__qk_nope_head_dim": 24,  # with the rotated part wider than values, which are padded
    "model__context_length": LENGTH,
    "data__sequence_length": LENGTH,
    "depth__curriculum": {"shape": "none"},
}


@pytest.mark.parametrize(
    ("kind", "ffn", "documents"),
    [("mla", "moe", True), ("mla", "dense", False), ("gqa", "moe", False), ("gqa", "dense", True)],
)
def test_step_on_a_gpu(tmp_path, monkeypatch, kind, ffn, documents):
    """All on the device, bfloat16 products, float32 state, no copy but those that do not wait."""
    trainer, result, watch = walk(
        tmp_path,
        monkeypatch,
        model__attention=kind,
        model__core_ffn=ffn,
        data__mask_documents=documents,
        **WALKED,
    )
    model = trainer.config.model
    assert len(set(result.plan.loops)) > 1, "rows must join the prefix"
    assert max(result.plan.loops) > result.plan.backprop, "some passes must go without gradient"
    for name in ("loss", "grad_norm", "state_norm", "state_delta"):
        value = getattr(result, name)
        assert (value.device, value.dtype, value.shape) == (CUDA, torch.float64, ()), name
    if ffn == "moe":
        assert result.expert_load.device == CUDA
        assert result.expert_load.shape == (model.core_layers, model.loops, model.n_experts)
    for name, parameter in trainer.model.named_parameters():
        kept = [parameter, *trainer.optimizer.state[parameter].values()]
        assert {(tensor.device, tensor.dtype) for tensor in kept} == {(CUDA, FLOAT32)}, name

    half = {name for name, dtype in watch.products if dtype == BFLOAT16}
    assert half == {"mm", "_scaled_dot_product_flash_attention"} | ({"_grouped_mm"} if ffn == "moe" else set())
    tokens, asked = 4 * LENGTH, 2 * LENGTH  # of a micro-batch; of the rows that teach the gate
    router_injection_gate = {model.n_experts, model.dim, model.dim + 1, GATE_WIDTH, tokens, asked}
    assert watch.float32_sizes == router_injection_gate - (set() if ffn == "moe" else {model.n_experts})
    micro_batches, copied = 2, 2 + documents  # ids, depths, documents
    assert watch.uploads == micro_batches * copied


def test_muon_on_a_gpu(tmp_path, monkeypatch):
    trainer, _, watch = walk(tmp_path, monkeypatch, optim__name="muon", **WALKED)
    assert {"bmm", "baddbmm"} <= {name for name, dtype in watch.products if dtype == BFLOAT16}
    assert not {"bmm", "baddbmm"} & {name for name, dtype in watch.products if dtype == FLOAT32}
    for name, parameter in trainer.model.named_parameters():
        kept = [parameter, *trainer.optimizer.state[parameter].values()]
        assert {(tensor.device, tensor.dtype) for tensor in kept} == {(CUDA, FLOAT32)}, name


@pytest.mark.parametrize(
    ("waits", "error"),
    [
        (lambda x: x.sum().item(), DataDependentOutputException),
        (lambda x: bool((x > 0).any()), DataDependentOutputException),
        (lambda x: x[x > 0], DynamicOutputShapeException),
        (lambda x: x.cpu(), Transfers),
        (lambda x: torch.tensor([1, 2], device=CUDA), Transfers),
        (lambda x: torch.tensor([1, 2]).to(CUDA, non_blocking=True), Transfers),
        (lambda x: torch.tensor([1, 2]).pin_memory().to(CUDA), Transfers),
        (lambda x: x[[0, 1]], Transfers),
        (lambda x: x[torch.tensor([0, 1])], Transfers),
        (lambda x: x * torch.tensor(2.0), Transfers),
    ],
    ids=[
        "item",
        "branch",
        "mask",
        "to host",
        "list",
        "pageable",
        "blocking",
        "list index",
        "host index",
        "host scalar",
    ],
)
def test_walk_catches(waits, error):
    """Each way to wait for the device, or to mix host and device, ends the walk."""
    watch = OnDevice()
    with FakeTensorMode(), watch, Kernels(watch):
        x = torch.zeros(4, 4, device=CUDA)
        torch.tensor([1, 2], pin_memory=True).to(CUDA, non_blocking=True)
        with pytest.raises(error):
            waits(x)


# --- long contexts


@pytest.mark.parametrize(("name", "documents"), [("mythos_100b", False), ("mythos_500b", True), ("mythos_1t", True)])
def test_presets_of_a_million_positions(name, documents):
    """All of a preset but the width of its experts, which is near a million too: no tensor of half of S x S bytes."""
    config, watch = preset_config(name, expert_dim=512, shared_expert_dim=512), OnDevice()
    length = config.context_length
    assert length == 1_000_000
    with FakeTensorMode(), torch.no_grad():
        with CUDA:
            model = RecurrentDepthTransformer(config)
            ids = torch.zeros(1, length, dtype=torch.int64)
        with watch, Kernels(watch), torch.autocast("cuda", dtype=BFLOAT16):
            assert model(ids, ids, loops=2, document_ids=ids if documents else None).loss.shape == ()
    assert watch.largest < length**2 / 2


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned, and the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.operations: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [
            leaf.untyped_storage().nbytes() // leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        self.operations.add(function.overloadpacket.__name__)
        return result


def test_forward_of_a_long_context():
    """65,536 positions, really run, of a preset for a million with its width shrunken: one layer, head and loop."""
    length = 2**16
    config = preset_config(
        "mythos_100b",
        **{"dim": 16, "n_heads": 1, "n_kv_heads": 1, "prelude_layers": 0, "coda_layers": 0, "vocab_size": 128},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16},
        **{"n_experts": 4, "experts_per_token": 2, "expert_dim": 16, "n_shared_experts": 1, "shared_expert_dim": 16},
        **{"ffn_dim": 16, "lora_rank": 4},
    )
    model = scrambled(RecurrentDepthTransformer(config))
    ids = torch.randint(128, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Largest() as largest:
        logits = model(ids, loops=1).logits
    assert "_scaled_dot_product_flash_attention_for_cpu" in largest.operations
    assert largest.elements <= 128 * length, "the logits are the largest"
    assert logits.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(logits[:, :300], model(ids[:, :300], loops=1).logits, rtol=1e-4, atol=1e-4)
