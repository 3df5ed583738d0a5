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
# In the caches' own state, or each call behind another candidate's: (machine, row, whether behind others).
TABLES = [
    *(("Intel Xeon", row, True) for row in ROWS),
    *(("AMD EPYC (Zen 5)", row, False) for row in ROWS),
    ("AMD EPYC (Zen 5)", "BN + ReLU, forward and backward", True),
]


def _last(what: str, threads: int, machine: str, *, behind_others: bool, back: int = 0) -> list[dict[str, Any]]:
    """The records of the last run, or of one that many runs before it."""
    lines = (ROOT / "benchmarks" / "results" / "batch_norm.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    found = [f for f in found if f.get("what") == what and f["threads"] == threads]
    found = [f for f in found if f["environment"]["processor"] == MACHINES[machine]]
    found = [f for f in found if (f.get("untimed", 0) == 0) == behind_others]
    found = [f for f in found if "compiled" not in f["microseconds"]]
    found = found[len(found) - SHAPES * (back + 1) : len(found) - SHAPES * back]
    assert len({f["case"] for f in found}) == SHAPES
    return found


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize(("machine", "row", "behind_others"), TABLES)
def test_the_card_has_the_last_records(machine: str, row: str, behind_others: bool) -> None:
    what, threads, copies = ROWS[row]
    records = _last(what, threads, machine, behind_others=behind_others)
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
    row += ", behind others" if behind_others and machine != "Intel Xeon" else ""
    expected = f"| {row} | {' | '.join(f'{c:.2f}' for c in columns)} | {relu} | {limit:.2f} ({copies:g} {plural}) |"
    card = (ROOT / "docs" / "cards" / "batch_norm.md").read_text()
    assert expected in card[card.index(f"| {machine}, ") :].split("\n\n")[0]


def _faster(what: str, threads: int, *, back: int) -> list[float]:
    records = _last(what, threads, "AMD EPYC (Zen 5)", behind_others=False, back=back)
    return [f["faster"][0] for f in records]


def test_the_card_has_the_run_before() -> None:
    before = [_mean(_faster(what, threads, back=1)) for what, threads, _ in ROWS.values()]
    expected = "had {:.2f}, {:.2f}, {:.2f} and {:.2f} in its first four rows".format(*before)
    assert expected in (ROOT / "docs" / "cards" / "batch_norm.md").read_text().replace("\n", " ")


def test_the_readme_has_the_last_records() -> None:
    xeon, cold = (
        [f["faster"][0] for f in _last("train", 1, machine, behind_others=True)]
        for machine in ("Intel Xeon", "AMD EPYC (Zen 5)")
    )
    runs = [_faster("train", 1, back=back) for back in (0, 1)]
    low, high = sorted(map(_mean, runs))
    expected = (
        f"{_mean(xeon):.2f} times as fast as torch's two layers (mean over 64 shapes; {min(xeon):.2f} at worst) on an "
        f"Intel Xeon, {_mean(cold):.2f} times ({min(cold):.2f}) on an AMD EPYC, where each call finds the caches as "
        f"another has left them; {low:.2f} and {high:.2f} times ({min(map(min, runs)):.2f}) in two runs there by itself"
    )
    assert expected in (ROOT / "README.md").read_text()
