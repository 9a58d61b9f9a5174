"""Evaluate many models and revisions with lm-eval: records, paired statistics, sensitivity, robustness, generalization.

    python run_eval.py                                            # the demo's checkpoints and tuned model, offline
    python run_eval.py --config configs/eval/trajectory.yaml --models you/name@step-*
    accelerate launch --config_file configs/accelerate/ddp.yaml run_eval.py ...   # on all GPUs

Stop it at any moment and run the same command again.
"""

import dataclasses
import functools
import warnings
from pathlib import Path

from llama_lite.config.arguments import answer_early
from llama_lite.digests import sha256
from llama_lite.distributed import (
    RANK,
    WORLD_SIZE,
    join_processes,
    main_first,
    print_main,
    raise_on_all_ranks,
    run_on_main,
)
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import FolderLock, csv_text, write_json, write_text
from llama_lite.processes import cores_for_a_process


def main(argv: list[str] | None = None) -> None:
    argv = answer_early("run_eval.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.eval import parse_eval

    model_args, task_args, output_args = parse_eval(argv)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from llama_lite.evaluation import downloads, forecast, resolve, runner
    from llama_lite.evaluation.sharing import SharedWork
    from llama_lite.evaluation.store import Store
    from llama_lite.evaluation.summary import ScoreLines
    from llama_lite.folder_kinds import check_folder
    from llama_lite.machine.parallelism import check_process_count
    from llama_lite.training.preflight import check_folders

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    threads = model_args.cpu_threads
    torch.set_num_threads(cores_for_a_process() if threads is None else threads)
    check_process_count(WORLD_SIZE)
    join_processes()

    run_on_main(check_folders, {"output_dir": output_args.output_dir})
    run_on_main(check_folder, "output_dir", output_args.output_dir, "eval")

    # ---- Models and tasks ----
    found = main_first(resolve.resolve_models, model_args.models, "--models", False)
    check_named_models(found, task_args)
    tasks = main_first(Tasks, found, task_args, model_args.tokenizer_name)
    work = [tasks.of(model.name) for model in found]
    run_on_main(runner.check_answers, found, work, task_args.confirm_run_unsafe_code)
    print_work(found, tasks)
    out = Path(output_args.output_dir)
    store, settings = Store(out), settings_of(model_args, task_args)
    plan = functools.partial(plan_work, store, found, work, settings, output_args.remove_downloads)
    if output_args.dry_run:
        plan()
        return

    lock = FolderLock(out, "write to")
    run_on_main(lock.acquire)
    run_on_main(write_run, out, found, tasks, model_args, task_args)
    check_shared(out)

    # ---- Evaluate each (model, task) pair that has no result yet ----
    shared, expected = SharedWork(), plan()
    removal = downloads.WeightRemoval(found, [len(pairs) for pairs in work], shared)
    ahead = downloads.DownloadAhead(found, {number for number, _ in expected.seconds})
    with forecast.Progress(expected, shared) as progress, ahead:
        lines = ScoreLines(progress)

        def finish(number: int, task: int, record: dict, fresh: bool) -> None:
            lines.add(number, task, record, fresh)
            if output_args.remove_downloads:
                removal.finish(number)

        def advance(number: int, task: int, fraction: float) -> None:
            progress.advance(number, task, fraction)
            ahead.start(number)

        def compute() -> None:
            for number in shared.models(len(found)):
                ahead.wait(number)
                calls = (functools.partial(function, number) for function in (finish, shared.take, advance))
                records = runner.evaluate_model(store, found[number], work[number], settings, *calls)
                shared.records |= {(number, task): record for task, record in records.items()}
            lines.close()

        records = shared.run(compute)

    # ---- Tables, comparisons and figures, from the records alone ----
    run_on_main(report, out, store, records, found, tasks, (task_args, output_args))
    run_on_main(lock.release)


# ---- tasks ----


class Tasks:
    """The tasks of an evaluation: `base_tasks` of every model, and their variants, {task: variants}, of
    `varied_models`.

    found: the models. Raises Refusal for a task that is not there or cannot be built.
    """

    def __init__(self, found, args, tokenizer_name: str | None):
        from llama_lite.config.eval import pairs, shots
        from llama_lite.evaluation import prompt_variants
        from llama_lite.evaluation.tasks import registry

        self.args = args
        self.base_tasks = registry.build(
            args.tasks,
            pairs(args.task_data),
            shots(args.num_fewshot),
            args.apply_chat_template,
            pairs(args.questions),
            args.include_path,
        )
        self.base_tasks += [registry.text_task(name, path) for name, path in pairs(args.texts).items()]
        self.varied_models = set(args.variant_models or [model.name for model in found[-1:]])
        chats = bool(args.sensitivity) and all(
            model.tokenizer(tokenizer_name).chat_template for model in found if model.name in self.varied_models
        )
        self.sensitivity = {
            task.name: prompt_variants.sensitivity(task, args.seed, chats)
            for task in self.base_tasks
            if task.name in args.sensitivity
        }
        self.robustness = {
            task.name: prompt_variants.robustness(task, args.seed)
            for task in self.base_tasks
            if task.name in args.robustness
        }

    def of(self, model: str) -> list[tuple]:
        """(task, number of items at most) of everything that a model is evaluated on."""
        limit, variant_limit = self.args.limit, self.args.variant_limit
        variant_limit = limit if variant_limit is None else variant_limit
        groups = (*self.sensitivity.values(), *self.robustness.values()) if model in self.varied_models else ()
        variants = [(task, variant_limit) for group in groups for task in group]
        return [(task, limit) for task in self.base_tasks] + variants


def check_named_models(found, task_args) -> None:
    """Name the models of --variant_models, --reference_model and --primary as the evaluated ones are named. Raises
    Refusal for others.
    """
    from llama_lite.evaluation.resolve import model_name

    def spelled(text: str) -> str:
        task, equals, pair = text.partition("=")
        return f"{task}{equals}{','.join(map(model_name, pair.split(',')))}"

    task_args.primary = list(map(spelled, task_args.primary))
    task_args.variant_models = list(map(model_name, task_args.variant_models))
    task_args.reference_model = task_args.reference_model and model_name(task_args.reference_model)
    names = [model.name for model in found]
    reference = [task_args.reference_model] if task_args.reference_model else []
    declared = [name for text in task_args.primary for name in text.partition("=")[2].split(",") if name]
    named_models = (("variant_models", task_args.variant_models), ("reference_model", reference), ("primary", declared))
    for flag, named in named_models:
        if unknown := [name for name in named if name not in names]:
            raise Refusal(f"--{flag} {unknown[0]} is not among the models: {', '.join(names)}.")


def print_work(found, tasks: Tasks) -> None:
    """The models, and how many items and variants each task has."""
    from llama_lite.evaluation.store import chosen
    from llama_lite.evaluation.tasks import sandbox

    print_main(f"models    {len(found)}: {', '.join(model.name for model in found)}")
    for task in tasks.base_tasks:
        count = sum(map(len, chosen(task, tasks.args.limit, tasks.args.seed).values()))
        ways = len(tasks.sensitivity.get(task.name, ())) + len(tasks.robustness.get(task.name, ()))
        print_main(
            f"task      {task.name}: {count:,} items, {task.n_shot} examples{f', {ways} variants' if ways else ''}"
        )
    if any(task.unsafe for task in tasks.base_tasks):
        print_main(f"sandbox   {', '.join(sandbox.protections())}")


# ---- records and output ----


def settings_of(model_args, task_args):
    """The Settings that all records share."""
    from llama_lite.evaluation.runner import Settings

    return Settings(
        model_args.dtype,
        task_args.seed,
        task_args.batch_tokens,
        model_args.tokenizer_name,
        task_args.confirm_run_unsafe_code,
    )


def plan_work(store, found, work: list[list[tuple]], settings, removes: bool):
    """The Forecast of an evaluation; prints about how long it takes, and what is downloaded for it. Call it on all
    ranks. Raises Refusal where the disk cannot hold the downloads.
    """
    from llama_lite.evaluation import downloads, forecast

    expected = run_on_main(forecast.forecast, store, found, work, settings)
    print_main(expected.line())
    needed = range(len(found)) if expected.problem else {number for number, _ in expected.seconds}
    if line := run_on_main(downloads.check_downloads, found, needed, removes):
        print_main(line)
    return expected


def write_run(out: Path, found, tasks: Tasks, model_args, task_args) -> None:
    """`run.json` of an evaluation that begins; the `status.json` of an earlier end goes. Says which earlier scores the
    new tables will not hold.
    """
    from llama_lite.evaluation.lm import inference_device
    from llama_lite.evaluation.tasks import embedded
    from llama_lite.files import read_json
    from llama_lite.provenance import provenance

    pairs = {(model.name, task.name) for model in found for task in tasks.base_tasks}
    earlier = {(row["model"], row["task"]): None for row in read_json(out / "scores.json") or [] if not row["factor"]}
    if left_out := [f"{model} on {task}" for model, task in earlier if (model, task) not in pairs]:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        print_main(
            f"replaced  the tables in {out} held {', '.join(left_out[:3])}{more}: the new ones will not. --output_dir"
            " OTHER keeps both; the records stay, and are not computed again"
        )
    (out / "status.json").unlink(missing_ok=True)
    known = embedded.DESCRIPTIONS
    record = {
        "kind": "eval",
        "arguments": [dataclasses.asdict(model_args), dataclasses.asdict(task_args)],
        "weights": {model.name: model.weights for model in found},
        "descriptions": {task.name: known[task.name] for task in tasks.base_tasks if task.name in known},
        **provenance(inference_device()),
    }
    write_json(out / "run.json", record)


def check_shared(out: Path) -> None:
    """Raise Refusal where a process does not see the folder that rank 0 has begun."""
    error = None
    if not (out / "run.json").exists():
        error = Refusal(
            f"--output_dir {out}: process {RANK} does not see what the first one wrote there. All machines write to one"
            " folder: give one on a disk that they share."
        )
    raise_on_all_ranks(error)


def report(out: Path, store, records: list[dict], found, tasks: Tasks, args) -> None:
    """Tables, analyses and cards, in the evaluation's folder and in those of the runs; scores on the Hub (rank 0).

    args: the groups of arguments of tasks and output.
    """
    from llama_lite.evaluation import runner
    from llama_lite.evaluation.store import write_scores
    from llama_lite.evaluation.summary import print_summary
    from model_card.card import write_card_or_reason
    from model_card.report.page import write_report_or_reason

    task_args, output_args = args
    plain = [record for record in records if not record["factor"]]
    write_scores(out, records)
    comparison, results = analyze(out, store, records, tasks, task_args)
    print_summary(plain, comparison, results)
    for folder, own in runner.runs_of(found).items():
        runner.copy_to_run(out, folder, own)
        print_main(f"card      {write_card_or_reason(folder)}")
        print_main(f"report    {write_report_or_reason(folder)}")
    if output_args.push_to_hub:
        from llama_lite.evaluation.push_scores import push_scores

        push_scores([(model, [record for record in plain if record["model"] == model.name]) for model in found])
    files = ["scores.csv", "comparison.csv", *(f"{name}.json" for name, rows in results.items() if rows), "samples"]
    print_main(f"finished  {out}: {', '.join(files)}")
    varied = " and prompt variants" if any(results.get(name) for name in ("sensitivity", "robustness")) else ""
    print_main(f"          all scores and differences{varied}: {write_card_or_reason(out)}")
    print_main(f"          scores and items: {write_report_or_reason(out)}")
    write_json(out / "status.json", {"status": "finished", "files": {"scores.csv": sha256(out / "scores.csv")}})


def analyze(out: Path, store, records: list[dict], tasks: Tasks, task_args) -> tuple[list[dict], dict]:
    """(comparison of models in pairs, {name: rows} of the other analyses), as written to `comparison.csv` and
    `NAME.json`.
    """
    from llama_lite.evaluation import analysis

    def variants(groups: dict) -> list[dict]:
        names = {task.name for group in groups.values() for task in group}
        return analysis.variant_sensitivity(records, store.samples, names)

    plain = [record for record in records if not record["factor"]]
    comparison = analysis.compare(plain, store.samples, task_args.primary)
    write_text(out / "comparison.csv", csv_text(analysis.PAIRS, comparison))
    results = {
        "generalisation": analysis.generalization(plain, store.samples, task_args.inside, task_args.reference_model),
        "sensitivity": variants(tasks.sensitivity),
        "robustness": variants(tasks.robustness),
    }
    if task_args.contamination:
        results["contamination"] = analysis.contaminated(
            tasks.base_tasks, plain, store, task_args.contamination, task_args.limit, task_args.seed
        )
    for name, rows in results.items():
        (out / f"{name}.json").unlink(missing_ok=True)  # of another call
        if rows:
            write_json(out / f"{name}.json", rows)
    return comparison, results


if __name__ == "__main__":
    exit_with_status(main)
