"""corpus.py and the preparations of OpenWebText and WikiText-2. Only what is about GPT-2's BPE itself needs tiktoken's vocabulary."""

import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import types
from pathlib import Path

import numpy as np
import pytest

import corpus
from configurator import InputError, TrainConfig, build, configure, one_line_errors
from corpus import GPT2Encoder, write_corpus
from dataset import Tokenizer, Tokens, gpt2_bpe, own_sha256

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
if (SHARED / "tiktoken_cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
FILES = {"train.bin", "val.bin", "meta.json"}


class ByteEncoder:
    """UTF-8 bytes as ids, for tests that are not about BPE. Workers import it from this module."""

    vocab_size, tokenizer, end = 257, {"type": "bytes"}, 256

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)

    def encode_documents(self, texts):
        return np.concatenate([np.append(self.encode(text), np.uint32(self.end)) for text in texts])


class SlowEncoder(ByteEncoder):
    def encode(self, text):
        time.sleep(0.002)
        return super().encode(text)


def load(name):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


openwebtext, wikitext2, wikitext2_char = load("openwebtext"), load("wikitext2"), load("wikitext2_char")


@pytest.fixture(scope="module")
def bpe():
    try:
        return gpt2_bpe()
    except InputError as error:
        pytest.skip(str(error))


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def documents_of(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    words = ["head", "Wert", "graph", "λ", "不", "margin,", "\n", "\r\n", "\U0001f600", "it's"]
    return [f"{i} " + " ".join(draw.choices(words, k=draw.randint(1, 60))) for i in range(count)]


def as_jsonl(documents) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, text in enumerate(documents))


def as_tar(members, **options) -> bytes:
    """members: (name, bytes) pairs or TarInfo objects."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member, io.BytesIO(b"x" * member.size))
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def expected(documents: list[str], val_fraction=0.0005) -> tuple[bytes, bytes]:
    """train.bin and val.bin of these documents by the rule, written down plainly."""
    ids = [np.append(ByteEncoder().encode(text), 256).astype("<u2").tobytes() for text in documents]
    order = np.random.default_rng(2357).permutation(len(documents))
    val = math.ceil(val_fraction * len(documents))
    return b"".join(ids[i] for i in order[val:]), b"".join(ids[i] for i in order[:val])


def write(source, out: Path, num_proc=1, encoder=ByteEncoder) -> dict:
    paths = [source] if isinstance(source, Path) else source
    return write_corpus(corpus.Files(paths), out, num_proc, encoder)


def check(source, out: Path, documents: list[str], **options) -> dict:
    meta = write(source, out, **options)
    assert set(files_in(out)) == FILES
    assert ((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()) == expected(documents)
    written = json.loads((out / "meta.json").read_text())
    assert written == {"kind": "tokens", "dtype": "uint16", **meta, "sha256": own_sha256(written)}
    assert meta["documents"] == len(documents) and meta["text_bytes"] == sum(len(text.encode()) for text in documents)
    return meta


def refuse(call, *args, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400, text
    return text


# ---------------------------------------------------------------------------------------------------------------------------------
# Every format gives the same documents

DOCUMENTS = documents_of(1, 300)


def texts_as_members(documents, folder=""):
    return [(f"{folder}{i:07d}.txt", text.encode()) for i, text in enumerate(documents)]


def make_jsonl(folder):
    (folder / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS))


def make_no_newline_at_the_end(folder):
    (folder / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS)[:-1])


def make_crlf(folder):
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + as_jsonl(DOCUMENTS).replace(b"\n", b"\r\n"))


def make_gz_of_two_members(folder):
    (folder / "a.JSONL.gz").write_bytes(gzip.compress(as_jsonl(DOCUMENTS[:100])) + gzip.compress(as_jsonl(DOCUMENTS[100:])))


def make_xz_of_two_streams(folder):
    parts = lzma.compress(as_jsonl(DOCUMENTS[:100])), lzma.compress(as_jsonl(DOCUMENTS[100:]))
    (folder / "a.jsonl.xz").write_bytes(parts[0] + bytes(8) + parts[1])


def make_zst(folder):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional: pip install -r requirements-data.txt")
    parts = [zstandard.ZstdCompressor().compress(as_jsonl(part)) for part in (DOCUMENTS[:100], DOCUMENTS[100:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(parts))


def make_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install -r requirements-data.txt")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"url": ["x"] * len(DOCUMENTS), "text": DOCUMENTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=70)


def make_txt_tree(folder):
    for i, text in enumerate(DOCUMENTS):
        path = folder / f"{i // 100}" / f"{i:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    (folder / "0" / "README.md").write_text("not read")
    (folder / ".hidden.txt").write_text("not read")
    (folder / "loop").symlink_to(folder)


def make_tar(folder):
    (folder / "a.tar").write_bytes(as_tar(texts_as_members(DOCUMENTS, "long/" * 40), format=tarfile.PAX_FORMAT))


def make_gnu_tar(folder):
    (folder / "a.tar").write_bytes(as_tar(texts_as_members(DOCUMENTS, "long/" * 40), format=tarfile.GNU_FORMAT))


def make_urlsf_xz(folder):
    (folder / "urlsf_subset00-1_data.xz").write_bytes(lzma.compress(as_tar(texts_as_members(DOCUMENTS))))


def shard_members():
    tars = [as_tar(texts_as_members(DOCUMENTS[first : first + 100])) for first in (0, 100, 200)]
    shards = [(f"openwebtext/urlsf_subset00-{i}_data.xz", lzma.compress(tar)) for i, tar in enumerate(tars)]
    directory = tarfile.TarInfo("openwebtext")
    directory.type = tarfile.DIRTYPE
    return [directory, *shards]


def make_urlsf_tar(folder):
    (folder / "urlsf_subset00.tar").write_bytes(as_tar(shard_members()))


def make_whole_tar_xz(folder):
    (folder / "openwebtext.tar.xz").write_bytes(lzma.compress(as_tar(shard_members())))


def make_mixture(folder):
    (folder / "1.jsonl").write_bytes(as_jsonl(DOCUMENTS[:50]))
    for i in range(50, 60):
        (folder / f"2-{i}.txt").write_bytes(DOCUMENTS[i].encode())
    (folder / "3.tar").write_bytes(as_tar([(f"{i}.txt", DOCUMENTS[i].encode()) for i in range(60, 100)]))
    (folder / "4").mkdir()
    (folder / "4" / "a.txt").write_bytes(DOCUMENTS[100].encode())
    (folder / "4" / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl(DOCUMENTS[101:299])))
    (folder / "5.txt").write_bytes(DOCUMENTS[299].encode())


MAKERS = [value for name, value in list(globals().items()) if name.startswith("make_")]


@pytest.mark.parametrize("small", [False, True], ids=["", "small blocks and shards"])
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__[5:])
def test_formats(tmp_path, monkeypatch, make, small):
    if small:  # everything is cut often, and large inner archives take the other way
        for name, value in {"BLOCK": 700, "SHARD": 3000, "RANGE": 9000, "INNER": 100}.items():
            monkeypatch.setattr(corpus, name, value)
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    meta = check(folder, tmp_path / "out", DOCUMENTS)
    assert meta["skipped"] == {} and meta["skipped_documents"] == 0 and meta["tokens"] == meta["text_bytes"] + 300
    (described,) = meta["sources"]
    listing = "".join(f"{entry['sha256']}  {entry['name']}\n" for entry in described["first_files"])
    if described["files"] <= corpus.LISTED_FILES:
        assert described["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
        assert all(entry["sha256"] == hashlib.sha256((tmp_path / entry["name"]).read_bytes()).hexdigest() for entry in described["first_files"])
    if make is make_txt_tree:
        assert described["files"] == 300 and described["files_of_other_kinds"] == 2


def test_several_paths_in_the_order_given(tmp_path, monkeypatch):
    monkeypatch.setattr(openwebtext, "GPT2Encoder", ByteEncoder)
    monkeypatch.setattr(openwebtext, "write_corpus", lambda *given, **keys: write_corpus(*given, ByteEncoder, **keys))
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(DOCUMENTS[:7]))
    (tmp_path / "a,c.jsonl").write_bytes(as_jsonl(DOCUMENTS[7:9]))
    (tmp_path / "z.txt").write_bytes(DOCUMENTS[9].encode())
    for source, documents in (
        (f"{tmp_path / 'b.jsonl'},{tmp_path / 'z.txt'}", [*DOCUMENTS[:7], DOCUMENTS[9]]),
        (f"{tmp_path / 'z.txt'},{tmp_path / 'b.jsonl'}", [DOCUMENTS[9], *DOCUMENTS[:7]]),
        (f"{tmp_path / 'a,c.jsonl'}", DOCUMENTS[7:9]),
    ):
        openwebtext.prepare(configure(openwebtext.PrepareConfig, [f"--source={source}", f"--out_dir={tmp_path / 'out'}", "--num_proc=1"]))
        assert ((tmp_path / "out" / "train.bin").read_bytes(), (tmp_path / "out" / "val.bin").read_bytes()) == expected(documents)


def test_long_lines_and_documents(tmp_path, monkeypatch):
    documents = ["a", "x y" * 3_500_000, "b", "c"]  # 10.5 MB in one line
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents))
    check(tmp_path / "a.jsonl", tmp_path / "out", documents)
    monkeypatch.setattr(corpus, "MAX_DOCUMENT", 5000)
    monkeypatch.setattr(corpus, "BLOCK", 1000)
    real = corpus.Files._chunks

    def small_chunks(self, path):
        for chunk in real(self, path):
            yield from (chunk[i : i + 300] for i in range(0, len(chunk), 300))

    monkeypatch.setattr(corpus.Files, "_chunks", small_chunks)
    for sizes in ([10, 5200, 10, 4900, 10], [5200, 10, 20], [10, 20, 5200], [10, 20000, 6000, 30, 5001, 4980]):
        documents = [f"{size} " + "x" * size for size in sizes]
        (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents))
        fits = [text for text in documents if len(text) + 12 <= 5000]
        meta = check(tmp_path / "a.jsonl", tmp_path / "out", fits)
        too_large = [f"a.jsonl:{i}" for i, text in enumerate(documents, 1) if len(text) + 12 > 5000]
        assert meta["skipped"] == {corpus.TOO_LARGE: {"documents": len(too_large), "first": too_large}}
    (tmp_path / "in").mkdir()
    for name, size in (("1", 4000), ("2", 5001), ("3", 5000)):
        (tmp_path / "in" / f"{name}.txt").write_text("x" * size)
    (tmp_path / "in" / "4.tar").write_bytes(as_tar([("a.txt", b"y" * 5000), ("b.txt", b"y" * 5001), ("c.txt", b"z")]))
    meta = check(tmp_path / "in", tmp_path / "out", ["x" * 4000, "x" * 5000, "y" * 5000, "z"])
    assert meta["skipped"] == {corpus.TOO_LARGE: {"documents": 2, "first": ["in/2.txt", "in/4.tar/b.txt"]}}


def test_what_is_not_text_is_counted_and_named(tmp_path, capsys):
    lines = [
        b'{"text": "good"}',
        b"",
        b"  \r",
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": "a\\u0000b"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud83d alone"}',
        b'{"text": "\\ud83d\\ude00 pair"}',
        b'{"text": 5}',
        b'{"txt": "a"}',
        b'["text"]',
        b"null",
        b"plain words",
        b'{"text": "cut',
        b"[" * 100_000,
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"url": 1, "text": "also good"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    for name, content in (("b", b""), ("c", b"a\0b"), ("d", "Grüße".encode("latin-1")), ("e\n\x1b[31m", b"\xed\xa0\x80"), ("f", b"fine\r\n")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    meta = check(tmp_path, tmp_path / "out", ["good", "\U0001f600 pair", "also good", "fine\r\n"])
    name = tmp_path.name
    assert {reason: entry["documents"] for reason, entry in meta["skipped"].items()} == {
        corpus.EMPTY: 3, corpus.NUL: 2, corpus.NOT_UTF8: 3, corpus.SURROGATE: 1, corpus.NO_TEXT: 4, corpus.NOT_JSON: 4
    }  # fmt: skip
    assert meta["skipped"][corpus.NOT_UTF8]["first"] == [f"{name}/a.jsonl:7", f"{name}/d.txt", f"{name}/e??[31m.txt"]
    assert meta["skipped"][corpus.NO_TEXT]["first"] == [f"{name}/a.jsonl:{i}" for i in (10, 11, 12)]
    assert meta["skipped_documents"] == 17
    printed = capsys.readouterr().out
    assert f"left out 4: {corpus.NO_TEXT} ({name}/a.jsonl:10, {name}/a.jsonl:11, {name}/a.jsonl:12, ...)" in printed
    assert "4 documents, 28 tokens + 4 end marks" in printed and "\x1b" not in printed


def test_parquet_rows_that_are_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: pip install -r requirements-data.txt")
    import pyarrow.parquet as parquet

    broken = pyarrow.array([b"good", None, b"\xff", b"", b"more"], type=pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    meta = check(tmp_path / "a.parquet", tmp_path / "out", ["good", "more"])
    assert {reason: entry["first"] for reason, entry in meta["skipped"].items()} == {
        corpus.NO_TEXT: ["a.parquet:1"], corpus.NOT_UTF8: ["a.parquet:2"], corpus.EMPTY: ["a.parquet:3"]
    }  # fmt: skip
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "b.parquet")
    assert "no column 'text'" in refuse(write, tmp_path / "b.parquet", tmp_path / "out2")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    assert "c.parquet is damaged" in refuse(write, tmp_path / "c.parquet", tmp_path / "out2")


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.jsonl.zst"), ("pyarrow.parquet", "a.parquet"), ("datasets", "hub")])
def test_missing_optional_packages_are_one_line(tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"x" * 100)
    call = (openwebtext.Hub, "main") if name == "hub" else (write, tmp_path / name, tmp_path / "out")
    assert f"needs the package {module.partition('.')[0]}: pip install -r requirements-data.txt" in refuse(*call)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------------------
# Hostile and damaged files


def special(name, kind, link="", size=0):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def test_hostile_members_are_counted_and_nothing_is_extracted(tmp_path):
    inner = lzma.compress(as_tar([("../inner.txt", b"bad"), ("ok.txt", b"inner"), ("deep.xz", lzma.compress(as_tar([("a.txt", b"deep")])))]))
    members = [
        ("good.txt", b"good"),
        ("/etc/absolute.txt", b"bad"),
        ("a/../../up.txt", b"bad"),
        ("../up.xz", inner),
        special("link.txt", tarfile.SYMTYPE, "/etc/hostname"),
        special("hard.txt", tarfile.LNKTYPE, "good.txt"),
        special("fifo.txt", tarfile.FIFOTYPE),
        special("device.txt", tarfile.CHRTYPE),
        special("sparse.txt", tarfile.GNUTYPE_SPARSE, size=10),
        special("unknown.txt", b"Z", size=700),
        ("README.md", b"other"),
        ("x" * 300 + "/..", b"bad"),
        ("dots..txt", b"two dots are no way up"),
        ("inner.xz", inner),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(as_tar(members))
    before = files_in(tmp_path)
    meta = check(tmp_path / "in", tmp_path / "out", ["good", "two dots are no way up", "inner"])
    assert {reason: entry["documents"] for reason, entry in meta["skipped"].items()} == {
        corpus.OUTSIDE: 5, corpus.LINK: 6, corpus.OTHER_MEMBER: 1, corpus.DEEP: 1
    }  # fmt: skip
    assert meta["skipped"][corpus.LINK]["first"] == ["in/a.tar/link.txt", "in/a.tar/hard.txt", "in/a.tar/fifo.txt"]
    assert {name: content for name, content in files_in(tmp_path).items() if not name.startswith("out/")} == before


def gnu_header(size: int, name="a.txt") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def bombs() -> dict[str, bytes]:
    many = lzma.LZMACompressor(preset=1)
    bomb = b"".join(many.compress(b"\n" * (1 << 20)) for _ in range(12)) + many.flush()
    large = io.BytesIO()
    with tarfile.open(fileobj=large, mode="w") as archive:
        for i in range(8):  # each of them small enough
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 3 << 20
            archive.addfile(info, io.BytesIO(b"A" * info.size))
    packed = lzma.compress(large.getvalue(), preset=1)
    return {
        "lines.jsonl.xz": bomb,
        "lines.jsonl.gz": gzip.compress(b"\n" * (12 << 20), 9),
        "tar.xz": packed,
        "nested.tar": as_tar([("a.txt", b"a"), ("b.xz", packed)]),
        "claims.tar": gnu_header(1 << 40) + b"x" * 4096,
        "negative.tar": gnu_header(-5) + b"x" * 4096,
        "name.tar": special("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=1 << 33).tobuf(tarfile.GNU_FORMAT) + b"x" * 4096,
        "pax.tar": special("pax", tarfile.XHDTYPE, size=20).tobuf(tarfile.USTAR_FORMAT)
        + b"20 size=99999999999\n".ljust(512, b"\0")
        + gnu_header(1)
        + bytes(2048),
    }


def test_bombs_and_false_sizes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FREE_BYTES", 4 << 20)
    for name, content in bombs().items():
        (tmp_path / name).write_bytes(content)
        text = refuse(write, tmp_path / name, tmp_path / "out")
        assert "unpack" in text and "times" in text or "is damaged" in text, text
        assert not (tmp_path / "out").exists(), name


def test_zst_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FREE_BYTES", 4 << 20)
    zstandard = pytest.importorskip("zstandard", reason="zstandard is optional: pip install -r requirements-data.txt")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b"\n" * (12 << 20)))
    assert "unpacks to more than 200 times" in refuse(write, tmp_path / "a.jsonl.zst", tmp_path / "out")


def damaged_files() -> dict[str, bytes]:
    noise = random.Random(0)
    lines = as_jsonl([noise.randbytes(40).hex() for _ in range(2000)])
    xz, gz = lzma.compress(lines), gzip.compress(lines)
    tar = as_tar([(f"{i}.txt", noise.randbytes(300).hex().encode()) for i in range(20)])
    header = bytearray(tar)
    header[1536 * 5 + 3] ^= 0xFF  # in the middle: the rest must not get lost quietly
    cases = {
        "cut.jsonl.xz": xz[:-9],
        "flipped.jsonl.xz": xz[:20000] + bytes([xz[20000] ^ 1]) + xz[20001:],
        "appended.jsonl.xz": xz + b"rubbish",
        "empty.jsonl.xz": b"",
        "plain.jsonl.xz": lines,
        "cut.jsonl.gz": gz[:-3],
        "flipped.jsonl.gz": gz[:-6] + bytes([gz[-6] ^ 1]) + gz[-5:],
        "cut.tar": tar[:6000],
        "header.tar": bytes(header),
        "empty.tar": b"",
        "zeros.tar": bytes(10240),
        "text.tar": lines[:5000],
        "lines.xz": xz,  # no tar inside
        "cut.tar.xz": lzma.compress(tar)[:-8],
        "cut_inner.tar": as_tar([("a.txt", b"a"), ("b.xz", lzma.compress(tar)[:-8])]),
    }
    try:
        import zstandard
    except ImportError:
        return cases
    zst = zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    return cases | {"cut.jsonl.zst": zst[:-5], "flipped.jsonl.zst": zst[:-2] + bytes([zst[-2] ^ 1]) + zst[-1:], "plain.jsonl.zst": lines}


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_are_refused_and_leave_the_old_data_set(tmp_path, name):
    bad, out = tmp_path / name, tmp_path / "out"
    bad.write_bytes(damaged_files()[name])
    (tmp_path / "good.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    write(tmp_path / "good.jsonl", out)
    before = files_in(out)
    text = refuse(write, [tmp_path / "good.jsonl", bad], out)
    assert name in text and ("is damaged" in text or "zeros" in name), text
    assert files_in(out) == before


def test_the_validation_set_may_be_a_larger_share(tmp_path):
    documents, out = documents_of(7, 30), tmp_path / "out"
    (tmp_path / "docs.jsonl").write_bytes(as_jsonl(documents))
    meta = write_corpus(corpus.Files([tmp_path / "docs.jsonl"]), out, 1, ByteEncoder, val_fraction=0.25)
    assert ((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()) == expected(documents, 0.25)
    assert meta["split"]["val_fraction"] == 0.25 and meta["splits"]["val"]["documents"] == 8
    before = files_in(out)
    with pytest.raises(InputError, match="--val_fraction=0.99 of 30 documents leaves none to train on"):
        write_corpus(corpus.Files([tmp_path / "docs.jsonl"]), out, 1, ByteEncoder, val_fraction=0.99)
    assert files_in(out) == before
    with pytest.raises(InputError, match="--val_fraction=1 must lie between 0 and 1"):
        openwebtext.PrepareConfig(source="docs.jsonl", val_fraction=1.0).check()


def test_bad_paths(tmp_path):
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "folder" / "a.csv").write_text("a")
    (tmp_path / "one.jsonl").write_bytes(as_jsonl(["only one"]))
    out = tmp_path / "out"
    assert "does not exist" in refuse(write, tmp_path / "nothing.jsonl", out)
    assert "holds no file of the kinds" in refuse(write, tmp_path / "folder", out)
    assert "a.csv is none of" in refuse(write, tmp_path / "folder" / "a.csv", out)
    assert "has 1 document, it must be 2" in refuse(write, tmp_path / "one.jsonl", out)
    (tmp_path / "bad.jsonl").write_text("no\nno\n")
    assert "0 documents" in refuse(write, tmp_path / "bad.jsonl", out) and not out.exists()
    assert "(2 left out: not JSON)" in refuse(write, tmp_path / "bad.jsonl", out)
    out.write_text("a file")
    assert "cannot write in" in refuse(write, [tmp_path / "one.jsonl"] * 2, out)
    for option in ("--source=", "--num_proc=-1", "--num_proc=257", "--sorce=hub"):
        refuse(configure, openwebtext.PrepareConfig, [option])


def test_script_exits_with_status_2(tmp_path, capsys):
    for module in (wikitext2, wikitext2_char):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            module.prepare(configure(module.PrepareConfig, [f"--source={tmp_path}", f"--out_dir={tmp_path / 'out'}"]))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--source=FOLDER" in error and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------------------
# Order, processes, resuming


@pytest.mark.parametrize("count", [2, 3, 1999, 2000, 2001, 4001])
def test_split_sizes(tmp_path, count):
    documents = [str(i) for i in range(count)]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents))
    meta = check(tmp_path / "a.jsonl", tmp_path / "out", documents)
    val = meta["splits"]["val"]["documents"]
    assert val == math.ceil(count / 2000) and meta["splits"]["train"]["documents"] == count - val
    assert meta["split"] == {"rule": corpus.ORDER_RULE, "seed": 2357, "val_fraction": 0.0005}


def test_external_sort_is_the_plain_sort(tmp_path, monkeypatch):
    documents = documents_of(3, 1500)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents))
    for block, shard, limit in ((20_000, 30_000, 50_000), (5_000, 100_000, 7_777), (5_000, 1, 1 << 30)):
        monkeypatch.setattr(corpus, "BLOCK", block)
        monkeypatch.setattr(corpus, "SHARD", shard)
        monkeypatch.setattr(corpus, "RANGE", limit)
        check(tmp_path / "a.jsonl", tmp_path / "out", documents)


def test_number_of_processes_changes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    make_mixture(tmp_path / "in")
    (tmp_path / "in" / "6.tar").write_bytes(as_tar(shard_members()))
    (tmp_path / "in" / "7.jsonl").write_bytes(as_jsonl(documents_of(4, 20_000)) + b"not JSON\n")
    documents = DOCUMENTS * 2 + documents_of(4, 20_000)
    results = []
    for num_proc in (1, 2, 3):
        meta = check(tmp_path / "in", tmp_path / f"out{num_proc}", documents, num_proc=num_proc)
        assert meta["skipped"] == {corpus.NOT_JSON: {"documents": 1, "first": ["in/7.jsonl:20001"]}}
        results.append(files_in(tmp_path / f"out{num_proc}"))
    assert results[0] == results[1] == results[2]


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import corpus, test_text_corpora
from pathlib import Path
if __name__ == "__main__":
    corpus.BLOCK, corpus.SHARD = 10_000, 30_000
    corpus.write_corpus(corpus.Files([Path({source!r})]), Path({out!r}), {num_proc}, test_text_corpora.{encoder})
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_resumes_after_kill_9(tmp_path, num_proc):
    documents = documents_of(5, 1000)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(documents) + b"broken\n" + as_jsonl(documents))
    out, work = tmp_path / "out", tmp_path / "out" / ".prepare.tmp"
    (tmp_path / "small.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    before = check(tmp_path / "small.jsonl", out, DOCUMENTS) and files_in(out)
    options = {"root": str(ROOT), "tests": str(ROOT / "tests"), "source": str(tmp_path / "a.jsonl"), "out": str(out), "num_proc": num_proc}
    script = tmp_path / "run.py"

    def start():
        script.write_text(KILLED.format(**options, encoder="SlowEncoder"))
        return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start()
    deadline = time.monotonic() + 40
    while not (work / "2.json").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children_of(process.pid) if Path("/proc/self/task").is_dir() else []
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (work / "2.json").exists(), process.stdout.read()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers)), "workers outlive the main process"
    assert {name: content for name, content in files_in(out).items() if not name.startswith(".prepare")} == before
    finished = len(list(work.glob("*.json")))

    damaged = work / f"{finished - 1}.bin"  # a shard that changed is not taken over
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\1\1")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert f"going on after {finished - 1} finished parts" in done.stdout
    assert set(files_in(out)) == FILES
    assert ((out / "train.bin").read_bytes(), (out / "val.bin").read_bytes()) == expected(documents * 2)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["skipped"] == {corpus.NOT_JSON: {"documents": 1, "first": ["a.jsonl:1001"]}} and meta["documents"] == 2000


@pytest.mark.parametrize("make", [make_mixture, make_txt_tree, make_urlsf_tar, make_jsonl], ids=lambda make: make.__name__[5:])
def test_resumes_after_every_shard(tmp_path, monkeypatch, make):
    """Stops after each shard in turn, on any format: the next run begins with the next block."""
    for name, value in {"BLOCK": 2000, "SHARD": 8000}.items():
        monkeypatch.setattr(corpus, name, value)
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    check(tmp_path / "in", tmp_path / "whole", DOCUMENTS)
    add, runs = corpus.Shards.add, 0

    def add_and_stop(self, *args):
        add(self, *args)
        raise KeyboardInterrupt

    while True:
        monkeypatch.setattr(corpus.Shards, "add", add_and_stop)
        try:
            write(tmp_path / "in", tmp_path / "out")
            break
        except InputError as error:
            runs += 1
            assert "the same command goes on" in str(error)
        assert runs < 100
    assert runs >= 3 and files_in(tmp_path / "out") == files_in(tmp_path / "whole")


def test_another_source_does_not_take_over_the_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SHARD", 1000)
    monkeypatch.setattr(corpus, "BLOCK", 1000)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    publish = corpus.publish

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "publish", full_disk)
    assert "No space left on device; what is finished is kept" in refuse(write, tmp_path / "a.jsonl", tmp_path / "out")
    assert (tmp_path / "out" / ".prepare.tmp" / "0.json").exists() and not (tmp_path / "out" / "train.bin").exists()
    monkeypatch.setattr(corpus, "publish", publish)
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS[::-1]))
    check(tmp_path / "a.jsonl", tmp_path / "out", DOCUMENTS[::-1])


def test_two_runs_at_once(tmp_path):
    import fcntl

    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    work = tmp_path / "out" / ".prepare.tmp"
    work.mkdir(parents=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is preparing" in refuse(write, tmp_path / "a.jsonl", tmp_path / "out")
        assert (work / "lock").exists()
    check(tmp_path / "a.jsonl", tmp_path / "out", DOCUMENTS)


def test_break_between_the_files_leaves_no_meta(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    (tmp_path / "b.jsonl").write_bytes(as_jsonl(DOCUMENTS[:200]))
    out, replace = tmp_path / "out", os.replace
    check(tmp_path / "a.jsonl", out, DOCUMENTS)

    def breaks_at_val(source, target):
        if Path(target) == out / "val.bin":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(corpus.os, "replace", breaks_at_val)
    assert "Input/output error" in refuse(write, tmp_path / "b.jsonl", out)
    assert not (out / "meta.json").exists()
    monkeypatch.undo()
    check(tmp_path / "b.jsonl", out, DOCUMENTS[:200])


def test_worker_that_dies_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(DOCUMENTS))
    assert "a worker process died" in refuse(write, tmp_path / "a.jsonl", tmp_path / "out", num_proc=2, encoder=DyingEncoder)
    assert not (tmp_path / "out" / "train.bin").exists()


class DyingEncoder(ByteEncoder):
    def encode(self, text):
        os._exit(9)


# ---------------------------------------------------------------------------------------------------------------------------------
# The hub, by stand-ins


@pytest.fixture
def hub(monkeypatch):
    """Stand-ins for datasets and huggingface_hub; returns what they were asked."""
    asked = []

    class Rows(list):
        def __getitem__(self, key):
            return {"text": list.__getitem__(self, key)}

    class HfApi:
        def dataset_info(self, name, revision, files_metadata, timeout):
            asked.append((name, revision))
            if revision == "gone":
                raise ConnectionError("no route\nto host")
            lfs = types.SimpleNamespace(sha256="ab" * 32)
            names = ["plain_text/train/0001.parquet", "plain_text/train/0000.parquet", ".gitattributes"]
            return types.SimpleNamespace(sha="c0ffee", siblings=[types.SimpleNamespace(rfilename=n, size=1000, lfs=lfs) for n in names])

    def load_dataset(kind, data_files, split):
        asked.append((kind, data_files, split))
        return Rows([*DOCUMENTS, None, "\ud800", ""])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
    monkeypatch.setattr(openwebtext, "HUB_DOCUMENTS", 303)
    return asked


def test_hub(tmp_path, monkeypatch, hub):
    monkeypatch.setattr(corpus, "SHARD", 1)
    source = openwebtext.Hub("refs/convert/parquet")
    address = "hf://datasets/Skylion007/openwebtext@c0ffee/plain_text/train/000"
    files = {"train": [f"{address}0.parquet", f"{address}1.parquet"]}
    assert hub == [("Skylion007/openwebtext", "refs/convert/parquet"), ("parquet", files, "train")]
    meta = write_corpus(source, tmp_path / "out", 1, ByteEncoder)
    assert ((tmp_path / "out" / "train.bin").read_bytes(), (tmp_path / "out" / "val.bin").read_bytes()) == expected(DOCUMENTS)
    assert {reason: entry["documents"] for reason, entry in meta["skipped"].items()} == {corpus.NO_TEXT: 1, corpus.NOT_UTF8: 1, corpus.EMPTY: 1}
    (described,) = meta["sources"]
    assert described["commit"] == "c0ffee" and described["first_files"][0]["sha256"] == "ab" * 32
    assert "cannot be had (ConnectionError: no route to host)" in refuse(openwebtext.Hub, "gone")
    monkeypatch.setattr(openwebtext, "HUB_DOCUMENTS", 8_013_769)
    assert "has 303 documents and not 8,013,769" in refuse(openwebtext.Hub, "refs/convert/parquet")


# ---------------------------------------------------------------------------------------------------------------------------------
# GPT-2's BPE


def test_fast_encoder_is_encode_ordinary(bpe):
    encoder, draw = GPT2Encoder(), random.Random(7)
    ascii_atoms = [" ", "  ", "\n\n", "\r\n", *"\n\t\r\v\f\x1ca'!_", "The", "'s", "'ll", "42", "...", "<|endoftext|>"]
    atoms = ascii_atoms * 2 + list("\x85\xa0\u1680\u2003\u2028\u3000\u180e\u200bé一½\U0001f600Ⅷ\u0301")
    texts = ["".join(draw.choices(atoms if i % 2 else ascii_atoms, k=draw.randint(1, 14))) for i in range(30_000)]
    plain = [bpe.encode_ordinary(text) for text in texts]
    for text, ids in zip(texts, plain, strict=True):
        assert encoder.encode(text).tolist() == ids, repr(text)
    for first in range(0, len(texts), 100):
        together = [id_ for ids in plain[first : first + 100] for id_ in (*ids, 50256)]
        assert encoder.encode_documents(texts[first : first + 100]).tolist() == together
    for text in ("x" + " " * 300_000, "\n" * 300_000 + "x"):  # beyond some 10^6 of them encode_ordinary itself gives up
        assert encoder.encode(text).tolist() == bpe.encode_ordinary(text)
    assert len(encoder.encode(" " * 2_000_000 + "x")) == 2_000_000


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the repository")
@pytest.mark.parametrize("num_proc", [1, 2])
def test_openwebtext_sample(tmp_path, bpe, num_proc):
    script = [sys.executable, str(ROOT / "data" / "openwebtext" / "prepare.py")]
    sample = SHARED / "openwebtext_sample" / "openwebtext-1000.jsonl"
    options = [f"--source={sample.parent}", f"--num_proc={num_proc}", f"--out_dir={tmp_path}"]
    done = subprocess.run([*script, *options], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "1,000 documents, 1,053,999 tokens + 1,000 end marks" in done.stdout
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["vocab_size"] == 50257 and meta["tokenizer"] == {"type": "gpt2"} and meta["text_bytes"] == 4_663_523
    assert sum(split["tokens"] for split in meta["splits"].values()) == 1_054_999
    tokens = Tokens(str(tmp_path), 1024, "cpu")
    texts = [json.loads(line)["text"] for line in sample.read_bytes().splitlines()]
    order = np.random.default_rng(2357).permutation(1000)
    want = [np.array([*bpe.encode_ordinary(texts[i]), 50256], dtype="<u2") for i in order]
    assert np.array_equal(np.fromfile(tmp_path / "val.bin", dtype="<u2"), want[0])
    assert np.array_equal(np.fromfile(tmp_path / "train.bin", dtype="<u2"), np.concatenate(want[1:]))
    assert tokens.checksum["val"] == hashlib.sha256(want[0].tobytes()).hexdigest()
    assert str(SHARED) not in (tmp_path / "meta.json").read_text()


# ---------------------------------------------------------------------------------------------------------------------------------
# WikiText-2


@pytest.fixture
def wikitext(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    texts = {"train": "the cat\r\n" * 30 + "q" * 5 + "é" * 4 + "\ufffd", "valid": "that é\n" * 3 + "Zq", "test": "hat"}
    for name, text in texts.items():
        (folder / f"wiki.{name}.raw").write_bytes(text.encode())
    return folder, texts


def test_wikitext2_char(tmp_path, wikitext, capsys):
    folder, texts = wikitext
    out = tmp_path / "out"
    wikitext2_char.prepare(configure(wikitext2_char.PrepareConfig, [f"--source={folder}", "--min_count=5", f"--out_dir={out}"]))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == {"type": "char", "characters": "\n\r acehqt\ufffd", "unknown": "\ufffd"} and meta["vocab_size"] == 10
    assert set(files_in(out)) == FILES | {"test.bin"} and meta["unknown_characters"] == {"train": 5, "val": 4, "test": 0}
    tokenizer = Tokenizer(meta["tokenizer"])
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        ids = np.fromfile(out / f"{split}.bin", dtype="<u2")
        assert tokenizer.decode(ids) == texts[name].replace("é", "\ufffd").replace("Z", "\ufffd")
        assert tokenizer.encode(texts[name]) == ids.tolist()
        assert meta["splits"][split] == {"tokens": len(ids), "sha256": hashlib.sha256(ids.tobytes()).hexdigest()}
    assert Tokens(str(out), 8, "cpu").vocab_size == 10
    assert "9 of 11 characters occur at least 5 times" in capsys.readouterr().out
    before = files_in(out)
    assert "leaves 0 known characters" in refuse(
        wikitext2_char.prepare, configure(wikitext2_char.PrepareConfig, [f"--source={folder}", "--min_count=1000", f"--out_dir={out}"])
    )
    (folder / "wiki.valid.raw").write_bytes(b"\xff")
    assert "wiki.valid.raw is not UTF-8 text (byte 0)" in refuse(
        wikitext2_char.prepare, configure(wikitext2_char.PrepareConfig, [f"--source={folder}", f"--out_dir={out}"])
    )
    refuse(configure, wikitext2_char.PrepareConfig, ["--min_count=0"])
    assert files_in(out) == before


def test_a_tokenizer_without_unknown_still_refuses():
    with pytest.raises(InputError, match="'c' at position 1"):
        Tokenizer({"type": "char", "characters": "ab"}).encode("acb")


def test_wikitext2(tmp_path, wikitext, bpe):
    folder, texts = wikitext
    out = tmp_path / "out"
    options = [f"--source={folder}", f"--out_dir={out}"]
    wikitext2.prepare(configure(wikitext2.PrepareConfig, options))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == {"type": "gpt2"} and meta["vocab_size"] == 50257 and set(files_in(out)) == FILES | {"test.bin"}
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert np.fromfile(out / f"{split}.bin", dtype="<u2").tolist() == bpe.encode_ordinary(texts[name])
    before = files_in(out)
    (folder / "wiki.train.raw").write_bytes(b"a\0b")
    assert "wiki.train.raw is not text" in refuse(wikitext2.prepare, configure(wikitext2.PrepareConfig, options))
    assert files_in(out) == before


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the repository")
def test_wikitext2_known_counts(tmp_path, bpe):
    wikitext2.prepare(configure(wikitext2.PrepareConfig, [f"--source={SHARED / 'wikitext-2-raw'}", f"--out_dir={tmp_path}"]))
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert {name: split["tokens"] for name, split in meta["splits"].items()} == {"train": 2_417_786, "val": 249_887, "test": 286_221}
    assert meta["sources"][0]["sha256"] == "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57"


@pytest.mark.parametrize("name", ["wikitext2", "wikitext2_char"])
def test_config_files(name):
    arm_a, arm_1 = (build(TrainConfig, [str(ROOT / "config" / f"{name}{suffix}.py")], []) for suffix in ("", "_laplacian"))
    assert arm_a.dataset == name and not arm_a.diffusion and arm_1.diffusion and arm_a.out_dir != arm_1.out_dir
    assert (arm_a.n_layer, arm_a.n_embd, arm_a.block_size, arm_a.max_iters) == (arm_1.n_layer, arm_1.n_embd, arm_1.block_size, arm_1.max_iters)
