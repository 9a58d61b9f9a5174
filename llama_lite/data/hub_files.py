"""The files of a `--dataset` on the Hub."""

import re

from ..errors import Refusal
from .formats import TextFile, kind_of
from .text_source import ReadOptions, Source

HUB_PATHS = 500  # files per request for sizes

HUB_ADDRESS = re.compile(r"^hf://datasets/[^@]+@[^/]+/")  # of a dataset, before the path of a file in it


def hub_source(dataset: str, config: str | None, split: str, revision: str | None, options: ReadOptions) -> Source:
    """The files of a split of a dataset on the Hub. Raises Refusal."""
    from datasets import load_dataset_builder

    from ..errors import unreachable

    try:
        builder = load_dataset_builder(dataset, config, revision=revision)
        files = builder.config.data_files[split]
    except KeyError:
        raise Refusal(f"--dataset_split {split}: {dataset} has {', '.join(builder.config.data_files)}.") from None
    except Exception as error:  # the Hub's clients raise a dozen kinds, from three packages
        reason = "the Hub cannot be reached from here" if unreachable(error) else " ".join(str(error).split())
        raise Refusal(
            f"--dataset {dataset} is neither a local file or folder nor a dataset on the Hub (revision"
            f" {revision or 'main'}): {reason}"
        ) from None
    commits = {str(file).split("@")[1].split("/")[0] for file in files if "@" in str(file)}
    commit = commits.pop() if len(commits) == 1 else None
    record = {"dataset": dataset, "config": builder.config.name, "split": split, "revision": commit or revision}
    sizes = _hub_sizes(dataset, commit, [str(file) for file in files]) if commit else {}
    text_column = None if options.only_rows else options.text_column or "text"
    found = []
    for path in map(str, files):
        kind = kind_of(path)
        found.append(
            TextFile(
                path,
                HUB_ADDRESS.sub("", path),
                kind,
                sizes.get(path),
                text_column,
                separator=options.separator if kind == "text" else None,
            )
        )
    return Source("files", tuple(found), record, options.encoding)


def _hub_sizes(dataset: str, commit: str, files: list[str]) -> dict[str, int]:
    """{file: bytes} of files `hf://datasets/NAME@COMMIT/PATH`; {} where the Hub does not give sizes."""
    from huggingface_hub import HfApi

    paths = {file.partition(f"@{commit}/")[2]: file for file in files}
    names, sizes = list(paths), {}
    try:
        for begin in range(0, len(names), HUB_PATHS):
            for entry in HfApi().get_paths_info(
                dataset, names[begin : begin + HUB_PATHS], repo_type="dataset", revision=commit
            ):
                sizes[paths[entry.path]] = entry.size
    except Exception:  # the client raises a dozen kinds, from three packages; sizes are optional
        return {}
    return sizes
