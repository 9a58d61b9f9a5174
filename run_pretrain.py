"""Pretrain a LLaMA on real text with transformers.Trainer, and resume it bit for bit.

    accelerate launch run_pretrain.py                                        # the demo
    accelerate launch run_pretrain.py --config configs/pretrain/paper.yaml   # the paper's run

Stop it at any moment and run the same command again.
"""

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
from pathlib import Path

from llama_lite.config.arguments import answer_early
from llama_lite.distributed import print_main, run_on_main
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import read_json, write_json
from llama_lite.run_folder import RunFolder


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    answer_early("run_pretrain.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.pretrain import parse_pretrain

    groups = model_args, data_args, curation_args, hub_args, run_args, training_args = parse_pretrain(argv)
    rules = dataclasses.asdict(curation_args)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.logging import disable_progress_bar

    from llama_lite.checkpoint import identity as checkpoint_identity
    from llama_lite.config.fields import switches
    from llama_lite.data.dataset import TokenWindows, collate
    from llama_lite.data.preparation import Text, prepare
    from llama_lite.data.shards import describe, verify_prepared
    from llama_lite.data.tokenizer import check_stock, load_tokenizer, tokenizer_record, tokenizer_to_be
    from llama_lite.folder_kinds import check_apart, check_folder
    from llama_lite.hub import download, publish_queue
    from llama_lite.hub import export as hub_export
    from llama_lite.hub.client import reference
    from llama_lite.hub.repository import Repository
    from llama_lite.kernels import block_attention
    from llama_lite.kernels.compile import compile_layers
    from llama_lite.kernels.switches import apply_kernels
    from llama_lite.machine import precision
    from llama_lite.machine.hardware import configure_cpu, peak_flops
    from llama_lite.machine.parallelism import check_launch, layout, layout_of, use_one_gpu
    from llama_lite.models import loading
    from llama_lite.models.presets import context_of, model_config_of
    from llama_lite.processes import StopSignals
    from llama_lite.provenance import code_revision, hardware, package_versions, provenance
    from llama_lite.training import derive_pretrain, resume
    from llama_lite.training.callbacks.health import Health, SpikeDetector
    from llama_lite.training.callbacks.progress import Progress
    from llama_lite.training.callbacks.samples import Samples, beginnings, check_prompts
    from llama_lite.training.callbacks.task_scores import TaskScores
    from llama_lite.training.decisions import lines, set_values
    from llama_lite.training.memory import forecast
    from llama_lite.training.plan import check_publish_steps, make_plan
    from llama_lite.training.preflight import check_folders, check_packages, check_token
    from llama_lite.training.suggest import write_suggestion
    from llama_lite.training.trainer import PretrainTrainer, finish_or_raise

    check_launch(training_args)
    idle_gpus = use_one_gpu(training_args, "run_pretrain.py")
    publishes, training_args.push_to_hub = training_args.push_to_hub, False  # Trainer would push on its own
    check_packages(training_args)
    check_token(publishes)
    launched = layout()
    planned = layout_of(run_args.plan_launch) if run_args.plan_launch else launched
    disable_progress_bar()
    configure_cpu(training_args.device, run_args.cpu_threads, run_args.keep_memory)
    training_args.output_dir = (
        derive_pretrain.output_dir(data_args.dataset)
        if "output_dir" not in run_args.given
        else training_args.output_dir
    )
    folders = {"prepared_dir": data_args.prepared_dir, "curated_dir": data_args.curated_dir}
    run_on_main(
        check_folders, folders if data_args.prepare_only else {**folders, "output_dir": training_args.output_dir}
    )
    run_on_main(check_folder, "prepared_dir", data_args.prepared_dir, "prepared")
    if not data_args.prepare_only:
        run_on_main(check_folder, "output_dir", training_args.output_dir, "pretrain")
        check_apart(training_args.output_dir, folders)
    text, claimed, memory_lines = Text(data_args), set(run_args.given), {}
    tokens_hub = reference(data_args.prepared_hub_id) if data_args.prepared_hub_id else None
    publish_bytes = getattr(torch, model_args.publish_dtype).itemsize

    @functools.cache
    def derivation():
        repo = training_args.hub_model_id if publishes else None
        recorded = resume.going_on(run_args, training_args, repo, derive_pretrain.RECORDED)
        return derive_pretrain.Derivation(groups, text, planned, run_args.given, recorded)

    def settle(only_tokens: bool = False) -> tuple[dict, dict]:
        """Every argument that nobody gave, from the run's record, the text and the machine; returns why, and the tokens
        that there are, or will be.
        """
        values, reasons, tokens = run_on_main(lambda: derivation().settle(only_tokens))
        set_values(groups, values)
        precision.apply(training_args, run_args.precision)
        for line in lines({name: value for name, value in values.items() if memory_lines.get(name) != value}, reasons):
            print_main(f"chosen    {line}")
        memory_lines.update(values)
        return reasons, tokens

    def plan_of(tokens: dict, processes: int | None = None):
        config = model_config_of(model_args.model_config, tokens["tokenizer"]["vocab_size"], run_args.block_size)
        plan = make_plan(config, tokens, run_args, training_args, publish_bytes, processes)
        check_publish_steps(training_args, plan.steps, hub_args.publish_steps)
        return config, plan

    def check_tokenizer(config, tokens: dict) -> None:
        """That others who load the model get its tokenizer. Raises Refusal."""
        found = (
            tokenizer_to_be(data_args.tokenizer)
            if "estimated" in tokens
            else load_tokenizer(f"{data_args.prepared_dir}/tokenizer")
        )
        check_stock(f"--model_config {model_args.model_config}", config, found, begins=not derivation().recorded)

    # ---- Plan without touching anything ----
    if run_args.dry_run or run_args.suggest:
        reasons, tokens = settle()
        if "estimated" not in tokens:  # the tokens are there: what is asked must agree with them
            run_on_main(
                verify_prepared,
                Path(data_args.prepared_dir),
                run_on_main(prepare, data_args, rules, text, claimed),
                "sizes",
            )
        config, plan = plan_of(tokens, planned.processes)
        run_on_main(check_tokenizer, config, tokens)
        fused = run_args.fused_loss and not run_args.plan_launch
        memory_lines, problems = forecast(config, plan, planned, run_args.precision, fused, training_args, run_args)
        print_main("\n".join([describe(tokens), *plan.lines(), *memory_lines]))
        if publishes:
            print_main("\n".join(publishing_lines(plan, hub_args, training_args)))
        for problem in problems:
            print_main(f"WARNING             {problem}")
        if problems and run_args.strict_plan:
            raise Refusal(f"--strict_plan: {' '.join(problems)}")
        if run_args.suggest:
            run_on_main(
                write_suggestion, run_args.suggest, "run_pretrain.py", groups, run_args.given, reasons, plan.lines()
            )
        return

    if data_args.prepare_only:
        StopSignals(lambda: None)
        if tokens_hub and not publishes:
            data_args.prepared_dir = run_on_main(download.pull_prepared, tokens_hub, data_args, rules, claimed)
        _, tokens = settle(only_tokens=True)
        run_on_main(
            check_folders, {"prepared_dir": data_args.prepared_dir}, {"prepared_dir": tokens.get("estimated", 0)}
        )
        print_main(describe(run_on_main(prepare, data_args, rules, text, claimed, True)))
        if publishes:
            run_on_main(
                download.push_prepared,
                Path(data_args.prepared_dir),
                data_args.prepared_hub_id,
                training_args.hub_private_repo,
            )
        return

    def publishers(run, identifier: str) -> list:
        def export(checkpoint, folder):
            hub_export.export_model(checkpoint, folder, model_args.publish_dtype)

        repository = Repository(training_args.hub_model_id, training_args.hub_private_repo, identifier)
        return [
            publish_queue.Publisher(run, repository, export, hub_args.publish_training_state, hub_args.publish_steps)
        ]

    if hub_args.publish_only:
        resume.publish_only(training_args.output_dir, publishers, hub_args.hub_drain_timeout)
        return

    with RunFolder(training_args.output_dir) as run, contextlib.ExitStack() as ends:
        signals = StopSignals(run.stopping)

        # ---- What nobody said; what cannot be right; then text to tokens ----
        if tokens_hub:
            data_args.prepared_dir = run_on_main(download.pull_prepared, tokens_hub, data_args, rules, claimed)
        _, tokens = settle()
        config, plan = plan_of(derive_pretrain.at_most(tokens))
        if "estimated" in tokens:
            run_on_main(check_tokenizer, config, tokens)
        needed = {"prepared_dir": tokens.get("estimated", 0), "output_dir": 2 * plan.checkpoint_bytes}
        run_on_main(
            check_folders, {"prepared_dir": data_args.prepared_dir, "output_dir": training_args.output_dir}, needed
        )
        manifest, folder = run_on_main(prepare, data_args, rules, text, claimed), Path(data_args.prepared_dir)
        run_on_main(verify_prepared, folder, manifest, data_args.verify_data)
        print_main(f"data      {describe(manifest)}")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
        if tokenizer_record(tokenizer) != manifest["tokenizer"]:
            raise Refusal(
                f"{folder}/tokenizer is not the one the tokens were made with. Run the same command with --prepare_only"
                " in a new --prepared_dir."
            )

        # ---- What is this run, and does it go on from somewhere ----
        if "estimated" in tokens:
            settle()  # now that they are counted
        config, plan = plan_of(manifest)
        run_on_main(check_tokenizer, config, manifest)
        check_prompts(
            run_args.sample_prompts if run_args.sample_tokens else [], tokenizer, context_of(config) or math.inf
        )
        forecasted = config, plan, launched, run_args.precision, run_args.fused_loss, training_args, run_args
        if run_args.strict_plan and (problems := run_on_main(forecast, *forecasted)[1]):
            raise Refusal(f"--strict_plan: {' '.join(problems)}")
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        order_seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
        identity = checkpoint_identity.build_identity(
            config.to_dict(),
            {**training_args.to_dict(), "precision": run_args.precision},
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
                    "attention": block_attention.NAME if run_args.block_attention else config._attn_implementation,
                    "fused_loss": run_args.fused_loss,
                    **switches(training_args),
                },
                "code_revision": code_revision(),
            },
        )
        print_main(f"plan      {chr(10).join(plan.lines()).replace(chr(10), chr(10) + '          ')}")
        card = {"license": hub_args.card_license, "language": hub_args.card_language}
        record = {
            "kind": "pretrain",
            "identity": identity,
            "plan": dataclasses.asdict(plan),
            "given": run_args.given,
            "settings": derive_pretrain.settings(groups),
            "card": card,
            **provenance(),
        }
        asked = resume.ResumeOptions(
            training_args.resume_from_checkpoint,
            run_args.resume_without,
            run_args.allow_changes,
            training_args.hub_model_id if publishes else None,
            hub_args.hub_required,
            hub_args.hub_drain_timeout,
        )
        start, opened = resume.prepare_run(
            run, record, plan.steps, asked, lambda identifier: publishers(run, identifier)
        )
        for publisher in opened:
            ends.callback(publisher.stop)
        if start is None:
            return
        run_on_main(write_json, run.path / "data.json", {**manifest, "curation": read_json(folder / "curation.json")})

        # ---- Model and trainer ----
        set_seed(training_args.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        loading.check_language_model(f"--model_config {model_args.model_config}", model)
        for name, why in apply_kernels(model, run_args.fused_loss, run_args.block_attention).items():
            print_main(f"plain     --{name} stays off for this model ({config.model_type}): {why}")
        if run_args.compile_layers:
            compile_layers(model, training_args.device)
        if model_args.init_from and start.checkpoint is None:
            weights = run_on_main(
                resume.init_folder, run, model_args.init_from, config, manifest["tokenizer"]["vocab_size"]
            )
            loading.load_weights(model, weights)
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
        )
        train.restart_order_at(start.data_start * plan.windows_per_step)
        held = TokenWindows(folder, manifest, "validation", run_args.block_size, length=run_args.eval_windows)
        trainer = PretrainTrainer(
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
            peak_flops=(
                peak_flops(run_args.precision, training_args.device)
                if run_args.peak_flops is None
                else run_args.peak_flops
            ),
            bytes_per_token=manifest["splits"]["validation"]["bytes"] / manifest["splits"]["validation"]["tokens"],
        )
        trainer.on_spike = SpikeDetector()
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Progress())
        trainer.add_callback(Health(run))
        if run_args.eval_tasks:
            trainer.add_callback(
                TaskScores(trainer, tokenizer, run_args.eval_tasks, run_args.eval_task_limit, training_args.seed)
            )
        if run_args.sample_tokens and (run_args.sample_prompts or "sample_prompts" not in run_args.given):
            prompts = run_args.sample_prompts or beginnings(held, tokenizer)
            trainer.add_callback(Samples(trainer, tokenizer, prompts, run_args.sample_tokens, training_args.seed))

        # ---- Train, or go on ----
        signals.at_once = False
        if start.step < plan.steps:
            if idle_gpus:
                print_main(f"device    {idle_gpus}")
            run.event(
                "resumed" if start.checkpoint else "started",
                checkpoint=start.checkpoint.name if start.checkpoint else None,
            )
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            finish_or_raise(trainer)
        else:
            loading.load_weights(model, start.checkpoint)

        # ---- Finish: a complete model, and the curves ----
        run_on_main(finish, run, plan.steps, manifest["baselines"], model_args.publish_dtype)
        run_on_main(lambda: [publisher.drain(hub_args.hub_drain_timeout) for publisher in opened])
        print_main("\n".join(what_next(run.path)))


def publishing_lines(plan, hub_args, training_args) -> list[str]:
    """What a run will publish, and what waits already, for --dry_run."""
    from llama_lite.formatting import size
    from llama_lite.hub.publish_queue import is_published, queue_lines
    from llama_lite.training.plan import saved_steps

    saved = saved_steps(training_args, plan.steps)
    revisions = sum(is_published(step, hub_args.publish_steps, step == plan.steps) for step in saved)
    with_state = {"all": revisions, "final": 1, "none": 0}[hub_args.publish_training_state]
    total = revisions * plan.model_bytes + with_state * plan.checkpoint_bytes
    return [
        (
            f"publishes           {revisions} revisions of {training_args.hub_model_id}, {with_state} with training"
            f" state: {size(total)} in all"
        ),
        *queue_lines(Path(training_args.output_dir) / "queue"),
    ]


def finish(run, steps: int, bases: dict, dtype: str) -> None:
    """The finished model at the root of the run folder, its card and figures (rank 0)."""
    from llama_lite.files import read_jsonl
    from llama_lite.hub.export import export_model
    from model_card.card import written

    export_model(run.path / f"checkpoint-{steps}", run.path, dtype)
    run.ends("finished")
    card = written(run.path)
    last = [entry for entry in read_jsonl(run.path / "log.jsonl") if "eval_loss" in entry][-1]
    print_main(
        f"finished  validation loss {last['eval_loss']:.4f} nats a token ({last['eval_bits_per_byte']:.4f} bits a"
        f" byte); baselines: bigram {bases['bigram']:.4f}, unigram {bases['unigram']:.4f}"
    )
    print_main(f"          model {run.path}, its card {card}")
    if last["eval_loss"] > bases["unigram"]:
        print_main(
            "WARNING   that is worse than the counts of single tokens: the run was too short to learn anything. Give it"
            " more --hours, on a quiet machine."
        )


def what_next(folder: Path) -> list[str]:
    """The commands that tune and evaluate what was trained."""
    return [
        f"next      accelerate launch run_sft.py --model_name_or_path {shlex.quote(str(folder))}",
        f"          python run_eval.py --models {shlex.join([str(folder), f'{folder}+{folder}-sft'])} --limit 100",
    ]


if __name__ == "__main__":
    exit_with_status(main)
