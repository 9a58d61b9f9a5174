"""lm-eval with this project's models: contexts computed once, logits held only where something is scored.

lm-eval runs a multiple-choice item once an option, context and all. Here the options of one context lie behind it in
one row, under a mask that lets each see the context and itself. The numbers are those of lm-eval.
"""

import contextlib
import functools
import itertools
import logging
import random

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from ..chat_format.rendering import apply_chat_template
from ..kernels import probe

HEAD_ELEMENTS = 2**25  # logits held at once, in float32: 128 MB, and as much for their logarithms

WINDOWS = (
    "sliding_window",
    "attention_window_size",
    "attention_chunk_size",
)  # fields of a config that shorten attention

APART, APART_HALF = 1e-5, 2e-2  # of a score, in float32 and in half precision: what another order of additions changes

CPU_TOKENS, GPU_TOKENS = 2048, 32_768  # in a batch


class SharedContextLM(HFLM):
    """lm-eval's HFLM over a model that is loaded already; `truncated` counts requests that did not fit into its
    context.

    batch_tokens: tokens in a forward pass, padding included. One row may be longer.
    """

    def __init__(
        self, model, tokenizer, batch_tokens: int | None = None, max_length: int | None = None, batch_size: int = 16
    ):
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
            )
        inner = (
            model.get_base_model() if hasattr(model, "peft_config") else model
        )  # without importing peft for a plain model
        self.body, self.head = inner.base_model, inner.get_output_embeddings()
        self.batch_tokens = batch_tokens or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)
        self.truncated, self.whole, self.answer_blank = 0, not probe.head_is_separate(inner), False
        self.shares = self._branches_are_apart(inner)

    @torch.no_grad()
    def _branches_are_apart(self, inner) -> bool:
        """Whether continuations behind one context have the scores that each has alone: some models see no mask or
        positions but their own.

        A window of attention that is shorter than the context would be lost under this mask, so such models share
        nothing.
        """
        config = inner.config.get_text_config()
        if any(0 < (getattr(config, name, None) or 0) < self.max_length for name in WINDOWS):
            return False
        ids = probe.probe_ids(inner)[0, :20].tolist()
        context, first, second = tuple(ids[:8]), tuple(ids[8:14]), tuple(ids[14:20])
        try:
            alone = [
                nats for row in ((context, {first: 0}), (context, {second: 0})) for nats, _ in self._scores([row])[0]
            ]
            shared = [nats for nats, _ in self._scores([(context, {first: 0, second: 1})])[0]]
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return False
        tolerance = APART if next(inner.parameters()).dtype == torch.float32 else APART_HALF
        return bool(np.allclose(shared, alone, rtol=tolerance, atol=0))

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """lm-eval's, with the blank that stands before an answer of this format where `answer_blank` asks for it.

        lm-eval leaves it out before options, so that `ASSISTANT:Paris` would be scored, which nobody was trained on.
        """
        return render_chat(self.tokenizer, chat_history, add_generation_prompt, self.answer_blank)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        size, self.batch_size_per_gpu = self.batch_size, max(1, len(requests))  # batches are made by tokens, below
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu = size

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (_, context ids, continuation ids)."""
        rows, shared = [], {}
        for index, (_, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            self.truncated += len(context) > room
            context, continuation = tuple(context[-room:]), tuple(continuation)
            row = shared.get(context)
            # A context is shared while that saves more than the wider row costs.
            if row is None or not self.shares or len(continuation) > len(context) or _length(row) > self.batch_tokens:
                row = (context, {})
                rows.append(row)
                shared[context] = row
            row[1].setdefault(continuation, []).append(index)
        rows.sort(key=lambda row: -_length(row))
        answers: list = [None] * len(requests)
        bar = tqdm(
            total=len(requests),
            desc="likelihoods",
            unit="request",
            disable=True if disable_tqdm or self.rank else None,
            leave=False,
        )
        begin = 0
        while begin < len(rows):
            count = max(1, self.batch_tokens // _length(rows[begin]))
            batch = rows[begin : begin + count]
            for (_, continuations), found in zip(batch, self._scores(batch), strict=True):
                for indices, answer in zip(continuations.values(), found, strict=True):
                    for index in indices:
                        answers[index] = answer
                    bar.update(len(indices))
            begin += count
        bar.close()
        return answers

    def _scores(self, rows: list[tuple[tuple, dict]]) -> list[list[tuple[float, bool]]]:
        """For each (context, continuations): the answer of each continuation."""
        width = max(map(_length, rows))
        ids = np.zeros((len(rows), width), np.int64)
        positions, owners = (
            np.zeros_like(ids),
            np.full_like(ids, -1),
        )  # owner 0: context, k: continuation k, -1: padding
        wanted, targets, bounds, branches = [], [], [0], False
        for row, (context, continuations) in enumerate(rows):
            size = len(context)
            ids[row, :size], positions[row, :size], owners[row, :size] = context, range(size), 0
            at = size
            for owner, continuation in enumerate(continuations, 1):
                inner = len(continuation) - 1
                ids[row, at : at + inner] = continuation[:-1]
                positions[row, at : at + inner] = range(size, size + inner)
                owners[row, at : at + inner] = owner
                wanted += [row * width + size - 1, *range(row * width + at, row * width + at + inner)]
                targets += continuation
                bounds.append(len(targets))
                branches |= owner > 1 and inner > 0
                at += inner
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device), "use_cache": False}
        if branches:
            inputs |= {
                "position_ids": torch.from_numpy(positions).to(self.device),
                "attention_mask": self._mask(owners),
            }
        nats, greedy = self._at(
            inputs, torch.tensor(wanted, device=self.device), torch.tensor(targets, device=self.device)
        )
        answers = [(float(nats[a:b].sum()), bool(greedy[a:b].all())) for a, b in itertools.pairwise(bounds)]
        found, begin = [], 0
        for _, continuations in rows:
            found.append(answers[begin : begin + len(continuations)])
            begin += len(continuations)
        return found

    def _mask(self, owners: np.ndarray) -> torch.Tensor:
        """Mask (rows, 1, tokens, tokens), true where seen: each sees the context and, of its own branch, what came
        before.
        """
        owner = torch.from_numpy(owners.astype(np.int16)).to(self.device)
        seen = (owner[:, None, :] == owner[:, :, None]).logical_or_(owner[:, None, :] == 0)
        return seen.logical_and_(torch.ones(seen.shape[1:], dtype=torch.bool, device=self.device).tril_())[:, None]

    def _at(self, inputs: dict, wanted: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Log-probability of each target at its flat position, and whether it is the likeliest; logits in parts,
        float32.
        """
        flat = (self.model(**inputs).logits if self.whole else self.body(**inputs).last_hidden_state).flatten(0, 1)
        nats, greedy = [], []
        part = max(1, HEAD_ELEMENTS // self.vocab_size)
        for places, aims in zip(wanted.split(part), targets.split(part), strict=True):
            logits = (flat[places] if self.whole else self.head(flat[places])).float()
            nats.append(
                logits.log_softmax(1).gather(1, aims[:, None])[:, 0]
            )  # rounds as lm-eval's does; logsumexp is closer to the truth
            greedy.append(logits.argmax(1) == aims)
        return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def render_chat(tokenizer, messages, add_generation_prompt: bool = True, answer_blank: bool = False) -> str:
    """Messages in a tokenizer's chat format, up to where an answer begins. The blank, if any, is moved into the answer
    by lm-eval.
    """
    text = apply_chat_template(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    if answer_blank and add_generation_prompt:
        whole = apply_chat_template(tokenizer, [*messages, {"role": "assistant", "content": "x"}])
        text += " " if whole.startswith(f"{text} ") else ""
    return text


def _length(row: tuple[tuple, dict]) -> int:
    """Tokens of a row: the context, and of each continuation all but its last."""
    return len(row[0]) + sum(len(continuation) - 1 for continuation in row[1])


def _no_bar(bar, *args, **how):
    return bar(*args, **{**how, "disable": True})


@contextlib.contextmanager
def quiet():
    """Without lm-eval's warnings of what is meant here (a model given as an object ...), and its bars for whatever
    takes no time.

    It compiles the template of a prompt again for every item, too: here once.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from lm_eval.utils import env

    logger, modules = logging.getLogger("lm_eval"), (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    level, bars = logger.level, [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    for module, bar in zip(modules, bars, strict=True):
        module.tqdm = functools.partial(_no_bar, bar)
    env.from_string = functools.lru_cache(1024)(functools.partial(type(env).from_string, env))
    try:
        yield
    finally:
        env.__dict__.pop("from_string", None)
        logger.setLevel(level)
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


def run(lm, tasks: dict, samples: dict[str, list[int]], seed: int, chat: bool, unsafe: bool) -> dict:
    """lm-eval's own result ({results, samples, ...}) of task objects that are built already; the caller's random state
    is kept.

    `samples`: sorted numbers of the documents of each task. lm-eval's few-shot draws go on from one evaluation to the
    next unless every task's seed is set again.
    """
    lm.answer_blank = all(task.OUTPUT_TYPE != "generate_until" for task in tasks.values())
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        for task in tasks.values():
            task.set_fewshot_seed(seed)
        with quiet():
            return evaluator.evaluate(
                lm,
                {"tasks": tasks, "groups": {}, "group_map": {}},
                samples=samples,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=unsafe,
            )
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
