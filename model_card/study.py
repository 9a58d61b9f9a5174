"""The report of a study and its figures, from its records: the question, the controlled variables, every difference
with its interval.
"""

from pathlib import Path

import numpy as np

from .figures import BLUE, GREEN, GREY, ORANGE, STYLE, plt, save
from .private import redact

COLORS = (GREY, BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00", "#F0E442", "#000000")  # Okabe and Ito

HARDWARE = ("device", "accelerator", "cuda", "capability", "generation")  # what of it a report shows
SAME = "the same for every seed"
DIFFERS = ("differs", "differs, by less than the margin")


def shown(row: dict, value: float | None) -> str:
    """A value of a difference with its unit."""
    if value is None:
        return "-"
    return f"{value:+,.0f} tokens" if row["unit"] == "tokens" else f"{value:+.4f} {row['unit']}".strip()


def interval(row: dict, suffix: str = "") -> str:
    """The 95 % interval of a row (suffix "": `low`, `high`), or the 90 % one ("90")."""
    low, high = row[f"low{suffix}"], row[f"high{suffix}"]
    return "-" if low is None else f"{shown(row, low)} to {shown(row, high)}"


def name_of(row: dict) -> str:
    """The arm of a difference, with the step that it begins from."""
    return row["arm"] if row["at"] is None else f"{row['arm']} at {row['at']}"


def verdict(row: dict) -> str:
    """The conclusion that a row allows: differs; differs, by less than the margin; equal within the margin; cannot
    tell; or why there is none of these. The margin is named.
    """
    return row["verdict"] if row["margin"] is None else row["verdict"].replace("the margin", f"{row['margin']:g}")


def line_of(row: dict) -> str:
    """A difference as one line of text."""
    between = "" if row["low"] is None else f" ({interval(row)}), {row['n']} seeds"
    return (
        f"{name_of(row)} compared with {row['against']}: {row['what']} {shown(row, row['value'])}{between};"
        f" {verdict(row)}"
    )


def write_report(out: Path, study: dict, rows: list[dict], results: dict, records: dict) -> Path:
    """Write report.md with figures/differences.png, where arms are compared, and, for training runs,
    figures/curves.png; returns its path.

    out: the study's folder. study: its fields. rows: every measured value. results: {comparison, contrasts}. records:
    {controlled: {kind: {name: value}}, health: {arm: {trend: {answer: runs}}}, cost: {runs, minutes, not_counted}}, and
    of a registered study {registration, deviations}.
    """
    trains, comparison = study["script"] != "run_eval.py", results["comparison"]
    if trains:
        curves(study, rows, comparison, out / "figures" / "curves.png")
    picture = out / "figures" / "differences.png"
    picture.unlink(missing_ok=True)  # of arms that the study had before
    if comparison:
        differences(comparison, picture)
    text = [
        f"# {study['title']}",
        "",
        study["question"].strip(),
        "",
        *(["![every difference with its interval](figures/differences.png)", ""] if comparison else []),
        *_registration_section(records),
        *_contrasts_section(study, results["contrasts"]),
        *_differences_section(comparison, bool(results["contrasts"])),
        *(_curves_section(bool(_compared_curves(study, comparison))) if trains else []),
        *_arms_section(study),
        *_controlled_section(records["controlled"]),
        *(_health_section(records["health"]) if trains else []),
        *_cost_section(records["cost"]),
    ]
    (out / "report.md").write_text("\n".join(map(redact, text)), encoding="utf-8")
    return out / "report.md"


def _registration_section(records: dict) -> list[str]:
    """Lines with the commit of a registered analysis, and what was done otherwise."""
    registered = records.get("registration")
    if not registered:
        return []
    text = [
        "## Registration",
        "",
        f"The design and the analysis were committed, alone, as `{registered['commit']}` ({registered['date']}), before"
        " the first run.",
    ]
    if not records["deviations"]:
        return [*text, "", "Deviations: none.", ""]
    return [*text, "", "Deviations:", "", *(f"- {deviation}" for deviation in records["deviations"]), ""]


def _p(value: float | None) -> str:
    """A p-value, rounded."""
    return "-" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


P_COLUMNS = {"p_holm": "p (Holm)", "p_equal": "p of equality"}
E_COLUMNS = {"e": "e of difference", "e_equal": "e of equality"}


def _contrasts_section(study: dict, rows: list[dict]) -> list[str]:
    """Lines of the sections with the primary and the exploratory contrasts."""
    if not rows:
        return []
    primary, others = ([row for row in rows if row["primary"] is kind] for kind in (True, False))
    rule = (
        f"p: a paired t over seeds, after Holm's correction for {len(primary)} tests. p of equality: the larger of two"
        " one-sided tests against the margin, not corrected; it is below 0.05 where the 90 % interval lies within the"
        " margin."
    )
    if study["stop_early"]:
        rule = (
            f"The study stopped after {len(study['seeds'])} seeds, by its rule: e-values of at least"
            f" {20 * len(primary)} ({len(primary)} tests share 5 %) decide, and are valid at any time. Intervals would"
            " not be; those of the other tables are of a fixed number of seeds."
        )
    text = ["## Primary contrasts", "", f"Each contrast is a weighted sum of arms in each seed. {rule}", ""]
    text += [*_contrast_table(primary, E_COLUMNS if study["stop_early"] else P_COLUMNS), ""]
    if others:
        text += ["## Exploratory contrasts", "", "Not corrected for their number.", ""]
        text += [*_contrast_table(others, {"p": "p", "p_equal": "p of equality"}), ""]
    return text


def _evidence(name: str, value: float | None) -> str:
    """A p-value or an e-value, rounded."""
    return f"{value:.3g}" if name in E_COLUMNS and value is not None else _p(value)


def _contrast_table(rows: list[dict], columns: dict[str, str]) -> list[str]:
    """Lines of a table of contrasts. columns: {field: name} of what the verdicts rest on."""
    names = [
        "outcome",
        "contrast",
        "difference",
        "95 % interval",
        "90 % interval",
        *columns.values(),
        "seeds",
        "verdict",
    ]
    lines = [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]
    for row in rows:
        seeds = "" if row["needed"] is None else f" (equality within {row['margin']:g}: about {row['needed']} seeds)"
        cells = [row["outcome"], row["contrast"], shown(row, row["value"]), interval(row), interval(row, "90")]
        cells += [_evidence(name, row[name]) for name in columns]
        lines.append(f"| {' | '.join([*cells, str(row['n']), verdict(row) + seeds])} |")
    return lines


def _what_a_row_is(comparison: list[dict]) -> str:
    """How to read the rows of the differences."""
    row_is = "Each row is an arm minus the arm that it is compared with, at equal tokens"
    counts = sorted({row["n"] for row in comparison})
    if counts == [1]:
        return f"{row_is}. There was one seed, so there is no interval, and nothing follows for other seeds."
    covers = "The intervals cover other seeds, not other texts or questions"
    if any(row["items"] for row in comparison):
        covers += ", but for the metrics of tasks: there, seeds are crossed with items in one error"
    margin = ""
    if not any(row["margin"] for row in comparison):
        margin = " No margin was declared; the 90 % interval says within which one an arm would count as equal."
    return (
        f"{row_is}, in pairs of one seed, with the mean over {' or '.join(map(str, counts))} seeds and its 95 % and"
        f" 90 % intervals (Student's t). {covers}. p is corrected for the rows of one metric (Holm). Verdicts:"
        " `differs` at a corrected p of 0.05; `equal within` a margin where the 90 % interval lies within it (two"
        f" one-sided tests at 5 %); otherwise `cannot tell`.{margin}"
    )


def _differences_section(comparison: list[dict], is_exploratory: bool) -> list[str]:
    """Lines of the section with every difference, its interval and its verdict. is_exploratory: beside contrasts."""
    if not comparison:
        return ["## Differences", "", "None: no arm is compared with another one.", ""]
    text = ["## Differences", "", _what_a_row_is(comparison)]
    if is_exploratory:
        text[-1] += " These are exploratory: what was planned is tested above."
    columns = ["arm", "compared with", "metric", "difference", "95 % interval", "90 % interval", "p (Holm)"]
    text += ["", f"| {' | '.join([*columns, 'of each seed', 'verdict'])} |", "| --- " * 9 + "|"]
    for row in comparison:
        each = ", ".join("not in the run" if value is None else shown(row, value).split()[0] for value in row["seeds"])
        cells = [name_of(row), row["against"], row["what"], shown(row, row["value"]), interval(row)]
        text.append(f"| {' | '.join([*cells, interval(row, '90'), _p(row['p_holm']), each, verdict(row)])} |")
    if same := {name_of(row): row for row in comparison if row["equal"]}:
        outcomes = "; ".join(
            f"{name} and {row['against']} in {row['equal']} of {row['n']} seeds" for name, row in same.items()
        )
        text += ["", f"Finished weights that are bitwise equal: {outcomes}."]
    return [*text, ""]


def _curves_section(has_differences: bool) -> list[str]:
    """Lines with the figure of the loss curves."""
    below = " Below: each arm minus the arm that it is compared with, in pairs of one seed." if has_differences else ""
    text = f"Lines are means over seeds, bands are 95 % intervals.{below}"
    return ["![curves of every arm](figures/curves.png)", "", text, ""]


def _arms_section(study: dict) -> list[str]:
    """Lines of the section with the arms, what they share, and the commands before and after them."""
    text = ["## Arms", "", "| arm | begins from | set | |", "| --- | --- | --- | --- |"]
    for arm in study["arms"]:
        source = f"{arm['source']}, step {arm['at']}" if arm["source"] else "nothing"
        text.append(f"| {arm['name']} | {source} | {_settings(arm['set'])} | {arm['about']} |")
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
    return text


def _controlled_section(equal: dict) -> list[str]:
    """Lines of the section with the controlled variables."""
    text = [
        "## Controlled variables",
        "",
        "Read from the records of the finished runs, and compared before this report was written:",
        "",
    ]
    for kind in ("data", "hyperparameters"):
        values = {name: value for name, value in equal[kind].items() if name not in ("seed", "data_seed")}
        text.append(f"- {kind}: {_settings(values)}")
    environment = {
        **equal["layout"],
        **{name: value for name, value in equal["environment"].get("hardware", {}).items() if name in HARDWARE},
        **equal["environment"].get("packages", {}),
    }
    return [*text, f"- layout and environment: {_settings(environment)}", ""]


def _health_section(health: dict) -> list[str]:
    """Lines of the section with saturation and overfitting of each arm; nothing where the runs cannot show them."""
    if not health:
        return []
    text = ["## Health", "", "Numbers of runs, as `llama_lite/training/loss_trends.py` defines the verdicts:", ""]
    for arm, trends in health.items():
        outcomes = (
            f"{name}: {', '.join(f'{answer} in {count}' for answer, count in sorted(answers.items()))}"
            for name, answers in trends.items()
        )
        text.append(f"- {arm}: {'; '.join(outcomes)}")
    return [*text, ""]


def _cost_section(cost: dict) -> list[str]:
    """Lines of the section with the wall time of all runs."""
    lost = f" ({cost['not_counted']} of them not counted)" if cost["not_counted"] else ""
    return [
        "## Cost",
        "",
        f"{cost['runs']} runs, {cost['minutes']:.0f} minutes of wall time{lost}, without what comes before and after"
        " them.",
        "",
    ]


def curves(study: dict, rows: list[dict], comparison: list[dict], path: Path) -> None:
    """Draw the losses of all arms with bands over seeds, and below them, where arms are compared, the difference from
    the arm that each is compared with; a resumed arm begins at its checkpoint.

    Seeds are aligned by step. Where the tokens of a step differ between seeds (tuning), it is drawn at their mean.
    """
    metric, against = _curve_metric(study), _compared_curves(study, comparison)
    values: dict = {}
    tokens: dict[int, list[int]] = {}
    for row in rows:
        if row["metric"] == metric and row["step"] > (row["at"] or 0):
            arm = name_of({**row, "at": row["at"] or None})
            values.setdefault(arm, {}).setdefault(row["seed"], {})[row["step"]] = row["value"]
            tokens.setdefault(row["step"], []).append(row["tokens"])
    x = {step: sum(counts) / len(counts) / 1e6 for step, counts in tokens.items()}
    with plt.rc_context(STYLE):
        panels = 2 if against else 1
        figure, axes = plt.subplots(panels, 1, figsize=(9, 4 * panels), sharex=True, layout="constrained")
        top, bottom = axes if against else (axes, None)
        names = list(dict.fromkeys(arm["name"] for arm in study["arms"]))
        for arm in study["arms"]:
            name = name_of({"arm": arm["name"], "at": arm["at"]})
            color = COLORS[names.index(arm["name"]) % len(COLORS)]
            label = (
                arm["name"]
                if arm["at"] in (None, min(a["at"] for a in study["arms"] if a["name"] == arm["name"]))
                else None
            )
            _band(top, x, values[name], color, label)
            if name in against:
                base = values[against[name]]
                difference = {
                    seed: {step: value - base[seed][step] for step, value in curve.items() if step in base[seed]}
                    for seed, curve in values[name].items()
                }
                _band(bottom, x, difference, color, label)
        top.set_ylabel(f"{'training' if metric == 'loss' else 'validation'} loss (nats per token)")
        if bottom:
            bottom.axhline(0, color=GREY, lw=1)
            bottom.set_ylabel("difference (nats per token)")
        (bottom or top).set_xlabel("million training tokens")
        figure.legend(*top.get_legend_handles_labels(), loc="outside right upper")
        save(figure, path)


def _curve_metric(study: dict) -> str:
    """The loss that the curves show."""
    return "loss" if any(arm["source"] for arm in study["arms"]) else "eval_loss"


def _compared_curves(study: dict, comparison: list[dict]) -> dict[str, str]:
    """{arm: the arm that its curve is compared with}; only arms that read the same windows."""
    any_windows = _curve_metric(study) == "eval_loss"
    return {
        name_of(row): row["against"]
        for row in comparison
        if row["against"] != "its base" and (any_windows or row["unit"] == "tokens")
    }


def differences(comparison: list[dict], path: Path) -> None:
    """Draw every difference with its interval and its seeds, one panel per metric and reference."""
    panels: dict = {}
    for row in comparison:
        panels.setdefault((row["what"], row["against"] if row["against"] == "its base" else ""), []).append(row)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, grid = plt.subplots(
            rows, columns, figsize=(4.6 * columns, (0.9 + 0.24 * tallest) * rows), layout="constrained", squeeze=False
        )
        for axes in grid.flat[len(panels) :]:
            axes.axis("off")
        for axes, ((metric, base), group) in zip(grid.flat, panels.items(), strict=False):
            scale = 1000 if group[0]["unit"] == "tokens" else 1
            for index, row in enumerate(group):
                color = ORANGE if row["verdict"] in DIFFERS or (row["value"] and row["verdict"] == SAME) else GREY
                known = [value / scale for value in row["seeds"] if value is not None]
                axes.plot(known, [-index] * len(known), ".", color=GREY, alpha=0.6)
                if row["low"] is not None:
                    axes.plot([row["low"] / scale, row["high"] / scale], [-index, -index], color=color, lw=2)
                if row["value"] is not None:
                    axes.plot(row["value"] / scale, -index, "o", color=color)
            axes.axvline(0, color=GREY, lw=1)
            labels = [
                f"{name_of(row)}{'' if base or _same_reference(group) else ' - ' + row['against']}" for row in group
            ]
            axes.set_yticks([-index for index in range(len(group))], labels)
            axes.set_ylim(-len(group) + 0.5, 0.5)
            reference = base or (group[0]["against"] if _same_reference(group) else "")
            axes.set_title(f"{metric}{f', minus {reference}' if reference else ''}", fontsize=9)
            axes.set_xlabel("thousand tokens" if scale == 1000 else group[0]["unit"] or "share")
        save(figure, path)


def _same_reference(group: list[dict]) -> bool:
    """Whether all differences of a panel are to the same arm."""
    return len({row["against"] for row in group}) == 1


def _band(axes, x: dict, seeds: dict, color: str, label: str | None) -> None:
    """Draw the mean over seeds and its 95 % interval at the steps that all seeds logged.

    x: {step: position on the axis}. seeds: {seed: {step: value}}.
    """
    from scipy import stats

    steps = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
    positions = [x[step] for step in steps]
    table = np.array([[curve[step] for step in steps] for curve in seeds.values()])  # (seeds, steps)
    mean = table.mean(0)
    axes.plot(positions, mean, color=color, lw=1.3, label=label)
    if len(table) > 1:
        half_width = stats.t.ppf(0.975, len(table) - 1) * table.std(0, ddof=1) / np.sqrt(len(table))
        axes.fill_between(positions, mean - half_width, mean + half_width, color=color, alpha=0.2, lw=0)


def _settings(values: dict) -> str:
    """Arguments and their values, in Markdown."""
    return (
        ", ".join(f"`{name}` {_list(value) if isinstance(value, list) else value}" for name, value in values.items())
        or "nothing"
    )


def _list(values: list) -> str:
    """Values separated by commas."""
    return ", ".join(map(str, values)) or "none"


def _short(path: str) -> str:
    """A config's path inside the repository, else its file name."""
    return path[path.index("configs/") :] if "configs/" in path else Path(path).name
