"""Publishes the report of a study as a dataset repository on the Hub."""

import tempfile
from pathlib import Path

import yaml

from model_card.card import YOURS
from model_card.metadata import CardError

from ..distributed import print_main
from ..errors import Refusal
from ..files import write_text
from ..hub.client import Reference, check_no_private_values, commit_of, fetch, foreign_files, last_titles
from ..hub.commits import TRIES, commit_files, hub_errors_as_refusals
from ..hub.repository import keep_user_text

REPORT_HEAD = (  # a dataset card's
    "---\ntags: [llama-lite, study]\nconfigs:\n- config_name: results\n  data_files: results.csv\n---\n\n"
)
COMMIT_TITLE = "Report of a study"
TABLES = ("results.csv", "comparison.json", "contrasts.json")  # what is published beside the report


def push(out: Path, repo: str) -> None:
    """Push report, results and figures of a study to a dataset repository on the Hub, in one commit. What others wrote
    around the report and into the card's metadata stays. Raises Refusal, also where the repository has other files of
    the same names.
    """
    from huggingface_hub import HfApi

    kept = "The report is kept; run the same command again."
    with hub_errors_as_refusals(f"--hub_model_id {repo}", kept):
        HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
        if not any(_push(out, repo, commit_of(Reference(repo), "dataset")) for _ in range(TRIES)):
            raise Refusal(f"--hub_model_id {repo} kept changing. {kept}")
    print_main(f"hub       {repo} holds the report")


def _push(out: Path, repo: str, head: str) -> bool:
    """One commit upon `head`; False when the repository moved meanwhile. Raises Refusal and the client's errors."""
    paths = (*map(out.joinpath, TABLES), *sorted((out / "figures").glob("*.png")))
    files = {str(path.relative_to(out)): path for path in paths if path.exists()}
    with tempfile.TemporaryDirectory() as folder:
        files["README.md"] = Path(folder) / "README.md"
        write_text(files["README.md"], _card(out, repo, head, Path(folder)))
        check_no_private_values(files)
        changed, foreign = foreign_files(repo, head, files, COMMIT_TITLE, "dataset")
        if foreign:
            raise Refusal(
                f"--hub_model_id {repo} holds {', '.join(foreign[:3])} of somebody else, which is not written over:"
                " choose another name, or rename it there. The report stays here."
            )
        return commit_files(repo, changed, COMMIT_TITLE, head, "dataset")


def _card(out: Path, repo: str, head: str, folder: Path) -> str:
    """The dataset card of a study's report, with what others wrote into the card at `head`. Raises Refusal where that
    is the report of another study.
    """
    report = (out / "report.md").read_text(encoding="utf-8")
    text = f"{REPORT_HEAD}{report}\n\n{chr(10).join(YOURS)}\n"
    title = last_titles(repo, head, ["README.md"], "dataset").get("README.md")
    if title is None:
        return text
    old = fetch(Reference(repo), head, "README.md", folder / "old", "dataset").read_text("utf-8", errors="replace")
    old_title = _study_title(old)
    if old_title not in (None, _study_title(text)):
        raise Refusal(
            f"--hub_model_id {repo} holds the report of another study ({old_title}), which is not written over: choose"
            " another name."
        )
    if old_title and title == COMMIT_TITLE and YOURS[0] not in old:
        return text  # as earlier versions wrote it: nothing of others is in it
    try:
        return keep_user_text(text, old)
    except CardError as error:
        raise Refusal(f"--hub_model_id {repo}: {error}") from None


def _study_title(card: str) -> str | None:
    """Title of the study whose report a dataset card is; None for any other card."""
    from huggingface_hub import RepoCard

    try:
        parsed = RepoCard(card)
    except (ValueError, yaml.YAMLError):
        return None
    tags = parsed.data.to_dict().get("tags")
    if not isinstance(tags, list) or not {"llama-lite", "study"} <= set(map(str, tags)):
        return None
    return next((line for line in parsed.text.splitlines() if line.startswith("# ")), None)
