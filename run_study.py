"""Run a controlled experiment: arms times seeds, each a run folder of its own, compared in pairs, with a report that
claims no more than its intervals.

    python run_study.py --config configs/studies/resume.yaml
    python run_study.py --config configs/studies/resume.yaml --dry_run
    python run_study.py --config configs/studies/resume.yaml --seed 1     # one seed: for Slurm array tasks

Stop it at any moment and run the same command again: finished runs are kept, changed arms are run again.
"""

import dataclasses
import signal
from pathlib import Path

from llama_lite.config.study import parse_study, read_study
from llama_lite.distributed import print_main
from llama_lite.errors import Interrupted, Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import csv_text, read_json, write_json, write_text


def main(argv: list[str] | None = None) -> None:
    arguments = parse_study(argv)
    read_study(arguments.config)  # a file that is not there is refused before the libraries are imported

    from tqdm import tqdm

    from llama_lite.folder_kinds import check_folder
    from llama_lite.provenance import provenance
    from llama_lite.studies import analysis, publish, registration, runner, spec
    from llama_lite.studies.cost import lines
    from llama_lite.training.preflight import check_folders

    study = spec.load(arguments.config)
    out = Path(arguments.output_dir or f"runs/{Path(arguments.config).stem}-study")
    check_folders({"output_dir": str(out)})
    check_folder("output_dir", out, "study")
    everything = spec.runs(study, out)
    chosen = [one for one in everything if arguments.arm in (None, one.arm.name) and arguments.seed in (None, one.seed)]
    if not chosen:
        names = ", ".join(dict.fromkeys(arm.name for arm in study.arms))
        raise Refusal(
            f"--arm {arguments.arm} --seed {arguments.seed}: the study has the arms {names} and the seeds"
            f" {study.seeds}."
        )

    # ---- Check that the folder belongs to this study ----
    definition = {
        name: value
        for name, value in dataclasses.asdict(study).items()
        if name in ("title", "script", "config", "reference")
    }
    there = read_json(out / "study.json")
    if other := next((name for name in definition if there and there["study"].get(name) != definition[name]), None):
        raise Refusal(
            f"--output_dir {out} belongs to another study ({other}: {there['study'].get(other)!r}, here"
            f" {definition[other]!r}): choose another one."
        )
    print_main(
        f"study     {study.title}: {len(study.arms)} arms, {len(study.seeds)} seeds, {len(everything)} runs in {out}"
    )
    if arguments.dry_run:
        for line in lines(study, everything, out):
            print_main(line)
        return
    if len(study.seeds) == 1:
        print_main("WARNING   one seed: differences are reported without intervals")
    if there is None:
        registered = {"registration": registration.register(Path(arguments.config))} if study.registered else {}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "study.json", {"study": definition, **registered, **provenance()})
    elif study.registered and "registration" not in there:
        raise Refusal(f"--output_dir {out} was begun before the study was registered: choose another one.")

    # ---- Prepare what all runs need, then run each unfinished run ----
    runner.prepare(study, out)
    if arguments.prepare_only:
        return
    planned = len(study.seeds)
    for one in tqdm(chosen, desc="runs", unit="run", disable=None):
        if study.stop_early:
            study, everything = analysis.until_decided(study, everything)
        if runner.is_done(one) or one not in everything:
            continue
        if runner.is_other(one):
            print_main(f"changed   {one.folder.name}: its arguments changed since it was run, so it is run again")
            runner.forget(one)
        print_main(f"run       {one.folder.name}")
        runner.make(study, one)
        analysis.check_measures(study, one)

    # ---- The report, when all runs are finished ----
    if study.stop_early:
        study, everything = analysis.until_decided(study, everything)
        print_main(f"stop      after {len(study.seeds)} of at most {planned} seeds")
    missing = [one.folder.name for one in everything if not runner.is_done(one)]
    if missing:
        print_main(
            f"{len(missing)} of {len(everything)} runs are still to do ({missing[0]} ...): the report comes with the"
            " last one"
        )
        return
    report(study, Path(arguments.config), everything, out)
    if arguments.push_to_hub:
        publish.push(out, arguments.hub_model_id)


def report(study, path: Path, finished: list, out: Path) -> None:
    """Write results, comparison, contrasts, records and the report of a finished study. Raises Refusal.

    path: the study file. finished: every run. out: the study's folder.
    """
    from llama_lite.studies import analysis, publish, registration
    from model_card.report.page import write_report_or_reason
    from model_card.study import line_of, write_report

    controlled = analysis.check_controlled_variables(study, finished)
    rows = analysis.collect(study, finished) + analysis.evaluate(study, finished, out)
    records = {"controlled": controlled, **analysis.records_of(study, finished, out)}
    if registered := read_json(out / "study.json").get("registration"):
        records["registration"] = {name: registered[name] for name in ("commit", "date")}
        records["deviations"] = [*study.deviations, *registration.deviations(registered, path)]
    write_text(out / "results.csv", csv_text(analysis.RUN_COLUMNS, rows))
    results = analysis.results_of(study, rows, records)
    for name, value in {**results, "records": records}.items():
        if value or name == "comparison" or (out / f"{name}.json").exists():  # a study without contrasts has none
            write_json(out / f"{name}.json", value)
    written = write_report(out, dataclasses.asdict(study), rows, results, records)
    for row in results["comparison"]:
        print_main(line_of(row))
    tables = ", ".join(name for name in publish.TABLES if (out / name).exists())
    print_main(f"finished  {written}, {tables}, records.json")
    print_main(f"          curves and differences: {write_report_or_reason(out)}")


def stop(number, frame) -> None:
    raise Interrupted(
        "finished runs are kept, and a run that was training has saved a checkpoint. Run the same command again."
    )


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    exit_with_status(main)
