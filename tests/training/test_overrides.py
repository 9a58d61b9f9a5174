"""Every method that overrides one of transformers, TRL or lm-eval exists there, takes what they pass, and is called.

A hook that a later release renames would silently no longer be called; stop signals and the handling of NaN hang on
one.
"""

import inspect
from collections import Counter

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from trl import SFTTrainer

from llama_lite.chat_format import template
from llama_lite.errors import Interrupted
from llama_lite.evaluation import lm, store
from llama_lite.evaluation.tasks import registry
from llama_lite.training import saving, sft_trainer, trainer
from llama_lite.training.callbacks import health, progress, samples, task_scores

VERIFIED = {
    "_build_accelerator_args",
    "create_scheduler",
    "training_step",
    "_maybe_log_save_evaluate",
    "log",
    "evaluate",
    "_get_num_items_in_batch",
    "_get_grad_norm",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_init_training_state",
    "_prepare_for_training",
}
SAVING = {"_save", "_save_checkpoint", "_save_optimizer_and_scheduler"}
OVERRIDES = {  # (our class, the one that it extends): the methods that it overrides
    (saving.VerifiedSaving, Trainer): SAVING,
    (saving.VerifiedSaving, SFTTrainer): SAVING,
    (trainer.VerifiedTraining, Trainer): VERIFIED,
    (trainer.VerifiedTraining, SFTTrainer): VERIFIED,
    (trainer.PretrainTrainer, Trainer): {"log"},
    (sft_trainer.TuningTrainer, SFTTrainer): {
        "compute_loss",
        "log",
        "_save",
        "_save_checkpoint",
        "_load_from_checkpoint",
    },
    (trainer.ResumeStateCallback, TrainerCallback): {"on_train_begin", "on_step_end", "on_train_end"},
    (trainer.DueEvaluationCallback, TrainerCallback): {"on_train_begin"},
    (progress.Progress, TrainerCallback): {"on_train_begin", "on_step_end", "on_log", "on_train_end"},
    (health.Health, TrainerCallback): {"on_evaluate"},
    (samples.Samples, TrainerCallback): {"on_evaluate"},
    (task_scores.TaskScores, TrainerCallback): {"on_evaluate"},
    (lm.SharedContextLM, HFLM): {
        "apply_chat_template",
        "loglikelihood_rolling",
        "_loglikelihood_tokens",
        "generate_until",
        "_model_generate",
        "tok_encode",
        "tok_batch_encode",
    },
}
CALLBACKS = (trainer.ResumeStateCallback, progress.Progress, health.Health)
LOADING = {"_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"}


def check_accepts(ours, theirs) -> None:
    """Assert that a call with every parameter of `theirs` is one of `ours`: by position, by name, and only what must be
    given.
    """
    mine, parameters = inspect.signature(ours), list(inspect.signature(theirs).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keywords = {p.name: None for p in named if p.kind is p.KEYWORD_ONLY}
    positional = [p for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
    mine.bind(*positional, **keywords)
    mine.bind(**{p.name: None for p in named})
    mine.bind(*[p for p in positional if p.default is p.empty])
    kinds = {p.kind for p in mine.parameters.values()}
    for kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        assert kind in kinds or kind not in {p.kind for p in parameters}


def upstream_method(kind, name: str):
    """The method of `kind` that names its parameters: TRL passes `*args, **kwargs` on to Trainer in some."""
    methods = [vars(cls)[name] for cls in kind.__mro__ if name in vars(cls)]
    return next(method for method in methods if {*inspect.signature(method).parameters} != {"self", "args", "kwargs"})


@pytest.mark.parametrize("pair", OVERRIDES, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}")
def test_each_override_exists_upstream_and_accepts_its_parameters(pair):
    ours, theirs = pair
    found = {
        name
        for name, value in vars(ours).items()
        if inspect.isfunction(value) and name != "__init__" and hasattr(theirs, name)
    }
    assert found == OVERRIDES[pair]
    for name in found:
        check_accepts(getattr(ours, name), upstream_method(theirs, name))


def test_a_parameter_that_an_override_does_not_know_is_noticed():
    class Theirs:
        def step(self, model, inputs, added=None): ...

    class Ours(Theirs):
        def step(self, model, inputs): ...

    with pytest.raises(TypeError, match="too many positional arguments"):
        check_accepts(Ours.step, Theirs.step)


def overrides_of(*classes) -> set[tuple[str, str]]:
    return {(ours.__name__, name) for (ours, _), names in OVERRIDES.items() if ours in classes for name in names}


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """How often each override was called, by the names of class and method."""
    counted = Counter()

    def spy(ours, name):
        original = vars(ours)[name]

        def called(self, *args, **kwargs):
            counted[ours.__name__, name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(ours, name, called)

    for ours, name in {(ours, name) for (ours, _), names in OVERRIDES.items() for name in names}:
        spy(ours, name)
    return counted


def stop_and_resume(call, kind, folder, calls, monkeypatch, **changes) -> tuple[set, set]:
    """(overrides called in a run that stops in step 3 of 4, overrides called when it is resumed)."""
    step = kind.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 2:
            (folder / "stop").touch()
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", stopping)
        with pytest.raises(Interrupted, match="at step 3 of 4"):
            call(folder, **changes)
    stopped = set(calls)
    assert calls["VerifiedTraining", "_get_grad_norm"] == 3 and calls["VerifiedTraining", "_load_from_checkpoint"] == 0
    calls.clear()
    call(folder, **changes)
    assert calls["VerifiedTraining", "_get_grad_norm"] == 1
    return stopped, set(calls)


QUICK = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "logging_steps": 1}


def test_each_override_is_called_when_a_pretraining_run_saves_stops_and_is_resumed(
    pretrain, tmp_path, calls, monkeypatch
):
    kind, watched = trainer.PretrainTrainer, {"eval_tasks": ["embedded_docs"], "eval_task_limit": 2}
    stopped, resumed = stop_and_resume(pretrain, kind, tmp_path / "run", calls, monkeypatch, **QUICK, **watched)
    training = trainer.VerifiedTraining, saving.VerifiedSaving
    expected = overrides_of(*training, kind, *CALLBACKS, samples.Samples, task_scores.TaskScores)
    assert expected <= resumed
    assert {pair for pair in expected if pair[1] not in LOADING} <= stopped


@pytest.mark.parametrize("use_lora", [True, False])
def test_each_override_is_called_when_a_tuning_run_saves_stops_and_is_resumed(
    sft, tmp_path, calls, monkeypatch, use_lora
):
    kind, few = sft_trainer.TuningTrainer, {"compared_prompts": 0, "sampled_answers": 1, "use_lora": use_lora}
    stopped, resumed = stop_and_resume(sft, kind, tmp_path / "run", calls, monkeypatch, **QUICK, **few)
    training = trainer.VerifiedTraining, saving.VerifiedSaving
    expected = overrides_of(*training, kind, *CALLBACKS) - {("VerifiedSaving", "_save")}
    if use_lora:
        expected -= {("VerifiedTraining", "_load_from_checkpoint")}  # an adapter is loaded by itself
    assert expected <= resumed
    assert {pair for pair in expected if pair[1] not in LOADING} <= stopped


def test_each_override_of_lm_evals_model_is_called(base, calls):
    tokenizer = AutoTokenizer.from_pretrained(base)
    template.set_chat_template(tokenizer)
    model = lm.SharedContextLM(AutoModelForCausalLM.from_pretrained(base).eval(), tokenizer)
    for name, chat in (("embedded_next_sentence", True), ("embedded_docs", False), ("embedded_instructions", True)):
        (task,) = registry.build([name], {}, {}, chat)
        items = store.chosen(task, 2, 0)
        lm.run(model, {leaf: task.leaves[leaf] for leaf in items}, items, 0, chat, False)
    assert set(calls) == overrides_of(lm.SharedContextLM)
