"""Instruction tuning: TRL's SFTTrainer with this project's checkpoints, and metrics before and after.

Rows are packed without padding and do not attend to each other, in bases whose logits show that they support it; else
rows are padded. Only answers are labels, so only their positions go through the output layer.
"""

import math
from pathlib import Path

import torch
from trl import SFTTrainer

from .. import formatting
from ..chat_format.packing import Example
from ..distributed import WORLD_SIZE, print_main
from ..evaluation.before_after import BEFORE, answer_losses, measure_losses
from ..files import read_json, write_json
from ..kernels import probe
from ..models import references
from ..models.batches import Batches
from .lora import load_adapter
from .trainer import VerifiedTraining, untold

HEAD_TOLERANCE = 1e-3  # of the largest loss: TRL's kernel on a GPU multiplies in TF32 where that is allowed


# ---- the trainer ----


class TuningTrainer(VerifiedTraining, SFTTrainer):
    """SFTTrainer over rows that are already encoded, packed and ordered.

    held: held-out rows. before: metrics of the base. base: record of the base. batches: how rows are batched.
    """

    def __init__(
        self, *args, eval_rows: list[Example], before: dict, base: dict, batches: Batches = Batches(), **kwargs
    ):
        # the warning is about micro-batches of one row; these hold several, packed before
        with untold("trl.trainer.sft_trainer", "padding-free training"):
            super().__init__(*args, **kwargs)
        self.eval_rows, self.before, self.base, self.batches = eval_rows, before, base, batches
        self.fused = self.args.device.type == "cuda" and self._head_fits()

    @torch.no_grad()
    def _head_fits(self) -> bool:
        """Whether TRL's fused head gives the same losses as the model's logits on the probe; prints the reason if
        not.
        """
        batch = {name: value.to(self.args.device) for name, value in self.probe[0].items()}
        try:
            with probe.evaluating(self.model):
                expected, losses = (
                    answer_losses(self.model, {**batch, "use_cache": False}, fused)[0] for fused in (False, True)
                )
            reason = (
                None
                if probe.close(losses, expected, HEAD_TOLERANCE)
                else f"its loss would be {float(losses.mean()):.4f} where its logits give {float(expected.mean()):.4f}"
            )
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = formatting.shortened(error)
        if reason:
            print_main(
                f"plain     TRL's fused head stays off for this model ({self.model.config.model_type}): {reason}"
            )
        return reason is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the losses of all answer tokens divided by `num_items_in_batch` (their number in the step, on all
        ranks).

        On a GPU, TRL's fused head computes them; on a CPU, where that is slower, the head is applied to answer
        positions only.
        """
        auxiliary = {"output_router_logits": True} if self.aux_loss_enabled else {}
        losses, _, router = answer_losses(model, {**inputs, "use_cache": False, **auxiliary}, self.fused)
        if self.args.loss_type == "dft":
            losses = losses * (-losses).exp().detach()
        count = len(losses) if num_items_in_batch is None else num_items_in_batch
        scale = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1) * scale
        if not self.aux_loss_enabled:
            return loss
        # as TRL's
        return loss + self.router_aux_loss_coef * router / (
            self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        )

    def held_out_metrics(self) -> dict[str, float]:
        """Mean loss in nats over the held-out answer tokens and over end-of-text tokens (left out where every held-out
        answer is cut), and the fraction of tokens that are the most likely ones. Each rank evaluates its part of the
        rows.
        """
        model = self.accelerator.unwrap_model(self.model)
        row_losses = measure_losses(
            model,
            self.eval_rows[self.args.process_index :: WORLD_SIZE],
            self.args.device,
            self.args.per_device_eval_batch_size if self.batches.packs else 1,
            self.batches.max_tokens,
        )
        sums = [math.fsum(row[key] for row in row_losses) for key in ("loss", "tokens", "end_loss", "ends", "top")]
        loss, tokens, end_loss, ends, top = self.sum_of_ranks(sums)
        return {
            "eval_loss": loss / tokens,
            **({"eval_end_loss": end_loss / ends} if ends else {}),
            "eval_mean_token_accuracy": top / tokens,
        }

    def log(self, logs: dict, start_time: float | None = None) -> None:
        """Log with the number of tokens so far."""
        logs["num_tokens"] = self.tokens
        super().log(logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        model, folder = self.accelerator.unwrap_model(self.model), Path(output_dir)
        if hasattr(model, "peft_config"):
            model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's own card
            config = read_json(folder / references.ADAPTER_CONFIG)
            write_json(folder / references.ADAPTER_CONFIG, config)  # in the format of every record
        else:
            model.save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)
        write_json(folder / references.BASE_RECORD, self.base)
        write_json(folder / BEFORE, self.before)

    def _save_checkpoint(self, model, trial):
        VerifiedTraining._save_checkpoint(self, model, trial)  # TRL's would write a card first

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if hasattr(model, "peft_config"):
            load_adapter(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
