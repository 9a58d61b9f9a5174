"""Pretrain a LLaMA on real text with transformers.Trainer, and resume it bit for bit.

    accelerate launch run_pretrain.py                                        # the demo
    accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml   # the paper's run

Stop it at any moment and run the same command again.
"""

import dataclasses
import functools
import math
import shlex
from pathlib import Path

from llama_lite.config.arguments import answer_early
from llama_lite.distributed import LAUNCH_COMMAND, print_main, run_on_main
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import write_json


def main(argv: list[str] | None = None) -> None:
    argv = answer_early("run_pretrain.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.pretrain import parse_pretrain

    groups = model_args, data_args, curation_args, hub_args, run_args, training_args = parse_pretrain(argv)
    if run_args.audit:
        return audit_run(run_args, training_args)

    from transformers import set_seed  # the heavy imports come after parsing: --help and refusals answer at once

    from llama_lite.data.dataset import collate
    from llama_lite.data.given_text import Text
    from llama_lite.hub.export import export_model
    from llama_lite.machine.hardware import peak_flops
    from llama_lite.machine.parallelism import layout, layout_of
    from llama_lite.models.loading import load_weights
    from llama_lite.training import derive_pretrain, dry_run, initial_weights, run_tokens
    from llama_lite.training.removal import RemovalOfRun
    from llama_lite.training.session import Session
    from llama_lite.training.trainer import PretrainTrainer
    from llama_lite.training.validation import probe_windows, validation_sets
    from llama_lite.training.values import Values, plan_of

    # ---- How this process is launched, and the folders of the run ----
    session = Session("pretrain", hub_args, run_args, training_args)
    session.catch_signals()
    planned = layout_of(run_args.plan_launch) if run_args.plan_launch else layout()
    check_switches(groups, planned)
    session.choose_folder(derive_pretrain.output_dir(data_args.dataset, data_args.mixture))
    run_tokens.recall_mixture(session, data_args, run_args)
    run_tokens.check_paths(data_args, training_args.output_dir)
    session.export_to = functools.partial(export_model, dtype=model_args.publish_dtype)
    rules = dataclasses.asdict(curation_args)
    values = Values(session, groups, Text(data_args, training_args.output_dir), planned)

    # ---- Commands that train nothing ----
    if run_args.dry_run or run_args.suggest:
        return dry_run.show_plan(session, groups, rules, values)
    if data_args.prepare_only:
        return run_tokens.prepare_only(session, data_args, rules, values)
    if hub_args.publish_only:
        return session.publish_only()

    with session:
        # ---- Derive missing arguments, check all of them, prepare the tokens ----
        tokens, tokenizer = run_tokens.prepare_text(groups, rules, values)
        manifest = tokens.record()

        # ---- The identity of the run, and the checkpoint it resumes from ----
        config, plan = plan_of(groups, manifest)
        check_run(groups, values, config, plan, manifest, tokenizer)
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        removal = RemovalOfRun(session, run_args, tokens.by_fingerprint)
        version = run_on_main(session.order_version)
        identity = session.identity(
            plan,
            config=config.to_dict(),
            data={
                **tokens.identity(),
                "order": run_args.order,
                **({"order_version": version} if version > 1 else {}),
                "block_size": run_args.block_size,
                "tokens_per_step": run_args.tokens_per_step,
                **removal.identity(),
            },
            switches=switches(config, run_args),
        )
        values.print_chosen()
        print_main(f"plan      {chr(10).join(plan.lines()).replace(chr(10), chr(10) + '          ')}")
        initial = initial_weights.InitialWeights(session.run, model_args.init_from, config, tokenizer)
        start = session.begin(identity, plan, derive_pretrain.settings(groups), initial.find)
        if start is None:
            return
        run_on_main(write_json, session.run.path / "data.json", run_tokens.data_record(tokens))

        # ---- Model and trainer ----
        set_seed(training_args.seed)
        model = build_model(config, model_args.model_config, run_args, training_args.device)
        if start.checkpoint is None:
            initial.load(model)
        train, sources, reads = run_tokens.training_data(groups, tokens, removal, identity.data, plan, start)
        held_out = validation_sets(tokens, run_args)
        trainer = PretrainTrainer(
            model=model,
            train_dataset=train,
            eval_dataset=held_out[0].windows,
            data_collator=collate,
            processing_class=tokenizer,
            probe=[collate([window]) for window in probe_windows(held_out, run_args.probe_windows)],
            flops_per_token=plan.flops_per_token,
            peak_flops=run_args.peak_flops or peak_flops(run_args.precision, training_args.device),
            validation=held_out,
            sources=sources,
            document_reads=reads,
            shard_checkpoints=run_args.shard_checkpoints,
            rerun=record_for_audits(groups, tokens),
            **session.trainer_arguments(),
        )
        session.add_callbacks(trainer)
        add_evaluations(trainer, tokenizer, held_out[0].windows, run_args)

        # ---- Train or resume; then export the model, the card and the figures ----
        if not session.train(trainer, plan.steps):
            load_weights(model, start.checkpoint)
        run_on_main(finish, session.run, plan.steps, manifest, model_args.publish_dtype)
        session.publish_rest(plan.steps)
        print_main("\n".join(what_next(session.run.path, tokenizer, config)))


# ---- before training ----


def check_switches(groups, planned) -> None:
    """Raise Refusal for switches that the planned Layout, or transformers, does not have, where it trains."""
    from llama_lite.kernels.attention import check_name
    from llama_lite.machine.parallelism import check_shard_checkpoints

    _, data_args, _, hub_args, run_args, _ = groups
    if not (data_args.prepare_only or hub_args.publish_only):
        check_shard_checkpoints(run_args.shard_checkpoints, planned)
        check_name(run_args.attention)


def check_run(groups, values, config, plan, manifest: dict, tokenizer) -> None:
    """Raise Refusal for a tokenizer, prompts, or with --strict_plan a size, that this run cannot have. What the
    launcher leaves to the plan is decided.
    """
    from llama_lite.kernels.probe import context_of
    from llama_lite.machine.parallelism import layout
    from llama_lite.training.callbacks.samples import check_prompts
    from llama_lite.training.memory import forecast, settle_resharding
    from llama_lite.training.run_tokens import check_tokenizer

    run_args, training_args = groups[-2:]
    run_on_main(check_tokenizer, groups, values, config, manifest)
    prompts = run_args.sample_prompts if run_args.sample_tokens else []
    check_prompts(prompts, tokenizer, context_of(config) or math.inf)
    forecasted = config, plan, layout(), run_args.precision, run_args.fused_loss, training_args, run_args
    if run_args.strict_plan and (problems := run_on_main(forecast, *forecasted)[1]):
        raise Refusal(f"--strict_plan: {' '.join(problems)}")
    if chosen := settle_resharding(config, plan, training_args, run_args):
        values.waiting.append(chosen)


def switches(config, run_args) -> dict:
    """How the run computes, of its identity."""
    from llama_lite.kernels import block_attention

    named = run_args.attention or config._attn_implementation
    return {
        "compile_layers": run_args.compile_layers,
        "attention": block_attention.NAME if run_args.block_attention else named,
        "fused_loss": run_args.fused_loss,
    }


def build_model(config, name: str, run_args, device):
    """A model of random weights in float32, with the kernels that fit it. name: what --model_config said."""
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lite.checkpoint import parts
    from llama_lite.kernels.attention import set_attention
    from llama_lite.kernels.compile import compile_layers
    from llama_lite.kernels.switches import apply_kernels
    from llama_lite.models import loading

    with torch.device(device if device.type == "cuda" else "cpu"):  # weights are drawn where they are trained
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    loading.check_language_model(f"--model_config {name}", model)
    if run_args.shard_checkpoints:
        parts.check_writable(model, f"--model_config {name}")
    for kernel, why in apply_kernels(model, run_args.fused_loss, run_args.block_attention).items():
        print_main(f"plain     --{kernel} stays off for this model ({config.model_type}): {why}")
    if run_args.attention:  # after the others were tried in float32, which flash kernels do not compute
        set_attention(model, run_args.attention, run_args.precision)
    if run_args.compile_layers:
        compile_layers(model, device)
    return model


def add_evaluations(trainer, tokenizer, held_out, run_args) -> None:
    """The task scores and the samples of each evaluation."""
    from llama_lite.training.callbacks.samples import Samples, beginnings, first_samples
    from llama_lite.training.callbacks.task_scores import TaskScores

    seed = trainer.args.seed
    if run_args.eval_tasks:
        trainer.add_callback(TaskScores(trainer, tokenizer, run_args.eval_tasks, run_args.eval_task_limit, seed))
    if run_args.sample_tokens and (run_args.sample_prompts or "sample_prompts" not in run_args.explicit_args):
        written = run_on_main(first_samples, Path(trainer.args.output_dir))
        prompts = run_args.sample_prompts or beginnings(held_out, tokenizer, written)
        trainer.add_callback(Samples(trainer, tokenizer, prompts, run_args.sample_tokens, seed))


# ---- audits ----


def audit_run(run_args, training_args) -> None:
    """--audit: steps of a published run, made again by this script."""
    from llama_lite.training.audit.audit import audit

    audit(run_args, training_args, main)


def record_for_audits(groups, tokens) -> dict:
    """What each checkpoint records so that others can make the next steps again. tokens: PreparedTokens."""
    from llama_lite.training.audit.record import rerun_record

    return rerun_record(groups, [part.folder for part in (*tokens.folders, *tokens.validation)])


# ---- after training ----


def finish(run, steps: int, manifest: dict, dtype: str) -> None:
    """The finished model at the root of the run folder, its card and figures (rank 0). manifest: of the tokens."""
    from llama_lite.files import read_json, read_jsonl
    from llama_lite.hub.export import export_model
    from llama_lite.training import lowest_loss
    from model_card.card import write_card_or_reason
    from model_card.report.page import write_report_or_reason
    from model_card.sources import windows_counted, windows_measured

    export_model(run.path / f"checkpoint-{steps}", run.path, dtype)
    run.ends("finished")
    card, page = write_card_or_reason(run.path), write_report_or_reason(run.path)
    bases, counted = manifest["baselines"], ""
    measured = [
        entry for entry in read_jsonl(run.path / "log.jsonl") if "eval_loss" in entry and entry["step"] == steps
    ]
    result = "its last evaluation failed"
    if measured:
        last = measured[-1]
        result = (
            f"validation loss {last['eval_loss']:.4f} nats per token ({last['eval_bits_per_byte']:.4f} bits per byte)"
        )
        if of := windows_measured(read_json(run.path / "run.json"), manifest):
            result, counted = f"{result} on {of}", f" on {windows_counted(manifest)}"
    print_main(f"finished  {result}; baselines{counted}: bigram {bases['bigram']:.4f}, unigram {bases['unigram']:.4f}")
    parts = {part["name"]: part.get("baselines") for part in manifest.get("mixture", [])}
    for name, own in {**parts, **dict.fromkeys(manifest.get("validation_sets", {}))}.items():
        if measured and f"eval_{name}_loss" in last:
            counts = f"; baselines: bigram {own['bigram']:.4f}, unigram {own['unigram']:.4f}" if own else ""
            bits = last[f"eval_{name}_bits_per_byte"]
            print_main(f"          {name} {last[f'eval_{name}_loss']:.4f} ({bits:.4f} bits per byte){counts}")
    print_main(f"          model {run.path}, its card {card}")
    print_main(f"          curves and samples: {page}")
    for line in lowest_loss.warnings(run.path):
        print_main(line)
    if measured and last["eval_loss"] > bases["unigram"]:
        print_main(
            "WARNING   that is worse than the counts of single tokens: the run was too short to learn anything. Give it"
            " more steps, or more --hours on a quiet machine."
        )
    elif measured and last["eval_loss"] > bases["bigram"]:
        print_main("          that is worse than the counts of pairs of tokens (bigram): the run or its text was short")


def what_next(folder: Path, tokenizer, config) -> list[str]:
    """The commands that tune and evaluate what was trained, or why it cannot be tuned. config: of the model."""
    from llama_lite.chat_format.template import least_context
    from llama_lite.kernels.probe import context_of
    from llama_lite.training import tuning_folder

    context, least = context_of(config) or math.inf, least_context(tokenizer)
    if context < least:
        return [
            f"next      python run_eval.py --models {shlex.quote(str(folder))} --limit 100",
            f"          run_sft.py needs a longer context: a short question and its answer take {least:,} tokens in the"
            f" chat format, and this model has {context:,}. Train on more text, or with --block_size 256.",
        ]
    tuned = tuning_folder.output_dir(str(folder))
    return [
        f"next      {LAUNCH_COMMAND} run_sft.py --model_name_or_path {shlex.quote(str(folder))}",
        f"          python run_eval.py --models {shlex.join([str(folder), f'{folder}+{tuned}'])} --limit 100",
        "          (run_sft.py reads questions about installed packages; --dataset rows.jsonl: rows of your own)",
    ]


if __name__ == "__main__":
    exit_with_status(main)
