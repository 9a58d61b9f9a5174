"""Bytes as text: by their byte order mark, as UTF-8, or in the encoding that the user names."""

import codecs
import contextlib

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"} | {
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def utf8_text(value: str | bytes, encoding: str | None = None) -> str | None:
    """A value of a row as text that UTF-8 can encode; bytes that are not UTF-8 are decoded with `encoding`. None for
    undecodable bytes and unpaired surrogates.
    """
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if not value.isascii():
            value.encode("utf-8")
        return value
    except UnicodeError:
        try:
            raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # JSON can hold an unpaired surrogate
            return None
        return decode(raw, encoding) if encoding else None


def decode(raw: bytes, encoding: str | None = None) -> str | None:
    """Bytes as text: by the byte order mark, else UTF-8, else `encoding`; None where none of these fits."""
    for mark, marked in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            encoding = marked
            break
    else:
        with contextlib.suppress(UnicodeDecodeError):
            return raw.decode("utf-8")
    try:
        return raw.decode(encoding) if encoding else None
    except UnicodeDecodeError:
        return None
