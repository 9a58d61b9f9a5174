"""python -m model_card FOLDER: render the card of a run, of prepared tokens or of an evaluation again, from its
records.
"""

import argparse
import sys

from .card import write
from .metadata import CardError


def main() -> int:
    """Render a card; returns 2 for a folder of which none can be made."""
    parser = argparse.ArgumentParser(prog="python -m model_card", description=__doc__)
    parser.add_argument(
        "folder", help="runs/NAME (or runs/NAME/merged), data/NAME, or the output folder of an evaluation"
    )
    parser.add_argument(
        "--hub_model_id", help="owner/name that the card describes (default: where the run was published)"
    )
    arguments = parser.parse_args()
    try:
        print(write(arguments.folder, arguments.hub_model_id))
    except CardError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
