"""Measurements of a run while it trains: validation, tasks and samples. A stop request interrupts any of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from mythos.config.sections import Config
from mythos.data.tasks import TaskSet
from mythos.data.tokenizer import Tokenizer
from mythos.data.validation import ValidationSet
from mythos.distributed.parallel import ParallelModel
from mythos.distributed.stop import StopRequests
from mythos.evaluation.choices import EncodedTask, choice_metrics
from mythos.evaluation.depth_sweep import adaptive_metrics, fit_metrics
from mythos.evaluation.execution import Execution
from mythos.evaluation.reasoning import task_metrics
from mythos.evaluation.validation import validation_metrics
from mythos.generation.sampling import Sampling
from mythos.generation.tokens import generate
from mythos.training.metrics import losses_by_depth


class Interrupted(Exception):
    """A stop was requested during a measurement. All ranks raise it together; partial results are discarded."""


@dataclass(frozen=True)
class Measurement:
    """Everything that a measurement needs. Its methods are collective."""

    config: Config
    parallel: ParallelModel
    data: ValidationSet | TaskSet
    tasks: Sequence[EncodedTask]
    tokenizer: Tokenizer | None
    micro_batch: int
    stop: StopRequests

    def measure(self) -> dict[str, float]:
        """Validation loss and scores of tasks at several depths. Raises Interrupted."""
        config, model, depths = self.config, self.parallel.model, self.config.eval.loops
        execution = Execution(self.micro_batch, self.parallel.world, self.parallel.autocast, check=self.check)
        follows = config.depth.follow == "difficulty"
        mean_loops = round(config.depth_mean)
        if isinstance(self.data, TaskSet):
            main_depth = None if follows else mean_loops
            metrics = task_metrics(model, self.data, execution, depths=depths, main_depth=main_depth)
        else:
            metrics = validation_metrics(model, self.data, execution, depths=depths, main_depth=mean_loops)
        if not follows:  # a fit needs one depth for all sequences
            metrics |= fit_metrics(losses_by_depth(metrics))
        # With halting, ranks run different numbers of passes: impossible if they share the model's parameters.
        if not follows and not self.parallel.layout.sharded:
            metrics |= adaptive_metrics(model, self.data, execution, most=mean_loops)
        return metrics | choice_metrics(model, self.tasks, execution, depths=depths)

    def samples(self) -> list[str]:
        """Continuations of eval.prompts, on the ranks that generate: rank 0, or all under FSDP. Raises Interrupted."""
        # Under FSDP a forward pass needs all ranks; they generate the same text.
        generating = self.tokenizer is not None and (self.parallel.world.ranks.main or self.parallel.layout.sharded)
        texts = []
        for index in range(self.config.eval.samples):
            if generating:
                texts.append(self._sample(index))
            self.check()  # discards a text that a stop cut short
        return texts

    def check(self) -> None:
        """Raise Interrupted on all ranks if any of them received a stop request."""
        if self._any_stop_requested():
            raise Interrupted

    def _any_stop_requested(self) -> bool:
        (stopping,) = self.parallel.world.ranks.any(self._stop_requested())
        return stopping

    def _stop_requested(self) -> bool:
        return self.stop.reason is not None

    def _sample(self, index: int) -> str:
        """A continuation of one of eval.prompts, at the mean depth; the same draws at every step."""
        assert self.tokenizer is not None
        config, tokenizer = self.config, self.tokenizer
        prompt = config.eval.prompts[index % len(config.eval.prompts)]
        # A prompt that leaves no room in the context loses its beginning.
        room = max(1, config.model.context_length - config.eval.sample_tokens)
        ids = (tokenizer.encode_batch([prompt])[0] or [tokenizer.eos_id])[-room:]
        sharded = self.parallel.layout.sharded
        # Under FSDP all ranks must stop at the same token: they agree on a stop request, and generate past the end of
        # the document, because logits may differ in the last bit between ranks.
        stopping = self._any_stop_requested if sharded else self._stop_requested
        with self.parallel.autocast:
            [continuation], _ = generate(
                self.parallel.model,
                [ids],
                config.eval.sample_tokens,
                sampling=Sampling(temperature=0.8, top_k=min(40, tokenizer.size)),
                seed=config.run.seed + index,
                vocabulary=tokenizer.size,
                loops=round(config.depth_mean),
                stop_ids=() if sharded else (tokenizer.eos_id,),
                on_token=lambda *_: stopping(),
            )
        return tokenizer.decode(ids + list(takewhile(lambda token: token != tokenizer.eos_id, continuation.tokens)))


def write_samples(texts: Sequence[str], path: Path) -> None:
    """Write texts to a file and create its folder. Raises OSError."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
