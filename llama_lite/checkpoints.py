"""What a checkpoint is, when it can be trusted, and what may differ from it when a run goes on.

`checkpoint-N/` exists only when it is whole: files are written aside and flushed, `manifest.json` (size and sha256 of
each, the run's identity, a proof of the weights) comes last, then the folder gets its name. A folder that does not
match its manifest is set aside as `checkpoint-N.damaged` and never used.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import runs
from .arguments import Refusal, names
from .fields import HYPERPARAMETERS, SFT_HYPERPARAMETERS
from .runs import flush_folder, sha256, write_json
from .schedules import CONSTANT

FORMAT = "llama_lite.checkpoint/1"
MANIFEST = "manifest.json"
STAGING, REPLACED, DELETED = ".staging-", ".replaced-", ".deleted-"
STATE_FILES = {"optimizer": ("optimizer.safetensors",), "scheduler": ("scheduler.pt",), "rng": ("rng_state",), "data": ()}
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # tensors with a row a token

# How the largest difference between two losses of one probe is judged where hardware or packages differ.
PROBE_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


# ---- writing ----


def staging_folder(run: Path, step: int) -> Path:
    """A fresh folder to write checkpoint `step` into."""
    folder = Path(run) / f"{STAGING}{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def need_space(run: Path, needed: int) -> None:
    """Raise Refusal when the disk cannot take `needed` bytes (with a twentieth to spare)."""
    way = "Make room or lower --save_total_limit, and run the same command again: the last checkpoint is untouched."
    runs.need_space(run, needed, "the next checkpoint", way)


def flush_and_hash(folder: Path) -> dict[str, dict]:
    """Size and sha256 of every file of a folder, each flushed to disk; hashing and flushing run side by side."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)

    def flush(path):
        with open(path, "rb") as file:
            runs.flush(file.fileno(), path)

    with ThreadPoolExecutor(max_workers=8) as pool:
        flushes = [pool.submit(flush, path) for path in paths]
        digests = list(pool.map(sha256, paths))
        for done in flushes:
            done.result()
    return {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest} for path, digest in zip(paths, digests, strict=True)}


def seal(staging: Path, run: Path, step: int, manifest: dict) -> Path:
    """Write the manifest and give the folder its name; an older `checkpoint-N` makes way without being lost."""
    manifest = {"format": FORMAT, "step": step, **manifest}
    write_json(staging / MANIFEST, {**manifest, "digest": digest_of(manifest)})
    flush_folder(staging)
    final, replaced = Path(run) / f"checkpoint-{step}", Path(run) / f"{REPLACED}{step}"
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(staging, final)
    flush_folder(run)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def digest_of(manifest: dict) -> str:
    """sha256 of a record, as it is kept in the record itself under `digest`."""
    return hashlib.sha256(json.dumps({k: v for k, v in manifest.items() if k != "digest"}, sort_keys=True).encode()).hexdigest()


def rotate(run: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; called right after one was sealed, which always stays."""
    for _, folder in checkpoints(run)[max(limit, 1) :] if limit else ():
        doomed = folder.with_name(f"{DELETED}{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)  # in one step, so that no half-deleted folder ever looks like a damaged checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


# ---- finding and verifying ----


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every `checkpoint-N`, newest first."""
    found = []
    for folder in Path(run).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and folder.is_dir():
            found.append((int(number), folder))
    return sorted(found, reverse=True)


def tidy(run: Path) -> None:
    """Finish or undo what a crash cut short: a save, a replacement, a rotation."""
    for folder in Path(run).glob(f"{REPLACED}*"):
        final = Path(run) / f"checkpoint-{folder.name.removeprefix(REPLACED)}"
        if not final.exists():
            os.rename(folder, final)
    for pattern in (STAGING, REPLACED, DELETED):
        for folder in Path(run).glob(f"{pattern}*"):
            shutil.rmtree(folder, ignore_errors=True)


def read_manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest, or None where there is none that is whole."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["digest"] == digest_of(manifest) and well_formed(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def well_formed(record) -> bool:
    """Whether JSON says of a checkpoint what every record of one says, in the right types: its step, tokens, identity and files.

    A digest shows that a record is as somebody wrote it, not that it is one. Names of files stay inside its folder.
    """

    if not isinstance(record, dict) or not _whole(record.get("step")) or not _whole(record.get("tokens")):
        return False
    identity = record.get("identity")
    if not isinstance(identity, dict) or not all(isinstance(identity.get(kind), dict) for kind in IDENTITY):
        return False
    return isinstance(identity["environment"].get("switches", {}), dict) and well_formed_files(record.get("files"))


def well_formed_files(files) -> bool:
    """Whether JSON is {path inside a folder: {size, sha256}}."""

    def inside(name: str) -> bool:
        return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\0" not in name

    return isinstance(files, dict) and all(
        inside(name) and isinstance(file, dict) and _whole(file.get("size")) and re.fullmatch("[0-9a-f]{64}", str(file.get("sha256")))
        for name, file in files.items()
    )


def _whole(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def problems(folder: Path, without: tuple[str, ...] = ()) -> list[str]:
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


def set_aside(folder: Path, suffix: str) -> Path:
    """Rename a checkpoint so that nothing takes it for one: `checkpoint-N.damaged`, `.damaged-2` ..."""
    target, count = folder.with_name(f"{folder.name}.{suffix}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{suffix}-{count}")
    os.rename(folder, target)
    flush_folder(folder.parent)
    return target


def newest_verified(run: Path, without: tuple[str, ...], report) -> Path | None:
    """The newest checkpoint that is whole. Each damaged one is set aside and told to `report(folder, problems)`."""
    for _, folder in checkpoints(run):
        wrong = problems(folder, without)
        if not wrong:
            return folder
        report(set_aside(folder, "damaged"), wrong)
    return None


def resolve(run: Path, mode: str, without: tuple[str, ...], report) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for a new run. Raises Refusal.

    auto: the newest verified one, else none. must: refused without one. never: refused with one. Else a folder.
    """
    run = Path(run)
    if mode == "never":
        if there := checkpoints(run):
            raise Refusal(
                f"--resume_from_checkpoint never: {run} holds {len(there)} checkpoint(s), the newest at step {there[0][0]}. "
                "Choose another --output_dir, or `auto` to go on."
            )
        return None
    if mode in ("auto", "must"):
        found = newest_verified(run, without, report)
        if found is None and mode == "must":
            raise Refusal(f"--resume_from_checkpoint must: {run} holds no verified checkpoint. `auto` would start a new run.")
        return found
    folder = Path(mode)
    if not folder.is_dir():
        raise Refusal(f"--resume_from_checkpoint {mode}: no such folder (or use auto, must or never).")
    if not (folder / MANIFEST).exists():
        refuse_sharded(folder)
        raise Refusal(
            f"--resume_from_checkpoint {mode}: no {MANIFEST}, so nothing in it can be verified. To start a new run from its weights "
            f"alone: --init_from {mode}."
        )
    if wrong := problems(folder, without):
        raise Refusal(f"--resume_from_checkpoint {mode} is damaged: {'; '.join(wrong)}. Use another checkpoint, or `auto`.")
    return folder


def refuse_sharded(folder: Path) -> None:
    """Raise Refusal for a checkpoint that another program saved in shards, which only its own layout can read."""
    if any(Path(folder).glob("pytorch_model_fsdp_*")):
        raise Refusal(
            f"{folder} holds weights in shards, which only FSDP over as many processes reads. Make a model of them, `accelerate merge-weights "
            f"{folder}/pytorch_model_fsdp_0 MODEL`, and start a new run from it: --init_from MODEL --resume_from_checkpoint never."
        )
    if any(Path(folder).glob("global_step*")):
        raise Refusal(
            f"{folder} holds weights in DeepSpeed's shards, which only DeepSpeed over as many processes reads. Make a model of them, `python "
            f"{folder}/zero_to_fp32.py {folder} MODEL --safe_serialization`, and start a new run from it: --init_from MODEL --resume_from_checkpoint never."
        )


def supersede_newer(run: Path, resumed: Path, step: int, report) -> None:
    """A run that goes back to an older checkpoint of its own: the newer ones are of another future and set aside."""
    if resumed.parent.resolve() != Path(run).resolve():
        return
    for number, folder in checkpoints(run):
        if number > step:
            report(set_aside(folder, "superseded"))


def require_state(manifest: dict, without: tuple[str, ...]) -> None:
    """Raise Refusal when the checkpoint was published without state that resuming needs."""
    for part, prefixes in STATE_FILES.items():
        absent = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in manifest["files"])]
        if absent and part not in without:
            raise Refusal(
                f"the checkpoint of step {manifest['step']} has no {part} state: going on would not be the same run. "
                f"--resume_without {part} does it on purpose; --init_from starts a new run from the weights."
            )


# ---- identity ----

IDENTITY = ("model", "hyperparameters", "data", "layout", "environment")
VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")


def identity(config: dict, training: dict, data: dict, layout: dict, environment: dict, more: Iterable[str] = ()) -> dict:
    """What makes two stretches of training one run, as a manifest records it. `more`: further hyperparameters that count."""
    model = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG}
    return _comparable(
        {
            "model": json.loads(json.dumps(model, default=str)),
            "hyperparameters": {name: training[name] for name in (*HYPERPARAMETERS, *more)},
            "data": data,
            "layout": layout,
            "environment": environment,
        }
    )


def _comparable(identity: dict) -> dict:
    """An identity as it is written today: what older manifests lack as the default that it was, threads beside the processes, not in the hardware."""
    threads = identity["environment"].get("hardware", {}).get("threads")
    hardware = {name: value for name, value in identity["environment"].get("hardware", {}).items() if name != "threads"}
    told = {**HYPERPARAMETERS, **identity["hyperparameters"]}
    if not told["lr_scheduler_kwargs"] or told["lr_scheduler_type"] in CONSTANT:
        told["lr_scheduler_kwargs"] = None
    return {
        **identity,
        "hyperparameters": told,
        "layout": identity["layout"] | ({} if threads is None else {"threads": threads}),
        "environment": identity["environment"] | ({"hardware": hardware} if hardware else {}),
    }


def differences(saved: dict, now: dict) -> dict[str, dict[str, tuple]]:
    """{kind: {name: (then, now)}} for the kinds hyperparameters, data, layout and environment.

    Model fields are named `model.field` and count as data: they cannot change within one run.
    """
    saved, now = _comparable(saved), _comparable(now)
    found: dict[str, dict[str, tuple]] = {"hyperparameters": {}, "data": {}, "layout": {}, "environment": {}}
    for kind in found:
        for name in sorted({*saved[kind], *now[kind]}):
            then, new = (identity[kind].get(name, SFT_HYPERPARAMETERS.get(name)) for identity in (saved, now))
            if then != new:
                found[kind][name] = (then, new)
    for name in sorted({*saved["model"], *now["model"]}):
        if saved["model"].get(name) != now["model"].get(name):
            found["data"][f"model.{name}"] = (saved["model"].get(name), now["model"].get(name))
    return found


def changed_arithmetic(changed: dict[str, dict[str, tuple]]) -> list[str]:
    """What of `differences` lets the same mathematics end in other last bits; empty where a result must be the same bit for bit."""
    threads = ["number of threads"] if "threads" in changed["layout"] else []
    return [*(name for name in ("hardware", "packages", "switches") if name in changed["environment"]), *threads]


def check_changes(saved: dict, now: dict, step: int, allow: str) -> dict[str, dict[str, tuple]]:
    """The differences from a checkpoint, or a Refusal with all that were not allowed, in one table."""
    allowed = names(allow)
    possible = {*now["hyperparameters"], *now["data"], *(f"model.{name}" for name in {*now["model"], *saved["model"]})}
    for name in allowed:
        if name not in possible:
            near = difflib.get_close_matches(name, possible, 1, 0.4)
            raise Refusal(f"--allow_changes {name}: no such field of a run's identity{f'; did you mean {near[0]}?' if near else '.'}")
    found = differences(saved, now)
    rows = {**found["hyperparameters"], **found["data"]}
    refused = [name for name in rows if name not in allowed]
    if refused:
        width = max(len(name) for name in rows)
        table = "\n".join(
            f"  {name:<{width}}  {_short(then)} -> {_short(new)}{'  (allowed)' if name in allowed else ''}"
            + (f"; {cost}" if (cost := position_cost(name, saved, now, step)) else "")
            for name, (then, new) in rows.items()
        )
        raise Refusal(
            f"this is not the run of the checkpoint at step {step}:\n{table}\nGive back the old values, choose another --output_dir, or "
            f"accept them, really applied from step {step + 1} on: --allow_changes {','.join(rows)}"
        )
    return found


def _short(value) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 40 and " " not in text else text


def position_cost(name: str, saved: dict, now: dict, step: int) -> str:
    """What a change of data, order or step size repeats or skips, in tokens."""
    if "tokens_per_step" not in saved["data"]:
        return "rows come in another order" if name in ("data", "data_seed", "packing", "max_length", "sequences_per_step") else ""
    done = step * saved["data"]["tokens_per_step"]
    if name in ("tokens_per_step", "block_size"):
        position = step * now["data"]["tokens_per_step"]
        if position > done:
            return f"{position - done:,} tokens are skipped"
        return f"{done - position:,} tokens are read again" if position < done else "windows are cut elsewhere"
    if name == "data":
        return f"the first {step * now['data']['tokens_per_step']:,} tokens of the new data are skipped"
    if name in ("order", "data_seed", "epoch_windows"):
        return f"another order: of the {done:,} tokens read so far, any may come again, and as many unread ones never"
    return ""
