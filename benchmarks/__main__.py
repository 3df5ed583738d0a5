"""`make bench`: every benchmark, one after the other, one thread."""

from benchmarks import batch_norm, batchwise_dropout, training_loop

# Parts of batchwise_dropout run in processes of their own, which import this module again.
if __name__ == "__main__":
    training_loop.main()
    batch_norm.main()
    batchwise_dropout.main()
