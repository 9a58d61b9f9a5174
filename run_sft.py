"""Tune a model on instructions with TRL's SFTTrainer and LoRA, and resume it bit for bit.

    accelerate launch run_sft.py                                            # on the demo's own model
    accelerate launch run_sft.py --config configs/sft/paper.yaml --model_name_or_path you/name --model_revision step-040000

Stop it at any moment and run the same command again.
"""

import contextlib
import dataclasses
import math
import shlex
import sys
import warnings
from pathlib import Path

from llama_lite.config.arguments import answer_early
from llama_lite.distributed import print_main, run_on_main
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import read_json
from llama_lite.run_folder import RunFolder

FEW_STEPS = 10  # of a run that is said to have been too short


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    answer_early("run_sft.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.sft import parse_sft

    groups = base_args, adapter_args, row_args, hub_args, run_args, training_args = parse_sft(argv)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    import torch
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from transformers.utils.logging import disable_progress_bar

    from llama_lite.chat_format import instruction_rows, packing, template
    from llama_lite.checkpoint import identity as checkpoint_identity
    from llama_lite.config.fields import SFT_HYPERPARAMETERS, switches
    from llama_lite.data import dataset
    from llama_lite.data.formats import skipped_lines
    from llama_lite.data.tokenizer import check_stock, tokenizer_record
    from llama_lite.evaluation import before_after
    from llama_lite.folder_kinds import check_folder
    from llama_lite.hub import publish_queue
    from llama_lite.hub.export import export_adapter, export_model
    from llama_lite.hub.repository import Repository
    from llama_lite.machine import precision
    from llama_lite.machine.hardware import configure_cpu
    from llama_lite.machine.parallelism import check_launch, layout, use_one_gpu
    from llama_lite.models import loading, references
    from llama_lite.models.batches import Batches, batches_of
    from llama_lite.models.presets import context_of
    from llama_lite.processes import StopSignals
    from llama_lite.provenance import code_revision, hardware, package_versions, provenance
    from llama_lite.training import derive_sft, lora, resume, sft_trainer
    from llama_lite.training.callbacks.health import Health, SpikeDetector
    from llama_lite.training.callbacks.progress import Progress
    from llama_lite.training.decisions import lines, set_values
    from llama_lite.training.plan import check_publish_steps, plan_tuning
    from llama_lite.training.preflight import check_folders, check_packages, check_token
    from llama_lite.training.suggest import write_suggestion
    from llama_lite.training.trainer import finish_or_raise

    check_launch(training_args, shards=False)
    idle_gpus = use_one_gpu(training_args, "run_sft.py")
    publishes, training_args.push_to_hub = training_args.push_to_hub, False  # Trainer would push on its own
    check_packages(training_args)
    check_token(publishes)
    disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks in the old way
    configure_cpu(training_args.device, run_args.cpu_threads, run_args.keep_memory)
    if "output_dir" not in run_args.given:
        training_args.output_dir = derive_sft.output_dir(base_args.model_name_or_path)
    check_folders({"output_dir": training_args.output_dir})
    run_on_main(check_folder, "output_dir", training_args.output_dir, "sft")

    # ---- What the record of the run says; the base, and the chat format ----
    repo = training_args.hub_model_id if publishes else None
    recorded = run_on_main(resume.going_on, run_args, training_args, repo, derive_sft.RECORDED)
    values, reasons = run_on_main(derive_sft.machine, groups, run_args.given, recorded)
    set_values(groups, values)
    precision.apply(training_args, run_args.precision)
    base = run_on_main(references.locate, base_args.model_name_or_path, base_args.model_revision)
    tokenizer = loading.load_tokenizer(base, base_args.tokenizer_name)
    own = tokenizer.chat_template
    template.set_chat_template(tokenizer, training_args.chat_template_path)
    if own and training_args.chat_template_path is None and own != tokenizer.chat_template and not recorded:
        named = base_args.tokenizer_name
        whose = f"the own chat template of {named or base.name}"
        print_main(f"format    {template.describe_put_aside(own, whose, Path(named or base.folder))}")
    hub_base = base_on_hub(base, hub_args.base_hub_id)
    if publishes and adapter_args.use_lora and not hub_args.base_hub_id:
        run_on_main(check_named_base, base, hub_base)

    def publishers(run, identifier: str) -> list:
        def repository(name):
            return Repository(name, training_args.hub_private_repo, identifier)

        def merged(checkpoint, folder):
            lora.merge(base, checkpoint, tokenizer, base_args.publish_dtype, folder)

        def whole(checkpoint, folder):
            export_model(checkpoint, folder, base_args.publish_dtype)

        export = export_adapter if adapter_args.use_lora else whole
        opened = [
            publish_queue.Publisher(
                run,
                repository(training_args.hub_model_id),
                export,
                hub_args.publish_training_state,
                hub_args.publish_steps,
            )
        ]
        if adapter_args.merge_adapter:
            opened.append(
                publish_queue.Publisher(
                    run, repository(f"{training_args.hub_model_id}-merged"), merged, "none", sys.maxsize, "-merged"
                )
            )
        return opened

    if hub_args.publish_only:
        resume.publish_only(training_args.output_dir, publishers, hub_args.hub_drain_timeout)
        return

    # ---- Rows to ids ----
    signals = StopSignals(lambda: None)
    rows, source, skipped = run_on_main(
        instruction_rows.load,
        row_args.dataset,
        row_args.dataset_config,
        row_args.dataset_split,
        row_args.dataset_revision,
        row_args.max_rows,
        row_args.prepare_workers,
        row_args.skip_held_out,
    )
    examples = run_on_main(packing.encode, rows, tokenizer, skipped)
    packing.need_rows(examples, examples, 1, skipped)
    config = references.load_config(base)
    if not adapter_args.use_lora or adapter_args.merge_adapter:
        run_on_main(check_stock, base.name, config, tokenizer, False)
    batches = Batches()
    if not row_args.show_example:
        model = loading.load_model(base)
        loading.check_vocabulary(base.name, model.get_input_embeddings().num_embeddings, tokenizer)
        loading.check_language_model(base.name, model)
        if said := loading.align_special_tokens(model, tokenizer):
            print_main(f"base      {base.name}: {said}")
        batches = batches_of(model)
        if not batches.packs:
            training_args.packing = False
            print_main(
                f"plain     rows of {config.model_type} would see each other side by side (its own logits say so): they"
                " are padded, one sequence a row"
            )
    further, why = run_on_main(derive_sft.tuning, groups, run_args.given, values, config, examples)
    set_values(groups, further)
    context = context_of(config)
    if context and training_args.max_length and training_args.max_length > context:
        raise Refusal(
            f"--max_length {training_args.max_length:,} is above the {context:,} positions that {base.name} knows"
            " (max_position_embeddings): lower it, or tune a base with a longer context."
        )
    longest = training_args.max_length or max(len(example.input_ids) for example in examples)
    at_once = training_args.per_device_train_batch_size * longest
    if batches.packs and not batches.fits(at_once):
        batches, training_args.packing = dataclasses.replace(batches, packs=False), False
        print_main(
            f"plain     {at_once:,} tokens side by side are more than the {batches.max_tokens:,} that {config.model_type}"
            " takes in a row: rows are padded, one sequence a row"
        )
        further, why = run_on_main(derive_sft.tuning, groups, run_args.given, values, config, examples)
        set_values(groups, further)
    before_after.check_prompts(run_args.prompts, tokenizer, context or math.inf, run_args.answer_tokens)
    documents = instruction_rows.held_documents(rows, row_args.eval_rows)
    examples = run_on_main(packing.limit, examples, training_args.max_length, row_args.long_rows, skipped)
    train_rows, eval_rows = (
        [example for example in examples if (example.row.document in documents) == out] for out in (False, True)
    )
    derive_sft.fit(groups, run_args.given, len(eval_rows))
    least = max(run_args.probe_rows, run_args.compared_prompts, run_args.sampled_answers)
    packing.need_rows(train_rows, eval_rows, least, skipped, len({row.document for row in rows}))
    for line in (*skipped_lines(skipped), *instruction_rows.unread_lines(source)):
        print_main(f"rows      {line}")
    if row_args.show_example:
        print_main(packing.show(tokenizer, eval_rows[0], sys.stdout.isatty()))
        return
    for line in lines({**values, **further}, {**reasons, **why}):
        print_main(f"chosen    {line}")
    packed = packing.pack(train_rows, training_args.max_length, training_args.packing)
    set_seed(training_args.seed)
    if adapter_args.use_lora:
        model = lora.add_adapter(model, adapter_args, *(hub_base or (base.name, None)))
    plan = plan_tuning(model, train_rows, eval_rows, len(packed), run_args, training_args)
    check_publish_steps(training_args, plan.steps, hub_args.publish_steps)
    print_main(
        "\n".join(plan.lines())
        if run_args.dry_run
        else f"plan      {chr(10).join(plan.lines()).replace(chr(10), chr(10) + '          ')}"
    )
    if run_args.suggest:
        run_on_main(
            write_suggestion, run_args.suggest, "run_sft.py", groups, run_args.given, {**reasons, **why}, plan.lines()
        )
    if run_args.dry_run or run_args.suggest:
        return

    with RunFolder(training_args.output_dir) as run, contextlib.ExitStack() as ends:
        signals.on_stop = run.stopping

        # ---- What is this run, and does it go on from somewhere ----
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        base_record = references.base_record(base, *(hub_base or (None, None)))
        order_seed = training_args.data_seed if training_args.data_seed is not None else training_args.seed
        identity = checkpoint_identity.build_identity(
            {**model.config.to_dict(), "base": base_record["sha256"], "adapter": lora.lora_record(adapter_args)},
            {**training_args.to_dict(), "precision": run_args.precision},
            {
                "data": packing.fingerprint(train_rows),
                "held_out": packing.fingerprint(eval_rows),
                "tokenizer": tokenizer_record(tokenizer)["sha256"],
                "data_seed": order_seed,
                "seed": training_args.seed,
                "packing": training_args.packing,
                "max_length": training_args.max_length,
                "sequences_per_step": run_args.sequences_per_step,
            },
            {
                "processes": plan.processes,
                "micro_batch": plan.micro_batch,
                "accumulation": plan.accumulation,
                "sharding": layout().sharding,
            },
            {
                "hardware": hardware(),
                "packages": package_versions(),
                "switches": {"attention": model.config._attn_implementation, **switches(training_args)},
                "code_revision": code_revision(),
            },
            SFT_HYPERPARAMETERS,
        )
        record = {
            "kind": "sft",
            "identity": identity,
            "plan": dataclasses.asdict(plan),
            "source": source,
            "skipped": skipped,
            "given": run_args.given,
            "settings": derive_sft.settings(groups),
            "card": {"license": hub_args.card_license, "language": hub_args.card_language},
            "base": base_record | {"name": base.name if base.repo else base.folder.name, "commit": base.commit},
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

        # ---- Trainer; what the base does with the held-out rows is measured before the first step ----
        model.to(training_args.device)
        before = read_json(start.checkpoint / before_after.BEFORE) if start.checkpoint else None
        answer_settings = before_after.AnswerSettings(
            run_args.prompts,
            run_args.compared_prompts,
            run_args.sampled_answers,
            run_args.answer_tokens,
            training_args.seed,
        )
        measured = (tokenizer, eval_rows, answer_settings, batches)
        before = before or run_on_main(before_after.measure_before, model, *measured)
        order = dataset.row_order(len(packed), plan.steps, run_args.sequences_per_step, order_seed, start.data_start)
        training_args.padding_free = batches.packs
        training_args.packing, training_args.max_length = False, None  # done already; what comes is laid side by side
        trainer = sft_trainer.TuningTrainer(
            model=model,
            args=training_args,
            train_dataset=packed.select(order),
            eval_dataset=packing.pack(eval_rows, 0, packing=False),
            processing_class=tokenizer,
            run=run,
            identity=identity,
            start=start,
            signals=signals,
            publisher=opened[0] if opened else None,
            probe=[
                {name: torch.tensor([getattr(row, name)]) for name in ("input_ids", "labels")}
                for row in eval_rows[: run_args.probe_rows]
            ],
            held=eval_rows,
            before=before,
            base=base_record,
            batches=batches,
        )
        trainer.on_spike = SpikeDetector()
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Progress())
        trainer.add_callback(Health(run))

        # ---- Train, or go on ----
        signals.at_once = False
        if start.step < plan.steps:
            if idle_gpus:
                print_main(f"device    {idle_gpus}")
            run.event(
                "resumed" if start.checkpoint else "started",
                checkpoint=start.checkpoint.name if start.checkpoint else None,
                data_start=start.data_start,
            )
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
            finish_or_raise(trainer)
        else:
            trainer._load_from_checkpoint(start.checkpoint)

        # ---- Finish: adapter or model first, which nothing that comes later can cost; then what tuning changed, and
        # the curves ----
        run_on_main(export, run, plan.steps, base, tokenizer, base_args.publish_dtype, adapter_args)
        after = run_on_main(before_after.measure_after, trainer.accelerator.unwrap_model(trainer.model), *measured)
        run_on_main(finish, run, plan.steps, base, adapter_args, before, after)
        run_on_main(publish_rest, opened, run.path / f"checkpoint-{plan.steps}", hub_args.hub_drain_timeout)


def base_on_hub(base, named: str | None) -> tuple[str, str | None] | None:
    """(Hub id, revision) of a base: its own, the one that is named, or the one that its run was published as; None
    where it is not there.
    """
    from llama_lite.files import read_jsonl
    from llama_lite.hub.client import reference

    if base.repo:
        return base.repo, base.revision or base.commit
    if named:
        where = reference(named)
        return where.repo, where.revision or "main"
    published = read_jsonl(base.folder / "published.jsonl")
    last = (read_json(base.folder / "status.json") or {}).get("step")
    return next(((row["repo"], row["revision"]) for row in reversed(published) if row["step"] == last), None)


def check_named_base(base, hub_base: tuple[str, str | None] | None) -> None:
    """Raise Refusal where an adapter that is to be published could not name its base, or names one that is not on the
    Hub (any more).
    """
    from llama_lite.hub.client import HubPermissionError, HubUnavailable, Reference, commit_of

    way = (
        "Publish that run first (its own command with --publish_only), or say where it is: --base_hub_id"
        " owner/name@revision."
    )
    if hub_base is None:
        raise Refusal(
            f"--push_to_hub: an adapter must name its base, and {base.name} is a folder of this machine. {way}"
        )
    try:
        commit_of(Reference(*hub_base))
    except Refusal as refusal:
        raise Refusal(
            f"--push_to_hub: an adapter must name its base, and {base.name} is not {hub_base[0]}@{hub_base[1]} (any"
            f" more): {refusal} {way}"
        ) from None
    except (HubUnavailable, HubPermissionError):
        return  # the queue says so, and waits


def export(run, steps: int, base, tokenizer, dtype: str, adapter_args) -> None:
    """The finished adapter or model at the root of the run folder (rank 0)."""
    from llama_lite.hub.export import export_adapter, export_model
    from llama_lite.training import lora

    checkpoint = run.path / f"checkpoint-{steps}"
    if adapter_args.use_lora:
        export_adapter(checkpoint, run.path)
    else:
        export_model(checkpoint, run.path, dtype)
    if adapter_args.merge_adapter:
        try:
            lora.merge(base, checkpoint, tokenizer, dtype, run.path / "merged")
        except (RuntimeError, ValueError, TypeError, NotImplementedError, OSError) as error:
            print_main(
                f"WARNING   base and adapter could not be merged ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:200]}); the adapter is there"
            )


def finish(run, steps: int, base, adapter_args, before: dict, after: dict | None) -> None:
    """`before_after.json`, card and figures (rank 0). `after`: None where it could not be measured."""
    from llama_lite.evaluation import before_after
    from llama_lite.files import write_json
    from model_card.card import written

    record = before_after.compare(before, after) if after else {}
    if record:
        write_json(run.path / "before_after.json", record)
    run.ends("finished")
    card = written(run.path)
    if (run.path / "merged").exists():
        written(run.path / "merged")
    for row in record.get("shown", ()):
        print_main(
            f"asked     {row['prompt']!r}\n  before  {row['before']['answer']!r}\n  after   {row['after']['answer']!r}"
        )
    if record:
        print_main(before_after.table(record))
    print_main(f"finished  {'adapter' if adapter_args.use_lora else 'model'} {run.path}, its card {card}")
    if steps < FEW_STEPS:
        print_main(
            f"WARNING   {steps:,} steps teach next to nothing: give it more --hours, or --num_train_epochs 3, and"
            " another --output_dir."
        )
    asked = f"{base.repo}@{base.revision}" if base.repo and base.revision else base.name
    tuned = f"{asked}+{run.path}" if adapter_args.use_lora else str(run.path)
    print_main(f"next      python run_eval.py --models {shlex.join([asked, tuned])} --limit 100")


def publish_rest(publishers: list, checkpoint: Path, timeout: float) -> None:
    """Queue the merged model, and wait for all queues (rank 0)."""
    for publisher in publishers[1:]:
        publisher.add(checkpoint)
        publisher.start()
    for publisher in publishers:
        publisher.drain(timeout)


if __name__ == "__main__":
    exit_with_status(main)
