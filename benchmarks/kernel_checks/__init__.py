"""What `benchmarks/ahead_of_time.py` is made of: recorded launches, the chips' rules, compilation."""
