"""Make report.html of a run, an evaluation or a study: curves, samples, items and tables in a page without network.

    python -m llama_lite report runs/demo                            # writes runs/demo/report.html
    python -m llama_lite report runs/a runs/b                        # both over each other: writes runs/report.html
    python -m llama_lite report runs/demo --push_report you/demo     # also as a static Space on the Hub

The scripts write the same page when they finish. It is made from the records in the folders alone.
"""

import argparse
from pathlib import Path

from ..distributed import print_main
from ..errors import Refusal, no_space
from ..formatting import size


def main(argv: list[str]) -> None:
    """Write the page of the folders, and publish it where asked. Raises Refusal."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_lite report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a run, an evaluation or a study")
    parser.add_argument(
        "--output",
        type=Path,
        help="the file to write (default: report.html in the folder; of several, beside the first of them)",
    )
    parser.add_argument(
        "--push_report",
        nargs="?",
        const="",
        metavar="OWNER/NAME",
        help="publish the page as a static Space (default name, of one run: that of its repository, with -report)",
    )
    parser.add_argument("--private", action="store_true", help="make the Space a private one")
    arguments = parser.parse_args(argv)
    repo = None if arguments.push_report is None else arguments.push_report or published_name(arguments.folders)
    page = write(arguments.folders, arguments.output)
    print_main(f"report    {page} ({size(page.stat().st_size)})")
    if repo:
        from ..hub.space import push_page

        print_main(f"hub       {push_page(repo, page, arguments.private)}")


def write(folders: list[Path], output: Path | None) -> Path:
    """Write the page of the folders; returns its path. Raises Refusal for folders without records, and a full disk."""
    from model_card.metadata import CardError
    from model_card.report.page import NAME, write_report

    if missing := next((folder for folder in folders if not folder.is_dir()), None):
        raise Refusal(f"{missing}: no such folder. Give the folder of a run, of an evaluation or of a study.")
    try:
        return write_report(folders, output / NAME if output and output.is_dir() else output)
    except CardError as error:
        raise Refusal(str(error)) from None
    except OSError as error:
        where = output or error.filename or folders[0]
        problem = no_space(error, output) or f"{where}: {error.strerror}. Give another --output."
        raise Refusal(problem) from None


def published_name(folders: list[Path]) -> str:
    """The name of the Space for a run that was published. Raises Refusal for one that was not, and for several, since
    that name is of the page of one.
    """
    from ..files import read_jsonl

    folder, *others = folders
    if others:
        raise Refusal(f"a page of {len(folders)} folders needs a name of its own: --push_report OWNER/NAME.")
    rows = read_jsonl(folder / "published.jsonl")
    if not rows:
        raise Refusal(f"{folder} was not published, so its report has no name yet: --push_report OWNER/NAME.")
    return f"{rows[-1]['repo']}-report"
