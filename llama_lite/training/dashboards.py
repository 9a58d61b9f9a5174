"""Dashboards (`--report_to`) that follow a run through its resumes: one dashboard run, and no step twice.

Transformers' callbacks send the logs, each to its own service. A resumed run makes again the steps after its
checkpoint, with the same values. What a dashboard has of them already, by `log.jsonl`, is not sent again. Where the
values can differ (another layout, changed arguments, a folder that is lost), they are sent, and `resumed_from` marks
where.

`dashboards.json` in the run's folder holds the id of the dashboard run, what was sent, and where to look.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    rewrite_logs,
)

from ..distributed import print_main, run_on_main
from ..files import read_json, read_jsonl, write_json
from ..run_folder import RunFolder
from .trainer import ResumePoint

FILE = "dashboards.json"
KINDS = ("train", "eval", "samples", "scores")  # of entries of the log


@dataclasses.dataclass
class Continuation:
    """What the dashboards of a run need of its sessions before. The same on every rank.

    id: of the dashboard run, 8 hex digits. sent: {dashboard: {kind of entry: its last step that was sent}}.
    links: {dashboard: where to look}. resumed_from: the step of the checkpoint, None for a new run. folder: the run's.
    """

    folder: Path
    id: str
    sent: dict[str, dict[str, int]]
    links: dict[str, dict]
    resumed_from: int | None

    def write(self) -> None:
        """`dashboards.json` (rank 0)."""
        write_json(self.folder / FILE, {"id": self.id, "sent": self.sent, "links": self.links})


def kind_of_entry(entry: dict) -> str:
    """train, eval, samples or scores: what an entry of the log is of."""
    for key, kind in (("loss", "train"), ("eval_loss", "eval"), ("samples", "samples")):
        if key in entry:
            return kind
    return "scores"


def continuation(
    run: RunFolder, start: ResumePoint, dashboards: list[str], run_id: str, repo: str | None
) -> Continuation | None:
    """The Continuation of a run, before its log is rewound to the checkpoint; None without dashboards.

    run_id: the run's. repo: where it publishes, from which a run whose folder is lost knows its dashboard run again.
    """
    if not dashboards:
        return None

    def read() -> Continuation:
        before = (read_json(run.path / FILE) or {}) if start.checkpoint else {}
        equal = not any(start.changed.values()) and not start.without
        logged: dict[str, int] = {}
        for entry in read_jsonl(run.path / "log.jsonl"):
            logged[kind_of_entry(entry)] = entry["step"]
        sent = {}
        for name in dashboards:
            was = before.get("sent", {}).get(name) if equal else None
            sent[name] = {} if was is None else {kind: max(logged.get(kind, 0), was.get(kind, 0)) for kind in KINDS}
        own = hashlib.sha256(f"{run_id} {repo or secrets.token_hex(8)}".encode()).hexdigest()[:8]
        links = {name: link for name, link in before.get("links", {}).items() if name in dashboards}
        found = Continuation(run.path, before.get("id", own), sent, links, start.step if start.checkpoint else None)
        found.write()
        return found

    return run_on_main(read)


@contextlib.contextmanager
def environment(found: Continuation | None, training: TrainingArguments) -> Iterator[None]:
    """Name the dashboard run, by --run_name and by the variables that wandb and MLflow read, for as long as the run
    lasts. Names and variables that the user sets stay.
    """
    if found is None:
        yield
        return
    training.run_name = training.run_name or f"{found.folder.resolve().name}-{found.id}"
    wanted = {
        "wandb": {"WANDB_RUN_ID": found.id, "WANDB_RESUME": "allow", "WANDB_DIR": str(found.folder)},
        # MLflow makes the ids of its runs itself
        "mlflow": {"MLFLOW_RUN_ID": found.links.get("mlflow", {}).get("id")},
    }
    added = [
        (name, value)
        for dashboard, values in wanted.items()
        for name, value in values.items()
        if dashboard in training.report_to and value and name not in os.environ
    ]
    os.environ.update(added)
    try:
        yield
    finally:
        for name, _ in added:
            os.environ.pop(name, None)


# ---- the callbacks ----


class Reported:
    """Mixin of a transformers callback that sends logs to a dashboard: what was sent is not sent again, and a dashboard
    that fails does not end the run.
    """

    name: str
    found: Continuation
    failed = False
    marked = False

    def texts(self, samples: list[str]) -> dict:
        """Sampled continuations as the dashboard takes them; {} for one that takes numbers only."""
        return {}

    def link(self) -> dict:
        """Where to look: `url` where there is one."""
        return {}

    def before(self) -> dict:
        """Where the sessions before said to look."""
        return self.found.links.get(self.name, {})

    def send(self, method, *args, **kwargs) -> None:
        """Call a method of the dashboard; after its first failure it is left alone, and a line says so."""
        if self.failed:
            return
        try:
            method(*args, **kwargs)
        except Exception as error:  # what a dashboard's package raises is its own affair
            self.failed = True
            print_main(
                f"WARNING   --report_to {self.name} failed, and gets nothing more; training goes on, and log.jsonl has"
                f" everything: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )

    def record_link(self, state: TrainerState) -> None:
        """Write where to look, for the card (rank 0)."""
        if state.is_world_process_zero and not self.failed:
            self.found.links[self.name] = self.link()
            self.found.write()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the dashboard run, or continue it."""
        self.send(super().on_train_begin, args, state, control, **kwargs)
        self.send(self.record_link, state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close it; trackio then has a Space that stays."""
        self.send(super().on_train_end, args, state, control, **kwargs)
        self.send(self.record_link, state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        """Send an entry of the log that the dashboard does not have."""
        kind, sent, logs = kind_of_entry(logs), self.found.sent[self.name], dict(logs)
        if state.global_step <= sent.get(kind, -1):
            return
        logs |= self.texts(logs.pop("samples", []))
        if self.found.resumed_from is not None and not sent and not self.marked:
            logs["resumed_from"], self.marked = self.found.resumed_from, True
        self.send(self.log_values, args, state, control, logs=logs, **kwargs)

    def log_values(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_log(args, state, control, **kwargs)


class TensorBoard(Reported, TensorBoardCallback):
    """Event files in the run's folder. What a resume took back is hidden by `purge_step`, where it is sent again."""

    def texts(self, samples: list[str]) -> dict:
        return {f"eval_sample_{number}": text for number, text in enumerate(samples, 1)}

    def link(self) -> dict:
        return {} if os.getenv("TENSORBOARD_LOGGING_DIR") else {"folder": "tensorboard"}

    def _init_summary_writer(self, args: TrainingArguments) -> None:
        """A writer in the run's folder, for TensorBoard's default is named by time and machine."""
        again = self.found.resumed_from is not None and not self.found.sent[self.name] and not self.marked
        purge = self.found.resumed_from + 1 if again else None
        folder = os.getenv("TENSORBOARD_LOGGING_DIR")
        path = os.path.expanduser(folder) if folder else self.found.folder / "tensorboard"
        self.tb_writer = self._SummaryWriter(log_dir=str(path), purge_step=purge)


class Trackio(Reported, TrackioCallback):
    """A trackio run, local or in a Space. Its steps are the run's; transformers lets trackio count entries."""

    def texts(self, samples: list[str]) -> dict:
        return {
            f"eval_sample_{number}": self._trackio.Markdown(f"```text\n{text}\n```")
            for number, text in enumerate(samples, 1)
        }

    def link(self) -> dict:
        context = self._trackio.context_vars
        space = self._static_space_id or self._space_id
        url = {"url": self.SPACE_URL.format(space_id=space)} if space else {}
        run = context.current_run.get()
        return {**self.before(), **({"project": context.current_project.get(), "name": run.name} if run else {}), **url}

    def log_values(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self._initialized:
            self.setup(args, state, kwargs.get("model"))
        if state.is_world_process_zero:
            values = rewrite_logs(kwargs["logs"])
            self._trackio.log({**values, "train/global_step": state.global_step}, step=state.global_step)


class Wandb(Reported, WandbCallback):
    """A run of Weights & Biases, continued by its id."""

    def texts(self, samples: list[str]) -> dict:
        return {f"eval_sample_{number}": text for number, text in enumerate(samples, 1)}

    def link(self) -> dict:
        return {"id": self._wandb.run.id, "url": self._wandb.run.url} if self._wandb.run else self.before()


class MLflow(Reported, MLflowCallback):
    """A run of MLflow, continued by the id that MLflow gave it. It takes numbers only."""

    def link(self) -> dict:
        active = self._ml_flow.active_run()
        if active is None:
            return self.before()
        info, uri = active.info, self._ml_flow.get_tracking_uri()
        url = f"{uri.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return {"id": info.run_id, **({"url": url} if uri.startswith("http") else {})}


OWN = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": MLflow}


def attach(trainer, found: Continuation | None) -> None:
    """Put the callbacks of this module in place of those that Trainer made of --report_to."""
    for name in trainer.args.report_to if found else ():
        theirs = INTEGRATION_TO_CALLBACK[name]
        ours = OWN.get(name) or type(theirs.__name__, (Reported, theirs), {})
        trainer.remove_callback(theirs)
        callback = ours()
        callback.name, callback.found = name, found
        trainer.add_callback(callback)
