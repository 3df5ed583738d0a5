"""The page of studies done again is what `batchlab compare` says of the committed claims."""

from pathlib import Path

import pytest

from batchlab.lab.claims import markdown, read_claims

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
AGAIN = EXPERIMENTS / "again"
STUDIES = sorted({path.parent.name.rsplit("-", 1)[0] for path in AGAIN.glob("*/claims.json")})


def test_there_is_a_study_done_again() -> None:
    assert STUDIES


@pytest.mark.parametrize("study", STUDIES)
def test_the_page_has_every_claim_of_every_time(study: str) -> None:
    others = sorted(AGAIN.glob(f"{study}-*"), key=lambda folder: not folder.name.endswith("-seeds"))
    told = [read_claims(folder) for folder in (EXPERIMENTS / study, *others)]
    assert {each.study for each in told} == {study}
    assert markdown(told) in (AGAIN / "README.md").read_text()
