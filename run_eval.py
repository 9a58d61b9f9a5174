"""Evaluate many models and revisions with lm-eval: records, paired statistics, sensitivity, robustness, generalisation.

    python run_eval.py                                            # the demo's checkpoints and its tuned model, without network
    python run_eval.py --config configs/eval/trajectory.yaml --models you/name@step-*

Stop it at any moment and run the same command again.
"""

import dataclasses
import warnings
from pathlib import Path

from llama_lite.config.eval import pairs, parse_eval, shots
from llama_lite.distributed import print_main
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import FolderLock, csv_text, sha256, write_json, write_text
from llama_lite.processes import cores_for_a_process
from model_card.records import shown_metric


def main(argv: list[str] | None = None) -> None:
    which, what, where = parse_eval(argv)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from tqdm import tqdm
    from transformers.utils.logging import disable_progress_bar

    from llama_lite.evaluation import analysis, prompt_variants, resolve, runner
    from llama_lite.evaluation.store import Store, chosen, write_scores
    from llama_lite.evaluation.tasks import embedded, registry, sandbox
    from llama_lite.folder_kinds import check_folder
    from llama_lite.provenance import provenance
    from llama_lite.training.preflight import check_folders
    from model_card.card import written

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(cores_for_a_process() if which.cpu_threads is None else which.cpu_threads)

    check_folders({"output_dir": where.output_dir})
    check_folder("output_dir", where.output_dir, "eval")

    # ---- Models and tasks ----
    found = resolve.resolve_models(which.models)
    names = [model.name for model in found]
    for flag, named in (
        ("variant_models", what.variant_models),
        ("reference_model", [what.reference_model] if what.reference_model else []),
    ):
        if unknown := [name for name in named if name not in names]:
            raise Refusal(f"--{flag} {unknown[0]} is not among the models: {', '.join(names)}.")
    asked = registry.build(what.tasks, pairs(what.task_data), shots(what.num_fewshot), what.apply_chat_template)
    asked += [registry.text_task(name, place) for name, place in pairs(what.texts).items()]
    varying = set(what.variant_models or names[-1:])
    chats = bool(what.sensitivity) and all(
        model.tokenizer(which.tokenizer_name).chat_template for model in found if model.name in varying
    )
    varied = {
        task.name: prompt_variants.sensitivity(task, what.seed, chats)
        for task in asked
        if task.name in what.sensitivity
    }
    disturbed = {
        task.name: prompt_variants.robustness(task, what.seed) for task in asked if task.name in what.robustness
    }
    work = {}
    for model in found:
        extra = (
            [task for group in (*varied.values(), *disturbed.values()) for task in group]
            if model.name in varying
            else []
        )
        work[model.name] = [(task, what.limit) for task in asked] + [
            (task, what.limit if what.variant_limit is None else what.variant_limit) for task in extra
        ]
    print_main(f"models    {len(found)}: {', '.join(names)}")
    for task in asked:
        count = sum(map(len, chosen(task, what.limit, what.seed).values()))
        ways = len(varied.get(task.name, ())) + len(disturbed.get(task.name, ()))
        print_main(
            f"task      {task.name}: {count:,} items, {task.n_shot} examples{f', {ways} variants' if ways else ''}"
        )
    if any(task.unsafe for task in asked):
        print_main(f"sandbox   {', '.join(sandbox.protections())}")
    if where.dry_run:
        return

    out = Path(where.output_dir)
    lock = FolderLock(out, "write to")
    lock.acquire()
    settings = runner.Settings(
        which.dtype, what.seed, what.batch_tokens, which.tokenizer_name, what.confirm_run_unsafe_code
    )
    descriptions = {task.name: embedded.DESCRIPTIONS[task.name] for task in asked if task.name in embedded.DESCRIPTIONS}
    arguments = [dataclasses.asdict(part) for part in (which, what)]
    (out / "status.json").unlink(missing_ok=True)
    weights = {model.name: model.weights for model in found}
    write_json(
        out / "run.json",
        {"kind": "eval", "arguments": arguments, "weights": weights, "descriptions": descriptions, **provenance()},
    )
    store = Store(out)

    # ---- Ask, pair by pair; what is there is not asked again ----
    records = []
    with tqdm(total=sum(map(len, work.values())), desc="evaluating", unit="task", disable=None) as bar:

        def done(record, fresh):
            metric = shown_metric(record["metrics"])
            value = record["metrics"][metric]
            if fresh or not record["factor"]:
                cut = f", {record['truncated']} requests longer than the context" if record["truncated"] else ""
                bar.write(
                    f"{record['model']}  {record['task']}  {metric} {told(value)}{cut}{'' if fresh else ', as before'}"
                )
            bar.update()

        for model in found:
            records += runner.evaluate_model(store, model, work[model.name], settings, done)

    # ---- Tables, pairs and pictures, from the records alone ----
    plain = [record for record in records if not record["factor"]]
    write_scores(out, records)
    comparison = analysis.compare(plain, store.samples)
    write_text(out / "comparison.csv", csv_text(analysis.PAIRS, comparison))
    kinds = analysis.generalisation(plain, store.samples, what.inside, what.reference_model)
    in_variants = {
        "sensitivity": analysis.variant_sensitivity(
            records, store.samples, {task.name for group in varied.values() for task in group}
        ),
        "robustness": analysis.variant_sensitivity(
            records, store.samples, {task.name for group in disturbed.values() for task in group}
        ),
    }
    results = {"generalisation": kinds, **in_variants}
    if what.contamination:
        results["contamination"] = analysis.contaminated(asked, plain, store, what.contamination, what.limit, what.seed)
    for name, rows in results.items():
        (out / f"{name}.json").unlink(missing_ok=True)  # of another call
        if rows:
            write_json(out / f"{name}.json", rows)
    summary(plain, comparison, results)
    for folder, own in runner.runs_of(found).items():
        runner.copy_to_run(out, folder, own)
        print_main(f"card      {written(folder)}")
    if where.push_to_hub:
        from llama_lite.evaluation.push_scores import push_scores

        for model in found:
            push_scores(model, [record for record in plain if record["model"] == model.name])
    files = ["scores.csv", "comparison.csv", *(f"{name}.json" for name, rows in results.items() if rows), "samples"]
    print_main(f"finished  {out}: {', '.join(files)}; {written(out)}")
    write_json(out / "status.json", {"status": "finished", "files": {"scores.csv": sha256(out / "scores.csv")}})
    lock.release()


def told(value: dict) -> str:
    """A value with its 95 % interval."""
    interval = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['value']:.4f}{interval}, {value['n']} items"


def summary(plain: list[dict], comparison: list[dict], results: dict) -> None:
    """What a person wants to know at once: the first and the last model of each task, what tells them apart, and how
    far prompts move them.
    """
    for row in comparison:
        if (row["first"], row["second"]) == (plain[0]["model"], plain[-1]["model"]) and row["low"] is not None:
            judged = f"p {row['p_holm']:.2g} (Holm)" if row.get("p_holm") is not None else ""
            print_main(
                f"change    {row['task']}: {row['metric']} {row['difference']:+.4f} ({row['low']:+.4f} to"
                f" {row['high']:+.4f}), {judged}; a difference below {row['detectable']:.4f} could not have been seen"
            )
    for name in ("sensitivity", "robustness"):
        for row in results[name]:
            if row["factor"] == "all" and "spread" in row:
                print_main(
                    f"{name:12}{row['model']} {row['task']}: {row['k']} prompts, {row['lowest']['value']:.3f} to"
                    f" {row['highest']['value']:.3f}, {row['flips']['value']:.0%} of answers change (blind"
                    f" {row['flips']['blind']:.0%}), right in all {row['worst_of_k']['value']:.3f}"
                )
    for row in results.get("contamination", ()):
        print_main(
            f"contamination  {row['task']}: {row['contaminated']} of {row['judged']} items share 13 words with the"
            " training text"
        )


if __name__ == "__main__":
    exit_with_status(main)
