"""Rows as token ids with labels on answers only: encoded, limited in length, packed into sequences."""

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..data.formats import Skipped
from ..errors import Refusal
from . import template
from .conversation import Row
from .rendering import NotRendered

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# ---- ids ----


@dataclasses.dataclass(frozen=True)
class Example:
    """A Row as ids and labels, -100 where no loss is computed. `cut`: its last answer was too long and has no
    end-of-text.
    """

    row: Row
    input_ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def num_label_tokens(self) -> int:
        """Number of tokens with a label."""
        return sum(label != -100 for label in self.labels)


# by kind of what `limit` does with a row of more tokens than allowed: how it is told
LONG_ROWS = {
    "dropped": "longer than {max_length} tokens: dropped",
    "dropped without an answer": "no answer within {max_length} tokens: dropped",
    "answer cut": "longer than {max_length} tokens: answer cut, no end-of-text",
    "turns cut": "longer than {max_length} tokens: later turns cut",
}


@dataclasses.dataclass(frozen=True)
class LongRows:
    """A reason in `skipped`: what was done with rows of more than `max_length` tokens (`kind`: of LONG_ROWS). Its text
    is made where it is shown or recorded (`str`).
    """

    kind: str
    max_length: int

    def __str__(self) -> str:
        return LONG_ROWS[self.kind].format(max_length=self.max_length)


def encode(rows: list[Row], tokenizer: "PreTrainedTokenizerBase", skipped: dict) -> list[Example]:
    """Examples of any length; `skipped` counts the rows that hold the text of a special token, or that the chat
    template refuses.
    """
    examples, counts = [], Skipped()
    for row in tqdm(rows, desc="encoding rows", unit="row", disable=None):
        messages = list(row.messages)
        if special := template.special_text(tokenizer, messages):
            counts.add(f"contains the text {special}", row.name)
            continue
        try:
            encoded = template.encode(tokenizer, messages, row.learn_from, row.untrained)
        except NotRendered as error:
            counts.add(str(error).partition(". ")[0], row.name)
            continue
        examples.append(Example(row, encoded.input_ids, encoded.labels))
    skipped.update(counts.reasons)
    return examples


def limit(examples: list[Example], max_length: int, long_rows: str, skipped: dict) -> list[Example]:
    """Examples of at most `max_length` ids. long_rows: `drop` or `truncate` longer ones, which are counted in
    `skipped`.
    """
    kept, counts = [], Skipped()
    for example in examples:
        if len(example.input_ids) <= max_length:
            kept.append(example)
        elif long_rows == "drop":
            counts.add(LongRows("dropped", max_length), example.row.name)
        elif all(label == -100 for label in example.labels[:max_length]):
            counts.add(LongRows("dropped without an answer", max_length), example.row.name)
        else:
            # Inside an answer, or between two turns.
            cut = example.labels[max_length - 1] != -100 and example.labels[max_length] != -100
            counts.add(LongRows("answer cut" if cut else "turns cut", max_length), example.row.name)
            kept.append(Example(example.row, example.input_ids[:max_length], example.labels[:max_length], cut))
    skipped.update(counts.reasons)
    return kept


def need_rows(
    train_rows: list[Example],
    eval_rows: list[Example],
    min_eval_rows: int,
    skipped: dict,
    documents: int | None = None,
    needed_by: str = "",
    at_context: bool = False,
) -> None:
    """Raise Refusal when no row is left to train on, or fewer than `min_eval_rows` rows are held out.

    documents: number of documents in all rows, once some are held out. needed_by: the argument that asks for
    `min_eval_rows`. at_context: whether --max_length is the base's context, so that it cannot be raised.
    """
    why = "; ".join(f"{entry['rows']:,} {reason}" for reason, entry in skipped.items()) or "none were skipped"
    fixes = _fixes_of_long_rows(skipped, at_context)
    if not train_rows and eval_rows and documents:
        count = "one document" if documents == 1 else f"{documents:,} documents"
        further = ["add rows with other questions"] if documents == 1 else ["lower --eval_rows", "add more rows"]
        raise Refusal(
            f"no row is left to train on ({why}): all {len(eval_rows):,} rows are held out. They form {count} (rows"
            f" with the same first question), and documents are held out whole: {_either([*fixes, *further])}."
        )
    if not train_rows:
        raise Refusal(f"no row is left to train on ({why}): {_either(fixes or ['add more rows'])}.")
    if len(eval_rows) < max(min_eval_rows, 1):
        fixes = [*([f"lower --{needed_by}"] if needed_by else []), *fixes, "raise --eval_rows", "add more rows"]
        raise Refusal(
            f"{len(eval_rows)} rows are held out and {max(min_eval_rows, 1)} are needed"
            f"{f' for --{needed_by} {min_eval_rows}' if needed_by else ''} ({why}): {_either(fixes)}."
        )


def _fixes_of_long_rows(skipped: dict, at_context: bool) -> list[str]:
    """What keeps the rows that were dropped because they are longer than --max_length; nothing where none were."""
    kinds = {reason.kind for reason in skipped if isinstance(reason, LongRows)}
    fixes = ["choose --long_rows truncate"] if "dropped" in kinds else []
    if not kinds & {"dropped", "dropped without an answer"}:
        return []
    if at_context:
        return [*fixes, "shorten the rows", "tune a base with a longer context (--max_length is all of this one's)"]
    return ["raise --max_length", *fixes]


def _either(fixes: list[str]) -> str:
    """Ways out as text: `one, two, or three`."""
    return ", or ".join(filter(None, (", ".join(fixes[:-1]), fixes[-1])))


def fingerprint(examples: list[Example]) -> str:
    """sha256 over ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input_ids, example.labels]).encode())
    return digest.hexdigest()


def pack(examples: list[Example], max_length: int, packing: bool) -> "Dataset":
    """A dataset with the columns input_ids and labels. With `packing`, whole rows share sequences of at most
    `max_length` ids (TRL's best fit decreasing), with the column seq_lengths.
    """
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from trl import pack_dataset

    disable_progress_bar()
    data = Dataset.from_dict(
        {name: [getattr(example, name) for example in examples] for name in ("input_ids", "labels")}
    )
    return pack_dataset(data, max_length, "bfd") if packing else data


def count_packs(lengths: list[int], max_length: int) -> int:
    """The number of sequences that `pack` makes of rows of so many ids, none of them longer than `max_length`."""
    rows = [Example(None, [0] * length, [0] * length) for length in lengths]
    return len(pack(rows, max_length, True))


def show(tokenizer: "PreTrainedTokenizerBase", example: Example, color: bool) -> str:
    """An example as text; what is trained on is in color, or between »« where `color` is false."""
    on, off = ("\x1b[1;32m", "\x1b[0m") if color else ("»", "«")
    text, ids, labelled = "", [], False
    for token, label in [*zip(example.input_ids, example.labels, strict=True), (None, None)]:
        if token is None or (label != -100) != labelled:
            piece = tokenizer.decode(ids)
            text += f"{on}{piece}{off}" if labelled and piece else piece
            ids, labelled = [], label != -100
        ids.append(token)
    return text
