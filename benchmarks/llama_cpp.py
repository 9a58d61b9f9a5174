"""What llama.cpp makes of an exported GGUF file, beside transformers on the same model: ids, greedy text, bits per byte.

    python benchmarks/llama_cpp.py --model runs/demo+runs/demo-sft

xllamacpp (PyPI) is a llama.cpp as a server on the loopback interface; float32 cache, flash attention off, one thread.

- ids: of each prompt's text, of hard strings, and of every assigned code point up to U+2FFF and of every 16th above.
- greedy: 200 prompts of 32 tokens of documentation, 32 new tokens each. A first difference counts as `different` only
  where transformers' two likeliest tokens are more than 1e-4 nats apart, else as a tie.
- bits per byte: of windows of documentation, each token's log-probability through a forced token (`logit_bias`). The
  server reports none of a token that is a part of a character: windows with one are left out.
- bytes: each file is written twice.
"""

import argparse
import ctypes
import json
import math
import sys
import tempfile
import unicodedata
import urllib.request
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import kill
from llama_lite.digests import sha256
from llama_lite.evaluation.resolve import Model, resolve_models
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.kernels.probe import context_of
from llama_lite.models import gguf, loading, references

TIE = 1e-4  # nats between the two likeliest tokens
PROMPT, NEW = 32, 32  # tokens
FORCED = 1e4  # of a token's logit: it is sampled, and its log-probability is reported without it
HARD = [
    "It's naïve: 中文, עברית, 🙂🙂‍↔️, ½ and ǆ; tabs\t\tand\r\nlines\n\n\n  x",
    "  two  blanks   three    four \n\n \n\t x\u3000y\ufeffz\x00\x1c\x85\u2028",
    "we'll they've I'M 'S 'round 1234567890 3.14 1,000 ²³ ⅷ x_y(z)->[q]; __init__ http://a.b/c?d=e#f !!!??? ''' \"\"\"",
    "A document that says <|endoftext|> in the middle.",
]


class LlamaServer:
    """A GGUF file in a llama.cpp that serves on the loopback interface."""

    def __init__(self, path: Path, context: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = (
            str(path),
            context,
            1,
            False,
            0,
        )
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)
        # It is never destroyed: its destructor waits for a thread, and for ever where that has not begun to listen yet.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.server))

    def post(self, path: str, **body) -> dict:
        """The answer of the server to a request."""
        address = self.server.listening_address + path
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def ids(self, text: str, special: bool = False) -> list[int]:
        """Ids of a text, without begin-of-text. special: read the text of special tokens as these tokens."""
        return self.post("/tokenize", content=text, add_special=False, parse_special=special)["tokens"]

    def greedy(self, ids: list[int], tokens: int) -> list[int]:
        """The ids of a greedy continuation, at most so many, without the end-of-text."""
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", **body)["tokens"]

    def log_probability(self, ids: list[int], token: int) -> float:
        """Log-probability in nats of one token after others."""
        body = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 1, "logit_bias": [[token, FORCED]]}
        found = self.post("/completion", **body)["completion_probabilities"][0]
        assert found["id"] == token, found
        return found["logprob"]


def load(name: str) -> tuple[Model, torch.nn.Module, object]:
    """(reference, model in float32 with its adapter merged, tokenizer)."""
    (found,) = resolve_models([name], one_each=True)
    tokenizer = found.tokenizer()
    return found, loading.load_merged(found.base, found.adapter, tokenizer).eval(), tokenizer


def texts(folder: Path, characters: int) -> list[str]:
    """Documentation from the end of the installed packages' files, one text a document."""
    kill.write_text(folder / "text.jsonl", characters)
    return [row["text"] for row in read_jsonl(folder / "text.jsonl")]


def windows(tokenizer, documents: list[str], tokens: int, count: int) -> list[tuple[str, list[int]]]:
    """(text, ids) of windows of so many tokens, at equal distances in the documents. A text gives its ids again, and
    each token is a whole number of characters.
    """
    found, plain = [], {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for document in documents:
        ids = tokenizer(document, **plain)["input_ids"]
        for begin in range(0, len(ids) - tokens, tokens):
            text = tokenizer.decode(ids[begin : begin + tokens], clean_up_tokenization_spaces=False)
            pieces = tokenizer.batch_decode([[id] for id in ids[begin : begin + tokens]])
            if "\ufffd" not in "".join(pieces) and tokenizer(text, **plain)["input_ids"] == ids[begin : begin + tokens]:
                found.append((text, ids[begin : begin + tokens]))
    if len(found) < count:
        raise SystemExit(f"{len(found)} windows of {tokens} tokens, and {count} are needed: more --characters")
    return [found[index * len(found) // count] for index in range(count)]


def code_points() -> list[str]:
    """Assigned code points, one a text, between two letters."""
    numbers = [*range(1, 0x3000), *range(0x3000, 0x110000, 16)]
    return [f"a{chr(number)}b" for number in numbers if unicodedata.category(chr(number)) not in ("Cn", "Cs", "Co")]


def compare_ids(server: LlamaServer, tokenizer, prompts: list[str], many: bool = True) -> dict:
    """How many texts get other ids. many: code points, too, joined in texts of 256."""
    points = code_points() if many else []
    joined = ["".join(points[begin : begin + 256]) for begin in range(0, len(points), 256)]
    ours = [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in (*prompts, *HARD, *joined)
    ]
    theirs = [server.ids(text) for text in (*prompts, *HARD, *joined)]
    different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    return {"texts": len(prompts) + len(HARD), "code_points": len(points), "different": different}


@torch.no_grad()
def compare_greedy(server: LlamaServer, model, eos_id: int, prompts: list[list[int]], new: int = NEW) -> dict:
    """How many continuations are equal, differ, or part where the two likeliest tokens are within TIE."""
    batch = torch.tensor(prompts)
    generated = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=eos_id,
        trust_remote_code=False,
    )
    counts = {"prompts": len(prompts), "equal": 0, "ties": 0, "different": 0}
    for ids, row in zip(prompts, generated[:, batch.shape[1] :].tolist(), strict=True):
        ours = row[: row.index(eos_id)] if eos_id in row else row
        theirs = server.greedy(ids, new)
        theirs = theirs[: theirs.index(eos_id)] if eos_id in theirs else theirs
        if ours == theirs:
            counts["equal"] += 1
            continue
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        best = model(input_ids=torch.tensor([ids + ours[:same]])).logits[0, -1].log_softmax(-1).topk(2).values
        counts["ties" if best[0] - best[1] <= TIE else "different"] += 1
    return counts


@torch.no_grad()
def bits_per_byte(model, server: LlamaServer | None, rows: list[tuple[str, list[int]]]) -> float:
    """Of rows (text, ids), all tokens but the first of each predicted; by transformers, or by the server."""
    nats, size = 0.0, 0
    for _, ids in rows:
        first = len(model.tokenizer.decode(ids[:1]).encode())
        size += len(model.tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()) - first
        if server is None:
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            nats -= float(log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum())
        else:
            nats -= sum(server.log_probability(ids[:end], ids[end]) for end in range(1, len(ids)))
    return nats / math.log(2) / size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a model reference, as run_eval.py's --models")
    parser.add_argument("--name", default="demo", help="of the model in the results; those of other names stay")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--windows", type=int, default=24, help="of bits per byte")
    parser.add_argument("--characters", type=int, default=2_000_000, help="of documentation")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    found, model, tokenizer = load(arguments.model)
    model.tokenizer = tokenizer
    context = context_of(model.config)
    result = {
        "model": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": found.step,
            "weights": references.model_digest((found.adapter or found.base).folder),
        },
        "formats": {},
    }
    with tempfile.TemporaryDirectory() as name:
        documents = texts(Path(name), arguments.characters)
        prompts = windows(tokenizer, documents, PROMPT, arguments.prompts)
        rows = windows(tokenizer, documents, min(128, context), arguments.windows)
        result["bits_per_byte"] = bits_per_byte(model, None, rows)
        for dtype in gguf.FORMATS:
            paths = [Path(name) / f"{turn}-{dtype}.gguf" for turn in range(2)]
            for path in paths:
                gguf.write_gguf(arguments.model, model, tokenizer, dtype, path)
            server = LlamaServer(paths[0], context)
            theirs = bits_per_byte(model, server, rows)
            result["formats"][dtype] = {
                "bytes": paths[0].stat().st_size,
                "same_bytes": sha256(paths[0]) == sha256(paths[1]),
                "greedy": compare_greedy(server, model, tokenizer.eos_token_id, [ids for _, ids in prompts]),
                "bits_per_byte": theirs,
                "difference": theirs - result["bits_per_byte"],
            }
            if dtype == "float32":
                result["ids"] = compare_ids(server, tokenizer, [text for text, _ in prompts])
            print(dtype, result["formats"][dtype], flush=True)
    print(result["ids"])
    write_json(arguments.output, {**(read_json(arguments.output) or {}), arguments.name: result})


if __name__ == "__main__":
    main()
