"""LoRA adapters: add to a base, load, merge, record."""

import json
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .. import formatting
from ..config.sft import AdapterArguments
from ..errors import Refusal
from ..models import loading, references

ALL_LINEAR = "all-linear"
TARGETS = ("target_modules", "target_parameters")  # fields of PEFT's config that hold names

# ---- the model ----


def add_adapter(model: PreTrainedModel, adapter: AdapterArguments, base: str, revision: str | None = None) -> PeftModel:
    """The model with a fresh LoRA adapter (`peft.PeftModel`) that names its base. Raises Refusal for targets that match
    no module.
    """
    config, available = lora_config(model, adapter, base), _available(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=loading.FALSE_WARNING)
            tuned = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Refusal(
            f"LoRA cannot be applied to {base} ({model.config.model_type}) with these settings:"
            f" {formatting.shortened(error)} Choose other --target_modules (there are {available}),"
            " --lora_dropout 0, or tune all weights with --no_use_lora."
        ) from None
    for name in TARGETS:  # sets, whose order is another one in every process
        if targets := getattr(config, name):
            setattr(config, name, sorted(targets))
    config.base_model_name_or_path, config.revision = base, revision
    return tuned


def lora_config(model: PreTrainedModel, adapter: AdapterArguments, base: str) -> LoraConfig:
    """PEFT's config of an adapter of this model. Raises Refusal for targets that match no module.

    Linear modules are PEFT's `target_modules`, and the stacked weights of all experts of a layer its
    `target_parameters`. `all-linear` is what PEFT makes of it: every linear module but the head, and in the mixtures of
    experts that PEFT knows (Mixtral, Qwen3-MoE) the experts and the router.
    """
    linear, experts = linear_modules(model), expert_parameters(model)
    unmatched = [
        target
        for target in adapter.target_modules
        if target != ALL_LINEAR and not any(_matches(name, target) for name in (*linear, *experts))
    ]
    if unmatched:
        raise Refusal(
            f"--target_modules {' '.join(unmatched)}: no linear module of {base} has that name. There are"
            f" {_available(model)} (or all-linear)."
        )
    stacked = [target for target in adapter.target_modules if any(_matches(name, target) for name in experts)]
    modules = [target for target in adapter.target_modules if any(_matches(name, target) for name in linear)]
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in adapter.target_modules else modules,
        target_parameters=stacked or None,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type="CAUSAL_LM",
    )


def drop_dropout(model: PreTrainedModel, adapter: AdapterArguments, base: str) -> str | None:
    """Set --lora_dropout to 0 where experts get an adapter, on which PEFT has no dropout. Returns the line that says
    so, None where nothing was changed. Raises Refusal for targets that match no module.
    """
    config = lora_config(model, adapter, base)
    convert_peft_config_for_transformers(config, model, None)  # as PEFT does before it adds an adapter
    if not (config.target_parameters and adapter.lora_dropout):
        return None
    adapter.lora_dropout = 0.0
    kind = model.config.model_type
    return f"--lora_dropout is 0: the experts of {kind} get an adapter, and PEFT has no dropout on them"


def linear_modules(model: PreTrainedModel) -> list[str]:
    """Names of the linear modules of a model, in its order, without the output layer."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold the weights of all experts of a layer at once, in the order of the model."""
    return [name for name, value in model.named_parameters() if ".experts." in name and value.dim() == 3]


def _matches(name: str, target: str) -> bool:
    """Whether PEFT counts a module or parameter of this name among a target."""
    return name == target or name.endswith(f".{target}")


def _available(model: PreTrainedModel) -> str:
    """The last parts of the names that --target_modules may have, sorted."""
    return ", ".join(sorted({name.split(".")[-1] for name in (*linear_modules(model), *expert_parameters(model))}))


def merge(
    base: references.Located, adapter: Path, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path
) -> None:
    """Save base and adapter as one model in `folder`, its weights in `dtype`; they are added in float32. Raises Refusal
    for a base that the adapter was not made for.
    """
    merged = loading.load_merged(base, references.Located(str(adapter), adapter), tokenizer)
    merged.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Load a checkpoint's adapter weights. Raises Refusal where one is missing, unknown or of another shape."""
    loading.check_adapter(model, f"in {folder}", folder)
    set_peft_model_state_dict(model, load_file(folder / references.ADAPTER_FILE))


def lora_record(adapter: AdapterArguments) -> dict:
    """Settings of an adapter for the identity of a run."""
    return json.loads(
        json.dumps({name: value for name, value in vars(adapter).items() if name not in ("merge_adapter",)})
    )
