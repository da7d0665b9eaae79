"""Parts of `benchmarks/experts.py`: cases, contestants, correctness, timing, results, report."""
