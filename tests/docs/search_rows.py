"""The table of a search for learning rates, as READMEs print it."""

from collections.abc import Iterable, Mapping
from statistics import fmean

from batchlab.lab.studies.search import Scores


def search_rows(rates: Iterable[float], scores: Scores, chosen: Mapping[str, float], arms: Iterable[str]) -> list[str]:
    """A line for each rate, with each arm's mean score over the seeds, 0 for what diverged; chosen in bold."""
    lines = []
    for rate in rates:
        cells = []
        for arm in arms:
            score = fmean(scores[arm][rate])
            cell = f"{100 * score:.2f} %" if score else "diverged"
            cells.append(f"**{cell}**" if chosen[arm] == rate else cell)
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return lines
