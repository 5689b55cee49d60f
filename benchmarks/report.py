"""The table to read, and the JSON to keep."""

import dataclasses
import json
import pathlib
import re
from typing import Any

from benchmarks.figures import Failure, Result
from benchmarks.machine import BenchmarkError
from grok1.machine.safe_files import replacing

_RATIOS = {"roofline": "of roofline", "dense": "x dense", "llama.cpp": "x llama.cpp"}
_OTHER_RATIOS = {
    "greedy": "{:.2f} of greedy decoding",
    "disk": "{:.2f} of reading the files",
    "files": "{:.2f} of the files",
    "one by one": "{:.2f} of one client",
    "scheduler": "{:.2f} of the scheduler alone",
    "llama.cpp server": "{:.2f} of llama.cpp's server",
    "max_stall": "{:.2f} of the most that is allowed",
    "first process": "{:.0%} of the first",
    "int8": "{:.2f} of int8",
    "int8's time": "{:.2f} of int8's time",
}


def document(
    device: dict[str, Any],
    date: str,
    arguments: dict[str, Any],
    results: list[Result],
    failures: list[Failure],
) -> dict[str, Any]:
    """Returns everything as one JSON object.

    Args:
      device: As `worker.Session.describe` says, with the version of llama.cpp if it was compared.
      date: Day of the run, as 2026-01-31.
      arguments: How it was run.
      results: The figures.
      failures: What could not be measured.
    """
    return {
        "date": date,
        "device": device,
        "arguments": arguments,
        "results": [dataclasses.asdict(result) for result in results],
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }


def table(found: dict[str, Any]) -> str:
    """Returns a document as a Markdown table under a line with device, versions and day."""
    device = found["device"]
    versions = ", ".join(f"{name} {version}" for name, version in device["versions"].items())
    columns = ["model", "measurement", "threads", "value", *_RATIOS.values(), ""]
    rows = [columns, ["-" * len(column) or "-" for column in columns]]
    for result in found["results"]:
        ratios = result["ratios"]
        rows.append(
            [
                result["model"],
                result["measurement"],
                str(result["threads"] or ""),
                f"{_three_digits(result['value'])} {result['unit']}",
                *(_ratio(name, ratios[name]) if name in ratios else "" for name in _RATIOS),
                _note(result),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    if any(result["ratios"].get("roofline", 0) > 1 for result in found["results"]):
        lines += [
            "",
            "?: faster than its bound, which was measured while the machine did something else;",
            "measure again with nothing beside it, or with more --repeats.",
        ]
    return "\n".join([f"{device['name']}, {versions}, {found['date']}", "", *lines])


def line(result: Result) -> str:
    """Returns one figure as one line, for those who wait."""
    ratios = (f"{_ratio(n, value)} {_RATIOS.get(n, n)}" for n, value in result.ratios.items())
    figure = f"{_three_digits(result.value)} {result.unit}"
    return f"{result.model}: {result.measurement}: " + ", ".join([figure, *ratios])


def write(found: dict[str, Any], directory: pathlib.Path) -> pathlib.Path:
    """Writes a document as `<device>-<date>.json` and returns the path.

    Figures that the file has of other measurements of that day, on the device and with the versions
    of this document, stay in it.

    Raises:
      BenchmarkError: If it cannot be written.
    """
    name = re.sub(r"\((?:r|tm)\)", "", found["device"]["name"].lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    path = directory / f"{slug}-{found['date']}.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.exists():
            found = _added(json.loads(path.read_text(encoding="utf-8")), found)
        with replacing(path) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _added(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    def key(result):
        return result["model"], result["measurement"], result["threads"]

    def without_peer(device):
        # llama.cpp is not part of every run.
        versions = {n: v for n, v in device["versions"].items() if n != "llama.cpp"}
        return device | {"versions": versions}

    if without_peer(before["device"]) != without_peer(found["device"]):
        return found
    versions = before["device"]["versions"] | found["device"]["versions"]
    device = found["device"] | {"versions": versions}
    new = {key(result) for result in found["results"]}
    kept = [result for result in before["results"] if key(result) not in new]
    return found | {"device": device, "results": kept + found["results"]}


def _note(result: dict[str, Any]) -> str:
    details = result["details"]
    if "bytes_per_second" in details:
        gigabytes = sum(details["bytes"].values()) / 1e9
        return f"{gigabytes:.3g} GB a step, {details['bytes_per_second'] / 1e9:.3g} GB/s"
    if "operations_per_second" in details:
        return (
            f"{details['operations'] / 1e9:.3g} GFLOP, "
            f"{details['operations_per_second'] / 1e9:.3g} GFLOP/s"
        )
    if "copies_of_weights" in details:
        copies = details["copies_of_weights"]
        what = f"{len(copies)} copies of weights" if copies else "no copy of a weight"
        return f"{details['argument_bytes'] / 1e9:.3g} GB arguments, {what}"
    if "kernels" in details:
        largest = list(details["kernels"].items())[:3]
        return ", ".join(f"{kernel['share']:.0%} {name}" for name, kernel in largest)
    if "spread" in details:
        nucleus, first = details["spread"]["nucleus"], details["spread"]["most probable"]
        ratio = _OTHER_RATIOS["greedy"].format(result["ratios"]["greedy"])
        return f"{ratio}; most probable token {first:.2f}, nucleus of {nucleus:,.0f}"
    if "int8" in result["ratios"]:
        return _OTHER_RATIOS["int8"].format(result["ratios"]["int8"])
    if "prompt" in details:
        return f"prompt of {details['prompt']}"
    return "; ".join(
        text.format(result["ratios"][name])
        for name, text in _OTHER_RATIOS.items()
        if name in result["ratios"]
    )


def _ratio(name: str, value: float) -> str:
    # Above its bound nothing runs: the machine was slower when the bound was measured.
    return "?" if name == "roofline" and value > 1 else f"{value:.2f}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
