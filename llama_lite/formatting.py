"""Numbers and errors as people read them: bytes, counts, durations."""


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, name, digits in ((2**40, "TiB", 2), (2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit / 2:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} bytes"


def duration(days: float) -> str:
    """Days as a person reads them."""
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} h" if days * 24 >= 1 else f"{days * 1440:.1f} min"


def amount(count: float) -> str:
    """Bytes of text as a person reads them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def shortened(error) -> str:
    """What an error says, in one line of 300 characters at most."""
    return " ".join(str(error).split())[:300]


def in_words(hours: float) -> str:
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.3g} hours"
