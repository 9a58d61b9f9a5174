"""What a checkpoint is, when it can be trusted, and what may differ from it when a run goes on.

`checkpoint-N/` exists only when it is whole: files are written aside and flushed, `manifest.json` (size and sha256 of
each, the run's identity, a proof of the weights) comes last, then the folder gets its name. A folder that does not
match its manifest is set aside as `checkpoint-N.damaged` and never used.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import files
from ..errors import Refusal
from ..files import flush_folder, sha256, write_json
from .verify import FORMAT, MANIFEST, digest_of, find_corruption, refuse_sharded

STAGING, REPLACED, DELETED = ".staging-", ".replaced-", ".deleted-"


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
    files.need_space(run, needed, "the next checkpoint", way)


def flush_and_hash(folder: Path) -> dict[str, dict]:
    """Size and sha256 of every file of a folder, each flushed to disk; hashing and flushing run side by side."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)

    def flush(path):
        with open(path, "rb") as file:
            files.flush(file.fileno(), path)

    with ThreadPoolExecutor(max_workers=8) as pool:
        flushes = [pool.submit(flush, path) for path in paths]
        digests = list(pool.map(sha256, paths))
        for done in flushes:
            done.result()
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def commit_checkpoint(staging: Path, run: Path, step: int, manifest: dict) -> Path:
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


def recover_interrupted(run: Path) -> None:
    """Finish or undo what a crash cut short: a save, a replacement, a rotation."""
    for folder in Path(run).glob(f"{REPLACED}*"):
        final = Path(run) / f"checkpoint-{folder.name.removeprefix(REPLACED)}"
        if not final.exists():
            os.rename(folder, final)
    for pattern in (STAGING, REPLACED, DELETED):
        for folder in Path(run).glob(f"{pattern}*"):
            shutil.rmtree(folder, ignore_errors=True)


def quarantine(folder: Path, suffix: str) -> Path:
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
        wrong = find_corruption(folder, without)
        if not wrong:
            return folder
        report(quarantine(folder, "damaged"), wrong)
    return None


def resolve(run: Path, mode: str, without: tuple[str, ...], report) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None for a new run. Raises Refusal.

    auto: the newest verified one, else none. must: refused without one. never: refused with one. Else a folder.
    """
    run = Path(run)
    if mode == "never":
        if there := checkpoints(run):
            raise Refusal(
                f"--resume_from_checkpoint never: {run} holds {len(there)} checkpoint(s), the newest at step"
                f" {there[0][0]}. Choose another --output_dir, or `auto` to go on."
            )
        return None
    if mode in ("auto", "must"):
        found = newest_verified(run, without, report)
        if found is None and mode == "must":
            raise Refusal(
                f"--resume_from_checkpoint must: {run} holds no verified checkpoint. `auto` would start a new run."
            )
        return found
    folder = Path(mode)
    if not folder.is_dir():
        raise Refusal(f"--resume_from_checkpoint {mode}: no such folder (or use auto, must or never).")
    if not (folder / MANIFEST).exists():
        refuse_sharded(folder)
        raise Refusal(
            f"--resume_from_checkpoint {mode}: no {MANIFEST}, so nothing in it can be verified. To start a new run from"
            f" its weights alone: --init_from {mode}."
        )
    if wrong := find_corruption(folder, without):
        raise Refusal(
            f"--resume_from_checkpoint {mode} is damaged: {'; '.join(wrong)}. Use another checkpoint, or `auto`."
        )
    return folder


def supersede_newer(run: Path, resumed: Path, step: int, report) -> None:
    """A run that goes back to an older checkpoint of its own: the newer ones are of another future and set aside."""
    if resumed.parent.resolve() != Path(run).resolve():
        return
    for number, folder in checkpoints(run):
        if number > step:
            report(quarantine(folder, "superseded"))
