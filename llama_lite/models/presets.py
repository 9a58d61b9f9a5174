"""Model configurations: presets (folders of configs/model) and shapes, their parameters and FLOPs per token."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Refusal
from ..formatting import shortened
from ..paths import ROOT
from . import shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..hub.client import Reference

PRESETS = ROOT / "configs" / "model"


def load_model_config(name: str):
    """The config of a preset, of a folder with a config.json, or of a model on the Hub (owner/name, @revision), of any
    causal language model. Raises Refusal.
    """
    from transformers import AutoConfig

    folder = PRESETS / name if (PRESETS / name / "config.json").exists() else _config_folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # malformed values lead to errors of every kind
        from . import references

        references.check_native(references.Located(f"--model_config {name}", folder))
        raise Refusal(
            f"--model_config {name}: {folder / 'config.json'} is not a model configuration"
            f" ({' '.join(str(error).split())})."
        ) from None


def _config_folder(name: str) -> Path:
    """The folder that holds the config.json of a model: its own, or of the Hub's cache. Raises Refusal."""
    from ..hub.client import HubPermissionError, HubUnavailable, reference
    from ..hub.local_names import check_misspelt

    problem = ""
    if (Path(name) / "config.json").is_file():
        return Path(name)
    check_misspelt("--model_config", name)
    if ref := reference(name):
        try:
            return _fetch_config(ref)
        except (Refusal, HubUnavailable, HubPermissionError) as error:
            problem = f", and as a model on the Hub: {str(error).rstrip('.')}"
    presets = ", ".join(sorted(path.parent.name for path in PRESETS.glob("*/config.json")))
    raise Refusal(
        f"--model_config {name}: neither a preset ({presets}), nor LAYERSxWIDTH such as 6x256, nor a folder with a"
        f" config.json{problem}."
    )


@functools.cache
def _fetch_config(ref: "Reference") -> Path:
    """The folder of a config.json of the Hub in the Hub's cache, which answers where the Hub does not."""
    from ..hub.client import fetch

    return fetch(ref, ref.revision, "config.json", None).parent


def model_config_of(name: str, vocab_size: int, context: int | None):
    """The config of `--model_config`: LAYERSxWIDTH with `vocab_size` ids and `context` positions (None: by width), or
    as `load_model_config`. Raises Refusal.
    """
    if shapes.is_shape(name):
        return shapes.config(shapes.parse(name), vocab_size, context or shapes.context_of(shapes.parse(name)[1]))
    return load_model_config(name)


def count_parameters(config: "PretrainedConfig") -> tuple[int, int]:
    """(number of parameters, number of those in embedding matrices) of a model, built on the meta device. Raises
    Refusal.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # malformed values lead to errors of every kind
        raise Refusal(
            f"{config.name_or_path or 'this config'} ({config.model_type}) does not give a causal language model of"
            f" transformers: {shortened(error).rstrip('.')}. Fix that config.json, or give another --model_config."
        ) from None
    embedding_layers = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    embeddings = {id(layer.weight): layer.weight.numel() for layer in embedding_layers}
    return sum(p.numel() for p in model.parameters()), sum(embeddings.values())


def flops_per_token(config: "PretrainedConfig", context: int) -> int:
    """Training FLOPs per token, attention included: TRL's formula, or, for configs that it does not support (GPT-2,
    most mixtures of experts), 6 per parameter without the embedding, as in Kaplan et al. (arXiv 2001.08361), plus 12 x
    layers x width x context for attention scores.
    """
    from trl.trainer.utils import compute_flops_per_token

    try:
        return compute_flops_per_token(config, context)
    except AttributeError:
        config = config.get_text_config()
        return (
            6 * (count_parameters(config)[0] - config.vocab_size * config.hidden_size)
            + 12 * config.num_hidden_layers * config.hidden_size * context
        )
