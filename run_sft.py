"""Tune a model on instructions with TRL's SFTTrainer and LoRA, and resume it bit for bit.

    accelerate launch run_sft.py                                    # on the demo's own model
    accelerate launch run_sft.py --config configs/sft/paper.yaml --model_name_or_path you/name

Stop it at any moment and run the same command again.
"""

import dataclasses
import functools
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

FEW_STEPS = 10  # of a run that is said to have been too short


def main(argv: list[str] | None = None) -> None:
    argv = answer_early("run_sft.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.sft import parse_sft

    groups = base_args, adapter_args, row_args, hub_args, run_args, training_args = parse_sft(argv)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    from transformers import set_seed

    from llama_lite.chat_format import packing
    from llama_lite.config.fields import SFT_HYPERPARAMETERS
    from llama_lite.data.dataset import row_order
    from llama_lite.data.formats import skipped_record
    from llama_lite.data.tokenizer import tokenizer_record
    from llama_lite.evaluation import before_after
    from llama_lite.models import references
    from llama_lite.training import derive_sft, lora
    from llama_lite.training.session import Session
    from llama_lite.training.sft_trainer import TuningTrainer

    # ---- How this process is launched, and the folder of the run ----
    session = Session("sft", hub_args, run_args, training_args, shards=False)
    session.catch_signals()
    choose_output_dir(session, base_args.model_name_or_path)

    # ---- The record of the run, the base and the chat format ----
    values, reasons, recorded = settle_machine(session, groups)
    base = run_on_main(references.locate, base_args.model_name_or_path, base_args.model_revision)
    tokenizer = load_chat_tokenizer(base, base_args.tokenizer_name, training_args.chat_template_path, not recorded)
    hub_base = find_hub_base(session, base, adapter_args)
    set_exports(session, base, tokenizer, base_args.publish_dtype, adapter_args)
    if hub_args.publish_only:
        session.publish_only()
        return

    # ---- From rows to token ids ----
    rows, source, skipped, examples = load_rows(row_args, tokenizer)
    config, model, batches = load_base(groups, base, tokenizer)
    by_machine, settled = (values, reasons), settle_tuning(groups, values, reasons, config, examples)
    check_lengths(base, config, tokenizer, run_args, training_args)
    batches, values, reasons = fit_rows(groups, batches, settled, by_machine, config, examples)
    train_rows, eval_rows = split_rows(groups, config, rows, examples, skipped)
    print_rows(row_args.dataset, skipped, source)
    if row_args.show_example:
        print_main(packing.show(tokenizer, eval_rows[0], sys.stdout.isatty()))
        return
    print_chosen(values, reasons)
    packed = packing.pack(train_rows, training_args.max_length, training_args.packing)  # TRL's trainer packs no more

    # ---- The adapter, and the plan ----
    set_seed(training_args.seed)
    if adapter_args.use_lora:
        model = lora.add_adapter(model, adapter_args, *(hub_base or (base.name, None)))
    plan = plan_of(groups, model, train_rows, eval_rows, len(packed))
    show_plan(session, groups, plan, reasons)
    if run_args.dry_run or run_args.suggest:
        return

    with session:
        # ---- The identity of the run, and the checkpoint it resumes from ----
        training_args.gradient_accumulation_steps, training_args.max_steps = plan.accumulation, plan.steps
        base_record = run_on_main(references.base_record, base, *(hub_base or (None, None)))
        identity = session.identity(
            plan,
            config={**model.config.to_dict(), "base": base_record["sha256"], "adapter": lora.lora_record(adapter_args)},
            data={
                "data": packing.fingerprint(train_rows),
                "held_out": packing.fingerprint(eval_rows),
                "tokenizer": tokenizer_record(tokenizer)["sha256"],
                "packing": training_args.packing,
                "max_length": training_args.max_length,
                "sequences_per_step": run_args.sequences_per_step,
            },
            switches={"attention": model.config._attn_implementation},
            further_hyperparameters=SFT_HYPERPARAMETERS,
        )
        record = {"source": source, "skipped": skipped_record(skipped), "base": base_record | name_of(base)}
        start = session.begin(identity, plan, derive_sft.settings(groups), **record)
        if start is None:
            return

        # ---- Trainer; the base is measured on the held-out rows before the first step ----
        model.to(training_args.device)
        measured = what_is_measured(tokenizer, eval_rows, run_args, training_args.seed, batches)
        before = recorded_before(start) or run_on_main(before_after.measure_before, model, *measured)
        order = row_order(len(packed), plan.steps, run_args.sequences_per_step, session.order_seed, start.data_start)
        training_args.padding_free, training_args.packing, training_args.max_length = batches.packs, False, None
        trainer = TuningTrainer(
            model=model,
            train_dataset=packed.select(order),
            eval_dataset=packing.pack(eval_rows, 0, packing=False),
            processing_class=tokenizer,
            probe=probe_batches(eval_rows[: run_args.probe_rows]),
            eval_rows=eval_rows,
            before=before,
            base=base_record,
            batches=batches,
            **session.trainer_arguments(),
        )
        session.add_callbacks(trainer)

        # ---- Train, or resume; then export, before anything that could still fail; then what tuning changed ----
        if not session.train(trainer, plan.steps):
            trainer._load_from_checkpoint(start.checkpoint)
        run_on_main(export, session.run, plan.steps, base, tokenizer, base_args.publish_dtype, adapter_args)
        after = run_on_main(before_after.measure_after, trainer.accelerator.unwrap_model(trainer.model), *measured)
        run_on_main(finish, session.run, plan.steps, base, adapter_args, before, after)
        session.publish_rest(plan.steps)


# ---- the arguments, and the plan ----


def choose_output_dir(session, base: str) -> None:
    """Name the run's folder where nobody did. Raises Refusal for one that cannot be written to, or holds something else
    than a tuning run.
    """
    from llama_lite.folder_kinds import check_folder
    from llama_lite.training import tuning_folder
    from llama_lite.training.preflight import check_folders

    explicit_args = session.run_args.explicit_args
    default = "" if "output_dir" in explicit_args else run_on_main(tuning_folder.output_dir, base, explicit_args)
    session.choose_folder(default)
    check_folders({"output_dir": session.training_args.output_dir})
    run_on_main(check_folder, "output_dir", session.training_args.output_dir, "sft")


def settle_machine(session, groups) -> tuple[dict, dict, dict]:
    """Set what follows from the record of the run and from the machine.

    Returns ({argument: value}, {argument: why}, what the record of an earlier start holds).
    """
    from llama_lite.machine import precision
    from llama_lite.training import derive_sft
    from llama_lite.training.decisions import set_values

    run_args, training_args = groups[-2:]
    recorded = run_on_main(session.recorded, derive_sft.RECORDED)
    values, reasons = run_on_main(derive_sft.machine, groups, run_args.explicit_args, recorded)
    set_values(groups, values)
    precision.apply(training_args, run_args.precision)
    return values, reasons, recorded


def settle_tuning(groups, values: dict, reasons: dict, config, examples: list) -> tuple[dict, dict]:
    """Set what follows from the rows and the base; returns `values` and `reasons` with these."""
    from llama_lite.training import derive_sft
    from llama_lite.training.decisions import set_values

    further, why = run_on_main(derive_sft.tuning, groups, groups[-2].explicit_args, values, config, examples)
    set_values(groups, further)
    return {**values, **further}, {**reasons, **why}


def print_chosen(values: dict, reasons: dict) -> None:
    """One line for each derived value."""
    from llama_lite.training.decisions import lines

    for line in lines(values, reasons):
        print_main(f"chosen    {line}")


def plan_of(groups, model, train_rows: list, eval_rows: list, sequences: int):
    """The TuningPlan of a run over so many sequences. Raises Refusal."""
    from llama_lite.training.plan import check_publish_steps, plan_tuning

    _, _, _, hub_args, run_args, training_args = groups
    plan = plan_tuning(model, train_rows, eval_rows, sequences, run_args, training_args)
    state = str(hub_args.publish_training_state)
    check_publish_steps(training_args, plan.steps, hub_args.publish_steps, state)
    return plan


def show_plan(session, groups, plan, reasons: dict) -> None:
    """Print the plan, with --dry_run also what will be published; with --suggest, write it as a config with the
    `reasons` of its values.
    """
    from llama_lite.training.publishing import publishing_lines
    from llama_lite.training.suggest import write_suggestion

    base_args, adapter_args, _, hub_args, run_args, training_args = groups
    lines = list(plan.lines())
    if run_args.dry_run and session.publishes:
        sizes = published_bytes(plan, base_args.publish_dtype, adapter_args)
        lines += publishing_lines(plan, hub_args, training_args, *sizes)
    text = "\n".join(lines)
    print_main(text if run_args.dry_run else f"plan      {text.replace(chr(10), chr(10) + '          ')}")
    if run_args.suggest:
        explicit_args = run_args.explicit_args
        run_on_main(write_suggestion, run_args.suggest, "run_sft.py", groups, explicit_args, reasons, plan.lines())


def published_bytes(plan, dtype: str, adapter_args) -> tuple[int, int]:
    """Bytes of the weights of a revision, and of the merged model (0 without one): adapters stay in float32."""
    import torch

    model = plan.parameters * getattr(torch, dtype).itemsize
    if not adapter_args.use_lora:
        return model, 0
    # the parameters of the plan include the adapter's
    merged = (plan.parameters - plan.trained) * getattr(torch, dtype).itemsize
    return plan.trained * torch.float32.itemsize, merged if adapter_args.merge_adapter else 0


# ---- the base ----


def load_chat_tokenizer(base, name: str | None, template_path: str | None, is_new_run: bool):
    """The tokenizer of a base, or the one of that name, with the chat format of the run. A new run prints one line
    where the tokenizer has another chat template of its own.
    """
    from llama_lite.chat_format import template
    from llama_lite.models import loading

    tokenizer = loading.load_tokenizer(base, name)
    own = tokenizer.chat_template
    template.set_chat_template(tokenizer, template_path)
    if own and template_path is None and own != tokenizer.chat_template and is_new_run:
        owner = f"the chat template of {name or base.name}"
        print_main(f"format    {template.describe_put_aside(own, owner, Path(name or base.folder))}")
    return tokenizer


def load_base(groups, base, tokenizer):
    """(config, model, Batches) of the base that is tuned; no model to show an example. Packing is off where rows would
    see each other. Raises Refusal, also where loaders of a model that is published would get another tokenizer.
    """
    from llama_lite.data.tokenizer import check_stock
    from llama_lite.models import loading, references
    from llama_lite.models.batches import batches_of
    from llama_lite.training import lora

    _, adapter_args, row_args, _, run_args, training_args = groups
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft asks in the old way
    config = references.load_config(base)
    if not adapter_args.use_lora or adapter_args.merge_adapter:
        run_on_main(check_stock, base.name, config, tokenizer, False)
    if row_args.show_example:
        return config, None, None
    model = loading.load_model(base)
    loading.check_vocabulary(base.name, model.get_input_embeddings().num_embeddings, tokenizer)
    loading.check_language_model(base.name, model)
    if said := loading.align_special_tokens(model, tokenizer):
        print_main(f"base      {base.name}: {said}")
    batches = batches_of(model)
    if not batches.packs:
        training_args.packing = False
        print_main(
            f"plain     rows of {config.model_type} would influence each other when packed (its own logits show it):"
            " they are padded, one sequence per row"
        )
    derives_dropout = adapter_args.use_lora and "lora_dropout" not in run_args.explicit_args
    if derives_dropout and (said := lora.drop_dropout(model, adapter_args, base.name)):
        print_main(f"plain     {said}")
    return config, model, batches


def fit_rows(groups, batches, settled: tuple, by_machine: tuple, config, examples: list) -> tuple:
    """(Batches, values, reasons): rows are padded where a micro-batch of them does not fit into one row of the base,
    which is printed; then steps and intervals are settled anew. batches: None to show an example. settled, by_machine:
    (values, reasons) of all that is settled, and of what the machine alone decided.
    """
    training_args = groups[-1]
    longest = training_args.max_length or max(len(example.input_ids) for example in examples)
    tokens = training_args.per_device_train_batch_size * longest
    if batches is None or not batches.packs or batches.fits(tokens):
        return batches, *settled
    print_main(
        f"plain     {tokens:,} packed tokens are more than the {batches.max_tokens:,} that {config.model_type} accepts"
        " in one row: rows are padded, one sequence per row"
    )
    training_args.packing = False
    values, reasons = settle_tuning(groups, *by_machine, config, examples)
    return dataclasses.replace(batches, packs=False), values, reasons


def recorded_before(start) -> dict | None:
    """What the base did with the held-out rows, as the checkpoint to resume from carries it."""
    from llama_lite.evaluation.before_after import BEFORE

    return read_json(start.checkpoint / BEFORE) if start.checkpoint else None


def name_of(base) -> dict:
    """How the records of a run name its base: without a path of this machine."""
    return {"name": base.name if base.repo else base.folder.name, "commit": base.commit}


def find_hub_base(session, base, adapter_args) -> tuple[str, str | None] | None:
    """As `base_on_hub`. Raises Refusal where an adapter is to be published and its base is not there."""
    named = session.hub_args.base_hub_id
    hub_base = base_on_hub(base, named)
    if session.publishes and adapter_args.use_lora and not named:
        run_on_main(check_named_base, base, hub_base)
    return hub_base


def base_on_hub(base, named: str | None) -> tuple[str, str | None] | None:
    """(Hub id, revision) of a base: its own, the one that is named, or the one that its run was published as; None
    where it is not there.
    """
    from llama_lite.hub.client import reference
    from llama_lite.models.references import published_as

    if named and not base.repo:
        where = reference(named)
        return where.repo, where.revision or "main"
    return published_as(base)


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


# ---- the rows ----


def load_rows(row_args, tokenizer):
    """(rows, record of their source, {reason: rows skipped}, encoded examples of any length). Raises Refusal."""
    from llama_lite.chat_format import instruction_rows, packing

    rows, source, skipped = run_on_main(
        instruction_rows.load,
        row_args.dataset,
        row_args.dataset_config,
        row_args.dataset_split,
        row_args.dataset_revision,
        row_args.max_rows,
        row_args.prepare_workers,
        row_args.skip_held_out,
        row_args.test_rows,
    )
    examples = run_on_main(packing.encode, rows, tokenizer, skipped)
    packing.need_rows(examples, examples, 1, skipped)
    return rows, source, skipped, examples


def check_lengths(base, config, tokenizer, run_args, training_args) -> None:
    """Raise Refusal for rows, or prompts with their answers, that are longer than the base's context."""
    from llama_lite.evaluation import before_after
    from llama_lite.kernels.probe import context_of

    context = context_of(config)
    if context and training_args.max_length and training_args.max_length > context:
        raise Refusal(
            f"--max_length {training_args.max_length:,} is above the {context:,} positions that {base.name} knows"
            " (max_position_embeddings): lower it, or tune a base with a longer context."
        )
    before_after.check_prompts(run_args.prompts, tokenizer, context or math.inf, run_args.answer_tokens)


def split_rows(groups, config, rows: list, examples: list, skipped: dict) -> tuple[list, list]:
    """(training, held-out) examples, none longer than --max_length; `skipped` counts what is dropped for that. What was
    derived for held-out rows is cut to their number. config: of the base. Raises Refusal for too few.
    """
    from llama_lite.chat_format import instruction_rows, packing
    from llama_lite.kernels.probe import context_of
    from llama_lite.training import derive_sft

    _, _, row_args, _, run_args, training_args = groups
    documents = instruction_rows.held_documents(rows, row_args.eval_rows)
    examples = run_on_main(packing.limit, examples, training_args.max_length, row_args.long_rows, skipped)
    train_rows, eval_rows = (
        [example for example in examples if (example.row.document in documents) == out] for out in (False, True)
    )
    derive_sft.fit(groups, run_args.explicit_args, len(eval_rows))
    least, name = max((getattr(run_args, name), name) for name in derive_sft.HELD_OUT)
    at_context = training_args.max_length >= (context_of(config) or math.inf)
    packing.need_rows(train_rows, eval_rows, least, skipped, len({row.document for row in rows}), name, at_context)
    return train_rows, eval_rows


def print_rows(dataset: str, skipped: dict, source: dict) -> None:
    """What the rows are where nobody gave any, what of them was not used, and what of their files was not read."""
    from llama_lite.chat_format import instruction_rows
    from llama_lite.data.formats import skipped_lines

    if dataset == "installed-docs":
        print_main("rows      questions about the documentation of installed packages; your own: --dataset rows.jsonl")
    for line in (*skipped_lines(skipped), *instruction_rows.unread_lines(source)):
        print_main(f"rows      {line}")


def probe_batches(eval_rows: list) -> list[dict]:
    """One batch for each row, whose loss proves a checkpoint."""
    import torch

    names = ("input_ids", "labels")
    return [{name: torch.tensor([getattr(row, name)]) for name in names} for row in eval_rows]


def what_is_measured(tokenizer, eval_rows: list, run_args, seed: int, batches) -> tuple:
    """The arguments of `before_after.measure_answers` but the model: the same before and after training."""
    from llama_lite.evaluation.before_after import AnswerSettings

    shown, sampled = run_args.compared_prompts, run_args.sampled_answers
    settings = AnswerSettings(run_args.prompts, shown, sampled, run_args.answer_tokens, seed)
    return tokenizer, eval_rows, settings, batches


# ---- after training ----


def set_exports(session, base, tokenizer, dtype: str, adapter_args) -> None:
    """Let the session publish the adapter or the model of each checkpoint, and at the end the merged model."""
    from llama_lite.hub.export import export_adapter, export_model
    from llama_lite.training import lora

    def merge(checkpoint: Path, folder: Path) -> None:
        lora.merge(base, checkpoint, tokenizer, dtype, folder)

    session.export_to = export_adapter if adapter_args.use_lora else functools.partial(export_model, dtype=dtype)
    session.merge_to = merge if adapter_args.merge_adapter else None


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
                f" {' '.join(str(error).split())[:200]}); the adapter is written"
            )


def finish(run, steps: int, base, adapter_args, before: dict, after: dict | None) -> None:
    """`before_after.json`, card and figures (rank 0). `after`: None where it could not be measured."""
    from llama_lite.evaluation import before_after
    from llama_lite.files import write_json
    from llama_lite.training import lowest_loss
    from model_card.card import write_card_or_reason
    from model_card.report.page import write_report_or_reason

    record = before_after.compare(before, after) if after else {}
    if record:
        write_json(run.path / "before_after.json", record)
    run.ends("finished")
    card, page = write_card_or_reason(run.path), write_report_or_reason(run.path)
    if (run.path / "merged").exists():
        write_card_or_reason(run.path / "merged")
    for row in record.get("shown", ()):
        print_main(
            f"asked     {row['prompt']!r}\n  before  {row['before']['answer']!r}\n  after   {row['after']['answer']!r}"
        )
    if record:
        print_main(before_after.table(record))
    print_main(f"finished  {'adapter' if adapter_args.use_lora else 'model'} {run.path}, its card {card}")
    print_main(f"          curves and answers: {page}")
    for line in lowest_loss.warnings(run.path):
        print_main(line)
    if steps < FEW_STEPS:
        print_main(
            f"WARNING   {steps:,} steps teach next to nothing: give it more rows, or --num_train_epochs 10, and another"
            " --output_dir."
        )
    reference = f"{base.repo}@{base.revision}" if base.repo and base.revision else base.name
    tuned = f"{reference}+{run.path}" if adapter_args.use_lora else str(run.path)
    print_main(f"next      python -m llama_lite chat {shlex.quote(tuned)}")
    print_main(f"          python run_eval.py --models {shlex.join([reference, tuned])} --limit 100")


if __name__ == "__main__":
    exit_with_status(main)
