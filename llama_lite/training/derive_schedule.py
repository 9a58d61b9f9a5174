"""The derived values of the schedule: steps, learning rate, warm-up, and intervals of evaluations, checkpoints and log
lines.
"""

import math

from ..data.dataset import count_windows
from ..formatting import in_words
from ..kernels import switches
from ..models import shapes
from ..models.presets import count_parameters
from . import decisions, plan, timing
from .data_plan import most_positions
from .derive_model import EVALUATION_SHARE, ModelDerivation

SAVE_BYTES, SAVE = 100e6, 0.8  # bytes of a checkpoint that are written, flushed and hashed in a second; seconds of any
EVALUATIONS = 10  # of a run
SAMPLES = 3  # prompts that are continued at each evaluation, if none are given


class ScheduleDerivation:
    """Derives the length of a run of a model, and what follows from the length. sets: number of validation sets."""

    def __init__(self, d: decisions.Decisions, model: ModelDerivation, sets: int):
        self.d, self.model, self.data, self.machine, self.sets = d, model, model.data, model.machine, sets

    def settle(self) -> None:
        """The length, then what follows from it."""
        self.settle_length()
        self.settle_intervals()

    def settle_length(self) -> None:
        """Steps, repeated passes over the text, and the kernels that pay off for that length."""
        d, device = self.d, self.machine.device
        if not d.settled("max_steps") and not d.settled("num_train_epochs"):
            self.settle_steps()
        epochs = self.steps / self.steps_per_epoch
        if not self.data.mixture and ("num_train_epochs" in d.fixed or 1 < epochs <= self.data.most_epochs + 1):
            times = f"{epochs:.1f} times" if epochs >= 1.05 else "once, and a little of it twice"
            d.decide("allow_epochs", True, f"the text is read {times}" if epochs > 1 else "")
        if not d.settled("compile_layers"):
            seconds = self.steps * self.step_pace().step(self.accumulation) if device.type == "cpu" else math.inf
            d.decide("compile_layers", *switches.choose_compile(seconds, d["precision"], device))
        d.decide("block_attention", *switches.choose_block_attention(d["precision"], d["compile_layers"], device))

    @property
    def accumulation(self) -> float:
        """Micro-batches per process and step."""
        d = self.d
        return d["tokens_per_step"] / (d["block_size"] * self.machine.processes * d["per_device_train_batch_size"])

    def step_pace(self) -> timing.Pace:
        """Speed of the chosen model with its micro-batch."""
        return self.machine.pace(self.model.config(), self.d["per_device_train_batch_size"], self.d["block_size"])

    def seconds_of_steps(self) -> float:
        """About how long all steps of the run take here, without evaluations and saves."""
        seconds, d = self.steps * self.step_pace().step(self.accumulation), self.d
        if d["compile_layers"] and self.machine.device.type == "cpu":
            return switches.COMPILING + seconds / switches.COMPILED[d["precision"]]
        return seconds

    def settle_steps(self) -> None:
        """As many as the hours hold, evaluations and saves included; no more passes over the text than teach
        something.
        """
        d, pace, available = self.d, self.step_pace(), self.model.seconds
        windows = max(1, (d["validation_tokens"] - 1) // d["block_size"])
        evaluation = (
            d["eval_windows"]
            if d.settled("eval_windows")
            else min(windows, max(8, int(EVALUATION_SHARE * available / EVALUATIONS / pace.window / self.sets)))
        ) * self.sets
        samples = (len(d["sample_prompts"]) or SAMPLES) * d["sample_tokens"] * pace.token
        saves = SAVE + 12 * count_parameters(self.model.config())[0] / SAVE_BYTES + 8 * pace.window
        seconds = max(0.5 * available, available - EVALUATIONS * (evaluation * pace.window + samples + saves))
        step = pace.step(self.accumulation)
        compiled, _ = (
            (d["compile_layers"], "")
            if d.settled("compile_layers")
            else switches.choose_compile(seconds, d["precision"], self.machine.device)
        )
        if compiled and self.machine.device.type == "cpu":
            seconds, step = seconds - switches.COMPILING, step / switches.COMPILED[d["precision"]]
        allowed = d["allow_epochs"], d["allow_epochs_of"]
        positions = most_positions(self.data.mixture or {}, d["block_size"], d["mixture"], *allowed)
        most = min(self.data.most_epochs * self.steps_per_epoch, positions / self.windows_per_step)
        steps = max(1, int(min(seconds / step, most)))
        length = (
            in_words(d["hours"])
            if "hours" in d.fixed
            else "about ten minutes, since no length is given (another: --hours 2, or --max_steps N),"
        )
        reason = f"{length} at {d['tokens_per_step'] / step:,.0f} tokens per second, with evaluations and saves"
        if steps >= int(most) and self.data.mixture:
            first = min(
                self.data.mixture["mixture"], key=lambda part: part["splits"]["train"]["tokens"] / part["weight"]
            )
            reason = (
                f"then {first['name']} is read as often as allowed, in {in_words(steps * step / 3600)}; a longer run"
                " reads it again: --allow_epochs_of its folder"
            )
        elif steps >= int(most):
            reason = (
                f"the text is read {self.data.most_epochs:.0f} times, in {in_words(steps * step / 3600)}; more would"
                " teach next to nothing (or: --max_steps N)"
            )
        d.decide("max_steps", without_short_interval(steps, decisions.nice(steps / EVALUATIONS)), reason)

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps of one pass over the text, as the plan counts them; at least 1."""
        tokens = self.data.manifest or {"splits": {"train": {"tokens": self.data.available}}}
        return max(1, count_windows(tokens, "train", self.d["block_size"]) // self.windows_per_step)

    @property
    def windows_per_step(self) -> int:
        """Windows of a step, at least 1."""
        return max(1, self.d["tokens_per_step"] // self.d["block_size"])

    @property
    def steps(self) -> int:
        """Optimizer steps of the run, at least 1."""
        return max(1, plan.run_steps(self.d.owner["max_steps"], self.steps_per_epoch))

    def settle_intervals(self) -> None:
        """Learning rate, warm-up, and intervals of evaluations, checkpoints and log lines."""
        d, steps = self.d, self.steps
        if not d.settled("learning_rate"):
            width = self.model.config().hidden_size
            d.decide("learning_rate", shapes.learning_rate(width), f"for a width of {width:,}")
        schedule = min(steps, d["schedule_steps"] or steps)
        warmup = max(1, min(715, round(0.04 * schedule)))
        warmup = min(warmup, d["schedule_steps"] - 1) if d["schedule_steps"] else warmup
        d.decide("warmup_steps", warmup, f"4 % of {schedule:,} steps")
        every = d.decide("eval_steps", decisions.nice(steps / EVALUATIONS), "some ten evaluations")
        between = decisions.whole_interval(every, steps)
        d.decide("save_steps", *decisions.save_interval(between, decisions.revision_interval(d)))
        d.decide("logging_steps", decisions.nice(steps / 100), "some hundred lines")
        windows = max(1, (d["validation_tokens"] - 1) // d["block_size"])
        if not d.settled("eval_windows"):
            # windows; one that is evaluated is a third of the work
            trained = steps * d["tokens_per_step"] / d["block_size"]
            most = max(
                8,
                int(
                    3
                    * EVALUATION_SHARE
                    * trained
                    / max(1, steps // plan.intervals(d.owner["eval_steps"], steps)["eval"])
                    / self.sets
                ),
            )
            sample = "a sample " if d["eval_order"] == "shuffled" else ""
            d.decide(
                "eval_windows",
                min(windows, most),
                "all that are held out"
                if most >= windows
                else f"{sample}of {windows:,}, so that evaluations take little time",
            )
        d.decide("probe_windows", min(8, windows), "")
        if not d.settled("save_total_limit"):
            size = 12 * count_parameters(self.model.config())[0]
            saves = len(plan.saved_steps(d.owner["save_steps"], steps))
            limit = checkpoints_kept(size, saves)
            d.decide(
                "save_total_limit",
                limit,
                "all of them, for their evaluation" if limit >= saves else f"{size * 4 / 1e9:.1f} GB of disk",
            )


def without_short_interval(steps: int, every: int) -> int:
    """`steps`, without those after the last multiple of `every` if they are less than a fifth of it: the last step is
    evaluated and saved too, and 551 would be so directly after 550.
    """
    return steps - steps % every if 5 * (steps % every) < every else steps


def checkpoints_kept(size: int, saves: int) -> int:
    """Of checkpoints of so many bytes: all `saves` of a run, where there are few and all are small, else three."""
    return max(saves, 3) if saves <= 2 * EVALUATIONS and size * saves < 2e9 else 3
