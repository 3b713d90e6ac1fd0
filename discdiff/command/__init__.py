"""The command ``discdiff`` and its benchmarks."""
