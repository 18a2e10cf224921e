"""MNIST, 28x28: writes train.bin, val.bin, their labels and meta.json, in the format of all picture data sets here.

    python data/mnist/prepare.py                      downloads the four official files (11.6 MB)
    python data/mnist/prepare.py --source=FOLDER      takes them from a folder: train-images-idx3-ubyte[.gz] and so on

60,000 pictures to train on, the 10,000 of the test set to validate on, in the official order. The three channels are equal, so that a vision
transformer reads them like any others. The contents of the files are verified by checksum, whether they come packed or not.
"""

import gzip
import hashlib
import sys
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy is imported where it is used)

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# name of the unpacked file -> its bytes and sha256; bytes and sha256 of the official .gz
FILES = {
    "train-images-idx3-ubyte": (
        47040016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        9912422,
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    ),
    "train-labels-idx1-ubyte": (
        60008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        28881,
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    ),
    "t10k-images-idx3-ubyte": (
        7840016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        1648877,
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    ),
    "t10k-labels-idx1-ubyte": (
        10008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        4542,
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
}


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare MNIST: python data/mnist/prepare.py [--source=FOLDER] [--out_dir=DIR]"""

    source: str = "download"  # download, or a folder that holds the four official files, packed (.gz) or not
    out_dir: str = ""  # directory for the files; empty: the one of this script


def content_of(folder: Path, name: str) -> bytes:
    """One unpacked file, verified. Raises InputError."""
    size, sha256, _, _ = FILES[name]
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise InputError(f"--source={folder} lacks {name}.gz: the four official files are needed, {', '.join(f'{file}.gz' for file in FILES)}")
    try:
        with open(path, "rb") if path == plain else gzip.open(path) as file:
            content = file.read(size + 1)  # no more, whatever a damaged archive would unpack to
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}): fetch it again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"{path} is not the official file: its contents do not have the sha256 {sha256[:16]}...: fetch it again")
    return content


def pictures_of(content: bytes):
    """The idx format's pictures: 16 bytes (type, count, height, width), then one byte a pixel -> (N, 28, 28) uint8."""
    import numpy as np

    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(-1, 28, 28)


def labels_of(content: bytes):
    """The idx format's labels: 8 bytes (type, count), then one byte each -> (N,) int64."""
    import numpy as np

    return np.frombuffer(content, dtype=np.uint8, offset=8).astype(np.int64)


def prepare(config: PrepareConfig):
    """Writes the files and says on stdout what they are. Raises InputError; the files are then as they were."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(config.source)
        if config.source == "download":
            from download import download

            folder = Path(temporary)
            for name, (_, _, size, sha256) in FILES.items():
                download(f"{URL}{name}.gz", folder / f"{name}.gz", sha256, max_bytes=size)
        elif not folder.is_dir():
            raise InputError(f"--source={config.source} is neither download nor a folder with the four official files")
        contents = {name: content_of(folder, name) for name in FILES}
    import numpy as np

    from pictures import PictureWriter, summary

    directory, labels = Path(config.out_dir) if config.out_dir else HERE, {}
    with PictureWriter(directory, shape=(3, 28, 28)) as writer:
        for split, start in (("train", "train"), ("val", "t10k")):
            grey = pictures_of(contents[f"{start}-images-idx3-ubyte"])
            for first in range(0, len(grey), 4096):
                writer.add(split, np.repeat(grey[first : first + 4096, None], 3, axis=1))
            labels[split] = labels_of(contents[f"{start}-labels-idx1-ubyte"])
        meta = writer.finish(labels, [str(digit) for digit in range(10)], "MNIST", {name: FILES[name][1] for name in FILES})
    print(f"MNIST, in {directory}\n{summary(meta)}")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
