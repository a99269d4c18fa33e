"""What every test may use: eight simulated devices, float64 on request, the shared folder."""

import gc
import os
import runpy
import sys
from pathlib import Path

import jaxlib.version

# Tests compile far more than they compute: without LLVM's optimisation, and with XLA's simpler
# emitters, they take half the time. XLA's own passes, which decide fusions and collectives, run as
# ever. Set before JAX starts; processes that tests start inherit them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        # A flag that XLA does not know ends the process.
        "--xla_cpu_use_fusion_emitters=false" if jaxlib.version.__version_info__ < (0, 11) else "",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

# Meshes are made of the simulated devices, whatever else a machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What commands print has no colours, and breaks where it does on every machine.
os.environ |= {"COLUMNS": "100", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
os.environ.pop("FORCE_COLOR", None)

# Small functions are compiled again and again, by test after test: once is enough for all workers,
# and for the processes that tests start.
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

import jax
import pytest
from hypothesis import settings

# Processes that tests start find this checkout, and are perturbed where this one is.
PATHS = [str(Path(__file__).parents[1])]
if os.environ.get("GDMAM_TEST_PERTURBATION"):
    PATHS.append(str(Path(__file__).parent / "perturbed"))
    if PATHS[-1] not in sys.path:
        runpy.run_path(f"{PATHS[-1]}/sitecustomize.py")
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.getenv("PYTHONPATH")])])

collect_ignore = ["perturbed"]  # imported by Python itself, and by nothing else
settings.register_profile("fixed", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fixed")

# Traced functions are millions of small objects, which the collector would go through all the time.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_num_cpu_devices", 8)


def skipped_under(setting, reason, value=True):
    """The mark of a test that cannot hold where one of JAX's settings has a value."""
    return pytest.mark.skipif(
        getattr(jax.config, setting) == value, reason=f"{setting}={value} {reason}"
    )


def skipped_under_strict_promotion(whose):
    """The mark of a test of something whose own code mixes dtypes."""
    return skipped_under("jax_numpy_dtype_promotion", f"forbids what {whose} does", "strict")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """With thousands of programs in memory a new one takes twice as long to lower."""
    yield
    jax.clear_caches()


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
