"""The README's tables of speed, of kinds of machine, and of what the studies found, out of the committed results.

python -m benchmarks.table     # writes them between their marks in README.md
"""

import json
from pathlib import Path

from model_card.study import name_of, verdict

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"
SHAPES = ("6x256", "124m, 4 layers")


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


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
    names["nanogpt"] = "that loop, whole model compiled (nanoGPT, litgpt)"
    for way, name in names.items():
        row(f"speed, against {name}", lambda shape, way=way: f"{shape['ours_to'][way]:.2f}x")
    flags = {
        "fused loss": "fused_loss",
        "attention in blocks": "block_attention",
        "compiled layers": "compile_layers",
        "kept memory": "keep_memory",
    }
    for switch, flag in flags.items():
        row(
            f"speed, against ours without `--{flag}`",
            lambda shape, switch=switch: f"{shape['switch_gives'][switch]:.2f}x",
        )
    row("share of what the matrix products alone allow", lambda shape: f"{100 * shape['share_of_ceiling']:.0f} %")
    row("two processes, against one on the same two cores", lambda shape: f"{shape['two_processes_to_one']:.2f}x")
    row(
        "peak memory, GiB: ours, `Trainer --bf16`",
        lambda shape: f"{shape['peak_gib']['ours']:.2f}, {shape['peak_gib']['run_clm']:.2f}",
    )
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    seconds, memory = start["seconds"], ""
    if peak := train.get("124m"):
        memory = (
            f"The whole 124m preset, micro-batch 8 x 1,024: {peak['peak_gib']['ours']:.1f} GiB,"
            f" {100 * peak['ours_to_run_clm']:.0f} % of `Trainer --bf16`'s {peak['peak_gib']['run_clm']:.1f}. "
        )
    return (
        f"{text}\n\n{memory}First step of a tiny run after {start['first_step_to_imports']:.2f} times what importing"
        f" Trainer and SFTTrainer takes ({seconds['first step']:.1f} s and {seconds['imports']:.1f} s; resumed and"
        f" verified {seconds['resumed']:.1f} s; with `--compile_layers` {seconds['compiled, cold']:.0f} s, and"
        f" {seconds['compiled, warm']:.0f} s from torch's cache).\nMeasured on {train['cores']} cores with"
        f" {train['capability']}, torch {train['torch']}, {train['date']}: `benchmarks/train.py`,"
        " `benchmarks/start.py`; medians of slices in turn.\n"
    )


def machines() -> str:
    """A kind of machine a row: what is chosen there, the demo's time, and what the choice is worth for the demo's
    model. Markdown.
    """
    train, demo, rows = read("train")["machines"], read("demo")["demo"], []
    rows = [
        [
            "processor",
            "precision",
            "`make demo`",
            "switches of a long run",
            "against the best of all",
            "against all off",
        ],
        ["---"] * 6,
    ]
    for name, found in train.items():
        timed = demo.get("AVX512-BF16" if name == "this processor" else name)
        minutes = f"{sum(timed['stages']) / 60:.1f} minutes" if timed else ""
        on = ", ".join(f"`--{switch}`" for switch in found["long"].split())
        sizes = [found[shape] for shape in ("1m", "demo")]
        measures = [
            ", ".join(f"{size[measure]:.2f}" for size in sizes) for measure in ("long_to_best", "long_to_nothing")
        ]
        rows.append(
            ["AVX512 with bfloat16" if name == "this processor" else name, found["precision"], minutes, on, *measures]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def studies() -> str:
    """A table a study: arms down, measures across, each cell a difference with its 95 % interval. Markdown."""
    parts = []
    for folder in sorted((ROOT / "benchmarks" / "studies").iterdir()):
        rows = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        title = (folder / "report.md").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        measures = {row["what"]: row["unit"] for row in rows}
        cells: dict = {}
        for row in rows:
            cells.setdefault((name_of(row), row["against"]), {})[row["what"]] = _cell(row)
        head = ["arm", "less", *(f"{what}{f' ({unit})' if unit else ''}" for what, unit in measures.items())]
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


def _cell(row: dict) -> str:
    if row["value"] is None:
        return verdict(row)
    form = "{:+,.0f}" if row["unit"] == "tokens" else "{:+.3f}"
    value = form.format(row["value"])
    if row["low"] is None:
        return f"{value}, {verdict(row)}"
    return (
        f"{value} ({form.format(row['low'])} to"
        f" {form.format(row['high'])}){'' if verdict(row) != 'not significant' else ', none found'}"
    )


PARTS = {
    "<!-- benchmarks/table.py -->\n": table,
    "<!-- kinds of machine -->\n": machines,
    "<!-- benchmarks/studies -->\n": studies,
}


def placed(readme: str) -> str:
    """The README's text with the tables as they are now."""
    for begin, made in PARTS.items():
        before, rest = readme.split(begin)
        readme = f"{before}{begin}{made()}{END}{rest.split(END, 1)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")
