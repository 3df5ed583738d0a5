"""The numbers on batch norm's card and in the README are those of the records of `benchmarks.batch_norm`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHAPES = 64
MACHINES = {"Intel Xeon": "Intel(R) Xeon(R) Processor", "AMD EPYC (Zen 5)": "AMD EPYC"}
"""The card's heading of a table -> what records call the processor."""
# The card's rows: (what, threads, copies of all that has to move).
ROWS = {
    "BN + ReLU, forward and backward": ("train", 1, 2.5),
    "BN + residual + ReLU, forward and backward": ("residual", 1, 4.0),
    "BN + ReLU, evaluation without a gradient": ("evaluation", 1, 1.0),
    "BN + ReLU, forward and backward, two threads": ("train", 2, 2.5),
}


def _last(what: str, threads: int, machine: str) -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks" / "results" / "batch_norm.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    found = [f for f in found if f.get("what") == what and f["threads"] == threads]
    found = [f for f in found if f["environment"]["processor"] == MACHINES[machine]]
    found = [f for f in found if "compiled" not in f["microseconds"]][-SHAPES:]
    assert len({f["case"] for f in found}) == SHAPES
    return found


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("row", ROWS)
def test_the_card_has_the_last_records(row: str, machine: str) -> None:
    what, threads, copies = ROWS[row]
    records = _last(what, threads, machine)
    times = {f["case"]: f["microseconds"] for f in records}
    faster = {f["case"]: f["faster"][0] for f in records}
    columns = [
        _mean(list(faster.values())),
        _mean([value for case, value in faster.items() if "channels-last" not in case]),
        _mean([value for case, value in faster.items() if "channels-last" in case]),
        min(faster.values()),
        max(faster.values()),
    ]
    relu = f"{_mean([t['torch'] / t['relu'] for t in times.values()]):.2f}" if what != "residual" else "–"
    limit = _mean([t["torch"] / copies / t["copy"] for t in times.values()])
    plural = "copies" if copies > 1 else "copy"
    expected = f"| {row} | {' | '.join(f'{c:.2f}' for c in columns)} | {relu} | {limit:.2f} ({copies:g} {plural}) |"
    card = (ROOT / "docs" / "cards" / "batch_norm.md").read_text()
    assert expected in card[card.index(f"| {machine}, ") :].split("\n\n")[0]


def test_the_readme_has_the_last_records() -> None:
    xeon, epyc = ([f["faster"][0] for f in _last("train", 1, machine)] for machine in MACHINES)
    expected = (
        f"{_mean(xeon):.2f} times as fast as torch's two layers (mean over 64 shapes; {min(xeon):.2f} at worst) on an "
        f"Intel Xeon, {_mean(epyc):.2f} times ({min(epyc):.2f}) on an AMD EPYC"
    )
    assert expected in (ROOT / "README.md").read_text()
