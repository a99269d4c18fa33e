"""Reading features and labels from `.csv`, `.npz` and `.mat` files; nothing is ever unpickled."""

import csv
import math
import reprlib
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FEATURE_KEYS = ("features", "feature", "X", "x", "data")
LABEL_KEYS = ("labels", "label", "labelDistribution", "label_distribution", "Y", "y", "D", "d")

UNPACKED = 1 << 28
"""Bytes that an array may unpack to. It may be larger if it is at most 20 times its file's size."""


class Table(NamedTuple):
    """What a file holds.

    Attributes:
      features: shape (samples, features), not checked further.
      labels: shape (samples, labels).
      feature_names: from a CSV file's header, or empty.
      label_names: from a CSV file's header, or empty.
      lines: for every row, its line in a CSV file, or empty.
    """

    features: NDArray[Any]
    labels: NDArray[Any]
    feature_names: Sequence[str] = ()
    label_names: Sequence[str] = ()
    lines: Sequence[int] = ()


def read(path: Path) -> Table:
    """Read a file, whose kind its suffix tells; see `data.load`.

    Args:
      path: of the file.

    Returns:
      A `Table`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown or broken format, missing arrays or columns, duplicate columns,
        arrays far larger than the file; the message names the file, and a CSV file's line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such data file: {path}")
    kind = path.suffix.lower()
    if kind == ".csv":
        return _read_csv(path)
    if kind not in (".mat", ".npz"):
        raise ValueError(f"{path}: expected a .mat, .npz or .csv file")
    headers, load = (_mat_headers, _load_mat) if kind == ".mat" else (_npz_headers, _load_npz)
    try:
        sizes = headers(path)
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{path} cannot be read as a {kind} file: {error}") from error
    keys = [_pick(sizes, names, path) for names in (FEATURE_KEYS, LABEL_KEYS)]
    for key in keys:
        packed = path.stat().st_size
        if sizes[key] > max(UNPACKED, 20 * packed):
            raise ValueError(
                f"{path}: {key} would take {sizes[key] / 1e9:.1f} GB unpacked from a file of "
                f"{packed / 1e6:.1f} MB, and was not read; if that is right, load it yourself and "
                "give the arrays to from_arrays"
            )
    try:
        features, labels = load(path, keys)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a {kind} file: {error}") from error
    return Table(features, labels)


def _pick(found: dict[str, int], keys: Sequence[str], path: Path) -> str:
    for key in keys:
        if key in found:
            return key
    raise ValueError(
        f"{path}: none of the arrays is named {', '.join(keys)}; there are "
        f"{', '.join(sorted(found)) or 'none'}"
    )


def _npz_headers(path: Path) -> dict[str, int]:
    """Bytes of every array, by name, from the headers alone."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    sizes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
            sizes[member.removesuffix(".npy")] = math.prod(shape) * dtype.itemsize
    return sizes


def _load_npz(path: Path, keys: Sequence[str]) -> list[NDArray[Any]]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return [stored[key] for key in keys]


def _mat_headers(path: Path) -> dict[str, int]:
    import scipy.io

    return {name: 8 * math.prod(shape) for name, shape, _ in scipy.io.whosmat(path)}


def _load_mat(path: Path, keys: Sequence[str]) -> list[NDArray[Any]]:
    import scipy.io
    import scipy.sparse

    stored = scipy.io.loadmat(path, variable_names=keys, spmatrix=False)
    found = [stored[key] for key in keys]
    return [
        value.toarray() if scipy.sparse.issparse(value) else np.asarray(value) for value in found
    ]


def _read_csv(path: Path) -> Table:
    rows, lines = [], []
    # Bytes that are not UTF-8 are shown, so that the line they are in can be named.
    with path.open(newline="", encoding="utf-8-sig", errors="backslashreplace") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            is_label = _label_columns(header) if header else np.zeros(0, bool)
            for row in reader:
                if row:
                    rows.append(_numbers(row, header))
                    lines.append(reader.line_num)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows below the header")
    table = np.array(rows)
    return Table(
        table[:, ~is_label],
        table[:, is_label],
        [name for name, label in zip(header, is_label, strict=True) if not label],
        [name for name, label in zip(header, is_label, strict=True) if label],
        lines,
    )


def _label_columns(header: Sequence[str]) -> NDArray[np.bool_]:
    duplicates = [name for name, count in Counter(header).items() if count > 1]
    if duplicates:
        raise ValueError(
            f"the header has several columns with the same name: {reprlib.repr(duplicates)}"
        )
    is_label = np.array([name.startswith("label") for name in header], bool)
    if is_label.all() or not is_label.any():
        raise ValueError(
            "the header needs columns that begin with 'label', and others; it has "
            f"{reprlib.repr(list(header))}"
        )
    return is_label


def _numbers(row: Sequence[str], header: Sequence[str]) -> list[float]:
    if len(row) != len(header):
        raise ValueError(f"{len(row)} fields, but the header has {len(header)}")
    numbers = []
    for name, field in zip(header, row, strict=True):
        try:
            numbers.append(float(field))
        except ValueError:
            raise ValueError(
                f"column {reprlib.repr(name)} holds {reprlib.repr(field)}, which is not a number"
            ) from None
    return numbers
