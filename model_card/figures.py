"""The figures of cards: one style, from the records of a folder alone; the same records give the same bytes."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .records import run_of

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6F6F6F"  # Okabe and Ito: safe for color-blind readers
SETS = ("#CC79A7", "#009E73", "#56B4E9", "#E69F00", "#000000")  # of the same palette
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure to `path` without the date and the version of matplotlib, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def training_curves(
    log: list[dict], baselines: dict, path: Path, resumed: list[int] = (), sets: list[str] = ()
) -> None:
    """Draw training and validation loss, learning rate and gradient norm against tokens.

    log: the entries of log.jsonl. baselines: {"bigram", "unigram": nats per token}. resumed: steps to mark. sets: names
    of validation sets, which get a line each.
    """
    trained = [entry for entry in log if "loss" in entry]
    scale, unit = (1e9, "billion") if log and log[-1]["tokens"] >= 1e9 else (1e6, "million")
    tokens = [entry["tokens"] / scale for entry in trained]
    with plt.rc_context(STYLE):
        figure, (top, middle, bottom) = plt.subplots(
            3, 1, figsize=(8, 8), sharex=True, height_ratios=[3, 1, 1], layout="constrained"
        )
        _draw_losses(top, trained, [entry for entry in log if "eval_loss" in entry], baselines, scale)
        _draw_sets(top, log, sets, scale)
        tokens_at = {entry["step"]: entry["tokens"] for entry in log if "step" in entry}
        for number, step in enumerate(sorted({step for step in resumed if step in tokens_at})):
            top.axvline(tokens_at[step] / scale, color=GREEN, lw=1, ls="-.", label="resumed" if number == 0 else None)
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="best" if sets else "upper center")
        middle.plot(tokens, [entry["learning_rate"] for entry in trained], color=GREEN)
        middle.set_ylabel("learning rate")
        middle.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        normed = [entry for entry in trained if "grad_norm" in entry]  # steps that float16 skipped have none
        norms = [entry["grad_norm"] for entry in normed]
        bottom.plot([entry["tokens"] / scale for entry in normed], norms, color=BLUE, lw=1)
        bottom.set_yscale("log")
        bottom.set_ylabel("gradient norm")
        bottom.set_xlabel(f"training tokens ({unit})")
        save(figure, path)


def _draw_losses(axes: Axes, trained: list[dict], evaluated: list[dict], baselines: dict, scale: float) -> None:
    """Training loss, validation loss with its last value, and the losses of n-gram counts. scale: tokens per unit of
    the axis.
    """
    axes.plot(
        [entry["tokens"] / scale for entry in trained],
        [entry["loss"] for entry in trained],
        color=BLUE,
        alpha=0.45,
        lw=1,
        label="training",
    )
    axes.plot(
        [entry["tokens"] / scale for entry in evaluated],
        [entry["eval_loss"] for entry in evaluated],
        color=ORANGE,
        marker="o",
        ms=4,
        label="validation",
    )
    for name, style in (("bigram", "--"), ("unigram", ":")):
        if name in baselines:
            axes.axhline(baselines[name], color=GREY, ls=style, lw=1.2)
            axes.annotate(
                f"{name} counts {baselines[name]:.2f}",
                (1, baselines[name]),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                color=GREY,
                fontsize=9,
            )
    if evaluated:
        axes.annotate(
            f"{evaluated[-1]['eval_loss']:.3f}",
            (evaluated[-1]["tokens"] / scale, evaluated[-1]["eval_loss"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=ORANGE,
        )


def _draw_sets(axes: Axes, log: list[dict], sets: list[str], scale: float) -> None:
    """The validation loss of each set. scale: tokens per unit of the axis."""
    for number, name in enumerate(sets):
        measured = [entry for entry in log if f"eval_{name}_loss" in entry]
        axes.plot(
            [entry["tokens"] / scale for entry in measured],
            [entry[f"eval_{name}_loss"] for entry in measured],
            color=SETS[number % len(SETS)],
            ls=("-", "--", ":")[number // len(SETS) % 3],
            marker=".",
            lw=1,
            label=f"validation: {name}",
        )


def curation(report: dict, path: Path) -> None:
    """Draw what each rule of `curation.json` dropped, in characters and documents, down to what was kept."""
    rows = [("read", report["read"]["characters"], report["read"]["documents"], GREY)]
    rows += [
        (f"- {rule['rule']}", rule["characters_dropped"], rule["documents_dropped"], ORANGE) for rule in report["rules"]
    ]
    rows += [("kept", report["kept"]["characters"], report["kept"]["documents"], GREEN)]
    total = max(report["read"]["characters"], 1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
        left = 0
        for index, (name, characters, documents, color) in enumerate(rows):
            start = total - left - characters if name.startswith("- ") else 0
            axes.barh(index, characters / 1e6, left=start / 1e6, color=color, height=0.7)
            if name.startswith("- "):
                left += characters
            text = f"{characters / 1e6:.2f}M characters, {documents:,} documents"
            is_inside, is_left = characters > 0.5 * total, start > 0.5 * total
            axes.annotate(
                text,
                ((start if is_left else start + characters) / 1e6, index),
                xytext=(-6 if is_inside or is_left else 6, 0),
                textcoords="offset points",
                ha="right" if is_inside or is_left else "left",
                va="center",
                fontsize=9,
                color="white" if is_inside else "black",
            )
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("million characters")
        save(figure, path)


def before_after(record: dict, path: Path) -> None:
    """Draw what tuning changed, from `before_after.json`: losses with the interval of their paired difference, and how
    answers end.
    """
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=[2, 3], layout="constrained")
        for index, key in enumerate(("answer_loss", "end_of_text_loss")):
            values = record[key]
            if values is None:
                left.annotate(
                    "none: all were cut",
                    (index, 0),
                    xytext=(0, 8),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )
                continue
            change = values["difference"]
            left.bar(index - 0.2, values["before"], 0.38, color=GREY, label="before" if index == 0 else None)
            errors = (
                None
                if change["low"] is None
                else [[change["value"] - change["low"]], [change["high"] - change["value"]]]
            )
            left.bar(
                index + 0.2,
                values["after"],
                0.38,
                color=BLUE,
                yerr=errors,
                capsize=3,
                label="after" if index == 0 else None,
            )
            for x, value in ((index - 0.2, values["before"]), (index + 0.2, values["after"])):
                left.annotate(
                    f"{value:.2f}", (x, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9
                )
        left.set_xticks([0, 1], ["held-out\nanswers", "end of\nthe answer"])
        left.set_ylabel("loss (nats per token)")
        left.set_title("bar: 95 % of the paired difference", fontsize=9, color=GREY)
        left.margins(y=0.15)
        left.legend(loc="upper right", fontsize=9)
        rows = [
            (decoding, key, name)
            for decoding in ("greedy", "sampled")
            for key, name in (("stopped", "stop"), ("kept_format", "keep the format"), ("loops", "loop"))
            if decoding in record
        ]
        for index, (decoding, key, _) in enumerate(rows):
            before, after = record[decoding]["before"][key], record[decoding]["after"][key]
            right.plot([before * 100, after * 100], [index, index], color=GREY, lw=1.5, zorder=1)
            right.scatter([before * 100], [index], color=GREY, s=45, zorder=2, label="before" if index == 0 else None)
            right.scatter([after * 100], [index], color=BLUE, s=45, zorder=3, label="after" if index == 0 else None)
        right.set_yticks(range(len(rows)), [f"{decoding} answers that {name}" for decoding, _, name in rows])
        right.invert_yaxis()
        right.set_xlim(-4, 104)
        right.set_xlabel("share of answers (%)")
        save(figure, path)


def trajectory(rows: list[dict], path: Path) -> None:
    """Draw scores against training tokens, one panel per task: the evaluated steps of each run as a line, other models
    as levels; 95 % intervals; chance where there are options.

    rows: {task, metric, value, low, high, chance, tokens, model, adapter} of the models in the order asked for.
    """
    names = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(3, len(names))
    panel_rows = -(-len(names) // columns)
    lines = _steps_of_runs(rows)
    inside = {model for models in lines.values() for model in models}
    levels = dict.fromkeys(row["model"] for row in rows if row["model"] not in inside)
    palette = itertools.cycle((BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00"))
    colors = dict(zip([*lines, *levels], palette, strict=False))
    most_tokens = max((row["tokens"] for row in rows if row["model"] in inside), default=0)
    scale, unit = (1e9, "billion") if most_tokens >= 1e9 else (1e6, "million")
    with plt.rc_context({**STYLE, "font.size": 10}):
        figure, panels = plt.subplots(
            panel_rows, columns, figsize=(3.6 * columns, 2.9 * panel_rows), squeeze=False, layout="constrained"
        )
        for panel, name in zip(panels.flat, names, strict=False):
            group = [row for row in rows if row["task"] == name]
            for run, models in lines.items():
                _draw_run(panel, [row for row in group if row["model"] in models], scale, colors[run])
            for row in group:
                if row["model"] in levels:
                    _draw_level(panel, row["value"], _short(row["model"]), colors[row["model"]])
            if (chance := group[0].get("chance")) is not None:
                _draw_level(panel, chance, "chance", GREY, is_chance=True)
            if not lines:
                panel.set_xticks([])
            panel.set_title(name.removeprefix("embedded_").replace("_", " "), fontsize=10)
            panel.set_ylabel(group[0]["metric"].replace("_", " "), fontsize=9)
        for panel in panels.flat[len(names) :]:
            panel.axis("off")
        if lines:
            figure.supxlabel(f"training tokens ({unit}); band: 95 % interval", fontsize=9)
        if len(lines) > 1:
            handles = [Line2D([], [], color=colors[run], marker="o", ms=4, lw=1.4) for run in lines]
            figure.legend(handles, _labels(list(lines)), loc="outside upper center", ncols=len(lines), fontsize=9)
        save(figure, path)


def _steps_of_runs(rows: list[dict]) -> dict[str, list[str]]:
    """{run: names of its steps} of the runs of which several steps were evaluated."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if row["tokens"] and not row["adapter"] and row["model"] not in runs.setdefault(run_of(row["model"]), []):
            runs[run_of(row["model"])].append(row["model"])
    return {run: models for run, models in runs.items() if len(models) > 1}


def _draw_run(panel: Axes, rows: list[dict], scale: float, color: str) -> None:
    """The scores of a run's steps on a task, with their intervals where all have one. scale: tokens per unit of the
    axis.
    """
    line = sorted(rows, key=lambda row: row["tokens"])
    x, y = [row["tokens"] / scale for row in line], [row["value"] for row in line]
    panel.plot(x, y, color=color, marker="o", ms=4, lw=1.4)
    if line and all(row["low"] is not None for row in line):
        low, high = ([row[name] for row in line] for name in ("low", "high"))
        panel.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


def _draw_level(panel: Axes, value: float, label: str, color: str, is_chance: bool = False) -> None:
    """A horizontal line with its label: at the right, or of random answers at the left."""
    panel.axhline(value, color=color, lw=1 if is_chance else 1.2, ls=":" if is_chance else "--")
    panel.annotate(
        label,
        (0.01 if is_chance else 1, value),
        xycoords=("axes fraction", "data"),
        xytext=(0 if is_chance else -2, 2),
        textcoords="offset points",
        ha="left" if is_chance else "right",
        color=color,
        fontsize=7,
    )


def _labels(runs: list[str]) -> list[str]:
    """Names of runs for readers: their last parts, or the last two where the last are the same."""
    short = list(map(_short, runs))
    return short if len(set(short)) == len(short) else ["/".join(run.split("/")[-2:]) for run in runs]


def _short(name: str) -> str:
    """`runs/demo+runs/demo-sft` -> `+demo-sft`; the last part of any other reference."""
    base, plus, adapter = name.partition("+")
    return f"+{adapter.split('/')[-1]}" if plus else base.split("/")[-1]


def variants(rows: list[dict], kind: str, path: Path) -> None:
    """Draw how variants of the prompt change the score, one panel per model and task, with the factors below each
    other.

    rows: those of sensitivity.json or robustness.json. Dots are variants with the 95 % interval of their paired change.
    """
    names = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    factors = {
        name: [row for row in rows if (row["model"], row["task"]) == name and row["factor"] != "all"] for name in names
    }
    height = max(sum(len(row["changes"]) for row in group) + len(group) for group in factors.values())
    with plt.rc_context({**STYLE, "font.size": 9, "axes.grid": False}):
        figure, panels = plt.subplots(
            1, len(names), figsize=(4.6 * len(names) + 0.6, 0.2 * height + 1.2), squeeze=False, layout="constrained"
        )
        for panel, name in zip(panels[0], names, strict=True):
            position, labels = 0, []
            for row in factors[name]:
                labels.append((position, row["factor"], "bold"))
                position += 1
                for label, change in zip(row["variants"][1:], row["changes"], strict=True):
                    if change["low"] is not None:
                        panel.plot([change["low"], change["high"]], [position, position], color=BLUE, lw=1.4)
                    panel.plot(change["value"], position, "o", color=BLUE, ms=4)
                    labels.append((position, label, "normal"))
                    position += 1
            panel.axvline(0, color=GREY, lw=1)
            panel.set_yticks(
                [label_position for label_position, _, _ in labels], [text for _, text, _ in labels], fontsize=7
            )
            for tick, (_, _, weight) in zip(panel.get_yticklabels(), labels, strict=True):
                tick.set_fontweight(weight)
            panel.invert_yaxis()
            panel.tick_params(axis="y", length=0)
            overall = next(row for row in rows if (row["model"], row["task"]) == name and row["factor"] == "all")
            title = f"{name[1].removeprefix('embedded_').replace('_', ' ')} ({_short(name[0])})"
            if "flips" in overall:
                flips = overall["flips"]
                blind = "" if flips["blind"] is None else f" (random answers {flips['blind']:.0%})"
                title += f"\n{flips['value']:.0%} of answers change{blind}"
            panel.set_title(title, fontsize=9)
            panel.set_xlabel(f"change of {overall['metric'].replace('_', ' ')} (95 % interval)")
        figure.suptitle(
            {"sensitivity": "The same items with other prompts", "robustness": "The same items, perturbed"}[kind],
            fontsize=11,
        )
        save(figure, path)


def generalization(rows: list[dict], path: Path) -> None:
    """Draw bits per byte, one group per kind of text and one bar per model; 95 % intervals. rows: those of
    generalisation.json.
    """
    names, models = list(dict.fromkeys(row["task"] for row in rows)), list(dict.fromkeys(row["model"] for row in rows))
    shown = models if len(models) <= 5 else [models[0], models[len(models) // 2], *models[-2:]]
    colors = (GREY, "#56B4E9", BLUE, ORANGE, GREEN)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
        width = 0.8 / len(shown)
        for index, (model, color) in enumerate(zip(shown, colors, strict=False)):
            for group, name in enumerate(names):
                row = next(row for row in rows if row["task"] == name and row["model"] == model)
                x = group + (index - (len(shown) - 1) / 2) * width
                errors = (
                    None
                    if row["low"] is None
                    else [[row["bits_per_byte"] - row["low"]], [row["high"] - row["bits_per_byte"]]]
                )
                axes.bar(
                    x,
                    row["bits_per_byte"],
                    width * 0.92,
                    color=color,
                    yerr=errors,
                    error_kw={"lw": 1},
                    label=_short(model) if group == 0 else None,
                )
        axes.set_xticks(range(len(names)), [name.removeprefix("embedded_").replace("_", " ") for name in names])
        axes.set_ylabel("bits per byte (lower is better)")
        axes.legend(fontsize=8, ncols=min(4, len(shown)), loc="lower center", bbox_to_anchor=(0.5, 1))
        save(figure, path)
