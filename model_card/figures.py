"""The project's figures: one style, from the records of a run folder alone; the same records give the same bytes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6F6F6F"  # Okabe and Ito: safe for colour-blind readers
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


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def training_curves(log: list[dict], baselines: dict, path: Path) -> None:
    """Training and validation loss, learning rate and gradient norm against tokens, from `log.jsonl`."""
    steps = [entry for entry in log if "loss" in entry]
    held = [entry for entry in log if "eval_loss" in entry]
    scale, unit = (1e9, "billion") if log and log[-1]["tokens"] >= 1e9 else (1e6, "million")
    with plt.rc_context(STYLE):
        figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, height_ratios=[3, 1, 1], layout="constrained")
        top.plot([e["tokens"] / scale for e in steps], [e["loss"] for e in steps], color=BLUE, alpha=0.45, lw=1, label="training")
        top.plot([e["tokens"] / scale for e in held], [e["eval_loss"] for e in held], color=ORANGE, marker="o", ms=4, label="validation")
        for name, style in (("bigram", "--"), ("unigram", ":")):
            if name in baselines:
                top.axhline(baselines[name], color=GREY, ls=style, lw=1.2)
                top.annotate(
                    f"{name} counts {baselines[name]:.2f}",
                    (1, baselines[name]),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="right",
                    color=GREY,
                    fontsize=9,
                )
        if held:
            top.annotate(
                f"{held[-1]['eval_loss']:.3f}",
                (held[-1]["tokens"] / scale, held[-1]["eval_loss"]),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                color=ORANGE,
            )
        top.set_ylabel("loss (nats a token)")
        top.legend(loc="upper center")
        middle.plot([e["tokens"] / scale for e in steps], [e["learning_rate"] for e in steps], color=GREEN)
        middle.set_ylabel("learning rate")
        middle.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.plot([e["tokens"] / scale for e in steps], [e["grad_norm"] for e in steps], color=BLUE, lw=1)
        bottom.set_yscale("log")
        bottom.set_ylabel("gradient norm")
        bottom.set_xlabel(f"training tokens ({unit})")
        _save(figure, path)


def curation(report: dict, path: Path) -> None:
    """What each rule of `curation.json` dropped, in characters and documents, down to what was kept."""
    rows = [("read", report["read"]["characters"], report["read"]["documents"], GREY)]
    rows += [(f"- {rule['rule']}", rule["characters_dropped"], rule["documents_dropped"], ORANGE) for rule in report["rules"]]
    rows += [("kept", report["kept"]["characters"], report["kept"]["documents"], GREEN)]
    total = max(report["read"]["characters"], 1)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1), layout="constrained")
        left = 0
        for place, (name, characters, documents, colour) in enumerate(rows):
            begin = total - left - characters if name.startswith("- ") else 0
            axes.barh(place, characters / 1e6, left=begin / 1e6, color=colour, height=0.7)
            if name.startswith("- "):
                left += characters
            text = f"{characters / 1e6:.2f}M characters, {documents:,} documents"
            inside, room = characters > 0.5 * total, begin > 0.5 * total
            axes.annotate(
                text,
                ((begin if room else begin + characters) / 1e6, place),
                xytext=(-6 if inside or room else 6, 0),
                textcoords="offset points",
                ha="right" if inside or room else "left",
                va="center",
                fontsize=9,
                color="white" if inside else "black",
            )
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("million characters")
        _save(figure, path)


def before_after(record: dict, path: Path) -> None:
    """What tuning changed, from `before_after.json`: losses with the interval of their paired difference, and how answers end."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=[2, 3], layout="constrained")
        for place, key in enumerate(("answer_loss", "end_of_text_loss")):
            found = record[key]
            change = found["difference"]
            left.bar(place - 0.2, found["before"], 0.38, color=GREY, label="before" if place == 0 else None)
            reach = None if change["low"] is None else [[change["value"] - change["low"]], [change["high"] - change["value"]]]
            left.bar(place + 0.2, found["after"], 0.38, color=BLUE, yerr=reach, capsize=3, label="after" if place == 0 else None)
            for x, value in ((place - 0.2, found["before"]), (place + 0.2, found["after"])):
                left.annotate(f"{value:.2f}", (x, value), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        left.set_xticks([0, 1], ["held-out\nanswers", "end of\nthe answer"])
        left.set_ylabel("loss (nats a token)")
        left.set_title("bar: 95 % of the paired difference", fontsize=9, color=GREY)
        left.margins(y=0.15)
        left.legend(loc="upper right", fontsize=9)
        rows = [
            (how, key, name)
            for how in ("greedy", "sampled")
            for key, name in (("stopped", "stop"), ("kept_format", "keep the format"), ("loops", "loop"))
            if how in record
        ]
        for place, (how, key, _) in enumerate(rows):
            before, after = record[how]["before"][key], record[how]["after"][key]
            right.plot([before * 100, after * 100], [place, place], color=GREY, lw=1.5, zorder=1)
            right.scatter([before * 100], [place], color=GREY, s=45, zorder=2, label="before" if place == 0 else None)
            right.scatter([after * 100], [place], color=BLUE, s=45, zorder=3, label="after" if place == 0 else None)
        right.set_yticks(range(len(rows)), [f"{how} answers that {name}" for how, _, name in rows])
        right.invert_yaxis()
        right.set_xlim(-4, 104)
        right.set_xlabel("share of answers (%)")
        _save(figure, path)
