"""What a stranger's files say of themselves is held against what they are, before anything is built of them.

sha256 shows that a revision is as its author published it, not that it is one. Here: JSON of the right types, whole
safetensors files, no pickle that holds more than numbers, and no model larger than its files.
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

SMALL = 2**28  # weights of a model that is built without being held against its files first

ELSEWHERE = "Use another revision."


def read_object(path: Path, what: str) -> dict:
    """The JSON object that a file must hold. Raises Refusal."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{what} is no JSON ({type(error).__name__}). {ELSEWHERE}") from None
    if not isinstance(value, dict):
        raise Refusal(f"{what} holds a JSON {type(value).__name__} where an object belongs. {ELSEWHERE}")
    return value


def shapes_of(path: Path, what: str) -> dict[str, list[int]]:
    """{tensor: shape} by the header of a safetensors file, which the library holds against the file's size. Raises
    Refusal.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (a safetensors handle is no dict)
    except Exception as error:  # the library's own, OSError, and whatever a malformed header leads to
        raise Refusal(
            f"{what} is no whole safetensors file ({' '.join(str(error).split())[:200]}). {ELSEWHERE}"
        ) from None


def check_model(name: str, folder: Path) -> None:
    """Raise Refusal where the files of a model or adapter are none, or describe a model that they do not hold."""
    objects = {file: read_object(folder / file, f"{file} of {name}") for file in OBJECTS if (folder / file).is_file()}
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
    config, base = objects["adapter_config.json"], objects.get("base.json", {})
    for file, record, keys in (
        ("adapter_config.json", config, ("base_model_name_or_path", "revision")),
        ("base.json", base, ("hub_id", "revision")),
    ):
        for key in keys:
            if not isinstance(record.get(key), str | None):
                raise Refusal(f"{file} of {name} has {key} {record[key]!r}, which is no text. {ELSEWHERE}")
    if "base.json" in objects and not isinstance(base.get("sha256"), str):
        raise Refusal(f"base.json of {name} does not say of which weights it is (sha256). {ELSEWHERE}")
    if not isinstance(base.get("config", {}), dict):
        raise Refusal(f"base.json of {name} has config {base['config']!r}, which are no fields. {ELSEWHERE}")
    pattern = config.get("rank_pattern") or {}
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    for rank in (config.get("r"), *(pattern.values() if isinstance(pattern, dict) else [pattern])):
        if rank is not None and not (isinstance(rank, int) and 0 < rank <= max(largest, 1)):
            raise Refusal(
                f"adapter_config.json of {name} says rank {rank!r}, and the largest dimension in its weights is"
                f" {largest}. {ELSEWHERE}"
            )


def _check_sizes(name: str, folder: Path, config: dict, shapes: dict[str, list[int]]) -> None:
    """Every layer has a tensor, every expert one or a row of one; and a large model is counted, without memory, before
    it is made.
    """
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    numbers: list[int] = []
    for key, value in _fields(config):
        most = len(shapes) if key in LAYERS else max(len(shapes), largest) if key in EXPERTS else None
        if (
            most is not None
            and value is not None
            and (not isinstance(value, int) or isinstance(value, bool) or value < 0)
        ):
            raise Refusal(f"config.json of {name} has {key} {value!r}, which is no number of them. {ELSEWHERE}")
        if most is not None and value is not None and value > most:
            raise Refusal(
                f"config.json of {name} has {key} {value:,}, and its weights are {len(shapes):,} tensors. {ELSEWHERE}"
            )
        if isinstance(value, int):
            numbers.append(value)
    there = sum(math.prod(shape) for shape in shapes.values())
    first, second, third = [*sorted(numbers, reverse=True), 1, 1, 1][:3]
    if first * second * third <= SMALL or "quantization_config" in config:
        return
    expected = 0
    with contextlib.suppress(Exception):  # a config that makes no model is refused where it is loaded, with the reason
        expected = _described(folder)
    if expected > 2 * there + SMALL:
        raise Refusal(
            f"config.json of {name} describes a model of {expected:,} weights, and its files hold {there:,}."
            f" {ELSEWHERE}"
        )


def _fields(value) -> Iterator[tuple[str, object]]:
    """(name, value) of every field of a config and of those inside it (`text_config`)."""
    for key, one in value.items():
        yield key, one
        if isinstance(one, dict):
            yield from _fields(one)


def _described(folder: Path) -> int:
    """Weights of the model that a config means, built on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def check_state(folder: Path, what: str, left_out: tuple[str, ...] = ()) -> None:
    """Raise Refusal where the training state of a verified checkpoint is none: safetensors, JSON and pickles of
    numbers, of the right types.

    Files whose names begin with one of `left_out` are not looked at.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    looked_at = sorted(path for path in folder.iterdir() if not (left_out and path.name.startswith(left_out)))
    for path in (path for path in looked_at if path.suffix == ".safetensors"):
        shapes_of(path, f"{path.name} of {what}")
    for name in OBJECTS:
        if (folder / name).is_file():
            read_object(folder / name, f"{name} of {what}")
    if (folder / "adapter_config.json").is_file():
        check_model(what, folder)
    manifest = read_object(folder / "manifest.json", f"manifest.json of {what}")
    _need(manifest.get("probe"), {"loss": float, "sha256": str}, f"manifest.json of {what}: probe")
    progress = {"tokens": int, "pending_loss": list, "logged_step": int, "data_start": int, "schedule_start": int}
    _need(read_object(folder / "progress.json", f"progress.json of {what}"), progress, f"progress.json of {what}")
    state = read_object(folder / "trainer_state.json", f"trainer_state.json of {what}")
    _need(state, {"global_step": int, "log_history": list}, f"trainer_state.json of {what}")
    for entry in state["log_history"]:
        _need(entry, {"step": int}, f"trainer_state.json of {what}: log_history")
    for path in (path for path in looked_at if path.suffix in (".pt", ".pth")):
        try:
            with safe_globals():
                value = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle, zip and torch
            raise Refusal(
                f"{path.name} of {what} is no state of numbers ({type(error).__name__}); code in it is not run."
                f" {ELSEWHERE}"
            ) from None
        if not isinstance(value, dict):
            raise Refusal(f"{path.name} of {what} holds a {type(value).__name__} where a state belongs. {ELSEWHERE}")


def _need(record, kinds: dict[str, type], what: str) -> None:
    for key, kind in kinds.items():
        value = record.get(key) if isinstance(record, dict) else None
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise Refusal(f"{what} has {key} {value!r}, which is no {kind.__name__}. {ELSEWHERE}")
