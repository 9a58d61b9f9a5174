"""Reading a checkpoint's manifest, and finding what is missing, short or altered in its folder."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import Refusal
from ..files import sha256
from .identity import IDENTITY

FORMAT = "llama_lite.checkpoint/1"

MANIFEST = "manifest.json"

STATE_FILES = {
    "optimizer": ("optimizer.safetensors",),
    "scheduler": ("scheduler.pt",),
    "rng": ("rng_state",),
    "data": (),
}

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # tensors with a row a token


# How the largest difference between two losses of one probe is judged where hardware or packages differ.
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def digest_of(manifest: dict) -> str:
    """sha256 of a record, as it is kept in the record itself under `digest`."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True).encode()
    ).hexdigest()


def read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest, or None where there is none that is whole."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["digest"] == digest_of(manifest) and is_well_formed(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_well_formed(record) -> bool:
    """Whether JSON says of a checkpoint what every record of one says, in the right types: its step, tokens, identity
    and files.

    A digest shows that a record is as somebody wrote it, not that it is one. Names of files stay inside its folder.
    """

    if not isinstance(record, dict) or not _whole(record.get("step")) or not _whole(record.get("tokens")):
        return False
    identity = record.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(kind), dict) for kind in IDENTITY):
        return False
    return isinstance(identity["environment"].get("switches", {}), dict) and is_well_formed_files(record.get("files"))


def is_well_formed_files(files) -> bool:
    """Whether JSON is {path inside a folder: {size, sha256}}."""

    def inside(name: str) -> bool:
        return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name

    return isinstance(files, dict) and all(
        inside(name)
        and isinstance(file, dict)
        and _whole(file.get("size"))
        and re.fullmatch("[0-9a-f]{64}", str(file.get("sha256")))
        for name, file in files.items()
    )


def _whole(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def find_corruption(folder: Path, without: tuple[str, ...] = ()) -> list[str]:
    """What keeps a checkpoint from being what was written: one sentence a file. Reads every byte of it.

    State that `--resume_without` leaves out is not looked at.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or altered"]
    left_out = tuple(prefix for part in without for prefix in STATE_FILES[part])

    def check(item):
        name, expected = item
        path = Path(folder) / name
        if left_out and name.startswith(left_out):
            return None
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        return f"{name} was altered" if sha256(path) != expected["sha256"] else None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [problem for problem in pool.map(check, sorted(manifest["files"].items())) if problem]


def refuse_sharded(folder: Path) -> None:
    """Raise Refusal for a checkpoint that another program saved in shards, which only its own layout can read."""
    if any(Path(folder).glob("pytorch_model_fsdp_*")):
        raise Refusal(
            f"{folder} holds weights in shards, which only FSDP over as many processes reads. Make a model of them,"
            f" `accelerate merge-weights {folder}/pytorch_model_fsdp_0 MODEL`, and start a new run from it: --init_from"
            " MODEL --resume_from_checkpoint never."
        )
    if any(Path(folder).glob("global_step*")):
        raise Refusal(
            f"{folder} holds weights in DeepSpeed's shards, which only DeepSpeed over as many processes reads. Make a"
            f" model of them, `python {folder}/zero_to_fp32.py {folder} MODEL --safe_serialization`, and start a new"
            " run from it: --init_from MODEL --resume_from_checkpoint never."
        )


def require_state(manifest: dict, without: tuple[str, ...]) -> None:
    """Raise Refusal when the checkpoint was published without state that resuming needs."""
    for part, prefixes in STATE_FILES.items():
        absent = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in manifest["files"])]
        if absent and part not in without:
            raise Refusal(
                f"the checkpoint of step {manifest['step']} has no {part} state: going on would not be the same run. "
                f"--resume_without {part} does it on purpose; --init_from starts a new run from the weights."
            )


OPTIMIZER_FILE = "optimizer.safetensors"
