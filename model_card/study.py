"""The report of a study, and its pictures, from its records: what was asked, what was held equal, every difference with
its interval.
"""

from pathlib import Path

import numpy as np

from .figures import BLUE, GREEN, GREY, ORANGE, STYLE, plt, save
from .private import redact

COLOURS = (GREY, BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")  # Okabe and Ito

SAME = "the same for every seed"


def shown(row: dict, value: float | None) -> str:
    """A value of a difference with its unit."""
    if value is None:
        return "-"
    return f"{value:+,.0f} tokens" if row["unit"] == "tokens" else f"{value:+.4f} {row['unit']}".strip()


def name_of(row: dict) -> str:
    return row["arm"] if row["at"] is None else f"{row['arm']} at {row['at']}"


def verdict(row: dict) -> str:
    """What an interval allows to be said: higher, lower, or no difference found."""
    if row["value"] is None:
        return f"not within the run for {sum(value is None for value in row['seeds'])} of {row['n']} seeds"
    if row["low"] is None:
        return "one seed: no interval" if row["n"] == 1 else SAME
    return "no difference found" if row["low"] <= 0 <= row["high"] else "higher" if row["low"] > 0 else "lower"


def line_of(row: dict) -> str:
    """A difference in one line."""
    interval = (
        "" if row["low"] is None else f" ({shown(row, row['low'])} to {shown(row, row['high'])}), {row['n']} seeds"
    )
    return f"{name_of(row)} less {row['against']}: {row['what']} {shown(row, row['value'])}{interval}; {verdict(row)}"


def write_report(
    out: Path, study: dict, rows: list[dict], comparison: list[dict], equal: dict, health: dict, cost: dict
) -> Path:
    """report.md with figures/differences.png and, of training, figures/curves.png, in the study's folder. `cost`: {run:
    seconds or None}.
    """
    trains = study["script"] != "run_eval.py"
    if trains:
        curves(study, rows, comparison, out / "figures" / "curves.png")
    differences(comparison, out / "figures" / "differences.png")
    seeds = len(study["seeds"])
    text = [
        f"# {study['title']}",
        "",
        study["question"].strip(),
        "",
        "![every difference with its interval](figures/differences.png)",
        "",
    ]
    text += ["## Differences", ""]
    text += [
        f"An arm less what it is compared with, in pairs of one seed, and the 95 % interval of the mean over {seeds}"
        " seeds (Student's t): it covers other seeds, not other texts or questions. The intervals are not widened for"
        f" their number ({len(comparison)}); where one holds 0, no difference was found, which does not say that there"
        " is none."
    ]
    if seeds == 1:
        text += ["", "There was one seed, so there is no interval, and nothing follows for another one."]
    text += [
        "",
        "| arm | less | what | difference | 95 % interval | of each seed | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparison:
        interval = "-" if row["low"] is None else f"{shown(row, row['low'])} to {shown(row, row['high'])}"
        each = ", ".join("not in the run" if value is None else shown(row, value).split()[0] for value in row["seeds"])
        text.append(
            f"| {name_of(row)} | {row['against']} | {row['what']} | {shown(row, row['value'])} | {interval} | {each} |"
            f" {verdict(row)} |"
        )
    if same := {name_of(row): row for row in comparison if row["equal"]}:
        outcomes = "; ".join(
            f"{name} and {row['against']} in {row['equal']} of {row['n']} seeds" for name, row in same.items()
        )
        text += ["", f"Finished weights that are equal bit for bit: {outcomes}."]
    text += [""]
    if trains:
        text += ["![curves of every arm](figures/curves.png)", ""]
        text += [
            (
                "Lines are means over seeds, bands their 95 % intervals; below, each arm less what it is compared with,"
                " in pairs of one seed."
            ),
            "",
        ]
    text += ["## Arms", "", "| arm | begins from | set | |", "| --- | --- | --- | --- |"]
    for arm in study["arms"]:
        begins = f"{arm['source']}, step {arm['at']}" if arm["source"] else "nothing"
        text.append(f"| {arm['name']} | {begins} | {_settings(arm['set'])} | {arm['about']} |")
    text += [
        "",
        (
            f"In all arms: `{study['script']} --config {_short(study['config'])}` with {_settings(study['shared'])};"
            f" seeds {_list(study['seeds'])}."
        ),
        "",
    ]
    if study["prepare"]:
        text += ["Before them, once:", "", "```bash", *(f"python {command}" for command in study["prepare"]), "```", ""]
    if study["evaluate"]:
        text += [f"After them `run_eval.py` with {_settings(study['evaluate'])}.", ""]
    text += [
        "## Held equal",
        "",
        "Read from the records of the finished runs, and compared before this was written:",
        "",
    ]
    for kind in ("data", "hyperparameters"):
        text.append(
            f"- {kind}:"
            f" {_settings({name: value for name, value in equal[kind].items() if name not in ('seed', 'data_seed')})}"
        )
    environment = {
        **equal["layout"],
        **equal["environment"].get("hardware", {}),
        **equal["environment"].get("packages", {}),
    }
    text += [f"- layout and environment: {_settings(environment)}", ""]
    if trains:
        text += [
            "## Health",
            "",
            "What the runs said of themselves, by the definitions of `llama_lite/training/loss_trends.py`:",
            "",
        ]
        for arm in dict.fromkeys(arm["name"] for arm in study["arms"]):
            outcomes = health.get(arm, {})
            text.append(
                f"- {arm}:"
                f" {', '.join(f'{name} in {count} runs' for name, count in sorted(outcomes.items())) or 'neither saturated nor overfitting'}"
            )
        text.append("")
    lost = sum(seconds is None for seconds in cost.values())
    text += [
        "## Cost",
        "",
        (
            f"{len(cost)} runs, {sum(filter(None, cost.values())) / 60:.0f} minutes by the"
            f" clock{f' ({lost} of them not counted)' if lost else ''}; what comes before and after them is not in it."
        ),
        "",
    ]
    (out / "report.md").write_text("\n".join(map(redact, text)), encoding="utf-8")
    return out / "report.md"


def curves(study: dict, rows: list[dict], comparison: list[dict], path: Path) -> None:
    """Losses of all arms with bands over seeds, and below them their difference from what they are compared with; of a
    resumed arm from there on.

    Seeds meet at steps; where a step's tokens differ between them (rows of a tuning), it is drawn at their mean.
    """
    metric = "loss" if any(arm["source"] for arm in study["arms"]) else "eval_loss"
    paired = {
        (row["arm"], row["at"]) for row in comparison if metric == "eval_loss" or row["unit"] == "tokens"
    }  # the same windows
    values: dict = {}
    tokens: dict[int, list[int]] = {}
    for row in rows:
        if row["metric"] == metric and row["step"] > (row["at"] or 0):
            values.setdefault((row["arm"], row["at"] or None), {}).setdefault(row["seed"], {})[row["step"]] = row[
                "value"
            ]
            tokens.setdefault(row["step"], []).append(row["tokens"])
    x = {step: sum(counts) / len(counts) / 1e6 for step, counts in tokens.items()}
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
        names = list(dict.fromkeys(arm["name"] for arm in study["arms"]))
        for arm in study["arms"]:
            own, colour = values[arm["name"], arm["at"]], COLOURS[names.index(arm["name"]) % len(COLOURS)]
            label = (
                arm["name"]
                if arm["at"] in (None, min(a["at"] for a in study["arms"] if a["name"] == arm["name"]))
                else None
            )
            _band(top, x, own, colour, label)
            if arm["against"] != arm["name"] and (arm["name"], arm["at"]) in paired:
                base = next(curve for (name, _), curve in values.items() if name == arm["against"])
                less = {
                    seed: {step: value - base[seed][step] for step, value in own[seed].items() if step in base[seed]}
                    for seed in own
                }
                _band(bottom, x, less, colour, label)
        bottom.axhline(0, color=GREY, lw=1)
        top.set_ylabel(f"{'training' if metric == 'loss' else 'validation'} loss (nats a token)")
        bottom.set_ylabel("difference (nats a token)")
        bottom.set_xlabel("million training tokens")
        figure.legend(*top.get_legend_handles_labels(), loc="outside right upper")
        save(figure, path)


def differences(comparison: list[dict], path: Path) -> None:
    """Every difference with its interval and its seeds, a panel for each measure and what it is compared with."""
    panels: dict = {}
    for row in comparison:
        panels.setdefault((row["what"], row["against"] if row["against"] == "its base" else ""), []).append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, grid = plt.subplots(
            lines, columns, figsize=(4.6 * columns, (0.9 + 0.24 * tallest) * lines), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(panels) :]:
            axes.axis("off")
        for axes, ((what, base), group) in zip(grid.flat, panels.items(), strict=False):
            scale = 1000 if group[0]["unit"] == "tokens" else 1
            for index, row in enumerate(group):
                colour = (
                    ORANGE if verdict(row) in ("higher", "lower") or (row["value"] and verdict(row) == SAME) else GREY
                )
                known = [value / scale for value in row["seeds"] if value is not None]
                axes.plot(known, [-index] * len(known), ".", color=GREY, alpha=0.6)
                if row["low"] is not None:
                    axes.plot([row["low"] / scale, row["high"] / scale], [-index, -index], color=colour, lw=2)
                if row["value"] is not None:
                    axes.plot(row["value"] / scale, -index, "o", color=colour)
            axes.axvline(0, color=GREY, lw=1)
            labels = [f"{name_of(row)}{'' if base or _one(group) else ' - ' + row['against']}" for row in group]
            axes.set_yticks([-index for index in range(len(group))], labels)
            axes.set_ylim(-len(group) + 0.5, 0.5)
            less = base or (group[0]["against"] if _one(group) else "")
            axes.set_title(f"{what}{f', less {less}' if less else ''}", fontsize=9)
            axes.set_xlabel("thousand tokens" if scale == 1000 else group[0]["unit"] or "share")
        save(figure, path)


def _one(group: list[dict]) -> bool:
    return len({row["against"] for row in group}) == 1


def _band(axes, x: dict, seeds: dict, colour: str, label: str | None) -> None:
    """Mean over seeds and its 95 % interval at the steps that all of them logged, each drawn at its `place`."""
    from scipy import stats

    steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
    shared, table = [x[step] for step in steps], np.array([[curve[step] for step in steps] for curve in seeds.values()])
    mean = table.mean(0)
    axes.plot(shared, mean, color=colour, lw=1.3, label=label)
    if len(table) > 1:
        reach = stats.t.ppf(0.975, len(table) - 1) * table.std(0, ddof=1) / np.sqrt(len(table))
        axes.fill_between(shared, mean - reach, mean + reach, color=colour, alpha=0.2, lw=0)


def _settings(values: dict) -> str:
    return (
        ", ".join(f"`{name}` {_list(value) if isinstance(value, list) else value}" for name, value in values.items())
        or "nothing"
    )


def _list(values: list) -> str:
    return ", ".join(map(str, values)) or "none"


def _short(path: str) -> str:
    return path[path.index("configs/") :] if "configs/" in path else Path(path).name
