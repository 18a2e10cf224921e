"""WikiText-2 by characters: writes train.bin, val.bin, test.bin (when there is a test text) and meta.json.

    python data/wikitext2_char/prepare.py [--source=FOLDER] [--min_count=20] [--out_dir=DIR]

--source is what data/wikitext2/prepare.py says; nothing is downloaded. A character that occurs fewer than --min_count times in the training
text becomes the unknown symbol U+FFFD, in every split, and so does one that occurs only elsewhere. U+FFFD itself counts as unknown where a
text holds it. A loss over these tokens is not one over the text's characters: the report says how many of them became unknown.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy is imported where it is used)
from corpus import decoded, wikitext_files, write_splits  # noqa: E402

UNKNOWN = "\ufffd"
MAX_CHARACTERS = 1 << 16  # ids are uint16


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare WikiText-2 by characters: python data/wikitext2_char/prepare.py [--key=value ...]"""

    source: str = ""  # folder of the raw files; empty: the directory of this script
    min_count: int = 20  # a character seen less often in the training text is unknown
    out_dir: str = ""  # directory for the files; empty: the one of this script

    def check(self) -> "PrepareConfig":
        if self.min_count < 1:
            raise InputError(f"--min_count={self.min_count} must be at least 1")
        return self


def prepare(config: PrepareConfig):
    """Reads, checks and numbers the files' characters and writes them. Raises InputError; the files are then as they were."""
    import numpy as np

    directory = Path(config.out_dir) if config.out_dir else HERE
    files = wikitext_files(config.source, HERE)
    points = {split: np.frombuffer(decoded(name, content).encode("utf-32-le"), dtype="<u4") for split, (name, content) in files.items()}
    seen, counts = np.unique(points["train"], return_counts=True)
    known = seen[(counts >= config.min_count) & (seen != ord(UNKNOWN))]
    if len(known) < 2 or len(known) >= MAX_CHARACTERS:
        raise InputError(f"--min_count={config.min_count} leaves {len(known):,} known characters, it must be 2 to {MAX_CHARACTERS - 1:,}")
    table = np.sort(np.append(known, ord(UNKNOWN)))
    unknown = int(np.searchsorted(table, ord(UNKNOWN)))
    splits, lost = {}, {}
    for split, characters in points.items():
        place = np.minimum(np.searchsorted(table, characters), len(table) - 1)
        splits[split] = np.where(table[place] == characters, place, unknown)
        lost[split] = int((splits[split] == unknown).sum())
    sources = {name: hashlib.sha256(content).hexdigest() for name, content in files.values()}
    meta = {
        "sources": [{"name": name, "bytes": len(content), "sha256": sources[name]} for name, content in files.values()],
        "min_count": config.min_count,
        "unknown_characters": lost,
        "vocab_size": len(table),
        "tokenizer": {"type": "char", "characters": "".join(map(chr, table)), "unknown": UNKNOWN},
    }
    write_splits(directory, splits, meta)
    print(f"{len(known):,} of {len(seen):,} characters occur at least {config.min_count} times in train, the others are one unknown symbol")
    for split, (name, content) in files.items():
        of_it = f"{lost[split]:,} of them unknown ({100 * lost[split] / len(splits[split]):.3f} %)"
        print(f"{split}.bin {len(splits[split]):,} tokens, {of_it}, from {name}, {len(content):,} bytes, sha256 {sources[name]}")
    print(f"in {directory}")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
