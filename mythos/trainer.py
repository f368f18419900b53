"""The training loop, from configuration to trained model, readable top to bottom."""

import contextlib
import logging
import math
import platform
import time
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mythos import checkpoint
from mythos.config import Config, save_config
from mythos.data.loader import Loader
from mythos.data.pipeline import open_data
from mythos.data.stream import Batch, DifferentData
from mythos.data.tokenizer import check_vocabulary
from mythos.depth import DepthPlan, DepthSchedule
from mythos.errors import MythosError
from mythos.estimate import count_parameters, forward_flops
from mythos.evaluation.validation import losses_by_depth, validation_metrics
from mythos.metrics import MetricsLog, expert_balance, peak_flops, peak_memory
from mythos.model.config import padded_vocab_size
from mythos.model.generate import generate
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.recurrence import initial_state
from mythos.optim import build_optimizer, learning_rate
from mythos.parallel import check_single_process, choose_device, choose_dtype, prepare_model
from mythos.plots import draw_plots

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What a training step leaves on the device; reading it synchronises, so only logged steps do."""

    loss: Tensor
    """Mean over the step's targets, nats."""
    grad_norm: Tensor
    state_norm: Tensor
    state_delta: Tensor
    expert_load: Tensor | None
    plan: DepthPlan
    lr: float


class Trainer:
    """Builds everything a run needs, in the order in which it can fail cheapest, and trains."""

    def __init__(self, config: Config) -> None:
        check_single_process()
        self.device = choose_device(config.train.device)
        self.dtype = choose_dtype(config.train.dtype, self.device)
        self.run_dir = config.run_dir
        prepare_directory(self.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        found = checkpoint.find(self.checkpoints, config.run.resume)
        meta = checkpoint.read_meta(found) if found else None

        # Data: corpora, their tokenizer (which sizes the model's vocabulary), training streams, validation rows.
        data = open_data(config, self.run_dir if found else None, meta["config"]["data"] if meta else {})
        self.tokenizer = data.tokenizer
        config = config.model_copy(update={"data": data.config})
        self.config = config = resolve_vocabulary(config, self.tokenizer.padded_size)
        check_vocabulary(self.tokenizer, config.model.vocab_size)
        if meta:
            check_same_model(config, meta["config"]["model"], found)
        self.schedule = DepthSchedule(config)
        self.loader = Loader(
            data.streams(config.run.seed),
            slots=self.schedule.slots,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
        if meta:
            self.restore_data(meta["data"])
        self.loader.start()  # the workers read the first batches while the rest is built
        self.validation = data.validation(config.eval.batches * config.data.streams)

        # Model: shaped without memory, then filled from (seed, parameter name).
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        self.model = model.to_empty(device=self.device).initialize(config.run.seed)
        prepare_model(config, self.model)
        self.optimizer = build_optimizer(self.model, config.optim)

        self.step = self.tokens = 0
        self.newest = found
        if found and meta:
            checkpoint.load(found, checkpoint.training_state(self.model, self.optimizer))
            self.step, self.tokens = meta["step"], meta["tokens"]
        else:  # only now that everything fits: a start that failed must not bind the next one
            self.tokenizer.save(self.run_dir / "tokenizer")
        save_config(config, self.run_dir / "config.yaml")
        self.log = MetricsLog(self.run_dir, config, self.step)
        self.announce(found)

    def restore_data(self, state: dict[str, Any]) -> None:
        """Continue the data where the checkpoint left it; raises MythosError for other data, unless it restarts."""
        try:
            self.loader.load_state_dict(state)
        except DifferentData as error:
            if self.config.data.on_mismatch == "fail":
                raise
            logger.warning("%s\ndata.on_mismatch is restart: the data starts from its beginning", error)

    def run(self) -> None:
        """Train from the current step to the last, then validate, save, plot and sum up."""
        config, steps = self.config, self.config.train_steps
        metrics: dict[str, Any] = {}
        result: StepResult | None = None
        bar = tqdm(total=steps, initial=self.step, unit="step", desc="training", dynamic_ncols=True)
        with contextlib.closing(self.log), contextlib.closing(self.loader), contextlib.closing(bar):
            window_start, window_steps = time.perf_counter(), 0
            while self.step < steps:
                result = self.train_step(self.next_batch(result))
                self.step += 1
                self.tokens += config.tokens_per_step
                window_steps += 1
                bar.update()
                last = self.step == steps
                validating = last or self.due(config.eval.every)
                if validating or self.due(config.log.every):
                    metrics = self.measure(result)  # waits for the device, so the window's time is whole
                    elapsed = time.perf_counter() - window_start
                    metrics |= self.throughput(result.plan, elapsed / window_steps)
                    bar.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:,.0f}")
                    if validating:
                        metrics |= self.validate()
                    self.log.write(metrics)
                    window_start, window_steps = time.perf_counter(), 0
                if last or self.due(config.checkpoint.every):
                    self.check_finite(result)  # what is saved is continued from, and replaces older checkpoints
                    saving = time.perf_counter()
                    self.save()
                    window_start += time.perf_counter() - saving
        if not metrics:
            print(f"nothing to train: the run is at step {self.step}; raise train.steps, or choose another run.name")
            metrics = self.validate()
        self.sum_up(metrics)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0 = never) happens after this one."""
        return every > 0 and self.step % every == 0

    def next_batch(self, last: StepResult | None) -> Batch:
        """The data of the next step; where it cannot be had, saves what was trained and raises MythosError."""
        try:
            return self.loader.next_batch()
        except MythosError as error:
            if last is None:
                raise
            if self.newest is None or checkpoint.step_of(self.newest) != self.step:
                self.check_finite(last)
                self.save()
            raise MythosError(f"{error}\nStopped after step {self.step}, which is saved: {self.newest}") from error

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step over the global batch; nothing in it reads from the device."""
        config, step = self.config, self.step
        plan = self.schedule.plan(step)
        # Deepest rows first: the model's active rows are then always a prefix, and micro-batches are of like depth.
        rows = batch.rows.tolist()
        order = sorted(range(len(rows)), key=lambda i: -plan.loops[rows[i]])
        targets = config.tokens_per_step

        totals: dict[str, Tensor] = {}
        for start in range(0, len(order), config.train.micro_batch):
            micro = order[start : start + config.train.micro_batch]
            micro_rows = [rows[i] for i in micro]
            ids = self.to_device(batch.ids[micro])
            documents = batch.document_ids
            with self.autocast:
                output = self.model(
                    ids[:, :-1],
                    ids[:, 1:],
                    loops=[plan.loops[row] for row in micro_rows],
                    backprop=plan.backprop,
                    state=initial_state(
                        config.model,
                        micro_rows,
                        config.data.sequence_length,
                        seed=config.run.seed,
                        step=step,
                        device=self.device,
                    ),
                    document_ids=None if documents is None else self.to_device(documents[micro]),
                )
            (output.loss / targets).backward()
            share = len(micro) / len(order)
            add(totals, "loss", output.loss.detach() / targets)
            add(totals, "state_norm", output.state_norm * share)
            add(totals, "state_delta", output.state_delta * share)
            if output.expert_load is not None:
                add(totals, "expert_load", output.expert_load)

        # Without a limit the norm is still measured: a run that is about to diverge shows it there first.
        limit = config.optim.clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        lr = learning_rate(config.optim, step, config.train_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load = totals.get("expert_load")
        if load is not None:
            self.model.rebalance(load)
        return StepResult(totals["loss"], grad_norm, totals["state_norm"], totals["state_delta"], load, plan, lr)

    def to_device(self, values: Tensor) -> Tensor:
        """Copy without waiting: from pinned memory, where the device is a GPU."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    @property
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in the run's dtype."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @cached_property
    def mean_loops(self) -> int:
        """The whole number of loops that validation and samples mean by 'the mean depth'."""
        return round(self.config.depth_mean)

    def check_finite(self, result: StepResult) -> None:
        """Raise MythosError if the loss or the gradient is not finite: then the weights are lost."""
        loss, norm = result.loss.item(), result.grad_norm.item()
        if not math.isfinite(loss + norm):
            raise MythosError(
                f"the loss is {loss} and the norm of the gradient {norm} at step {self.step}: training has diverged. "
                f"The last checkpoint is {self.newest or 'not yet written'}; lower optim.lr, or set a lower optim.clip "
                "than the norms before, and continue from it."
            )

    def measure(self, result: StepResult) -> dict[str, Any]:
        """The step's record. Raises MythosError if the step has diverged."""
        self.check_finite(result)
        plan = result.plan
        metrics: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss.item(),
            "lr": result.lr,
            "grad_norm": result.grad_norm.item(),
            "loops": sum(plan.loops) / len(plan.loops),
            "backprop_loops": plan.mean_backprop,
            "state_norm": result.state_norm.item(),
            "state_delta": result.state_delta.item(),
            "peak_memory_bytes": peak_memory(self.device),
        }
        radius = self.model.spectral_radius()
        if radius is not None:
            metrics["rho_a"] = radius.item()
        if result.expert_load is not None:
            metrics |= expert_balance(result.expert_load)
        metrics |= {f"data/{kind}": count for kind, count in self.loader.skipped.items()}
        return metrics

    def throughput(self, plan: DepthPlan, seconds: float) -> dict[str, float]:
        """Tokens per second, and on known GPUs the share of peak that the step's needed FLOPs make."""
        metrics = {"tokens_per_second": self.config.tokens_per_step / seconds, "time": time.time()}
        peak = peak_flops(self.device, self.dtype)
        if peak is not None:
            flops = forward_flops(self.config.model, self.config.data.sequence_length)
            needed = flops.training(plan.loops, plan.backprop) * self.config.tokens_per_step
            metrics["mfu"] = needed / seconds / peak
        return metrics

    def validate(self) -> dict[str, float]:
        """Validation loss at several depths; text samples go to samples/step-N.txt."""
        config = self.config
        self.model.eval()
        metrics = validation_metrics(
            self.model,
            self.validation,
            depths=config.eval.loops,
            main_depth=self.mean_loops,
            micro_batch=config.train.micro_batch,
            device=self.device,
            autocast=self.autocast,
        )
        if config.eval.samples:
            samples = [self.sample(index) for index in range(config.eval.samples)]
            path = self.run_dir / "samples" / f"step-{self.step:08d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n\n".join(samples) + "\n", encoding="utf-8")
        self.model.train()
        return metrics

    def sample(self, index: int) -> str:
        """Text after one of eval.prompts, at the mean depth; the same draw at every step."""
        config = self.config
        prompt = config.eval.prompts[index % len(config.eval.prompts)]
        ids = torch.tensor([self.tokenizer.encode_batch([prompt])[0] or [self.tokenizer.eos_id]], device=self.device)
        generator = torch.Generator(self.device).manual_seed(config.run.seed + index)
        with self.autocast:
            ids = generate(
                self.model,
                ids,
                config.eval.sample_tokens,
                generator=generator,
                vocabulary=self.tokenizer.size,
                loops=self.mean_loops,
                stop_id=self.tokenizer.eos_id,
            )
        return self.tokenizer.decode(ids[0].tolist())

    def save(self) -> None:
        """Write a checkpoint, remove the ones no longer kept, redraw the plots."""
        meta = {
            "tokens": self.tokens,
            "data": self.loader.state_dict(),
            "config": self.config.model_dump(mode="json"),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets")},
        }
        state = checkpoint.training_state(self.model, self.optimizer)
        self.newest = checkpoint.save(self.checkpoints, self.step, state, meta)
        checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, self.config.checkpoint.keep_every)
        draw_plots(self.run_dir, self.config.depth_mean)

    def announce(self, found: Path | None) -> None:
        """Print what the configuration amounts to."""
        config, length = self.config, self.config.data.sequence_length
        parameters = count_parameters(config.model)
        lines = {
            "model": f"{config.model.preset}: {parameters.total:,} parameters, {parameters.active:,} active per loop",
            "depth": f"{config.depth_mean:g} loops on average ({config.depth.sampling}, "
            f"at most {config.depth_maximum}), gradient through the last {config.depth_backprop}",
            "data": f"{config.data.kind}, {config.data.streams} streams, "
            f"{len(self.validation.ids)} validation sequences",
            "training": f"{config.train_steps:,} steps of {config.train.global_batch} x {length} = "
            f"{config.tokens_per_step:,} tokens, {config.train_steps * config.tokens_per_step:,} in all",
            "device": f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads",
            "run": f"{self.run_dir}" + (f", continuing at step {self.step} from {found}" if found else ""),
        }
        print("\n".join(f"{name:9} {line}" for name, line in lines.items()))

    def sum_up(self, metrics: dict[str, Any]) -> None:
        """Print the depth table, a sample, and where everything is."""
        curve = losses_by_depth(metrics)
        print(f"\nValidation after {self.tokens:,} tokens\n\n  loops      loss  perplexity")
        for loops, loss in curve.items():
            mark = "  <- training mean" if loops == self.mean_loops else ""
            print(f"  {loops:5d}  {loss:8.4f}  {math.exp(loss):10.2f}{mark}")
        print(f"\n  {metrics['val/bits_per_byte']:.3f} bits per byte at {self.mean_loops} loops")
        if self.config.eval.samples:
            print(f"\nSample\n\n  {self.sample(0)!r}")
        plots = "\n            ".join(map(str, draw_plots(self.run_dir, self.config.depth_mean)))
        print(f"\nplots       {plots}\nmetrics     {self.log.path}\ncheckpoint  {self.newest}")


def add(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Sum a measurement over micro-batches, on the device."""
    totals[key] = totals[key] + value if key in totals else value


def prepare_directory(run_dir: Path) -> None:
    """Make the run directory. Raises MythosError if it cannot be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise MythosError(f"run directory {run_dir} cannot be written ({error}): choose another run.dir") from error


def resolve_vocabulary(config: Config, tokenizer_size: int) -> Config:
    """The configuration with `model.vocab_size: auto` replaced by the tokenizer's padded size."""
    if config.model.vocab_size != "auto":
        return config
    if config.tokenizer.name == "bpe":
        # A small corpus may give fewer tokens than asked for; the written configuration asks for them again.
        tokenizer_size = max(tokenizer_size, padded_vocab_size(config.tokenizer.vocab_size))
    model = config.model.model_copy(update={"vocab_size": tokenizer_size})
    return config.model_copy(update={"model": model})


FREE_MODEL_FIELDS = {"preset", "context_length", "loops", "router_bias_rate", "state_init"}
"""Fields of the model that may change between a checkpoint and the run that continues it.

None changes the function that the weights compute at a given number of loops. (The adapter has a slot per loop; its
shape is checked with all others.)"""


def check_same_model(config: Config, saved: dict[str, Any], path: Path | None) -> None:
    """Refuse to continue with another model than the checkpoint's. Raises MythosError naming every differing field."""
    here = config.model.model_dump(mode="json")
    differing = [name for name in here if name not in FREE_MODEL_FIELDS and here[name] != saved.get(name)]
    if differing:
        lines = [f"  model.{name}: {saved.get(name)!r} in the checkpoint, {here[name]!r} here" for name in differing]
        raise MythosError(
            f"checkpoint {path} is of another model:\n"
            + "\n".join(lines)
            + "\nRestore these values to continue it, or "
            "give this run another run.name."
        )
