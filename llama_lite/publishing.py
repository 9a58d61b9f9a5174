"""What a finished model is: a folder that `from_pretrained` opens, with nothing of this machine in it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from .runs import flush_folder


def export_model(model, tokenizer, folder: Path, dtype: str) -> None:
    """Save `model` in `dtype` with the vocabulary cut to the tokenizer's; rows beyond it were padding.

    The training model is left as it is. Same model, same bytes.
    """
    config = type(model.config)(**model.config.to_dict())
    config.vocab_size, config.use_cache = len(tokenizer), True
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    config.dtype = getattr(torch, dtype)
    rows = len(tokenizer)
    vocabulary = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        cut = parameter.detach()[:rows] if id(parameter) in vocabulary else parameter.detach()
        tensors[name] = cut.to(device="cpu", dtype=config.dtype).contiguous()
    with torch.device("meta"):
        published = AutoModelForCausalLM.from_config(config)
    published.generation_config = GenerationConfig(
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    published.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)
    flush_folder(Path(folder))
