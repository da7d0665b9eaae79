"""Parts of `benchmarks/ahead_of_time.py`: recorded launches, the chips' rules, compilation."""
