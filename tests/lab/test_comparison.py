import math

import numpy as np
import pytest

from batchlab.lab.comparison import (
    compare_steps,
    estimate,
    final_score,
    mean_curve,
    paired_ratio,
    steps_to_target,
    student_t_quantile,
)
from batchlab.lab.records import RunRecord
from batchlab.lab.settings import RunSettings


def record(seed: int, curve: list[tuple[int, float]], status: str = "finished") -> RunRecord:
    metrics = [{"step": step, "accuracy": accuracy} for step, accuracy in curve]
    settings = RunSettings(seed=seed, steps=curve[-1][0])
    return RunRecord(f"seed{seed}", settings, {}, {}, metrics, {"status": status}, {})


# From printed tables of Student's t, two-sided 95 %.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize(("degrees", "value"), TABLE.items())
def test_student_t(degrees: int, value: float) -> None:
    assert student_t_quantile(degrees) == pytest.approx(value, abs=6e-4)


def test_interval_of_a_textbook_sample() -> None:
    # n = 5, mean 3, sd sqrt(2.5): 3 ± 2.776 · sqrt(2.5/5)
    found = estimate([1, 2, 3, 4, 5])
    assert (found.mean, found.n) == (3, 5)
    assert found.high - 3 == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert 3 - found.low == pytest.approx(found.high - 3)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    samples = generator.normal(2.0, 3.0, size=(2000, 4))
    covered = np.mean([(e := estimate(list(row))).low <= 2.0 <= e.high for row in samples])
    assert 0.935 < covered < 0.965


def test_one_seed_has_no_interval_and_none_is_an_error() -> None:
    assert math.isnan(estimate([1.0]).low)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_ratio_is_geometric_and_paired() -> None:
    found = paired_ratio([100, 400], [50, 50])
    assert found.mean == pytest.approx(4)
    assert found.low < 2
    assert found.high > 8


def test_steps_to_a_target_is_the_first_time() -> None:
    run = record(0, [(0, 0.1), (10, 0.91), (20, 0.89), (30, 0.95)])
    assert [steps_to_target(run, t) for t in (0.9, 0.91, 0.92, 0.96)] == [10, 10, 30, None]


def test_comparison_pairs_by_seed_whatever_the_order() -> None:
    slow = [record(0, [(100, 0.9), (200, 0.95)]), record(1, [(100, 0.5), (200, 0.9)])]
    fast = [record(1, [(50, 0.9), (200, 0.97)]), record(0, [(25, 0.92), (200, 0.94)])]
    row = compare_steps(slow, fast, 0.9)
    assert (row.baseline, row.other) == ((100, 200), (25, 50))
    assert row.ratio is not None
    assert row.ratio.mean == pytest.approx(4)
    own = compare_steps(slow, fast)  # each seed's baseline sets the target: 0.95 and 0.9
    assert (own.baseline, own.other) == ((200, 200), (None, 50))
    assert compare_steps(slow, fast, 0.99).ratio is None
    with pytest.raises(ValueError, match="same seeds"):
        compare_steps(slow, fast[:1])


def test_score_is_the_mean_of_the_last_fifth() -> None:
    run = record(0, [(0, 0.0), (79, 0.3), (80, 0.5), (90, 0.6), (100, 0.7)])
    assert final_score(run) == pytest.approx(0.6)
    assert final_score(record(0, [(0, 0.9), (100, 0.9)], "diverged")) == 0


def test_mean_curve_stops_where_the_first_run_stopped() -> None:
    curve = mean_curve([record(0, [(0, 0.1), (10, 0.3), (20, 0.5)]), record(1, [(0, 0.3), (10, 0.5)])])
    assert curve.steps == (0, 10)
    assert curve.mean == pytest.approx((0.2, 0.4))
