"""The documentation's tables of speed, kinds of machine and studies, made from the committed results.

python -m benchmarks.table     # writes them between their marks in docs/
"""

import json
from pathlib import Path

from benchmarks.render_demo import processor_in_words
from model_card.study import name_of, verdict

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
SHAPES = ("6x256", "124m, 4 layers")


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def used(record: dict) -> str:
    """The processor that a record was measured with."""
    return processor_in_words(record["processor"]) if "processor" in record else f"not recorded ({record['date']})"


def table() -> str:
    """Markdown."""
    train, start = read("train"), read("start")
    shapes = [train.get(shape, {}) for shape in SHAPES]
    rows = [
        ["", "6 x 256, 8k tokens, 512 context", "4 layers of the 124m preset, 50k tokens, 1,024 context"],
        ["---", "---", "---"],
    ]

    def row(name, value):
        cells = []
        for shape in shapes:
            try:
                cells.append(value(shape))
            except KeyError:
                cells.append("not measured yet")
        rows.append([name, *cells])

    names = {
        "trainer": "`Trainer` as it comes (float32)",
        "run_clm": "`Trainer --bf16`, as run_clm.py",
        "loop": "a plain bfloat16 loop",
    }
    names["nanogpt"] = "that loop with the whole model compiled (nanoGPT, litgpt)"
    for way, name in names.items():
        row(f"speed, relative to {name}", lambda shape, way=way: f"{shape['ours_to'][way]:.2f}x")
    flags = {
        "fused loss": "fused_loss",
        "attention in blocks": "block_attention",
        "compiled layers": "compile_layers",
        "kept memory": "keep_memory",
    }
    for switch, flag in flags.items():
        row(
            f"speed, relative to this project without `--{flag}`",
            lambda shape, switch=switch: f"{shape['switch_gives'][switch]:.2f}x",
        )
    row(
        "share of the speed that the matrix products alone would allow",
        lambda shape: f"{100 * shape['share_of_ceiling']:.0f} %",
    )
    row("two processes, relative to one on the same two cores", lambda shape: f"{shape['two_processes_to_one']:.2f}x")
    row(
        "peak memory, GiB: this project, `Trainer --bf16`",
        lambda shape: f"{shape['peak_gib']['ours']:.2f}, {shape['peak_gib']['run_clm']:.2f}",
    )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    seconds, memory = start["seconds"], ""
    if peak := train.get("124m"):
        memory = (
            f"The whole 124m preset, micro-batch 8 x 1,024: {peak['peak_gib']['ours']:.1f} GiB, "
            f"{100 * peak['ours_to_run_clm']:.0f} % of `Trainer --bf16`'s {peak['peak_gib']['run_clm']:.1f}. "
        )
    return (
        f"{text}\n\n{memory}A tiny run takes its first step after {start['first_step_to_imports']:.2f} times the time to "
        f"import Trainer and SFTTrainer ({seconds['first step']:.1f} s and {seconds['imports']:.1f} s; resumed and "
        f"verified {seconds['resumed']:.1f} s; with `--compile_layers` {seconds['compiled, cold']:.0f} s, and "
        f"{seconds['compiled, warm']:.0f} s from torch's cache; {used(start)}; `benchmarks/start.py`).\nThe rest was "
        f"measured on {train['cores']} cores with {train['capability']}, processor {used(train)}, torch {train['torch']}, with "
        "`benchmarks/train.py`; medians of alternating slices.\n"
    )


def machines() -> str:
    """One row per kind of machine: what is chosen there, and the speed of that choice. Markdown."""
    train = read("train")["machines"]
    rows = [
        [
            "instructions",
            "processor",
            "precision",
            "switches of a long run",
            "speed, relative to the best",
            "speed, relative to all off",
        ],
        ["---"] * 6,
    ]
    for name, found in train.items():
        on = ", ".join(f"`--{switch}`" for switch in found["long"].split())
        sizes = [found[shape] for shape in ("1m", "demo")]
        pairs = [[f"{size[measure]:.2f}" for size in sizes] for measure in ("long_to_best", "long_to_nothing")]
        measures = [", ".join(pair) for pair in pairs]
        rows.append([name, used(found), found["precision"], on, *measures])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def studies() -> str:
    """One table per study: arms down, metrics across, each cell a difference with its 95 % interval. Markdown."""
    parts = []
    for folder in sorted((ROOT / "benchmarks" / "studies").iterdir()):
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        title = (folder / "report.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        measures = {row["what"]: row["unit"].replace(" a ", " per ") for row in rows}
        cells: dict = {}
        for row in rows:
            cells.setdefault((name_of(row), row["against"]), {})[row["what"]] = _cell(row)
        head = ["arm", "compared with", *(f"{what}{f' ({unit})' if unit else ''}" for what, unit in measures.items())]
        lines = [
            head,
            ["---"] * len(head),
            *([*arm, *(found.get(what, "") for what in measures)] for arm, found in cells.items()),
        ]
        parts.append(
            f"**{title}** (`benchmarks/studies/{folder.name}/report.md`)\n\n"
            + "\n".join(f"| {' | '.join(line)} |" for line in lines)
            + "\n"
        )
    return "\n".join(parts)


def simulations() -> str:
    """What the simulation of the statistics gives, next to what is wanted. Markdown."""
    found = read("simulate_statistics")
    lines = [["", "cases", "lowest", "highest", "wanted"], ["---"] * 5]
    for row in found["reach"]:
        low, high = row["wanted"]
        wanted = f"at most {high:g}" if low == 0 else f"at least {low:g}" if high == 1 else f"{low:g} to {high:g}"
        outside = f" ({len(row['beyond'])} outside)" if row["beyond"] else ""
        lines.append(
            [row["what"], str(row["cases"]), f"{row['lowest']:.3f}", f"{row['highest']:.3f}", wanted + outside]
        )
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    again = [row for name in ("clustered_shares", "stratified_shares") for row in found[name] if "repeats" in row]
    near = f"; {len(again)} shares near a limit are of {again[0]['repeats']:,}" if again else ""
    tails = [row for row in found["heavy_tails"] if row["tail"].startswith("lognormal")]
    told = ", ".join(f"{row['coverage']:.2f} with {row['documents']}" for row in tails)
    rejected = ", ".join(f"{row['rejected']:.2f}" for row in tails)
    return (
        f"{text}\n\nFractions of {found['repeats']:,} simulated evaluations or more (a quarter of them for the spread{near}),"
        f" with `benchmarks/simulate_statistics.py`. Bits per byte with very heavy tails (lognormal, sigma 1.5) are the"
        f" exception: their interval holds the truth in {told} documents, and a true null is rejected in {rejected}.\n"
    )


def _cell(row: dict) -> str:
    if row["value"] is None:
        return verdict(row)
    form = "{:+,.0f}" if row["unit"] == "tokens" else "{:+.3f}"
    value = form.format(row["value"])
    if row["low"] is None:
        return f"{value}, {verdict(row)}"
    concluded = "" if row["verdict"] == "differs" else f", {verdict(row)}"
    return f"{value} ({form.format(row['low'])} to {form.format(row['high'])}){concluded}"


def _lines(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _noise(name: str) -> str:
    """The noise of a simulation, in words."""
    correlation, deviation = name.removeprefix("correlation ").split(", ")
    return f"{deviation}, correlation {correlation}"


def trends() -> str:
    """How often the verdicts on saturation and overfitting are given, and wrong, at some look of a run. Markdown."""
    rows = []
    for name, windows in read("trends")["windows"].items():
        for count in ("6", "10", "20", "40"):
            saturation, overfitting = windows[count]["saturation"], windows[count]["overfitting"]
            wrong = [told["yes, at some look"] for slope, told in saturation.items() if float(slope) <= -0.02]
            wrong += [told["no, at some look"] for slope, told in saturation.items() if float(slope) >= -0.02]
            wrong += [told["yes, at some look"] for slope, told in overfitting.items() if float(slope) <= 0]
            wrong += [told["no, at some look"] for slope, told in overfitting.items() if float(slope) > 0]
            right = saturation["0.0"]["yes, at some look"], saturation["-0.06"]["no, at some look"]
            right += overfitting["0.05"]["yes, at some look"], overfitting["0.2"]["yes, at some look"]
            rows.append([_noise(name), count, *(f"{share:.2f}" for share in right), f"{max(wrong):.3f}"])
    head = [
        "noise of an evaluation",
        "evaluations in the last doubling",
        "flat: saturated",
        "falls by 0.06: not saturated",
    ]
    return _lines([*head, "rises by 0.05: overfitting", "rises by 0.2: overfitting", "wrong, at most"], rows)


def paper() -> str:
    """What a test of the paper's 15e9 tokens would find. Markdown."""
    rows = []
    for name, found in read("trends")["paper"].items():
        slopes, median = found["slope"], found["found at"]["50 %"]
        cells = [slopes["0.0"]["yes"], slopes["-0.06"]["no"], slopes["-0.1"]["no"]]
        last = f"{median / 1e9:.1f}e9" if median else "not by 45e9"
        rows.append([_noise(name), *(f"{share:.2f}" for share in cells), last])
    head = ["noise of an evaluation", "flat: yes", "falls by 0.06: no", "falls by 0.1: no"]
    return _lines([*head, "by the last doubling, flat is found at (median)"], rows)


def stop_rule() -> str:
    """How often the stop rule of studies is wrong, and the seeds that it takes. Markdown."""
    rows = []
    for tests, found in read("stopping")["tests"].items():
        equality = max(one["wrong"] for name, case in found.items() if "of a diff" in name for one in case.values())
        medians = [found["difference"][effect]["median"] for effect in ("1.0", "2.0", "4.0")]
        wrong = [f"{100 * share:.1f} %" for share in (found["difference"]["0.0"]["wrong"], equality)]
        rows.append([tests, str(found["fewest seeds"]), *wrong, *(f"{median:.0f}" for median in medians)])
    head = ["primary tests", "fewest seeds", "false differences", "false equalities"]
    return _lines(
        [*head, *(f"seeds for a difference of {n} standard deviation{'s' * (n > 1)}" for n in (1, 2, 4))], rows
    )


def llama_cpp() -> str:
    """Markdown."""
    rows = [
        "| model | weights | bytes | equal greedy texts | ties | bits per byte | difference from transformers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in read("llama_cpp").items():
        for dtype in ("float32", "float16", "q8_0"):
            found = result["formats"][dtype]
            greedy = found["greedy"]
            rows.append(
                f"| {name}, {result['model']['parameters'] / 1e6:,.1f}M parameters | {dtype} | {found['bytes']:,} |"
                f" {greedy['equal']} of {greedy['prompts']} | {greedy['ties']} | {found['bits_per_byte']:.4f} |"
                f" {found['difference']:.1e} |"
            )
    return (
        "\n".join(rows) + "\n\nGreedy texts are 32 tokens after prompts of 32 tokens of documentation. A tie is a first"
        " difference where transformers' two likeliest tokens are within 1e-4 nats.\nMeasured with"
        " `benchmarks/llama_cpp.py`: counts, which do not depend on the speed of the machine.\n"
    )


PARTS = {
    "<!-- benchmarks/llama_cpp.py -->\n": llama_cpp,
    "<!-- simulate_statistics -->\n": simulations,
    "<!-- benchmarks/trends.py -->\n": trends,
    "<!-- benchmarks/trends.py, paper -->\n": paper,
    "<!-- benchmarks/stopping.py -->\n": stop_rule,
    "<!-- benchmarks/table.py -->\n": table,
    "<!-- kinds of machine -->\n": machines,
    "<!-- benchmarks/studies -->\n": studies,
}


def placed(page: str) -> str:
    """A page's text with the tables that have marks in it as they are now."""
    for begin, made in PARTS.items():
        if begin in page:
            before, rest = page.split(begin)
            page = f"{before}{begin}{made()}{END}{rest.split(END, 1)[1]}"
    return page


if __name__ == "__main__":
    for path in (ROOT / "docs").glob("*.md"):
        path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")
