"""Text corpora: documents from files of many formats, and a parallel, resumable writer of GPT-2 tokens.

The way of a document. The main process reads the source files in order and cuts them into blocks of about 0.5 MiB (whole lines, whole
archive members). Worker processes turn a block into documents, check that they are text and tokenise them. The main process appends their results,
in order, to shards of 8 MiB in the hidden folder DIRECTORY/.prepare.tmp. Blocks and shards depend on the source alone, not on the number of
processes. When all is tokenised the number N of documents is known, the split and the order are drawn (see ORDER_RULE) and an external sort
brings the documents into that order: every shard is sorted, then all shards are read side by side, a range of places at a time. Nothing that
grows with the corpus is held in memory but 8 bytes a document. The disk needs three times the size of the result meanwhile.

A killed run leaves the finished shards with their checksums, and the same command goes on after them. train.bin, val.bin and meta.json
replace what was there before only when they are complete.
"""

import collections
import concurrent.futures.process
import contextlib
import fcntl
import hashlib
import json
import lzma
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

from configurator import InputError
from dataset import meta_json, replace_files, sha256_of, staging

KIB, MIB = 1 << 10, 1 << 20
BLOCK = MIB // 2  # bytes of raw documents that a worker gets at once, about
SHARD = 8 * MIB  # bytes of tokens between two points where a killed run can go on, about
RANGE = 128 * MIB  # bytes of tokens that the last step of the sort holds, about
MAX_DOCUMENT = 16 * MIB  # bytes of a document; tiktoken needs up to 55 times as much for one unbroken word of that length
LARGE = MIB  # bytes; documents beyond it are tokenised one at a time over all processes, for the same reason
MAX_DOCUMENTS = 100_000_000  # 8 bytes each are held in memory
MAX_RATIO, FREE_BYTES = 200, 64 * MIB  # files may unpack to 200 times their size + 64 MiB: texts reach a tenth of that, bombs pass it
INNER = MIB  # bytes of an .xz inside a tar that a worker unpacks; larger ones are unpacked by the main process
PENDING = 64 * MIB  # bytes of blocks that wait for a worker, at most
FIRST_NAMES, LISTED_FILES = 3, 100  # left-out documents named per reason, source files listed in meta.json

VAL_FRACTION, SEED = 0.0005, 2357  # nanoGPT's
ORDER_RULE = (
    "documents are numbered from 0 in the order of the source; order = numpy.random.default_rng(seed).permutation(documents); val is the first "
    "ceil(val_fraction * documents) of it, train the rest, both in that order (what datasets' train_test_split gives nanoGPT)"
)
SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.zst", ".jsonl.gz", ".parquet", ".txt", ".tar", ".xz")
FORMATS = ".jsonl, .jsonl.xz, .jsonl.zst, .jsonl.gz, .parquet, .txt, .tar or .xz (a tar inside)"
END_OF_TEXT = 50256

# Why a document is left out
EMPTY, NUL, NOT_UTF8, SURROGATE = "empty or only white space", "a zero byte", "not UTF-8", "half of a surrogate pair"
NOT_JSON, NO_TEXT = "not JSON", 'no string "text"'
TOO_LARGE = f"larger than {MAX_DOCUMENT // MIB} MiB"
LINK, OUTSIDE, OTHER_MEMBER = "a link or device in an archive", "an archive path that is absolute or has ..", "an archive member of another kind"
DEEP = "an .xz two archives deep"


def shown(name: str) -> str:
    """A file or member name as one short printable line."""
    return "".join(c if c.isprintable() else "?" for c in name[:200])


def optional(module: str, what: str):
    """Imports an optional package. Raises InputError that says what to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{what} needs the package {module.partition('.')[0]}: pip install -r requirements-data.txt") from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Bytes: files, decompression, tar


def unpack(chunks, packing: str, name: str, free: int | None = None):
    """Decompresses the byte pieces `chunks` ("xz", "gz" or "zst", any number of streams one after the other) into small pieces.

    Raises InputError for damaged or truncated data, and when more than free (FREE_BYTES) + MAX_RATIO times the input comes out.
    """
    free = FREE_BYTES if free is None else free
    damaged = (lzma.LZMAError, zlib.error, EOFError)
    if packing == "zst":
        zstandard = optional("zstandard", name)
        damaged += (zstandard.ZstdError,)

    def start():
        if packing == "xz":
            return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=256 * MIB)
        return zlib.decompressobj(31) if packing == "gz" else zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()

    def feed(stream, data: bytes):
        if packing == "xz":
            yield stream.decompress(data, MIB)
            while not stream.eof and not stream.needs_input:
                yield stream.decompress(b"", MIB)
        elif packing == "gz":
            while True:
                piece = stream.decompress(data, MIB)
                yield piece
                data = stream.unconsumed_tail
                if stream.eof or (not data and len(piece) < MIB):
                    break
        else:  # no limit for the output can be given, but 2 KiB become 64 MiB at most
            yield stream.decompress(data)

    given = taken = 0
    stream = None
    try:
        for chunk in chunks:
            given += len(chunk)
            step = 2 * KIB if packing == "zst" else len(chunk)
            pieces = collections.deque(chunk[i : i + step] for i in range(0, len(chunk), step))
            while pieces:
                data = pieces.popleft()
                if stream is None:
                    data = data.lstrip(b"\0") if taken else data  # padding between streams
                    if not data:
                        continue
                    stream = start()
                for piece in feed(stream, data):
                    taken += len(piece)
                    if taken > free + MAX_RATIO * given:
                        raise InputError(f"{name} unpacks to more than {MAX_RATIO} times its size: that is no text, leave it out")
                    if piece:
                        yield piece
                if stream.eof:
                    rest, stream = stream.unused_data, None
                    if rest:
                        pieces.appendleft(rest)
        if stream is not None or not given:
            raise EOFError("it ends too early")
    except damaged as error:
        raise InputError(f"{name} is damaged ({error}): fetch it again or leave it out") from None


class Stream:
    """Exact reads from an iterator of byte pieces."""

    def __init__(self, chunks):
        self.chunks, self.piece, self.at = iter(chunks), b"", 0

    def part(self, size: int):
        """Yields the next `size` bytes in pieces; fewer only at the end."""
        while size > 0:
            while self.at == len(self.piece):
                self.piece, self.at = next(self.chunks, None), 0
                if self.piece is None:
                    self.piece = b""
                    return
            piece = self.piece[self.at : self.at + size]
            self.at += len(piece)
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        return b"".join(self.part(size))


def tar_members(chunks, name: str, inner: bool = False):
    """Yields (kind, "ARCHIVE/MEMBER", content): "text" with the bytes of a .txt, "archive" with those of a small .xz, "skip" with a reason.

    The members of a large .xz follow in its place. inner: this tar came from inside another one, so an .xz in it is left out. Nothing is
    written to disk. tarfile's own reader is not used: it takes a damaged header in the middle for the end, and believes any stated size.
    Raises InputError for a damaged archive.
    """
    stream = Stream(chunks)
    long_name = None  # from a header that only names the next member

    def damaged(what):
        return InputError(f"{name} is damaged or not a tar ({what}): fetch it again or leave it out")

    def read(size):
        content = stream.read(size)
        if len(content) < size:
            raise damaged("it ends too early")
        return content

    def pass_over(size):
        if sum(map(len, stream.part(size))) < size:
            raise damaged("it ends too early")

    seen = 0
    while True:
        block = read(512) if not seen else stream.read(512)
        if not block.strip(b"\0"):
            if not seen or (block and len(block) < 512):
                raise damaged("it is empty")
            collections.deque(stream.part(1 << 62), maxlen=0)  # to the end, where a packed file has its checksum
            return
        seen += 1
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise damaged(f"header {seen}: {error}") from None
        if info.size < 0:
            raise damaged(f"header {seen}: negative size")
        has_content = info.isreg() or info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        has_content = has_content or info.type not in tarfile.SUPPORTED_TYPES
        size, padding = (info.size, -info.size % 512) if has_content else (0, 0)

        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if size > MIB:
                raise damaged(f"header {seen}: a name of {size:,} bytes")
            content = read(size)
            pass_over(padding)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
                long_name = found[1].decode("utf-8", "surrogateescape") if found else long_name
                if re.search(rb"(?:^|\n)\d+ (?:size|GNU\.sparse[^=]*)=", content):
                    raise damaged(f"header {seen}: sizes beyond 8 GiB and sparse files are not read")
            continue
        member, long_name = info.name if long_name is None else long_name, None
        label = f"{name}/{member}"
        if info.isdir() or member.endswith("/"):
            pass_over(size + padding)
        elif member.startswith("/") or ".." in member.split("/"):
            pass_over(size + padding)
            yield "skip", label, OUTSIDE
        elif info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            pass_over(size + padding)
            yield "skip", label, LINK
        elif member.lower().endswith(".txt"):
            if size > MAX_DOCUMENT:
                pass_over(size + padding)
                yield "skip", label, TOO_LARGE
            else:
                content = read(size)
                pass_over(padding)
                yield "text", label, content
        elif member.lower().endswith(".xz") and not inner:
            if size <= INNER:
                content = read(size)
                yield "archive", label, content
            else:
                part = stream.part(size)
                yield from tar_members(unpack(part, "xz", label), label, inner=True)
            pass_over(padding)
        else:
            pass_over(size + padding)
            yield "skip", label, DEEP if member.lower().endswith(".xz") else OTHER_MEMBER


def line_blocks(chunks, name: str):
    """Cuts pieces of a file into blocks of whole lines: ("lines", name, number of the first line, bytes), and "texts" for lines too long."""
    held, number, dropping = bytearray(), 1, False
    for chunk in chunks:
        if dropping:
            cut = chunk.find(b"\n") + 1
            if not cut:
                continue
            yield "texts", name, 0, [(f"{name}:{number}", TOO_LARGE)]
            chunk, number, dropping = chunk[cut:], number + 1, False
        last = chunk.rfind(b"\n") + 1
        cut = len(held) + last if last else 0
        held += chunk
        if cut and len(held) >= BLOCK:
            yield "lines", name, number, bytes(held[:cut])
            number += held.count(b"\n", 0, cut)
            del held[:cut]
        if not last and len(held) > MAX_DOCUMENT:  # then it holds one unfinished line, or a few lines and the start of one
            cut = held.rfind(b"\n") + 1
            if cut:
                yield "lines", name, number, bytes(held[:cut])
                number += held.count(b"\n", 0, cut)
                del held[:cut]
            if len(held) > MAX_DOCUMENT:
                held.clear()
                dropping = True
    if dropping:
        yield "texts", name, 0, [(f"{name}:{number}", TOO_LARGE)]
    elif held:
        yield "lines", name, number, bytes(held)


def grouped(items, name: str):
    """(label, bytes or reason) pairs -> "texts" blocks of about BLOCK bytes."""
    group, size = [], 0
    for label, content in items:
        group.append((label, content))
        size += len(content or "") + 64
        if size >= BLOCK:
            yield "texts", name, 0, group
            group, size = [], 0
    if group:
        yield "texts", name, 0, group


class Files:
    """The documents of files and folders. `size`: bytes; `read`: bytes read so far; `description`: the sources for meta.json."""

    def __init__(self, paths: list[Path]):
        self.paths, self.size, self.read = paths, 0, 0
        for path in paths:
            if not path.exists():
                raise InputError(f"--source={path} does not exist: give hub, or files or folders (comma-separated) of {FORMATS}")
            if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(SUFFIXES)):
                raise InputError(f"--source={path} is none of {FORMATS}, and no folder of them")
        self.description = [self._describe(path) for path in paths]

    def _walk(self, path: Path, name: str):
        """Yields (path, name, whether its kind is known) of files: depth first, names sorted; hidden ones and linked folders are left out."""
        if not path.is_dir():
            yield path, name, True
            return
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(Path(entry.path), f"{name}/{entry.name}")
            else:
                yield Path(entry.path), f"{name}/{entry.name}", entry.is_file() and entry.name.lower().endswith(SUFFIXES)

    def _files(self):
        """Yields (path, name) of all files to read, in order."""
        for source in self.paths:
            for path, name, known in self._walk(source, source.name or source.resolve().name):
                if known:
                    yield path, name

    def _describe(self, path: Path) -> dict:
        name = path.name or path.resolve().name
        listing, first, files, size, others = hashlib.sha256(), [], 0, 0, 0
        for file_path, file_name, known in self._walk(path, name):
            if not known:
                others += 1
                continue
            try:
                with open(file_path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    file_size = os.fstat(file.fileno()).st_size
            except OSError as error:
                raise InputError(f"{file_path} cannot be read: {error.strerror or error}") from None
            listing.update(f"{digest}  {file_name}\n".encode(errors="replace"))
            files, size = files + 1, size + file_size
            if len(first) < LISTED_FILES:
                first.append({"name": shown(file_name), "bytes": file_size, "sha256": digest})
        self.size += size
        if not path.is_dir():
            return first[0]
        if not files:
            raise InputError(f"--source={path} holds no file of the kinds {FORMATS}")
        folder = {"name": shown(name), "files": files, "bytes": size, "sha256": listing.hexdigest()}
        folder["sha256_of"] = "the lines '<sha256>  <name>' of all its files"
        return folder | {"files_of_other_kinds": others, "first_files": first}

    def _chunks(self, path: Path):
        """The bytes of a file in pieces; keeps `read` up to date."""
        try:
            with open(path, "rb") as file:
                while chunk := file.read(BLOCK):
                    self.read += len(chunk)
                    yield chunk
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None

    def _parquet(self, path: Path, name: str):
        parquet, before = optional("pyarrow.parquet", name), self.read
        import pyarrow

        try:
            with parquet.ParquetFile(path, pre_buffer=False, buffer_size=MIB) as file:
                field = file.schema_arrow.field("text") if "text" in file.schema_arrow.names else None
                if field is None or not (pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)):
                    raise InputError(f"{name} has no column 'text' of strings")
                row, rows = 0, max(1, file.metadata.num_rows)
                for batch in file.iter_batches(batch_size=64, columns=["text"], use_threads=False):
                    # as binary, so that invalid UTF-8 reaches the check that counts it
                    for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        yield f"{name}:{row}", NO_TEXT if content is None else content if len(content) <= MAX_DOCUMENT else TOO_LARGE
                        row += 1
                    self.read = before + path.stat().st_size * row // rows
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{name} is damaged ({str(error).splitlines()[0][:150]}): fetch it again or leave it out") from None

    def _blocks(self, path: Path, name: str):
        lower = path.name.lower()
        packing = lower.rpartition(".")[2]
        if ".jsonl" in lower[-10:]:
            chunks = self._chunks(path)
            yield from line_blocks(unpack(chunks, packing, name) if packing != "jsonl" else chunks, name)
        elif packing == "parquet":
            yield from grouped(self._parquet(path, name), name)
        else:
            chunks = self._chunks(path)
            texts, size = [], 0
            for kind, label, content in tar_members(unpack(chunks, "xz", name) if packing == "xz" else chunks, name):
                if kind == "archive":
                    if texts:
                        yield "texts", name, 0, texts
                        texts, size = [], 0
                    yield "archive", label, 0, content
                    continue
                texts.append((label, content))
                size += len(content) + 64
                if size >= BLOCK:
                    yield "texts", name, 0, texts
                    texts, size = [], 0
            if texts:
                yield "texts", name, 0, texts

    def _text(self, path: Path) -> bytes | str:
        if path.stat().st_size > MAX_DOCUMENT:
            self.read += path.stat().st_size
            return TOO_LARGE
        return b"".join(self._chunks(path))

    def blocks(self, cursor=(0, 0)):
        """Yields (cursor, block); a cursor (file, blocks of it that are done) says where the next block begins, here or in another run."""
        first, done = cursor
        texts, size, self.read = [], 0, 0
        for number, (path, name) in enumerate(self._files()):
            if number < first:
                self.read += path.stat().st_size
                continue
            if path.name.lower().endswith(".txt"):  # many small ones make one block
                texts.append((name, self._text(path)))
                size += len(texts[-1][1]) + 64
                if size >= BLOCK:
                    yield (number + 1, 0), ("texts", name, 0, texts)
                    texts, size = [], 0
                continue
            if texts:
                yield (number, 0), ("texts", name, 0, texts)
                texts, size = [], 0
            for index, block in enumerate(self._blocks(path, name)):
                if number > first or index >= done:
                    yield (number, index + 1), block
        if texts:
            yield (number + 1, 0), ("texts", name, 0, texts)


# ---------------------------------------------------------------------------------------------------------------------------------
# Documents


class NotText(Exception):
    """A document that is left out; the message is the reason."""


def text_of(content: bytes | str, is_json: bool = False) -> str:
    """The text of a raw document, or of a JSON line's key "text". Raises NotText; a str is the reason why it was left out before."""
    if isinstance(content, str):
        raise NotText(content)
    if len(content) > MAX_DOCUMENT:
        raise NotText(TOO_LARGE)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotText(NOT_UTF8) from None
    if is_json:
        try:
            row = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            raise NotText(NOT_JSON) from None
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise NotText(NO_TEXT)
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise NotText(SURROGATE) from None
    if not text or text.isspace():
        raise NotText(EMPTY)
    if "\0" in text:
        raise NotText(NUL)
    return text


def raw_documents(block):
    """A block -> (name, raw bytes or reason, whether it is a JSON line), in order."""
    kind, name, start, payload = block
    if kind == "lines":
        for number, line in enumerate(payload.split(b"\n"), start):
            if line and not line.isspace():  # a blank line is no document
                yield f"{name}:{number}", line, True
    elif kind == "texts":
        for label, content in payload:
            yield label, content, False
    else:
        for _, label, content in tar_members(unpack([payload], "xz", name, free=MAX_DOCUMENT), name, inner=True):
            yield label, content, False


class GPT2Encoder:
    """encode_ordinary of GPT-2's BPE about twice as fast, as an array of token ids.

    GPT-2's pattern for the pieces that are merged ends in \\s+(?!\\S)|\\s. The look-ahead keeps the regular-expression engine from its fast
    automaton. It matters only for a run of white space that is followed by more text: all but the last character of the run are one piece.
    Without the look-ahead, with plain \\s, one- and two-character runs come out the same. So longer runs (and two or more at the end of the
    text) are cut out first. tests/test_text_corpora.py compares the result with encode_ordinary.
    """

    SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"  # \s in the pattern; Python's \s has four more
    LONG_RUN = re.compile(f"[{SPACE}][{SPACE}](?:[{SPACE}]|\\Z)")
    CUT = re.compile(f"([{SPACE}]{{2,}}\\Z|[{SPACE}]{{2,}}(?=[{SPACE}]))")
    LONG_ASCII_RUN = re.compile("\n\n(?:[\t-\r ]|\\Z)")
    PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"

    vocab_size, tokenizer, end = 50257, {"type": "gpt2"}, END_OF_TEXT
    END = "<|endoftext|>"

    def __init__(self):
        import numpy as np
        import tiktoken

        from dataset import gpt2_bpe

        self.np, self.plain = np, gpt2_bpe()
        ranks, special = self.plain._mergeable_ranks, {self.END: self.end}
        self.fast = tiktoken.Encoding("gpt2-fast", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def _is_simple(self, text: str) -> bool:
        if text.isascii():  # the only token of several ASCII spaces is two line feeds: a run without them is the same ids in any pieces
            return self.LONG_ASCII_RUN.search(text) is None
        return self.LONG_RUN.search(text) is None

    def encode(self, text: str):
        """Text -> 1-d array of token ids, those of encode_ordinary."""
        if self._is_simple(text):
            return self.fast.encode_to_numpy(text, disallowed_special=())
        runs_and_rest = self.CUT.split(text)  # text, run, text, run, ..., text
        encode = (lambda part: self.fast.encode_to_numpy(part, disallowed_special=())), self.plain.encode_ordinary
        return self.np.concatenate([self.np.asarray(encode[i % 2](part), dtype=self.np.uint32) for i, part in enumerate(runs_and_rest)])

    def encode_documents(self, texts: list[str]):
        """Texts -> 1-d array of the ids of all of them, the end mark after each. One call for many is faster than one for each."""
        parts, simple = [], []

        def take():
            if simple:
                parts.append(self.fast.encode_to_numpy(self.END.join(simple) + self.END, allowed_special={self.END}, disallowed_special=()))
                simple.clear()

        for text in texts:
            if self.END not in text and self._is_simple(text):
                simple.append(text)
            else:  # the mark as ordinary text, for one
                take()
                parts += (self.encode(text), [self.end])
        take()
        return self.np.concatenate(parts)


class Skipped(dict):
    """{reason: {"documents": count, "first": a few names}}"""

    def add(self, reason: str, names: list[str], count: int):
        entry = self.setdefault(reason, {"documents": 0, "first": []})
        entry["documents"] += count
        entry["first"] += names[: FIRST_NAMES - len(entry["first"])]

    def merge(self, other: dict):
        for reason, entry in other.items():
            self.add(reason, entry["first"], entry["documents"])


def tokenise(block, encoder, lock=None) -> tuple[bytes, bytes, int, dict]:
    """A block -> (ids as little-endian uint16, length of each document with its end mark as uint32, bytes of text, Skipped)."""
    import numpy as np

    parts, texts, held, size, skipped = [], [], 0, 0, Skipped()

    def take():
        if texts:
            parts.append(encoder.encode_documents(texts).astype("<u2"))
            texts.clear()

    for name, content, is_json in raw_documents(block):
        try:
            text = text_of(content, is_json)
        except NotText as reason:
            skipped.add(str(reason), [shown(name)], 1)
            continue
        length = len(text) if text.isascii() else len(text.encode())
        size, held = size + length, held + length
        if length > LARGE or held > 4 * LARGE:
            take()
            held = length
        texts.append(text)
        if length > LARGE:
            with lock or contextlib.nullcontext():
                take()
    take()
    ids = np.concatenate([np.zeros(0, dtype="<u2"), *parts])
    ends = np.flatnonzero(ids == encoder.end)
    return ids.tobytes(), np.diff(ends, prepend=-1).astype("<u4").tobytes(), size, skipped


# ---------------------------------------------------------------------------------------------------------------------------------
# Processes

_encoder = _lock = None  # of a worker


def start_worker(make_encoder, lock):
    """Initialiser of a worker, which leaves by itself when the main process is gone, even by kill -9."""
    global _encoder, _lock
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _encoder, _lock = make_encoder(), lock


def work_on(block):
    """tokenise in a worker."""
    return tokenise(block, _encoder, _lock)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenised(blocks, num_proc: int, make_encoder):
    """Yields (cursor, result of tokenise) for (cursor, block) pairs, in order, from `num_proc` processes.

    Raises InputError, and BrokenProcessPool when a process ends unexpectedly.
    """
    if num_proc == 1:
        encoder = make_encoder()
        for cursor, block in blocks:
            yield cursor, tokenise(block, encoder)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (make_encoder, context.Lock()))
    waiting, pending = collections.deque(), 0
    try:
        for cursor, block in blocks:
            size = sum(len(content) for _, content in block[3]) if block[0] == "texts" else len(block[3])
            while waiting and (len(waiting) > 3 * num_proc or pending + size > PENDING):
                at, future, its_size = waiting.popleft()
                yield at, future.result()
                pending -= its_size
            waiting.append((cursor, pool.submit(work_on, block), size))
            pending += size
        while waiting:
            at, future, _ = waiting.popleft()
            yield at, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# Shards


class Shards:
    """Finished parts of the tokenised corpus in a hidden folder: N.bin (ids), N.len (length of each document), N.json (checksums, cursor)."""

    def __init__(self, folder: Path, fingerprint: str):
        """Takes over what an earlier run with the same fingerprint finished; anything else in the folder is deleted."""
        self.folder, self.records = folder, []
        found = folder / "fingerprint"
        if not found.is_file() or found.read_text() != fingerprint:
            self._clear(keep=())
            write_durably(found, fingerprint.encode())
        while (record := self._load(len(self.records))) is not None:
            self.records.append(record)
        self._clear(keep={f"{i}.{kind}" for i in range(len(self.records)) for kind in ("bin", "len", "json")} | {"fingerprint"})

    def _clear(self, keep):
        for path in self.folder.iterdir():
            if path.name != "lock" and path.name not in keep:
                path.unlink()

    def _load(self, number: int) -> dict | None:
        try:
            record = json.loads((self.folder / f"{number}.json").read_text())
            whole = all(sha256_of(self.folder / f"{number}.{kind}") == record[f"sha256_{kind}"] for kind in ("bin", "len"))
            return record if whole and len(record["cursor"]) == 2 else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def cursor(self) -> tuple[int, int]:
        return tuple(self.records[-1]["cursor"]) if self.records else (0, 0)

    def total(self, key: str) -> int:
        return sum(record[key] for record in self.records)

    def skipped(self) -> Skipped:
        total = Skipped()
        for record in self.records:
            total.merge(record["skipped"])
        return total

    def add(self, ids: list[bytes], lengths: list[bytes], text_bytes: int, skipped: dict, cursor):
        number = len(self.records)
        record = {"cursor": cursor, "tokens": sum(map(len, ids)) // 2, "documents": sum(map(len, lengths)) // 4}
        record |= {"text_bytes": text_bytes, "skipped": skipped}
        for kind, content in (("bin", ids), ("len", lengths)):
            record[f"sha256_{kind}"] = write_durably(self.folder / f"{number}.{kind}", *content)
        write_durably(self.folder / f"{number}.json", json.dumps(record).encode())  # last: it vouches for the others
        self.records.append(record)


def write_durably(path: Path, *content: bytes) -> str:
    """Writes, fsyncs and renames; returns the sha256."""
    digest, temporary = hashlib.sha256(), path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        for part in content:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def in_order(shards: Shards, documents: int, bar):
    """Yields (place of the first document, ids as uint16, lengths) for consecutive ranges of the order that ORDER_RULE draws.

    An external sort: memory 8 bytes a document and some RANGEs, whatever the corpus.
    """
    import numpy as np

    order = np.arange(documents, dtype=np.uint32)
    np.random.default_rng(SEED).shuffle(order)  # the same draws as permutation(documents), in half the memory
    place = np.empty(documents, dtype=np.uint32)
    for first in range(0, documents, MIB):
        part = order[first : first + MIB]
        place[part] = np.arange(first, first + len(part), dtype=np.uint32)
    del order

    def permuted(ids, lengths, by):
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return np.concatenate([ids[starts[i] : starts[i] + lengths[i]] for i in by]), lengths[by]

    numbers = [number for number, record in enumerate(shards.records) if record["documents"]]
    first = 0
    for number in numbers:
        ids = np.fromfile(shards.folder / f"{number}.bin", dtype="<u2")
        lengths = np.fromfile(shards.folder / f"{number}.len", dtype="<u4")
        places = place[first : first + len(lengths)]
        first += len(lengths)
        by = np.argsort(places)
        ids, lengths = permuted(ids, lengths, by)
        ids.tofile(shards.folder / f"{number}.sorted")
        np.stack([places[by], lengths], axis=1).tofile(shards.folder / f"{number}.places")
        bar.update(len(ids))
    del place

    tokens = shards.total("tokens")
    ranges = max(1, math.ceil(2 * tokens / RANGE))
    at = {number: (0, 0) for number in numbers}  # documents and ids of each shard that are done
    for k in range(ranges):
        low, high = documents * k // ranges, documents * (k + 1) // ranges
        ids, table = [], []
        for number in numbers:
            row, begin = at[number]
            rows = np.memmap(shards.folder / f"{number}.places", dtype="<u4", mode="r").reshape(-1, 2)
            stop = row + int(np.searchsorted(rows[row:, 0], high))
            if stop == row:
                continue
            table.append(np.array(rows[row:stop]))
            count = int(table[-1][:, 1].sum(dtype=np.int64))
            ids.append(np.fromfile(shards.folder / f"{number}.sorted", dtype="<u2", count=count, offset=2 * begin))
            at[number] = (stop, begin + count)
        if table:
            table, ids = np.concatenate(table), np.concatenate(ids)
            ids, lengths = permuted(ids, table[:, 1], np.argsort(table[:, 0]))
            yield low, ids, lengths
            bar.update(len(ids))


# ---------------------------------------------------------------------------------------------------------------------------------
# The data set


class Output:
    """A .bin that is being written: append arrays of ids, then close() -> {"tokens": ..., "sha256": ...}."""

    def __init__(self, path: Path):
        self.file, self.digest, self.tokens = open(path, "wb"), hashlib.sha256(), 0

    def append(self, ids):
        content = ids.astype("<u2", copy=False).tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(ids)

    def close(self) -> dict:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"tokens": self.tokens, "sha256": self.digest.hexdigest()}


def publish(directory: Path, folder: Path, splits: dict, meta: dict):
    """Moves SPLIT.bin from `folder` into `directory`, with a meta.json. Raises InputError and OSError."""
    write_durably(folder / "meta.json", meta_json({"kind": "tokens", "dtype": "uint16", **meta, "splits": splits}))
    replace_files(folder, directory, [*(f"{name}.bin" for name in splits), "meta.json"])


def write_splits(directory: Path, splits: dict, meta: dict):
    """Arrays of ids {"train": ..., "val": ..., perhaps "test": ...} -> their files and meta.json, all or nothing. Raises InputError."""
    described = {}
    with staging(directory) as folder:
        for name, ids in splits.items():
            output = Output(folder / f"{name}.bin")
            output.append(ids)
            described[name] = output.close()
        publish(directory, folder, described, meta)


def wikitext_files(source: str, directory: Path) -> dict[str, tuple[str, bytes]]:
    """{"train": (file name, content), "val": ..., and "test" if it is there} of WikiText's files in the folder `source`, else in `directory`.

    Raises InputError: nothing is downloaded, as the address of the official archive is dead and no checksum of another one is known.
    """
    folder = Path(source) if source else directory
    if source and not folder.is_dir():
        raise InputError(f"--source={source} is not a folder: give the one with train.txt and valid.txt, or wiki.train.raw and wiki.valid.raw")
    for form in ("{}.txt", "wiki.{}.raw", "wiki.{}.tokens"):
        names = {"train": form.format("train"), "val": form.format("valid"), "test": form.format("test")}
        if not all((folder / names[split]).is_file() for split in ("train", "val")):
            continue
        try:
            return {split: (name, (folder / name).read_bytes()) for split, name in names.items() if (folder / name).is_file()}
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from None
    raise InputError(
        f"{folder} has neither train.txt and valid.txt nor wiki.train.raw and wiki.valid.raw (or .tokens): get WikiText-2 raw, for example the "
        "set Salesforce/wikitext, wikitext-2-raw-v1, on the Hugging Face hub, as these text files, and name their folder with --source=FOLDER"
    )


def decoded(name: str, content: bytes) -> str:
    """The text of a whole file. Raises InputError."""
    try:
        text = content.decode("utf-8")  # bytes, decoded: reading in text mode would translate newlines
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it first") from None
    if "\0" in text:
        raise InputError(f"{name} is not text (a zero at character {text.index(chr(0))})")
    if len(text) < 2:
        raise InputError(f"{name} has {len(text)} characters, it needs 2 at least")
    return text


def write_corpus(source, directory: Path, num_proc: int = 0, make_encoder=GPT2Encoder, val_fraction: float = VAL_FRACTION) -> dict:
    """Tokenises the documents of `source` (Files, or anything with blocks, size, read and description) into `directory`.

    num_proc: worker processes, 0 for one a core; the files do not depend on it. make_encoder: the encoder's class, called in every process.
    val_fraction: the share of the documents that val.bin holds.
    Says on stdout what was written and what was left out, and returns meta. Raises InputError; the files are then as they were before.
    """
    num_proc, keep = num_proc or cores(), False
    folder, existed = directory / ".prepare.tmp", directory.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keep = True
                raise InputError(f"another process is preparing {directory}: wait for it") from None
            return _write_corpus(source, directory, folder, num_proc, make_encoder, val_fraction)
    except concurrent.futures.process.BrokenProcessPool:
        keep = True
        raise InputError("a worker process died (out of memory?): run the same command again, perhaps with a smaller --num_proc") from None
    except OSError as error:
        keep = True
        raise InputError(f"cannot write in {directory}: {error.strerror or error}; what is finished is kept for the next run") from None
    except KeyboardInterrupt:
        keep = True
        raise InputError("interrupted: what is finished is kept, the same command goes on from there") from None
    finally:  # what is finished is of no use after a success, nor when the source is at fault
        if not keep or not (folder / "lock").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):
                    directory.rmdir()


def _write_corpus(source, directory: Path, folder: Path, num_proc: int, make_encoder, val_fraction: float) -> dict:
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    settings = [source.description, BLOCK, SHARD, MAX_DOCUMENT, INNER, make_encoder.__qualname__]
    shards = Shards(folder, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest())
    if shards.records:
        done = f"{shards.total('documents'):,} documents, {shards.total('tokens'):,} tokens"
        print(f"going on after {len(shards.records)} finished parts ({done})", flush=True)

    # ---- tokenise
    began, tokens_before = time.perf_counter(), shards.total("tokens")
    ids, lengths, held, text_bytes, skipped, cursor = [], [], 0, 0, Skipped(), shards.cursor
    all_bytes, all_tokens, shown_at = shards.total("text_bytes"), 0, 0.0
    with tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenising", disable=quiet) as bar:
        results = tokenised(source.blocks(cursor), num_proc, make_encoder)
        try:
            for cursor, (some_ids, some_lengths, some_bytes, some_skipped) in results:
                ids.append(some_ids)
                lengths.append(some_lengths)
                held, text_bytes = held + len(some_ids), text_bytes + some_bytes
                skipped.merge(some_skipped)
                all_bytes, all_tokens = all_bytes + some_bytes, all_tokens + len(some_ids) // 2
                if all_bytes > FREE_BYTES + MAX_RATIO * source.size:
                    raise InputError(f"the files unpack to more than {MAX_RATIO} times their size: that is no text, leave it out")
                if held >= SHARD:
                    shards.add(ids, lengths, text_bytes, skipped, cursor)
                    ids, lengths, held, text_bytes, skipped = [], [], 0, 0, Skipped()
                now = time.perf_counter()
                if not quiet and now > shown_at + 0.2:
                    bar.set_postfix_str(f"{all_tokens / (now - began):,.0f} tokens/s", refresh=False)
                    bar.update(source.read - bar.n)
                    shown_at = now
            bar.update(source.size - bar.n)
        finally:
            results.close()  # ends the workers
        if ids:
            shards.add(ids, lengths, text_bytes, skipped, cursor)
    seconds = time.perf_counter() - began
    documents, tokens, skipped = shards.total("documents"), shards.total("tokens"), shards.skipped()
    left_out = sum(entry["documents"] for entry in skipped.values())
    if documents < 2 or documents > MAX_DOCUMENTS:
        why = "; ".join(f"{entry['documents']:,} left out: {reason}" for reason, entry in skipped.items())
        limits = f"it must be 2 to {MAX_DOCUMENTS:,}"
        raise InputError(
            f"--source has {documents:,} document{'s' * (documents != 1)}, {limits}{f' ({why})' if why else ''}: name other or more files"
        )
    if (validation := math.ceil(val_fraction * documents)) == documents:
        raise InputError(f"--val_fraction={val_fraction:g} of {documents:,} documents leaves none to train on: give a smaller one, or more files")

    # ---- split and order
    train, val, passed = Output(folder / "train.bin"), Output(folder / "val.bin"), time.perf_counter()
    with tqdm(total=2 * tokens, unit=" tokens", unit_scale=True, desc="ordering", disable=quiet) as bar:
        for first, part, its_lengths in in_order(shards, documents, bar):
            cut = int(its_lengths[: max(0, validation - first)].sum(dtype="int64"))
            val.append(part[:cut])
            train.append(part[cut:])
    splits = {"train": train.close() | {"documents": documents - validation}, "val": val.close() | {"documents": validation}}
    if splits["train"]["tokens"] + splits["val"]["tokens"] != tokens:
        raise InputError(f"the ordered files have not the {tokens:,} tokens of the parts in {folder}: delete that folder and run again")
    meta = {
        "sources": source.description,
        "documents": documents,
        "text_bytes": shards.total("text_bytes"),  # as UTF-8
        "tokens": tokens,
        "end_marks": documents,
        "skipped_documents": left_out,
        "skipped": skipped,
        "split": {"rule": ORDER_RULE, "seed": SEED, "val_fraction": val_fraction},
        "vocab_size": make_encoder.vocab_size,
        "tokenizer": make_encoder.tokenizer,
    }
    publish(directory, folder, splits, meta)

    # ---- say so
    new = tokens - tokens_before
    print(f"{documents:,} documents, {tokens - documents:,} tokens + {documents:,} end marks")
    print(f"tokenised {new:,} of them in {seconds:.1f} s with {num_proc} processes: {new / max(seconds, 1e-9):,.0f} tokens/s, reading included")
    print(f"ordered and written in {time.perf_counter() - passed:.1f} s")
    for reason, entry in skipped.items():
        more = ", ..." if entry["documents"] > len(entry["first"]) else ""
        print(f"left out {entry['documents']:,}: {reason} ({', '.join(entry['first'])}{more})")
    for entry in source.description:
        if entry.get("files_of_other_kinds"):
            print(f"{entry['name']}: {entry['files_of_other_kinds']:,} files of other kinds were not read")
    for name, split in splits.items():
        print(f"{name}.bin {split['tokens']:,} tokens, {split['documents']:,} documents, sha256 {split['sha256']}")
    print(f"in {directory}", flush=True)
    return meta | {"splits": splits}
