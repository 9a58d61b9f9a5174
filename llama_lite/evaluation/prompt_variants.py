"""The same task asked otherwise: systematic variants of the prompt (sensitivity), and disturbed questions (robustness).

A variant is a task object over the same items, in the same order, so that answers are compared item by item. Options
are never disturbed; where their order changes, answers are compared by the option that was meant. What a variant does
to an item depends on the item and the seed alone, never on the model.
"""

import hashlib
import random
from collections.abc import Callable

from ..errors import Refusal
from . import perturbations
from .tasks import embedded
from .tasks.definition import LETTERS, EvalTask, make

DESCRIPTIONS = {
    "knowledge": "The following are questions with their answers.\n\n",
    "instruction": "Choose the right continuation of the text below.\n\n",
    "expert": "You are an expert. Read carefully and answer.\n\n",
}

OPTIONS = ("choices", "options", "endings")  # fields of an item that hold the texts behind its letters

PARAPHRASES: dict[str, Callable[[str], str]] = {
    "please": lambda text: f"Please answer: {text}",
    "question": lambda text: f"I have a question. {text}",
    "short": lambda text: f"{text}\n\nAnswer in one sentence.",
    "lower case": str.lower,
    "expert": lambda text: f"You are an expert. {text}",
    "no final mark": lambda text: text.rstrip("?. "),
}


def _hash(*parts) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


class _VariantTask:
    """A task's items in one form: question text, option texts, and which is right; `lettered` where the options are in
    the prompt.
    """

    def __init__(self, task):
        self.task = task
        first = task.eval_docs[0]
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            raise Refusal(
                f"--tasks {task.config.task} is not asked as one question with options, so its prompt cannot be varied."
            )
        self.lettered = list(task.doc_to_choice(first)) == LETTERS
        self.field = next((name for name in OPTIONS if isinstance(first.get(name), list)), None)
        if self.lettered and (self.field is None or "question" not in first):
            raise Refusal(
                f"--tasks {task.config.task} asks for letters, and its items have no `question` with `choices`: its"
                " prompt cannot be varied."
            )

    def question(self, item) -> str:
        return item["question"].strip() if self.lettered else self.task.doc_to_text(item)

    def options(self, item) -> list[str]:
        return list(item[self.field]) if self.lettered else list(self.task.doc_to_choice(item))

    def gold(self, item) -> int:
        target = self.task.doc_to_target(item)
        choices = list(self.task.doc_to_choice(item))
        return target if isinstance(target, int) else int(target) if str(target).isdigit() else choices.index(target)


def derive(
    task,
    name: str,
    *,
    question: Callable[[str, str], str] = lambda text, key: text,
    order: Callable[[int, str], list[int]] | None = None,
    description: str = "",
    enumerators: tuple[str, ...] = ("A. ", "B. ", "C. ", "D. "),
    labels: tuple[str, ...] = ("A", "B", "C", "D"),
    separator: str = "\n",
    ending: str = "Answer:",
    casing: Callable[[str], str] = str,
    n_shot: int | None = None,
):
    """A task over `task`'s items with another prompt. `question(text, key)` and `order(number of options, key)` are
    given the item's key.

    Without any of these it asks what `task` asks, bit for bit.
    """
    asked = _VariantTask(task)

    def key(item) -> str:
        return f"{asked.question(item)}|{'|'.join(asked.options(item))}"

    def placed(item) -> list[int]:
        count = len(asked.options(item))
        return order(count, key(item)) if order else list(range(count))

    def text(item) -> str:
        told = question(asked.question(item), key(item))
        if asked.lettered:
            told += (
                separator
                + "".join(f"{enumerators[at]}{asked.options(item)[i]}{separator}" for at, i in enumerate(placed(item)))
                + ending
            )
        return casing(told)

    def choices(item) -> list[str]:
        return (
            list(labels[: len(asked.options(item))])
            if asked.lettered
            else [asked.options(item)[i] for i in placed(item)]
        )

    config, examples = task.config, {"fewshot_split": "test"}
    if task.fewshot_cfg.split != config.test_split and (there := task.fewshot_docs()) is not None:
        examples = {"fewshot_config": {"sampler": task.fewshot_cfg.sampler, "samples": list(there)}}
    derived = make(
        name,
        list(task.eval_docs),
        "multiple_choice",
        task.VERSION,
        doc_to_text=text,
        doc_to_choice=choices,
        doc_to_target=lambda item: placed(item).index(asked.gold(item)),
        target_delimiter=config.target_delimiter,
        fewshot_delimiter=config.fewshot_delimiter,
        metric_list=config.metric_list,
        description=casing((config.description or "") + description),
        num_fewshot=config.num_fewshot if n_shot is None else n_shot,
        **examples,
    )
    derived.meant = placed  # which option of the original each answer means
    return derived


def _shuffled(seed: int) -> Callable[[int, str], list[int]]:
    return lambda count, key: random.Random(_hash("order", seed, key)).sample(range(count), count)


def _variant(
    base: EvalTask, factor: str, label: str, n_shot: int | None = None, chat: bool | None = None, **how
) -> EvalTask:
    leaves = {
        leaf: derive(task, f"{leaf}|{factor}: {label}", n_shot=n_shot, **how) for leaf, task in base.leaves.items()
    }
    leaves = {task.config.task: task for task in leaves.values()}
    shots = base.n_shot if n_shot is None else n_shot
    name = f"{base.name}|{factor}: {label}"
    return EvalTask(name, leaves, shots, base.name, label, factor, base.chat if chat is None else chat)


def sensitivity(base: EvalTask, seed: int, chat: bool) -> list[EvalTask]:
    """The task asked in systematic variants, each changing one factor; the first is the task itself. `chat`: the models
    have a chat format.

    A task of instructions is asked in paraphrases instead.
    """
    first = next(iter(base.leaves.values()))
    if first.OUTPUT_TYPE == "generate_until":
        return _paraphrases(base, first)
    found = [_variant(base, "reference", "as it is")]
    for label, text in DESCRIPTIONS.items():
        found.append(_variant(base, "description", label, description=text))
    found += [
        _variant(base, "casing", "upper case", casing=str.upper),
        _variant(base, "casing", "lower case", casing=str.lower),
    ]
    if _VariantTask(first).lettered:
        found.append(_variant(base, "enumerators", "(A)", enumerators=("(A) ", "(B) ", "(C) ", "(D) ")))
        found.append(
            _variant(base, "enumerators", "1.", enumerators=("1. ", "2. ", "3. ", "4. "), labels=("1", "2", "3", "4"))
        )
        found.append(_variant(base, "separators", "double line", separator="\n\n"))
        found.append(_variant(base, "separators", "blanks", separator=" "))
        found.append(_variant(base, "ending", "The answer is", ending="The answer is"))
    else:
        found.append(
            _variant(
                base, "descriptor", "Question: ... Answer:", question=lambda text, key: f"Question: {text}\nAnswer:"
            )
        )
        found.append(_variant(base, "descriptor", "Text: ...", question=lambda text, key: f"Text: {text}"))
    found += [_variant(base, "option order", f"shuffled {turn}", order=_shuffled(seed + turn)) for turn in (1, 2)]
    found += [_variant(base, "examples", f"{count} examples", n_shot=count) for count in (1, 3) if count != base.n_shot]
    if chat:
        found.append(_variant(base, "chat format", "off" if base.chat else "on", chat=not base.chat))
    return found


def _paraphrases(base: EvalTask, task) -> list[EvalTask]:
    items, name = list(task.eval_docs), task.config.task
    if "question" not in items[0] or "answer" not in items[0]:
        raise Refusal(
            f"--tasks {name} is generated, and its items have no `question` and `answer`: its prompt cannot be varied."
        )
    found = []
    for label, wrap in {"as it is": str, **PARAPHRASES}.items():
        factor = "reference" if label == "as it is" else "paraphrase"
        leaf = f"{name}|{factor}: {label}"
        found.append(
            EvalTask(leaf, {leaf: embedded.instruction_task(leaf, items, wrap)}, 0, base.name, label, factor, base.chat)
        )
    return found


def robustness(base: EvalTask, seed: int, strengths: tuple[float, ...] = (0.1, 0.3), turns: int = 2) -> list[EvalTask]:
    """The task with disturbed questions, at several strengths and seeds, and with its options in another order; the
    first is the task itself.
    """
    found = [_variant(base, "reference", "as it is")]
    for operation in perturbations.OPERATIONS:
        for strength in (1, 2) if operation == "distractor" else strengths:
            for turn in range(turns):

                def disturbed(text, key, operation=operation, strength=strength, turn=turn):
                    return perturbations.perturb(text, operation, strength, seed + turn, key)

                found.append(_variant(base, operation, f"{strength:g}, seed {seed + turn}", question=disturbed))
    found += [_variant(base, "option order", f"shuffled {turn}", order=_shuffled(seed + turn)) for turn in range(turns)]
    if _VariantTask(next(iter(base.leaves.values()))).lettered:
        found.append(
            _variant(base, "labels", "P Q R S", enumerators=("P. ", "Q. ", "R. ", "S. "), labels=("P", "Q", "R", "S"))
        )
    return found
