"""The chat format: exactly the answers are learnt, and what is generated begins as what was trained."""

import os
import select

import pytest

from llama_lite.chat_format import rendering
from llama_lite.chat_format import template as chat_format_template
from llama_lite.data.tokenizer import gpt2_tokenizer
from llama_lite.errors import Refusal

ONE = chat_format_template.conversation("Name a city.", "", "Paris is one.")
GIVEN = chat_format_template.conversation("Say it in French.", "a house", "  une maison\n")
TWO = [*ONE, *chat_format_template.conversation("Another?", None, "Tokyo: it is large!")]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ONE]


@pytest.fixture(scope="module", params=["gpt2", "learnt", "with begin"])
def tokenizer(request):
    if request.param == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        from llama_lite.data.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(
            iter([chat_format_template.SYSTEM + " USER: ASSISTANT: Paris is a city and so is Tokyo."] * 3), 300
        )
    if request.param == "with begin":  # one whose texts begin with a token of their own, as Llama 2's do
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        place = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", place)]
        )
    chat_format_template.set_chat_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    "messages, learnt",
    [
        (ONE, [" Paris is one."]),
        (GIVEN, [" une maison"]),
        (TWO, [" Paris is one.", " Tokyo: it is large!"]),
        (SYSTEM, [" Paris is one."]),
    ],
)
def test_exactly_the_answers_and_their_end_are_learnt(tokenizer, messages, learnt):
    encoded = chat_format_template.encode(tokenizer, messages)
    expected = [
        id
        for answer in learnt
        for id in [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert [label for label in encoded.labels if label != -100] == expected
    assert all(label in (-100, id) for id, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("messages", [ONE, GIVEN, TWO, SYSTEM])
def test_what_is_generated_begins_as_what_was_trained(tokenizer, messages):
    encoded = chat_format_template.encode(tokenizer, messages)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = chat_format_template.encode_prompt(tokenizer, messages[:place])
            assert encoded.input_ids[: len(asked)] == asked and encoded.labels[len(asked)] != -100
            assert encoded.labels[len(asked) - 1] == -100


@pytest.mark.parametrize("messages", [ONE, GIVEN, TWO, SYSTEM])
def test_the_saved_template_gives_transformers_the_same_ids_and_mask(tokenizer, messages, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    encoded = chat_format_template.encode(tokenizer, messages)
    assert found["input_ids"] == encoded.input_ids
    assert [bool(mask) for mask in found["assistant_masks"]] == [label != -100 for label in encoded.labels]


def test_a_begin_token_stands_first_where_a_tokenizer_has_one_and_nowhere_else(tokenizer):
    ids = chat_format_template.encode(tokenizer, TWO).input_ids
    if tokenizer.bos_token == "<s>":
        assert ids.index(tokenizer.bos_token_id) == 0 and ids.count(tokenizer.bos_token_id) == 1
    else:
        assert ids.count(tokenizer.eos_token_id) == 2  # the two ends, and no begin


def test_vicuna_word_for_word(tokenizer):
    tokenizer = gpt2_tokenizer()
    chat_format_template.set_chat_template(tokenizer)
    assert (
        tokenizer.apply_chat_template(TWO, tokenize=False)
        == "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: Name a city. ASSISTANT: Paris is"
        " one.<|endoftext|>USER: Another? ASSISTANT: Tokyo: it is large!<|endoftext|>"
    )


@pytest.mark.parametrize("empty", [None, "", "  \n", "<noinput>", "<NoInput>"])
def test_an_empty_input_adds_nothing(empty):
    assert chat_format_template.conversation("Do it.", empty) == [{"role": "user", "content": "Do it."}]
    assert chat_format_template.conversation("Do it.", "with this")[0]["content"] == "Do it.\n\nwith this"


def test_earlier_answers_can_be_context(tokenizer):
    encoded = chat_format_template.encode(tokenizer, TWO, learn_from=2)
    assert (
        tokenizer.decode([label for label in encoded.labels if label != -100])
        == " Tokyo: it is large!" + tokenizer.eos_token
    )


def test_a_template_without_generation_marks_is_refused(tmp_path):
    plain = tmp_path / "plain.jinja"
    plain.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(Refusal, match=r"plain\.jinja has no \{% generation %\}"):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(plain))
    with pytest.raises(Refusal, match=r"is not a readable \.jinja file"):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(tmp_path / "nothing.jinja"))
    marked = tmp_path / "marked.jinja"
    marked.write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }} A{% else %}{% generation %} {{"
        " m['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    tokenizer = gpt2_tokenizer()
    chat_format_template.set_chat_template(tokenizer, str(marked))
    encoded = chat_format_template.encode(tokenizer, ONE)
    assert tokenizer.decode([label for label in encoded.labels if label != -100]) == " Paris is one.<|endoftext|>"


def template(ending: str) -> str:
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}Q {{ m['content'] }} A{% else %}{% generation %} {{"
        " m['content'] }}" + ending + "{% endif %}{% endfor %}"
    )


@pytest.mark.parametrize(
    "ending, how",
    [
        ("{% endgeneration %}", r"write \{\{ eos_token \}\} before \{% endgeneration %\}"),
        (
            "{% endgeneration %}{{ eos_token }}",
            r"it comes after .*: move \{\{ eos_token \}\} before \{% endgeneration %\}",
        ),
        ("{% endgeneration %}\n{{ eos_token }}\n", r"it comes after"),
        ("{{ eos_token }}\n{% endgeneration %}", r"'\\n' follows it there: move that after \{% endgeneration %\}"),
        ("{{ eos_token }} {% endgeneration %}", r"' ' follows it there"),
        (
            "<|im_end|>{% endgeneration %}",
            r"or name a tokenizer whose end-of-text the template writes \(--tokenizer_name\)",
        ),
        ("{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}", r"write \{\{ eos_token \}\}"),
        ("{% if not loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}", r"write \{\{ eos_token \}\}"),
    ],
)
def test_a_template_whose_answers_do_not_end_is_refused_with_how_to_mend_it(tmp_path, ending, how):
    path = tmp_path / "own.jinja"
    path.write_text(template(ending))
    with pytest.raises(
        Refusal,
        match=(
            r"own.jinja: the chat template does not end each answer with the tokenizer's end-of-text '<\|endoftext\|>'"
            rf" inside .*{how}"
        ),
    ):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))


@pytest.mark.parametrize("ending", ["{{ eos_token }}{% endgeneration %}", "{{ eos_token }}{% endgeneration %}\n"])
def test_a_template_whose_answers_end_is_used(tmp_path, ending):
    path = tmp_path / "own.jinja"
    path.write_text(template(ending))
    tokenizer = gpt2_tokenizer()
    chat_format_template.set_chat_template(tokenizer, str(path))
    assert (
        tokenizer.decode([label for label in chat_format_template.encode(tokenizer, TWO).labels if label != -100])
        == " Paris is one.<|endoftext|> Tokyo: it is large!<|endoftext|>"
    )


@pytest.mark.parametrize(
    "text, message",
    [
        (
            template("{{ eos_token }}{% endgeneration %}").replace(
                "{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"
            ),
            r"marks 4 passages for 2 answers",
        ),
        ("{% generation %}{{ raise_exception('no ' + 'room') }}{% endgeneration %}", r"cannot be rendered .*no room"),
        ("{% generation %}{{ messages[0]['content'] + 1 }}{% endgeneration %}", r"cannot be rendered .*TypeError"),
        ("{% generation %}{% for %}{% endgeneration %}", r"cannot be rendered .*TemplateSyntaxError"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path, text, message):
    path = tmp_path / "own.jinja"
    path.write_text(text)
    with pytest.raises(Refusal, match=rf"--chat_template_path .*own.jinja.*{message}"):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))


def test_special_tokens_in_the_text_are_seen():
    tokenizer = gpt2_tokenizer()
    assert chat_format_template.special_text(tokenizer, ONE) is None
    assert (
        chat_format_template.special_text(
            tokenizer, chat_format_template.conversation("What is <|endoftext|>?", "", "A token.")
        )
        == "<|endoftext|>"
    )


@pytest.mark.parametrize(
    "answer, kept", [("Fine.", True), ("  ", False), ("Fine. USER: and?", False), ("ASSISTANT: no", False)]
)
def test_the_format_of_an_answer(answer, kept):
    assert chat_format_template.kept_format(answer) is kept


GENERATION = "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"


@pytest.mark.parametrize(
    "asks, trained",
    [
        ("A: <think>\n\n</think>\n", "A: "),  # more than was trained
        ("A:", "A: "),  # less
        ("", "A: "),  # add_generation_prompt is passed over
    ],
)
def test_an_answer_is_asked_for_with_what_stands_before_it_in_training(tmp_path, asks, trained):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}"
        + f"{trained}{GENERATION}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )
    with pytest.raises(
        Refusal, match=r"own.jinja: the generation prompt ends with .* but in training the answer follows"
    ):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))
    path.write_text(path.read_text().replace(f"prompt %}}{asks}{{%", f"prompt %}}{trained}{{%"))
    chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))


@pytest.mark.parametrize(
    "asks, where",
    [
        (
            "{{ 'A: ' if messages[0]['role'] != 'system' else 'A, in short: ' }}",
            " in a conversation with a system turn",
        ),
        ("{{ 'A: ' if messages|length > 1 else 'A:' }}", ""),  # behind the first question
    ],
)
def test_the_generation_prompt_is_tried_with_a_system_turn_and_behind_the_first_question(tmp_path, asks, where):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n{% elif m['role'] == 'user' %}Q: {{ m['content'] }}\n{% else %}"
        + f"A: {GENERATION}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    )
    with pytest.raises(
        Refusal, match=rf"own.jinja: the generation prompt{where} ends with .* but in training the answer follows"
    ):
        chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))
    path.write_text(path.read_text().replace(asks, "A: "))
    chat_format_template.set_chat_template(gpt2_tokenizer(), str(path))


def test_a_template_without_a_place_for_a_system_turn_is_used(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}"
        + template("{{ eos_token }}{% endgeneration %}")
    )
    tokenizer = gpt2_tokenizer()
    chat_format_template.set_chat_template(tokenizer, str(path))
    with pytest.raises(chat_format_template.NotRendered, match="no system"):
        chat_format_template.encode(tokenizer, SYSTEM)


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
)
SILENT = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
WITH_SYSTEM = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("own", [ALTERNATING, SILENT])
def test_a_system_message_begins_the_first_question_where_a_template_has_none(own):
    """As Gemma's and Mistral's templates, which raise an error for one, and others, which pass over it."""
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = own
    assert not rendering.takes_system(tokenizer)
    for turns in (ONE[:1], [*ONE, *TWO[2:3]]):
        text = rendering.apply_chat_template(tokenizer, [SYSTEM[0], *turns])
        assert text.startswith("<user>Be brief.\n\nName a city.") and text.count("Be brief.") == 1
        assert text == rendering.apply_chat_template(
            tokenizer, [{"role": "user", "content": "Be brief.\n\nName a city."}, *turns[1:]]
        )
    tokenizer.chat_template = WITH_SYSTEM
    assert rendering.takes_system(tokenizer)
    assert rendering.apply_chat_template(tokenizer, SYSTEM[:2]) == "<system>Be brief.<user>Name a city."


def test_a_template_that_raised_an_error_keeps_its_process():
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = ALTERNATING
    rendering.apply_chat_template(tokenizer, ONE)
    process = rendering._renderers[ALTERNATING].process
    with pytest.raises(rendering.NotRendered, match="roles must alternate"):
        rendering.apply_chat_template(tokenizer, [ONE[0], ONE[0]])
    rendering.apply_chat_template(tokenizer, ONE)
    assert rendering._renderers[ALTERNATING].process is process and process.is_alive()


def test_the_process_of_a_template_holds_no_pipe_of_this_process_open():
    """A program whose input this process closes would otherwise wait for ever."""
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = WITH_SYSTEM + "{# a process that starts after the pipe #}"
    reading, writing = os.pipe()
    rendering.apply_chat_template(tokenizer, ONE)
    assert rendering._renderers[tokenizer.chat_template].process.is_alive()
    os.close(writing)
    with open(reading, "rb") as ended:
        assert select.select([ended], [], [], 20) == ([ended], [], []) and ended.read() == b""


PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
MARKED = "{% for m in messages %}{%- generation -%}{{ m['content'] }}{% endgeneration %}{% endfor %}"
MARKS = r", with {% generation %} ... {% endgeneration %} around the answer"


@pytest.mark.parametrize(
    "own, in_file, how",
    [
        (MARKED, True, "--chat_template_path {folder}/chat_template.jinja"),
        (PLAIN, True, "a copy of {folder}/chat_template.jinja" + MARKS + ": --chat_template_path COPY"),
        (
            MARKED,
            False,
            "the text of `chat_template` in {folder}/tokenizer_config.json as a file of its own: --chat_template_path FILE",
        ),
        (
            PLAIN,
            False,
            "the text of `chat_template` in {folder}/tokenizer_config.json as a file of its own"
            + MARKS
            + ": --chat_template_path FILE",
        ),
        (
            {"default": PLAIN, "tool_use": MARKED},
            True,
            "a copy of {folder}/chat_template.jinja" + MARKS + ": --chat_template_path COPY",
        ),
    ],
)
def test_a_template_that_is_put_aside_is_named_where_it_is(tmp_path, own, in_file, how):
    from transformers import AutoTokenizer

    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = own
    tokenizer.save_pretrained(tmp_path, save_jinja_files=in_file)
    assert (tmp_path / "chat_template.jinja").exists() is in_file
    found = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert found == own
    said = chat_format_template.describe_put_aside(found, "its own", tmp_path)
    assert said == f"Vicuna 1.1; its own is not used (to keep it: {how.replace('{folder}', str(tmp_path))})"


def test_what_a_template_leaves_out_or_takes_from_the_clock_is_refused(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        template("{{ eos_token }}{% endgeneration %}").replace(
            "{{ m['content'] }}{{ eos", "{{ m['content'].split('<sep>')[-1] }}{{ eos"
        )
    )
    tokenizer = gpt2_tokenizer()
    chat_format_template.set_chat_template(tokenizer, str(path))
    with pytest.raises(Refusal, match="the chat template leaves out a turn of the assistant, or a part of it"):
        chat_format_template.encode(tokenizer, chat_format_template.conversation("Name two.", "", "First<sep>second"))
    with pytest.raises(Refusal, match="the chat template leaves out a turn of the system"):
        path.write_text(
            path.read_text().replace(
                "{% if m['role'] == 'user' %}", "{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}"
            )
        )
        chat_format_template.set_chat_template(tokenizer, str(path))
        chat_format_template.encode(tokenizer, [{"role": "system", "content": "In verse."}, *ONE])
    path.write_text("{{ strftime_now('%H') }}" + template("{{ eos_token }}{% endgeneration %}"))
    with pytest.raises(Refusal, match="uses the current time"):
        chat_format_template.set_chat_template(tokenizer, str(path))
