"""From a reference to a model: a folder, a revision on the Hub, one of the authors' checkpoints; with an adapter or without.

Files of the Hub are verified before anything is loaded, and only safetensors and JSON are ever read. A model's begin, end
and padding ids are made those of its tokenizer, and that is said.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from . import integrity, pulling
from .arguments import Refusal
from .hub import NoAnswer, NotAllowed, Reference, reference
from .runs import read_json, sha256

BASE_RECORD = "base.json"  # in an adapter's folder: which weights it belongs to
UNUSED_ROWS = 1024  # vocabularies are padded to a round number; more than this is another tokenizer's


@dataclasses.dataclass(frozen=True)
class Located:
    """A model, or adapter, as verified files in a folder. `repo` and `commit` are None for a folder of this machine."""

    name: str
    folder: Path
    repo: str | None = None
    revision: str | None = None
    commit: str | None = None

    @property
    def adapter(self) -> bool:
        return (self.folder / "adapter_config.json").is_file()


def locate(name: str, revision: str | None = None, argument: str = "--model_name_or_path") -> Located:
    """The verified files that a folder, `org/name`, or `org/name@revision` means. Raises Refusal."""
    folder, where = Path(name).expanduser(), reference(name)
    if revision and where and where.revision:
        raise Refusal(f"{argument} {name} names a revision, and --model_revision {revision} another: give one of them.")
    if where is None:
        if revision:
            raise Refusal(f"--model_revision {revision}: {name} is a folder, and folders have no revisions.")
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise Refusal(f"{argument} {name}: no folder with a config.json or adapter_config.json, and no Hub id (owner/name).")
        integrity.check_model(name, folder)
        return Located(name, folder)
    where = Reference(where.repo, where.revision or revision)
    try:
        commit, folder = pulling.pull_model(where)
    except (NoAnswer, NotAllowed) as error:
        raise Refusal(
            f"{argument} {where}: no folder here has this name, and the Hub says: {error}. Make it first, give another name, or run the same command "
            "again when the Hub answers."
        ) from None
    integrity.check_model(str(where), folder)
    return Located(str(where), folder, where.repo, where.revision, commit)


def weights_digest(folder: Path) -> str:
    """sha256 over the names and sha256 of the weight files of a model or adapter."""
    files = sorted(path for pattern in ("model*.safetensors", "adapter_model.safetensors") for path in Path(folder).glob(pattern))
    if not files:
        raise Refusal(f"{folder} holds no model.safetensors: only safetensors are read.")
    return hashlib.sha256(json.dumps([[path.name, sha256(path)] for path in files]).encode()).hexdigest()


def load_tokenizer(located: Located, other: str | None = None):
    """The tokenizer of a model, or the one named by `other` (`gpt2`, a folder, a Hub id). Raises Refusal."""
    from transformers import AutoTokenizer

    from . import tokenizers

    if other:
        return tokenizers.load_tokenizer(other)
    try:
        tokenizer = AutoTokenizer.from_pretrained(located.folder)
    except Exception as error:  # the tokenizers library raises bare ones
        raise Refusal(f"{located.name} has no tokenizer ({' '.join(str(error).split())[:200]}): name one with --tokenizer_name, e.g. gpt2.") from None
    if tokenizer.eos_token_id is None:
        raise Refusal(f"the tokenizer of {located.name} has no end-of-text token, so no answer could ever end: name another with --tokenizer_name.")
    return tokenizer


def load_config(located: Located):
    """The config of a model, of an adapter's base where it is one. Raises Refusal."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(located.folder)
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(f"{located.name} has no config that transformers can read: {' '.join(str(error).split())[:300]}") from None


def load_model(located: Located, dtype: str = "float32"):
    """The causal language model of a folder, its weights in `dtype`. Raises Refusal."""
    import torch
    from transformers import AutoModelForCausalLM

    if located.adapter:
        raise Refusal(f"{located.name} is an adapter, not a model: give its base, or merge the two with --merge_adapter first.")
    try:
        return AutoModelForCausalLM.from_pretrained(located.folder, dtype=getattr(torch, dtype), use_safetensors=True)
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(f"{located.name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def check_vocabulary(name: str, rows: int, tokenizer) -> None:
    """Raise Refusal when a tokenizer is not that of a model with `rows` embeddings."""
    if not len(tokenizer) <= rows <= len(tokenizer) + UNUSED_ROWS:
        raise Refusal(
            f"{name} has {rows:,} embeddings and its tokenizer {len(tokenizer):,} ids: they do not belong together. Name the right one with "
            "--tokenizer_name."
        )


def mend_ids(model, tokenizer) -> str | None:
    """Give config and generation config the tokenizer's begin, end and padding ids; says what was wrong, None if nothing was."""
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    said = mended(model.config, begin, end)
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = begin, end, tokenizer.pad_token_id
    return said


def mended(config, begin: int, end: int) -> str | None:
    """What to say when the ids of a config are not its tokenizer's, as in the authors' checkpoints (1 and 2 instead of 50256)."""
    before = (config.bos_token_id, config.eos_token_id)
    return None if before == (begin, end) else f"begin and end ids {before} are mended to {(begin, end)}, the tokenizer's"


def base_record(base: Located, hub_id: str | None, revision: str | None) -> dict:
    """`base.json` of an adapter: the digest of its base's weights, and where on the Hub they are."""
    return {"sha256": weights_digest(base.folder), "hub_id": hub_id, "revision": revision}


def check_base(adapter: Located, base: Located) -> None:
    """Raise Refusal when an adapter was made for other weights than `base`'s."""
    record = read_json(adapter.folder / BASE_RECORD)
    if record:
        if record["sha256"] != weights_digest(base.folder):
            made_for = f"{record['hub_id']}@{record['revision']}" if record["hub_id"] else "other weights"
            raise Refusal(f"the adapter {adapter.name} was made for {made_for} and not for {base.name} (their sha256 differ).")
        return
    named = (read_json(adapter.folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if named not in (base.name, base.repo):
        raise Refusal(f"the adapter {adapter.name} says that its base is {named}, not {base.name}.")


def attach(model, adapter: Located):
    """The model with an adapter on it (`peft.PeftModel`), not trainable. Raises Refusal."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter.folder))
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(f"the adapter {adapter.name} cannot be put on this model: {' '.join(str(error).split())[:300]}") from None
