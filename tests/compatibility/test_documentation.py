"""The tests that the documentation's tables name exist, and the other way round."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_row_names_tests_that_exist_and_every_test_is_in_a_row():
    page = (HERE.parents[1] / "docs" / "compatibility.md").read_text()
    named = set(re.findall(r"`(?:tests/)?(test_\w+\.py::test_\w+)`", page))
    files = [*HERE.glob("test_*.py"), HERE.parent / "test_nnx.py"]
    existing = {
        f"{file.name}::{name}"
        for file in files
        if file != Path(__file__)
        for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)
    }
    assert named <= existing
    # Accuracy is named by its command; errors of NNX are no row of a table.
    unnamed = {
        "test_mixed_precision.py::test_accuracy",
        "test_nnx.py::test_errors_say_what_is_wrong",
        "test_nnx.py::test_state_is_untouched_after_an_error",
        "test_nnx.py::test_ordinary_optimizer_through_summed_is_nnx_grad_of_the_sum",
    }
    assert existing - named == unnamed
