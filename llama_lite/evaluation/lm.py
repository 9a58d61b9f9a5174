"""lm-eval with this project's models: contexts are computed once, logits only at scored positions.

lm-eval runs a multiple-choice item once per option, with its context. Here the options follow their context in one row,
under a mask that lets each option see the context and itself. The numbers are those of lm-eval.
"""

import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable

import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..chat_format.rendering import apply_chat_template
from ..errors import Refusal
from ..kernels import probe

HEAD_ELEMENTS = 2**25  # logits held at once, in float32: 128 MB, and as much for their logarithms

# fields of a config that shorten attention
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")

# relative change of a score by another order of additions, in float32 and half precision
APART, APART_HALF = (1e-5, 2e-2)
CPU_TOKENS, GPU_TOKENS = 2048, 32_768  # in a batch
BATCH_SIZE = 16  # items that generate together
ANSWER_TOKENS = 256  # of a generated answer at most, where a task does not say: lm-eval's number


def inference_device() -> torch.device:
    """The device that models are evaluated on."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return torch.device(next(kind for kind, is_there in kinds.items() if is_there))


def batch_tokens_of(device: torch.device, batch_tokens: int | None) -> int:
    """Tokens per forward pass: `batch_tokens`, by default what suits the device."""
    return batch_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)


class SharedContextLM(HFLM):
    """lm-eval's HFLM over a loaded model; `truncated` counts requests that exceeded its context.

    batch_tokens: tokens per forward pass, padding included. A single row may be longer. `on_progress(fraction)` is
    called after each batch with the fraction of a call's requests that is answered.
    """

    def __init__(
        self,
        model,
        tokenizer,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        batch_size: int = BATCH_SIZE,
    ):
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype="float32",
            )
        # without importing peft for a plain model
        base_model = model.get_base_model() if hasattr(model, "peft_config") else model
        self.body, self.head = base_model.base_model, base_model.get_output_embeddings()
        self.num_embeddings = base_model.get_input_embeddings().num_embeddings
        self.batch_tokens = batch_tokens_of(self.device, batch_tokens)
        self.on_progress: Callable[[float], None] = lambda fraction: None
        self.to_generate = self.generated = 0  # of the current call, requests
        self.truncated, self.needs_full_forward, self.answer_blank = 0, not probe.head_is_separate(base_model), False
        self.shares_contexts = self._can_share_contexts(base_model)

    @torch.no_grad()
    def _can_share_contexts(self, base_model) -> bool:
        """Whether continuations that share a context get the scores that each gets separately: some models ignore the
        given mask or positions.

        False for models with an attention window shorter than the context, which this mask would disable.
        """
        config = base_model.config.get_text_config()
        if any(0 < (getattr(config, name, None) or 0) < self.max_length for name in WINDOWS):
            return False
        ids = probe.probe_ids(base_model)[0, :20].tolist()
        context, first, second = tuple(ids[:8]), tuple(ids[8:14]), tuple(ids[14:20])
        try:
            separate = [
                nats
                for row in ((context, {first: 0}), (context, {second: 0}))
                for nats, _ in self._score_rows([row])[0]
            ]
            shared = [nats for nats, _ in self._score_rows([(context, {first: 0, second: 1})])[0]]
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            return False
        tolerance = APART if next(base_model.parameters()).dtype == torch.float32 else APART_HALF
        return bool(np.allclose(shared, separate, rtol=tolerance, atol=0))

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """As lm-eval's, plus the space before an answer of this format where `answer_blank` is set.

        lm-eval leaves it out before options, so that it would score `ASSISTANT:Paris`, which no model was trained on.
        """
        return render_chat(self.tokenizer, chat_history, add_generation_prompt, self.answer_blank)

    def tok_encode(self, string: str, *args, **kwargs) -> list[int]:
        """As lm-eval's. Raises Refusal for a text with a special token that has no embedding."""
        ids = super().tok_encode(string, *args, **kwargs)
        self._check_ids(ids)
        return ids

    def _check_ids(self, ids: list[int]) -> None:
        """Raise Refusal for an id without an embedding: text that spells a special token gets its id here."""
        if (largest := max(ids, default=0)) >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise Refusal(
                f"an item holds the text {token!r}, a special token of this tokenizer, and the model has no embedding"
                f" for it (id {largest:,} of {self.num_embeddings:,}): leave that item out."
            )

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats, after one begin-of-text.

        As lm-eval's, but for tokenizers that put a begin-of-text of their own before a text: lm-eval scores that token,
        too, as if it were part of the text.
        """
        # batches are made by tokens, below
        before = self.batch_size_per_gpu, self.add_bos_token
        self.batch_size_per_gpu, self.add_bos_token = max(1, len(requests)), False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.batch_size_per_gpu, self.add_bos_token = before

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """As lm-eval's: the continuation of each prompt. Only the task says how: lm-eval also follows the generation
        config of the model's authors (a penalty for repetitions ...).
        """
        self.to_generate, self.generated = len(requests), 0
        with probe.plain_generation(self.model), probe.without_router_loss(self.model):
            return super().generate_until(requests, disable_tqdm)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As lm-eval's: (ids, mask) of a batch of prompts, each (items, tokens); prompts that are cut are counted."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.truncated += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As lm-eval's. context: (items, tokens)."""
        self._check_ids(context.flatten().tolist())
        answers = super()._model_generate(context, *args, **kwargs)
        self.generated += len(context)
        self.on_progress(self.generated / max(self.to_generate, 1))
        return answers

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each (texts, context ids, continuation ids).
        Raises Refusal where there is nothing to score, or more than the context holds.
        """
        rows, shared = [], {}
        for index, (texts, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise Refusal(_describe_unscorable(texts or ("", ""), context, continuation, self.max_length))
            max_context = self.max_length + 1 - len(continuation)
            self.truncated += len(context) > max_context
            context, continuation = tuple(context[-max_context:]), tuple(continuation)
            row = shared.get(context)
            # A context is shared while that saves more than the wider row costs.
            if (
                row is None
                or not self.shares_contexts
                or len(continuation) > len(context)
                or _num_tokens(row) > self.batch_tokens
            ):
                row = (context, {})
                rows.append(row)
                shared[context] = row
            row[1].setdefault(continuation, []).append(index)
        rows.sort(key=lambda row: -_num_tokens(row))
        answers: list = [None] * len(requests)
        progress_bar = tqdm(
            total=len(requests),
            desc="likelihoods",
            unit="request",
            disable=True if disable_tqdm or self.rank else None,
            leave=False,
        )
        begin, num_tokens = 0, list(itertools.accumulate(map(_num_tokens, rows)))
        while begin < len(rows):
            count = max(1, self.batch_tokens // _num_tokens(rows[begin]))
            batch = rows[begin : begin + count]
            for (_, continuations), scores in zip(batch, self._score_rows(batch), strict=True):
                for indices, answer in zip(continuations.values(), scores, strict=True):
                    for index in indices:
                        answers[index] = answer
                    progress_bar.update(len(indices))
            begin += count
            self.on_progress(num_tokens[min(begin, len(rows)) - 1] / max(num_tokens[-1], 1))
        progress_bar.close()
        return answers

    def _score_rows(self, rows: list[tuple[tuple, dict]]) -> list[list[tuple[float, bool]]]:
        """For each (context, continuations): (log-likelihood in nats, whether greedy) of each continuation."""
        width = max(map(_num_tokens, rows))
        ids = np.zeros((len(rows), width), np.int64)
        # owner 0: context, k: continuation k, -1: padding
        positions, owners = (np.zeros_like(ids), np.full_like(ids, -1))
        flat_positions, targets, bounds, branches = [], [], [0], False
        for row, (context, continuations) in enumerate(rows):
            context_length = len(context)
            ids[row, :context_length], positions[row, :context_length], owners[row, :context_length] = (
                context,
                range(context_length),
                0,
            )
            column = context_length
            for owner, continuation in enumerate(continuations, 1):
                num_inputs = len(continuation) - 1
                ids[row, column : column + num_inputs] = continuation[:-1]
                positions[row, column : column + num_inputs] = range(context_length, context_length + num_inputs)
                owners[row, column : column + num_inputs] = owner
                flat_positions += [
                    row * width + context_length - 1,
                    *range(row * width + column, row * width + column + num_inputs),
                ]
                targets += continuation
                bounds.append(len(targets))
                branches |= owner > 1 and num_inputs > 0
                column += num_inputs
        inputs = {"input_ids": torch.from_numpy(ids).to(self.device), "use_cache": False}
        if branches:
            inputs |= {
                "position_ids": torch.from_numpy(positions).to(self.device),
                "attention_mask": self._mask(owners),
            }
        nats, greedy = self._log_probs_at(
            inputs, torch.tensor(flat_positions, device=self.device), torch.tensor(targets, device=self.device)
        )
        answers = [(float(nats[a:b].sum()), bool(greedy[a:b].all())) for a, b in itertools.pairwise(bounds)]
        grouped, start = [], 0
        for _, continuations in rows:
            grouped.append(answers[start : start + len(continuations)])
            start += len(continuations)
        return grouped

    def _mask(self, owners: np.ndarray) -> torch.Tensor:
        """Attention mask (rows, 1, tokens, tokens), True where visible: each token sees the context and the earlier
        tokens of its own continuation. owners: (rows, tokens).
        """
        owner = torch.from_numpy(owners.astype(np.int16)).to(self.device)
        seen = (owner[:, None, :] == owner[:, :, None]).logical_or_(owner[:, None, :] == 0)
        return seen.logical_and_(torch.ones(seen.shape[1:], dtype=torch.bool, device=self.device).tril_())[:, None]

    def _log_probs_at(
        self, inputs: dict, flat_positions: torch.Tensor, targets: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """(log-probability in nats of each target at its flat position, whether it is the most likely), each of shape
        (targets,). Logits are computed in float32, HEAD_ELEMENTS at a time.
        """
        features = (
            self.model(**inputs).logits if self.needs_full_forward else self.body(**inputs).last_hidden_state
        ).flatten(0, 1)
        nats, greedy = [], []
        chunk_size = max(1, HEAD_ELEMENTS // self.vocab_size)
        for chunk, target_chunk in zip(flat_positions.split(chunk_size), targets.split(chunk_size), strict=True):
            logits = (features[chunk] if self.needs_full_forward else self.head(features[chunk])).float()
            # rounds as lm-eval's does; logsumexp is closer to the truth
            nats.append(logits.log_softmax(1).gather(1, target_chunk[:, None])[:, 0])
            greedy.append(logits.argmax(1) == target_chunk)
        return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    add_generation_prompt: bool = True,
    answer_blank: bool = False,
) -> str:
    """Messages in a tokenizer's chat format, up to where an answer begins. answer_blank: include the space before the
    answer, if the format has one, which lm-eval moves into the answer.
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


def _describe_unscorable(texts: tuple[str, str], context: list[int], continuation: list[int], most: int) -> str:
    """Why a continuation has no likelihood. texts: of context and continuation; most: tokens of the model's context."""
    prompt, answer = (text if len(text) <= 60 else f"...{text[-60:]}" for text in texts)
    if not context:
        why = f"the prompt {prompt!r} becomes no token of this tokenizer, so nothing comes before {answer!r}"
    elif not continuation:
        why = f"{answer!r} adds no token of this tokenizer to the prompt {prompt!r}, so it has no likelihood"
    else:
        why = f"{answer!r} has {len(continuation):,} tokens, and the context of this model holds {most:,}"
    return f"{why}. Leave the task out for this model, or change this text in the task."


def too_long_answers(tasks: dict, context: float) -> dict[str, int]:
    """{name: tokens of an answer} of the tasks ({name: task object}) whose answers leave no room for a prompt in a
    context of so many tokens.
    """
    answers = {
        name: normalize_gen_kwargs(task.config.generation_kwargs or {}, ANSWER_TOKENS)["max_gen_toks"]
        for name, task in tasks.items()
        if task.OUTPUT_TYPE == "generate_until"
    }
    return {name: tokens for name, tokens in answers.items() if tokens >= context}


def check_generation(lm: SharedContextLM, tasks: dict) -> None:
    """Raise Refusal where the answers of a task ({name: task object}) leave no room for a prompt in the context."""
    for name, tokens in too_long_answers(tasks, lm.max_length).items():
        raise Refusal(no_room(name, tokens, "this model", lm.max_length))


def no_room(task: str, tokens: int, model: str, context: int) -> str:
    """That answers of so many tokens leave no room for a prompt."""
    return (
        f"{task} generates up to {tokens:,} tokens (max_gen_toks), and the context of {model} holds {context:,} for"
        " prompt and answer together: leave the task out for this model, or define it with a lower max_gen_toks"
        " (--include_path)."
    )


def _num_tokens(row: tuple[tuple, dict]) -> int:
    """Tokens of a row: the context, and each continuation without its last token."""
    return len(row[0]) + sum(len(continuation) - 1 for continuation in row[1])


def _no_bar(progress_bar, *args, **kwargs):
    return progress_bar(*args, **{**kwargs, "disable": True})


@contextlib.contextmanager
def quiet():
    """Context without lm-eval's warnings about intended use (a model given as an object ...) and its progress bars.

    lm-eval also compiles a prompt's template for every item; here it is compiled once.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    from lm_eval.utils import env

    logger, modules = logging.getLogger("lm_eval"), (lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface)
    level, progress_bars = logger.level, [module.tqdm for module in modules]
    logger.setLevel(logging.ERROR)
    for module, progress_bar in zip(modules, progress_bars, strict=True):
        module.tqdm = functools.partial(_no_bar, progress_bar)
    env.from_string = functools.lru_cache(1024)(functools.partial(type(env).from_string, env))
    try:
        yield
    finally:
        env.__dict__.pop("from_string", None)
        logger.setLevel(level)
        for module, progress_bar in zip(modules, progress_bars, strict=True):
            module.tqdm = progress_bar


def run(lm: SharedContextLM, tasks: dict, samples: dict[str, list[int]], seed: int, chat: bool, unsafe: bool) -> dict:
    """lm-eval's result ({results, samples, ...}) for {name: task object}. The caller's random state does not change.

    samples: {name: sorted indices of the documents}. lm-eval's few-shot draws would continue from one evaluation to the
    next, so every task's seed is set again, and so is that of sampled answers. Raises Refusal for requests that the
    model cannot answer; `check_generation` finds those without room for a prompt before the first task.
    """
    lm.answer_blank = all(task.OUTPUT_TYPE != "generate_until" for task in tasks.values())
    states = random.getstate(), np.random.get_state()
    devices = [lm.device] if lm.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.callback(random.setstate, states[0])
        stack.callback(np.random.set_state, states[1])
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
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
