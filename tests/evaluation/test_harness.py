# ruff: noqa: E402 (nothing of it can be imported where the extra is not installed)
"""lm-evaluation-harness on local tasks, compared with our own scores and with greedy decoding."""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from mythos.checkpoints.stored_model import OpenedModel, open_model
from mythos.cli import main
from mythos.evaluation import harness
from mythos.evaluation.choices import choice_scores, encode_task, read_tasks
from mythos.evaluation.continuations import DepthSetting, score_requests
from mythos.evaluation.execution import Execution
from mythos.evaluation.harness import HarnessModel
from mythos.generation.sampling import Sampling
from tests.evaluation.local_tasks import write_tasks
from tests.evaluation.test_continuations import ALONE
from tests.runs import documents, tiny
from tests.trainers import run

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Path:
    """An exported nano model, questions.jsonl, and tasks/ that read it."""
    folder = tmp_path_factory.mktemp("harness")
    nano = {"preset": "mythos_nano", "loops": 2, "context_length": 48}
    trainer = run(tiny(folder, model=nano, train__steps=2, optim__lr=0.01, depth__backprop=1, depth__curriculum={}))
    assert main(["export", str(trainer.run_dir), str(folder / "model")]) == 0
    words = documents()[7].split()
    lines = [
        {"query": f"{' '.join(words[n : n + 3 + 40 * (n == 5)])}{' ' * (n == 4)}", "gold": n % 3}
        | {"choices": [words[n + 3], " ".join(words[n + 1 : n + 4]), " ".join(words[: n + 2])]}
        for n in range(9)
    ]
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_tasks(folder / "tasks", file)
    return folder


@pytest.fixture(scope="module")
def opened(exported: Path) -> OpenedModel:
    return open_model(exported / "model")


def adapter(opened: OpenedModel, settings: list[DepthSetting]) -> HarnessModel:
    return HarnessModel(opened, settings, Execution(4, ALONE, contextlib.nullcontext()))


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, entry, index) for index, entry in enumerate(arguments)]


def test_a_local_task_at_several_depths(exported: Path, opened: OpenedModel, tmp_path: Path, capsys: Any) -> None:
    """From the command line: the harness' accuracies equal ours on the same file."""
    tasks = "local_multiple_choice,local_loglikelihood_rolling,local_generate_until"
    arguments = ["--tasks", f"{tasks},{exported / 'questions.jsonl'}", "--include-path", str(exported / "tasks")]
    arguments += ["--loops", "1,4,8,auto", "--halting", "convergence", "--exit-threshold", "0.5"]
    assert main(["evaluate", str(exported / "model"), *arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(next(tmp_path.glob("step-00000002_*.json")).read_text())
    results = {
        (result["task"], result["metric"], result["loops"], result["rule"]): result for result in content["results"]
    }
    settings = [(1, None), (4, None), (8, None), (2, "convergence")]
    for loops, rule in settings:
        for metric in ("acc", "acc_norm"):
            theirs, ours = (results[name, metric, loops, rule] for name in ("local_multiple_choice", "questions"))
            assert theirs["value"] == ours["value"] and theirs["samples"] == ours["samples"] == 9
            assert theirs["stderr"] == pytest.approx(ours["stderr"])
            assert theirs["mean_loops"] == pytest.approx(ours["mean_loops"])
        bits = results["local_loglikelihood_rolling", "bits_per_byte", loops, rule]["value"]
        assert 0 < bits < 20
        assert results["local_generate_until", "exact_match", loops, rule]["value"] == 0
    assert (
        len({results["local_loglikelihood_rolling", "bits_per_byte", *setting]["value"] for setting in settings}) == 4
    )
    assert "local_multiple_choice" in printed and "convergence 0.5" in printed


def test_a_local_task_limited(exported: Path, tmp_path: Path) -> None:
    arguments = ["--tasks", "local_multiple_choice", "--include-path", str(exported / "tasks"), "--limit", "4"]
    assert main(["evaluate", str(exported / "model"), *arguments, "--loops", "1", "--out", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.glob("step-00000002_*.json")).read_text())
    assert {result["samples"] for result in content["results"]} == {4}
    [task] = read_tasks([str(exported / "questions.jsonl")], what="--tasks", limit=4)
    assert content["results"][0]["value"] == own(open_model(exported / "model"), task, DepthSetting(1)).acc


def own(opened: OpenedModel, task: Any, setting: DepthSetting) -> Any:
    assert opened.tokenizer is not None
    encoded = encode_task(task, opened.tokenizer, opened.model.config.context_length)
    execution = Execution(2, ALONE, contextlib.nullcontext())
    [scores] = score_requests(opened.model, encoded.requests, [setting], execution)
    return choice_scores(task, scores)


def test_texts_longer_than_the_context_are_summed_over_windows(opened: OpenedModel) -> None:
    """Every token is scored once, with as much context as fits; compared token by token."""
    tokenizer, context = opened.tokenizer, opened.model.config.context_length
    assert tokenizer is not None
    texts = ["The river crosses.", documents()[6] * 2, ""]
    model = adapter(opened, [DepthSetting(1), DepthSetting(3)])
    for setting in model.settings:
        model.begin(setting)
        likelihoods = model.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
        for text, likelihood in zip(texts, likelihoods, strict=True):
            ids = [tokenizer.eos_id, *tokenizer.encode_batch([text])[0]]
            total, done = 0.0, 1
            while done < len(ids):
                end = min(done + context, len(ids))
                begin = max(0, end - context - 1)
                with torch.no_grad():
                    logits = opened.model(torch.tensor([ids[begin : end - 1]]), loops=setting.loops).logits[0]
                chances = logits.double().log_softmax(-1)
                total += sum(chances[place - 1 - begin, ids[place]].item() for place in range(done, end))
                done = end
            assert likelihood == pytest.approx(total, rel=1e-5)
        assert model.mean_loops == pytest.approx(setting.loops * 2 / 3), "the empty text took none"
    assert len(tokenizer.encode_batch([texts[1]])[0]) > context


def test_generation_is_greedy_and_stops(opened: OpenedModel) -> None:
    tokenizer, model = opened.tokenizer, adapter(opened, [DepthSetting(3)])
    assert tokenizer is not None
    contexts = ["The river", "", documents()[6] * 2]
    options = {"until": [], "max_gen_toks": 8}
    answers = model.generate_until(instances("generate_until", [(context, options) for context in contexts]))
    for context, text in zip(contexts, answers, strict=True):
        ids = (tokenizer.encode_batch([context])[0] or [tokenizer.eos_id])[-(opened.model.config.context_length - 8) :]
        prompt_length = len(ids)
        while len(ids) < prompt_length + 8:
            with torch.no_grad():
                best = opened.model(torch.tensor([ids]), loops=3).logits[0, -1, : tokenizer.size].argmax()
            if int(best) == tokenizer.eos_id:
                break
            ids.append(int(best))
        assert text == tokenizer.decode(ids)[len(tokenizer.decode(ids[:prompt_length])) :]
    drawn = [(context, {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}) for context in contexts]
    first, second = (model.generate_until(instances("generate_until", drawn)) for _ in range(2))
    assert first == second != answers
    longest = max(answers, key=len)
    stop = longest[len(longest) // 2 :]
    again = [(context, {"until": stop, "max_gen_toks": 8}) for context in contexts]
    assert model.generate_until(instances("generate_until", again)) == [text.partition(stop)[0] for text in answers]


@pytest.mark.parametrize("most", [47, 48, 49, 10**6])
def test_an_answer_longer_than_the_context_keeps_the_prompt(opened: OpenedModel, most: int, caplog: Any) -> None:
    """The prompt is kept whole, and the answer ends when the context is full."""
    tokenizer, context = opened.tokenizer, opened.model.config.context_length
    assert tokenizer is not None and context == 48
    model, prompts = adapter(opened, [DepthSetting(1)]), ["The river crosses", "The stone"]
    texts = model.generate_until(instances("generate_until", [(p, {"max_gen_toks": most}) for p in prompts]))
    assert "2 of 2 answers have less room" in caplog.text and "lose their beginning" not in caplog.text
    for prompt, text in zip(prompts, texts, strict=True):
        room = context - len(tokenizer.encode_batch([prompt])[0])
        [fitting] = model.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": room})]))
        assert text == fitting


def test_a_prompt_that_is_cut_keeps_half_of_the_context(opened: OpenedModel, caplog: Any) -> None:
    tokenizer, context = opened.tokenizer, opened.model.config.context_length
    assert tokenizer is not None
    model, prompt = adapter(opened, [DepthSetting(1)]), documents()[6] * 2
    [text] = model.generate_until(instances("generate_until", [(prompt, {"max_gen_toks": 500})]))
    ids = tokenizer.encode_batch([prompt])[0][-context // 2 :]
    rows = harness.generate(
        opened.model, [ids], context // 2, sampling=Sampling(temperature=0), loops=1, stop_ids=(tokenizer.eos_id,)
    ).rows
    assert text == tokenizer.decode([*ids, *rows[0].tokens])[len(tokenizer.decode(ids)) :]
    assert "1 of 1 prompts do not fit" in caplog.text and "1 of 1 answers have less room" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "got num_beams 4"),
        ({"max_length": 20}, "got max_length 20"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0"),
        ({"max_completion_tokens": float("inf")}, "max_completion_tokens: got inf"),
        ({"max_new_tokens": "many"}, "max_new_tokens: got 'many'"),
        ({"until": [3]}, r"until: got \[3\]"),
        ({"temperature": "warm"}, "could not convert"),
        ({"temperature": -1.0, "do_sample": True}, "temperature: got -1"),
    ],
)
def test_options_of_generation_that_would_not_be_followed(opened: OpenedModel, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter(opened, [DepthSetting(1)]).generate_until(instances("generate_until", [("The", options)]))


def test_options_of_generation_that_are_followed(opened: OpenedModel) -> None:
    most = {"max_gen_toks": 8}
    same = [most, most | {"num_beams": 1, "top_k": 0}, most | {"do_sample": None}, most | {"temperature": None}]
    same += [most | {"do_sample": False, "temperature": 2.0}, {"max_completion_tokens": 8}]
    texts = adapter(opened, [DepthSetting(3)]).generate_until(
        instances("generate_until", [("The river", options) for options in same])
    )
    assert set(texts) == {texts[0]}
    penalised = most | {"repetition_penalty": 1e9}
    assert adapter(opened, [DepthSetting(3)]).generate_until(
        instances("generate_until", [("The river", penalised)])
    ) != [texts[0]]


def test_a_diverged_model_has_no_score(opened: OpenedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = [[harness.Score(float("nan"), False, 1.0)]]
    monkeypatch.setattr(harness, "score_requests", lambda *_, **__: nan)
    with pytest.raises(ValueError, match="not finite"):
        adapter(opened, [DepthSetting(1)]).loglikelihood(instances("loglikelihood", [("The", " river")]))


def test_answers_are_those_of_the_harness_own_class(exported: Path, opened: OpenedModel) -> None:
    """The harness' class for transformers, on the export as transformers opens it, at the training mean."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, context = str(exported / "model"), opened.model.config.context_length
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        batch_size=3,
        max_length=context,
        device="cpu",
    )
    ours = adapter(opened, [DepthSetting(opened.mean_loops)])
    pairs = [("The river", " crosses"), ("Page 7.  ", "The"), ("", " finds the"), (documents()[6] * 2, " stone.")]
    likelihoods = [model.loglikelihood(instances("loglikelihood", pairs)) for model in (ours, theirs)]
    for (own_sum, own_greedy), (their_sum, their_greedy) in zip(*likelihoods, strict=True):
        assert own_sum == pytest.approx(their_sum, rel=1e-5) and own_greedy == their_greedy
    texts = [(documents()[6] * 2,), ("Page",)]
    sums = [model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for model in (ours, theirs)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    options = {"until": ["river"], "max_gen_toks": 6}
    asked = [(context, options) for context, _ in pairs if context]
    answers = [model.generate_until(instances("generate_until", asked)) for model in (ours, theirs)]
    assert answers[0] == answers[1]


def test_tasks_that_cannot_be_had(exported: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading the harness' thousands of tasks takes seconds.
    monkeypatch.setattr(harness, "TaskManager", partial(TaskManager, include_defaults=False))
    own_tasks, lambada = exported / "tasks", Path(lm_eval.__file__).parent / "tasks" / "lambada"
    for name, folder, message in (
        ("local_multiple_choce", own_tasks, "no .jsonl file; nearest names: local_multiple_choice"),
        ("xyz", own_tasks, "nearest names: none"),
        ("lambada_openai", lambada, "lambada_openai cannot be loaded: Couldn't reach"),
        ("local_multiple_choice", exported / "nothing", "is not a folder"),
    ):
        arguments = ["--tasks", name, "--include-path", str(folder), "--out", str(exported / "out")]
        assert main(["evaluate", str(exported / "model"), *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not (exported / "out").exists()
