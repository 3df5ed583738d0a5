"""The study of rectifiers end to end on a size of seconds, and its sentences on numbers worked out by hand."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from batchlab.lab.comparison import Estimate, estimate
from batchlab.lab.data import load_embedded
from batchlab.lab.figures import Cell, table_figure
from batchlab.lab.settings import SettingsError
from batchlab.lab.studies import STUDIES
from batchlab.lab.studies.rectifiers import COMPARISON
from batchlab.lab.studies.rectifiers.answer import accuracy_text, answer, closing, in_words, listed, sure, verdicts
from batchlab.lab.studies.rectifiers.page import rate_table, slope_table, start_table, steps_table
from batchlab.lab.studies.rectifiers.settings import SIZES, RectifiersSettings, cell
from batchlab.lab.studies.rectifiers.summary import CellResult, Summary, fewer_steps, gain
from batchlab.lab.study import Workplace

TINY = RectifiersSettings(
    steps=20,
    seeds=2,
    rates=(0.03, 1e6),
    search_steps=10,
    search_seeds=1,
    depths=(1, 3),
    width=8,
    spacing=0.5,
)
FULL = SIZES["full"]


def result(*accuracies: float, **other: Any) -> CellResult:
    values: dict[str, Any] = {
        "accuracies": accuracies,
        "accuracy": estimate(accuracies),
        "trained": sum(value >= 0.5 for value in accuracies),
        "diverged": 0,
        "steps": (100,) * len(accuracies),
        "sizes": (1.0, 0.5, 2.0**-29),
        "differing": (0.5, 0.25, 1e-9),
        "gradients": (12345.0, 5.0, 1.0),
        "slopes": (),
    }
    return CellResult(**(values | other))


def summary(settings: RectifiersSettings, **cells: CellResult) -> Summary:
    """All networks recognize 90 % in three runs, but for those that are given; "_" stands for "-" in their names."""
    found = {name: result(0.89, 0.90, 0.91) for name in settings.cells}
    given = {re.sub(r"_(\d+)_", r"-\1-", name): value for name, value in cells.items()}
    assert set(given) <= set(found)
    return Summary(dict.fromkeys(found, 0.03), {}, found | given, (), 60.0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHLAB_DATA", "")
        patch.setenv("BATCHLAB_OFFLINE", "1")
        workplace = Workplace(tmp_path_factory.mktemp("study") / "out", load_embedded(), None, 2, Console(width=200))
        return STUDIES["rectifiers"].run(TINY, workplace).parent


def test_the_study_leaves_records_figures_and_a_report(tiny: Path) -> None:
    first = {p.name: p.read_bytes() for p in tiny.rglob("*.*") if p.suffix in (".html", ".json", ".svg")}
    found = json.loads((tiny / "summary.json").read_text())
    assert set(found["cells"]) == set(found["chosen"]) == set(COMPARISON.arms(TINY)) == set(TINY.cells)
    assert len(found["cells"]) == 20
    names = {"cells", "start-size", "start-signal", "start-gradient", "slopes"}
    names |= {"rate-search-none", "rate-search-batch_norm"}
    assert {p.stem for p in (tiny / "figures").iterdir()} == names
    text = (tiny / "report.html").read_text()
    assert "The test images had no part in it" in text
    assert "nan" not in text.lower().replace("finan", "")
    STUDIES["rectifiers"].report(tiny, Console(record=True))
    assert {p.name: p.read_bytes() for p in tiny.rglob("*.*") if p.suffix in (".html", ".json", ".svg")} == first


def test_the_numbers_are_those_of_the_records(tiny: Path) -> None:
    found = json.loads((tiny / "summary.json").read_text())
    name = cell("prelu_he", 3)
    runs = [tiny / f"runs/final/{name}-rate{found['chosen'][name]:g}-seed{seed}" for seed in (0, 1)]
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    mine = found["cells"][name]
    assert mine["accuracies"] == pytest.approx([result["accuracy"] for result in results])
    assert mine["slopes"] == [list(result["slopes"].values()) for result in results]
    signal = [result["signal"] for result in results]
    last = [one["size"][2] / one["size"][0] for one in signal]
    assert mine["sizes"][2] == pytest.approx((last[0] * last[1]) ** 0.5)
    share = [one["differing"][1] / one["size"][1] for one in signal]
    assert mine["differing"][1] == pytest.approx((share[0] * share[1]) ** 0.5)
    back = [one["gradient"][0] / one["gradient"][2] for one in signal]
    assert mine["gradients"][0] == pytest.approx((back[0] * back[1]) ** 0.5)
    paces = [json.loads(path.read_text())["processor_seconds"] for path in tiny.glob("runs/*/*/timing.json")]
    assert len(paces) == 20 * (2 + 2)
    assert found["seconds"] == pytest.approx(sum(paces), abs=1e-3)


def test_arms_differ_in_what_their_names_say() -> None:
    arms = COMPARISON.arms(FULL)
    assert len(arms) == 40
    network = arms[cell("prelu_xavier", 22, "batch_norm")].network
    assert (network.activation, network.initialization, network.normalization) == ("prelu", "xavier", "batch_norm")
    assert network.widths == (64,) * 22
    kinds = {(arm.network.activation, arm.network.initialization) for arm in arms.values()}
    assert len(kinds) == 5
    assert all(arm.optimizer.weight_decay == 0 for arm in arms.values())


def test_which_networks_train_and_which_is_best() -> None:
    stuck, partly = result(0.11, 0.11, 0.11), result(0.9, 0.1, 0.8)
    found = summary(
        FULL, sigmoid_30_none=stuck, relu_xavier_22_none=partly, prelu_he_30_batch_norm=result(0.94, 0.95, 0.96)
    )
    trained, best, *_ = answer(FULL, found)
    assert trained.startswith("Of 20 networks without batch norm 18 train in every run: after 1,800 steps they")
    assert trained.endswith("With batch norm 20 of the same 20 do.")
    assert best == (
        "With 30 hidden layers the best without batch norm is ReLU, Xavier's start with 90.00 % (87.52 to 92.48), the "
        "best with it PReLU, He's start with 95.00 % (92.52 to 97.48) (+5.00 percentage points, 95 % interval +5.00 to "
        "+5.00)."
    )
    assert accuracy_text(partly) == "60.00 % (2 of 3 runs train)"
    assert accuracy_text(stuck) == "11.00 % (0 of 3 runs train)"


def test_the_start_is_judged_by_the_numbers() -> None:
    stalled = result(0.11, 0.11, 0.12, steps=(None, None, None))
    start = answer(FULL, summary(FULL, relu_xavier_30_none=stalled))[2]
    assert start.startswith("ReLU, 30 hidden layers, He's start against Xavier's: without batch norm 90.00 % (87.52 to")
    assert "against 11.33 % (0 of 3 runs train) (+78.67 percentage points, 95 % interval +77.23 to +80.10); wi" in start
    assert "with batch norm 90.00 % (87.52 to 92.48) against 90.00 % (87.52 to 92.48) (no clear diff" in start
    other = answer(FULL, summary(FULL, relu_he_30_none=stalled))[2]
    assert "(-78.67 percentage points, 95 % interval -80.10 to -77.23)" in other


def test_differences_in_words() -> None:
    clear, unclear, loss = Estimate(0.02, 0.01, 0.03, 3), Estimate(0.01, -0.01, 0.03, 3), Estimate(-0.5, -0.6, -0.4, 3)
    assert in_words({3: unclear, 10: clear, 22: clear, 30: loss}) == (
        "clearly more with 10 and 22 hidden layers (+2.00 and +2.00 percentage points), "
        "clearly less with 30 hidden layers (-50.00 percentage points), "
        "no clear difference with 3 hidden layers (+1.00 percentage points)"
    )
    one = estimate([0.02])
    assert in_words({3: one, 30: one}) == (
        "+2.00 with 3 and +2.00 with 30 hidden layers (percentage points; one seed, so without intervals)"
    )
    assert sure(one) == "+2.00 percentage points; one seed, so without an interval"
    assert sure(unclear) == "no clear difference: +1.00 percentage points, 95 % interval -1.00 to +3.00"
    assert [listed([]), listed([3]), listed([3, 10]), listed([3, 10, 22])] == ["", "3", "3 and 10", "3, 10 and 22"]


def test_the_papers_statements_meet_the_numbers() -> None:
    slopes = ((0.5, 0.2, 0.3), (0.6, 0.2, 0.2), (0.55, 0.3, 0.1))
    found = summary(
        FULL,
        relu_xavier_30_none=result(0.11, 0.11, 0.11, steps=(None,) * 3, diverged=1),
        relu_xavier_22_none=result(0.89, 0.90, 0.91, steps=(200, 400, 200)),
        relu_he_10_none=result(0.95, 0.96, 0.97),
        prelu_he_30_none=result(0.92, 0.93, 0.94, slopes=slopes),
        sigmoid_30_batch_norm=result(0.1, 0.1, 0.1),
    )
    rows = verdicts(FULL, found)
    by_claim = {row[0]: row[1] for row in rows}
    assert by_claim["30 layers of ReLU: He's start converges, Xavier's stalls"] == (
        "30 hidden layers. He's start: 90.00 % (87.52 to 92.48); Xavier's start: 11.00 % (0 of 3 runs train), "
        "1 diverged"
    )
    both = by_claim["22 layers of ReLU: both converge, He's earlier"]
    assert both.endswith("He's takes 100 steps to 90 %, Xavier's 267, 2.52 (0.93 to 6.81) times as many")
    assert by_claim["30 layers end with more errors than 14, He's start"] == (
        "30 hidden layers against 10, accuracy: -6.00 percentage points, 95 % interval -6.00 to -6.00"
    )
    assert [row[1] for row in rows if "slope" in row[0]] == [
        "3 hidden layers: no run has slopes to compare",
        "30 hidden layers: 0.550 in the first, 0.217 in the deeper ones (+0.333, +0.144 to +0.523: clear)",
    ]
    assert by_claim["(not in the paper) sigmoids with batch norm"] == (
        "train with 3, 10 and 22, do not train in every run with 30 hidden layers"
    )
    assert "clearly more with 30 hidden layers (+3.00 percentage points)" in str(rows)


def test_steps_are_compared_only_where_every_run_has_them() -> None:
    found = summary(TINY, relu_he_3_none=result(0.9, 0.9, 0.9, steps=(100, None, 100)))
    assert fewer_steps(found, cell("relu_he", 3), cell("relu_he", 1)) is None
    assert gain(found, cell("relu_xavier", 3), cell("relu_xavier", 1)).mean == 0
    table = {row[0]: row[1:] for row in steps_table(TINY, found, "").rows}
    assert table["ReLU, He's start, without batch norm"] == ["100", "100 (2 of 3 runs)"]


def test_one_seed_and_one_depth_have_no_nan() -> None:
    settings = dataclasses.replace(TINY, seeds=1, depths=(2,))
    single = {name: result(0.9, slopes=((0.25, 0.3),) if "prelu" in name else ()) for name in settings.cells}
    found = Summary(dict.fromkeys(single, 0.03), {}, single, (), 1.0)
    text = " ".join([*answer(settings, found), *(cell for row in verdicts(settings, found) for cell in row)])
    assert "nan" not in text
    assert "0.250 in the first, 0.300 in the deeper ones (-0.050: one seed)" in text
    alone = {name: result(0.9, slopes=((0.25,),) if "prelu" in name else ()) for name in settings.cells}
    assert slope_table(settings, Summary({}, {}, alone, (), 1.0), "").rows[0][1] == "0.250"


def test_the_table_of_the_start_has_theory_and_measurement() -> None:
    rows = {row[0]: row[1:] for row in start_table(FULL, summary(FULL), "").rows}
    assert rows["ReLU, Xavier's start, without batch norm"] == ["1.9e-09", "1.9e-09", "below 0.0001 %", "12000"]
    assert rows["PReLU, Xavier's start, without batch norm"][0] == f"{0.53125**29:.2g}"
    assert rows["sigmoid, without batch norm"][0] == "–"
    assert len(rows) == 10


def test_rates_of_networks_that_do_not_train_are_in_brackets_and_edges_are_named() -> None:
    found = summary(TINY, sigmoid_3_none=result(0.1, 0.1, 0.9))
    assert rate_table(TINY, found, "").rows[0] == ["sigmoid, without batch norm", "0.03", "(0.03)"]
    assert closing(found) == "No network that trains has its best rate at the edge of those tried."
    edge = dataclasses.replace(found, not_closed=(cell("relu_he", 3, "batch_norm"),))
    assert closing(edge).endswith("beyond: ReLU, He's start, 3 layers, with batch norm (0.03).")


@pytest.mark.parametrize("wrong", [{"depths": ()}, {"depths": (3, 2)}, {"depths": (0,)}, {"trains_from": 0.1}], ids=str)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        dataclasses.replace(TINY, **wrong)


def test_a_table_figure_shows_each_field() -> None:
    field = Cell("97.1", 1, 0.7)
    svg = table_figure(
        "t", {"left": [[field]], "right": [[field]]}, ["row"], ["3"], x_label="layers", description="a < b"
    )
    assert svg.count(">97.1<") == 2
    assert all(f">{word}<" in svg for word in ("left", "right", "row", "layers"))
    assert svg.count(">3<") == 2
    assert "<title>a &lt; b</title>" in svg
