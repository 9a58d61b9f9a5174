"""Reading a checkpoint's manifest, and finding what is missing, short or altered in its folder."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..digests import ALGORITHMS, digest, digest_of, is_digest, recorded_digest
from ..errors import Refusal
from .identity import IDENTITY

FORMAT = "llama_lite.checkpoint/1"
MANIFEST = "manifest.json"

STATE_FILES = {
    "optimizer": ("optimizer",),  # optimizer.safetensors, or its parts
    "scheduler": ("scheduler.pt",),
    "rng": ("rng_state",),
    "data": (),
}

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # tensors with one row per token


# Largest difference in nats between two losses of one probe that is accepted where hardware or packages differ.
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest, or None where it is missing, altered or malformed."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["digest"] == digest_of(manifest) and is_well_formed(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_well_formed(record: object, algorithms: tuple[str, ...] = ALGORITHMS) -> bool:
    """Whether a JSON value has the fields of a manifest, in the right types: step, tokens, identity and files.

    A digest shows that a record is as somebody wrote it, not that it is a manifest. File names must stay inside the
    checkpoint's folder. algorithms: of which each file needs a digest.
    """
    if not isinstance(record, dict) or not _is_count(record.get("step")) or not _is_count(record.get("tokens")):
        return False
    identity = record.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(kind), dict) for kind in IDENTITY):
        return False
    switches = identity["environment"].get("switches", {})
    return isinstance(switches, dict) and is_well_formed_files(record.get("files"), algorithms)


def is_well_formed_files(files: object, algorithms: tuple[str, ...] = ALGORITHMS) -> bool:
    """Whether a JSON value is {path inside a folder: {size, and a digest by one of `algorithms`}}."""

    def is_inside_folder(name: str) -> bool:
        return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name

    return isinstance(files, dict) and all(
        is_inside_folder(name)
        and isinstance(file, dict)
        and _is_count(file.get("size"))
        and any(is_digest(file.get(name)) for name in algorithms)
        for name, file in files.items()
    )


def _is_count(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def find_corruption(folder: Path, excluded_state: tuple[str, ...] = ()) -> list[str]:
    """How a checkpoint differs from its manifest: one sentence per file, none where it is intact. Reads every byte.

    excluded_state: keys of STATE_FILES whose files are not read (--resume_without).
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST} is missing or altered"]
    left_out = tuple(prefix for kind in excluded_state for prefix in STATE_FILES[kind])

    def find_problem(manifest_entry: tuple[str, dict]) -> str | None:
        name, expected = manifest_entry
        path = Path(folder) / name
        if left_out and name.startswith(left_out):
            return None
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        algorithm, recorded = recorded_digest(expected)
        return f"{name} was altered" if digest(path, algorithm) != recorded else None

    with ThreadPoolExecutor(max_workers=8) as pool:
        return [problem for problem in pool.map(find_problem, sorted(manifest["files"].items())) if problem]


def refuse_sharded(folder: Path) -> None:
    """Raise Refusal for sharded weights of FSDP or DeepSpeed, which only the layout that saved them can read."""
    if any(Path(folder).glob("pytorch_model_fsdp_*")):
        raise Refusal(
            f"{folder} holds weights in shards, which only FSDP with the same number of processes can read. Merge them"
            f" into a model, `accelerate merge-weights {folder}/pytorch_model_fsdp_0 MODEL`, and start a new run from"
            " it: --init_from MODEL --resume_from_checkpoint never."
        )
    if any(Path(folder).glob("global_step*")):
        raise Refusal(
            f"{folder} holds weights in DeepSpeed's shards, which only DeepSpeed with the same number of processes can"
            f" read. Merge them into a model, `python {folder}/zero_to_fp32.py {folder} MODEL --safe_serialization`,"
            " and start a new run from it: --init_from MODEL --resume_from_checkpoint never."
        )


def require_state(manifest: dict, excluded_state: tuple[str, ...]) -> None:
    """Raise Refusal when the checkpoint was published without state that resuming needs."""
    for kind, prefixes in STATE_FILES.items():
        absent = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in manifest["files"])]
        if absent and kind not in excluded_state:
            raise Refusal(
                f"the checkpoint of step {manifest['step']} has no {kind} state, so a resumed run would differ from an"
                f" uninterrupted one. --resume_without {kind} accepts that; --init_from starts a new run from the"
                " weights."
            )


def random_state_files(processes: int) -> list[str]:
    """The files of the random state of each of so many processes, as transformers.Trainer names them."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]


OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_FILES = "optimizer*.safetensors"  # it, or its parts
