"""Saving in VerifiedTraining: a copy of the state, from which a thread writes, hashes and names a checkpoint."""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import TrainerCallback

from .. import files
from ..checkpoint import optimizer_state, parts, store
from ..checkpoint.background import BackgroundWriter
from ..checkpoint.snapshot import Snapshot, live_storages
from ..checkpoint.verify import OPTIMIZER_FILE
from ..distributed import LOCAL_WORLD_SIZE, WORLD_SIZE, print_main, print_once, raise_on_all_ranks, run_on_main
from ..errors import end_of
from ..formatting import size
from ..machine.host_memory import SNAPSHOT_FRACTION, available_memory

PROGRESS_FILE = "progress.json"


class VerifiedSaving:
    """The half of VerifiedTraining that saves, in place of Trainer's methods."""

    shard_checkpoints = False  # whether every rank writes a part of a checkpoint (FSDP2)
    rerun: dict = {}  # noqa: RUF012 (what each checkpoint records for an audit; replaced, never changed)

    def prepare_saves(self) -> None:
        """Called once, when the trainer is made."""
        self.saved_step: int | None = None
        # whether a save is under way is known to all ranks, at the latest a step after it is done
        self.async_save, self.writer, self.is_saving = True, BackgroundWriter(), False
        self.unsealed: tuple | None = None  # arguments of `_commit` of the checkpoint whose parts are being written
        self.snapshot = Snapshot(self.args.device.type == "cuda")
        self.run.before_end.append(self._end_save)

    def follow_save(self, busy: bool, failed: bool) -> None:
        """What the reduction of a step tells all ranks of the save that is under way: whether the thread of any rank is
        writing, or has failed. Raises what it raised.
        """
        self.is_saving = busy
        if failed:
            self.unsealed = None
            raise_on_all_ranks(self.writer.failure)
        if not busy:
            self.seal_parts()

    def _save(self, output_dir=None, state_dict=None):
        """As Trainer's, without `training_args.bin`: it is a pickle, and holds local paths. Under ZeRO, the float32
        weights.
        """
        if self.is_deepspeed_enabled:
            state_dict = optimizer_state.zero_weights(self.model, self.args.should_save)
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(output_dir, state_dict=state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial):
        with self.clock.during("saves"):
            self._save_verified()

    def _save_verified(self) -> None:
        """Copy weights and optimizer state, write the rest to a staging folder, compute the probe loss. A thread then
        writes the copies, flushes, hashes and renames the folder, and deletes the oldest checkpoints, while training
        goes on. Without memory for the copies, training waits until all of it is done (what is in host memory is then
        written from there). A failure on one rank ends all.

        With `shard_checkpoints` the thread of each rank writes a part. That of rank 0 does the rest when the reduction
        of a step has told the ranks that all parts are written.
        """
        began, step = time.perf_counter(), self.state.global_step
        if step == self.saved_step:
            return
        self.finish_save()
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        run_on_main(self._need_space, 3 * trained)  # weights and two moments
        copied = 3 * (parts.largest_part(self.model) if self.shard_checkpoints else trained)
        in_background = run_on_main(self._can_save_in_background, copied)
        staging = Path(run_on_main(lambda: str(store.staging_folder(self.run.path, step))))
        failure = None
        try:
            self.store_flos()
            self._save_state(staging, in_background)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them
            failure = error
        raise_on_all_ranks(failure)
        probe = {"loss": self.probe_loss(), "sha256": self.probe_digest()}
        manifest = {"tokens": self.tokens, "identity": self.identity, "probe": probe}
        manifest |= {"rerun": self.rerun} if self.rerun else {}
        recorded = {"seconds": self.clock.recorded(), "evaluation_due": self.evaluation_due}
        self.saved_step = step
        if self.shard_checkpoints:
            self.writer.submit(self._write_part, staging)
            self.is_saving, self.unsealed = True, (staging, step, manifest, recorded)
            if not in_background:
                self.finish_save()
        elif in_background:
            self.do_in_background(self._commit, staging, step, manifest, recorded)
        else:
            run_on_main(self._commit, staging, step, manifest, recorded)
        self.outside += time.perf_counter() - began

    def _save_state(self, staging: Path, in_background: bool) -> None:
        """Write weights and training state into a folder, those in safetensors only into the snapshot where the save is
        `in_background`, or where they are in host memory, which then needs no copies.
        """
        self.snapshot.begin(waits=not in_background and not self.shard_checkpoints)
        into_snapshot = self.args.should_save and (in_background or self.args.device.type == "cpu")
        if self.shard_checkpoints:
            self._save(str(staging), {})  # all but the weights
            parts.add_weights(self.snapshot, staging, self.model)
        else:
            live = live_storages([*self.model.parameters(), *self.model.buffers()])
            with self.snapshot.capture(live) if into_snapshot else contextlib.nullcontext():
                self.save_model(str(staging), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staging), self.snapshot if into_snapshot else None)
        self._save_scaler(str(staging))
        self._save_rng_state(str(staging))
        self._save_progress(staging)
        self.snapshot.synchronize()

    def _can_save_in_background(self, num_bytes: int) -> bool:
        """Whether training goes on while a checkpoint is written (rank 0); says once why it does not. num_bytes: of the
        weights and optimizer state that a rank writes, at most.
        """
        available = available_memory() // (LOCAL_WORLD_SIZE if self.shard_checkpoints else 1)
        callbacks = self.callback_handler.callbacks
        readers = [type(callback).__name__ for callback in callbacks if reads_checkpoint(callback)]
        if not self.async_save:
            return False
        if readers:
            reason = f"{readers[0]} reads each checkpoint when it is saved"
        elif num_bytes - self.snapshot.buffer_bytes > SNAPSHOT_FRACTION * available:
            reason = f"the copy that a save is written from takes {size(num_bytes)} and {size(available)} are available"
        else:
            return True
        print_once("synchronous", f"saving    training waits for each save: {reason}")
        return False

    def do_in_background(self, job: Callable, *args) -> None:
        """Let the thread of rank 0 do a job after those before it. Call on all ranks; `finish_save` waits for it."""
        if self.is_world_process_zero():
            self.writer.submit(job, *args)
        self.is_saving = True

    def _write_part(self, staging: Path) -> None:
        """Write and flush this rank's part of a checkpoint (in the thread of each rank)."""
        digests = self.snapshot.write()
        for path in digests:  # another machine cannot flush what this one has written
            with open(path, "rb") as file:
                files.flush(file.fileno(), path)
        parts.write_digests(staging, digests)

    def seal_parts(self) -> None:
        """If a checkpoint is being written in parts: wait for all of them, and let the thread of rank 0 do the rest.
        Call on all ranks. Raises on all what failed on any.
        """
        if self.unsealed:
            self.writer.join()
            unsealed, self.unsealed = self.unsealed, None
            raise_on_all_ranks(self.writer.failure)  # waits for all ranks, too
            self.do_in_background(self._commit, *unsealed)

    def finish_save(self) -> None:
        """Return when no checkpoint is being written. Raises on all ranks what the thread that writes it raised."""
        self.seal_parts()
        if self.is_saving:
            run_on_main(self.writer.join)
            self.is_saving = False
            raise_on_all_ranks(self.writer.failure)

    def _end_save(self) -> None:
        """Before the run ends, for whatever reason: let the thread end its work, on this rank alone. Says what failed
        in it where the run ends for another reason.
        """
        if self.unsealed and self.is_world_process_zero():
            self.writer.submit(self._commit, *self.unsealed)
        self.writer.join()
        if self.is_saving and self.writer.failure:
            print_main(f"WARNING   the last checkpoint was not saved: {end_of(self.writer.failure, self.run.path)}")

    def _need_space(self, num_bytes: int) -> None:
        """Raise Refusal where the disk has no space for a checkpoint, also without what the queue can give up."""
        if self.publisher:
            self.publisher.make_room(num_bytes)
        store.need_space(self.run.path, num_bytes)

    def _save_progress(self, staging: Path) -> None:
        """What Trainer does not save: the losses since the last log (one value per rank), and where data and schedule
        began."""
        pending = self._tr_loss.detach().float().reshape(1)
        if dist.is_initialized() and WORLD_SIZE > 1:
            gathered = [torch.zeros_like(pending) for _ in range(WORLD_SIZE)]
            dist.all_gather(gathered, pending)
            pending = torch.cat(gathered)
        if self.args.should_save:
            self.state.best_model_checkpoint = None
            self.state.save_to_json(str(staging / "trainer_state.json"))
            progress = {
                "tokens": self.tokens,
                "pending_loss": pending.tolist(),
                "logged_step": self._globalstep_last_logged,
                "data_start": self.start.data_start,
                "schedule_start": self.start.schedule_start,
                "evaluation_due": self.evaluation_due,
                **({"order_history": self.start.order_history} if self.start.order_history else {}),
            }
            (staging / PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")

    def _commit(self, staging: Path, step: int, manifest: dict, recorded: dict) -> None:
        """Write what the snapshot holds, flush, hash and name the checkpoint of a step (rank 0, in either thread).

        recorded: what was known when the state was copied: the seconds of the event, and whether an evaluation is due.
        """
        digests = parts.take_digests(staging) if self.shard_checkpoints else self.snapshot.write()
        manifest["files"] = store.flush_and_hash(staging, digests)
        if unseen := sorted(path.name for path in digests if path.name not in manifest["files"]):
            raise OSError(f"{unseen[0]} of step {step} was written, and is not in {staging.name} here")
        checkpoint = store.commit_checkpoint(staging, self.run.path, step, manifest)
        loss = manifest["probe"]["loss"]
        self.run.event("saved", step=step, checkpoint=checkpoint.name, probe_loss=loss, **recorded["seconds"])
        if self.publisher and not recorded["evaluation_due"]:
            self.publisher.add(checkpoint)  # before rotation can take it; else when its evaluation has ended
        store.rotate(self.run.path, self.args.save_total_limit)

    def _save_optimizer_and_scheduler(self, output_dir: str, snapshot: Snapshot | None = None) -> None:
        """Optimizer state by parameter name, gathered from every layout into one safetensors file, or a snapshot, or
        the snapshots of all ranks.
        """
        model, optimizer = self.model, self._raw_optimizer()
        if self.shard_checkpoints:
            parts.add_optimizer(self.snapshot, Path(output_dir), model, optimizer)
        else:
            path, writes = os.path.join(output_dir, OPTIMIZER_FILE), self.args.should_save
            optimizer_state.save_optimizer(model, optimizer, path, self.is_fsdp_enabled, writes, snapshot)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _raw_optimizer(self):
        return getattr(self.optimizer, "optimizer", self.optimizer)


def reads_checkpoint(callback: TrainerCallback) -> bool:
    """Whether a callback reads a checkpoint's folder when it is saved: those of users may, those of transformers do
    where they are asked to upload it.
    """
    owner = next(kind for kind in type(callback).__mro__ if "on_save" in vars(kind))  # of the method that is called
    if owner is TrainerCallback:
        return False
    if not owner.__module__.startswith("transformers."):
        return True
    asked = ("_log_artifacts", "_log_model", "_should_upload_checkpoint", "sync_checkpoints")
    values = [getattr(callback, name, None) for name in asked]
    return any(str(getattr(value, "value", value)).lower() not in ("none", "false", "end") for value in values)
