"""Rows as token ids with labels on answers only: encoded, limited in length, packed into sequences."""

import dataclasses
import hashlib
import json

from tqdm import tqdm

from ..data.formats import Skipped
from ..errors import Refusal
from . import template
from .conversation import Row
from .rendering import NotRendered

# ---- ids ----


@dataclasses.dataclass(frozen=True)
class Example:
    """A Row as ids and labels, -100 where nothing is learnt. `cut`: its last answer was too long and has no end."""

    row: Row
    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def learnt(self) -> int:
        return sum(label != -100 for label in self.labels)


def encode(found: list[Row], tokenizer, skipped: dict) -> list[Example]:
    """Examples of any length; `skipped` counts the rows that hold the text of a special token, or that the chat
    template refuses.
    """
    examples, counts = [], Skipped()
    for row in tqdm(found, desc="encoding rows", unit="row", disable=None):
        messages = list(row.messages)
        if special := template.special_text(tokenizer, messages):
            counts.add(f"contains the text {special}", row.name)
            continue
        try:
            encoded = template.encode(tokenizer, messages, row.learn_from, row.unlearnt)
        except NotRendered as error:
            counts.add(str(error).partition(". ")[0], row.name)
            continue
        examples.append(Example(row, encoded.input_ids, encoded.labels))
    skipped.update(counts.reasons)
    return examples


def limit(examples: list[Example], max_length: int, long_rows: str, skipped: dict) -> list[Example]:
    """Examples of at most `max_length` ids. `long_rows` says whether longer ones are dropped or truncated; `skipped`
    counts what went.
    """
    kept, counts = [], Skipped()
    for example in examples:
        if len(example.input_ids) <= max_length:
            kept.append(example)
        elif long_rows == "drop":
            counts.add(f"longer than {max_length} tokens: dropped", example.row.name)
        elif all(label == -100 for label in example.labels[:max_length]):
            counts.add(f"no answer within {max_length} tokens: dropped", example.row.name)
        else:
            # Inside an answer, or between two turns.
            cut = example.labels[max_length - 1] != -100 and example.labels[max_length] != -100
            what = "answer cut, no end-of-text" if cut else "later turns cut"
            counts.add(f"longer than {max_length} tokens: {what}", example.row.name)
            kept.append(Example(example.row, example.input_ids[:max_length], example.labels[:max_length], cut))
    skipped.update(counts.reasons)
    return kept


def need_rows(
    train_rows: list[Example], eval_rows: list[Example], least: int, skipped: dict, documents: int | None = None
) -> None:
    """Raise Refusal when nothing is left to learn from, or fewer than `least` held-out rows. `documents`: how many all
    rows make, once some are held out.
    """
    why = "; ".join(f"{entry['rows']:,} {reason}" for reason, entry in skipped.items()) or "none were skipped"
    if not train_rows and eval_rows and documents:
        count = "one document" if documents == 1 else f"{documents:,} documents"
        raise Refusal(
            f"no row is left to learn from ({why}): all {len(eval_rows):,} are held out, because they are {count} (rows"
            " whose first question is the same), and documents are held out whole."
            f" {'Bring rows with other questions' if documents == 1 else 'Lower --eval_rows, or bring more rows'}."
        )
    if not train_rows:
        long = (
            "raise --max_length, choose --long_rows truncate, " if any("tokens" in reason for reason in skipped) else ""
        )
        raise Refusal(f"no row is left to learn from ({why}): {long}lower --eval_rows, or bring more rows.")
    if len(eval_rows) < max(least, 1):
        raise Refusal(
            f"{len(eval_rows)} rows are held out and {max(least, 1)} are needed ({why}): raise --eval_rows, or bring"
            " more rows."
        )


def fingerprint(examples: list[Example]) -> str:
    """sha256 over ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def pack(examples: list[Example], max_length: int, packing: bool):
    """A `datasets.Dataset` of ids and labels; with `packing`, whole rows side by side up to `max_length` (TRL's best
    fit decreasing).
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    data = Dataset.from_dict(
        {name: [getattr(example, name) for example in examples] for name in ("input_ids", "labels")}
    )
    return pack_dataset(data, max_length, "bfd") if packing else data


def show(tokenizer, example: Example, colour: bool) -> str:
    """An example as text, what is learnt in colour, or between »« where there is none."""
    on, off = ("\x1b[1;32m", "\x1b[0m") if colour else ("»", "«")
    text, ids, labelled = "", [], False
    for token, label in [*zip(example.input_ids, example.labels, strict=True), (None, None)]:
        if token is None or (label != -100) != labelled:
            part = tokenizer.decode(ids)
            text += f"{on}{part}{off}" if labelled and part else part
            ids, labelled = [], label != -100
        ids.append(token)
    return text
