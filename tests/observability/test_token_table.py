"""Tokens on disk: what was written comes back, in any batch, and a file that lies is found out."""

import json

import numpy as np
import pytest
import torch

from hf_moe.models.modeling_hf_moe import CACHE
from hf_moe.observability import token_recording
from hf_moe.observability.recording import record_routing
from hf_moe.observability.routing_trace import RoutingTrace
from tiny_models import build_tiny
from tiny_moe import hf_moe_model

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
IDS = torch.arange(1, 49).view(4, 12)


def recorded(model=None, **options):
    model = hf_moe_model() if model is None else model
    with torch.no_grad(), record_routing(model, "tokens", **options) as trace:
        for batch in IDS.split(2):
            with trace.domain("law"):
                model(input_ids=batch)
    return trace


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "trace"
    recorded().save(folder)
    return folder


def test_rows_hold_what_the_router_chose(saved):
    model = hf_moe_model()
    trace = RoutingTrace.load(saved)
    with torch.no_grad():
        logits = model(input_ids=IDS, output_router_logits=True).router_logits
    rows = list(trace.tokens.rows())
    assert [row.row for row in rows] == [0, 1, 2, 3]
    assert np.stack([row.token_ids for row in rows]).tolist() == IDS.tolist()
    assert {row.domain for row in rows} == {"law"}
    for name, scores in zip(trace.layers, logits, strict=True):
        chosen = scores.topk(2)
        weights = chosen.values.softmax(-1).view(4, 12, 2)
        assert np.stack([row.experts[name] for row in rows]).tolist() == chosen.indices.view(4, 12, 2).tolist()
        assert np.stack([row.weights[name] for row in rows]) == pytest.approx(weights.numpy(), abs=1e-3)
        assert rows[0].experts[name].dtype == np.uint8


def test_a_layer_may_be_cut_short(saved):
    tokens = RoutingTrace.load(saved).tokens
    name = "model.layers.1.mlp"
    whole, few = tokens.layer(name), tokens.layer(name, limit=15)
    assert (len(whole.row), len(few.row), len(tokens.layer(name, limit=0).row)) == (48, 15, 0)
    assert (whole.experts[:15] == few.experts).all()
    assert few.position.tolist() == [*range(12), 0, 1, 2]
    with pytest.raises(ValueError, match="no layer 'x'"):
        tokens.layer("x")


def test_many_experts_get_wider_ids():
    model, inputs = build_tiny("olmoe", num_experts=300)
    with torch.no_grad(), record_routing(model, "tokens") as trace:
        model(**inputs)
    experts = trace.tokens.layer(trace.layers[0]).experts
    assert experts.dtype == np.uint16
    assert np.bincount(experts.flatten(), minlength=300).tolist() == trace.statistics(trace.layers[0]).counts.tolist()


def test_row_groups_are_written_while_the_model_runs(monkeypatch):
    monkeypatch.setattr(token_recording, "_ROW_GROUP", 30)
    trace = recorded()
    assert len(list(trace.tokens.rows())) == 4
    file = parquet.ParquetFile(trace.tokens._folder / "tokens.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [48]
    monkeypatch.setattr(token_recording, "_ROW_GROUP", 20)
    trace = recorded()
    file = parquet.ParquetFile(trace.tokens._folder / "tokens.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [24, 24]
    assert [len(row.token_ids) for row in trace.tokens.rows()] == [12] * 4


def test_temporary_files_go_with_the_trace(tmp_path):
    trace = recorded(scratch=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    del trace
    assert list(tmp_path.iterdir()) == []


def test_models_without_single_tokens_are_refused():
    model = hf_moe_model()
    with pytest.raises(ValueError, match="called without input_ids"), record_routing(model, "tokens"):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    cache = model(input_ids=IDS)[CACHE]
    with pytest.raises(ValueError, match="cache of 12 positions that were not seen"), record_routing(model, "tokens"):
        model(input_ids=IDS[:, :1], **{CACHE: cache})


def test_a_cache_that_is_cut_back_is_refused():
    model = hf_moe_model()

    def run():
        with record_routing(model, "tokens"):
            cache = model(input_ids=IDS)[CACHE]
            cache.crop(-4)
            model(input_ids=IDS[:, :1], **{CACHE: cache})

    with pytest.raises(ValueError, match="cut back"):
        run()


def test_texts_must_fit_the_tokens():
    model = hf_moe_model()

    def run():
        with record_routing(model, "tokens") as trace, trace.domain("law", token_texts=[["a"]]):
            model(input_ids=IDS[:1])

    with pytest.raises(ValueError, match=r"rows of \[12\] tokens, got \[1\]"):
        run()


def change_column(name, file="tokens.parquet", **values):
    """Replace one value of a column."""

    def damage(folder):
        table = parquet.read_table(folder / file)
        field = table.schema.field(name)
        column = table.column(name).to_pylist()
        for place, value in values.items():
            column[int(place[1:])] = value
        position = table.schema.get_field_index(name)
        changed = table.set_column(position, field, pyarrow.array(column, type=field.type))
        parquet.write_table(changed, folder / file)

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def manifest_tokens(**changes):
    def damage(folder):
        manifest = json.loads((folder / "trace.json").read_text())
        manifest["tokens"] |= changes
        (folder / "trace.json").write_text(json.dumps(manifest))

    return damage


def drop_column(folder):
    table = parquet.read_table(folder / "tokens.parquet")
    parquet.write_table(table.drop_columns(["weights_1"]), folder / "tokens.parquet")


def shorten(folder):
    table = parquet.read_table(folder / "tokens.parquet")
    parquet.write_table(table.slice(0, 40), folder / "tokens.parquet")


DAMAGES = {
    "missing": (lambda folder: (folder / "rows.parquet").unlink(), "rows.parquet is missing"),
    "no parquet": (write("tokens.parquet", b"PAR1" + b"\xff" * 64), "no Parquet file"),
    "empty": (write("tokens.parquet", b""), "no Parquet file"),
    "columns": (drop_column, "other columns"),
    "fewer": (shorten, "has 40 records, the manifest says 48"),
    "manifest": (manifest_tokens(num_tokens="48"), "the manifest must say"),
    "extra": (manifest_tokens(owner=1), "the manifest must say"),
    "audit": (manifest_tokens(is_audit=True), "other columns"),
    "row": (change_column("row", n3=9), r"rows must lie in \[0, 4\)"),
    "position": (change_column("position", n3=-1), "rows must lie in"),
    "twice": (change_column("position", n3=4), "row 0 must have the positions 0 to 11"),
    "id": (change_column("experts_1", n3=[9, 0]), "must be at most 8"),
    "nan": (change_column("weights_1", n3=[np.float16("nan"), np.float16(1)]), "not finite"),
    "null": (change_column("experts_1", n3=None), "must have 2 values"),
    "null token": (change_column("token_id", n3=None), "token_id has empty values"),
    "order": (change_column("first", "rows.parquet", n2=20, n3=20), "does not follow"),
    "span": (change_column("span", "rows.parquet", n2=2**60, n3=2**60), "does not follow"),
    "length": (change_column("length", "rows.parquet", n1=10**9), "record 1 is"),
    "number": (change_column("row", "rows.parquet", n1=7), "record 1 is"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_hostile_table_is_refused(saved, tmp_path, case):
    damage, message = DAMAGES[case]
    RoutingTrace.load(saved).save(tmp_path / "trace")
    damage(tmp_path / "trace")

    def read():
        trace = RoutingTrace.load(tmp_path / "trace")
        list(trace.tokens.rows())
        trace.tokens.layer("model.layers.1.mlp")

    with pytest.raises(ValueError, match=message):
        read()
