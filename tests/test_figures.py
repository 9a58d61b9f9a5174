"""Figures in the prose of README and docs are those of the committed records; tables are compared in test_docs.py."""

import csv
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks import render_demo

ROOT = Path(__file__).resolve().parent.parent


def read(name: str):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def comparison(study: str) -> dict[tuple, dict]:
    """{(arm, stop or None, against, what): row} of a committed study."""
    rows = read(f"studies/{study}/comparison")
    return {(row["arm"], row["at"], row["against"], row["what"]): row for row in rows}


def short(value: float, form: str = ".1e") -> str:
    """A number with an exponent as the docs write it: 9.5e-7."""
    return re.sub(r"e([+-])0", r"e\1", format(value, form))


def missing(page: str, figures: list[str]) -> list[str]:
    words = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    return [figure for figure in figures if figure not in words]


def test_the_resume_study():
    rows, weights = comparison("resume"), read("studies/resume/records")["equal_weights"]
    equal = [count for arm, count in weights.items() if arm.startswith("everything")]
    ends = [rows["no_optimizer", at, "whole", "eval_loss"]["value"] for at in (150, 300, 450)]
    what = "highest excess of the training loss after the stop"
    jumps = [rows["new_warmup", at, "whole", what]["value"] for at in (150, 300, 450)]
    figures = [
        f"bit for bit, in {sum(equal)} of {3 * len(equal)} cases",
        f"its validation loss ends {min(ends):.3f} to {max(ends):.3f} nats higher",
        f"{jumps[0]:.3f}, {jumps[1]:.3f} and {jumps[2]:.3f} nats after stops at steps 150, 300 and 450",
    ]
    assert missing("docs/studies.md", figures) == []


def test_the_table_of_confound():
    rows, spike = comparison("confound"), "highest excess of the training loss after the stop"
    contrasts = {(row["outcome"], row["contrast"]): row["value"] for row in read("studies/confound/contrasts")}

    def first(late: str) -> list[float]:
        """Means of the first 50 steps above the uninterrupted run: moments lost, stretched, both."""
        names = ("moments lost, cosine kept", "cosine stretched, moments kept", "moments lost, cosine stretched")
        kept, stretched, lost = (contrasts["training loss of the first 50 steps", name + late] for name in names)
        return [kept, stretched, lost + stretched]

    arms = (
        ("moments lost, cosine kept", "lost"),
        ("moments kept, cosine stretched", "stretched"),
        ("both, as the authors' code does", "both"),
    )
    figures = []
    for (name, arm), late, early in zip(arms, first(""), first(", at step 160"), strict=True):
        high, end = (rows[arm, 480, "kept", what]["value"] for what in (spike, "eval_loss"))
        early_end = rows[f"early_{arm}", 160, "kept", "eval_loss"]["value"]
        cells = (late, high, end, early, early_end)
        figures.append(f"| {name} | {' | '.join(f'{value:+.3f}' for value in cells)} |")
    assert missing("docs/studies.md", figures) == []


def test_what_confound_says():
    rows, table = comparison("confound"), {}
    for row in read("studies/confound/contrasts"):
        table[row["outcome"].split()[0], row["contrast"]] = row  # training, final, area
    spike, end = (table[outcome, "interaction"] for outcome in ("training", "final"))
    both = table["training", "moments lost, cosine stretched"]["value"]
    both += table["training", "cosine stretched, moments kept"]["value"]
    early = [f"{name}, at step 160" for name in ("moments lost, cosine kept", "moments lost, cosine stretched")]
    early_both = table["training", early[1]]["value"]
    early_both += table["training", "cosine stretched, moments kept, at step 160"]["value"]
    lost = ("moments lost, cosine kept", "moments lost, cosine stretched", *early)
    costs = [table["final", name]["value"] for name in lost]
    stretched = (("stretched", 480), ("early_stretched", 160))
    gains = [-rows[arm, at, "kept", "eval_loss"]["value"] for arm, at in stretched]
    planned = rows["planned", None, "kept", "eval_loss"]["seeds"]
    beyond = -statistics.mean(planned) + statistics.mean(rows["stretched", 480, "kept", "eval_loss"]["seeds"][:3])
    primary = [row for row in table.values() if row["primary"]]
    assert len(primary) == 8 and all(row["verdict"].startswith("differs") for row in primary)
    alone = table["training", "moments lost, cosine kept"]["value"]
    alone += table["training", "cosine stretched, moments kept"]["value"]
    assert both > 2 * alone and spike["value"] > both / 2 and end["high"] < end["margin"] == 0.01
    figures = [
        f"is {spike['value']:.3f} nats (95 % interval {spike['low']:.3f} to {spike['high']:.3f}) of {both:.3f}",
        f"{table['training', early[0]]['value']:.3f} of {early_both:.3f}",
        f"**Lost moments cost {min(costs):.3f} to {max(costs):.3f} nats at the end**",
        f"{costs[0]:.3f} with the kept cosine and {costs[1]:.3f} with the stretched one after step 480,",
        f"{costs[2]:.3f} and {costs[3]:.3f} after step 160",
        f"by {gains[0]:.3f} and {gains[1]:.3f} nats",
        f"ends another {beyond:.3f} nats lower (the same three seeds",
        f"p at most {short(max(row['p_holm'] for row in primary), '.0e')} after Holm's correction",
        f"the interaction in the final loss, {end['value']:.4f}, is below",
        f"{read('studies/confound/records')['cost']['runs']} runs)",
    ]
    assert missing("docs/studies.md", figures) == []


def test_the_jump_of_the_rate():
    """The authors' cosine, written out: warm-up of 50 steps, a floor of a tenth, length 600 or stretched."""

    def jump(step: int) -> float:
        kept, stretched = (
            0.1 + 0.45 * (1 + math.cos(math.pi * (step - 50) / (length - 50))) for length in (600, 600 + step)
        )
        return stretched / kept

    figures = [
        f"at step 480, where the stretched rate is {jump(480):.1f} times the kept one",
        f"at step 160, where it is {jump(160):.2f} times",
    ]
    assert missing("docs/studies.md", figures) == []
    assert missing("README.md", [f"where the rate jumps {jump(480):.1f} times"]) == []


def test_the_contrasts_of_confound_follow_from_its_runs():
    """Computed again from results.csv, by nothing of the package."""
    curves: dict = defaultdict(dict)
    with open(ROOT / "benchmarks/studies/confound/results.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] in ("loss", "eval_loss"):
                curves[row["arm"], row["metric"], row["seed"]][int(row["step"])] = float(row["value"])
    weights = {
        "moments lost, cosine kept": {"lost": 1, "kept": -1},
        "moments lost, cosine stretched": {"both": 1, "stretched": -1},
        "cosine stretched, moments kept": {"stretched": 1, "kept": -1},
        "interaction": {"both": 1, "stretched": -1, "lost": -1, "kept": 1},
    }
    checked = 0
    for row in read("studies/confound/contrasts"):
        name, _, early = row["contrast"].partition(", at step ")
        at, end = (160, 760) if early else (480, 1080)
        if row["outcome"].startswith("area"):
            continue
        metric = "loss" if row["outcome"].startswith("training") else "eval_loss"
        for seed, value in row["seeds"].items():
            total = 0.0
            for arm, weight in weights[name].items():
                curve = curves["early_" + arm if early and arm != "kept" else arm, metric, seed]
                steps = range(at + 5, at + 51, 5) if metric == "loss" else (end,)
                total += weight * statistics.mean(curve[step] for step in steps)
            assert abs(total - value) < 1e-9, (row["outcome"], row["contrast"], seed)
            checked += 1
    assert checked == 2 * 4 * (10 + 5)


def test_the_other_studies():
    half, lora, shots = (comparison(name) for name in ("curation", "lora_sizes", "shots"))
    costs, gains = (half["half", None, "curated", f"{kind} bits_per_byte"]["value"] for kind in ("curated", "raw"))
    bits = "embedded_docs bits_per_byte"
    to_base = [(what, row["value"]) for (_, _, against, what), row in lora.items() if against == "its base"]
    learned, forgotten = ([value for what, value in to_base if what == name] for name in ("answer_loss", bits))
    pairs = {(arm, what): row for (arm, _, against, what), row in lora.items() if against != "its base"}
    verdicts = [row["verdict"] for (_, what), row in pairs.items() if what == bits]
    assert sorted(verdicts) == ["differs, by less than the margin", *["equal within the margin"] * 5]
    small = [row["verdict"] for (arm, what), row in pairs.items() if what == "answer_loss" and not arm.startswith("8m")]
    assert small == ["equal within the margin"] * 4
    large = pairs["8m-lora-16", "answer_loss"]
    assert pairs["8m-lora-4", "answer_loss"]["verdict"] == "cannot tell" and large["verdict"] == "differs"
    examples = [-shots[arm, None, "none", "embedded_next_sentence acc_norm"]["value"] for arm in ("one", "two")]
    noise = read("trends")
    measured = noise["noise of committed runs"]
    figures = [
        f"costs {costs:.1f} bits per byte on documentation and gains {-gains:.1f} on raw files",
        f"falls by {-max(learned):.2f} to {-min(learned):.2f} nats",
        f"ends {-large['value']:.3f} nats below full tuning (p {large['p_holm']:.3f} after",
        f"costs {min(forgotten):.2f} to {max(forgotten):.2f} bits per byte more after tuning",
        f"forgets {pairs['1m-lora-4', bits]['value']:.3f} more",
        f"is {min(examples):.3f} to {max(examples):.3f} lower with one or two examples",
        f"is {measured['confound']:.3f} nats (`confound`",
        f"and {measured['curation']:.3f} (`curation`)",
        f"it was {noise['noise of replaced runs']['lora_sizes']:.4f}",
    ]
    assert missing("docs/studies.md", figures) == []


def test_figures_of_evidence():
    layouts, texts, suggest, resume = map(read, ("layouts", "own_text", "suggest", "resume"))
    trace, evaluate, mixture, llama_cpp = map(read, "trace evaluate mixture llama_cpp".split())
    page, chat, adapter = read("report")["made_up"], read("chat")["merged"], read("chat")["adapter"]
    float32, bfloat16 = (layouts[name]["largest_difference_in_nats"] for name in ("float32", "bfloat16"))
    sizes, counts = ([text[name] for text in texts.values()] for name in ("megabytes", "files"))
    assert {text[command] for text in texts.values() for command in ("pretrain", "tune", "evaluate")} == {0}
    models = [(row["bits_per_byte"].pop("suggested"), min(row["bits_per_byte"].values())) for row in suggest["loss"]]
    code, docs, avx2_code, avx2_docs = (f"{found:.2f} beside {preset:.2f}" for found, preset in models)
    assert all(found < preset for found, preset in models)
    gb, mb = (resume[name]["seconds"] for name in ("save_1_gb", "save_100_mb"))
    pairs = [[a - b for a, b in zip(one["ours"], one["trainer_and_fsync"], strict=True)] for one in (gb, mb)]
    behind = resume["save_1_gb"]["background"]
    scale, per_document = trace["scale"], read("prepare")["index"]["bytes_per_document"]
    memory = max(scale[name]["most_mib_beyond_imports"] for name in ("step", "document", "document_by_file_and_row"))
    bits = max(abs(one["difference"]) for model in llama_cpp.values() for one in model["formats"].values())
    assert layouts["accepted"] == len(layouts["each"]) == 50 and bits < 0.001
    figures = [
        f"all {layouts['accepted'] // 2} pairs are accepted in each precision",
        f"within {short(float32)} nats (float32) and {short(bfloat16)} (bfloat16)",
        f"{len(texts)} of {len(texts)} folders of {min(sizes):g} to {max(sizes):g} MB,"
        f" {min(counts)} to {max(counts):,} files",
        f"20 MB of Python code {code}, documentation {docs}; limited to AVX2 {avx2_code}, and {avx2_docs}",
        f"which lie between {min(pairs[0]):.2f} and {max(pairs[0]):.2f} s",
        f"(between {min(pairs[1]):.2f} and {max(pairs[1]):.2f} s: no difference found)",
        f"({statistics.median(behind['seconds']['blocked']):.2f} s at 1 GB)",
        f"takes {behind['slow_disk']['mb_per_second']:.0f} MB/s",
        f"while 1 GB is written for {behind['slow_disk']['writing_seconds']} s",
        f"the slowest took {scale['step']['slowest_seconds']:.2f} s), with at most {memory} MiB more",
        f"in a run over {scale['tokens'] / 1e9:.1f}e9 (sparse) tokens of {scale['documents'] / 1e6:.0f}e6 documents",
        f"searching {trace['scan']['megabytes']} MB of tokens",
        f"{per_document['.npy']} bytes per document, and {per_document['.parquet']} more",
        f"{evaluate['memory']['gib_beyond_the_weights_rolling']:.1f} GiB beyond the weights",
        f"takes ({chat['seconds']['chat']:.1f} s); an answer of at most 150 tokens"
        f" ends {chat['seconds']['end'] - chat['seconds']['chat']:.1f} s later",
        f"After {adapter['first_answer_to_transformers']:.2f} times with its adapter over the base, as in README"
        f" ({adapter['seconds']['chat']:.1f} s;",
        f"of {page['log_lines']:,} log lines, {page['revisions']} revisions",
        f"{page['bytes'] / 1e6:.1f} MB; made in",
        f"of {mixture['mixtures']} random mixtures",
        f"at most {mixture['worst_distance'] + 1e-9:.3f} windows",
        "all {texts} texts and {code_points:,} code points".format(**llama_cpp["demo"]["ids"]),
        "SmolLM2-135M: {equal} of {prompts}".format(**llama_cpp["smollm2-135m"]["formats"]["float32"]["greedy"]),
        f"beyond {read('prepare_on_ray')['seconds_to_start_ray']} s to start the cluster",
    ]
    assert missing("docs/evidence.md", figures) == []
    low, high = read("outage")["step_time_95_interval"]
    agree = f"to {short(bfloat16)} nats in bfloat16 and {short(float32)} in float32"
    assert missing("docs/gpus-and-clusters.md", [agree]) == []
    assert missing("docs/hub.md", [f"95 % interval {low + 1e-9:.2f} to {high + 1e-9:.2f}"]) == []


def test_the_first_screen_of_the_demo():
    """The lines that README and getting-started show are of the committed run."""
    log = [json.loads(line) for line in (ROOT / "benchmarks/demo/log.jsonl").read_text(encoding="utf-8").splitlines()]
    begin, data = next(entry for entry in log if entry["step"] == 10), read("demo/data")
    kept, given = (data["curation"][name] for name in ("kept", "read"))
    train, validation = (data["splits"][name]["tokens"] for name in ("train", "validation"))
    shown = [
        f"step 10/900 loss {begin['loss']:.4f} grad {begin['grad_norm']:.2f} lr {begin['learning_rate']:.2e}"
        f" {begin['tokens_per_second']:,.0f} tok/s mfu {begin['mfu']:.1f}%",
        f"{train:,} training and {validation:,} validation tokens, vocabulary 4,096, fingerprint {data['fingerprint'][:12]};"
        f" baselines: unigram {data['baselines']['unigram']:.3f}, bigram {data['baselines']['bigram']:.3f} nats",
    ]
    curated = (
        f"{given['documents']:,} documents, {given['characters']:,} characters -> {kept['documents']:,} documents,"
        f" {kept['characters']:,} characters kept"
    )
    assert missing("README.md", shown) == [] and missing("docs/getting-started.md", [*shown, curated]) == []


def test_what_tuning_changed_in_the_demo():
    from llama_lite.evaluation.before_after import table

    page = (ROOT / "docs/instruction-tuning.md").read_text(encoding="utf-8")
    assert f"```text\n{table(read('demo/before_after'))}\n```" in page


def test_the_terminal_of_the_demo():
    """The lines, the processor and the day that pages show are those of the recorded output."""
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in render_demo.PAGES}
    wrong = [page for page, text in pages.items() if render_demo.placed(text) != text]
    assert wrong == [], "python -m benchmarks.render_demo"


def test_the_row_of_the_simulated_statistics():
    found = read("simulate_statistics")
    reach = {row["what"]: row for row in found["reach"]}
    covered, null = reach["coverage, ten and more clusters"], reach["true null rejected"]
    means = [row["rejected"] for row in found["heavy_tails"] if not row["tail"].startswith("lognormal")]
    tails = [row["rejected"] for row in found["heavy_tails"] if row["tail"].startswith("lognormal")]
    figures = [
        f"{covered['lowest']:.2f} to {covered['highest']:.2f} of the intervals of shares hold the truth",
        f"is rejected in {null['highest']:.3f} of the cases at most",
        f"it is {min(means):.3f} to {max(means):.3f}, but {min(tails):.2f} to {max(tails):.2f} with very heavy tails",
    ]
    assert missing("docs/evidence.md", figures) == []
    assert null["highest"] <= 0.06 and [row for row in reach.values() if row["beyond"]] == []


def test_times_name_their_processor_or_their_day():
    """Rows of evidence with an absolute time, and the first screens of README and getting-started."""
    time = re.compile(r"\d(\.\d+)? (s|µs|ms|minutes)\b")
    rows = [row for row in (ROOT / "docs/evidence.md").read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    timed = [row for row in rows if time.search(row.split(" | ")[1])]
    assert len(timed) >= 10
    assert [row for row in timed if not re.search(r"AMD EPYC, Zen [35]\)|Emerald Rapids\)|\(2026-11-\d\d\)", row)] == []
    entry = render_demo.recorded(render_demo.TERMINAL.read_text(encoding="utf-8"))
    shown = render_demo.processor_in_words(entry["processor"])
    for page in ("README.md", "docs/getting-started.md"):
        assert missing(page, [shown]) == []
