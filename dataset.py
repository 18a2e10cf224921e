"""Token data sets: the files that data/NAME/prepare.py writes and the batches that train.py draws from them.

On disk a data set is a directory with

    train.bin, val.bin   token ids, uint16, little-endian, nothing else (nanoGPT's format)
    meta.json            source and its sha256, vocab_size, tokenizer, and per split the count of tokens and the sha256 of the file

A training batch is a pure function of (seed, step): resuming needs no generator state, every arm of a comparison sees the same data, and any
number of processes cuts the same global batch into its own rows.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from configurator import InputError

ROOT = Path(__file__).resolve().parent
DATA_STREAM = 1  # SeedSequence keys (seed, stream, step): train.py's dropout is stream 2
HASH_AT_LOAD = 1 << 30  # bytes; larger .bin files are checked by size alone, hashing 18 GB would hold up the start


# ---------------------------------------------------------------------------------------------------------------------------------
# Files


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, content: bytes):
    """Writes a file whole or not at all: temporary name in the same directory, fsync, rename. Raises InputError when it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; whatever was there before is unchanged") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_tokens(directory: Path, train: np.ndarray, val: np.ndarray, meta: dict):
    """Writes train.bin, val.bin and, last, meta.json. `meta` needs vocab_size (int) and tokenizer (dict, see Tokenizer)."""
    directory = Path(directory)
    splits = {}
    for name, ids in (("train", train), ("val", val)):
        content = np.ascontiguousarray(ids, dtype="<u2").tobytes()
        write_file(directory / f"{name}.bin", content)
        splits[name] = {"tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps({"kind": "tokens", "dtype": "uint16", **meta, "splits": splits}, indent=1, ensure_ascii=False)
    write_file(directory / "meta.json", (text + "\n").encode())


def directory_of(dataset: str) -> Path:
    """The directory of `--dataset`: a name under data/ of this repository, else a path."""
    named = ROOT / "data" / dataset
    return named if named.is_dir() else Path(dataset)


def prepare_if_missing(dataset: str):
    """Runs data/NAME/prepare.py when the data set is not there yet. One process prepares, others that ask meanwhile wait for it.

    Raises InputError when there is nothing to run or the preparation fails.
    """
    directory = directory_of(dataset)
    if (directory / "meta.json").is_file():
        return
    script = directory / "prepare.py"
    if not script.is_file():
        known = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))
        raise InputError(f"--dataset={dataset} is neither a directory with meta.json nor one of {', '.join(known)}")
    try:
        lock = open(directory / ".prepare.lock", "w")
    except OSError as error:
        raise InputError(f"cannot prepare --dataset={dataset} in {directory}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (directory / "meta.json").is_file():
            return
        print(f"{directory / 'meta.json'} is missing: running {script}", file=sys.stderr)
        if subprocess.run([sys.executable, str(script)], stdout=sys.stderr).returncode != 0:
            raise InputError(f"{script} failed (its message is above), so --dataset={dataset} is not there")


# ---------------------------------------------------------------------------------------------------------------------------------
# Text <-> token ids


class Tokenizer:
    """Text <-> ids from the description in meta.json or in a checkpoint, so that neither needs the other's folder.

    {"type": "char", "characters": "..."}: the id of a character is its place in the string. {"type": "gpt2"}: GPT-2's BPE by tiktoken.
    """

    def __init__(self, description: dict):
        self.type = description.get("type")
        if self.type == "char":
            self.characters = description["characters"]
            self.ids = {character: i for i, character in enumerate(self.characters)}
        elif self.type == "gpt2":
            self.bpe = gpt2_bpe()
        else:
            raise InputError(f"tokenizer {description} is unknown: type must be 'char' or 'gpt2'")

    def encode(self, text: str) -> list[int]:
        """Raises InputError that names a character outside a character vocabulary."""
        if self.type == "gpt2":
            return self.bpe.encode(text, allowed_special={"<|endoftext|>"})
        for place, character in enumerate(text):
            if character not in self.ids:
                known = "".join(c for c in self.characters if c.isprintable())
                raise InputError(f"character {character!r} at position {place} is not in the model's vocabulary of {len(self.characters)}: {known}")
        return [self.ids[character] for character in text]

    def decode_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one token (for BPE perhaps a part of a character). Ids beyond the vocabulary (padding rows) give b''."""
        if self.type == "char":
            return self.characters[token].encode() if token < len(self.characters) else b""
        return self.bpe.decode_single_token_bytes(token) if token < self.bpe.n_vocab else b""

    def decode(self, tokens) -> str:
        """Ids to text; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.decode_bytes(int(token)) for token in tokens).decode(errors="replace")


def gpt2_bpe():
    """tiktoken's GPT-2 encoding. Raises InputError that says what to put where when package or vocabulary cannot be had."""
    try:
        import tiktoken
    except ImportError:
        raise InputError("GPT-2 BPE needs the package tiktoken: pip install tiktoken") from None
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' errors, a wrong checksum: tiktoken names no common class
        raise InputError(
            f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}): on a machine without network copy a tiktoken cache here "
            "(6d1cbeee0f20b3d9449abfede4726ed8212e3aee and 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6) and set TIKTOKEN_CACHE_DIR to its folder"
        ) from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Batches


class Tokens:
    """The two splits of a data set as tensors on `device` when they fit there, else memory-mapped on the CPU.

    Attributes: vocab_size, tokenizer (dict), checksum {"train": sha256, "val": sha256}, block_size (T).
    Raises InputError for a missing, damaged or too short data set.
    """

    def __init__(self, dataset: str, block_size: int, device):
        import torch

        directory = directory_of(dataset)
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.vocab_size, self.tokenizer = int(meta["vocab_size"]), meta["tokenizer"]
            self.checksum = {name: meta["splits"][name]["sha256"] for name in ("train", "val")}
            counts = {name: int(meta["splits"][name]["tokens"]) for name in ("train", "val")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{directory / 'meta.json'} cannot be read ({type(error).__name__}: {error}): run {directory / 'prepare.py'} again") from None
        self.block_size, self.device = block_size, torch.device(device)
        self.split = {}
        for name, count in counts.items():
            path = directory / f"{name}.bin"
            again = f"run {directory / 'prepare.py'} again"
            if not path.is_file():
                raise InputError(f"{path} is missing: {again}")
            if path.stat().st_size != 2 * count:
                raise InputError(f"{path} has {path.stat().st_size} bytes, meta.json says {count} tokens of 2 bytes: {again}")
            if path.stat().st_size <= HASH_AT_LOAD and sha256_of(path) != self.checksum[name]:
                raise InputError(f"{path} does not have the sha256 that meta.json states: {again}")
            if count < block_size + 1:
                raise InputError(f"{path} has {count} tokens, fewer than one sequence of --block_size={block_size} and its target")
            # mode "c" is copy-on-write: torch wants a writable array and the file must stay as it is. int16 because uint16 lacks operators.
            tokens = torch.from_numpy(np.memmap(path, dtype="<i2", mode="c"))
            if path.stat().st_size <= HASH_AT_LOAD and int(self._unsigned(tokens).max()) >= self.vocab_size:
                raise InputError(f"{path} has token id {int(self._unsigned(tokens).max())}, the vocabulary has {self.vocab_size}: {again}")
            self.split[name] = tokens
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if sum(2 * count for count in counts.values()) < free / 4:
                self.split = {name: tokens.to(self.device) for name, tokens in self.split.items()}
        self.home = self.split["train"].device  # where the tokens are, and the offsets must be
        self.span = torch.arange(block_size + 1, device=self.home)

    @staticmethod
    def _unsigned(tokens):
        return tokens.long() & 0xFFFF

    def offsets(self, seed: int, step: int, rows: int) -> np.ndarray:
        """(rows,) int64: where the sequences of the global batch of `step` begin in train.bin. A pure function of its arguments."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, DATA_STREAM, step])))
        return generator.integers(0, len(self.split["train"]) - self.block_size, size=rows)

    def sequences(self, offsets):
        """(B,) int64 offsets on `home` -> inputs x and targets y, (B, T) int64 on `device`; y is x one token later."""
        chunk = self._unsigned(self.split["train"][offsets[:, None] + self.span])  # (B, T + 1)
        if self.home != self.device:
            chunk = chunk.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else chunk.to(self.device)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()

    def validation(self, batch_size: int, eval_tokens: int = 0, rank: int = 0, world: int = 1):
        """Yields (x, y, number of targets) over the validation set in order, this rank's share of it.

        The set is cut into windows of T tokens, the last one shorter; eval_tokens > 0 takes eval_tokens // T of the full windows (at least one),
        evenly spaced. Every batch has batch_size rows; targets that do not exist are -1, which the loss ignores.
        """
        import torch

        tokens, T = self.split["val"], self.block_size
        starts = np.arange(0, len(tokens) - 1, T)
        wanted = max(1, eval_tokens // T)
        if eval_tokens and wanted < len(starts):
            full = (len(tokens) - 1) // T
            starts = starts[np.linspace(0, full - 1, wanted).round().astype(np.int64)]
        starts = starts[rank::world]
        for first in range(0, len(starts), batch_size):
            batch = np.full(batch_size, len(tokens), dtype=np.int64)  # rows past the end have no target at all
            rows = starts[first : first + batch_size]
            batch[: len(rows)] = rows
            index = torch.from_numpy(batch).to(self.home)[:, None] + self.span
            chunk = self._unsigned(tokens[index.clamp(max=len(tokens) - 1)])
            x, y = chunk[:, :-1], chunk[:, 1:].masked_fill(index[:, 1:] >= len(tokens), -1)
            targets = int(np.clip(len(tokens) - 1 - rows, 0, T).sum())
            yield x.contiguous().to(self.device), y.contiguous().to(self.device), targets
