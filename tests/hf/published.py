"""Published looped models written out from their equations, in float64 and position by position; with random weights.

Each gives what it publishes (a config.json and named tensors) and the logits of a row of ids, every position run for
the same loops from a zero state.
"""

import json
from dataclasses import dataclass
from math import exp, pi, sqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.noise import name_generator

Shapes = dict[str, tuple[int, ...]]
EPS32 = 2.0**-23


@dataclass
class Published:
    """A small model: its config.json with changes, and its tensors, filled with noise."""

    values: dict[str, Any]
    scales: ClassVar[dict[str, float]] = {}
    """Standard deviation of the noise by the end of a tensor's name; otherwise it follows from the fan-in."""

    def __post_init__(self) -> None:
        self.tensors = {name: self.noise(name, shape) for name, shape in self.shapes().items()}
        self.w = {name: tensor.double() for name, tensor in self.tensors.items()}

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=name_generator(11, name))
        scale = next((s for end, s in self.scales.items() if name.endswith(end)), 0.3 if len(shape) == 1 else None)
        drawn *= shape[-1] ** -0.5 if scale is None else scale
        return drawn + (1 if len(shape) == 1 and name.endswith("weight") else 0)

    def shapes(self) -> Shapes:
        raise NotImplementedError

    def extra(self) -> dict[str, Tensor]:
        """Published tensors that do not influence the result."""
        return {}

    def logits(self, ids: list[int], loops: int) -> Tensor:
        """(S, V) float64."""
        raise NotImplementedError

    def save(self, folder: Path, **changes: Any) -> Path:
        """Write it as published, in a file of torch.save."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.values | changes))
        torch.save(self.tensors | self.extra(), folder / "pytorch_model.bin")
        return folder

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * self.w[f"{name}.weight"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return torch.stack([self.w[f"{name}.weight"] @ row for row in x])


def turned(head: Tensor, position: int, base: float, neighbours: bool) -> Tensor:
    """RoPE of one head (d,) at a position: pairs as complex numbers, each rotated by its own angle."""
    half = len(head) // 2
    real, imaginary = (head[0::2], head[1::2]) if neighbours else (head[:half], head[half:])
    turn = torch.tensor([position * base ** (-2 * i / len(head)) for i in range(half)], dtype=torch.float64)
    result = torch.complex(real, imaginary) * torch.exp(1j * turn)
    if not neighbours:
        return torch.cat((result.real, result.imag))
    return torch.stack((result.real, result.imag), dim=1).flatten()


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention, each (S, H, d) -> (S, H d)."""
    rows = []
    for place in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            scores = [exp(query[place, head] @ key[seen, head] / sqrt(query.shape[2])) for seen in range(place + 1)]
            heads.append(sum(s * value[seen, head] for seen, s in enumerate(scores)) / sum(scores))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def table(length: int, dim: int, base: float) -> Tensor:
    """Cosines and sines (1, S, 1, d / 2, 2) as SandyResearch and seal-rg store them."""
    angle = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, dim, 2) / dim))
    return torch.stack((angle.cos(), (pi / 2 - angle).cos()), dim=-1)[None, :, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


PARCAE = {
    "_class_name": "ParcaeConfig",
    "name": "parcae-small",
    "block_size": 64,
    "vocab_size": 200,
    "padding_multiple": 64,
    "padded_vocab_size": 256,
    "n_embd": 48,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 96,
    "bias": False,
    "qk_bias": False,
    "tie_embeddings": True,
    "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50_000},
    "block_class_name": "TransformerPreNormBlock",
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5,
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "ReLU2",
    "clip_qkv": None,
    "qk_norm": True,
    "logit_softcap": None,
    "prelude_norm": True,
    "init_strategy": "scaled-zero",
    "init_orthogonal": True,
    "mup_model_scaling_factor": 1,
    "injection_type": "diagonal",
    "state_init": "like-init",
    "recurrent_embedding_dimension": 48,
    "recurrent_intermediation_embedding_dimension": 96,
    "recurrent_num_attention_heads": None,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 2,
    "mean_recurrence": 8,
    "mean_backprop_depth": 4,
    "recurrent_iteration_method": "per-sequence",
    "sampling_scheme": "poisson-truncated-full",
}


class PublishedParcae(Published):
    """x = wte; P blocks; norm; T times a h + d (B e) and N blocks; C; M blocks; norm; head."""

    # Queries of about 1e-2, small enough for the epsilon of their norm to matter.
    scales: ClassVar[dict[str, float]] = {"c_q.weight": 2e-4, "ve_gate.weight": 0.5, "dt_bias": 1.0, "A_log": 1.0}

    @property
    def parts(self) -> list[tuple[str, int]]:
        names = {"prelude": "prelude", "core_block": "recurrent_block", "coda": "coda"}
        return [(ours, self.values[f"n_layers_in_{theirs}"]) for ours, theirs in names.items()]

    def shapes(self) -> Shapes:
        v = self.values
        rows, dim, heads, ffn = v["padded_vocab_size"], v["n_embd"], v["num_attention_heads"], v["intermediate_size"]
        shapes: Shapes = {"transformer.wte.weight": (rows, dim), "transformer.ln_f.weight": (dim,)}
        if v["prelude_norm"]:
            shapes["transformer.ln_prelude.weight"] = (dim,)
        if not v["tie_embeddings"]:
            shapes["lm_head.weight"] = (rows, dim)
        shapes |= {"transformer.C.weight": (dim, dim), "transformer.adapter.B": (dim, dim)}
        shapes |= {"transformer.adapter.A_log": (dim,), "transformer.adapter.dt_bias": (dim,)}
        layers = [f"transformer.{part}.{layer}" for part, count in self.parts for layer in range(count)]
        for index, at in enumerate(layers):
            shapes |= {f"{at}.norm_{n}.weight": (dim,) for n in (1, 2)}
            shapes |= {f"{at}.attn.c_{name}.weight": (dim, dim) for name in ("q", "k", "v", "proj")}
            shapes |= {f"{at}.mlp.fc.weight": (ffn, dim), f"{at}.mlp.proj.weight": (dim, ffn)}
            if (len(layers) - index) % 2:
                shapes |= {f"value_embeds.{index}.weight": (rows, dim), f"{at}.attn.ve_gate.weight": (heads, 32)}
        return shapes

    def noise(self, name: str, shape: tuple[int, ...]) -> Tensor:
        drawn = super().noise(name, shape)
        if name.endswith("A_log"):  # outside of our bounds; only the product with Delta counts
            drawn[:4] = torch.tensor([3.5, -7.0, 0.0, 2.5])
        if name.endswith("dt_bias"):
            drawn[:4] = torch.tensor([-4.0, 3.0, 7.0, 8.0])
        return drawn

    def extra(self) -> dict[str, Tensor]:
        v = self.values
        extra = {"freqs_cis": table(v["block_size"], v["n_embd"] // v["num_attention_heads"], 50_000)}
        return extra | ({"lm_head.weight": self.tensors["transformer.wte.weight"]} if v["tie_embeddings"] else {})

    def logits(self, ids: list[int], loops: int) -> Tensor:
        v, w = self.values, self.w
        numbers = iter(range(99))
        layers = {part: [next(numbers) for _ in range(count)] for part, count in self.parts}

        def run(part: str, x: Tensor) -> Tensor:
            for layer, index in enumerate(layers[part]):
                x = self.block(f"transformer.{part}.{layer}", index, x, ids)
            return x

        e = run("prelude", w["transformer.wte.weight"][ids])
        if v["prelude_norm"]:
            e = self.norm("transformer.ln_prelude", e, v["norm_eps"])
        delta = torch.log(1 + torch.exp(w["transformer.adapter.dt_bias"]))
        decay = torch.exp(-delta * torch.exp(w["transformer.adapter.A_log"]))
        h = torch.zeros_like(e)
        for _ in range(loops):
            h = run("core_block", decay * h + delta * torch.stack([w["transformer.adapter.B"] @ row for row in e]))
        x = self.norm("transformer.ln_f", run("coda", self.linear("transformer.C", h)), v["norm_eps"])
        return x @ w["transformer.wte.weight" if v["tie_embeddings"] else "lm_head.weight"].T

    def block(self, at: str, index: int, x: Tensor, ids: list[int]) -> Tensor:
        v, w = self.values, self.w
        heads = v["num_attention_heads"]
        normed = self.norm(f"{at}.norm_1", x, v["norm_eps"])
        q, k, value = (self.linear(f"{at}.attn.c_{n}", normed).view(len(ids), heads, -1) for n in "qkv")
        if f"{at}.attn.ve_gate.weight" in w:
            gate = 2 / (1 + torch.exp(-normed[:, :32] @ w[f"{at}.attn.ve_gate.weight"].T))
            value = value + gate.unsqueeze(-1) * w[f"value_embeds.{index}.weight"][ids].view_as(value)

        def placed(x: Tensor) -> Tensor:
            rows = [[turned(head, place, 50_000, neighbours=True) for head in row] for place, row in enumerate(x)]
            x = torch.stack([torch.stack(row) for row in rows])
            return x / (x.pow(2).mean(-1, keepdim=True) + EPS32).sqrt()

        x = x + self.linear(f"{at}.attn.c_proj", attended(placed(q), placed(k), value))
        hidden = self.linear(f"{at}.mlp.fc", self.norm(f"{at}.norm_2", x, v["norm_eps"])).clamp(min=0)
        return x + self.linear(f"{at}.mlp.proj", hidden * hidden / 2)


HUGINN = {
    "model_type": "huginn_raven",
    "architectures": ["RavenForCausalLM"],
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "n_embd": 40,
    "n_heads": 5,
    "n_layers": 5,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "n_layers_in_coda": 2,
    "intermediate_size": 56,
    "mean_recurrence": 8,
    "block_size": 64,
    "vocab_size": 256,
    "padded_vocab_size": 256,
    "norm_eps": 1e-6,
    "rope_base": 50_000,
    "qk_bias": True,
    "bias": False,
    "tie_embeddings": True,
    "injection_type": "linear",
    "state_init": "like-init",
    "init_values": {"std": 0.1, "embed_scale": 6.3},
    "test_time_noise": 0,
}


class PublishedHuginn(Published):
    """x = s wte; P blocks; T times adapter [h, x] and N blocks; norm; M blocks; the same norm; head."""

    @property
    def parts(self) -> list[tuple[str, int]]:
        names = {"prelude": "prelude", "core_block": "recurrent_block", "coda": "coda"}
        return [(ours, self.values[f"n_layers_in_{theirs}"]) for ours, theirs in names.items()]

    def shapes(self) -> Shapes:
        v = self.values
        dim, heads, ffn = v["n_embd"], v["n_heads"], v["intermediate_size"]
        shapes: Shapes = {"transformer.wte.weight": (v["vocab_size"], dim), "transformer.ln_f.weight": (dim,)}
        shapes["transformer.adapter.weight"] = (dim, 2 * dim)
        if not v["tie_embeddings"]:
            shapes["lm_head.weight"] = (v["vocab_size"], dim)
        for at in (f"transformer.{part}.{layer}" for part, count in self.parts for layer in range(count)):
            shapes |= {f"{at}.norm_{n}.weight": (dim,) for n in (1, 2, 3, 4)}
            shapes |= {f"{at}.attn.Wqkv.weight": (3 * dim, dim), f"{at}.attn.proj.weight": (dim, dim)}
            shapes |= {f"{at}.mlp.fc.weight": (2 * ffn, dim), f"{at}.mlp.proj.weight": (dim, ffn)}
            if v["qk_bias"]:
                shapes[f"{at}.attn.qk_bias"] = (2, 1, heads, dim // heads)
        return shapes

    def extra(self) -> dict[str, Tensor]:
        extra = {"freqs_cis": table(64, self.values["n_embd"] // self.values["n_heads"], 50_000)}
        tied = {"lm_head.weight": self.tensors["transformer.wte.weight"]}
        return extra | (tied if self.values["tie_embeddings"] else {})

    def logits(self, ids: list[int], loops: int) -> Tensor:
        v, w = self.values, self.w

        def run(part: str, x: Tensor) -> Tensor:
            for layer in range(dict(self.parts)[part]):
                x = self.block(f"transformer.{part}.{layer}", x)
            return x

        e = run("prelude", w["transformer.wte.weight"][ids] * v["init_values"]["embed_scale"])
        h = torch.zeros_like(e)
        for _ in range(loops):
            h = run("core_block", self.linear("transformer.adapter", torch.cat((h, e), dim=1)))
        x = run("coda", self.norm("transformer.ln_f", h, v["norm_eps"]))
        head = w["transformer.wte.weight" if v["tie_embeddings"] else "lm_head.weight"]
        return self.norm("transformer.ln_f", x, v["norm_eps"]) @ head.T

    def block(self, at: str, x: Tensor) -> Tensor:
        v, heads, eps = self.values, self.values["n_heads"], self.values["norm_eps"]
        qkv = self.linear(f"{at}.attn.Wqkv", self.norm(f"{at}.norm_1", x, eps)).view(len(x), 3, heads, -1)
        q, k, value = qkv.unbind(1)
        if v["qk_bias"]:
            q, k = q + self.w[f"{at}.attn.qk_bias"][0], k + self.w[f"{at}.attn.qk_bias"][1]

        def placed(x: Tensor) -> Tensor:
            rows = [[turned(head, place, 50_000, neighbours=True) for head in row] for place, row in enumerate(x)]
            return torch.stack([torch.stack(row) for row in rows])

        x = self.norm(f"{at}.norm_2", x + self.linear(f"{at}.attn.proj", attended(placed(q), placed(k), value)), eps)
        gate, up = self.linear(f"{at}.mlp.fc", self.norm(f"{at}.norm_3", x, eps)).chunk(2, dim=1)
        return self.norm(f"{at}.norm_4", x + self.linear(f"{at}.mlp.proj", silu(gate) * up), eps)


OURO = {
    "model_type": "ouro",
    "architectures": ["OuroForCausalLM"],
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "vocab_size": 200,
    "dtype": "bfloat16",
}


class PublishedOuro(Published):
    """h = embeddings; T times all layers and the norm; head."""

    def shapes(self) -> Shapes:
        v = self.values
        dim, ffn, size = v["hidden_size"], v["intermediate_size"], v["head_dim"]
        shapes: Shapes = {"model.embed_tokens.weight": (v["vocab_size"], dim), "model.norm.weight": (dim,)}
        if not v["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (v["vocab_size"], dim)
        for at in (f"model.layers.{layer}" for layer in range(v["num_hidden_layers"])):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes |= {f"{at}.{norm}.weight": (dim,), f"{at}.{norm}_2.weight": (dim,)}
            shapes[f"{at}.self_attn.q_proj.weight"] = (v["num_attention_heads"] * size, dim)
            shapes |= {f"{at}.self_attn.{n}_proj.weight": (v["num_key_value_heads"] * size, dim) for n in "kv"}
            shapes[f"{at}.self_attn.o_proj.weight"] = (dim, v["num_attention_heads"] * size)
            shapes |= {f"{at}.mlp.{name}_proj.weight": (ffn, dim) for name in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = (dim, ffn)
        return shapes

    def extra(self) -> dict[str, Tensor]:
        return {"model.early_exit_gate.weight": torch.ones(1, 40), "model.early_exit_gate.bias": torch.ones(1)}

    def logits(self, ids: list[int], loops: int) -> Tensor:
        v, w = self.values, self.w
        h = w["model.embed_tokens.weight"][ids]
        for _ in range(loops):
            for layer in range(v["num_hidden_layers"]):
                h = self.layer(f"model.layers.{layer}", h)
            h = self.norm("model.norm", h, v["rms_norm_eps"])
        return h @ w["model.embed_tokens.weight" if v["tie_word_embeddings"] else "lm_head.weight"].T

    def layer(self, at: str, x: Tensor) -> Tensor:
        v, eps = self.values, self.values["rms_norm_eps"]
        normed = self.norm(f"{at}.input_layernorm", x, eps)
        q, k, value = (self.linear(f"{at}.self_attn.{n}_proj", normed).view(len(x), -1, v["head_dim"]) for n in "qkv")

        def placed(x: Tensor) -> Tensor:
            rows = [[turned(h, place, v["rope_theta"], neighbours=False) for h in row] for place, row in enumerate(x)]
            return torch.stack([torch.stack(row) for row in rows])

        k, value = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (placed(k), value))
        output = self.linear(f"{at}.self_attn.o_proj", attended(placed(q), k, value))
        x = x + self.norm(f"{at}.input_layernorm_2", output, eps)
        normed = self.norm(f"{at}.post_attention_layernorm", x, eps)
        gate, up = (self.linear(f"{at}.mlp.{name}_proj", normed) for name in ("gate", "up"))
        output = self.linear(f"{at}.mlp.down_proj", silu(gate) * up)
        return x + self.norm(f"{at}.post_attention_layernorm_2", output, eps)


PUBLISHED = {
    "parcae": (PublishedParcae, PARCAE),
    "parcae with a head of its own, without prelude norm": (
        PublishedParcae,
        PARCAE | {"tie_embeddings": False, "prelude_norm": False, "n_layers_in_prelude": 1, "n_layers_in_coda": 1},
    ),
    "huginn": (PublishedHuginn, HUGINN),
    "huginn with a head of its own, without bias": (
        PublishedHuginn,
        HUGINN | {"tie_embeddings": False, "qk_bias": False, "n_layers_in_coda": 1},
    ),
    "ouro": (PublishedOuro, OURO),
    "ouro with one table": (PublishedOuro, OURO | {"tie_word_embeddings": True}),
}
"""Class and config.json of the models to import."""


def published(name: str, **changes: Any) -> Published:
    """One of `PUBLISHED` with changes to its config.json."""
    build, values = PUBLISHED[name]
    return build(values | changes)
