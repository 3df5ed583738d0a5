"""Which runs the study dropout-or-bn compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from batchlab.lab.settings import DataSettings, DropoutSettings, NetworkSettings, OptimizerSettings, RunSettings
from batchlab.lab.studies.dropout_or_bn.settings import DropoutOrBnSettings

__all__ = ["PLACES", "Arm", "arms", "named_arms"]

PLACES: Final[dict[str, str]] = {
    "hidden": "between",
    "before_normalization": "before BN",
    "last": "last",
}
"""Position of the dropouts -> what figures and tables call it."""


@dataclass(frozen=True)
class Arm:
    """One way to build and train a network.

    Args:
        batch_norm: whether it has it.
        dropout: name of the mechanism, "none", "independent" or "batchwise".
        share: that it drops.
        place: of its dropouts.
        convolutional: rather than the multilayer perceptron.
    """

    batch_norm: bool = False
    dropout: str = "none"
    share: float = 0.0
    place: str = "hidden"
    convolutional: bool = False

    @property
    def name(self) -> str:
        """In names of folders."""
        words = ["conv"] if self.convolutional else []
        words += ["bn"] if self.batch_norm else []
        if self.dropout != "none":
            kind = "dropout" if self.dropout == "independent" else self.dropout
            words += [f"{kind}{self.share:g}", *([self.place] if self.batch_norm else [])]
        return "-".join(words if words not in ([], ["conv"]) else [*words, "none"])

    @property
    def label(self) -> str:
        """In figures and tables."""
        words = ["BN"] if self.batch_norm else []
        words += [f"{'batchwise' if self.dropout == 'batchwise' else 'dropout'} {self.share:g}"] if self.share else []
        several = self.batch_norm and self.share and not self.convolutional
        place = f", {PLACES[self.place]}" if several else ""
        return f"{'conv: ' if self.convolutional else ''}{' + '.join(words) or 'neither'}{place}"

    def without_batch_norm(self) -> Arm:
        """The arm with the same dropout, and without batch norm."""
        return replace(self, batch_norm=False, place="hidden")

    def without_dropout(self) -> Arm:
        """The arm with the same normalization, and without dropout."""
        return Arm(self.batch_norm, convolutional=self.convolutional)


def named_arms(settings: DropoutOrBnSettings) -> dict[str, Arm]:
    """All arms by name, in the order of the tables."""
    found = [Arm(), *(Arm(False, "independent", share) for share in settings.shares), Arm(True)]
    found += [Arm(True, "independent", share, place) for place in PLACES for share in settings.shares]
    last = settings.shares[-1]
    found += [Arm(False, "batchwise", last), *(Arm(True, "batchwise", last, place) for place in PLACES)]
    if settings.channels:
        share = settings.channel_share
        found += [
            Arm(convolutional=True),
            Arm(False, "independent", share, convolutional=True),
            Arm(True, convolutional=True),
            Arm(True, "independent", share, convolutional=True),
        ]
    return {arm.name: arm for arm in found}


def _run(settings: DropoutOrBnSettings, arm: Arm) -> RunSettings:
    network = NetworkSettings(
        widths=settings.channel_widths if arm.convolutional else settings.widths,
        activation="relu",
        normalization="batch_norm" if arm.batch_norm else "none",
        dropout=DropoutSettings(arm.dropout, input=0.0, hidden=arm.share, position=arm.place),
        initialization="he",
        channels=settings.channels if arm.convolutional else (),
    )
    return RunSettings(
        data=DataSettings(settings.dataset, binarize=False, training_images=settings.training_images),
        network=network,
        optimizer=OptimizerSettings(
            momentum=settings.momentum,
            nesterov=True,
            schedule="linear",
            final=settings.final,
            algorithm="submatrix_sgd" if arm.dropout == "batchwise" else "sgd",
        ),
        batch_size=settings.batch_size,
        probe_units=0,
        # An evaluation of the convolutional network takes as long as a hundred steps of it: fewer of them.
        evaluate_every=settings.evaluate_every * (5 if arm.convolutional else 1),
        variance_shift=arm.batch_norm,
    )


def arms(settings: DropoutOrBnSettings) -> dict[str, RunSettings]:
    """Each arm's run, by the arm's name."""
    return {name: _run(settings, arm) for name, arm in named_arms(settings).items()}
