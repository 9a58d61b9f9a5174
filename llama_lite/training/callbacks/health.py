"""NaN, infinite and spiking losses; saturation and overfitting."""

from collections import deque

import numpy as np
from transformers import TrainerCallback

from ...distributed import print_main
from .. import loss_trends

SPIKE_SIGMAS, SPIKE_HISTORY = 6.0, 100


class SpikeDetector:
    """Tells a step whose loss lies 6 standard deviations above the last 100 steps' (at least 20 of them)."""

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
    """At each evaluation: is the curve saturated, do training and validation loss part? Reported once each."""

    def __init__(self, run):
        self.run, self.told = run, set()

    def on_evaluate(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
        logged = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        tokens, losses = [entry["tokens"] for entry in evaluated], [entry["eval_loss"] for entry in evaluated]
        if "saturated" not in self.told and (found := loss_trends.saturation(tokens, losses)):
            self.told.add("saturated")
            self.run.event("saturated", tokens=tokens[-1], slope=found.slope, low=found.low, high=found.high)
            print_main(
                f"validation loss is saturated: {found.slope:+.4f} nats a doubling of tokens ({found.low:+.4f} to"
                f" {found.high:+.4f})"
            )
        stretches = zip([0, *(entry["step"] for entry in evaluated)], evaluated, strict=False)
        since = [[loss for step, loss in logged if before < step <= entry["step"]] for before, entry in stretches]
        if "overfitting" in self.told or not all(since):
            return
        if found := loss_trends.overfitting(tokens, [float(np.mean(losses)) for losses in since], losses):
            self.told.add("overfitting")
            self.run.event(
                "overfitting",
                tokens=tokens[-1],
                eval_loss=losses[-1],
                best_eval_loss=min(losses),
                slope=found.slope,
                low=found.low,
                high=found.high,
            )
            print_main(
                f"validation loss rises and parts from training loss by {found.slope:.4f} nats a doubling of tokens"
                f" ({found.low:.4f} to {found.high:.4f}): {losses[-1]:.4f}, best {min(losses):.4f}"
            )
