"""Writes a picture data set: what data/imagenet16/prepare.py and data/digits16/prepare.py share.

On disk it is a directory with

    train.bin, val.bin                 pictures, uint8, N x 3 x H x W in C order (red first), nothing else
    train_labels.bin, val_labels.bin   their classes 0..K-1, uint16, little-endian
    meta.json                          shape, class names, mean and std of the train pictures, counts and sha256 of the files, source, duplicates
"""

import contextlib
import fcntl
import hashlib
import io
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from configurator import InputError
from dataset import meta_json, replace_files, write_file

SPLITS = ("train", "val")
FILES = (*(f"{split}.bin" for split in SPLITS), *(f"{split}_labels.bin" for split in SPLITS), "meta.json")
MAX_FILE = 256 << 20  # bytes of a picture file
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not all that PIL knows: EPS would start a program
CHUNK = 4096  # pictures: what is worked on at a time


class PictureWriter:
    """Streams pictures to disk and puts the five files into `directory` together, or none of them:

        with PictureWriter(directory) as writer:
            writer.add("train", pictures)  # as often as needed, either split
            meta = writer.finish({"train": classes, "val": classes}, class_names, source, source_sha256)

    The files grow in a hidden folder inside `directory`, so that an error, a full disk or a kill leaves what was there as it was. As for text,
    meta.json, without which there is no data set, goes first and comes back last. One writer at a time per directory; the next one removes
    what a killed one has left. Memory: one chunk, and 16 bytes (as a Python object about 100) a picture to find duplicates.
    Everything that cannot be written raises InputError.
    """

    def __init__(self, directory: str | os.PathLike, shape: tuple[int, int, int] = (3, 16, 16)):
        self.directory, self.shape = Path(directory), tuple(shape)
        self.count = dict.fromkeys(SPLITS, 0)
        self.sha256 = {split: hashlib.sha256() for split in SPLITS}
        self.histogram = np.zeros((shape[0], 256), dtype=np.int64)  # of the train pictures, per channel: mean and std become exact
        self.seen: set[bytes] = set()  # hashes of the train pictures
        self.val: list[bytes] = []

    @contextlib.contextmanager
    def _one_line(self):
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write in {self.directory}: {error.strerror or error}; whatever was there before is unchanged") from None

    def __enter__(self) -> "PictureWriter":
        self.stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack, self._one_line():
            if not self.directory.exists():
                self.directory.mkdir(parents=True)
                stack.callback(self._remove_if_empty)
            handle = os.open(self.directory, os.O_RDONLY)
            stack.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing pictures in {self.directory}: wait for it, or choose another --out_dir") from None
            except OSError:
                pass  # a file system without locks: then nothing is taken for abandoned
            else:
                for abandoned in self.directory.glob(".pictures.*.tmp"):
                    shutil.rmtree(abandoned, ignore_errors=True)
            self.folder = Path(tempfile.mkdtemp(prefix=".pictures.", suffix=".tmp", dir=self.directory))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.file = {split: stack.enter_context(open(self.folder / f"{split}.bin", "wb")) for split in SPLITS}
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # a file that could not be flushed is removed anyway
            self.stack.close()

    def _remove_if_empty(self):
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    def add(self, split: str, pictures: np.ndarray):
        """Appends uint8 pictures, (N, 3, H, W) or (N, 3 H W)."""
        if pictures.dtype != np.uint8:
            raise TypeError(f"pictures must be uint8, not {pictures.dtype}")
        flat = pictures.reshape(len(pictures), math.prod(self.shape))
        for first in range(0, len(flat), CHUNK):
            chunk = np.ascontiguousarray(flat[first : first + CHUNK])
            with self._one_line():
                self.file[split].write(chunk)
            self.sha256[split].update(chunk)
            hashes = [hashlib.blake2b(picture, digest_size=16).digest() for picture in chunk]
            if split == "train":
                self.seen.update(hashes)
                for channel, values in enumerate(np.moveaxis(chunk.reshape(-1, *self.shape), 1, 0)):
                    self.histogram[channel] += np.bincount(values.reshape(-1), minlength=256)
            else:
                self.val += hashes
        self.count[split] += len(flat)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of the train pictures so far, per channel, for values scaled to 0..1; std is that of the population. Rounded once, at the end."""
        mean, std = [], []
        for counts in self.histogram.tolist():
            n = sum(counts)
            first = sum(value * count for value, count in enumerate(counts))
            second = sum(value * value * count for value, count in enumerate(counts))
            mean.append(first / (255 * n))
            std.append(math.sqrt((n * second - first * first) / (255 * n) ** 2))
        return mean, std

    def finish(self, labels: dict, class_names: list[str], source: str, source_sha256: dict[str, str], **more) -> dict:
        """Writes the labels and meta.json and gives all five files their names. Returns what meta.json says; `more` becomes part of it.

        Raises InputError when a split is empty, the counts differ, a class is out of range or has no train picture.
        """
        classes = len(class_names)
        labels = {split: np.asarray(labels[split], dtype=np.int64) for split in SPLITS}
        if not 2 <= classes <= 1 << 16:
            raise InputError(f"{source} has {classes} class{'es' if classes != 1 else ''}: a classifier needs at least 2, and 16 bits number 65,536")
        for split in SPLITS:
            if not self.count[split]:
                raise InputError(f"{source} has no {split} pictures")
            if labels[split].shape != (self.count[split],):
                raise InputError(f"{source} has {self.count[split]:,} {split} pictures and {labels[split].size:,} labels")
            if labels[split].min() < 0 or labels[split].max() >= classes:
                raise InputError(f"{source} has {split} labels {labels[split].min()}..{labels[split].max()} for {classes} classes")
        absent = np.flatnonzero(np.bincount(labels["train"], minlength=classes) == 0)
        if len(absent):
            more = f" and {len(absent) - 1} more" * (len(absent) > 1)
            raise InputError(f"{source} has no train picture of class {class_names[absent[0]]!r}{more}")

        splits = {}
        with self._one_line():
            for split in SPLITS:
                self.file[split].flush()
                os.fsync(self.file[split].fileno())
                content = labels[split].astype("<u2").tobytes()
                write_file(self.folder / f"{split}_labels.bin", content)
                splits[split] = {
                    "pictures": self.count[split],
                    "sha256": self.sha256[split].hexdigest(),
                    "labels_sha256": hashlib.sha256(content).hexdigest(),
                }
            mean, std = self.mean_and_std()
            meta = {
                "kind": "pictures",
                "dtype": "uint8",
                "shape": list(self.shape),
                "classes": classes,
                "class_names": list(class_names),
                "mean": mean,
                "std": std,
                "splits": splits,
                "source": source,
                "source_sha256": source_sha256,
                "duplicates": {
                    "val_in_train": sum(picture in self.seen for picture in self.val),
                    "train_repeated": self.count["train"] - len(self.seen),
                },
                **more,
            }
            write_file(self.folder / "meta.json", meta_json(meta))
        try:
            replace_files(self.folder, self.directory, FILES)
        except OSError as error:
            raise InputError(f"cannot put the files into {self.directory}: {error.strerror or error}; prepare again") from None
        return meta


def summary(meta: dict) -> str:
    """A few lines for stdout about what has been written."""

    def numbers(values):
        return " ".join(f"{value:.4f}" for value in values)

    counts = {split: meta["splits"][split]["pictures"] for split in SPLITS}
    duplicates = meta["duplicates"]
    return "\n".join(
        (
            f"{counts['train']:,} train and {counts['val']:,} val pictures of {meta['classes']} classes, {'x'.join(map(str, meta['shape']))}",
            f"train mean {numbers(meta['mean'])}, std {numbers(meta['std'])} (red green blue, 0..1)",
            f"duplicates (all bytes equal): {duplicates['val_in_train']:,} val pictures are also in train, "
            f"{duplicates['train_repeated']:,} train pictures repeat an earlier one; all are kept",
        )
    )


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading picture files


def shown(name) -> str:
    """A name from outside for a message of one line."""
    name = str(name)
    return name if name.isprintable() else ascii(name)


def short(error: BaseException) -> str:
    """The kind of an exception and the first words of its message."""
    words = " ".join(str(error).split())[:100]
    return type(error).__name__ + f": {shown(words)}" * bool(words)


def reduce_picture(path: Path, side: int = 16):
    """A picture file -> ((3, side, side) uint8, or why it cannot be decoded, as text; sha256 of the file), reduced by PIL's BOX filter."""
    from PIL import Image, UnidentifiedImageError

    digest = ""
    Image.init()  # PIL knows its formats only then
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            return f"more than {MAX_FILE:,} bytes", digest
        digest = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                return f"{image.width} x {image.height} pixels, more than PIL's limit", digest
            image.load()
            if image.mode.startswith("I;16"):
                grey = np.asarray(image).astype(np.uint32)
                image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
            if image.mode in ("I", "F"):
                return f"PIL mode {image.mode}, whose range is not known", digest
            if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.new("RGB", layer.size)
                image.paste(layer, mask=layer.getchannel("A"))
            small = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))
            return np.ascontiguousarray(small.transpose(2, 0, 1)), digest
    except UnidentifiedImageError:
        return "of no known format", digest
    except Exception as error:  # a damaged file makes PIL's decoders raise almost anything
        return short(error), digest
