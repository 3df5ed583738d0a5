"""`python -m batchlab.cli` is `batchlab`."""

import sys

from batchlab.cli import main

sys.exit(main())
