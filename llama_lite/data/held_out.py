"""Documentation that no demo trains on: the embedded evaluation tasks are made of it."""

from .formats import Skipped
from .sources import resolve

HELD_OUT_CHARACTERS = 450_000  # of the documentation at the corpus's beginning, which is the demo's validation slice


def held_out_documents() -> list[dict]:
    """Documentation at the beginning of the embedded corpus: {text, document}. No demo trains or tunes on it."""
    found, characters = [], 0
    for document in resolve("installed-docs").documents(Skipped()):
        if characters >= HELD_OUT_CHARACTERS:
            break
        if len(document.text) >= 200:
            found.append({"text": document.text, "document": document.id.rpartition(":")[0]})
            characters += len(document.text)
    return found
