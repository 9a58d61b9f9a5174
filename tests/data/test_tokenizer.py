"""The fast encoder gives the tokenizer's ids, on every text."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import END, HARD, with_end_at

from llama_lite.data import tokenizer as data_tokenizer
from llama_lite.errors import Refusal
from llama_lite.models import loading, references

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def gpt2():
    return data_tokenizer.gpt2_tokenizer()


def test_gpt2_is_gpt2(gpt2):
    assert len(gpt2) == 50257 and gpt2.eos_token_id == 50256 and gpt2.eos_token == END
    assert gpt2("Hello, I am a language model,")["input_ids"] == [15496, 11, 314, 716, 257, 3303, 2746, 11]


@pytest.mark.parametrize("text", HARD, ids=["end-of-text", "unicode", "million blanks", "long runs", "control"])
def test_fast_encoder_gives_the_tokenizers_ids(gpt2, text):
    encode = data_tokenizer.Encoder(gpt2)
    assert encode.fast is not None
    found = encode(text).tolist()
    assert found == gpt2(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert gpt2.eos_token_id not in found


@pytest.mark.parametrize(
    "extra", ["", data_tokenizer.Encoder.BETWEEN, HARD[2]], ids=["plain", "the separator", "million blanks"]
)
def test_a_batch_is_its_documents_one_by_one(gpt2, extra):
    encode, texts = data_tokenizer.Encoder(gpt2), ["Two words  ", "", extra, " and\n\n", "more" + END]
    ids, ends, slow = encode.batch(texts)
    found = [part.tolist() for part in np.split(ids, ends[:-1])]
    assert found == [
        [50256, *gpt2(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]] for text in texts
    ]
    assert ends[-1] == len(ids) and slow == [text == HARD[2] for text in texts]
    assert encode.slow_documents == sum(slow)


def test_fast_encoder_on_real_text_with_a_learnt_vocabulary(text):
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = data_tokenizer.train_tokenizer(iter(documents), 600)
    encode = data_tokenizer.Encoder(tokenizer)
    assert encode.fast is not None
    for document in documents:
        assert (
            encode(document).tolist()
            == tokenizer(document, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        )


def test_a_very_long_word_is_learnt_from_in_pieces_and_encoded_whole():
    """The trainer's work on a word grows with the square of its length: it gets none above LONGEST_WORD. A pair across
    two pieces is none that it sees.
    """
    piece = "z" + "x" * (data_tokenizer.LONGEST_WORD - 2) + "q"
    long = piece * 20
    learnt, of_pieces = (data_tokenizer.train_tokenizer(iter(texts), 290) for texts in ([long], [piece] * 20))
    assert data_tokenizer.tokenizer_record(learnt) == data_tokenizer.tokenizer_record(of_pieces)
    assert "xx" in learnt.get_vocab() and not any("qz" in token for token in learnt.get_vocab())
    assert learnt.backend_tokenizer.pre_tokenizer.pre_tokenize_str(long) == [(long, (0, len(long)))]
    encode = data_tokenizer.Encoder(learnt)
    assert encode.fast is not None and encode(long).tolist() == own_ids(learnt, long)
    whole = data_tokenizer.train_tokenizer(iter(["qz" * 20]), 290)
    assert "qz" in whole.get_vocab()  # where it is within a word


def own_ids(tokenizer, text):
    return tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("token", ["argument", " the ", "<b>", "é"])
def test_added_tokens_have_the_tokenizers_ids(gpt2, token, special):
    from tokenizers import AddedToken

    tokenizer = data_tokenizer.gpt2_tokenizer()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    encode = data_tokenizer.Encoder(tokenizer)
    texts = [f"An argument of the function, <b>bold</b>, {token}{token} café.", "plain words"]
    assert [encode(text).tolist() for text in texts] == [own_ids(tokenizer, text) for text in texts]
    assert special or tokenizer.convert_tokens_to_ids(token) in encode(texts[0])
    ids, ends, _ = encode.batch(texts)
    assert [part.tolist() for part in np.split(ids, ends[:-1])] == [
        [50256, *own_ids(tokenizer, text)] for text in texts
    ]


def test_ids_with_holes_keep_their_number(tmp_path):
    tokenizer = with_end_at(70_000, tmp_path)
    assert data_tokenizer.vocabulary_size(tokenizer) == 70_001 > len(tokenizer)
    assert data_tokenizer.tokenizer_record(tokenizer)["vocab_size"] == 70_001
    ids, _, _ = data_tokenizer.Encoder(tokenizer).batch(["some words", "more words"])
    assert (ids == 70_000).sum() == 2
    assert data_tokenizer.vocabulary_size(data_tokenizer.gpt2_tokenizer()) == 50257


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    with pytest.raises(Refusal, match=r"byt5 is ByT5Tokenizer, which has no fast version"):
        data_tokenizer.load_tokenizer(str(tmp_path / "byt5"))
    for name, change in (
        ("dropout", lambda text: text.replace('"dropout": null', '"dropout": 0.5')),
        ("pointer", lambda text: "version https://git-lfs"),
    ):
        data_tokenizer.train_tokenizer(iter(["some words"]), 300).save_pretrained(tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        path.write_text(change(path.read_text()))
    with pytest.raises(Refusal, match="dropout encodes at random"):
        data_tokenizer.load_tokenizer(str(tmp_path / "dropout"))
    with pytest.raises(Refusal, match="pointer: neither gpt2, train, a folder with a tokenizer"):
        data_tokenizer.load_tokenizer(str(tmp_path / "pointer"))


def test_learning_a_tokenizer_twice_gives_the_same(text):
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    first, second = (data_tokenizer.train_tokenizer(iter(texts), 600) for _ in range(2))
    assert data_tokenizer.tokenizer_record(first) == data_tokenizer.tokenizer_record(second)


PROBE = "It's 1,234 o'clock; I'LL say 007\r\n\n\n  don't\tNAÏVE cafe\u0301 ½ 中文字 עברית 🙂🙂‍↔️ a_b(c)->[d]"
ROWS = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
KINDS = {
    kind: {**ROWS, "head_dim": 16, "max_position_embeddings": 64}
    for kind in ("llama", "gemma", "qwen3", "mistral", "qwen2")
}
KINDS["gpt2"] = {"vocab_size": 512, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}


@pytest.fixture
def config_of(tmp_path):
    """A folder with a tiny config of a kind."""

    def write(kind: str) -> str:
        from transformers import AutoConfig

        AutoConfig.for_model(kind, **KINDS[kind]).save_pretrained(tmp_path / f"{kind}-config")
        return str(tmp_path / f"{kind}-config")

    return write


def ids_of(folder) -> list[int]:
    """By the tokenizers library alone, from tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROBE, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen2"])
def test_a_trained_model_of_any_kind_is_loaded_with_the_ids_that_it_learnt(
    kind, pretrain, settings, config_of, tmp_path
):
    from transformers import AutoTokenizer

    run = pretrain(tmp_path / "run", model_config=config_of(kind), max_steps=2, sample_tokens=0)
    learnt = ids_of(Path(settings["prepared_dir"]) / "tokenizer")
    for tokenizer in (AutoTokenizer.from_pretrained(run), loading.load_tokenizer(references.locate(str(run)))):
        assert tokenizer(PROBE, add_special_tokens=False)["input_ids"] == learnt
    assert tokenizer.decode(learnt) == PROBE


@pytest.mark.parametrize("switch", [[], ["--dry_run"]], ids=["run", "dry run"])
def test_a_kind_whose_models_others_load_with_another_tokenizer_is_refused_before_anything_is_prepared(
    switch, pretrain, config_of, tmp_path
):
    with pytest.raises(Refusal) as refused:
        pretrain(tmp_path / "run", *switch, model_config=config_of("qwen2"), prepared_dir=str(tmp_path / "tokens"))
    assert (
        "qwen2-config (qwen2): beside a qwen2 model, AutoTokenizer of transformers makes every tokenizer"
        " Qwen2Tokenizer, with other ids" in str(refused.value)
    )
    assert "another kind (llama, mistral, qwen3), or --tokenizer FOLDER with the tokenizer of a qwen2 model." in str(
        refused.value
    )
    assert not (tmp_path / "tokens" / "manifest.json").exists() and not (tmp_path / "run" / "run.json").exists()


def test_a_tokenizer_of_the_kind_itself_is_not_refused(gpt2):
    from transformers import AutoConfig, Qwen2Tokenizer

    config = AutoConfig.for_model("qwen2", **KINDS["qwen2"])
    model = json.loads(data_tokenizer.train_tokenizer(iter([PROBE]), 300).backend_tokenizer.to_str())["model"]
    own = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    assert data_tokenizer.stock_class(config, own) is None
    assert data_tokenizer.stock_class(config, gpt2) == "Qwen2Tokenizer"


def test_such_a_run_of_an_earlier_version_goes_on_with_a_warning_and_is_exported_and_evaluated_with_its_own_ids(
    pretrain, settings, config_of, tmp_path, monkeypatch, capsys
):
    config = config_of("qwen2")
    with monkeypatch.context() as earlier:
        earlier.setattr(data_tokenizer, "stock_class", lambda *_: None)
        run = pretrain(tmp_path / "run", model_config=config, max_steps=2, sample_tokens=0)
    assert "WARNING   --model_config" not in capsys.readouterr().out
    learnt = ids_of(Path(settings["prepared_dir"]) / "tokenizer")
    assert ids_of(run) == learnt
    pretrain(run, model_config=config, max_steps=4, sample_tokens=0, allow_changes="max_steps")
    assert (
        "WARNING   --model_config" in (said := capsys.readouterr().out)
        and "PreTrainedTokenizerFast.from_pretrained reads the model's own" in said
    )
    assert ids_of(run) == learnt
    loaded = loading.load_tokenizer(references.locate(str(run)))
    assert loaded(PROBE, add_special_tokens=False)["input_ids"] == learnt and loaded.eos_token == END
    again = data_tokenizer.load_tokenizer(str(run))  # as --tokenizer FOLDER
    assert data_tokenizer.tokenizer_record(again) == data_tokenizer.tokenizer_record(loaded)


@pytest.mark.parametrize(
    "changes, warned",
    [({"use_lora": False}, True), ({"merge_adapter": True}, True), ({}, False)],
    ids=["all weights", "merged", "an adapter"],
)
def test_a_tuned_model_that_others_load_with_another_tokenizer_is_told(changes, warned, sft, base, tmp_path, capsys):
    """A whole model is published beside its config, an adapter beside none."""
    from transformers import AutoConfig

    folder = tmp_path / "qwen2-base"
    AutoConfig.for_model("qwen2", **{**KINDS["qwen2"], "max_position_embeddings": 512}).save_pretrained(folder)
    loading.load_tokenizer(references.Located("base", base)).save_pretrained(folder)
    sft(tmp_path / "run", "--show_example", model_name_or_path=str(folder), **changes)
    told = f"WARNING   {folder} (qwen2): beside a qwen2 model, AutoTokenizer of transformers makes every tokenizer Qwen2Tok"
    assert (told in capsys.readouterr().out) == warned


def with_image_token(base, folder, special: bool = True) -> Path:
    """The tokenizer of a model with one more added token, as Gemma 3's has, beside the model itself."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=special)])
    tokenizer.save_pretrained(folder)
    return folder


def test_a_special_token_that_text_never_gives_needs_no_embedding(base, tmp_path):
    tokenizers = [
        data_tokenizer.load_tokenizer(str(with_image_token(base, tmp_path / str(special), special)))
        for special in (True, False)
    ]
    assert [data_tokenizer.vocabulary_size(one) for one in tokenizers] == [513, 513]
    assert [data_tokenizer.text_vocabulary_size(one) for one in tokenizers] == [512, 513]
    assert data_tokenizer.Encoder(tokenizers[0])("an <image> of it").max() < 512
    loading.check_vocabulary("a model", 512, tokenizers[0])
    for rows, one in ((511, tokenizers[0]), (512, tokenizers[1]), (513 + 1025, tokenizers[0])):
        with pytest.raises(Refusal, match=f"a model has {rows:,} embeddings and its tokenizer 513 ids: they do not"):
            loading.check_vocabulary("a model", rows, one)


def test_a_large_vocabulary_may_have_more_unused_rows(tmp_path):
    """gpt-oss has a thousand of 201,088."""
    tokenizer = with_end_at(70_000, tmp_path)
    loading.check_vocabulary("a model", 70_001 + 3000, tokenizer)
    with pytest.raises(Refusal, match="do not belong together"):
        loading.check_vocabulary("a model", 70_001 + 5000, tokenizer)


def test_models_with_such_a_token_are_tuned_and_trained_on(base, sft, pretrain, tmp_path):
    from transformers import AutoModelForCausalLM

    model = str(with_image_token(base, tmp_path / "model"))
    tuned = sft(tmp_path / "tuned", model_name_or_path=model, use_lora=False, max_steps=2)
    new = {"model_config": None, "tokenizer": None, "vocab_size": None, "prepared_dir": str(tmp_path / "tokens")}
    trained = pretrain(tmp_path / "trained", init_from=model, **new, max_steps=2)
    for folder in (tuned, trained):
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert found.config.vocab_size == found.get_input_embeddings().num_embeddings == 512
    other = str(with_image_token(base, tmp_path / "other", special=False))
    new |= {"prepared_dir": str(tmp_path / "others")}
    with pytest.raises(Refusal, match="the tokenizer has 513 ids and the model's vocabulary is 512"):
        pretrain(tmp_path / "refused", init_from=other, **new, max_steps=2)
    assert not (tmp_path / "others" / "manifest.json").exists()
