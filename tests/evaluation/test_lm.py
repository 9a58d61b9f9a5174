"""The numbers are lm-eval's own: shared contexts change how they are computed, and nothing else."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import forking
import pytest
import torch
from helpers import ROOT
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_lite.errors import Refusal
from llama_lite.evaluation.lm import SharedContextLM, check_generation, run
from llama_lite.evaluation.runner import adds_begin
from llama_lite.evaluation.tasks import definition, registry
from llama_lite.training.callbacks.task_scores import TaskScores


def requests_of(pairs, kind="loglikelihood"):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in pairs]


@pytest.fixture(scope="module")
def words():
    return (ROOT / "LICENSE").read_text().split()


@pytest.fixture(scope="module")
def pairs(words):
    """Contexts with four endings each of unequal length, a few single ones, one without context, repeated endings."""
    chance, found = random.Random(0), []

    def some(count):
        begin = chance.randrange(len(words) - count)
        return " ".join(words[begin : begin + count])

    for _ in range(8):
        context = some(chance.randint(3, 12))
        found += [(context, " " + some(chance.randint(1, 8))) for _ in range(4)]
    return [*found, ("", some(4)), (found[0][0], " x"), found[0], (some(3), " " + some(12))]


def both(folder, **how):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    return SharedContextLM(model, tokenizer, **how), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


@pytest.mark.parametrize("batch_tokens", [64, 2048])
def test_likelihoods_are_lm_evals(base, pairs, batch_tokens):
    ours, theirs = both(base, batch_tokens=batch_tokens)
    found, expected = (lm.loglikelihood(requests_of(pairs), disable_tqdm=True) for lm in (ours, theirs))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-4)
    assert (
        [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        and not ours.needs_full_forward
        and ours.truncated == 0
    )


def test_greedy_answers_are_known(base):
    """A continuation that the model itself would choose."""
    ours, theirs = both(base)
    ids = ours.tok_encode("Count to")
    end = theirs.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=-1)[
        0, len(ids) :
    ].tolist()
    asked = [(("", ""), ids, end), (("", ""), ids, [*end[:2], (end[2] + 1) % 512])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(asked)] == [True, False]


def test_long_requests_are_cut_as_lm_eval_cuts_them_and_counted(base, words):
    ours, theirs = (lm for lm in both(base, max_length=40))
    theirs._max_length = 40
    text = " ".join(words[:200])
    pairs = [(text, " Apache"), (text, " License and more"), ("short", " one")]
    assert [a for a, _ in ours.loglikelihood(requests_of(pairs), disable_tqdm=True)] == pytest.approx(
        [a for a, _ in theirs.loglikelihood(requests_of(pairs), disable_tqdm=True)], abs=1e-4
    )
    assert ours.truncated == 2


def test_rolling_likelihoods_are_lm_evals(base, words):
    ours, theirs = both(base, max_length=50)
    theirs._max_length = 50
    texts = [(" ".join(words[i * 40 : i * 40 + 10 + 30 * i]),) for i in range(1, 5)]
    found, expected = (
        lm.loglikelihood_rolling(requests_of(texts, "loglikelihood_rolling"), disable_tqdm=True)
        for lm in (ours, theirs)
    )
    assert found == pytest.approx(expected, abs=2e-3, rel=1e-6)


def test_a_begin_of_text_of_the_tokenizers_own_is_not_scored(base, words):
    """As Llama's and Gemma's tokenizers add it: lm-eval scores it as if it were part of the text, which adds to the bits
    per byte of these models alone.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer, text = AutoTokenizer.from_pretrained(base), " ".join(words[:20])
    plain = tokenizer(text)["input_ids"]
    tokenizer.bos_token, begin = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.eos_token} $A", special_tokens=[(tokenizer.eos_token, begin)]
    )
    assert tokenizer(text)["input_ids"] == [begin, *plain] and adds_begin(tokenizer)
    ours = SharedContextLM(model, tokenizer)
    (found,) = ours.loglikelihood_rolling(requests_of([(text,)], "loglikelihood_rolling"), disable_tqdm=True)
    with torch.no_grad():
        logits = model(torch.tensor([[begin, *plain]])).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(float(logits[range(len(plain)), plain].sum()), abs=2e-3)
    assert not adds_begin(AutoTokenizer.from_pretrained(base)) and ours.add_bos_token is None


def test_a_model_whose_head_does_more_is_asked_whole(base, pairs):
    """One that scales its logits, as some do: the body's output times the head would be wrong."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(base),
    )
    plain = model.forward

    def scaled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits / 2
        return output

    model.forward = scaled
    ours, theirs = SharedContextLM(model, tokenizer), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    assert ours.needs_full_forward
    found, expected = (lm.loglikelihood(requests_of(pairs[:9]), disable_tqdm=True) for lm in (ours, theirs))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-4)


def test_bfloat16_weights_have_float32_probabilities(base, pairs):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval(),
        AutoTokenizer.from_pretrained(base),
    )
    found = [nats for nats, _ in SharedContextLM(model, tokenizer).loglikelihood(requests_of(pairs), disable_tqdm=True)]
    exact = [nats for nats, _ in both(base)[0].loglikelihood(requests_of(pairs), disable_tqdm=True)]
    assert (
        found == pytest.approx(exact, rel=5e-3) and sum(nats == round(nats * 2) / 2 for nats in found) < 5
    )  # not rounded to half a nat


def test_the_callers_random_state_is_kept(base):
    task = definition.cloze("t", [{"question": "One two", "choices": [" three", " four"], "answer": 0}] * 3)
    random.seed(3)
    torch.manual_seed(3)
    expected = (random.random(), torch.rand(1).item())
    random.seed(3)
    torch.manual_seed(3)
    run(both(base)[0], {"t": task}, {"t": [0, 1, 2]}, 1, False, False)
    assert (random.random(), torch.rand(1).item()) == expected


@pytest.mark.parametrize(
    "prompt, answer, message",
    [
        ("The end", "", r"'' adds no token of this tokenizer to the prompt 'The end', so it has no likelihood"),
        (" ", " one", r"the prompt ' ' becomes no token of this tokenizer, so nothing comes before ' one'"),
        ("The end", " word" * 60, r"'\.\.\..* word' has \d+ tokens, and the context of this model holds 40"),
    ],
)
def test_what_has_no_likelihood_is_refused(base, prompt, answer, message):
    """lm-eval ends with an AssertionError."""
    ours, theirs = both(base, max_length=40)
    theirs._max_length = 40
    with pytest.raises(AssertionError):
        theirs.loglikelihood(requests_of([(prompt, answer)]), disable_tqdm=True)
    with pytest.raises(Refusal, match=f"{message}.* Leave the task out for this model, or change this text"):
        ours.loglikelihood(requests_of([("The", " end"), (prompt, answer)]), disable_tqdm=True)


# ---- generated answers ----


def test_generated_answers_follow_the_task_and_not_the_generation_config_of_the_authors(base):
    ours, theirs = both(base)
    prompts = [(text, {"until": [], "max_gen_toks": 6, "do_sample": False}) for text in ("The end", "Count to 3:")]
    expected = theirs.generate_until(requests_of(prompts, "generate_until"), disable_tqdm=True)
    config = ours.model.generation_config
    config.repetition_penalty, config.max_new_tokens = 50.0, 2
    config.suppress_tokens = ours.tok_encode(expected[0])
    before = config.to_dict()
    assert theirs.model.generation_config is config  # one model: lm-eval follows it
    assert theirs.generate_until(requests_of(prompts, "generate_until"), disable_tqdm=True) != expected
    assert ours.generate_until(requests_of(prompts, "generate_until"), disable_tqdm=True) == expected
    assert ours.model.generation_config.to_dict() == before


def generated(tokens: int):
    return definition.make(
        "t",
        [{"question": "Say one", "answer": "one"}],
        "generate_until",
        doc_to_text="question",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": tokens, "do_sample": False},
        metric_list=[{"metric": "exact_match", **definition.MEAN}],
    )


def test_answers_that_leave_no_room_for_a_prompt_are_refused(base):
    ours, _ = both(base, max_length=40)
    check_generation(ours, {"t": generated(39)})
    with pytest.raises(Refusal, match=r"t generates up to 40 tokens \(max_gen_toks\), and the context .* holds 40 for"):
        check_generation(ours, {"t": generated(40)})
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model), model=ours.model)
    in_training = TaskScores(trainer, ours.tokenizer, [], 1, 1)
    in_training.tasks = [(definition.EvalTask("t", {"t": generated(512)}, 0), {"t": [0]})]
    with pytest.raises(Refusal, match="t generates up to 512 tokens"):
        in_training.on_evaluate(None, None, None)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_prompts_that_are_cut_are_counted_and_none_is_encoded_once_more(base, words, batch_size, monkeypatch):
    ours, theirs = both(base, max_length=40, batch_size=batch_size)
    theirs._max_length, theirs.batch_size_per_gpu = 40, batch_size
    ids = ours.tok_encode(" ".join(words[:200]))
    assert len(ids) > 31
    texts = [*(ours.tok_decode(ids[-count:]) for count in (30, 31)), " ".join(words[:200]), "The end"]
    assert [len(ours.tok_encode(text)) > 30 for text in texts] == [False, True, True, False]
    prompts = [(text, {"until": [], "max_gen_toks": 10, "do_sample": False}) for text in texts]
    encoded, tok_encode = [], HFLM.tok_encode
    monkeypatch.setattr(HFLM, "tok_encode", lambda *args, **kwargs: encoded.append(args[1]) or tok_encode(*args))
    expected = theirs.generate_until(requests_of(prompts, "generate_until"), disable_tqdm=True)
    by_lm_eval = encoded.copy()
    encoded.clear()
    assert ours.generate_until(requests_of(prompts, "generate_until"), disable_tqdm=True) == expected
    assert encoded == by_lm_eval and ours.truncated == 2


# ---- against the command ----


HELLASWAG = [
    {
        "activity_label": "Reading",
        "ctx_a": f"A reader opens book number {i}.",
        "ctx_b": "she",
        "endings": [f"reads page {i}.", "closes the window.", f"counts to {i} and sleeps.", "sings."],
        "label": str(i % 4),
        "ind": i,
        "source_id": f"book {i // 3}",
    }
    for i in range(24)
]


def write_hellaswag(folder):
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in HELLASWAG))
    return folder


def command_results(folder, data, work_folder):
    """`lm_eval` as a user would run it (as a fork), on the built-in task with local data: (results, samples)."""
    source = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks/hellaswag/hellaswag.yaml"
    (work_folder / "tasks").mkdir()
    (work_folder / "tasks/local.yaml").write_text(
        f"include: {source}\ntask: hellaswag_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation:"
        f" {data}/validation.jsonl\n    train: {data}/train.jsonl\n"
    )
    (work_folder / "lm_eval_command.py").write_text("from lm_eval.__main__ import cli_evaluate\n\ncli_evaluate()\n")
    command = [
        sys.executable,
        str(work_folder / "lm_eval_command.py"),
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--tasks",
        "hellaswag_local",
    ]
    command += [
        "--include_path",
        str(work_folder / "tasks"),
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--output_path",
        str(work_folder / "out"),
        "--log_samples",
    ]
    result = forking.run(command, 900, work_folder)
    assert result.returncode == 0, result.stderr
    results = json.loads(next((work_folder / "out").rglob("results_*.json")).read_text())["results"]["hellaswag_local"]
    samples = [
        json.loads(line) for line in next((work_folder / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    ]
    return results, samples


def compare_with_the_command(folder, tmp_path):
    data = write_hellaswag(tmp_path / "data")
    results, theirs = command_results(folder, data, tmp_path)
    (task,) = registry.build(["hellaswag"], {"hellaswag": str(data)}, {}, False)
    found = run(both(folder)[0], task.leaves, {"hellaswag": list(range(24))}, 1234, False, False)
    for metric in ("acc", "acc_norm"):
        assert found["results"]["hellaswag"][f"{metric},none"] == results[f"{metric},none"]
    nats = {row["doc_id"]: [float(answer[0]) for answer in row["filtered_resps"]] for row in theirs}
    ours = {row["doc_id"]: [answer[0] for answer in row["filtered_resps"]] for row in found["samples"]["hellaswag"]}
    assert nats.keys() == ours.keys()
    for number in nats:
        assert ours[number] == pytest.approx(nats[number], abs=1e-4, rel=1e-6)


def test_the_numbers_of_the_lm_eval_command(base, tmp_path):
    compare_with_the_command(base, tmp_path)


@pytest.mark.slow
def test_the_numbers_of_the_lm_eval_command_on_a_real_model(smol, tmp_path):
    compare_with_the_command(smol, tmp_path)


def test_a_text_with_a_special_token_that_has_no_embedding_is_refused(base):
    """Gemma 3's text models have an image token in their tokenizer alone."""
    from llama_lite.errors import Refusal

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens("<image>", special_tokens=True)
    lm, told = SharedContextLM(model, tokenizer), r"'<image>', a special token .* no embedding for it \(id 512 of 512\)"
    with pytest.raises(Refusal, match=told):
        lm.loglikelihood(requests_of([("One <image> of", " it")]), disable_tqdm=True)
    generated = [("One <image> of", {"max_gen_toks": 2, "until": []})]
    with pytest.raises(Refusal, match=told):
        lm.generate_until(requests_of(generated, "generate_until"), disable_tqdm=True)
    assert len(lm.loglikelihood(requests_of([("One image of", " it")]), disable_tqdm=True)) == 1
