"""NaN, infinite and spiking losses; saturation and overfitting."""

from collections import deque

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...distributed import print_main
from ...run_folder import RunFolder
from .. import loss_trends

SPIKE_SIGMAS, SPIKE_HISTORY = 6.0, 100


class SpikeDetector:
    """Detects a loss more than 6 standard deviations above the mean of the last 100 steps (at least 20 of them)."""

    def __init__(self):
        self.losses: deque = deque(maxlen=SPIKE_HISTORY)

    def __call__(self, loss: float) -> float | None:
        """The excess in standard deviations if `loss` is a spike, else None. Spikes do not enter the history."""
        if len(self.losses) >= 20:
            mean, deviation = float(np.mean(self.losses)), float(np.std(self.losses)) + 1e-3
            if loss > mean + SPIKE_SIGMAS * deviation:
                return (loss - mean) / deviation
        self.losses.append(loss)
        return None


class Health(TrainerCallback):
    """At each evaluation: is validation loss saturated, does the model overfit? Each is reported once per run."""

    def __init__(self, run: RunFolder):
        self.run, self.reported = run, set()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Report saturation and overfitting on the main process, as events of the run and as printed lines."""
        if not state.is_world_process_zero:
            return
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        logged = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        tokens, losses = [entry["tokens"] for entry in evaluated], [entry["eval_loss"] for entry in evaluated]
        if "saturated" not in self.reported and (slope := loss_trends.saturation(tokens, losses)):
            self.reported.add("saturated")
            self.run.event("saturated", tokens=tokens[-1], slope=slope.slope, low=slope.low, high=slope.high)
            print_main(
                f"validation loss is saturated: {slope.slope:+.4f} nats per doubling of tokens ({slope.low:+.4f} to"
                f" {slope.high:+.4f})"
            )
        intervals = zip([0, *(entry["step"] for entry in evaluated)], evaluated, strict=False)
        losses_since = [[loss for step, loss in logged if start < step <= entry["step"]] for start, entry in intervals]
        if "overfitting" in self.reported or not all(losses_since):
            return
        if slope := loss_trends.overfitting(tokens, [float(np.mean(part)) for part in losses_since], losses):
            self.reported.add("overfitting")
            self.run.event(
                "overfitting",
                tokens=tokens[-1],
                eval_loss=losses[-1],
                best_eval_loss=min(losses),
                slope=slope.slope,
                low=slope.low,
                high=slope.high,
            )
            print_main(
                f"validation loss rises and diverges from training loss by {slope.slope:.4f} nats per doubling of"
                f" tokens ({slope.low:.4f} to {slope.high:.4f}): {losses[-1]:.4f}, best {min(losses):.4f}"
            )
