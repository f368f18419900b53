"""Tasks of lm-evaluation-harness, run through its own interface (extra `eval`).

Import this module only if such tasks are requested: the harness is optional.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mythos.checkpoints.stored_model import OpenedModel
from mythos.errors import MythosError, short_reason
from mythos.evaluation.continuations import (
    DepthSetting,
    Request,
    Score,
    encode_requests,
    least_prompt,
    score_requests,
)
from mythos.evaluation.execution import Execution
from mythos.evaluation.results import Result
from mythos.generation.sampling import Sampling
from mythos.generation.text import PieceStream
from mythos.generation.tokens import generate
from mythos.model.halting import halting_rule

logger = logging.getLogger(__name__)

BOOTSTRAP = 1000
"""Bootstrap resamples for standard errors without a formula."""
MOST_TOKENS = 256
"""Maximum number of generated tokens, if a task does not set one; the harness' own default."""
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the maximum number of generated tokens; the first one that is set counts, as in the harness."""
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL_OPTIONS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Generation options that we do not have, and the values that switch them off."""


def open_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, Any]:
    """Load tasks, groups or tags, with their data, by the harness' names of them.

    `include_path` is a folder with YAML files of further tasks. Raises MythosError if a name is unknown, or a task's
    data cannot be loaded.
    """
    manager = None
    if include_path is not None:
        if not include_path.is_dir():
            raise MythosError(f"--include-path: {include_path} is not a folder; give one with YAML files of tasks")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        # With the harness' own tasks: it reads thousands of files, which takes seconds.
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    tasks = {}
    for name in names:
        if name not in manager.all_tasks:
            nearest = ", ".join(get_close_matches(name, manager.all_tasks)) or "none"
            raise MythosError(
                f"--tasks: {name!r} is no task of lm-evaluation-harness and no .jsonl file; nearest names: {nearest}. "
                "`lm-eval ls tasks` lists all"
            )
        try:
            tasks[name] = manager.load([name])
        except Exception as error:  # harness, datasets and network errors share no base class
            raise MythosError(
                f"--tasks: {name} cannot be loaded: {short_reason(error)}. Unless its YAML names local files, its data "
                "comes from the Hugging Face hub: load it once with network access, then it is cached; or give a "
                ".jsonl file of questions"
            ) from error
    return tasks


class HarnessModel(LM):
    """A model with the harness' interface: it answers requests at the current `setting`.

    The first setting that needs a likelihood computes it for all settings, with one run of the model for those without
    a halting rule. Collective: this class divides requests over the ranks, so the harness on every rank sees all
    answers and believes that it is alone.
    """

    def __init__(self, opened: OpenedModel, settings: Sequence[DepthSetting], execution: Execution) -> None:
        super().__init__()
        self.model = opened.model
        self.our_tokenizer = opened.require_tokenizer()  # the harness takes `tokenizer` for one of transformers'
        self.settings = list(settings)
        self.execution, self.world = execution, execution.world
        self.setting = self.settings[0]
        self.loops: list[float] = []
        """Mean loops of each request since `begin`."""
        self._scores: dict[tuple[str, ...], list[Score]] = {}

    def begin(self, setting: DepthSetting) -> None:
        """Answer at this setting from now on; the first setting starts another task."""
        self.setting, self.loops = setting, []
        if setting == self.settings[0]:
            self._scores.clear()

    @property
    def mean_loops(self) -> float:
        """Mean loops of a position over the requests since `begin`."""
        return sum(self.loops) / max(1, len(self.loops))

    def loglikelihood(self, requests: list[Instance], **harness_options: Any) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding gives it."""
        arguments = [request.args for request in requests]
        new = [texts for texts in dict.fromkeys(arguments) if texts not in self._scores]
        if new:
            encoded, cut = encode_requests(self.our_tokenizer, new, self.model.config.context_length)
            self._warn_of_cuts(cut, len(new))
            for texts, scores in zip(new, self._score(encoded), strict=True):
                self._scores[texts] = scores
        return [(score.log_likelihood, score.greedy) for score in self._answers(arguments)]

    def loglikelihood_rolling(self, requests: list[Instance], **harness_options: Any) -> list[float]:
        """Log-likelihood in nats of each text; a text longer than the context is split into windows."""
        arguments = [request.args for request in requests]
        new = [texts for texts in dict.fromkeys(arguments) if texts not in self._scores]
        windows = []
        for (text,), ids in zip(new, self.our_tokenizer.encode_batch([text for (text,) in new]), strict=True):
            parts = get_rolling_token_windows(ids, self.our_tokenizer.eos_id, self.model.config.context_length, 1)
            windows += [(text, Request(*make_disjoint_window(part))) for part in parts]
        sums: dict[tuple[str, ...], list[Score]] = {
            (text,): [Score(0.0, True, 0.0)] * len(self.settings) for (text,) in new
        }
        counts = Counter(text for text, _ in windows)
        if windows:
            for (text, _), scores in zip(windows, self._score([request for _, request in windows]), strict=True):
                sums[text,] = [
                    Score(a.log_likelihood + b.log_likelihood, a.greedy and b.greedy, a.loops + b.loops / counts[text])
                    for a, b in zip(sums[text,], scores, strict=True)
                ]
        self._scores |= sums
        return [score.log_likelihood for score in self._answers(arguments)]

    def generate_until(self, requests: list[Instance], **harness_options: Any) -> list[str]:
        """Continue each context up to a stop string, greedily unless the task samples.

        A prompt that does not fit loses its beginning, down to half of the model's context; beyond that the answer gets
        fewer tokens than the task allows. Both are counted in a warning. Raises ValueError for generation options that
        this model does not have.
        """
        arguments: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]
        same_options: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(arguments):
            same_options.setdefault(json.dumps(options, sort_keys=True), []).append(index)
        prompts = self._prompts(arguments)
        batches, size = [], self.execution.micro_batch
        for indices in same_options.values():
            indices.sort(key=lambda index: -len(prompts[index]))
            batches += [indices[start : start + size] for start in range(0, len(indices), size)]
        answers: dict[int, tuple[str, float]] = {}
        for batch in batches[self.world.rank :: self.world.size]:
            generated = self._generate([prompts[index] for index in batch], arguments[batch[0]][1], batch)
            answers |= zip(batch, generated, strict=True)
        for part in self.world.ranks.gather(answers):
            answers |= part
        self.loops += [answers[index][1] for index in range(len(arguments))]
        return [answers[index][0] for index in range(len(arguments))]

    def _prompts(self, arguments: Sequence[tuple[str, dict[str, Any]]]) -> list[list[int]]:
        """The ids of contexts, cut to leave room for the answers, with a warning about how many are cut.

        Raises ValueError for options that this model does not have.
        """
        context_length = self.model.config.context_length
        prompts, cut, short = [], 0, 0
        encoded = self.our_tokenizer.encode_batch([context for context, _ in arguments])
        for (_, options), ids in zip(arguments, encoded, strict=True):
            most = most_tokens(options)
            stops_of(options)
            sampling_of(options, self.our_tokenizer.size)
            # The answer takes room from the prompt, which keeps at least half of the context.
            prompt = (ids or [self.our_tokenizer.eos_id])[-max(context_length - most, least_prompt(context_length)) :]
            prompts.append(prompt)
            cut += len(prompt) < len(ids)
            short += len(prompt) + most > context_length
        self._warn_of_cuts(cut, len(prompts))
        if short and self.world.rank == 0 and self.setting == self.settings[0]:
            logger.warning(
                "%d of %d answers have less room than the %d tokens that the task allows: prompt and answer share the "
                "context of %d tokens, and an answer ends when it is full",
                *(short, len(prompts), max(most_tokens(options) for _, options in arguments), context_length),
            )
        return prompts

    def _generate(
        self, prompts: Sequence[list[int]], options: dict[str, Any], seeds: list[int]
    ) -> list[tuple[str, float]]:
        """Continuations of a batch, and the mean loops of their tokens."""
        streams = [PieceStream(self.our_tokenizer, ids, stops_of(options)) for ids in prompts]

        def on_token(row: int, token: int, loops: int) -> bool:
            streams[row].push(token, loops)
            return streams[row].stopped

        with self.execution.autocast:
            rows = generate(
                self.model,
                prompts,
                most_tokens(options),
                sampling=sampling_of(options, self.our_tokenizer.size),
                seed=seeds,
                loops=self.setting.loops,
                halting=halting_rule(self.model, self.setting.rule or "none", self.setting.threshold),
                stop_ids=(self.our_tokenizer.eos_id,),
                on_token=on_token,
                vocabulary=self.our_tokenizer.size,
            ).rows
        for stream in streams:
            stream.finish()
        return [
            ("".join(piece.text for piece in stream.pieces), sum(row.loops) / max(1, len(row.loops)))
            for stream, row in zip(streams, rows, strict=True)
        ]

    def _score(self, requests: Sequence[Request]) -> list[list[Score]]:
        """For each request its scores at all settings. Raises ValueError if any is NaN."""
        by_setting = score_requests(self.model, requests, self.settings, self.execution)
        if any(math.isnan(score.log_likelihood) for scores in by_setting for score in scores):
            raise ValueError("the model's likelihoods are not finite: it has diverged; take an earlier checkpoint")
        return [list(scores) for scores in zip(*by_setting, strict=True)]

    def _answers(self, arguments: Sequence[tuple[str, ...]]) -> list[Score]:
        """The scores at the current setting, whose loops are recorded."""
        number = self.settings.index(self.setting)
        answers = [self._scores[texts][number] for texts in arguments]
        self.loops += [score.loops for score in answers]
        return answers

    def _warn_of_cuts(self, cut: int, total: int) -> None:
        if cut and self.world.rank == 0 and self.setting == self.settings[0]:
            context = self.model.config.context_length
            logger.warning(
                "%d of %d prompts do not fit in the context of %d tokens and lose their beginning", cut, total, context
            )


def most_tokens(options: dict[str, Any]) -> int:
    """Maximum number of generated tokens by a task's options. Raises ValueError unless it is a number above 0."""
    name = next((name for name in LENGTH_OPTIONS if options.get(name) is not None), None)
    value = MOST_TOKENS if name is None else options[name]
    try:
        most = int(value)
    except (TypeError, ValueError, OverflowError):
        most = 0
    if most < 1:
        raise ValueError(f"{name}: got {value!r}; allowed: a whole number, at least 1")
    return most


def stops_of(options: dict[str, Any]) -> list[str]:
    """Stop strings by a task's options. Raises ValueError unless they are texts."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"generation_kwargs: until: got {until!r}; allowed: a text or a list of texts")
    return [stop for stop in stops if stop]


def sampling_of(options: dict[str, Any], vocabulary: int) -> Sampling:
    """The sampling settings by a task's options; greedy by default.

    Raises ValueError for options that this model does not have: without them it would be scored on another task.
    """
    values = {name: value for name, value in options.items() if value is not None}
    known = {"until", "do_sample", *LENGTH_OPTIONS, *SAMPLING_OPTIONS}
    unknown = [
        f"{name} {values[name]!r}" for name in values.keys() - known if values[name] != NEUTRAL_OPTIONS.get(name)
    ]
    if unknown:
        raise ValueError(f"generation_kwargs: got {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(known))}")
    try:
        numbers = {name: float(values[name]) for name in SAMPLING_OPTIONS if name in values}
        top_k = min(int(numbers.pop("top_k", 0)), vocabulary) or None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"generation_kwargs: {error}; allowed: numbers for {', '.join(SAMPLING_OPTIONS)}") from error
    temperature = numbers.pop("temperature", None)
    if not values.get("do_sample", temperature is not None and temperature > 0):
        temperature = 0.0
    return Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, **numbers)


def run_tasks(
    model: HarnessModel, tasks: dict[str, Any], *, limit: int | None = None, fewshot: int | None = None
) -> list[Result]:
    """Scores of every task and its subtasks at every setting of the model. Collective; all ranks get the result.

    `tasks` are from `open_tasks`, `limit` is the maximum number of documents of a task, `fewshot` the examples before
    each question (None = the task's own number). Raises MythosError if the harness or the model refuses a task.
    """
    results = []
    for name, loaded in tasks.items():
        for task in loaded["tasks"].values():
            # A task that sets 0 has no documents for examples.
            own = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(own or 0) if fewshot is None or own == 0 else fewshot)
            task.set_fewshot_seed(seed=1234)
        for setting in model.settings:
            model.begin(setting)
            try:
                output = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
            except ValueError as error:  # from the harness for tasks with code or images, or from our model
                raise MythosError(f"--tasks: {name} cannot be run: {error}") from error
            assert output is not None
            results += _results(output, setting, model.mean_loops)
    return results


def _results(output: Any, setting: DepthSetting, mean_loops: float) -> list[Result]:
    """The numbers of the harness' output, whose keys are METRIC,FILTER and METRIC_stderr,FILTER."""
    results = []
    for name, values in (output["results"] | output.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            label = metric if filter_name == "none" else key
            count = output["n-samples"].get(name, {}).get("effective")
            stderr = float(error) if isinstance(error, int | float) else None
            results.append(Result(name, label, setting, mean_loops, float(value), stderr, count))
    return results
