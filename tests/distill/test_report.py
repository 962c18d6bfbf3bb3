"""The texts that a run leaves for people."""

import importlib.metadata

from distill.report import GRADIENTS, hybrid_card, model_card, rate_warnings, table, versions
from models import ALGORITHMS

SUMMARY = {
    "teacher_top1": 90.0,
    "hybrid_top1": {"layer1": 80.5, "layer2": 70.25},
    "student_top1": 60.0,
    "student_top1_by_timesteps": {1: 50.0, 4: 60.0},
    "timesteps": 4,
    "algorithm": "rate_m",
    "parameters": 12345,
    "mean_firing_rate": 0.125,
    "versions": {"torch": "9.9"},
}


def test_the_table_has_one_row_for_each_network():
    header, _, *rows = table(SUMMARY).splitlines()
    assert header.split() == ["network", "top-1", "(%)"]
    assert [row.split()[-1] for row in rows] == ["90.00", "80.50", "70.25", "60.00", "50.00", "60.00"]
    names = ["teacher", "hybrid up to layer1", "hybrid up to layer2", "SNN, T = 4"]
    assert [row.rsplit(maxsplit=1)[0].strip() for row in rows[:4]] == names
    assert "T = 1" in rows[4] and "T = 4" in rows[5]


def energy(network, timesteps, compute, memory):
    return {"network": network, "timesteps": timesteps, "compute_uj": compute, "memory_uj": memory}


def test_the_table_shows_energies_in_percent_of_the_teachers_and_what_they_rest_on():
    frontier = [
        energy("teacher", None, 20.0, 50.0), energy("hybrid/layer1", 1, 1.0, 1.0),
        energy("hybrid/layer1", 4, 10.0, 60.0), energy("student", 1, 1.0, 25.0), energy("student", 4, 4.0, 100.0),
    ]  # fmt: skip
    text = table(SUMMARY | {"frontier": frontier, "energy_assumptions": ["free of charge"]})
    header, _, *rows = text.splitlines()
    assert header.endswith("top-1 (%)  compute (%)  memory (%)")
    assert [row.split()[-3:] for row in (*rows[:2], *rows[3:6])] == [
        ["90.00", "100.0", "100.0"], ["80.50", "50.0", "120.0"], ["60.00", "20.0", "200.0"],
        ["50.00", "5.0", "50.0"], ["60.00", "20.0", "200.0"],
    ]  # fmt: skip
    assert rows[2].endswith("layer2       70.25")  # of which no energy is known
    assert "of the teacher's (compute 20 uJ, memory 50 uJ)" in rows[-2] and rows[-1] == "- free of charge"


def test_without_a_teacher_energies_are_in_microjoule():
    alone = {k: v for k, v in SUMMARY.items() if k not in ("teacher_top1", "hybrid_top1")}
    text = table(alone | {"frontier": [energy("student", 4, 0.12345, 678.9)], "energy_assumptions": []})
    assert "compute (uJ)" in text and text.splitlines()[2].split()[-3:] == ["60.00", "0.123", "679"]


def test_silent_and_saturated_layers_are_named_and_no_other():
    lines = rate_warnings({"a": 0.0099, "b": 0.0101, "c": 0.9499, "d": 0.9501})
    assert len(lines) == 2
    assert "layer a" in lines[0] and "0.99 %" in lines[0] and "silent" in lines[0]
    assert "layer d" in lines[1] and "95.0 %" in lines[1]


def test_the_model_card_says_what_it_is_how_to_load_it_and_how_it_was_made():
    card = model_card(SUMMARY, "resnet18", "digits", "train:\n  epochs: 3\n")
    for text in ("resnet18", "4 time steps", "12,345 parameters", "12.5 %", "torch 9.9", "models.load_snn(", "60.00"):
        assert text in card
    assert "```yaml\ntrain:\n  epochs: 3\n```" in card
    assert "\nlicense: apache-2.0\n" in card and "## Licence\n\nApache-2.0" in card and "snn.predict(" in card
    assert card.count("@inproceedings{") == 2 and "arXiv:2503.16572" in card and "arXiv:2410.11488" in card


def test_the_card_of_event_frames_says_what_the_network_takes():
    card = model_card(SUMMARY, "resnet18", "nmnist", "train:\n  epochs: 3\n", events=True)
    assert "(T, B, C, H, W)" in card and "predict" not in card


def test_the_card_of_a_hybrid_has_its_own_accuracy():
    card = hybrid_card("layer2", "resnet18", 4, SUMMARY, "train:\n  epochs: 3\n")
    for text in (
        "up to `layer2`",
        "Top-1: 70.25 % (the teacher: 90.00 %)",
        "epochs: 3",
        "distill.load_hybrid(",
        "torch 9.9",
    ):
        assert text in card
    assert card.count("@inproceedings{") == 2 and "80.50" not in card
    alone = hybrid_card("layer2", "resnet18", 4, {}, "")
    assert "cut at `layer2`." in alone and "Top-1" not in alone and "```yaml" not in alone


def test_versions_are_those_of_the_installed_packages():
    found = versions()
    assert {"python", "spikeswap", "torch", "timm", "accelerate", "spikingjelly"} <= found.keys()
    assert found["timm"] == importlib.metadata.version("timm")


def test_a_network_that_had_no_teacher_says_so():
    summary = {k: v for k, v in SUMMARY.items() if k not in ("teacher_top1", "hybrid_top1")} | {"algorithm": "ottt"}
    assert [row.split()[-1] for row in table(summary).splitlines()[2:]] == ["60.00", "50.00", "60.00"]
    card = model_card(summary, None, "digits", "train:\n  epochs: 3\n")
    card, citation = card.split("## Citation")
    assert "Hybrid Block-wise Replacement" in citation
    wanted = "from the start that the configuration below names, with online training through time (Xiao et al., "
    assert wanted in card
    assert (
        "distill" not in card
        and "Hybrid" not in card
        and "\ntags: [spiking-neural-network, image-classification]\n" in card
    )


def test_every_algorithm_has_a_name_for_the_model_card():
    assert GRADIENTS.keys() == set(ALGORITHMS)
