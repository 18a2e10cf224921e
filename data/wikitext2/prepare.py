"""WikiText-2 in GPT-2's BPE: writes train.bin, val.bin, test.bin (when there is a test text) and meta.json.

    python data/wikitext2/prepare.py [--source=FOLDER] [--out_dir=DIR]

--source: the folder with train.txt, valid.txt and perhaps test.txt, or the same as wiki.train.raw or wiki.train.tokens, the names in the
official archives; without it they are looked for in this directory. There is no download: the archives' old address is dead, and no
checksum of another copy is known. Each file is tokenised whole and as it is, without end-of-text marks. test.bin is for you: train.py reads
train.bin and val.bin.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import configure, one_line_errors  # noqa: E402  (numpy and tiktoken are imported where they are used)
from corpus import GPT2Encoder, decoded, wikitext_files, write_splits  # noqa: E402


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare WikiText-2 in GPT-2's BPE: python data/wikitext2/prepare.py [--key=value ...]"""

    source: str = ""  # folder of the raw files; empty: the directory of this script
    out_dir: str = ""  # directory for the files; empty: the one of this script


def prepare(config: PrepareConfig):
    """Reads, checks and tokenises the files and writes them. Raises InputError; the files are then as they were."""
    directory = Path(config.out_dir) if config.out_dir else HERE
    files = wikitext_files(config.source, HERE)
    encoder = GPT2Encoder()
    splits = {split: encoder.encode(decoded(name, content)) for split, (name, content) in files.items()}
    sources = {name: hashlib.sha256(content).hexdigest() for name, content in files.values()}
    meta = {
        "sources": [{"name": name, "bytes": len(content), "sha256": sources[name]} for name, content in files.values()],
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.tokenizer,
    }
    write_splits(directory, splits, meta)
    for split, (name, content) in files.items():
        print(f"{split}.bin {len(splits[split]):,} tokens, from {name}, {len(content):,} bytes, sha256 {sources[name]}")
    print(f"in {directory}")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
