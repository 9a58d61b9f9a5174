"""Prompt variants of a task: systematic changes of the prompt (sensitivity) and perturbed questions (robustness).

A variant is a task object over the same items in the same order, so answers are compared item by item. Options are
never perturbed; where their order changes, answers are compared by the original option. A variant depends on the item
and the seed only, never on the model.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import Refusal
from . import perturbations
from .tasks.definition import LETTERS, EvalTask, examples_are_items, gold_index, make

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

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
    """Question, options and right option of a task's items in one form; `lettered` where the prompt lists the options
    by letter. Raises Refusal for tasks without one question with options.
    """

    def __init__(self, task):
        self.task = task
        first_item = task.eval_docs[0]
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            raise Refusal(
                f"--tasks {task.config.task} is not asked as one question with options, so its prompt cannot be varied."
            )
        if task.multiple_target or callable(task.config.process_results):
            raise Refusal(
                f"--tasks {task.config.task} has several right options, or a function of its own that scores them: its"
                " prompt cannot be varied."
            )
        self.lettered = list(task.doc_to_choice(first_item)) == LETTERS
        self.field = next((name for name in OPTIONS if isinstance(first_item.get(name), list)), None)
        if self.lettered and (self.field is None or "question" not in first_item):
            raise Refusal(
                f"--tasks {task.config.task} asks for letters, and its items have no `question` with `choices`: its"
                " prompt cannot be varied."
            )
        prompt = PromptFormat().prompt(self.question(first_item), self.options(first_item), self.lettered)
        if prompt != task.doc_to_text(first_item):
            raise Refusal(
                f"--tasks {task.config.task} lists its options in a prompt that is not written as MMLU's (`question`, a"
                " line `A. ` for each option, `Answer:`): it cannot be varied."
            )

    def question(self, item: dict) -> str:
        """The question text of an item."""
        return item["question"].strip() if self.lettered else self.task.doc_to_text(item)

    def options(self, item: dict) -> list[str]:
        """The option texts of an item, in their original order."""
        return list(item[self.field]) if self.lettered else list(self.task.doc_to_choice(item))

    def key(self, item: dict) -> str:
        """Text that identifies an item: its question and options."""
        return f"{self.question(item)}|{'|'.join(self.options(item))}"

    def gold(self, item: dict) -> int:
        """Index of an item's right option. Raises Refusal for an item that has none."""
        target = self.task.doc_to_target(item)
        index = gold_index(target, list(self.task.doc_to_choice(item)))
        if index is None:
            raise Refusal(
                f"--tasks {self.task.config.task}: the right answer {target!r} of an item is none of its options: its"
                " prompt cannot be varied."
            )
        return index


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a prompt is written; the defaults write the original task's prompt.

    question: `question(text, key)` rewrites the question text, key identifies the item. order: `order(number of
    options, key)` gives the indices of the options in their new order (None: unchanged). enumerators, separator,
    ending and labels: of options that are in the prompt (`lettered`). casing: applied to the whole prompt.
    """

    question: Callable[[str, str], str] = lambda text, key: text
    order: Callable[[int, str], list[int]] | None = None
    description: str = ""
    enumerators: tuple[str, ...] = ("A. ", "B. ", "C. ", "D. ")
    labels: tuple[str, ...] = ("A", "B", "C", "D")
    separator: str = "\n"
    ending: str = "Answer:"
    casing: Callable[[str], str] = str

    def prompt(self, question: str, options: list[str], lettered: bool) -> str:
        """The prompt of a question, with its options, in their order, where they are listed by letter."""
        if lettered:
            lines = [f"{self.enumerators[row]}{option}{self.separator}" for row, option in enumerate(options)]
            question = f"{question}{self.separator}{''.join(lines)}{self.ending}"
        return self.casing(question)


def derive(
    task: "ConfigurableTask", name: str, prompt_format: PromptFormat, n_shot: int | None = None
) -> "ConfigurableTask":
    """An lm-eval task over the items of `task` with another prompt; `n_shot` None keeps the number of examples.

    With `PromptFormat()` it has exactly the prompts of `task`. Raises Refusal for a task that has no variants.
    """
    source = _VariantTask(task)

    def option_order(item: dict) -> list[int]:
        num_options = len(source.options(item))
        return prompt_format.order(num_options, source.key(item)) if prompt_format.order else list(range(num_options))

    def text(item: dict) -> str:
        question, options = prompt_format.question(source.question(item), source.key(item)), source.options(item)
        return prompt_format.prompt(question, [options[index] for index in option_order(item)], source.lettered)

    def choices(item: dict) -> list[str]:
        options = source.options(item)
        if source.lettered:
            return list(prompt_format.labels[: len(options)])
        return [options[index] for index in option_order(item)]

    config = task.config
    derived = make(
        name,
        list(task.eval_docs),
        "multiple_choice",
        task.VERSION,
        doc_to_text=text,
        doc_to_choice=choices,
        doc_to_target=lambda item: option_order(item).index(source.gold(item)),
        target_delimiter=config.target_delimiter,
        fewshot_delimiter=config.fewshot_delimiter,
        gen_prefix=config.gen_prefix,
        metric_list=config.metric_list,
        description=prompt_format.casing((config.description or "") + prompt_format.description),
        num_fewshot=config.num_fewshot if n_shot is None else n_shot,
        **_fewshot_fields(task),
    )
    derived.option_order = option_order  # item -> index of the original's option for each of its options
    return derived


def _fewshot_fields(task) -> dict:
    """Config fields with the few-shot examples of `task`: the other items, or the examples that it has set aside."""
    if examples_are_items(task) or (examples := task.fewshot_docs()) is None:
        return {"fewshot_split": "test"}
    return {"fewshot_config": {"sampler": task.fewshot_cfg.sampler, "samples": list(examples)}}


def _most_examples(task) -> int:
    """Few-shot examples that an item of `task` can have; of its own items, one is the item itself."""
    if examples_are_items(task) or (examples := task.fewshot_docs()) is None:
        return len(task.eval_docs) - 1
    return len(list(examples))


def _shuffled(seed: int) -> Callable[[int, str], list[int]]:
    return lambda num_options, key: random.Random(_hash("order", seed, key)).sample(range(num_options), num_options)


def _variant(
    base: EvalTask, factor: str, label: str, n_shot: int | None = None, chat: bool | None = None, **format_fields
) -> EvalTask:
    """The variant `label` of a task, which changes `factor`; `format_fields`: of its PromptFormat."""
    prompt_format = PromptFormat(**format_fields)
    leaves = {
        leaf: derive(task, f"{leaf}|{factor}: {label}", prompt_format, n_shot) for leaf, task in base.leaves.items()
    }
    leaves = {task.config.task: task for task in leaves.values()}
    num_examples = base.n_shot if n_shot is None else n_shot
    name = f"{base.name}|{factor}: {label}"
    chat = base.chat if chat is None else chat
    return EvalTask(name, leaves, num_examples, base.name, label, factor, chat, base.own)


def sensitivity(base: EvalTask, seed: int, chat: bool) -> list[EvalTask]:
    """Variants of a task that each change one factor of the prompt; the first is the task itself. chat: the models have
    a chat format.

    A task with generated answers gets paraphrased instructions instead. Raises Refusal where the prompt cannot be
    varied.
    """
    first = next(iter(base.leaves.values()))
    if first.OUTPUT_TYPE == "generate_until":
        changes = [("paraphrase", label, change) for label, change in PARAPHRASES.items()]
        return _reworded(base, [("reference", "as it is", str), *changes])
    variants = [_variant(base, "reference", "as it is")]
    for label, text in DESCRIPTIONS.items():
        variants.append(_variant(base, "description", label, description=text))
    variants += [
        _variant(base, "casing", "upper case", casing=str.upper),
        _variant(base, "casing", "lower case", casing=str.lower),
    ]
    if _VariantTask(first).lettered:
        variants.append(_variant(base, "enumerators", "(A)", enumerators=("(A) ", "(B) ", "(C) ", "(D) ")))
        variants.append(
            _variant(base, "enumerators", "1.", enumerators=("1. ", "2. ", "3. ", "4. "), labels=("1", "2", "3", "4"))
        )
        variants.append(_variant(base, "separators", "double line", separator="\n\n"))
        variants.append(_variant(base, "separators", "blanks", separator=" "))
        variants.append(_variant(base, "ending", "The answer is", ending="The answer is"))
    else:
        variants.append(
            _variant(
                base, "descriptor", "Question: ... Answer:", question=lambda text, key: f"Question: {text}\nAnswer:"
            )
        )
        variants.append(_variant(base, "descriptor", "Text: ...", question=lambda text, key: f"Text: {text}"))
    variants += [
        _variant(base, "option order", f"shuffled {offset}", order=_shuffled(seed + offset)) for offset in (1, 2)
    ]
    variants += [
        _variant(base, "examples", f"{count} examples", n_shot=count)
        for count in (1, 3)
        if count != base.n_shot and count <= min(map(_most_examples, base.leaves.values()))
    ]
    if chat:
        variants.append(_variant(base, "chat format", "off" if base.chat else "on", chat=not base.chat))
    return variants


def _reworded(base: EvalTask, changes: list[tuple[str, str, Callable[[str], str]]]) -> list[EvalTask]:
    """Variants of a task with generated answers, from (factor, label, function of the question). Raises Refusal."""
    variants = []
    for factor, label, change in changes:
        leaves = {}
        for leaf, task in base.leaves.items():
            if not hasattr(task, "reworded"):
                raise Refusal(
                    f"--tasks {task.config.task} is generated: its prompt cannot be varied. Those of --questions and of"
                    " embedded_instructions can."
                )
            name = f"{leaf}|{factor}: {label}"
            leaves[name] = task.reworded(name, change)
            leaves[name].set_config(key="num_fewshot", value=base.n_shot)
        name = f"{base.name}|{factor}: {label}"
        variants.append(EvalTask(name, leaves, base.n_shot, base.name, label, factor, base.chat, base.own))
    return variants


def robustness(
    base: EvalTask, seed: int, strengths: tuple[float, ...] = (0.1, 0.3), num_seeds: int = 2
) -> list[EvalTask]:
    """Variants of a task with perturbed questions, at several strengths and seeds, and with its options in another
    order; the first is the task itself. Raises Refusal where the prompt cannot be varied.
    """
    perturbed = [
        (operation, f"{strength:g}, seed {seed + offset}", _perturbation(operation, strength, seed + offset))
        for operation in perturbations.OPERATIONS
        for strength in ((1, 2) if operation == "distractor" else strengths)
        for offset in range(num_seeds)
    ]
    if next(iter(base.leaves.values())).OUTPUT_TYPE == "generate_until":
        changes = [(factor, label, _without_key(change)) for factor, label, change in perturbed]
        return _reworded(base, [("reference", "as it is", str), *changes])
    variants = [_variant(base, "reference", "as it is")]
    variants += [_variant(base, factor, label, question=change) for factor, label, change in perturbed]
    variants += [
        _variant(base, "option order", f"shuffled {offset}", order=_shuffled(seed + offset))
        for offset in range(num_seeds)
    ]
    if _VariantTask(next(iter(base.leaves.values()))).lettered:
        variants.append(
            _variant(base, "labels", "P Q R S", enumerators=("P. ", "Q. ", "R. ", "S. "), labels=("P", "Q", "R", "S"))
        )
    return variants


def _perturbation(operation: str, strength: float, seed: int) -> Callable[[str, str], str]:
    """A function of (question, key of its item) that perturbs the question."""
    return lambda text, key: perturbations.perturb(text, operation, strength, seed, key)


def _without_key(change: Callable[[str, str], str]) -> Callable[[str], str]:
    """The same for a question that is its own key."""
    return lambda text: change(text, text)
