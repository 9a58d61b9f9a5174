"""Evaluation tasks: lm-eval task objects over local items, scored by letters, by cloze, or by bits per byte."""

import dataclasses
import hashlib

DOCUMENTS, DOCUMENT_CHARACTERS = 150, 1500  # of each kind of text
LETTERS = ["A", "B", "C", "D"]

# fields of an item that tell which items share a source, and so are not independent
CLUSTERS = ("source_id", "passage", "document")


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """A requested task: one lm-eval task, or the leaves of a group.

    leaves: {name: lm-eval task}. base, variant, factor: of a prompt variant, its original task, its label, and what it
    changes. chat: the model's chat template is applied. own: the user can change its definition at any time.
    """

    name: str
    leaves: dict
    n_shot: int
    base: str = ""
    variant: str = ""
    factor: str = ""
    chat: bool = False
    own: bool = False

    @property
    def version(self) -> str:
        """lm-eval's version of the task."""
        return str(next(iter(self.leaves.values())).VERSION)

    @property
    def dataset(self) -> str | None:
        """The Hub id of its data set; None for embedded and local data."""
        path = next(iter(self.leaves.values())).DATASET_PATH
        return path if path and path.count("/") == 1 and not path.startswith((".", "/")) else None

    def items(self, leaf: str) -> list[dict]:
        """The documents of a leaf, in lm-eval's order."""
        return list(self.leaves[leaf].eval_docs)

    @property
    def is_text(self) -> bool:
        """Whether whole texts are scored."""
        return any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in self.leaves.values())

    @property
    def generates(self) -> bool:
        """Whether answers are generated."""
        return any(task.OUTPUT_TYPE == "generate_until" for task in self.leaves.values())

    @property
    def counts_right_options(self) -> bool:
        """Whether several options of an item can be right, as far as lm-eval's task says."""
        return any(
            task.OUTPUT_TYPE == "multiple_choice"
            and (callable(task.config.process_results) or getattr(task, "multiple_target", 0))
            for task in self.leaves.values()
        )

    @property
    def unsafe(self) -> bool:
        """Whether it runs generated code."""
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.leaves.values())


def clusters_of(item: dict) -> str | None:
    """The cluster of items that an item belongs to because they share a source; None for an independent item."""
    return next((f"{field} {item[field]}" for field in CLUSTERS if item.get(field) not in (None, "")), None)


def gold_index(target: object, options: list[str]) -> int | None:
    """The index of the right option, from what lm-eval calls the target of an item: an index or the option's text. None
    where it is neither, or several are right.
    """
    if isinstance(target, bool) or not isinstance(target, int | str):
        return None
    if target in options:
        return options.index(target)
    return int(target) if str(target).isdigit() and int(target) < len(options) else None


def examples_are_items(task) -> bool:
    """Whether the few-shot examples of a task are its items: of their split, or where it has no other split."""
    config, drawn_from = task.config, task.fewshot_cfg.split
    evaluated = config.test_split or config.validation_split
    if drawn_from is None and not task.fewshot_cfg.samples:
        drawn_from = config.training_split or config.validation_split or evaluated
    return drawn_from == evaluated


# ---- making tasks ----


def make(name: str, items: list[dict], kind: str, version: float = 1.0, **config):
    """An lm-eval ConfigurableTask over `items`. kind: its output_type. config: further fields of its config, functions
    allowed.
    """
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

# few-shot examples come from the items, without the current one
ANSWERED = {"doc_to_target": "answer", "fewshot_split": "test"}
ACCURACY = [{"metric": "acc", **MEAN}]
BITS = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]


def letters(name: str, items: list[dict], **config):
    """Multiple choice by letter, in MMLU's own format: items hold question, choices, answer (an index)."""

    def text(item: dict) -> str:
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

    def question(item: dict) -> str:
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
    """DOCUMENTS of the texts, each cut to DOCUMENT_CHARACTERS, chosen by a hash of `seed` and their content; none that
    is blank up to there.
    """
    cut = {item["text"][:DOCUMENT_CHARACTERS].rstrip(): item for item in texts}
    cut.pop("", None)
    chosen = sorted(cut, key=lambda text: hashlib.sha256((seed + text).encode()).digest())[:DOCUMENTS]
    return [{**cut[text], "text": text} for text in chosen]
