"""Builds sdist and wheel twice, from two copies, and fails unless they are the same and complete.

`python .github/check_package.py dist` leaves them in `dist`. It needs git and the packages that
`.github/constraints-build.txt` pins: the builder writes its version into the wheel. With `--test`
it also installs the wheel in a new environment and runs the tests there, in a folder that holds
everything but the package's source.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "gdmam_jax"
DEVELOPMENT = (".ci/", ".github/", ".pre-commit-config.yaml")
"""What is tracked and belongs in no sdist, beside links."""
EVERYTHING = ("tests", "README.md", "docs")
"""All tests but those in the source itself."""


def tracked() -> set[str]:
    """The paths that git tracks."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return set(listed.split("\0")) - {""}


def copy(files: set[str], folder: Path) -> None:
    """Copies tracked files and links, with new times of change."""
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target, follow_symlinks=False)


def build(files: set[str]) -> Path:
    """The folder with a wheel and an sdist of a copy of the files; the wheel is the sdist's."""
    folder = Path(tempfile.mkdtemp())
    copy(files, folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # Files in the archives are as old as the commit.
    dated = ["git", "log", "-1", "--format=%ct"]
    time = subprocess.check_output(dated, cwd=ROOT, text=True).strip()
    environment = os.environ | {"SOURCE_DATE_EPOCH": time}
    subprocess.run([*command, folder / "source"], check=True, env=environment, **quiet)
    return folder / "dist"


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def check_contents(folder: Path, files: set[str]) -> None:
    """Fails unless wheel and sdist hold what git tracks, and nothing else."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    top = sdist.name.removesuffix(".tar.gz")
    information = f"{top}.dist-info"
    modules = {name for name in files if name.startswith(f"{PACKAGE}/")}
    same(
        "wheel",
        set(zipfile.ZipFile(wheel).namelist()),
        modules
        | {
            f"{information}/{name}"
            for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
        },
    )
    with tarfile.open(sdist) as archive:
        held = {member.name.removeprefix(f"{top}/") for member in archive if member.isfile()}
    same(
        "sdist",
        held,
        {
            name
            for name in files
            if not name.startswith(DEVELOPMENT) and not (ROOT / name).is_symlink()
        }
        | {"PKG-INFO"},
    )


def same(what: str, found: set[str], expected: set[str]) -> None:
    """Fails with the differences of two sets of paths."""
    if found != expected:
        sys.exit(
            f"{what}: missing {sorted(expected - found)}, not expected {sorted(found - expected)}"
        )


def test(wheel: Path, files: set[str], selected: list[str]) -> None:
    """Runs the tests with the installed wheel, where no source of the package is."""
    with tempfile.TemporaryDirectory() as name:
        folder, environment = Path(name) / "tests", Path(name) / "environment"
        copy({file for file in files if not file.startswith(f"{PACKAGE}/")}, folder)
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q", "-c", "constraints.txt", f"{wheel}[test]"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(install, check=True, cwd=folder, env=clean)
        command = [python, "-m", "pytest", "-q", *(selected or ["-n", "auto", *EVERYTHING])]
        subprocess.run(command, check=True, cwd=folder, env=clean)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--test", nargs="*", help="these tests, all unless any is named")
    arguments = parser.parse_args()
    files = tracked()
    first, second = build(files), build(files)
    if digests(first) != digests(second):
        sys.exit(f"two builds differ: {digests(first)} and {digests(second)}")
    check_contents(first, files)
    shutil.copytree(first, arguments.output, dirs_exist_ok=True)
    for name, digest in digests(first).items():
        print(digest, name)
    if arguments.test is not None:
        (wheel,) = arguments.output.resolve().glob("*.whl")
        test(wheel, files, arguments.test)


if __name__ == "__main__":
    main()
