"""The Trainer mixin that makes a run verifiable: atomic checkpoints, exact resume, health, one collective per step.

It replaces how transformers.Trainer saves (training/saving.py) and loads, and nothing of how it trains. Pretraining
adds the data order.
"""

import contextlib
import copy
import dataclasses
import hashlib
import logging
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from ..checkpoint import optimizer_state, verify
from ..checkpoint.identity import changed_arithmetic, differences, is_deterministic, model_differences
from ..config.schedules import make_scheduler
from ..data.document_reads import DocumentReads
from ..data.run_windows import describe_windows
from ..distributed import (
    WORLD_SIZE,
    is_known_to_all,
    print_main,
    raise_on_all_ranks,
)
from ..errors import Interrupted, ProbeDiffers, Refusal, Unhealthy, status_of
from ..files import read_json
from ..formatting import shortened
from ..machine.parallelism import complete_accelerator_arguments
from ..models.loading import load_weights
from ..run_folder import RunFolder
from .goodput import WallClock
from .random_state import draws_in_training, preserved_random_state
from .saving import PROGRESS_FILE, VerifiedSaving
from .validation import ValidationSet, held_out_metrics

logger = logging.getLogger(__name__)

LEAST_LOSS_SCALE = 1.0  # of float16, at which gradients that overflow would do so unscaled, too
NAMED_DOCUMENTS = 20  # in the event of a spike; `python -m llama_lite trace RUN --spikes` shows all
TIMINGS = (  # what two equal runs may log differently
    *("tokens_per_second", "mfu", "peak_memory_gib", "goodput", "wall_seconds"),
    *("save_seconds", "evaluation_seconds", "restart_seconds", "waiting_seconds"),
)


@contextlib.contextmanager
def untold(library: str, words: str):
    """In this block a library's logger prints no line with these words."""
    library_logger = logging.getLogger(library)
    library_logger.addFilter(without := lambda record: words not in record.getMessage())
    try:
        yield
    finally:
        library_logger.removeFilter(without)


@dataclasses.dataclass
class ResumePoint:
    """Where a run begins. `data_start` and `schedule_start` are the steps from which data and schedule count.

    `changed`: what differs from the checkpoint's run, by kind (`checkpoint.identity.check_changes`). `evaluation_due`:
    whether the evaluation of the checkpoint's step is still to be made, before the first step. `progress`: the
    checkpoint's `progress.json`. `order_history`: of a mixture, what happened to its order (`training/mixture.py`).
    """

    checkpoint: Path | None = None
    manifest: dict | None = None
    without: tuple[str, ...] = ()
    data_start: int = 0
    schedule_start: int = 0
    changed: dict = dataclasses.field(default_factory=dict)
    evaluation_due: bool = False
    progress: dict = dataclasses.field(default_factory=dict)
    order_history: list[dict] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        return self.manifest["step"] if self.manifest else 0


def read_resume_point(checkpoint: Path | None, without: tuple[str, ...]) -> ResumePoint:
    """The ResumePoint of a verified checkpoint; None is step 0 of a new run."""
    if checkpoint is None:
        return ResumePoint()
    manifest = verify.read_manifest(checkpoint)
    verify.require_state(manifest, without)
    progress = read_json(checkpoint / PROGRESS_FILE)
    return ResumePoint(
        checkpoint,
        manifest,
        without,
        manifest["step"] if "data" in without else progress["data_start"],
        manifest["step"] if "scheduler" in without else progress["schedule_start"],
        evaluation_due=progress.get("evaluation_due", False),  # absent in older checkpoints: evaluated before saving
        progress=progress,
    )


class VerifiedTraining(VerifiedSaving):
    """Mixin for Trainer and SFTTrainer. `probe` is a list of batches whose loss is recorded in each checkpoint and
    computed again on resume.
    """

    def __init__(
        self,
        *args,
        run: RunFolder,
        identity: dict,
        start: ResumePoint,
        signals,
        probe: list[dict],
        flops_per_token: int | None = None,
        peak_flops: float | None = None,
        publisher=None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.run, self.identity, self.start, self.signals, self.probe = run, identity, start, signals, probe
        self.flops_per_token, self.peak_flops, self.publisher = flops_per_token, peak_flops, publisher
        self.tokens = 0  # of all ranks, since step 0
        self.stop_reason, self.step_loss, self.step_tokens, self.last_loss = None, None, 0, None
        self.on_spike, self.window_start, self.outside = None, None, 0.0
        self.evaluation_due, self.clock, self.watchdog = start.evaluation_due, WallClock(), None
        self.prepare_saves()
        self.add_callback(ResumeStateCallback(self))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Trainer's schedule, or that of --schedule_steps."""
        if self.lr_scheduler is None:
            steps = self.identity["hyperparameters"]["schedule_steps"]
            self.lr_scheduler = make_scheduler(
                self.args, optimizer or self.optimizer, num_training_steps, None if steps == "max_steps" else steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _build_accelerator_args(self, **kwargs) -> dict:
        return complete_accelerator_arguments(super()._build_accelerator_args(**kwargs))

    # ---- stepping ----

    def training_step(self, model, inputs, *args, **kwargs):
        # padded rows have a mask: bases that cannot be packed train on one row per sequence
        mask = inputs.get("attention_mask")
        self.step_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.step_loss = loss if self.step_loss is None else self.step_loss + loss
        return loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device):
        """Trainer's count of labels, as whole numbers: it makes a float32 tensor of it, which FSDP2 would round to
        bfloat16 with a model's inputs.
        """
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.round().long() if torch.is_tensor(count) else count

    def _get_grad_norm(self, model, grad_norm=None):
        """Called once a step, before the optimizer: the ranks agree on loss, tokens, stopping and the save that is
        under way in one small reduction. Returns None for a step that is skipped.
        """
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        stop_file = self.is_world_process_zero() and (self.run.path / "stop").exists()
        stop_requested = self.signals.received is not None or stop_file
        # whether it is busy before whether it failed: what is not busy any more has failed by then, or is saved
        flags = [stop_requested, self.step_tokens, self.writer.busy, self.writer.failure is not None]
        counted = torch.tensor(list(map(float, flags)), device=self.step_loss.device)
        shared = torch.cat([self.step_loss.float().reshape(1), counted])
        self.step_loss, self.step_tokens = None, 0
        if dist.is_initialized() and WORLD_SIZE > 1:
            dist.all_reduce(shared)
        loss, stops, tokens, busy, failed = shared.tolist()
        loss /= WORLD_SIZE
        self.last_loss, self.tokens = loss, self.tokens + int(tokens)
        self.follow_save(bool(busy), bool(failed))
        if stops:
            self.stop_reason = self.signals.received or "stop"
        step = self.state.global_step + 1
        norm = float(grad_norm)
        skipped = not math.isfinite(norm) and self._skips_overflow()
        if not (math.isfinite(loss) and (math.isfinite(norm) or skipped)):
            about = {"windows": self.windows_of(step), **self.documents_of(step)}
            self.run.event("not finite", at_step=step, loss=str(loss), grad_norm=str(norm), **about)
            raise Unhealthy(
                f"loss {loss}, gradient norm {norm} at step {step} ({self.windows_of(step)}): the last checkpoint is "
                "untouched. Look at those windows, lower --learning_rate, or raise --warmup_steps."
            )
        if self.on_spike and (excess := self.on_spike(loss)):
            about = {"windows": self.windows_of(step), **self.documents_of(step)}
            self.run.event("spike", at_step=step, loss=loss, sigmas=round(excess, 1), **about)
        if skipped:
            scale = self.accelerator.scaler.get_scale()
            reason = f"gradients overflowed at a loss scale of {scale:,.0f}, which is lowered"
            self.run.event("step skipped", at_step=step, reason=reason)
        return None if skipped else grad_norm

    def _skips_overflow(self) -> bool:
        """Whether the step is skipped where gradients are not finite: in float16, whose loss is scaled as far as they
        allow, so that they overflow now and then. torch's GradScaler then lowers the scale.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > LEAST_LOSS_SCALE

    def windows_of(self, step: int) -> str:
        """The training rows of a step, for a person to look at."""
        return f"step {step}"

    def documents_of(self, step: int) -> dict:
        """What an event of a step says of its documents; nothing where they are not known."""
        return {}

    # ---- logging ----

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "train_runtime" in logs:
            return  # Trainer's own summary counts from the last resume
        logs["tokens"] = self.tokens
        if "loss" in logs:
            logs.update(self._throughput() | self.clock.logged())
        for name in [name for name in logs if name.endswith(("_runtime", "_per_second")) and name.startswith("eval")]:
            del logs[name]
        super().log(logs)
        self.run.log(self.state.log_history[-1])

    def _throughput(self) -> dict:
        """Tokens per second and MFU since the last log, without evaluations and saves; peak memory of this process,
        GiB.
        """
        now = time.perf_counter()
        since, first = self.window_start or (now, self.tokens)
        seconds = now - since - self.outside
        self.window_start, self.outside = (now, self.tokens), 0.0
        found = {"peak_memory_gib": round(_peak_memory(self.args.device) / 2**30, 3)}
        if self.tokens > first and seconds > 0:
            found["tokens_per_second"] = (self.tokens - first) / seconds
            if self.peak_flops and self.flops_per_token:
                share = 100 * found["tokens_per_second"] * self.flops_per_token / (self.peak_flops * WORLD_SIZE)
                found |= {"mfu": share} if share <= 100 else {}  # the peak was measured while others used the machine
        return found

    # ---- evaluating ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Log and save first, then evaluate: what fails in an evaluation, or kills it, costs no step. A checkpoint
        records that its evaluation is due. A run that was asked to stop leaves the evaluation to the resumed run.
        """
        if self.control.should_evaluate:  # not at the end of the epoch, where Trainer calls this once more
            self.evaluation_due, self.control.should_evaluate = True, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.evaluation_due and not self.stop_reason:
            self.make_due_evaluation()

    def make_due_evaluation(self) -> None:
        """Evaluate, then queue the checkpoint of this step, if there is one, with the losses of this step."""
        self.seal_parts()  # an evaluation that is killed costs no checkpoint
        self.evaluate()
        self.evaluation_due = False
        self.do_in_background(self._queue_evaluated, self.run.path / f"checkpoint-{self.state.global_step}")

    def _queue_evaluated(self, checkpoint: Path) -> None:
        """Queue a checkpoint, if it is there, whose evaluation has ended (rank 0, after the thread has saved it)."""
        if self.publisher and checkpoint.is_dir():
            self.publisher.add_missing(checkpoint)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Log `held_out_metrics` and call the callbacks. Trainer's own loop weighs a ragged last batch, and what
        processes repeat, too much.

        A part that fails is recorded, and the others are made. Random state and mode of the model stay as they were.
        Returns the metrics, {} where they failed.
        """
        began, training, state = time.perf_counter(), self.model.training, (self.args, self.state, self.control)
        # other shapes, samples and tasks: only training steps are worth compiling
        eager = torch.compiler.set_stance("force_eager")
        with self.clock.during("evaluations"), preserved_random_state(self.args.device), eager:
            self.model.eval()
            metrics = self._attempt("validation loss", self._log_held_out_metrics) or {}
            self.model.train(training)
            for callback in self.callback_handler.callbacks:
                handler = copy.copy(self.callback_handler)
                handler.callbacks = [callback]
                self._attempt(type(callback).__name__, handler.on_evaluate, *state, metrics)
                self.model.train(training)
        self.outside += time.perf_counter() - began
        return metrics

    def _log_held_out_metrics(self) -> dict[str, float]:
        metrics = self.held_out_metrics()
        self.log(metrics)
        return metrics

    def _attempt(self, part: str, function, *args):
        """The result of a part of an evaluation; None on every rank where it fails on any of them, which is recorded.
        Raises what ends a run in order (Refusal, Interrupted, Unhealthy, a full disk).
        """
        result = failure = None
        watched = self.watchdog.attempting(part) if self.watchdog else contextlib.nullcontext()
        try:
            with watched:
                try:
                    result = function(*args)
                except Exception as error:
                    failure = error
                    if is_known_to_all(error):
                        raise
                    if self.watchdog:
                        self.watchdog.fail_alone(shortened(error))
                raise_on_all_ranks(failure)
        except Exception as error:
            if status_of(error):
                raise
            logger.warning("%s of the evaluation at step %s failed", part, self.state.global_step, exc_info=error)
            reason = shortened(error)
            self.run.event("evaluation failed", at_step=self.state.global_step, part=part, reason=reason)
            print_main(f"WARNING   {part} at step {self.state.global_step} failed, and training goes on: {reason}")
            return None
        return result

    def held_out_metrics(self) -> dict[str, float]:
        """What an evaluation measures, of all ranks together: the same under any batch size and number of processes."""
        raise NotImplementedError

    def sum_of_ranks(self, values: list[float]) -> list[float]:
        """Each value, added up over the processes in float64. Raises on all ranks where one has failed before."""
        if WORLD_SIZE == 1:
            return values
        raise_on_all_ranks(None)  # a rank that has failed does not come to the reduction
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.args.device)).tolist()

    # ---- loading ----

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        tensors = load_weights(self.model if model is None else model, Path(resume_from_checkpoint))
        if self.is_deepspeed_enabled:
            optimizer_state.load_zero_weights(self.model, tensors)

    def _init_training_state(self, max_steps, *args, **kwargs):
        """Trainer takes logging, saving and evaluation intervals from the checkpoint; here the arguments count."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.state.train_batch_size = self._train_batch_size
        return result

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None:
            return
        optimizer, without = self._raw_optimizer(), self.start.without
        options = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        if "optimizer" not in without:
            optimizer_state.load_optimizer(self.model, optimizer, Path(checkpoint))
        for group, values in zip(optimizer.param_groups, options, strict=True):
            group.update(values)  # this run's options, not those of the checkpoint
        self._place_on_schedule(self.start.step - self.start.schedule_start, checkpoint)

    def _place_on_schedule(self, step: int, checkpoint) -> None:
        """Learning rates of the requested schedule at `step`; Trainer would keep the checkpoint's base rates."""
        scheduler, base = self.lr_scheduler, list(self.lr_scheduler.base_lrs)
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))
            return
        scheduler.base_lrs, scheduler.last_epoch, scheduler._step_count = base, step, step + 1
        rates = [rate * factor(step) for rate, factor in zip(base, scheduler.lr_lambdas, strict=True)]
        for group, rate, first in zip(self._raw_optimizer().param_groups, rates, base, strict=True):
            group["lr"], group["initial_lr"] = rate, first
        scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None and "rng" not in self.start.without:
            super()._load_rng_state(checkpoint)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        zero = self.is_deepspeed_enabled  # for which Trainer would look for DeepSpeed's own files
        result = super()._prepare_for_training(max_steps, train_dataloader, None if zero else resume_from_checkpoint)
        if resume_from_checkpoint is not None:
            if zero:
                self._load_from_checkpoint(resume_from_checkpoint)
                self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self.check_probe()
            self.report_lost_random_state()
        return result

    def report_lost_random_state(self) -> None:
        """Print a warning, and record it, where training draws random numbers and the checkpoint has no random state
        for a process of this layout: Trainer then leaves that process with the state that follows from the seed.
        """
        files = verify.random_state_files(WORLD_SIZE)
        absent = [name for name in files if name not in self.start.manifest["files"]]
        draws = draws_in_training(self.model) or self.args.neftune_noise_alpha
        if not absent or not draws or "rng" in self.start.without:
            return
        name = self.start.checkpoint.name
        self.run.event("changed", kind="layout", fields={"random_state": [f"of {name}", "of the seed"]})
        print_main(
            f"WARNING   {name} has no {absent[0]}, for another number of processes saved it: dropout starts from the"
            " seed again, with other masks than in an uninterrupted run"
        )

    # ---- probe loss ----

    @torch.no_grad()
    def probe_loss(self) -> float:
        """Mean loss over the probe, one window at a time on every rank, whatever the layout; draws no random number."""
        training = self.model.training
        self.model.eval()
        losses = []
        with torch.compiler.set_stance("force_eager"):
            for batch in self.probe:
                batch = {name: value.to(self.args.device) for name, value in batch.items()}
                losses.append(self.model(**batch).loss.item())
        self.model.train(training)
        return math.fsum(losses) / len(losses)

    def probe_digest(self) -> str:
        """sha256 over the ids of the probe."""
        digest = hashlib.sha256()
        for batch in self.probe:
            digest.update(batch["input_ids"].numpy().tobytes())
        return digest.hexdigest()

    def check_probe(self) -> None:
        """Raise Refusal when the loaded model does not give the loss that was recorded when it was saved."""
        then, now = self.start.manifest["identity"], self.identity
        recorded, found = self.start.manifest["probe"]["loss"], self.probe_loss()
        precisions = [identity["hyperparameters"]["precision"] for identity in (then, now)]
        is_other = model_differences(then, now) or precisions[0] != precisions[1]
        if is_other or self.start.manifest["probe"]["sha256"] != self.probe_digest():
            print_main("the probe windows are not those of the checkpoint, so their loss is not compared")
            return
        deterministic = is_deterministic(now)
        same = deterministic and not changed_arithmetic(differences(then, now))
        tolerance = 0.0 if same else verify.PROBE_TOLERANCE[now["hyperparameters"]["precision"]]
        error = None
        if not abs(found - recorded) <= tolerance:
            error = ProbeDiffers(
                f"the weights of {self.start.checkpoint.name} give a loss of {found!r} on the probe; {recorded!r} was"
                f" recorded when they were saved (allowed difference here: {tolerance}). Wrong weights, number format"
                " or kernels: resume where it was saved, or from another checkpoint."
            )
        raise_on_all_ranks(error)
        print_main(
            f"verified: probe loss {found:.6f},"
            f" {'as recorded, bit for bit' if same else f'within {tolerance} of the recorded {recorded:.6f}'}"
            + ("" if deterministic else " (a GPU gives the same bits every time only with --deterministic)")
        )


class ResumeStateCallback(TrainerCallback):
    """Restores what Trainer resets when training begins, and ends a run in order."""

    def __init__(self, trainer: VerifiedTraining):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.start.checkpoint is not None:
            progress = read_json(trainer.start.checkpoint / PROGRESS_FILE)
            pending = progress["pending_loss"]
            same = len(pending) == WORLD_SIZE
            trainer._tr_loss += pending[args.process_index] if same else sum(pending) / len(pending)
            trainer._globalstep_last_logged, trainer.tokens = progress["logged_step"], progress["tokens"]
        trainer.window_start, trainer.outside = (time.perf_counter(), trainer.tokens), 0.0
        trainer.clock.switch("steps")

    def on_train_end(self, args, state, control, **kwargs):
        with self.trainer.clock.during("saves"):
            self.trainer.finish_save()
        self.trainer.clock.switch("other")

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.run.step = state.global_step
        if trainer.accelerator.optimizer_step_was_skipped:
            trainer.lr_scheduler.step()  # Trainer does not, and a resumed run is placed on the schedule by its step
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        elif trainer.stop_reason:
            control.should_save = control.should_training_stop = True
        return control


class DueEvaluationCallback(TrainerCallback):
    """Makes the evaluation that the checkpoint left to the resumed run, before its first step. The last callback."""

    def __init__(self, trainer: VerifiedTraining):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.evaluation_due:
            self.trainer.make_due_evaluation()


def finish_or_raise(trainer: VerifiedTraining) -> None:
    """After `train()`: Interrupted unless the last step was reached and evaluated. Training that was asked to stop has
    saved.
    """
    if trainer.state.global_step < trainer.state.max_steps or trainer.evaluation_due:
        (trainer.run.path / "stop").unlink(missing_ok=True)
        raise Interrupted(
            f"{trainer.stop_reason} at step {trainer.state.global_step} of {trainer.state.max_steps};"
            f" checkpoint-{trainer.state.global_step} is verified. Run the same command again to continue."
        )


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or, where another device trains, resident in this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PretrainTrainer(VerifiedTraining, Trainer):
    """Trainer over TokenWindows or MixedWindows: rows in order, validation sets, tokens per folder of a mixture, and
    spikes named by their windows.

    validation: the sets that are measured. sources: names of the folders of a mixture, in the order of its counts.
    document_reads: which documents a step reads, where the prepared folders have an index. shard_checkpoints: whether
    every rank writes a part of a checkpoint (FSDP2). rerun: what each checkpoint records for an audit.
    """

    def __init__(
        self,
        *args,
        validation: list[ValidationSet],
        sources: list[str],
        document_reads: DocumentReads | None = None,
        shard_checkpoints: bool = False,
        rerun: dict | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.validation, self.sources = validation, sources
        self.windows_per_step = self.identity["data"]["tokens_per_step"] // self.train_dataset.block_size
        self.document_reads, self.shard_checkpoints, self.rerun = document_reads, shard_checkpoints, rerun or {}

    def held_out_metrics(self) -> dict[str, float]:
        return held_out_metrics(self, self.validation)

    def windows_of(self, step: int) -> str:
        rows = self.windows_per_step
        return describe_windows(self.train_dataset, self.sources, range((step - 1) * rows, step * rows))

    def documents_of(self, step: int) -> dict:
        if self.document_reads is None or not self.is_world_process_zero():
            return {}
        try:
            names = self.document_reads.names_of_step(step)
        except (Refusal, OSError):  # of a folder that was damaged or removed since: no reason to end a run
            return {}
        return {"documents": names[:NAMED_DOCUMENTS], "documents_in_step": len(names)}

    def log(self, logs: dict, start_time: float | None = None) -> None:
        read = self.state.global_step * self.windows_per_step
        if "loss" in logs and self.sources:
            counts = zip(self.sources, self.train_dataset.counts(read), strict=True)
            logs.update({f"tokens_{name}": count * self.train_dataset.block_size for name, count in counts})
        self.state.epoch = read / self.train_dataset.epoch_windows
        super().log(logs, start_time)
