"""What a run publishes: the forecast of --dry_run, and its queues when it begins and ends."""

from collections.abc import Callable
from pathlib import Path

from transformers import TrainingArguments

from ..config.common import HubArguments
from ..distributed import print_main
from ..errors import Interrupted
from ..formatting import size
from ..hub.publish_queue import is_published, queue_lines, queued
from ..hub.queue_limit import carries_state, default_limit
from ..run_folder import RunFolder
from .plan import Plan, TuningPlan, saved_steps

WHILE_PUBLISHING = "while publishing; what is not published yet stays in the queue."


def publishing_lines(
    plan: Plan | TuningPlan, hub_args: HubArguments, training_args: TrainingArguments, revision: int, merged: int = 0
) -> list[str]:
    """What a run will publish, and what waits already.

    revision: bytes of a revision without training state, a model or an adapter; merged: of the merged model, which has
    a repository of its own, 0 without one.
    """
    saved = saved_steps(training_args, plan.steps)
    state, every = str(hub_args.publish_training_state), hub_args.publish_steps
    published = [step for step in saved if is_published(step, every, step == plan.steps)]
    with_state = sum(carries_state(state, step, step == plan.steps) for step in published)
    total = len(published) * revision + with_state * plan.checkpoint_bytes + merged
    queue, given = Path(training_args.output_dir) / "queue", hub_args.publish_queue_limit
    limit = default_limit(queue) if given is None else int(given * 2**30)
    last = f", and the merged model ({size(merged)}) at the end" if merged else ""
    return [
        (
            f"publishes           {len(published)} revisions of {training_args.hub_model_id}, {with_state} with"
            f" training state{last}: {size(total)} in all; {size(limit)} may wait here"
        ),
        *queue_lines(queue),
        *(queue_lines(queue.with_name("queue-merged")) if merged else ()),
    ]


# ---- queues (rank 0) ----


def open_queues(publishers: list, required: bool) -> None:
    """Begin to publish, after a look at the repository. Raises Refusal where the Hub is `required` and cannot be."""
    for publisher in publishers:
        publisher.check(required)
        publisher.catch_up()
        publisher.start()


def publish_queued(publishers: list, timeout: float, stop_requested: Callable[[], str | None]) -> None:
    """Publish what waits in the queues of a finished run. timeout, stop_requested: as `drain_queues`."""
    waiting = [publisher for publisher in publishers if queued(publisher.folder)]
    for publisher in waiting:
        publisher.start()
    drain_queues(waiting, timeout, stop_requested)


def publish_rest(publishers: list, checkpoint: Path, timeout: float, stop_requested: Callable[[], str | None]) -> None:
    """Queue what only the last checkpoint gives (a merged model), and wait for all queues. timeout, stop_requested: as
    `drain_queues`.
    """
    for publisher in publishers[1:]:
        publisher.add(checkpoint)
        publisher.start()
    drain_queues(publishers, timeout, stop_requested)


def drain_queues(publishers: list, timeout: float, stop_requested: Callable[[], str | None]) -> list[str]:
    """Wait until the queues are empty, for `timeout` seconds at most each; returns lines about what still waits.

    stop_requested: what asks this process to end, if something does. Raises Interrupted for it if something is left.
    """
    left = []
    for publisher in publishers:
        if not publisher.drain(timeout, stop_requested):
            left += queue_lines(publisher.folder)
    if left and (reason := stop_requested()):
        raise Interrupted(f"{reason} {WHILE_PUBLISHING} Run the same command again.")
    return left


def publish_waiting(run: RunFolder, publishers: list, timeout: float, stop_requested: Callable[[], str | None]) -> None:
    """Publish what waits in the queues of a run, and what should. Raises Interrupted when some of it still waits.
    timeout, stop_requested: as `drain_queues`.
    """
    left, lost, due = [], [], []
    for publisher in publishers:
        publisher.check(required=True)
        publisher.catch_up()
        publisher.start()
        left += drain_queues([publisher], timeout, stop_requested)
        lost += publisher.lost
        due += publisher.not_evaluated
    if left:
        raise Interrupted("; ".join(left))
    missing = [f"{len(lost)} revisions that are gone from the Hub and from this machine"] if lost else []
    missing += [f"step {due[0]:,}, whose evaluation the resumed run makes"] if due else []
    print_main(f"everything in {run.path} is published{', except ' + ' and '.join(missing) if missing else ''}")
