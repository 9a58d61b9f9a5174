"""Instruction tuning: TRL's SFTTrainer with this project's checkpoints, and what it changed, measured before and after.

Rows lie side by side without padding and do not see each other, in bases that show on their own logits that they can;
else they are padded. Only answers are learnt, so only their positions go through the head.
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
from .trainer import VerifiedTraining

HEAD_TOLERANCE = 1e-3  # of the largest loss: TRL's kernel on a GPU multiplies in TF32 where that is allowed


# ---- the trainer ----


class TuningTrainer(VerifiedTraining, SFTTrainer):
    """SFTTrainer over rows that are encoded, packed and ordered already; `held` are the held-out rows, `batches` how
    rows go together.
    """

    def __init__(self, *args, held: list[Example], before: dict, base: dict, batches: Batches = Batches(), **kwargs):
        super().__init__(*args, **kwargs)
        self.held, self.before, self.base, self.batches = held, before, base, batches
        self.fused = self.args.device.type == "cuda" and self._head_fits()

    @torch.no_grad()
    def _head_fits(self) -> bool:
        """Whether TRL's fused head gives the losses that the model's logits give, tried on the probe; says so where it
        does not.
        """
        batch = {name: value.to(self.args.device) for name, value in self.probe[0].items()}
        try:
            with probe.evaluating(self.model):
                plain, ours = (
                    answer_losses(self.model, {**batch, "use_cache": False}, fused)[0] for fused in (False, True)
                )
            why = (
                None
                if probe.close(ours, plain, HEAD_TOLERANCE)
                else f"its loss would be {float(ours.mean()):.4f} where its logits give {float(plain.mean()):.4f}"
            )
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = formatting.shortened(error)
        if why:
            print_main(f"plain     TRL's fused head stays off for this model ({self.model.config.model_type}): {why}")
        return why is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the losses of all answer tokens over `num_items_in_batch` (their number in the step, on all ranks).

        On a GPU TRL's fused head gives them; on a CPU, where that is slower, the head is applied to answer positions
        only.
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
        return loss + self.router_aux_loss_coef * router / (
            self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        )  # as TRL's

    def held_out_metrics(self) -> dict[str, float]:
        """Mean loss over the held-out answer tokens, the end-of-text's own (not there where every held-out answer is
        cut), and the share of tokens that are the likeliest; ranks share the rows out.
        """
        model = self.accelerator.unwrap_model(self.model)
        mine = measure_losses(
            model,
            self.held[self.args.process_index :: WORLD_SIZE],
            self.args.device,
            self.args.per_device_eval_batch_size if self.batches.packs else 1,
            self.batches.longest,
        )
        sums = [math.fsum(row[key] for row in mine) for key in ("loss", "tokens", "end_loss", "ends", "top")]
        loss, tokens, end_loss, ends, top = self.sum_of_ranks(sums)
        return {
            "eval_loss": loss / tokens,
            **({"eval_end_loss": end_loss / ends} if ends else {}),
            "eval_mean_token_accuracy": top / tokens,
        }

    def log(self, logs: dict, start_time: float | None = None) -> None:
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
            config["target_modules"] = sorted(config["target_modules"])  # a set: in another order in every process
            write_json(folder / references.ADAPTER_CONFIG, config)
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
