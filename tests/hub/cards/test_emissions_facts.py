"""The energy on a card: what codecarbon wrote, in the layout that codecarbon 3.3 writes."""

import csv
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_moe.hub import model_card, write_card
from hf_moe.hub.cards.emissions_facts import EMISSIONS, emissions_facts
from hf_moe.hub.cards.facts import CardError

ROW = {
    "timestamp": "2026-11-22T09:23:04", "project_name": "codecarbon", "run_id": "1815a6f6",
    "experiment_id": "5b0fa12a-3dd7-45bb-9766-cc326314d9f1", "duration": "300.5", "emissions": "0.0166",
    "emissions_rate": "5.5e-05", "cpu_power": "42.5", "gpu_power": "302.3", "ram_power": "20.0",
    "cpu_energy": "0.0035", "gpu_energy": "0.0277", "ram_energy": "0.0026", "energy_consumed": "0.0338",
    "water_consumed": "0.0", "country_name": "Canada", "country_iso_code": "CAN", "region": "quebec",
    "cloud_provider": "", "cloud_region": "", "os": "Linux-6.1-x86_64-with-glibc2.36", "python_version": "3.11.7",
    "codecarbon_version": "3.3.2", "cpu_count": "12", "cpu_model": "Intel(R) Xeon(R) CPU @ 2.20GHz",
    "gpu_count": "1", "gpu_model": "1 x NVIDIA A100-SXM4-80GB", "longitude": "-73.5", "latitude": "45.5",
    "ram_total_size": "83.4", "tracking_mode": "machine", "cpu_utilization_percent": "0.0",
    "gpu_utilization_percent": "0", "ram_utilization_percent": "8.9", "ram_used_gb": "2.1", "on_cloud": "N",
    "pue": "1.0", "wue": "0.0",
}  # fmt: skip


def write_emissions(folder: Path, *changes: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / EMISSIONS, "w", newline="") as file:
        writer = csv.DictWriter(file, ROW, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROW | change for change in changes or ({},))
    return folder


def test_the_trainers_emissions_are_on_the_card(saved, tmp_path):
    """Beside trainer_state.json, or above the checkpoint that it lies in."""
    write_emissions(tmp_path / "out")
    for state in (tmp_path / "out" / "trainer_state.json", tmp_path / "out" / "checkpoint-9" / "trainer_state.json"):
        state.parent.mkdir(exist_ok=True)
        state.write_text('{"log_history": [], "global_step": 9}')
        write_card(saved, output=tmp_path / "card", training=state, base_model="me/base")
        text = (tmp_path / "card" / "README.md").read_text()
        assert (
            "Energy: 0.0338 kWh, 0.0166 kg CO2eq in 300 seconds, as codecarbon 3.3.2 estimates it (tracking mode "
            "machine; 1 x NVIDIA A100-SXM4-80GB, Intel(R) Xeon(R) CPU @ 2.20GHz; quebec, Canada)." in text
        )
        assert ModelCard(text).data.co2_eq_emissions == {
            "emissions": 16.6,  # grams
            "source": "codecarbon",
            "training_type": "fine-tuning",
            "geographical_location": "quebec, Canada",
            "hardware_used": "1 x NVIDIA A100-SXM4-80GB, Intel(R) Xeon(R) CPU @ 2.20GHz",
        }
        assert not {"-73.5", "45.5"} & set(text.split()), "no coordinates"


def test_a_training_in_two_runs_is_their_sum(tmp_path):
    """codecarbon appends a row for each run, and one more for each flush, with the run's sums so far."""
    again = {"run_id": "5fbd8ce0", "energy_consumed": "0.1", "emissions": "0.2", "duration": "1"}
    found = emissions_facts(write_emissions(tmp_path, {}, again, again | {"energy_consumed": "0.2", "duration": "2"}))
    assert found is not None
    assert (found.runs, found.seconds) == (2, 302.5)
    assert (found.energy, found.emissions) == pytest.approx((0.2338, 0.2166))


def test_a_place_that_codecarbon_assumed_is_named_and_no_metadata(saved, tmp_path):
    """Without a network it takes the coordinates below: emissions of a place where nothing ran."""
    write_emissions(tmp_path, {"latitude": "46.8", "longitude": "-71.2"})
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    card = model_card(saved, training=tmp_path / "trainer_state.json")
    assert "quebec, Canada, which codecarbon assumes where it cannot tell the place)." in str(card)
    assert "co2_eq_emissions" not in card.data.to_dict()


def test_without_a_file_it_is_not_measured(saved):
    card = model_card(saved)
    assert "Energy: not measured." in str(card)
    assert "co2_eq_emissions" not in str(card)


def test_what_is_not_known_is_left_out(saved, tmp_path):
    unknown = dict.fromkeys(("country_name", "region", "gpu_model", "cpu_model", "tracking_mode", "duration"), "")
    write_emissions(tmp_path, unknown)
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    card = model_card(saved, training=tmp_path / "trainer_state.json")
    assert "0.0166 kg CO2eq, as codecarbon 3.3.2 estimates it (tracking mode not stated)." in str(card)
    assert card.data.co2_eq_emissions == {"emissions": 16.6, "source": "codecarbon"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no row"),
        (b"a,b\n1,2\n", "without energy_consumed"),
        (b"run_id,energy_consumed,emissions\nx,nan,1\n", "without energy_consumed"),
        (b"run_id,energy_consumed,emissions\nx,1,lots\n", "without energy_consumed"),
        (b"\xff\xfe\x00a\n\x80\x80", "is no CSV file"),
        (b'"' + b"a" * 200_000, "is no CSV file"),
        (b"," * 10_000_001, "more than 10,000,000 bytes"),
    ],
    ids=["empty", "other table", "nan", "text", "binary", "one long cell", "huge"],
)
def test_another_file_of_that_name_is_refused(content, message, tmp_path):
    (tmp_path / EMISSIONS).write_bytes(content)
    with pytest.raises(CardError, match=message):
        emissions_facts(tmp_path)


def test_hostile_text_in_it_stays_text(saved, tmp_path):
    evil = "x\n---\nlicense: evil\n---\n# <img src=x> {{ 7 * 7 }} [a](http://b)"
    write_emissions(tmp_path, {"country_name": evil, "cpu_model": evil, "tracking_mode": evil})
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    text = str(model_card(saved, training=tmp_path / "trainer_state.json"))
    assert ModelCard(text).data.license is None
    assert "<img" not in text.split("---\n", 2)[2].replace("\\<", "")
    assert "\n# <" not in text
    assert "{{ 7 * 7 }}" in text.replace("\\", "")
