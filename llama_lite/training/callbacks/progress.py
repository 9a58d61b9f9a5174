"""The progress bar and the lines of a run."""

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

OWN_METRICS = ("eval_loss", "eval_bits_per_byte", "eval_perplexity", "eval_end_loss", "eval_mean_token_accuracy")


def is_beside_loss(name: str, logs: dict) -> bool:
    """Whether a metric says of a validation set what its loss says, which is shown."""
    kinds = ("_perplexity", "_bits_per_byte")
    return any(name.endswith(kind) and f"{name.removesuffix(kind)}_loss" in logs for kind in kinds)


class Progress(TrainerCallback):
    """A progress bar on a terminal, and one plain line per log entry."""

    def __init__(self):
        self.bar = self.since = None  # since: (step, time) of the first step's end, which may compile layers

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Open the bar on the main process."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="training",
                disable=not sys.stderr.isatty(),
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.since = self.since or (state.global_step, time.monotonic())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        """Print losses, scores, throughput, time left and samples of a log entry."""
        if self.bar is None or not logs:
            return
        shown = [f"step {state.global_step}/{state.max_steps}"]
        names = {
            "loss": "loss {:.4f}",
            "grad_norm": "grad {:.2f}",
            "learning_rate": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tok/s",
        }
        names |= {"mfu": "mfu {:.1f}%", "eval_loss": "validation {:.4f}", "eval_bits_per_byte": "{:.4f} bits/byte"}
        shown += [text.format(logs[name]) for name, text in names.items() if name in logs]
        shown += [
            f"{name.removeprefix('eval_').removesuffix('_loss')} {value:.{4 if name.endswith('_loss') else 3}f}"
            for name, value in logs.items()
            if name.startswith("eval_") and name not in OWN_METRICS and not is_beside_loss(name, logs)
        ]
        first, began = self.since or (state.global_step, 0.0)
        if "loss" in logs and state.global_step > first:
            left = (time.monotonic() - began) / (state.global_step - first) * (state.max_steps - state.global_step)
            shown.append(f"{left / 60:.1f} min left" if left >= 90 else f"{left:.0f} s left")
        if len(shown) > 1:
            self.bar.write("  ".join(shown), file=sys.stdout)
        for sample in logs.get("samples", ()):
            self.bar.write(f"    {sample!r}", file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
