"""Exports of serving processes: what is counted, and what is refused."""

import json
import time

import pytest

from hf_moe.comparison.served_counts import (
    METRIC,
    CountsError,
    by_layer_name,
    json_line,
    prometheus_text,
    read_served_counts,
)


def read(tmp_path, *texts, **options):
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"export{number}")
        paths[-1].write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_served_counts(paths, **options)


def sample(value, layer="a", expert="0", more=""):
    return f'{METRIC}{{layer="{layer}",expert="{expert}"{more}}} {value}\n'


def test_what_is_written_is_read_back(tmp_path):
    totals = {"model.layers.0.mlp": [3, 0, 5], 'odd "name" \\ with\nlines': [1, 1, 1]}
    expected = {name: dict(enumerate(counts)) for name, counts in totals.items()}
    assert read(tmp_path, prometheus_text(totals)).counts == expected
    lines = "".join(json_line(name, counts) for name, counts in totals.items())
    assert read(tmp_path, lines).counts == expected


def test_records_since_the_record_before_add_up(tmp_path):
    lines = [{"layer": "a", "counts": [1, 2]}, {"layer": 7, "counts": [1, 1]}, {"layer": "a", "counts": [10.0, 0]}]
    found = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert found.counts == {"a": {0: 11, 1: 2}, "7": {0: 1, 1: 1}}
    assert (found.records, found.notes) == (3, [])


def test_totals_count_from_the_first_to_the_last(tmp_path):
    lines = [
        json_line("a", total, process)
        for total, process in (([5, 5], "p"), ([1, 0], "q"), ([9, 6], "p"), ([4, 4], "q"))
    ]
    assert read(tmp_path, "".join(lines)).counts == {"a": {0: 4 + 3, 1: 1 + 4}}


def test_a_counter_that_falls_was_reset(tmp_path):
    lines = "".join(json_line("a", total) for total in ([50, 60], [70, 60], [3, 4], [5, 5]))
    found = read(tmp_path, lines)
    # 20 and 0 before the restart; 3 and 4, then 2 and 1 after it
    assert found.counts == {"a": {0: 25, 1: 5}}
    assert found.notes == ["The counters of layer 'a' were reset 1 times: counted from 0 again."]


def test_scrapes_are_moments_of_one_process(tmp_path):
    first = sample(10) + sample(20, expert="1") + sample(5, more=',pod="x"') + "other_metric 3\n"
    second = (
        "# TYPE whatever counter\n"
        + sample("1.2e+01 1700000000")
        + sample(20, expert="1")
        + sample(9, more=',pod="x"')
    )
    found = read(tmp_path, first, second)
    assert found.counts == {"a": {0: 2 + 4, 1: 0}}
    assert read(tmp_path, first).counts == {"a": {0: 15, 1: 20}}


def test_a_series_that_appears_later_began_at_zero(tmp_path):
    assert read(tmp_path, sample(1), sample(4) + sample(7, expert="1")).counts == {"a": {0: 3, 1: 7}}


def test_openmetrics_parts_are_read(tmp_path):
    text = sample('3 1.5 # {trace_id="x"} 1 2').replace("\n", "\r\n") + "# EOF\n"
    assert read(tmp_path, text).counts == {"a": {0: 3}}


@pytest.mark.parametrize("cut", [b'{"layer": "a", "coun', '{"layer": "aé'.encode()[:-1]])
def test_a_cut_last_record_is_left_out_and_reported(tmp_path, cut):
    found = read(tmp_path, json_line("a", [1, 2]).encode() + cut)
    assert found.counts == {"a": {0: 1, 1: 2}}
    assert "line 2: the last line is cut off; it is left out." in found.notes[0]


def test_a_cut_scrape_is_refused(tmp_path):
    text = sample(10) + sample(1234, expert="1")
    with pytest.raises(CountsError, match=r"line 2: the text is cut off .* Scrape it again"):
        read(tmp_path, text[:-3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no expert counts"),
        ("# nothing\nup 1\n", "no expert counts. Prometheus text needs the counter"),
        ('{"layer": "a", "total": [1]}\n{"layer"\n{"layer": "a", "total": [2]}\n', "line 2: not valid JSON"),
        ('{"layer": "a", "layer": "b", "total": [1]}\n', "a key is there twice"),
        ('{"layer": "a", "total": [1], "counts": [1]}\n', "must have either 'counts'"),
        ('{"layer": "a"}\n', "must have either 'counts'"),
        ('{"total": [1]}\n', "'layer' must be a name"),
        ('{"layer": true, "total": [1]}\n', "'layer' must be a name"),
        ('{"layer": "a", "total": {"0": 1}}\n', "must be a list of 1 to 65,536 counts"),
        ('{"layer": "a", "total": []}\n', "must be a list of 1 to"),
        ('{"layer": "a", "total": [-1]}\n', "must be a whole number from 0 to 2**53, got -1"),
        ('{"layer": "a", "total": [1.5]}\n', "got 1.5"),
        ('{"layer": "a", "total": [true]}\n', "got True"),
        ('{"layer": "a", "total": ["1"]}\n', "got 1"),
        (
            '{"layer": "a", "total": [1, 2]}\n{"layer": "a", "total": [1, 2, 3]}\n',
            "has 3 entries, and layer 'a' had 2",
        ),
        ('{"layer": "a", "total": [NaN]}\n', "NaN is no JSON value"),
        ('{"layer": "a", "total": [1e999]}\n', "got inf"),
        ('{"layer": "a", "total": [' + "9" * 30 + "]}\n", "from 0 to 2**53"),
        ('{"layer": "a", "total": [' + "9" * 5000 + "]}\n", "not valid JSON"),
        ('{"a":' + "[" * 100_000 + "\n", "not valid JSON"),
        ('{"layer": "' + "x" * 1_000_000 + '"}\n', "longer than 1,000,000 bytes"),
        (b'{"layer": "\xff", "total": [1]}\n', "not UTF-8 text (byte 11)"),
        ("\0\0\0\n", "not Prometheus text"),
        (sample("NaN"), "a counter must be finite, got NaN"),
        (sample("+Inf"), "must be finite"),
        (sample("many"), "must be a number, got 'many'"),
        (sample(-3), "whole number from 0"),
        (sample(1, expert="-1"), "'expert' must be a number from 0 to 65535"),
        (sample(1, expert="99999999999"), "'expert' must be a number"),
        (sample(1, expert="99999"), "'expert' must be a number from 0 to 65535"),
        (sample("1_000"), "must be a number, got '1_000'"),
        (sample("٣"), "must be a number"),
        (sample(1, expert="a"), "'expert' must be a number"),
        (sample(1) + sample(2), "line 2: the series of layer 'a' and expert 0 is there twice"),
        (f'{METRIC}{{expert="1"}} 3\n', "must have the labels 'layer' and 'expert'"),
        (f"{METRIC} 3\n", "must have the labels"),
        (f'{METRIC}{{layer="a",layer="b"}} 3\n', "labels must be different"),
        (f"{METRIC}{{layer=a}} 3\n", 'of the form name="value"'),
        (f'{METRIC}{{layer="a" 3\n', "not Prometheus text"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path, text, message):
    with pytest.raises(CountsError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


def test_a_hostile_line_costs_no_more_than_its_length(tmp_path):
    size = 200_000
    hostile = [
        "a" + " " * size + "b c d e",
        METRIC + "{" + "}" * size + " x y z w",
        METRIC + "{" + "} " * (size // 2) + "x y z w",
        METRIC + '{layer="' + "\\" * size + '"} 1',
        METRIC + "{" + 'a="' * (size // 3) + "} 1",
        METRIC + "{" + " " * size + "} 1",
    ]
    start = time.process_time()
    for line in hostile:
        with pytest.raises(CountsError):
            read(tmp_path, line + "\n", format="prometheus")
    assert time.process_time() - start < 2


def test_another_counter_and_format_can_be_named(tmp_path):
    text = sample(4).replace(METRIC, "vllm:expert_tokens")
    assert read(tmp_path, text, metric="vllm:expert_tokens").counts == {"a": {0: 4}}
    with pytest.raises(CountsError, match="not valid JSON"):
        read(tmp_path, text, format="jsonl")
    with pytest.raises(CountsError, match="the format must be one of auto, jsonl, prometheus, got 'csv'"):
        read(tmp_path, text, format="csv")


def test_layers_are_known_by_name_or_number():
    layers = ["model.layers.3.mlp", "model.layers.4.mlp"]
    assert by_layer_name(["4", "model.layers.3.mlp"], layers) == {"4": layers[1], "model.layers.3.mlp": layers[0]}
    with pytest.raises(CountsError, match="has a layer '5': there is no such layer in the baseline"):
        by_layer_name(["5"], layers)
    with pytest.raises(CountsError, match=r"names the layer 'model\.layers\.3\.mlp' twice"):
        by_layer_name(["3", "model.layers.3.mlp"], layers)
    with pytest.raises(CountsError, match="2 layers have this number"):
        by_layer_name(["3"], ["encoder.3.mlp", "decoder.3.mlp"])
