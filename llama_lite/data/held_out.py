"""Documentation that no demo trains on; the embedded evaluation tasks use it."""

from .formats import Skipped
from .sources import resolve

HELD_OUT_CHARACTERS = 450_000  # at the beginning of the documentation, which is the demo's validation slice


def held_out_documents() -> list[dict]:
    """[{text, document}] from the beginning of the embedded corpus, which no demo trains or tunes on."""
    found, characters = [], 0
    for document in resolve("installed-docs").documents(Skipped()):
        if characters >= HELD_OUT_CHARACTERS:
            break
        if len(document.text) >= 200:
            found.append({"text": document.text, "document": document.id.rpartition(":")[0]})
            characters += len(document.text)
    return found
