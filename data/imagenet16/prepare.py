"""ImageNet at 16x16: writes train.bin, val.bin, their labels and meta.json (their form: pictures.py).

    python data/imagenet16/prepare.py --source=PATH [--classes=FILE] [--out_dir=DIR]

ImageNet's terms forbid a download without an account, so PATH is something you already have, in one of three layouts:

batches   The official Downsampled ImageNet 16x16 (Chrabaszcz, Loshchilov and Hutter 2017): a folder with train_data_batch_1 ... 10 and
          val_data, or its archives Imagenet16_train.zip and Imagenet16_val.zip (their folder, or both paths with a comma between), which are
          read without being unpacked. Labels 1..1000 become classes 0..999; when fewer than 1000 occur in train, those that do are numbered
          0.. in the same order. The mean inside the batches is not used.
npz       A folder with train_a.npz, train_b.npz and val.npz: data (N x 768), labels (1..1000), labels200 (the classes 0..), and classes.tsv.
pictures  A folder with train/CLASS/* and val/CLASS/*, the same classes in both, numbered in the order of their names. Hidden files (.name)
          are passed over, everything else must be a picture (JPEG, PNG, BMP, GIF, WebP, TIFF, PPM, known by content, not by name).

Pictures in folders are reduced as the official ones were: the whole picture, not cropped, straight to 16x16 with PIL's BOX filter, whatever
its proportions (one smaller than 16x16 is enlarged by the same filter). Before that: transparency is laid over black, 16-bit grey scaled to
8 bits, every other mode converted to RGB by PIL, of an animation the first frame taken. The EXIF orientation is ignored. A file that cannot
be decoded, and one with more pixels than PIL's limit (Image.MAX_IMAGE_PIXELS), stops the preparation: all files are read, then one line
gives their number and names the first 5.

The batches are pickles, and a pickle from elsewhere may contain a program. Here nothing of it runs: names in the pickle become stand-ins
for the few functions by which numpy stores arrays, any other name is refused, and no object of numpy is touched by the pickle (ArraysOnly).

--classes names the classes: a classes.tsv (tabs: label200, label_1_1000, wnid, name) or the official map_clsloc.txt (wnid, number, name).
Without it such a file in the folder of the data is used; without any, a class is called by its official number.

Symbolic links in a source folder must not lead out of it. Nothing is written unless everything has been read; existing files are then as
they were.
"""

import contextlib
import hashlib
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402
from pictures import PictureWriter, reduce_picture, short, shown, summary  # noqa: E402

SIDE = 16
VALUES = 3 * SIDE * SIDE
NUMBERS = 1000  # official classes, 1..1000
TRAIN_BATCHES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
BATCHES = (*TRAIN_BATCHES, "val_data")
ARCHIVES = ("Imagenet16_train.zip", "Imagenet16_val.zip")
NPZ = ("train_a.npz", "train_b.npz", "val.npz")
MAX_BATCH = 256 << 20  # bytes of a batch or an .npz file unpacked; the official batches have 99 million, in protocol 2 up to twice that
MAX_OPCODES = 4_000_000  # of a pickle; an official batch has about one per picture
READ_AHEAD = 1024  # picture files given to the threads at a time
NAMED = 5  # files named in a message about many


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare ImageNet at 16x16: python data/imagenet16/prepare.py --source=PATH [--key=value ...]"""

    source: str = ""  # folder of batches, of .npz files or of pictures; or the zip archives of the batches, with a comma between
    classes: str = ""  # classes.tsv or map_clsloc.txt; empty: the one in the folder of the data, if any
    out_dir: str = ""  # directory for the files; empty: the one of this script

    def check(self) -> "PrepareConfig":
        if not self.source:
            raise InputError(
                "--source is empty: ImageNet needs an account, so name what you have: a folder with train_data_batch_1 ... 10 and val_data, "
                "the zip archives of these, a folder with train_a.npz, train_b.npz and val.npz, or one with train/CLASS/* and val/CLASS/*"
            )
        return self


# ---------------------------------------------------------------------------------------------------------------------------------
# Pickles without programs


class DType:
    """Stands for numpy.dtype(code) in a pickle: numbers of 1 to 8 bytes."""

    __slots__ = ("code", "order", "reader")

    def __init__(self, code: str, reader: "ArraysOnly"):
        self.code, self.order, self.reader = code, "|", reader

    def __setstate__(self, state):
        match state:
            case (3, ("|" | "<" | ">") as order, None, None, None, -1, -1, 0):
                self.order = order
            case _:
                raise InputError("has an array of a type that is not numbers")

    def array(self, raw, shape: tuple, fortran: bool):
        """The numpy array in `raw`: bytes, or the text that python 2's byte strings are read as."""
        import numpy as np

        raw = self.reader.encode(raw) if isinstance(raw, str) else raw
        dtype = np.dtype(self.order + self.code)
        if len(shape) > 2 or not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(raw):
            raise InputError(f"has an array of shape {str(shape)[:40]} and type {dtype} in {len(raw):,} bytes")
        return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


class Array:
    """Stands for a numpy array in a pickle, empty at first, as numpy makes it."""

    __slots__ = ("value",)

    def __init__(self, value=None):
        self.value = value

    def __setstate__(self, state):
        match state:
            case (1, tuple() as shape, DType() as dtype, (bool() | int()) as fortran, (bytes() | str()) as raw):
                self.value = dtype.array(raw, shape, bool(fortran))
            case _:
                raise InputError("has an array that is not of plain numbers")


class Name:
    """Stands for a function or a class that a pickle names. It can be called with the arguments that numpy writes, and no others."""

    __slots__ = ("module", "name", "reader")

    def __init__(self, module: str, name: str, reader: "ArraysOnly"):
        self.module, self.name, self.reader = module, name, reader

    def __setstate__(self, state):
        raise InputError(f"would change {self.module}.{self.name}, which arrays do not need: refused")

    def __call__(self, *args):
        match self.name, args:
            case "_reconstruct", (Name(name="ndarray"), (0,), b"b" | "b"):
                return Array()
            case "_frombuffer", ((bytes() | str()) as raw, DType() as dtype, tuple() as shape, ("C" | "F") as order):
                return Array(dtype.array(raw, shape, order == "F"))
            case "dtype", (str() as code, *rest) if re.fullmatch("[iu][1248]|f[248]", code) and rest == [0, 1]:
                return DType(code, self.reader)
            case "scalar", (DType() as dtype, (bytes() | str()) as raw):
                return dtype.array(raw, (1,), False)[0].item()
            case "encode", (str() as text, "latin1"):
                return self.reader.encode(text)
        raise InputError(f"calls {self.module}.{self.name} with arguments that arrays do not need: refused")


NAMES = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),  # protocol 5
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # bytes in protocol 2
}
OPCODES = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 BYTEARRAY8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
    "SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"
)


class Limited:
    """A file of `size` bytes for the unpickler: whatever length a pickle states, no more than the rest of the file is asked for."""

    def __init__(self, file, size: int):
        self.file, self.rest = file, size

    def read(self, n: int) -> bytes:
        data = self.file.read(min(n, self.rest))
        self.rest -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(min(1000, self.rest))  # names of modules and functions
        self.rest -= len(data)
        return data


class Opcodes:
    """The opcodes that arrays and plain containers need -> what pickle's Unpickler does for them, for MAX_OPCODES steps.

    One byte can make an object of a hundred bytes, so that a batch within MAX_BATCH could fill any memory.
    """

    def __init__(self, methods: dict):
        self.methods, self.left = methods, MAX_OPCODES

    def __getitem__(self, code: int):
        self.left -= 1
        if self.left < 0:
            raise InputError(f"has more than {MAX_OPCODES:,} steps: refused")
        if code not in self.methods:
            raise InputError(f"uses pickle opcode {bytes([code])!r}, which arrays do not need: refused")
        return self.methods[code]


class ArraysOnly(pickle._Unpickler):
    """Reads a pickle of protocol 2 to 5 that holds numbers, texts, lists, tuples, dicts and numpy arrays of numbers.

    find_class gives stand-ins, so that no function outside this file can be called; opcodes that arrays do not need are refused (persistent
    ids, the extension registry, instances of classes). It is the pickle module's Unpickler in Python because the one in C lets a few bytes
    reserve all memory; nearly all of a batch is one string, so it is hardly slower.
    """

    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPCODES.split()}
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8  # a bytearray would be reserved before it is read

    def __init__(self, file, size: int):
        super().__init__(Limited(file, size), fix_imports=False, encoding="latin1")
        self.dispatch = Opcodes(self.dispatch)
        self.left = size  # bytes that may still be encoded

    def find_class(self, module, name):
        if (module, name) not in NAMES:
            raise InputError(f"names {shown(f'{module}.{name}'[:80])}, which arrays do not need: refused, it may be a program")
        return Name(module, name, self)

    def encode(self, text: str) -> bytes:
        self.left -= len(text)
        if self.left < 0:  # one text encoded again and again: a few bytes in the file, many in memory
            raise InputError("has more text to encode than bytes: refused")
        return text.encode("latin1")

    def load_setitems(self):
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes):  # hashing nested tuples can take for ever
                raise InputError("has a dict whose keys are not texts")
            self.stack[-1][key] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.metastack.append(self.stack)
        self.stack = [key, value]
        self.load_setitems()

    dispatch[pickle.SETITEMS[0]], dispatch[pickle.SETITEM[0]] = load_setitems, load_setitem


def read_batch(file, size: int) -> dict:
    """The dict in a pickled batch: texts as keys, numpy arrays and plain values. Raises InputError, without the name of the file."""
    start = file.read(2)
    if len(start) < 2 or start[0] != 0x80 or not 2 <= start[1] <= 5:
        raise InputError("is not a pickle of protocol 2 to 5")
    try:
        batch = ArraysOnly(file, size - 2).load()
        if not isinstance(batch, dict):
            raise InputError(f"holds a {type(batch).__name__} and not a dict")
        batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
        return {key: value.value if isinstance(value, Array) else value for key, value in batch.items()}
    except InputError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to: EOFError, IndexError, struct.error, zlib.error, MemoryError ...
        raise InputError(f"cannot be read as a pickle of arrays and plain containers ({short(error)})") from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Files and checks that the layouts share


def inside(path: Path, root: Path) -> Path:
    """`path`, unless it leads out of the folder `root` by a symbolic link: that raises InputError."""
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise InputError(f"{shown(path)} is a symbolic link out of {shown(root)}: put the data itself there, or name the folder it is in")
    return path


def need_file(path: Path, root: Path | None):
    """Raises InputError unless `path` is a regular file and, with a `root`, does not lie outside it."""
    if root:
        inside(path, root)
    if not path.is_file():
        raise InputError(f"{shown(path)} " + ("is not a regular file" if path.exists() else "does not exist"))


def check_pictures(data, where: str):
    """Raises InputError unless `data` is (N, 768) uint8 with N > 0."""
    import numpy as np

    if not isinstance(data, np.ndarray):
        raise InputError(f"{where} has no array 'data'")
    if data.ndim != 2 or data.shape[1] != VALUES or data.dtype != np.uint8:
        other = next((f" (pictures of {side}x{side}?)" for side in (8, 32, 64) if data.shape[1:] == (3 * side * side,)), "")
        raise InputError(f"{where} has data of shape {data.shape} and type {data.dtype}{other}, expected is N x {VALUES} of uint8")
    if not len(data):
        raise InputError(f"{where} has no pictures")


def check_labels(labels, count: int, low: int, high: int, where: str, key: str = "labels"):
    """The labels, a list or an array, as int64 of length `count`. Raises InputError unless they are integers low..high."""
    import numpy as np

    if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
        labels = labels.tolist()
    if not isinstance(labels, list | tuple) or not all(type(label) is int for label in labels):
        raise InputError(f"{where} has no {key!r} that are a list of integers")
    if len(labels) != count:
        raise InputError(f"{where} has {count:,} pictures and {len(labels):,} {key}")
    wrong = next((place for place, label in enumerate(labels) if not low <= label <= high), None)
    if wrong is not None:
        raise InputError(f"{where} has the label {str(labels[wrong])[:20]} (picture {wrong}), {key} must lie in {low}..{high}")
    return np.array(labels, dtype=np.int64)


def names_of(numbers: list[int], classes: str, folder: Path | None) -> dict:
    """Official numbers of the classes 0.. -> meta.json's class_names, label_numbers and, where known, wnids."""
    path = Path(classes) if classes else None
    if path is None and folder is not None:
        path = next((folder / name for name in ("classes.tsv", "map_clsloc.txt") if (folder / name).exists()), None)
        if path is not None:
            inside(path, folder)
    if path is None:
        return {"class_names": [str(number) for number in numbers], "label_numbers": numbers}
    try:
        lines = path.read_bytes()[: 1 << 20].decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(path)} cannot be read ({short(error)}): give a classes.tsv or map_clsloc.txt with --classes=FILE") from None
    known = {}
    for line in lines:
        official = re.fullmatch(r"(?P<wnid>n\d{8}) (?P<number>\d{1,4}) (?P<name>\S+)", line.strip())
        table = re.fullmatch(r"\d+\t(?P<number>\d{1,4})\t(?P<wnid>n\d{8})\t(?P<name>[^\t]+)", line.strip())
        if official or table:
            entry = official or table
            known[int(entry["number"])] = entry["wnid"], entry["name"]
    unknown = next((number for number in numbers if number not in known), None)
    if unknown is not None:
        raise InputError(f"{shown(path)} has no line for class number {unknown}: is it a classes.tsv or map_clsloc.txt?")
    wnids, names = zip(*(known[number] for number in numbers), strict=True)
    return {"class_names": list(names), "label_numbers": numbers, "wnids": list(wnids)}


# ---------------------------------------------------------------------------------------------------------------------------------
# The official batches, in a folder or in zip archives


def batches_in(archive_path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members that are batches, in whatever folder of the archive, by their name. Nothing is unpacked. Raises InputError."""
    found = {}
    try:
        with zipfile.ZipFile(archive_path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise InputError(f"{shown(archive_path)} cannot be read as a zip archive ({short(error)})") from None
    for entry in entries:
        where = f"{shown(archive_path)}: member {shown(entry.filename[:80])}"
        if entry.filename.startswith("/") or re.search(r"\\|^\w:|(^|/)\.\.(/|$)", entry.orig_filename):
            raise InputError(f"{where} names a place outside the archive: refused")
        name = PurePosixPath(entry.filename).name
        if entry.is_dir() or name not in BATCHES:
            continue
        if name in found:
            raise InputError(f"{where} is there twice")
        if entry.file_size > MAX_BATCH:
            raise InputError(f"{where} has {entry.file_size:,} bytes unpacked, a batch has at most {MAX_BATCH:,}")
        if entry.flag_bits & 1:
            raise InputError(f"{where} is encrypted")
        found[name] = entry
    return found


def find_batches(paths: list[Path], root: Path | None) -> dict[str, tuple[Path, zipfile.ZipInfo | None]]:
    """Batch name -> (its file, None) or (archive, member), all eleven. `root` is the folder, if it is one. Raises InputError."""
    found = {}
    for path in paths:
        need_file(path, root)
        for name, member in ({path.name: None} if path.name in BATCHES else batches_in(path)).items():
            if name in found:
                raise InputError(f"{shown(path)} holds {name}, which {shown(found[name][0])} holds as well")
            found[name] = path, member
    missing = [name for name in BATCHES if name not in found]
    if missing:
        listed = ", ".join(missing[:NAMED]) + f" and {len(missing) - NAMED} more" * (len(missing) > NAMED)
        where = ", ".join(shown(path) for path in ([root] if root else paths))
        raise InputError(f"{where} lacks {listed}: train_data_batch_1 ... 10 and val_data are all needed")
    return found


def read_batches(found: dict, writer) -> dict:
    """Streams the pictures into the writer, one batch in memory at a time. Returns the labels of the splits, 1..1000. Raises InputError."""
    import numpy as np
    from tqdm import tqdm

    labels = {"train": [], "val": []}
    for name in tqdm(BATCHES, unit="batch", leave=False, disable=not sys.stderr.isatty()):
        path, member = found[name]
        where = shown(path) if member is None else f"{shown(path)}: {shown(member.filename)}"
        with contextlib.ExitStack() as stack:
            try:
                if member is None:
                    file, size = stack.enter_context(open(path, "rb")), path.stat().st_size
                    if size > MAX_BATCH:
                        raise InputError(f"has {size:,} bytes, a batch has at most {MAX_BATCH:,}")
                else:
                    file, size = stack.enter_context(stack.enter_context(zipfile.ZipFile(path)).open(member)), member.file_size
                batch = read_batch(file, size)
            except InputError as error:
                raise InputError(f"{where} {error}") from None
            except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
                raise InputError(f"{where} cannot be read ({short(error)})") from None
        check_pictures(batch.get("data"), where)
        split = "val" if name == "val_data" else "train"
        labels[split].append(check_labels(batch.get("labels"), len(batch["data"]), 1, NUMBERS, where))
        writer.add(split, batch["data"])
        del batch  # else it stays while the next one is read
    return {split: np.concatenate(parts) for split, parts in labels.items()}


def from_batches(paths: list[Path], root: Path | None, found: dict, classes: str, writer) -> dict:
    """Adds the pictures to the writer and returns what its finish takes."""
    import numpy as np

    from dataset import sha256_of

    labels = read_batches(found, writer)
    numbers = np.unique(labels["train"])
    absent = np.setdiff1d(labels["val"], numbers)
    if len(absent):
        raise InputError(f"val_data has class number {absent[0]}, of which the train batches have no picture")
    return {
        "labels": {split: np.searchsorted(numbers, values) for split, values in labels.items()},
        "source": "Downsampled ImageNet 16x16, official batches",
        "source_sha256": {path.name: sha256_of(path) for path in paths},
        **names_of(numbers.tolist(), classes, root),
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# The .npz form


def read_npz(path: Path) -> tuple:
    """(data, labels 1..1000, labels200) of one file, checked. Raises InputError."""
    import numpy as np

    where = shown(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_BATCH:
            raise InputError(f"{where} has {size:,} bytes unpacked, at most {MAX_BATCH:,} are read")
        with np.load(path, allow_pickle=False) as arrays:
            missing = [key for key in ("data", "labels", "labels200") if key not in arrays.files]
            if missing:
                raise InputError(f"{where} has no array {missing[0]!r}")
            data, labels, classes = arrays["data"], arrays["labels"], arrays["labels200"]
    except InputError:
        raise
    except Exception as error:  # BadZipFile, ValueError for objects, zlib.error, EOFError, MemoryError: numpy names no common class
        raise InputError(f"{where} cannot be read as an .npz file of plain arrays ({short(error)})") from None
    check_pictures(data, where)
    return data, check_labels(labels, len(data), 1, NUMBERS, where), check_labels(classes, len(data), 0, NUMBERS - 1, where, "labels200")


def from_npz(root: Path, names: str, writer) -> dict:
    """Adds the pictures to the writer and returns what its finish takes."""
    import numpy as np

    from dataset import sha256_of

    labels, number_of = {"train": [], "val": []}, {}
    for name in NPZ:
        data, numbers, classes = read_npz(root / name)
        split = "val" if name == "val.npz" else "train"
        for pair in np.unique(np.stack([classes, numbers], axis=1), axis=0).tolist():
            if number_of.setdefault(*pair) != pair[1]:
                raise InputError(f"{shown(root / name)} ties class {pair[0]} of labels200 to the labels {number_of[pair[0]]} and {pair[1]}")
        labels[split].append(classes)
        writer.add(split, data)
        del data
    labels = {split: np.concatenate(parts) for split, parts in labels.items()}
    count = int(labels["train"].max()) + 1
    absent = sorted(set(range(count)) - set(number_of))
    if absent or len(set(number_of.values())) < len(number_of) or labels["val"].max() >= count:
        what = f"no picture of class {absent[0]}" if absent else "a class in val alone, or two classes with one label"
        raise InputError(f"{shown(root)} has {what}: labels200 must number the classes of train 0..{count - 1}")
    return {
        "labels": labels,
        "source": "ImageNet pictures at 16x16 in .npz files",
        "source_sha256": {name: sha256_of(root / name) for name in NPZ},
        **names_of([number_of[k] for k in range(count)], names, root),
    }


# ---------------------------------------------------------------------------------------------------------------------------------
# Folders of pictures


def find_pictures(root: Path) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> its files, both in order of name. Raises InputError for whatever is not in its place."""
    found = {}
    for split in ("train", "val"):
        found[split] = {}
        for folder in sorted(inside(root / split, root).iterdir()):
            if folder.name.startswith("."):
                continue
            if not inside(folder, root).is_dir():
                raise InputError(f"{shown(folder)} is not a folder: pictures lie in {split}/CLASS/")
            if not folder.name.isprintable():
                raise InputError(f"{shown(folder)}: a class needs a printable name")
            with os.scandir(folder) as entries:  # 1.3 million files: their kind comes with the listing
                entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
            for entry in entries:
                if entry.is_symlink():
                    inside(Path(entry.path), root)
                if not entry.is_file():
                    raise InputError(f"{shown(entry.path)} is not a file: pictures lie directly in {split}/CLASS/")
            if not entries:
                raise InputError(f"{shown(folder)} has no pictures")
            found[split][folder.name] = [Path(entry.path) for entry in entries]
    for split, other in (("train", "val"), ("val", "train")):
        single = sorted(set(found[split]) - set(found[other]))
        if single:
            raise InputError(f"{shown(root / other)} lacks the class {shown(single[0])}, which is in {split}: both need the same classes")
    return found


def from_pictures(root: Path, found: dict, writer) -> dict:
    """Adds the pictures to the writer and returns what its finish takes."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("reading picture files needs the package pillow: pip install pillow") from None
    import numpy as np
    from tqdm import tqdm

    Image.init()  # all formats, before threads ask for them
    names = sorted(found["train"])
    labels, listing, unreadable = {}, {}, []
    total = sum(len(files) for classes in found.values() for files in classes.values())
    bar = tqdm(total=total, unit=" pictures", leave=False, disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, warnings.catch_warnings(), bar:
        warnings.simplefilter("ignore")  # PIL's, about metadata; those about size are checked in reduce_picture
        for split, classes in found.items():
            files = [path for name in names for path in classes[name]]
            labels[split] = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
            listing[split] = hashlib.sha256()
            for first in range(0, len(files), READ_AHEAD):
                part = files[first : first + READ_AHEAD]
                pictures = []
                for path, (picture, digest) in zip(part, pool.map(reduce_picture, part), strict=True):
                    listing[split].update(f"{digest}  {path.relative_to(root)}\n".encode(errors="surrogateescape"))
                    if isinstance(picture, str):
                        unreadable.append(f"{shown(path.relative_to(root))} ({picture})")
                    else:
                        pictures.append(picture)
                if pictures:
                    writer.add(split, np.stack(pictures))
                bar.update(len(part))
    if unreadable:
        more = f" and {len(unreadable) - NAMED} more" * (len(unreadable) > NAMED)
        few = "1 file that is not a picture" if len(unreadable) == 1 else f"{len(unreadable):,} files that are not pictures"
        raise InputError(f"{shown(root)} has {few} PIL can decode: {', '.join(unreadable[:NAMED])}{more}; mend or remove, then prepare again")
    return {
        "labels": labels,
        "class_names": names,
        "source": "folders of pictures, reduced to 16x16 with PIL's BOX filter",
        "source_sha256": {f"lines `sha256  {split}/CLASS/FILE`": digest.hexdigest() for split, digest in listing.items()},
    }


# ---------------------------------------------------------------------------------------------------------------------------------


def find_layout(source: str, classes: str):
    """What is at `source` -> the reader of its layout, to be called with a writer. Raises InputError for a layout that is incomplete."""
    path = Path(source)
    if not path.exists() and "," in source:
        paths = [Path(part.strip()) for part in source.split(",") if part.strip()]
        return partial(from_batches, paths, None, find_batches(paths, None), classes)
    if path.name in NPZ and path.is_file():
        raise InputError(f"--source={shown(source)} is one file of several: name its folder, with {', '.join(NPZ)}")
    if path.is_file():
        return partial(from_batches, [path], None, find_batches([path], None), classes)
    if not path.is_dir():
        raise InputError(f"--source={shown(source)} " + ("is neither a file nor a folder" if path.exists() else "does not exist"))
    for names in (BATCHES, ARCHIVES):
        paths = [path / name for name in names if os.path.lexists(path / name)]
        if paths:
            return partial(from_batches, paths, path, find_batches(paths, path), classes)
    there = [name for name in NPZ if os.path.lexists(path / name)]
    if there:
        for name in NPZ:
            if name not in there:
                raise InputError(f"{shown(path)} lacks {name}: {', '.join(NPZ)} are all needed")
            need_file(path / name, path)
        return partial(from_npz, path, classes)
    if (path / "train").is_dir() and (path / "val").is_dir():
        return partial(from_pictures, path, find_pictures(path))
    for name, other in (("train", "val"), ("val", "train")):
        if (path / name).is_dir():
            raise InputError(f"{shown(path)} has {name}/ and lacks {other}/: pictures are read from train/CLASS/* and val/CLASS/*")
    raise InputError(
        f"{shown(path)} has none of the layouts: train_data_batch_1 ... 10 and val_data, {' and '.join(ARCHIVES)}, {', '.join(NPZ)}, "
        "or train/CLASS/* and val/CLASS/*"
    )


def prepare(config: PrepareConfig):
    """Reads the source, writes the files and says on stdout what they are. Raises InputError; the files are then as they were."""

    directory = Path(config.out_dir) if config.out_dir else HERE
    try:
        read = find_layout(config.source, config.classes)
        with PictureWriter(directory) as writer:
            meta = writer.finish(**read(writer=writer))
    except OSError as error:  # of the source: the writer has lines of its own
        raise InputError(f"{shown(error.filename or config.source)} cannot be read: {error.strerror or error}") from None
    print(f"{meta['source']}, in {directory}\n{summary(meta)}")
    if "label_numbers" in meta and meta["classes"] < NUMBERS:
        print(f"{meta['classes']} of the {NUMBERS} official classes occur: they are numbered 0..{meta['classes'] - 1} (label_numbers in meta.json)")
    if meta["class_names"] == [str(number) for number in meta.get("label_numbers", ())]:
        print("the classes are called by their official numbers: --classes=map_clsloc.txt gives them names")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
