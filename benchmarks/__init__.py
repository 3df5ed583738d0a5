"""Speed, measured: interleaved comparisons whose results are appended to benchmarks/results/ as JSON lines."""
