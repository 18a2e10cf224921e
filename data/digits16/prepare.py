"""Handwritten digits, 16x16: writes train.bin, val.bin, their labels and meta.json. Needs scikit-learn, and no network.

    python data/digits16/prepare.py [--out_dir=DIR]

The 1,797 grey pictures of 8x8 pixels, values 0..16, that scikit-learn carries (sklearn.datasets.load_digits: the test part of the UCI set
"Optical Recognition of Handwritten Digits"). Each value v becomes round(255 v / 16), halves up; each pixel becomes 2x2 equal ones
(nearest neighbour, which for a factor of 2 is also the BOX filter); the three channels are equal.

Split: of each digit, 80 % of its pictures (rounded) at random are for training, the rest for validation; each split keeps the order of the
source. Both splits come from the same 13 writers.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy and scikit-learn are imported where they are used)

SPLIT_SEED = 2507  # fixed: another split is another data set


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare handwritten digits at 16x16: python data/digits16/prepare.py [--key=value ...]"""

    out_dir: str = ""  # directory for the files; empty: the one of this script


def enlarge(images):
    """(N, 8, 8) with integers 0..16 -> (N, 3, 16, 16) uint8. Raises InputError for anything else."""
    import numpy as np

    levels = np.asarray(images)
    if levels.shape[1:] != (8, 8) or levels.min() < 0 or levels.max() > 16 or (levels != levels.round()).any():
        raise InputError("load_digits gives other pictures than 8x8 with integers 0..16: install the version in requirements.txt")
    grey = ((levels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    return np.repeat(grey.repeat(2, axis=1).repeat(2, axis=2)[:, None], 3, axis=1)


def split(classes):
    """(N,) classes -> sorted indices of the train pictures and of the val pictures; 80 % of each class are for training."""
    import numpy as np

    draw = np.random.RandomState(SPLIT_SEED)  # the old generator: numpy promises that its stream never changes
    train = []
    for number in np.unique(classes):
        members = draw.permutation(np.flatnonzero(classes == number))
        train.append(members[: (8 * len(members) + 5) // 10])
    train = np.sort(np.concatenate(train))
    return train, np.setdiff1d(np.arange(len(classes)), train)


def prepare(config: PrepareConfig):
    """Writes the files and says on stdout what they are. Raises InputError; the files are then as they were."""
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(f"the package scikit-learn is missing ({error}): pip install scikit-learn") from None
    import numpy as np

    from pictures import PictureWriter, summary

    directory = Path(config.out_dir) if config.out_dir else HERE
    digits = load_digits()
    images, classes = enlarge(digits.images), digits.target.astype(np.int64)
    indices = dict(zip(("train", "val"), split(classes), strict=True))
    source = "scikit-learn's handwritten digits (load_digits)"
    content = digits.images.astype(np.uint8).tobytes() + classes.astype(np.uint8).tobytes()
    with PictureWriter(directory) as writer:
        for name, rows in indices.items():
            writer.add(name, images[rows])
        labels = {name: classes[rows] for name, rows in indices.items()}
        meta = writer.finish(
            labels,
            [str(number) for number in range(10)],
            source,
            {"images and target as uint8": hashlib.sha256(content).hexdigest()},
            scikit_learn=sklearn.__version__,
            split_seed=SPLIT_SEED,
        )
    print(f"{source} {sklearn.__version__}, in {directory}\n{summary(meta)}")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
