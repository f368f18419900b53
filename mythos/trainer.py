"""The training loop, from configuration to trained model, readable top to bottom."""

import contextlib
import logging
import math
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from mythos.checkpoints import checkpoint
from mythos.checkpoints.checkpoint import Checkpoints
from mythos.checkpoints.init_from import agreed_start
from mythos.checkpoints.preflight import (
    check_memory,
    check_same_model,
    check_same_optimizer,
    prepare_directory,
    resolve_vocabulary,
    schedule_change,
)
from mythos.config.loading import save_config
from mythos.config.sections import Config
from mythos.data.loader import Loader
from mythos.data.pipeline import open_data
from mythos.data.stream import Batch, DifferentData, count_skipped, merge_states
from mythos.data.tokenizer import check_vocabulary
from mythos.distributed.parallel import choose_micro_batch, parallelize
from mythos.distributed.ranks import join_world
from mythos.distributed.restarts import collective_failure, collective_reason
from mythos.distributed.run_lock import RunLock
from mythos.distributed.stop import StopRequests, parse_duration
from mythos.distributed.watchdog import Watchdog
from mythos.errors import MythosError, TransientError, without_credentials
from mythos.evaluation.choices import encode_task, read_tasks
from mythos.evaluation.in_training import Interrupted, Measurement, write_samples
from mythos.model.rdt import RDTOutput, RecurrentDepthTransformer
from mythos.model.recurrence import initial_state
from mythos.planning.flops import forward_flops
from mythos.planning.layout import agree_on_layout
from mythos.progress import Console
from mythos.reports.plots import draw_plots
from mythos.reports.summary import config_lines, summary, validation_line
from mythos.training.depth_schedule import DepthPlan, DepthSchedule
from mythos.training.metrics import (
    MetricsLog,
    check_trackers,
    expert_balance,
    loop_loads,
    over_ranks,
    peak_flops,
    peak_memory,
)
from mythos.training.optim import build_optimizer, learning_rate
from mythos.training.profiling import OwnTime, Profiler, Stopwatch
from mythos.training.rng import random_state, set_random_state
from mythos.versions import installed_versions

logger = logging.getLogger(__name__)


@dataclass
class StepResult:
    """What a training step leaves on the device, the same on every rank; reading it waits for the device."""

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
        self.stop = StopRequests(parse_duration(config.train.max_time) if config.train.max_time else None)
        self.world = world = join_world(config)
        self.device = world.device
        self.console = Console(shown=self.main)
        self.run_dir = config.run_dir
        check_trackers(config.log.trackers)
        tasks = world.ranks.agreed(lambda: read_tasks(config.eval.tasks, what="eval.tasks"))
        world.ranks.agreed(lambda: prepare_directory(self.run_dir))
        self.resources = contextlib.ExitStack()
        lock = RunLock(self.run_dir)
        world.ranks.agreed(lambda: self.resources.enter_context(lock) if self.main else None)
        self.checkpoints = Checkpoints(
            config.checkpoint.dir or self.run_dir / "checkpoints",
            world.storage,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.resources.callback(self.checkpoints.close)
        self.checkpoints.claim(lock, config.run.name)
        found = self.checkpoints.find(config.run.resume)
        meta = world.ranks.agreed(lambda: checkpoint.read_meta(found)) if found else None
        self.step, self.tokens = (meta["step"], meta["tokens"]) if meta else (0, 0)
        # The weights that a new run starts from; one that is continued has its own, and needs that model no more.
        self.start = None if found else agreed_start(config, world.ranks)
        if self.start is not None:
            self.resources.callback(self.start.close)

        # Data: corpora, their tokenizer (which sizes the model's vocabulary), training streams, validation rows.
        saved_data = meta["config"]["data"] if meta else {}
        data = world.in_turn(
            lambda: open_data(config, self.run_dir if found else None, saved_data, progress=world.local_rank == 0)
        )
        self.tokenizer = data.tokenizer
        config = config.model_copy(update={"data": data.config})
        if self.tokenizer is not None:
            config = resolve_vocabulary(config, self.tokenizer.padded_size)
            check_vocabulary(self.tokenizer, config.model.vocab_size)
        self.config = config
        if self.start is not None:
            world.ranks.agreed(lambda: self.start.match(config, self.tokenizer))
        self.tasks = [encode_task(task, self.tokenizer, config.model.context_length) for task in tasks]
        self.count_targets = data.targets
        if meta:
            check_same_model(config, meta["config"]["model"], found)
            check_same_optimizer(config, meta["config"]["optim"], found)
            if self.main and (change := schedule_change(config, meta["config"], self.step)):
                logger.warning("%s", change)
        self.schedule = DepthSchedule(config)
        self.loader = Loader(
            data.streams(config.run.seed, world.rank, world.size),
            slots=self.schedule.slots,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
        self.resources.callback(self.loader.close)
        if meta:
            self.restore_data(meta["data"])
        if self.step < config.train_steps:
            self.loader.start()  # the workers read the first batches while the rest is built
        self.validation = world.in_turn(lambda: data.validation(config.eval.batches * config.data.streams))

        # Model: shaped without memory, laid out over the processes, then filled from (seed, parameter name).
        set_seed(config.run.seed)  # nothing here draws from global generators, but what users add may
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config.model)
        self.layout = agree_on_layout(config, world)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        world.ranks.agreed(lambda: check_memory(parameters, self.layout.shard, self.device))
        self.parallel = parallelize(config, model, self.layout, world)
        self.model = model
        self.optimizer = build_optimizer(self.model, config.optim, self.parallel.dtype, self.layout.size)
        self.micro_batch = choose_micro_batch(config, self.parallel)

        # Updates that were skipped, in all and in a row; on the device, so that no step waits to know.
        skips = (meta or {}).get("skips", {"total": 0, "in_a_row": 0, "rollbacks": 0})
        self.skipped = torch.tensor(skips["total"], device=self.device)
        self.skipped_in_a_row = torch.tensor(skips["in_a_row"], device=self.device)
        self.rollbacks = skips["rollbacks"]
        if found and meta:
            self.checkpoints.load(found, self.state())
            if "rng" in meta:
                set_random_state(meta["rng"])
        if self.start is not None:
            world.ranks.agreed(lambda: self.start.fill(self.model, config.run.seed))
            self.start.close()
        if self.step < config.train_steps:
            self.checkpoints.require_space(self.state())
        unfinished = meta.get("record") if meta and self.checkpoints.wrote(meta) else None
        self.log = world.ranks.agreed(lambda: self.begin_files(found, unfinished))
        self.resources.callback(self.log.close)
        self.watchdog = Watchdog(self.run_dir / "stacks", world.rank, config.parallel.stall_after)
        self.position = self.loader.state_dict()
        self.own_time = OwnTime(self.device)
        if self.main:
            self.announce(found)

    @property
    def main(self) -> bool:
        """Whether this process is the one that prints, logs and draws."""
        return self.world.ranks.main

    def begin_files(self, found: Path | None, unfinished: dict[str, Any] | None) -> MetricsLog:
        """Write what a run begins with: only now that everything fits, for a failed start must not bind the next."""
        if self.main:
            if found is None and self.tokenizer is not None:
                self.tokenizer.save(self.run_dir / "tokenizer")
            save_config(self.config, self.run_dir / "config.yaml")
        return MetricsLog(self.run_dir, self.config, self.step, main=self.main, unfinished=unfinished)

    def restore_data(self, state: dict[str, Any]) -> None:
        """Continue the data where the checkpoint left it; raises MythosError for other data, unless it restarts."""
        try:
            self.loader.load_state_dict(state)
        except DifferentData as error:
            if self.config.data.on_mismatch == "fail":
                raise
            logger.warning("%s\ndata.on_mismatch is restart: the data starts from its beginning", error)

    def run(self) -> None:
        """Train from the current step to the last, then validate, save, plot and sum up.

        Returns early, with everything saved, where a signal or train.max_time asks for it. Raises MythosError where
        training diverges or a checkpoint cannot be written, and TransientError where data cannot be had or another
        process is lost.
        """
        with self.resources:
            try:
                with self.stop, self.watchdog:
                    self.train()
            except (RuntimeError, ConnectionError) as error:
                if not collective_failure(error):
                    raise
                self.abandoned = self.resources.pop_all()  # closing them would wait for the lost processes as well
                raise TransientError(
                    f"rank {self.world.rank} lost the other processes in {self.watchdog.doing}: "
                    f"{collective_reason(error)}. "
                    "One of them has died or hangs; its own message says why. torchrun's restart, or the same command, "
                    f"continues from the newest checkpoint: {self.checkpoints.newest or 'none yet'}"
                ) from error
        with contextlib.suppress(RuntimeError):  # all is done and saved, whatever became of the others
            self.world.leave()

    def train(self) -> None:
        """The loop of :meth:`run`."""
        config, steps = self.config, self.config.train_steps
        metrics: dict[str, Any] = {}
        with (
            self.console.training(self.step, steps),
            Profiler(self.run_dir, config.train.profile, self.world.rank) as profiler,
        ):
            batch, problem = self.read_ahead() if self.step < steps else (None, None)
            self.agree_on_data(problem)
            unfinished = self.world.ranks.broadcast(self.log.unfinished)
            if self.start is not None:  # what it starts from, as the same validation measures it
                unfinished = {"step": 0, "tokens": 0, "time": time.time()}
            if unfinished is not None:
                metrics = unfinished
                if not self.conclude(metrics):
                    self.end_early(None, validated=False)
                    return
            watch, steps_before, first = Stopwatch(), self.step, True
            while batch is not None:
                result = self.train_step(batch)
                self.step += 1
                self.tokens += config.tokens_per_step
                self.position = self.loader.state_dict()
                self.console.step_done()
                last = self.step == steps
                # The device still computes: what comes next is read, and agreed on, meanwhile.
                batch, problem = (None, None) if last else self.read_ahead()
                stopping = self.agree_to_stop(problem) and not last
                if first:
                    self.world.set_timeouts(config.parallel.timeout, config.parallel.timeout + config.data.patience)
                    first = False
                with watch.pause():  # writing a trace takes seconds
                    profiler.step()

                validating = last or self.due(config.eval.every)
                logged = validating or stopping or self.due(config.log.every)
                saving = last or stopping or self.due(config.checkpoint.every)
                if logged or saving:
                    sound = self.check_progress(result, last)  # waits for the device, so the window's time is whole
                if logged:
                    metrics = self.measure(result)
                    metrics |= self.throughput(result.plan, watch.lap() / (self.step - steps_before))
                    metrics |= loop_loads(result.expert_load) if validating else {}
                    self.console.report(metrics, always=validating or steps_before == self.console.first)
                    steps_before = self.step
                # Before the validation, so that a kill in its minutes costs nothing. After a skipped update weights or
                # data may be to blame, and older checkpoints are surely good.
                saving = saving and (sound or last or stopping)
                with watch.pause():
                    if saving:
                        self.save(wait=last or stopping, record=metrics if validating else None)
                    validated = not validating or (not stopping and self.conclude(metrics))
                    if logged and (stopping or not validating):
                        self.log.write(metrics)
                    if not (validated or saving):  # the stop came meanwhile
                        self.save(wait=True, record=metrics)
                if stopping or not validated:
                    self.end_early(problem, validated)
                    return
        if not metrics:
            if self.main:
                self.console.write(
                    f"nothing to train: the run is at step {self.step}; raise train.steps, or change run.name"
                )
                self.plots = draw_plots(self.run_dir, config.depth_mean)
            try:
                metrics = self.validate()
            except Interrupted:
                self.end_early(None, validated=False)
                return
        self.sum_up(metrics)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0 = never) happens after this one."""
        return every > 0 and self.step % every == 0

    def read_ahead(self) -> tuple[Batch | None, str | None]:
        """The next step's data, or why it cannot be had."""
        self.watchdog.beat(f"step {self.step + 1}: waiting for data")
        try:
            with self.own_time:
                return self.loader.next_batch(), None
        except MythosError as error:
            return None, str(error)

    def agree_to_stop(self, problem: str | None) -> bool:
        """Whether all ranks stop after this step: for a signal or the time limit on any of them, or missing data.

        Raises MythosError on all of them where a checkpoint could not be written.
        """
        self.watchdog.beat(f"step {self.step}: agreeing to go on (all-reduce)")
        wish = 2 if self.checkpoints.failed else 1 if problem or self.stop.reason else 0
        agreed = self.world.ranks.max(wish)
        if agreed == 2:
            self.checkpoints.wait()
        return agreed > 0

    def agree_on_data(self, problem: str | None, saved: str = "") -> None:
        """Raise TransientError on all ranks, naming the rank, if any lacks data: a server may be back by a restart."""
        told = self.world.ranks.gather(problem)
        lacking = next((rank for rank, text in enumerate(told) if text), None)
        if lacking is not None:
            where = f" (rank {lacking})" if self.world.size > 1 else ""
            raise TransientError(f"{told[lacking]}{where}{saved}")

    def end_early(self, problem: str | None, validated: bool) -> None:
        """Say why the run ends here, with everything saved, and whether the validation of its last step is missing."""
        self.checkpoints.wait()
        saved = f"Stopped after step {self.step}, which is saved: {self.checkpoints.newest}"
        if not self.checkpoints.newest:
            saved = "Stopped before the first step"
        self.agree_on_data(problem, f"\n{saved}")
        reasons = self.world.ranks.gather(self.stop.reason)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        where = f" (rank {rank})" if self.world.size > 1 else ""
        missing = "" if validated else "Its validation was interrupted, and is made when the run continues.\n"
        self.console.write(f"{reasons[rank]}{where}. {saved}\n{missing}The same command continues.")

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step over the global batch; nothing in it reads from the device."""
        config, step, world = self.config, self.step, self.world
        plan = self.schedule.plan(step)
        # Deepest rows first: the model's active rows are then always a prefix, and micro-batches are of like depth. The
        # rows of every rank are as deep, so all compute alike.
        rows = batch.rows.tolist()
        order = sorted(range(len(rows)), key=lambda i: -plan.loops[rows[i]])
        # The losses of all ranks must add up, and DDP and FSDP average.
        counted = self.count_targets(config, step)
        targets = counted / world.size

        sums: dict[str, Tensor] = {}
        for start in range(0, len(order), self.micro_batch):
            micro = order[start : start + self.micro_batch]
            last = start + self.micro_batch >= len(order)
            with self.parallel.accumulating(last):
                self.watchdog.beat(f"step {step + 1}: forward pass of rows {start} on (all-gathers under FSDP)")
                # Under FSDP a pass waits for the other ranks' parameters: it is not a rank's own.
                with contextlib.nullcontext() if self.layout.sharded else self.own_time:
                    output = self.forward(batch, micro, plan)
                self.watchdog.beat(f"step {step + 1}: backward pass of rows {start} on (reducing gradients)")
                (output.objective / targets).backward()
            share = len(micro) / len(order) / world.size
            add(sums, "loss", output.loss.detach() / counted)
            add(sums, "state_norm", output.state_norm * share)
            add(sums, "state_delta", output.state_delta * share)
            if output.expert_load is not None:
                add(sums, "expert_load", output.expert_load)
        self.parallel.finish_gradients()

        # One all-reduce carries all measurements of the step; float64 holds the experts' counts exactly.
        self.watchdog.beat(f"step {step + 1}: summing measurements (all-reduce)")
        scalars = [sums["loss"], self.parallel.squared_norm(), sums["state_norm"], sums["state_delta"]]
        load = sums.get("expert_load")
        packed = torch.cat(
            [*(value.double().view(1) for value in scalars), *([load.double().view(-1)] if load is not None else [])]
        )
        world.sum(packed)
        loss, squared_norm, state_norm, state_delta = packed[:4]
        grad_norm = squared_norm.sqrt()
        if load is not None:
            load = packed[4:].round().long().view_as(load)

        # All ranks skip an update together, on the device: they hold the same sums. The fused optimizer takes both
        # numbers as a gradient scaler gives them: it divides by the one, and changes nothing where the other is 1.
        self.watchdog.beat(f"step {step + 1}: update (all-to-alls of Muon under FSDP, all-gathers under DDP)")
        skip = ~(loss.isfinite() & grad_norm.isfinite())
        self.optimizer.found_inf = skip.float()
        self.optimizer.grad_scale = (grad_norm / config.optim.clip).clamp(min=1).float() if config.optim.clip else None
        lr = learning_rate(config.optim, step, config.schedule_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += skip
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skip
        if load is not None:
            self.model.rebalance(load, applied=(~skip).float())
        return StepResult(loss, grad_norm, state_norm, state_delta, load, plan, lr)

    def forward(self, batch: Batch, micro: list[int], plan: DepthPlan) -> RDTOutput:
        """Loss and measurements of some rows of the batch."""
        config = self.config
        rows = batch.rows[micro].tolist()
        early = [place for place, row in enumerate(rows) if plan.early and row in plan.early.rows]
        ids = self.to_device(batch.ids[micro])
        targets = ids[:, 1:] if batch.targets is None else self.to_device(batch.targets[micro])
        documents = batch.document_ids
        with self.parallel.autocast:
            return self.parallel(
                ids[:, :-1],
                targets,
                loops=[plan.loops[row] for row in rows],
                backprop=plan.backprop,
                state=initial_state(
                    config.model,
                    rows,
                    config.data.sequence_length,
                    seed=config.run.seed,
                    step=self.step,
                    device=self.device,
                ),
                document_ids=None if documents is None else self.to_device(documents[micro]),
                early_rows=early,
                early_by=plan.early.by if plan.early else 0,
            )

    def to_device(self, values: Tensor) -> Tensor:
        """Copy without waiting: from pinned memory, where the device is a GPU."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    @cached_property
    def mean_loops(self) -> int:
        """The whole number of loops that validation and samples mean by 'the mean depth'."""
        return round(self.config.depth_mean)

    def measure(self, result: StepResult) -> dict[str, Any]:
        """The step's record."""
        plan = result.plan
        names = ("loss", "grad_norm", "state_norm", "state_delta")
        *numbers, skipped = torch.stack([*(getattr(result, name) for name in names), self.skipped]).tolist()
        metrics: dict[str, Any] = {
            "step": self.step,
            "tokens": self.tokens,
            # JSON has no NaN.
            **{name: value if math.isfinite(value) else None for name, value in zip(names, numbers, strict=True)},
            "lr": result.lr,
            "loops": sum(plan.loops) / len(plan.loops),
            "backprop_loops": plan.mean_backprop,
            "skipped_steps": int(skipped),
            "rollbacks": self.rollbacks,
        }
        radius = self.model.spectral_radius()
        if radius is not None:
            metrics["rho_a"] = radius.item()
        if result.expert_load is not None:
            metrics |= expert_balance(result.expert_load)
        report = {"peak_memory_bytes": peak_memory(self.device), "own_seconds": self.own_time.read()}
        told = self.world.ranks.gather((report, count_skipped(self.position)))
        metrics |= over_ranks([report for report, _ in told])
        for _, left_out in told:
            for kind, count in left_out.items():
                metrics[f"data/{kind}"] = metrics.get(f"data/{kind}", 0) + count
        return metrics

    def check_progress(self, result: StepResult, last: bool) -> bool:
        """Whether the newest update was applied; goes back to the newest checkpoint if too many in a row were not.

        Raises MythosError where it may not go back, for then training has diverged.
        """
        in_a_row = int(self.skipped_in_a_row)
        if in_a_row < self.config.train.skip_limit and not (last and in_a_row):
            return in_a_row == 0
        what = (
            f"the loss is {result.loss.item()} and the norm of the gradient {result.grad_norm.item()} at step "
            f"{self.step}: training has diverged ({in_a_row} updates in a row were skipped)"
        )
        self.checkpoints.wait()
        if self.rollbacks < self.config.train.rollbacks and self.checkpoints.newest:
            self.rollbacks += 1
            self.checkpoints.load(self.checkpoints.newest, self.state())
            self.skipped_in_a_row.zero_()
            if self.main:
                rollback = f"Rollback {self.rollbacks} of {self.config.train.rollbacks}"
                back = f"weights and optimizer are those of {self.checkpoints.newest} again"
                logger.warning("%s. %s: %s; the data that led here is not repeated", what, rollback, back)
            return False
        raise MythosError(
            f"{what}. The last checkpoint is {self.checkpoints.newest or 'not yet written'}; lower optim.lr, or set a "
            "lower optim.clip than the norms before, and continue from it; or set train.rollbacks, if the data is to "
            "blame."
        )

    def throughput(self, plan: DepthPlan, seconds: float) -> dict[str, float]:
        """Tokens per second over all ranks, and on known GPUs the share of their peak that the needed FLOPs make."""
        metrics = {"tokens_per_second": self.config.tokens_per_step / seconds, "time": time.time()}
        peak = peak_flops(self.device, self.parallel.dtype)
        if peak is not None:
            flops = forward_flops(self.config.model, self.config.data.sequence_length)
            needed = flops.training(plan.loops, plan.backprop) * self.config.tokens_per_step
            metrics["mfu"] = needed / seconds / (peak * self.world.size)
        return metrics

    def validate(self) -> dict[str, float]:
        """Validation loss and answers at several depths; text samples go to samples/step-N.txt. Raises Interrupted."""
        self.watchdog.beat(f"step {self.step}: validation")
        measured = self.validation, self.tasks, self.tokenizer
        measurement = Measurement(self.config, self.parallel, *measured, self.micro_batch, self.stop)
        generators = random_state()  # a checkpoint has those from before
        self.model.eval()
        try:
            metrics = measurement.measure()
            self.samples = measurement.samples()
        finally:
            self.model.train()
            set_random_state(generators)
        if self.samples and self.main:
            write_samples(self.samples, self.run_dir / "samples" / f"step-{self.step:08d}.txt")
        return metrics

    def conclude(self, record: dict[str, Any]) -> bool:
        """Complete a step's record by a validation, log it and draw.

        False where a stop interrupted that: the record, which its checkpoint has too, is completed at the next start.
        """
        try:
            record |= self.validate()
        except Interrupted:
            self.log.write(record)
            return False
        self.console.write(validation_line(self.config, record, self.mean_loops))
        self.log.write(record)
        if self.main:
            self.plots = draw_plots(self.run_dir, self.config.depth_mean)
        return True

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training continues from, the live ones."""
        self.parallel.reshard()  # after a validation, FSDP's root is still gathered
        return checkpoint.training_state(self.model, self.optimizer)

    def save(self, wait: bool, record: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this step: in the background, unless the run is about to end.

        `record` is the step's, if its validation is yet to come.
        """
        self.watchdog.beat(f"step {self.step}: saving")
        meta = {
            "tokens": self.tokens,
            "record": record,
            "skips": {
                "total": int(self.skipped),
                "in_a_row": int(self.skipped_in_a_row),
                "rollbacks": self.rollbacks,
            },
            "rng": random_state(),
            "data": merge_states(self.world.ranks.gather(self.position)),
            "config": self.config.model_dump(mode="json"),
            "layout": {"mode": self.layout.mode, "replicate": self.layout.replicate, "shard": self.layout.shard},
            "versions": installed_versions(("torch", "transformers", "tokenizers", "datasets")),
        }
        self.checkpoints.save(self.step, self.state(), meta, wait=wait)

    def announce(self, found: Path | None) -> None:
        """Print what the configuration amounts to."""
        config, dtype = self.config, str(self.parallel.dtype).removeprefix("torch.")
        lines = {
            **config_lines(config, self.micro_batch, len(self.validation.ids)),
            "device": f"{self.device}, {dtype}, {torch.get_num_threads()} threads",
            "parallel": f"{self.layout.mode}, {self.layout.why}",
            "run": f"{self.run_dir}" + (f", continuing at step {self.step} from {found}" if found else ""),
        }
        if config.optim.schedule_steps is not None:
            lines["schedule"] = f"over {config.schedule_steps:,} steps"
        if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            lines["restart"] = f"{restarts}, because a process was lost"
        self.console.write("\n".join(f"{name:9} {line}" for name, line in lines.items()))
        for number, line in enumerate(self.start.told if self.start else []):
            self.console.write(f"{'' if number else 'start':9} {line}")

    def sum_up(self, metrics: dict[str, Any]) -> None:
        """Print the depth table, a sample, and where everything is."""
        if not self.main:
            return
        self.console.write(summary(self.config, metrics, self.mean_loops, self.tokens))
        if self.samples:
            self.console.write(f"\nSample\n\n{indent(self.samples[0], '  ')}")
        plots = "\n            ".join(map(str, self.plots))
        newest = without_credentials(str(self.checkpoints.newest))
        self.console.write(f"\nplots       {plots}\nmetrics     {self.log.path}\ncheckpoint  {newest}")


def add(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Sum a measurement over micro-batches, on the device."""
    totals[key] = totals[key] + value if key in totals else value
