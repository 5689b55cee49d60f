"""The files that come with the library, in a checkout and in a wheel."""

import pathlib
import tomllib

from grok1 import bundled
from grok1.checkpoint.directory import tokenizer_path
from grok1.config import GROK_1, TOY

ROOT = pathlib.Path(__file__).parent.parent


def test_a_wheel_has_them_where_they_are_looked_for(tmp_path, monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    beside = [bundled.toy(), bundled.tokenizer()]
    assert {ROOT / source for source in wheel["force-include"]} == set(beside)
    for target in wheel["force-include"].values():
        (tmp_path / target).mkdir(parents=True)
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "grok1" / "bundled.py"))
    inside = [bundled.toy(), bundled.tokenizer()]
    assert inside == [tmp_path / target for target in wheel["force-include"].values()]


def test_toy_is_a_name_unless_there_is_such_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bundled.named("toy") == bundled.toy()
    for other in ("toys", "./toy/ckpt-0", "x/toy"):
        assert bundled.named(other) == pathlib.Path(other)
    (tmp_path / "toy").mkdir()
    assert bundled.named("toy") == pathlib.Path("toy")


def test_released_weights_without_a_tokenizer_take_the_one_that_comes_along(tmp_path):
    assert tokenizer_path(tmp_path, GROK_1) == bundled.tokenizer()
    assert tokenizer_path(tmp_path, GROK_1.first_layers(8)) == bundled.tokenizer()
    assert tokenizer_path(tmp_path, TOY) is None
    own = tmp_path / "tokenizer.model"
    own.symlink_to("absent")  # the model's own, and an error when it is read
    for config in (GROK_1, TOY):
        assert tokenizer_path(tmp_path, config) == own
