"""Instruction tuning: TRL's SFTTrainer with this project's checkpoints, and what it changed, measured before and after.

Rows lie side by side without padding and do not see each other, in bases that show on their own logits that they can; else they are padded. Only answers are learnt, so only their positions go
through the head.
"""

import dataclasses
import json
import math
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import SFTTrainer

from . import models, prompts, scores
from .arguments import Refusal
from .instructions import Example
from .plan import context_of
from .runs import WORLD_SIZE, read_json, say, write_json
from .training import VerifiedTraining

BEFORE = "before.json"  # what the untuned model did, carried in every checkpoint
HEAD_TOLERANCE = 1e-3  # of the largest loss: TRL's kernel on a GPU multiplies in TF32 where that is allowed
MIXED = 1e-4  # of the largest logit: clean bases differ by 1.1e-6 at most, those whose rows see each other by 2.7e-3 at least (measured, 20 kinds)
TEMPERATURE, TOP_K = 0.7, 50  # of sampled answers
LOOP = re.compile(r"(.{4,80}?)\1{2,}\s*$", re.S)  # ends in something said three times in a row


# ---- the model ----


def add_adapter(model: PreTrainedModel, adapter, base: str, revision: str | None = None):
    """The model with a fresh LoRA adapter (`peft.PeftModel`) that names its base. Raises Refusal for targets that match no linear module."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and module is not head]
    targets = "all-linear" if adapter.target_modules == ["all-linear"] else list(adapter.target_modules)
    unmatched = [t for t in adapter.target_modules if t != "all-linear" and not any(n == t or n.endswith(f".{t}") for n in linear)]
    if unmatched:
        there = ", ".join(sorted({name.split(".")[-1] for name in linear}))
        raise Refusal(f"--target_modules {' '.join(unmatched)}: no linear module of {base} has that name. There are {there} (or all-linear).")
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        tuned = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Refusal(
            f"LoRA cannot be put on {base} ({model.config.model_type}) like this: {models.shortened(error)} Choose other --target_modules (there are "
            f"{', '.join(sorted({name.split('.')[-1] for name in linear}))}), --lora_dropout 0, or tune all weights with --no_use_lora."
        ) from None
    config.base_model_name_or_path, config.revision = base, revision
    return tuned


def merge(base: models.Located, adapter: Path, tokenizer, dtype: str, folder: Path) -> None:
    """Base and adapter as one model in `folder`, its weights in `dtype`; added in float32. Raises Refusal for a base that the adapter was not made for."""
    tuned = models.Located(str(adapter), adapter)
    models.check_base(tuned, base)
    model = models.load_model(base)
    models.mend_ids(model, tokenizer)
    merged = models.attach(model, tuned).merge_and_unload()
    merged.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Batches:
    """How rows of a base go together: side by side in one row without seeing each other, and padded on the left for answers."""

    packs: bool = True
    pads: bool = True

    @property
    def measured(self) -> int:
        """Rows of a batch whose losses are measured, laid side by side."""
        return 8 if self.packs else 1

    @property
    def answered(self) -> int:
        return 16 if self.pads else 1


@torch.no_grad()
def batches_of(model) -> Batches:
    """How rows go together in a base, by its own logits, in float32: a row's behind another one, and behind padding, against its own alone."""
    first, second = models.probe_ids(model)
    places = torch.arange(len(first), device=first.device)
    filled = torch.ones(len(first) + 8, dtype=torch.long, device=first.device)
    filled[:8] = 0
    ways = {
        "packs": {"input_ids": torch.cat([first, second])[None], "position_ids": torch.cat([places, places])[None]},
        "pads": {"input_ids": torch.cat([first[:8], second])[None], "attention_mask": filled[None]},
    }
    found = {}
    with models.evaluating(model):
        alone = model(input_ids=second[None], use_cache=False).logits
        for name, inputs in ways.items():
            try:
                found[name] = models.close(model(**inputs, use_cache=False).logits[:, -len(second) :], alone, MIXED)
            except (TypeError, ValueError, RuntimeError):
                found[name] = False
    return Batches(**found)


# ---- the trainer ----


class TuningTrainer(VerifiedTraining, SFTTrainer):
    """SFTTrainer over rows that are encoded, packed and ordered already; `held` are the held-out rows, `batches` how rows go together."""

    def __init__(self, *args, held: list[Example], before: dict, base: dict, batches: Batches = Batches(), **kwargs):
        super().__init__(*args, **kwargs)
        self.held, self.before, self.base, self.batches = held, before, base, batches
        self.fused = self.args.device.type == "cuda" and self._head_fits()

    @torch.no_grad()
    def _head_fits(self) -> bool:
        """Whether TRL's fused head gives the losses that the model's logits give, tried on the probe; says so where it does not."""
        batch = {name: value.to(self.args.device) for name, value in self.probe[0].items()}
        try:
            with models.evaluating(self.model):
                plain, ours = (answer_losses(self.model, {**batch, "use_cache": False}, fused)[0] for fused in (False, True))
            why = (
                None
                if models.close(ours, plain, HEAD_TOLERANCE)
                else f"its loss would be {float(ours.mean()):.4f} where its logits give {float(plain.mean()):.4f}"
            )
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = models.shortened(error)
        if why:
            say(f"plain     TRL's fused head stays off for this model ({self.model.config.model_type}): {why}")
        return why is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of the losses of all answer tokens over `num_items_in_batch` (their number in the step, on all ranks).

        On a GPU TRL's fused head gives them; on a CPU, where that is slower, the head is applied to answer positions only.
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
        """Mean loss over the held-out answer tokens, the end-of-text's own, and the share of tokens that are the likeliest; ranks share the rows out."""
        model = self.accelerator.unwrap_model(self.model)
        mine = measure(
            model,
            self.held[self.args.process_index :: WORLD_SIZE],
            self.args.device,
            self.args.per_device_eval_batch_size if self.batches.packs else 1,
        )
        sums = [math.fsum(row[key] for row in mine) for key in ("loss", "tokens", "end_loss", "ends", "top")]
        loss, tokens, end_loss, ends, top = self.sum_of_ranks(sums)
        return {"eval_loss": loss / tokens, "eval_end_loss": end_loss / max(ends, 1), "eval_mean_token_accuracy": top / tokens}

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
            config = read_json(folder / models.ADAPTER_CONFIG)
            config["target_modules"] = sorted(config["target_modules"])  # a set: in another order in every process
            write_json(folder / models.ADAPTER_CONFIG, config)
        else:
            model.save_pretrained(output_dir, state_dict=state_dict)
        self.processing_class.save_pretrained(output_dir)
        write_json(folder / models.BASE_RECORD, self.base)
        write_json(folder / BEFORE, self.before)

    def _save_checkpoint(self, model, trial):
        VerifiedTraining._save_checkpoint(self, model, trial)  # TRL's would write a card first

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        if hasattr(model, "peft_config"):
            load_adapter(model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def load_adapter(model, folder: Path) -> None:
    """Load a checkpoint's adapter weights. Raises Refusal where one is missing, unknown or of another shape."""
    models.check_adapter(model, f"in {folder}", folder)
    set_peft_model_state_dict(model, load_file(folder / models.ADAPTER_FILE))


# ---- measuring ----


def answer_losses(model, inputs: dict, fused: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(loss, whether it was the likeliest) of each answer token of a batch (rows, T), in order, nats; and the router's loss, where it is asked for.

    `inputs` is a batch of TRL's collator, padding-free (one row) or padded, whose labels are -100 but for answers. `fused`: by TRL's fused head,
    which SFTTrainer has put on the model.
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
def measure(model, examples: list[Example], device, batch: int = 8) -> list[dict]:
    """For each row: its document, the summed loss of its answer tokens, their number, the end-of-text's loss, and how many were the likeliest."""
    model.eval()
    found = []
    for begin in range(0, len(examples), batch):
        rows = examples[begin : begin + batch]
        losses, top, _ = answer_losses(model, {**side_by_side(rows, device), "use_cache": False})
        parts = zip(losses.double().split([row.learnt for row in rows]), top.split([row.learnt for row in rows]), strict=True)
        for row, (nats, likeliest) in zip(rows, parts, strict=True):
            ends = 0 if row.cut else 1
            counts = {"tokens": row.learnt, "top": int(likeliest.sum()), "ends": ends}
            found.append({"document": row.row.document, "loss": float(nats.sum()), "end_loss": float(nats[-1]) * ends, **counts})
    return found


def side_by_side(rows: list[Example], device) -> dict:
    """Rows as one flat batch (1, T), each with positions of its own, so that none sees another."""
    columns = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "position_ids": [place for row in rows for place in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values], device=device) for name, values in columns.items()}


@torch.no_grad()
def answers(model, tokenizer, asked: list[list[dict]], longest: int, sample: bool, seed: int, batch: int = 16) -> list[dict]:
    """Answers to conversations: {answer, tokens, stopped, kept_format, loops}. The random state is left as it was."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found = []
    how = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K} if sample else {"do_sample": False}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), models.without_router_loss(model):
        torch.manual_seed(seed)
        for begin in range(0, len(asked), batch):
            rows = [prompts.encode_prompt(tokenizer, messages) for messages in asked[begin : begin + batch]]
            width = max(map(len, rows))
            ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
            room = (context_of(model.config) or 2**30) - width
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(1, min(longest, room)), use_cache=True, trust_remote_code=False, **how
            )
            for row in output[:, width:].tolist():
                end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                found.append(
                    {
                        "answer": text.strip(),
                        "tokens": len(row) if end is None else end,
                        "stopped": end is not None,
                        "kept_format": prompts.kept_format(text),
                        "loops": end is None and bool(LOOP.search(text)),
                    }
                )
    model.train(training)
    return found


def check_prompts(asked: list[str], tokenizer, context: int, answer_tokens: int) -> None:
    """Raise Refusal for further prompts that are empty, or that with their answer are longer than the model's `context`."""
    if answer_tokens >= context:
        raise Refusal(f"--answer_tokens {answer_tokens}: the base has {context:,} positions, for prompt and answer together.")
    for text in asked:
        count = len(prompts.encode_prompt(tokenizer, [{"role": "user", "content": text}]))
        if not text.strip() or count + answer_tokens > context:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise Refusal(
                f"--prompts {shown!r}: {count:,} tokens in the chat format, and with --answer_tokens {answer_tokens} the base has {context:,} positions."
            )


def behaviour(
    model, tokenizer, held: list[Example], further: list[str], shown: int, sampled: int, longest: int, seed: int, batches: Batches = Batches()
) -> dict:
    """What a model does with the held-out rows: the losses of each, `shown` answers, and `sampled` greedy and sampled ones. JSON."""
    asked = [[m for m in example.row.messages if m["role"] != "assistant"][:2] for example in held]
    asked = [messages if messages[0]["role"] == "system" else messages[:1] for messages in asked]
    spread = [asked[i * len(asked) // sampled] for i in range(sampled)]
    fixed = [asked[i * len(asked) // shown] for i in range(shown)] + [[{"role": "user", "content": text}] for text in further]
    greedy = answers(model, tokenizer, fixed, longest, False, seed, batches.answered)
    return {
        "rows": measure(model, held, next(model.parameters()).device, batches.measured),
        "shown": [{"prompt": messages[-1]["content"], **answer} for messages, answer in zip(fixed, greedy, strict=True)],
        "greedy": answers(model, tokenizer, spread, longest, False, seed, batches.answered),
        "sampled": answers(model, tokenizer, spread, longest, True, seed, batches.answered),
    }


def first_behaviour(model, *asked) -> dict:
    """`behaviour` before the first step, which is its trial, too: what cannot be done at the end is refused now. Raises Refusal."""
    try:
        return behaviour(model, *asked)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise Refusal(
            f"this base ({model.config.model_type}) cannot be measured or answer as it is to be tuned, so nothing is trained: {models.shortened(error)}. Give "
            "other --target_modules, or another base."
        ) from None


def last_behaviour(model, *asked) -> dict | None:
    """`behaviour` after the last step; None, which is said, where it fails: the tuned weights are there already."""
    try:
        return behaviour(model, *asked)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        say(f"WARNING   what tuning changed could not be measured ({type(error).__name__}: {models.shortened(error)}); the tuned weights are there")
        return None


def compare(before: dict, after: dict) -> dict:
    """`before_after.json`: losses of held-out answers with the paired 95 % interval of their difference, and how answers end."""
    pairs = list(zip(before["rows"], after["rows"], strict=True))
    documents = [row["document"] for row, _ in pairs]

    def losses(key: str, counts: str) -> dict:
        weights = [row[counts] for row, _ in pairs]
        total = max(sum(weights), 1)
        difference = scores.ratio([b[key] - a[key] for a, b in pairs], weights, documents)
        return {"before": sum(a[key] for a, _ in pairs) / total, "after": sum(b[key] for _, b in pairs) / total, "difference": difference}

    def endings(record: dict, how: str) -> dict:
        rows = record[how]
        return {
            "answers": len(rows),
            **{share: sum(row[share] for row in rows) / len(rows) for share in ("stopped", "kept_format", "loops")},
            "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        }

    return {
        "held_out": {"rows": len(pairs), "documents": len(set(documents))},
        "answer_loss": losses("loss", "tokens"),
        "end_of_text_loss": losses("end_loss", "ends"),
        **{how: {"before": endings(before, how), "after": endings(after, how)} for how in ("greedy", "sampled") if before[how]},
        "shown": [{"prompt": a["prompt"], "before": a, "after": b} for a, b in zip(before["shown"], after["shown"], strict=True)],
    }


def table(record: dict) -> str:
    """`before_after.json` as a person reads it in a terminal."""
    lines = [f"{'':40}{'before':>9}{'after':>9}"]
    for name, key in (("loss of held-out answers (nats)", "answer_loss"), ("loss of the end-of-text (nats)", "end_of_text_loss")):
        found = record[key]
        change = found["difference"]
        interval = "no interval" if change["low"] is None else f"{change['low']:+.3f} to {change['high']:+.3f}"
        lines.append(f"{name:40}{found['before']:9.3f}{found['after']:9.3f}   {change['value']:+.3f} ({interval}, {change['clusters']} documents)")
    for how in ("greedy", "sampled"):
        for name, key in (("stop by themselves", "stopped"), ("keep the format", "kept_format"), ("end in a loop", "loops")):
            if how in record:
                before, after = (record[how][when] for when in ("before", "after"))
                lines.append(f"{f'{how} answers that {name}':40}{before[key]:9.0%}{after[key]:9.0%}")
        if how in record:
            before, after = (record[how][when]["mean_tokens"] for when in ("before", "after"))
            lines.append(f"{f'tokens of {how} answers':40}{before:9.1f}{after:9.1f}")
    return "\n".join(lines)


def order(count: int, steps: int, per_step: int, seed: int, start: int = 0) -> list[int]:
    """Which row each position of the run reads: every epoch is a permutation of its own, cut to whole steps.

    From step `start` on the order begins again: a run resumed without its data position.
    """
    from .windows import permuted

    epoch = count // per_step * per_step
    places = (position - start * per_step if position >= start * per_step else 0 for position in range(steps * per_step))
    return [permuted(place % epoch, epoch, seed + place // epoch) for place in places]


def lora_record(adapter) -> dict:
    """The adapter's settings, as a run's identity keeps them."""
    return json.loads(json.dumps({name: value for name, value in vars(adapter).items() if name not in ("merge_adapter",)}))
