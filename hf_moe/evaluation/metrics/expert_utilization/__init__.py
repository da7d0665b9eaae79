"""Metric module `expert_utilization` of the `evaluate` library.

    expert_utilization.py   the metric, its inputs and its citation

`evaluate.load` finds it by the name of this folder.
"""
