"""The training loop, from configuration to trained model. Methods follow a batch from top to bottom."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mythos.checkpoints.checkpoint import Checkpoints, training_state
from mythos.checkpoints.config_changes import config_changes, save_configuration
from mythos.checkpoints.init_from import agreed_start
from mythos.checkpoints.preflight import check_continued, check_memory, prepare_directory, resolve_vocabulary
from mythos.checkpoints.stored_checkpoint import read_meta
from mythos.config.sections import Config
from mythos.data.loader import Loader
from mythos.data.pipeline import open_data
from mythos.data.stream import Batch, DifferentData, count_skipped, merge_states
from mythos.data.tasks import TaskSet
from mythos.data.tokenizer import Tokenizer, check_vocabulary
from mythos.data.validation import ValidationSet
from mythos.distributed.collective_errors import collective_failure, collective_reason
from mythos.distributed.layout import Layout
from mythos.distributed.parallel import ParallelModel, choose_micro_batch, parallelize
from mythos.distributed.ranks import join_world
from mythos.distributed.run_lock import RunLock
from mythos.distributed.stop import StopRequests, parse_duration
from mythos.distributed.watchdog import Watchdog
from mythos.errors import DivergedError, MythosError, TransientError, without_credentials
from mythos.evaluation.choices import ChoiceTask, EncodedTask, encode_task, read_tasks
from mythos.evaluation.in_training import Interrupted, Measurement, write_samples
from mythos.model.rdt import RDTOutput, RecurrentDepthTransformer
from mythos.model.state import initial_state
from mythos.planning.flops import ForwardFlops, forward_flops
from mythos.planning.layout import agree_on_layout
from mythos.progress import Console
from mythos.reports.plots import draw_plots
from mythos.reports.summary import checkpoint_line, config_lines, ending, sample_line, summary, validation_line
from mythos.training.adamw import FusedAdamW
from mythos.training.depth_schedule import DepthPlan, DepthSchedule
from mythos.training.lr import learning_rate
from mythos.training.measurements import StepResult, expert_balance, loop_loads, over_ranks, peak_flops, peak_memory
from mythos.training.metrics import MetricsLog
from mythos.training.optim import build_optimizer
from mythos.training.profiling import OwnTime, Profiler, Stopwatch
from mythos.training.rng import random_state, seed_generators, set_random_state
from mythos.training.trackers import check_trackers
from mythos.versions import installed_versions

logger = logging.getLogger(__name__)


class Trainer:
    """Opens everything a run needs, cheapest failures first, and trains. Raises MythosError for what cannot work."""

    def __init__(self, config: Config) -> None:
        # Started first: train.max_time includes the time to build everything.
        self.stop = StopRequests(parse_duration(config.train.max_time) if config.train.max_time else None)
        self.world = join_world(config)
        self.ranks, self.device = self.world.ranks, self.world.device
        self.main = self.ranks.main  # whether this process prints, logs and draws
        console = self.console = Console(shown=self.main)
        self.run_dir = config.run_dir
        check_trackers(config.log.trackers)
        questions = self.ranks.agreed(lambda: read_tasks(config.eval.tasks, what="eval.tasks"))
        self.ranks.agreed(lambda: prepare_directory(self.run_dir))
        self.resources = contextlib.ExitStack()
        lock = RunLock(self.run_dir)
        self.ranks.agreed(lambda: self.resources.enter_context(lock) if self.main else None)
        self.checkpoints = Checkpoints(
            config.checkpoints_dir,
            self.world.storage,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            # Not through self: a trainer in a cycle of references would keep its lock after a refused start.
            committed=lambda step, path: console.write(checkpoint_line(config, step, path), style="dim"),
        )
        self.resources.callback(self.checkpoints.close)
        self.checkpoints.claim(lock, config.run.name)
        checkpoint = self.resumed_from = self.checkpoints.find(config.run.resume)
        meta: dict[str, Any] = self.ranks.agreed(lambda: read_meta(checkpoint)) if checkpoint else {}
        self.step: int = meta.get("step", 0)  # optimizer steps done
        self.tokens: int = meta.get("tokens", 0)
        # The weights of train.init_from. A run that is resumed has its own and does not need that model any more.
        self.start = None if checkpoint else agreed_start(config, self.ranks)
        if self.start is not None:
            self.resources.callback(self.start.close)

        self.config: Config  # as given, with what the data decides: pinned revisions, model.vocab_size
        self.mean_loops: int  # "the mean depth" of validation and samples
        self.tokenizer: Tokenizer | None
        self.tasks: list[EncodedTask]
        self.count_targets: Callable[[Config, int], int]
        self.schedule: DepthSchedule
        self.loader: Loader
        self.validation: ValidationSet | TaskSet
        self.prepare_data(config, questions, meta)

        self.model: RecurrentDepthTransformer
        self.flops: ForwardFlops
        self.layout: Layout
        self.parallel: ParallelModel
        self.optimizer: FusedAdamW
        self.micro_batch: int
        self.skipped: Tensor  # updates skipped so far; on the device, so that no step waits to read it
        self.skipped_in_a_row: Tensor
        self.rollbacks: int
        self.prepare_model(meta)

        if self.step < self.config.train_steps:
            self.checkpoints.require_space(self.state())
        self.log = self.ranks.agreed(lambda: self.begin_files(meta))
        self.resources.callback(self.log.close)
        self.watchdog = Watchdog(self.run_dir / "stacks", self.world.rank, config.parallel.stall_after)
        self.position = self.loader.state_dict()  # after the newest step; the loader itself is one batch ahead
        self.own_time = OwnTime(self.device)
        self.samples: list[str] = []
        self.plots: list[Path] = []
        self.abandoned: contextlib.ExitStack | None = None  # resources that must not be closed any more
        if self.main:
            self.announce()

    def prepare_data(self, config: Config, questions: Sequence[ChoiceTask], meta: dict[str, Any]) -> None:
        """Open corpora, their tokenizer (whose size the model's vocabulary takes), training streams, validation rows.

        Refuses a checkpoint (`meta`, empty for a new run) of another model, and starts the loader's workers.
        """
        world, start, saved = self.world, self.start, meta.get("config", {})
        progress, run_dir = world.local_rank == 0, self.run_dir if meta else None
        data = world.in_turn(lambda: open_data(config, run_dir, saved.get("data", {}), progress=progress))
        tokenizer = self.tokenizer = data.tokenizer
        config = config.model_copy(update={"data": data.config})
        if tokenizer is not None:
            config = resolve_vocabulary(config, tokenizer.padded_size)
            check_vocabulary(tokenizer, int(config.model.vocab_size))
        self.config, self.mean_loops = config, round(config.depth_mean)
        if start is not None:
            self.ranks.agreed(lambda: start.match(config, tokenizer))
        # A configuration without text has no eval.tasks.
        length = config.model.context_length
        self.tasks = [encode_task(task, tokenizer, length) for task in questions] if tokenizer is not None else []
        self.count_targets = data.targets
        changes = self.changes = config_changes(config, saved) if meta else []
        differences = check_continued(config, saved, changes, self.step, self.resumed_from) if meta else None
        if self.main and differences:
            logger.warning("%s", differences)
        self.schedule = DepthSchedule(config)
        self.loader = Loader(
            data.streams(config.run.seed, world.rank, world.size),
            slots=self.schedule.slots,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
        )
        self.resources.callback(self.loader.close)
        if meta:
            try:
                self.loader.load_state_dict(meta["data"])
            except DifferentData as error:
                if config.data.on_mismatch == "fail":
                    raise
                logger.warning("%s\ndata.on_mismatch is restart: the data starts from its beginning", error)
        if self.step < config.train_steps:
            self.loader.start()  # the workers read the first batches while the model is built
        self.validation = world.in_turn(lambda: data.validation(config.eval.batches * config.data.streams))

    def prepare_model(self, meta: dict[str, Any]) -> None:
        """Lay the model out over the processes, and fill it: new values, a checkpoint's, or train.init_from's."""
        config, start = self.config, self.start
        seed_generators(config.run.seed)  # mythos does not draw from global generators, but code that users add may
        with torch.device("meta"):
            self.model = RecurrentDepthTransformer(config.model)
        self.flops = forward_flops(config.model, config.data.sequence_length)  # refuses parts that it cannot count
        self.layout = layout = agree_on_layout(config, self.world)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.ranks.agreed(lambda: check_memory(parameters, layout.shard, self.device))
        self.parallel = parallelize(config, self.model, layout, self.world)
        self.optimizer = build_optimizer(self.model, config.optim, self.parallel.dtype, layout.size)
        self.micro_batch = choose_micro_batch(config, self.parallel)

        skips = meta.get("skips", {"total": 0, "in_a_row": 0, "rollbacks": 0})
        self.skipped = torch.tensor(skips["total"], device=self.device)
        self.skipped_in_a_row = torch.tensor(skips["in_a_row"], device=self.device)
        self.rollbacks = skips["rollbacks"]
        if self.resumed_from is not None:
            self.checkpoints.load(self.resumed_from, self.state())
            if "rng" in meta:
                set_random_state(meta["rng"])
        if start is not None:
            self.ranks.agreed(lambda: start.fill(self.model, config.run.seed))
            start.close()

    def begin_files(self, meta: dict[str, Any]) -> MetricsLog:
        """Write the run's first files. Only after all checks: a start that failed must not bind the next one."""
        if self.main:
            if self.resumed_from is None and self.tokenizer is not None:
                self.tokenizer.save(self.run_dir / "tokenizer")
            save_configuration(self.run_dir, self.config, meta, self.changes)
        unfinished = meta.get("record") if self.checkpoints.wrote(meta) else None
        return MetricsLog(self.run_dir, self.config, self.step, main=self.main, unfinished=unfinished)

    def announce(self) -> None:
        """Print the size of the run: model, depth, data, device, layout."""
        config, dtype = self.config, str(self.parallel.dtype).removeprefix("torch.")
        resumed = f", continuing at step {self.step} from {self.resumed_from}" if self.resumed_from else ""
        lines = {
            **config_lines(config, self.micro_batch, len(self.validation.ids)),
            "device": f"{self.device}, {dtype}, {torch.get_num_threads()} threads",
            "parallel": f"{self.layout.mode}, {self.layout.why}",
            "run": f"{self.run_dir}{resumed}",
        }
        if config.optim.schedule_steps is not None:
            lines["schedule"] = f"over {config.schedule_steps:,} steps"
        if restarts := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            lines["restart"] = f"{restarts}, because a process was lost"
        self.console.write(without_credentials("\n".join(f"{name:9} {line}" for name, line in lines.items())))
        for number, line in enumerate(self.start.changes if self.start else []):
            self.console.write(f"{'' if number else 'start':9} {line}")

    def run(self) -> None:
        """Train from the current step to the last, then validate, save, plot and print a summary.

        Returns early, with everything saved, if a signal or train.max_time asks for it. Raises MythosError if
        training diverges or a checkpoint cannot be written, and TransientError if data cannot be read or another
        process is lost.
        """
        with self.resources:
            try:
                with self.stop, self.watchdog:
                    self.train()
            except (RuntimeError, ConnectionError) as error:
                if not collective_failure(error):
                    raise
                self.abandoned = self.resources.pop_all()  # closing them would wait for the lost processes
                raise TransientError(
                    f"rank {self.world.rank} lost the other processes in {self.watchdog.doing}: "
                    f"{collective_reason(error)}. "
                    "One of them has died or hangs; its own message says why. torchrun's restart, or the same command, "
                    f"continues from the newest checkpoint: {self.checkpoints.newest or 'none yet'}"
                ) from error
        with contextlib.suppress(RuntimeError):  # everything is saved, even if another process has died since
            self.world.leave()

    def train(self) -> None:
        """The loop of :meth:`run`."""
        config, steps = self.config, self.config.train_steps
        with (
            self.console.training(self.step, steps),
            Profiler(self.run_dir, config.train.profile, self.world.rank) as profiler,
        ):
            batch, problem = self.read_ahead() if self.step < steps else (None, None)
            self.agree_on_data(problem)
            record = self.record_to_validate()
            if record and not self.conclude(record):
                self.end_early(None, validated=False)
                return
            first_step = logged_step = self.step
            window = Stopwatch()
            while batch is not None:
                result = self.train_step(batch)
                self.step += 1
                self.tokens += config.tokens_per_step
                self.position = self.loader.state_dict()
                self.console.step_done()
                last = self.step == steps
                # While the device computes, the host reads the next batch and agrees with the other ranks to go on.
                batch, problem = (None, None) if last else self.read_ahead()
                stopping = self.agree_to_stop(problem) and not last
                if self.step == first_step + 1:  # the first step starts slowly: compilation, connections, caches
                    self.world.set_timeouts(config.parallel.timeout, config.parallel.timeout + config.data.patience)
                with window.pause():  # writing a trace takes seconds
                    profiler.step()

                validating = last or self.due(config.eval.every)
                logged = validating or stopping or self.due(config.log.every)
                saving = last or stopping or self.due(config.checkpoint.every)
                if logged or saving:
                    applied = self.check_progress(result, last)  # waits for the device, so the window's time is whole
                    # After a skipped update the weights or the data may be bad: keep the older checkpoints.
                    saving = saving and (applied or last or stopping)
                if logged:
                    seconds = window.lap() / (self.step - logged_step)
                    record = self.measure(result) | self.throughput(result.plan, seconds)
                    record |= loop_loads(result.expert_load, self.layout.expert) if validating else {}
                    self.console.report(record)
                    logged_step = self.step
                with window.pause():
                    # Save before validating: a kill during the minutes of a validation then costs nothing.
                    if saving:
                        self.save(wait=last or stopping, record=record if validating else None)
                    if validating and not stopping:
                        stopping = not self.conclude(record)
                        if stopping and not saving:
                            self.save(wait=True, record=record)
                    elif logged:
                        self.log.write(record)
                if stopping:
                    self.end_early(problem, validated=not validating)
                    return
        record = record or self.validate_finished()
        if record:
            self.sum_up(record)

    def record_to_validate(self) -> dict[str, Any]:
        """The record of the current step if its validation was interrupted, or of step 0 with train.init_from; or {}.

        The same on all ranks.
        """
        if self.start is not None:
            return {"step": 0, "tokens": 0, "time": time.time()}
        return self.ranks.broadcast(self.log.unfinished) or {}

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0 = never) happens after this one."""
        return every > 0 and self.step % every == 0

    def read_ahead(self) -> tuple[Batch | None, str | None]:
        """The next step's data, or the reason why it cannot be read."""
        self.watchdog.beat(f"step {self.step + 1}: waiting for data")
        try:
            with self.own_time:
                return self.loader.next_batch(), None
        except MythosError as error:
            return None, str(error)

    def train_step(self, batch: Batch) -> StepResult:
        """One optimizer step over the global batch. Nothing in it reads from the device, so the host runs ahead."""
        plan = self.schedule.plan(self.step)
        sums = self.accumulate(batch, plan)
        (loss, grad_norm, state_norm, state_delta), expert_load = self.reduce(sums)
        lr = self.update(loss, grad_norm, expert_load)
        return StepResult(loss, grad_norm, state_norm, state_delta, expert_load, plan, lr)

    def accumulate(self, batch: Batch, plan: DepthPlan) -> dict[str, Tensor]:
        """Accumulate gradients over this rank's micro-batches; return this rank's share of the step's measurements."""
        # Deepest rows first: the rows that still run are then a prefix, and a micro-batch has rows of similar depth.
        # Ranks have rows of the same depths, so all do the same work.
        rows = batch.rows.tolist()
        order = sorted(range(len(rows)), key=lambda i: -plan.loops[rows[i]])
        counted = self.count_targets(self.config, self.step)
        # The ranks' gradients must add up, but DDP and FSDP average them: multiply by the number of ranks.
        targets = counted / self.world.size
        sums: dict[str, Tensor] = {}
        for start in range(0, len(order), self.micro_batch):
            micro = order[start : start + self.micro_batch]
            last = start + self.micro_batch >= len(order)
            with self.parallel.accumulating(last):
                self.watchdog.beat(f"step {self.step + 1}: forward pass of rows {start} on (all-gathers under FSDP)")
                # Under FSDP a forward pass includes waiting for other ranks, so it is not this rank's own time.
                with contextlib.nullcontext() if self.layout.sharded else self.own_time:
                    output = self.forward(batch, micro, plan)
                self.watchdog.beat(f"step {self.step + 1}: backward pass of rows {start} on (reducing gradients)")
                (output.objective / targets).backward()
            assert output.loss is not None, "a forward pass with targets has a loss"
            share = len(micro) / len(order) / self.world.size
            add(sums, "loss", output.loss.detach() / counted)
            add(sums, "state_norm", output.state_norm * share)
            add(sums, "state_delta", output.state_delta * share)
            if output.expert_load is not None:
                add(sums, "expert_load", output.expert_load)
        self.parallel.finish_gradients()
        return sums

    def forward(self, batch: Batch, micro: list[int], plan: DepthPlan) -> RDTOutput:
        """Loss and measurements of some rows of the batch, by their places in it."""
        config = self.config
        rows = batch.rows[micro].tolist()  # numbers in the global batch
        early = [place for place, row in enumerate(rows) if plan.early and row in plan.early.rows]
        ids = self.to_device(batch.ids[micro])
        targets = ids[:, 1:] if batch.targets is None else self.to_device(batch.targets[micro])
        documents = batch.document_ids
        length, seed = config.data.sequence_length, config.run.seed
        with self.parallel.autocast:
            return self.parallel(
                ids[:, :-1],
                targets,
                loops=[plan.loops[row] for row in rows],
                backprop=plan.backprop,
                state=initial_state(config.model, rows, length, seed=seed, step=self.step, device=self.device),
                document_ids=None if documents is None else self.to_device(documents[micro]),
                early_rows=early,
                early_by=plan.early.by if plan.early else 0,
            )

    def to_device(self, values: Tensor) -> Tensor:
        """Copy to the device without waiting, from pinned memory if it is a GPU."""
        return values.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else values

    def reduce(self, sums: dict[str, Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """Sum measurements over all ranks: loss, norm of the gradient, state norm and delta; load of the experts."""
        self.watchdog.beat(f"step {self.step + 1}: summing measurements (all-reduce)")
        scalars = [sums["loss"], self.parallel.squared_norm(), sums["state_norm"], sums["state_delta"]]
        load = sums.get("expert_load")
        # One all-reduce carries everything; float64 represents the experts' counts exactly.
        parts = [value.double().view(1) for value in scalars]
        packed = torch.cat([*parts, *([load.double().view(-1)] if load is not None else [])])
        self.world.sum(packed)
        loss, squared_norm, state_norm, state_delta = packed[:4]
        if load is not None:
            load = packed[4:].round().long().view_as(load)
        return (loss, squared_norm.sqrt(), state_norm, state_delta), load

    def update(self, loss: Tensor, grad_norm: Tensor, expert_load: Tensor | None) -> float:
        """Update weights and router biases, unless loss or gradient are not finite; return the learning rate."""
        config, step = self.config, self.step
        self.watchdog.beat(f"step {step + 1}: update (all-to-alls of Muon under FSDP, all-gathers under DDP)")
        # Decided on the device, without waiting: the fused kernel divides gradients by `grad_scale` and skips the
        # update if `found_inf` is 1. All ranks have the same sums, so all skip together.
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
        if expert_load is not None:
            self.model.rebalance(expert_load, applied=(~skip).float())
        return lr

    def agree_to_stop(self, problem: str | None) -> bool:
        """Whether all ranks stop after this step: any of them got a signal, is out of time, or lacks data.

        Raises MythosError on all of them if a checkpoint could not be written.
        """
        self.watchdog.beat(f"step {self.step}: agreeing to go on (all-reduce)")
        asked = bool(problem or self.stop.reason)
        save_failed, stopping = self.ranks.any(self.checkpoints.failed, asked)
        if save_failed:
            self.checkpoints.wait()  # raises the error
        return save_failed or stopping

    def check_progress(self, result: StepResult, last: bool) -> bool:
        """Whether the newest update was applied. Too many skipped in a row: go back to the newest checkpoint.

        Raises MythosError if it may not go back: training has diverged.
        """
        in_a_row = int(self.skipped_in_a_row)
        if in_a_row < self.config.train.skip_limit and not (last and in_a_row):
            return in_a_row == 0
        diverged = (
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
                loaded = f"weights and optimizer are loaded from {self.checkpoints.newest}"
                logger.warning("%s. %s: %s; the data that led here is not repeated", diverged, rollback, loaded)
            return False
        raise DivergedError(
            f"{diverged}. The last checkpoint is {self.checkpoints.newest or 'not yet written'}; lower optim.lr, or "
            "set a lower optim.clip than the norms before, and continue from it; or set train.rollbacks if the data "
            "causes it."
        )

    def measure(self, result: StepResult) -> dict[str, Any]:
        """The step's record, except for throughput and validation. Reads from the device."""
        record = {"step": self.step, "tokens": self.tokens, **result.record(self.skipped), "rollbacks": self.rollbacks}
        radius = self.model.spectral_radius()
        if radius is not None:
            record["rho_a"] = radius.item()
        if result.expert_load is not None:
            record |= expert_balance(result.expert_load)
        mine = {"peak_memory_bytes": peak_memory(self.device), "own_seconds": self.own_time.read()}
        reports = self.ranks.gather((mine, count_skipped(self.position)))
        record |= over_ranks([report for report, _ in reports])
        for _, skipped_data in reports:
            for kind, count in skipped_data.items():
                record[f"data/{kind}"] = record.get(f"data/{kind}", 0) + count
        return record

    def throughput(self, plan: DepthPlan, seconds: float) -> dict[str, float]:
        """Tokens per second over all ranks; on known GPUs, MFU: needed FLOPs over the GPUs' peak. `seconds` a step."""
        metrics = {"tokens_per_second": self.config.tokens_per_step / seconds, "time": time.time()}
        peak = peak_flops(self.device, self.parallel.dtype)
        if peak is not None:
            needed = self.flops.training(plan.loops, plan.backprop) * self.config.tokens_per_step
            metrics["mfu"] = needed / seconds / (peak * self.world.size)
        return metrics

    def save(self, wait: bool, record: dict[str, Any] | None = None) -> None:
        """Write a checkpoint of this step: in the background, unless `wait` because the run is about to end.

        `record` is the step's record if its validation is yet to come.
        """
        self.watchdog.beat(f"step {self.step}: saving")
        skips = {"total": int(self.skipped), "in_a_row": int(self.skipped_in_a_row), "rollbacks": self.rollbacks}
        meta = {
            "tokens": self.tokens,
            "record": record,
            "skips": skips,
            "rng": random_state(),
            "data": merge_states(self.ranks.gather(self.position)),
            "config": self.config.model_dump(mode="json"),
            "layout": self.layout.sizes,
            "versions": installed_versions(("torch", "transformers", "tokenizers", "datasets")),
        }
        self.checkpoints.save(self.step, self.state(), meta, wait=wait)

    def state(self) -> dict[str, Tensor]:
        """Every tensor that training continues from, by name; not copies."""
        self.parallel.reshard()  # after a validation, FSDP's root unit is still gathered
        return training_state(self.model, self.optimizer)

    def conclude(self, record: dict[str, Any]) -> bool:
        """Validate, add the results to the step's record, log it and draw the plots.

        False if a stop interrupted the validation: the record, which the checkpoint contains too, is completed at the
        next start.
        """
        try:
            record |= self.validate()
        except Interrupted:
            self.log.write(record)
            return False
        self.console.write(validation_line(self.config, record, self.mean_loops), style="bold")
        if self.samples and self.step < self.config.train_steps:  # the last step's is printed whole
            self.console.write(sample_line(self.config, self.step, self.samples[0]))
        self.log.write(record)
        if self.main:
            self.plots = draw_plots(self.run_dir, self.config.depth_mean)
        return True

    def validate(self) -> dict[str, float]:
        """Validation loss and answers at several depths; text samples go to samples/step-N.txt. Raises Interrupted."""
        self.watchdog.beat(f"step {self.step}: validation")
        measured = self.validation, self.tasks, self.tokenizer
        measurement = Measurement(self.config, self.parallel, *measured, self.micro_batch, self.stop)
        generators = random_state()  # restored below, so that validating changes nothing in training
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

    def validate_finished(self) -> dict[str, Any]:
        """Validate and draw a run that has no steps left, without logging; {} if a stop interrupts that."""
        if self.main:
            self.console.write(
                f"nothing to train: the run is at step {self.step}; raise train.steps, or change run.name"
            )
            self.plots = draw_plots(self.run_dir, self.config.depth_mean)
        try:
            return self.validate()
        except Interrupted:
            self.end_early(None, validated=False)
            return {}

    def end_early(self, problem: str | None, validated: bool) -> None:
        """Finish saving and print why the run ends here. Raises TransientError if data was missing.

        `validated` is false if the validation of the last step is missing.
        """
        self.checkpoints.wait()
        saved = f"Stopped after step {self.step}, which is saved: {self.checkpoints.newest}"
        if not self.checkpoints.newest:
            saved = "Stopped before the first step"
        self.agree_on_data(problem, f"\n{saved}")
        reasons = self.ranks.gather(self.stop.reason)
        rank = next(rank for rank, reason in enumerate(reasons) if reason)
        where = f" (rank {rank})" if self.world.size > 1 else ""
        self.console.end_training()
        missing = "" if validated else "Its validation was interrupted and is repeated when the run continues.\n"
        self.console.write(f"{reasons[rank]}{where}. {saved}\n{missing}The same command continues.")

    def agree_on_data(self, problem: str | None, saved: str = "") -> None:
        """Raise TransientError on all ranks if any lacks data: a restart may find the server back."""
        problems = self.ranks.gather(problem)
        rank = next((rank for rank, text in enumerate(problems) if text), None)
        if rank is not None:
            where = f" (rank {rank})" if self.world.size > 1 else ""
            raise TransientError(f"{problems[rank]}{where}{saved}")

    def sum_up(self, record: dict[str, Any]) -> None:
        """Print the depth table, a sample, and the paths of all results."""
        if not self.main:
            return
        self.console.write(summary(self.config, record, self.mean_loops, self.tokens))
        self.console.write(ending(self.samples, self.plots, self.log.path, self.checkpoints.newest))


def add(totals: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Sum a measurement over micro-batches, on the device."""
    totals[key] = totals[key] + value if key in totals else value
