"""What an experiment writes: files that are whole or absent, checkpoints, a lock on the folder."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import flax
import numpy as np
from numpy.typing import NDArray


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error of writing, such as a full disk, name the path."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is at `path` once all of it is written."""
    part = path.with_name(f"{path.name}.part")
    with naming(path):
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without its content
        part.replace(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make an error of a file that is damaged name the path, and what to do."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{path} is damaged: {error}; remove it, and run again") from error


def write_npz(path: Path, tree: dict[str, Any], *, compressed: bool = True) -> None:
    """Write a tree of dictionaries of arrays, see `read_npz`."""
    flat = flax.traverse_util.flatten_dict(tree, sep="/")
    with whole(path) as file:
        (np.savez_compressed if compressed else np.savez)(file, **flat)


def read_npz(path: Path) -> dict[str, Any]:
    """What `write_npz` wrote."""
    with reading(path), np.load(path, allow_pickle=False) as stored:
        return dict(flax.traverse_util.unflatten_dict(dict(stored), sep="/"))


def outcomes(folder: Path, seeds: int) -> list[Path]:
    """Where the outcomes of a trial lie, a file for each seed."""
    return [folder / f"{seed}.npz" for seed in range(seeds)]


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record."""
    with whole(path) as file:
        file.write(json.dumps(record, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote."""
    with reading(path):
        return dict(json.loads(path.read_text()))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and lock it against other processes until the context or the process ends.

    Args:
      folder: of an experiment.

    Raises:
      OSError: it cannot be written, or another process holds it.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            import fcntl
        except ModuleNotFoundError:  # Windows: not locked
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another run writes to {folder}: wait, or give another folder") from None
        except OSError:  # a file system without locks
            pass
        yield


def save(
    folder: Path, epoch: int, leaves: Sequence[NDArray[Any]], history: dict[str, NDArray[Any]]
) -> None:
    """Write a checkpoint in place of the last one.

    Args:
      folder: of one seed's checkpoints.
      epoch: how many are done.
      leaves: of the runs' states.
      history: of the epochs done.
    """
    with naming(folder):
        folder.mkdir(exist_ok=True)
    named = {str(number): leaf for number, leaf in enumerate(leaves)}
    tree = {"epoch": np.asarray(epoch), "leaf": named, "history": history}
    write_npz(folder / "checkpoint.npz", tree, compressed=False)


def restore(folder: Path) -> tuple[int, list[NDArray[Any]], dict[str, NDArray[Any]]] | None:
    """The last checkpoint.

    Args:
      folder: what `save` wrote to.

    Returns:
      `(epoch, leaves, history)`, or None if there is no checkpoint.
    """
    path = folder / "checkpoint.npz"
    if not path.is_file():
        return None
    found = read_npz(path)
    return int(found["epoch"]), list(found["leaf"].values()), found["history"]
