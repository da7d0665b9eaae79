"""Metric module `routing_agreement` of the `evaluate` library.

    routing_agreement.py   the metric, its inputs and its citation

`evaluate.load` finds it by the name of this folder.
"""
