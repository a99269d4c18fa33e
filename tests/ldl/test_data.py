"""Loading, checking and fetching data, and the papers' folds."""

import http.server
import pickle
import re
import threading
import warnings

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from gdmam_jax import ldl
from gdmam_jax.ldl import data, files

X = np.array([[0.0, 5.0], [1.0, 6.0], [2.0, 8.0]])
Y = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]])


def changed(array, row, column, value):
    array = array.copy()
    array[row, column] = value
    return array


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (changed(X, 1, 0, np.nan), Y, r"features hold nan in row 1, column 0 \(age\)"),
        (changed(X, 2, 1, -np.inf), Y, r"features hold -inf in row 2, column 1 \(height\)"),
        (X, changed(Y, 0, 1, np.nan), r"labels hold nan in row 0, column 1 \(bad\)"),
        (X, changed(Y, 2, 1, -0.5), r"labels hold -0.5, which is negative, in row 2, column 1"),
        (X, changed(Y, 1, 0, 0.2), r"labels of row 1 sum to 0.95, not to 1; normalize=True"),
        (X[:2], Y, "2 rows of features, but 3 rows of labels"),
        (np.ones((3, 2)), Y, r"features are 1 in every row, 0 to 2, of column 0 \(age\)"),
        (np.add(X, (2e9, 0)), Y, r"features are 2e\+09 in every row, .* \(age\), in float32"),
        (np.add(X, (1e39, 0)), Y, r"features hold inf in row 0, column 0 \(age\)"),
        ((X - 1) * (3e38, 1), Y, r"range from -3e\+38 to 3e\+38 in column 0 \(age\), too far for"),
        (X[:1], Y[:1], "data: 1 row is too few"),
        (X[0], Y, r"features must have the shape \(samples, columns\), got \(2,\)"),
        (X, np.ones((3, 1)), "needs 2 labels or more, got 1"),
        (X.astype(str), Y, "features must be real numbers, got dtype"),
    ],
)
def test_bad_data_is_refused_and_the_place_named(x, y, message):
    names = {"feature_names": ("age", "height"), "label_names": ("good", "bad")}
    with pytest.raises(ValueError, match=message):
        data.from_arrays(x, y, **(names if np.shape(y)[1] == 2 else {}))


def test_rows_that_nearly_sum_to_1_are_renormalised_and_it_is_said():
    with pytest.warns(UserWarning, match="1 rows of labels were renormalised, row 1 the most"):
        dataset = data.from_arrays(X, changed(Y, 1, 0, 0.250005))
    np.testing.assert_allclose(dataset.labels.sum(1), 1, atol=1e-7)
    assert data.from_arrays(X, 3 * Y, normalize=True).labels.tolist() == Y.tolist()
    with pytest.raises(ValueError, match="labels of row 2 are all 0"):
        data.from_arrays(X, changed(Y, 2, 0, 0), normalize=True)


@pytest.mark.parametrize("keys", [("features", "labels"), ("feature", "label"), ("X", "D")])
def test_files(tmp_path, keys):
    scipy.io.savemat(tmp_path / "a.mat", dict(zip(keys, (X, Y), strict=True)))
    np.savez(tmp_path / "a.npz", **dict(zip(keys, (X, Y), strict=True)))
    (tmp_path / "a.csv").write_text(
        "age,label_1,label_2,height\n0,0.5,0.5,5\n1,0.25,0.75,6\n2,1,0,8"
    )
    for name in ("a.mat", "a.npz", "a.csv"):
        dataset = data.find(str(tmp_path / name))
        np.testing.assert_array_equal(dataset.features, X)
        np.testing.assert_array_equal(dataset.labels, Y)
        assert dataset.name == "a"
    assert dataset.feature_names == ("age", "height")
    sparse = {keys[0]: scipy.sparse.csc_matrix(X), keys[1]: Y}
    scipy.io.savemat(tmp_path / "sparse.mat", sparse)
    np.testing.assert_array_equal(data.load(tmp_path / "sparse.mat").features, X)


def test_bad_files(tmp_path):
    np.savez(tmp_path / "a.npz", features=X, targets=Y)
    with pytest.raises(
        ValueError, match=r"none of the arrays is named labels, .*features, targets"
    ):
        data.load(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", features=np.array([object()]), labels=Y)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        data.load(tmp_path / "b.npz")
    for name in ("broken.npz", "broken.mat"):
        (tmp_path / name).write_bytes((tmp_path / "a.npz").read_bytes()[:100])
        with pytest.raises(ValueError, match=f"{name} cannot be read as a "):
            data.load(tmp_path / name)
    (tmp_path / "e.pkl").write_bytes(pickle.dumps(X))
    with pytest.raises(ValueError, match=r"expected a \.mat, \.npz or \.csv file"):
        data.load(tmp_path / "e.pkl")
    with pytest.raises(FileNotFoundError, match="no such data file"):
        data.load(tmp_path / "f.mat")
    with pytest.raises(ValueError, match="unknown data set 'Moovie'"):
        data.find("Moovie")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "line 1: the header needs columns that begin with 'label'"),
        ("a,label_1,label_2\n1,.5,.5\n\nx,1,0", r"line 4: column 'a' holds 'x', which is not a n"),
        (f"a,label_1,label_2\n1,.5,.5\n{'x' * 9999},1,0", r"line 3: column 'a' holds .{,40}, wh"),
        ("a,label_1,label_2\n1,.5,\n", "line 2: column 'label_2' holds '', which is not a number"),
        ("a,label_1,label_2\n1,.5,.5\n2,1\n", "line 3: 2 fields, but the header has 3"),
        ("a,a,label_1,label_2\n1,2,.5,.5\n", r"line 1: the header has .* same name: \['a'\]"),
        ("a,label_1,label_2\n1,.5,.5\n\n2,.5,.25\n", "labels of line 4 sum to 0.75, not to 1"),
        ('a,label_1,label_2\n1,.5,".5', "line 2: unexpected end of data"),
        ("a,label_1,label_2\n", "no rows below the header"),
        ("", "no rows below the header"),
    ],
)
def test_csv_errors_name_file_line_and_cause(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'a.csv'))}.*{message}"):
        data.load(tmp_path / "a.csv")


def test_a_place_is_named_whatever_the_names_are(tmp_path):
    """Names of pandas and NumPy are arrays; a file's name may look like a place."""
    x, y = [[1.0], [np.nan]], [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ValueError, match=r"features hold nan in row 1, column 0 \(a\)"):
        data.from_arrays(x, y, feature_names=np.array(["a"]))
    (tmp_path / "row 9.csv").write_text("a,label_1,label_2\n1,.5,.5\n2,.5,-1\n")
    with pytest.raises(ValueError, match=r"row 9.csv: labels hold -1, .* in line 3, column 1"):
        data.load(tmp_path / "row 9.csv")


def test_bytes_that_are_no_utf8_are_found(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,label_1,label_2\n1,.5,.5\n2\xff,1,0\n")
    with pytest.raises(ValueError, match=r"line 3: column 'a' holds '2\\\\xff'"):
        data.load(tmp_path / "a.csv")


@pytest.mark.parametrize("suffix", [".npz", ".mat"])
def test_arrays_far_larger_than_their_file_are_not_unpacked(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(files, "UNPACKED", 1 << 18)
    path, arrays = tmp_path / f"a{suffix}", {"features": np.zeros((1 << 16, 2)), "labels": Y}
    if suffix == ".mat":
        scipy.io.savemat(path, arrays, do_compression=True)
    else:
        np.savez_compressed(path, **arrays)
    monkeypatch.setattr(files, f"_load_{suffix[1:]}", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=r"a\.\w+: features would take 0\.0 GB unpacked"):
        data.load(path)


def test_constant_columns_are_dropped_on_request():
    x = np.column_stack([np.ones(3), X, np.ones(3)])
    names = ("one", "age", "height", "uno")
    with pytest.raises(
        ValueError, match=r"of column 0 \(one\), in float32, and .* 1 more .*; drop_constant=True"
    ):
        data.from_arrays(x, Y, feature_names=names)
    dropped = data.from_arrays(x, Y, feature_names=names, drop_constant=True)
    np.testing.assert_array_equal(dropped.features, X)
    assert dropped.feature_names == ("age", "height")
    with pytest.raises(ValueError, match=r"in float32, and constant in 1 more columns$"):
        data.from_arrays(np.ones((3, 2)), Y, drop_constant=True)


def test_samplers_belong_to_what_a_file_holds(tmp_path, monkeypatch):
    labels = np.random.default_rng(0).dirichlet(np.ones(4), 9)
    arrays = {"features": np.arange(18.0).reshape(9, 2), "labels": labels}
    scipy.io.savemat(tmp_path / "Movie.mat", arrays)
    assert data.load(tmp_path / "Movie.mat").sampler is None  # its name, another's content
    path = (tmp_path / "Movie.mat").rename(tmp_path / "mine.mat")
    for name, sampler in (
        ("Movie", ldl.RELEASED_THRESHOLDS["Movie"]),
        ("M2B", ldl.FoundThresholds(100)),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(data.REGISTRY, name, data.blob_id(path.read_bytes()))
            assert data.load(path).sampler == sampler


def test_folds_follow_the_protocol():
    rng = np.random.default_rng(0)
    dataset = data.from_arrays(
        rng.normal(size=(103, 3)), rng.dirichlet(np.ones(3), 103), normalize=True
    )
    folds = data.make_folds(dataset, folds=5, validation_size=7)
    assert folds.features.min() == 0
    assert folds.features.max() == 1
    tested = []
    for i in range(5):
        train = set(folds.train[i][folds.train_mask[i]])
        test = set(folds.test[i][folds.test_mask[i]])
        parts = (train, set(folds.validation[i]), test)
        assert sum(map(len, parts)) == len(set.union(*parts)) == 103
        assert len(parts[1]) == 7
        assert set(folds.natural[i]) == parts[1]  # no sampler, so nothing is left out
        tested += test
    assert sorted(tested) == list(range(103))
    with pytest.raises(ValueError, match="3 rows are too few for 10 folds"):
        data.make_folds(data.from_arrays(X, Y))
    with pytest.raises(ValueError, match="fold 0 keeps 82 rows, which leaves none for training"):
        data.make_folds(dataset, folds=5, validation_size=82)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("Movie", 108), ("SCUT_FBP", 146), ("emotion6", 85), ("Painting", 80), ("Yeast_spo", 80)],
)
def test_real_sets(shared, name, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = data.find(name, folder=shared / "data" / "ldl", drop_constant=True)
    folds = data.make_folds(dataset)
    assert folds.train_mask[0].sum() == rows
    for fold in range(10):
        used = [folds.train[fold], folds.validation[fold], folds.test[fold]]
        assert len(set(folds.natural[fold])) == 20
        assert not set(folds.natural[fold]) & set(np.concatenate(used))


def test_films():
    films = data.films()
    assert films.features.shape == (15713, 15)
    assert films.row_names[films.labels[:, 9].argmax()] == "All About Lurleen"
    folds = data.make_folds(films)
    for fold in range(10):  # no row has two uses
        parts = (
            folds.train[fold][folds.train_mask[fold]],
            folds.validation[fold],
            folds.natural[fold],
            folds.test[fold][folds.test_mask[fold]],
        )
        rows = np.concatenate(parts)
        assert len(np.unique(rows)) == len(rows)
    training = films.labels[folds.train[0]].sum(0)
    assert training.max() / training.min() > 15


class Server:
    """An HTTP server on this machine that knows ranges, and can break off or tamper."""

    def __init__(self, content):
        self.content, self.stop_after, self.ranges = content, None, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                rest = server.content[start:]
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(rest)))
                self.end_headers()
                self.wfile.write(rest[: server.stop_after])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    content = np.random.default_rng(0).bytes(300_000)
    monkeypatch.setitem(data.REGISTRY, "Movie", data.blob_id(content))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(content)
    yield server
    server.http.shutdown()
    server.http.server_close()


def fetch(server, folder):
    return data.fetch("Movie", folder=folder, base_url=server.url)


def test_fetch_verifies_and_keeps(server, tmp_path):
    path = fetch(server, tmp_path)
    assert path.read_bytes() == server.content
    assert fetch(server, tmp_path) == path
    assert server.ranges == [None]
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the registered Movie: its git blob id is"):
        fetch(server, tmp_path)


def test_a_truncated_download_is_continued(server, tmp_path):
    server.stop_after = 100_000
    with pytest.raises(ConnectionError, match="bytes are kept for the next try") as caught:
        fetch(server, tmp_path)
    assert str(tmp_path / "Movie.mat") in str(caught.value)
    assert not (tmp_path / "Movie.mat").exists()
    kept = (tmp_path / "Movie.mat.part").stat().st_size
    assert 0 < kept <= 100_000
    server.stop_after = None
    assert fetch(server, tmp_path).read_bytes() == server.content
    assert server.ranges == [None, f"bytes={kept}-"]
    assert [path.name for path in tmp_path.iterdir()] == ["Movie.mat"]


def test_a_tampered_download_is_refused(server, tmp_path):
    server.content = server.content[:-1] + b"!"
    with pytest.raises(ValueError, match="is not the registered Movie"):
        fetch(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_offline_says_where_to_put_the_file(tmp_path):
    with pytest.raises(ConnectionError, match="put the file by hand at") as caught:
        data.fetch("Movie", folder=tmp_path, base_url="http://127.0.0.1:9")
    assert str(tmp_path / "Movie.mat") in str(caught.value)
    with pytest.raises(ValueError, match="unknown data set 'Moovie'; expected one of FG-Net"):
        data.fetch("Moovie")
