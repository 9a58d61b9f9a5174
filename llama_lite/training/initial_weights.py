"""The model whose weights a new run begins from, if --init_from names one: its config, its tokenizer, its weights."""

from pathlib import Path

from ..checkpoint import integrity
from ..data.shards import read_tokenizer_record
from ..data.tokenizer import load_tokenizer, text_vocabulary_size, tokenizer_record
from ..distributed import print_main, run_on_main
from ..errors import Refusal
from ..hub import download
from ..hub.client import HubPermissionError, HubUnavailable, reference
from ..hub.local_names import check_misspelt
from ..models import loading
from ..models.presets import load_model_config
from ..models.references import FREE_FIELDS, need_weights


def config_name(init_from: str) -> str:
    """The --model_config that the model has, as `load_model_config` reads it. Raises Refusal for a folder without a
    config.json, and for a name that neither is a folder nor on the Hub.
    """
    check_misspelt("--init_from", init_from)
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
    check_misspelt("--init_from", init_from)
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
    check_same_model(init_from, load_model_config(name), config)


def check_same_model(init_from: str, theirs, config) -> None:
    """Raise Refusal where weights of the config `theirs` are not those of a model of this one."""
    if other := differing_fields(theirs, config):
        shown = [f"{name} is {there} there and {here} here" for name, (there, here) in list(other.items())[:6]]
        raise Refusal(
            f"--init_from {init_from} is another model: {'; '.join(shown)}{' ...' if len(other) > 6 else ''}. Leave out"
            " --model_config, or give the config.json of those weights."
        )


def differing_fields(theirs, config) -> dict[str, tuple]:
    """{field: (theirs, this one's)} of what must be equal for the weights of one config to be those of the other: the
    kind and tying first.
    """
    found = [{**one.to_dict(), "tie_word_embeddings": one.tie_word_embeddings} for one in (theirs, config)]
    names = [
        "model_type",
        "tie_word_embeddings",
        *sorted({*found[0], *found[1]} - {"model_type", "tie_word_embeddings"}),
    ]
    other = {name: (found[0].get(name), found[1].get(name)) for name in names if not FREE_FIELDS.search(name)}
    return {name: both for name, both in other.items() if both[0] != both[1]}


def init_folder(init_from: str, config, ids: int = 0) -> Path:
    """The folder of the weights that `--init_from` means, downloaded where it is a revision. Raises Refusal where they
    need another model.

    ids: of the tokenizer. Each must have a row in the weights; only rows beyond, which are padding, may be missing.
    """
    check_misspelt("--init_from", init_from)
    where, folder = reference(init_from), Path(init_from).expanduser()
    if where:
        try:
            folder = download.pull_model(where)[1]
        except (HubUnavailable, HubPermissionError) as error:
            raise Refusal(f"--init_from {where}: {error}. Run the same command again when the Hub answers.") from None
    integrity.check_model(init_from, folder)
    need_weights(folder)
    if (folder / "config.json").exists():
        theirs = load_model_config(str(folder.absolute()))
        check_same_model(init_from, theirs, config)
        if theirs.get_text_config().vocab_size < ids:
            raise Refusal(
                f"--init_from {init_from} has a vocabulary of {theirs.get_text_config().vocab_size:,} ids, but this"
                f" run's tokenizer has {ids:,}: prepare the text with the tokenizer of those weights (--tokenizer"
                " FOLDER)."
            )
        if said := loading.describe_mismatch(theirs, config.bos_token_id, config.eos_token_id):
            print_main(f"init      {init_from}: {said}")
    loading.check_weights(folder, config)
    return folder


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
        folder = init_folder(self.init_from, self.config, text_vocabulary_size(self.tokenizer))
        theirs = read_tokenizer_record(folder) if (folder / "tokenizer.json").is_file() else None
        if theirs and theirs != tokenizer_record(self.tokenizer):
            print_main(
                f"WARNING   --init_from {self.init_from}: its weights were trained with another tokenizer than this"
                f" run's, so its embeddings belong to other tokens: --tokenizer {self.init_from} keeps theirs"
            )
        return folder

    def load(self, model) -> None:
        """Load them into a model. Raises Refusal where they do not fill it."""
        if self.folder:
            loading.load_weights(model, self.folder)
            name = self.init_from if reference(self.init_from) else self.folder.name
            self.run.event("initialised", weights=name)
