"""Chats: templates in the language of Jinja, run in a sandbox, and what becomes of messages."""

import builtins
import time

import pytest

from grok1.server.chat import TRANSCRIPT, load_template
from grok1.server.refusals import RefusalError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture
def template(tmp_path):
    """Loads a template of this text."""
    pytest.importorskip("jinja2")

    def load(text):
        path = tmp_path / "template.jinja"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_template(str(path))

    return load


def test_a_transcript_names_its_speakers():
    assert load_template("transcript") is TRANSCRIPT
    assert TRANSCRIPT.render(MESSAGES) == "System: Be brief.\n\nUser: Hi\n\nAssistant:"


def test_a_file_writes_the_messages(template):
    found = template(
        "{% for message in messages %}\n"
        "<{{ message.role }}>{{ message['content'] }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert found.render(MESSAGES) == "<system>Be brief.\n<user>Hi\n<assistant>"
    assert found.stops == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
    ],
)
def test_what_a_template_cannot_or_must_not_do_refuses_the_messages(text, said, template):
    with pytest.raises(RefusalError, match=rf"^the chat template cannot write these .*{said}"):
        template(text).render(MESSAGES)


@pytest.mark.parametrize("text", ["{% for %}", b"\xff"])
def test_what_is_no_template_is_an_error_at_the_start(text, template):
    with pytest.raises(ValueError, match=r"template\.jinja: is no template: "):
        template(text)


def test_a_missing_file_or_package_is_said(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent: no such file; a chat template is a file"):
        load_template(str(tmp_path / "absent"))
    (tmp_path / "template").write_text("")
    original = builtins.__import__

    def without(name, *more):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="needs the package jinja2: pip install jinja2"):
        load_template(str(tmp_path / "template"))


def test_a_chat_needs_a_template_and_stops_at_the_next_speaker(client, complete, start, server):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    chat = client.chat.completions.create(
        model="toy", messages=messages, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2
    )
    plain = complete(prompt="User: Hello\n\nAssistant:", max_tokens=6, temperature=0)
    assert chat.choices[0].message.content == plain["choices"][0]["text"]
    assert len(chat.choices[0].logprobs.content) == 6
    stream = client.chat.completions.create(
        model="toy", messages=messages, max_completion_tokens=6, temperature=0, stream=True
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content for one in parts) == plain["choices"][0]["text"]
    for more, words in (
        ({"messages": []}, "at least one message"),
        ({"tools": [{}]}, "tools are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be text"),
        ({"messages": [{**messages[0], "tool_calls": [{"id": "a"}]}]}, "tool_calls are not"),
        ({"messages": [{**messages[0], "function_call": {"name": "a"}}]}, "function_call are not"),
        ({"messages": [{"role": "user"}]}, "a message must have content"),
        ({"messages": messages * 1025}, "messages must be at most 1024"),
        ({"response_format": {"type": "json_object"}}, "response_format must be text here"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    ):
        error = complete(400, path="/v1/chat/completions", **{"messages": messages, **more})[
            "error"
        ]
        assert words in error["message"]
    without, _, _ = start(lambda: server)
    while without.get("/health").status_code != 200:
        time.sleep(0.01)
    answer = without.post("/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
    assert "/v1/completions" in answer.text


def test_a_chat_takes_what_a_completion_takes(complete):
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "Hello"}]
    options = {"messages": messages, "max_tokens": 2, "temperature": 0}
    whole = complete(path=path, **options, truncate_prompt_tokens=1000)
    # The server's own stops are not the client's.
    assert (
        complete(path=path, **options, stop=[f"{k}!" for k in range(16)])["choices"]
        == (whole["choices"])
    )
    error = complete(400, path, **options, stop=["!"] * 17)["error"]
    assert error["message"] == "stop must be at most 16 texts, found 17"


def test_a_template_has_the_tokens_and_messages_have_their_spellings(start, server, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text(
        "{{ bos_token }}{% for one in messages %}{{ one.name }}{{ one.content }}{{ eos_token }}"
        "{% endfor %}A:"
    )
    client, _, _ = start(lambda: server, chat_template=str(path), add_bos=True)
    while client.get("/health").status_code != 200:
        time.sleep(0.01)
    tokenizer = server.model.tokenizer
    bos, eos = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
    body = {"messages": [{"role": "user", "content": f"{bos} {eos}"},
                         {"role": "a", "content": "", "name": "Al", "tool_calls": []}],
            "max_tokens": 1, "return_token_ids": True}  # fmt: skip
    for given in ({}, {"add_special_tokens": True}):
        answer = client.post("/v1/chat/completions", json=body | given).json()
        expected = [tokenizer.bos_id, *tokenizer.encode(f"{bos} {eos}"), tokenizer.eos_id,
                    *tokenizer.encode("Al"), tokenizer.eos_id, *tokenizer.encode("A:")]  # fmt: skip
        assert answer["choices"][0]["prompt_token_ids"] == expected
