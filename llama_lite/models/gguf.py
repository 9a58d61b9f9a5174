"""A LLaMA as a GGUF file, the format of llama.cpp, LM Studio and Ollama, by the writer of the `gguf` package.

The file is a function of weights, config and tokenizer alone: the same checkpoint gives the same bytes. What llama.cpp
would compute differently is refused: another architecture, another rotation, a tokenizer that it has no name for.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch

from ..chat_format import template
from ..data.tokenizer import vocabulary_size
from ..errors import Refusal, disk_full_as_refusal
from ..files import flush, flush_folder, need_space
from ..kernels.probe import context_of

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

FORMATS = {  # of matrices; vectors stay in float32, as llama.cpp's own converter leaves them
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
SUFFIXES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}  # in file names, as the Hub and LM Studio read them
ROTATIONS = ("default", "linear", "llama3")  # whose frequencies are fixed: the file holds what divides them

# The splitters of text into words that llama.cpp has a name for, as `tokenizers` writes them, and whether a word that
# is in the vocabulary is taken whole there.
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": ([{**BYTES, "use_regex": True}], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], False),
    "llama-bpe": (
        [
            {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
            {**BYTES, "use_regex": False},
        ],
        True,
    ),
}


# ---- what can be written ----


def check_config(name: str, config: "LlamaConfig") -> None:
    """Raise Refusal for a model that llama.cpp's LLaMA does not compute. name: of the model in messages."""
    kind, rotation = config.model_type, (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "llama":
        raise Refusal(
            f"{name} is a {kind}, and only LLaMA models (model_type llama) are written as GGUF. llama.cpp's own"
            " convert_hf_to_gguf.py knows other architectures."
        )
    if config.hidden_act != "silu":
        raise Refusal(
            f"{name} has hidden_act {config.hidden_act}, and llama.cpp computes every LLaMA with silu: it would give"
            " other text. Use it with transformers."
        )
    if rotation not in ROTATIONS:
        raise Refusal(
            f"{name} has rope_type {rotation}, and only {', '.join(ROTATIONS)} are written as GGUF. llama.cpp's own"
            " convert_hf_to_gguf.py knows other rotations."
        )


def pre_tokenizer_of(name: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer splits a text: `gpt-2`, `smollm` or `llama-bpe`. Raises
    Refusal for a tokenizer that it has no name for. name: of the model in messages.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = definition["model"], definition["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    own = [name for name, known in PRE_TOKENIZERS.items() if known == (steps, bool(model.get("ignore_merges")))]
    added = definition["added_tokens"]
    why = None
    if model["type"] != "BPE":
        why = f"it is {model['type']}, not byte-level BPE"
    elif definition["normalizer"]:
        why = f"it normalizes text first ({definition['normalizer']['type']})"
    elif not own:
        why = f"it splits text as none of {', '.join(PRE_TOKENIZERS)} does"
    elif odd := [token["content"] for token in added if token["lstrip"] or token["rstrip"] or token["single_word"]]:
        why = (
            f"its added token {odd[0]!r} takes the blanks beside it (lstrip, rstrip) or only whole words (single_word)"
        )
    elif (unknown := model.get("unk_token")) and any(piece not in model["vocab"] for piece in _byte_pieces()):
        why = f"it has no tokens for some bytes, and writes {unknown} for them"
    if why:
        raise Refusal(
            f"llama.cpp has no name for the tokenizer of {name} ({why}), so it would read other tokens. Tokenizers"
            " with GPT-2's splitting (--tokenizer train or gpt2), SmolLM's or Llama 3's can be written."
        )
    return own[0]


def _byte_pieces() -> list[str]:
    """The 256 characters that stand for the bytes in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def added_around(name: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[bool, bool]:
    """Whether a tokenizer puts (its begin-of-text before, its end-of-text after) a text. Raises Refusal where it adds
    anything else.
    """
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for begins in (False, True):
        for ends in (False, True):
            if whole == [tokenizer.bos_token_id] * begins + plain + [tokenizer.eos_token_id] * ends:
                return begins, ends
    raise Refusal(
        f"the tokenizer of {name} adds {tokenizer.convert_ids_to_tokens(whole)} for 'a', and llama.cpp adds a"
        " begin-of-text and an end-of-text alone. Change its post_processor, or use it with transformers."
    )


# ---- the file ----


def write_gguf(
    name: str, model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerBase", dtype: str, path: Path
) -> None:
    """Write a model and its tokenizer as one GGUF file, complete or absent. Raises Refusal.

    name: of the model in messages. model: in float32, on a CPU, an adapter merged. dtype: of FORMATS.
    """
    check_config(name, model.config)
    splitter, rows = pre_tokenizer_of(name, tokenizer), vocabulary_size(tokenizer)
    tensors = named_tensors(model, rows)
    kinds = {key: _kind(name, key, tensor, dtype) for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kinds[key])) for key, tensor in tensors.items())
    need_space(path.parent, int(size), path.name, "Make room, or name another --output_dir.")
    temporary = path.with_name(f".{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    add_hyperparameters(writer, model.config, rows, dtype)
    add_tokenizer(writer, tokenizer, splitter, added_around(name, tokenizer))
    for key, tensor in tensors.items():
        stored = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[key])
        writer.add_tensor_info(key, tensor.shape, np.dtype(np.float32), int(np.prod(stored)), kinds[key])
    with disk_full_as_refusal(path.parent):
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for key, tensor in tensors.items():  # one at a time: the others are not held twice
                writer.write_tensor_data(gguf.quants.quantize(tensor.numpy(), kinds[key]))
            writer.flush()
            flush(writer.fout[0].fileno(), path)
            writer.close()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)


def named_tensors(model: "LlamaForCausalLM", rows: int) -> dict[str, torch.Tensor]:
    """{name in llama.cpp: float32 tensor}, queries and keys in its order of rotation, the vocabulary cut to `rows`."""
    config, found = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    state = model.state_dict()
    if config.tie_word_embeddings:  # llama.cpp reads the embedding in its place
        state.pop("lm_head.weight", None)
    for key, tensor in state.items():
        tensor = tensor.detach().float().contiguous()
        if "q_proj" in key or "k_proj" in key:
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:rows]
        found[names.get_name(key, (".weight", ".bias"))] = tensor
    inverse = model.model.rotary_emb.inv_freq.float().cpu()
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(len(inverse), dtype=torch.float64) / len(inverse))
    factors = (plain / inverse.double()).float()
    if config.rope_parameters["rope_type"] != "default":
        found[gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight"] = factors
    return found


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a projection to queries or keys, [heads * D, ...], so that llama.cpp rotates the right pairs: it
    pairs rows 2i and 2i + 1 of a head, transformers rows i and i + D / 2.
    """
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _kind(name: str, key: str, tensor: torch.Tensor, dtype: str) -> gguf.GGMLQuantizationType:
    """The format that a tensor is stored in. Raises Refusal where it cannot be."""
    kind = FORMATS[dtype][0] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
    if not torch.isfinite(tensor).all():
        raise Refusal(f"{name}: {key} holds NaN or infinity. Use an earlier step, or intact weights.")
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise Refusal(
            f"{name}: {key} holds numbers above 65,504, the largest of float16: give --dtype float32 or q8_0."
        )
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if tensor.shape[-1] % block:
        raise Refusal(
            f"{name}: {key} has rows of {tensor.shape[-1]}, and {dtype} stores blocks of {block}: give --dtype float16."
        )
    return kind


def add_hyperparameters(writer: gguf.GGUFWriter, config: "LlamaConfig", rows: int, dtype: str) -> None:
    """Add what llama.cpp must know of the architecture. rows: of the vocabulary."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(FORMATS[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: "PreTrainedTokenizerBase", splitter: str, around: tuple[bool, bool]
) -> None:
    """Add a byte-level BPE tokenizer and its chat template. splitter: as `pre_tokenizer_of`; around: as
    `added_around`.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {id: piece for piece, id in definition["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for token in definition["added_tokens"]:
        tokens[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    ids = range(vocabulary_size(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list([tokens.get(id, f"[UNUSED{id}]") for id in ids])
    writer.add_token_types([kinds.get(id, gguf.TokenType.UNUSED) for id in ids])
    pairs = definition["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    eos_id = tokenizer.eos_token_id
    writer.add_bos_token_id(eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
    writer.add_eos_token_id(eos_id)
    writer.add_pad_token_id(eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    writer.add_add_bos_token(around[0])
    writer.add_add_eos_token(around[1])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


# ---- for Ollama ----

OLLAMA_CHAT = (
    "{{ if .System }}{{ .System }}{{ end }} {{ range .Messages }}"
    f'{{{{ if eq .Role "user" }}}}{template.USER_MARKER} {{{{ .Content }}}} {template.ASSISTANT_MARKER}'
    '{{ else if eq .Role "assistant" }} {{ .Content }}EOS{{ end }}{{ end }}'
)


def modelfile(file_name: str, config: "LlamaConfig", tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of a `Modelfile` beside a GGUF file: chat format, stop tokens and context, for `ollama create`."""
    lines = [f"FROM ./{file_name}"]
    stops = [tokenizer.eos_token]
    if template.is_vicuna(tokenizer):
        lines.append(f'TEMPLATE """{OLLAMA_CHAT.replace("EOS", tokenizer.eos_token)}"""')
        lines.append(f'SYSTEM """{template.SYSTEM}"""')
        stops.append(template.USER_MARKER)
    elif tokenizer.chat_template:
        lines.append(
            "# Its chat template is its authors': Ollama takes the template inside the file, where it knows it."
        )
    else:
        lines.append("# A base model: it continues a text.")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {context_of(config)}")
    return "\n".join(lines) + "\n"
