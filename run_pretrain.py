"""Pretrain a LLaMA on real text with transformers.Trainer, and resume it bit for bit.

    accelerate launch run_pretrain.py                                        # the demo
    accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml   # the paper's run

Stop it at any moment and run the same command again.
"""

import contextlib
import dataclasses
from pathlib import Path

from llama_lite.arguments import Refusal, parse_pretrain
from llama_lite.runs import RunFolder, exit_with_status, on_main, read_json, say, write_json


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, curation_args, hub_args, run_args, training_args = parse_pretrain(argv)
    rules = dataclasses.asdict(curation_args)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.logging import disable_progress_bar

    from llama_lite import block_attention, checkpoints, publishing, pulling, training
    from llama_lite.callbacks import Health, Progress, Samples, SpikeDetector, StopSignals, TaskScores
    from llama_lite.fused_loss import fuse
    from llama_lite.hub import reference
    from llama_lite.launching import check_launch, layout, layout_of
    from llama_lite.memory import forecast
    from llama_lite.plan import assumed_manifest, load_model_config, make_plan
    from llama_lite.provenance import code_revision, hardware, package_versions, provenance
    from llama_lite.speed import compile_layers, settle_cpu
    from llama_lite.starting import Asked, begin, init_folder, publish_only
    from llama_lite.tokenizers import tokenizer_record
    from llama_lite.tokens import check_recipe, describe, prepare, verify_prepared, wanted_recipe
    from llama_lite.windows import TokenWindows, collate

    check_launch(training_args)
    launched = layout()
    disable_progress_bar()
    settle_cpu(training_args, run_args.cpu_threads, run_args.keep_memory)
    config = load_model_config(model_args.model_config)
    folder = Path(data_args.prepared_dir)
    publishes, training_args.push_to_hub = training_args.push_to_hub, False  # Trainer would push on its own

    precision = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
    on_cpu = training_args.device.type == "cpu"
    fused, blocks = run_args.fused_loss and on_cpu, run_args.block_attention and on_cpu
    publish_bytes = getattr(torch, model_args.publish_dtype).itemsize

    # ---- Plan without touching anything ----
    if run_args.dry_run:
        check_recipe(folder, wanted_recipe(data_args, rules))
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            manifest = assumed_manifest(data_args, config)
            say(f"{folder} is not prepared yet: planned with as many tokens as --max_tokens {data_args.max_tokens:,} says")
        else:
            verify_prepared(folder, manifest, "sizes")
            say(describe(manifest))
        planned = layout_of(run_args.plan_launch) if run_args.plan_launch else launched
        plan = make_plan(config, manifest, run_args, training_args, publish_bytes, planned.processes)
        lines, problems = forecast(config, plan, planned, precision, fused and not run_args.plan_launch, training_args, run_args)
        say("\n".join(plan.lines() + lines))
        if publishes:
            say("\n".join(publishing_lines(plan, hub_args, training_args)))
        for problem in problems:
            say(f"WARNING             {problem}")
        if problems and run_args.strict_plan:
            raise Refusal(f"--strict_plan: {' '.join(problems)}")
        return

    tokens_hub = reference(data_args.prepared_hub_id) if data_args.prepared_hub_id else None
    if data_args.prepare_only:
        StopSignals(lambda: None)
        if tokens_hub and not publishes:
            on_main(pulling.pull_prepared, tokens_hub, folder, wanted_recipe(data_args, rules))
        say(describe(on_main(prepare, data_args, rules)))
        if publishes:
            on_main(pulling.push_prepared, folder, data_args.prepared_hub_id, training_args.hub_private_repo)
        return

    def publishers(run, identifier: str) -> list:
        def export(checkpoint, folder):
            publishing.export_model(checkpoint, folder, model_args.publish_dtype)

        repository = publishing.Repository(training_args.hub_model_id, training_args.hub_private_repo, identifier)
        return [publishing.Publisher(run, repository, export, hub_args.publish_training_state, hub_args.publish_steps)]

    if hub_args.publish_only:
        publish_only(training_args.output_dir, publishers, hub_args.hub_drain_timeout)
        return

    with RunFolder(training_args.output_dir) as run, contextlib.ExitStack() as ends:
        signals = StopSignals(run.stopping)

        # ---- Text to tokens ----
        if tokens_hub:
            on_main(pulling.pull_prepared, tokens_hub, folder, wanted_recipe(data_args, rules))
        manifest = on_main(prepare, data_args, rules)
        on_main(verify_prepared, folder, manifest, data_args.verify_data)
        say(f"data      {describe(manifest)}")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        if tokenizer_record(tokenizer) != manifest["tokenizer"]:
            raise Refusal(
                f"{folder}/tokenizer is not the one the tokens were made with. Run the same command with --prepare_only in a new --prepared_dir."
            )

        # ---- What is this run, and does it go on from somewhere ----
        plan = make_plan(config, manifest, run_args, training_args, publish_bytes)
        if run_args.strict_plan and (problems := on_main(forecast, config, plan, launched, precision, fused, training_args, run_args)[1]):
            raise Refusal(f"--strict_plan: {' '.join(problems)}")
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        order_seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
        identity = checkpoints.identity(
            config.to_dict(),
            {**training_args.to_dict(), "precision": precision},
            {
                "data": manifest["fingerprint"],
                "order": run_args.order,
                "data_seed": order_seed,
                "seed": training_args.seed,
                "block_size": run_args.block_size,
                "tokens_per_step": run_args.tokens_per_step,
            },
            {
                "processes": plan.processes,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                "sharding": launched.sharding,
            },
            {
                "hardware": hardware(),
                "packages": package_versions(),
                "switches": {
                    "compile_layers": run_args.compile_layers,
                    "attention": block_attention.NAME if blocks else config._attn_implementation,
                    "fused_loss": fused,
                },
                "code_revision": code_revision(),
            },
        )
        say(f"plan      {chr(10).join(plan.lines()).replace(chr(10), chr(10) + '          ')}")
        card = {"license": hub_args.card_license, "language": hub_args.card_language}
        record = {"kind": "pretrain", "identity": identity, "plan": dataclasses.asdict(plan), "given": run_args.given, "card": card, **provenance()}
        asked = Asked(
            training_args.resume_from_checkpoint,
            run_args.resume_without,
            run_args.allow_changes,
            training_args.hub_model_id if publishes else None,
            hub_args.hub_required,
            hub_args.hub_drain_timeout,
        )
        start, opened = begin(run, record, plan.steps, asked, lambda identifier: publishers(run, identifier))
        for publisher in opened:
            ends.callback(publisher.stop)
        if start is None:
            return
        on_main(write_json, run.path / "data.json", {**manifest, "curation": read_json(folder / "curation.json")})

        # ---- Model and trainer ----
        set_seed(training_args.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if fused:
            fuse(model)
        if blocks:
            block_attention.use_blocks(model)
        if run_args.compile_layers:
            compile_layers(model, training_args.device)
        if model_args.init_from and start.checkpoint is None:
            weights = on_main(init_folder, run, model_args.init_from, config)
            training.load_weights(model, weights)
            run.event("initialised", weights=model_args.init_from if reference(model_args.init_from) else weights.name)
        train = TokenWindows(
            folder,
            manifest,
            "train",
            run_args.block_size,
            run_args.order,
            order_seed,
            plan.epoch_windows,
            plan.steps * plan.windows_per_step,
            start.data_start * plan.windows_per_step,
        )
        held = TokenWindows(folder, manifest, "validation", run_args.block_size, length=run_args.eval_windows)
        trainer = training.PretrainTrainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=held,
            data_collator=collate,
            processing_class=tokenizer,
            run=run,
            identity=identity,
            start=start,
            signals=signals,
            publisher=opened[0] if opened else None,
            probe=[collate([held[i]]) for i in range(run_args.probe_windows)],
            flops_per_token=plan.flops_per_token,
            peak_flops=run_args.peak_flops or training.peak_flops(precision, training_args.device),
            bytes_per_token=manifest["splits"]["validation"]["bytes"] / manifest["splits"]["validation"]["tokens"],
        )
        trainer.on_spike = SpikeDetector()
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Progress())
        trainer.add_callback(Health(run))
        if run_args.eval_tasks:
            trainer.add_callback(TaskScores(trainer, tokenizer, run_args.eval_tasks, run_args.eval_task_limit, training_args.seed))
        if run_args.sample_tokens:
            trainer.add_callback(Samples(trainer, tokenizer, run_args.sample_prompts, run_args.sample_tokens, training_args.seed))

        # ---- Train, or go on ----
        signals.at_once = False
        if start.step < plan.steps:
            run.event("resumed" if start.checkpoint else "started", checkpoint=start.checkpoint.name if start.checkpoint else None)
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            training.finish_or_raise(trainer)
        else:
            training.load_weights(model, start.checkpoint)

        # ---- Finish: a complete model, and the curves ----
        on_main(finish, run, plan.steps, manifest["baselines"], model_args.publish_dtype)
        on_main(lambda: [publisher.drain(hub_args.hub_drain_timeout) for publisher in opened])


def publishing_lines(plan, hub_args, training_args) -> list[str]:
    """What a run will publish, and what waits already, for --dry_run."""
    from llama_lite.plan import size
    from llama_lite.publishing import queue_lines

    every = hub_args.publish_steps or int(training_args.save_steps if training_args.save_steps >= 1 else plan.steps * training_args.save_steps)
    revisions = -(-plan.steps // every)
    with_state = {"all": revisions, "final": 1, "none": 0}[hub_args.publish_training_state]
    total = revisions * plan.model_bytes + with_state * plan.checkpoint_bytes
    return [
        f"publishes           {revisions} revisions of {training_args.hub_model_id}, {with_state} with training state: {size(total)} in all",
        *queue_lines(Path(training_args.output_dir) / "queue"),
    ]


def finish(run, steps: int, bases: dict, dtype: str) -> None:
    """The finished model at the root of the run folder, its card and figures (rank 0)."""
    from llama_lite.publishing import export_model
    from llama_lite.runs import read_jsonl
    from model_card.card import written

    export_model(run.path / f"checkpoint-{steps}", run.path, dtype)
    run.ends("finished")
    card = written(run.path)
    last = [entry for entry in read_jsonl(run.path / "log.jsonl") if "eval_loss" in entry][-1]
    say(
        f"finished  validation loss {last['eval_loss']:.4f} nats a token ({last['eval_bits_per_byte']:.4f} bits a byte); "
        f"baselines: bigram {bases['bigram']:.4f}, unigram {bases['unigram']:.4f}"
    )
    say(f"          model {run.path}, its card {card}")


if __name__ == "__main__":
    exit_with_status(main)
