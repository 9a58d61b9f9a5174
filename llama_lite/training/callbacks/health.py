"""NaN, infinite and spiking losses; saturation and overfitting."""

import math
from collections import deque

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...distributed import print_main
from ...run_folder import RunFolder
from .. import loss_trends

SPIKE_SIGMAS, SPIKE_HISTORY = 6.0, 100


class SpikeDetector:
    """Detects a loss more than 6 standard deviations above the mean of this process's last 100 steps (at least 20).

    The loss of a spike counts as this limit in the steps after it: one spike hardly moves the mean, and a loss that
    stays high is no spike any more after some steps, for which mean and deviation have grown.
    """

    def __init__(self):
        self.losses: deque = deque(maxlen=SPIKE_HISTORY)

    def __call__(self, loss: float) -> float | None:
        """The excess in standard deviations if `loss` is a spike, else None."""
        excess = None
        if len(self.losses) >= 20:
            mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses)) + 1e-3
            limit = mean + SPIKE_SIGMAS * deviation
            if loss > limit:
                loss, excess = limit, (loss - mean) / deviation
        self.losses.append(loss)
        return excess


class Health(TrainerCallback):
    """At each evaluation: is validation loss saturated, does the model overfit? A yes is reported once per run, and
    both verdicts at its end.
    """

    def __init__(self, run: RunFolder):
        self.run, self.reported = run, set()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Report saturation and overfitting on the main process, as events of the run and as printed lines."""
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        if not state.is_world_process_zero or not evaluated:  # every one so far has failed
            return
        verdicts = loss_trends.judge(
            state.log_history, math.ceil(state.max_steps / (state.eval_steps or state.max_steps))
        )
        tokens, losses = evaluated[-1]["tokens"], [entry["eval_loss"] for entry in evaluated]
        found = {name for name, verdict in verdicts.items() if verdict.answer == loss_trends.YES} - self.reported
        self.reported |= found
        if "saturation" in found:
            slope = verdicts["saturation"].slope
            self.run.event("saturated", tokens=tokens, slope=slope.slope, low=slope.low, high=slope.high)
            print_main(
                f"validation loss is saturated: {slope.slope:+.4f} nats per doubling of tokens ({slope.low:+.4f} to"
                f" {slope.high:+.4f})"
            )
        if "overfitting" in found:
            slope = verdicts["overfitting"].slope
            best = {"eval_loss": losses[-1], "best_eval_loss": min(losses)}
            self.run.event("overfitting", tokens=tokens, **best, slope=slope.slope, low=slope.low, high=slope.high)
            print_main(
                f"validation loss rises and diverges from training loss by {slope.slope:.4f} nats per doubling of"
                f" tokens ({slope.low:.4f} to {slope.high:.4f}): {losses[-1]:.4f}, best {min(losses):.4f}"
            )
        if state.global_step >= state.max_steps:
            self.run.event(
                "trends",
                tokens=tokens,
                **{name: {"answer": one.answer, "needed": one.needed} for name, one in verdicts.items()},
            )
