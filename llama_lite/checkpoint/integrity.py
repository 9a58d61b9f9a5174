"""Checks that downloaded files are what they claim to be, before anything is built from them.

sha256 shows that a revision is as its author published it, not that it is well-formed. Checked here: JSON of the right
types, complete safetensors files, pickles that hold only numbers, and no model larger than its files.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from ..errors import Refusal

OBJECTS = (
    "config.json generation_config.json adapter_config.json base.json tokenizer.json tokenizer_config.json"
    " special_tokens_map.json added_tokens.json model.safetensors.index.json"
).split()  # files that hold one JSON object each

LAYERS = "num_hidden_layers n_layer n_layers num_layers num_decoder_layers decoder_layers".split()
EXPERTS = "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split()
UNCHECKED_WEIGHTS = 2**28  # a model of up to so many weights is built without comparing it with its files first
ELSEWHERE = "Use another revision."


def read_object(path: Path, source: str) -> dict:
    """The JSON object in a file. `source` names the file in messages. Raises Refusal where it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{source} is not valid JSON ({type(error).__name__}). {ELSEWHERE}") from None
    if not isinstance(value, dict):
        raise Refusal(f"{source} must hold a JSON object, but holds {type(value).__name__}. {ELSEWHERE}")
    return value


def shapes_of(path: Path, source: str) -> dict[str, list[int]]:
    """{tensor name: shape} from the header of a safetensors file, which the library checks against the file's size.
    `source` names the file in messages. Raises Refusal where the file is incomplete or malformed.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (a safetensors handle is no dict)
    except Exception as error:  # the library's own, OSError, and whatever a malformed header leads to
        raise Refusal(
            f"{source} is not a complete safetensors file ({' '.join(str(error).split())[:200]}). {ELSEWHERE}"
        ) from None


def check_objects(name: str, folder: Path) -> dict[str, dict]:
    """{file: the JSON object in it} of the OBJECTS of a model or adapter. Raises Refusal where one holds none."""
    return {file: read_object(folder / file, f"{file} of {name}") for file in OBJECTS if (folder / file).is_file()}


def check_model(name: str, folder: Path) -> None:
    """Raise Refusal where the files of a model or adapter are malformed, or describe a model that they do not hold."""
    objects = check_objects(name, folder)
    whole = [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else []
    index = objects.get("model.safetensors.index.json", {}).get("weight_map", {})
    if not isinstance(index, dict) or not all(
        isinstance(file, str) and "/" not in file and (whole or (folder / file).is_file()) for file in index.values()
    ):
        raise Refusal(f"model.safetensors.index.json of {name} names files that are not there. {ELSEWHERE}")
    adapter = "adapter_config.json" in objects
    named = sorted({folder / file for file in index.values()})
    paths = sorted(folder.glob("adapter_model.safetensors")) if adapter else whole or named
    shapes: dict[str, list[int]] = {}
    for path in paths:
        shapes |= shapes_of(path, f"{path.name} of {name}")
    if adapter:
        _check_adapter(name, objects, shapes)
    elif "config.json" in objects and paths:
        _check_sizes(name, folder, objects["config.json"], shapes)


def _check_adapter(name: str, objects: dict, shapes: dict) -> None:
    """Raise Refusal where the records of an adapter have wrong types or a rank larger than its tensors."""
    config, base = objects["adapter_config.json"], objects.get("base.json", {})
    for file, record, keys in (
        ("adapter_config.json", config, ("base_model_name_or_path", "revision")),
        ("base.json", base, ("hub_id", "revision")),
    ):
        for key in keys:
            if not isinstance(record.get(key), str | None):
                raise Refusal(f"{file} of {name} has {key} {record[key]!r}, which is not a string. {ELSEWHERE}")
    if "base.json" in objects and not isinstance(base.get("sha256"), str):
        raise Refusal(f"base.json of {name} does not identify the base's weights (sha256). {ELSEWHERE}")
    if not isinstance(base.get("config", {}), dict):
        raise Refusal(f"base.json of {name} has config {base['config']!r}, which is not a mapping. {ELSEWHERE}")
    pattern = config.get("rank_pattern") or {}
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])):
        if rank is not None and not (isinstance(rank, int) and 0 < rank <= max(largest, 1)):
            raise Refusal(
                f"adapter_config.json of {name} says rank {rank!r}, but the largest dimension in its weights is"
                f" {largest}. {ELSEWHERE}"
            )


def _check_sizes(name: str, folder: Path, config: dict, shapes: dict[str, list[int]]) -> None:
    """Raise Refusal where a config names more layers or experts than there are tensors, or describes a large model with
    more weights than its files hold. Weights are counted on the meta device.
    """
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    numbers: list[int] = []
    for key, value in _fields(config):
        limit = len(shapes) if key in LAYERS else max(len(shapes), largest) if key in EXPERTS else None
        if (
            limit is not None
            and value is not None
            and (not isinstance(value, int) or isinstance(value, bool) or value < 0)
        ):
            raise Refusal(f"config.json of {name} has {key} {value!r}, which is not a valid number. {ELSEWHERE}")
        if limit is not None and value is not None and value > limit:
            raise Refusal(
                f"config.json of {name} has {key} {value:,}, but its weights are {len(shapes):,} tensors. {ELSEWHERE}"
            )
        if isinstance(value, int):
            numbers.append(value)
    stored = sum(math.prod(shape) for shape in shapes.values())
    first, second, third = [*sorted(numbers, reverse=True), 1, 1, 1][:3]
    if first * second * third <= UNCHECKED_WEIGHTS or "quantization_config" in config:
        return
    expected = 0
    with contextlib.suppress(Exception):  # a config that makes no model is refused where it is loaded, with the reason
        expected = _count_described_weights(folder)
    if expected > 2 * stored + UNCHECKED_WEIGHTS:
        raise Refusal(
            f"config.json of {name} describes a model of {expected:,} parameters, but its files hold {stored:,}."
            f" {ELSEWHERE}"
        )


def _fields(value) -> Iterator[tuple[str, object]]:
    """(name, value) of every field of a config and of the configs nested in it (`text_config`)."""
    for key, field in value.items():
        yield key, field
        if isinstance(field, dict):
            yield from _fields(field)


def _count_described_weights(folder: Path) -> int:
    """Number of weights of the model that a config describes, built on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def check_state(folder: Path, checkpoint: str, left_out: tuple[str, ...] = ()) -> None:
    """Raise Refusal where the training state of a verified checkpoint is malformed: it must be safetensors, JSON and
    pickles of numbers, each of the right types.

    Files whose names begin with one of `left_out` are not read. `checkpoint` names it in messages.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    paths = sorted(path for path in folder.iterdir() if not (left_out and path.name.startswith(left_out)))
    for path in (path for path in paths if path.suffix == ".safetensors"):
        shapes_of(path, f"{path.name} of {checkpoint}")
    for name in OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name, f"{name} of {checkpoint}")
    if (folder / "adapter_config.json").is_file():
        check_model(checkpoint, folder)
    manifest = read_object(folder / "manifest.json", f"manifest.json of {checkpoint}")
    _check_types(manifest.get("probe"), {"loss": float, "sha256": str}, f"manifest.json of {checkpoint}: probe")
    progress = {"tokens": int, "pending_loss": list, "logged_step": int, "data_start": int, "schedule_start": int}
    _check_types(
        read_object(folder / "progress.json", f"progress.json of {checkpoint}"),
        progress,
        f"progress.json of {checkpoint}",
    )
    state = read_object(folder / "trainer_state.json", f"trainer_state.json of {checkpoint}")
    _check_types(state, {"global_step": int, "log_history": list}, f"trainer_state.json of {checkpoint}")
    for entry in state["log_history"]:
        _check_types(entry, {"step": int}, f"trainer_state.json of {checkpoint}: log_history")
    for path in (path for path in paths if path.suffix in (".pt", ".pth")):
        try:
            with safe_globals():
                value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip and torch
            raise Refusal(
                f"{path.name} of {checkpoint} is not a state of tensors and numbers ({type(error).__name__}); code in"
                f" it is never run. {ELSEWHERE}"
            ) from None
        if not isinstance(value, dict):
            raise Refusal(f"{path.name} of {checkpoint} holds a {type(value).__name__} instead of a state. {ELSEWHERE}")


def _check_types(record, types: dict[str, type], source: str) -> None:
    """Raise Refusal where a field of a record is missing or not of its type; an int counts as a float."""
    for key, expected_type in types.items():
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, (int, float) if expected_type is float else expected_type) or isinstance(value, bool):
            raise Refusal(f"{source} has {key} {value!r}, which is not of type {expected_type.__name__}. {ELSEWHERE}")
