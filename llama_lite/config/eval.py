"""Arguments of `run_eval.py`: models, tasks, prompts and output."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Literal

from ..errors import Problems, Refusal
from ..paths import ROOT, beside_run
from .common import arg
from .parser import Parser


@dataclasses.dataclass
class ModelsArguments:
    """What is evaluated."""

    _argument_group_name = "Models"

    models: list[str] = arg(
        ["runs/demo@step-*", "runs/demo+runs/demo-sft"],
        "References: the folder of a run, FOLDER@step-N (a checkpoint), owner/name, owner/name@revision, ...@step-*"
        " (every step), each with +ADAPTER (a folder or owner/name@revision) for a tuned one.",
    )
    tokenizer_name: str | None = arg(None, "Tokenizer of models that have none: gpt2, a folder or a Hub id.")
    dtype: Literal["float32", "bfloat16"] = arg(
        "float32", "Number format of the weights; log-probabilities are float32 either way."
    )
    cpu_threads: int | None = arg(None, "Threads to compute with on a CPU (default: all cores).")


@dataclasses.dataclass
class TasksArguments:
    """What they are evaluated on."""

    _argument_group_name = "Tasks"

    tasks: list[str] = arg(
        [
            "embedded_mmlu",
            "embedded_mmlu_cloze",
            "embedded_next_sentence",
            "embedded_docs",
            "embedded_code",
            "embedded_web",
            "embedded_science",
        ],
        "Tasks and groups of lm-eval (hellaswag, mmlu, arc_easy, arc_challenge, piqa, winogrande, openbookqa, boolq,"
        " truthfulqa_mc2 ...) and the embedded ones, which need no network: embedded_mmlu, embedded_mmlu_cloze,"
        " embedded_next_sentence, embedded_docs, embedded_code, embedded_web, embedded_science, embedded_instructions,"
        " embedded_humaneval.",
    )
    task_data: list[str] = arg(
        [],
        "TASK=FOLDER: a local copy of a built-in task's data (SPLIT.jsonl or SPLIT.parquet, what `save_to_disk` of a"
        " DatasetDict wrote, or a dataset's own layout).",
    )
    texts: list[str] = arg(
        [],
        "NAME=PATH or NAME=HUB_ID: more texts whose bits per byte are measured (parquet, jsonl, txt; a `text` column):"
        " the first 1,500 characters of 150 of their first 2,000 documents.",
    )
    questions: list[str] = arg(
        [],
        "NAME=PATH: your own questions as a task, a JSONL file or a folder of them (question, choices, answer; or"
        " prompt, answer, or another pair of rows; or text; optional: group).",
    )
    include_path: str | None = arg(None, "Folder with task definitions in lm-eval's format, for --tasks.")
    num_fewshot: list[str] = arg([], "Few-shot examples: N for all tasks, or TASK=N (default: each task's own number).")
    limit: int | None = arg(None, "Items per task: a seeded sample, the same for every model (default: all).")
    apply_chat_template: bool = arg(False, "Format the prompts with the model's chat template.")
    primary: list[str] = arg(
        [],
        "Comparisons that you declare beforehand: TASK (the last model with the first) or TASK=FIRST,SECOND. Their"
        " p-values are adjusted together by Holm; all others are exploratory (false discovery rate).",
    )
    sensitivity: list[str] = arg([], "Tasks that are also evaluated with systematic variants of the prompt.")
    robustness: list[str] = arg(
        [],
        "Tasks that are also evaluated with typing errors, changed case and spacing, and distracting sentences.",
    )
    variant_limit: int | None = arg(None, "Items of each variant (default: as --limit).")
    variant_models: list[str] = arg([], "Models that are evaluated on variants (default: the last one).")
    contamination: str | None = arg(
        None,
        "Prepared folder of training tokens: count the items that share 13 consecutive words with it, and score with"
        " and without them.",
    )
    inside: str = arg(
        "embedded_docs", "Text task of the same kind as the training text, with which the other texts are compared."
    )
    reference_model: str | None = arg(
        None, "One of the models, with which the likelihood of other kinds of text is compared."
    )
    confirm_run_unsafe_code: bool = arg(False, "Run the code that models write (embedded_humaneval), in a sandbox.")
    seed: int = arg(1234, "Seed of samples, few-shot examples, option orders and perturbations.")
    batch_tokens: int | None = arg(None, "Tokens per forward pass (default: 2,048 on a CPU, 32,768 on a GPU).")


# of TasksArguments, in which nothing comes twice
LISTS = ("tasks", "num_fewshot", "primary", "sensitivity", "robustness", "variant_models")


@dataclasses.dataclass
class OutputArguments:
    """Where results are written."""

    _argument_group_name = "Output"

    output_dir: str | None = arg(
        None, "Folder of the evaluation; results in it are not computed again (default: runs/MODEL-eval)."
    )
    remove_downloads: bool = arg(
        False,
        "Remove the weights that this evaluation downloads from the Hub's cache after the last task of their model"
        " (default: they stay there). Weights that were there before stay.",
    )
    push_to_hub: bool = arg(False, "Publish the scores of each model that is on the Hub to main of its repository.")
    dry_run: bool = arg(False, "Print models, tasks, items and about how long they take; evaluate nothing.")


EVAL_HELP = """Evaluate many models and revisions with lm-eval: paired statistics, sensitivity, robustness.

examples:
  python run_eval.py
      the demo's checkpoints and its tuned model, without network
  python run_eval.py --config configs/eval/paper.yaml --models you/name TinyLlama/TinyLlama_v1.1
      the paper's tasks for several models of the Hub
  python run_eval.py --config configs/eval/trajectory.yaml --models you/name@step-*
      every published step
  python run_eval.py --config configs/eval/sensitivity.yaml --models you/name+you/name-chat
      a tuned model, with variants of its prompts
  python run_eval.py --models runs/demo --tasks hellaswag --task_data hellaswag=data/hellaswag
      built-in task, local data
  accelerate launch --config_file configs/accelerate/ddp.yaml run_eval.py --models you/name@step-*
      on all GPUs: the processes share models and tasks

Stop it at any moment and run the same command again: finished (model, task) pairs are kept.
exit status: 0 finished, 2 refused, 75 interrupted."""


def eval_parser() -> Parser:
    groups = (ModelsArguments, TasksArguments, OutputArguments)
    usage = "run_eval.py [--config FILE.yaml] [--models REFERENCE ...] [--tasks TASK ...] [--field value ...]"
    return Parser(groups, {}, {}, prog="run_eval.py", usage=usage, description=EVAL_HELP)


def parse_eval(argv: list[str] | None = None):
    """(ModelsArguments, TasksArguments, OutputArguments). Raises Refusal."""
    parsed = eval_parser().parse(sys.argv[1:] if argv is None else argv, ROOT / "configs/eval/demo.yaml")
    check_eval(*parsed)
    output_args = parsed[-1]
    output_args.output_dir = output_args.output_dir or f"runs/{short_name(parsed[0].models[0])}-eval"
    return parsed


def short_name(model: str) -> str:
    """A name of a model that can name a folder: `org/name@step-*` and `runs/name+runs/name-sft` -> `name`, and
    `runs/name/checkpoint-180` -> `name-checkpoint-180`.
    """
    base = beside_run(Path(os.path.abspath(model.partition("+")[0].partition("@")[0])))
    return re.sub(r"[^\w.-]+", "-", base.name, flags=re.ASCII).strip(".-") or "models"


def check_eval(model_args: ModelsArguments, task_args: TasksArguments, output_args: OutputArguments) -> None:
    """Raise one Refusal that names every argument that cannot be right."""
    problems = Problems()
    own = [text.partition("=")[0] for text in task_args.questions]
    for name in task_args.sensitivity + task_args.robustness:
        problems.add_if(
            name not in task_args.tasks + own,
            f"--sensitivity and --robustness vary tasks of --tasks, and {name} is not among them.",
        )
    for text in task_args.primary:
        name, given, pair = text.partition("=")
        texts = [one.partition("=")[0] for one in task_args.texts]
        problems.add_if(
            name not in task_args.tasks + own + texts, f"--primary {text}: {name} is none of the evaluated tasks."
        )
        problems.add_if(given and len(pair.split(",")) != 2, f"--primary {text}: TASK or TASK=FIRST,SECOND is wanted.")
    problems.add_if(not model_args.models, "--models: at least one is needed.")
    for name in ("task_data", "texts", "questions"):
        for text in getattr(task_args, name):
            problems.add_if("=" not in text, f"--{name} {text}: expected NAME=PATH.")
    named = {
        name: [text.rpartition("=")[0] for text in task_args.num_fewshot]
        if name == "num_fewshot"
        else getattr(task_args, name)
        for name in LISTS
    }
    for name in ("task_data", "texts", "questions"):
        named[name] = [text.partition("=")[0] for text in getattr(task_args, name)]
    for name in named["texts"]:
        problems.add_if(
            name in task_args.tasks,
            f"--tasks {name} names a text of --texts, which is evaluated anyway: leave it out of --tasks.",
        )
    for name in own:
        problems.add_if(
            name in task_args.tasks, f"--tasks {name} names a task of --questions: leave it out of --tasks."
        )
        problems.add_if(name in named["texts"], f"--texts {name} and --questions {name}: choose another name for one.")
    for name, items in {**named, "models": model_args.models}.items():
        duplicates = sorted({item or "a number for all tasks" for item in items if items.count(item) > 1})
        problems.add_if(duplicates, f"--{name} {' '.join(duplicates)}: given twice.")
    problems.end()


def pairs(texts: list[str]) -> dict[str, str]:
    """[`a=b`] as {a: b}. Raises Refusal for a duplicate name."""
    found = [text.split("=", 1) for text in texts]
    names = [name for name, _ in found]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise Refusal(f"{duplicates[0]}={dict(found)[duplicates[0]]}: {duplicates[0]} is given twice.")
    return dict(found)


def shots(texts: list[str]) -> dict[str, int]:
    """[`5`, `mmlu=5`] as {"": 5, "mmlu": 5}. Raises Refusal for another form, and for a duplicate name."""
    found = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not number.isdigit():
            raise Refusal(f"--num_fewshot {text}: expected N or TASK=N.")
        if (name if equals else "") in found:
            raise Refusal(
                f"--num_fewshot {text}: {f'{name} is' if equals else 'a number for all tasks is'} given twice."
            )
        found[name if equals else ""] = int(number)
    return found
