"""`make bench`: every benchmark, one after the other, one thread."""

from benchmarks import batch_norm, training_loop

training_loop.main()
batch_norm.main()
