"""Training is the paper's mathematics, and a resumed run is the run that was not stopped."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import QUICK, log_of, same_tensors, tensors_of
from safetensors.torch import save_file

from llama_lite.checkpoint.identity import differences
from llama_lite.data import sources
from llama_lite.errors import Interrupted, Refusal, Unhealthy
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.hub import export
from llama_lite.run_folder import RunFolder
from llama_lite.training import trainer

pytestmark = pytest.mark.usefixtures("undrawn")


def reference(config, tokens, block_size, windows_per_step, steps, peak, warmup, decay, clip):
    """The paper's training written out: (losses, gradient norms, rates, final weights) in float32."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(1337)
    model = LlamaForCausalLM(config)
    weights = dict(model.named_parameters())
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    losses, norms, rates = [], [], []
    for step in range(steps):
        starts = [(step * windows_per_step + i) * block_size for i in range(windows_per_step)]
        batch = torch.from_numpy(np.stack([tokens[s : s + block_size + 1] for s in starts]).astype(np.int64))
        log_p = model(batch[:, :-1]).logits.float().log_softmax(-1)
        loss = -log_p.gather(-1, batch[:, 1:, None]).mean()  # every one of the block_size predictions counts
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in weights.values()))
        rate = peak * (step + 1) / warmup
        if step >= warmup:
            rate = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps - warmup))))
        with torch.no_grad():
            for name, w in weights.items():
                g = w.grad * min(1.0, clip / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.95 * second[name] + 0.05 * g * g
                unbiased = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
                w *= 1 - rate * (decay if w.dim() >= 2 else 0.0)
                w -= rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        losses.append(loss.item())
        norms.append(norm)
        rates.append(rate)
    return losses, norms, rates, {name: w.detach() for name, w in weights.items()}


def test_training_equals_the_written_out_reference(pretrain, settings, tmp_path):
    from transformers import AutoConfig

    run = pretrain(
        tmp_path / "run",
        order="sequential",
        bf16=False,
        max_steps=6,
        logging_steps=1,
        warmup_steps=3,
        max_grad_norm=0.5,
        save_steps=6,
    )
    config = AutoConfig.from_pretrained(run / "checkpoint-6")
    shards = sorted(Path(settings["prepared_dir"]).glob("train-*.npy"))
    tokens = np.concatenate([np.load(path) for path in shards])
    losses, norms, rates, weights = reference(config, tokens, 64, 16, 6, 1e-3, 3, 0.1, 0.5)
    logged = [entry for entry in log_of(run) if "loss" in entry]
    np.testing.assert_allclose([entry["loss"] for entry in logged], losses, atol=1e-5)
    np.testing.assert_allclose([entry["grad_norm"] for entry in logged], norms, atol=1e-5)
    np.testing.assert_allclose([entry["learning_rate"] for entry in logged], rates, rtol=1e-9)
    assert rates[-1] == pytest.approx(1e-4)  # the floor: a tenth of the peak, at the last step
    trained = tensors_of(run / "checkpoint-6" / "model.safetensors")
    assert trained.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=0)


def stop_at(step: int):
    """A callback that asks for an orderly end after `step`."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                (self.folder / "stop").touch()

    return Stop()


def interrupt(pretrain, folder, step, monkeypatch, **changes):
    """A run that is asked to stop, by the file `stop`, in its step `step`."""
    from llama_lite.training.trainer import PretrainTrainer

    stop = stop_at(step)
    stop.folder = folder
    original = PretrainTrainer.train

    def train(self, *args, **kwargs):
        self.add_callback(stop)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "train", train)
        with pytest.raises(Interrupted, match=f"at step {step} of"):
            pretrain(folder, **changes)


@pytest.mark.parametrize("step", [4, 6, 12])  # at 6 and 12 the evaluation is left to the resumed run
def test_a_stopped_run_ends_as_the_one_that_was_not(pretrain, whole_run, tmp_path, monkeypatch, step):
    interrupt(pretrain, tmp_path / "run", step, monkeypatch)
    assert read_json(tmp_path / "run" / "status.json") | {"reason": ""} == {
        "code": 75,
        "reason": "",
        "status": "interrupted",
        "step": step,
    }
    ended, log = [], RunFolder.log
    monkeypatch.setattr(
        RunFolder, "log", lambda self, record: ended.append((self.path / "status.json").exists()) or log(self, record)
    )
    run = pretrain(tmp_path / "run")
    assert ended and not any(ended)  # a run that goes on has not ended, whatever its last end was
    assert log_of(run) == log_of(whole_run)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(run / "checkpoint-12" / name, whole_run / "checkpoint-12" / name), name
    assert same_tensors(run / "model.safetensors", whole_run / "model.safetensors")
    assert [
        entry["event"]
        for entry in read_jsonl(run / "events.jsonl")
        if entry["event"] in ("started", "resumed", "interrupted", "finished")
    ] == [
        "started",
        "interrupted",
        "resumed",
        "finished",
    ]


def test_a_finished_run_stays_finished(pretrain, whole_run, tmp_path, capsys, monkeypatch):
    """Its model is the last checkpoint's: what is not there, is damaged, or is another one is written again, and said
    with the reason.
    """
    monkeypatch.setattr("llama_lite.provenance.code_revision", lambda: "another")
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    pretrain(run)
    assert "is finished (12 steps): nothing to do" in capsys.readouterr().out
    assert {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    } == before
    model = run / "model.safetensors"
    whole, config = model.read_bytes(), (run / "config.json").read_text()
    tensors = tensors_of(model)

    def lack_one() -> None:
        save_file(
            {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, model, {"format": "pt"}
        )

    damages = {
        "its files are not there": model.unlink,
        "is not a complete safetensors file": lambda: model.write_bytes(whole[:1000]),
        "it is not that of checkpoint-12": lambda: export.export_model(
            run / "checkpoint-10", run, "bfloat16"
        ),  # an older one
        "is not that of checkpoint-12": lack_one,
        "not that of checkpoint-12": lambda: save_file({**tensors, "more": torch.ones(1)}, model, {"format": "pt"}),
        "rms_norm_eps in its config.json is 0.5, and 1e-05 in checkpoint-12": (
            lambda: (run / "config.json").write_text(json.dumps({**json.loads(config), "rms_norm_eps": 0.5}))
        ),
    }
    for why, damage in damages.items():
        damage()
        pretrain(run)
        said = capsys.readouterr().out
        assert "is written again from the last checkpoint" in said and why in said
        assert model.read_bytes() == whole and (run / "config.json").read_text() == config
    export.export_model(run / "checkpoint-12", run, "float32")  # by hand, in another number format: the same model
    pretrain(run)
    assert "nothing to do" in capsys.readouterr().out
    longer = r"--max_steps N \(in place of --hours or --num_train_epochs\) --allow_changes learning_rate,max_steps"
    other = rf"choose another --output_dir \(--config {run} keeps the other values of this run\)"
    with pytest.raises(Refusal, match=rf"{other}, or train longer with the new ones: {longer}"):
        pretrain(run, learning_rate=5e-4)
    pretrain(run, "--allow_changes", "learning_rate", learning_rate=5e-4)
    assert re.search(rf"nothing to do, and the new learning_rate is not used.*{longer}", capsys.readouterr().out)
    with pytest.raises(Refusal, match=r"--max_steps 6: the run in .* is already at step 12"):
        pretrain(run, "--allow_changes", "max_steps", max_steps=6)


def test_allowed_changes_are_really_applied_from_the_first_resumed_step(pretrain, tmp_path, monkeypatch):
    interrupt(pretrain, tmp_path / "run", 5, monkeypatch, logging_steps=1)
    changes = {"learning_rate": 5e-4, "max_steps": 10, "weight_decay": 0.3, "max_grad_norm": 0.25}
    with pytest.raises(Refusal) as refusal:
        pretrain(tmp_path / "run", logging_steps=1, **changes)
    for name in changes:
        assert name in str(refusal.value)
    assert "0.001 -> 0.0005" in str(refusal.value) and "12 -> 10" in str(refusal.value)
    with pytest.raises(Refusal, match=r"max_steps +12 -> 10"):
        pretrain(tmp_path / "run", logging_steps=1, allow_changes="learning_rate,weight_decay,max_grad_norm", **changes)
    from llama_lite.training.trainer import PretrainTrainer

    decays = []
    original = PretrainTrainer.training_step

    def spy(self, *args, **kwargs):
        decays.append([group["weight_decay"] for group in self.optimizer.param_groups])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", spy)
    run = pretrain(tmp_path / "run", logging_steps=1, allow_changes=",".join(changes), **changes)
    rates = {entry["step"]: entry["learning_rate"] for entry in log_of(run) if "loss" in entry}
    for step in range(6, 11):
        assert rates[step] == pytest.approx(5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / (10 - 4))))), step
    assert decays[0] == [0.3, 0.0]
    changed = [
        event
        for event in read_jsonl(run / "events.jsonl")
        if event["event"] == "changed" and event["kind"] == "hyperparameters"
    ]
    assert changed[-1]["fields"]["learning_rate"] == [1e-3, 5e-4]


def test_new_intervals_count_on_resume(pretrain, tmp_path, monkeypatch):
    interrupt(pretrain, tmp_path / "run", 4, monkeypatch)
    run = pretrain(tmp_path / "run", logging_steps=2, save_steps=4, save_total_limit=3)
    assert [entry["step"] for entry in log_of(run) if "loss" in entry] == [3, 6, 8, 10, 12]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]


def test_resume_without_state_on_purpose(pretrain, whole_run, tmp_path, monkeypatch):
    run = tmp_path / "stopped"
    interrupt(pretrain, run, 5, monkeypatch, logging_steps=1)
    steps = {}
    for without in ("optimizer", "scheduler", "data", "rng"):
        copy = tmp_path / without
        shutil.copytree(run, copy)
        pretrain(copy, logging_steps=1, resume_without=without)
        steps[without] = {entry["step"]: entry for entry in log_of(copy) if "loss" in entry}
    exact = tmp_path / "exact"
    shutil.copytree(run, exact)
    pretrain(exact, logging_steps=1)
    exact_steps = {entry["step"]: entry for entry in log_of(exact) if "loss" in entry}
    assert steps["rng"] == exact_steps  # this model draws no random number in training
    assert (
        steps["optimizer"][6]["loss"] == exact_steps[6]["loss"]
        and steps["optimizer"][7]["loss"] != exact_steps[7]["loss"]
    )
    assert steps["optimizer"][6]["learning_rate"] == exact_steps[6]["learning_rate"]
    assert [steps["scheduler"][step]["learning_rate"] for step in (6, 7, 8, 9)] == pytest.approx(
        [2.5e-4, 5e-4, 7.5e-4, 1e-3]
    )
    assert (
        steps["data"][6]["loss"] != exact_steps[6]["loss"]
        and steps["data"][6]["learning_rate"] == exact_steps[6]["learning_rate"]
    )


def test_data_position_restarts_at_the_first_window(pretrain, tmp_path, monkeypatch):
    from llama_lite.data.dataset import TokenWindows

    run = tmp_path / "run"
    interrupt(pretrain, run, 5, monkeypatch, order="sequential")
    read = []
    original = TokenWindows.__getitem__

    def spy(self, position):
        if self.paths[0].name.startswith("train"):
            read.append(self.window_of(position))
        return original(self, position)

    monkeypatch.setattr(TokenWindows, "__getitem__", spy)
    pretrain(run, order="sequential", resume_without="data", eval_strategy="no", save_steps=100)
    assert read[:16] == list(range(16))


def test_wrong_weights_are_refused_by_the_probe(pretrain, tmp_path, monkeypatch):
    from llama_lite.models import loading
    from llama_lite.training import trainer

    run = tmp_path / "run"
    interrupt(pretrain, run, 5, monkeypatch)
    original = loading.load_weights

    def altered(model, folder):
        original(model, folder)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5

    monkeypatch.setattr(trainer, "load_weights", altered)
    with pytest.raises(Refusal, match=r"give a loss of .* on the probe"):
        pretrain(run)
    monkeypatch.setattr(trainer, "load_weights", original)
    pretrain(run)


def test_init_from_takes_weights_only(pretrain, whole_run, tmp_path):
    run = pretrain(
        tmp_path / "run", init_from=str(whole_run / "checkpoint-12"), max_steps=4, warmup_steps=4, logging_steps=1
    )
    first = next(entry for entry in log_of(run) if "loss" in entry)
    last = [entry for entry in log_of(whole_run) if "loss" in entry][-1]
    assert first["step"] == 1 and first["learning_rate"] == pytest.approx(2.5e-4)
    assert abs(first["loss"] - last["loss"]) < 0.3  # trained weights, not fresh ones (6.2)
    again = {"init_from": str(tmp_path / "another"), "max_steps": 5, "warmup_steps": 4, "allow_changes": "max_steps"}
    with pytest.raises(
        Refusal,
        match=(
            r"--init_from .*another: the run in .* began from .*checkpoint-12 and continues from its checkpoint at step 4"
        ),
    ):
        pretrain(tmp_path / "run", **again)
    with pytest.raises(Refusal, match="holds no model"):
        pretrain(tmp_path / "other", init_from=str(tmp_path))
    assert not (tmp_path / "other/run.json").exists()  # a refused command begins no run
    with pytest.raises(
        Refusal,
        match=r"is another model: head_dim is 16 there and 48 here; .*num_key_value_heads is 2 there and 4 here",
    ):
        pretrain(tmp_path / "third", init_from=str(whole_run / "checkpoint-12"), model_config="demo", block_size=64)


def test_init_from_alone_takes_config_and_tokenizer_too(pretrain, whole_run, tmp_path, capsys):
    """Continued pretraining on another text; a tokenizer or a model that is given counts."""
    source = str(whole_run / "checkpoint-12")
    new = {"model_config": None, "tokenizer": None, "vocab_size": None, "prepared_dir": str(tmp_path / "tokens")}
    new |= {"max_steps": 2, "logging_steps": 1, "init_from": source}
    run = pretrain(tmp_path / "run", **new)
    settings, said = read_json(run / "run.json")["settings"], capsys.readouterr().out
    assert settings["model_config"] == source and "another tokenizer" not in said
    tokenizers = [json.loads((folder / "tokenizer.json").read_text()) for folder in (run, Path(source))]
    assert tokenizers[0] == tokenizers[1]
    first = next(entry for entry in log_of(run) if "loss" in entry)
    last = [entry for entry in log_of(whole_run) if "loss" in entry][-1]
    assert abs(first["loss"] - last["loss"]) < 0.3
    pretrain(run, **new)
    assert "is finished (2 steps): nothing to do" in capsys.readouterr().out

    trained = {**new, "vocab_size": 300, "prepared_dir": str(tmp_path / "own")}
    pretrain(tmp_path / "own-run", **trained)
    assert "its weights were trained with another tokenizer than this run's" in capsys.readouterr().out
    with pytest.raises(
        Refusal, match=r"another model: .*num_hidden_layers is 2 there and 3 here.*Leave out --model_con"
    ):
        pretrain(tmp_path / "other", **{**new, "prepared_dir": str(tmp_path / "never"), "model_config": "3x64"})
    assert not (tmp_path / "never").exists()


def test_init_from_without_config_or_tokenizer_names_itself(pretrain, whole_run, tmp_path):
    bare = shutil.copytree(
        whole_run / "checkpoint-12", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "config.json")
    )
    new = {"tokenizer": None, "vocab_size": None, "prepared_dir": str(tmp_path / "tokens"), "init_from": str(bare)}
    with pytest.raises(Refusal, match=r"--init_from .*bare: no config of it can be read, and no --model_config is"):
        pretrain(tmp_path / "run", model_config=None, **new)
    with pytest.raises(Refusal, match=r"--init_from .*bare: no tokenizer of it can be used, and no --tokenizer is"):
        pretrain(tmp_path / "run", **new)
    assert not (tmp_path / "run/run.json").exists()


def test_a_start_that_kept_nothing_leaves_its_record_to_none(tmp_path):
    """`run.json` is the next start's, which may have other arguments; the id stays where something was published."""
    from llama_lite.run_folder import RunFolder
    from llama_lite.training import resume, trainer

    with RunFolder(tmp_path) as run:
        start = trainer.read_resume_point(None, ())
        for seed in (1, 2):
            record = {"kind": "pretrain", "identity": {"data": {"seed": seed}}, "given": {"seed": seed}}
            record["id"] = resume.run_id_of(run, record["identity"], begins=True)
            resume.begin_run(run, record, start)
            assert read_json(tmp_path / "run.json") == record
        another = {"data": {"seed": 3}}
        assert resume.run_id_of(run, another, begins=True) != record["id"] == resume.run_id_of(run, another)
        (tmp_path / "published.jsonl").touch()
        assert resume.run_id_of(run, another, begins=True) == record["id"]


def test_labels_are_counted_in_whole_numbers(pretrain, tmp_path, monkeypatch):
    """FSDP2 casts a model's floating inputs to bfloat16, which knows 1,024 and 1,032 and nothing between."""
    from llama_lite.training import trainer

    step, counts = trainer.VerifiedTraining.training_step, []

    def seen(self, model, inputs, count, *args):
        counts.append(count)
        return step(self, model, inputs, count, *args)

    monkeypatch.setattr(trainer.VerifiedTraining, "training_step", seen)
    pretrain(tmp_path / "run", max_steps=2)
    assert [(count.dtype.is_floating_point, int(count)) for count in counts] == [(False, 1024)] * len(counts) and counts


def test_nan_stops_the_run_and_leaves_the_checkpoint(pretrain, tmp_path, monkeypatch):
    from llama_lite.training.trainer import PretrainTrainer

    original = PretrainTrainer.training_step

    def poisoned(self, model, inputs, *args, **kwargs):
        if self.state.global_step == 6:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.nan
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", poisoned)
    with pytest.raises(Unhealthy, match=r"loss nan, gradient norm nan at step 7 \(windows"):
        pretrain(tmp_path / "run")
    run = tmp_path / "run"
    assert read_json(run / "status.json")["code"] == 3
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-5"]
    from llama_lite.checkpoint.verify import find_corruption

    assert find_corruption(run / "checkpoint-5") == []


@pytest.fixture
def scaler(monkeypatch):
    """Training under a GradScaler, as in float16 on a GPU: in float32 on this CPU, with gradients rounded to float16.
    Its first scale lets them overflow, and it does so again after three steps.
    """
    from accelerate import Accelerator

    create = Accelerator.__init__

    def create_with_scaler(self, *args, **kwargs):
        create(self, *args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", 2.0**24, growth_factor=64, backoff_factor=1 / 64, growth_interval=3)

    def unscale(self, optimizer=None):
        for prepared in self._optimizers:
            for group in prepared.param_groups:
                for parameter in group["params"]:
                    parameter.grad.copy_(parameter.grad.half())
            self.scaler.unscale_(prepared.optimizer)

    monkeypatch.setattr(Accelerator, "__init__", create_with_scaler)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)


def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_keeps_its_place(pretrain, scaler, tmp_path):
    """Under the fused optimizer, which leaves the weights by itself, and stopped and resumed under the other one, where
    Trainer leaves the schedule too: the same steps are skipped, at the same rates.
    """
    settings = {**QUICK, "max_steps": 9, "warmup_steps": 3}
    whole = pretrain(tmp_path / "whole", **settings, optim="adamw_torch_fused")
    with pytest.raises(Interrupted):
        pretrain(tmp_path / "run", "--stop_after_step", "5", **settings, optim="adamw_torch")
    resumed = pretrain(tmp_path / "run", **settings, optim="adamw_torch")
    logs = [[entry for entry in log_of(run) if "loss" in entry] for run in (whole, resumed)]
    for run, log in zip((whole, resumed), logs, strict=True):
        events = read_jsonl(run / "events.jsonl")
        skipped = [event["at_step"] for event in events if event["event"] == "step skipped"]
        assert skipped == [entry["step"] for entry in log if "grad_norm" not in entry]
        assert skipped == [1, 5, 9]
        assert [entry["learning_rate"] for entry in log[:3]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
        probes = {event["checkpoint"]: event["probe_loss"] for event in events if event["event"] == "saved"}
        assert probes["checkpoint-4"] > probes["checkpoint-6"] > probes["checkpoint-8"] == probes["checkpoint-9"]
    for first, second in zip(*logs, strict=True):
        assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize("scale, skips", [(None, False), (2.0, True), (1.0, False)])
def test_gradients_that_are_not_finite_without_a_scale_end_a_run(scale, skips):
    from types import SimpleNamespace

    from llama_lite.training.trainer import VerifiedTraining

    scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(scaler=scaler))
    assert VerifiedTraining._skips_overflow(trainer) is skips


def test_a_checkpoint_holds_no_path_of_this_machine_and_no_pickle_of_arguments(whole_run, settings):
    words = [str(whole_run).encode(), settings["prepared_dir"].encode(), b".staging"]
    names = [path.name for path in (whole_run / "checkpoint-12").iterdir()]
    assert "training_args.bin" not in names and "optimizer.pt" not in names
    for path in (whole_run / "checkpoint-12").iterdir():
        content = path.read_bytes()
        assert not any(word in content for word in words), path.name


def test_finished_folder_is_a_whole_model(whole_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(whole_run), AutoTokenizer.from_pretrained(whole_run)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer) == 512
    ids = tokenizer("Returns the", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert (whole_run / "figures" / "training.png").stat().st_size > 10_000


def test_log_tells_what_a_reader_wants(whole_run):
    log = read_jsonl(whole_run / "log.jsonl")
    trained = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in trained] == [3, 6, 9, 12]
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "tokens_per_second",
        "mfu",
        "peak_memory_gib",
        "epoch",
    } <= trained[0].keys()
    held = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in held] == [6, 12] and held[-1]["eval_loss"] < held[0]["eval_loss"] < math.log(512)
    assert held[0]["eval_perplexity"] == pytest.approx(math.exp(held[0]["eval_loss"]))
    assert next(entry["samples"] for entry in log if "samples" in entry)[0].startswith("The")
    record = read_json(whole_run / "run.json")
    assert record["identity"]["data"]["tokens_per_step"] == 1024 and record["plan"]["accumulation"] == 2


def test_bits_per_byte_counts_the_bytes_of_the_text(whole_run, settings):
    from transformers import AutoTokenizer

    folder = Path(settings["prepared_dir"])
    held = np.load(folder / "validation-00000.npy")
    text = AutoTokenizer.from_pretrained(folder / "tokenizer").decode(held, skip_special_tokens=True)
    entry = [entry for entry in read_jsonl(whole_run / "log.jsonl") if "eval_loss" in entry][-1]
    assert entry["eval_bits_per_byte"] == pytest.approx(
        entry["eval_loss"] / math.log(2) * len(held) / len(text.encode()), rel=2e-3
    )


def test_going_back_to_an_older_checkpoint_sets_the_newer_aside(pretrain, whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    pretrain(run, resume_from_checkpoint=str(run / "checkpoint-10"))
    assert (run / "checkpoint-12.superseded").is_dir()
    assert log_of(run) == log_of(whole_run)
    assert same_tensors(run / "checkpoint-12" / "model.safetensors", whole_run / "checkpoint-12" / "model.safetensors")


def test_the_same_command_goes_on_from_what_it_saved_since(pretrain, whole_run, tmp_path, monkeypatch, capsys):
    """It begins at the checkpoint that it names once, and leaves a state out once."""
    began = {"resume_from_checkpoint": str(whole_run / "checkpoint-10"), "resume_without": "optimizer"}
    went_on = "has saved checkpoints since this command last started it, and goes on from the newest"
    run = tmp_path / "run"
    interrupt(pretrain, run, 11, monkeypatch, **began)
    assert went_on not in capsys.readouterr().out
    shutil.copytree(run, tmp_path / "other")
    pretrain(run, **began)
    out = capsys.readouterr().out
    assert went_on in out and "start     step 11" in out and "without" not in out
    resumed = [event["checkpoint"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "resumed"]
    assert resumed == ["checkpoint-10", "checkpoint-11"]
    finished = (run / "log.jsonl").read_text()
    pretrain(run, **began)
    assert "is finished" in capsys.readouterr().out and (run / "log.jsonl").read_text() == finished
    with pytest.raises(Refusal, match=r"holds a run already, whose newest checkpoint is at step 11\. Use `auto`"):
        pretrain(tmp_path / "other", **began, logging_steps=1)  # another command


def test_a_run_that_went_back_goes_on_with_the_same_command(pretrain, whole_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    back = {"resume_from_checkpoint": str(run / "checkpoint-10"), "save_total_limit": 4}
    interrupt(pretrain, run, 11, monkeypatch, **back)
    pretrain(run, **back)
    assert not (run / "checkpoint-11.superseded").exists() and log_of(run) == log_of(whole_run)
    pretrain(run, **back, logging_steps=1)  # another command goes back again
    assert (run / "checkpoint-11.superseded").is_dir()


def test_a_stop_file_made_while_the_run_starts_counts(pretrain, tmp_path, capsys):
    file = tmp_path / "run" / "stop"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(Interrupted, match="stop was made before the first step"):
        pretrain(tmp_path / "run", max_steps=1)
    file.touch()
    os.utime(file, (1e9, 1e9))  # of an earlier launch
    pretrain(tmp_path / "run", max_steps=1)
    assert not file.exists()
    file.touch()
    with pytest.raises(Interrupted):  # it had finished, and stays so
        pretrain(tmp_path / "run", max_steps=1)
    assert read_json(tmp_path / "run" / "status.json")["status"] == "finished"
    capsys.readouterr()
    pretrain(tmp_path / "run", max_steps=1)
    assert "is finished (1 steps): nothing to do" in capsys.readouterr().out


def test_tasks_watched_while_training_disturb_nothing(pretrain, whole_run, tmp_path, monkeypatch):
    """The weights are those of the run that watches none, and a stopped run that watches ends as one that was not
    stopped.
    """
    watched = {"eval_tasks": ["embedded_next_sentence", "embedded_docs"], "eval_task_limit": 5}
    whole = pretrain(tmp_path / "whole", **watched)
    assert same_tensors(whole / "checkpoint-12/model.safetensors", whole_run / "checkpoint-12/model.safetensors")
    found = [entry for entry in log_of(whole) if "eval_embedded_next_sentence_acc_norm" in entry]
    assert [entry["step"] for entry in found] == [6, 12] and all(
        1 < entry["eval_embedded_docs_bits_per_byte"] < 10 for entry in found
    )
    interrupt(pretrain, tmp_path / "run", 7, monkeypatch, **watched)
    run = pretrain(tmp_path / "run", **watched)
    assert log_of(run) == log_of(whole) and same_tensors(
        run / "checkpoint-12/optimizer.safetensors", whole / "checkpoint-12/optimizer.safetensors"
    )
    with pytest.raises(Refusal, match="no such task"):
        pretrain(tmp_path / "other", eval_tasks=["helaswag"])


def test_a_run_that_lies_in_its_own_text_goes_on(pretrain, text, tmp_path, capsys):
    """Its folder, its tokens and its curated text are no text."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "text.jsonl").write_bytes(text.read_bytes())
    places = {
        "dataset": str(folder),
        "prepared_dir": str(folder / "data" / "tokens"),
        "curated_dir": str(folder / "data" / "curated"),
    }
    changes = {**places, "min_characters": 10, "eval_strategy": "no", "sample_tokens": 0}
    run = pretrain(folder / "runs" / "one", **changes, max_steps=2)
    capsys.readouterr()
    pretrain(run, "--allow_changes", "max_steps", **changes, max_steps=3)
    told = capsys.readouterr().out
    assert "start     step 2" in told and read_json(run / "status.json") == {
        "status": "finished",
        "code": 0,
        "step": 3,
        "reason": "",
    }
    assert sources.resolve(str(folder)).record["not_read"]["why"].count("what this project writes") == 3


def test_deterministic_algorithms_are_on_in_the_run_recorded_and_off_after_it(pretrain, tmp_path, monkeypatch):
    from transformers import Trainer

    from model_card.card import write_card_or_reason

    found, step = [], Trainer.training_step

    def spied(self, *args, **kwargs):
        found.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step(self, *args, **kwargs)

    before = dict(os.environ)
    monkeypatch.setattr(Trainer, "training_step", spied)
    run = pretrain(tmp_path / "run", "--deterministic", **QUICK | {"max_steps": 1})
    assert set(found) == {(True, ":4096:8")} and not torch.are_deterministic_algorithms_enabled()
    assert dict(os.environ) == before
    record = read_json(run / "run.json")
    assert record["identity"]["environment"]["switches"]["deterministic"] is True
    same = "| resumed runs equal uninterrupted ones | {} |"
    for hardware, switch, said in (
        ({}, False, "bit for bit"),
        ({"cuda": "13.0"}, True, "bit for bit"),
        ({"cuda": "13.0"}, False, "within rounding (no --deterministic)"),
        ({"accelerator": "mps"}, True, "within rounding (on mps)"),
    ):
        record["hardware"] = {"device": "a device", **hardware}
        record["identity"]["environment"]["switches"] = {"deterministic": True} if switch else {}
        write_json(run / "run.json", record)
        write_card_or_reason(run)
        assert same.format(said) in (run / "README.md").read_text()


def test_another_run_begins_with_the_values_of_a_run(pretrain, whole_run, tmp_path, handlers):
    """`--config RUN`: the same run again where nothing else is given; with another rate, that alone is another."""
    from run_pretrain import main

    main(["--config", str(whole_run), "--output_dir", str(tmp_path / "again")])
    assert log_of(tmp_path / "again") == log_of(whole_run)
    assert same_tensors(
        tmp_path / "again/checkpoint-12/model.safetensors", whole_run / "checkpoint-12/model.safetensors"
    )
    main(["--config", str(whole_run), "--output_dir", str(tmp_path / "other"), "--learning_rate", "2e-3"])
    then, now = (read_json(run / "run.json")["identity"] for run in (whole_run, tmp_path / "other"))
    changed = differences(then, now)
    assert changed.pop("hyperparameters") == {"learning_rate": (1e-3, 2e-3)} and not any(changed.values())


def test_what_is_refused_changes_nothing_in_the_history_of_a_run(pretrain, whole_run, tmp_path, monkeypatch, capsys):
    """Weights that do not fit the new model were refused after the records of the finished run were those of another:
    its card told steps, rate and data that it never had.
    """
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    told = ("events.jsonl", "status.json", ".lock")

    def history() -> dict:
        events = [event for event in read_jsonl(run / "events.jsonl") if event["event"] != "refused"]
        files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name not in told}
        return {"events": events, **files}

    before = history()
    names = "max_steps,model.hidden_size,model.intermediate_size,model.num_attention_heads,model.num_key_value_heads"
    wider = {"model_config": "2x64", "max_steps": 14}
    for allowed in ("", names + ",model.num_hidden_layers,model.head_dim,model.initializer_range"):
        with pytest.raises(Refusal, match="do not match the model") as refused:
            pretrain(run, "--allow_changes", allowed, **wider)
        assert "the new ones cannot be applied to this run: the weights of checkpoint-12" in str(refused.value)
        assert "--allow_changes" not in str(refused.value) and history() == before
    with monkeypatch.context() as patch:  # later, when the weights are loaded
        patch.setattr(
            trainer.VerifiedTraining, "check_probe", lambda self: (_ for _ in ()).throw(Refusal("another loss"))
        )
        with pytest.raises(Refusal, match="another loss"):
            pretrain(run, "--allow_changes", "max_steps,learning_rate", max_steps=14, learning_rate=5e-4)
    assert history()["events"] == before["events"]
    capsys.readouterr()
    pretrain(run, "--allow_changes", "max_steps", max_steps=14)
    changed = [event["fields"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "changed"]
    assert changed == [{"max_steps": [12, 14]}]
    told = re.search(
        r"WARNING   a rate that rises .*: step 13 has (\S+), and had 1\.00e-04 before", capsys.readouterr().out
    )
    assert told and float(told[1]) > 1.2e-4
