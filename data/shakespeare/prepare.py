"""Shakespeare in GPT-2's BPE: writes train.bin (the first 90 % of the characters), val.bin (the rest), meta.json and input.txt.

    python data/shakespeare/prepare.py [--source=auto|tinyshakespeare|plays|PATH] [--out_dir=DIR]

--source is what data/shakespeare_char/prepare.py says, whose code gets the text and writes the files. The text is cut by characters, as there,
then each part is tokenised as it is, without end-of-text marks. Losses per token here and per character there are not comparable.
"""

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import InputError, configure, one_line_errors  # noqa: E402  (numpy and tiktoken are imported where they are used)
from corpus import GPT2Encoder, decoded  # noqa: E402


def character_script():
    """data/shakespeare_char/prepare.py as a module: no package holds it, and another prepare.py cannot be imported by that name."""
    name = "data_shakespeare_char_prepare"
    if name not in sys.modules:  # where dataclasses and --help look a module up
        spec = importlib.util.spec_from_file_location(name, HERE.parent / "shakespeare_char" / "prepare.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


characters = character_script()


@dataclass(frozen=True)
class PrepareConfig(characters.PrepareConfig):
    """Prepare Shakespeare in GPT-2's BPE: python data/shakespeare/prepare.py [--key=value ...]"""


def prepare(config: PrepareConfig):
    """Gets the text, checks it, writes the files and says on stdout what they are. Raises InputError; the files are then as they were."""
    directory = Path(config.out_dir) if config.out_dir else HERE
    encoder = GPT2Encoder()  # first: without its vocabulary a text is of no use
    content, name = characters.get_content(config.source, directory)
    digest = hashlib.sha256(content).hexdigest()
    name = characters.KNOWN.get(digest, name)
    text = decoded(name, content)
    cut = len(text) * 9 // 10
    splits = [encoder.encode(text[:cut]), encoder.encode(text[cut:])]
    if min(map(len, splits)) < 2:
        raise InputError(f"{name} has {len(text)} characters: too short, each split (90 % and 10 %) needs at least 2 tokens")
    characters.check_kept(directory, digest)
    meta = {
        "source": name,
        "source_sha256": digest,
        "characters": len(text),
        "vocab_size": encoder.vocab_size,
        "tokenizer": encoder.tokenizer,
    }
    characters.write(directory, content, *splits, meta)
    print(f"text: {name}, {len(text):,} characters, sha256 {digest}")
    print(f"train.bin {len(splits[0]):,} tokens, val.bin {len(splits[1]):,} tokens, in {directory}")


if __name__ == "__main__":
    with one_line_errors():
        prepare(configure(PrepareConfig))
