"""The notebooks run, conclude what their text says, and are committed as somebody ran them."""

import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SHORTER = {
    "first_training": {"STEPS = 2000": "STEPS = 400"},
    "is_there_conflict": {"STEPS = 400": "STEPS = 150"},
    "physics_informed_network": {
        "STEPS = 2000": "STEPS = 300",
        "[2, width, width, width]": "[2, width, width]",
        "(200, 2)": "(100, 2)",
        "0.0, 1e-2, 100": "0.0, 2e-2, 100",
    },
    "label_distributions": {"EPOCHS = 50, 60": "EPOCHS = 50, 20"},
}
"""What a test replaces in a notebook, to be quick."""


def numbers(notebook, pattern):
    """The numbers that the groups of a pattern find in what the notebook printed."""
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    found = re.findall(pattern, printed)
    assert found, f"{pattern} is not in: {printed}"
    return [float(each) for row in found for each in ([row] if isinstance(row, str) else row)]


def first_training(notebook):
    [ours] = numbers(notebook, r"GDMAM: relative error ([\d.]+)")
    summed = numbers(notebook, r"sum, factor \S+: relative error ([\d.]+)")
    assert len(summed) == 6
    assert ours < 2 * min(summed)  # about as good as the best factor
    assert ours < 0.5 * summed[-1]
    assert summed[-1] > 0.9  # the plain sum learns nothing


def is_there_conflict(notebook):
    [opposed] = numbers(notebook, r"oppose each other in (\d+)%")
    [cancels] = numbers(notebook, r"cancels in the sum: (\d+)%")
    assert opposed > 80
    assert 25 < cancels < 75
    [*_, summed] = numbers(notebook, r"sum: losses ([\d.]+) and ([\d.]+), .*read: ([\d.]+)%")
    [*_, ours] = numbers(notebook, r"GDMAM: losses ([\d.]+) and ([\d.]+), .*read: ([\d.]+)%")
    assert summed > 60
    assert ours > 60


def physics_informed_network(notebook):
    [summed] = numbers(notebook, r"Adam on the sum: relative error ([\d.]+)")
    [ours] = numbers(notebook, r"GDMAM: relative error ([\d.]+)")
    [ratio] = numbers(notebook, r"gradient is (\d+) times longer")
    assert ours < 0.5 * summed
    assert ratio > 10


def label_distributions(notebook):
    [uniform, mean, summed, ours] = numbers(notebook, r"KLD ([\d.]+)")
    assert uniform == 0.2687
    assert ours < summed < mean
    assert ours < uniform
    [opposed] = numbers(notebook, r"opposed each other in (\d+)%")
    assert 5 < opposed < 60


CONCLUSIONS = (first_training, is_there_conflict, physics_informed_network, label_distributions)


def read(conclusion):
    return nbformat.read(ROOT / "notebooks" / f"{conclusion.__name__}.ipynb", as_version=4)


def test_every_notebook_has_a_test():
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert names == sorted(conclusion.__name__ for conclusion in CONCLUSIONS)


@pytest.mark.parametrize("conclusion", CONCLUSIONS)
def test_committed_notebooks_are_complete(conclusion):
    notebook = read(conclusion)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert "At the end you will" in notebook.cells[0].source
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 'if "google.colab" in sys.modules:\n    %pip install' in codes[0].source
    assert [cell.execution_count for cell in codes] == [*range(1, len(codes) + 1)]
    kinds = [output.output_type for cell in codes for output in cell.outputs]
    assert "error" not in kinds
    pictures = [
        output for cell in codes for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 2
    assert all(not cell.metadata for cell in notebook.cells)
    conclusion(notebook)


INSTALLED_BY = {
    **dict.fromkeys(("chex", "gdmam_jax", "jax", "optax"), ("gdmam-jax",)),
    "flax": ("flax", "ldl"),
    "matplotlib": ("plotting", "ldl"),
    "numpy": ("plotting", "ldl"),
    "sklearn": ("scikit-learn", "ldl"),
}
"""The packages and extras that bring a module."""


@pytest.mark.parametrize("conclusion", CONCLUSIONS)
def test_the_first_cell_installs_what_is_imported_in_colab(conclusion):
    install, *codes = [cell.source for cell in read(conclusion).cells if cell.cell_type == "code"]
    named = set(re.findall(r"[a-z]+(?:-[a-z]+)*", install.partition("%pip install")[2]))
    imported = re.findall(r"^(?:import|from) (\w+)", "\n".join(codes), re.MULTILINE)
    assert "jax" in imported
    for module in set(imported) - sys.stdlib_module_names:
        assert named & set(INSTALLED_BY[module]), module


def shortened(conclusion):
    """The code of a notebook, shorter, in cells that have not been run."""
    codes = [cell.source for cell in read(conclusion).cells if cell.cell_type == "code"]
    for old, new in SHORTER[conclusion.__name__].items():
        assert sum(old in code for code in codes) == 1
        codes = [code.replace(old, new) for code in codes]
    return [nbformat.v4.new_code_cell(code) for code in codes]


def test_notebooks_run(tmp_path):
    """One after the other, in one kernel: it starts, and imports, once. It forgets all names."""
    notebooks = {conclusion: shortened(conclusion) for conclusion in CONCLUSIONS}
    cells = []
    for codes in notebooks.values():
        cells += [nbformat.v4.new_code_cell("%reset -f"), *codes]
    client = nbclient.NotebookClient(
        nbformat.v4.new_notebook(cells=cells),
        timeout=500,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    for conclusion, codes in notebooks.items():
        conclusion(nbformat.v4.new_notebook(cells=codes))
