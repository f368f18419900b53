"""Private interfaces of torch: all are in one module, and work on every version."""

import ast
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from mythos import torch_internals
from mythos.planning.collectives import fake_processes

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "mythos").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py")), ROOT / "train.py"]
OTHERS = {
    "_asdict": "NamedTuple, documented",
    "_fields": "NamedTuple, documented",
    "_replace": "NamedTuple, documented",
    "_exit": "os, documented",
    "_actions": "argparse: shtab completes by it",
    "_SubParsersAction": "argparse: shtab completes by it",
    "_is_hf_initialized": "transformers: how its models mark loaded weights",
    "_prepare_generation_config": "transformers: overridden",
    "_get_num_items_in_batch": "transformers: wrapped, for it has no other place that knows all labels of a step",
    "_testMethodName": "unittest: the name of a test, which TestCase has no public name for",
}
"""Private names of other libraries that may be used anywhere."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module gives to its own functions, classes, variables and attributes of `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return {name for name in names if private(name)}


def used(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of each private name that is read as an attribute, imported, or passed to getattr."""
    uses = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            text = node.args[1].values[0] if isinstance(node.args[1], ast.JoinedStr) else node.args[1]
            names = [text.value] if isinstance(text, ast.Constant) else []
        uses += [(node.lineno, name) for name in names if private(name)]
    return uses


def test_private_names_of_libraries_are_used_in_one_module() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    own = set().union(*map(defined, trees.values()))
    elsewhere = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        for line, name in used(tree)
        if name not in own and name not in OTHERS and path.name != "torch_internals.py"
    ]
    assert not elsewhere, "private names; wrap those of torch in mythos/torch_internals.py"
    assert {"_inductor", "_cdata"} <= {name for _, name in used(trees[ROOT / "mythos" / "torch_internals.py"])}


def test_every_way_to_a_private_name_is_seen() -> None:
    code = (
        "import torch._dynamo as d\n"
        "from torch._subclasses import x\n"
        "from torch.distributed import _functional\n"
        "getattr(torch, '_chosen')\n"
        "getattr(aten, f'_flash{kind}')\n"
        "self._inherited = self._inherited\n"
        "call._marker = True\n"
        "torch.__version__\n"
    )
    lines = used(ast.parse(code))
    assert {name for _, name in lines} >= {"_dynamo", "_subclasses", "_functional", "_chosen", "_flash", "_marker"}
    assert {line for line, _ in lines} == {1, 2, 3, 4, 5, 6, 7}
    assert defined(ast.parse(code)) == {"_inherited"}


def test_backward_passes_are_distinguished() -> None:
    numbers: list[int] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    for tensor in (x, y):
        tensor.register_hook(lambda gradient: numbers.append(torch_internals.backward_pass_number()))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    first, second = numbers[:2], numbers[2:]
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0] and -1 not in numbers
    assert torch_internals.backward_pass_number() == -1


@pytest.mark.parametrize(("value_dim", "flash"), [(64, True), (32, False)])
def test_sdpa_backend_is_the_one_that_runs(value_dim: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    query, value = (torch.randn(1, 1, 128, width, requires_grad=True) for width in (64, value_dim))
    with torch.profiler.profile() as profile:
        F.scaled_dot_product_attention(query, query, value, is_causal=True)
    ran = {event.name for event in profile.events()}
    assert (torch_internals.CPU_FLASH._qualified_op_name in ran) == flash
    chosen = SDPBackend.FLASH_ATTENTION if flash else SDPBackend.MATH
    assert torch_internals.sdpa_backend(query, query, value) == chosen
    monkeypatch.delattr(torch, "_fused_sdp_choice")
    assert torch_internals.sdpa_backend(query, query, value) == SDPBackend.MATH


def test_onednn_matmul_and_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(48, 32), torch.randn(32, 24)
    reference = (a.double() @ b.double()).float()
    torch.testing.assert_close(torch_internals.onednn_matmul(a, b), reference, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch_internals, "ONEDNN_LINEAR", None)
    torch.testing.assert_close(torch_internals.onednn_matmul(a, b), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_backward_is_the_formula(dtype: torch.dtype) -> None:
    probabilities, grad_out = torch.randn(3, 8, 16).softmax(-1).to(dtype), torch.randn(3, 8, 16).to(dtype)
    p, g = probabilities.double(), grad_out.double()
    reference = p * (g - (p * g).sum(-1, keepdim=True))
    scores = torch_internals.softmax_backward(grad_out, probabilities)
    assert scores.dtype == dtype
    torch.testing.assert_close(scores.double(), reference, atol=1e-5 if dtype == torch.float32 else 1e-2, rtol=1e-2)


def test_storage_address_tells_storages_apart_and_not_views() -> None:
    with torch_internals.FakeTensorMode():
        a, b = torch.empty(4, 4), torch.empty(4, 4)
    for one, other in ((torch.empty(4, 4), torch.empty(4, 4)), (torch.empty(0), torch.empty(0)), (a, b)):
        assert torch_internals.storage_address(one) == torch_internals.storage_address(one.view(-1))
        assert torch_internals.storage_address(one) != torch_internals.storage_address(other)


def test_compiler_counters_count_graphs() -> None:
    counters = torch_internals.compiler_counters()
    torch.compiler.reset()
    counters.clear()
    double = torch.compile(lambda x: x * 2, backend="eager")
    for size in (torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.float64)):
        double(size)
    # Another length compiles a graph for any length, another type a third graph.
    assert counters["stats"]["unique_graphs"] == 3


def test_argument_names() -> None:
    assert torch_internals.argument_names(torch.ops.aten.mm) == ["self", "mat2"]
    assert all("query" in torch_internals.argument_names(operator) for operator in torch_internals.FUSED_ATTENTION)


def test_foreach_functions_change_lists_in_place() -> None:
    a, b = [torch.tensor([2.0, 4.0])], [torch.tensor([4.0, 8.0])]
    torch_internals.foreach_lerp_(a, b, 0.5)
    torch_internals.foreach_mul_(a, 4.0)
    torch_internals.foreach_div_(a, torch.tensor(2.0))
    assert a[0].tolist() == [6.0, 12.0]
    torch_internals.foreach_copy_(a, b)
    assert a[0].tolist() == [4.0, 8.0]


def test_ddp_buckets_of_a_mebibyte_each() -> None:
    parameters = [torch.empty(2**18, device="meta") for _ in range(51)]
    # DDP's first bucket is 1 MiB, so that reduction starts early; 50 more fill two of 25 MiB.
    assert torch_internals.count_ddp_buckets(parameters, 25 * 2**20) == 3


def test_ddp_and_timeouts_take_what_this_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither warns of a deprecated name, and forward passes do not broadcast buffers."""
    model = nn.BatchNorm1d(4)
    with fake_processes(2), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        ddp = DistributedDataParallel(model, **torch_internals.no_buffer_sync())
        torch_internals.set_timeout(None, 5)
    assert not getattr(ddp, "forward_sync_buffers", ddp.broadcast_buffers)
    calls = []
    monkeypatch.setattr(dist, "set_timeout", lambda *arguments: calls.append(arguments), raising=False)
    torch_internals.set_timeout(None, 5)
    assert calls == [(timedelta(seconds=5), None)]


def test_mesh_placements_exist_where_they_are_said_to() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_common

    assert torch_internals.has_mesh_placements() == hasattr(_fsdp_common, "ShardPlacementResult")
