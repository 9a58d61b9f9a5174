"""Planned contrasts of a study: weighted sums of arms, per seed, of declared outcomes; the primary ones are one family.

A contrast adds up the outcome of several arms with weights that sum to zero; its test is a paired t over seeds. Primary
contrasts of primary outcomes are one family for Holm's correction; all others are exploratory. An equality is tested by
two one-sided tests against the margin of its outcome.
"""

import dataclasses

from ..errors import Refusal
from ..evaluation.statistics import holm
from . import inference, stopping

TAKES = ("last", "first", "area")

Series = dict[tuple[str, int, str], dict[int, tuple[int, float]]]  # {(arm, seed, metric): {step: (tokens, value)}}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is measured of a run. take: the `last` value at equal tokens; the mean over the `first` logged losses up to
    `steps` steps after the checkpoint; or the `area` under the logged values from the checkpoint to the end, in units
    of the metric times million tokens. margin: a smaller difference counts as none (None: not tested).
    """

    name: str
    metric: str
    take: str = "last"
    steps: int | None = None
    margin: float | None = None


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Weights of arms, by their labels (`name`, or `name at step` where an arm begins at several steps)."""

    name: str
    weights: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Contrasts:
    """The contrasts of a study file. primary: (outcome, contrast) pairs that are one family."""

    outcomes: tuple[Outcome, ...] = ()
    contrasts: tuple[Contrast, ...] = ()
    primary: tuple[tuple[str, str], ...] = ()


# ---- reading the study file ----


def contrast_problems(raw: dict, labels: dict[str, int | None]) -> list[str]:
    """What is wrong with `outcomes`, `contrasts` and `primary` of a study file. labels: {arm: step of its begin}."""
    outcomes, contrasts, primary = (raw.get(name) or {} for name in ("outcomes", "contrasts", "primary"))
    if bool(contrasts) != bool(outcomes) or bool(primary) != bool(outcomes):
        return ["`outcomes`, `contrasts` and `primary` go together."]
    problems = []
    for name, fields in outcomes.items():
        problems += _outcome_problems(name, fields)
    for name, weights in contrasts.items():
        problems += _weight_problems(name, weights, labels)
    for kind, known in (("outcomes", outcomes), ("contrasts", contrasts)):
        named = primary.get(kind) if outcomes else []
        if not isinstance(named, list) or (outcomes and not named) or any(name not in known for name in named):
            problems.append(f"`primary` needs `{kind}`, a list of some of: {', '.join(known)}; not {named!r}.")
    if unknown := set(primary) - {"outcomes", "contrasts"}:
        problems.append(f"`primary` has `outcomes` and `contrasts`, not {', '.join(sorted(unknown))}.")
    return problems


def _outcome_problems(name: str, fields) -> list[str]:
    """What is wrong with one outcome."""
    known = {field.name for field in dataclasses.fields(Outcome)} - {"name"}
    if not isinstance(fields, dict) or "metric" not in fields or set(fields) - known:
        return [
            f"outcome {name}: a mapping with `metric`, and maybe {', '.join(sorted(known - {'metric'}))}, is wanted."
        ]
    problems, take = [], fields.get("take", "last")
    if take not in TAKES:
        problems.append(f"outcome {name}: `take` is one of {', '.join(TAKES)}, not {take!r}.")
    if (take == "first") != ("steps" in fields) or ("steps" in fields and not _is_count(fields["steps"])):
        problems.append(f"outcome {name}: `steps`, a whole number, goes with `take: first`.")
    if "margin" in fields and not is_margin(fields["margin"]):
        problems.append(f"outcome {name}: `margin` {fields['margin']!r}: a number above 0 is wanted.")
    return problems


def _is_count(value) -> bool:
    return type(value) is int and value > 0


def is_margin(value) -> bool:
    """Whether a value of a study file is a margin: a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _weight_problems(name: str, weights, labels: dict[str, int | None]) -> list[str]:
    """What is wrong with one contrast."""
    if not isinstance(weights, dict) or not all(type(weight) in (int, float) for weight in weights.values()):
        return [f"contrast {name}: a mapping of arms to weights is wanted."]
    if unknown := [arm for arm in map(str, weights) if arm not in labels]:
        return [f"contrast {name}: {', '.join(unknown)} is no arm: {', '.join(labels)}."]
    if len(weights) < 2 or abs(sum(weights.values())) > 1e-9 or not all(weights.values()):
        return [f"contrast {name}: weights of at least two arms that add up to 0 are wanted, not {weights}."]
    if len({labels[str(arm)] for arm in weights} - {None}) > 1:
        return [f"contrast {name}: its arms begin at different steps, so that there are no first steps in common."]
    return []


def read_contrasts(raw: dict) -> Contrasts:
    """The contrasts of a checked study file."""
    outcomes = raw.get("outcomes") or {}
    primary = raw.get("primary") or {"outcomes": [], "contrasts": []}
    return Contrasts(
        tuple(Outcome(name, **fields) for name, fields in outcomes.items()),
        tuple(
            Contrast(name, {str(arm): float(weight) for arm, weight in weights.items()})
            for name, weights in (raw.get("contrasts") or {}).items()
        ),
        tuple((outcome, contrast) for outcome in primary["outcomes"] for contrast in primary["contrasts"]),
    )


# ---- values ----


def series_of(rows: list[dict]) -> Series:
    """Every measured curve, by arm, seed and metric."""
    series: Series = {}
    for row in rows:
        label = f"{row['arm']} at {row['at']}" if row["at"] else row["arm"]
        for name in {label, row["arm"]}:
            key = (name, row["seed"], row["metric"])
            series.setdefault(key, {})[row["step"]] = (row["tokens"], row["value"])
    return series


def at_equal_tokens(curves: dict[str, dict[int, tuple[int, float]]], metric: str) -> dict[str, float]:
    """The last value of each arm that every arm has at the same number of tokens. curves: {arm: {step: (tokens,
    value)}}. Raises Refusal where the shortest arm ends at tokens at which another has no value.
    """
    by_tokens = {arm: {tokens: value for tokens, value in curve.values()} for arm, curve in curves.items()}
    end = min(max(values) for values in by_tokens.values())
    if missing := [arm for arm, values in by_tokens.items() if end not in values]:
        shortest = next(arm for arm, values in by_tokens.items() if max(values) == end)
        raise Refusal(
            f"{metric}: {missing[0]} has no value at {end:,} tokens, where {shortest} ends, so the two cannot be"
            " compared at equal tokens. Give both the same length, or evaluate at that step, too."
        )
    return {arm: values[end] for arm, values in by_tokens.items()}


def value_of(
    outcome: Outcome, contrast: Contrast, curves: dict[str, dict[int, tuple[int, float]]], first: int
) -> float:
    """The weighted sum of an outcome over arms, for one seed. first: the step of the checkpoint. Raises Refusal."""
    if outcome.take == "last":
        values = at_equal_tokens(curves, outcome.metric)
    else:
        last = first + outcome.steps if outcome.take == "first" else min(max(curve) for curve in curves.values())
        cut = {
            arm: {step: point for step, point in sorted(curve.items()) if first < step <= last}
            for arm, curve in curves.items()
        }
        grids = {tuple(curve) for curve in cut.values()}
        if len(grids) > 1 or () in grids:
            raise Refusal(
                f"{outcome.metric} of {', '.join(curves)} was not logged at the same steps from {first + 1} to {last}."
            )
        if outcome.take == "first":
            values = {arm: sum(value for _, value in curve.values()) / len(curve) for arm, curve in cut.items()}
        else:
            values = {arm: _area(curve, first) for arm, curve in cut.items()}
    return sum(weight * values[arm] for arm, weight in contrast.weights.items())


def _area(curve: dict[int, tuple[int, float]], first: int) -> float:
    """Sum of logged values times the million tokens since the log before."""
    steps = list(curve)
    per_step = curve[steps[-1]][0] / steps[-1]
    widths = [step - before for step, before in zip(steps, [first, *steps], strict=False)]
    return sum(curve[step][1] * width * per_step / 1e6 for step, width in zip(steps, widths, strict=True))


def compute(
    plan: Contrasts, seeds: list[int], begins: dict[str, int | None], series: Series, stops_early: bool = False
) -> list[dict]:
    """Every contrast of every outcome, primary ones first: {contrast, outcome, primary, unit, margin, seeds: {seed:
    value}, p_holm, verdict, needed} and what `inference.summarize` gives. Raises Refusal.

    seeds: in their order; a contrast takes those that all of its arms have. begins: {arm: step of its checkpoint, or
    None}. needed: seeds that would show equality, where the verdict is `cannot tell` and there is a margin.
    stops_early: the primary ones are judged by `stopping.conclude`, which adds {e, e_equal}; p and intervals would not
    be valid.
    """
    rows = []
    for outcome in plan.outcomes:
        for contrast in plan.contrasts:
            first = max(begins[arm] or 0 for arm in contrast.weights)
            values = {}
            for seed in seeds:
                curves = {arm: series.get((arm, seed, outcome.metric)) for arm in contrast.weights}
                if all(curves.values()):
                    values[seed] = value_of(outcome, contrast, curves, first)
            if not values:
                raise Refusal(
                    f"contrast {contrast.name}: no seed has {outcome.metric} of {', '.join(contrast.weights)}."
                )
            row = {"contrast": contrast.name, "outcome": outcome.name, "unit": _unit(outcome), "margin": outcome.margin}
            row |= {"primary": (outcome.name, contrast.name) in plan.primary, "p_holm": None}
            rows.append(
                {**row, "seeds": values, **inference.summarize(inference.estimate([*values.values()]), outcome.margin)}
            )
    for row in rows if stops_early else ():
        if row["primary"]:
            row |= dict.fromkeys(("low", "high", "low90", "high90", "p", "p_equal"))
            row |= stopping.conclude([*row["seeds"].values()], row["margin"], len(plan.primary))
    family = [row for row in rows if row["primary"] and row["p"] is not None]
    for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
        row["p_holm"] = adjusted
    for row in rows:
        row["needed"] = None
        row.setdefault("verdict", "one seed" if row["n"] == 1 else "the same for every seed")
        if row["p"] is not None:
            row["verdict"] = inference.verdict(row["p"] if row["p_holm"] is None else row["p_holm"], row["p_equal"])
            if row["verdict"] == "cannot tell" and row["margin"]:
                row["needed"] = inference.seeds_needed([*row["seeds"].values()], row["margin"])
    return sorted(rows, key=lambda row: not row["primary"])


def unit_of(metric: str) -> str:
    """Unit of the values of a metric: nats, bits per byte, or "" for a fraction."""
    return "bits per byte" if metric.endswith("bits_per_byte") else "nats" if metric.endswith("loss") else ""


def _unit(outcome: Outcome) -> str:
    """Unit of an outcome's values."""
    found = unit_of(outcome.metric)
    return f"{found} x million tokens".strip() if outcome.take == "area" else found
