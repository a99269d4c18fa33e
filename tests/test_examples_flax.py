"""The two Flax examples: they run, and end in a model that works."""

import sys

import pytest

from tests.test_examples import load_example


def run(name, arguments, monkeypatch, capsys):
    module = load_example(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    module.main()
    return capsys.readouterr().out


def percentages(printed, method):
    line = next(line for line in printed.splitlines() if line.startswith(method))
    return [float(word.strip("%")) for word in line.split() if word.endswith("%")]


def test_nnx_lora_learns_the_new_and_keeps_the_old(monkeypatch, capsys):
    arguments = ["--pretraining-epochs", "6", "--epochs", "8", "--learning-rate", "5e-3"]
    printed = run("nnx_lora", arguments, monkeypatch, capsys)
    new_before, old_before = percentages(printed, "before fine-tuning")
    new, old = percentages(printed, "both losses, GDMAM")
    _, forgotten = percentages(printed, "fine-tuned on the new digits only")
    assert new > new_before + 20
    assert old > (old_before + forgotten) / 2  # more than half of what is forgotten otherwise
    assert "conflicted in" in printed


def test_linen_train_state_learns(monkeypatch, capsys):
    arguments = ["--epochs", "3", "--seeds", "1", "--labels", "100"]
    printed = run("linen_train_state", arguments, monkeypatch, capsys)
    assert percentages(printed, "both losses, GDMAM")[0] > 50  # guessing: 10
    assert "From 100 labels and 1,300 images" in printed


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nnx_lora", ["--epochs", "0"], "--epochs must be at least 1"),
        ("nnx_lora", ["--seed", "-1"], "--seed must be at least 0"),
        ("linen_train_state", ["--labels", "5"], "--labels must lie between 10 and 1400"),
    ],
)
def test_wrong_flags_are_refused(name, arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, arguments, monkeypatch, capsys)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
