"""LoRA adapters: add to a base, load, merge, record."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .. import formatting
from ..config.sft import AdapterArguments
from ..errors import Refusal
from ..models import loading, references

# ---- the model ----


def add_adapter(model: PreTrainedModel, adapter: AdapterArguments, base: str, revision: str | None = None) -> PeftModel:
    """The model with a fresh LoRA adapter (`peft.PeftModel`) that names its base. Raises Refusal for targets that match
    no linear module.
    """
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]
    targets = "all-linear" if adapter.target_modules == ["all-linear"] else list(adapter.target_modules)
    unmatched = [
        target
        for target in adapter.target_modules
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in linear)
    ]
    if unmatched:
        available = ", ".join(sorted({name.split(".")[-1] for name in linear}))
        raise Refusal(
            f"--target_modules {' '.join(unmatched)}: no linear module of {base} has that name. There are {available}"
            " (or all-linear)."
        )
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        tuned = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Refusal(
            f"LoRA cannot be applied to {base} ({model.config.model_type}) with these settings:"
            f" {formatting.shortened(error)} Choose other --target_modules (there are"
            f" {', '.join(sorted({name.split('.')[-1] for name in linear}))}), --lora_dropout 0, or tune all weights"
            " with --no_use_lora."
        ) from None
    config.base_model_name_or_path, config.revision = base, revision
    return tuned


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
