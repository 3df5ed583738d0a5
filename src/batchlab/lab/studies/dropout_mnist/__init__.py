"""The claim of the seed: a large network with dropout beats a small one, and batchwise dropout does it for less time (Graham et al. 2015)."""
