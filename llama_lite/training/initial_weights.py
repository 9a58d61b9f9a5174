"""The model whose weights a new run begins from, if --init_from names one: its config, its tokenizer, its weights."""

from pathlib import Path

from ..data.shards import read_tokenizer_record
from ..data.tokenizer import load_tokenizer, text_vocabulary_size, tokenizer_record
from ..distributed import print_main, run_on_main
from ..errors import Refusal
from ..hub.client import reference
from ..models import loading
from ..models.presets import load_model_config
from . import resume


def config_name(init_from: str) -> str:
    """The --model_config that the model has, as `load_model_config` reads it. Raises Refusal for a folder without a
    config.json, and for a name that neither is a folder nor on the Hub.
    """
    name = init_from if "/" in init_from else f"./{init_from}"  # a folder, not the preset of that name
    try:
        load_model_config(name)
    except Refusal as refusal:
        raise Refusal(
            f"--init_from {init_from}: no config of it can be read, and no --model_config is given ({refusal})."
        ) from None
    return name


def tokenizer_name(init_from: str) -> str:
    """The --tokenizer that the model has. Raises Refusal where it has none that can be used."""
    try:
        load_tokenizer(init_from)
    except Refusal as refusal:
        raise Refusal(
            f"--init_from {init_from}: no tokenizer of it can be used, and no --tokenizer is given ({refusal})."
        ) from None
    return init_from


def check_config(init_from: str, config) -> None:
    """Raise Refusal where the model is another one than that of a config, if its config.json can be read: what is wrong
    with it otherwise is said when the weights are looked for.
    """
    try:
        name = config_name(init_from)
    except Refusal:
        return
    resume.check_same_model(init_from, load_model_config(name), config)


class InitialWeights:
    """The weights that --init_from names, if it names some.

    config: of the run's model. tokenizer: of its text.
    """

    def __init__(self, run, init_from: str | None, config, tokenizer):
        self.run, self.init_from, self.config, self.tokenizer = run, init_from, config, tokenizer
        self.folder = None

    def find(self) -> None:
        """Find the weights, or download them. Raises Refusal where they are another model's, or lack ids of the
        tokens.
        """
        if self.init_from:
            self.folder = run_on_main(self._find)

    def _find(self) -> Path:
        """As `find` (rank 0). Prints a warning where the model has another tokenizer."""
        folder = resume.init_folder(self.run, self.init_from, self.config, text_vocabulary_size(self.tokenizer))
        theirs = read_tokenizer_record(folder) if (folder / "tokenizer.json").is_file() else None
        if theirs and theirs != tokenizer_record(self.tokenizer):
            print_main(
                f"WARNING   --init_from {self.init_from}: its weights were trained with another tokenizer than this"
                " run's, so its embeddings belong to other tokens"
            )
        return folder

    def load(self, model) -> None:
        """Load them into a model. Raises Refusal where they do not fill it."""
        if self.folder:
            loading.load_weights(model, self.folder)
            name = self.init_from if reference(self.init_from) else self.folder.name
            self.run.event("initialised", weights=name)
