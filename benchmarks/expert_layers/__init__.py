"""What `benchmarks/experts.py` is made of: cases, contestants, correctness, timing, results, report."""
