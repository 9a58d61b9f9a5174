"""Losses and answers on held-out rows before and after tuning, and how they differ."""

import dataclasses
import re
from typing import TYPE_CHECKING

import torch

from .. import formatting
from ..chat_format import template
from ..chat_format.packing import Example
from ..distributed import print_main
from ..errors import Refusal
from ..kernels import probe
from ..kernels.probe import context_of
from ..machine.precision import without_autocast
from ..models.batches import Batches, flatten_batch, group_rows
from . import statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BEFORE = "before.json"  # `measure_before` of the untuned model, stored in every checkpoint
TEMPERATURE, TOP_K = 0.7, 50  # of sampled answers
NO_END = "none: no held-out answer ends (all were cut)"  # in the place of a loss of the end-of-text
LOOP = re.compile(r"(.{4,80}?)\1{2,}\s*$", re.S)  # ends in a phrase that is repeated three times or more


# ---- measuring ----


def answer_losses(
    model: torch.nn.Module, inputs: dict, fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(losses in nats, whether the token was the most likely, router loss or None) of the answer tokens of a batch; the
    first two are of shape (answer tokens,), in order.

    inputs: a batch (rows, T) of TRL's collator, padding-free (one row) or padded, whose labels are -100 outside of
    answers. fused: use TRL's fused head, which SFTTrainer has put on the model.
    """
    labels = inputs.pop("labels")
    if fused:
        outputs = model(**inputs, labels=labels, fused_lm_head=True)
        keep = labels[:, 1:] != -100
        return -outputs.log_probs[keep], outputs.is_top1[keep], outputs.aux_loss
    if len(labels) == 1:
        keep = (labels[0, 1:] != -100).nonzero().flatten()
        targets = labels[0, keep + 1]
        outputs = model(**inputs, logits_to_keep=keep)
        logits = outputs.logits[0].float()
    else:
        keep = labels[:, 1:] != -100
        targets = labels[:, 1:][keep]
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1][keep].float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses, logits.argmax(-1) == targets, getattr(outputs, "aux_loss", None)


@torch.no_grad()
def measure_losses(
    model: torch.nn.Module,
    examples: list[Example],
    device: torch.device | str,
    batch: int = 8,
    max_tokens: int | None = None,
) -> list[dict]:
    """For each row {document, loss: sum over its answer tokens in nats, end_loss: of its end-of-text, tokens: answer
    tokens, top: how many were the most likely, ends: 1 if it has an end-of-text, else 0}.

    Rows lie side by side, at most `batch` rows and `max_tokens` tokens. `end_loss` is 0 where `ends` is 0: the answer
    is cut and has none.
    """
    model.eval()
    records = []
    for rows in group_rows(examples, batch, max_tokens):
        losses, top, _ = answer_losses(model, {**flatten_batch(rows, device), "use_cache": False})
        per_row = zip(
            losses.double().split([row.num_label_tokens for row in rows]),
            top.split([row.num_label_tokens for row in rows]),
            strict=True,
        )
        for row, (nats, likeliest) in zip(rows, per_row, strict=True):
            ends = 0 if row.cut else 1
            counts = {"tokens": row.num_label_tokens, "top": int(likeliest.sum()), "ends": ends}
            records.append(
                {
                    "document": row.row.document,
                    "loss": float(nats.sum()),
                    "end_loss": float(nats[-1]) if ends else 0.0,
                    **counts,
                }
            )
    return records


@torch.no_grad()
def answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    conversations: list[list[dict]],
    max_new_tokens: int,
    sample: bool,
    seed: int,
    batch: int = 16,
) -> list[dict]:
    """Generated answers to conversations: {answer, tokens, stopped, kept_format, loops} each, greedy or, with `sample`,
    sampled. The global random state does not change.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    records = []
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K} if sample else {"do_sample": False}
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        probe.without_router_loss(model),
        probe.plain_generation(model),
    ):
        torch.manual_seed(seed)
        for begin in range(0, len(conversations), batch):
            rows = [template.encode_prompt(tokenizer, messages) for messages in conversations[begin : begin + batch]]
            width = max(map(len, rows))
            input_ids = torch.tensor(
                [[tokenizer.pad_token_id] * (width - len(token_ids)) + token_ids for token_ids in rows], device=device
            )
            mask = torch.tensor(
                [[0] * (width - len(token_ids)) + [1] * len(token_ids) for token_ids in rows], device=device
            )
            room = (context_of(model.config) or 2**30) - width
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max(1, min(max_new_tokens, room)),
                use_cache=True,
                trust_remote_code=False,
                **sampling,
            )
            for token_ids in output[:, width:].tolist():
                end = token_ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in token_ids else None
                text = tokenizer.decode(token_ids[:end], skip_special_tokens=True)
                records.append(
                    {
                        "answer": text.strip(),
                        "tokens": len(token_ids) if end is None else end,
                        "stopped": end is not None,
                        "kept_format": template.kept_format(text),
                        "loops": end is None and bool(LOOP.search(text)),
                    }
                )
    model.train(training)
    return records


def check_prompts(prompts: list[str], tokenizer: "PreTrainedTokenizerBase", context: int, answer_tokens: int) -> None:
    """Raise Refusal for prompts that are empty, or that with their answer exceed the model's `context` (in tokens)."""
    if answer_tokens >= context:
        raise Refusal(
            f"--answer_tokens {answer_tokens}: the base has {context:,} positions, for prompt and answer together."
        )
    for prompt in prompts:
        num_tokens = len(template.encode_prompt(tokenizer, [{"role": "user", "content": prompt}]))
        if not prompt.strip() or num_tokens + answer_tokens > context:
            shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
            raise Refusal(
                f"--prompts {shown!r}: {num_tokens:,} tokens in the chat format, and with --answer_tokens"
                f" {answer_tokens} the base has {context:,} positions: shorten it, or lower --answer_tokens."
            )


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """Which answers `measure_answers` generates.

    prompts: further prompts to show the answers to (--prompts). num_shown: held-out rows whose answers are shown
    (--compared_prompts). num_sampled: held-out rows that are answered greedily and by sampling (--sampled_answers).
    max_new_tokens: --answer_tokens. seed: of sampling.
    """

    prompts: list[str]
    num_shown: int
    num_sampled: int
    max_new_tokens: int
    seed: int


def measure_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    eval_rows: list[Example],
    settings: AnswerSettings,
    batches: Batches = Batches(),
) -> dict:
    """What a model does with the held-out rows, as JSON: {rows: losses of each, shown: answers, greedy, sampled}."""
    prompts = [_prompt_of(example) for example in eval_rows]
    spread = _spread(prompts, settings.num_sampled)
    shown = _spread(prompts, settings.num_shown) + [[{"role": "user", "content": text}] for text in settings.prompts]

    def generate(conversations: list[list[dict]], sample: bool) -> list[dict]:
        size = batches.generation_batch_size
        return answers(model, tokenizer, conversations, settings.max_new_tokens, sample, settings.seed, size)

    shown_answers = generate(shown, False)
    return {
        "rows": measure_losses(
            model, eval_rows, next(model.parameters()).device, batches.loss_batch_size, batches.max_tokens
        ),
        "shown": [
            {"prompt": messages[-1]["content"], **answer} for messages, answer in zip(shown, shown_answers, strict=True)
        ],
        "greedy": generate(spread, False),
        "sampled": generate(spread, True),
    }


def _prompt_of(example: Example) -> list[dict]:
    """The messages of a row up to its first question: a system message if it begins with one, and the user's."""
    messages = [message for message in example.row.messages if message["role"] != "assistant"]
    return messages[:2] if messages[0]["role"] == "system" else messages[:1]


def _spread(prompts: list, count: int) -> list:
    """`count` of the prompts at equal distances."""
    return [prompts[index * len(prompts) // count] for index in range(count)]


def measure_before(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    eval_rows: list[Example],
    settings: AnswerSettings,
    batches: Batches = Batches(),
) -> dict:
    """`measure_answers` before the first step. It also proves that the measurement after the last step will work:
    raises Refusal where it fails.
    """
    try:
        return measure_answers(model, tokenizer, eval_rows, settings, batches)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise Refusal(
            f"this base ({model.config.model_type}) cannot compute a loss or generate answers in this tuning setup, so"
            f" nothing is trained: {formatting.shortened(error)}. Give other --target_modules, or another base."
        ) from None


def measure_after(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    eval_rows: list[Example],
    settings: AnswerSettings,
    batches: Batches = Batches(),
) -> dict | None:
    """`measure_answers` after the last step, in float32 as before the first; None, with a warning, where it fails,
    since the tuned weights exist already.
    """
    try:
        with without_autocast(model):
            return measure_answers(model, tokenizer, eval_rows, settings, batches)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        print_main(
            f"WARNING   what tuning changed could not be measured ({type(error).__name__}:"
            f" {formatting.shortened(error)}); the tuned weights are there"
        )
        return None


def compare(before: dict, after: dict) -> dict:
    """The content of `before_after.json`: losses of held-out answers (nats per token) with the paired 95 % interval of
    their difference, and how generated answers end.

    Each loss is a mean over the rows that have such tokens; `end_of_text_loss` is None where every held-out answer is
    cut.
    """
    pairs = list(zip(before["rows"], after["rows"], strict=True))

    def losses(key: str, counts: str) -> dict | None:
        having = [(a, b) for a, b in pairs if a[counts]]
        if not having:
            return None
        weights, documents = [a[counts] for a, _ in having], [a["document"] for a, _ in having]
        difference = statistics.ratio([b[key] - a[key] for a, b in having], weights, documents)
        means = [sum(row[key] for row in rows) / sum(weights) for rows in zip(*having, strict=True)]
        return {"before": means[0], "after": means[1], "difference": difference}

    def summarize_answers(record: dict, decoding: str) -> dict:
        rows = record[decoding]
        return {
            "answers": len(rows),
            **{share: sum(row[share] for row in rows) / len(rows) for share in ("stopped", "kept_format", "loops")},
            "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        }

    documents = [a["document"] for a in before["rows"]]
    return {
        "held_out": {"rows": len(pairs), "documents": len({a["document"] for a, _ in pairs})},
        "answer_loss": losses("loss", "tokens"),
        "end_of_text_loss": losses("end_loss", "ends"),
        **{
            decoding: {
                "before": summarize_answers(before, decoding),
                "after": summarize_answers(after, decoding),
                "difference": answer_differences(before[decoding], after[decoding], documents),
            }
            for decoding in ("greedy", "sampled")
            if before[decoding]
        },
        "shown": [
            {"prompt": a["prompt"], "before": a, "after": b}
            for a, b in zip(before["shown"], after["shown"], strict=True)
        ],
    }


def answer_differences(before: list[dict], after: list[dict], documents: list[str]) -> dict[str, dict]:
    """{measure: paired difference} of generated answers to the same prompts, in clusters of one document. documents: of
    all held-out rows, of which the prompts are an even choice.
    """
    clusters = _spread(documents, len(before))
    differences = {
        share: statistics.difference([a[share] for a in before], [b[share] for b in after], clusters, share=True)
        for share in ("stopped", "kept_format", "loops")
    }
    tokens = ([answer["tokens"] for answer in answers] for answers in (before, after))
    return differences | {"mean_tokens": statistics.difference(*tokens, clusters)}


def table(record: dict) -> str:
    """`before_after.json` as a table for the terminal."""
    lines = [f"{'':40}{'before':>9}{'after':>9}"]
    for name, key in (
        ("loss of held-out answers (nats)", "answer_loss"),
        ("loss of the end-of-text (nats)", "end_of_text_loss"),
    ):
        losses = record[key]
        if losses is None:
            lines.append(f"{name:40}{NO_END}")
            continue
        difference = losses["difference"]
        interval = (
            "no interval" if difference["low"] is None else f"{difference['low']:+.3f} to {difference['high']:+.3f}"
        )
        lines.append(
            f"{name:40}{losses['before']:9.3f}{losses['after']:9.3f}   {difference['value']:+.3f} ({interval},"
            f" {difference['clusters']} documents)"
        )
    for decoding in ("greedy", "sampled"):
        for name, key in (
            ("stop by themselves", "stopped"),
            ("keep the format", "kept_format"),
            ("end in a loop", "loops"),
        ):
            if decoding in record:
                before, after = (record[decoding][when] for when in ("before", "after"))
                line = f"{f'{decoding} answers that {name}':40}{before[key]:9.0%}{after[key]:9.0%}"
                if change := record[decoding].get("difference", {}).get(key):  # records of earlier versions have none
                    ends = [f"{change[end]:+.2f}" for end in ("low", "high") if change[end] is not None]
                    line += f"   {change['value']:+.2f} ({' to '.join(ends) or 'no interval'})"
                lines.append(line)
        if decoding in record:
            before, after = (record[decoding][when]["mean_tokens"] for when in ("before", "after"))
            lines.append(f"{f'tokens of {decoding} answers':40}{before:9.1f}{after:9.1f}")
    return "\n".join(lines)
