"""The weights that a new run begins from, if --init_from names some."""

from ..distributed import run_on_main
from ..hub.client import reference
from ..models import loading
from . import resume


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
        if self.init_from:
            ids = self.manifest["tokenizer"]["vocab_size"]
            self.folder = run_on_main(resume.init_folder, self.run, self.init_from, self.config, ids)

    def load(self, model) -> None:
        """Load them into a model. Raises Refusal where they do not fill it."""
        if self.folder:
            loading.load_weights(model, self.folder)
            name = self.init_from if reference(self.init_from) else self.folder.name
            self.run.event("initialised", weights=name)
