"""Metric module `routing_agreement` of the `evaluate` library."""
