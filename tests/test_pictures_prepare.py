"""pictures.py, data/imagenet16/prepare.py and data/digits16/prepare.py: the three layouts of the source, hostile pickles, the writer."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pictures
from configurator import InputError, configure
from dataset import own_sha256
from pictures import PictureWriter

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "imagenet16"
FILES = {"train.bin", "val.bin", "train_labels.bin", "val_labels.bin", "meta.json"}
CORE = b"numpy._core.multiarray" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else b"numpy.core.multiarray"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


imagenet, digits = load_script("imagenet16"), load_script("digits16")


def prepare(source, out: Path, **keys) -> dict:
    """Runs imagenet16's preparation in this process; returns meta.json."""
    imagenet.prepare(configure(imagenet.PrepareConfig, [f"--source={source}", f"--out_dir={out}", *(f"--{k}={v}" for k, v in keys.items())]))
    return read_meta(out)


def read_meta(out: Path) -> dict:
    assert {path.name for path in out.iterdir()} == FILES  # nothing else is left either
    return json.loads((out / "meta.json").read_text())


def read(out: Path, split: str):
    """(N, 3, 16, 16) pictures and (N,) classes of a prepared split, after checking the counts and hashes in meta.json."""
    entry = json.loads((out / "meta.json").read_text())["splits"][split]
    content, labels = (out / f"{split}.bin").read_bytes(), (out / f"{split}_labels.bin").read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry["sha256"] and hashlib.sha256(labels).hexdigest() == entry["labels_sha256"]
    assert len(content) == 768 * entry["pictures"] and len(labels) == 2 * entry["pictures"]
    return np.frombuffer(content, np.uint8).reshape(-1, 3, 16, 16), np.frombuffer(labels, "<u2").astype(np.int64)


def snapshot(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(source, out: Path, *words: str, **keys) -> str:
    """The preparation must fail with one line that has these words, and leave `out` as it was. Returns the line."""
    before = snapshot(out) if out.exists() else None
    with pytest.raises(InputError) as error:
        prepare(source, out, **keys)
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000, line
    for word in words:
        assert word in line, line
    assert (snapshot(out) if out.exists() else None) == before
    return line


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 768), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------------------
# Writer


def write(out: Path, train: np.ndarray, val: np.ndarray, classes=(0, 1), labels=None, **more):
    labels = labels or {"train": np.arange(len(train)) % len(classes), "val": np.arange(len(val)) % len(classes)}
    with PictureWriter(out) as writer:
        for first in range(0, len(train), 3):
            writer.add("train", train[first : first + 3])
        writer.add("val", val)
        return writer.finish(labels, [str(name) for name in classes], "a test", {"file": "00"}, **more)


def test_writer_mean_std_and_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CHUNK", 4)
    train, val = noise(23), noise(5, 1)
    train[:, 256:512] //= 3
    train[7] = train[20] = train[2]  # two repetitions
    val[1], val[3] = train[2], train[11]
    val[4] = val[0]  # within val: not counted
    meta = write(tmp_path / "out", train, val, note="more")
    exact = train.reshape(23, 3, 256).astype(np.float64) / 255
    np.testing.assert_allclose(meta["mean"], exact.mean(axis=(0, 2)), rtol=1e-13)
    np.testing.assert_allclose(meta["std"], exact.std(axis=(0, 2)), rtol=1e-13)
    assert meta["duplicates"] == {"val_in_train": 2, "train_repeated": 2} and meta["note"] == "more"
    assert read_meta(tmp_path / "out") == meta | {"sha256": own_sha256(meta)}
    assert (read(tmp_path / "out", "train")[0].reshape(23, 768) == train).all()
    assert (read(tmp_path / "out", "val")[0].reshape(5, 768) == val).all()
    assert meta["kind"] == "pictures" and meta["dtype"] == "uint8" and meta["shape"] == [3, 16, 16] and meta["classes"] == 2
    with pytest.raises(TypeError):
        PictureWriter(tmp_path).add("train", train.astype(np.float32))


@pytest.mark.parametrize(
    ("classes", "labels", "words"),
    [
        (("a",), None, "1 class:"),
        ((), {"train": [0] * 6, "val": [0] * 2}, "0 classes"),
        (("a", "b"), {"train": [0, 1, 2, 0, 1, 0], "val": [0, 1]}, "train labels 0..2 for 2 classes"),
        (("a", "b"), {"train": [0, 1, 0, 0, 1, 0], "val": [0, -1]}, "val labels -1..0"),
        (("a", "b"), {"train": [0, 1, 0, 0, 1], "val": [0, 1]}, "6 train pictures and 5 labels"),
        (("a", "b", "c", "d"), {"train": [0, 1, 0, 0, 1, 0], "val": [0, 1]}, "no train picture of class 'c' and 1 more"),
    ],
)
def test_writer_refuses(tmp_path, classes, labels, words):
    write(tmp_path, noise(4), noise(2))
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=words.replace(".", "[.]")):
        write(tmp_path, noise(6), noise(2), classes, labels)
    assert snapshot(tmp_path) == before


def test_writer_removes_what_it_made_and_only_that(tmp_path):
    with pytest.raises(InputError, match="no val pictures"):
        write(tmp_path / "new", noise(4), noise(0))
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write in"):
        write(tmp_path / "file", noise(4), noise(2))
    (tmp_path / "out" / "val.bin").mkdir(parents=True)
    with pytest.raises(InputError, match="is a directory"):
        write(tmp_path / "out", noise(4), noise(2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["val.bin"]


def test_writer_full_disk(tmp_path):
    write(tmp_path, noise(4), noise(2))
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="cannot write in .*No space left"), PictureWriter(tmp_path) as writer:
        writer.file["train"].close()
        writer.file["train"] = open("/dev/full", "wb", buffering=0)
        with writer.file["train"]:
            writer.add("train", noise(4))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("step", range(5))
def test_writer_stopped_between_the_renames(tmp_path, monkeypatch, step):
    """No mixture of old and new files is a data set: meta.json is not there until the last step."""
    write(tmp_path, noise(4), noise(2))
    replace, calls = os.replace, []

    def failing(source, target):
        if Path(target).parent == tmp_path:
            calls.append(target)
            if len(calls) == step + 1:
                raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match="prepare again"):
        write(tmp_path, noise(4, 2), noise(2, 3))
    assert not (tmp_path / "meta.json").exists() and Path(calls[-1]).name == pictures.FILES[step]
    monkeypatch.undo()
    write(tmp_path, noise(4, 2), noise(2, 3))
    assert (read(tmp_path, "train")[0].reshape(4, 768) == noise(4, 2)).all()


def test_writer_killed_and_one_at_a_time(tmp_path):
    write(tmp_path, noise(4), noise(2))
    before = snapshot(tmp_path)
    code = (
        "import sys, time, numpy as np; from pictures import PictureWriter\n"
        "with PictureWriter(sys.argv[1]) as writer:\n"
        "    writer.add('train', np.zeros((9000, 768), np.uint8)); print('writing', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(InputError, match="another process is writing"):
            write(tmp_path, noise(4, 2), noise(2, 3))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    left = snapshot(tmp_path)
    assert set(left) > set(before) and {name: left[name] for name in before} == before
    write(tmp_path, noise(4, 2), noise(2, 3))
    read_meta(tmp_path)  # and what the killed process left is gone


# ---------------------------------------------------------------------------------------------------------------------------------
# Pickles


def numpy_1(pickled: bytes) -> bytes:
    """A pickle of protocol 2 or 3 as numpy 1 writes it."""
    assert pickled[1] in (2, 3)
    return pickled.replace(CORE, b"numpy.core.multiarray")


def numpy_1_framed(pickled: bytes) -> bytes:
    """The same for protocol 4 and a pickle of one frame: the name and the frame have lengths."""
    assert pickled[1] == 4 and pickled[2:3] == pickle.FRAME and pickled.count(CORE) == 1
    old = b"numpy.core.multiarray"
    body = pickled[11:].replace(bytes([len(CORE)]) + CORE, bytes([len(old)]) + old)
    return pickled[:3] + struct.pack("<Q", len(body)) + body


def python_2(data: np.ndarray, labels: list[int]) -> bytes:
    """{'data', 'labels'} as cPickle of python 2 writes it in protocol 2: byte strings, numpy 1, dtype('u1', 0, 1)."""
    raw = data.tobytes()
    numbers = b"".join(b"M" + struct.pack("<H", label) for label in labels)
    shape = b"M" + struct.pack("<H", data.shape[0]) + b"M" + struct.pack("<H", data.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01bq\x04\x87Rq\x05(K\x01" + shape
    array += b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    return b"\x80\x02}q\x01(U\x04data" + array + b"U\x06labels]q\x08(" + numbers + b"eu."


DATA, LABELS = noise(6), [3, 1000, 1, 3, 7, 1]
BATCH = {"data": DATA, "labels": LABELS, "mean": DATA.mean(axis=0)}
STYLES = {
    **{f"protocol {protocol}": pickle.dumps(BATCH, protocol) for protocol in (2, 3, 4, 5)},
    "protocol 2, numpy 1": numpy_1(pickle.dumps(BATCH, 2)),
    "protocol 3, numpy 1": numpy_1(pickle.dumps(BATCH, 3)),
    "protocol 4, numpy 1": numpy_1_framed(pickle.dumps(BATCH, 4)),
    "python 2": python_2(DATA, LABELS),
    "bytes as keys": pickle.dumps({key.encode(): value for key, value in BATCH.items()}, 2),
    "labels as an array": pickle.dumps(BATCH | {"labels": np.array(LABELS, dtype=">i4")}, 4),
    "labels as scalars": pickle.dumps(BATCH | {"labels": [np.int64(label) for label in LABELS]}, 2),
    "Fortran order": pickle.dumps(BATCH | {"data": np.asfortranarray(DATA)}, 3),
    "Fortran order, protocol 5": pickle.dumps(BATCH | {"data": np.asfortranarray(DATA)}, 5),
    "not contiguous": pickle.dumps(BATCH | {"data": np.repeat(DATA, 2, axis=0)[::2]}, 5),
}


def read_bytes(pickled: bytes) -> dict:
    return imagenet.read_batch(io.BytesIO(pickled), len(pickled))


@pytest.mark.parametrize("style", STYLES)
def test_pickles_of_every_style(style):
    batch = read_bytes(STYLES[style])
    imagenet.check_pictures(batch["data"], "here")
    assert (batch["data"] == DATA).all()
    assert imagenet.check_labels(batch["labels"], 6, 1, 1000, "here").tolist() == LABELS
    if "mean" in batch:
        assert (batch["mean"] == BATCH["mean"]).all()


def test_styles_are_what_they_claim():
    assert pickle.loads(STYLES["python 2"], encoding="latin1")["labels"] == LABELS
    assert (pickle.loads(STYLES["python 2"], encoding="latin1")["data"] == DATA).all()
    for style, pickled in STYLES.items():
        assert (b"numpy.core." in pickled) == ("numpy 1" in style or style == "python 2" or CORE.startswith(b"numpy.core")), style
    assert b"_codecs" in STYLES["protocol 2"] and b"_frombuffer" in STYLES["protocol 5"]


class Call:
    """Pickles as a call of `function` with `args`, and then a state."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


class DictWithState(dict):
    def __reduce__(self):
        return (DictWithState, (), {"labels": 1}, None, iter([("data", 1)]))


def by_name(module: str, name: str, *args: str, protocol: int = 2) -> bytes:
    """A pickle {'data': module.name(*args)} for names that need not exist here."""
    arguments = b"".join(b"X" + struct.pack("<I", len(arg)) + arg.encode() for arg in args)
    if protocol < 4:
        function = f"c{module}\n{name}\n".encode()
    else:
        function = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name)) + b"\x93"
    return bytes([0x80, protocol]) + b"}X\x04\0\0\0data" + function + b"(" + arguments + b"tRs."


def hostile(mark: str) -> dict[str, bytes]:
    """Pickles that would create the file `mark`, or do other things that arrays do not need."""
    import numpy.testing

    shell, python = f"echo > '{mark}'", f"open({mark!r}, 'w').close()"
    rebuild = np.empty(1).__reduce__()[0]
    u1 = np.dtype("u1")
    found = {
        "posix.system": by_name(os.system.__module__, "system", shell),
        "os.system": pickle.dumps({"data": Call(os.system, shell)}, 2),
        "os.system, protocol 4": pickle.dumps({"data": Call(os.system, shell)}, 4),
        "instead of a dict": pickle.dumps(Call(os.system, shell), 3),
        "builtins.exec": pickle.dumps({"data": Call(exec, python)}, 3),
        "builtins.eval": pickle.dumps({"data": Call(eval, python)}, 4),
        "python 2's __builtin__.eval": by_name("__builtin__", "eval", python),
        "python 2's __builtin__.getattr": by_name("__builtin__", "getattr", "x", "upper"),
        "subprocess": pickle.dumps({"data": Call(subprocess.call, ["touch", mark])}, 4),
        "open": by_name("io", "open", mark, "w", protocol=4),
        "numpy.load": pickle.dumps({"data": Call(np.load, mark)}, 4),
        "numpy.fromfile": by_name("numpy", "fromfile", mark),
        "numpy.memmap": by_name("numpy", "memmap", mark, "u1", "w+"),
        "numpy.save": by_name("numpy", "save", mark, "x"),
        "numpy.testing.runstring": pickle.dumps({"data": Call(numpy.testing.runstring, python, {})}, 4),
        "numpy.f2py": by_name("numpy.f2py", "compile", "x"),
        "numpy's own os": by_name("numpy._core.multiarray", "os.system", shell, protocol=4),
        "through attributes": by_name("numpy._core.multiarray", "_reconstruct.__globals__", protocol=4),
        "through numpy": by_name("numpy", "os.system", shell, protocol=4),
        "numpy.core.multiarray.fromstring": by_name("numpy.core.multiarray", "fromstring", "x"),
        "_codecs.encode to another codec": by_name("_codecs", "encode", "x", "rot13"),
        "_codecs.encode without codec": by_name("_codecs", "encode", "x"),
        "_codecs.decode": by_name("_codecs", "decode", "x", "unicode_escape"),
        "_codecs.lookup": by_name("_codecs", "lookup", "x"),
        "copyreg": by_name("copyreg", "_reconstructor", "x", "x", "x"),
        "copyreg of python 2": by_name("copy_reg", "_reconstructor", "x", "x", "x"),
        "another array class": pickle.dumps({"data": Call(rebuild, np.memmap, (0,), b"b")}, 4),
        "another shape at first": pickle.dumps({"data": Call(rebuild, np.ndarray, (1 << 40,), b"b")}, 4),
        "another type at first": pickle.dumps({"data": Call(rebuild, np.ndarray, (0,), b"O")}, 4),
        "a class instead of an array": pickle.dumps({"data": Call(rebuild, os.system, (0,), b"b")}, 4),
        "numpy.ndarray called": pickle.dumps({"data": Call(np.ndarray, (1 << 40,))}, 4),
        "array of objects": pickle.dumps({"data": np.array([Call(os.system, shell)], dtype=object)}, 4),
        "array of dates": pickle.dumps({"data": np.zeros(2, "M8[s]")}, 4),
        "array of records": pickle.dumps({"data": np.zeros(2, [("a", "u1")])}, 4),
        "array of texts": pickle.dumps({"data": np.array(["x"])}, 4),
        "array with a state of a dict": pickle.dumps({"data": Call(rebuild, np.ndarray, (0,), b"b", state={"x": 1})}, 4),
        "array with the bytes of another": pickle.dumps({"data": Call(rebuild, np.ndarray, (0,), b"b", state=(1, (9, 768), u1, False, b"x"))}, 4),
        "array of negative shape": pickle.dumps({"data": Call(rebuild, np.ndarray, (0,), b"b", state=(1, (-1, -1), u1, False, b"x"))}, 4),
        "array of many axes": pickle.dumps({"data": Call(rebuild, np.ndarray, (0,), b"b", state=(1, (1,) * 99, u1, False, b"x"))}, 4),
        "scalar of an object": by_name("numpy.core.multiarray", "scalar", "x", "y"),
        "state on a name": b"\x80\x02}X\x04\0\0\0datac_codecs\nencode\nN}X\x01\0\0\0xK\x01s\x86bs.",
        "state on a class": b"\x80\x02}X\x04\0\0\0datacnumpy\nndarray\n}X\x01\0\0\0xK\x01sbs.",
        "state on a list": b"\x80\x02}X\x04\0\0\0data]}X\x01\0\0\0xK\x01sbs.",
        "a list called": b"\x80\x02}X\x04\0\0\0data])Rs.",
        "subclass of dict": pickle.dumps(DictWithState(), 2),
        "subclass of dict, protocol 4": pickle.dumps({"data": DictWithState()}, 4),
        "instance (opcode i)": b"\x80\x02(X" + struct.pack("<I", len(shell)) + shell.encode() + b"ios\nsystem\n.",
        "instance (opcode o)": b"\x80\x02(cos\nsystem\nX" + struct.pack("<I", len(shell)) + shell.encode() + b"o.",
        "new object (opcode 0x81)": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
        "extension registry": b"\x80\x02\x82\x01.",
        "persistent id": b"\x80\x02Pabc\n.",
        "buffers beside the pickle": b"\x80\x05\x97.",
        "nested keys": b"\x80\x02}" + b"K\x01" + b"2\x86" * 30 + b"K\x01s.",
        "nested keys without opcode 2": b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 200 + b"K\x01s.",
        "protocol 0": pickle.dumps({"data": Call(os.system, shell)}, 0),
        "protocol 1": pickle.dumps({"data": 1}, 1),
        "protocol 6": b"\x80\x06}.",
        "empty": b"",
        "cut": pickle.dumps(BATCH, 3)[:2000],
        "cut, protocol 4": pickle.dumps(BATCH, 4)[:2000],
        "not a pickle": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "a list": pickle.dumps([1, 2], 2),
        "length of a petabyte": b"\x80\x04}X\x04\0\0\0data\x8e" + struct.pack("<Q", 1 << 50) + b"x.",
        "bytearray of a petabyte": b"\x80\x05}X\x04\0\0\0data\x96" + struct.pack("<Q", 1 << 50) + b"x.",
        "one text encoded often": b"\x80\x02X\x00\x10\0\0" + b"a" * 4096 + b"q\x01" + b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R" * 999,
    }
    return found


@pytest.mark.parametrize("attack", list(hostile("mark")))
def test_hostile_and_damaged_pickles(tmp_path, attack):
    mark = tmp_path / "mark"
    pickled = hostile(str(mark))[attack]
    with pytest.raises(InputError) as error:
        read_bytes(pickled)
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert not mark.exists()
    if attack.startswith(("posix", "os.", "builtins", "python 2", "subprocess", "open", "numpy.f", "numpy.l", "numpy.t", "copyreg", "through")):
        assert "names " in str(error.value)  # refused for the name, before anything is called


def test_hostile_pickles_would_work(tmp_path):
    """The attacks are real: the standard library's unpickler runs them."""
    for attack in ("os.system", "os.system, protocol 4", "instead of a dict", "builtins.exec", "builtins.eval", "array of objects", "posix.system"):
        mark = tmp_path / attack.replace(" ", "_").replace(",", "")
        with contextlib.suppress(Exception):
            pickle.loads(hostile(str(mark))[attack])
        assert mark.exists(), attack


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02}r\xff\xff\xff\xff.",  # a memo of 4 billion places
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 50) + b"}.",  # a frame of a petabyte
        b"\x80\x04}\x8e" + struct.pack("<Q", 1 << 50) + b".",
        b"\x80\x05}\x96" + struct.pack("<Q", 1 << 34) + b".",
    ],
)
def test_stated_lengths_reserve_nothing(pickled):
    tracemalloc.start()
    with contextlib.suppress(InputError):
        assert read_bytes(pickled) == {}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_steps_are_limited(monkeypatch):
    monkeypatch.setattr(imagenet, "MAX_OPCODES", 1000)
    with pytest.raises(InputError, match="more than 1,000 steps"):
        read_bytes(b"\x80\x02" + b"}" * 1000 + b".")


# ---------------------------------------------------------------------------------------------------------------------------------
# Official batches


def make_batches(folder: Path, style=lambda batch: numpy_1(pickle.dumps(batch, 3)), classes=range(1, 1001), train=110, val=30):
    """Eleven batches; returns (train pictures, labels, val pictures, labels)."""
    folder.mkdir()
    classes = np.array(classes)
    everything = [[], [], [], []]
    for number, name in enumerate(imagenet.BATCHES):
        count = val if name == "val_data" else train
        data, labels = noise(count, number), classes[(np.arange(count) + number * train) % len(classes)]
        (folder / name).write_bytes(style({"data": data, "labels": labels.tolist(), "mean": data.mean(axis=0)}))
        everything[2 * (name == "val_data")].append(data)
        everything[2 * (name == "val_data") + 1].append(labels)
    return [np.concatenate(parts) for parts in everything]


@pytest.fixture(scope="module")
def batches(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batches") / "official"
    make_batches(folder, classes=(5, 17, 1000), train=6, val=4)
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_batches_of_all_classes(tmp_path, capsys):
    train, train_labels, val, val_labels = make_batches(tmp_path / "source")
    meta = prepare(tmp_path / "source", tmp_path / "out")
    pictures, classes = read(tmp_path / "out", "train")
    assert (pictures.reshape(-1, 768) == train).all() and (classes == train_labels - 1).all()
    pictures, classes = read(tmp_path / "out", "val")
    assert (pictures.reshape(-1, 768) == val).all() and (classes == val_labels - 1).all()
    assert meta["classes"] == 1000 and meta["label_numbers"] == list(range(1, 1001)) and "wnids" not in meta
    assert meta["splits"]["train"]["pictures"] == 1100 and meta["splits"]["val"]["pictures"] == 30
    exact = train.reshape(-1, 3, 256).astype(np.float64) / 255
    np.testing.assert_allclose(meta["mean"], exact.mean(axis=(0, 2)), rtol=1e-13)
    np.testing.assert_allclose(meta["std"], exact.std(axis=(0, 2)), rtol=1e-13)
    assert meta["source_sha256"].keys() == set(imagenet.BATCHES)
    assert meta["source_sha256"]["val_data"] == hashlib.sha256((tmp_path / "source" / "val_data").read_bytes()).hexdigest()
    said = capsys.readouterr().out
    assert "1,100 train and 30 val pictures of 1000 classes" in said and "occur" not in said


def test_batches_of_some_classes(batches, tmp_path, capsys):
    meta = prepare(batches, tmp_path / "out")
    assert meta["classes"] == 3 and meta["label_numbers"] == [5, 17, 1000] and meta["class_names"] == ["5", "17", "1000"]
    assert read(tmp_path / "out", "train")[1].tolist() == [0, 1, 2] * 20 and read(tmp_path / "out", "val")[1].tolist() == [0, 1, 2, 0]
    assert "3 of the 1000 official classes occur" in capsys.readouterr().out
    names = tmp_path / "names.txt"
    names.write_text("n00000001 5 first\nn00000002 17 second\nn00000003 1000 third\n")
    meta = prepare(batches, tmp_path / "out", classes=names)
    assert meta["class_names"] == ["first", "second", "third"] and meta["wnids"] == [f"n0000000{k}" for k in (1, 2, 3)]
    names.write_text("n00000001 5 first\nn00000002 17 second\n")
    refused(batches, tmp_path / "out", "no line for class number 1000", classes=names)
    refused(batches, tmp_path / "out", "cannot be read", classes=tmp_path / "absent.txt")
    beside = copy(batches, tmp_path / "beside")
    (beside / "classes.tsv").write_text("label200\tlabel_1_1000\twnid\tname\n0\t5\tn00000001\ta fish\n1\t17\tn00000002\tb\n2\t1000\tn00000003\tc\n")
    assert prepare(beside, tmp_path / "out")["class_names"] == ["a fish", "b", "c"]


def test_every_style_gives_the_same_files(tmp_path):
    def labelled(batch):
        return python_2(batch["data"], batch["labels"])

    styles = [lambda batch, protocol=protocol: pickle.dumps(batch, protocol) for protocol in (2, 3, 4, 5)] + [labelled]
    found = []
    for number, style in enumerate(styles):
        make_batches(tmp_path / f"source{number}", style, classes=(5, 17, 1000), train=6, val=4)
        prepare(tmp_path / f"source{number}", tmp_path / "out")
        found.append({name: content for name, content in snapshot(tmp_path / "out").items() if name != "meta.json"})
    assert all(files == found[0] for files in found)
    before = snapshot(tmp_path / "out")
    prepare(tmp_path / "source4", tmp_path / "out")
    assert snapshot(tmp_path / "out") == before  # and meta.json too, from the same source


def zips_of(batches: Path, folder: Path, inner: str = "", **more: bytes) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "Imagenet16_train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in imagenet.TRAIN_BATCHES:
            archive.write(batches / name, inner + name)
        for name, content in more.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(folder / "Imagenet16_val.zip", "w") as archive:
        archive.write(batches / "val_data", inner + "val_data")
    return folder


@pytest.mark.parametrize("inner", ["", "imagenet/16/"])
def test_archives(batches, tmp_path, inner):
    zips = zips_of(batches, tmp_path / "zips", inner)
    prepare(batches, tmp_path / "a")
    meta = prepare(zips, tmp_path / "b")
    prepare(f"{zips / 'Imagenet16_train.zip'},{zips / 'Imagenet16_val.zip'}", tmp_path / "c")
    a, b, c = (snapshot(tmp_path / name) for name in "abc")
    assert b == c and meta["source_sha256"].keys() == {"Imagenet16_train.zip", "Imagenet16_val.zip"}
    assert {k: v for k, v in a.items() if k != "meta.json"} == {k: v for k, v in b.items() if k != "meta.json"}
    assert sorted(path.name for path in zips.iterdir()) == ["Imagenet16_train.zip", "Imagenet16_val.zip"]  # nothing unpacked
    refused(zips / "Imagenet16_train.zip", tmp_path / "a", "lacks val_data")
    (zips / "Imagenet16_val.zip").unlink()
    refused(zips, tmp_path / "a", "lacks val_data")


def test_hostile_archives(batches, tmp_path, monkeypatch):
    prepare(batches, out := tmp_path / "out")
    for number, name in enumerate(("../val_data", "/etc/val_data", "a/../../b", "C:\\val_data", "a\\..\\b")):
        refused(zips_of(batches, tmp_path / f"zips{number}", **{name: b"x"}), out, "outside the archive")
    assert not (tmp_path.parent / "val_data").exists()
    refused(zips_of(batches, tmp_path / "twice", **{"other/train_data_batch_3": b"x"}), out, "train_data_batch_3 is there twice")
    refused(zips_of(batches, tmp_path / "both", val_data=b"x"), out, "val_data", "as well")
    zips = zips_of(batches, tmp_path / "damaged")
    content = bytearray((zips / "Imagenet16_train.zip").read_bytes())
    content[2000:2100] = bytes(100)
    (zips / "Imagenet16_train.zip").write_bytes(content)
    refused(zips, out, "train_data_batch_1")
    (zips / "Imagenet16_train.zip").write_bytes(b"PK" + bytes(100))
    refused(zips, out, "cannot be read as a zip archive")
    monkeypatch.setattr(imagenet, "MAX_BATCH", 1 << 16)
    refused(zips_of(batches, tmp_path / "bomb", **{"deep/val_data": bytes(1 << 17)}), out, "131,072 bytes unpacked")
    monkeypatch.setattr(imagenet, "MAX_BATCH", 1 << 10)
    refused(batches, out, "train_data_batch_1", "at most 1,024")


def damage(batch=None, **change):
    """Bytes of a batch of 6 pictures with some entries changed (None: absent)."""
    batch = {"data": noise(6), "labels": [5, 17, 1000] * 2} | change
    return pickle.dumps({key: value for key, value in batch.items() if value is not None}, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (damage(data=None), "no array 'data'"),
        (damage(data=[1, 2]), "no array 'data'"),
        (damage(data=np.zeros((6, 3072), np.uint8)), "(pictures of 32x32?)"),
        (damage(data=np.zeros((6, 700), np.uint8)), "shape (6, 700)"),
        (damage(data=np.zeros(768, np.uint8)), "shape (768,)"),
        (damage(data=np.zeros((6, 768))), "type float64"),
        (damage(labels=None), "no 'labels'"),
        (damage(labels="abcdef"), "no 'labels'"),
        (damage(labels=[1.0] * 6), "list of integers"),
        (damage(labels=[True] * 6), "list of integers"),
        (damage(labels=np.ones((6, 1), np.int64)), "list of integers"),
        (damage(labels=[5] * 5), "6 pictures and 5 labels"),
        (damage(labels=[5, 17, 1000, 0, 5, 5]), "label 0 (picture 3)"),
        (damage(labels=[5, 17, 1001, 0, 5, 5]), "label 1001 (picture 2)"),
        (damage(labels=[5, 17, 10**30, 0, 5, 5]), "1..1000"),
        (damage(labels=np.array([5, 17, 2**64 - 1, 0, 5, 5], np.uint64)), "1..1000"),
        (b"", "not a pickle"),
        (damage()[:-400], "cannot be read as a pickle"),
    ],
)
def test_damaged_batches(batches, tmp_path, content, words):
    source = copy(batches, tmp_path / "source")
    prepare(source, out := tmp_path / "out")
    (source / "train_data_batch_4").write_bytes(content)
    refused(source, out, "train_data_batch_4", words)
    refused(source, tmp_path / "new", words)
    assert not (tmp_path / "new").exists()


def test_incomplete_batches(batches, tmp_path):
    source = copy(batches, tmp_path / "source")
    prepare(source, out := tmp_path / "out")
    (source / "val_data").write_bytes(damage(labels=[6] * 6))
    refused(source, out, "class number 6")
    (source / "val_data").unlink()
    refused(source, out, "lacks val_data")
    for number in (2, 3, 5, 7, 10):
        (source / f"train_data_batch_{number}").unlink()
    refused(source, out, "lacks train_data_batch_2, train_data_batch_3, train_data_batch_5, train_data_batch_7, train_data_batch_10 and 1 more")
    source = copy(batches, tmp_path / "links")
    (source / "val_data").unlink()
    (source / "val_data").symlink_to(batches / "val_data")
    refused(source, out, "val_data is a symbolic link out of")
    (source / "val_data").unlink()
    (source / "val_data").symlink_to("train_data_batch_1")  # inside: as good as a copy
    prepare(source, out)
    (source / "val_data").unlink()
    os.mkfifo(source / "val_data")
    refused(source, out, "not a regular file")  # and does not wait for a writer
    one = tmp_path / "one"
    make_batches(one, classes=(5,), train=3, val=2)
    refused(one, out, "1 class:")


# ---------------------------------------------------------------------------------------------------------------------------------
# .npz


def make_npz(folder: Path, **changes):
    """Three classes; `changes` maps a file's stem to its changed arrays (None: absent)."""
    folder.mkdir(exist_ok=True)
    numbers = np.array([900, 20, 450])  # the order of labels200 is not the order of labels
    made = {}
    for seed, (stem, count) in enumerate((("train_a", 7), ("train_b", 5), ("val", 4))):
        classes = np.arange(count) % 3
        arrays = {"data": noise(count, seed), "labels": numbers[classes], "labels200": classes} | changes.get(stem, {})
        np.savez_compressed(folder / f"{stem}.npz", **{key: value for key, value in arrays.items() if value is not None})
        made[stem] = arrays
    rows = "".join(f"{k}\t{number}\tn{number:08}\tname {k}\n" for k, number in enumerate(numbers))
    (folder / "classes.tsv").write_text("label200\tlabel_1_1000\twnid\tname\n" + rows)
    return made


def test_npz(tmp_path, capsys):
    made = make_npz(tmp_path / "source")
    meta = prepare(tmp_path / "source", tmp_path / "out")
    pictures, classes = read(tmp_path / "out", "train")
    assert (pictures.reshape(-1, 768) == np.concatenate([made["train_a"]["data"], made["train_b"]["data"]])).all()
    assert classes.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1] and read(tmp_path / "out", "val")[1].tolist() == [0, 1, 2, 0]
    assert meta["class_names"] == ["name 0", "name 1", "name 2"] and meta["label_numbers"] == [900, 20, 450]
    assert meta["wnids"] == ["n00000900", "n00000020", "n00000450"]
    assert "12 train and 4 val pictures of 3 classes" in capsys.readouterr().out
    (tmp_path / "source" / "classes.tsv").unlink()
    assert prepare(tmp_path / "source", tmp_path / "out")["class_names"] == ["900", "20", "450"]


def test_damaged_npz(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    make_npz(source)
    prepare(source, out)
    for changes, words in (
        ({"train_b": {"labels": None}}, "no array 'labels'"),
        ({"train_b": {"data": noise(5).astype(np.int64)}}, "type int64"),
        ({"train_b": {"data": np.array([{}] * 5, dtype=object)}}, "train_b.npz cannot be read"),
        ({"val": {"data": noise(3)}}, "3 pictures and 4 labels"),
        ({"val": {"labels": np.zeros(4, np.int64)}}, "label 0"),
        ({"val": {"labels": np.array([900, 20, 451, 900])}}, "ties class 2"),
        ({"val": {"labels200": np.array([0, 1, 3, 0])}}, "labels200 must number the classes of train 0..2"),
        ({"val": {"labels200": np.array([0, 1, -1, 0])}}, "labels200 must lie in"),
        ({stem: {"labels200": np.arange(n) % 3 * 2} for stem, n in (("train_a", 7), ("train_b", 5), ("val", 4))}, "no picture of class 1"),
    ):
        make_npz(source, **changes)
        refused(source, out, words)
    make_npz(source)
    (source / "train_b.npz").write_bytes((source / "train_b.npz").read_bytes()[:3000])
    refused(source, out, "train_b.npz", "cannot be read")
    (source / "train_b.npz").unlink()
    refused(source, out, "lacks train_b.npz")


# ---------------------------------------------------------------------------------------------------------------------------------
# Folders of pictures


def save(path: Path, array, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def make_folders(root: Path) -> Path:
    """Two classes, one 20 x 24 picture of noise each and split, as PNG."""
    for number, name in enumerate(("train/cat/1", "train/dog/1", "val/cat/1", "val/dog/1")):
        save(root / f"{name}.png", np.random.default_rng(number).integers(0, 256, (24, 20, 3), dtype=np.uint8))
    return root


def first_train(root: Path, out: Path) -> np.ndarray:
    """(3, 16, 16): the first picture of train/cat."""
    prepare(root, out)
    return read(out, "train")[0][0]


def test_folders_and_colours(tmp_path):
    root, out = make_folders(tmp_path / "source"), tmp_path / "out"
    red = np.zeros((40, 60, 3), np.uint8)
    red[:, :, 0], red[:20, :, 1], red[:, 30:, 2] = 200, 100, 50  # all red, the upper half green too, the right half blue too
    save(root / "train" / "cat" / "0.bmp", red)
    save(root / "train" / "cat" / "2.jpg", red, quality=95, subsampling=0)
    (root / "train" / "cat" / ".hidden").write_text("passed over")
    meta = prepare(root, out)
    pictures, classes = read(out, "train")
    assert meta["class_names"] == ["cat", "dog"] and meta["classes"] == 2 and classes.tolist() == [0, 0, 0, 1]
    expected = np.zeros((3, 16, 16), np.uint8)
    expected[0], expected[1, :8], expected[2, :, 8:] = 200, 100, 50
    assert (pictures[0] == expected).all()
    assert np.abs(pictures[2].astype(int) - expected).max() <= 25 and np.abs(pictures[2].astype(int) - expected).mean() < 3
    lines = "".join(
        f"{hashlib.sha256((root / name).read_bytes()).hexdigest()}  {name}\n" for name in ("val/cat/1.png", "val/dog/1.png")
    )  # as sha256sum prints them
    assert meta["source_sha256"]["lines `sha256  val/CLASS/FILE`"] == hashlib.sha256(lines.encode()).hexdigest()
    before = snapshot(out)
    prepare(root, out)
    assert snapshot(out) == before


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 128), (16, 64), (24, 40), (50, 37), (333, 17), (16, 16), (5, 9)])
def test_box_reduction(tmp_path, height, width):
    """Against the mean over each box in float64: PIL's BOX takes the pixels whose centre lies in the box, and rounds after rows and columns."""
    root, picture = make_folders(tmp_path / "source"), np.random.default_rng(9).integers(0, 256, (height, width, 3), dtype=np.uint8)
    save(root / "train" / "cat" / "0.png", picture)
    found = first_train(root, tmp_path / "out").astype(np.float64)

    def weights(size):
        """(16, size): rows sum to 1."""
        distance = 16 * (2 * np.arange(size) + 1) - size * (2 * np.arange(16)[:, None] + 1)  # of the centres, in 1/32 of a pixel
        within = (distance > -max(size, 16)) & (distance <= max(size, 16))
        return within / within.sum(axis=1, keepdims=True)

    rows = np.floor(np.einsum("xw,hwc->hxc", weights(width), picture.astype(np.float64)) + 0.5 + 1e-9)
    twice = np.floor(np.einsum("yh,hxc->cyx", weights(height), rows) + 0.5 + 1e-9)
    assert np.abs(found - twice).max() <= 1 and (found != twice).mean() < 0.05  # halves: PIL's 1/20 has too few bits to round them up
    exact = np.einsum("yh,xw,hwc->cyx", weights(height), weights(width), picture.astype(np.float64))
    assert np.abs(found - exact).max() <= 1
    if height % 16 == 0 and width % 16 == 0:  # then a box is a block, and this the plain mean
        blocks = picture.reshape(16, height // 16, 16, width // 16, 3).astype(np.float64)
        np.testing.assert_allclose(exact, blocks.mean(axis=(1, 3)).transpose(2, 0, 1), atol=1e-9)


def test_modes(tmp_path):
    root, out = make_folders(tmp_path / "source"), tmp_path / "out"
    path = root / "train" / "cat" / "0.png"
    save(path, np.array([[[10, 20, 30]]], np.uint8))  # 1 x 1
    assert (first_train(root, out) == np.array([10, 20, 30])[:, None, None]).all()
    half = np.zeros((32, 32, 4), np.uint8)
    half[...] = 200, 100, 50, 128
    half[:16, :, 3] = 0
    save(path, half)  # over black: nothing above, half below
    found = first_train(root, out)
    assert (found[:, :8] == 0).all() and np.abs(found[:, 8:].astype(int) - np.array([100, 50, 25])[:, None, None]).max() <= 1
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 90, 80, 70])
    palette.save(path)
    assert (first_train(root, out) == np.array([90, 80, 70])[:, None, None]).all()
    palette.save(path, transparency=1)
    assert (first_train(root, out) == 0).all()
    save(path, np.full((20, 20), 40_000, np.uint16))  # 16-bit grey
    assert (first_train(root, out) == round(40_000 * 255 / 65535)).all()
    save(path, np.full((20, 20), 77, np.uint8))
    assert (first_train(root, out) == 77).all()
    Image.new("1", (20, 20), 1).save(path)
    assert (first_train(root, out) == 255).all()
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(path, format="JPEG", quality=95)  # a JPEG that calls itself PNG: content decides
    assert np.abs(first_train(root, out).astype(int) - np.array([255, 0, 0])[:, None, None]).max() <= 3
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees: ignored
    save(path, upright, exif=exif)
    assert (first_train(root, out)[:, :8] == 255).all() and (first_train(root, out)[:, 8:] == 0).all()


def test_unreadable_pictures(tmp_path, monkeypatch):
    root, out = make_folders(tmp_path / "source"), tmp_path / "out"
    prepare(root, out)
    whole = save(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    bad = root / "train" / "dog" / "0.jpg"
    for content in (whole[:700], whole[:20], b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        bad.write_bytes(content)
        assert "0x" not in refused(root, out, "1 file that is not a picture", "train/dog/0.jpg")
    for number in range(7):
        (root / "val" / "cat" / f"bad{number}.jpg").write_bytes(whole[:-300])
    line = refused(root, out, "8 files that are not pictures", "train/dog/0.jpg", "val/cat/bad3.jpg", "and 3 more", "truncated")
    assert "bad4" not in line
    for path in root.rglob("*.jpg"):
        path.unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    save(root / "train" / "dog" / "0.png", np.zeros((24, 24, 3), np.uint8))  # between once and twice the limit: PIL alone only warns
    refused(root, out, "0.png", "24 x 24 pixels", "PIL's limit")
    save(root / "train" / "dog" / "0.png", np.zeros((40, 40, 3), np.uint8))
    refused(root, out, "0.png", "DecompressionBombError")
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "MAX_FILE", 100)
    refused(root, out, "more than 100 bytes")


def test_folders_that_are_not_right(tmp_path):
    root, out = make_folders(tmp_path / "source"), tmp_path / "out"
    prepare(root, out)
    (root / "train" / "bird").mkdir()
    refused(root, out, "bird has no pictures")
    save(root / "train" / "bird" / "1.png", np.zeros((9, 9, 3), np.uint8))
    refused(root, out, "val lacks the class bird")
    (root / "train" / "bird").rename(root / "val" / "bird")
    refused(root, out, "train lacks the class bird")
    (root / "val" / "bird").rename(root / "val" / "cat" / "more")
    refused(root, out, "more is not a file", "directly in val/CLASS/")
    (root / "val" / "cat" / "more").rename(tmp_path / "elsewhere")
    (root / "val" / "notes.txt").write_text("x")
    refused(root, out, "notes.txt is not a folder")
    (root / "val" / "notes.txt").unlink()
    link = root / "val" / "cat" / "2.png"
    link.symlink_to(tmp_path / "elsewhere" / "1.png")
    refused(root, out, "2.png is a symbolic link out of")
    link.unlink()
    link.symlink_to("1.png")
    prepare(root, out)
    link.unlink()
    link.symlink_to("nowhere")
    refused(root, out, "2.png is not a file")
    link.unlink()
    os.mkfifo(link)
    refused(root, out, "2.png is not a file")
    link.unlink()
    (root / "train" / "cow").symlink_to(tmp_path / "elsewhere")
    refused(root, out, "cow is a symbolic link out of")
    (root / "train" / "cow").unlink()
    (root / "train" / "a\nb").mkdir()
    refused(root, out, "printable name")
    (root / "train" / "a\nb").rmdir()
    for split in ("train", "val"):
        (root / split / "dog" / "1.png").unlink()
        (root / split / "dog").rmdir()
    refused(root, out, "1 class:")


# ---------------------------------------------------------------------------------------------------------------------------------
# The scripts as they are started


def run(script: str, *arguments: str):
    return subprocess.run([sys.executable, str(ROOT / "data" / script / "prepare.py"), *arguments], capture_output=True, text=True, timeout=60)


def test_exit_status_and_one_line(batches, tmp_path):
    mark = tmp_path / "mark"
    source = copy(batches, tmp_path / "source")
    (source / "train_data_batch_7").write_bytes(hostile(str(mark))["os.system"])
    done = run("imagenet16", f"--source={source}", f"--out_dir={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "train_data_batch_7 names" in done.stderr and "system" in done.stderr and not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [("", "--source is empty"), ("absent", "not exist"), (".", "none of the layouts"), ("a.zip,b.zip", "a.zip does not exist"), (__file__, "zip")],
)
def test_source_that_is_nothing(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    refused(source, tmp_path / "out", words)


# ---------------------------------------------------------------------------------------------------------------------------------
# Digits


def test_digits(tmp_path, capsys):
    sklearn = pytest.importorskip("sklearn.datasets")
    digits.prepare(configure(digits.PrepareConfig, [f"--out_dir={tmp_path / 'a'}"]))
    digits.prepare(configure(digits.PrepareConfig, [f"--out_dir={tmp_path / 'b'}"]))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    meta = read_meta(tmp_path / "a")
    assert meta["class_names"] == list("0123456789") and meta["duplicates"] == {"val_in_train": 0, "train_repeated": 0}
    # the data and the split are the same on every machine and with every version of numpy and scikit-learn
    assert meta["splits"]["train"]["sha256"] == "06354ae57d54ef82a6799415ac6431920fa645a4d9a7b9bd6036be42bdce1955"
    assert meta["splits"]["val"]["labels_sha256"] == "30ce8a034ad641cc0ec5088ea38b12c9540e18a0ff2f0a66ef9a562ba3c0073c"
    original = sklearn.load_digits()
    parts = [read(tmp_path / "a", split) for split in ("train", "val")]
    assert [len(classes) for _, classes in parts] == [1438, 359] and "1,438 train and 359 val" in capsys.readouterr().out
    for digit in range(10):
        counts = [int((classes == digit).sum()) for _, classes in parts]
        assert sum(counts) == (original.target == digit).sum() and abs(counts[0] - 0.8 * sum(counts)) <= 0.5
    found = sorted((picture.tobytes(), int(k)) for pictures, classes in parts for picture, k in zip(pictures, classes, strict=True))
    expected = []
    for image, digit in zip(original.images, original.target, strict=True):
        grey = np.floor(image * 255 / 16 + 0.5).astype(np.uint8)
        expected.append((np.stack([np.kron(grey, np.ones((2, 2), np.uint8))] * 3).tobytes(), int(digit)))
    assert found == sorted(expected)


def test_digits_of_another_kind():
    assert digits.enlarge(np.arange(64).reshape(1, 8, 8) % 17).max() == 255
    for images in (np.zeros((2, 9, 8)), np.full((2, 8, 8), 17), np.full((2, 8, 8), 0.5), np.full((2, 8, 8), -1)):
        with pytest.raises(InputError, match="8x8"):
            digits.enlarge(images)


# ---------------------------------------------------------------------------------------------------------------------------------
# The real pictures


def test_shared_pictures(tmp_path):
    needed = [SHARED / name for name in ("train_a.npz", "train_b.npz", "val.npz", "classes.tsv", "official_layout/val_data")]
    if not all(path.is_file() for path in needed):
        pytest.skip("the 100,000 pictures are not in ../shared/data/imagenet16")
    meta = prepare(SHARED, tmp_path / "npz")
    assert meta["splits"]["train"]["pictures"] == 100_000 and meta["splits"]["val"]["pictures"] == 10_000 and meta["classes"] == 200
    assert meta["duplicates"] == {"val_in_train": 7, "train_repeated": 20} and meta["class_names"][0] == "goldfish"
    pictures, classes = read(tmp_path / "npz", "train")
    assert (np.bincount(classes) == 500).all() and (np.bincount(read(tmp_path / "npz", "val")[1]) == 50).all()
    np.testing.assert_allclose(meta["mean"], [np.mean(pictures[:, c], dtype=np.float64) / 255 for c in range(3)], rtol=1e-12)

    official = prepare(SHARED / "official_layout", tmp_path / "batches", classes=SHARED / "classes.tsv")
    assert official["classes"] == 200 and official["splits"]["train"]["pictures"] == 2000 and official["splits"]["val"]["pictures"] == 500
    assert sorted(official["class_names"]) == sorted(meta["class_names"]) and official["label_numbers"] == sorted(meta["label_numbers"])
    for split, count in (("train", 2000), ("val", 500)):  # the batches are the first pictures of the .npz files
        from_npz, from_batches = read(tmp_path / "npz", split), read(tmp_path / "batches", split)
        assert (from_npz[0][:count] == from_batches[0]).all()
        assert [meta["label_numbers"][k] for k in from_npz[1][:count]] == [official["label_numbers"][k] for k in from_batches[1]]
