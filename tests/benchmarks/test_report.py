"""What is written of the figures, and shown."""

import json

from benchmarks import figures, report


def test_figures_of_one_day_and_device_are_kept_together(tmp_path):
    def document(measurement, value, **more):
        result = figures.Result("toy", measurement, value, "s", 1)
        device = {"name": "A CPU", "versions": {"jax": "1", **more}}
        return report.document(device, "2026-01-31", {}, [result], [])

    def values(path):
        return {r["measurement"]: r["value"] for r in json.loads(path.read_text())["results"]}

    report.write(document("load", 1.0, **{"llama.cpp": "b1"}), tmp_path)
    report.write(document("decode", 2.0), tmp_path)
    path = report.write(document("load", 3.0), tmp_path)
    assert values(path) == {"decode": 2.0, "load": 3.0}
    assert json.loads(path.read_text())["device"]["versions"] == {"jax": "1", "llama.cpp": "b1"}
    other = document("load", 4.0)
    other["device"]["versions"]["jax"] = "2"
    assert values(report.write(other, tmp_path)) == {"load": 4.0}


def test_what_is_faster_than_its_bound_is_shown_as_doubtful():
    result = figures.Result("toy", "decode", 9.0, "tokens/s", 1, {"roofline": 1.4, "dense": 2})
    device = {"name": "A CPU", "versions": {}}
    table = report.table(report.document(device, "2026-01-31", {}, [result], []))
    assert "1.40" not in table
    assert "| ?           | 2.00    |" in table
    assert "?: faster than its bound" in table
    assert report.line(result) == "toy: decode: 9 tokens/s, ? of roofline, 2.00 x dense"
