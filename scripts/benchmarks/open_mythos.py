"""The package open-mythos for comparison: the same sizes, its own training step and its own generation."""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.sections import Config
from mythos.distributed.parallel import choose_dtype
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import tensor_bytes, tensor_peak
from mythos.model.config import ModelConfig
from scripts.benchmarks.timing import Memory, peak_memory, resident_bytes

LR = 3e-4
CLIP = 1.0


def package() -> ModuleType:
    """Import the package's main module. Raises MythosError if that fails."""
    try:
        return importlib.import_module("open_mythos.main")
    except ImportError as error:
        raise MythosError(
            f"--against open-mythos: {sys.executable} cannot import it ({error}). Install it there, without its "
            "dependencies, which are those of this project: pip install --no-deps open-mythos"
        ) from error


def check_sizes(config: ModelConfig) -> None:
    """Raise MythosError that lists all fields whose values the package does not support."""
    dense = config.dim * 4 // 3
    rules: dict[str, tuple[bool, str]] = {
        "core_layers": (config.core_layers == 1, "1"),
        "core_ffn": (config.core_ffn == "moe", "moe"),
        "injection": (config.injection == "lti", "lti"),
        "tie_embeddings": (config.tie_embeddings, "true"),
        "lora_rank": (config.lora_rank > 0, "at least 1"),
        "ffn_dim": (abs(config.ffn_dim - dense) <= 0.05 * dense, f"{dense}, or at most 5% from it"),
        "shared_expert_dim": (
            not config.n_shared_experts or config.shared_expert_dim == config.expert_dim * config.experts_per_token,
            f"expert_dim x experts_per_token = {config.expert_dim * config.experts_per_token}",
        ),
        "q_lora_rank": (config.attention == "gqa" or config.q_lora_rank > 0, "at least 1"),
        "head_dim": (
            config.attention == "mla" or config.head_dim * config.n_heads == config.dim,
            f"dim / n_heads = {config.dim / config.n_heads:g}",
        ),
    }
    lines = [
        f"model.{name}: got {str(getattr(config, name)).lower()}; open-mythos has {rule}"
        for name, (fits, rule) in rules.items()
        if not fits
    ]
    if lines:
        raise MythosError("\n  ".join(["--against open-mythos: it has no model of these sizes", *lines]))


def build(config: ModelConfig, length: int, loops: int) -> nn.Module:
    """Build its model in the sizes of ours, for sequences of up to `length` tokens.

    Its loop ends early once every position has halted. With the threshold at infinity no position halts, so all loops
    run, at the same cost each.
    """
    check_sizes(config)
    module = package()
    torch.manual_seed(0)
    return module.OpenMythos(
        module.MythosConfig(
            vocab_size=int(config.vocab_size),
            dim=config.dim,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            max_seq_len=length,
            max_loop_iters=loops,
            prelude_layers=config.prelude_layers,
            coda_layers=config.coda_layers,
            attn_type=config.attention,
            kv_lora_rank=config.kv_lora_rank,
            q_lora_rank=config.q_lora_rank,
            qk_rope_head_dim=config.qk_rope_head_dim,
            qk_nope_head_dim=config.qk_nope_head_dim,
            v_head_dim=config.v_head_dim,
            n_experts=config.n_experts,
            n_shared_experts=config.n_shared_experts,
            n_experts_per_tok=config.experts_per_token,
            expert_dim=config.expert_dim,
            lora_rank=config.lora_rank,
            rope_theta=config.rope_theta,
            act_threshold=float("inf"),
        )
    )


class Steps:
    """Its training step, as in its own script: autocast, mean cross-entropy, clipping, fused AdamW.

    Like ours, that script accumulates micro-batches in one process. All of its loops carry gradient.
    """

    def __init__(self, config: Config) -> None:
        length = config.data.sequence_length
        self.loops = round(config.depth_mean)
        self.model = build(config.model, length, self.loops)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.95), fused=True
        )
        self.dtype = choose_dtype(config.train.dtype, torch.device("cpu"))
        rows = config.train.global_batch
        micro = rows if config.train.micro_batch == "auto" else config.train.micro_batch
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(int(config.model.vocab_size), (rows, length + 1), generator=generator)
        self.micro_batches = ids.split(micro)

    def __call__(self) -> None:
        """Run one step."""
        self.optimizer.zero_grad()
        for ids in self.micro_batches:
            self.loss(ids).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()

    def loss(self, ids: Tensor) -> Tensor:
        """Mean loss of a micro-batch, divided by the number of micro-batches."""
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(ids[:, :-1], n_loops=self.loops)
            mean = F.cross_entropy(logits.view(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        return mean / len(self.micro_batches)

    def held_bytes(self) -> int:
        """Bytes of the tensors that exist between steps: weights, buffers, optimizer state."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return tensor_bytes([*self.model.parameters(), *self.model.buffers(), *moments])


def memory_of_steps(config: Config) -> Memory:
    """Measure the memory of a process that trains with it; call it in a fresh process."""
    package()  # count its imports as imports
    start = resident_bytes()
    steps = Steps(config)
    memory = peak_memory(torch.device("cpu"), start, steps)
    steps.optimizer.zero_grad()  # otherwise the next step frees gradients that its record does not contain
    return memory._replace(tensors=steps.held_bytes() + tensor_peak(steps))


class Decoder:
    """Its generation, greedy like ours: top-1 sampling."""

    def __init__(self, config: ModelConfig, length: int, loops: int, dtype: torch.dtype) -> None:
        self.model: Any = build(config, length, loops).eval()
        self.loops, self.dtype = loops, dtype

    def __call__(self, prompts: Tensor, tokens: int) -> None:
        """Generate after prompts (B, S) int64."""
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32):
            self.model.generate(prompts, max_new_tokens=tokens, n_loops=self.loops, top_k=1)
