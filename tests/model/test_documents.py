"""Packed documents against every document alone: attention, positions, losses, gradients, cost."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.attention import gqa, mla
from mythos.model.attention.base import build_attention
from mythos.model.attention.context import attend, attention_context, document_block_mask, document_starts
from tests.model.conftest import scrambled
from tests.model.test_recurrence import assert_same_gradients, gradients

ROWS = [[4, 1, 6], [2, 9], [11], [1, 5, 5]]
"""Lengths of the documents of each row."""
DEPTHS = [5, 3, 3, 1]
LENGTH = sum(ROWS[0])

ATTENTIONS = [{"attention": "gqa"}, {"attention": "mla"}]


def document_ids(rows: list[list[int]]) -> Tensor:
    """Ids that repeat along a row, where only a change marks a new document."""
    ids = [[place % 2 for place, length in enumerate(lengths) for _ in range(length)] for lengths in rows]
    return torch.tensor(ids, dtype=torch.int32)


def spans(rows: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """Row, start and end of every document."""
    for row, lengths in enumerate(rows):
        edges = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
        yield from ((row, start, end) for start, end in pairwise(edges))


def naive_mask(rows: list[list[int]]) -> Tensor:
    """(B, S, S) bool, pair by pair."""
    length = sum(rows[0])
    mask = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for row, start, end in spans(rows):
        for query in range(start, end):
            for key in range(start, query + 1):
                mask[row, query, key] = True
    return mask


def tokens(model) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (len(ROWS), LENGTH + 1), generator=generator)
    state = torch.randn(len(ROWS), LENGTH, model.config.dim, generator=generator)
    return ids[:, :-1], ids[:, 1:], state


@pytest.mark.parametrize("backprop", [None, 2])
@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
def test_packed_documents_equal_documents_alone(model, changes, backprop):
    """Logits, losses, gradients and expert counts; the last target of a document is the next one's first token."""
    model = model(**changes)
    assert model.config.core_ffn == "moe" and len(model.prelude) and len(model.coda)
    ids, targets, state = tokens(model)
    packed = {"loops": DEPTHS, "backprop": backprop, "state": state, "document_ids": document_ids(ROWS)}
    with torch.no_grad():
        logits = model(ids, **packed).logits
    output = model(ids, targets, **packed)
    output.loss.backward()
    packed_gradients = gradients(model)

    total, load = 0.0, 0
    for row, start, end in spans(ROWS):
        part = (slice(row, row + 1), slice(start, end))
        alone = model(ids[part], loops=DEPTHS[row], backprop=backprop, state=state[part])
        torch.testing.assert_close(logits[part], alone.logits, rtol=1e-5, atol=1e-5)
        losses = F.cross_entropy(alone.logits[0], targets[part][0], reduction="none")
        packed_losses = F.cross_entropy(logits[part][0], targets[part][0], reduction="none")
        torch.testing.assert_close(packed_losses, losses, rtol=1e-5, atol=1e-5)
        losses.sum().backward()
        total, load = total + losses.sum().item(), load + alone.expert_load
    assert output.loss.item() == pytest.approx(total, rel=1e-5)
    assert_same_gradients(packed_gradients, gradients(model))
    assert torch.equal(output.expert_load, load)
    with torch.no_grad():
        joined = model(ids, loops=DEPTHS, state=state).logits
    assert (joined - logits).abs().max() > 0.1  # without the mask, documents see each other


@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
def test_losses_by_depth_of_packed_documents_equal_documents_alone(model, changes):
    model = model(**changes)
    ids, targets, _ = tokens(model)
    packed = model.read_depths(ids, targets, [1, 4], document_ids(ROWS))
    for row, start, end in spans(ROWS):
        part = (slice(row, row + 1), slice(start, end))
        alone = model.read_depths(ids[part], targets[part], [1, 4])
        for together, single in zip(packed, alone, strict=True):
            torch.testing.assert_close(together.losses[part], single.losses, rtol=1e-5, atol=1e-5)


def test_every_target_counts(model):
    model = model()
    ids, targets, state = tokens(model)
    packed = {"loops": DEPTHS, "state": state, "document_ids": document_ids(ROWS)}
    with torch.no_grad():
        loss = model(ids, targets, **packed).loss.item()
        log_probabilities = torch.log_softmax(model(ids, **packed).logits.double(), -1)
        read = model.read_depths(ids, targets, [2], document_ids(ROWS))[0]
    assert (read.losses > 0).all()
    nats = [-log_probabilities[row, s, targets[row, s]].item() for row in range(len(ROWS)) for s in range(LENGTH)]
    assert len(nats) == targets.numel() and min(nats) > 0
    assert loss == pytest.approx(sum(nats), rel=1e-6)


@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
def test_a_changed_token_is_seen_by_its_own_document_alone(model, changes):
    model = model(**changes)
    ids, _, state = tokens(model)
    packed = {"loops": DEPTHS, "state": state, "document_ids": document_ids(ROWS)}
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 128  # a document of one token, between two others
    changed[3, 3] = (ids[3, 3] + 1) % 128
    with torch.no_grad():
        difference = (model(changed, **packed).logits - model(ids, **packed).logits).abs().amax(-1)
    reached = torch.zeros(len(ROWS), LENGTH, dtype=torch.bool)
    reached[0, 4] = reached[3, 3:6] = True
    assert (difference[reached] > 1e-2).all()
    assert (difference[~reached] < 1e-5).all()  # an expert has another number of rows, so its products round anew


def test_boolean_mask_equals_naive_construction(small):
    context = attention_context(small(), LENGTH, torch.device("cpu"), document_ids(ROWS))
    for rows in range(1, len(ROWS) + 1):
        assert torch.equal(context.first_rows(rows).mask, naive_mask(ROWS[:rows]).unsqueeze(1))


@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
def test_positions_restart_in_every_document(small, changes):
    """Bit by bit the table of a document alone, also for the leading rows."""
    config = small(**changes)
    context = attention_context(config, LENGTH, torch.device("cpu"), document_ids(ROWS))
    for rows in range(1, len(ROWS) + 1):
        prefix = context.first_rows(rows)
        assert len(prefix.cos) == len(prefix.sin) == rows
        for row, start, end in spans(ROWS[:rows]):
            alone = attention_context(config, end - start, torch.device("cpu"), None)
            assert torch.equal(prefix.cos[row, start:end], alone.cos)
            assert torch.equal(prefix.sin[row, start:end], alone.sin)


@pytest.mark.parametrize("changes", ATTENTIONS, ids=str)
def test_queries_and_keys_do_not_depend_on_where_a_document_starts(small, changes, monkeypatch):
    """Scores depend on distances alone, so that outputs could not show positions that run on; queries and keys do."""
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(query, key, value, context):
        seen.append((query, key))
        return attend(query, key, value, context)

    for module in (gqa, mla):
        monkeypatch.setattr(module, "attend", recording)
    config = small(**changes)
    module = scrambled(build_attention(config))
    x = torch.randn(len(ROWS), LENGTH, config.dim, generator=torch.Generator().manual_seed(4))
    module(x, attention_context(config, LENGTH, x.device, document_ids(ROWS)))
    for row, start, end in spans(ROWS):
        module(x[row : row + 1, start:end], attention_context(config, end - start, x.device, None))
        for packed, alone in zip(seen[0], seen[-1], strict=True):
            torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=1e-5, atol=1e-5)


def test_without_documents_rows_share_one_table(small):
    context = attention_context(small(), LENGTH, torch.device("cpu"), None)
    assert context.cos.shape == context.sin.shape == (LENGTH, 4)
    assert context.mask is None and context.first_rows(1) is context


def visited(rows: list[list[int]]) -> tuple[list[set[tuple[int, int]]], list[set[tuple[int, int]]]]:
    """The (query block, key block) pairs of each row that flex attention masks pair by pair, and takes whole."""
    mask = document_block_mask(document_starts(document_ids(rows)))

    def pairs(counts: Tensor, indices: Tensor) -> list[set[tuple[int, int]]]:
        return [
            {
                (query, key)
                for query, count in enumerate(counts[row, 0])
                for key in indices[row, 0, query, :count].tolist()
            }
            for row in range(len(rows))
        ]

    return pairs(mask.kv_num_blocks, mask.kv_indices), pairs(mask.full_kv_num_blocks, mask.full_kv_indices)


@pytest.mark.parametrize("rows", [[[512], [128, 384], [100, 28, 300, 84]], [[1, 299], [129, 171]], [[7]]], ids=str)
def test_block_mask_lists_the_blocks_with_anything_to_see(rows):
    mask = naive_mask(rows)
    length = mask.shape[1]
    masked, whole = visited(rows)
    for row in range(len(rows)):
        cells = {
            (query, key): mask[row, query * 128 : query * 128 + 128, key * 128 : key * 128 + 128]
            for query in range(-(-length // 128))
            for key in range(-(-length // 128))
        }
        assert whole[row] == {pair for pair, cell in cells.items() if cell.all() and cell.numel() == 128 * 128}
        assert masked[row] | whole[row] == {pair for pair, cell in cells.items() if cell.any()}
        assert not masked[row] & whole[row]


@pytest.mark.parametrize(("documents", "blocks"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_attention_costs_what_the_documents_need(documents, blocks):
    """n documents of k blocks: n k (k + 1) / 2 block pairs, n k of them on the diagonal."""
    masked, whole = visited([[128 * blocks] * documents])
    assert len(masked[0]) == documents * blocks
    assert len(whole[0]) == documents * blocks * (blocks - 1) // 2
