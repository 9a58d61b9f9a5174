"""The progress bar and the lines of a run."""

import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback

OWN_METRICS = ("eval_loss", "eval_bits_per_byte", "eval_perplexity", "eval_end_loss", "eval_mean_token_accuracy")


class Progress(TrainerCallback):
    """One bar on a terminal, one plain line a log entry elsewhere."""

    def __init__(self):
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                desc="training",
                disable=not sys.stderr.isatty(),
            )
            self.started, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
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
            f"{name.removeprefix('eval_')} {value:.3f}"
            for name, value in logs.items()
            if name.startswith("eval_") and name not in OWN_METRICS
        ]
        done = state.global_step - self.first
        if "loss" in logs and done:
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            shown.append(f"{left / 60:.1f} min left" if left >= 90 else f"{left:.0f} s left")
        if len(shown) > 1:
            self.bar.write("  ".join(shown), file=sys.stdout)
        for sample in logs.get("samples", ()):
            self.bar.write(f"    {sample!r}", file=sys.stdout)
        sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
