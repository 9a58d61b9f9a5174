"""How values are written in a card: numbers, intervals, tables, quoted text."""

import re
import textwrap

from .sources import percentage

SHOWN = 12  # rows of a long table
WIDTH = 96  # characters of a quoted line


def first_of(config: dict, names: tuple[str, ...]):
    """The first of a config's fields that is there and not None; of its text model's, where it has one inside."""
    inner = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    return next((part[name] for part in (config, inner) for name in names if part.get(name) is not None), None)


def number(value: float | None, digits: int | None = None) -> str:
    """A number with thousands separators, with `digits` decimals where given; "" for None."""
    if value is None:
        return ""
    return f"{value:,}" if digits is None else f"{value:,.{digits}f}"


def probability(value: float | None) -> str:
    """A p-value with four decimals; "" for None."""
    return "<0.0001" if value is not None and value < 1e-4 else number(value, 4)


def interval(row: dict, digits: int, sign: str = "") -> str:
    """A 95 % interval, or that there is none."""
    return (
        "no interval" if row.get("low") is None else f"{row['low']:{sign}.{digits}f} to {row['high']:{sign}.{digits}f}"
    )


def spread(row: dict, digits: int, sign: str = "") -> str:
    """A value with its 95 % interval."""
    return f"{row['value']:{sign}.{digits}f} ({interval(row, digits, sign)})"


def items_of(row: dict) -> str:
    """The number of items behind a score, and whether they are a sample."""
    return number(row["n"]) + (f" (a sample, `--limit {row['limit']}`)" if row.get("limit") else "")


def beside_random(row: dict, digits: int) -> str:
    """A measure of variants with its interval, and what random answers would give."""
    return spread(row, digits) + ("" if row.get("blind") is None else f"; random {row['blind']:.{digits}f}")


def short(value: object) -> str:
    """A value in at most 60 characters; a mixture as shares of its folders."""
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(part, dict) and "weight" in part for part in value.values())
    ):
        return ", ".join(f"{name} {percentage(part['weight'])}" for name, part in value.items())
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def thinned(rows: list) -> list:
    """At most SHOWN rows, evenly, first and last among them."""
    return rows if len(rows) <= SHOWN else [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def cell(text: object) -> str:
    """A value as a cell of a Markdown table."""
    return str(text).replace("|", "\\|").replace("\n", " ").strip()


def table(rows: list[list], *header: str) -> str:
    """A markdown table; columns that are empty in all rows are left out; nothing where there are no rows."""
    if not rows:
        return ""
    kept = [i for i in range(len(header)) if any(str(row[i]).strip() for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *[[cell(row[i]) for i in kept] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quote(text: str) -> str:
    """A text as a block that markdown leaves alone, whatever is in it."""
    lines = [
        part
        for line in text.strip().splitlines()
        for part in textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
    ]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return "\n".join([f"{fence}text", *(line.rstrip() for line in lines), fence])
