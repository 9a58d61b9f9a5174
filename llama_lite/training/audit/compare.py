"""What was published, compared with what a rerun gives: logged values, tensors, files. Exact, or with a tolerance."""

import contextlib
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from ...checkpoint.verify import OPTIMIZER_FILES
from ...data.tokenizer import read_tokenizer
from ...digests import is_as_recorded, sha256
from ...files import read_json
from ...hub.export import export_model, is_export

LOGGED = re.compile(r"loss|grad_norm|learning_rate|tokens|eval_(\w+_)?loss")  # fields of the log that are compared
EVALUATED = re.compile(r"eval_(\w+_)?loss")
# files of a checkpoint that two equal runs may have otherwise: wall times, what hashes them, what samples leave
UNCOMPARED = ("manifest.json", "trainer_state.json", "generation_config.json")
VOLATILE = ("transformers_version", "dtype", "torch_dtype")  # of the configs that are written beside a model
WEIGHTS = "model*.safetensors"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# Relative differences that are taken for noise wherever the measured noise is smaller: one rounding of float32. A rate
# follows from the step alone, in float64.
LEAST_NOISE, RATE_TOLERANCE = 2.0**-23, 1e-9
NOISE_FACTOR = 10.0  # a difference of up to so many times the noise is none


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where what was published first differs. step: of the log's line, or of the state. field: of that line, or a
    tensor or file. recorded, computed: the two values, None for one that is not there.
    """

    step: int
    field: str
    recorded: object = None
    computed: object = None

    def __str__(self) -> str:
        values = {name: value for name, value in (("recorded", self.recorded), ("computed", self.computed))}
        shown = ", ".join(f"{'absent' if value is None else value} {name}" for name, value in values.items())
        return f"step {self.step:,}, {self.field}" + ("" if set(values.values()) == {None} else f": {shown}")


# ---- the log ----


def lines_of(log: list[dict], first: int, last: int) -> dict[tuple[int, bool], dict]:
    """{(step, whether it is an evaluation): compared fields} of a log's lines of the steps `first` to `last`."""
    found: dict[tuple[int, bool], dict] = {}
    for entry in log:
        fields = {name: value for name, value in entry.items() if LOGGED.fullmatch(name)}
        is_evaluation = any(EVALUATED.fullmatch(name) for name in fields)
        if first <= entry["step"] <= last and ("loss" in fields or is_evaluation):
            found.setdefault((entry["step"], is_evaluation), {}).update(fields)
    return dict(sorted(found.items()))


def log_difference(recorded: dict, computed: dict, limits: dict[str, float] | None = None) -> Difference | None:
    """The first difference of two logs of `lines_of`. limits: {field: largest relative difference}, for a comparison
    within a tolerance.
    """
    for key in sorted({*recorded, *computed}):
        there, here = recorded.get(key), computed.get(key)
        if there is None or here is None:
            name = next(name for name in (there or here) if name != "tokens")
            return Difference(key[0], name, (there or {}).get(name), (here or {}).get(name))
        for name in sorted({*there, *here}):
            if not _is_equal(name, there.get(name), here.get(name), limits):
                return Difference(key[0], name, there.get(name), here.get(name))
    return None


def _is_equal(name: str, recorded, computed, limits: dict[str, float] | None) -> bool:
    """Whether two values of a field of the log are equal, or no further apart than their limit."""
    if limits is None or name == "tokens":
        return recorded == computed
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (recorded, computed)):
        return False
    return relative(recorded, computed) <= (RATE_TOLERANCE if name == "learning_rate" else limits[name])


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|."""
    return abs(value - reference) / max(abs(reference), 1e-30)


def log_distances(recorded: dict, computed: dict) -> dict[str, float]:
    """{field: largest relative difference} of two logs of `lines_of`, over the lines that both have."""
    found: dict[str, float] = {}
    for key in recorded.keys() & computed.keys():
        for name in recorded[key].keys() & computed[key].keys() - {"tokens", "learning_rate"}:
            values = recorded[key][name], computed[key][name]
            if all(isinstance(value, int | float) for value in values):
                found[name] = max(found.get(name, 0.0), relative(*values))
    return found


# ---- tensors ----


class Tensors:
    """The tensors of one kind in a checkpoint, read one at a time. patterns: of their files."""

    def __init__(self, checkpoint: Path, pattern: str):
        self.files = {}
        for path in sorted(checkpoint.glob(pattern)):
            with safe_open(path, "pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def tensor_difference(recorded: Path, computed: Path, pattern: str, step: int) -> Difference | None:
    """The first tensor that is not the same, bit for bit, in two checkpoints, and how many are not."""
    there, here = Tensors(recorded, pattern), Tensors(computed, pattern)
    if odd := sorted(there.files.keys() ^ here.files.keys()):
        return Difference(
            step, odd[0], *("present" if odd[0] in files else None for files in (there.files, here.files))
        )
    other = [name for name in there.files if not same_bits(there[name], here[name])]
    if not other:
        return None
    first, second = there[other[0]], here[other[0]]
    what = f"{other[0]} (and {len(other) - 1} of the other {len(there.files) - 1} tensors)"
    if first.shape != second.shape or first.dtype != second.dtype:
        return Difference(step, what, f"{first.dtype} {list(first.shape)}", f"{second.dtype} {list(second.shape)}")
    index = int((first != second).reshape(-1).nonzero()[0]) if bool((first != second).any()) else 0
    values = (float(tensor.reshape(-1)[index]) for tensor in (first, second))
    return Difference(step, f"{what}, element {index}", *values)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
    )


def tensor_distances(recorded: Path, computed: Path, start: Path | None) -> dict[str, float]:
    """Relative differences of the states of two checkpoints, each over all tensors: `update`, of the change of the
    weights since `start` (None: of the weights), and one for each field of the optimizer. inf where shapes differ.
    """
    there, here = Tensors(recorded, WEIGHTS), Tensors(computed, WEIGHTS)
    begin = Tensors(start, WEIGHTS) if start else None
    pairs = [("update", there, here, begin, name) for name in here.files]
    moments = Tensors(recorded, OPTIMIZER_FILES), Tensors(computed, OPTIMIZER_FILES)
    pairs += [(name.rpartition("|")[2], *moments, None, name) for name in moments[1].files]
    difference, size = {}, {}
    for kind, first, second, reference, name in pairs:
        if name not in first.files or first[name].shape != second[name].shape:
            return {kind: math.inf}
        a, b = first[name].double(), second[name].double()
        base = b - reference[name].double() if reference and name in reference.files else b
        difference[kind] = difference.get(kind, 0.0) + float((a - b).square().sum())
        size[kind] = size.get(kind, 0.0) + float(base.square().sum())
    return {kind: math.sqrt(value / max(size[kind], 1e-60)) for kind, value in difference.items()}


def limits_of(noise: dict[str, float]) -> dict[str, float]:
    """{what: largest relative difference that counts as equal}, from the noise that was measured."""
    return {name: NOISE_FACTOR * max(value, LEAST_NOISE) for name, value in noise.items()}


# ---- files ----


def file_difference(recorded: dict[str, dict], computed: Path, step: int) -> Difference | None:
    """The first file of a checkpoint, weights and optimizer state left out, that is not as recorded ({name: its record
    in the manifest}).
    """
    names = sorted(name for name in recorded if name not in UNCOMPARED and ".safetensors" not in name)
    name = next((name for name in names if not is_as_recorded(computed / name, recorded[name])), None)
    return Difference(step, name) if name else None


def state_difference(checkpoint: Path, manifest: dict) -> Difference | None:
    """The first contradiction between the files of one checkpoint: tokens read, and place on the schedule."""
    progress, step = read_json(checkpoint / "progress.json"), manifest["step"]
    if progress["tokens"] != manifest["tokens"]:
        return Difference(step, "tokens in progress.json and manifest.json", progress["tokens"], manifest["tokens"])
    scheduler = torch.load(checkpoint / "scheduler.pt", map_location="cpu", weights_only=True)
    reached, expected = scheduler.get("last_epoch"), step - progress["schedule_start"]
    if reached is not None and reached != expected:
        return Difference(step, "scheduler.pt: steps on the schedule", reached, expected)
    return None


def model_difference(checkpoint: Path, model: Path, files: dict[str, dict], step: int) -> Difference | None:
    """The first file of a published model that does not follow from its training state.

    model: its folder. files: {path in the revision: its record in revision.json}.
    """
    if not is_export(checkpoint, model):
        return Difference(step, "model.safetensors: not the weights of the revision's training state")
    with safe_open(model / "model.safetensors", "pt") as file:
        kinds = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 (a safetensors handle)
    with tempfile.TemporaryDirectory() as folder:
        exported, rewritten = Path(folder) / "exported", Path(folder) / "rewritten"
        export_model(checkpoint, exported, DTYPES.get(kinds[0], "bfloat16"))
        own = {path.name: path for path in _files(exported)}
        names = sorted(name for name in files if "/" not in name and name not in ("README.md", "model.safetensors"))
        other = [name for name in names if name not in own or not _same_file(own[name], model / name)]
        if other:
            _rewrite(model, rewritten)
        for name in other:
            if name not in own or not _lacks_only_added_fields(own[name], model / name, rewritten / name):
                return Difference(step, f"{name} of the model: it does not follow from the revision's training state")
    return None


def _rewrite(model: Path, folder: Path) -> None:
    """Write config, generation config and tokenizer of a published model into `folder` as the installed transformers
    does. What it cannot read is not written.
    """
    folder.mkdir()
    for read in (
        lambda: AutoConfig.from_pretrained(model, trust_remote_code=False),
        lambda: GenerationConfig.from_pretrained(model),
        lambda: read_tokenizer(model),
    ):
        with contextlib.suppress(Exception):  # malformed values lead to errors of every kind: the file differs
            read().save_pretrained(folder)


def _lacks_only_added_fields(own: Path, published: Path, rewritten: Path) -> bool:
    """Whether a published JSON file has the fields of `own`, but for some that the installed transformers adds, with
    the values that the published model has for it: versions write other fields for the same model. rewritten: of
    `_rewrite`.
    """
    if own.suffix != ".json" or not rewritten.is_file():
        return False
    return _is_part(_counted(published), _counted(own)) and _counted(rewritten) == _counted(own)


def _is_part(value: object, whole: object) -> bool:
    """Whether every field of a value is in `whole`, at every level of nested fields."""
    if not (isinstance(value, dict) and isinstance(whole, dict)):
        return value == whole
    return all(name in whole and _is_part(value[name], whole[name]) for name in value)


def _counted(path: Path) -> dict:
    """The fields of a JSON file but VOLATILE."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in fields.items() if name not in VOLATILE}


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.iterdir()) if path.is_file())


def _same_file(own: Path, published: Path) -> bool:
    """Whether two files have the same bytes, or are JSON with the same fields but VOLATILE."""
    if sha256(own) == sha256(published):
        return True
    return own.suffix == ".json" and _counted(own) == _counted(published)
