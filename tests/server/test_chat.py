"""Chat templates of the server's owner: files in the language of Jinja, run in a sandbox."""

import builtins

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
