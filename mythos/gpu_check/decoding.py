"""Decoding with a cache: the right tokens, and how fast."""

from collections.abc import Iterator
from functools import cache, partial

import torch

from mythos.benchmarks.timing import timed
from mythos.config.presets import preset_config
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import Generation, generate
from mythos.gpu_check.result import Result, Setting, judged
from mythos.gpu_check.runs import TINY
from mythos.model.halting import HaltingRule, halting_rule
from mythos.model.layers import autocast_to
from mythos.model.rdt import RecurrentDepthTransformer

PRESET = "mythos_small"
NOISE = 0.02
"""Standard deviation of weights that start at zero, so that no part of the model is silent."""
NEAR = 1e-3
"""Logits that are no further apart may change places by rounding."""


def sizes(setting: Setting) -> tuple[int, int, int]:
    """Rows, tokens of a prompt, and tokens generated."""
    return (32, 64, 48) if setting.cuda else (3, 12, 6)


def greedy(setting: Setting) -> Iterator[Result]:
    """Tokens per second, and each token against the whole forward pass over all before it."""
    rows, prompt, tokens = sizes(setting)
    rates = {}
    for dtype in ("bfloat16", "float32"):
        decode(setting, dtype, tokens=2)
        rates[dtype] = rows * tokens / timed(partial(decode, setting, dtype), setting.device).wall
    told = ", ".join(f"{rate:,.0f} in {dtype}" for dtype, rate in rates.items())
    yield judged(True, f"{told}; {rows} rows, {model(setting).config.loops} loops")

    generated = torch.tensor([row.tokens for row in decode(setting, "float32").rows])
    ids = torch.cat((torch.tensor(prompts(setting)), generated), dim=1)
    with torch.no_grad():
        logits = model(setting)(ids[:, :-1].to(setting.device)).logits
    assert logits is not None
    logits = logits[:, prompt - 1 :, : int(model(setting).config.vocab_size)].cpu()
    chosen = logits.gather(-1, generated.unsqueeze(-1)).squeeze(-1)
    short = logits.amax(-1) - chosen
    differing = int((short > NEAR).sum())
    alike = int((logits.argmax(-1) == generated).sum())
    told = f"{alike} of {generated.numel()} tokens alike; logits of the others short by at most {short.max():.1e}"
    yield judged(differing == 0, told)


def halting(setting: Setting) -> Iterator[Result]:
    """All loops for all positions, against a rule that lets them stop."""
    rule = halting_rule(model(setting), "convergence")
    loops = 2 * max(4, model(setting).config.loops)  # more than are needed
    decode(setting, "bfloat16", rule=rule, loops=loops, tokens=2)
    whole = timed(lambda: decode(setting, "bfloat16", loops=loops), setting.device).wall
    halted: list[Generation] = []
    part = timed(lambda: halted.append(decode(setting, "bfloat16", rule=rule, loops=loops)), setting.device).wall
    counts = [count for row in halted[0].rows for count in row.loops]
    mean = sum(counts) / len(counts)
    told = f"{mean:.2f} loops of {loops}, {part / whole:.2f} of the time"
    yield judged(mean < loops and (part < whole or not setting.cuda), told)


def compiled(setting: Setting) -> Iterator[Result]:
    """The step from token to token as one graph."""
    rows, _, tokens = sizes(setting)
    decode(setting, "float32", compiled=True)
    made: list[Generation] = []
    fast = timed(lambda: made.append(decode(setting, "float32", compiled=True)), setting.device).wall
    slow = timed(lambda: made.append(decode(setting, "float32")), setting.device).wall
    told = f"{rows * tokens / fast:,.0f} in float32, {slow / fast:.2f} times eager"
    yield judged(fast < slow or not setting.cuda, told)
    one, other = ([row.tokens for row in generation.rows] for generation in made)
    first = [
        next((n for n, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
        for x, y in zip(one, other, strict=True)
    ]
    differing = [place for place in first if place is not None]
    # After a token that differs by rounding the row goes another way: rows count, and not tokens.
    told = (
        f"{rows - len(differing)} of {rows} rows alike{f', others up to token {min(differing)}' if differing else ''}"
    )
    yield judged(len(differing) <= rows // 8, told)


@cache
def model(setting: Setting) -> RecurrentDepthTransformer:
    """The preset with weights none of which are zero."""
    config = preset_config(PRESET, vocab_size=4096)
    if not setting.cuda:
        config = preset_config(PRESET, **{name: size for name, size in TINY.items() if name != "q_lora_rank"})
    built = RecurrentDepthTransformer(config).initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * NOISE)
    return built.to(setting.device).eval()


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
    with autocast_to(getattr(torch, dtype), setting.device):
        return generate(
            model(setting),
            prompts(setting),
            count,
            sampling=Sampling(temperature=0),
            loops=loops,
            halting=rule,
            compiled=compiled,
        )
