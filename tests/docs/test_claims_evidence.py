"""The committed claims are what the committed records say, and one kind of them is counted by hand."""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest

from batchlab.lab.claims import read_claims
from batchlab.lab.studies import STUDIES

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.parametrize("study", sorted(path.parent.name for path in EXPERIMENTS.glob("*/claims.json")))
def test_claims_are_those_of_the_records(study: str) -> None:
    found = STUDIES[study].read(EXPERIMENTS / study).told
    committed = read_claims(EXPERIMENTS / study)
    assert found is not None
    assert (found.study, found.title, found.command) == (committed.study, committed.title, committed.command)
    assert [repr(claim) for claim in found.claims] == [repr(claim) for claim in committed.claims]  # as NaN is not NaN


def test_steps_of_dropout_or_bn_counted_by_hand() -> None:
    runs = EXPERIMENTS / "dropout-or-bn" / "runs" / "final"

    def steps(arm: str, seed: int) -> int:
        (folder,) = runs.glob(f"{arm}-rate*-seed{seed}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return next(line["step"] for line in lines if line["accuracy"] >= 0.95)

    ratios = [math.log(steps("bn", seed) / steps("dropout0.5", seed)) for seed in range(5)]
    claim = next(
        c for c in read_claims(runs.parents[1]).claims if c.text == "dropout 0.5: batch norm's steps over its own"
    )
    assert claim.value is not None
    assert claim.value.mean == pytest.approx(math.exp(fmean(ratios)), rel=1e-12)
