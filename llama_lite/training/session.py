"""One run from launch to publication: what run_pretrain.py and run_sft.py have in common."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from .. import provenance
from ..checkpoint.identity import RunIdentity
from ..config.fields import switches as library_switches
from ..data.dataset import ORDER_VERSION
from ..distributed import RANK, print_main, run_on_main
from ..errors import Interrupted, Refusal
from ..files import read_json, read_jsonl
from ..hub.publish_queue import Publisher
from ..hub.repository import Repository
from ..machine.hardware import configure_cpu, deterministic_algorithms, deterministic_variables
from ..machine.parallelism import check_launch, layout, use_one_gpu
from ..processes import StopSignals, seconds_since_start
from ..run_folder import RunFolder
from . import dashboards, goodput, publishing, recorded_values, resume
from .callbacks.health import Health, SpikeDetector
from .callbacks.progress import Progress
from .callbacks.stop_after_step import StopAfterStep
from .preflight import check_packages, check_token
from .trainer import DueEvaluationCallback, ResumePoint, VerifiedTraining, finish_or_raise, untold
from .watchdog import Watchdog, last_seen, record_collectives


class Session:
    """A run of a training script. As a context it holds the run's folder, and stops its publishers at the end.

    kind: `pretrain` or `sft`. hub_args, run_args, training_args: the groups of arguments that both scripts have.
    shards: whether the script can train a model that is sharded over processes. Raises Refusal for a launch, a package
    or a login that the run cannot do with.

    Before the run publishes, the script sets `export_to(checkpoint, folder)`, which writes a revision's files, and
    `merge_to`, the same for the merged model of a second repository, if there is one. `also_allowed` is that of
    ResumeOptions.
    """

    def __init__(self, kind: str, hub_args, run_args, training_args, shards: bool = True):
        self.kind, self.hub_args, self.run_args, self.training_args = kind, hub_args, run_args, training_args
        self.ends = contextlib.ExitStack()
        deterministic = run_args.deterministic or training_args.full_determinism
        self.ends.enter_context(deterministic_variables(deterministic))  # here: products are timed before __enter__
        check_launch(training_args, shards)
        self.gpu_note = use_one_gpu(training_args, f"run_{kind}.py")
        self.publishes, training_args.push_to_hub = training_args.push_to_hub, False  # Trainer would push on its own
        check_packages(training_args)
        check_token(self.publishes)
        disable_progress_bar()
        configure_cpu(training_args.device, run_args.cpu_threads, run_args.keep_memory)
        self.export_to = self.merge_to = None
        self.also_allowed = resume.ResumeOptions.also_allowed
        self.repeats = False  # whether this command was the last to start the run, which has saved checkpoints since
        self.values: dict | None = None  # of the record of the run that goes on, on rank 0
        self.run: RunFolder | None = None
        self.signals: StopSignals | None = None
        self.start: ResumePoint | None = None
        self.dashboards: dashboards.Continuation | None = None
        self.publishers: list[Publisher] = []  # on rank 0

    def __enter__(self):
        self.ends.enter_context(deterministic_algorithms(self.run_args.deterministic))
        self.run = self.ends.enter_context(RunFolder(self.training_args.output_dir))
        self.catch_signals()
        record_collectives(self.run.path)
        return self

    def __exit__(self, kind, error, trace):
        if self.run and isinstance(error, Interrupted):
            self.run.keep_finished()
        return self.ends.__exit__(kind, error, trace)

    def choose_folder(self, default: str) -> None:
        """The run's folder: the given one, or `default`. Where this command was the last to start the run in it, and
        it has saved checkpoints since, the command goes on from those: like `auto`, and with all of their state.
        """
        run_args, training_args = self.run_args, self.training_args
        if "output_dir" not in run_args.explicit_args:
            training_args.output_dir = default
        if run_args.values_of:
            kept = "prepared_dir" in run_args.explicit_args and "dataset" not in run_args.explicit_args
            print_main(
                f"record    values that the command does not give are those of {run_args.values_of}"
                + ("; it reads the same tokens, whatever its text is now" if kept else "")
            )
        folder, mode = training_args.output_dir, training_args.resume_from_checkpoint
        self.repeats = run_on_main(recorded_values.is_repeated, folder, run_args.explicit_args)
        if self.repeats and (run_args.resume_without or mode not in ("auto", "must", "never")):
            print_main(
                f"resume    {folder} has saved checkpoints since this command last started it, and goes on from the"
                " newest"
            )
            training_args.resume_from_checkpoint, run_args.resume_without = "auto", ""

    @property
    def repo(self) -> str | None:
        """Where the run publishes; None if it does not."""
        return self.training_args.hub_model_id if self.publishes else None

    def recorded(self, names) -> dict:
        """{argument: value} of `names` that the record of the run to go on with holds (rank 0). Raises Refusal."""
        if self.values is None:
            self.values = recorded_values.values_to_continue(self.run_args, self.training_args, self.repo)
        return {name: self.values[name] for name in names if name in self.values}

    def order_version(self) -> int:
        """How the order of the windows follows from the seed (rank 0): today's in a run that begins."""
        return self.recorded(("order_version",)).get("order_version", ORDER_VERSION)

    def catch_signals(self) -> None:
        """Let signals end the process in order: at once until training begins, then after a save, and after the last
        step when what runs is finished, but for what waits to be published. In the run's folder, whoever starts the
        same run meanwhile waits for that.
        """
        on_stop = self.run.stopping if self.run else lambda: None
        if self.signals is None:
            self.signals = StopSignals(on_stop)
        else:
            self.signals.on_stop = on_stop

    def stop_requested(self) -> str | None:
        """What asks this process to end, if something does: the name of a signal, or `stop`, the file in its folder."""
        return self.signals.received or ("stop" if (self.run.path / "stop").exists() else None)

    def publish_only(self) -> None:
        """Publish what waits in the folder's queues. Raises Refusal where there is no run, Interrupted when some of it
        still waits, or when it was asked to stop.
        """
        folder = self.training_args.output_dir
        record = read_json(Path(folder) / "run.json")
        if record is None:
            raise Refusal(f"--publish_only: {folder} is not the folder of a run.")
        with RunFolder(folder) as run:
            run.record_end, self.run = False, run
            self.catch_signals()
            self.signals.end_at_once(publishing.WHILE_PUBLISHING)
            (run.path / "stop").unlink(missing_ok=True)  # of the run, which it has ended
            publishers = self._make_publishers(run, record["id"])
            self._publish(publishing.publish_waiting, run, publishers)

    def _publish(self, function: Callable, *args) -> None:
        """Call `function(*args, timeout, stop_requested)` of `publishing` on rank 0."""
        run_on_main(function, *args, self.hub_args.hub_drain_timeout, self.stop_requested)

    def _make_publishers(self, run: RunFolder, identifier: str) -> list[Publisher]:
        """The queue of the run's checkpoints, and that of its merged model; identifier: the run's, in its records."""
        hub, repo, private = self.hub_args, self.training_args.hub_model_id, self.training_args.hub_private_repo
        repository = Repository(repo, private, identifier)
        state, limit = str(hub.publish_training_state), hub.publish_queue_limit
        publishers = [Publisher(run, repository, self.export_to, state, hub.publish_steps, limit)]
        if self.merge_to:
            repository = Repository(f"{repo}-merged", private, identifier)
            publishers.append(Publisher(run, repository, self.merge_to, "none", sys.maxsize, limit, "-merged"))
        return publishers

    def identity(self, plan, *, config: dict, data: dict, switches: dict, further_hyperparameters=()) -> RunIdentity:
        """The identity of this run as it is launched here; the arguments but plan as in RunIdentity, `switches` being
        the script's own of its environment.
        """
        return RunIdentity(
            config=config,
            training={
                **self.training_args.to_dict(),
                "precision": self.run_args.precision,
                "schedule_steps": self.run_args.schedule_steps or "max_steps",
            },
            data={**data, "data_seed": self.order_seed, "seed": self.training_args.seed},
            layout={
                "processes": plan.processes,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                **layout().record(),
            },
            environment={
                "hardware": provenance.hardware(self.training_args.device),
                "packages": provenance.package_versions(),
                "switches": {
                    **switches,
                    **library_switches(self.training_args),
                    **({"deterministic": True} if self.run_args.deterministic else {}),
                },
                "code_revision": provenance.code_revision(),
            },
            further_hyperparameters=further_hyperparameters,
        )

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        args = self.training_args
        return args.data_seed if args.data_seed is not None else args.seed

    def begin(
        self, identity: RunIdentity, plan, settings: dict, check_new: Callable[[], object] = bool, **record
    ) -> ResumePoint | None:
        """Find where the run begins, write `run.json` and open the queues. Returns None for a run that is finished:
        what it still has to publish is published. Raises Refusal.

        settings: the values of the arguments that decide what the run is. check_new: called before a run that begins
        from no checkpoint is recorded; may raise Refusal. record: what else `run.json` holds.
        """
        hub, run_args = self.hub_args, self.run_args
        record = {
            "kind": self.kind,
            "identity": identity.record(),
            "plan": dataclasses.asdict(plan),
            "given": run_args.explicit_args,
            "settings": settings,
            "card": hub.card,
            **record,
            **provenance.provenance(self.training_args.device),
        }
        options = resume.ResumeOptions(
            self.training_args.resume_from_checkpoint,
            run_args.resume_without,
            run_args.allow_changes,
            self.repo,
            hub.hub_required,
            self.also_allowed,
        )
        self.identity_record = record["identity"]
        self.start = resume.find_start(self.run, record, options)
        if run_args.stop_after_step and self.start.step >= run_args.stop_after_step:
            raise Refusal(
                f"--stop_after_step {run_args.stop_after_step}: the run in {self.run.path} is already at step"
                f" {self.start.step}. Give a later step, or leave it out."
            )
        if not self.repeats:
            explicit_args = recorded_values.comparable_args(run_args.explicit_args)
            record["last_start"] = {"given": explicit_args, "step": self.start.step}
        record["id"] = resume.run_id_of(self.run, record["identity"], self.start.checkpoint is None)
        if self.publishes and not hub.card_license:
            print_main(
                "license   the card will name none, and without one nobody knows what they may do with the model:"
                " --card_license apache-2.0, mit, other ..."
            )
        if self.publishes and RANK == 0:
            self.publishers = self._make_publishers(self.run, record["id"])
        for publisher in self.publishers:
            self.ends.callback(publisher.stop)
        if resume.is_finished(self.run, self.start, plan.steps):
            self._finish_first()
            self._publish(publishing.publish_queued, self.publishers)
            return None
        if self.start.checkpoint is None:
            check_new()
        reported = self.run, self.start, self.training_args.report_to, record["id"], self.repo
        self.dashboards = dashboards.continuation(*reported)  # before the log is rewound
        self.ends.enter_context(dashboards.environment(self.dashboards, self.training_args))
        resume.begin_run(self.run, record, self.start)
        run_on_main(publishing.open_queues, self.publishers[:1], hub.hub_required)
        return self.start

    def trainer_arguments(self) -> dict:
        """The arguments of VerifiedTraining that come from the session."""
        return {
            "args": self.training_args,
            "run": self.run,
            "identity": self.identity_record,
            "start": self.start,
            "signals": self.signals,
            "publisher": self.publishers[0] if self.publishers else None,
        }

    def add_callbacks(self, trainer: VerifiedTraining) -> None:
        """The progress lines and health checks of this project, in place of Trainer's own lines."""
        trainer.on_spike, trainer.async_save = SpikeDetector(), self.run_args.async_save
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Progress())
        trainer.add_callback(Health(self.run))
        if self.run_args.stop_after_step:
            trainer.add_callback(StopAfterStep(trainer, self.run_args.stop_after_step))
        dashboards.attach(trainer, self.dashboards)

    def train(self, trainer: VerifiedTraining, steps: int) -> bool:
        """Train up to the last step and evaluate; False if nothing of that is left. Raises Interrupted when it was
        asked to stop.
        """
        checkpoint = self.start.checkpoint
        if self.start.step >= steps and not self.start.evaluation_due:
            self._finish_first()
            return False
        self.signals.end_after("this step is finished and saved first")
        if self.gpu_note:
            print_main(f"device    {self.gpu_note}")
        trainer.clock = self._wall_clock()
        trainer.watchdog = Watchdog(self.run, self.run_args.step_timeout, trainer.clock)
        trainer.add_callback(trainer.watchdog)
        trainer.add_callback(RecordStart(trainer))
        trainer.add_callback(DueEvaluationCallback(trainer))
        changed_intervals = "do not match the ones in the `trainer_state.json`"  # which may change at any resume
        with trainer.watchdog, untold("transformers.trainer_utils", changed_intervals):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        recorded = trainer.clock.recorded()
        self.run.event("trained", **recorded)
        print_main(goodput.line(recorded["seconds"]))
        finish_or_raise(trainer)
        if self.run_args.stop_after_step:
            raise Interrupted(f"--stop_after_step {steps} at the last step. Run the same command without it to finish.")
        self._finish_first()
        return True

    def _finish_first(self) -> None:
        """After the last step, let signals leave nothing but what waits to be published."""
        left = "; what is not published by then stays in the queue" if self.publishes else ""
        self.signals.end_after(f"the run is finished first{left}")

    def _wall_clock(self) -> goodput.WallClock:
        """The clock of this session, with the wall time of the run before it (rank 0)."""
        clock = goodput.WallClock()
        if RANK == 0:
            events, seen = read_jsonl(self.run.path / "events.jsonl"), last_seen(self.run.path)
            clock.seconds |= goodput.seconds_before(events, self.start.step, seconds_since_start(), seen)
        if self.start.checkpoint:
            clock.switch("restarts")
        return clock

    def publish_rest(self, steps: int) -> None:
        """Queue the merged model of the last checkpoint, if there is one, and wait until all queues are empty. Raises
        Interrupted when it was asked to stop before.
        """
        self._publish(publishing.publish_rest, self.publishers, self.run.path / f"checkpoint-{steps}")


class RecordStart(TrainerCallback):
    """Records that a session trains, and what it changes, once its checkpoint is loaded and verified: a command that is
    refused until then changes nothing in the history of a run.
    """

    def __init__(self, trainer: VerifiedTraining):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Write the events."""
        run, start = self.trainer.run, self.trainer.start
        for kind in ("hyperparameters", "data", "layout", "environment"):
            if changed := start.changed.get(kind):
                run.event("changed", kind=kind, fields={name: list(values) for name, values in changed.items()})
        run.event(
            "resumed" if start.checkpoint else "started",
            checkpoint=start.checkpoint.name if start.checkpoint else None,
            data_start=start.data_start,
            **({"reshard_after_forward": layout().reshard} if layout().sharding == "fsdp2" else {}),
            **self.trainer.clock.recorded(),
        )
        self.report_rate()

    def report_rate(self) -> None:
        """Print how the learning rate of the next step differs from what it was before a change of the run: from that
        step's, or of a finished run from that of the last step, for its schedule ends there.
        """
        start = self.trainer.start
        changed = start.changed.get("hyperparameters")
        if not changed or "scheduler" in start.without:
            return
        saved, *_ = torch.load(start.checkpoint / "scheduler.pt", weights_only=True).get("_last_lr", [None])
        if saved is None:  # of a schedule that does not keep it
            return
        if changed.get("max_steps", (None,))[0] == start.step:
            history = read_json(start.checkpoint / "trainer_state.json")["log_history"]
            saved = next((entry["learning_rate"] for entry in reversed(history) if "learning_rate" in entry), saved)
        rate = self.trainer.lr_scheduler.get_last_lr()[0]
        if abs(rate - saved) > 0.01 * saved:
            warned = "WARNING   a rate that rises can raise the loss for some time: " if rate > saved else "rate      "
            print_main(f"{warned}step {start.step + 1} has {rate:.2e}, and had {saved:.2e} before the change")
