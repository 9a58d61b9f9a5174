"""What tuning changes: losses and sampled answers on held-out rows, before and after."""

import re

import torch

from .. import formatting
from ..chat_format import template
from ..chat_format.packing import Example
from ..distributed import print_main
from ..errors import Refusal
from ..kernels import probe
from ..models.batches import Batches, flatten_batch, groups
from ..models.presets import context_of
from . import statistics

BEFORE = "before.json"  # what the untuned model did, carried in every checkpoint

TEMPERATURE, TOP_K = 0.7, 50  # of sampled answers

NO_END = "none: no held-out answer ends (all were cut)"  # in the place of a loss of the end-of-text

LOOP = re.compile(r"(.{4,80}?)\1{2,}\s*$", re.S)  # ends in something said three times in a row


# ---- measuring ----


def answer_losses(model, inputs: dict, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss, whether it was the likeliest) of each answer token of a batch (rows, T), in order, nats; and the router's
    loss, where it is asked for.

    `inputs` is a batch of TRL's collator, padding-free (one row) or padded, whose labels are -100 but for answers.
    `fused`: by TRL's fused head, which SFTTrainer has put on the model.
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
def measure_losses(model, examples: list[Example], device, batch: int = 8, longest: int | None = None) -> list[dict]:
    """For each row: its document, the summed loss of its answer tokens, their number, how many were the likeliest, and
    the end-of-text's loss (`end_loss`, 0 where `ends` is 0: the answer is cut and has none). Rows lie side by side,
    `batch` of them and `longest` tokens at most.
    """
    model.eval()
    found = []
    for rows in groups(examples, batch, longest):
        losses, top, _ = answer_losses(model, {**flatten_batch(rows, device), "use_cache": False})
        parts = zip(
            losses.double().split([row.num_label_tokens for row in rows]),
            top.split([row.num_label_tokens for row in rows]),
            strict=True,
        )
        for row, (nats, likeliest) in zip(rows, parts, strict=True):
            ends = 0 if row.cut else 1
            counts = {"tokens": row.num_label_tokens, "top": int(likeliest.sum()), "ends": ends}
            found.append(
                {
                    "document": row.row.document,
                    "loss": float(nats.sum()),
                    "end_loss": float(nats[-1]) if ends else 0.0,
                    **counts,
                }
            )
    return found


@torch.no_grad()
def answers(
    model, tokenizer, asked: list[list[dict]], longest: int, sample: bool, seed: int, batch: int = 16
) -> list[dict]:
    """Answers to conversations: {answer, tokens, stopped, kept_format, loops}. The random state is left as it was."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = []
    how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K} if sample else {"do_sample": False}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), probe.without_router_loss(model):
        torch.manual_seed(seed)
        for begin in range(0, len(asked), batch):
            rows = [template.encode_prompt(tokenizer, messages) for messages in asked[begin : begin + batch]]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            room = (context_of(model.config) or 2**30) - width
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(1, min(longest, room)),
                use_cache=True,
                trust_remote_code=False,
                **how,
            )
            for row in output[:, width:].tolist():
                end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                found.append(
                    {
                        "answer": text.strip(),
                        "tokens": len(row) if end is None else end,
                        "stopped": end is not None,
                        "kept_format": template.kept_format(text),
                        "loops": end is None and bool(LOOP.search(text)),
                    }
                )
    model.train(training)
    return found


def check_prompts(asked: list[str], tokenizer, context: int, answer_tokens: int) -> None:
    """Raise Refusal for further prompts that are empty, or that with their answer are longer than the model's
    `context`.
    """
    if answer_tokens >= context:
        raise Refusal(
            f"--answer_tokens {answer_tokens}: the base has {context:,} positions, for prompt and answer together."
        )
    for text in asked:
        count = len(template.encode_prompt(tokenizer, [{"role": "user", "content": text}]))
        if not text.strip() or count + answer_tokens > context:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise Refusal(
                f"--prompts {shown!r}: {count:,} tokens in the chat format, and with --answer_tokens {answer_tokens}"
                f" the base has {context:,} positions."
            )


def measure_answers(
    model,
    tokenizer,
    held: list[Example],
    further: list[str],
    shown: int,
    sampled: int,
    longest: int,
    seed: int,
    batches: Batches = Batches(),
) -> dict:
    """What a model does with the held-out rows: the losses of each, `shown` answers, and `sampled` greedy and sampled
    ones. JSON.
    """
    asked = [[m for m in example.row.messages if m["role"] != "assistant"][:2] for example in held]
    asked = [messages if messages[0]["role"] == "system" else messages[:1] for messages in asked]
    spread = [asked[i * len(asked) // sampled] for i in range(sampled)]
    fixed = [asked[i * len(asked) // shown] for i in range(shown)] + [
        [{"role": "user", "content": text}] for text in further
    ]
    greedy = answers(model, tokenizer, fixed, longest, False, seed, batches.answered)
    return {
        "rows": measure_losses(model, held, next(model.parameters()).device, batches.measured, batches.longest),
        "shown": [
            {"prompt": messages[-1]["content"], **answer} for messages, answer in zip(fixed, greedy, strict=True)
        ],
        "greedy": answers(model, tokenizer, spread, longest, False, seed, batches.answered),
        "sampled": answers(model, tokenizer, spread, longest, True, seed, batches.answered),
    }


def measure_before(model, *asked) -> dict:
    """`measure_answers` before the first step, which is its trial, too: what cannot be done at the end is refused now.
    Raises Refusal.
    """
    try:
        return measure_answers(model, *asked)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise Refusal(
            f"this base ({model.config.model_type}) cannot be measured or answer as it is to be tuned, so nothing is"
            f" trained: {formatting.shortened(error)}. Give other --target_modules, or another base."
        ) from None


def measure_after(model, *asked) -> dict | None:
    """`measure_answers` after the last step; None, which is said, where it fails: the tuned weights are there
    already.
    """
    try:
        return measure_answers(model, *asked)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        print_main(
            f"WARNING   what tuning changed could not be measured ({type(error).__name__}:"
            f" {formatting.shortened(error)}); the tuned weights are there"
        )
        return None


def compare(before: dict, after: dict) -> dict:
    """`before_after.json`: losses of held-out answers with the paired 95 % interval of their difference, and how
    answers end.

    A loss is over the rows that have what it is of; `end_of_text_loss` is None where every held-out answer is cut.
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

    def endings(record: dict, how: str) -> dict:
        rows = record[how]
        return {
            "answers": len(rows),
            **{share: sum(row[share] for row in rows) / len(rows) for share in ("stopped", "kept_format", "loops")},
            "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        }

    return {
        "held_out": {"rows": len(pairs), "documents": len({a["document"] for a, _ in pairs})},
        "answer_loss": losses("loss", "tokens"),
        "end_of_text_loss": losses("end_loss", "ends"),
        **{
            how: {"before": endings(before, how), "after": endings(after, how)}
            for how in ("greedy", "sampled")
            if before[how]
        },
        "shown": [
            {"prompt": a["prompt"], "before": a, "after": b}
            for a, b in zip(before["shown"], after["shown"], strict=True)
        ],
    }


def table(record: dict) -> str:
    """`before_after.json` as a person reads it in a terminal."""
    lines = [f"{'':40}{'before':>9}{'after':>9}"]
    for name, key in (
        ("loss of held-out answers (nats)", "answer_loss"),
        ("loss of the end-of-text (nats)", "end_of_text_loss"),
    ):
        found = record[key]
        if found is None:
            lines.append(f"{name:40}{NO_END}")
            continue
        change = found["difference"]
        interval = "no interval" if change["low"] is None else f"{change['low']:+.3f} to {change['high']:+.3f}"
        lines.append(
            f"{name:40}{found['before']:9.3f}{found['after']:9.3f}   {change['value']:+.3f} ({interval},"
            f" {change['clusters']} documents)"
        )
    for how in ("greedy", "sampled"):
        for name, key in (
            ("stop by themselves", "stopped"),
            ("keep the format", "kept_format"),
            ("end in a loop", "loops"),
        ):
            if how in record:
                before, after = (record[how][when] for when in ("before", "after"))
                lines.append(f"{f'{how} answers that {name}':40}{before[key]:9.0%}{after[key]:9.0%}")
        if how in record:
            before, after = (record[how][when]["mean_tokens"] for when in ("before", "after"))
            lines.append(f"{f'tokens of {how} answers':40}{before:9.1f}{after:9.1f}")
    return "\n".join(lines)
