"""The report of a study, and its picture, from its records: what was asked, what was held equal, every difference with its interval."""

from pathlib import Path

import numpy as np

from .figures import BLUE, GREEN, GREY, ORANGE, STYLE, plt, save

COLOURS = (GREY, BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito


def write_report(out: Path, study: dict, rows: list[dict], comparison: list[dict], equal: dict, cost: dict) -> Path:
    """report.md and figures/curves.png in the study's folder."""
    curves(study, rows, out / "figures" / "curves.png")
    text = [f"# {study['title']}", "", study["question"], "", "![loss of every arm, and its difference from the reference](figures/curves.png)", ""]
    text += ["Lines are means over seeds, bands their 95 % intervals; below, each arm less the reference with the same seed.", "", "## Arms", ""]
    text += ["| arm | begins from | set | |", "| --- | --- | --- | --- |"]
    for arm in study["arms"]:
        begins = f"{arm['source']}, step {arm['at']}" if arm["source"] else "nothing"
        text.append(f"| {arm['name']} | {begins} | {_settings(arm['set'])} | {arm['about']} |")
    text += [
        "",
        f"In all arms: `{study['script']} --config {_short(study['config'])}` with {_settings(study['shared'])}; seeds {_list(study['seeds'])}.",
        "",
    ]
    text += ["## Differences from the reference", ""]
    text += [
        f"Of an arm less `{study['reference']}` with the same seed, and the 95 % interval of the mean over {len(study['seeds'])} seeds (Student's t)."
    ]
    if len(study["seeds"]) == 1:
        text += ["", "There was one seed, so there is no interval, and nothing follows for another one."]
    text += [
        "",
        "| arm | what | difference | 95 % interval | seeds | verdict | weights equal bit for bit |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparison:
        name = row["arm"] if row["at"] is None else f"{row['arm']}, at {row['at']}"
        text.append(
            f"| {name} | {row['what']} | {_value(row, row['value'])} | {_interval(row)} | {_seeds(row)} | {_verdict(row)} | {row['equal']} of {row['n']} |"
        )
    text += ["", "## Held equal", "", "Read from the manifests of the finished runs, and compared before this was written:", ""]
    for kind in ("data", "hyperparameters", "layout"):
        text.append(f"- {kind}: {_settings({k: v for k, v in equal[kind].items() if k not in ('seed', 'data_seed')})}")
    environment = equal["environment"]
    text += [f"- environment: {_settings(environment['hardware'])}; {_settings(environment['packages'])}", ""]
    total = sum(cost.values())
    text += ["## Cost", "", f"{len(cost)} runs, {total / 60:.0f} minutes of training steps in all (evaluations, saves and starts not counted).", ""]
    path = out / "report.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def curves(study: dict, rows: list[dict], path: Path) -> None:
    """Losses of all arms with bands over seeds, and below them their difference from the reference."""
    values: dict = {}
    for row in rows:
        if row["metric"] == study["measure"] or row["metric"] == "loss":
            values.setdefault((row["arm"], row["at"] or None, row["metric"]), {}).setdefault(row["seed"], {})[row["tokens"]] = row["value"]
    reference = study["arms"][0]
    resumes = any(arm["source"] for arm in study["arms"])
    metric = "loss" if resumes else study["measure"]
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
        base = values[reference["name"], reference["at"], metric]
        names = list(dict.fromkeys(arm["name"] for arm in study["arms"]))
        for arm in study["arms"]:
            own, colour = values[arm["name"], arm["at"], metric], COLOURS[names.index(arm["name"]) % len(COLOURS)]
            label = arm["name"] if arm["at"] in (None, min(a["at"] for a in study["arms"] if a["name"] == arm["name"])) else None
            _band(top, own, colour, label)
            if arm is not reference:
                differences = {seed: {t: v - base[seed][t] for t, v in own[seed].items() if t in base[seed]} for seed in own}
                _band(bottom, differences, colour, label)
        bottom.axhline(0, color=GREY, lw=1)
        top.set_ylabel(f"{'training loss' if metric == 'loss' else metric} (nats a token)")
        bottom.set_ylabel(f"less {reference['name']}")
        bottom.set_xlabel("training tokens")
        top.legend()
        save(figure, path)


def _band(axes, seeds: dict, colour: str, label: str | None) -> None:
    from scipy import stats

    shared = sorted(set.intersection(*(set(curve) for curve in seeds.values())))
    table = np.array([[curve[t] for t in shared] for curve in seeds.values()])
    mean = table.mean(0)
    axes.plot(shared, mean, color=colour, lw=1.3, label=label)
    if len(table) > 1:
        reach = stats.t.ppf(0.975, len(table) - 1) * table.std(0, ddof=1) / np.sqrt(len(table))
        axes.fill_between(shared, mean - reach, mean + reach, color=colour, alpha=0.2, lw=0)


def _settings(values: dict) -> str:
    return ", ".join(f"`{name}` {_list(value) if isinstance(value, list) else value}" for name, value in values.items()) or "nothing"


def _list(values: list) -> str:
    return ", ".join(map(str, values))


def _short(path: str) -> str:
    return path[path.index("configs/") :] if "configs/" in path else Path(path).name


def _value(row: dict, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:+,.0f} tokens" if row["unit"] == "tokens" else f"{value:+.4f} nats"


def _interval(row: dict) -> str:
    return "-" if row["low"] is None else f"{_value(row, row['low'])} to {_value(row, row['high'])}"


def _seeds(row: dict) -> str:
    return ", ".join("not in the run" if value is None else _value(row, value).split()[0] for value in row["seeds"])


def _verdict(row: dict) -> str:
    if row["value"] is None:
        return "not for every seed"
    if row["low"] is None:
        return "none: one seed" if row["n"] == 1 else "every seed the same"
    return "no difference found" if row["low"] <= 0 <= row["high"] else "higher" if row["low"] > 0 else "lower"
