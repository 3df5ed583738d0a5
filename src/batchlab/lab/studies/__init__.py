"""The studies, by name, in the order in which lists and reports of several have them."""

from typing import Final

from batchlab.lab.studies.bn_mnist import STUDY as BN_MNIST
from batchlab.lab.studies.dropout_mnist import STUDY as DROPOUT_MNIST
from batchlab.lab.studies.dropout_or_bn import STUDY as DROPOUT_OR_BN
from batchlab.lab.studies.dropout_patterns import STUDY as DROPOUT_PATTERNS
from batchlab.lab.studies.dropout_speed import STUDY as DROPOUT_SPEED
from batchlab.lab.studies.factorization import STUDY as FACTORIZATION
from batchlab.lab.studies.learning_rates import STUDY as LEARNING_RATES
from batchlab.lab.studies.rectifiers import STUDY as RECTIFIERS
from batchlab.lab.studies.whitening import STUDY as WHITENING
from batchlab.lab.studies.why import STUDY as WHY
from batchlab.lab.study import Study

__all__ = ["STUDIES"]

STUDIES: Final[dict[str, Study]] = {
    study.name: study
    for study in (
        BN_MNIST,
        WHITENING,
        FACTORIZATION,
        DROPOUT_OR_BN,
        RECTIFIERS,
        LEARNING_RATES,
        WHY,
        DROPOUT_MNIST,
        DROPOUT_PATTERNS,
        DROPOUT_SPEED,
    )
}
