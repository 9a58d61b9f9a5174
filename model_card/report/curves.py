"""Every number that a run logged, as curves by step, tokens and time, and what happened on the way."""

import itertools

import numpy as np

from ..records import Records
from .values import is_number, short, shorts

AXES = ("step", "tokens", "epoch", "num_tokens")  # keys of a log entry that are positions, not values
ENDINGS = ("loss", "bits_per_byte", "perplexity", "seconds")  # of values that share a chart
PAIRED = ("entropy", "mean_token_accuracy")  # TRL logs these of training, too
WATCHED = ("loss", "grad_norm")  # the extremes of these stay where a log is thinned
DOCUMENTS = 12  # named at most at a spike

# Events that are marked in the curves, and in words below them: refused attempts and publishing are no part of training
MARKED = (*"started resumed saved spike changed initialised".split(), "not finite", "set aside", "evaluation failed")
ENDS = ("finished", "interrupted", "unhealthy")
TRENDS = ("saturated", "overfitting")


def run_curves(records: Records, lines: int) -> dict:
    """What a page draws of a run: {grids, series, marks, samples, prompts, baselines, thinned}.

    lines: entries of training that are kept at most; of more, those with the lowest and highest loss and gradient norm
    of each stretch stay. A grid is {step, tokens, seconds} of the entries that its series share; seconds are wall time
    without waiting, in earlier logs tokens divided by the throughput, None where neither was logged.
    """
    training = [entry for entry in records.log if "loss" in entry]
    other = _merged(entry for entry in records.log if "loss" not in entry)
    clock = _clock(training)
    spikes = {event.get("at_step", event["step"]) for event in records.events if event["event"] == "spike"}
    kept = _thinned(training, lines, spikes)
    grids, series = [], []
    for entries in (kept, other):
        names = sorted({name for entry in entries for name, value in entry.items() if is_number(value)} - {*AXES})
        if names:
            grids.append(_grid(entries, clock))
            series += [
                {
                    "name": name,
                    "group": group_of(name),
                    "grid": len(grids) - 1,
                    "values": shorts([entry.get(name) for entry in entries]),
                }
                for name in names
            ]
    locate = _locator(training or other, clock)
    bases = records.data.get("baselines") or {}
    return {
        "grids": grids,
        "series": series,
        "marks": [mark for event in records.events if (mark := _mark(event, locate))],
        **_samples(records, other),
        "baselines": {name: short(bases[name]) for name in ("bigram", "unigram") if name in bases},
        "thinned": len(training) if len(kept) < len(training) else 0,
    }


def group_of(name: str) -> str:
    """The chart of a logged value: losses of all validation sets share one, and scores of all tasks."""
    base = name.removeprefix("eval_")
    ending = next((ending for ending in ENDINGS if base == ending or base.endswith(f"_{ending}")), None)
    if ending and (ending != "seconds" or not name.startswith("eval_")):
        return ending
    return "scores" if name.startswith("eval_") and base not in PAIRED else base


def _merged(entries) -> list[dict]:
    """Entries of one step as one: losses, scores of tasks and samples of an evaluation are logged one by one."""
    found: dict[int, dict] = {}
    for entry in entries:
        found.setdefault(entry["step"], {}).update(entry)
    return [found[step] for step in sorted(found)]


def _clock(training: list[dict]) -> tuple[list, list] | None:
    """(steps, seconds up to them); None where the log has neither wall time nor throughput."""
    if training and all("wall_seconds" in entry for entry in training):
        seconds = [entry["wall_seconds"] - entry.get("waiting_seconds", 0) for entry in training]
        return [entry["step"] for entry in training], list(np.maximum.accumulate(seconds))
    steps, seconds, tokens = [0], [0.0], 0
    for entry in training:
        if entry.get("tokens_per_second") and "tokens" in entry:
            seconds.append(seconds[-1] + max(entry["tokens"] - tokens, 0) / entry["tokens_per_second"])
            steps.append(entry["step"])
            tokens = entry["tokens"]
    return (steps, seconds) if len(steps) > 1 else None


def _grid(entries: list[dict], clock: tuple | None) -> dict:
    steps = [entry["step"] for entry in entries]
    tokens = [entry.get("tokens") for entry in entries]
    return {
        "step": steps,
        "tokens": tokens if None not in tokens else None,
        "seconds": None if clock is None else [round(float(value), 3) for value in np.interp(steps, *clock)],
    }


def _thinned(entries: list[dict], lines: int, spikes: set[int]) -> list[dict]:
    """At most about `lines` entries: of each stretch of equal length those with the lowest and the highest WATCHED
    values, and all spikes, first and last.
    """
    if len(entries) <= lines:
        return entries
    kept = {0, len(entries) - 1, *(index for index, entry in enumerate(entries) if entry["step"] in spikes)}
    bounds = np.linspace(0, len(entries), max(lines // (2 * len(WATCHED)), 1) + 1).astype(int)
    for name in WATCHED:
        values = np.array([entry.get(name, np.nan) for entry in entries], dtype=float)
        for begin, end in itertools.pairwise(bounds):
            known = np.flatnonzero(np.isfinite(values[begin:end])) + begin
            if len(known):
                kept |= {int(known[values[known].argmin()]), int(known[values[known].argmax()])}
    return [entries[index] for index in sorted(kept)]


def _locator(entries: list[dict], clock: tuple | None):
    """A function that gives {step, tokens, seconds} of any step, between logged ones by a straight line."""
    steps = [0, *(entry["step"] for entry in entries)]
    tokens = [0, *(entry.get("tokens", 0) for entry in entries)]

    def locate(step: int) -> dict:
        return {
            "step": step,
            "tokens": round(float(np.interp(step, steps, tokens))),
            "seconds": None if clock is None else round(float(np.interp(step, *clock)), 3),
        }

    return locate


def _samples(records: Records, entries: list[dict]) -> dict:
    """{samples, prompts}: continuations at each evaluation, or the answers before and after tuning."""
    found = [
        {
            "step": entry["step"],
            "tokens": entry.get("tokens"),
            "loss": short(entry.get("eval_loss")),
            "texts": entry["samples"],
        }
        for entry in entries
        if entry.get("samples")
    ]
    shown = records.tuning.get("shown") or []
    if found or not shown:
        return {"samples": found, "prompts": records.run.get("given", {}).get("sample_prompts") or []}
    common = {"step": None, "tokens": None, "loss": None, "isAnswer": True}
    answers = [
        {"title": f"{when} tuning", **common, "texts": [one[when]["answer"] for one in shown]}
        for when in ("before", "after")
    ]
    return {"samples": answers, "prompts": [one["prompt"] for one in shown]}


# ---- what happened ----


def _mark(event: dict, locate) -> dict | None:
    """An event as a mark in the curves, with its words; None for one that is no part of training."""
    kind = event["event"]
    if kind not in (*MARKED, *ENDS, *TRENDS):
        return None
    found = {"kind": kind, **locate(event.get("at_step", event["step"])), "text": _words(event), "time": event["time"]}
    if kind == "spike":
        found["loss"] = short(event["loss"])
        names = [_document(one) for one in event.get("documents") or []]
        rest = max(event.get("documents_in_step", 0), len(names)) - len(names[:DOCUMENTS])
        found["documents"] = names[:DOCUMENTS] + ([f"and {rest:,} more"] if rest else [])
    return found


def _document(document: dict | str) -> str:
    """The name of a document that a training step read."""
    if isinstance(document, dict):
        return str(next((document[key] for key in ("name", "document", "url", "id") if document.get(key)), document))
    return str(document)


def _words(event: dict) -> str:
    """An event in a few words."""
    kind = event["event"]
    if kind == "spike":
        return f"loss {event['loss']:.4f}, {event['sigmas']} standard deviations above the last losses"
    if kind == "not finite":
        return f"loss {event['loss']}, gradient norm {event['grad_norm']}"
    if kind == "changed":
        return "; ".join(f"{name}: {old} → {new}" for name, (old, new) in event["fields"].items())
    if kind == "set aside":
        return f"{event['checkpoint']}: {'; '.join(event['problems'])}"
    if kind == "initialised":
        return f"from the weights of {event['weights']}"
    if kind in ("resumed", "saved"):
        return event.get("checkpoint") or ""
    if kind in TRENDS:
        return f"slope {event['slope']:+.4f} ({event['low']:+.4f} to {event['high']:+.4f})"
    return event.get("reason") or ""
