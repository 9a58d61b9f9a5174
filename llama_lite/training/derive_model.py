"""The derived values of the model: its shape, and the sizes of window, step and micro-batch."""

import functools
import math

import torch

from ..kernels.probe import context_of
from ..models import shapes
from ..models.presets import model_config_of
from ..processes import seconds_since_start
from . import decisions, derive_data, timing
from .memory import capacity

# seconds: from here to the first step, beside preparing; and from the last step to the end (export, card, figures)
READY, FINISH = (4.0, 10.0)
EVALUATION_SHARE = 0.08  # of a run's time that evaluations may take
WINDOWS, TUNED_WINDOWS = (400, 8), (8, 2)  # to train on and held out, at least; of TUNED_LENGTH tokens, fewer will do
STATE_SHARE, BYTES_PER_PARAMETER = 0.8, 16  # of memory: float32 weights, gradients and two moments


class ModelDerivation:
    """Derives the model that fits data, time and machine, and the sizes that suit them.

    shards: processes over which weights, gradients and moments are divided. is_new: whether the run begins now.
    """

    def __init__(
        self,
        d: decisions.Decisions,
        data: derive_data.DataDerivation,
        machine: timing.Machine,
        shards: int,
        is_new: bool,
    ):
        self.d, self.data, self.machine, self.shards, self.is_new = d, data, machine, shards, is_new

    def settle(self) -> None:
        """The model, then its sizes."""
        self.settle_model()
        self.settle_sizes()

    def config(self, block_size: int | None = None):
        """The config of the chosen model, with vocabulary and context as the run will have them."""
        return model_config_of(self.d["model_config"], self.data.vocabulary(), block_size or self.d["block_size"])

    @functools.cached_property
    def seconds(self) -> float:
        """For training, evaluating and saving: what the hours leave beside starting, preparing and finishing."""
        given = self.reads_given()
        default = decisions.DEFAULT_HOURS
        hours = self.d["hours"] or default if given else self.d.decide("hours", default, "")
        return max(15.0, hours * 3600 - seconds_since_start() - READY - self.data.preparing_seconds() - FINISH)

    def settle_model(self) -> None:
        """The model that fits text, time and machine."""
        if not self.d.settled("model_config"):
            self.d.decide("model_config", *self.best_shape())
        if self.d["init_from"] and self.is_new:
            from .initial_weights import check_config  # whose libraries other plans do not need

            check_config(self.d["init_from"], self.config(1))

    def best_shape(self) -> tuple[str, str]:
        """The shape that is expected to end with the lowest loss in this time, and why: guessed by FLOPs, then timed,
        until the guess stays.

        Of those that memory holds, and that so many tokens are enough for; where the length is given, of those that
        read it in this time.
        """
        rate, speeds = self.machine.flops_per_second * self.machine.processes, {}
        given = self.reads_given()

        def read_in_time(shape) -> float:
            tokens_per_second = speeds.get(shape) or rate / shapes.flops_per_token(
                shape, self.data.vocabulary(), shapes.context_of(shape[1])
            )
            return tokens_per_second * (1 - EVALUATION_SHARE) * self.seconds

        def reads(shape) -> float:
            return given or min(read_in_time(shape), self.data.most_epochs * self.data.available)

        def fits(shape) -> bool:
            size = shapes.parameters(shape, self.data.vocabulary())
            enough = size <= min(shapes.PARAMETERS_PER_TOKEN * reads(shape), self.most_parameters())
            return enough and (not given or given <= read_in_time(shape))

        for _ in range(4):
            candidates = [shape for shape in shapes.LADDER if fits(shape)] or shapes.LADDER[:1]
            best = min(candidates, key=lambda shape: shapes.expected_loss(shape, reads(shape), self.data.available))
            if best in speeds:
                break
            block = self.d["block_size"] or shapes.context_of(best[1])
            speeds[best] = self.machine.tokens_per_second(
                model_config_of(f"{best[0]}x{best[1]}", self.data.vocabulary(), block), block
            )
            rate = speeds[best] * shapes.flops_per_token(best, self.data.vocabulary(), shapes.context_of(best[1]))
        size = shapes.parameters(best, self.data.vocabulary())
        why = (
            f"{size / 1e6:.1f}M parameters: for {reads(best) / 1e6:.2g}M tokens, at {speeds[best]:,.0f} tokens per"
            " second here"
        )
        return f"{best[0]}x{best[1]}", why

    def most_parameters(self) -> float:
        """Of a model whose weights, gradients and moments leave a process some memory for activations."""
        if self.machine.device.type == "cuda" and not torch.cuda.is_available():
            return math.inf  # planned for GPUs that are not here
        return STATE_SHARE * capacity(self.machine.device) * self.shards / BYTES_PER_PARAMETER

    def reads_given(self) -> float:
        """Tokens that the run reads by --max_steps or --num_train_epochs; 0 where its length follows from the time."""
        d = self.d
        if d.settled("max_steps") and d["max_steps"] > 0:
            return d["max_steps"] * (d["tokens_per_step"] or derive_data.step_for(d["max_steps"]))
        return d["num_train_epochs"] * self.data.available if d.settled("num_train_epochs") else 0.0

    def settle_sizes(self) -> None:
        """Window, step, micro-batch."""
        d = self.d
        if not d.settled("block_size"):
            config = self.config(1)
            wanted, context = shapes.context_of(config.hidden_size), context_of(config)
            limit = 2**30 if shapes.is_shape(d["model_config"]) else context or 2**30
            block = self.fitting_block(min(wanted, limit))
            why = (
                f"for {self.data.tokens:,} tokens of text"
                if block < min(wanted, limit)
                else "the model's context"
                if block == limit
                else "for its width"
            )
            d.decide("block_size", block, why)
        most = self.machine.micro_windows(d["block_size"])
        if not d.settled("tokens_per_step"):
            reads = self.reads_given() or min(self.seconds * self.speed(), self.data.most_epochs * self.data.available)
            unit = d["block_size"] * self.windows_unit()
            steps = d["max_steps"] if d.settled("max_steps") and d["max_steps"] > 0 else None
            wanted = derive_data.step_for(steps) if steps else shapes.tokens_per_step(reads)
            if steps:  # of a short text, no larger than what may be read again
                wanted = min(wanted, self.data.most_epochs * self.data.available / steps // unit * unit)
            step = max(unit, round(wanted / unit) * unit)
            while step > unit and self.data.available < 8 * step:
                step -= unit
            if decisions.given_accumulation(d) > 1:  # so many micro-batches, no larger than suits the device
                step = min(step, unit * (1 if d.settled("per_device_train_batch_size") else most))
            d.decide("tokens_per_step", step, f"for a run over {reads / 1e6:.2g}M tokens")
        if not d.settled("per_device_train_batch_size"):
            windows = d["tokens_per_step"] // (d["block_size"] * self.machine.processes) or 1
            micro = decisions.micro_batch(windows, decisions.given_accumulation(d), most)
            d.decide("per_device_train_batch_size", micro, "windows at once, which the step is a multiple of")

    def windows_unit(self) -> int:
        """Windows that a step is a multiple of, whatever its length: those of all processes in the micro-batches whose
        size and number were given.
        """
        micro = self.d["per_device_train_batch_size"] if self.d.settled("per_device_train_batch_size") else 1
        return self.machine.processes * micro * decisions.given_accumulation(self.d)

    def fitting_block(self, most: int) -> int:
        """Predictions per window, at most `most`: some hundred windows of the text and eight that are held out, where
        it is long enough, and one of each in any case; not below what tuning on instructions needs where a short text
        has some windows of that. A given step is a multiple of them, if a size of 32 or more divides it.
        """
        d, block = self.d, most
        least = decisions.TUNED_LENGTH if self.has_windows(decisions.TUNED_LENGTH, *TUNED_WINDOWS) else 32
        while block > least and not self.has_windows(block, *WINDOWS):
            block //= 2
        block = max(1, min(block, d["validation_tokens"] - 1, self.data.available - 1))
        if not d.settled("tokens_per_step"):
            return block
        halves = [block // 2**n for n in range(block.bit_length())]
        for size in (*halves, *range(block, 0, -1)):
            if size >= min(32, block) and d["tokens_per_step"] % (size * self.windows_unit()) == 0:
                return size
        return block

    def has_windows(self, block: int, train: int, held: int) -> bool:
        """Whether the text gives so many windows of `block` tokens to train on, and so many that are held out."""
        return self.data.available >= train * block and self.d["validation_tokens"] >= held * block + 1

    def speed(self) -> float:
        """Tokens per second of the chosen model, training alone."""
        return self.machine.tokens_per_second(self.config(), self.d["block_size"])
