"""Explain a Mixture-of-Experts model, and record, judge, show and replay what its routers decide.

From a decision to the page, in the order of the data:

    recording.py            `record_routing`: a trace of what runs in a block; `count_expert_load`: counts alone
    trace_texts.py          a trace of texts, by domain
    layer_sums.py           the sums of one layer while it runs, on the model's device
    layer_statistics.py     the sums of one layer on the CPU, with its metrics of balance
    token_recording.py      the decision for every token, written to disk while the model runs
    token_table.py          these files read back, every value checked
    routing_trace.py        `RoutingTrace`: all layers by domain, its metrics, its files, its page
    trace_files.py          the trace's folder, written whole and checked when it is read
    health.py               `diagnose`: a verdict in words, layer by layer
    report/                 one HTML page about a trace
    plots.py                PNG and SVG files

Beside it:

    replay.py               make a model route as recorded
    thresholds.py           checks in a YAML file that measured metrics must keep
    threshold_metrics.py    the metrics that they can bound
    explain.py              `explain`: parameters, layers, the backend that runs and those that refuse
    unquantised_experts.py  quantised models whose experts are not
"""
