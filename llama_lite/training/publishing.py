"""What a run will publish, for --dry_run."""

from pathlib import Path

from transformers import TrainingArguments

from ..config.common import HubArguments
from ..formatting import size
from ..hub.publish_queue import is_published, queue_lines
from ..hub.queue_limit import carries_state, default_limit
from .plan import Plan, TuningPlan, saved_steps


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
