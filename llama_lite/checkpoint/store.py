"""Writing, finding and choosing checkpoints on disk.

`checkpoint-N/` exists only when it is complete: files are written to a staging folder and flushed, `manifest.json`
(size and BLAKE3 of each file, the run's identity, a probe of the weights) is written last, then the folder gets its
name. A folder that does not match its manifest is quarantined as `checkpoint-N.damaged` and never used.
"""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import files
from ..digests import blake3, digest_of
from ..errors import Refusal
from ..files import flush_folder, write_json
from .verify import FORMAT, MANIFEST, find_corruption, refuse_sharded

STAGING, REPLACED, DELETED = ".staging-", ".replaced-", ".deleted-"


# ---- writing ----


def staging_folder(run: Path, step: int) -> Path:
    """A new, empty folder to write checkpoint `step` into."""
    folder = Path(run) / f"{STAGING}{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def need_space(run: Path, num_bytes: int) -> None:
    """Raise Refusal when the disk has less free space than `num_bytes` and a margin of 5 %."""
    advice = "Make room or lower --save_total_limit, and run the same command again: the last checkpoint is untouched."
    files.need_space(run, num_bytes, "the next checkpoint", advice)


def flush_and_hash(folder: Path, known: dict[Path, str] | None = None) -> dict[str, dict]:
    """{path in the folder: {size in bytes, blake3}} of every file but the manifest, each flushed to disk. Hashing and
    flushing run concurrently. known: BLAKE3 of files that were hashed as they were written.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != MANIFEST)

    def flush(path: Path) -> None:
        with open(path, "rb") as file:
            files.flush(file.fileno(), path)

    with ThreadPoolExecutor(max_workers=8) as pool:
        flushes = [pool.submit(flush, path) for path in paths]
        digests = list(pool.map(lambda path: (known or {}).get(path) or blake3(path), paths))
        for future in flushes:
            future.result()
    return {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "blake3": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def commit_checkpoint(staging: Path, run: Path, step: int, manifest: dict) -> Path:
    """Write the manifest and rename the staging folder to `checkpoint-N`, which is returned. An older folder of that
    name is deleted only after the rename.
    """
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
    """Delete the oldest checkpoints beyond `limit` (None: keep all). The newest one always stays."""
    for _, folder in checkpoints(run)[max(limit, 1) :] if limit else ():
        doomed = folder.with_name(f"{DELETED}{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)  # in one step, so that no half-deleted folder ever looks like a damaged checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


# ---- finding and verifying ----


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every `checkpoint-N`, newest first."""
    steps = []
    for folder in Path(run).glob("checkpoint-*"):
        number = folder.name.removeprefix("checkpoint-")
        if number.isdigit() and folder.is_dir():
            steps.append((int(number), folder))
    return sorted(steps, reverse=True)


def recover_interrupted(run: Path) -> None:
    """Finish or undo a save, a replacement or a rotation that a crash interrupted."""
    for folder in Path(run).glob(f"{REPLACED}*"):
        final = Path(run) / f"checkpoint-{folder.name.removeprefix(REPLACED)}"
        if not final.exists():
            os.rename(folder, final)
    for pattern in (STAGING, REPLACED, DELETED):
        for folder in Path(run).glob(f"{pattern}*"):
            shutil.rmtree(folder, ignore_errors=True)


def quarantine(folder: Path, suffix: str) -> Path:
    """Rename a checkpoint so that nothing uses it: `checkpoint-N.damaged`, `.damaged-2` ... Returns the new path."""
    target, count = folder.with_name(f"{folder.name}.{suffix}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{suffix}-{count}")
    os.rename(folder, target)
    flush_folder(folder.parent)
    return target


def newest_verified(
    run: Path, excluded_state: tuple[str, ...], on_quarantine: Callable[[Path, list[str]], None]
) -> Path | None:
    """The newest checkpoint without corruption, None if there is none. Each damaged one is quarantined and reported to
    `on_quarantine(folder, problems)`.
    """
    for _, folder in checkpoints(run):
        problems = find_corruption(folder, excluded_state)
        if not problems:
            return folder
        on_quarantine(quarantine(folder, "damaged"), problems)
    return None


def resolve(
    run: Path, mode: str, excluded_state: tuple[str, ...], on_quarantine: Callable[[Path, list[str]], None]
) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` selects; None for a new run. Raises Refusal.

    mode: auto (the newest verified one, else None), must (refused without one), never (refused with one), or a folder.
    excluded_state: keys of `verify.STATE_FILES` that are not loaded and so not verified (--resume_without).
    """
    run = Path(run)
    if mode == "never":
        if existing := checkpoints(run):
            raise Refusal(
                f"--resume_from_checkpoint never: {run} holds {len(existing)} checkpoint(s), the newest at step"
                f" {existing[0][0]}. Choose another --output_dir, or `auto` to continue."
            )
        return None
    if mode in ("auto", "must"):
        checkpoint = newest_verified(run, excluded_state, on_quarantine)
        if checkpoint is None and mode == "must":
            raise Refusal(
                f"--resume_from_checkpoint must: {run} holds no verified checkpoint. `auto` would start a new run."
            )
        return checkpoint
    folder = Path(mode)
    if not folder.is_dir():
        raise Refusal(f"--resume_from_checkpoint {mode}: no such folder (or use auto, must or never).")
    if not (folder / MANIFEST).exists():
        refuse_sharded(folder)
        raise Refusal(
            f"--resume_from_checkpoint {mode}: no {MANIFEST}, so nothing in it can be verified. To start a new run from"
            f" its weights alone: --init_from {mode}."
        )
    if problems := find_corruption(folder, excluded_state):
        raise Refusal(
            f"--resume_from_checkpoint {mode} is damaged: {'; '.join(problems)}. Use another checkpoint, or `auto`."
        )
    return folder


def supersede_newer(run: Path, resumed: Path, step: int, on_quarantine: Callable[[Path], None]) -> None:
    """Quarantine the checkpoints of `run` that are newer than `step`, when it resumes from a checkpoint of its own."""
    if resumed.parent.resolve() != Path(run).resolve():
        return
    for newer_step, folder in checkpoints(run):
        if newer_step > step:
            on_quarantine(quarantine(folder, "superseded"))
