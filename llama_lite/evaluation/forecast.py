"""How long an evaluation takes: the tokens that its items need, from a sample of each task, and how fast its models are
here; and what is left of it while it runs.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..digests import sha256
from ..distributed import RANK, WORLD_SIZE
from ..formatting import seconds_in_words, shortened
from ..kernels.probe import context_of
from ..machine import hardware
from ..models.presets import flops_per_token
from ..models.references import load_config
from ..processes import seconds_since_start
from .lm import BATCH_SIZE, batch_tokens_of, inference_device
from .runner import Settings, kept_pairs, runs_of
from .store import Store, chosen

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from .resolve import Model
    from .tasks.definition import EvalTask

SAMPLED = 8  # items of a task whose tokens are counted
MAX_TIMED = 1.0  # seconds of a batch that is still timed
ENOUGH = 0.5  # seconds of timed batches
SEQUENCE = 256  # tokens of a timed row
GENERATED = 8  # tokens of a timed generation
FRACTION = 0.4  # of the peak FLOP/s, assumed for a model whose batches are too long to be timed
# tables, cards and figures after the last pair, as shares of the time that this process took to start, which tells how
# fast the machine is: those of the evaluation, and of each run whose models it has
EVALUATION_CARD, RUN_CARD = 0.15, 0.4
MOST_START = 60.0  # seconds; a longer start was a download
PRIOR = 0.05  # of the forecast: how long it counts as much as what was measured since


@dataclasses.dataclass(frozen=True)
class Work:
    """What the items of a task need. tokens: through a forward pass; generated: tokens that are made one after the
    other, at most; seconds: of this process, to write and encode the prompts.
    """

    tokens: float = 0.0
    generated: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of a model per token of a forward pass, and per generated token where BATCH_SIZE items generate. timed:
    on this machine, else from FLOPs.
    """

    token: float
    generated: float
    timed: bool


# ---- what there is to do ----


def work_of(task: EvalTask, limit: int | None, seed: int, tokenizer: PreTrainedTokenizerBase, context: int) -> Work:
    """The Work of the `limit` items of a task, from SAMPLED of them. context: positions of the model."""
    items = [(leaf, number) for leaf, numbers in chosen(task, limit, seed).items() for number in numbers]
    sampled = items[:: max(1, len(items) // SAMPLED)][:SAMPLED]
    began, tokens, generated = time.perf_counter(), 0, 0
    for leaf, number in sampled:
        for context_text, continuations, own_generated in _rows(task, leaf, number, seed):
            count, *others = [_count(tokenizer, text) for text in (context_text, *continuations)]
            if task.leaves[leaf].OUTPUT_TYPE == "loglikelihood_rolling" and count > context:
                count = -(-count // context) * context  # in windows, of which the last is filled up
            else:
                count = min(count, context)
            tokens += count + sum(others)
            generated += own_generated
    factor = len(items) / len(sampled)
    # a prompt is written for the digest of the pair, then for lm-eval
    return Work(factor * tokens, factor * generated, 2 * factor * (time.perf_counter() - began))


def _rows(task: EvalTask, leaf: str, number: int, seed: int) -> list[tuple[str, list[str], int]]:
    """(context, continuations, tokens to generate at most) of each row that an item gives."""
    lm_task = task.leaves[leaf]
    lm_task.set_fewshot_seed(seed)
    document, kind = lm_task.eval_docs[number], lm_task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        return [(lm_task.doc_to_target(document), [], 0)]
    context = lm_task.fewshot_context(document, task.n_shot)
    found = lm_task.construct_requests(document, context)
    rows: dict[str, tuple[str, list[str], int]] = {}
    for request in found if isinstance(found, list) else [found]:
        text, second = request.args[0], request.args[1]
        generated = second.get("max_gen_toks", 256) if kind == "generate_until" else 0
        rows.setdefault(text, (text, [], generated))[1].extend([second] if isinstance(second, str) else [])
    return list(rows.values())


def _count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- how fast the models are ----


def speed_of(config: PretrainedConfig, settings: Settings, generates: bool) -> Speed:
    """The Speed of a model of this config: batches of random weights are timed, or, where one would take longer than
    MAX_TIMED, its FLOPs are divided by those of the device. generates: time generation, too. The global random state
    does not change.
    """
    device, precision = inference_device(), settings.dtype
    width = min(SEQUENCE, context_of(config) or SEQUENCE)
    per_token = flops_per_token(config, width) / 3 / (FRACTION * hardware.reachable_flops(precision, device))
    rows = max(1, batch_tokens_of(device, settings.batch_tokens) // width)
    if per_token * rows * width > MAX_TIMED:
        return Speed(per_token, per_token * BATCH_SIZE, False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        return _time(config, device, precision, (rows, width), generates)


def _time(
    config: PretrainedConfig, device: torch.device, precision: str, shape: tuple[int, int], generates: bool
) -> Speed:
    """As `speed_of`, by measurement. shape: rows and tokens of a batch."""
    from transformers import AutoModelForCausalLM

    def seconds(function: Callable, *args, **kwargs) -> float:
        began = time.perf_counter()
        function(*args, **kwargs)
        hardware.synchronize(device)
        return time.perf_counter() - began

    with device:
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, precision), trust_remote_code=False
        ).eval()
        ids = torch.randint(0, config.get_text_config().vocab_size, shape)
    model.eval()
    per_token, total = [], 0.0
    while len(per_token) < 3 or (total < ENOUGH and len(per_token) < 10):
        rows = ids[:, : max(1, shape[1] - 3 * len(per_token))]  # each of another shape, as in an evaluation
        total += (one := seconds(model.base_model, input_ids=rows, use_cache=False))
        per_token.append(one / rows.numel())
    usual, generating = statistics.median(per_token[1:]), 0.0  # the first allocates and chooses kernels
    if generates:
        prompts = ids[:1, :4].expand(BATCH_SIZE, 4)
        end = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "trust_remote_code": False}
        mask = torch.ones_like(prompts)
        generating = seconds(model.generate, prompts, attention_mask=mask, max_new_tokens=GENERATED, **end) / GENERATED
    return Speed(usual, generating, True)


# ---- the forecast ----


@dataclasses.dataclass(frozen=True)
class Forecast:
    """seconds: {(model, task), as positions: of one process} of each pair that is still to be computed. pairs: how many
    there are in all. timed: whether every model was timed; cards: seconds of tables, cards and figures; problem: why
    nothing is known, or None.
    """

    seconds: dict[tuple[int, int], float]
    pairs: int
    timed: bool = True
    cards: float = 0.0
    problem: str | None = None

    @property
    def total(self) -> float:
        """Seconds of all processes together."""
        return sum(self.seconds.values())

    def line(self) -> str:
        """What is said before the first item."""
        if self.problem:
            return f"time      unknown: {self.problem}"
        after = f"{seconds_in_words(max(self.cards, 1))} for tables, cards and figures"
        if not self.seconds:
            return f"time      about {after}: all {self.pairs} (model, task) pairs are kept from before"
        kept = f", {self.pairs - len(self.seconds)} are kept" if len(self.seconds) < self.pairs else ""
        source = "batches timed here" if self.timed else "estimated from FLOPs"
        processes = f" on {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
        computing = max(self.total / WORLD_SIZE, 1)
        return (
            f"time      about {seconds_in_words(computing + self.cards)}: {seconds_in_words(computing)}{processes} for"
            f" {len(self.seconds)} (model, task) pairs{kept} ({source}; loading of large models comes on top), then"
            f" {after}"
        )


def forecast(
    store: Store, found: list[Model], work: list[list[tuple[EvalTask, int | None]]], settings: Settings
) -> Forecast:
    """The Forecast of the (task, limit) pairs `work` of each model (rank 0). What fails here fails nothing: the
    evaluation itself will say what is wrong.
    """
    pairs, start = sum(map(len, work)), min(seconds_since_start(), MOST_START)
    try:
        expected = _forecast(found, work, settings, kept_pairs(store, found, work, settings), pairs)
        return dataclasses.replace(expected, cards=start * (EVALUATION_CARD + RUN_CARD * len(runs_of(found))))
    except Exception as error:  # a task or model of any kind
        return Forecast({}, pairs, problem=f"{type(error).__name__}: {shortened(error)}")


def _forecast(found, work, settings: Settings, kept: set[tuple[int, int]], pairs: int) -> Forecast:
    """As `forecast`. kept: the pairs that are not computed again."""
    speeds: dict[tuple, Speed] = {}
    works: dict[tuple, Work] = {}
    tokenizers: dict[tuple, PreTrainedTokenizerBase] = {}
    seconds = {}
    for number, model in enumerate(found):
        left = [position for position in range(len(work[number])) if (number, position) not in kept]
        if not left:
            continue
        config, named = load_config(model.base), _tokenizer_key(model, settings.tokenizer_name)
        if named not in tokenizers:
            tokenizers = {named: model.tokenizer(settings.tokenizer_name)}  # one at a time: they are large
        tokenizer, context = tokenizers[named], context_of(config) or SEQUENCE
        for position in left:
            task, limit = work[number][position]
            what = task.name, limit, named, context
            if what not in works:
                works[what] = work_of(task, limit, settings.seed, tokenizer, context)
            one, generates = works[what], works[what].generated > 0
            kind = generates, str({name: value for name, value in config.to_dict().items() if name != "_name_or_path"})
            speed = speeds[kind] = speeds.get(kind) or speed_of(config, settings, generates)
            batches = speed.token * one.tokens + speed.generated * one.generated / BATCH_SIZE
            seconds[number, position] = batches + one.seconds
    return Forecast(seconds, pairs, all(speed.timed for speed in speeds.values()))


def _tokenizer_key(model: Model, name: str | None) -> tuple:
    """What tells the tokenizers of models apart, without loading them."""
    files = [located.folder / "tokenizer.json" for located in (model.adapter, model.base) if located]
    there = [path for path in files if path.is_file()]
    return (name,) if name else ("", sha256(there[0]) if there else str(model.base.folder))


# ---- while it runs ----


class Progress:
    """The progress bar over all pairs of all processes, and the time that is left (shown by rank 0).

    forecast: the Forecast; shared: the SharedWork, which counts the pairs.
    """

    def __init__(self, forecast: Forecast, shared):
        self.forecast, self.shared, self.began = forecast, shared, time.monotonic()
        self.pairs, self.done = 0, 0.0  # pairs that are done, and their forecast seconds with those of a part of one
        hidden, shown = True if RANK else None, "{desc} {percentage:3.0f}%|{bar}| {postfix}"
        self.bar = tqdm(total=max(forecast.total, 1e-9), desc="evaluating", disable=hidden, bar_format=shown)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def advance(self, model: int, task: int, fraction: float) -> None:
        """So much of the requests of a pair, which this process computes, is answered. Raises FailedElsewhere where
        another process has failed.
        """
        self.shared.stop_if_failed()
        # texts are scored in more than one call, and each begins at 0
        self._show(max(self.done, self.shared.work + fraction * self._seconds(model, task)))

    def finish(self, model: int, task: int) -> None:
        """A pair of this process is done."""
        self.pairs, done = self.shared.count(self._seconds(model, task))
        self._show(done)

    def left(self) -> float:
        """Seconds that are left: at the pace of the forecast at first, more and more at the pace that is measured."""
        total = self.forecast.total
        elapsed = time.monotonic() - self.began + PRIOR * total / WORLD_SIZE
        return elapsed * (total - self.done) / (self.done + PRIOR * total) if total else 0.0

    def left_in_words(self) -> str:
        """`, 4.2 min left`; nothing where nothing is known, or left."""
        left = self.left()
        return f", {seconds_in_words(left)} left" if left else ""

    def _seconds(self, model: int, task: int) -> float:
        return self.forecast.seconds.get((model, task), 0.0)

    def _show(self, done: float) -> None:
        self.done = min(done, self.forecast.total)
        self.bar.set_postfix_str(f"{self.pairs} of {self.forecast.pairs} tasks{self.left_in_words()}", refresh=False)
        self.bar.update(self.done - self.bar.n)
