"""The page, in a browser: typed, clicked and read as people do."""

import base64
import itertools
import json
import shutil
import time

import pytest

from tests.server.browser import PROGRAM, Browser
from tests.server.helpers import idle

PROMPT = "The answer to life is <img src=x onerror=alert(1)> "


@pytest.fixture(scope="module")
def page(http, tmp_path_factory):
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"no {PROGRAM} on this machine")
    one = Browser(tmp_path_factory.mktemp("profile"))
    size = {"width": 1280, "height": 1500, "deviceScaleFactor": 1, "mobile": False}
    one.call("Emulation.setDeviceMetricsOverride", **size)
    one.call("Page.navigate", url=str(http.base_url))
    one.until("document.getElementById('model')?.textContent === 'toy'")
    yield one
    one.close()


def fill(page, **values):
    for name, value in values.items():
        page.run(f"document.getElementById('{name}').value = {json.dumps(value)}")


def text_of(page) -> str:
    return page.run("document.getElementById('text').textContent")


def status(page) -> str:
    return page.run("document.getElementById('status').textContent")


def test_the_files_are_small_and_closed_to_others(http):
    total = 0
    for path in ("/", "/app.js", "/style.css"):
        answer = http.get(path)
        total += len(answer.content)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        again = http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert b"http://" not in answer.content.replace(b"http://www.w3.org", b"")
        assert b"innerHTML" not in answer.content
    assert total < 60_000


def test_a_prompt_is_continued_and_gone_on_from_an_alternative(page, server, complete):
    fill(page, temperature="0", max_tokens="20", prompt="")
    page.run("document.getElementById('prompt').focus()")
    page.write(PROMPT)
    page.press("Enter", modifiers=2)
    page.until("document.getElementById('status').textContent.includes('tokens, ')")
    expected = complete(prompt=PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    # What looks like markup is text.
    assert text_of(page) == PROMPT + expected
    assert page.run("document.querySelectorAll('#text img').length") == 0
    assert page.run("document.querySelectorAll('#text .prompt').length") > 5
    assert "of the prompt's" in status(page)

    # By keyboard: to a new token, then to its second alternative.
    page.run("document.getElementById('text').focus()")
    page.press("End")
    page.press("ArrowLeft")
    facts = page.run("document.getElementById('token-facts').textContent")
    assert "bits, rank 1" in facts
    place = int(page.run("document.querySelector('#text .here').dataset.place"))
    of_row = "r => r.innerText.split('\\t')"
    rows = page.run(f"[...document.querySelectorAll('#alternatives tbody tr')].map({of_row})")
    assert len(rows) == 10
    assert rows[0][2] == "100 %"
    before = page.run(f"[...document.querySelectorAll('#text .t')].slice(0, {place})"
                      ".map(t => t.textContent).join('')")  # fmt: skip
    page.run("document.querySelectorAll('#alternatives button')[1].click()")
    page.until(f"document.querySelectorAll('#text .t').length === {place} + 21")
    page.until("document.getElementById('status').textContent.includes('tokens, ')")
    assert text_of(page).startswith(before + json.loads(rows[1][0]))
    known = int(status(page).split("; ")[-1].split()[0])
    assert known >= 16

    curl = page.run("document.getElementById('curl').textContent")
    assert "/v1/completions" in curl
    assert '"temperature":0' in curl
    assert "openai.OpenAI" in page.run("document.getElementById('python').textContent")
    idle(server)


def test_the_ribbon_shows_the_experts_of_the_text(page, toy):
    text = text_of(page)
    page.run("document.getElementById('trace').click()")
    page.until("document.getElementById('ribbon').width > 0")
    page.run("document.getElementById('ribbon').focus()")
    for key in ("Home", "ArrowDown", "ArrowDown"):
        page.press(key)
    words = page.until("document.getElementById('cell').textContent")
    assert words.startswith("layer 2, token ")
    table = page.run("[...document.querySelectorAll('#routing tr')].map(r => r.children.length)")
    assert len(table) == toy.config.num_layers + 1
    assert set(table) == {page.run("document.querySelectorAll('#text .t').length") + 1}
    lens = page.run("document.querySelectorAll('#lens tr').length")
    assert lens == toy.config.num_layers + 1
    assert text_of(page) == text
    made = page.call("Page.captureScreenshot", format="png")
    assert base64.b64decode(made["data"]).startswith(b"\x89PNG")


def test_stop_frees_the_slot_and_the_end_of_the_server_is_told(page, server, complete):
    def num_tokens(seed: int) -> int:
        answer = complete(prompt="A", max_tokens=900, temperature=1, top_p=1, seed=seed)
        return answer["usage"]["completion_tokens"]

    # One that goes on for a while, and turns that leave the page time to stop it.
    seed = next(seed for seed in itertools.count() if num_tokens(seed) > 300)
    fill(page, temperature="1", top_p="1", max_tokens="900", seed=str(seed), prompt="A")

    def wait(*turn):
        time.sleep(0.05)

    server.on_turn.append(wait)
    page.press("Enter", modifiers=2)
    page.until("document.querySelectorAll('#text .t').length > 5")
    page.press("Escape")
    page.until("document.getElementById('status').textContent.startsWith('stopped after')")
    server.on_turn.remove(wait)
    idle(server)
    fill(page, max_tokens="0")
    page.run("document.getElementById('go').click()")
    page.until("document.getElementById('status').textContent.startsWith('failed: ') || "
               "document.getElementById('status').textContent.includes('0 tokens')")  # fmt: skip


def test_it_is_read_in_the_dark_and_on_a_small_screen(page, http):
    feature = [{"name": "prefers-color-scheme", "value": "dark"}]
    page.call("Emulation.setEmulatedMedia", features=feature)
    colours = "getComputedStyle(document.body)"
    assert page.run(f"{colours}.backgroundColor") == "rgb(21, 21, 21)"
    size = {"width": 320, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    assert page.run("document.documentElement.scrollWidth") <= 320
    assert page.hosts == {f"127.0.0.1:{http.base_url.port}"}
    assert page.errors == []
