"""The fast encoder gives the tokenizer's ids, on every text."""

import json

import numpy as np
import pytest

from llama_lite import tokenizers

END = "<|endoftext|>"
HARD = [
    "A document that says <|endoftext|> in the middle.",
    "It's naïve: 中文, עברית, 🙂🙂‍↔️, ½ and ǆ; tabs\t\tand\r\nlines\n\n\n  x",
    "Before" + " " * 1_000_000 + "after",
    "a" * 3000 + " " * 3000 + "1234567890" * 100,
    "\x00\x1c\x85\u2028\u3000 odd blanks \ufeff",
]


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.gpt2_tokenizer()


def test_gpt2_is_gpt2(gpt2):
    assert len(gpt2) == 50257 and gpt2.eos_token_id == 50256 and gpt2.eos_token == END
    assert gpt2("Hello, I am a language model,")["input_ids"] == [15496, 11, 314, 716, 257, 3303, 2746, 11]


@pytest.mark.parametrize("text", HARD, ids=["end-of-text", "unicode", "million blanks", "long runs", "control"])
def test_fast_encoder_gives_the_tokenizers_ids(gpt2, text):
    encode = tokenizers.Encoder(gpt2)
    assert encode.fast is not None
    found = encode(text).tolist()
    assert found == gpt2(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert gpt2.eos_token_id not in found


@pytest.mark.parametrize("extra", ["", tokenizers.Encoder.BETWEEN, HARD[2]], ids=["plain", "the separator", "million blanks"])
def test_a_batch_is_its_documents_one_by_one(gpt2, extra):
    encode, texts = tokenizers.Encoder(gpt2), ["Two words  ", "", extra, " and\n\n", "more" + END]
    ids, ends, slow = encode.batch(texts)
    found = [part.tolist() for part in np.split(ids, ends[:-1])]
    assert found == [[50256, *gpt2(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]] for text in texts]
    assert ends[-1] == len(ids) and slow == [text == HARD[2] for text in texts]
    assert encode.slow_documents == sum(slow)


def test_fast_encoder_on_real_text_with_a_learnt_vocabulary(text):
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = tokenizers.train_tokenizer(iter(documents), 600)
    encode = tokenizers.Encoder(tokenizer)
    assert encode.fast is not None
    for document in documents:
        assert encode(document).tolist() == tokenizer(document, split_special_tokens=True, add_special_tokens=False)["input_ids"]


def test_learning_a_tokenizer_twice_gives_the_same(text):
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    first, second = (tokenizers.train_tokenizer(iter(texts), 600) for _ in range(2))
    assert tokenizers.tokenizer_record(first) == tokenizers.tokenizer_record(second)
