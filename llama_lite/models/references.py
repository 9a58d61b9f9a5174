"""Models by name: a folder, a checkpoint, `org/name@revision`; their digests, and which base an adapter belongs to."""

import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint import integrity, store, verify
from ..checkpoint.identity import VOLATILE_CONFIG
from ..digests import sha256
from ..errors import Refusal
from ..files import read_json, read_jsonl
from ..formatting import shortened
from ..hub import download
from ..hub.client import HubPermissionError, HubUnavailable, Reference, reference
from ..hub.local_names import check_misspelt, nearest

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

# fields of adapter_config.json that do not decide what an adapter computes
VOLATILE_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")
BASE_RECORD = "base.json"  # in an adapter's folder: which weights it belongs to, and what their config makes of them

# Fields of a config that do not decide what its weights compute: sizes of vocabulary (padding, checked against the
# tensors) and context, token ids, fields used in training only (dropout, initial values, router losses), and output
# options.
FREE_FIELDS = re.compile(
    r"^(vocab_size|n_positions|max_position_embeddings|max_seq_len|n_ctx|\w+_token_id|\w*(dropout|pdrop|drop|initializer\w*|init_std)|router_aux_loss_coef|output_\w+|"
    rf"pretraining_tp|problem_type|return_dict|chunk_size_feed_forward|is_encoder_decoder|id2label|label2id|{'|'.join(VOLATILE_CONFIG)})$"
)


@dataclasses.dataclass(frozen=True)
class Located:
    """A model or adapter as verified files in a folder. `repo`, `revision` and `commit` are None for a local folder.
    remote_weights: those that `fetch_weights` puts into the folder; None where all are there.
    """

    name: str
    folder: Path
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None
    remote_weights: download.RemoteWeights | None = dataclasses.field(default=None, compare=False)

    @property
    def adapter(self) -> bool:
        """Whether it is an adapter."""
        return (self.folder / "adapter_config.json").is_file()


def locate(
    name: str, revision: str | None = None, argument: str = "--model_name_or_path", with_weights: bool = True
) -> Located:
    """The verified files of a folder, `org/name`, or `org/name@revision`; files on the Hub are downloaded. argument:
    the flag that messages name. with_weights: also the weights of a model; else `fetch_weights` downloads them. Raises
    Refusal.
    """
    folder, ref = Path(name).expanduser(), reference(name)
    if not revision:
        check_misspelt(argument, name)
    if revision and ref and ref.revision:
        raise Refusal(f"{argument} {name} names a revision, and --model_revision {revision} another: give one of them.")
    if ref is None:
        if revision:
            raise Refusal(f"--model_revision {revision}: {name} is a folder, and folders have no revisions.")
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise Refusal(
                f"{argument} {name}: no folder with a config.json or adapter_config.json, and no Hub id (owner/name)."
                f"{nearest(folder)}"
            )
        integrity.check_model(name, folder)
        return Located(name, folder)
    ref = Reference(ref.repo, ref.revision or revision)
    try:
        commit, folder, remote = download.pull_records(ref)
        is_whole = with_weights or (folder / ADAPTER_CONFIG).is_file() or not remote.files
        if is_whole:
            download.pull_weights(ref, commit, remote)
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"{argument} {ref}: no folder here has this name, and the Hub says: {error}. Make it first, give another"
            " name, or run the same command again when the Hub answers."
        ) from None
    check = integrity.check_model if is_whole else integrity.check_objects
    check(str(ref), folder)
    return Located(str(ref), folder, ref.repo, ref.revision, commit, None if is_whole else remote)


def fetch_weights(located: Located) -> None:
    """Download, verify and check the weights of a model that `locate` left on the Hub. Raises Refusal."""
    if located.remote_weights is None:
        return
    ref = Reference(located.repo, located.revision)
    try:
        download.pull_weights(ref, located.commit, located.remote_weights)
    except (HubUnavailable, HubPermissionError) as error:
        raise Refusal(
            f"{ref}: its weights cannot be downloaded: {error}. Run the same command again when the Hub answers: what"
            " is finished is kept."
        ) from None
    integrity.check_model(str(ref), located.folder)


def weights_digest(folder: Path, remote: download.RemoteWeights | None = None) -> str:
    """sha256 over the names and sha256 of the weight files of a model or adapter. remote: those that need not be in the
    folder. Raises Refusal where there are none.
    """
    digests = {name: file["sha256"] for name, file in (remote.files if remote else {}).items()}
    paths = [
        path for pattern in ("model*.safetensors", "adapter_model.safetensors") for path in Path(folder).glob(pattern)
    ]
    digests |= {path.name: sha256(path) for path in paths if path.name not in digests}
    if not digests:
        refuse_unread(Path(folder))
    return hashlib.sha256(json.dumps([list(item) for item in sorted(digests.items())]).encode()).hexdigest()


def need_weights(folder: Path, name: str | None = None) -> None:
    """Raise Refusal for a folder without model.safetensors or an index of its shards."""
    if not any((folder / file).is_file() for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        refuse_unread(folder, name)


def refuse_unread(folder: Path, name: str | None = None) -> None:
    """Raise Refusal for a folder without model.safetensors or an index of its shards, with what makes one of what it
    holds.
    """
    verify.refuse_sharded(folder)
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    way = (
        f'Convert its {pickles[0]}, where you trust who made it: python -c "from transformers import'
        f" AutoModelForCausalLM as M; M.from_pretrained('{folder}',"
        f" use_safetensors=False).save_pretrained('{folder}')\""
        if pickles
        else "Give a folder or revision that does (transformers' save_pretrained writes one)."
    )
    raise Refusal(f"{name or folder} holds no {SAFE_WEIGHTS_NAME}: only safetensors are read. {way}")


def model_digest(folder: Path, remote: download.RemoteWeights | None = None) -> str:
    """sha256 over the weights of a model or adapter and the config fields that decide what they compute (epsilons,
    rotations, LoRA's alpha). remote: as `weights_digest`. Raises Refusal where there are no weights.
    """
    configs = [read_json(Path(folder) / name) for name in ("config.json", ADAPTER_CONFIG)]
    counted = [
        config and {key: value for key, value in config.items() if key not in (*VOLATILE_CONFIG, *VOLATILE_ADAPTER)}
        for config in configs
    ]
    return hashlib.sha256(json.dumps([weights_digest(folder, remote), counted], sort_keys=True).encode()).hexdigest()


def load_config(located: Located):
    """The config of a model, or of an adapter's base. Raises Refusal for an unreadable or quantized one."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    except Exception as error:  # malformed values lead to errors of every kind
        check_native(located)
        raise Refusal(
            f"{located.name} has no config that transformers can read: {shortened(error).rstrip('.')}. Fix its"
            " config.json, or give another model."
        ) from None
    if quantization := getattr(config, "quantization_config", None):
        method = (
            quantization.get("quant_method")
            if isinstance(quantization, dict)
            else getattr(quantization, "quant_method", None)
        )
        raise Refusal(
            f"{located.name} is quantized ({getattr(method, 'value', method)}, quantization_config in its config.json):"
            " only unquantized weights are read. Use the original model, or a dequantized copy."
        )
    return config


def check_native(located: Located, file: str = "config.json") -> None:
    """Raise Refusal where a model or tokenizer needs custom code, according to `auto_map` in `file`: such code is never
    run.
    """
    record = read_json(located.folder / file)
    if isinstance(record, dict) and record.get("auto_map"):
        kind = record.get("model_type") or record.get("tokenizer_class") or "unknown"
        raise Refusal(
            f"{located.name} needs custom code (auto_map in its {file}; {kind} is not a class of transformers), and"
            " custom code is never run. Use a model of a class that transformers has, or a copy that was converted to"
            " one."
        )


def published_as(located: Located) -> tuple[str, str | None] | None:
    """(Hub id, revision) of a model: its own, or the one that its run was last published as; None where it is not
    there.
    """
    if located.repo:
        return located.repo, located.revision or located.commit
    last = (read_json(located.folder / "status.json") or {}).get("step")
    rows = reversed(read_jsonl(located.folder / "published.jsonl"))
    return next(((row["repo"], row["revision"]) for row in rows if row["step"] == last), None)


def base_record(base: Located, hub_id: str | None, revision: str | None) -> dict:
    """The content of an adapter's `base.json`: digest and counted config fields of its base, where it is on the Hub,
    and, of the folder of a run, the run's id, the step of the checkpoint that it is made of, and the digest of that.
    """
    return {
        "sha256": weights_digest(base.folder),
        **_checkpoint_of(base.folder),
        "config": counted_fields(base),
        "hub_id": hub_id,
        "revision": revision,
    }


def _checkpoint_of(folder: Path) -> dict:
    """{run, step, checkpoint_sha256} of the newest checkpoint of a run, where the run's model is made of it; the digest
    only where both are in one number format, so that the weights are the same. Empty for any other folder.
    """
    from ..hub.export import is_export

    steps = store.checkpoints(folder) if (folder / "run.json").is_file() else []
    if not steps or not is_export(steps[0][1], folder):
        return {}
    step, checkpoint = steps[0]
    dtypes = {(read_json(path / "config.json") or {}).get("dtype") for path in (folder, checkpoint)}
    of_run = {"run": read_json(folder / "run.json").get("id"), "step": step}
    return of_run | ({"checkpoint_sha256": weights_digest(checkpoint)} if len(dtypes) == 1 else {})


def counted_fields(located: Located) -> dict:
    """The fields of a model's config that decide what its weights compute (rotations, epsilons, heads), as JSON values.
    Raises Refusal.
    """
    fields = load_config(located).to_dict()
    return json.loads(
        json.dumps({name: value for name, value in fields.items() if not FREE_FIELDS.search(name)}, default=str)
    )


def _way_to_base(record: dict, adapter: Located, base: Located) -> str:
    """A sentence that says how to give the weights that an adapter was made for, where `base` is of a run; else "".
    record: the adapter's `base.json`.
    """
    run = next((folder for folder in (base.folder, base.folder.parent) if (folder / "run.json").is_file()), None)
    if run is None:
        return ""
    name = base.name.partition("@")[0] if base.folder == run or "@" in base.name else os.path.dirname(base.name)
    step = record.get("step")
    if step and record["run"] != (read_json(run / "run.json") or {}).get("id"):
        return ""
    if step and not (run / f"checkpoint-{step}").is_dir():
        return f" It was tuned from step {step:,} of this run, whose checkpoint is no longer in {run}."
    if "checkpoint_sha256" in record:
        return f" It was tuned from step {step:,} of this run: give {name}@step-{step}+{adapter.name}."
    known = (
        "It was tuned from these weights in the finished model's number format: export them"
        if step and base.folder.name == f"checkpoint-{step}"
        else f"It was tuned from step {step:,} of this run: export it"
        if step
        else "If the run was trained further since,"
    )
    which, folder = (step, f"{name}-{step}") if step else ("N", "FOLDER")
    return (
        f" {known}{'' if step else ' export the step that was tuned'}: python -m llama_lite export {name}@step-{which}"
        f" --to safetensors --output_dir {folder}, and give {folder}+{adapter.name}."
    )


def check_base(adapter: Located, base: Located) -> None:
    """Raise Refusal when an adapter was trained for other weights than `base`, or for the same weights with another
    config, as far as its record states them.
    """
    record = read_json(adapter.folder / BASE_RECORD)
    if record:
        digests = record["sha256"], record.get("checkpoint_sha256")
        if weights_digest(base.folder, base.remote_weights) not in digests:
            made_for = f"{record['hub_id']}@{record['revision']}" if record["hub_id"] else "other weights"
            raise Refusal(
                f"the adapter {adapter.name} was made for {made_for} and not for {base.name} (their sha256"
                f" differ).{_way_to_base(record, adapter, base)}"
            )
        saved_fields = record.get("config", {})  # which the first versions did not record
        current_fields = counted_fields(base) if saved_fields else {}
        changes = [
            f"{name} was {saved_fields[name]} and is {current_fields[name]}"
            for name in sorted(saved_fields.keys() & current_fields.keys())
            if saved_fields[name] != current_fields[name]
        ]
        if changes:
            raise Refusal(
                f"the adapter {adapter.name} was made for the weights of {base.name} with another config"
                f" ({'; '.join(changes)}): give the base with the config that it had."
            )
        return
    named = (read_json(adapter.folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    is_folder = named and base.repo is None and os.path.isdir(named)
    if named not in (base.name, base.repo) and not (is_folder and os.path.samefile(named, base.folder)):
        raise Refusal(
            f"the adapter {adapter.name} says that its base is {named}, not {base.name}: give that base, or name this"
            " one as base_model_name_or_path in the adapter's adapter_config.json if it is the same model."
        )
