"""A conversation: what fits the context, where an answer ends, how it is chosen."""

import types

import pytest
import torch
from helpers import END

from llama_lite.chat_format import template
from llama_lite.data.tokenizer import read_tokenizer
from llama_lite.errors import Refusal
from llama_lite.models.chat import Conversation, Sampling


@pytest.fixture
def tokenizer(base):
    """With the chat format."""
    found = read_tokenizer(base)
    found.chat_template = template.vicuna_template(found)
    return found


class Scripted(torch.nn.Module):
    """In the place of a model: it 'generates' given texts, one token at a time, within the limits that it is given."""

    def __init__(self, tokenizer, *answers: str, context: int = 512, fails: BaseException | None = None):
        super().__init__()
        self.config = types.SimpleNamespace(max_position_embeddings=context, model_type="scripted")
        self.config.get_text_config = lambda: self.config
        self.generation_config = types.SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=0)
        self.device, self.asked = torch.device("cpu"), []
        self.tokenizer, self.scripts, self.fails = tokenizer, list(answers), fails

    def generate(self, input_ids, streamer, stopping_criteria, max_new_tokens, **arguments):
        self.asked.append((self.tokenizer.decode(input_ids[0]), max_new_tokens, arguments))
        streamer.put(input_ids)
        for token in self.tokenizer(self.scripts.pop(0))["input_ids"][:max_new_tokens]:
            streamer.put(torch.tensor([token]))
            if token == self.tokenizer.eos_token_id or bool(stopping_criteria(input_ids, None)[0]):
                break
        if self.fails:
            raise self.fails
        streamer.end()


def talk(conversation: Conversation, text: str):
    """(the answer, the parts in which it was written)."""
    parts = []
    conversation.ask(text)
    return conversation.answer(parts.append), parts


def test_an_answer_streams_in_words_and_ends_with_the_end_of_text(tokenizer):
    conversation = Conversation(Scripted(tokenizer, f" It is blue.{END}"), tokenizer, Sampling())
    answer, parts = talk(conversation, "What color?")
    assert (answer.text, answer.end) == ("It is blue.", "stopped")
    assert "".join(parts) == answer.text and len(parts) > 1
    assert conversation.model.asked[0][0] == f"{template.SYSTEM} USER: What color? ASSISTANT:"


def test_several_turns_are_one_conversation(tokenizer):
    model = Scripted(tokenizer, f" Blue.{END}", f" Because.{END}")
    conversation = Conversation(model, tokenizer, Sampling(), system="Be brief.")
    talk(conversation, "What color?")
    talk(conversation, "Why?")
    assert model.asked[1][0] == f"Be brief. USER: What color? ASSISTANT: Blue.{END}USER: Why? ASSISTANT:"
    conversation.reset()
    assert conversation.turns == []


def test_what_no_longer_fits_is_named_and_forgotten(tokenizer):
    opening = len(template.encode_prompt(tokenizer, [{"role": "user", "content": "First question?"}]))
    model = Scripted(tokenizer, *[f" An answer.{END}"] * 3, context=opening + 45)
    conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=20))
    assert conversation.ask("First question?") == []
    conversation.answer(lambda text: None)
    assert conversation.ask("Second question, which is a longer one?") == ["First question?"]
    conversation.answer(lambda text: None)
    assert "First" not in model.asked[1][0] and "Second" in model.asked[1][0]


def test_a_message_that_cannot_be_answered_is_refused_and_leaves_the_conversation_as_it_was(tokenizer):
    model = Scripted(tokenizer, f" Yes.{END}", context=128)
    conversation = Conversation(model, tokenizer, Sampling())
    talk(conversation, "Hi")
    turns = list(conversation.turns)
    with pytest.raises(Refusal, match=r"takes [\d,]+ tokens, and the context of this model holds 128 .*: shorten it"):
        conversation.ask("word " * 100)
    with pytest.raises(Refusal, match=r"contains <\|endoftext\|>, a special token"):
        conversation.ask(f"Hi {END}")
    assert conversation.turns == turns


@pytest.mark.parametrize(
    "script", [" Blue. USER: And why? ASSISTANT: Because.", " Blue. USER:", " Blue.\nASSISTANT: Red"]
)
def test_an_answer_ends_before_a_further_turn(tokenizer, script):
    answer, parts = talk(Conversation(Scripted(tokenizer, script), tokenizer, Sampling()), "What color?")
    assert (answer.text.strip(), answer.end) == ("Blue.", "stopped")
    assert "USER" not in "".join(parts) and "ASSISTANT" not in "".join(parts)


def test_an_answer_that_is_cut_says_by_what(tokenizer):
    long = " words" * 300
    answer, _ = talk(Conversation(Scripted(tokenizer, long), tokenizer, Sampling(max_new_tokens=9)), "Go on")
    assert (answer.tokens, answer.end) == (9, "max_new_tokens")
    answer, _ = talk(
        Conversation(Scripted(tokenizer, long, context=200), tokenizer, Sampling(max_new_tokens=500)), "Go"
    )
    assert answer.end == "context" and answer.tokens < 200


def test_ctrl_c_ends_the_answer_and_keeps_what_was_written(tokenizer):
    model = Scripted(tokenizer, " It is ble", fails=KeyboardInterrupt())
    conversation = Conversation(model, tokenizer, Sampling())
    answer, parts = talk(conversation, "What color?")
    assert (answer.text, answer.end, "".join(parts)) == ("It is ble", "interrupted", "It is ble")
    assert conversation.turns[-1] == {"role": "assistant", "content": "It is ble"}


def test_a_model_that_cannot_generate_is_refused(tokenizer):
    model = Scripted(tokenizer, " x", fails=RuntimeError("probability tensor contains nan"))
    with pytest.raises(Refusal, match=r"this model \(scripted\) cannot generate text: probability tensor"):
        talk(Conversation(model, tokenizer, Sampling()), "Hi")


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)


def test_a_system_message_begins_the_first_message_where_the_chat_format_has_none(tokenizer):
    model = Scripted(tokenizer, f" Blue.{END}", f" Sky.{END}")
    assert Conversation(model, tokenizer, Sampling(), system="Be brief.").system_remark() is None
    tokenizer.chat_template = ALTERNATING
    conversation = Conversation(model, tokenizer, Sampling(), system="Be brief.")
    assert conversation.system_remark() == "has no system message in its chat format: --system begins the first message"
    talk(conversation, "What color?")
    talk(conversation, "Why?")
    assert [prompt for prompt, _, _ in model.asked] == [
        "[Be brief.\n\nWhat color?]",
        "[Be brief.\n\nWhat color?][Blue.][Why?]",
    ]


def test_a_message_without_an_answer_is_not_part_of_the_next_prompt(tokenizer):
    """A template that demands turns in order would refuse every further message."""
    tokenizer.chat_template = ALTERNATING
    model = Scripted(tokenizer, " x", f" Blue.{END}", fails=RuntimeError("out of memory"))
    conversation = Conversation(model, tokenizer, Sampling())
    with pytest.raises(Refusal, match="out of memory"):
        talk(conversation, "What color?")
    model.fails = None
    answer, _ = talk(conversation, "And now?")
    assert answer.text == "Blue." and model.asked[1][0] == "[And now?]"


def test_a_base_continues_each_text_alone(base):
    tokenizer = read_tokenizer(base)
    model = Scripted(tokenizer, " one USER: two", " three")
    conversation = Conversation(model, tokenizer, Sampling())
    answer, _ = talk(conversation, "Count:")
    talk(conversation, "More:")
    assert conversation.plain and answer.text == " one USER: two"
    with_system = Conversation(model, tokenizer, Sampling(), system="Be brief.")
    assert with_system.system_remark() == "continues each message as a text, so --system is not used"
    assert [prompt for prompt, _, _ in model.asked] == ["Count:", "More:"]


def test_sampling_is_what_was_asked_for(tokenizer):
    model = Scripted(tokenizer, " x", " x")
    talk(Conversation(model, tokenizer, Sampling(temperature=0, max_new_tokens=5)), "Hi")
    talk(Conversation(model, tokenizer, Sampling(0.5, 7, 0.9, 1.2)), "Hi")
    greedy, sampled = (arguments for _, _, arguments in model.asked)
    assert greedy["do_sample"] is False and "temperature" not in greedy
    chosen = {name: sampled[name] for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")}
    assert chosen == {"do_sample": True, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2}


def test_a_seed_gives_the_same_answers(base):
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    answers = []
    for seed in (1, 1, 2):
        conversation = Conversation(model, tokenizer, Sampling(max_new_tokens=12, seed=seed))
        answers.append([talk(conversation, "The")[0].text for _ in range(2)])
    assert answers[0] == answers[1] != answers[2] and answers[0][0] != answers[0][1]
