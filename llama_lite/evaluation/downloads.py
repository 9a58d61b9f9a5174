"""Weights of an evaluation's models on the Hub: how much there is to download, what is downloaded ahead, and what is
removed again.

The weights of a model are downloaded before its first task (`references.fetch_weights`), so that 150 revisions need not
be here before the first is evaluated; those of the next one while a model is evaluated (`DownloadAhead`). They stay in
the Hub's cache, as all downloads do, or go after its last task (--remove_downloads).
"""

import functools
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from ..distributed import WORLD_SIZE, print_main
from ..errors import Refusal
from ..files import need_space
from ..formatting import size
from ..hub.client import Reference, remove_cached
from ..models.references import Located
from ..processes import die_with_parent
from .resolve import Model
from .sharing import SharedWork

AHEAD = 2**26  # bytes of weights that take longer to download than a process takes to start
# A process, because a thread in a download cannot be stopped. The client removes its partial file at SystemExit.
DOWNLOAD = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
from huggingface_hub import hf_hub_download
repo, commit, *names = sys.argv[1:]
for name in names:
    hf_hub_download(repo, name, revision=commit)
"""


def check_downloads(models: list[Model], needed: Collection[int], removes: bool) -> str | None:
    """A line about the weights to be downloaded for the models at the positions `needed`; None where there are none.

    removes: --remove_downloads. Raises Refusal where the disk of the Hub's cache cannot hold them: all, or, with
    `removes`, those of one model per process.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    bases = {_key(models[number].base): models[number].base for number in needed}
    sizes = sorted(base.remote_weights.missing_bytes for base in bases.values() if _is_missing(base))
    if not sizes:
        return None
    at_once = sum(sizes[-WORLD_SIZE:])
    remedy = "Make room, or set HF_HOME to a folder on a larger disk."
    if not removes:
        remedy = f"Add --remove_downloads, which needs {size(at_once)}, or make room."
    need_space(Path(HF_HUB_CACHE), at_once if removes else sum(sizes), "the weights of --models", remedy)
    end = "and removed after its last" if removes else "and kept in the Hub's cache (--remove_downloads: removed)"
    models_in_words = f"{len(sizes)} models" if len(sizes) > 1 else "1 model"
    return f"hub       {size(sum(sizes))} of weights of {models_in_words}, each downloaded before its first task {end}"


class DownloadAhead:
    """Downloads the weights of the next model into the Hub's cache while a model is evaluated; as a context, stops when
    the evaluation does.

    Nothing relies on it: when the turn of a model comes, `fetch_weights` verifies its weights, downloads what is not
    here, and reports what fails. With several processes it does nothing: they download side by side. needed: positions
    of the models that are to be evaluated.
    """

    def __init__(self, models: list[Model], needed: Collection[int]):
        self.models, self.needed = models, sorted(needed)
        self.number: int | None = None  # of the model that was last looked at
        self.process: subprocess.Popen | None = None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.process:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def start(self, number: int) -> None:
        """The weights of the model at position `number` are here: begin with those of the next one, where the disk has
        twice the space for them.
        """
        following = next((other for other in self.needed if other > number), None)
        if WORLD_SIZE > 1 or following is None or following == self.number:
            return
        self.number, base = following, self.models[following].base
        if not _is_missing(base) or (missing := base.remote_weights).missing_bytes < AHEAD:
            return
        from huggingface_hub.constants import HF_HUB_CACHE

        try:
            need_space(Path(HF_HUB_CACHE), 2 * missing.missing_bytes, base.name, "")
            self.process = subprocess.Popen(
                [sys.executable, "-c", DOWNLOAD, base.repo, base.commit, *sorted(missing.missing)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=functools.partial(die_with_parent, signal.SIGTERM),
            )
        except (Refusal, OSError):
            return

    def wait(self, number: int) -> None:
        """Wait until what was begun for the model at position `number` has ended."""
        if self.process and self.number == number and self.process.poll() is None:
            print_main(f"hub       waiting for the weights of {self.models[number].base.name}")
            self.process.wait()


class WeightRemoval:
    """Removes downloaded weights from the Hub's cache when the last (model, task) pair of their model is done.

    num_pairs: of each model. shared: counts the pairs of all processes. Weights that were in the cache when the
    evaluation began stay.
    """

    def __init__(self, models: list[Model], num_pairs: list[int], shared: SharedWork):
        self.models, self.shared = models, shared
        self.num_pairs: Counter[tuple] = Counter()  # of each base, which adapters share
        for model, count in zip(models, num_pairs, strict=True):
            self.num_pairs[_key(model.base)] += count

    def finish(self, number: int) -> None:
        """A pair of the model at position `number` is done."""
        base = self.models[number].base
        if not _is_missing(base):
            return
        if self.shared.add(f"weights of {base.repo} {base.commit}") == self.num_pairs[_key(base)]:
            remove_cached(Reference(base.repo), base.commit, base.remote_weights.missing)


def _key(base: Located) -> tuple:
    """What tells bases apart."""
    return base.repo, base.commit, base.folder


def _is_missing(base: Located) -> bool:
    """Whether weights of a base were not here when the evaluation began."""
    return base.remote_weights is not None and bool(base.remote_weights.missing)
