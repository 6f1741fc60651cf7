"""Tokenizer, streaming, stop strings and chat templates: the same text in pieces, and no template is trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mycel.node import text as text_module
from mycel.node.demo import demo_model_dir
from mycel.node.template_process import MAX_TEXT_CHARS
from mycel.node.text import MAX_TEMPLATE_CHARS, TextCodec
from mycel.protocols.errors import ConfigError
from tests.tiny_models import make_tiny_tokenizer

TINY_VOCAB = 259


@pytest.fixture(scope="module")
def demo() -> TextCodec:
    return TextCodec.load(demo_model_dir(), 1 << 16)


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(tiny_dir: Path) -> TextCodec:
    """A token for every byte: characters come in up to four pieces."""
    return TextCodec.load(tiny_dir, TINY_VOCAB)


def bytewise(codec: TextCodec, text: str) -> list[int]:
    return codec.encode(text, special=False)


def pieces(codec: TextCodec, tokens: list[int], *stop: str) -> list[str]:
    stream = codec.stream(stop)
    return [*(stream.push(token) for token in tokens), stream.finish()]


# ---- streaming


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stream_of_any_tokens_is_the_whole_text(demo: TextCodec, tiny: TextCodec, data: st.DataObject) -> None:
    codec = data.draw(st.sampled_from([demo, tiny]))
    size = codec.tokenizer.get_vocab_size()
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    assert "".join(pieces(codec, tokens)) == codec.tokenizer.decode(tokens, skip_special_tokens=True)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_stream_of_any_text_is_the_text(tiny: TextCodec, text: str) -> None:
    got = pieces(tiny, bytewise(tiny, text))
    assert "".join(got) == text
    assert "\ufffd" not in "".join(got) or "\ufffd" in text, "half a character was shown"


def test_a_character_appears_when_its_last_byte_is_there(tiny: TextCodec) -> None:
    assert pieces(tiny, bytewise(tiny, "aé€😀b")) == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_a_character_that_stays_unfinished_is_shown_at_the_end(tiny: TextCodec) -> None:
    got = pieces(tiny, [*bytewise(tiny, "a"), *bytewise(tiny, "€")[:2]])
    assert got[:3] == ["a", "", ""]
    assert set(got[3]) == {"\ufffd"}


def test_special_tokens_are_no_text(tiny: TextCodec) -> None:
    assert "".join(pieces(tiny, [256, *bytewise(tiny, "a"), 257, *bytewise(tiny, "b"), 258])) == "ab"


def test_a_token_outside_of_the_vocabulary_is_no_text(tiny: TextCodec) -> None:
    assert "".join(pieces(tiny, [*bytewise(tiny, "a"), 10**6, *bytewise(tiny, "b")])) == "ab"


def test_words_that_are_joined_by_spaces_stream_as_well(tmp_path: Path) -> None:
    """Sentencepiece's way: a space stands before each word, and the first one is not shown."""
    words = ["▁", "▁a", "▁b", "c", "▁d", "<0xE2>", "<0x82>", "<0xAC>"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec.load(tmp_path, len(words))
    for tokens in ([1, 2, 3, 4], [0, 1, 5, 6, 7, 2], [5, 6, 7], [1, 0, 0, 2], [1, 5, 6, 2]):
        assert "".join(pieces(codec, tokens)) == tokenizer.decode(tokens)


# ---- stop strings

few_letters = st.text("ab€", max_size=14)


@settings(max_examples=300)
@given(text=few_letters, stop=st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_of_a_stop_string_is_shown_wherever_tokens_end(tiny: TextCodec, text: str, stop: list[str]) -> None:
    stream = tiny.stream(stop)
    shown = ""
    for token in bytewise(tiny, text):
        shown += stream.push(token)
        assert not any(one in shown for one in stop)
        if stream.stopped:
            break
    shown += stream.finish()
    first = min((at for one in stop if (at := text.find(one)) >= 0), default=None)
    assert stream.stopped == (first is not None)
    if first is None:
        assert shown == text
    else:
        assert text.startswith(shown)
        # Where several stop strings overlap, the one that is complete first ends the text.
        assert not any(one in shown for one in stop)
        assert len(shown) >= first


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(tiny: TextCodec) -> None:
    assert pieces(tiny, bytewise(tiny, "xEND"), "ENDE") == ["x", "", "", "", "END"]
    assert pieces(tiny, bytewise(tiny, "xENdy"), "ENDE") == ["x", "", "", "ENd", "y", ""]
    assert pieces(tiny, bytewise(tiny, "xENDEy"), "ENDE") == ["x", "", "", "", "", "", ""]
    assert pieces(tiny, bytewise(tiny, "xEENDEy"), "ENDE") == ["x", "", "E", "", "", "", "", ""]


def test_an_empty_stop_string_stops_nothing(tiny: TextCodec) -> None:
    assert "".join(pieces(tiny, bytewise(tiny, "abc"), "")) == "abc"


# ---- files


def test_no_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        TextCodec.load(tmp_path, 10)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not json", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="is not a tokenizer") as caught:
        TextCodec.load(tmp_path, 10)
    assert str(caught.value).isprintable()


def test_the_tokenizer_of_another_model_is_refused(tiny_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"not this model's: it has 259 tokens, the model 258"):
        TextCodec.load(tiny_dir, TINY_VOCAB - 1)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_damaged_configuration_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged"):
        TextCodec.load(tmp_path, TINY_VOCAB)


@pytest.mark.parametrize("content", ["[]", "7", '{"chat_template": 7}', '{"chat_template": [7, {"name": "x"}]}'])
def test_a_configuration_without_a_template_is_fine(tmp_path: Path, content: str) -> None:
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content, "utf-8")
    assert TextCodec.load(tmp_path, TINY_VOCAB).template is None


def test_half_a_surrogate_pair_is_no_crash(tiny: TextCodec) -> None:
    assert tiny.encode("a\ud800b", special=False) == bytewise(tiny, "a?b")


# ---- chat templates


def with_template(tmp_path: Path, template: str, **config: object) -> TextCodec:
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}), "utf-8")
    return TextCodec.load(tmp_path, TINY_VOCAB)


def chat(codec: TextCodec, *contents: str) -> str:
    messages = [{"role": "user", "content": content} for content in contents or ("hello",)]
    return codec.tokenizer.decode(codec.encode_chat(messages), skip_special_tokens=False)


def test_without_a_template_turns_are_plain_lines(tiny: TextCodec) -> None:
    assert chat(tiny, "hello") == "User: hello\nAssistant:"


def test_a_template_finds_what_templates_of_hugging_face_expect(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% if tools is not none or documents is not none %}wrong{% endif %}"
        "{% for message in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ message.role }}={{ message['content'] | trim | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}{% if strftime_now('%Y') | int > 2000 %}#{% endif %}"
    )
    codec = with_template(tmp_path, template, bos_token={"content": "<s>"})
    assert chat(codec, " größer <b> ", "second") == '<s>user="größer <b>"!#'


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    with_template(tmp_path, "config")
    (tmp_path / "chat_template.jinja").write_text("file", "utf-8")
    assert chat(TextCodec.load(tmp_path, TINY_VOCAB)) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert chat(with_template(tmp_path, named)) == "default"  # type: ignore[arg-type]


def test_a_template_that_is_too_long_is_not_used(tmp_path: Path) -> None:
    assert with_template(tmp_path, "a" * (MAX_TEMPLATE_CHARS + 1)).template is None


def test_special_tokens_in_a_template_are_tokens(tmp_path: Path) -> None:
    codec = with_template(tmp_path, "<s>{{ messages[0].content }}")
    assert codec.encode_chat([{"role": "user", "content": "a"}])[0] == 256


HOSTILE = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "an import": "{% import 'os' as os %}",
    "an include": "{% include '/etc/passwd' %}",
    "changing the messages": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "division": "{{ 1 // 0 }}",
    "its own refusal": "{{ raise_exception('only \x1b[2J system messages') }}",
    "syntax": "{% for %}",
    "much text": "{{ 'a' * 4000001 }}",
    "a long text": "{{ 'a' * 10**10 }}",
    "a wide text": "{{ 'a' | center(10**10) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a long list": "{{ ([0] * 10**10) | length }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by blocks": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "replacing": "{{ ('a' * 10**6) | replace('a', 'a' * 10**6) | length }}",
}
ENDLESS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (9 ** (9 ** 9)) > 1 }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "sorting": "{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
}


@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
def test_a_hostile_template_gets_nothing_and_costs_little(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="the chat template") as caught:
        chat(with_template(tmp_path, template))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "expression",
    [
        "raise_exception.__globals__",
        "strftime_now.__code__",
        "messages.__class__",
        "''|attr('__class__')",
        "messages | map(attribute='__class__') | first",
        "self._TemplateReference__context",
        "cycler.__init__.__globals__",
        "lipsum.__globals__['os']",
        "namespace.__init__",
    ],
)
def test_a_template_reaches_no_attribute_of_python(tmp_path: Path, expression: str) -> None:
    """To jinja2's sandbox they are not there: nothing is shown, or looking further is an error."""
    try:
        shown = chat(with_template(tmp_path, f"[{{{{ {expression} }}}}]"))
    except ConfigError:
        return
    assert shown == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("template", [pytest.param(text, id=name) for name, text in ENDLESS.items()])
def test_an_endless_template_is_ended(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="the chat template needs more memory or time"):
        chat(with_template(tmp_path, template))


def test_a_template_that_only_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system keeps no limit of processor time, the deadline does."""
    stuck = tmp_path / "stuck.py"
    stuck.write_text("import threading; threading.Event().wait()", "utf-8")
    monkeypatch.setattr(text_module, "_RENDERER", stuck)
    monkeypatch.setattr(text_module, "RENDER_PATIENCE_S", 0.5)
    with pytest.raises(ConfigError, match="did not come to an end"):
        chat(with_template(tmp_path, "x"))


def test_without_a_program_to_render_with_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="cannot be used: No such file"):
        chat(with_template(tmp_path, "x"))


def test_as_much_text_as_is_allowed_is_fine(tmp_path: Path) -> None:
    codec = with_template(tmp_path, "{{ 'a' * 100000 }}")
    assert len(chat(codec)) == 100_000 < MAX_TEXT_CHARS
