"""The studies, by name."""

from typing import Final

from batchlab.lab.studies.bn_mnist import STUDY as BN_MNIST
from batchlab.lab.studies.dropout_mnist import STUDY as DROPOUT_MNIST
from batchlab.lab.studies.dropout_or_bn import STUDY as DROPOUT_OR_BN
from batchlab.lab.studies.dropout_patterns import STUDY as DROPOUT_PATTERNS
from batchlab.lab.studies.dropout_speed import STUDY as DROPOUT_SPEED
from batchlab.lab.studies.whitening import STUDY as WHITENING
from batchlab.lab.study import Study

__all__ = ["STUDIES"]

STUDIES: Final[dict[str, Study]] = {
    study.name: study for study in (BN_MNIST, DROPOUT_MNIST, DROPOUT_OR_BN, DROPOUT_PATTERNS, DROPOUT_SPEED, WHITENING)
}
