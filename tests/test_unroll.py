"""unroll.py: the block against the theory's formula, measures against loops, and the program from end to end."""

import dataclasses
import gzip
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

import unroll
from configurator import InputError
from model import Block
from unroll import UnrollConfig

ROOT = unroll.Path(unroll.__file__).resolve().parent


def clusters(n: int = 60, dims: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Points of three noisy clusters, and their labels."""
    draw, labels = np.random.default_rng(0), np.arange(n) % 3
    return draw.standard_normal((3, dims))[labels] + draw.standard_normal((n, dims)), labels


# ---------------------------------------------------------------------------------------------------------------------------------
# The block


@pytest.mark.parametrize("arm,sign,identity", [("A", 1, 0), ("A-I", 1, 1), ("-(A-I)", -1, 1)])
@pytest.mark.parametrize("regulariser", [0.0, 0.3])
def test_a_step_is_the_formula(arm, sign, identity, regulariser):
    p, temperature, eta = 12, 0.4, 0.7
    X = torch.randn(20, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = unroll.theory_block(p, arm, temperature, eta, regulariser).double()
    assert isinstance(block, Block)
    expected = [F.layer_norm(X, (p,))]
    for _ in range(3):
        u = F.layer_norm(X, (p,))
        cosine = u @ u.T / p  # |u|^2 = p
        A = (cosine / temperature).softmax(dim=1)
        X = X + sign * eta * (A - identity * torch.eye(20, dtype=torch.float64)) @ u
        X = X + regulariser * F.layer_norm(X, (p,))
        expected.append(F.layer_norm(X, (p,)))
    start = torch.randn(20, p, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(unroll.unroll(block, start, 3), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # the weights were set in float32


def test_first_latents_are_a_linear_map_of_the_pictures():
    pictures = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    X = unroll.first_latents(pictures, 8, seed=3)
    assert float(X.square().mean()) == pytest.approx(1, abs=1e-5)
    both = unroll.first_latents(np.concatenate([pictures, pictures[:1] + pictures[1:2]]), 8, seed=3)
    torch.testing.assert_close(both[-1], both[0] + both[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(X, unroll.first_latents(pictures, 8, seed=4))


def test_pictures_are_drawn_without_repetition_and_have_mean_zero():
    pictures, digits = np.arange(50, dtype=np.float32)[:, None].repeat(2, 1), np.arange(50)
    chosen, labels = unroll.draw_pictures(pictures, digits, 20, seed=1)
    assert len(set(labels)) == 20 and abs(chosen.mean(axis=0)).max() < 1e-4
    np.testing.assert_allclose(chosen[:, 0], labels - labels.mean(), atol=1e-4)
    assert list(unroll.draw_pictures(pictures, digits, 80, seed=1)[1]) == list(range(50))
    assert list(unroll.draw_pictures(pictures, digits, 20, seed=2)[1]) != list(labels)


# ---------------------------------------------------------------------------------------------------------------------------------
# Measures


def test_knn_accuracy_is_its_definition():
    X, labels = clusters()
    right = 0
    for i, x in enumerate(X):
        near = sorted((j for j in range(len(X)) if j != i), key=lambda j: float(((X[j] - x) ** 2).sum()))[:5]
        votes = [sum(labels[j] == label for j in near) for label in range(3)]
        right += votes.index(max(votes)) == labels[i]
    assert 0.5 < right / len(X) < 1
    assert unroll.knn_accuracy(X, labels, 5) == pytest.approx(right / len(X))


def test_within_between_is_its_definition():
    X, labels = clusters()
    within = between = 0.0
    for label in range(3):
        members = X[labels == label]
        within += float(((members - members.mean(0)) ** 2).sum())
        between += len(members) * float(((members.mean(0) - X.mean(0)) ** 2).sum())
    assert unroll.within_between(X, labels) == pytest.approx(within / between)
    assert unroll.within_between(X, labels * 2) == pytest.approx(within / between)  # a digit may be absent


def test_measures_see_clusters():
    X, labels = clusters(dims=2)
    scattered = unroll.measure(np.random.default_rng(1).standard_normal((60, 2)), labels, 5)
    clustered = unroll.measure(X * 10, labels, 5)
    assert list(clustered) == list(unroll.MEASURES)
    for key in ("knn", "silhouette"):
        assert clustered[key] == clustered[f"{key}_2"] > scattered[key]
    assert clustered["within_between"] < scattered["within_between"]


def test_the_interval_is_students():
    values = [0.3, 0.5, 0.4, 0.45]
    entry = unroll.interval(values)
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert entry["interval"] == pytest.approx([np.mean(values) - half, np.mean(values) + half])
    assert unroll.interval([0.5])["interval"] is None and unroll.interval([0.5, 0.5])["interval"] is None


# ---------------------------------------------------------------------------------------------------------------------------------
# Is it inference?


@pytest.mark.parametrize("kind", ["A", "A-I", "-(A-I)", "gradient"])
def test_the_climb_is_the_bound_along_the_steps(kind):
    config = UnrollConfig(steps=2, eta=0.2, temperature=0.5, beta=0.7)
    X = torch.randn(15, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows, identity = unroll.climb(X, kind, config), torch.eye(15, dtype=torch.float64)

    def bound(U, L):  # with the large determinant
        K = U @ U.T + 0.7 * identity
        return -0.5 * torch.trace(L @ K) + 7.5 * torch.linalg.slogdet(K).logabsdet

    first = None
    for step in range(3):
        U = F.layer_norm(X, (5,))
        A = (U @ U.T / 5 / 0.5).softmax(1)
        L, row = identity - A, rows[step]
        first = L if first is None else first
        assert row["bound"] == pytest.approx(float(bound(U, L)), rel=1e-5) and row["bound_first"] == pytest.approx(float(bound(U, first)), rel=1e-5)
        assert row["dirichlet"] == pytest.approx(float(torch.trace(U.T @ L @ U) / torch.trace(U.T @ U)), rel=1e-5)
        if kind == "gradient":
            leaf = U.clone().requires_grad_()
            X = X + 0.2 * torch.autograd.grad(bound(leaf, L), leaf)[0]
        else:
            X = X + {"A": A, "A-I": -L, "-(A-I)": L}[kind] @ U * 0.2
        if step < 2:
            gain = float(bound(F.layer_norm(X, (5,)), L) - bound(U, L))
            assert row["gain"] == pytest.approx(gain, rel=1e-4, abs=1e-4)
            assert row["gain_data"] + row["gain_log_det"] == pytest.approx(row["gain"], abs=1e-9)
    assert "gain" not in rows[-1]


# ---------------------------------------------------------------------------------------------------------------------------------
# The program


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "unroll.py"), *args], capture_output=True, text=True, timeout=200)


def test_the_program_writes_its_report_and_figures(tmp_path):
    done = command(f"--out_dir={tmp_path}", "--n=300", "--seeds=2", "--steps=3", "--latent_dim=32")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy.png", "inference.png", "latents.png", "report.json", "report.md", "steps.gif",
    }  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == 300 and list(report["summary"]) == ["before", "A, after", "A − I, after", "PCA", "SpectralEmbedding"]
    pictures, digits = unroll.load_pictures("digits")
    for seed, found in zip((1, 2), report["summary"]["A − I, after"]["knn_2"]["values"], strict=True):
        chosen, labels = unroll.draw_pictures(pictures, digits, 300, seed)
        seen = unroll.unroll(unroll.theory_block(32, "A-I", 0.1, 0.5, 0.0), unroll.first_latents(chosen, 32, seed), 3)
        assert unroll.knn_accuracy(seen[-1][:, :2].numpy(), labels, 10) == pytest.approx(found, abs=0.02)  # another number of threads
    change = report["change"]["A-I"]["knn_2"]
    assert change["mean"] == pytest.approx(report["summary"]["A − I, after"]["knn_2"]["mean"] - report["summary"]["before"]["knn_2"]["mean"])
    assert len(report["climb"]["A"]) == 2 and len(report["climb"]["A"][0]) == 4
    assert "Is it inference?" in (tmp_path / "report.md").read_text() and (tmp_path / "steps.gif").read_bytes().startswith(b"GIF8")


@pytest.mark.parametrize("args,words", [
    (["--dataset=cifar"], "--dataset=cifar must be digits or mnist"), (["--arm=A+I"], "--arm=A+I must be A or A-I or both"),
    (["--steps=0"], "--steps=0 must be between 1 and"), (["--temperature=0"], "--temperature=0.0 must be a positive"),
    (["--temprature=1"], "perhaps you meant 'temperature'"), (["--n=50"], "--n=50 must be between 100 and"), (["--eta=nan"], "--eta=nan must be"),
    (["--eta=x"], "--eta=x is not of type float"), (["mnist"], "'mnist' is neither an option"),
])  # fmt: skip
def test_bad_input_is_one_line(args, words):
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        unroll.configure(UnrollConfig, args)
    assert words in str(caught.value)


def test_a_directory_with_a_training_run_is_left_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="holds a run of train.py"):
        unroll.main(UnrollConfig(out_dir=str(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------------------
# data/mnist/prepare.py


@pytest.fixture
def prepare(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("prepare_mnist", ROOT / "data" / "mnist" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare_mnist", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def idx(array: np.ndarray) -> bytes:
    """The idx format of a uint8 array."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture
def small(prepare, monkeypatch, tmp_path):
    """A folder with 20 and 10 pictures instead of the official files, whose sizes and checksums the module takes for official."""
    import hashlib

    draw, folder = np.random.default_rng(0), tmp_path / "source"
    folder.mkdir()
    arrays = {}
    for start, n in (("train", 20), ("t10k", 10)):
        arrays[f"{start}-images-idx3-ubyte"] = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{start}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    files = {}
    for name, array in arrays.items():
        content = idx(array)
        files[name] = len(content), hashlib.sha256(content).hexdigest(), 0, ""
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(prepare, "FILES", files)
    return folder, arrays


def test_mnist_is_written_as_pictures_of_three_equal_channels(prepare, small, tmp_path, capsys):
    folder, arrays = small
    name = "t10k-images-idx3-ubyte"
    (folder / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))  # an unpacked one will do
    (folder / f"{name}.gz").unlink()
    prepare.prepare(prepare.PrepareConfig(source=str(folder), out_dir=str(tmp_path / "out")))
    data = unroll.Pictures(str(tmp_path / "out"), patch_size=4, pad=0, flip=False, device="cpu")
    assert data.image_size == 28 and data.n_classes == 10
    for split, start in (("train", "train"), ("val", "t10k")):
        pictures, labels = data.split[split]
        for channel in range(3):
            np.testing.assert_array_equal(pictures[:, channel], arrays[f"{start}-images-idx3-ubyte"])
        np.testing.assert_array_equal(labels, arrays[f"{start}-labels-idx1-ubyte"])


@pytest.mark.parametrize("damage", ["missing", "cut", "changed", "no gzip"])
def test_files_that_are_not_the_official_ones_are_refused(prepare, small, tmp_path, damage):
    path = small[0] / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = gzip.compress(gzip.decompress(content)[:-1] + b"\7")
        path.write_bytes({"cut": content[:-9], "changed": changed, "no gzip": b"<html>404</html>"}[damage])
    with pytest.raises(InputError, match="train-labels-idx1-ubyte.gz") as caught:
        prepare.prepare(prepare.PrepareConfig(source=str(small[0]), out_dir=str(tmp_path / "out")))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_shared_mnist_is_the_official_one(prepare, tmp_path):
    folder = next((path for path in (ROOT.parent / "shared" / "data" / "mnist", ROOT / "shared" / "data" / "mnist") if path.is_dir()), None)
    if folder is None:
        pytest.skip("MNIST's files are not beside this repository")
    assert all(len(prepare.content_of(folder, name)) == size for name, (size, *_) in prepare.FILES.items())


def test_mnist_by_folder_only(prepare, tmp_path):
    with pytest.raises(InputError, match="is neither download nor a folder"):
        prepare.prepare(prepare.PrepareConfig(source=str(tmp_path / "none")))
    assert math.isclose(sum(size for _, _, size, _ in prepare.FILES.values()), 11_594_722)


def test_a_report_of_something_else_is_never_replaced(tmp_path):
    config = unroll.UnrollConfig(out_dir=str(tmp_path / "out"), n=200)
    out = tmp_path / "out"
    assert unroll.report_of_another(config, out) == ""
    out.mkdir()
    (out / "latents.png").write_bytes(b"")  # of a killed run
    assert unroll.report_of_another(config, out) == ""
    (out / "report.md").write_text("mine")
    assert unroll.report_of_another(config, out) == "something else"
    longer = dataclasses.replace(config, n=300, steps=config.steps + 1)
    for theirs, what in ((config, ""), (longer, "other values of n, steps"), (dataclasses.replace(config, overwrite=True), "")):
        (out / "report.json").write_text(json.dumps({"config": dataclasses.asdict(theirs)}))
        assert unroll.report_of_another(config, out) == what
    (out / "report.json").write_text("[]")
    assert unroll.report_of_another(config, out) == "something else"
    with pytest.raises(InputError, match="--overwrite=True replaces it"):
        unroll.main(config)
    assert (out / "report.md").read_text() == "mine"
