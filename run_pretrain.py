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
from llama_lite.distributed import print_main, run_on_main
from llama_lite.errors import Refusal
from llama_lite.exit import exit_with_status
from llama_lite.files import read_json, write_json


def main(argv: list[str] | None = None) -> None:
    argv = answer_early("run_pretrain.py", argv)  # --help and misspelt arguments, before the libraries are imported
    from llama_lite.config.pretrain import parse_pretrain

    groups = model_args, data_args, curation_args, hub_args, run_args, training_args = parse_pretrain(argv)
    if run_args.audit:
        return audit_run(run_args, training_args)

    # The heavy imports come after parsing, so that --help and refusals answer at once.
    from transformers import set_seed

    from llama_lite.data.dataset import collate
    from llama_lite.data.preparation import Text
    from llama_lite.hub.export import export_model
    from llama_lite.kernels.attention import check_name
    from llama_lite.machine.hardware import peak_flops
    from llama_lite.machine.parallelism import check_shard_checkpoints, layout, layout_of
    from llama_lite.models.loading import load_weights
    from llama_lite.training import derive_pretrain
    from llama_lite.training.removal import RemovalOfRun
    from llama_lite.training.session import Session
    from llama_lite.training.trainer import PretrainTrainer
    from llama_lite.training.validation import probe_windows, validation_sets

    # ---- How this process is launched, and the folders of the run ----
    session = Session("pretrain", hub_args, run_args, training_args)
    planned = layout_of(run_args.plan_launch) if run_args.plan_launch else layout()
    check_shard_checkpoints(run_args.shard_checkpoints, planned)
    check_name(run_args.attention)
    if "output_dir" not in run_args.explicit_args:
        training_args.output_dir = derive_pretrain.output_dir(data_args.dataset, data_args.mixture)
    recall_mixture(session, data_args, run_args)
    check_paths(data_args, training_args.output_dir)
    session.export_to = functools.partial(export_model, dtype=model_args.publish_dtype)
    rules = dataclasses.asdict(curation_args)
    values = Values(session, groups, Text(data_args), planned)

    # ---- Commands that train nothing ----
    if run_args.dry_run or run_args.suggest:
        return show_plan(session, groups, rules, values)
    if data_args.prepare_only:
        return prepare_only(session, data_args, rules, values)
    if hub_args.publish_only:
        return session.publish_only()

    with session:
        session.catch_signals()

        # ---- Derive missing arguments, check all of them, prepare the tokens ----
        tokens, tokenizer = prepare_text(groups, rules, values)
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
        initial = InitialWeights(session.run, model_args.init_from, config, manifest)
        start = session.begin(identity, plan, derive_pretrain.settings(groups), initial.find)
        if start is None:
            return
        run_on_main(write_json, session.run.path / "data.json", data_record(tokens))

        # ---- Model and trainer ----
        set_seed(training_args.seed)
        model = build_model(config, model_args.model_config, run_args, training_args.device)
        if start.checkpoint is None:
            initial.load(model)
        train, sources, reads = training_data(groups, tokens, removal, identity.data, plan, start)
        held_out = validation_sets(tokens, run_args.block_size, run_args.eval_windows)
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
            **session.trainer_arguments(),
        )
        trainer.shard_checkpoints = run_args.shard_checkpoints
        trainer.rerun = record_for_audits(groups, tokens)
        trainer.document_reads = reads
        session.add_callbacks(trainer)
        add_evaluations(trainer, tokenizer, held_out[0].windows, run_args)

        # ---- Train or resume; then export the model, the card and the figures ----
        if not session.train(trainer, plan.steps):
            load_weights(model, start.checkpoint)
        run_on_main(finish, session.run, plan.steps, manifest, model_args.publish_dtype)
        session.publish_rest(plan.steps)
        print_main("\n".join(what_next(session.run.path)))


# ---- derived arguments and the plan ----


class Values:
    """The derived arguments: from the record of the run, the text and the machine. Each choice is printed once, when
    nothing can refuse it any more.

    planned: the Layout that the run is planned for. folders, validation: of a mixture and of --validation, once they
    are found.
    """

    def __init__(self, session, groups, text, planned):
        self.session, self.groups, self.text, self.planned = session, groups, text, planned
        self.printed, self.waiting = {}, []
        self.folders, self.validation = [], []

    @functools.cached_property
    def derivation(self):
        """The Derivation of this command (rank 0)."""
        from llama_lite.data.prepared import mixture_manifest
        from llama_lite.training import derive_pretrain

        recorded = self.session.recorded(derive_pretrain.RECORDED)
        mixture = mixture_manifest(self.folders) if self.folders else None
        return derive_pretrain.Derivation(
            self.groups,
            self.text,
            self.planned,
            self.session.run_args.explicit_args,
            recorded,
            mixture,
            len(self.validation),
        )

    def find_folders(self, verify: str) -> None:
        """Find the folders of --mixture and --validation, verified. Raises Refusal."""
        from llama_lite.training.mixture import find_mixture, find_validation

        data_args = self.groups[1]
        self.folders = run_on_main(find_mixture, data_args, verify)
        self.validation = run_on_main(find_validation, data_args, self.folders, verify)

    def settle(self, only_tokens: bool = False) -> tuple[dict, dict]:
        """Set every missing argument. Returns ({argument: reason}, the manifest of the tokens or an estimate of it)."""
        from llama_lite.machine import precision
        from llama_lite.training.decisions import lines, set_values

        values, reasons, tokens = run_on_main(lambda: self.derivation.settle(only_tokens))
        set_values(self.groups, values)
        precision.apply(self.session.training_args, self.session.run_args.precision)
        new = {name: value for name, value in values.items() if self.printed.get(name) != value}
        self.waiting += lines(new, reasons)
        self.printed.update(values)
        return reasons, tokens

    def print_chosen(self) -> None:
        """Print the choices that were not printed yet."""
        for line in self.waiting:
            print_main(f"chosen    {line}")
        self.waiting = []


def plan_of(groups, tokens: dict, processes: int | None = None):
    """(model config, Plan) of a run over `tokens` (a manifest, or an estimate of one). Raises Refusal."""
    import torch

    from llama_lite.models.presets import model_config_of
    from llama_lite.training.data_plan import check_epochs
    from llama_lite.training.plan import check_publish_steps, make_plan

    model_args, data_args, _, hub_args, run_args, training_args = groups
    config = model_config_of(model_args.model_config, tokens["tokenizer"]["vocab_size"], run_args.block_size)
    publish_bytes = getattr(torch, model_args.publish_dtype).itemsize
    plan = make_plan(config, tokens, run_args, training_args, publish_bytes, processes)
    state = str(hub_args.publish_training_state)
    check_publish_steps(training_args, plan.steps, hub_args.publish_steps, state)
    check_epochs(plan.sources, data_args.mixture, run_args.allow_epochs, run_args.allow_epochs_of)
    return config, plan


def show_plan(session, groups, rules: dict, values: Values) -> None:
    """--dry_run and --suggest: the plan, without touching anything. Raises Refusal."""
    from llama_lite.data.preparation import prepare
    from llama_lite.data.prepared import data_lines, with_validation
    from llama_lite.data.shards import verify_prepared
    from llama_lite.training.memory import forecast
    from llama_lite.training.mixture import check_before_preparing
    from llama_lite.training.publishing import publishing_lines
    from llama_lite.training.suggest import write_suggestion

    _, data_args, _, hub_args, run_args, training_args = groups
    explicit_args, planned = run_args.explicit_args, values.planned
    values.find_folders("sizes")
    reasons, tokens = values.settle()
    if "estimated" not in tokens and not values.folders:  # the tokens exist: the arguments must agree with them
        manifest = run_on_main(prepare, data_args, rules, values.text, set(explicit_args))
        run_on_main(verify_prepared, Path(data_args.prepared_dir), manifest, "sizes")
    check_before_preparing(data_args, tokens, values.validation)
    tokens = with_validation(tokens, values.validation)
    config, plan = plan_of(groups, tokens, planned.processes)
    run_on_main(check_tokenizer, groups, values, config, tokens)
    fused = run_args.fused_loss and not run_args.plan_launch
    memory_lines, problems = forecast(config, plan, planned, run_args.precision, fused, training_args, run_args)
    values.print_chosen()
    print_main("\n".join([*data_lines(tokens, values.folders, values.validation), *plan.lines(), *memory_lines]))
    print_reading(groups, rules, values, "estimated" in tokens)
    if session.publishes:
        print_main("\n".join(publishing_lines(plan, hub_args, training_args, plan.model_bytes)))
    for problem in problems:
        print_main(f"WARNING             {problem}")
    if problems and run_args.strict_plan:
        raise Refusal(f"--strict_plan: {' '.join(problems)}")
    if run_args.suggest:
        run_on_main(write_suggestion, run_args.suggest, "run_pretrain.py", groups, explicit_args, reasons, plan.lines())


def print_reading(groups, rules: dict, values: Values, is_estimate: bool) -> None:
    """For --dry_run: the tasks that prepare the tokens on a cluster, and what is left out of them. Raises Refusal.

    is_estimate: whether the tokens are not prepared yet.
    """
    from llama_lite.data.prepared import PreparedFolder, PreparedTokens
    from llama_lite.data.shards import read_manifest
    from llama_lite.training.removal import RemovalOfRun

    data_args, run_args = groups[1], groups[-2]
    if data_args.prepare_on == "ray" and is_estimate:
        from llama_lite.data.ray_cluster import task_line

        print_main(run_on_main(task_line, values.text.source, rules))
    if run_args.without_documents and not is_estimate:
        folder = Path(data_args.prepared_dir or "")
        parts = values.folders or [PreparedFolder("", folder, read_manifest(folder))]
        RemovalOfRun(values.session, run_args, PreparedTokens(parts).by_fingerprint)


# ---- paths, text and tokens ----


def check_paths(data_args, output_dir: str) -> None:
    """Raise Refusal for folders that cannot be written to, hold something else, or lie in each other."""
    from llama_lite.folder_kinds import check_apart, check_folder
    from llama_lite.training.preflight import check_folders

    folders = {"prepared_dir": data_args.prepared_dir, "curated_dir": data_args.curated_dir}
    run_on_main(check_folders, folders if data_args.prepare_only else {**folders, "output_dir": output_dir})
    run_on_main(check_folder, "prepared_dir", data_args.prepared_dir, "prepared")
    if not data_args.prepare_only:
        run_on_main(check_folder, "output_dir", output_dir, "pretrain")
        check_apart(output_dir, folders)


def prepare_only(session, data_args, rules: dict, values: Values) -> None:
    """--prepare_only: the token shards, repaired where they are damaged; with --push_to_hub, as a Hub dataset."""
    from llama_lite.data.preparation import prepare
    from llama_lite.data.shards import describe
    from llama_lite.hub import download
    from llama_lite.training.preflight import check_folders

    session.catch_signals()
    if data_args.mixture:
        prepare_only_mixture(session, data_args, values)
        return
    explicit_args = set(session.run_args.explicit_args)
    if not session.publishes:
        pull_prepared(data_args, rules, explicit_args)
    _, tokens = values.settle(only_tokens=True)
    folder, size = data_args.prepared_dir, tokens.get("estimated", 0)
    run_on_main(check_folders, {"prepared_dir": folder}, {"prepared_dir": size})
    values.print_chosen()
    print_main(describe(run_on_main(prepare, data_args, rules, values.text, explicit_args, True)))
    if session.publishes:
        private = session.training_args.hub_private_repo
        run_on_main(download.push_prepared, Path(folder), data_args.prepared_hub_id, private, session.hub_args.card)


def prepare_only_mixture(session, data_args, values: Values) -> None:
    """--prepare_only of a mixture: its folders, downloaded where --prepared_hub_id names them and verified by their
    digests; with --push_to_hub, each as a Hub dataset.
    """
    from llama_lite.data.prepared import data_lines
    from llama_lite.training.mixture import pull_folders, push_folders

    if not session.publishes:
        run_on_main(pull_folders, data_args)
    values.find_folders("hashes")
    print_main("\n".join(data_lines({}, values.folders, values.validation)))
    if session.publishes:
        run_on_main(push_folders, data_args, session.training_args.hub_private_repo, session.hub_args.card)


def pull_prepared(data_args, rules: dict, explicit_args: set[str]) -> None:
    """Download the tokens that --prepared_hub_id names, if it names some."""
    from llama_lite.hub import client, download
    from llama_lite.training.mixture import pull_folders

    if data_args.mixture:
        run_on_main(pull_folders, data_args)
    elif hub := data_args.prepared_hub_id and client.reference(data_args.prepared_hub_id):
        data_args.prepared_dir = run_on_main(download.pull_prepared, hub, data_args, rules, explicit_args)


def recall_mixture(session, data_args, run_args) -> None:
    """Take mixture and validation sets from the record of the run that goes on, where the command does not give them,
    nor a text.
    """
    from llama_lite.config.pretrain import PREPARING
    from llama_lite.training.derive_pretrain import RECALLED

    recorded = run_on_main(session.recorded, RECALLED)
    if any(name in run_args.explicit_args for name in PREPARING):
        recorded.pop("mixture", None)
    for name, value in recorded.items():
        if name not in run_args.explicit_args:
            setattr(run_args if name == "allow_epochs_of" else data_args, name, value)


def prepare_text(groups, rules: dict, values: Values):
    """(PreparedTokens, tokenizer) of the run: the prepared folder, which is made where it is not there, or those of the
    mixture, and the validation sets, all verified; every argument is settled. Raises Refusal, as far as can be before
    a long preparation.
    """
    from transformers import AutoTokenizer

    from llama_lite.data.prepared import PreparedFolder, PreparedTokens, data_lines, with_validation
    from llama_lite.data.tokenizer import tokenizer_record
    from llama_lite.training import derive_pretrain
    from llama_lite.training.mixture import check_before_preparing, find_validation
    from llama_lite.training.preflight import check_folders

    _, data_args, _, _, run_args, training_args = groups
    pull_prepared(data_args, rules, set(run_args.explicit_args))
    values.find_folders(data_args.verify_data)
    _, tokens = values.settle()
    check_before_preparing(data_args, tokens, values.validation)
    config, plan = plan_of(groups, with_validation(derive_pretrain.at_most(tokens), values.validation))
    is_estimate = "estimated" in tokens
    if is_estimate:
        run_on_main(check_tokenizer, groups, values, config, tokens)
    folders = {"prepared_dir": data_args.prepared_dir, "output_dir": training_args.output_dir}
    needed = {"prepared_dir": tokens.get("estimated", 0), "output_dir": 2 * plan.checkpoint_bytes}
    run_on_main(check_folders, folders, needed)
    if is_estimate:
        values.print_chosen()  # preparing takes its time
    parts = values.folders
    if not parts:
        manifest = prepare_folder(data_args, rules, values, set(run_args.explicit_args))
        parts = [PreparedFolder("", Path(data_args.prepared_dir), manifest)]
        values.validation = run_on_main(find_validation, data_args, parts, "sizes")
    found = PreparedTokens(parts, bool(values.folders), values.validation)
    for line in data_lines(found.manifest, values.folders, found.validation):
        print_main(f"data      {line}")
    tokenizer = AutoTokenizer.from_pretrained(found.tokenizer, trust_remote_code=False)
    if tokenizer_record(tokenizer) != found.manifest["tokenizer"]:
        raise Refusal(
            f"{found.tokenizer} is not the one the tokens were made with. Run the same command with --prepare_only"
            " in a new --prepared_dir."
        )
    if is_estimate:
        values.settle()  # now that they are counted
    return found, tokenizer


def prepare_folder(data_args, rules: dict, values: Values, explicit_args: set[str]) -> dict:
    """The manifest of the prepared folder of one text, which is made where it is not there, and verified."""
    from llama_lite.data.preparation import prepare
    from llama_lite.data.shards import verify_prepared

    manifest = run_on_main(prepare, data_args, rules, values.text, explicit_args)
    run_on_main(verify_prepared, Path(data_args.prepared_dir), manifest, data_args.verify_data)
    return manifest


def data_record(tokens) -> dict:
    """`data.json` of a run: what its PreparedTokens are, with what curation dropped."""
    curation = None if tokens.is_mixture else read_json(tokens.folders[0].folder / "curation.json")
    return {**tokens.record(), "curation": curation}


# ---- the run ----


def check_epochs_left(groups, tokens, train) -> None:
    """Raise Refusal where a folder of a mixture would be read too often, by what the run has read of it already."""
    from llama_lite.training.data_plan import check_epochs
    from llama_lite.training.mixture import rows_at_end

    _, data_args, _, _, run_args, _ = groups
    if tokens.is_mixture:
        rows = rows_at_end(tokens, train)
        check_epochs(rows, data_args.mixture, run_args.allow_epochs, run_args.allow_epochs_of)


def check_tokenizer(groups, values: Values, config, tokens: dict) -> None:
    """Raise Refusal where others who load the model would not get its tokenizer (rank 0)."""
    from llama_lite.data.tokenizer import check_stock, load_tokenizer, tokenizer_to_be

    model_args, data_args = groups[:2]
    found = (
        tokenizer_to_be(data_args.tokenizer)
        if "estimated" in tokens
        else load_tokenizer(f"{values.folders[0].folder if values.folders else data_args.prepared_dir}/tokenizer")
    )
    begins = not values.derivation.recorded
    check_stock(f"--model_config {model_args.model_config}", config, found, begins=begins)


def check_run(groups, values: Values, config, plan, manifest: dict, tokenizer) -> None:
    """Raise Refusal for a tokenizer, prompts, or with --strict_plan a size, that this run cannot have. What the
    launcher leaves to the plan is decided.
    """
    from llama_lite.kernels.probe import context_of
    from llama_lite.machine.parallelism import layout
    from llama_lite.training.callbacks.samples import check_prompts
    from llama_lite.training.memory import forecast, settle_resharding

    run_args, training_args = groups[-2:]
    run_on_main(check_tokenizer, groups, values, config, manifest)
    prompts = run_args.sample_prompts if run_args.sample_tokens else []
    check_prompts(prompts, tokenizer, context_of(config) or math.inf)
    forecasted = config, plan, layout(), run_args.precision, run_args.fused_loss, training_args, run_args
    if run_args.strict_plan and (problems := run_on_main(forecast, *forecasted)[1]):
        raise Refusal(f"--strict_plan: {' '.join(problems)}")
    if chosen := settle_resharding(config, plan, training_args, run_args):
        values.waiting.append(chosen)


def training_data(groups, tokens, removal, data: dict, plan, start):
    """(windows of the run, names of the folders of a mixture, which documents it reads). removal: a RemovalOfRun. data:
    `identity["data"]` of the run. Raises Refusal.
    """
    from llama_lite.data.document_reads import document_reads
    from llama_lite.training.mixture import order_history, training_windows

    train, sources = training_windows(tokens, data, plan, start)
    removal.apply(train)
    check_epochs_left(groups, tokens, train)
    history = order_history(start, data)
    return train, sources, document_reads(tokens.by_fingerprint, data, plan.steps, history, removal.removal)


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
    if run_args.attention:
        set_attention(model, run_args.attention, run_args.precision)
    for kernel, why in apply_kernels(model, run_args.fused_loss, run_args.block_attention).items():
        print_main(f"plain     --{kernel} stays off for this model ({config.model_type}): {why}")
    if run_args.compile_layers:
        compile_layers(model, device)
    return model


class InitialWeights:
    """The weights that --init_from names, if it names some.

    config: of the run's model. manifest: of its tokens.
    """

    def __init__(self, run, init_from: str | None, config, manifest: dict):
        self.run, self.init_from, self.config, self.manifest = run, init_from, config, manifest
        self.folder = None

    def find(self) -> None:
        """Find the weights, or download them. Raises Refusal where they are another model's, or lack ids of the
        tokens.
        """
        from llama_lite.training import resume

        if self.init_from:
            ids = self.manifest["tokenizer"]["vocab_size"]
            self.folder = run_on_main(resume.init_folder, self.run, self.init_from, self.config, ids)

    def load(self, model) -> None:
        """Load them into a model. Raises Refusal where they do not fill it."""
        from llama_lite.hub.client import reference
        from llama_lite.models import loading

        if self.folder:
            loading.load_weights(model, self.folder)
            name = self.init_from if reference(self.init_from) else self.folder.name
            self.run.event("initialised", weights=name)


def add_evaluations(trainer, tokenizer, held_out, run_args) -> None:
    """The task scores and the samples of each evaluation."""
    from llama_lite.training.callbacks.samples import Samples, beginnings
    from llama_lite.training.callbacks.task_scores import TaskScores

    seed = trainer.args.seed
    if run_args.eval_tasks:
        trainer.add_callback(TaskScores(trainer, tokenizer, run_args.eval_tasks, run_args.eval_task_limit, seed))
    if run_args.sample_tokens and (run_args.sample_prompts or "sample_prompts" not in run_args.explicit_args):
        prompts = run_args.sample_prompts or beginnings(held_out, tokenizer)
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
    from llama_lite.files import read_jsonl
    from llama_lite.hub.export import export_model
    from model_card.card import write_card_or_reason
    from model_card.report.page import write_report_or_reason

    export_model(run.path / f"checkpoint-{steps}", run.path, dtype)
    run.ends("finished")
    card, page = write_card_or_reason(run.path), write_report_or_reason(run.path)
    bases = manifest["baselines"]
    measured = [
        entry for entry in read_jsonl(run.path / "log.jsonl") if "eval_loss" in entry and entry["step"] == steps
    ]
    result = "its last evaluation failed"
    if measured:
        last = measured[-1]
        result = (
            f"validation loss {last['eval_loss']:.4f} nats per token ({last['eval_bits_per_byte']:.4f} bits per byte)"
        )
    print_main(f"finished  {result}; baselines: bigram {bases['bigram']:.4f}, unigram {bases['unigram']:.4f}")
    parts = {part["name"]: part.get("baselines") for part in manifest.get("mixture", [])}
    for name, own in {**parts, **dict.fromkeys(manifest.get("validation_sets", {}))}.items():
        if measured and f"eval_{name}_loss" in last:
            counts = f"; baselines: bigram {own['bigram']:.4f}, unigram {own['unigram']:.4f}" if own else ""
            bits = last[f"eval_{name}_bits_per_byte"]
            print_main(f"          {name} {last[f'eval_{name}_loss']:.4f} ({bits:.4f} bits per byte){counts}")
    print_main(f"          model {run.path}, its card {card}")
    print_main(f"          curves and samples: {page}")
    if measured and last["eval_loss"] > bases["unigram"]:
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
