"""The flags of every command: scripts depend on them, so a change here needs a line in CHANGELOG.md."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from vitq.cli import app

# command -> what it takes: arguments by their name, options by their flags; "!" marks what must be given
FLAGS: dict[str, list[str]] = {
    "bench": [
        "!target",
        "--batch",
        "--checkpoint",
        "--data",
        "--deployments",
        "--device",
        "--eval",
        "--json",
        "--limit",
        "--plot",
        "--quiet -q",
        "--rounds",
        "--seconds",
        "--threads",
        "--trust-code",
    ],
    "compare": ["!targets", "--batch-size", "--data", "--device", "--json", "--quiet -q", "--trust-code"],
    "demo": ["--json", "--out", "--quiet -q", "--shared"],
    "diagnose": [
        "!--data",
        "!target",
        "--bits",
        "--by",
        "--calib",
        "--calib-size",
        "--checkpoint",
        "--device",
        "--images",
        "--json",
        "--option",
        "--quiet -q",
        "--recipe",
        "--seed",
        "--size",
        "--top",
        "--trust-code",
    ],
    "evaluate": [
        "!--data",
        "!target",
        "--batch-size",
        "--checkpoint",
        "--device",
        "--draw",
        "--fidelity",
        "--images",
        "--json",
        "--limit",
        "--predictions",
        "--quiet -q",
        "--size",
        "--skip-bad",
        "--task",
        "--trust-code",
    ],
    "export": [
        "!--out",
        "!target",
        "--data",
        "--images",
        "--json",
        "--profile",
        "--quiet -q",
        "--to",
        "--trust-code",
    ],
    "inspect": ["!model", "--checkpoint", "--image-size", "--json", "--quiet -q"],
    "leaderboard": [
        "!model",
        "--against",
        "--batch-size",
        "--bits",
        "--calib",
        "--calib-size",
        "--checkpoint",
        "--count-macs",
        "--device",
        "--dry-run",
        "--eval",
        "--images",
        "--json",
        "--keep",
        "--modifiers",
        "--option",
        "--out",
        "--plot",
        "--quiet -q",
        "--recipes",
        "--seeds",
    ],
    "quantize": [
        "!--calib",
        "!--out",
        "!model",
        "--batch-size",
        "--bits",
        "--calib-size",
        "--checkpoint",
        "--device",
        "--eval",
        "--exclude",
        "--force",
        "--json",
        "--option",
        "--quiet -q",
        "--recipe",
        "--scope",
        "--seed",
        "--set",
        "--size",
        "--skip-bad",
    ],
    "recipes": ["--json", "--quiet -q"],
    "train": [
        "!--out",
        "!--train",
        "!model",
        "--augment",
        "--basin",
        "--batch-size",
        "--bits",
        "--calib-size",
        "--checkpoint",
        "--device",
        "--epochs",
        "--eval",
        "--exclude",
        "--force",
        "--images",
        "--json",
        "--labels",
        "--looks",
        "--micro-batch",
        "--option",
        "--precision",
        "--quiet -q",
        "--recipe",
        "--recompute",
        "--resume",
        "--seed",
        "--set",
        "--size",
        "--skip-bad",
        "--task",
        "--train-batch",
        "--workers",
    ],
    "transfer": [
        "!--data",
        "!target",
        "--batch-size",
        "--checkpoint",
        "--device",
        "--json",
        "--neighbours",
        "--quiet -q",
        "--seed",
        "--skip-bad",
        "--test",
        "--trust-code",
    ],
}
# defaults that decide numbers
DEFAULTS = {
    ("quantize", "recipe"): "repq_vit",
    ("quantize", "bits"): "w4a4",
    ("quantize", "calib_size"): 32,
    ("quantize", "seed"): 0,
    ("quantize", "device"): "auto",
    ("evaluate", "task"): "classify",
    ("leaderboard", "bits"): "w8a8,w6a6,w4a4,w3a3",
    ("leaderboard", "recipes"): "all",
    ("leaderboard", "seeds"): "0,1,2",
    ("leaderboard", "calib_size"): 32,
    ("leaderboard", "against"): "float",
    ("export", "to"): "onnx",
    ("export", "profile"): None,
    ("export", "images"): 64,
    ("train", "recipe"): "gplq",
    ("train", "epochs"): 1,
    ("train", "train_batch"): 16,
    ("train", "augment"): "none",
    ("train", "looks"): 4,
    ("transfer", "neighbours"): 20,
    ("diagnose", "recipe"): "repq_vit",
    ("diagnose", "bits"): "w4a4",
    ("diagnose", "by"): "site",
    ("diagnose", "images"): 16,
}


def commands() -> dict[str, Any]:
    group: Any = get_command(app)
    return dict(group.commands)


def written(parameter: Any) -> str:
    names = parameter.opts + parameter.secondary_opts if parameter.param_type_name == "option" else [parameter.name]
    return ("!" if parameter.required else "") + " ".join(names)


def test_the_commands_are_these() -> None:
    assert sorted(commands()) == sorted(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_of_a_command_are_these(name: str) -> None:
    assert sorted(written(p) for p in commands()[name].params) == FLAGS[name]


@pytest.mark.parametrize(("name", "parameter"), DEFAULTS)
def test_defaults_that_decide_numbers(name: str, parameter: str) -> None:
    (found,) = (p for p in commands()[name].params if p.name == parameter)
    assert found.default == DEFAULTS[(name, parameter)]


@pytest.mark.parametrize("name", FLAGS)
def test_help_lists_every_flag_with_what_it_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    answer = CliRunner().invoke(app, [name, "--help"])
    assert answer.exit_code == 0
    for parameter in commands()[name].params:
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in answer.stdout
        assert parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("name", list(FLAGS))
def test_help_teaches_by_example(name: str) -> None:
    example = "--recipe repq_vit+gptq" if name == "recipes" else f"vitq {name}"
    assert example in commands()[name].help


def test_the_program_says_where_to_begin() -> None:
    answer = CliRunner().invoke(app, ["--help"])
    assert answer.exit_code == 0
    assert "vitq demo" in answer.stdout
    for name in FLAGS:
        assert name in answer.stdout
