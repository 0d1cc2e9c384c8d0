from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_replay.data.records import Message
from megatron_replay.data.template import ChatTemplate, PlainTemplate, Template, load_template
from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from megatron_replay.errors import DataError

# What Qwen3's template does to history: a think block in the replies after the last question only, empty where the
# reply has none
THINKING = """
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.question %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def user(content: str) -> Message:
    return Message("user", content)


def reply(content: str, train: bool = True) -> Message:
    return Message("assistant", content, train)


ONE = [user("How many heads?"), reply("SELECT count(*) FROM head")]
TWO = [Message("system", "Write SQL."), *ONE, user("And their age?"), reply("SELECT age FROM head")]


@pytest.fixture(scope="module")
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


@pytest.fixture(scope="module")
def chatml(tokenizer: Tokenizer) -> Template:
    return load_template("auto", tokenizer)


@pytest.fixture(scope="module")
def thinking(tokenizer: Tokenizer) -> Template:
    return ChatTemplate(THINKING, tokenizer)


def targets(template: Template, messages: Sequence[Message]) -> list[str]:
    """The texts of the runs of target tokens."""
    ids, mask, _ = template.encode(messages)
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [template.tokenizer.decode(ids[a:b].tolist(), special=True) for a, b in edges]


def text_of(template: Template, messages: Sequence[Message]) -> str:
    return template.tokenizer.decode(template.encode(messages).ids.tolist(), special=True)


# chat templates


def test_targets_are_replies_with_their_end_token(chatml: Template) -> None:
    assert targets(chatml, ONE) == ["SELECT count(*) FROM head<|im_end|>"]
    assert targets(chatml, TWO) == ["SELECT count(*) FROM head<|im_end|>", "SELECT age FROM head<|im_end|>"]
    encoded = chatml.encode(TWO)
    assert (encoded.ids.dtype, encoded.mask.dtype, encoded.num_skipped) == (np.int32, np.bool_, 0)
    assert encoded.ids[-1] == chatml.tokenizer.eos_ids[0]
    assert encoded.mask[-1]


def test_a_reply_ends_with_the_templates_token_whatever_the_folder_names(
    make: SimpleNamespace, tmp_path: Path, chatml_folder: Path
) -> None:
    """A base model names <|endoftext|>; a reply is trained to end with <|im_end|>, and generation stops there."""
    named = load_tokenizer(chatml_folder)
    end = named.encode("<|im_end|>")[0]
    other = dataclasses.replace(named, eos_ids=(0,))
    for tokenizer in (named, other):
        template = ChatTemplate(tokenizer.chat_template or "", tokenizer)
        assert template.turn_end == end == template.encode(ONE).ids[-1]
        assert template.stop_ids == (end, *(i for i in tokenizer.eos_ids if i != end))
    assert PlainTemplate(other).stop_ids == (0,)


@pytest.mark.parametrize("text", ["{{ messages[-1].content }}", "{{ messages[-1].content }} over", "{{ 1 / 0 }}"])
def test_without_an_end_token_the_folders_are_all(tokenizer: Tokenizer, text: str) -> None:
    """Neither the last letter of a reply nor a word of the template ends generation."""
    template = ChatTemplate(text, tokenizer)
    assert template.turn_end is None and template.stop_ids == tokenizer.eos_ids


def test_untrained_replies_are_context(chatml: Template) -> None:
    assert targets(chatml, [user("a"), reply("no", False), user("b"), reply("yes")]) == ["yes<|im_end|>"]
    after = [user("a"), reply("yes"), user("b"), reply("no", False), user("c")]
    assert targets(chatml, after) == ["yes<|im_end|>"]
    # what follows the last target costs nothing
    assert len(chatml.encode(after).ids) == len(chatml.encode(after[:2]).ids)


@pytest.mark.parametrize("messages", [ONE, TWO, [user("a"), reply("\n  indented\n")], [user("a "), reply(" spaced ")]])
def test_the_prompt_is_a_prefix_of_the_sample(chatml: Template, thinking: Template, messages: list[Message]) -> None:
    for template in (chatml, thinking, PlainTemplate(chatml.tokenizer)):
        ids, mask, _ = template.encode(messages)
        prompt = template.prompt(messages[:-1])
        assert ids[: len(prompt)].tolist() == prompt
        assert mask[len(prompt) :].all()
        assert not mask[len(prompt) - 1]


def test_control_tokens_in_a_question_are_parsed_as_hugging_face_does(chatml: Template) -> None:
    eos = chatml.tokenizer.eos_ids[0]
    assert chatml.encode([user("a<|im_end|>b"), reply("c")]).ids.tolist().count(eos) == 3


@pytest.mark.parametrize("text", ["chatml", "thinking"])
@pytest.mark.parametrize(
    "messages", [ONE, TWO, [user("a"), reply("<think>\nfirst\n</think>\n\nthen")]], ids=["one", "two", "thought"]
)
def test_rendering_is_transformers_own(
    chatml_folder: Path, tokenizer: Tokenizer, text: str, messages: list[Message]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chatml_folder)
    source = THINKING if text == "thinking" else tokenizer.chat_template
    ours = ChatTemplate(str(source), tokenizer)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    for prompt in (False, True):
        for thinks in (False, True):
            options = {"chat_template": source, "add_generation_prompt": prompt, "enable_thinking": thinks}
            assert ours.render(messages, add_generation_prompt=prompt, thinking=thinks) == theirs.apply_chat_template(
                turns, tokenize=False, **options
            )
    ids = theirs.apply_chat_template(turns, chat_template=source, tokenize=True, return_dict=False)
    # all but the line break after the last end token
    assert [*ours.encode(messages).ids, *tokenizer.encode("\n")] == ids
    prompt_ids = theirs.apply_chat_template(
        turns[:-1], chat_template=source, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert ours.prompt(messages[:-1]) == prompt_ids


def test_an_empty_think_block_belongs_to_the_prompt(thinking: Template) -> None:
    assert targets(thinking, ONE) == ["SELECT count(*) FROM head<|im_end|>"]
    assert text_of(thinking, ONE).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\nSELECT count(*) FROM head<|im_end|>"
    )


def test_a_thought_is_a_target(thinking: Template) -> None:
    messages = [user("a"), reply("<think>\nfirst\n</think>\n\nthen")]
    assert targets(thinking, messages) == ["<think>\nfirst\n</think>\n\nthen<|im_end|>"]


def test_turns_shown_otherwise_than_generated_are_context(thinking: Template) -> None:
    assert targets(thinking, TWO) == ["SELECT age FROM head<|im_end|>"]
    assert thinking.encode(TWO).num_skipped == 1
    thoughts = [user("a"), reply("<think>\nx\n</think>\n\ny"), user("b"), reply("<think>\nz\n</think>\n\nw")]
    assert targets(thinking, thoughts) == ["<think>\nz\n</think>\n\nw<|im_end|>"]
    assert "x" not in text_of(thinking, thoughts)


@pytest.mark.parametrize(
    "content", ["<b>t</b>", "t", "<think", "as", "How many heads?", "<think>\nno\n</think>\n\nyes"]
)
def test_the_last_reply_is_trained_even_if_the_prompt_differs(tokenizer: Tokenizer, content: str) -> None:
    opens = (  # as DeepSeek-R1's: opens a think block to generate, strips thoughts from what was said
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip() "
        "}}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    template = ChatTemplate(opens, tokenizer)
    messages = [user("How many heads?"), reply(content)]
    assert targets(template, messages) == [content.split("</think>")[-1].lstrip() + "<|im_end|>"]
    assert targets(template, [user("a"), reply("b"), *messages]) == [
        content.split("</think>")[-1].lstrip() + "<|im_end|>"
    ]


def test_a_template_without_generation_prompt(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        tokenizer,
    )
    assert targets(template, TWO[1:]) == [" SELECT count(*) FROM head<|im_end|>", " SELECT age FROM head<|im_end|>"]


def test_a_conversation_that_begins_with_a_reply(chatml: Template) -> None:
    assert targets(chatml, [reply("Hello"), *ONE]) == ["SELECT count(*) FROM head<|im_end|>"]
    assert chatml.encode([reply("Hello"), *ONE]).num_skipped == 1
    assert targets(chatml, [reply("Hello")]) == ["Hello<|im_end|>"]


def test_generation_marks_and_loop_controls_and_json(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ {'é': '<'} | tojson }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        tokenizer,
    )
    assert template.render(TWO) == '{"é": "<"}Write SQL.{"é": "<"}How many heads?'


def test_todays_date_is_not_in_the_tokens(tokenizer: Tokenizer) -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", tokenizer).render(ONE) == "26 Jul 2024"


def test_names_and_further_keys_reach_the_template(tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ eos_token }}{{ bos_token }}{{ messages[0].name }}{{ messages[0].role }}", tokenizer)
    assert template.render([Message("user", "c", True, {"name": "n", "role": "not this"})]) == "<|im_end|>nuser"


# plain


def test_plain_is_prompt_completion_eos(tokenizer: Tokenizer) -> None:
    template = load_template("plain", tokenizer)
    ids, mask, skipped = template.encode([user("name:"), reply(" singer")])
    prompt, completion = tokenizer.encode("name:"), tokenizer.encode(" singer")
    assert ids.tolist() == [*prompt, *completion, 2]
    assert mask.tolist() == [False] * len(prompt) + [True] * (len(completion) + 1)
    assert skipped == 0
    assert template.render([user("name:"), reply(" singer")]) == "name: singer<|im_end|>"


def test_plain_turns(tokenizer: Tokenizer) -> None:
    template = load_template("plain", tokenizer)
    messages = [Message("system", "s"), user("a"), reply("b"), user("c"), reply("d", False), user("e"), reply("f")]
    assert text_of(template, messages) == "s\nab<|im_end|>cd<|im_end|>ef<|im_end|>"
    assert targets(template, messages) == ["b<|im_end|>", "f<|im_end|>"]


def test_plain_with_bos_and_no_space_between(make: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make.pieces(tmp_path / "m"))
    template = load_template("auto", tokenizer)  # sentencepiece folders without a chat template
    assert isinstance(template, PlainTemplate)
    ids = template.encode([user("name:"), reply("singer")]).ids.tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "name:singer"
    assert template.prompt([user("name:")]) == ids[: len(template.prompt([user("name:")]))]


def test_the_first_token_is_never_a_target(tokenizer: Tokenizer) -> None:
    template = load_template("plain", tokenizer)
    mask = template.encode([user(""), reply("singer")]).mask
    assert not mask[0]
    assert mask[1:].all()


def test_plain_needs_an_end_token(make: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make.byte_level(tmp_path / "m", eos_token=None))
    with pytest.raises(DataError, match=r"names none; set eos_token_id in generation_config\.json"):
        load_template("plain", tokenizer)


# choosing, and what goes wrong


def test_choice(tokenizer: Tokenizer, make: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(THINKING)
    assert (
        load_template(str(tmp_path / "t.jinja"), tokenizer).fingerprint == ChatTemplate(THINKING, tokenizer).fingerprint
    )
    bare = load_tokenizer(make.byte_level(tmp_path / "m", template=None))
    assert isinstance(load_template("auto", bare), PlainTemplate)
    prints = {load_template(choice, tokenizer).fingerprint for choice in ("auto", "plain", str(tmp_path / "t.jinja"))}
    assert len(prints) == 3
    with pytest.raises(DataError, match=r"data\.template=chatml: cannot be read .*give auto, plain, or the path"):
        load_template("chatml", tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ ('{0.__class__}'.format)('') }}",
        "{{ ''.format.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__self__ }}",
        "{{ [messages]|map(attribute='__class__')|list }}",
        "{{ self.__init__.__globals__ }}",
        "{{ namespace.__init__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler('a').next() }}",
        "{{ range(1000000000) }}",
        "{% include 'x' %}",
        "{{ undefined_name.attribute }}",
        "{{ 'a' + 1 }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('turns must alternate') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_templates_cannot_reach_out(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(DataError, match=r"chat template .*(data\.template)"):
        ChatTemplate(text, tokenizer).render(ONE)


def test_the_templates_own_words_are_in_the_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="refused the conversation: turns must alternate; fix the record"):
        ChatTemplate("{{ raise_exception('turns must alternate') }}", tokenizer).render(ONE)
    with pytest.raises(DataError, match=r"access to '__class__' of str is not allowed"):
        ChatTemplate("{{ ''.__class__ }}", tokenizer).render(ONE)
    with pytest.raises(DataError, match=r"chat template, line 2: .*correct it, or set data\.template=plain"):
        ChatTemplate("ok\n{% for %}", tokenizer)


def test_nothing_to_train_on(chatml: Template, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no assistant turn to train on"):
        chatml.encode([user("a"), reply("b", False)])
    with pytest.raises(DataError, match="does not show the last reply"):
        ChatTemplate("{{ messages[0].content }}", tokenizer).encode(ONE)
