"""Compare two models, or a served model with a stored routing trace.

    run.py                 load two models one after the other, measure both, compare (`hf-moe compare`)
    text_probe.py          measure one model on texts by domain
    models.py              what was measured of two models, and how they differ
    routing.py             the routing of two models, layer by layer
    routing_agreement.py   the experts of fixed tokens before and after training
    weights.py             how far the weights of two models are apart
    table.py               a comparison in the terminal, and the verdict of its thresholds
    page.py                a comparison as one HTML page
    monitor.py             exported expert counts against a stored trace (`hf-moe monitor`)
    served_counts.py       read and write the expert counts of a serving process

The thresholds that a comparison has to keep are in `hf_moe.observability.thresholds`. Benchmark scores of two runs are
compared in `hf_moe.evaluation.paired`.
"""
