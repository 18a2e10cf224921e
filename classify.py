"""What sample.py does with a checkpoint of pictures: the five most probable classes of each, and a contact sheet.

Its pictures are files or folders of files, reduced as data/imagenet16/prepare.py reduces them, or the first validation pictures of the data set
that the model was trained on.
"""

from pathlib import Path

import numpy as np
import torch

from configurator import InputError
from dataset import directory_of, write_file
from pictures import reduce_picture


def read_pictures(given: str, count: int, meta: dict) -> tuple[np.ndarray, list[str]]:
    """At most `count` pictures, uint8 (N, 3, S, S), and a name for each: of the files in `given`, or validation pictures. Raises InputError."""
    classes, side = meta["tokenizer"]["class_names"], meta["tokenizer"]["shape"][-1]
    if given:
        paths = []
        for word in map(Path, given.split(",")):
            if not word.exists():
                raise InputError(f"--pictures={given}: {word} does not exist")
            paths += sorted(path for path in word.rglob("*") if path.is_file() and not path.name.startswith(".")) if word.is_dir() else [word]
        if not paths:
            raise InputError(f"--pictures={given} has no file")
        reduced = [reduce_picture(path, side)[0] for path in paths[:count]]
        for path, picture in zip(paths, reduced):
            if isinstance(picture, str):
                raise InputError(f"--pictures: {path} is {picture}: name files that are pictures")
        return np.stack(reduced), [str(path) for path in paths[:count]]
    directory = directory_of(meta["config"]["dataset"])
    try:
        count = min(count, (directory / "val.bin").stat().st_size // (3 * side * side))
        pictures = np.fromfile(directory / "val.bin", dtype=np.uint8, count=count * 3 * side * side).reshape(-1, 3, side, side)
        labels = np.fromfile(directory / "val_labels.bin", dtype="<u2", count=len(pictures))
        return pictures, [f"validation picture {i}, {classes[label]}" for i, label in enumerate(labels)]
    except (OSError, ValueError, IndexError):
        raise InputError(f"the validation pictures of {directory} are not there (any more): name pictures with --pictures=FILE,FOLDER,...") from None


def draw_sheet(pictures: np.ndarray, captions: list[str]) -> bytes:
    """A PNG with the pictures, enlarged without smoothing, each over its caption."""
    from figures import plt, png

    columns = min(5, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.3 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, caption in zip(axes.flat, pictures, captions):
        axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
        axis.set_title(caption, fontsize=7)
    return png(figure)


@torch.inference_mode()
def classify(model, meta: dict, given: str, count: int, sheet: Path, place):
    """Prints the five most probable classes of each picture and writes the contact sheet. Raises InputError."""
    pictures, names = read_pictures(given, count, meta)
    about = meta["tokenizer"]
    mean, std = (torch.tensor(about[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (torch.from_numpy(pictures).float() / 255 - mean) / std.clamp(min=1 / 255)  # as dataset.Pictures.normalise
    logits, _ = model(x.to(place.device, place.dtype))
    shares, classes = logits.float().softmax(dim=1).topk(min(5, logits.size(1)))
    captions = []
    for name, share, top in zip(names, shares.tolist(), classes.tolist()):
        print(f"{name}: " + ", ".join(f"{about['class_names'][i]} {p:.1%}" for p, i in zip(share, top)))
        shown = name.split(", ", 1)[-1] if not given else Path(name).name
        captions.append(f"{shown[:28]}\n→ {about['class_names'][top[0]][:24]} {share[0]:.0%}")
    write_file(sheet, draw_sheet(pictures, captions))
    print(sheet)
