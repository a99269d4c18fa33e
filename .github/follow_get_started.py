"""Follows *Get started* by copy and paste, with a wheel in a new and empty environment.

`python .github/follow_get_started.py dist` takes the wheel in `dist`, which
`python .github/check_package.py dist` builds from a clean copy, and the Python that runs it. It
installs what the page says, with the newest versions, and runs the page twice for each library. It
leaves out the loggers that need an account or a server.
"""

import os
import runpy
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

SNIPPETS = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "snippets.py"))
IN_CLONE = 'pip install -e ".[plotting]" orbax-checkpoint'
ELSEWHERE = ("import wandb", "import mlflow")


def main() -> None:
    """See the module's text."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    page, blocks = SNIPPETS["PAGE"], SNIPPETS["blocks"]
    if IN_CLONE not in page.read_text():
        sys.exit(f"{page} does not say {IN_CLONE}")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "environment", with_pip=True)
        python = folder / "environment" / "bin" / "python"
        start = time.monotonic()
        packages = (f"{wheel}[plotting]", "orbax-checkpoint", "flax", "equinox", "tensorboardX")
        install = [python, "-m", "pip", "install", "-q", *packages]
        subprocess.run(install, check=True, cwd=folder, env=clean)
        print(f"installed in {time.monotonic() - start:.0f} s", flush=True)
        versions = "import sys, jax, optax; print(sys.version, jax.__version__, optax.__version__)"
        subprocess.run([python, "-c", versions], check=True, env=clean)
        for number, library in enumerate(SNIPPETS["LIBRARIES"]):
            own = folder / str(number)
            own.mkdir()
            found = [block for block in blocks(library) if not block.startswith(ELSEWHERE)]
            (own / "page.py").write_text("\n\n".join(found))
            start = time.monotonic()
            for _ in range(2):
                command = [python, "page.py"]
                subprocess.run(command, check=True, cwd=own, env=clean | {"MPLBACKEND": "agg"})
            print(f"{library}: twice in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
