"""The values of a run as a config: with `--config runs/mine`, another run begins with the same ones."""

from pathlib import Path

from ..errors import Refusal
from ..files import read_json, read_jsonl

KINDS = {"run_pretrain.py": "pretrain", "run_sft.py": "sft"}

# where a run is and publishes, how long its steps took, and how it was resumed: of that run alone
OWN = {
    *"output_dir run_name push_to_hub hub_model_id hub_revision".split(),
    *"hours resume_from_checkpoint resume_without allow_changes stop_after_step".split(),
}
FOLDERS = {"prepared_dir", "curated_dir"}  # where another text, tokenizer or curation is given, they follow from it
KEEP_TOKENS = {  # arguments of text that leave the tokens as they are
    *"prepared_dir curated_dir prepared_hub_id validation prepare_workers prepare_on prepare_only".split(),
    *"add_index verify_data".split(),
}
LENGTH = {"hours", "max_steps", "num_train_epochs"}
INTERVALS = {"logging_steps", "eval_steps", "save_steps", "save_total_limit"}  # of another length, they follow from it


def values_of_run(script: str, folder: Path, names: set[str], of_tokens: set[str], typed: set[str]) -> dict:
    """{argument: value} of the run in `folder`, given or derived, with those that were changed on the way. Raises
    Refusal for a folder that holds no run of this script.

    names: the script's arguments. of_tokens: those of text and curation. typed: those of the command line. With another
    length, what was derived from the run's is derived anew; with other tokens, their folders; a mixture and a text take
    each other's place.
    """
    record = read_json(folder / "run.json") or {}
    if script not in KINDS or record.get("kind") != KINDS[script]:
        holds = f"a run of run_{record['kind']}.py" if record.get("kind") in KINDS.values() else "no run"
        raise Refusal(
            f"--config {folder} is a folder with {holds}: give a YAML file"
            + (f", or the folder of a run of {script}." if script in KINDS else ".")
        )
    given, length_is_typed = record.get("given", {}), bool(typed & LENGTH)
    values, changed = {**given, **record.get("settings", {})}, set()
    for event in read_jsonl(folder / "events.jsonl"):
        if event["event"] == "changed" and event["kind"] in ("hyperparameters", "data"):
            changed |= event["fields"].keys()
            values |= {name: new for name, (_, new) in event["fields"].items() if name in values}
    left = OWN | (FOLDERS if typed & (of_tokens - KEEP_TOKENS) else set())
    if "mixture" in typed:
        left |= of_tokens - {"validation"}
    elif "dataset" in typed:
        left |= {"mixture", "allow_epochs_of"}
    if length_is_typed or "max_steps" in changed:
        left |= INTERVALS - given.keys()
    if length_is_typed:
        left |= LENGTH | ({"warmup_steps"} - given.keys())
    return {name: value for name, value in values.items() if name in names - left and value not in (None, [])}
