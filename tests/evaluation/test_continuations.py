"""Likelihoods of continuations compared with the model on one text at a time."""

import contextlib
import math
from typing import Any

import pytest
import torch

from mythos.data.tokenizer import Tokenizer, train_bpe
from mythos.distributed.ranks import Ranks, World
from mythos.errors import MythosError
from mythos.evaluation import choices
from mythos.evaluation.choices import ChoiceTask, Question, choice_metrics, choice_scores, encode_task, read_tasks
from mythos.evaluation.continuations import DepthSetting, Score, choose_settings, encode_requests, score_requests
from mythos.evaluation.execution import Execution
from mythos.model.halting import default_threshold
from mythos.model.rdt import RecurrentDepthTransformer
from tests.evaluation.test_depth_sweep import build
from tests.model.slow_decode import converged, slow_decode
from tests.runs import documents

ALONE = World(torch.device("cpu"), Ranks(), Ranks())
CONTEXT = 24
TEXTS = [
    ("The river crosses", " the garden."),
    ("The river", " finds"),
    ("", "The signal"),
    ("The stone follows the  ", "engine, and more"),
    ("Page 7. The letter repeats the number. " * 3, " The morning."),
]
SETTINGS = [DepthSetting(4), DepthSetting(1), DepthSetting(4, "convergence", 0.31), DepthSetting(3)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(iter(documents()), 384, progress=False)


@pytest.fixture(scope="module")
def model() -> RecurrentDepthTransformer:
    return build(vocab_size=384, context_length=CONTEXT)


def score(
    model: RecurrentDepthTransformer, requests: Any, settings: Any = SETTINGS, micro_batch: int = 3
) -> list[list[Score]]:
    return score_requests(model, requests, settings, Execution(micro_batch, ALONE, contextlib.nullcontext()))


def slowly(model: RecurrentDepthTransformer, tokenizer: Tokenizer, context: str, text: str, loops: int) -> Score:
    """One text, one depth, no padding: the sum of the tokens' log-probabilities after the context's."""
    whole = tokenizer.encode_batch([context + text])[0]
    context_ids = tokenizer.encode_batch([context.rstrip()])[0]
    tokens = whole[len(context_ids) :]
    ids = [*(context_ids or [tokenizer.eos_id]), *tokens][-(CONTEXT + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]), loops=loops).logits[0].double().log_softmax(-1)
    ends = range(len(ids) - 1 - len(tokens), len(ids) - 1)
    likelihoods = [logits[place, ids[place + 1]].item() for place in ends]
    return Score(sum(likelihoods), all(int(logits[place].argmax()) == ids[place + 1] for place in ends), loops)


def test_each_depth_equals_one_text_at_a_time(model, tokenizer):
    requests, cut = encode_requests(tokenizer, TEXTS, CONTEXT)
    assert cut == 1 and max(len(r.context) + len(r.continuation) for r in requests) == CONTEXT + 1
    scores_by_setting = score(model, requests)
    for setting, scores in zip(SETTINGS, scores_by_setting, strict=True):
        if setting.rule is None:
            for (context, text), one in zip(TEXTS, scores, strict=True):
                expected = slowly(model, tokenizer, context, text, setting.loops)
                assert one.log_likelihood == pytest.approx(expected.log_likelihood, rel=1e-5)
                assert one[1:] == expected[1:]
    assert len({round(scores[0].log_likelihood, 4) for scores in scores_by_setting}) == 4, "settings must differ"


def test_greedy_continuations_are_recognised(model, tokenizer):
    requests, _ = encode_requests(tokenizer, TEXTS[:2], CONTEXT)
    for loops in (1, 4):
        with torch.no_grad():
            logits = model(torch.tensor([requests[0].context]), loops=loops).logits[0, -1]
        likeliest = requests[0]._replace(continuation=[int(logits.argmax())])
        other = requests[0]._replace(continuation=[int(logits.argmin())])
        [scores] = score(model, [requests[1], likeliest, other], [DepthSetting(loops)])
        assert [one.greedy for one in scores[1:]] == [True, False]


def test_a_rule_equals_decoding_position_by_position(model, tokenizer):
    requests, _ = encode_requests(tokenizer, TEXTS, CONTEXT)
    setting = SETTINGS[2]
    [scores] = score(model, requests, [setting])
    depths = set()
    for (context, continuation), one in zip(requests, scores, strict=True):
        ids = [*context, *continuation[:-1]]
        logits, loops = slow_decode(model, ids, [setting.loops] * len(ids), stops=converged(0.31))
        chances = logits.double().log_softmax(-1)[len(context) - 1 :]
        expected = chances.gather(1, torch.tensor(continuation).unsqueeze(1)).sum().item()
        assert one.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert one.loops == pytest.approx(sum(loops) / len(ids))
        depths |= set(loops)
    assert len(depths) > 1, "the rule must stop some positions and not others"


def test_batches_do_not_matter(model, tokenizer):
    requests, _ = encode_requests(tokenizer, TEXTS, CONTEXT)
    for one, other in zip(score(model, requests), score(model, requests, micro_batch=1), strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["", "x" * 40])
def test_continuations_that_cannot_be_scored(tokenizer, text):
    with pytest.raises(MythosError, match="no token of its own" if not text else r"context is 24 .*give shorter"):
        encode_requests(tokenizer, [("The river", text)], CONTEXT)


def joining(tokenizer: Tokenizer) -> tuple[str, str]:
    """A text split inside a token, so that its parts have other tokens than the whole."""
    for word in " ".join(documents()[:5]).split():
        whole = tokenizer.encode_batch([f"The {word}"])[0]
        part = tokenizer.encode_batch([f"The {word[:-1]}"])[0]
        if whole[: len(part)] != part and len(whole) <= len(part):
            return f"The {word[:-1]}", word[-1]
    raise AssertionError("no word joins")


def test_a_continuation_that_joins_the_last_token_is_scored_as_it_is_asked(model, tokenizer):
    """The harness' own class takes whole[len(context):], which is empty or another text here."""
    context, letter = joining(tokenizer)
    texts = [(context, letter), (context, f"{letter} finds")]
    requests, _ = encode_requests(tokenizer, texts, CONTEXT)
    for (before, text), request in zip(texts, requests, strict=True):
        assert tokenizer.decode([*request.context, *request.continuation]) == before + text
        assert request.context == tokenizer.encode_batch([before])[0]
    [scores] = score(model, requests, [DepthSetting(2)])
    for request, one in zip(requests, scores, strict=True):
        ids = [*request.context, *request.continuation]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]), loops=2).logits[0].double().log_softmax(-1)
        expected = sum(logits[place - 1, ids[place]].item() for place in range(len(request.context), len(ids)))
        assert one.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_that_cannot_join_says_so():
    """SentencePiece-like tokenizers add a space before each text, so the letter alone would be a word."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "\u2581the": 1, "\u2581reader": 2, "\u2581reade": 3, "\u2581r": 4, "<unk>": 5}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"), {"name": "words"})
    [request], _ = encode_requests(words, [("the", " reader")], CONTEXT)
    assert request == ([1], [2])
    with pytest.raises(MythosError, match='continuation "r" of "the reade" shares a token'):
        encode_requests(words, [("the reade", "r")], CONTEXT)


def test_a_context_is_not_cut_to_nothing(tokenizer):
    """A cut prompt keeps at least half of the model's context; a prompt that fits may have any length."""
    long, short = "The letter repeats the number. " * 9, "The"
    for words in range(1, 30):
        text = " a" * words
        tokens = len(tokenizer.encode_batch([text])[0])
        if CONTEXT + 1 - tokens >= CONTEXT / 2:
            [request], cut = encode_requests(tokenizer, [(long, text)], CONTEXT)
            assert cut == 1 and len(request.context) + len(request.continuation) == CONTEXT + 1
        else:
            with pytest.raises(MythosError, match=r"cut keeps at least half|context is 24"):
                encode_requests(tokenizer, [(long, text)], CONTEXT)
        if len(tokenizer.encode_batch([short + text])[0]) <= CONTEXT + 1:
            assert encode_requests(tokenizer, [(short, text)], CONTEXT)[1] == 0


def test_settings(model):
    default = default_threshold("convergence")
    rule = DepthSetting(4, "convergence", default)
    assert choose_settings(model, 4, [1, None, 1]) == [DepthSetting(1), rule], "the model's own rule"
    chosen = choose_settings(model, 4, [None, 2], "second_difference", [0.5, 0.25])
    assert list(map(str, chosen)) == ["second_difference 0.5", "second_difference 0.25", "2"]
    assert choose_settings(model, 4, [4, None], "none") == [DepthSetting(4)], "without a rule, auto is the mean"
    for bad in (([0],), ([None], "never"), ([None], "gate"), ([None], "none", [0.5]), ([None], None, [0.0])):
        with pytest.raises(ValueError, match=r"allowed|at least 1|needs a rule"):
            choose_settings(model, 4, *bad)


# Multiple choice

QUESTIONS = [
    Question("The river crosses the", ["garden.", "stone and the engine and the letter.", "x"], 0),
    Question("The stone", ["finds", "finds the morning", "follows it"], 2),
    Question("", ["Page 1", "Page"], 1),
    Question("Page 7. The letter repeats the number. " * 3, ["The signal", "garden", "river", "é"], 3),
]


def test_accuracy_equals_a_loop_over_choices(model, tokenizer, caplog):
    """With questions whose likeliest choice differs from the likeliest by length."""
    drawn = torch.Generator().manual_seed(1)
    words = documents()[3].split()

    def pick(count: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (count,), generator=drawn).tolist())

    more = [Question(pick(3), [pick(1), pick(2), pick(4)], n % 3) for n in range(12)]
    task = ChoiceTask("local", [*QUESTIONS, *more])
    execution = Execution(5, ALONE, contextlib.nullcontext())
    metrics = choice_metrics(model, [encode_task(task, tokenizer, CONTEXT)], execution, depths=[1, 4])
    assert "local: 4 of 48 prompts do not fit in the context of 24 tokens and lose their beginning" in caplog.text
    expected = {}
    for loops in (1, 4):
        plain = normalised = 0
        for query, options, gold in task.questions:
            sums = [slowly(model, tokenizer, query, f" {option}", loops).log_likelihood for option in options]
            plain += max(range(len(options)), key=lambda n: sums[n]) == gold
            normalised += max(range(len(options)), key=lambda n: sums[n] / len(options[n])) == gold
        expected |= {f"val/local_acc@{loops}": plain / 16, f"val/local_acc_norm@{loops}": normalised / 16}
    assert metrics == expected
    assert len(set(expected.values())) > 1


def test_length_counts_characters_and_ties_go_to_the_first():
    scores = [Score(value, False, 2.0) for value in (-4.0, -5.0, -3.0, -3.0)]
    task = ChoiceTask("t", [Question("", ["ab", "éééé"], 0), Question("", ["a", "b"], 0)])
    assert choice_scores(task, scores) == (1.0, 0.5, 2.0)


def test_likelihoods_that_are_not_numbers_score_nothing():
    task = ChoiceTask("t", [Question("", ["a", "b"], 0)])
    accuracies = choice_scores(task, [Score(math.nan, False, 1.0), Score(-1.0, False, 1.0)])
    assert math.isnan(accuracies.acc) and math.isnan(accuracies.acc_norm)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a", "choices": ["b", "c"], "gold": 0}', "{"], "line 2: Expecting"),
        (["", "[]"], "line 2: got list, not an object"),
        (['{"query": "a", "gold": 0}'], "line 1: choices is missing"),
        (['{"query": 1, "choices": ["b", "c"], "gold": 0}'], "line 1: query: got 1"),
        (['{"query": "a", "choices": ["b"], "gold": 0}'], "at least two"),
        (['{"query": "a", "choices": ["b", " "], "gold": 0}'], "at least two"),
        (['{"query": "a", "choices": ["b", "c"], "gold": 2}'], "gold: got 2, not a number from 0 to 1"),
        (['{"query": "a", "choices": ["b", "c"], "gold": true}'], "gold: got True"),
        ([], "has no questions in it"),
        (["[" * 100_000], "line 1: it is nested too deeply"),
    ],
)
def test_files_that_are_no_questions(tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(MythosError) as caught:
        read_tasks([str(tmp_path / "bad.jsonl")], what="eval.tasks")
    assert str(caught.value).startswith(f"eval.tasks: {tmp_path / 'bad.jsonl'}") and message in str(caught.value)
    assert choices.EXAMPLE in str(caught.value)


def test_files(tmp_path):
    good = tmp_path / "good.jsonl"
    good.write_text(f'{choices.EXAMPLE}\n\n{{"query": "q", "choices": ["a", "b"], "gold": 1, "more": 2}}\nbad')
    [task] = read_tasks([str(good)], what="--tasks", limit=2)
    good.write_bytes(b"\xef\xbb\xbf" + good.read_bytes())
    assert read_tasks([str(good)], what="--tasks", limit=2) == [task], "a byte order mark"
    assert task == ChoiceTask("good", [Question("Two and two make", ["four", "five"], 0), Question("q", ["a", "b"], 1)])
    with pytest.raises(MythosError, match=r"--tasks: .*nothing.jsonl cannot be read"):
        read_tasks([str(tmp_path / "nothing.jsonl")], what="--tasks")
    with pytest.raises(MythosError, match="two files have the name good"):
        read_tasks([str(good), "elsewhere/good.jsonl"], what="--tasks")
