"""Metric module `expert_utilization` of the `evaluate` library."""
