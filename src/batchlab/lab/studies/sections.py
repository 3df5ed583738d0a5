"""Parts that the reports of several studies share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from batchlab.lab.report import FigureBlock, Paragraph, Section

__all__ = ["DROPOUT_PAPER", "footer", "method_section", "rate_section"]

DROPOUT_PAPER: Final = (
    "Graham, Reizenstein & Robinson, Efficient batchwise dropout training using submatrices, 2015 (arXiv:1502.02478)."
)


def rate_section(figure: str, search_steps: int) -> Section:
    """The search for learning rates, drawn."""
    return Section(
        "Is it only the learning rate?",
        [
            FigureBlock(
                figure,
                f"The search: accuracy on held-out training images after {search_steps:,} steps for "
                "each first learning rate; rings are the chosen ones. The test images had no part in it.",
            )
        ],
    )


def method_section(method: str, command: str) -> Section:
    """How it was done, and the command that does it again."""
    return Section("How it was done", [Paragraph(method), Paragraph("To repeat it:"), Paragraph(command, code=True)])


def footer(images: str, environment: Mapping[str, Any], source: str) -> list[str]:
    """Data, versions and machine, and the paper."""
    return [
        f"{images}.",
        f"batchlab {environment['batchlab']} ({environment.get('commit') or 'no commit'}), torch "
        f"{environment['torch']}, Python {environment['python']}, {environment['processor']}, one thread a run.",
        source,
    ]
