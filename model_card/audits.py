"""Audits of a run, for its card: the `audit.json` files that the run's owner put into its folder `audits/`.

They were made by others, but are held by the owner: the card quotes them with the digest of each file, by which an
auditor can show that it is theirs, and says how to repeat them.
"""

import hashlib
import json
import re
from pathlib import Path

from .metadata import CardError

FORMAT = "llama_lite.audit/1"
FINISHED = ("equal, bit for bit", "equal within tolerance", "differs")
LONGEST_NAME = 80  # characters of an auditor's name that are shown


def read_audits(folder: Path, run_id: str | None) -> list[dict]:
    """The audits in `folder`/audits, each with the sha256 of its file as `sha256`. Raises CardError for a file that is
    no finished audit of the run with this id.
    """
    found = []
    for path in sorted((Path(folder) / "audits").glob("*.json")):
        content = path.read_bytes()
        try:
            record = json.loads(content)
            known = record["format"] == FORMAT and record["verdict"] in FINISHED
            shown = {**record, "line": _line(record), "sha256": hashlib.sha256(content).hexdigest()}
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise CardError(f"{path} is not the audit.json of a finished audit: remove it.")
        if record.get("run") != run_id:
            raise CardError(f"{path} is an audit of another run ({record.get('run')}, this is {run_id}): remove it.")
        found.append(shown)
    return found


def _line(record: dict) -> str:
    """One audit in words: by whom, when, which steps, the verdict."""
    by = re.sub(r"[^\w .,@()/'-]", "", str(record["by"] or ""))[:LONGEST_NAME].strip()
    steps = ", ".join(f"{int(part['first']) + 1:,} to {int(part['last']):,}" for part in record["segments"])
    drawn = record["drawn"]
    how = f" (drawn with the auditor's seed {int(drawn['seed'])})" if drawn else ""
    date = re.sub(r"[^\d-]", "", str(record["date"]))
    what = f"steps {steps}{how}, {int(record['tokens']):,} tokens" if steps else "the records alone"
    alone = [part for part in record["segments"] if "weights" not in part["compared"]]
    logs = f"; of {len(alone)} of {len(record['segments'])} segments logged values alone" if alone else ""
    return f"audited{f' by {by}' if by else ''} on {date}, {what}: {record['verdict']}{logs}"
