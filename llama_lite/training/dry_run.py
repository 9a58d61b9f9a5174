"""--dry_run and --suggest of run_pretrain.py: the plan of a run, without touching anything."""

from pathlib import Path

from ..data.preparation import prepare
from ..data.prepared import PreparedFolder, PreparedTokens, data_lines, with_validation
from ..data.shards import read_manifest, verify_prepared
from ..distributed import print_main, run_on_main
from ..errors import Refusal
from ..formatting import seconds_in_words
from .memory import forecast
from .mixture import check_before_preparing
from .publishing import publishing_lines
from .removal import RemovalOfRun
from .run_tokens import check_tokenizer
from .suggest import write_suggestion
from .values import Values, plan_of


def show_plan(session, groups, rules: dict, values: Values) -> None:
    """--dry_run and --suggest: the plan, without touching anything. Raises Refusal."""
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
    times = [] if run_args.plan_launch else [run_on_main(time_line, values, plan)]
    print_main(
        "\n".join([*data_lines(tokens, values.folders, values.validation), *plan.lines(), *times, *memory_lines])
    )
    print_reading(groups, rules, values, "estimated" in tokens)
    if session.publishes:
        print_main("\n".join(publishing_lines(plan, hub_args, training_args, plan.model_bytes)))
    for problem in problems:
        print_main(f"WARNING             {problem}")
    if problems and run_args.strict_plan:
        raise Refusal(f"--strict_plan: {' '.join(problems)}")
    if run_args.suggest:
        run_on_main(write_suggestion, run_args.suggest, "run_pretrain.py", groups, explicit_args, reasons, plan.lines())


def time_line(values: Values, plan) -> str:
    """About how long the steps of a Plan take on this machine (rank 0)."""
    seconds = values.derivation.schedule.seconds_of_steps()
    return (
        f"time                about {seconds_in_words(seconds)} for the steps on this machine, at"
        f" {plan.tokens / seconds:,.0f} tokens per second; evaluations and saves come on top"
    )


def print_reading(groups, rules: dict, values: Values, is_estimate: bool) -> None:
    """For --dry_run: the tasks that prepare the tokens on a cluster, and what is left out of them. Raises Refusal.

    is_estimate: whether the tokens are not prepared yet.
    """
    data_args, run_args = groups[1], groups[-2]
    if data_args.prepare_on == "ray" and is_estimate:
        from ..data.ray_cluster import task_line

        print_main(run_on_main(task_line, values.text.source, rules))
    if run_args.without_documents and not is_estimate:
        folder = Path(data_args.prepared_dir or "")
        parts = values.folders or [PreparedFolder("", folder, read_manifest(folder))]
        RemovalOfRun(values.session, run_args, PreparedTokens(parts).by_fingerprint)
