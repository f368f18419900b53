"""Decoding written out: every position runs alone, in order, in float64, over keys and values expanded per head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, cos, exp, log1p, sin, sqrt

import torch
from torch import Tensor

from mythos.model.rdt import RecurrentDepthTransformer

States = list[Tensor]
"""The states of one position, h_0 first."""


def converged(threshold: float) -> Callable[[States], bool]:
    return lambda h: bool((h[-1] - h[-2]).norm() < threshold * h[-1].norm())


def straightened(threshold: float) -> Callable[[States], bool]:
    return lambda h: len(h) > 2 and bool((h[-1] - 2 * h[-2] + h[-3]).norm() < threshold * h[-1].norm())


@dataclass
class SlowRow:
    """One row: append tokens one by one."""

    model: RecurrentDepthTransformer
    stops: Callable[[States], bool] = lambda states: False
    reads: Callable[[States], Tensor] = lambda states: states[-1]
    cache_loops: int | None = None
    kept: dict[tuple[str, int], list[list[tuple[Tensor, Tensor]]]] = field(default_factory=dict)
    """Of each layer and position, keys (H, d) and values (H, v) of every loop it ran."""

    def __post_init__(self) -> None:
        self.config = self.model.config
        self.weights = {name: p.detach().double() for name, p in self.model.named_parameters()}
        self.weights |= {name: b.double() for name, b in self.model.named_buffers()}

    def append(self, token: int, limit: int) -> tuple[Tensor, int]:
        """Logits (V,) after the token, and the loops it ran."""
        config, w = self.config, self.weights
        self.token = token
        x = w["embedding.weight"][token] * sqrt(config.dim)
        for layer in range(config.prelude_layers):
            x = self.block(f"prelude.{layer}.", ("prelude", layer), x, 1)
        looped = config.injection != "none"
        e = self.norm("prelude_norm.", x) if looped and config.prelude_norm else x
        stages, passes = [list(range(config.core_layers))], 0
        if config.loop_over == "layer":
            stages = [[layer] for layer in stages[0]]
        for number, layers in enumerate(stages):
            if number:
                e = self.norm(f"recurrence.stage_norms.{number - 1}.", x) if config.prelude_norm else x
            states, lanes = [torch.zeros_like(e)], [torch.zeros_like(e)] * config.lanes
            for loop in range(1, limit + 1):
                if config.lanes > 1:
                    lanes, shown = self.lanes(lanes, e, loop, layers)
                else:
                    shown = self.core(states[-1], e, loop, layers)
                states.append(shown)
                if self.stops(states):
                    break
            x = self.reads(states)
            passes += len(states) - 1
        if looped:
            x = self.norm("readout_norm.", x) if config.readout_norm else x
            x = w["readout.weight"] @ x
        for layer in range(config.coda_layers):
            x = self.block(f"coda.{layer}.", ("coda", layer), x, 1)
        head = w["embedding.weight" if config.tie_embeddings else "head.weight"]
        return head @ self.norm("norm.", x), ceil(passes / len(stages))

    def lanes(self, lanes: list[Tensor], e: Tensor, loop: int, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The next lanes, and what the pass computed."""
        w, at = self.weights, "recurrence."
        injected = []
        for lane, dts, log_a in zip(lanes, w[at + "injection.dt"], w[at + "injection.log_a"], strict=True):
            delta = torch.tensor([log1p(exp(dt)) for dt in dts.tolist()]).double()
            injected.append(torch.exp(-delta * log_a.exp()) * lane + delta * (w[at + "injection.weight"] @ e))
        features = torch.cat([self.norm(at + "lanes.norm.", lane) for lane in injected])
        gates = (w[at + "lanes.weight"] @ features + w[at + "lanes.bias"]).tolist()
        reads, writes = gates[: len(lanes)], gates[len(lanes) :]
        total = sum(exp(gate) for gate in reads)
        u = sum((exp(gate) / total * lane for gate, lane in zip(reads, injected, strict=True)), torch.zeros_like(e))
        shown = self.blocks(u, loop, layers)
        written = [lane + 2 / (1 + exp(-gate)) * (shown - u) for gate, lane in zip(writes, injected, strict=True)]
        return written, shown

    def core(self, h: Tensor, e: Tensor, loop: int, layers: Sequence[int]) -> Tensor:
        config, w, at = self.config, self.weights, "recurrence."
        if config.injection in ("lti", "orthogonal"):
            delta = torch.tensor([log1p(exp(dt)) for dt in w[at + "injection.dt"].tolist()]).double()
            kept = torch.exp(-delta * w[at + "injection.log_a"].exp()) * h
            added = delta * (w[at + "injection.weight"] @ e)
            if config.injection == "orthogonal":
                kept = kept - added * (kept @ added / (added @ added + 1e-6))
            u = kept + added
        elif config.injection == "linear":
            u = w[at + "injection.state.weight"] @ h + w[at + "injection.input.weight"] @ e
        else:
            u = h + e if config.injection == "add" else e
        if config.injection == "initial" and loop > 1:
            u = self.norm(at + "injection.norm.", h)
        return self.blocks(u, loop, layers)

    def blocks(self, u: Tensor, loop: int, layers: Sequence[int]) -> Tensor:
        config, w, at = self.config, self.weights, "recurrence."
        if config.loop_embedding:
            half = config.dim // 2
            angles = [(loop - 1) * 10_000 ** (-i / half) for i in range(half)]
            waves = torch.tensor([sin(a) for a in angles] + [cos(a) for a in angles], dtype=torch.float64)
            u = u + w[at + "embedding.gain"] * waves
        x = u
        for layer in layers:
            x = self.block(f"{at}blocks.{layer}.", ("core", layer), x, loop)
        if config.lora_rank:
            scale = w[at + "adapter.scale"][min(loop, config.loops) - 1]
            low = w[at + "adapter.down.weight"] @ self.norm(at + "adapter.norm.", u)
            x = x + config.residual_scale * (w[at + "adapter.up.weight"] @ (low * scale))
        return x

    def block(self, at: str, layer: tuple[str, int], x: Tensor, loop: int) -> Tensor:
        attended = self.attention(at + "attention.", layer, self.loop_norm(at + "attention_norm.", x, loop), loop)
        scale = self.config.residual_scale if layer[0] == "core" else 1
        x = self.add(at + "attention_out_norm.", x, attended, scale)
        normed = self.loop_norm(at + "ffn_norm.", x, loop)
        if at + "ffn.router.weight" in self.weights:
            return self.add(at + "ffn_out_norm.", x, self.experts(at + "ffn.", normed, loop), scale)
        ffn = self.swiglu if self.config.dense_ffn == "swiglu" else self.squared_relu
        return self.add(at + "ffn_out_norm.", x, ffn(at + "ffn.", normed), scale)

    def add(self, at: str, x: Tensor, output: Tensor, scale: float) -> Tensor:
        kind = self.config.block_norm
        if kind == "pre":
            return x + scale * output
        return x + scale * self.norm(at, output) if kind == "peri" else self.norm(at, x + scale * output)

    def of_loop(self, name: str, loop: int) -> Tensor | float:
        """The row of a table with one for each trained loop; 0 without the table."""
        table = self.weights.get(name)
        return 0.0 if table is None else table[min(loop, len(table)) - 1]

    def loop_norm(self, at: str, x: Tensor, loop: int) -> Tensor:
        return (1 + self.of_loop(at + "loop_scale", loop)) * self.norm(at, x) + self.of_loop(at + "loop_shift", loop)

    def attention(self, at: str, layer: tuple[str, int], x: Tensor, loop: int) -> Tensor:
        kept = self.kept.setdefault(layer, [])
        if loop == 1:
            kept.append([])
        query, key, value = (self.latent_heads if self.config.attention == "mla" else self.shared_heads)(
            at, x, len(kept) - 1
        )
        if self.config.value_embeddings and self.from_last(layer) % 2 == 0:
            row = self.weights["value_embeddings.{}_{}.weight".format(*layer)][self.token].view(-1, len(value[0]))
            gate = 2 * torch.sigmoid(self.weights[at + "value_gate.weight"] @ x[:32])
            value = value + (gate.unsqueeze(1) * row).repeat_interleave(len(value) // len(row), dim=0)
        kept[-1].append((key, value))
        seen = [ran[-1] if ran is kept[-1] else self.serves(ran, loop) for ran in kept]
        results = []
        for head, q in enumerate(query):
            scores = torch.stack([q @ key[head] / sqrt(len(q)) for key, _ in seen])
            weights = scores.exp() / scores.exp().sum()
            results.append(sum(p * value[head] for p, (_, value) in zip(weights, seen, strict=True)))
        return self.weights[at + "out.weight"] @ torch.cat(results)

    def from_last(self, layer: tuple[str, int]) -> int:
        """How many layers come after this one, those of the core counted once."""
        config = self.config
        after = {"coda": 0, "core": config.coda_layers, "prelude": config.coda_layers + config.core_layers}
        return after[layer[0]] + getattr(config, f"{layer[0]}_layers") - 1 - layer[1]

    def serves(self, ran: list[tuple[Tensor, Tensor]], loop: int) -> tuple[Tensor, Tensor]:
        """What an earlier position serves to a later one in a loop: its own of that loop, or its last."""
        if self.cache_loops is None:
            return ran[min(loop, len(ran)) - 1]
        slot = (loop - 1) % self.cache_loops
        return ran[slot :: self.cache_loops][-1] if slot < len(ran) else ran[-1]

    def shared_heads(self, at: str, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        config, w = self.config, self.weights
        query, key, value = (w[f"{at}{name}.weight"] @ x for name in ("query", "key", "value"))
        if config.qk_bias:
            query, key = query + w[at + "query_bias"], key + w[at + "key_bias"]
        query, key, value = (heads.split(config.head_dim) for heads in (query, key, value))
        if config.qk_norm:
            query = [self.norm(at + "query_norm.", q) for q in query]
            key = [self.norm(at + "key_norm.", k) for k in key]
        queries = torch.stack([self.rotate(q, position) for q in query])
        of_head = [head * config.n_kv_heads // config.n_heads for head in range(config.n_heads)]
        return queries, torch.stack([self.rotate(key[g], position) for g in of_head]), torch.stack(value)[of_head]

    def latent_heads(self, at: str, x: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
        config, w = self.config, self.weights
        nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
        low = self.norm(at + "query_latent_norm.", w[at + "query_down.weight"] @ x) if config.q_lora_rank else x
        query = (w[at + "query.weight"] @ low).split(nope + config.qk_rope_head_dim)
        down = w[at + "key_value_down.weight"] @ x
        latent, rope_key = self.norm(at + "latent_norm.", down[:rank]), down[rank:]
        if config.qk_norm:
            query = [self.norm(at + "query_norm.", q) for q in query]
            rope_key = self.norm(at + "rope_key_norm.", rope_key)
        rope_key = self.rotate(rope_key, position)
        heads = (w[at + "key_value_up.weight"] @ latent).split(nope + config.v_head_dim)
        queries = [torch.cat((q[:nope], self.rotate(q[nope:], position))) for q in query]
        keys = [torch.cat((head[:nope], rope_key)) for head in heads]
        return torch.stack(queries), torch.stack(keys), torch.stack([head[nope:] for head in heads])

    def rotate(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        pairs = torch.complex(x[:half], x[half:])
        angles = torch.tensor([position * self.config.rope_theta ** (-i / half) for i in range(half)])
        turned = pairs * torch.polar(torch.ones(half, dtype=torch.float64), angles.double())
        return torch.cat((turned.real, turned.imag))

    def norm(self, at: str, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.config.norm_eps).sqrt() * self.weights[at + "weight"]

    def swiglu(self, at: str, x: Tensor) -> Tensor:
        gate, up = (self.weights[at + "gate_up.weight"] @ x).chunk(2)
        return self.weights[at + "down.weight"] @ (gate * torch.sigmoid(gate) * up)

    def squared_relu(self, at: str, x: Tensor) -> Tensor:
        return self.weights[at + "down.weight"] @ (self.weights[at + "up.weight"] @ x).clamp(min=0) ** 2

    def experts(self, at: str, x: Tensor, loop: int) -> Tensor:
        w, chosen, groups = self.weights, self.config.experts_per_token, self.config.groups_per_token
        logits = w[at + "router.weight"] @ (x * (1 + self.of_loop(at + "router.loop_embedding", loop)))
        affinity = torch.sigmoid(logits + self.of_loop(at + "router.loop_bias", loop))
        balance = w[at + "router.bias"]
        biased = (affinity + (balance if balance.ndim == 1 else balance[min(loop, len(balance)) - 1])).tolist()
        ranked = sorted(range(len(biased)), key=lambda expert: -biased[expert])
        size = len(biased) // self.config.expert_groups
        of_group = {group: [e for e in ranked if e // size == group] for group in range(self.config.expert_groups)}
        by_score = sorted(of_group, key=lambda g: -sum(biased[e] for e in of_group[g][: chosen // groups]))
        best = [expert for expert in ranked if expert // size in by_score[:groups]][:chosen]
        output = self.swiglu(at + "shared.", x) if self.config.n_shared_experts else torch.zeros_like(x)
        for expert in best:
            gate, up = (x @ w[at + "gate_up"][expert]).chunk(2)
            routed = (gate * torch.sigmoid(gate) * up) @ w[at + "down"][expert]
            output = output + affinity[expert] / affinity[best].sum() * routed
        return output


def slow_decode(
    model: RecurrentDepthTransformer, tokens: Sequence[int], limits: Sequence[int], **settings: object
) -> tuple[Tensor, list[int]]:
    """Logits (S, V) of one row and the loops of each position, the most of which `limits` gives; see `SlowRow`."""
    row = SlowRow(model, **settings)
    results = [row.append(token, limit) for token, limit in zip(tokens, limits, strict=True)]
    return torch.stack([logits for logits, _ in results]), [loops for _, loops in results]
