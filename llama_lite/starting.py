"""Where a run begins: in its own folder, in a checkpoint of the Hub, from another model's weights, or at step 0.

All of it happens on rank 0, before any model is made.
"""

from pathlib import Path

from . import checkpoints, pulling, training
from .arguments import Refusal, names
from .hub import NoAnswer, NotAllowed, reference
from .plan import load_model_config
from .runs import read_json, say, write_json

OWN_FILES = ("status.json", "events.jsonl", "log.jsonl", "stop")  # what a run that ended before its run.json can leave


def find_start(run, training_args, run_args, identity, repo: str | None, hub_required: bool):
    """The Start of this run: tidies the folder, pulls from the Hub, verifies, compares identities (rank 0). Raises Refusal."""

    def report(folder, problems=("a run that went back to an older checkpoint",)):
        say(f"SET ASIDE {folder.name}: {'; '.join(problems)}")
        run.event("set aside", checkpoint=folder.name, problems=list(problems))

    record = read_json(run.path / "run.json")
    if record is None and any(path.name not in OWN_FILES and path.name[0] != "." for path in run.path.iterdir()):
        raise Refusal(f"--output_dir {run.path} holds files and is not the folder of a run: choose another one.")
    if record and record.get("kind") != "pretrain":
        raise Refusal(f"--output_dir {run.path} belongs to a run of another kind ({record.get('kind')}): choose another one.")
    checkpoints.tidy(run.path)
    (run.path / "stop").unlink(missing_ok=True)
    without = tuple(names(run_args.resume_without))
    mode = from_hub(run, training_args.resume_from_checkpoint, run_args, identity, repo, hub_required)
    folder = checkpoints.resolve(run.path, mode, without, report)
    start = training.start_from(folder, without)
    if folder is None:
        run.rewind_log([])
        return start
    start.changed = checkpoints.check_changes(start.manifest["identity"], identity, start.step, run_args.allow_changes)
    if start.changed["environment"]:
        say(f"WARNING   another {', '.join(start.changed['environment'])} than when {folder.name} was saved: equal within tolerance, not bit for bit")
    if mode not in ("auto", "must"):
        checkpoints.supersede_newer(run.path, folder, start.step, report)
    run.rewind_log(read_json(folder / "trainer_state.json")["log_history"])
    return start


def from_hub(run, mode: str, run_args, identity, repo: str | None, hub_required: bool) -> str:
    """Bring a checkpoint from the Hub into the run folder where `mode` means one; returns the mode that is left."""
    record, where = read_json(run.path / "run.json") or {}, reference(mode)
    if where and record.get("resumed_from") == str(where) and checkpoints.checkpoints(run.path):
        return "auto"  # the same command again: it goes on from where it got to
    if where and "identity" in record:
        raise Refusal(f"--resume_from_checkpoint {where}: {run.path} is a run already. Use `auto` to go on with it, or another --output_dir.")
    if mode == "auto" and repo and not checkpoints.checkpoints(run.path):
        try:
            where = pulling.newest_resumable(repo)
        except (NoAnswer, NotAllowed) as error:
            if hub_required:
                raise Refusal(f"--push_to_hub {repo}: {error}. Mend it, or leave out --hub_required.") from None
            say(f"WARNING   nobody can tell whether {repo} has checkpoints of this run: {error}")
    if where is None:
        return mode
    try:
        theirs = pulling.read_revision(where)[1]
        if mode == "auto":
            try:
                checkpoints.check_changes(theirs["identity"], identity, theirs["step"], run_args.allow_changes)
            except Refusal as refusal:
                raise Refusal(f"{where.repo} belongs to another run, so choose another --hub_model_id, or go on with that one: {refusal}") from None
        write_json(run.path / "run.json", {"kind": "pretrain", "id": theirs["run"], "resumed_from": str(where)})
        pulling.pull_checkpoint(where, run.path)
    except (NoAnswer, NotAllowed) as error:
        raise Refusal(f"{where} cannot be downloaded: {error}. Run the same command again when the Hub answers.") from None
    return "must"


def init_folder(run, init_from: str, config) -> Path:
    """The folder of the weights that `--init_from` means, downloaded where it is a revision. Raises Refusal where they need another model."""
    where, folder = reference(init_from), Path(init_from)
    if where:
        try:
            folder = pulling.pull_weights(where, run.path / "init")
        except (NoAnswer, NotAllowed) as error:
            raise Refusal(f"--init_from {where}: {error}. Run the same command again when the Hub answers.") from None
    if (folder / "config.json").exists():
        theirs = load_model_config(str(folder))
        fields = ("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters")
        if other := [
            f"{name} is {getattr(theirs, name)} there and {getattr(config, name)} here"
            for name in fields
            if getattr(theirs, name) != getattr(config, name)
        ]:
            raise Refusal(f"--init_from {init_from} is another model: {'; '.join(other)}. Give its config.json as --model_config.")
        ids = (theirs.bos_token_id, theirs.eos_token_id)
        if ids != (config.bos_token_id, config.eos_token_id):
            say(f"init      begin and end ids {ids} of {init_from} are mended to {config.eos_token_id}, the tokenizer's end of text")
    return folder


def new_run(run, record: dict) -> None:
    """`run.json` of a run's first start; one that began on the Hub keeps its id."""
    there = read_json(run.path / "run.json") or {}
    if "identity" not in there:
        write_json(run.path / "run.json", record | there)
