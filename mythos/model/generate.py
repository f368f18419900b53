"""Continue token ids with a model, by full recomputation of the context for every token."""

import torch
from torch import Tensor

from mythos.model.rdt import RecurrentDepthTransformer


@torch.no_grad()
def generate(
    model: RecurrentDepthTransformer,
    ids: Tensor,
    new_tokens: int,
    *,
    generator: torch.Generator,
    vocabulary: int | None = None,
    loops: int | None = None,
    temperature: float = 0.8,
    top_k: int = 40,
    stop_id: int | None = None,
) -> Tensor:
    """Sample up to `new_tokens` after ids (1, S) int64, S at least 1.

    Returns (1, S + generated), without the stop token. Only the first `vocabulary` ids are drawn (default all): the
    rows that pad the table stand for no text. Temperature 0 takes the likeliest token. The context is cut to the
    model's context length from the left.
    """
    for _ in range(new_tokens):
        logits = model(ids[:, -model.config.context_length :], loops=loops).logits[:, -1, :vocabulary]
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            best, candidates = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
            chosen = torch.multinomial((best / temperature).softmax(-1), 1, generator=generator)
            token = candidates.gather(-1, chosen)
        if stop_id is not None and token.item() == stop_id:
            break
        ids = torch.cat((ids, token), dim=1)
    return ids
