"""What a run measures of its model while it trains: validation, tasks and samples, all of which a stop interrupts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from mythos.config.sections import Config
from mythos.data.tasks import TaskSet
from mythos.data.tokenizer import Tokenizer
from mythos.data.validation import ValidationSet
from mythos.distributed.parallel import ParallelModel
from mythos.distributed.stop import StopRequests
from mythos.evaluation.choices import EncodedTask, choice_metrics
from mythos.evaluation.depth_sweep import adaptive_metrics, fit_metrics
from mythos.evaluation.reasoning import task_metrics
from mythos.evaluation.validation import losses_by_depth, validation_metrics
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate


class Interrupted(Exception):
    """A stop was asked for while the model was measured. All ranks raise it together, and nothing is half measured."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, and by what. Its methods are collective."""

    config: Config
    parallel: ParallelModel
    data: ValidationSet | TaskSet
    tasks: Sequence[EncodedTask]
    tokenizer: Tokenizer | None
    micro_batch: int
    stop: StopRequests

    def measure(self) -> dict[str, float]:
        """Validation loss and answers at several depths. Raises Interrupted."""
        config = self.config
        common: dict[str, Any] = {
            "micro_batch": self.micro_batch,
            "world": self.parallel.world,
            "autocast": self.parallel.autocast,
            "check": self.check,
        }
        follows = config.depth.follow == "difficulty"
        measure = task_metrics if isinstance(self.data, TaskSet) else validation_metrics
        mean_loops = round(config.depth_mean)
        main_depth = None if follows else mean_loops
        metrics = measure(self.parallel.model, self.data, depths=config.eval.loops, main_depth=main_depth, **common)
        if not follows:  # where each sequence has its own depth, one for all says nothing
            metrics |= fit_metrics(losses_by_depth(metrics))
        # Where positions halt, ranks run different numbers of passes, and those that share the model must not.
        if not follows and not self.parallel.layout.sharded:
            metrics |= adaptive_metrics(self.parallel.model, self.data, most=mean_loops, **common)
        return metrics | choice_metrics(self.parallel.model, self.tasks, depths=config.eval.loops, **common)

    def samples(self) -> list[str]:
        """Texts after eval.prompts, on the ranks that draw them: rank 0, under FSDP all. Raises Interrupted."""
        # Under FSDP a forward pass takes all ranks; they draw the same.
        drawing = self.tokenizer is not None and (self.parallel.world.ranks.main or self.parallel.layout.sharded)
        texts = []
        for index in range(self.config.eval.samples):
            if drawing:
                texts.append(self._sample(index))
            self.check()  # a text that was cut short is not kept
        return texts

    def check(self) -> None:
        """Raise Interrupted on all ranks if any has been asked to stop."""
        if self._agreed_to_stop():
            raise Interrupted

    def _agreed_to_stop(self) -> bool:
        (stopping,) = self.parallel.world.ranks.any(self._asked_to_stop())
        return stopping

    def _asked_to_stop(self) -> bool:
        return self.stop.reason is not None

    def _sample(self, index: int) -> str:
        """Text after one of eval.prompts, at the mean depth; the same draw at every step."""
        assert self.tokenizer is not None
        config, tokenizer = self.config, self.tokenizer
        prompt = config.eval.prompts[index % len(config.eval.prompts)]
        # Of a prompt that leaves no room in the context, the end is continued.
        room = max(1, config.model.context_length - config.eval.sample_tokens)
        ids = (tokenizer.encode_batch([prompt])[0] or [tokenizer.eos_id])[-room:]
        # Under FSDP no rank may stop before the others.
        stopping = self._agreed_to_stop if self.parallel.layout.sharded else self._asked_to_stop
        with self.parallel.autocast:
            [drawn], _ = generate(
                self.parallel.model,
                [ids],
                config.eval.sample_tokens,
                sampling=Sampling(temperature=0.8, top_k=min(40, tokenizer.size)),
                seed=config.run.seed + index,
                vocabulary=tokenizer.size,
                loops=round(config.depth_mean),
                # Nor should their logits differ in the last bit.
                stop_ids=() if self.parallel.layout.sharded else (tokenizer.eos_id,),
                on_token=lambda *_: stopping(),
            )
        return tokenizer.decode(ids + list(takewhile(lambda token: token != tokenizer.eos_id, drawn.tokens)))


def write_samples(texts: Sequence[str], path: Path) -> None:
    """Write texts to a file, whose folder is made. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
