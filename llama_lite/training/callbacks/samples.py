"""Sampled continuations at each evaluation."""

from collections.abc import Sequence

import numpy as np
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ...errors import Refusal
from ...kernels.probe import context_of


class Samples(TrainerCallback):
    """Continuations of fixed prompts at each evaluation (top-k 50, temperature 1, as in the paper), in the log.

    The random state of the run does not change.
    """

    def __init__(
        self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int, seed: int
    ):
        self.trainer, self.tokenizer, self.prompts, self.tokens, self.seed = trainer, tokenizer, prompts, tokens, seed

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Generate a continuation of each prompt, at most `tokens` long, and log them."""
        import torch

        from ...kernels.probe import without_router_loss

        model = self.trainer.model
        devices = [args.device] if args.device.type == "cuda" else []
        training = model.training
        with torch.random.fork_rng(devices=devices), torch.no_grad(), without_router_loss(model):
            torch.manual_seed(self.seed + state.global_step)
            model.eval()
            texts = []
            for prompt in self.prompts:
                ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(args.device)
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=50,
                    temperature=1.0,
                    max_new_tokens=min(self.tokens, (context_of(model.config) or 2**30) - ids.shape[1]),
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.eos_token_id,
                    use_cache=True,
                    trust_remote_code=False,
                )
                texts.append(self.tokenizer.decode(output[0], skip_special_tokens=True))
            model.train(training)
        self.trainer.log({"samples": texts})


def check_prompts(prompts: list[str], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raise Refusal for prompts without tokens, and for prompts that leave no position of the model's `context` (in
    tokens) for a continuation.
    """
    for prompt in prompts:
        count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not 0 < count < context:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
            raise Refusal(
                f"--sample_prompts {shown!r}: {count:,} tokens, but a prompt for this model must have 1 to"
                f" {context - 1:,}."
            )


def beginnings(windows: Sequence, tokenizer: PreTrainedTokenizerBase, count: int = 3, tokens: int = 6) -> list[str]:
    """The beginnings of some held-out documents, as prompts: the first that begin in `windows`.

    windows: TokenWindows of the validation split, in the order in which they are measured. count: number of
    prompts. tokens: length of each.
    """
    prompts = []
    for index in range(min(len(windows), 200)):
        ids = np.asarray(windows[index])
        for start in np.flatnonzero(ids == tokenizer.eos_token_id) + 1:
            text = tokenizer.decode(ids[start : start + tokens]).strip()
            if start + tokens <= len(ids) and text and text not in prompts:
                prompts.append(text)
        if len(prompts) >= count:
            return prompts[:count]
    return prompts or [tokenizer.decode(np.asarray(windows[0])[:tokens])]
