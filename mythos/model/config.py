"""The model's dimensions and switches, independent of training, data and logging."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mythos.section import (
    Count,
    CountOrZero,
    Identifiers,
    Layers,
    LayersOrZero,
    Positions,
    Section,
    Small,
    Weight,
    Width,
    WidthOrZero,
)

# Rows of grouped and fused kernels must be 16-byte multiples, and vocabulary tiles are fastest at 128.
VOCAB_MULTIPLE = 128


class ModelConfig(Section):
    """A recurrent-depth transformer: prelude, looped core, coda.

    Select a named size with ``preset`` and override any field by its name. Defaults are those of ``mythos_nano``.
    """

    preset: str = "mythos_nano"
    """Named size whose values the other fields of this section override; `mythos presets` prints all."""

    # Size
    vocab_size: Identifiers | Literal["auto"] = "auto"
    """Token ids the embedding has rows for (padded up to a multiple of 128); auto = the tokenizer's size."""
    dim: Width = 128
    """Width D of the residual stream; a multiple of 8."""
    prelude_layers: LayersOrZero = 1
    """Dense blocks run once before the loop."""
    core_layers: Layers = 1
    """Blocks inside the loop, run at every pass."""
    coda_layers: LayersOrZero = 1
    """Dense blocks run once after the loop."""
    context_length: Positions = 1024
    """Longest sequence in tokens the model is meant for; no parameter depends on it."""
    tie_embeddings: bool = True
    """Share one matrix between the token embedding and the output head."""
    scale_embeddings: bool = True
    """Multiply the rows of the embedding by sqrt(dim); false where the model has been another's, whose rows are not."""

    # Attention
    attention: Literal["gqa", "mla"] = "mla"
    """Grouped-query attention (arXiv 2305.13245) or multi-head latent attention (arXiv 2405.04434)."""
    n_heads: Count = 2
    """Query heads."""
    n_kv_heads: Count = 1
    """Key and value heads of gqa; must divide n_heads. Unused by mla."""
    head_dim: Width = 64
    """Dimension of a gqa head; even, because RoPE rotates pairs. Unused by mla."""
    kv_lora_rank: Width = 48
    """mla: width of the latent that keys and values are expanded from (what a cache stores per token)."""
    q_lora_rank: WidthOrZero = 0
    """mla: width of the query latent; 0 projects queries directly from the residual stream."""
    qk_rope_head_dim: Width = 32
    """mla: dimensions of a query or key head that carry RoPE; the rotated key is shared by all heads. Even."""
    qk_nope_head_dim: Width = 32
    """mla: dimensions of a query or key head without positions."""
    v_head_dim: Width = 64
    """mla: dimension of a value head."""
    qk_norm: bool = True
    """RMSNorm on query and key heads (arXiv 2010.04245); in mla on the query heads and the shared rotated key."""
    qk_bias: bool = False
    """gqa: a bias added to queries and keys before all else, as in Huginn (arXiv 2502.05171)."""
    rope_theta: Annotated[float, Field(gt=1, le=1e15)] = 10_000.0
    """Base of the RoPE frequencies (arXiv 2104.09864). Tables are computed, never stored."""
    value_embeddings: bool = False
    """gqa: every second layer, counted back from the last, adds a row of a table to the values of each token, weighted
    for each head by a gate on the layer's input (after arXiv 2410.17897, in the form of nanochat and Parcae)."""
    norm_eps: Small = 1e-6
    """Added to the mean square in every RMSNorm."""
    block_norm: Literal["pre", "peri", "sandwich"] = "pre"
    """Where a block has RMSNorms: pre = before attention and feed-forward; peri = also after each, before its result is
    added (Ouro, arXiv 2510.25741); sandwich = also on each sum (Huginn, arXiv 2502.05171)."""

    # Feed-forward
    ffn_dim: Width = 256
    """Hidden width of the dense feed-forward in prelude, coda and (core_ffn: dense) core; a multiple of 8."""
    dense_ffn: Literal["swiglu", "relu2"] = "swiglu"
    """Form of the dense feed-forward: swiglu is gated (arXiv 2002.05202), relu2 squares a ReLU (arXiv 2109.08668)."""
    core_ffn: Literal["moe", "dense"] = "moe"
    """Feed-forward of the core: mixture of experts or one dense feed-forward of width ffn_dim."""
    n_experts: Count = 8
    """Routed experts of a core block."""
    experts_per_token: Count = 2
    """Routed experts a token is sent to (top-k); at most n_experts, and at least 2 to train."""
    expert_dim: Width = 64
    """Hidden width of a routed expert; a multiple of 8."""
    n_shared_experts: CountOrZero = 1
    """Experts every token passes through."""
    shared_expert_dim: Width = 64
    """Hidden width of one shared expert; a multiple of 8."""
    router_bias_rate: Weight = 1e-3
    """Step gamma of the load-balancing bias, moved once per optimizer step (arXiv 2408.15664); 0 turns it off."""

    # Recurrence
    loops: Count = 8
    """Passes through the core the model is trained for on average: the default of depth.mean and of inference."""
    injection: Literal["lti", "linear", "add", "initial", "none"] = "lti"
    """How the encoded input enters every pass: lti = stable by construction (rho(A) < 1), linear = one unconstrained
    matrix over state and input, add = plain sum; initial = the first alone, the others read the normalised state (Ouro,
    arXiv 2510.25741); none = a fixed-depth transformer whose core runs once."""
    prelude_norm: bool = True
    """RMSNorm on the prelude's output before it is injected (arXiv 2604.12946: without it long runs blow up)."""
    readout_norm: bool = False
    """RMSNorm on the last state before it is read out, as in Huginn (arXiv 2502.05171)."""
    state_init: Literal["normal", "zero"] = "normal"
    """Initial state in training: truncated-normal noise of std sqrt(2 / (5 D)), or zeros. Evaluation starts at zero."""
    lora_rank: WidthOrZero = 4
    """Rank of the core's depth-wise low-rank adapter, one scale vector a trained loop (arXiv 2410.20672); 0 = none."""
    loop_embedding: bool = False
    """Add a sinusoidal embedding of the loop index to the core's input."""
    halting: Literal["none", "convergence", "second_difference", "gate", "act"] = "convergence"
    """Rule by which a position stops looping at inference, unless the caller names another: convergence = its state has
    nearly stopped to change, second_difference = the change has (arXiv 2509.23314), gate = a small network, trained
    beside the model, expects no gain, act = adaptive computation time (arXiv 1603.08983), trained with the model, for
    comparison only, none = all loops for all."""
    ponder_weight: Weight = 0.01
    """act: weight of the ponder cost (passes plus remainder of a position) beside the loss in nats."""


def padded_vocab_size(size: int) -> int:
    """Round a number of token ids up to the next multiple of 128."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def model_contradictions(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the fields and the explanation of every pair of values that cannot hold together.

    Fields that the chosen attention or feed-forward does not use are not looked at.
    """
    widths = ["dim", "ffn_dim"]
    if config.core_ffn == "moe":
        widths += ["expert_dim", *(["shared_expert_dim"] if config.n_shared_experts else [])]
        if config.experts_per_token > config.n_experts:
            given = f"got {config.experts_per_token} and {config.n_experts}"
            yield ("experts_per_token", "n_experts"), f"{given}; a token is sent to at most n_experts experts"
    for name in widths:
        if getattr(config, name) % 8:
            yield (name,), f"got {getattr(config, name)}; allowed: a multiple of 8 (rows of 16 bytes in bfloat16)"

    if config.attention == "gqa" and config.n_heads % config.n_kv_heads:
        given = f"got {config.n_heads} and {config.n_kv_heads}"
        yield ("n_heads", "n_kv_heads"), f"{given}; n_kv_heads must divide n_heads"
    if config.attention == "mla":
        for name in ("value_embeddings", "qk_bias"):
            if getattr(config, name):
                rule = "latent attention has nothing of its own to add it to"
                yield ("attention", name), f"got mla and true; {rule}: set attention to gqa, or leave out {name}"
    rotated = "head_dim" if config.attention == "gqa" else "qk_rope_head_dim"
    if getattr(config, rotated) % 2:
        yield (rotated,), f"got {getattr(config, rotated)}; allowed: an even number (RoPE rotates pairs)"

    if config.injection == "none":
        for name, only in (("loops", 1), ("lora_rank", 0), ("loop_embedding", False)):
            if getattr(config, name) != only:
                rule = f"without injection the core runs once, so {name} must be {str(only).lower()}"
                yield ("injection", name), f"got none and {str(getattr(config, name)).lower()}; {rule}"
