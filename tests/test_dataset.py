"""dataset.py: batches as a pure function of (seed, step), validation that covers every target once, and data that is refused by name."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from configurator import InputError
from dataset import Tokenizer, Tokens, meta_json, prepare_if_missing, sha256_of, write_file, write_tokens

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = {"type": "char", "characters": "abc"}


def prepared(directory: Path, train, val, vocab_size: int = 65536) -> Path:
    """A data set of these token ids."""
    directory.mkdir(exist_ok=True)
    write_tokens(directory, np.asarray(train), np.asarray(val), {"vocab_size": vocab_size, "tokenizer": CHARACTERS})
    return directory


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    """Token i is the number i, so that an id tells its place: 40,000 to train on, 1,003 to validate on (they start at 50,000)."""
    return prepared(tmp_path_factory.mktemp("counting"), np.arange(40_000), np.arange(50_000, 51_003))


# ---------------------------------------------------------------------------------------------------------------------------------
# Training batches


def test_draws_are_a_pure_function_of_seed_and_step(counting):
    first, second = Tokens(counting, 16, "cpu"), Tokens(str(counting), 16, "cpu")
    keys = [(seed, step) for seed in (0, 1337, 2**63 - 1) for step in (0, 1, 2, 10**6)]
    expected = {key: first.draw(*key, 32) for key in keys}
    for number, key in enumerate(reversed(keys)):  # another order, and the global generators somewhere else
        np.random.seed(number)
        torch.manual_seed(number)
        assert np.array_equal(second.draw(*key, 32), expected[key])
    assert len({tuple(offsets) for offsets in expected.values()}) == len(keys)


def test_drawing_a_batch_leaves_the_global_generators_alone(counting):
    tokens = Tokens(counting, 16, "cpu")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    tokens.batch(torch.from_numpy(tokens.draw(1, 2, 8)))
    list(tokens.validation(4))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("T", [1, 16, 100])
def test_targets_are_the_inputs_one_token_later(counting, T):
    tokens = Tokens(counting, T, "cpu")
    offsets = tokens.draw(3, 4, 50)
    x, y = tokens.batch(torch.from_numpy(offsets))
    assert x.dtype == y.dtype == torch.int64 and x.is_contiguous() and y.is_contiguous()
    assert x.tolist() == [list(range(begin, begin + T)) for begin in offsets]
    assert y.tolist() == [list(range(begin + 1, begin + T + 1)) for begin in offsets]


def test_windows_cover_the_whole_range_evenly(tmp_path):
    T, places = 8, 5
    tokens = Tokens(prepared(tmp_path, range(T + places), range(T + 1)), T, "cpu")
    drawn = np.concatenate([tokens.draw(0, step, 100) for step in range(100)])
    counts = np.bincount(drawn)
    assert len(counts) == places  # from 0 to the last window whose target exists
    assert np.abs(counts - 2000).max() < 4 * (10_000 * 0.2 * 0.8) ** 0.5
    assert tokens.batch(torch.tensor([places - 1]))[1][0, -1] == T + places - 1  # the last token of the file is a target


def test_the_shortest_data_set_has_one_window(tmp_path):
    tokens = Tokens(prepared(tmp_path, range(9), range(9)), 8, "cpu")
    assert set(tokens.draw(0, 0, 100)) == {0}


def test_ids_beyond_int16_are_read_as_they_are(tmp_path):
    ids = np.array([0, 1, 32767, 32768, 32769, 50256, 65534, 65535, 7])
    tokens = Tokens(prepared(tmp_path, ids, ids[::-1]), 8, "cpu")
    x, y = tokens.batch(torch.tensor([0]))
    assert x[0].tolist() == ids[:-1].tolist() and y[0].tolist() == ids[1:].tolist()
    x, y, count = next(tokens.validation(1))
    assert x[0].tolist() == ids[::-1][:-1].tolist() and y[0].tolist() == ids[::-1][1:].tolist() and count == 8


def test_files_are_nanogpts_and_stay_as_they_are(tmp_path):
    ids = [3, 1, 65535, 256, 0]
    prepared(tmp_path, ids, ids)
    assert (tmp_path / "train.bin").read_bytes() == b"\x03\x00\x01\x00\xff\xff\x00\x01\x00\x00"
    tokens = Tokens(tmp_path, 4, "cpu")
    tokens.split["train"][0] = 9
    assert (tmp_path / "train.bin").read_bytes()[:2] == b"\x03\x00"
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["splits"]["val"] == {"tokens": 5, "sha256": sha256_of(tmp_path / "val.bin")}
    assert tokens.checksum == {name: sha256_of(tmp_path / f"{name}.bin") for name in ("train", "val")}
    assert (tokens.vocab_size, tokens.tokenizer) == (65536, CHARACTERS)


# ---------------------------------------------------------------------------------------------------------------------------------
# Validation


def targets_of(tokens: Tokens, *args) -> list[int]:
    """The targets that count, after checks of the shape and of x against y. Ids count up by one, so the target after x is x + 1."""
    found = []
    for x, y, count in tokens.validation(*args):
        assert x.shape == y.shape == (args[0], tokens.block_size)
        real = y >= 0
        assert set(y[~real].tolist()) <= {-1}
        assert torch.equal(y[real], x[real] + 1)
        assert count == int(real.sum())  # 0 where other ranks have a batch and this one has no more
        found += y[real].tolist()
    return found


@given(extra=st.integers(0, 60), T=st.integers(1, 20), batch_size=st.integers(1, 7), world=st.integers(1, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_target_is_validated_exactly_once(tmp_path_factory, extra, T, batch_size, world):
    length = T + 1 + extra
    tokens = Tokens(prepared(tmp_path_factory.mktemp("validated"), range(T + 1), range(length)), T, "cpu")
    found = [target for rank in range(world) for target in targets_of(tokens, batch_size, 0, rank, world)]
    assert sorted(found) == list(range(1, length))
    windows = -(-(length - 1) // T)
    batches = {len(list(tokens.validation(batch_size, 0, rank, world))) for rank in range(world)}
    assert batches == {math.ceil(math.ceil(windows / world) / batch_size)}  # equally many, none too many


@pytest.mark.parametrize("eval_tokens", [1, 15, 16, 17, 32, 160, 333, 990, 991, 992, 1001, 1002, 1003, 10**9])
@pytest.mark.parametrize("world, batch_size", [(1, 1), (1, 5), (3, 4)])
def test_eval_tokens_takes_evenly_spaced_full_windows(counting, eval_tokens, world, batch_size):
    T, targets = 16, 1002
    tokens = Tokens(counting, T, "cpu")
    found = [target - 50_000 for rank in range(world) for target in targets_of(tokens, batch_size, eval_tokens, rank, world)]
    again = [target - 50_000 for rank in range(world) for target in targets_of(tokens, batch_size, eval_tokens, rank, world)]
    assert found == again
    full, wanted = targets // T, max(1, eval_tokens // T)  # 62 full windows, and one of 10 targets
    if wanted > full:
        assert sorted(found) == list(range(1, targets + 1))
        return
    windows = sorted({(target - 1) // T for target in found})
    assert sorted(found) == [window * T + place for window in windows for place in range(1, T + 1)]
    assert len(windows) == wanted
    for j, window in enumerate(windows):  # the nearest window to j / (wanted - 1) of the way from the first to the last
        assert 2 * abs(window * (wanted - 1) - j * (full - 1)) <= wanted - 1


# ---------------------------------------------------------------------------------------------------------------------------------
# Data that cannot be used


def refused(directory: Path, T: int = 4) -> str:
    """The message with which a data set is refused."""
    with pytest.raises(InputError) as error:
        Tokens(directory, T, "cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def small(tmp_path) -> Path:
    return prepared(tmp_path / "small", [0, 1, 2] * 5, [2, 1, 0] * 4, vocab_size=3)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_missing_file(small, name):
    assert Tokens(small, 4, "cpu").vocab_size == 3
    (small / name).unlink()
    message = refused(small)
    assert str(small / name) in message and "prepare.py" in message


@pytest.mark.parametrize("name, tokens", [("train.bin", 15), ("val.bin", 12)])
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_wrong_size(small, name, tokens, change):
    content = (small / name).read_bytes()
    (small / name).write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    message = refused(small)
    assert str(small / name) in message and f"{2 * tokens + change} bytes" in message and f"says {2 * tokens}:" in message


@pytest.mark.parametrize("name, place", [("train.bin", 0), ("train.bin", 29), ("val.bin", 12)])
def test_flipped_byte(small, name, place):
    content = bytearray((small / name).read_bytes())
    content[place] ^= 1
    (small / name).write_bytes(content)
    message = refused(small)
    assert str(small / name) in message and "sha256" in message


@pytest.mark.parametrize("name, train, val", [("train.bin", 16, 20), ("val.bin", 20, 16)])
def test_too_short(tmp_path, name, train, val):
    directory = prepared(tmp_path, [0] * train, [0] * val)
    assert Tokens(directory, 15, "cpu").block_size == 15  # 15 tokens and a target fit exactly
    message = refused(directory, 16)
    assert str(directory / name) in message and "16 tokens" in message and "--block_size=16" in message


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("bad", [3, 40_000])
def test_token_beyond_the_vocabulary(tmp_path, split, bad):
    ids = {"train": [0, 1, 2] * 4, "val": [0, 1, 2] * 4}
    ids[split][5] = bad
    message = refused(prepared(tmp_path, ids["train"], ids["val"], vocab_size=3))
    assert str(tmp_path / f"{split}.bin") in message and f"token id {bad}" in message and "3" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff\xfe", b'{"vocab_size": 3, "tokenizer": {}, "splits": []}'])
def test_damaged_meta(small, content):
    (small / "meta.json").write_bytes(content)
    message = refused(small)
    assert str(small / "meta.json") in message and "prepare.py" in message


@pytest.mark.parametrize(
    "path", [("vocab_size",), ("tokenizer",), ("splits",), ("splits", "train"), ("splits", "val", "tokens"), ("splits", "train", "sha256")], ids=str
)
def test_meta_without_a_key(small, path):
    meta = json.loads((small / "meta.json").read_text())
    parent = meta
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    (small / "meta.json").write_text(json.dumps(meta))
    message = refused(small)
    assert str(small / "meta.json") in message and path[-1] in message


def test_every_flipped_bit_in_meta_is_refused_or_without_effect(small):
    path = small / "meta.json"
    whole, before = path.read_bytes(), vars(Tokens(small, 4, "cpu"))
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = vars(Tokens(small, 4, "cpu"))
        except InputError as error:
            assert str(path) in str(error) or "bin" in str(error)
            continue
        assert all(found[key] == before[key] for key in ("vocab_size", "tokenizer", "checksum"))
    path.write_bytes(json.dumps(json.loads(whole), indent=None, sort_keys=True).encode())  # written down otherwise, and equal
    Tokens(small, 4, "cpu")


@pytest.mark.parametrize("split", ["train", "val"])
def test_large_files_are_looked_at_batch_by_batch(tmp_path, monkeypatch, split):
    """Beyond HASH_AT_LOAD nothing is read at the start; a batch with an id beyond the vocabulary is refused before it goes to the device."""
    ids = {"train": [0, 1, 2] * 40, "val": [0, 1, 2] * 40}
    ids[split][77] = 3
    directory = prepared(tmp_path, ids["train"], ids["val"], vocab_size=3)
    monkeypatch.setattr(dataset, "HASH_AT_LOAD", 100)
    tokens = Tokens(directory, 4, "cpu")
    tokens.batch(torch.tensor([0, 30, 72, 78]))  # 72 to 76 and 78 to 82
    tokens.device = torch.device("meta")  # nothing of a refused batch is on the device
    with pytest.raises(InputError, match=f"{split}.bin has token id 3, the vocabulary has 3"):
        tokens.batch(torch.tensor([0, 73])) if split == "train" else list(tokens.validation(4))
    monkeypatch.setattr(dataset, "HASH_AT_LOAD", 1000)
    assert "token id 3" in refused(directory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_large_files_on_the_gpu_are_looked_through_there(tmp_path, monkeypatch):
    directory = prepared(tmp_path, [0, 40_000, 2] * 40, [0, 1, 2] * 40, vocab_size=40_001)
    monkeypatch.setattr(dataset, "HASH_AT_LOAD", 100)
    monkeypatch.setattr(dataset, "SCAN", 7)
    assert Tokens(directory, 4, "cuda").unseen == {}
    with pytest.raises(InputError, match="token id 40000"):
        Tokens(prepared(tmp_path, [0, 40_000, 2] * 40, [0, 1, 2] * 40, vocab_size=40_000), 4, "cuda")


def test_write_file_writes_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(dataset.os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(InputError, match="No space left on device") as error:
                write_file(path, b"new")
        assert str(path) in str(error.value)
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(InputError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "file", b"")


def test_meta_is_read_as_utf8_in_any_locale(tmp_path):
    prepared(tmp_path, [0, 1, 2] * 4, [0, 1, 2] * 4)
    meta = json.loads((tmp_path / "meta.json").read_bytes())
    meta["tokenizer"] = {"type": "char", "characters": "aé😀"}
    write_file(tmp_path / "meta.json", meta_json(meta))
    code = "import sys; from dataset import Tokens; assert ascii(Tokens(sys.argv[1], 4, 'cpu').tokenizer['characters']) == ascii('a\\xe9\\U0001f600')"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ | plain, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ids_that_do_not_fit_are_not_written(tmp_path):
    for ids, word in (([0, 1, 65536], "0 to 65536"), ([0, -1, 2], "-1 to 2")):
        for splits, name in (((ids, [0, 1]), "train"), (([0, 1], ids), "val")):
            with pytest.raises(InputError) as error:
                prepared(tmp_path, *splits)
            assert name in str(error.value) and word in str(error.value)
    assert not (tmp_path / "meta.json").exists()


# ---------------------------------------------------------------------------------------------------------------------------------
# Preparation on demand

WRITER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from dataset import write_tokens
here = Path(__file__).parent
time.sleep(0.3)
with open(here / "runs", "a") as file:
    file.write("x")
write_tokens(here, [0, 1] * 9, [1, 0] * 9, {{"vocab_size": 2, "tokenizer": {{"type": "char", "characters": "ab"}}}})
"""


def test_one_of_several_prepares_and_the_others_wait(tmp_path):
    (tmp_path / "prepare.py").write_text(WRITER)
    found = []

    def ask():
        prepare_if_missing(str(tmp_path))
        found.append(Tokens(tmp_path, 8, "cpu").vocab_size)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2, 2, 2]
    prepare_if_missing(str(tmp_path))
    assert (tmp_path / "runs").read_text() == "x"


def test_preparation_that_fails_names_the_script(tmp_path):
    (tmp_path / "prepare.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError) as error:
        prepare_if_missing(str(tmp_path))
    assert str(tmp_path / "prepare.py") in str(error.value)
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize("name", ["shakespear", "nowhere/at/all", "."])
def test_unknown_data_set_lists_the_known_ones(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        prepare_if_missing(name)
    assert f"--dataset={name} " in str(error.value) and "shakespeare_char" in str(error.value)


def test_a_name_under_data_comes_before_a_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("shakespeare_char").mkdir()
    Path("mine").mkdir()
    assert dataset.directory_of("shakespeare_char") == ROOT / "data" / "shakespeare_char"
    assert dataset.directory_of("mine").resolve() == tmp_path / "mine"


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizer


@given(st.text(alphabet="aé😀\n\t Z", max_size=50))
@settings(derandomize=True, deadline=None)
def test_characters_round_trip(text):
    tokenizer = Tokenizer({"type": "char", "characters": "\n\t Zaé😀"})
    ids = tokenizer.encode(text)
    assert ids == ["\n\t Zaé😀".index(character) for character in text]
    assert tokenizer.decode(ids) == text == tokenizer.decode(torch.tensor(ids, dtype=torch.int64))
    assert b"".join(map(tokenizer.decode_bytes, ids)) == text.encode()


def test_a_foreign_character_is_named_with_its_place():
    with pytest.raises(InputError, match=r"'é' at position 2 .* 4: abc$"):
        Tokenizer({"type": "char", "characters": "abc\n"}).encode("abéc")


def test_ids_of_padding_rows_decode_to_nothing():
    tokenizer = Tokenizer(CHARACTERS)
    assert tokenizer.decode_bytes(3) == b"" and tokenizer.decode([0, 3, 63, 2]) == "ac"


@pytest.mark.parametrize("description", [{}, {"type": "bpe"}])
def test_unknown_tokenizer(description):
    with pytest.raises(InputError, match="tokenizer .* is unknown"):
        Tokenizer(description)


def test_gpt2_without_tiktoken_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InputError, match="pip install tiktoken"):
        Tokenizer({"type": "gpt2"})


def test_gpt2_without_its_vocabulary_says_what_to_do(monkeypatch):
    class Unreachable:
        @staticmethod
        def get_encoding(name):
            raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "tiktoken", Unreachable)
    with pytest.raises(InputError, match="ConnectionError.*TIKTOKEN_CACHE_DIR"):
        Tokenizer({"type": "gpt2"})


def test_replacing_another_data_set_is_told(tmp_path, capsys):
    from dataset import replace_files

    def put(text):
        folder = tmp_path / text
        folder.mkdir()
        for name in ("train.bin", "meta.json"):
            (folder / name).write_text(text)
        replace_files(folder, tmp_path / "data", ("train.bin", "meta.json"))
        return capsys.readouterr().err

    (tmp_path / "data").mkdir()
    assert put("one") == ""
    assert put("two") == f"note: another data set was in {tmp_path / 'data'}, which this one has replaced\n"
