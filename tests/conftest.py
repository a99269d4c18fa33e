"""What every test may use: eight simulated devices, float64 on request, the shared folder."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Run the test with float64 switched on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared():
    """The folder of recorded trajectories and real data, beside a development checkout."""
    folder = Path(__file__).parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the folder {folder} (recorded trajectories and real data sets)")
    return folder
