"""From a reference to a model: a folder, a revision on the Hub, one of the authors' checkpoints; with an adapter or without.

Files of the Hub are verified before anything is loaded, and only safetensors and JSON are ever read; code that comes with a model is
never run and never asked about. Weights must fill the model: what is missing, unknown or of another shape is refused by name. A model's
begin, end and padding ids are made those of its tokenizer, and that is said.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path

from . import integrity, pulling
from .arguments import Refusal
from .checkpoints import VOLATILE_CONFIG
from .hub import NoAnswer, NotAllowed, Reference, reference
from .runs import read_json, sha256
from .tokenizers import vocabulary_size

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
VOLATILE_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")  # of adapter_config.json: its place
BASE_RECORD = "base.json"  # in an adapter's folder: which weights it belongs to, and what their config makes of them
# Fields of a config that weights do not depend on: the length of the vocabulary (padding, held against the tensors) and of the context, ids, what only
# training uses (dropout, initial values, router losses), and how it is computed.
FREE_FIELDS = re.compile(
    r"^(vocab_size|n_positions|max_position_embeddings|max_seq_len|n_ctx|\w+_token_id|\w*(dropout|pdrop|drop|initializer\w*|init_std)|router_aux_loss_coef|output_\w+|"
    rf"pretraining_tp|problem_type|return_dict|chunk_size_feed_forward|is_encoder_decoder|id2label|label2id|{'|'.join(VOLATILE_CONFIG)})$"
)
PROBED = 1e-5  # of the largest number, in float32: what another order of additions changes
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


def model_digest(folder: Path) -> str:
    """sha256 over the weights of a model or adapter and what of its config decides what they compute (epsilons, rotations, LoRA's alpha)."""
    configs = [read_json(Path(folder) / name) for name in ("config.json", ADAPTER_CONFIG)]
    counted = [config and {key: value for key, value in config.items() if key not in (*VOLATILE_CONFIG, *VOLATILE_ADAPTER)} for config in configs]
    return hashlib.sha256(json.dumps([weights_digest(folder), counted], sort_keys=True).encode()).hexdigest()


def load_tokenizer(located: Located, other: str | None = None):
    """The tokenizer of a model, or the one named by `other` (`gpt2`, a folder, a Hub id). Raises Refusal."""
    from . import tokenizers

    if other:
        return tokenizers.load_tokenizer(other)
    try:
        tokenizer = tokenizers.read_tokenizer(located.folder)
    except Exception as error:  # the tokenizers library raises bare ones
        check_native(located, "tokenizer_config.json")
        raise Refusal(f"{located.name} has no tokenizer ({' '.join(str(error).split())[:200]}): name one with --tokenizer_name, e.g. gpt2.") from None
    if tokenizer.eos_token_id is None:
        raise Refusal(f"the tokenizer of {located.name} has no end-of-text token, so no answer could ever end: name another with --tokenizer_name.")
    tokenizers.check_usable(f"the tokenizer of {located.name}", tokenizer)
    return tokenizer


def load_config(located: Located):
    """The config of a model, of an adapter's base where it is one. Raises Refusal."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
    except Exception as error:  # malformed values lead to errors of every kind
        check_native(located)
        raise Refusal(f"{located.name} has no config that transformers can read: {shortened(error)}") from None
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", None)
        raise Refusal(
            f"{located.name} is quantised ({getattr(method, 'value', method)}, quantization_config in its config.json): only whole weights are read. "
            "Give the model that it was made from, or a dequantised copy."
        )
    return config


def check_native(located: Located, file: str = "config.json") -> None:
    """Raise Refusal where a model or tokenizer needs code of its own, as its `auto_map` says: such code is never run."""
    record = read_json(located.folder / file)
    if isinstance(record, dict) and record.get("auto_map"):
        kind = record.get("model_type") or record.get("tokenizer_class") or "unknown"
        raise Refusal(
            f"{located.name} needs code of its own (auto_map in its {file}; {kind} is no class of transformers), and code that comes with a model is never run "
            "here. Give a model of a class that transformers has, or a copy that was converted to one."
        )


def load_model(located: Located, dtype: str = "float32"):
    """The causal language model of a folder, its weights in `dtype`, every one of them from its files. Raises Refusal."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if located.adapter:
        raise Refusal(f"{located.name} is an adapter, not a model: give its base, or merge the two with --merge_adapter first.")
    config = load_config(located)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of keys that do not fit: they are refused below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            located.folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # malformed values lead to errors of every kind
        if "conversion of the weights" in str(error):
            check_filled(located.name, *_unlike_files(located.folder, config))
        raise Refusal(f"{located.name} cannot be loaded: {shortened(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
    check_filled(located.name, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if info["error_msgs"]:
        raise Refusal(f"{located.name} cannot be loaded: {shortened('; '.join(info['error_msgs']))}")
    return model


def _unlike_files(folder: Path, config) -> tuple[set[str], set[str]]:
    """(missing, unknown) tensors of a model's files, for kinds whose files name them otherwise than the model does."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted, there = set(revert_weight_conversion(model, model.state_dict())), set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            there |= set(file.keys())
    return wanted - there - set(model.all_tied_weights_keys), there - wanted


def check_filled(name: str, missing, unexpected, mismatched=()) -> None:
    """Raise Refusal unless weights fill their model: names that are missing, that the model does not know, or of another shape (name, theirs, its)."""
    found = {"missing": sorted(missing), "unknown": sorted(unexpected)}
    found["of another shape"] = [f"{key} {list(theirs)} for {list(own)}" for key, theirs, own in sorted(mismatched)]
    told = [f"{len(keys):,} {what} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})" for what, keys in found.items() if keys]
    if told:
        raise Refusal(f"the weights of {name} do not fill the model: {'; '.join(told)}. Nothing is computed with weights that nobody trained.")


def shortened(error) -> str:
    """What an error says, in one line of 300 characters at most."""
    return " ".join(str(error).split())[:300]


# ---- what a model is, asked of the model itself ----


def probe_ids(model):
    """Two rows of 24 ids to try a model on."""
    import torch

    return torch.arange(1, 49, device=next(model.parameters()).device).reshape(2, 24) * 7 % model.config.get_text_config().vocab_size


def close(ours, theirs, tolerance: float = PROBED) -> bool:
    """Whether two results of a probe are one, but for the order of additions; `tolerance` is relative to the largest number."""
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@contextlib.contextmanager
def evaluating(model):
    """A model in evaluation mode and without autocast; its mode and the global random state are as before afterwards."""
    import torch

    training, device = model.training, next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.autocast(device.type, enabled=False):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


@contextlib.contextmanager
def without_router_loss(model):
    """A mixture of experts without the loss of its router, which transformers cannot compute while tokens are generated one by one."""
    config = model.config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    try:
        if asked:
            config.output_router_logits = False
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def head_is_separate(model) -> bool:
    """Whether a model's logits are its output layer's product, bit for bit, which some models scale or cap besides."""
    import torch

    ids, head = probe_ids(model), model.get_output_embeddings()
    with torch.no_grad(), evaluating(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return head is not None and torch.equal(head(hidden), model(input_ids=ids, use_cache=False).logits)


def check_language_model(name: str, model) -> None:
    """Raise Refusal unless a model's weights are finite, it predicts each token from those before it, and its loss of `shift_labels` is what these logits give."""
    import torch

    if wrong := [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]:
        raise Refusal(
            f"{name}: {len(wrong):,} of its tensors hold NaN or infinity ({', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}): no loss of it is a "
            "number. Give an earlier step, or whole weights."
        )
    ids, labels = probe_ids(model), probe_ids(model).flip(1)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad(), evaluating(model):
            outputs = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False)
            before, after = (model(input_ids=row, use_cache=False).logits[:, :-1].float() for row in (ids, other))
            loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, ImportError) as error:
        raise Refusal(f"{name} cannot be run as a causal language model of transformers: {shortened(error)}") from None
    kind = model.config.model_type
    if not close(after, before):
        raise Refusal(f"{name} ({kind}) sees the tokens that it is to predict: it is no decoder-only language model. Give one that is.")
    if getattr(outputs, "aux_loss", None) is None and not close(outputs.loss.float(), loss):
        raise Refusal(f"{name} ({kind}) takes no shifted labels: its loss is {float(outputs.loss):.4f} where its logits give {float(loss):.4f}.")


def check_vocabulary(name: str, rows: int, tokenizer) -> None:
    """Raise Refusal when a tokenizer is not that of a model with `rows` embeddings."""
    ids = vocabulary_size(tokenizer)
    if not ids <= rows <= ids + UNUSED_ROWS:
        raise Refusal(
            f"{name} has {rows:,} embeddings and its tokenizer {ids:,} ids: they do not belong together. Name the right one with --tokenizer_name."
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
    """`base.json` of an adapter: the digest of its base's weights, what of its config they depend on, and where on the Hub they are."""
    return {"sha256": weights_digest(base.folder), "config": counted_fields(base), "hub_id": hub_id, "revision": revision}


def counted_fields(located: Located) -> dict:
    """The fields of a model's config that decide what its weights compute (rotations, epsilons, heads), as JSON has them. Raises Refusal."""
    fields = load_config(located).to_dict()
    return json.loads(json.dumps({name: value for name, value in fields.items() if not FREE_FIELDS.search(name)}, default=str))


def check_base(adapter: Located, base: Located) -> None:
    """Raise Refusal when an adapter was made for other weights than `base`'s, or for the same with another config, where its record says that."""
    record = read_json(adapter.folder / BASE_RECORD)
    if record:
        if record["sha256"] != weights_digest(base.folder):
            made_for = f"{record['hub_id']}@{record['revision']}" if record["hub_id"] else "other weights"
            raise Refusal(f"the adapter {adapter.name} was made for {made_for} and not for {base.name} (their sha256 differ).")
        then = record.get("config", {})  # which the first versions did not record
        now = counted_fields(base) if then else {}
        other = [f"{name} was {then[name]} and is {now[name]}" for name in sorted(then.keys() & now.keys()) if then[name] != now[name]]
        if other:
            raise Refusal(
                f"the adapter {adapter.name} was made for the weights of {base.name} with another config ({'; '.join(other)}): give the base with the "
                "config that it had."
            )
        return
    named = (read_json(adapter.folder / "adapter_config.json") or {}).get("base_model_name_or_path")
    if named not in (base.name, base.repo):
        raise Refusal(f"the adapter {adapter.name} says that its base is {named}, not {base.name}.")


def attach(model, adapter: Located):
    """The model with an adapter on it (`peft.PeftModel`), not trainable, each of its weights from the adapter's file. Raises Refusal."""
    from peft import PeftModel

    if not (adapter.folder / ADAPTER_FILE).is_file():
        raise Refusal(f"the adapter {adapter.name} holds no {ADAPTER_FILE}: only safetensors are read.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            tuned = PeftModel.from_pretrained(model, str(adapter.folder))
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(f"the adapter {adapter.name} cannot be put on this model: {shortened(error)}") from None
    check_adapter(tuned, adapter.name, adapter.folder)
    return tuned


def check_adapter(model, name: str, folder: Path) -> None:
    """Raise Refusal unless the adapter's file in `folder` holds every weight of a PeftModel's adapter, in its shape, and no other.

    Embeddings of the base, which PEFT can store beside an adapter, are no other.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        theirs = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (a safetensors handle is no dict)
    own = {key: list(value.shape) for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    ends = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    base = {f"{key}.weight" for key, module in model.named_modules() if any(module is layer for layer in ends)}
    other = [(key, theirs[key], own[key]) for key in own.keys() & theirs.keys() if theirs[key] != own[key]]
    check_filled(f"the adapter {name}", own.keys() - theirs.keys(), theirs.keys() - own.keys() - base, other)
