"""Claims compared with the same study done again: verdicts by hand, files, and what is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from batchlab.cli import main
from batchlab.lab.claims import Claim, Told, again, comparison_table, count, markdown, read_claims, write_claims
from batchlab.lab.comparison import Estimate
from batchlab.lab.studies import STUDIES

ABOVE = Claim("a ratio", Estimate(2.0, 1.5, 2.7, 5))
BELOW = Claim("a ratio", Estimate(0.5, 0.4, 0.6, 5))
OPEN = Claim("a ratio", Estimate(1.1, 0.9, 1.3, 5))
MISSING = Claim("a ratio", None)
ONE_SEED = Claim("a ratio", Estimate(3.0, math.nan, math.nan, 1))
LESS = Claim("a difference", Estimate(-0.004, -0.006, -0.002, 5), 0.0, percent=True)
UNBOUNDED = Claim("a ratio", Estimate(10.0, 1.0, math.inf, 3))


def _told(*claims: Claim, title: str = "full MNIST, seeds 0 to 4", command: str = "batchlab study x") -> Told:
    return Told("x", title, command, claims)


@pytest.mark.parametrize(
    ("claim", "side"),
    [(ABOVE, 1), (BELOW, -1), (OPEN, 0), (MISSING, None), (ONE_SEED, None), (LESS, -1), (UNBOUNDED, 1)],
    ids=["above", "below", "open", "missing", "one seed", "less", "without an upper bound"],
)
def test_an_interval_says_on_which_side_of_nothing_it_lies(claim: Claim, side: int | None) -> None:
    assert claim.side == side


def test_runs_that_are_all_alike_claim_nothing() -> None:
    assert Claim("a difference", Estimate(0.0, 0.0, 0.0, 3), 0.0).side == 0
    assert Claim("a ratio", Estimate(1.0, 1.0, 1.0, 3)).side == 0


@pytest.mark.parametrize(
    ("first", "other", "verdict"),
    [
        (ABOVE, ABOVE, "again"),
        (BELOW, BELOW, "again"),
        (ABOVE, BELOW, "the opposite"),
        (ABOVE, OPEN, "not clear here"),
        (OPEN, OPEN, "again not clear"),
        (OPEN, BELOW, "clear here"),
        (MISSING, MISSING, "again not reached"),
        (MISSING, ABOVE, "reached here"),
        (OPEN, MISSING, "not reached here"),
        (ABOVE, ONE_SEED, "one seed cannot say"),
    ],
)
def test_the_verdict_on_a_claim(first: Claim, other: Claim, verdict: str) -> None:
    assert again(first, other) == verdict


def test_the_table_and_the_count_of_claims_that_hold() -> None:
    named = [dataclasses.replace(claim, text=f"claim {n}") for n, claim in enumerate((ABOVE, BELOW, OPEN, MISSING))]
    others = [dataclasses.replace(claim, text=f"claim {n}") for n, claim in enumerate((ABOVE, OPEN, OPEN, ABOVE))]
    first, other = _told(*named), _told(*others, title="full MNIST, seeds 100 to 104")
    rows = comparison_table([first, other]).rows
    assert rows[0] == ["claim 0", "2.00 (1.50 to 2.70)", "2.00 (1.50 to 2.70): again"]
    assert rows[1] == ["claim 1", "0.50 (0.40 to 0.60)", "1.10 (0.90 to 1.30): not clear here"]
    assert rows[3] == ["claim 3", "not in every run", "2.00 (1.50 to 2.70): reached here"]
    sentence = (
        "full MNIST, seeds 100 to 104: of 2 clear claims 1 is clear again, the same way; 1 not clear here. Of 2 that "
        "were not clear or not reached, 1 say the same again."
    )
    assert count(first, other) == sentence
    page = markdown([first, other])
    assert f"- {sentence}" in page
    assert f"| {' | '.join(rows[1])} |" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_numbers_are_shown_as_what_they_are() -> None:
    rows = comparison_table([_told(LESS, UNBOUNDED, ONE_SEED)]).rows
    assert [row[1] for row in rows] == ["-0.40 (-0.60 to -0.20)", "10.0 (1.00 to more)", "3.00"]


def test_a_file_of_claims_brings_back_what_was_written(tmp_path: Path) -> None:
    told = _told(ABOVE, MISSING, LESS, UNBOUNDED)
    write_claims(told, tmp_path / "claims.json")
    found = read_claims(tmp_path)
    assert list(found.claims) == list(told.claims)
    assert (found.study, found.title, found.command) == (told.study, told.title, told.command)
    write_claims(_told(ONE_SEED), tmp_path / "claims.json")
    value = read_claims(tmp_path).claims[0].value
    assert value is not None
    assert math.isnan(value.low)


@pytest.mark.parametrize("content", ["{", "[]", '{"claims": [{}]}', '{"study": "x", "claims": [1]}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "claims.json").write_text(content)
    with pytest.raises(ValueError, match=r"claims\.json is not"):
        read_claims(tmp_path)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: tmp_path / name for name in ("first", "other", "foreign", "empty", "apart")}
    for folder in folders.values():
        folder.mkdir()
    write_claims(_told(ABOVE), folders["first"] / "claims.json")
    write_claims(_told(ABOVE, title="full MNIST, seeds 9 to 12"), folders["other"] / "claims.json")
    write_claims(Told("y", "z", "batchlab study y", [ABOVE]), folders["foreign"] / "claims.json")
    write_claims(_told(LESS, title="full MNIST, seeds 9 to 12"), folders["apart"] / "claims.json")
    for name, message in {
        "first": "both are x on full MNIST, seeds 0 to 4",
        "foreign": "different studies (x, y)",
        "empty": "claims.json is missing",
        "apart": "no claim in common",
    }.items():
        assert main(["compare", str(folders["first"]), str(folders[name])]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(folders["first"])]) == 2
    out = tmp_path / "page.md"
    assert main(["compare", str(folders["first"]), str(folders["other"]), "--out", str(out)]) == 0
    assert "1 is clear again" in out.read_text()


def test_every_study_that_draws_random_numbers_has_claims() -> None:
    folder = Path(__file__).parents[2] / "experiments"
    for name in STUDIES:
        path = folder / name / "claims.json"
        if not path.is_file():
            assert name == "dropout-speed" or not (folder / name / "summary.json").is_file()
            continue
        texts = [claim["text"] for claim in json.loads(path.read_text())["claims"]]
        assert texts
        assert len(texts) == len(set(texts))
