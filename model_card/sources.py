"""Folders of a mixture and validation sets, for cards and figures, from the records alone."""

from .records import Records

COUNTED = 50_000_000  # tokens of a held-out slice, at most, on which n-gram counts are scored (data/ngram_baselines.py)


def set_names(data: dict) -> list[str]:
    """Names of the validation sets that a run's log tells apart. data: its `data.json`."""
    return [*(part["name"] for part in data.get("mixture", [])), *data.get("validation_sets", {})]


def mixture_rows(records: Records) -> list[list]:
    """Name, source, share, documents, training tokens, tokens read, times read, and fingerprint of each folder of a
    mixture; nothing of one text.
    """
    last = records.trained[-1] if records.trained else {}
    rows = []
    for part in records.data.get("mixture", []):
        tokens, read = part["splits"]["train"]["tokens"], last.get(f"tokens_{part['name']}", 0)
        rows.append(
            [
                part["name"],
                source_in_words(part.get("source", {})),
                percentage(part["weight"]),
                f"{part['documents']:,}",
                f"{tokens:,}",
                f"{read:,}",
                f"{read / max(1, tokens):.2f}",
                f"`{part['fingerprint'][:16]}`",
            ]
        )
    return rows


def validation_rows(records: Records) -> list[list]:
    """Name, part of the validation loss, loss, perplexity, bits per byte, and loss of n-gram counts of each validation
    set at the last evaluation; nothing where there is one.
    """
    if not records.evaluated:
        return []
    last, rows = records.evaluated[-1], []
    own = {part["name"]: part for part in records.data.get("mixture", [])}
    for name in set_names(records.data):
        if f"eval_{name}_loss" in last:
            measured = [last[f"eval_{name}_{metric}"] for metric in ("loss", "perplexity", "bits_per_byte")]
            bases = own.get(name, {}).get("baselines", {})
            rows.append(
                [
                    name,
                    percentage(own[name]["weight"]) if name in own else "",
                    *(f"{value:.{digits}f}" for value, digits in zip(measured, (4, 2, 4), strict=True)),
                    *(f"{bases[key]:.4f}" if key in bases else "" for key in ("bigram", "unigram")),
                ]
            )
    return rows


def windows_measured(run: dict, data: dict) -> str | None:
    """Which held-out windows the validation losses of a run are of, in words; None where they are of all, or the
    records do not say.

    run, data: its `run.json` and `data.json`. A run without `eval_order` in its record measured the first ones.
    """
    block = run.get("identity", {}).get("data", {}).get("block_size")
    settings = run.get("settings") or run.get("given", {})
    most, order = settings.get("eval_windows"), settings.get("eval_order", "sequential")
    sets = [*data.get("mixture", [data]), *data.get("validation_sets", {}).values()]
    tokens = [part["splits"]["validation"]["tokens"] for part in sets if "splits" in part]
    if not block or not most or not tokens:
        return None
    counts = [(count - 1) // block for count in tokens]
    if most >= max(counts):
        return None
    which = "a sample of" if order == "shuffled" else "the first"
    if len(counts) > 1:
        return f"{which} {most:,} held-out windows of each set (all, where it has fewer)"
    return f"{which} {most:,} of {counts[0]:,} held-out windows"


def windows_counted(data: dict) -> str:
    """How much of the held-out windows the losses of n-gram counts are of, in words. data: as of `windows_measured`."""
    most = max(part["splits"]["validation"]["tokens"] for part in data.get("mixture", [data]))
    return "all" if most <= COUNTED else f"all, up to {COUNTED:,} tokens"


def percentage(weight: float) -> str:
    """A share as `70 %`."""
    return f"{100 * weight:.4g} %"


INSTALLED = {  # texts that no dataset of the Hub is
    "installed-docs": "the English documentation inside installed Python packages",
    "installed-files": "all text files inside installed Python packages",
}


def source_in_words(source: dict) -> str:
    """The source of a text, in words. source: of a manifest."""
    if source.get("dataset") in INSTALLED:
        return INSTALLED[source["dataset"]]
    if "files" in source:
        return f"local files ({source['dataset']})"
    parts = (
        [f"[{source['dataset']}](https://huggingface.co/datasets/{source['dataset']})"]
        if source.get("dataset")
        else [""]
    )
    parts += [f"configuration `{source['config']}`"] if source.get("config") not in (None, "default") else []
    return ", ".join(parts + ([f"revision `{source['revision'][:12]}`"] if source.get("revision") else []))


def read_again(records: Records) -> str | None:
    """How often text was read that was read more than once, as a sentence; None where none was."""
    if not records.trained:
        return None
    if "mixture" in records.data:
        often = [f"{row[0]} {row[6]} times" for row in mixture_rows(records) if float(row[6]) > 1]
        return f"Folders of the mixture that were read more than once: {', '.join(often)}." if often else None
    epochs = records.trained[-1].get("epoch", 0)
    return f"The training text was read {epochs:.2f} times." if epochs > 1 else None
