"""Ends training after a given step, in order."""

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Saves after `step`, makes the evaluation that is due there, and ends training (`--stop_after_step`)."""

    def __init__(self, trainer, step: int):
        self.trainer, self.step = trainer, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step and not self.trainer.stop_reason:
            self.trainer.stop_reason = f"--stop_after_step {self.step}"
