"""Loads tokenizers, models, adapters and weights from verified files.

Only safetensors and JSON are read; code that comes with a model is never run. Weights must fill the model: missing,
unknown or differently shaped tensors are refused by name. A model's begin, end and padding ids are set to those of its
tokenizer.
"""

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import formatting
from ..checkpoint import integrity, verify
from ..data.tokenizer import text_vocabulary_size, vocabulary_size
from ..errors import Refusal
from ..files import read_json
from ..formatting import shortened
from ..kernels.probe import close, evaluating, probe_ids
from . import references
from .references import ADAPTER_FILE, Located, check_native, load_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# of a generation config: what stays, or does not change an answer whose length is given
NOT_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "use_cache", "max_length")
NEUTRAL_SETTINGS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "min_length": 0,
}

# unused rows of an embedding, and the share of its rows that they may be: vocabularies are padded to a round number or
# keep rows for later tokens (gpt-oss a thousand of 201,088); more mean another tokenizer
UNUSED_ROWS, UNUSED_SHARE = 1024, 0.05

# of PEFT, about the stacked weights of experts, whose rank it does set by these patterns
FALSE_WARNING = r"The following (rank|alpha)_pattern keys did not match"


def load_tokenizer(located: Located, tokenizer_name: str | None = None):
    """The tokenizer of a model, or the one that `tokenizer_name` names (`gpt2`, a folder, a Hub id). Raises Refusal."""
    from ..data import tokenizer as data_tokenizer

    if tokenizer_name:
        return data_tokenizer.load_tokenizer(tokenizer_name)
    try:
        tokenizer = data_tokenizer.read_tokenizer(located.folder)
    except Exception as error:  # the tokenizers library raises bare ones
        check_native(located, "tokenizer_config.json")
        raise Refusal(
            f"{located.name} has no tokenizer ({' '.join(str(error).split())[:200]}): name one with --tokenizer_name,"
            " e.g. gpt2."
        ) from None
    if tokenizer.eos_token_id is None:
        raise Refusal(
            f"the tokenizer of {located.name} has no end-of-text token, so no answer could ever end: name another with"
            " --tokenizer_name."
        )
    data_tokenizer.check_usable(f"the tokenizer of {located.name}", tokenizer)
    return tokenizer


def load_model(located: Located, dtype: str = "float32"):
    """The causal language model in a folder, with all weights from its files, in `dtype` ("float32" ...). Raises
    Refusal.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if located.adapter:
        raise Refusal(
            f"{located.name} is an adapter, not a model: give its base, or merge the two with --merge_adapter first."
        )
    config = load_config(located)
    references.need_weights(located.folder, located.name)
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
        record = read_json(located.folder / "config.json") or {}
        attention = record.get("attn_implementation") or record.get("_attn_implementation")
        way = (
            f"remove attn_implementation ({attention}) from its config.json, and transformers takes one that is here"
            if attention
            else "mend its files"
        )
        raise Refusal(
            f"{located.name} cannot be loaded: {shortened(error).rstrip('.')}. To continue, {way}, or give another"
            " model."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    check_filled(located.name, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    if info["error_msgs"]:
        raise Refusal(f"{located.name} cannot be loaded: {shortened('; '.join(info['error_msgs']))}")
    return model


def _unlike_files(folder: Path, config) -> tuple[set[str], set[str]]:
    """(missing, unknown) tensors of a model's files, for architectures whose files use other names than the model."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected, stored = set(revert_weight_conversion(model, model.state_dict())), set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= set(file.keys())
    return expected - stored - set(model.all_tied_weights_keys), stored - expected


def check_fits(folder: Path, name: str, config) -> None:
    """Raise Refusal unless the weights in a folder are those of a model of this config, by names and shapes."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    mismatched = []
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in expected.keys() & set(file.keys()):
                if (shape := file.get_slice(key).get_shape()) != list(expected[key].shape):
                    mismatched.append((key, shape, expected[key].shape))
    check_filled(name, *_unlike_files(folder, config), mismatched)


def check_filled(
    name: str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]] = (),
) -> None:
    """Raise Refusal unless weights fill their model: no tensor is missing, unknown to the model, or of another shape.

    mismatched: (tensor name, shape in the file, shape in the model).
    """
    problems_by_kind = {"missing": sorted(missing), "unknown": sorted(unexpected)}
    problems_by_kind["of another shape"] = [
        f"{key} {list(stored)} for {list(expected)}" for key, stored, expected in sorted(mismatched)
    ]
    problems = [
        f"{len(keys):,} {kind} ({', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''})"
        for kind, keys in problems_by_kind.items()
        if keys
    ]
    if problems:
        raise Refusal(
            f"the weights of {name} do not match the model: {'; '.join(problems)}. Untrained weights are never used."
        )


def check_language_model(name: str, model: "PreTrainedModel") -> None:
    """Raise Refusal unless a model's weights are finite, it predicts each token from the earlier ones only, and its
    loss with `shift_labels` is the cross-entropy of its logits.
    """
    import torch

    if non_finite := [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]:
        raise Refusal(
            f"{name}: {len(non_finite):,} of its tensors hold NaN or infinity"
            f" ({', '.join(non_finite[:3])}{' ...' if len(non_finite) > 3 else ''}), so its loss would not be a number."
            " Use an earlier step, or intact weights."
        )
    kind, ids, labels = model.config.model_type, probe_ids(model), probe_ids(model).flip(1)
    altered = ids.clone()
    altered[:, -1] = (altered[:, -1] + 1) % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad(), evaluating(model):
            outputs = model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False)
            logits, altered_logits = (
                model(input_ids=row, use_cache=False).logits[:, :-1].float() for row in (ids, altered)
            )
            loss = torch.nn.functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten())
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError, ImportError) as error:
        raise Refusal(
            f"{name} ({kind}) cannot be run as a causal language model of transformers, so its config.json does not"
            f" match its class: {shortened(error).rstrip('.')}. Fix that config.json, or give another model."
        ) from None
    if not close(altered_logits, logits):
        raise Refusal(
            f"{name} ({kind}) sees the tokens that it must predict: it is not a decoder-only language model. Use one"
            " that is."
        )
    if getattr(outputs, "aux_loss", None) is None and not close(outputs.loss.float(), loss):
        raise Refusal(
            f"{name} ({kind}) does not support shifted labels: its loss is {float(outputs.loss):.4f}, but its logits"
            f" give {float(loss):.4f}."
        )


def check_vocabulary(name: str, rows: int, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise Refusal when a tokenizer does not belong to a model with `rows` embeddings: text can get ids that have
    none, or far too many are unused.
    """
    ids = vocabulary_size(tokenizer)
    if rows < text_vocabulary_size(tokenizer) or rows > ids + max(UNUSED_ROWS, UNUSED_SHARE * rows):
        raise Refusal(
            f"{name} has {rows:,} embeddings and its tokenizer {ids:,} ids: they do not belong together. Name the right"
            " one with --tokenizer_name."
        )


def align_special_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Set the begin, end and padding ids of config and generation config to the tokenizer's; several end ids of a
    generation config stay if the tokenizer's is among them. Returns a description of the mismatch, None if there was
    none.
    """
    eos_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    bos_id = eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    mismatch = describe_mismatch(model.config, bos_id, eos_id)
    own = model.generation_config.eos_token_id
    ends = own if isinstance(own, list) and eos_id in own else eos_id  # a chat model's answers end with others, too
    for config, end in ((model.config, eos_id), (model.generation_config, ends)):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = bos_id, end, tokenizer.pad_token_id
    return mismatch


def describe_mismatch(config: "PretrainedConfig", bos_id: int, eos_id: int) -> str | None:
    """A message when the ids of a config are not its tokenizer's, as in the authors' checkpoints (1 and 2 instead of
    50256), else None.
    """
    current, expected = (config.bos_token_id, config.eos_token_id), (bos_id, eos_id)
    return None if current == expected else f"begin and end ids {current} are replaced by {expected}, the tokenizer's"


def generation_settings(folder: Path) -> dict:
    """What the `generation_config.json` of a model's folder asks for beyond special tokens and length. Evaluations do
    not follow it (`probe.plain_generation`).
    """
    record = read_json(folder / "generation_config.json")
    return {
        name: value
        for name, value in (record.items() if isinstance(record, dict) else ())
        if name not in NOT_SETTINGS
        and not name.startswith(("_", "output_", "return_"))
        and value not in (None, [], NEUTRAL_SETTINGS.get(name))
    }


def attach(model: "PreTrainedModel", adapter: Located) -> "PeftModel":
    """The model with an adapter on it, not trainable, with all adapter weights from its file. Raises Refusal."""
    from peft import PeftModel

    if not (adapter.folder / ADAPTER_FILE).is_file():
        raise Refusal(f"the adapter {adapter.name} holds no {ADAPTER_FILE}: only safetensors are read.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            warnings.filterwarnings("ignore", message=FALSE_WARNING)
            tuned = PeftModel.from_pretrained(model, str(adapter.folder))
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(f"the adapter {adapter.name} cannot be applied to this model: {shortened(error)}") from None
    if tuned.active_peft_config.is_prompt_learning:
        raise Refusal(
            f"the adapter {adapter.name} is of the kind {tuned.active_peft_config.peft_type.value}, which puts vectors"
            " before a prompt: only adapters that change weights are read (LoRA and its kin)."
        )
    check_adapter(tuned, adapter.name, adapter.folder)
    return tuned


def load_merged(
    base: Located, adapter: Located | None, tokenizer: "PreTrainedTokenizerBase", dtype: str = "float32"
) -> "PreTrainedModel":
    """The model of a base and an adapter (or None), merged, with the special tokens of its tokenizer. Raises Refusal,
    also for a base that the adapter was not made for.
    """
    if adapter is not None:
        references.check_base(adapter, base)
    model = load_model(base, dtype)
    check_vocabulary(base.name, model.get_input_embeddings().num_embeddings, tokenizer)
    align_special_tokens(model, tokenizer)
    if adapter is None:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks in the old way
        tuned = attach(model, adapter)
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        if tied and tuned.base_model._get_tied_target_modules(model):
            raise Refusal(
                f"the adapter {adapter.name} changes an embedding that its base ties to the output layer: merged, both"
                " would change. Use it unmerged, with PEFT."
            )
        return tuned.merge_and_unload()


def check_adapter(model: "PeftModel", name: str, folder: Path) -> None:
    """Raise Refusal unless the adapter's file in `folder` has exactly the weights of a PeftModel's adapter, in their
    shapes.

    Embeddings of the base, which PEFT can store with an adapter, are allowed, too.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_FILE, "pt") as file:
        stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (a safetensors handle is no dict)
    expected = {
        key: list(value.shape) for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    embedding_layers = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    base_keys = {
        f"{key}.weight" for key, module in model.named_modules() if any(module is layer for layer in embedding_layers)
    }
    mismatched = [
        (key, stored[key], expected[key]) for key in expected.keys() & stored.keys() if stored[key] != expected[key]
    ]
    check_filled(
        f"the adapter {name}", expected.keys() - stored.keys(), stored.keys() - expected.keys() - base_keys, mismatched
    )


def load_weights(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Load the `model*.safetensors` of a folder into a model, and return them. Raises Refusal where a tensor is
    missing, unknown or of another shape.

    A published model's vocabulary is cut to the tokenizer's: the model's rows beyond it, which are padding, do not
    change. Of two tied tensors one is enough; if both are stored, they must be equal.
    """
    tensors = read_weights(folder)
    # files of some architectures (Mixtral) use other tensor names than the model: transformers converts them
    if get_model_conversion_mapping(model, add_legacy=False):
        with patch.dict(os.environ, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}):  # every rank reads all of them
            tensors = load_model(references.Located(str(folder), folder)).state_dict()
    model_state = model.state_dict()
    _check_shapes(str(folder), model, {name: list(tensor.shape) for name, tensor in tensors.items()})
    _check_tied(folder, model, tensors)
    for name, tensor in tensors.items():
        if name in verify.VOCABULARY and len(tensor) < len(model_state[name]):
            tensors[name] = torch.cat([tensor.to(model_state[name]), model_state[name][len(tensor) :]])
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, strict=False))  # sharded or not
    return tensors


def check_weights(folder: Path, config: "PretrainedConfig") -> None:
    """Raise Refusal where `load_weights` would refuse the files of a folder for a model of this config. Nothing is
    allocated: the headers of the files are read, and tensors only where tied ones are stored twice.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if get_model_conversion_mapping(model, add_legacy=False):
        check_filled(str(folder), *_unlike_files(folder, config))
        return
    paths: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in _weight_files(folder):
        found = integrity.shapes_of(path, str(path))
        shapes |= found
        paths |= dict.fromkeys(found, path)
    _check_shapes(str(folder), model, shapes)
    stored_twice = {name for pair in _tied(model).items() if shapes.keys() >= {*pair} for name in pair}
    tensors = {}
    for name in stored_twice:
        with safe_open(paths[name], "pt") as file:
            tensors[name] = file.get_tensor(name)
    _check_tied(folder, model, tensors)


def _tied(model: torch.nn.Module) -> dict[str, str]:
    """{tensor name: the one that it is tied to} of a model."""
    return getattr(model, "all_tied_weights_keys", {})


def _check_shapes(name: str, model: torch.nn.Module, shapes: dict[str, list[int]]) -> None:
    """Raise Refusal unless tensors of these shapes fill a model, as `load_weights` loads them."""
    expected = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    loaded = {
        *shapes,
        *(first for first, second in _tied(model).items() if second in shapes),
        *(second for first, second in _tied(model).items() if first in shapes),
    }

    def fits(key: str, shape: list[int]) -> bool:
        own = expected[key]
        return shape == own or (key in verify.VOCABULARY and shape[0] < own[0] and shape[1:] == own[1:])

    mismatched = [(key, shape, expected[key]) for key, shape in shapes.items() if key in expected]
    mismatched = [problem for problem in mismatched if not fits(*problem[:2])]
    check_filled(name, expected.keys() - loaded, shapes.keys() - expected.keys(), mismatched)


def _check_tied(folder: Path, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise Refusal where tensors that are tied in a model are stored with other values."""
    for first, second in _tied(model).items():
        if first in tensors and second in tensors and not torch.equal(tensors[first], tensors[second]):
            raise Refusal(
                f"the weights in {folder} are not this model's: {first} and {second} are tied here"
                " (tie_word_embeddings) and differ there."
            )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder by their names in its files: model.safetensors, or else the files in its index, as
    transformers chooses. Raises Refusal.
    """
    tensors = {}
    for path in _weight_files(folder):
        try:
            tensors.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise Refusal(f"{path} cannot be read: {formatting.shortened(error)}") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights in a folder. Raises Refusal where there are none."""
    weights_path, index_path = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    references.need_weights(folder)
    if weights_path.is_file():
        return [weights_path]
    return [folder / name for name in sorted(set((read_json(index_path) or {}).get("weight_map", {}).values()))]
