"""Tasks of lm-evaluation-harness, run through its own interface (extra `eval`).

It is imported only where tasks of it are asked for.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mythos.checkpoints.stored_model import OpenedModel
from mythos.distributed.ranks import World
from mythos.errors import MythosError, short_reason
from mythos.evaluation.continuations import (
    DepthSetting,
    Request,
    Score,
    encode_requests,
    least_prompt,
    score_requests,
)
from mythos.evaluation.results import Result
from mythos.evaluation.text import require_tokenizer
from mythos.generation.sampling import Sampling
from mythos.generation.text import PieceStream
from mythos.generation.tokens import generate
from mythos.model.halting import halting_rule

logger = logging.getLogger(__name__)

BOOTSTRAP = 1000
"""Resamples for standard errors that have no formula."""
MOST_TOKENS = 256
"""Tokens that are generated where a task does not say how many; the harness' own default."""
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of how many tokens may be generated, the first that is given counts, as in the harness."""
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
NEUTRAL_OPTIONS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
"""Options of generation that we do not have, and the values which say as much."""


def open_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, Any]:
    """Load tasks, groups or tags, with their data.

    Args:
        names: what the harness calls them.
        include_path: folder with YAML files of further tasks.

    Raises:
        MythosError: an unknown name, or a task whose data cannot be had.
    """
    manager = None
    if include_path is not None:
        if not include_path.is_dir():
            raise MythosError(f"--include-path: {include_path} is no folder; give one with YAML files of tasks")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        # All that the harness brings: thousands of files, which takes seconds.
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
        except Exception as error:  # of the harness, of datasets, of the network: no common base class
            raise MythosError(
                f"--tasks: {name} cannot be loaded: {short_reason(error)}. Unless its YAML names local files, its data "
                "comes from the Hugging Face hub: load it once with the network, then it is in the cache; or give a "
                ".jsonl file of questions"
            ) from error
    return tasks


class HarnessModel(LM):
    """A model as the harness sees it: one process that answers requests, at `setting`.

    Likelihoods at all settings are computed when the first asks for them, equal loops in one run of the model. The
    requests are divided over the ranks here, so that all harnesses see all answers.
    """

    def __init__(
        self,
        opened: OpenedModel,
        settings: Sequence[DepthSetting],
        *,
        micro_batch: int,
        world: World,
        autocast: AbstractContextManager[Any],
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.model = opened.model
        self.coder = require_tokenizer(opened)  # what is called tokenizer, the harness takes for one of transformers
        self.settings = list(settings)
        self.world = world
        self.autocast = autocast
        self.micro_batch = micro_batch
        self.progress = progress
        self.setting = self.settings[0]
        self.loops: list[float] = []
        """Mean loops of what was asked for since `begin`."""
        self._known: dict[tuple[str, ...], list[Score]] = {}

    def begin(self, setting: DepthSetting) -> None:
        """Answer at this setting from now on. The first one begins another task."""
        self.setting, self.loops = setting, []
        if setting == self.settings[0]:
            self._known.clear()

    @property
    def mean_loops(self) -> float:
        """Loops of a position, on average over requests since `begin`."""
        return sum(self.loops) / max(1, len(self.loops))

    def loglikelihood(self, requests: list[Instance], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether it is what greedy decoding gives."""
        asked = [request.args for request in requests]
        new = [texts for texts in dict.fromkeys(asked) if texts not in self._known]
        if new:
            encoded, cut = encode_requests(self.coder, new, self.model.config.context_length)
            self._tell(cut, len(new))
            for texts, scores in zip(new, self._score(encoded), strict=True):
                self._known[texts] = scores
        return [(score.log_likelihood, score.greedy) for score in self._answers(asked)]

    def loglikelihood_rolling(self, requests: list[Instance], **_: Any) -> list[float]:
        """Log-likelihood in nats of each text, in windows of the context where it is longer."""
        asked = [request.args for request in requests]
        new = [texts for texts in dict.fromkeys(asked) if texts not in self._known]
        windows = []
        for (text,), ids in zip(new, self.coder.encode_batch([text for (text,) in new]), strict=True):
            cut = get_rolling_token_windows(ids, self.coder.eos_id, self.model.config.context_length, 1)
            windows += [(text, Request(*make_disjoint_window(window))) for window in cut]
        sums = {(text,): [Score(0.0, True, 0.0)] * len(self.settings) for (text,) in new}
        counts = Counter(text for text, _ in windows)
        if windows:
            for (text, _), scores in zip(windows, self._score([request for _, request in windows]), strict=True):
                sums[text,] = [
                    Score(a.log_likelihood + b.log_likelihood, a.greedy and b.greedy, a.loops + b.loops / counts[text])
                    for a, b in zip(sums[text,], scores, strict=True)
                ]
        self._known |= sums
        return [score.log_likelihood for score in self._answers(asked)]

    def generate_until(self, requests: list[Instance], **_: Any) -> list[str]:
        """Each context continued up to a stop string, greedily unless the task samples.

        A prompt that does not fit loses its beginning, down to half of the model's context; beyond that the answer has
        less room than the task gives it. Both are counted in a warning. Raises ValueError for options of generation
        that this model does not have.
        """
        asked = [request.args for request in requests]
        alike: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(asked):
            alike.setdefault(json.dumps(options, sort_keys=True), []).append(index)
        context_length = self.model.config.context_length
        prompts, cut, short = [], 0, 0
        for (_, options), ids in zip(asked, self.coder.encode_batch([context for context, _ in asked]), strict=True):
            most, _, _ = most_tokens(options), stops_of(options), sampling_of(options, self.coder.size)
            # The answer takes its room from the prompt until half of the context is left to it.
            prompt = (ids or [self.coder.eos_id])[-max(context_length - most, least_prompt(context_length)) :]
            prompts.append(prompt)
            cut += len(prompt) < len(ids)
            short += len(prompt) + most > context_length
        self._tell(cut, len(prompts))
        if short and self.world.rank == 0 and self.setting == self.settings[0]:
            logger.warning(
                "%d of %d answers have less room than the %d tokens that the task lets be generated: the context of %d "
                "tokens holds prompt and answer, and an answer ends where it is full",
                *(short, len(prompts), max(most_tokens(options) for _, options in asked), context_length),
            )
        batches = []
        for indices in alike.values():
            indices.sort(key=lambda index: -len(prompts[index]))
            batches += [indices[start : start + self.micro_batch] for start in range(0, len(indices), self.micro_batch)]
        found: dict[int, tuple[str, float]] = {}
        for batch in batches[self.world.rank :: self.world.size]:
            made = self._generate([prompts[index] for index in batch], asked[batch[0]][1], batch)
            found |= zip(batch, made, strict=True)
        for part in self.world.ranks.gather(found):
            found |= part
        self.loops += [found[index][1] for index in range(len(asked))]
        return [found[index][0] for index in range(len(asked))]

    def _generate(
        self, prompts: Sequence[list[int]], options: dict[str, Any], seeds: list[int]
    ) -> list[tuple[str, float]]:
        """Continuations and the mean loops of their tokens."""
        streams = [PieceStream(self.coder, ids, stops_of(options)) for ids in prompts]

        def on_token(row: int, token: int, loops: int) -> bool:
            streams[row].push(token, loops)
            return streams[row].stopped

        with self.autocast:
            rows = generate(
                self.model,
                prompts,
                most_tokens(options),
                sampling=sampling_of(options, self.coder.size),
                seed=seeds,
                loops=self.setting.loops,
                halting=halting_rule(self.model, self.setting.rule or "none", self.setting.threshold),
                stop_ids=(self.coder.eos_id,),
                on_token=on_token,
                vocabulary=self.coder.size,
            ).rows
        for stream in streams:
            stream.finish()
        return [
            ("".join(piece.text for piece in stream.pieces), sum(row.loops) / max(1, len(row.loops)))
            for stream, row in zip(streams, rows, strict=True)
        ]

    def _score(self, requests: Sequence[Request]) -> list[list[Score]]:
        """For each request its scores at all settings."""
        by_setting = score_requests(
            self.model,
            requests,
            self.settings,
            micro_batch=self.micro_batch,
            world=self.world,
            autocast=self.autocast,
            progress=self.progress,
        )
        if any(math.isnan(score.log_likelihood) for scores in by_setting for score in scores):
            raise ValueError("the model's likelihoods are not finite: it has diverged; take an earlier checkpoint")
        return [list(scores) for scores in zip(*by_setting, strict=True)]

    def _answers(self, asked: Sequence[tuple[str, ...]]) -> list[Score]:
        number = self.settings.index(self.setting)
        answers = [self._known[texts][number] for texts in asked]
        self.loops += [score.loops for score in answers]
        return answers

    def _tell(self, cut: int, of: int) -> None:
        if cut and self.world.rank == 0 and self.setting == self.settings[0]:
            context = self.model.config.context_length
            logger.warning(
                "%d of %d prompts do not fit in the context of %d tokens and lose their beginning", cut, of, context
            )


def most_tokens(options: dict[str, Any]) -> int:
    """How many tokens a task's options let be generated. Raises ValueError for anything but a number above 0."""
    name = next((name for name in LENGTH_OPTIONS if options.get(name) is not None), None)
    given = MOST_TOKENS if name is None else options[name]
    try:
        most = int(given)
    except (TypeError, ValueError, OverflowError):
        most = 0
    if most < 1:
        raise ValueError(f"{name}: got {given!r}; allowed: a whole number, at least 1")
    return most


def stops_of(options: dict[str, Any]) -> list[str]:
    """The texts that a task's options let an answer end before. Raises ValueError for anything but texts."""
    until = options.get("until") or []
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"generation_kwargs: until: got {until!r}; allowed: a text or a list of texts")
    return [stop for stop in stops if stop]


def sampling_of(options: dict[str, Any], vocabulary: int) -> Sampling:
    """How a task's options let tokens be drawn; greedily unless they say otherwise.

    Raises ValueError for options that ask for what this model does not do: it would be scored on something else.
    """
    given = {name: value for name, value in options.items() if value is not None}
    known = {"until", "do_sample", *LENGTH_OPTIONS, *SAMPLING_OPTIONS}
    unknown = [f"{name} {given[name]!r}" for name in given.keys() - known if given[name] != NEUTRAL_OPTIONS.get(name)]
    if unknown:
        raise ValueError(f"generation_kwargs: got {', '.join(sorted(unknown))}; allowed: {', '.join(sorted(known))}")
    try:
        numbers = {name: float(given[name]) for name in SAMPLING_OPTIONS if name in given}
        top_k = min(int(numbers.pop("top_k", 0)), vocabulary) or None
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"generation_kwargs: {error}; allowed: numbers for {', '.join(SAMPLING_OPTIONS)}") from error
    temperature = numbers.pop("temperature", None)
    if not given.get("do_sample", temperature is not None and temperature > 0):
        temperature = 0.0
    return Sampling(temperature=1.0 if temperature is None else temperature, top_k=top_k, **numbers)


def run_tasks(
    model: HarnessModel, tasks: dict[str, Any], *, limit: int | None = None, fewshot: int | None = None
) -> list[Result]:
    """Scores of every task and its parts at every setting of the model, on every rank.

    Args:
        model: the model.
        tasks: from `open_tasks`.
        limit: most documents of a task.
        fewshot: examples before each question; None = what the task says.

    Raises:
        MythosError: a task that the harness or the model refuses.
    """
    results = []
    for name, loaded in tasks.items():
        for task in loaded["tasks"].values():
            # A task that says 0 has nothing to make examples of.
            said = task.get_config("num_fewshot")
            task.set_config(key="num_fewshot", value=(said or 0) if fewshot is None or said == 0 else fewshot)
            task.set_fewshot_seed(seed=1234)
        for setting in model.settings:
            model.begin(setting)
            try:
                found = evaluate(model, loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False)
            except ValueError as error:  # a task that runs code, or shows pictures; or of our own model
                raise MythosError(f"--tasks: {name} cannot be run: {error}") from error
            assert found is not None
            results += _results(found, setting, model.mean_loops)
    return results


def _results(found: Any, setting: DepthSetting, mean_loops: float) -> list[Result]:
    """The numbers of the harness' result, which it names METRIC,FILTER and METRIC_stderr,FILTER."""
    results = []
    for name, values in (found["results"] | found.get("groups", {})).items():
        for key, value in values.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{of_filter}")
            called = metric if of_filter == "none" else key
            count = found["n-samples"].get(name, {}).get("effective")
            stderr = float(error) if isinstance(error, int | float) else None
            results.append(Result(name, called, setting, mean_loops, float(value), stderr, count))
    return results
