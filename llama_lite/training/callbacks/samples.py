"""Sampled continuations at each evaluation."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

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
from ...files import read_jsonl
from ...kernels.probe import context_of

# default prompts
MOST_WINDOWS = 200  # whose documents they are of
LEAST_WORDS, MOST_WORDS = 4, 6
FEW_TOKENS = 6
MARKS = re.compile(r"^[\W_]+|[\W_]+$")  # around a word


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


def first_samples(run: Path) -> list[str]:
    """What a run wrote at its first evaluation; nothing where there was none."""
    return next((entry["samples"] for entry in read_jsonl(run / "log.jsonl") if entry.get("samples")), [])


def beginnings(
    windows: Sequence, tokenizer: PreTrainedTokenizerBase, samples: Sequence[str] = (), count: int = 3
) -> list[str]:
    """The beginnings of some held-out documents, as prompts: the first in `windows` that are words; where these are
    fewer than `count`, as in languages without blanks, also the first FEW_TOKENS tokens of any document.

    windows: TokenWindows of the validation split, in the order in which they are measured. samples: what the run wrote
    at its first evaluation. If that continues what earlier versions prompted with, beginnings of any kind, and not
    these, those stay.
    """
    words, any_kind = [], []
    for index in range(min(len(windows), MOST_WINDOWS)):
        ids = np.asarray(windows[index])
        for start in np.flatnonzero(ids == tokenizer.eos_token_id) + 1:
            if start + FEW_TOKENS <= len(ids):
                any_kind.append(tokenizer.decode(ids[start : start + FEW_TOKENS]).strip())
            ends = np.flatnonzero(ids[start:] == tokenizer.eos_token_id)
            end = min([start + len(ids) // 4, *(start + ends[:1])])
            words.append(_first_words(tokenizer.decode(ids[start:end], skip_special_tokens=True)))
        words, any_kind = ([text for text in dict.fromkeys(texts) if text] for texts in (words, any_kind))
        if len(words) >= count:
            break
    any_kind = any_kind[:count] or [tokenizer.decode(np.asarray(windows[0])[:FEW_TOKENS])]
    prompts = list(dict.fromkeys([*words, *any_kind]))[:count]
    if samples and _continue(samples, any_kind) and not _continue(samples, prompts):
        return any_kind
    return prompts


def _continue(samples: Sequence[str], prompts: Sequence[str]) -> bool:
    """Whether each sample begins with its prompt."""
    return all(sample.strip().startswith(prompt) for sample, prompt in zip(samples, prompts, strict=False))


def _first_words(text: str) -> str:
    """The first MOST_WORDS whole words of a text; empty where fewer than LEAST_WORDS of them are made of letters."""
    pieces = re.findall(r"\S+\s+", text)[:MOST_WORDS]
    words = [word for piece in pieces if (word := MARKS.sub("", piece))]
    lettered = sum(all(unicodedata.category(character)[0] in "LM" for character in word) for word in words)
    return "".join(pieces).strip() if lettered >= LEAST_WORDS else ""
