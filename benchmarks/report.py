"""How large the page of a long run is, how long it takes to make, and how it behaves in a browser: 20,000 log lines, 11
revisions, 6 tasks.

    python benchmarks/report.py                    # of made-up records; results in benchmarks/report.json
    python benchmarks/report.py --run runs/demo-long     # of a finished and evaluated run, by its name

Needs chromium (`apt-get install chromium`). Times count only on a quiet machine; --sizes_only leaves them out.
"""

import argparse
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LINES, REVISIONS, ITEMS = 20_000, 11, 300
CHOICE_TASKS, TEXT_TASKS = ("embedded_mmlu_cloze", "embedded_next_sentence"), ("docs", "code", "web", "science")
RECORDS = ROOT / "tests" / "compatibility" / "f587f49" / "run"  # of a tiny run: what a run.json holds
TOKENS_PER_STEP = 2048


# ---- records of a run that never was ----


def synthetic_run(folder: Path, lines: int = LINES, revisions: int = REVISIONS, items: int = ITEMS) -> Path:
    """Write the records of a run of `lines` logged steps, evaluated at `revisions` steps on 6 tasks; returns its folder.

    It was resumed once and had three spikes, and some of its items were forgotten.
    """
    from model_card.report import items as item_grids

    chance = random.Random(0)
    folder.mkdir(parents=True)
    run = json.loads((RECORDS / "run.json").read_text())
    run["identity"]["hyperparameters"]["max_steps"] = run["plan"]["steps"] = lines
    run["given"]["sample_prompts"] = ["Returns the", "This function is used to"]
    (folder / "run.json").write_text(json.dumps(run))
    shutil.copyfile(RECORDS / "data.json", folder / "data.json")
    (folder / "status.json").write_text(json.dumps({"status": "finished", "code": 0, "step": lines, "reason": ""}))
    spikes = {lines * part // 20 for part in (5, 11, 16)}
    evaluated = [lines * (index + 1) // revisions for index in range(revisions)]
    _write_log(folder, lines, evaluated, spikes, chance)
    _write_events(folder, lines, evaluated, spikes)
    answers = folder.parent / f"{folder.name}-eval"
    models = {step: f"runs/{folder.name}@step-{step:06d}" for step in evaluated}
    scores = _write_answers(answers, models, items, chance)
    copy = folder / "evaluation" / answers.name
    copy.mkdir(parents=True)
    shutil.copyfile(answers / "scores.json", copy / "scores.json")
    shutil.copyfile(answers / "sensitivity.json", copy / "sensitivity.json")
    (copy / item_grids.NAME).write_text(json.dumps(item_grids.grids(answers, scores)))
    of = {"id": run["id"], "models": list(models.values()), "files": {}}
    (copy / "run.json").write_text(json.dumps({"kind": "eval", "of": of}))
    return folder


def _write_log(folder: Path, lines: int, evaluated: list[int], spikes: set[int], chance: random.Random) -> None:
    entries = []
    for step in range(1, lines + 1):
        progress = step / lines
        loss = 3.2 + 5 * math.exp(-12 * progress) + 0.6 * (1 - progress) + chance.gauss(0, 0.05)
        entries.append(
            {
                "step": step,
                "tokens": step * TOKENS_PER_STEP,
                "epoch": progress,
                "loss": loss + (1.4 if step in spikes else 0),
                "grad_norm": math.exp(chance.gauss(-0.7, 0.25)) * (8 if step in spikes else 1),
                "learning_rate": 3e-3 * min(1, 20 * progress) * (0.55 + 0.45 * math.cos(math.pi * progress)),
                "tokens_per_second": 21_000 + chance.gauss(0, 400),
                "mfu": 11 + chance.gauss(0, 0.2),
                "peak_memory_gib": 0.714,
                "goodput": 90 - 5 * math.exp(-30 * progress),
                "wall_seconds": round(20 + step * 0.11, 3),
                "save_seconds": round(step // (lines // 10) * 1.5, 3),
                "evaluation_seconds": round(step // (lines // 10) * 4.2, 3),
                "restart_seconds": 0.0,
                "waiting_seconds": 0.0,
            }
        )
        if step in evaluated:
            at = {"step": step, "tokens": step * TOKENS_PER_STEP, "epoch": progress}
            held_out = 3.3 + 5 * math.exp(-12 * progress) + 0.6 * (1 - progress)
            text = {"eval_loss": held_out, "eval_perplexity": math.exp(held_out), "eval_bits_per_byte": held_out / 2.2}
            entries += [at | text, at | {"eval_code_loss": held_out + 0.4, "eval_web_loss": held_out + 0.9}]
            words = "the array of values along the given axis , and ".split() * 3
            samples = [
                f"{prompt} {' '.join(chance.sample(words, 24))}."
                for prompt in ("Returns the", "This function is used to")
            ]
            entries.append(at | {"samples": samples})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _write_events(folder: Path, lines: int, evaluated: list[int], spikes: set[int]) -> None:
    def event(kind: str, step: int, **fields) -> tuple:
        minute, second = divmod(step * 3600 // lines, 60)
        return step, {
            "event": kind,
            "step": step,
            "time": f"2026-11-01T12:{min(minute, 59):02d}:{second:02d}Z",
            **fields,
        }

    events = [event("started", 0, checkpoint=None), event("finished", lines, reason="")]
    events += [event("saved", step, checkpoint=f"checkpoint-{step}", probe_loss=4.0) for step in evaluated]
    events.append(
        event("resumed", evaluated[len(evaluated) // 2], checkpoint=f"checkpoint-{evaluated[len(evaluated) // 2]}")
    )
    for step in spikes:
        names = [f"numpy/lib/part_{step % 7}_{index}.py" for index in range(4)]
        events.append(event("spike", step, at_step=step, loss=4.9, sigmas=9.3, windows=[0, 1], documents=names))
    events.sort(key=lambda pair: pair[0])
    (folder / "events.jsonl").write_text("".join(json.dumps(fields) + "\n" for _, fields in events))


def _write_answers(folder: Path, models: dict[int, str], items: int, chance: random.Random) -> list[dict]:
    """The folder of an evaluation: results, answers and tables; returns its rows of scores. models: {step: name}."""
    for name in ("results", "samples"):
        (folder / name).mkdir(parents=True)
    last, rows, skills = max(models), [], {}
    for task in (*CHOICE_TASKS, *(f"embedded_{name}" for name in TEXT_TASKS)):
        for step, model in models.items():
            samples = [
                _answer(task, item, step / last, skills.setdefault((task, item), chance.gauss(0, 1.2)), chance)
                for item in range(items)
            ]
            key = f"{model.replace('/', '-')}--{task}"
            metric = "acc" if task in CHOICE_TASKS else "bits_per_byte"
            values = [
                s["metrics"]["acc"]
                if metric == "acc"
                else -s["metrics"][metric][0] / math.log(2) / s["metrics"][metric][1]
                for s in samples
            ]
            row = {
                **dict.fromkeys("revision commit adapter base_model base_revision base_commit limit sandbox".split()),
                **{
                    "model": model,
                    "step": step,
                    "tokens": step * TOKENS_PER_STEP,
                    "task": task,
                    "variant": "",
                    "factor": "",
                },
                **{
                    "version": "1.0",
                    "n_shot": 0,
                    "metric": metric,
                    "filter": "none",
                    "value": statistics.fmean(values),
                },
                **{"stderr": 0.02, "low": statistics.fmean(values) - 0.04, "high": statistics.fmean(values) + 0.04},
                **{"chance": 0.25 if metric == "acc" else None, "n": items, "clusters": items, "chat_template": False},
                **{
                    "dtype": "float32",
                    "seed": 1234,
                    "prefix_id": 0,
                    "truncated": 0,
                    "harness": "lm-eval",
                    "date": "2026-11-01",
                },
            }
            rows.append(row)
            (folder / "results" / f"{key}.json").write_text(json.dumps({**row, "key": key}))
            (folder / "samples" / f"{key}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "scores.json").write_text(json.dumps(rows))
    (folder / "sensitivity.json").write_text(json.dumps(_variants(models[last])))
    shutil.copyfile(RECORDS.parent / "evaluation" / "run.json", folder / "run.json")
    return rows


def _answer(task: str, item: int, progress: float, skill: float, chance: random.Random) -> dict:
    """The stored answer to an item: options with their likelihoods, or the likelihood of a text."""
    stored = {"leaf": task, "doc_id": item, "item": str(item), "prompt": str(item), "filter": "none", "cluster": None}
    if task not in CHOICE_TASKS:
        rate = 1.4 + 0.4 * skill**2 + 1.6 * math.exp(-4 * progress)
        return stored | {
            "cluster": f"document {item // 4}",
            "metrics": {"bits_per_byte": [-rate * 500 * math.log(2), 500]},
        }
    gold = item % 4
    nats = [chance.gauss(0, 0.5) for _ in range(4)]
    nats[gold] += 3.5 * progress + skill - 1.2 - (2.5 if item % 9 == 0 and progress > 0.7 else 0)
    right = float(nats.index(max(nats)) == gold)
    by_length = float(right if item % 11 else 1 - right)
    subject = ("anatomy", "astronomy", "virology")[item % 3]
    return stored | {
        "metrics": {"acc": right, "acc_norm": by_length},
        "nats": nats,
        "options": 4,
        "meant": 0,
        "gold": gold,
        "subject": subject,
    }


def _variants(model: str) -> list[dict]:
    def measure(value):
        return {"value": value, "low": value - 0.05, "high": value + 0.05, "blind": 0.25}

    rows = []
    for factor, names in (
        ("all", ["a"]),
        ("casing", ["reference", "lower case", "upper case"]),
        ("order", ["reference", "shuffled 1", "shuffled 2"]),
    ):
        changes = [
            {"value": -0.03 * index, "low": -0.03 * index - 0.02, "high": -0.03 * index + 0.02}
            for index in range(1, len(names))
        ]
        spread = {**measure(0.06), "p": 0.03}
        shares = {name: measure(0.4) for name in ("mean", "worst_of_k", "flips", "consistency")}
        rows.append(
            {
                "model": model,
                "task": CHOICE_TASKS[0],
                "metric": "acc",
                "n": 60,
                "k": len(names),
                "factor": factor,
                "variants": names,
                "changes": changes,
                "spread": spread,
                **shares,
            }
        )
    return rows


# ---- measured ----


def in_browser(path: Path) -> dict:
    """{drawn_seconds, longest_task_ms} of a page in headless chromium: until all curves are drawn, and the longest task
    while the cursor moves and the page zooms.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("body[data-ready]")
        drawn = page.evaluate("performance.getEntriesByName('curves drawn')[0].startTime / 1000")
        page.evaluate("""() => { window.long = [0];
            new PerformanceObserver((list) => window.long.push(...list.getEntries().map((one) => one.duration))).observe({ entryTypes: ["longtask"] }); }""")
        box = page.locator(".plot .u-over").first.bounding_box()
        for index in range(60):
            page.mouse.move(box["x"] + box["width"] * (index + 1) / 62, box["y"] + 80)
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 80)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 80, steps=10)
        page.mouse.up()
        page.get_by_label("show all").click()
        page.wait_for_timeout(500)
        longest = page.evaluate("Math.max(...window.long)")
        browser.close()
    return {"drawn_seconds": round(drawn, 2), "longest_task_ms": round(longest)}


def evaluated(run: Path) -> dict:
    """{revisions, tasks}: how many models and tasks the evaluations of a run have."""
    paths = run.glob("evaluation/*/scores.json")
    rows = [row for path in paths for row in json.loads(path.read_text()) if not row["factor"]]
    return {f"{what}s": len({row[key] for row in rows}) for what, key in (("revision", "model"), ("task", "task"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder; by default made-up records")
    parser.add_argument("--sizes_only", action="store_true", help="no times: the machine is busy")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    from llama_lite.provenance import processor
    from model_card.report.page import write_report

    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or synthetic_run(Path(folder) / "long")
        begin = time.perf_counter()
        path = write_report(run, Path(folder) / "report.html")
        seconds = time.perf_counter() - begin
        log = sum(1 for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line)
        result = {"log_lines": log, **evaluated(run), "bytes": path.stat().st_size}
        if not arguments.sizes_only:
            result |= {"processor": processor(), "made_seconds": round(seconds, 2), **in_browser(path)}
    name = arguments.run.resolve().name if arguments.run else "made_up"
    print(json.dumps({name: result}))
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    arguments.output.write_text(json.dumps({**results, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
