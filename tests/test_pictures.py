"""dataset.Pictures, model.ViT and their training, against loops over single pixels, patches and labels in float64 written here."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import build, run
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import dataset
import train
from configurator import InputError, TrainConfig
from dataset import Pictures, Tokens, load, meta_json
from metrics import KEYS, read_metrics
from model import GPT, GPTConfig, ViT, ViTConfig
from pictures import FILES, PictureWriter


def prepared(directory: Path, train_pictures, train_labels, val_pictures, val_labels, classes: int) -> Path:
    """A data set of these (N, 3, S, S) pictures and their labels."""
    with PictureWriter(directory, train_pictures.shape[1:]) as writer:
        writer.add("train", np.asarray(train_pictures, dtype=np.uint8))
        writer.add("val", np.asarray(val_pictures, dtype=np.uint8))
        writer.finish({"train": train_labels, "val": val_labels}, [f"class {i}" for i in range(classes)], "the tests", {})
    return directory


def random_pictures(count: int, size: int, seed: int) -> np.ndarray:
    """Channels of different mean and spread."""
    draw = np.random.default_rng(seed)
    return np.stack([draw.integers(low, high, (count, size, size)) for low, high in ((0, 256), (100, 140), (200, 256))], axis=1).astype(np.uint8)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """20 + 11 pictures of 6 x 6 random pixels, 7 classes. No test changes it."""
    directory = tmp_path_factory.mktemp("noise")
    return prepared(directory, random_pictures(20, 6, 0), np.arange(20) % 7, random_pictures(11, 6, 1), np.arange(11) % 7, 7)


@pytest.fixture(scope="module")
def blobs(tmp_path_factory) -> Path:
    """210 + 53 pictures of 8 x 8, 7 classes that a small network can tell apart: a patch of one colour in a noisy picture. No test changes it."""
    draw = np.random.default_rng(5)
    splits = []
    for count in (210, 53):
        pictures, labels = draw.integers(60, 196, (count, 3, 8, 8)), draw.permutation(np.arange(count) % 7)
        for picture, label in zip(pictures, labels):
            top, left = draw.integers(1, 4, 2)
            for channel in range(3):
                picture[channel, top : top + 4, left : left + 4] = 255 * (label + 1 >> channel & 1)
        splits += [pictures, labels]
    return prepared(tmp_path_factory.mktemp("blobs"), *splits, 7)


def raw(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels as they are in the files."""
    size = json.loads((directory / "meta.json").read_text())["shape"][1]
    pictures = np.frombuffer((directory / f"{split}.bin").read_bytes(), dtype=np.uint8).reshape(-1, 3, size, size)
    return pictures, np.frombuffer((directory / f"{split}_labels.bin").read_bytes(), dtype="<u2").astype(np.int64)


def scale(directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over the training pictures, from the pixels, for values from 0 to 1."""
    values = raw(directory, "train")[0].astype(np.float64) / 255
    return values.mean((0, 2, 3)), np.maximum(values.std((0, 2, 3)), 1 / 255)


def picture_by_loops(directory: Path, picture: np.ndarray, down: int = 0, right: int = 0, flip: bool = False) -> np.ndarray:
    """One pixel at a time in float64: the mirror image of the picture, then the window that begins at (down, right), then the scaling."""
    mean, std = scale(directory)
    size = picture.shape[-1]
    result = np.zeros((3, size, size))
    for channel in range(3):
        for i in range(size):
            for j in range(size):
                row, column = i + down, j + right
                if 0 <= row < size and 0 <= column < size:
                    pixel = picture[channel, row, size - 1 - column if flip else column]
                    result[channel, i, j] = (float(pixel) / 255 - mean[channel]) / std[channel]
    return result


# ---------------------------------------------------------------------------------------------------------------------------------
# Training batches


def test_draws_are_a_pure_function_of_seed_and_step(noise):
    first, second = Pictures(noise, 2, 2, True, "cpu"), Pictures(str(noise), 3, 2, True, "cpu")
    keys = [(seed, step) for seed in (0, 1337, 2**63 - 1) for step in (0, 1, 2, 10**6)]
    expected = {key: first.draw(*key, 32) for key in keys}
    for number, key in enumerate(reversed(keys)):  # another order, and the global generators somewhere else
        np.random.seed(number)
        torch.manual_seed(number)
        assert np.array_equal(second.draw(*key, 32), expected[key])
    assert len({drawn.tobytes() for drawn in expected.values()}) == len(keys)
    assert all(drawn.dtype == np.int64 and drawn.shape == (32, 4) for drawn in expected.values())


def test_draws_cover_pictures_shifts_and_flips_evenly(noise):
    data = Pictures(noise, 2, 2, True, "cpu")
    drawn = np.concatenate([data.draw(0, step, 100) for step in range(100)])
    for column, low, places in ((0, 0, 20), (1, -2, 5), (2, -2, 5), (3, 0, 2)):
        counts = np.bincount(drawn[:, column] - low)
        assert len(counts) == places
        assert np.abs(counts - 10_000 / places).max() < 4 * (10_000 * (1 / places) * (1 - 1 / places)) ** 0.5
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 4 / 10_000**0.5  # drawn independently of each other


def test_without_augmentation_nothing_is_shifted_or_flipped(noise):
    plain = Pictures(noise, 2, 0, False, "cpu").draw(3, 4, 200)
    assert not plain[:, 1:].any() and len(set(plain[:, 0])) == 20
    assert set(Pictures(noise, 2, 0, True, "cpu").draw(3, 4, 200)[:, 3]) == {0, 1}
    assert np.array_equal(Pictures(noise, 2, 5, True, "cpu").draw(3, 4, 200)[:, 0], plain[:, 0])  # the same pictures with and without


def test_a_batch_equals_the_loops_over_pixels(noise):
    data = Pictures(noise, 2, 9, True, "cpu")
    pictures, labels = raw(noise, "train")
    draws = [(i % 20, down, right, flip) for i, (down, right, flip) in enumerate(np.ndindex(5, 5, 2))]
    draws = [(which, down - 2, right - 2, flip) for which, down, right, flip in draws]
    draws += [(0, 5, -5, 0), (1, -6, 0, 0), (2, 0, 6, 1), (3, 9, -9, 1)]  # as far as the picture is wide, and farther
    x, y = data.batch(torch.tensor(draws))
    assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (54, 3, 6, 6) and x.is_contiguous()
    assert y.tolist() == [labels[which] for which, *_ in draws]
    expected = np.stack([picture_by_loops(noise, pictures[which], down, right, flip == 1) for which, down, right, flip in draws])
    assert np.abs(x.numpy() - expected).max() < 1e-6
    assert np.array_equal(x.numpy() == 0, expected == 0)  # the mean colour outside is exactly 0, and no pixel of the picture is
    assert not x[51:].any()  # nothing of these three is left


def picture_by_numpy(data: Pictures, picture: np.ndarray, down: int, right: int, flip: int) -> np.ndarray:
    """Mirrored, padded, cut and scaled in float32, in this order of operations; the padding is 0 after the scaling."""
    picture = picture[:, :, ::-1] if flip else picture
    scaled = (picture.astype(np.float32) / np.float32(255) - data.mean.numpy()) / data.std.numpy()
    size, pad = picture.shape[-1], max(abs(down), abs(right))
    return np.pad(scaled, ((0, 0), (pad, pad), (pad, pad)))[:, pad + down : pad + down + size, pad + right : pad + right + size]


@pytest.mark.parametrize("table", [True, False], ids=["table", "computed"])
@pytest.mark.parametrize("pad, flip", [(0, False), (0, True), (1, False), (3, True), (8, True)])
@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_batch_equals_padding_cutting_and_mirroring_to_the_bit(size, pad, flip, table, tmp_path, monkeypatch):
    """Every shift and both directions; the other way round, draws that are made cover just these."""
    directory = prepared(tmp_path, random_pictures(11, size, 6), np.arange(11) % 3, random_pictures(2, size, 7), [0, 1], 3)
    monkeypatch.setattr(dataset, "TABLE", 16 * (2 * pad + 1) ** 2 * (1 + flip) * size**2 - (not table))  # bytes: just enough, or one too few
    data, pictures = Pictures(directory, 1, pad, flip, "cpu"), raw(directory, "train")[0]
    assert (data.windows is None) == (not table)
    if table:
        assert data.windows.nbytes == dataset.TABLE
    draws = [(i % 11, down - pad, right - pad, mirrored) for i, (down, right, mirrored) in enumerate(np.ndindex(2 * pad + 1, 2 * pad + 1, 1 + flip))]
    x, y = data.batch(torch.tensor(draws))
    expected = np.stack([picture_by_numpy(data, pictures[which], *how) for which, *how in draws])
    assert x.dtype == torch.float32 and np.array_equal(x.numpy(), expected) and y.tolist() == [which % 3 for which, *_ in draws]
    assert not pad or (expected == 0).any()
    reach = data.draw(0, 0, 5000)[:, 1:]
    assert np.abs(reach[:, :2]).max() == pad and reach[:, 2].max() == flip


def test_every_byte_is_normalised_to_the_bit(noise):
    """In training and in validation, by the arithmetic written in `normalise`."""
    data = Pictures(noise, 3, 0, False, "cpu")
    every = np.tile(np.arange(288, dtype=np.uint8), (3, 1)).reshape(3, 8, 6, 6).transpose(1, 0, 2, 3).copy()  # all 256 in every channel
    data.split = {name: (torch.from_numpy(every), torch.arange(8) % 7) for name in ("train", "val")}
    expected = (every.astype(np.float32) / np.float32(255) - data.mean.numpy()) / data.std.numpy()
    assert np.array_equal(data.normalise(torch.from_numpy(every)).numpy(), expected)
    assert np.array_equal(data.batch(torch.tensor([(i, 0, 0, 0) for i in range(8)]))[0].numpy(), expected)
    (first, *_), (second, *_) = data.validation(5)
    assert np.array_equal(torch.cat((first, second))[:8].numpy(), expected) and second.is_contiguous()


def test_a_batch_is_few_operations(noise):
    """Each is a kernel on a GPU, whose start takes as long as its work: six that compute, and views."""
    data, views = Pictures(noise, 2, 2, True, "cpu"), {"unbind", "select", "slice", "view", "expand", "expand_as", "flatten", "unsqueeze", "reshape"}
    drawn = torch.from_numpy(data.draw(0, 0, 9))

    class Counted(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Counted() as counted:
        data.batch(drawn)
    assert sorted(set(counted.names) - views) == ["add", "gather", "index"]
    assert len([name for name in counted.names if name not in views]) == 6


def test_no_shift_and_no_flip_is_the_picture_with_mean_0_and_deviation_1(noise):
    x, _ = Pictures(noise, 2, 2, True, "cpu").batch(torch.tensor([(i, 0, 0, 0) for i in range(20)]))
    x = x.double()
    assert x.mean((0, 2, 3)).abs().max() < 1e-6
    assert (x.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    assert x[3, 0, 1].argsort().tolist() == np.argsort(raw(noise, "train")[0][3, 0, 1].astype(int), kind="stable").tolist()


def test_a_constant_channel_is_0_and_elsewhere_finite(tmp_path):
    pictures, other = random_pictures(6, 4, 2), random_pictures(3, 4, 3)
    pictures[:, 1], other[:, 1] = 77, 79
    data = Pictures(prepared(tmp_path, pictures, [0, 1] * 3, other, [0, 1, 0], 2), 2, 1, True, "cpu")
    x, _ = data.batch(torch.tensor([(i, 1, 0, 1) for i in range(6)]))
    assert x.isfinite().all() and x[:, 1].abs().max() < 1e-4 and x[:, 0].abs().max() > 1
    x = next(data.validation(3))[0]
    assert (x[:, 1] - 2).abs().max() < 1e-4  # a step of one value out of 255 is 1


def test_drawing_and_reading_leave_the_global_generators_and_the_data_alone(noise):
    data = Pictures(noise, 2, 2, True, "cpu")
    kept = data.split["train"][0].clone(), data.split["val"][0].clone()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    data.batch(torch.from_numpy(data.draw(1, 2, 8)))
    list(data.validation(4))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(data.split["train"][0], kept[0]) and torch.equal(data.split["val"][0], kept[1])


# ---------------------------------------------------------------------------------------------------------------------------------
# Validation


def validated(data: Pictures, *args) -> list[int]:
    """The numbers of the pictures that count: picture i has the red value i in its corner, and the label i mod 7."""
    found = []
    mean, std = float(data.mean[0]), float(data.std[0])
    for x, y, count in data.validation(*args):
        assert x.shape == (args[0], 3, data.image_size, data.image_size) and y.shape == (args[0],)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert 0 <= count <= args[0] and (y[:count] >= 0).all() and (y[count:] == -1).all()
        numbers = ((x[:count, 0, 0, 0].double() * std + mean) * 255).round().long().tolist()
        assert y[:count].tolist() == [number % 7 for number in numbers]
        found += numbers
    return found


def numbered(directory: Path, count: int) -> Path:
    """`count` pictures to validate on, of which picture i has the red value i in its corner."""
    pictures, others = random_pictures(count, 4, 4), random_pictures(7, 4, 5)
    pictures[:, 0, 0, 0] = np.arange(count)
    return prepared(directory, others, np.arange(7), pictures, np.arange(count) % 7, 7)


@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), world=st.integers(1, 5))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_picture_is_validated_exactly_once(tmp_path_factory, count, batch_size, world):
    data = Pictures(numbered(tmp_path_factory.mktemp("validated"), count), 2, 2, True, "cpu")
    ranks = [validated(data, batch_size, 0, rank, world) for rank in range(world)]
    assert sorted(sum(ranks, [])) == list(range(count))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    batches = {len(list(data.validation(batch_size, 0, rank, world))) for rank in range(world)}
    assert batches == {math.ceil(math.ceil(count / world) / batch_size)}  # equally many, none too many: a rank's last may be empty


@pytest.mark.parametrize("eval_tokens", [1, 3, 4, 7, 8, 12, 40, 131, 132, 133, 10**9])
@pytest.mark.parametrize("world, batch_size", [(1, 1), (1, 5), (3, 4)])
def test_eval_tokens_takes_evenly_spaced_pictures(tmp_path, eval_tokens, world, batch_size):
    data = Pictures(numbered(tmp_path, 33), 2, 2, True, "cpu")  # 4 tokens each
    found = sorted(number for rank in range(world) for number in validated(data, batch_size, eval_tokens, rank, world))
    wanted = min(33, max(1, eval_tokens // 4))
    assert len(set(found)) == len(found) == wanted
    for j, number in enumerate(found):  # the nearest picture to j / (wanted - 1) of the way from the first to the last
        assert 2 * abs(number * (wanted - 1) - j * 32) <= wanted - 1


def test_validation_is_not_augmented(noise):
    x, y, count = next(Pictures(noise, 2, 2, True, "cpu").validation(11))
    pictures, labels = raw(noise, "val")
    assert count == 11 and y.tolist() == labels.tolist()
    assert np.abs(x.numpy() - np.stack([picture_by_loops(noise, picture) for picture in pictures])).max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------------------
# Data that cannot be used


def refused(directory: Path, patch_size: int = 2) -> str:
    """The message with which a data set is refused."""
    with pytest.raises(InputError) as error:
        Pictures(directory, patch_size, 2, True, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(noise, tmp_path) -> Path:
    shutil.copytree(noise, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(directory: Path, change):
    """meta.json after change(meta)."""
    meta = json.loads((directory / "meta.json").read_text())
    change(meta)
    (directory / "meta.json").write_bytes(meta_json(meta))


def test_attributes(noise):
    data, meta = Pictures(noise, 3, 2, True, "cpu"), json.loads((noise / "meta.json").read_text())
    assert (data.n_classes, data.image_size, data.block_size) == (7, 6, 4)
    assert data.tokenizer == {"type": "pictures", **{key: meta[key] for key in ("class_names", "mean", "std", "shape")}}
    digests = {name: hashlib.sha256((noise / f"{name}.bin").read_bytes()).hexdigest() for name in ("train", "val", "train_labels", "val_labels")}
    assert data.checksum == digests


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy, name):
    assert Pictures(copy, 2, 2, True, "cpu").n_classes == 7
    (copy / name).unlink()
    message = refused(copy)
    assert str(copy / name) in message and "prepare.py" in message


@pytest.mark.parametrize("name, size", [("train.bin", 20 * 108), ("val.bin", 11 * 108), ("train_labels.bin", 40), ("val_labels.bin", 22)])
@pytest.mark.parametrize("change", [-2, -1, 1, 108])
def test_wrong_size(copy, name, size, change):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    message = refused(copy)
    assert str(copy / name) in message and f"{size + change} bytes" in message and f"says {size}:" in message


@pytest.mark.parametrize("name, place", [("train.bin", 0), ("train.bin", 2159), ("val.bin", 500), ("train_labels.bin", 0), ("val_labels.bin", 20)])
def test_flipped_bit(copy, name, place):
    content = bytearray((copy / name).read_bytes())
    content[place] ^= 1
    (copy / name).write_bytes(content)
    message = refused(copy)
    assert str(copy / name) in message and "sha256" in message


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("label", [7, 65535])
def test_label_beyond_the_classes(copy, split, label):
    labels = raw(copy, split)[1].astype("<u2")
    for good, last in ((True, 6), (False, label)):
        labels[3] = last
        (copy / f"{split}_labels.bin").write_bytes(labels.tobytes())
        rewrite(copy, lambda meta: meta["splits"][split].update(labels_sha256=hashlib.sha256(labels.tobytes()).hexdigest()))
        if good:
            Pictures(copy, 2, 2, True, "cpu")
    message = refused(copy)
    assert str(copy / f"{split}_labels.bin") in message and "7 classes" in message


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_picture(copy, split):
    empty = hashlib.sha256(b"").hexdigest()
    for name in (f"{split}.bin", f"{split}_labels.bin"):
        (copy / name).write_bytes(b"")
    rewrite(copy, lambda meta: meta["splits"].update({split: {"pictures": 0, "sha256": empty, "labels_sha256": empty}}))
    message = refused(copy)
    assert str(copy / f"{split}_labels.bin") in message and "no picture" in message


@pytest.mark.parametrize("patch_size", [4, 5, 7, 12])
def test_patches_that_do_not_divide_the_picture(noise, patch_size):
    message = refused(noise, patch_size)
    assert f"--patch_size={patch_size} " in message and "6 pixels" in message


@pytest.mark.parametrize(
    "path",
    [
        *[(key,) for key in ("kind", "classes", "shape", "class_names", "mean", "std", "splits")],
        *[("splits", split, key) for split in ("train", "val") for key in ("pictures", "sha256", "labels_sha256")],
    ],
    ids=" ".join,
)
def test_meta_without_a_key(copy, path):
    def forget(meta):
        for key in path[:-1]:
            meta = meta[key]
        del meta[path[-1]]

    rewrite(copy, forget)
    message = refused(copy)
    assert str(copy / "meta.json") in message and path[-1] in message and "prepare.py" in message


@pytest.mark.parametrize(
    "change",
    [{"shape": 6}, {"shape": [3, 6]}, {"shape": [3, "6", 6]}, {"classes": "many"}, {"classes": None}, {"splits": []}, {"mean": "x"}, {"std": None}],
    ids=str,
)
def test_meta_of_wrong_types(copy, change):
    rewrite(copy, lambda meta: meta.update(change))
    assert str(copy / "meta.json") in refused(copy)


def test_kinds_of_data(noise, tokens_dir, copy):
    config = TrainConfig(dataset=str(noise), patch_size=3, crop_pad=0, flip=False)
    data = load(config, "cpu")
    assert isinstance(data, Pictures) and (data.block_size, data.pad, data.flip) == (4, 0, False)
    assert isinstance(load(dataclasses.replace(config, dataset=str(tokens_dir)), "cpu"), Tokens)
    rewrite(copy, lambda meta: meta.update(kind="sounds"))
    with pytest.raises(InputError, match="'sounds'"):
        load(dataclasses.replace(config, dataset=str(copy)), "cpu")


# ---------------------------------------------------------------------------------------------------------------------------------
# The network

SMALL = ViTConfig(image_size=6, patch_size=2, n_classes=7, n_layer=2, n_head=4, n_embd=16, bias=True)
ARMS = {
    "A": {},
    "A-I": {"diffusion": True},
    "scaled": {"diffusion": True, "diffusion_alpha": 0.7, "diffusion_lambda": 1.3},
    "no head": {"diffusion": True, "diffusion_heads": (0,)},
    "one head": {"diffusion": True, "diffusion_heads": (1,)},
    "by layer": {"diffusion": True, "diffusion_heads": (0, 3), "diffusion_lambda": 0.5},
}
EACH_ARM = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())


def noisy(model):
    """The model in float64, eval mode, with every parameter, biases and gains too, moved off its initial value."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def some_pictures(count: int = 3, size: int = 6, seed: int = 1):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_by_loops(model: ViT, pictures) -> torch.Tensor:
    """The forward pass from the parameters by name, one picture and one head at a time, with each head's full T x T matrix stored."""
    p, c = {name: parameter.detach() for name, parameter in model.named_parameters()}, model.config
    n, d = c.image_size // c.patch_size, c.n_embd // c.n_head

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p.get(name + ".bias", 0)

    def linear(x, name):
        return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)

    result = []
    for picture in pictures:
        tokens = []
        for i in range(n):  # patches by rows from the top left, in each patch channel after channel, in each channel by rows
            for j in range(n):
                pixels = [
                    picture[channel, i * c.patch_size + row, j * c.patch_size + column]
                    for channel in range(3)
                    for row in range(c.patch_size)
                    for column in range(c.patch_size)
                ]
                tokens.append(linear(torch.stack(pixels), "transformer.patch") + p["transformer.wpe.weight"][i * n + j])
        x = torch.stack(tokens)
        for layer in range(c.n_layer):
            h = f"transformer.h.{layer}."
            diffusing = c.n_head if c.diffusion_heads == () else c.diffusion_heads[layer % len(c.diffusion_heads)]
            qkv, heads = linear(norm(x, h + "ln_1"), h + "attn.c_attn"), []
            for head in range(c.n_head):
                q, k, v = (qkv[:, part * c.n_embd + head * d : part * c.n_embd + head * d + d] for part in range(3))
                A = torch.exp(q @ k.T / d**0.5)
                G = A / A.sum(1, keepdim=True)
                assert (G > 0).all()  # nothing is hidden from any patch
                if c.diffusion and head >= c.n_head - diffusing:
                    G = c.diffusion_lambda * (G - c.diffusion_alpha * torch.eye(n * n, dtype=torch.float64))
                heads.append(G @ v)
            x = x + linear(torch.cat(heads, 1), h + "attn.c_proj")
            wide = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
            x = x + linear(0.5 * wide * (1 + torch.erf(wide / 2**0.5)), h + "mlp.c_proj")
        result.append(p["lm_head.weight"] @ norm(x, "transformer.ln_f").mean(0))
    return torch.stack(result)


@EACH_ARM
@pytest.mark.parametrize("patch_size, bias", [(2, True), (3, False), (1, True), (6, True)])
def test_logits_equal_the_loops(arm, patch_size, bias):
    model = noisy(ViT(dataclasses.replace(SMALL, patch_size=patch_size, bias=bias, **arm)))
    pictures = some_pictures()
    with torch.no_grad():
        logits, loss = model(pictures)
        torch.testing.assert_close(logits, logits_by_loops(model, pictures), rtol=0, atol=1e-11)
        assert loss is None and logits.shape == (3, 7)
        assert torch.equal(model(pictures, torch.tensor([0, 6, 3]))[0], logits)


def test_patches_in_order_of_rows_and_channels():
    """A picture whose pixel (channel, row, column) is the number of its place, through a layer that hands one pixel of a patch on."""
    model = ViT(dataclasses.replace(SMALL, image_size=4, n_embd=12, n_head=1, n_layer=1)).double()
    seen = []
    with torch.no_grad():
        model.transformer.patch.weight.copy_(torch.eye(12))
        model.transformer.patch.bias.zero_()
        model.transformer.wpe.weight.zero_()
    model.transformer.drop.register_forward_hook(lambda module, args, x: seen.append(x.detach()))
    model(torch.arange(48.0, dtype=torch.float64).view(1, 3, 4, 4))
    first = [0, 1, 4, 5, 16, 17, 20, 21, 32, 33, 36, 37]
    assert seen[0][0].tolist() == [[pixel + corner for pixel in first] for corner in (0, 2, 8, 10)]


@EACH_ARM
def test_patches_without_positions_have_no_order(arm):
    model = noisy(ViT(dataclasses.replace(SMALL, **arm)))
    pictures = some_pictures()
    swapped = pictures.clone()
    swapped[:, :, 0:2, 0:2], swapped[:, :, 4:6, 2:4] = pictures[:, :, 4:6, 2:4], pictures[:, :, 0:2, 0:2]
    with torch.no_grad():
        assert (model(pictures)[0] - model(swapped)[0]).abs().max() > 1e-3
        model.transformer.wpe.weight.zero_()
        torch.testing.assert_close(model(pictures)[0], model(swapped)[0], rtol=0, atol=1e-11)  # a causal mask would show


def test_the_laplacian_of_equal_patches_is_zero():
    model = noisy(ViT(dataclasses.replace(SMALL, diffusion=True, bias=False)))
    seen = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
        model(torch.ones(2, 3, 6, 6, dtype=torch.float64))
        assert max(y.abs().max() for y in seen) < 1e-13
        model(some_pictures())
        assert min(y.abs().max() for y in seen[2:]) > 0.1


def test_arms_have_equal_parameters_and_weights_and_different_outputs():
    plain = ViT(SMALL)
    weights, pictures = dict(plain.named_parameters()), some_pictures().float()
    for name, arm in ARMS.items():
        model = ViT(dataclasses.replace(SMALL, **arm))
        others = dict(model.named_parameters())
        assert model.num_params() == plain.num_params() and others.keys() == weights.keys()
        assert all(torch.equal(others[key], weights[key]) for key in weights)
        assert torch.equal(model(pictures)[0], plain(pictures)[0]) == (name in ("A", "no head"))


def test_alpha_zero_lambda_one_is_attention_bit_for_bit():
    runs = []
    for arm in ({}, {"diffusion": True, "diffusion_alpha": 0.0}):
        model = ViT(dataclasses.replace(SMALL, **arm))
        logits, loss = model(some_pictures().float(), torch.tensor([1, 2, 3]))
        runs.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_loss_is_the_mean_over_the_labels_that_are_not_minus_one():
    model = noisy(ViT(SMALL))
    pictures, labels = some_pictures(5).requires_grad_(), torch.tensor([3, -1, 0, 6, -1])
    logits, loss = model(pictures, labels)
    terms = []
    for row, label in zip(logits.tolist(), labels.tolist()):
        if label >= 0:
            terms.append(math.log(sum(math.exp(z - max(row)) for z in row)) + max(row) - row[label])
    assert len(terms) == 3
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-6)  # the loss is float32
    gradient = torch.autograd.grad(loss, pictures)[0].abs().amax((1, 2, 3))
    assert torch.equal(gradient == 0, labels == -1)


@pytest.mark.parametrize("bias", [True, False])
def test_names_shapes_and_counts(bias):
    h = "transformer.h.0."
    expected = {
        "transformer.patch.weight": (16, 12), "transformer.patch.bias": (16,), "transformer.wpe.weight": (9, 16), "lm_head.weight": (7, 16),
        "transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,),
        h + "ln_1.weight": (16,), h + "ln_1.bias": (16,), h + "ln_2.weight": (16,), h + "ln_2.bias": (16,),
        h + "attn.c_attn.weight": (48, 16), h + "attn.c_attn.bias": (48,), h + "attn.c_proj.weight": (16, 16), h + "attn.c_proj.bias": (16,),
        h + "mlp.c_fc.weight": (64, 16), h + "mlp.c_fc.bias": (64,), h + "mlp.c_proj.weight": (16, 64), h + "mlp.c_proj.bias": (16,),
    }  # fmt: skip
    if not bias:
        expected = {name: shape for name, shape in expected.items() if not name.endswith("bias") or name == "transformer.patch.bias"}
    model = ViT(dataclasses.replace(SMALL, n_layer=1, bias=bias, diffusion=True))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    counted = sum(math.prod(shape) for shape in expected.values())
    assert model.num_params(non_embedding=False) == counted and model.num_params() == counted - 9 * 16
    assert model.flops_per_token() == 6 * (counted - 9 * 16) + 12 * 16 * 9


def test_initial_weights():
    config = ViTConfig(image_size=8, patch_size=4, n_classes=50, n_layer=3, n_head=4, n_embd=64, bias=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = ViT(config)
    fresh = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in fresh.items():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name
        else:
            z, n = parameter.double().flatten() / (0.02 / 6**0.5 if name.endswith("c_proj.weight") else 0.02), parameter.numel()
            assert abs(float(z.mean())) < 4 / n**0.5, name  # four standard errors of a normal sample; the seed is fixed
            assert abs(float(z.square().mean()) - 1) < 4 * (2 / n) ** 0.5, name
    model.init_weights(1)
    assert not any(torch.equal(p, fresh[name]) for name, p in model.named_parameters() if p.dim() > 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.init_weights(0)
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="image_size 6.*patch_size 4"):
        ViT(dataclasses.replace(SMALL, patch_size=4))
    with pytest.raises(ValueError, match="n_embd 16.*n_head 3"):
        ViT(dataclasses.replace(SMALL, n_head=3))


# ---------------------------------------------------------------------------------------------------------------------------------
# Training

TINY = dict(
    n_layer=2, n_head=2, n_embd=32, patch_size=2, crop_pad=1, batch_size=16, gradient_accumulation_steps=1, learning_rate=5e-3, warmup_iters=5,
    max_iters=60, eval_interval=20, log_interval=1, device="cpu", dtype="float32", compile=False,
)  # fmt: skip
NOISY = dict(dropout=0.1, diffusion=True, diffusion_heads=(2, 1), diffusion_alpha=0.9, bias=True)


def tiny(data: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(**TINY | {"dataset": str(data), "out_dir": str(out)} | changes).check()


def column(rows: list[dict], key: str) -> dict[int, float]:
    """{step: value} of the rows that have one."""
    return {row["step"]: row[key] for row in rows if row[key] is not None}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a checkpoint."""
    meta = checkpoint.read_meta(directory)
    return {f"{kind} {name}": t for kind in meta["files"] for name, t in checkpoint._read_tensors(directory, meta, kind).items()}


def plain_copy(program: train.Program) -> ViT:
    """The network of a program in float64, of plain modules."""
    model = ViT(program.model.config)
    model.load_state_dict(program.model.state_dict())
    return model.double().eval()


def scores_by_loops(model: ViT, directory: Path) -> dict[str, float]:
    """Loss, top 1 and top 5 over the validation pictures: how many classes have a larger logit than the right one."""
    pictures, labels = raw(directory, "val")
    total, first, five = 0.0, 0, 0
    for picture, label in zip(pictures, labels):
        row = logits_by_loops(model, torch.from_numpy(picture_by_loops(directory, picture))[None])[0].tolist()
        total += math.log(sum(math.exp(z - max(row)) for z in row)) + max(row) - row[label]
        above = sum(z > row[label] for z in row)
        first, five = first + (above < 1), five + (above < 5)
    return {"val_loss": total / len(labels), "top1": first / len(labels), "top5": five / len(labels)}


@pytest.fixture(scope="module")
def undisturbed(blobs, tmp_path_factory) -> Path:
    """A run of 60 steps with dropout on. No test changes it."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(tiny(blobs, out, **NOISY))
    return out


def test_the_model_learns_and_the_log_says_so(undisturbed):
    rows = read_metrics(undisturbed)
    assert all(list(row) == list(KEYS) for row in rows)
    curves = {key: column(rows, key) for key in ("val_loss", "top1", "top5")}
    assert all(list(curve) == [0, 20, 40, 60] for curve in curves.values())
    assert 1.9 < curves["val_loss"][0] < 2.0 and curves["val_loss"][60] < 1.0  # ln 7 = 1.95
    assert curves["top1"][0] < 0.4 and curves["top1"][60] > 0.6
    for row in rows:
        given = [key for key in KEYS if row[key] is not None]
        assert given == (["step", "train_loss", "ms", "tokens_per_s", "lr", "grad_norm"] if row["val_loss"] is None else ["step", *curves])
    assert sorted(column(rows, "train_loss")) == list(range(1, 61))


@pytest.mark.parametrize("batch_size, at_least", [(16, train.EVAL_TOKENS), (9, 1), (53, 1)])
def test_scores_equal_a_plain_count(blobs, tmp_path, undisturbed, monkeypatch, batch_size, at_least):
    monkeypatch.setattr(train, "EVAL_TOKENS", at_least)
    program = build(tiny(blobs, tmp_path, **NOISY | {"batch_size": batch_size, "init_from": "resume"}))
    assert train.start_state(program, 1337, undisturbed)[0] == 60
    if batch_size == 16:
        last = [row for row in read_metrics(undisturbed) if row["val_loss"] is not None][-1]
        assert program.evaluate() == {key: last[key] for key in ("val_loss", "top1", "top5")}
    with torch.no_grad():  # worse than it was, so that there is something to count
        for name, p in program.model.named_parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    expected = scores_by_loops(plain_copy(program), blobs)
    assert 0 < expected["top1"] < expected["top5"] < 1
    scores = program.evaluate()
    assert list(scores) == ["val_loss", "top1", "top5"]
    assert scores == pytest.approx(expected, rel=1e-6)


def test_with_fewer_than_five_classes_all_are_among_the_first_five(tmp_path):
    pictures = random_pictures(9, 4, 6)
    program = build(tiny(prepared(tmp_path / "data", pictures, [0, 1, 2] * 3, pictures[:5], [0, 1, 2, 0, 1], 3), tmp_path / "out"))
    program.model.init_weights(3)
    expected = scores_by_loops(plain_copy(program), tmp_path / "data")
    assert expected["top5"] == 1 and program.evaluate() == pytest.approx(expected, abs=1e-6)


def test_the_first_losses_and_gradients_are_those_of_the_loops(blobs, tmp_path):
    """Two batches of 4 a step, augmented, against the whole of 8 in float64; without dropout."""
    program = build(tiny(blobs, tmp_path, batch_size=4, gradient_accumulation_steps=2, diffusion=True))
    assert program.tokens == 8 * 16
    pictures, labels = raw(blobs, "train")
    for step in (0, 7):
        program.model.init_weights(11)
        model = plain_copy(program)
        drawn = program.data.draw(11, step, 8)
        x = torch.from_numpy(np.stack([picture_by_loops(blobs, pictures[i], down, right, flip == 1) for i, down, right, flip in drawn]))
        expected = torch.nn.functional.cross_entropy(logits_by_loops(model, x), torch.from_numpy(labels[drawn[:, 0]]))
        gradients = torch.autograd.grad(model(x, torch.from_numpy(labels[drawn[:, 0]]))[1], list(model.parameters()))
        loss, norm = program.step(11, step)
        assert float(loss) == pytest.approx(float(expected), abs=1e-6)
        assert float(norm) == pytest.approx(sum(float(g.square().sum()) for g in gradients) ** 0.5, rel=1e-5)


def test_equal_seeds_give_equal_runs_and_others_do_not(blobs, tmp_path):
    runs = [column(run(tiny(blobs, tmp_path / str(i), max_iters=8, seed=seed, **NOISY)), "train_loss") for i, seed in enumerate((1, 1, 2))]
    assert runs[0] == runs[1] and all(runs[0][step] != runs[2][step] for step in range(1, 9))


@pytest.mark.parametrize("stop", [13, 20])
def test_an_interrupted_run_resumes_exactly(blobs, tmp_path, undisturbed, stop):
    config = tiny(blobs, tmp_path, **NOISY)
    program = build(config)

    def interrupted(seed, i):
        if i == stop - 1:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)
        return program.step(seed, i)

    with pytest.raises(train.Interrupted):
        train.train(program._replace(step=interrupted), config.seed, tmp_path, quiet=True)
    assert checkpoint.read_meta(tmp_path / "last")["step"] == stop
    rows, expected = run(dataclasses.replace(config, init_from="resume")), read_metrics(undisturbed)
    for key in ("train_loss", "val_loss", "top1", "top5", "lr", "grad_norm"):
        assert column(rows, key) == column(expected, key)
    resumed, whole = tensors(tmp_path / "last"), tensors(undisturbed / "last")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_command_line_says_the_scores(blobs, tmp_path, capsys):
    config = tiny(blobs, tmp_path / "run", max_iters=2, eval_interval=2, warmup_iters=0)
    assert train.main(config) == 0
    last = [row for row in read_metrics(tmp_path / "run") if row["val_loss"] is not None][-1]
    out = capsys.readouterr().out
    assert f"step 2: val loss {last['val_loss']:.4f}, top1 {last['top1']:.2%}, top5 {last['top5']:.2%}\n" in out
    assert train.main(dataclasses.replace(config, eval_only=True, init_from="resume")) == 0
    assert f"step 2: val loss {last['val_loss']:.4f}, top1 {last['top1']:.2%}, top5 {last['top5']:.2%}\n" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_knows_its_kind(tmp_path, tokens_dir, noise):
    config = dataclasses.replace(SMALL, diffusion=True, diffusion_heads=(1, 2), diffusion_alpha=0.1)
    model, data = ViT(config), Pictures(noise, 2, 2, True, "cpu")
    model.init_weights(3)
    checkpoint.save(tmp_path / "best", model, None, 5, tokenizer=data.tokenizer)
    loaded, tokenizer, meta = checkpoint.load_model(tmp_path)
    assert type(loaded) is ViT and loaded.config == config and not loaded.training
    assert tokenizer is None and meta["kind"] == "pictures" and meta["tokenizer"] == data.tokenizer
    assert torch.equal(loaded(some_pictures().float())[0], model.eval()(some_pictures().float())[0])
    other = GPT(GPTConfig(block_size=4, vocab_size=3, n_layer=1, n_head=1, n_embd=4))
    checkpoint.save(tmp_path / "best", other, None, 6, tokenizer={"type": "char", "characters": "abc"})
    loaded, tokenizer, meta = checkpoint.load_model(tmp_path)
    assert type(loaded) is GPT and tokenizer.characters == "abc" and meta["kind"] == "tokens"


def test_a_finished_run_loads_with_its_scores(blobs, undisturbed, tmp_path):
    model, tokenizer, meta = checkpoint.load_model(undisturbed, "last")
    assert tokenizer is None and meta["step"] == 60 and meta["data"] == Pictures(blobs, 2, 1, True, "cpu").checksum
    assert scores_by_loops(model.double(), blobs)["val_loss"] == pytest.approx(meta["val_loss"], abs=1e-6)
    assert (model.config.diffusion_heads, model.config.n_classes, model.config.image_size) == ((2, 1), 7, 8)


@pytest.mark.parametrize(
    "changes, words",
    [({"patch_size": 4}, ["patch_size=2", "patch_size=4"]), ({"n_layer": 3, "diffusion_heads": ()}, ["n_layer=2", "n_layer=3"])],
    ids=str,
)
def test_resume_with_other_sizes_is_refused_by_name(blobs, undisturbed, changes, words):
    program = build(tiny(blobs, undisturbed, **NOISY | {"init_from": "resume"} | changes))
    with pytest.raises(InputError) as error:
        train.start_state(program, 1337, undisturbed)
    assert str(undisturbed / "last") in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "train_labels.bin", "val_labels.bin"])
def test_resume_on_other_pictures_or_labels_is_refused(blobs, tmp_path, undisturbed, name):
    splits = {f"{split}{kind}.bin": value.copy() for split in ("train", "val") for kind, value in zip(("", "_labels"), raw(blobs, split))}
    other = splits[name].reshape(-1)
    other[[0, 1]] = other[[1, 0]] if other[0] != other[1] else (other[0] + 1) % 7
    program = build(tiny(prepared(tmp_path, *splits.values(), 7), undisturbed, **NOISY | {"init_from": "resume"}))
    with pytest.raises(InputError, match="other data"):
        train.start_state(program, 1337, undisturbed)


@pytest.mark.parametrize("change", [{"mean": [0.5]}, {"std": [0.1, 0.2, 0.3, 0.4]}, {"mean": []}], ids=str)
def test_a_mean_that_has_not_three_numbers_is_refused(copy, change):
    rewrite(copy, lambda meta: meta.update(change))
    assert str(copy / "meta.json") in refused(copy)


@pytest.mark.parametrize("own", ["pictures", "tokens"])
def test_resume_of_the_other_kind_is_refused(blobs, tokens_dir, tmp_path, undisturbed, own):
    if own == "pictures":
        run(tiny(tokens_dir, tmp_path, max_iters=1, warmup_iters=0, block_size=8, batch_size=2, crop_pad=2))
        program, last = build(tiny(blobs, tmp_path, init_from="resume")), tmp_path
    else:
        program, last = build(tiny(tokens_dir, undisturbed, init_from="resume", block_size=8, crop_pad=2)), undisturbed
    with pytest.raises(InputError) as error:
        train.start_state(program, 1337, last)
    assert str(last / "last") in str(error.value)


def test_a_run_starts_from_the_weights_of_another(blobs, tmp_path, undisturbed):
    program = build(tiny(blobs, tmp_path, init_from=str(undisturbed / "last"), **NOISY))
    assert train.start_state(program, 1, tmp_path) == (0, {})
    weights = checkpoint.read_weights(undisturbed / "last")[0]
    assert all(torch.equal(p, weights[name]) for name, p in program.model.named_parameters())


def test_weights_of_the_other_kind_are_refused(blobs, tokens_dir, tmp_path, undisturbed):
    run(tiny(tokens_dir, tmp_path, max_iters=1, warmup_iters=0, block_size=8, batch_size=2, crop_pad=2))
    with pytest.raises(InputError, match="holds a model of text, .* is pictures"):
        build(tiny(blobs, tmp_path / "new", init_from=str(tmp_path / "last")))
    with pytest.raises(InputError, match="holds a model of pictures, .* is text"):
        build(tiny(tokens_dir, tmp_path / "new", init_from=str(undisturbed / "last"), crop_pad=2))
