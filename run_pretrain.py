"""Pretrain a LLaMA on real text with transformers.Trainer, and resume it bit for bit.

    accelerate launch run_pretrain.py                                        # the demo
    accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml   # the paper's run

Stop it at any moment and run the same command again.
"""

import dataclasses
from pathlib import Path

from llama_lite.arguments import Refusal, parse_pretrain
from llama_lite.runs import RunFolder, cores_for_a_process, exit_with_status, on_main, read_json, say, write_json

OWN_FILES = ("status.json", "events.jsonl", "log.jsonl", "stop")  # what a run that ended before its run.json can leave


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, curation_args, run_args, training_args = parse_pretrain(argv)
    rules = dataclasses.asdict(curation_args)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.logging import disable_progress_bar

    from llama_lite import checkpoints, training
    from llama_lite.callbacks import Health, Progress, Samples, SpikeDetector, StopSignals
    from llama_lite.plan import load_model_config, make_plan
    from llama_lite.provenance import code_revision, hardware, package_versions, provenance
    from llama_lite.tokenizers import tokenizer_record
    from llama_lite.tokens import check_recipe, describe, prepare, verify_prepared, wanted_recipe
    from llama_lite.windows import TokenWindows, collate

    disable_progress_bar()
    torch.set_num_threads(run_args.cpu_threads or cores_for_a_process())
    config = load_model_config(model_args.model_config)
    folder = Path(data_args.prepared_dir)

    # ---- Plan without touching anything ----
    if run_args.dry_run:
        check_recipe(folder, wanted_recipe(data_args, rules))
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            raise Refusal(f"--dry_run counts the tokens in {folder}, which is not prepared yet: run the same command with --prepare_only first.")
        verify_prepared(folder, manifest, "sizes")
        say(describe(manifest))
        say("\n".join(make_plan(config, manifest, run_args, training_args, getattr(torch, model_args.publish_dtype).itemsize).lines()))
        return

    if data_args.prepare_only:
        StopSignals(lambda: None)
        say(describe(on_main(prepare, data_args, rules)))
        return

    with RunFolder(training_args.output_dir) as run:
        signals = StopSignals(run.stopping)

        # ---- Text to tokens ----
        manifest = on_main(prepare, data_args, rules)
        on_main(verify_prepared, folder, manifest, data_args.verify_data)
        say(f"data      {describe(manifest)}")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        if tokenizer_record(tokenizer) != manifest["tokenizer"]:
            raise Refusal(
                f"{folder}/tokenizer is not the one the tokens were made with. Run the same command with --prepare_only in a new --prepared_dir."
            )

        # ---- What is this run, and does it go on from somewhere ----
        plan = make_plan(config, manifest, run_args, training_args, getattr(torch, model_args.publish_dtype).itemsize)
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        precision = "bfloat16" if training_args.bf16 else "float16" if training_args.fp16 else "float32"
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
            {"processes": plan.processes, "micro_batch": plan.micro_batch, "accumulation": plan.accumulation},
            {
                "hardware": hardware(),
                "packages": package_versions(),
                "switches": {"torch_compile": training_args.torch_compile, "attention": config._attn_implementation},
                "code_revision": code_revision(),
            },
        )
        start = on_main(find_start, run, training_args, run_args, identity)
        run.step = start.step
        final = run.path / "config.json"
        if start.step >= plan.steps and final.exists() and (read_json(run.path / "status.json") or {}).get("status") == "finished":
            say(
                f"{run.path} is finished ({plan.steps} steps): nothing to do. Its model is there; raise --max_steps with --allow_changes max_steps to go on."
            )
            run.record_end = False
            return
        if start.checkpoint is None:
            on_main(new_run, run, {"kind": "pretrain", "identity": identity, "plan": dataclasses.asdict(plan), **provenance()})
        for kind in ("hyperparameters", "data", "layout", "environment"):
            if start.changed.get(kind):
                run.event("changed", kind=kind, fields={name: list(values) for name, values in start.changed[kind].items()})
        say(f"plan      {chr(10).join(plan.lines()).replace(chr(10), chr(10) + '          ')}")
        say(f"start     {f'step {start.step}, from {start.checkpoint}' if start.checkpoint else 'step 0, a new run'} in {run.path}")

        # ---- Model and trainer ----
        set_seed(training_args.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if model_args.init_from and start.checkpoint is None:
            training.load_weights(model, Path(model_args.init_from))
            run.event("initialised", weights=Path(model_args.init_from).name)
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
        on_main(finish, run, trainer, tokenizer, folder, manifest, model_args.publish_dtype)


def find_start(run, training_args, run_args, identity):
    """The Start of this run: tidies the folder, verifies, compares identities (rank 0). Raises Refusal."""
    from llama_lite import checkpoints, training
    from llama_lite.arguments import names

    def report(folder, problems=("a run that went back to an older checkpoint",)):
        say(f"SET ASIDE {folder.name}: {'; '.join(problems)}")
        run.event("set aside", checkpoint=folder.name, problems=list(problems))

    record = read_json(run.path / "run.json")
    if record is None and any(path.name not in OWN_FILES and path.name[0] != "." for path in run.path.iterdir()):
        raise Refusal(f"--output_dir {run.path} holds files and is not the folder of a run: choose another one.")
    if record and record.get("kind") != "pretrain":
        raise Refusal(f"--output_dir {run.path} belongs to a run of another kind ({record.get('kind')}): choose another one.")
    checkpoints.tidy(run.path)
    (run.path / "stop").unlink(missing_ok=True)
    without = tuple(names(run_args.resume_without))
    folder = checkpoints.resolve(run.path, training_args.resume_from_checkpoint, without, report)
    start = training.start_from(folder, without)
    if folder is None:
        run.rewind_log([])
        return start
    start.changed = checkpoints.check_changes(start.manifest["identity"], identity, start.step, run_args.allow_changes)
    if start.changed["environment"]:
        say(f"WARNING   another {', '.join(start.changed['environment'])} than when {folder.name} was saved: equal within tolerance, not bit for bit")
    if training_args.resume_from_checkpoint not in ("auto", "must"):
        checkpoints.supersede_newer(run.path, folder, start.step, report)
    run.rewind_log(read_json(folder / "trainer_state.json")["log_history"])
    return start


def new_run(run, record: dict) -> None:
    """`run.json` of a run's first start."""
    write_json(run.path / "run.json", record)


def finish(run, trainer, tokenizer, prepared: Path, manifest: dict, dtype: str) -> None:
    """The finished model at the root of the run folder, and its figures (rank 0)."""
    from llama_lite.publishing import export_model
    from llama_lite.runs import read_jsonl
    from model_card import figures

    export_model(trainer.accelerator.unwrap_model(trainer.model), tokenizer, run.path, dtype)
    log = read_jsonl(run.path / "log.jsonl")
    figures.training_curves(log, manifest["baselines"], run.path / "figures" / "training.png")
    if curated := read_json(prepared / "curation.json"):
        figures.curation(curated, run.path / "figures" / "curation.png")
    last = [entry for entry in log if "eval_loss" in entry][-1]
    bases = manifest["baselines"]
    say(
        f"finished  validation loss {last['eval_loss']:.4f} nats a token ({last['eval_bits_per_byte']:.4f} bits a byte); "
        f"baselines: bigram {bases['bigram']:.4f}, unigram {bases['unigram']:.4f}"
    )
    say(f"          model {run.path}, curves {run.path}/figures, samples and losses {run.path}/log.jsonl")


if __name__ == "__main__":
    exit_with_status(main)
