"""The model section of the configuration: dimensions, switches, and the registries of exchangeable parts."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mythos.model.registry import Contradiction, Registry, TrainingDepth
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

VOCAB_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this: a tile of the head's matmul kernels on GPUs."""

GATE_INPUTS = 32
"""Leading dimensions of a layer's input that the gate of its value embedding reads, as in nanochat."""

Part = Literal["prelude", "core", "coda"]
"""The stacks of blocks."""

# Filled at the end of this file, one line for each entry.
ATTENTIONS, CORES, FEED_FORWARDS, ROUTERS, INJECTIONS, LOOP_NORMS, HALTING_RULES = (Registry() for _ in range(7))


class ModelConfig(Section):
    """A recurrent-depth transformer: prelude, looped core, coda.

    Select a named size with `preset` and override any field by its name. Defaults are those of `mythos_nano`.
    """

    preset: str = "mythos_nano"
    """Named size that sets the other fields of this section unless they are given; `mythos presets` lists all."""

    # Size
    vocab_size: Identifiers | Literal["auto"] = "auto"
    """Number of token ids (the embedding is padded to a multiple of 128 rows); auto = the tokenizer's size."""
    dim: Width = 128
    """Width D of the residual stream; a multiple of 8."""
    prelude_layers: LayersOrZero = 1
    """Dense blocks that run once before the loop."""
    core_layers: Layers = 1
    """Blocks inside the loop; `loop_over` says in which order they are repeated."""
    coda_layers: LayersOrZero = 1
    """Dense blocks that run once after the loop."""
    context_length: Positions = 1024
    """Longest sequence in tokens that the model is meant for; no parameter depends on it."""
    tie_embeddings: bool = True
    """Use one matrix as token embedding and output head."""
    scale_embeddings: bool = True
    """Multiply embedding rows by sqrt(dim). Set to false for models imported from another code base, whose embedding
    rows are not scaled."""

    # Attention
    attention: Annotated[str, ATTENTIONS] = "mla"
    """Grouped-query attention (arXiv 2305.13245) or multi-head latent attention (arXiv 2405.04434)."""
    n_heads: Count = 2
    """Query heads."""
    n_kv_heads: Count = 1
    """gqa: key and value heads; must divide n_heads. Unused by mla."""
    head_dim: Width = 64
    """gqa: width of a head; even, because RoPE rotates pairs. Unused by mla."""
    kv_lora_rank: Width = 48
    """mla: width of the latent that keys and values are expanded from; the cache stores it for every token."""
    q_lora_rank: WidthOrZero = 0
    """mla: width of the query latent; 0 projects queries directly from the residual stream."""
    qk_rope_head_dim: Width = 32
    """mla: dimensions of a query or key head that carry RoPE; all heads share the rotated key. Even."""
    qk_nope_head_dim: Width = 32
    """mla: dimensions of a query or key head without RoPE."""
    v_head_dim: Width = 64
    """mla: width of a value head."""
    qk_norm: bool = True
    """RMSNorm on query and key heads (arXiv 2010.04245); in mla on the query heads and the shared rotated key."""
    qk_bias: bool = False
    """gqa: add a bias to queries and keys before norm and RoPE, as in Huginn (arXiv 2502.05171)."""
    rope_theta: Annotated[float, Field(gt=1, le=1e15)] = 10_000.0
    """Base of the RoPE frequencies (arXiv 2104.09864). Checkpoints store no tables: they are computed."""
    value_embeddings: bool = False
    """gqa: in every second layer, counted back from the last, add a learned row of the token to its values, weighted
    for each head by a gate on the layer's input (after arXiv 2410.17897, in the form of nanochat and Parcae)."""
    norm_eps: Small = 1e-6
    """Added to the mean square in every RMSNorm."""
    block_norm: Literal["pre", "peri", "sandwich"] = "pre"
    """Where a block has RMSNorms: pre = before attention and feed-forward; peri = also on the output of each, before it
    is added (Ouro, arXiv 2510.25741); sandwich = also on each sum (Huginn, arXiv 2502.05171)."""

    # Feed-forward
    ffn_dim: Width = 256
    """Hidden width of the dense feed-forward in prelude, coda and (core_ffn: dense) core; a multiple of 8."""
    dense_ffn: Annotated[str, FEED_FORWARDS] = "swiglu"
    """Form of the dense feed-forward: swiglu is gated (arXiv 2002.05202), relu2 squares a ReLU (arXiv 2109.08668)."""
    core_ffn: Annotated[str, CORES] = "moe"
    """Feed-forward of the core: a mixture of experts, or one dense feed-forward of width ffn_dim."""
    n_experts: Count = 8
    """Routed experts of a core block."""
    experts_per_token: Count = 2
    """Routed experts that a token is sent to (top-k); at most n_experts, and at least 2 to train."""
    expert_dim: Width = 64
    """Hidden width of a routed expert; a multiple of 8."""
    n_shared_experts: CountOrZero = 1
    """Experts that every token passes through."""
    shared_expert_dim: Width = 64
    """Hidden width of one shared expert; a multiple of 8."""
    expert_groups: Count = 1
    """Groups of neighbouring experts. A token's experts lie in `groups_per_token` of them, so that it travels to few
    processes under expert parallelism (arXiv 2412.19437, node-limited routing). Divides n_experts; 1 = no groups."""
    groups_per_token: Count = 1
    """Groups that a token's experts are chosen from: those in which the best experts_per_token / groups_per_token
    experts have the largest sum of affinity and balancing bias. Divides experts_per_token; at most expert_groups."""
    router_bias_rate: Weight = 1e-3
    """Step gamma of the load-balancing bias, which moves once per optimizer step (arXiv 2408.15664); 0 turns it off."""
    router_bias_per_loop: bool = False
    """Balance the load in each loop, by a load-balancing bias for each trained loop; false = over all loops together.
    Loops beyond `loops` count as the last."""
    router_loop: Annotated[str, ROUTERS] = "none"
    """How routing depends on the loop, by a table with a row for each trained loop, the last of which serves all later
    loops: none = not; bias = a bias on the router's logits; embedding = a factor on each dimension of its input."""
    router_loop_start: Weight = 0.5
    """router_loop: standard deviation of the table's initial values; 0 starts from the routing of `none`. The router's
    logits start with a standard deviation of 0.63. docs/depth.md has measurements."""

    # Recurrence
    loops: Count = 8
    """Mean number of passes through the core in training: the default of depth.mean and of inference."""
    injection: Annotated[str, INJECTIONS] = "lti"
    """How the encoded input enters a pass: lti = stable by construction (rho(A) < 1); orthogonal = lti whose decayed
    state keeps only what is orthogonal to the injected input (arXiv 2610.06833); linear = one unconstrained matrix over
    state and input; add = sum; initial = only in the first pass, later passes read the normalised state
    (Ouro, arXiv 2510.25741); none = a fixed-depth transformer whose core runs once."""
    loop_over: Literal["core", "layer"] = "core"
    """What a loop repeats: core = all core layers, one pass after the other; layer = each core layer by itself, all its
    passes before the next layer begins (arXiv 2607.16051). Then the encoded input of a layer is the last state of the
    layer before, normalised like the prelude's output."""
    lanes: Annotated[int, Field(ge=1, le=16)] = 1
    """lti: number K of state lanes, streams of width D with decays of their own, fast to slow. A pass reads a mixture
    of them, weighted by gates, and writes its change to each (after arXiv 2409.19606 and 2604.21254)."""
    prelude_norm: bool = True
    """RMSNorm on the prelude's output before it is injected (arXiv 2604.12946: long runs diverge without it)."""
    readout_norm: bool = False
    """RMSNorm on the last state before it is read out, as in Huginn (arXiv 2502.05171)."""
    state_init: Literal["normal", "zero"] = "normal"
    """Initial state in training: truncated-normal noise of std sqrt(2 / (5 D)), or zeros. Evaluation starts at zero."""
    lora_rank: WidthOrZero = 4
    """Rank of the core's low-rank adapter, which has one scale vector per trained loop (arXiv 2410.20672); 0 = none.
    An ablation at 136M parameters found almost no gain: perplexity 14.85 -> 14.81 (arXiv 2604.21254)."""
    loop_embedding: bool = False
    """Add a sinusoidal embedding of the loop index to the core's input."""
    loop_norm: Annotated[str, LOOP_NORMS] = "none"
    """How the norms before attention and feed-forward of the core depend on the loop: none = not; adaptive = a scale
    and a shift for each trained loop, zero at the start, the last of which serve all later loops (after arXiv
    2606.04438)."""
    residual_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the outputs of the core's attentions, feed-forwards and adapter before they are added. With 1 / N for N
    expected loops, learning rates carry over to other numbers of loops (arXiv 2606.18524)."""
    halting: Annotated[str, HALTING_RULES] = "convergence"
    """Rule by which a position stops looping at inference, unless the caller names another: none = all loops;
    convergence = the relative change of its state is small; second_difference = the change of that change is small
    (arXiv 2509.23314); gate = a small network, trained beside the model, expects no gain; act = adaptive computation
    time (arXiv 1603.08983), trained with the model, for comparison only."""
    ponder_weight: Weight = 0.01
    """act: weight of the ponder cost (passes plus remainder of a position), relative to the loss in nats."""


def loop_stages(config: ModelConfig) -> list[range]:
    """The core layers of each loop of a forward pass; the loops run one after the other, each with all its passes."""
    if config.loop_over == "core":
        return [range(config.core_layers)]
    return [range(layer, layer + 1) for layer in range(config.core_layers)]


def padded_vocab_size(size: int) -> int:
    """Round a number of token ids up to the next multiple of 128."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def model_contradictions(config: ModelConfig) -> Iterator[Contradiction]:
    """Yield the names of fields whose values cannot be combined, with an explanation.

    Fields that the chosen attention or feed-forward does not use are not checked.
    """
    yield from _multiples_of_8(config, "dim", "ffn_dim")
    for registry, name in registered_parts(config):
        yield from registry.contradictions(name, config)
    if config.lanes > 1 and config.injection != "lti":
        values = f"got {config.lanes} and {config.injection}"
        rule = "lanes differ by their decays, which only lti has: set lanes to 1, or use lti"
        yield ("lanes", "injection"), f"{values}; {rule}"
    if config.loop_over == "layer" and config.core_layers == 1:
        rule = "one layer has no order: leave out loop_over, or set core_layers to at least 2"
        yield ("loop_over", "core_layers"), f"got layer and 1; {rule}"


def model_training_contradictions(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    """Yield full paths of fields with which the model cannot be trained, though it can run, with an explanation."""
    for registry, name in registered_parts(config):
        yield from registry.entries[name].training_rules(config, depth)


def registered_parts(config: ModelConfig) -> tuple[tuple[Registry, str], ...]:
    """The registries and the names that the configuration chooses of them."""
    return (
        (CORES, config.core_ffn),
        (ROUTERS, config.router_loop),
        (LOOP_NORMS, config.loop_norm),
        (FEED_FORWARDS, config.dense_ffn),
        (ATTENTIONS, config.attention),
        (INJECTIONS, config.injection),
        (HALTING_RULES, config.halting),
    )


def _multiples_of_8(config: ModelConfig, *names: str) -> Iterator[Contradiction]:
    for name in names:
        if getattr(config, name) % 8:
            yield (name,), f"got {getattr(config, name)}; allowed: a multiple of 8 (rows of 16 bytes in bfloat16)"


def _even(config: ModelConfig, name: str) -> Iterator[Contradiction]:
    if getattr(config, name) % 2:
        yield (name,), f"got {getattr(config, name)}; allowed: an even number (RoPE rotates pairs)"


def _moe_rules(config: ModelConfig) -> Iterator[Contradiction]:
    if config.experts_per_token > config.n_experts:
        values = f"got {config.experts_per_token} and {config.n_experts}"
        yield ("experts_per_token", "n_experts"), f"{values}; a token is sent to at most n_experts experts"
    elif config.n_experts % config.expert_groups:
        values = f"got {config.expert_groups} and {config.n_experts}"
        yield ("expert_groups", "n_experts"), f"{values}; groups are equally large: expert_groups must divide n_experts"
    else:
        yield from _group_rules(config)
    yield from _multiples_of_8(config, "expert_dim", *(["shared_expert_dim"] if config.n_shared_experts else []))


def _group_rules(config: ModelConfig) -> Iterator[Contradiction]:
    groups, chosen = config.expert_groups, config.groups_per_token
    if chosen > groups:
        yield ("groups_per_token", "expert_groups"), f"got {chosen} and {groups}; a token uses at most all groups"
    if config.experts_per_token % chosen:
        values = f"got {chosen} and {config.experts_per_token}"
        rule = "a group is judged by its best experts_per_token / groups_per_token experts: this must be whole"
        yield ("groups_per_token", "experts_per_token"), f"{values}; {rule}"
    if config.experts_per_token > (eligible := chosen * (config.n_experts // groups)):
        values = f"got {config.experts_per_token}, and {chosen} of {groups} groups, which have {eligible} experts"
        yield ("experts_per_token", "groups_per_token"), f"{values}; give fewer experts, or more groups per token"


def _dense_rules(config: ModelConfig) -> Iterator[Contradiction]:
    for name, only in (("router_loop", "none"), ("router_bias_per_loop", False), ("expert_groups", 1)):
        if getattr(config, name) != only:
            rule = f"a dense core has no router: set {name} to {str(only).lower()}, or core_ffn to moe"
            yield ("core_ffn", name), f"got dense and {str(getattr(config, name)).lower()}; {rule}"


def _gqa_rules(config: ModelConfig) -> Iterator[Contradiction]:
    if config.n_heads % config.n_kv_heads:
        values = f"got {config.n_heads} and {config.n_kv_heads}"
        yield ("n_heads", "n_kv_heads"), f"{values}; n_kv_heads must divide n_heads"
    yield from _even(config, "head_dim")


def _mla_rules(config: ModelConfig) -> Iterator[Contradiction]:
    for name in ("value_embeddings", "qk_bias"):
        if getattr(config, name):
            rule = f"latent attention does not support {name}"
            yield ("attention", name), f"got mla and true; {rule}: set attention to gqa, or leave out {name}"
    yield from _even(config, "qk_rope_head_dim")


def _fixed_depth_rules(config: ModelConfig) -> Iterator[Contradiction]:
    only_values = {"loops": 1, "lora_rank": 0, "loop_embedding": False, "loop_over": "core"}
    only_values |= {"loop_norm": "none", "residual_scale": 1.0}
    if config.core_ffn == "moe":
        only_values |= {"router_loop": "none", "router_bias_per_loop": False}
    for name, only in only_values.items():
        if getattr(config, name) != only:
            rule = f"without injection the core runs once, so {name} must be {str(only).lower()}"
            yield ("injection", name), f"got none and {str(getattr(config, name)).lower()}; {rule}"


def _trained_halting_rules(config: ModelConfig) -> Iterator[Contradiction]:
    if config.loop_over == "layer":
        rule = "this rule is trained on shallower readouts of a run, and with loop_over: layer a run contains none"
        allowed = "set halting to none, convergence or second_difference"
        yield ("loop_over", "halting"), f"got layer and {config.halting}; {rule}: {allowed}"


def _several_experts(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    if config.experts_per_token == 1:
        rule = "the weights of a token's experts sum to 1, so with a single expert the router would get no gradient"
        yield ("model.experts_per_token",), f"got 1; {rule}: give 2 or more, or set model.core_ffn to dense"


def _experts(config: ModelConfig) -> str:
    shared = f", {config.n_shared_experts} shared" if config.n_shared_experts else ""
    groups = f" in {config.groups_per_token} of {config.expert_groups} groups" if config.expert_groups > 1 else ""
    return f"{config.experts_per_token} of {config.n_experts} experts per token{groups}{shared}"


def _first_loop_has_gradient(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    deepest = depth.deepest
    for path, loops in depth.gradient_limits:
        if loops < deepest.loops:
            values = f"got {config.injection}, {loops:g} and sequences of up to {deepest.loops:g} loops"
            rule = (
                f"{config.injection} reads the input in the first loop only, so embedding and prelude learn nothing "
                "from a sequence whose first loop carries no gradient: set depth.backprop to null (all loops) and "
                "depth.backprop_curriculum.shape to none"
            )
            yield ("model.injection", path, deepest.path), f"{values}; {rule}"


def _lanes_are_read_with_gradient(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    if config.lanes > 1 and depth.backprop.loops == 1:
        rule = "what a pass writes to the lanes is read in the next pass only: set depth.backprop to 2 or more"
        yield ("model.lanes", depth.backprop.path), f"got {config.lanes} and gradient through 1 loop; {rule}"


def _earlier_loops(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    if depth.mean.loops == 1:
        rule = "it learns from loops before the last, and there are none: set the first to none or convergence"
        yield ("model.halting", depth.mean.path), f"got {config.halting} and a mean of 1 loop; {rule}"


def _earlier_loops_with_gradient(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
    yield from _earlier_loops(config, depth)
    if depth.mean.loops != 1 and depth.backprop.loops == 1:
        rule = (
            f"the last loop takes all remaining probability, so {config.halting} learns only from the loops before it: "
            "set depth.backprop to 2 or more"
        )
        yield ("model.halting", depth.backprop.path), f"got {config.halting} and gradient through 1 loop; {rule}"


# Name, class (imported at first use, because it imports torch), what the class requires of other fields, and facts.
ATTENTIONS.add("gqa", "mythos.model.attention.gqa:GroupedQueryAttention", _gqa_rules)
ATTENTIONS.add("mla", "mythos.model.attention.mla:MultiHeadLatentAttention", _mla_rules)

CORES.add("moe", "mythos.model.moe:MixtureCore", _moe_rules, training_rules=_several_experts, summary=_experts)
CORES.add("dense", "mythos.model.moe:DenseCore", _dense_rules)

ROUTERS.add("none", "mythos.model.moe:Router")
ROUTERS.add("bias", "mythos.model.moe:LoopBiasRouter")
ROUTERS.add("embedding", "mythos.model.moe:LoopEmbeddingRouter")

LOOP_NORMS.add("none", None)
LOOP_NORMS.add("adaptive", "mythos.model.layers:LoopNorm")

FEED_FORWARDS.add("swiglu", "mythos.model.layers:SwiGLU")
FEED_FORWARDS.add("relu2", "mythos.model.layers:SquaredReLU")

INJECTIONS.add("lti", "mythos.model.injection:LTIInjection", training_rules=_lanes_are_read_with_gradient)
INJECTIONS.add("orthogonal", "mythos.model.injection:OrthogonalInjection")
INJECTIONS.add("linear", "mythos.model.injection:LinearInjection")
INJECTIONS.add("add", "mythos.model.injection:AddInjection")
INJECTIONS.add("initial", "mythos.model.injection:InitialInjection", training_rules=_first_loop_has_gradient)
INJECTIONS.add("none", None, _fixed_depth_rules)

HALTING_RULES.add("none", None)
HALTING_RULES.add("convergence", "mythos.model.halting:Convergence")
HALTING_RULES.add("second_difference", "mythos.model.halting:SecondDifference")
HALTING_RULES.add("gate", "mythos.model.halting:Gate", _trained_halting_rules, training_rules=_earlier_loops)
HALTING_RULES.add(
    "act", "mythos.model.halting:Act", _trained_halting_rules, training_rules=_earlier_loops_with_gradient
)
