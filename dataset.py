"""Data sets, tokens or pictures: the files that data/NAME/prepare.py writes and the batches that train.py draws from them.

On disk a data set of tokens is a directory with

    train.bin, val.bin   token ids, uint16, little-endian, nothing else (nanoGPT's format)
    meta.json            source and its sha256, vocab_size, tokenizer, and per split the count of tokens and the sha256 of the file

and one of pictures has uint8 pictures N x 3 x S x S in train.bin and val.bin, and uint16 labels in train_labels.bin and val_labels.bin.

A training batch is a pure function of (seed, step): resuming needs no generator state, every arm of a comparison sees the same data, and any
number of processes cuts the same global batch into its own rows.
"""

import contextlib
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from configurator import InputError, TrainConfig

ROOT = Path(__file__).resolve().parent
DATA_STREAM = 1  # SeedSequence keys (seed, stream, step): train.py's dropout is stream 2
HASH_AT_LOAD = 1 << 30  # bytes; larger .bin files are checked by size alone, hashing 18 GB would hold up the start (their token ids: see Tokens)
REPLACED = ".meta.json.tmp"  # meta.json of a data set that is being replaced
SCAN = 1 << 26  # tokens that are looked at together
TABLE = 1 << 26  # bytes that the table of all windows of a picture may take; imagenet16's take 205 kB, 64 x 64 pixels with shifts up to 8 38 MB


# ---------------------------------------------------------------------------------------------------------------------------------
# Files


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_in_place(temporary: Path, path: Path):
    """Renames a complete, synced file to its name and syncs the directory, so that a power loss does not undo the rename."""
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_file(path: Path, content: bytes):
    """Writes a file whole or not at all: temporary name in the same directory, fsync, rename. Raises InputError when it cannot."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; whatever was there before is unchanged") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def staging(directory: Path):
    """A hidden folder inside `directory`, made if need be, in which the files of a data set are written before replace_files; removed at the end.

    One process at a time; the next one removes the folder that a killed one has left. Raises InputError for all that cannot be written.
    """
    with contextlib.ExitStack() as undo:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory, os.O_RDONLY)
            undo.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process is writing data in {directory}: wait for it") from None
            except OSError:  # a file system without locks: then nothing is taken for abandoned
                pass
            else:
                for abandoned in directory.glob(".prepare.*.tmp"):
                    shutil.rmtree(abandoned, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix=".prepare.", suffix=".tmp", dir=directory))
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            yield folder
        except OSError as error:
            raise InputError(f"cannot write in {directory}: {error.strerror or error}") from None


def replace_files(folder: Path, directory: Path, names: list[str] | tuple[str, ...]):
    """Moves the complete files of a data set from `folder` into `directory`; meta.json is the last of `names`. Raises InputError and OSError.

    meta.json, without which there is no data set, goes first and comes back last: a mixture of old and new files is never taken for one. Until then
    the old one is REPLACED, so that whoever is killed on the way can still be told whose the other files are.
    """
    for name in names:
        if (directory / name).is_dir():
            raise InputError(f"{directory / name} is a directory: move it away")
    other = (directory / "meta.json").is_file() and not filecmp.cmp(directory / "meta.json", folder / "meta.json", shallow=False)
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory / "meta.json", directory / REPLACED)
    for name in names:
        os.replace(folder / name, directory / name)
    (directory / REPLACED).unlink(missing_ok=True)
    if other:
        print(f"note: another data set was in {directory}, which this one has replaced", file=sys.stderr)


def write_tokens(directory: Path, train: np.ndarray, val: np.ndarray, meta: dict):
    """Writes train.bin, val.bin and, last, meta.json. `meta` needs vocab_size (int) and tokenizer (dict, see Tokenizer)."""
    directory = Path(directory)
    splits = {}
    for name, ids in (("train", train), ("val", val)):
        if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < 2**16:
            raise InputError(f"the {name} split has token ids from {np.min(ids)} to {np.max(ids)}: uint16 holds 0 to 65535")
        content = np.ascontiguousarray(ids, dtype="<u2").tobytes()
        write_file(directory / f"{name}.bin", content)
        splits[name] = {"tokens": len(ids), "sha256": hashlib.sha256(content).hexdigest()}
    write_file(directory / "meta.json", meta_json({"kind": "tokens", "dtype": "uint16", **meta, "splits": splits}))


def own_sha256(meta: dict) -> str:
    """SHA-256 of meta.json without its own entry "sha256", in a form that does not depend on how it was written down."""
    text = json.dumps({key: value for key, value in meta.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def meta_json(meta: dict) -> bytes:
    """What is written to meta.json, with a checksum of its own: a changed letter of the tokenizer would otherwise pass for another tokenizer."""
    return (json.dumps({**meta, "sha256": own_sha256(meta)}, indent=1, ensure_ascii=False) + "\n").encode()


def check_meta(directory: Path, meta: dict):
    """Raises InputError when meta.json states a checksum of its own that it does not have. (One written by hand may state none.)"""
    if meta.get("sha256", "") not in ("", own_sha256(meta)):
        raise InputError(f"{directory / 'meta.json'} is damaged: it does not have the sha256 that it states: run {directory / 'prepare.py'} again")


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
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process prepares {directory}: waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: then two may prepare at once, each in a folder of its own
            pass
        if (directory / "meta.json").is_file():
            return
        print(f"{directory / 'meta.json'} is missing: running {script}", file=sys.stderr)
        # the script holds the lock as well: when this process is killed it works on, and the next one waits for it
        if subprocess.run([sys.executable, str(script)], stdout=sys.stderr, pass_fds=[lock.fileno()]).returncode != 0:
            raise InputError(f"{script} failed (its message is above), so --dataset={dataset} is not there")


# ---------------------------------------------------------------------------------------------------------------------------------
# Text <-> token ids


class Tokenizer:
    """Text <-> ids from the description in meta.json or in a checkpoint, so that neither needs the other's folder.

    {"type": "char", "characters": "..."}: the id of a character is its place in the string; with "unknown": "?", any other character gets the
    id of that one. {"type": "gpt2"}: GPT-2's BPE by tiktoken.
    """

    def __init__(self, description: dict):
        self.type = description.get("type")
        if self.type == "char":
            self.characters = description["characters"]
            self.ids = {character: i for i, character in enumerate(self.characters)}
            self.unknown = self.ids.get(description.get("unknown"))
        elif self.type == "gpt2":
            self.bpe = gpt2_bpe()
        else:
            raise InputError(f"tokenizer {description} is unknown: type must be 'char' or 'gpt2'")

    def encode(self, text: str) -> list[int]:
        """Raises InputError that names a character outside a character vocabulary."""
        if self.type == "gpt2":
            return self.bpe.encode(text, allowed_special={"<|endoftext|>"})
        for place, character in enumerate(text):
            if character not in self.ids and self.unknown is None:
                known = "".join(c for c in self.characters if c.isprintable())
                raise InputError(f"character {character!r} at position {place} is not in the model's vocabulary of {len(self.characters)}: {known}")
        return [self.ids.get(character, self.unknown) for character in text]

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


def stream(seed: int, step: int) -> np.random.Generator:
    """The data generator of one step: counter-based, so that any step's draws are had without those before it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, DATA_STREAM, step])))


def read_meta(dataset: str) -> tuple[Path, dict]:
    """Directory and meta.json of a data set. Raises InputError when it cannot be read."""
    path = directory_of(dataset) / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kind = meta["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}): run {path.parent / 'prepare.py'} again") from None
    if kind not in ("tokens", "pictures"):
        raise InputError(f"{path} describes {kind!r}; this version reads tokens and pictures")
    return path.parent, meta


def incomplete(directory: Path, error: Exception) -> InputError:
    """The error for a meta.json that lacks what it must have."""
    return InputError(f"{directory / 'meta.json'} is incomplete ({type(error).__name__}: {error}): run {directory / 'prepare.py'} again")


def check_file(path: Path, size: int, sha256: str):
    """Raises InputError unless the file has `size` bytes and, up to HASH_AT_LOAD, the checksum that meta.json states."""
    again = f"run {path.parent / 'prepare.py'} again"
    if not path.is_file():
        raise InputError(f"{path} is missing: {again}")
    if path.stat().st_size != size:
        raise InputError(f"{path} has {path.stat().st_size} bytes, meta.json says {size}: {again}")
    if size <= HASH_AT_LOAD and sha256_of(path) != sha256:
        raise InputError(f"{path} does not have the sha256 that meta.json states: {again}")


class Tokens:
    """The two splits of a data set as tensors on `device` when they fit there, else memory-mapped on the CPU.

    No token id beyond the vocabulary reaches the model, where it would read or write past a table. Files up to HASH_AT_LOAD are looked through at
    the start, and so are larger ones that go to the GPU, there, in milliseconds. What stays memory-mapped is looked at batch by batch, on the CPU
    (12 us for 16,400 tokens).

    Attributes: vocab_size, tokenizer (dict), checksum {"train": sha256, "val": sha256}, block_size (T).
    Raises InputError for a missing, damaged or too short data set.
    """

    def __init__(self, dataset: str, block_size: int, device):
        import torch

        directory, meta = read_meta(dataset)
        try:
            self.vocab_size, self.tokenizer = int(meta["vocab_size"]), meta["tokenizer"]
            self.checksum = {name: meta["splits"][name]["sha256"] for name in ("train", "val")}
            counts = {name: int(meta["splits"][name]["tokens"]) for name in ("train", "val")}
        except (ValueError, KeyError, TypeError) as error:
            raise incomplete(directory, error) from None
        self.block_size, self.device = block_size, torch.device(device)
        self.split = {}
        for name, count in counts.items():
            path = directory / f"{name}.bin"
            check_file(path, 2 * count, self.checksum[name])
            if count < block_size + 1:
                raise InputError(f"{path} has {count} tokens, fewer than one sequence of --block_size={block_size} and its target")
            # mode "c" is copy-on-write: torch wants a writable array and the file must stay as it is. int16 because uint16 lacks operators.
            tokens = np.memmap(path, dtype="<i2", mode="c")
            if 2 * count <= HASH_AT_LOAD:
                self._check(path, int(tokens.view("<u2").max()))
            self.split[name] = torch.from_numpy(tokens)
        check_meta(directory, meta)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if sum(2 * count for count in counts.values()) < free / 4:
                self.split = {name: tokens.to(self.device) for name, tokens in self.split.items()}
        self.unseen = {}  # files of which no one knows yet whether an id is beyond the vocabulary
        for name, count in counts.items():
            if 2 * count > HASH_AT_LOAD and self.split[name].device.type == "cpu":
                self.unseen[name] = directory / f"{name}.bin"
            elif 2 * count > HASH_AT_LOAD:
                for part in self.split[name].split(SCAN):
                    self._check(directory / f"{name}.bin", int((part.int() & 0xFFFF).max()))
        self.home = self.split["train"].device  # where the tokens are, and the offsets must be
        self.span = torch.arange(block_size + 1, device=self.home)

    def _check(self, path: Path, top: int):
        """Raises InputError for a highest token id that the vocabulary does not have."""
        if top >= self.vocab_size:
            raise InputError(f"{path} has token id {top}, the vocabulary has {self.vocab_size}: run {path.parent / 'prepare.py'} again")

    def _take(self, name: str, index):
        """Token ids of a split, int64, at these places."""
        tokens = self.split[name][index].long() & 0xFFFF
        if name in self.unseen:
            self._check(self.unseen[name], int(tokens.max()))
        return tokens

    def draw(self, seed: int, step: int, rows: int) -> np.ndarray:
        """(rows,) int64: where the sequences of the global batch of `step` begin in train.bin. A pure function of its arguments."""
        return stream(seed, step).integers(0, len(self.split["train"]) - self.block_size, size=rows)

    def batch(self, drawn):
        """(B,) int64 starts on `home` -> inputs x and targets y, (B, T) int64 on `device`; y is x one token later."""
        chunk = self._take("train", drawn[:, None] + self.span)  # (B, T + 1)
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
        most = -(-len(starts) // world)  # every process yields as many batches, the last perhaps without a target: sharded models run in step
        starts = starts[rank::world]
        for first in range(0, most, batch_size):
            batch = np.full(batch_size, len(tokens), dtype=np.int64)  # rows past the end have no target at all
            rows = starts[first : first + batch_size]
            batch[: len(rows)] = rows
            index = torch.from_numpy(batch).to(self.home)[:, None] + self.span
            chunk = self._take("val", index.clamp(max=len(tokens) - 1))
            x, y = chunk[:, :-1], chunk[:, 1:].masked_fill(index[:, 1:] >= len(tokens), -1)
            targets = int(np.clip(len(tokens) - 1 - rows, 0, T).sum())
            yield x.contiguous().to(self.device), y.contiguous().to(self.device), targets


class Pictures:
    """The two splits of a data set of square pictures, uint8, on `device`; augmentation and normalisation are vectorised there.

    A batch is small, so that on a GPU it costs what its kernels cost to start. Hence tables, made once: of every byte's normalised value in every
    channel, by `normalise` itself and so equal to the bit, and of the pixels that every window takes. A training batch is six kernels.

    Attributes: n_classes, image_size, checksum, tokenizer (what a checkpoint needs to name classes and to normalise), block_size (patches of a
    picture). Raises InputError for a missing or damaged data set.
    """

    def __init__(self, dataset: str, patch_size: int, pad: int, flip: bool, device):
        import torch

        directory, meta = read_meta(dataset)
        self.device, self.pad, self.flip = torch.device(device), pad, flip
        try:
            self.n_classes, (_, self.image_size, _) = int(meta["classes"]), meta["shape"]
            self.tokenizer = {"type": "pictures", **{key: meta[key] for key in ("class_names", "mean", "std", "shape")}}
            self.checksum = {}
            self.split = {}
            for name in ("train", "val"):
                entry = meta["splits"][name]
                count = int(entry["pictures"])
                self.checksum |= {name: entry["sha256"], f"{name}_labels": entry["labels_sha256"]}
                check_file(directory / f"{name}.bin", count * 3 * self.image_size**2, entry["sha256"])
                check_file(directory / f"{name}_labels.bin", 2 * count, entry["labels_sha256"])
                pictures = np.fromfile(directory / f"{name}.bin", dtype=np.uint8).reshape(count, 3, self.image_size, self.image_size)
                labels = np.fromfile(directory / f"{name}_labels.bin", dtype="<u2").astype(np.int64)
                if count == 0 or labels.max() >= self.n_classes:
                    raise InputError(f"{directory / f'{name}_labels.bin'} has labels beyond the {self.n_classes} classes, or no picture")
                self.split[name] = torch.from_numpy(pictures).to(device), torch.from_numpy(labels).to(device)
            if len(meta["mean"]) != 3 or len(meta["std"]) != 3:
                raise ValueError("mean and std need three numbers each")
            scale = [torch.tensor(meta[key], dtype=torch.float32, device=device).view(3, 1, 1) for key in ("mean", "std")]
        except (ValueError, KeyError, TypeError) as error:
            raise incomplete(directory, error) from None
        check_meta(directory, meta)
        if self.image_size % patch_size:
            raise InputError(f"--patch_size={patch_size} does not divide the pictures' side of {self.image_size} pixels")
        self.mean, self.std = scale[0], scale[1].clamp(min=1 / 255)  # a channel may be constant
        self.block_size = (self.image_size // patch_size) ** 2
        self.home = self.device
        every = torch.arange(256, dtype=torch.uint8, device=device).expand(1, 3, 1, 256)
        known = self.normalise(every).view(1, 3, 256)
        self.values = torch.cat((known, torch.zeros_like(known)), dim=2)  # (1, 3, 512): code -> value of a channel, 0 from 256 on
        shifts = torch.arange(-pad, pad + 1).roll(-pad)  # 0..pad, -pad..-1: a negative shift is an index from the end
        self.windows = None  # (2 pad + 1, 2 pad + 1, flips, 2, S S) of `_window` by vertical shift, horizontal shift and flip
        if 16 * len(shifts) ** 2 * (1 + flip) * self.image_size**2 <= TABLE:
            self.windows = self._window(shifts[:, None, None, None], shifts[:, None, None], torch.arange(1 + flip)[:, None]).to(device)

    def draw(self, seed: int, step: int, rows: int) -> np.ndarray:
        """(rows, 4) int64: picture, vertical and horizontal shift in -pad..pad, flip in 0..1. A pure function of its arguments."""
        generator = stream(seed, step)
        which = generator.integers(0, len(self.split["train"][0]), size=(rows, 1))
        shift = generator.integers(-self.pad, self.pad + 1, size=(rows, 2))
        flip = generator.integers(0, 1 + self.flip, size=(rows, 1))
        return np.concatenate((which, shift, flip), axis=1)

    def normalise(self, pictures):
        """uint8 (B, 3, S, S) -> float32, mean 0 and standard deviation 1 per channel over the training pictures."""
        return (pictures.float() / 255 - self.mean) / self.std

    def _window(self, down, right, flip):
        """Shifts and flip, (..., 1) int64 each -> (..., 2, S S) int64: the pixel, counted from 0 row by row, of which each pixel of the window is a
        copy, and what is to be added to its value, 256 where it is outside and any pixel will do."""
        import torch

        S = self.image_size
        span = torch.arange(S, device=down.device)
        rows, columns = span + down, span + right  # (..., S)
        columns = torch.where(flip == 1, S - 1 - columns, columns)
        rows, columns = rows[..., :, None], columns[..., None, :]
        inside = (rows >= 0) & (rows < S) & (columns >= 0) & (columns < S)  # (..., S, S)
        return torch.stack(((rows * S + columns) * inside, 256 * ~inside), dim=-3).flatten(-2)

    def _look_up(self, codes):
        """(B, 3, S S) int64, values of pixels or 256 and more -> (B, 3, S, S) float32: normalised, 0 from 256 on."""
        S = self.image_size
        return self.values.expand(len(codes), -1, -1).gather(2, codes).view(-1, 3, S, S)

    def batch(self, drawn):
        """(B, 4) draws -> augmented pictures (B, 3, S, S) float32 and labels (B,) int64. What a shift brings in from outside is the mean colour.

        Shifts beyond -pad..pad are not drawn and must not be asked for.
        """
        pictures, labels = self.split["train"]
        which, down, right, flip = drawn.unbind(1)
        if self.windows is None:
            window = self._window(down[:, None], right[:, None], flip[:, None])
        else:
            window = self.windows[down, right, flip]  # (B, 2, S S)
        place, add = window[:, :1], window[:, 1:]
        pixels = pictures[which].flatten(2)  # (B, 3, S S)
        return self._look_up(pixels.gather(2, place.expand_as(pixels)) + add), labels[which]

    def validation(self, batch_size: int, eval_tokens: int = 0, rank: int = 0, world: int = 1):
        """Yields (pictures, labels, number of them) over the validation set in order, this rank's share; the last batch is filled with label -1.

        eval_tokens > 0 takes eval_tokens // block_size pictures (at least one), evenly spaced.
        """
        import torch

        pictures, labels = self.split["val"]
        chosen = np.arange(len(pictures))
        wanted = max(1, eval_tokens // self.block_size)
        if eval_tokens and wanted < len(chosen):
            chosen = np.linspace(0, len(pictures) - 1, wanted).round().astype(np.int64)
        most = -(-len(chosen) // world)  # every process yields as many batches, the last perhaps without a picture: sharded models run in step
        chosen = chosen[rank::world]
        starts = range(0, most, batch_size)
        index = np.full(len(starts) * batch_size, -1)
        index[: len(chosen)] = chosen
        index = torch.from_numpy(index.reshape(-1, batch_size)).to(self.device)  # at once: a copy per batch would wait for the batch before
        targets = labels[index].masked_fill(index < 0, -1)  # where there is no picture, the last one stands without a label
        for first, which, y in zip(starts, index, targets):
            yield self._look_up(pictures[which].flatten(2).long()), y, min(max(len(chosen) - first, 0), batch_size)


def load(config: TrainConfig, device) -> Tokens | Pictures:
    """The data set of --dataset on its device. Raises InputError."""
    if read_meta(config.dataset)[1]["kind"] == "pictures":
        return Pictures(config.dataset, config.patch_size, config.crop_pad, config.flip, device)
    return Tokens(config.dataset, config.block_size, device)
