"""The example with a front of preferences: one program trains them all, validation picks one."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("preference_front")


def test_it_reports_the_pick_and_the_default(example, tmp_path, monkeypatch, capsys):
    fronts = []
    judge = example.judge
    monkeypatch.setattr(example, "judge", lambda *args: fronts.append(judge(*args)) or fronts[-1])
    picture = tmp_path / "new" / "picture.png"
    small = ["--count", "4", "--steps", "300", "--width", "16", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["preference_front.py", *small])
    example.main()
    printed = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    numbers = np.unique([*np.geomspace(0.01, 100, 4), 1.0])
    assert [row[0].strip() for row in rows] == [
        "GDMAM, picked",
        "GDMAM, 1",
        "sum, picked",
        "sum, 1",
    ]
    for front, picked in zip(fronts, rows[::2], strict=True):
        place = int(np.argmax(front["validation"]))
        assert float(picked[1]) == pytest.approx(numbers[place], rel=0.05)
        assert float(picked[3]) == pytest.approx(float(front["test"][place]), abs=1e-3)
        # The more the alignment loss counts, the lower it ends.
        assert front["alignment"][-1] < 0.1 * front["alignment"][0]
        assert front["prediction"][-1] > front["prediction"][place]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_training_in_the_front_is_the_training_alone(example):
    options = types.SimpleNamespace(steps=100, learning_rate=1e-2, width=8, seed=0)
    data = example.load(0, 1 / 3)[0]
    start, block = example.make_front(example.METHODS["GDMAM"], data, options)
    keys = jax.random.split(jax.random.key(1), 5)
    together = block(start(jnp.array([0.1, 3.0])), keys)[0]
    for place, number in enumerate((0.1, 3.0)):
        alone = block(start(jnp.array([number])), keys)[0]
        for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one[place], other[0], rtol=1e-3, atol=1e-5)


def test_a_third_of_the_labels_is_drawn_and_none_of_the_test_images(example):
    digits = example.load_digits()
    images = np.float32(digits.data / 16)
    known = {image.tobytes(): label for image, label in zip(images, digits.target, strict=True)}

    def right(pixels, labels):
        found = [known[image.tobytes()] for image in np.asarray(pixels)]
        return np.mean(np.array(found) == labels)

    training, validation, test = example.load(0, 1 / 3)
    assert right(*test) == 1
    assert right(*example.load(0, 0.0)[0]) == 1
    # Of a third drawn among ten, a tenth is right by chance.
    assert right(*training) == pytest.approx(0.7, abs=0.08)
    assert right(*validation) == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--steps", "150", "multiple of 100"),
        ("--wrong", "1.5", "between 0 and 1"),
        ("--seed", "-1", "at least 0"),
    ],
)
def test_impossible_options_are_refused(example, monkeypatch, capsys, option, value, message):
    monkeypatch.setattr(sys, "argv", ["preference_front.py", option, value])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
