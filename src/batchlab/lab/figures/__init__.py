"""Figures as SVG text that takes its colours from the page around it, so one picture serves light, dark and print."""

from batchlab.lab.figures.curves import Line, accuracy_curves, line_figure, percentile_bands, rate_search
from batchlab.lab.figures.rows import Cell, interval_rows, range_bars, table_figure
from batchlab.lab.figures.style import COLORS, standalone

__all__ = [
    "COLORS",
    "Cell",
    "Line",
    "accuracy_curves",
    "interval_rows",
    "line_figure",
    "percentile_bands",
    "range_bars",
    "rate_search",
    "standalone",
    "table_figure",
]
