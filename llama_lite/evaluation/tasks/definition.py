"""What a task is: lm-eval task objects over our own items, by letters, by cloze, by bits per byte."""

import dataclasses
import hashlib

DOCUMENTS, DOCUMENT_CHARACTERS = 150, 1500  # of each kind of text

LETTERS = ["A", "B", "C", "D"]

CLUSTERS = (
    "source_id",
    "passage",
    "document",
)  # fields of an item that tell which items share a source, and so are not independent


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A task as it was asked for: one lm-eval task, or the leaves of a group, with the prompt's variant where it is
    one.

    `base` is the task of which it is a `variant`, `factor` what the variant changes. `chat`: the model's chat template
    is applied.
    """

    name: str
    leaves: dict
    n_shot: int
    base: str = ""
    variant: str = ""
    factor: str = ""
    chat: bool = False

    @property
    def version(self) -> str:
        return str(next(iter(self.leaves.values())).VERSION)

    @property
    def dataset(self) -> str | None:
        """The Hub's id of its data; None for embedded and local data."""
        path = next(iter(self.leaves.values())).DATASET_PATH
        return path if path and path.count("/") == 1 and not path.startswith((".", "/")) else None

    def items(self, leaf: str) -> list[dict]:
        """The documents of a leaf, in lm-eval's order."""
        return list(self.leaves[leaf].eval_docs)

    @property
    def unsafe(self) -> bool:
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.leaves.values())


def clusters_of(item: dict) -> str | None:
    """What an item shares with others that are not independent of it; None where it stands alone."""
    return next((f"{field} {item[field]}" for field in CLUSTERS if item.get(field) not in (None, "")), None)


# ---- making tasks ----


def make(name: str, items: list[dict], kind: str, version: float = 1.0, **config):
    """An lm-eval task over `items`. `config`: its ConfigurableTask fields, functions allowed."""
    from lm_eval.api.task import ConfigurableTask

    from ..lm import quiet

    settings = {
        "task": name,
        "output_type": kind,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": _Rows(items)},
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metadata": {"version": version},
        **config,
    }
    with quiet():
        return ConfigurableTask(config=settings)


class _Rows(list):
    """Items as lm-eval reads a split: a sequence with `features`."""

    @property
    def features(self) -> dict:
        return dict.fromkeys(self[0])


MEAN = {"aggregation": "mean", "higher_is_better": True}

ANSWERED = {
    "doc_to_target": "answer",
    "fewshot_split": "test",
}  # examples come from the items themselves, the one that is asked left out

ACCURACY = [{"metric": "acc", **MEAN}]

BITS = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]


def letters(name: str, items: list[dict], **config):
    """Multiple choice by letter, in MMLU's own format: items hold question, choices, answer (an index)."""

    def text(item):
        return (
            f"{item['question'].strip()}\n"
            + "".join(f"{LETTERS[i]}. {c}\n" for i, c in enumerate(item["choices"]))
            + "Answer:"
        )

    return make(
        name,
        items,
        "multiple_choice",
        doc_to_text=text,
        doc_to_choice=LETTERS,
        **ANSWERED,
        metric_list=ACCURACY,
        **config,
    )


def cloze(name: str, items: list[dict], ending: str = "", **config):
    """Multiple choice by the likelihood of each option's own text, after the question and `ending`."""
    metrics = [*ACCURACY, {"metric": "acc_norm", **MEAN}]

    def question(item):
        return item["question"] + ending

    return make(
        name,
        items,
        "multiple_choice",
        doc_to_text=question,
        doc_to_choice="choices",
        **ANSWERED,
        metric_list=metrics,
        **config,
    )


def bits_per_byte(name: str, texts: list[dict]):
    """Bits per byte of texts: items hold text and document."""
    return make(name, texts, "loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=BITS)


def sample_texts(texts: list[dict], seed: str) -> list[dict]:
    """DOCUMENTS of the texts, cut to DOCUMENT_CHARACTERS, chosen by a hash of their content."""
    cut = {item["text"][:DOCUMENT_CHARACTERS].rstrip(): item for item in texts}
    chosen = sorted(cut, key=lambda text: hashlib.sha256((seed + text).encode()).digest())[:DOCUMENTS]
    return [{**cut[text], "text": text} for text in chosen]
