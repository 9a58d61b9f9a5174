"""Human-readable text of numbers and errors: bytes, durations, messages."""


def size(count: int) -> str:
    """Bytes in binary units: `1.50 GiB`."""
    for unit, name, digits in ((2**40, "TiB", 2), (2**30, "GiB", 2), (2**20, "MiB", 1), (2**10, "KiB", 1)):
        if count >= unit / 2:
            return f"{count / unit:.{digits}f} {name}"
    return f"{count:.0f} bytes"


def duration(days: float) -> str:
    """Days as days, hours or minutes: `2.5 h`."""
    return f"{days:,.1f} days" if days >= 1 else f"{days * 24:.1f} h" if days * 24 >= 1 else f"{days * 1440:.1f} min"


def dollars(value: float) -> str:
    """A price: `$1,234.50`, or that it is less than a cent."""
    return f"${value:,.2f}" if value >= 0.01 or not value else "less than $0.01"


def seconds_in_words(seconds: float) -> str:
    """Seconds as they are below 90, else as minutes, hours or days: `42 s`, `4.2 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else duration(seconds / 86_400)


def amount(count: float) -> str:
    """Bytes of text in decimal units: `1.5 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def shortened(error: object) -> str:
    """The message of an error, as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def in_words(hours: float) -> str:
    """Hours as seconds below two minutes, as minutes below two hours, else as hours: `90 minutes`."""
    if hours * 60 < 2:
        return f"{hours * 3600:.0f} seconds"
    return f"{hours * 60:.0f} minutes" if hours < 2 else f"{hours:.3g} hours"
