"""Decoding with a cache: whether its tokens are right, and its speed."""

from collections.abc import Iterator
from functools import cache

import torch

from mythos.config.presets import preset_config
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import Generation, generate
from mythos.gpu_check.result import Result, Setting, judged
from mythos.gpu_check.runs import TINY
from mythos.gpu_check.timed_steps import timed
from mythos.model.halting import HaltingRule, halting_rule
from mythos.model.layers import autocast_to
from mythos.model.rdt import RecurrentDepthTransformer

PRESET = "mythos_small"
NOISE = 0.02
"""Standard deviation of the noise that replaces weights which start at zero, so that every part of the model counts."""
NEAR = 1e-3
"""Tokens whose logits differ by no more than this may change places by rounding."""


def sizes(setting: Setting) -> tuple[int, int, int]:
    """Rows, tokens of a prompt, and tokens generated."""
    return (32, 64, 48) if setting.cuda else (3, 12, 6)


def greedy(setting: Setting) -> Iterator[Result]:
    """Measure tokens per second, and compare each token with a whole forward pass over all tokens before it."""
    rows, prompt, tokens = sizes(setting)
    rates = {}
    for dtype in ("bfloat16", "float32"):
        decode(setting, dtype, tokens=2)
        _, seconds = timed_decode(setting, dtype)
        rates[dtype] = rows * tokens / seconds
    speeds = ", ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in rates.items())
    yield judged(True, f"{speeds}; {rows} rows, {model(setting).config.loops} loops")

    generated = torch.tensor([row.tokens for row in decode(setting, "float32").rows])
    ids = torch.cat((torch.tensor(prompts(setting)), generated), dim=1)
    with torch.no_grad():
        logits = model(setting)(ids[:, :-1].to(setting.device)).logits
    assert logits is not None
    logits = logits[:, prompt - 1 :, : int(model(setting).config.vocab_size)].cpu()
    chosen = logits.gather(-1, generated.unsqueeze(-1)).squeeze(-1)
    short = logits.amax(-1) - chosen
    alike = int((logits.argmax(-1) == generated).sum())
    measured = f"{alike} of {generated.numel()} tokens alike; logits of the others short by at most {short.max():.1e}"
    yield judged(not (short > NEAR).any(), measured)


def halting(setting: Setting) -> Iterator[Result]:
    """Compare all loops for all positions with a rule that lets positions halt."""
    rule = halting_rule(model(setting), "convergence")
    loops = 2 * max(4, model(setting).config.loops)  # more than are needed
    decode(setting, "bfloat16", rule=rule, loops=loops, tokens=2)
    _, all_loops_seconds = timed_decode(setting, "bfloat16", loops=loops)
    halted, seconds = timed_decode(setting, "bfloat16", rule=rule, loops=loops)
    counts = [count for row in halted.rows for count in row.loops]
    mean = sum(counts) / len(counts)
    measured = f"{mean:.2f} loops of {loops}, {seconds / all_loops_seconds:.2f} of the time"
    yield judged(mean < loops and (seconds < all_loops_seconds or not setting.cuda), measured)


def compiled(setting: Setting) -> Iterator[Result]:
    """Compare decoding whose step from token to token is one graph with eager decoding."""
    rows, _, tokens = sizes(setting)
    decode(setting, "float32", compiled=True)
    graph, graph_seconds = timed_decode(setting, "float32", compiled=True)
    eager, eager_seconds = timed_decode(setting, "float32")
    measured = f"{rows * tokens / graph_seconds:,.0f} in float32, {eager_seconds / graph_seconds:.2f} times eager"
    yield judged(graph_seconds < eager_seconds or not setting.cuda, measured)
    # After one token that differs by rounding the rest of its row differs, so count rows and not tokens.
    first_differing = []
    for graph_row, eager_row in zip(graph.rows, eager.rows, strict=True):
        pairs = enumerate(zip(graph_row.tokens, eager_row.tokens, strict=True))
        first_differing += [place for place, (a, b) in pairs if a != b][:1]
    others = f", others up to token {min(first_differing)}" if first_differing else ""
    measured = f"{rows - len(first_differing)} of {rows} rows alike{others}"
    yield judged(len(first_differing) <= rows // 8, measured)


@cache
def model(setting: Setting) -> RecurrentDepthTransformer:
    """The preset with random weights, none of which are zero."""
    config = preset_config(PRESET, vocab_size=4096)
    if not setting.cuda:
        config = preset_config(PRESET, **{name: size for name, size in TINY.items() if name != "q_lora_rank"})
    rdt = RecurrentDepthTransformer(config).initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in rdt.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * NOISE)
    return rdt.to(setting.device).eval()


def prompts(setting: Setting) -> list[list[int]]:
    """Random ids."""
    rows, prompt, _ = sizes(setting)
    vocabulary = int(model(setting).config.vocab_size)
    return torch.randint(vocabulary, (rows, prompt), generator=torch.Generator().manual_seed(0)).tolist()


def decode(
    setting: Setting,
    dtype: str,
    *,
    rule: HaltingRule | None = None,
    compiled: bool = False,
    loops: int | None = None,
    tokens: int | None = None,
) -> Generation:
    """Generate greedily after the prompts."""
    count = sizes(setting)[2] if tokens is None else tokens
    greedily = Sampling(temperature=0)
    with autocast_to(getattr(torch, dtype), setting.device):
        return generate(
            model(setting), prompts(setting), count, sampling=greedily, loops=loops, halting=rule, compiled=compiled
        )


def timed_decode(
    setting: Setting, dtype: str, *, rule: HaltingRule | None = None, compiled: bool = False, loops: int | None = None
) -> tuple[Generation, float]:
    """The result of :func:`decode`, and the seconds it took."""
    results: list[Generation] = []
    work = timed(
        lambda: results.append(decode(setting, dtype, rule=rule, compiled=compiled, loops=loops)), setting.device
    )
    return results[0], work.wall
