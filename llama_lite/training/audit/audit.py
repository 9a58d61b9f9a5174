"""The audit of a run: segments of its steps are made again and compared with what was published; `audit.json`.

The cost is printed first. Equal bits are the verdict wherever they are found; where they are expected (equal hardware,
packages, code, layout, and deterministic) other bits are a difference. Elsewhere a second rerun with another
micro-batch gives the noise, and a difference is what exceeds it tenfold: single bits cannot be judged there.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model_card.private import redact

from ... import provenance
from ...checkpoint import verify
from ...checkpoint.identity import LATER_HARDWARE, differences, is_deterministic
from ...data.recipes import name_of
from ...distributed import print_main, run_on_main
from ...errors import Differs, ProbeDiffers, Refusal
from ...files import read_json, write_json
from ...folder_kinds import check_folder
from ...machine.parallelism import check_launch, layout
from ...run_folder import RunFolder
from . import compare, rerun, segments, tokens
from .compare import Difference
from .segments import Segment
from .sources import FolderSource, HubSource, State, source_of

FORMAT = "llama_lite.audit/1"
EQUAL, WITHIN, DIFFERS, UNFINISHED = "equal, bit for bit", "equal within tolerance", "differs", "not finished"
ORDER = (EQUAL, WITHIN, DIFFERS)  # the verdict on several segments is the last of theirs


def audit(run_args, training_args, main: Callable[[list[str]], None]) -> None:
    """`--audit`: audit what the arguments name; writes `audit.json` into the output folder. Call it on all ranks.

    main: the training script's, which makes the steps again. Raises Refusal, Interrupted, and Differs where a segment
    is not what was published.
    """
    where, first, last = segments.parse(run_args.audit, run_args.audit_random is not None)
    check_launch(training_args)
    if run_args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            run_on_main(lambda: Audit(run_args, where, Path(folder), training_args.device).plan(first, last) and None)
        return
    name = f"{name_of(where)}-{f'{first[0]}-{last[0]}' if first else f'random-{run_args.audit_seed}'}"
    out = Path(run_args.explicit_args.get("output_dir", f"audits/{name}"))  # transformers has a default of its own
    run_on_main(check_folder, "output_dir", out, "audit")
    with RunFolder(out):
        rerun.catch_signals()
        own = Audit(run_args, where, out, training_args.device)
        run_on_main(own.check_folder)
        try:
            planned = run_on_main(own.plan, first, last)
            run_on_main(own.write)
            for segment in planned:
                run_on_main(own.add, audit_segment(own, segment, main))
        except Differs as difference:  # of records, before their steps were made again
            run_on_main(own.contradicts, str(difference))
            raise
        run_on_main(own.end)


class Audit:
    """What an audit plans and records, in the folder `out` (rank 0). device: what makes the steps again."""

    def __init__(self, run_args, where: str, out: Path, device: torch.device):
        self.run_args, self.where, self.out, self.device = run_args, where, out, device
        explicit_args = run_args.explicit_args
        self.given = {name: explicit_args[name] for name in tokens.GIVEN if name in explicit_args}
        self.record = {
            "format": FORMAT,
            "audit": run_args.audit,
            "verdict": UNFINISHED,
            "by": run_args.audit_by,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "drawn": None,
            "tokens": 0,
            "segments": [],
            **{name: value for name, value in provenance.provenance(device).items() if name != "command"},
        }

    def check_folder(self) -> None:
        """Raise Refusal where the folder has another audit."""
        there = read_json(self.out / "audit.json") or {}
        if there.get("audit") not in (None, redact(self.run_args.audit)):
            raise Refusal(
                f"--output_dir {self.out} holds another audit ({there['audit']}): give each a folder of its own."
            )

    def write(self) -> None:
        """Write `audit.json`, without paths and names of this machine."""
        write_json(self.out / "audit.json", redact(self.record))

    def plan(self, first, last) -> list[Segment]:
        """The segments, checked; prints what each costs. first, last: as `segments.parse` returned them."""
        self.source = source_of(self.where, self.out / ".published")
        count = self.run_args.audit_random
        if count is None:
            planned = [segments.named_segment(self.source, first, last)]
        else:
            seed, most = self.run_args.audit_seed, self.run_args.audit_tokens
            planned, total = segments.drawn_segments(self.source, count, most, seed)
            self.record["drawn"] = {"segments": count, "of": total, "seed": seed, "tokens_at_most": most}
        print_main(
            f"audit     run {planned[0].holder.run or self.where}, {sum(one.tokens for one in planned):,} tokens"
        )
        for segment in planned:
            rerun.rerun_arguments(self.source, segment)
            locations = tokens.token_locations(self.source, segment, self.given)
            print_main("\n".join(segments.cost_lines(self.source, segment, self.elsewhere(segment))))
        print_main(f"tokens    {', '.join(map(str, locations))}")
        self.record["run"] = planned[0].holder.run
        return planned

    def elsewhere(self, segment: Segment) -> list[str]:
        """In what this machine differs from the run's, as far as can be said before a rerun."""
        identity = segment.holder.manifest["identity"]
        layout_now = {"processes": layout().processes, **layout().record()}
        now = {
            **identity,
            "layout": {**identity["layout"], **layout_now},
            "environment": {
                **identity["environment"],
                "hardware": provenance.hardware(self.device),
                "packages": provenance.package_versions(),
                "code_revision": provenance.code_revision(),
            },
        }
        threads = {"threads": identity["layout"].get("threads")}  # which the rerun sets
        now["environment"]["hardware"] |= threads if threads["threads"] else {}
        return what_differs(identity, now)

    def add(self, result: dict) -> None:
        """Record and print the result of a segment."""
        self.record["segments"].append(result)
        self.record["tokens"] += result["tokens"]
        self.write()
        print_main(f"verdict   steps {result['first'] + 1:,} to {result['last']:,}: {sentence(result)}")

    def contradicts(self, text: str) -> None:
        """Write that records contradict each other, and how."""
        self.record |= {"verdict": DIFFERS, "contradiction": text}
        self.write()

    def end(self) -> None:
        """Write and print the verdict on all segments. Raises Differs where one differs."""
        verdicts = [result["verdict"] for result in self.record["segments"]]
        self.record["verdict"] = max(verdicts, key=ORDER.index)
        self.write()
        if self.record["verdict"] == DIFFERS:
            found = next(result for result in self.record["segments"] if result["verdict"] == DIFFERS)
            text = f"{self.where} is not what its records say: it {sentence(found)}"
            raise Differs(f"{text}; {self.out}/audit.json has all.")
        for path in self.out.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix == ".yaml":
                path.unlink()
        print_main(
            f"audited   {self.record['verdict']}: {self.record['tokens']:,} tokens in"
            f" {len(verdicts)} segment{'s' if len(verdicts) > 1 else ''}; {self.out}/audit.json. The owner of the run"
            " can show it on its card: put it into the run's folder as audits/NAME.json."
        )


# ---- one segment ----


def audit_segment(own: Audit, segment: Segment, main: Callable) -> dict:
    """Make a segment again and compare it; returns its record for `audit.json`. Call it on all ranks."""
    began, result = time.monotonic(), new_result(segment)
    if broken := run_on_main(lambda: check_published(own.source, segment)):
        return finished(result, broken, began)
    arguments, result["not_compared"] = run_on_main(lambda: rerun.rerun_arguments(own.source, segment))
    of_tokens = run_on_main(lambda: find_tokens(own, segment))
    folder = own.out / f"steps-{segment.first}-{segment.last}"
    try:
        rerun.rerun_segment(segment, {**arguments, **of_tokens}, folder, own.device, main)
    except ProbeDiffers as refusal:
        print_main(f"probe     {refusal}")
        what = "probe loss: the start's weights do not give the recorded one"
        return finished(result, Difference(segment.first, what, segment.start.manifest["probe"]["loss"]), began)
    except Refusal as refusal:
        raise Refusal(f"--audit: these steps cannot be made again here: {refusal}") from None
    difference, found = run_on_main(lambda: compare_exactly(own.source, segment, folder, arguments))
    result |= found
    if difference is None or not result["elsewhere"]:
        return finished(result, difference, began)
    print_main(f"noise     {difference}: another {', '.join(result['elsewhere'])}, so once more for the noise")
    second = own.out / f"noise-{segment.first}-{segment.last}"
    rerun.rerun_segment(segment, {**rerun.other_batch(arguments), **of_tokens}, second, own.device, main)
    difference, found = run_on_main(lambda: compare_within_noise(own.source, segment, folder, second, arguments))
    return finished(result | found, difference, began, WITHIN)


def find_tokens(own: Audit, segment: Segment) -> dict:
    """{argument: value} that lead to the run's tokens, which are downloaded where they are not here (rank 0)."""
    locations = tokens.token_locations(own.source, segment, own.given)
    tokens.fetch_tokens(locations)
    return tokens.token_arguments(own.source, segment, locations, own.given)


def new_result(segment: Segment) -> dict:
    """The record of a segment before it is made again."""

    def named(state: State | None) -> dict | None:
        return state and {"name": state.name, "commit": state.commit, "manifest": state.digest}

    return {
        "first": segment.first,
        "last": segment.last,
        "tokens": segment.tokens,
        "start": named(segment.start),
        "end": named(segment.end),
        "log_of": named(segment.holder),
        "compared": ["log"] + (["weights", "moments"] if segment.has_end_state else []),
        "lines": len(segment.recorded_lines()),
        "not_compared": [],
        "elsewhere": [],
    }


def finished(result: dict, difference: Difference | None, began: float, equal: str = EQUAL) -> dict:
    """The record of a segment with its verdict. equal: the verdict without a difference. began: of time.monotonic."""
    return {
        **result,
        "verdict": DIFFERS if difference else equal,
        "difference": dataclasses.asdict(difference) | {"where": str(difference)} if difference else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def sentence(result: dict) -> str:
    """The verdict on a segment in words."""
    if result["verdict"] == DIFFERS:
        return f"differs first at {result['difference']['where']}"
    what = f"{result['lines']} lines of the log" + (
        ", weights and moments" if len(result["compared"]) > 1 else " alone"
    )
    without = f"; not compared: {'; '.join(result['not_compared'])}" if result["not_compared"] else ""
    if result["verdict"] == EQUAL:
        return f"{EQUAL}: {what}{without}"
    worst = ", ".join(
        f"{name} {value:.1e} (limit {result['limits'][name]:.1e})" for name, value in result["distances"].items()
    )
    return (
        f"equal within {compare.NOISE_FACTOR:g} times the noise of another micro-batch: {what}; relative differences"
        f" {worst}; single bits cannot be judged on another {', '.join(result['elsewhere'])}{without}"
    )


def check_published(source: HubSource | FolderSource, segment: Segment) -> Difference | None:
    """Verify all files of a segment's states; the first contradiction between those of one state, such as a published
    model that does not follow from its training state (rank 0). Raises Refusal for damaged files.
    """
    for state in {id(state): state for state in (segment.start, segment.end, segment.holder) if state}.values():
        source.pull(state)
        found = compare.state_difference(state.checkpoint, state.manifest) if state.checkpoint else None
        if found is None and state.checkpoint and state.model:
            found = compare.model_difference(state.checkpoint, state.model, state.record["files"], state.step)
        if found:
            return found
    return None


def what_differs(saved: dict, now: dict) -> list[str]:
    """In what makes bits differ one identity is not the other; also what an older record cannot tell."""
    changed = differences(saved, now)
    found = [name.replace("_", " ") for name in changed["environment"]] + sorted(changed["layout"])
    there, here = (identity["environment"].get("hardware", {}) for identity in (saved, now))
    if "hardware" not in found and any(name in here and name not in there for name in LATER_HARDWARE):
        found.append("hardware (its record is of an earlier version)")
    if not is_deterministic(now):
        found.append("order of sums (a GPU without --deterministic)")
    return found


def check_identity(recorded: dict, made: dict) -> None:
    """Raise Refusal where a rerun is of another run than the recorded one: its data, model or hyperparameters."""
    changed = differences(recorded, made)
    rows = {**changed["hyperparameters"], **changed["data"]}
    if rows:
        shown = "; ".join(f"{name}: {old} recorded, {new} here" for name, (old, new) in list(rows.items())[:6])
        raise Refusal(f"--audit: these steps cannot be made again by this version and with these tokens: {shown}.")


def logs_of(source, segment: Segment, folder: Path, arguments: dict) -> tuple[dict, dict]:
    """(the recorded lines, those of a rerun) of a segment (`compare.lines_of`)."""
    log, _, _ = rerun.results_of(segment, folder)
    recorded, computed = segment.recorded_lines(), compare.lines_of(log, segment.first, segment.last)
    last = (segment.last, True)
    if segment.end is segment.holder:  # which was saved before it was evaluated
        shown = compare.lines_of([{**source.evaluated(segment.end), "step": segment.last}], segment.last, segment.last)
        recorded |= shown
        if last in computed and last in shown:
            computed[last] = {name: value for name, value in computed[last].items() if name in shown[last]}
        elif last in computed:
            del computed[last]
    if arguments.get("eval_strategy") == "no":  # its last step is evaluated even so
        recorded, computed = ({key: log[key] for key in log if not key[1]} for log in (recorded, computed))
    return recorded, computed


def compare_exactly(source, segment: Segment, folder: Path, arguments: dict) -> tuple[Difference | None, dict]:
    """(the first difference, if there is one: of the log, the probe, weights, moments, other files of the end; {lines,
    elsewhere}) of a rerun, bit for bit (rank 0).
    """
    recorded, computed = logs_of(source, segment, folder, arguments)
    _, checkpoint, identity = rerun.results_of(segment, folder)
    check_identity(segment.holder.manifest["identity"], identity)
    elsewhere = what_differs(segment.holder.manifest["identity"], identity)
    changed = segment.changes()
    elsewhere += [f"{name} within the segment" for name in (*changed["environment"], *changed["layout"])]
    difference = compare.log_difference(recorded, computed)
    if difference is None and segment.has_end_state:
        difference = end_difference(segment, checkpoint, files=not elsewhere)
    return difference, {"lines": len(recorded), "elsewhere": elsewhere}


def end_difference(segment: Segment, checkpoint: Path, files: bool) -> Difference | None:
    """The first difference of the end's state, bit for bit. files: whether files other than tensors are compared, too:
    some depend on the number of processes, and on versions of libraries.
    """
    end, there = segment.end, read_json(checkpoint / verify.MANIFEST)
    found = None
    for pattern in (compare.WEIGHTS, verify.OPTIMIZER_FILES):
        found = found or compare.tensor_difference(end.checkpoint, checkpoint, pattern, end.step)
    # an earlier version did not record which windows its probe has
    for name in ("tokens", "probe") if end.manifest.get("rerun") else ("tokens",):
        if found is None and end.manifest.get(name) != there.get(name):
            found = Difference(end.step, f"{name} of the manifest", str(end.manifest.get(name)), str(there.get(name)))
    return found or (compare.file_difference(end.manifest["files"], checkpoint, end.step) if files else None)


def compare_within_noise(
    source, segment: Segment, folder: Path, second: Path, arguments: dict
) -> tuple[Difference | None, dict]:
    """(the first difference above NOISE_FACTOR times the noise, {noise, limits, distances}): the noise is that between
    the rerun and a second one (rank 0).
    """
    recorded, computed = logs_of(source, segment, folder, arguments)
    _, other = logs_of(source, segment, second, arguments)
    noise, distances = compare.log_distances(other, computed), compare.log_distances(recorded, computed)
    if segment.has_end_state:
        checkpoints = [rerun.results_of(segment, one)[1] for one in (folder, second)]
        start = segment.start.checkpoint if segment.start else None
        noise |= compare.tensor_distances(checkpoints[1], checkpoints[0], start)
        distances |= compare.tensor_distances(segment.end.checkpoint, checkpoints[0], start)
    limits = compare.limits_of(noise)
    difference = compare.log_difference(recorded, computed, limits)
    for name, value in distances.items():
        if difference is None and not value <= limits.get(name, 0.0):
            difference = Difference(segment.last, f"{name}: relative difference {value:.1e}, limit {limits[name]:.1e}")
    return difference, {"noise": noise, "limits": limits, "distances": distances}
