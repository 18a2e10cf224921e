"""checkpoint.py: exact, replaced whole or not at all whenever the process dies, and unable to run what it reads."""

import dataclasses
import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import checkpoint
import train
from checkpoint import load_into, load_model, optimizer_tensors, read_meta, read_nanogpt, read_weights, readable, remove, save, settle
from configurator import InputError, TrainConfig
from dataset import Tokenizer, sha256_of
from model import GPT, GPTConfig
from place import find_place

TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8, bias=True, diffusion=True, diffusion_heads=(1, 2), diffusion_alpha=0.1)
TOKENIZER = {"type": "char", "characters": "abcdefghijé"}


def state_of(seed: int, config: GPTConfig = TINY):
    """A model and an AdamW in the middle of training, every tensor random."""
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
            moments = {name: torch.rand(p.shape, generator=generator) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(seed)), **moments}
    return model, optimizer


def tensors_of(model, optimizer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()} | {k: v.clone() for k, v in optimizer_tensors(model, optimizer).items()}


def equal(a: dict, b: dict) -> bool:
    """Same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


def loaded(directory: Path, name: str = "checkpoint.json") -> tuple[int, dict[str, torch.Tensor]]:
    """Step and tensors of a checkpoint, read into a model and an optimizer that held something else."""
    meta = read_meta(directory, name)
    model, optimizer = state_of(99)
    load_into(directory, meta, model, optimizer)
    return meta["step"], tensors_of(model, optimizer)


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rewrite(directory: Path, meta: dict):
    """checkpoint.json with other contents and the checksum that belongs to them."""
    (directory / "checkpoint.json").write_text(json.dumps(meta | {"sha256": checkpoint._checksum(meta)}))


def saved(directory: Path, seed: int, step: int | None = None):
    """Saves state `seed` at this step (the seed by default); returns what `loaded` must find."""
    model, optimizer = state_of(seed)
    step = seed if step is None else step
    save(directory, model, optimizer, step, tokenizer=TOKENIZER, val_loss=0.1 * seed)
    return step, tensors_of(model, optimizer)


def same(a, b) -> bool:
    return a[0] == b[0] and equal(a[1], b[1])


# ---------------------------------------------------------------------------------------------------------------------------------
# Save and load


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path):
    expected = saved(tmp_path / "new" / "last", 3)
    assert same(loaded(tmp_path / "new" / "last"), expected)
    assert not same((3, expected[1]), saved(tmp_path / "other", 4, step=3))


def test_odd_numbers_survive(tmp_path):
    model, optimizer = state_of(1)
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3.4e38, float("inf"), float("nan"), 0.1])
    with torch.no_grad():
        model.transformer.ln_f.weight.copy_(odd)
    save(tmp_path, model, optimizer, 1)
    assert equal(loaded(tmp_path)[1], tensors_of(model, optimizer))


def test_meta_holds_architecture_entries_and_digests(tmp_path):
    saved(tmp_path, 3)
    meta = read_meta(tmp_path)
    assert (meta["step"], meta["val_loss"], meta["tokenizer"]) == (3, 0.1 * 3, TOKENIZER)
    assert checkpoint.config_of(meta) == TINY
    assert {entry["name"] for entry in meta["files"].values()} | {"checkpoint.json"} == set(os.listdir(tmp_path))
    for kind, entry in meta["files"].items():
        assert entry["sha256"] == sha256_of(tmp_path / entry["name"])
        assert entry["name"] == f"{kind}-000003-{entry['sha256'][:8]}.safetensors"


def test_files_hold_the_tied_table_once_and_flat_names(tmp_path):
    model, optimizer = state_of(1)
    save(tmp_path, model, optimizer, 1)
    files = {kind: safetensors.torch.load_file(tmp_path / entry["name"]) for kind, entry in read_meta(tmp_path)["files"].items()}
    names = {name for name, _ in model.named_parameters()}
    assert files["model"].keys() == names and "lm_head.weight" not in names
    assert files["optimizer"].keys() == {f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}


def test_files_of_the_old_checkpoint_are_removed(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    old = {name for name in os.listdir(tmp_path) if name.endswith(".safetensors")}
    expected = saved(tmp_path, 2)
    now = set(os.listdir(tmp_path))
    assert len(old) == 2 and old < now and len(now) == 7 and {"notes.txt", "previous.json"} < now
    third = saved(tmp_path, 3)
    now = set(os.listdir(tmp_path))
    assert not old & now and len(now) == 7
    assert not same(expected, third) and same(loaded(tmp_path), third)
    model, _ = state_of(4)
    save(tmp_path, model, None, 4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not (tmp_path / "previous.json").exists()


def test_a_checkpoint_without_optimizer_gives_weights_but_cannot_continue(tmp_path):
    model, optimizer = state_of(2)
    save(tmp_path, model, None, 2)
    other, other_optimizer = state_of(5)
    load_into(tmp_path, read_meta(tmp_path), other)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    with pytest.raises(InputError, match="no optimizer state"):
        load_into(tmp_path, read_meta(tmp_path), other, other_optimizer)


def test_load_model_takes_a_run_or_a_checkpoint(tmp_path):
    models = {}
    for number, name in enumerate(("best", "last")):
        models[name], _ = state_of(number)
        save(tmp_path / name, models[name], None, number, tokenizer=TOKENIZER)
    idx = torch.arange(8)[None]
    for given, which, expected in ((tmp_path, "best", "best"), (tmp_path, "last", "last"), (tmp_path / "last", "best", "last")):
        model, tokenizer, meta = load_model(given, which)
        assert not model.training and model.config == TINY and isinstance(tokenizer, Tokenizer) and tokenizer.characters == TOKENIZER["characters"]
        assert torch.equal(model(idx, idx)[0], models[expected].eval()(idx, idx)[0])
        assert meta["step"] == ("best", "last").index(expected)
    weights, architecture = read_weights(tmp_path / "last")
    assert equal(weights, dict(models["last"].named_parameters()))
    assert architecture == json.loads(json.dumps(dataclasses.asdict(TINY)))


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(InputError, match="not a directory"):
        load_model(tmp_path / "none")
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert f"{tmp_path / 'best'} holds no checkpoint" in str(error.value)


def test_weights_of_another_model_are_refused_by_name(tmp_path):
    saved(tmp_path, 1)
    meta = read_meta(tmp_path)
    for changes, name in (
        ({"bias": False}, "transformer.h.0.attn.c_attn.bias is not one of this model"),
        ({"n_layer": 3, "diffusion_heads": ()}, "transformer.h.2.attn.c_attn.bias is missing"),
        ({"vocab_size": 12}, r"transformer.wte.weight has shape \(11, 8\), the model needs \(12, 8\)"),
    ):
        with pytest.raises(InputError, match=name):
            load_into(tmp_path, meta, GPT(dataclasses.replace(TINY, **changes)))


# ---------------------------------------------------------------------------------------------------------------------------------
# Death at any instant


def dies_at(number: int, action) -> bool:
    """Runs `action` in a child that dies, as by SIGKILL, just before its file-system call of this number; False when it got to the end.

    Half of a tensor file is on disk when the child dies inside safetensors.
    """
    child = os.fork()
    if child == 0:
        left = number

        def call(event, arguments):
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "fsync", "half"):
                left -= 1
                if left < 0:
                    os._exit(9)

        plain_save, plain_fsync = safetensors.torch.save_file, os.fsync

        def save_file(tensors, path):
            plain_save(tensors, path)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            call("half", ())
            Path(path).write_bytes(whole)

        def fsync(number):
            call("fsync", ())
            plain_fsync(number)

        try:
            checkpoint.safetensors.torch.save_file, os.fsync = save_file, fsync
            sys.addaudithook(call)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("step", [2, 1])  # 1: the same name but for the hash
def test_a_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path, step):
    outcomes = []
    for number in range(200):
        directory = tmp_path / str(number)
        older, old = saved(directory, 0), saved(directory, 1)
        model, optimizer = state_of(2)
        new = step, tensors_of(model, optimizer)
        died = dies_at(number, lambda: save(directory, model, optimizer, step))
        found, before = loaded(directory), loaded(directory, "previous.json")
        assert (same(found, old) and same(before, older)) or (same(found, new) and (same(before, older) or same(before, old))), number
        outcomes.append(same(found, new) + same(before, old))
        after = saved(directory, 5)  # and the next save works and cleans up
        assert same(loaded(directory), after) and same(loaded(directory, "previous.json"), found)
        assert len(list(directory.glob("*.safetensors"))) == 4
        if not died:
            break
    assert not died and len(outcomes) > 16
    assert outcomes == sorted(outcomes) and {0, 1, 2} == set(outcomes)  # two moments of change: the new one is there, the old one is the previous one


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_killed_first_save_leaves_nothing_or_all(tmp_path):
    states = []
    for number in range(200):
        directory = tmp_path / str(number) / "last"
        model, optimizer = state_of(2)
        died = dies_at(number, lambda: save(directory, model, optimizer, 2))
        try:
            assert same(loaded(directory), (2, tensors_of(model, optimizer)))
            states.append(True)
        except InputError as error:
            assert "holds no checkpoint" in str(error)
            states.append(False)
        if not died:
            break
    assert not died and states == sorted(states) and states.count(False) > 8 and states[-1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_saving_the_same_state_again_never_breaks_it(tmp_path):
    model, optimizer = state_of(2)
    save(tmp_path, model, optimizer, 2)
    died, number = True, 0
    while died:
        died = dies_at(number, lambda: save(tmp_path, model, optimizer, 2))
        assert same(loaded(tmp_path), (2, tensors_of(model, optimizer)))
        number += 1
    assert number > 10


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_temporary_files(tmp_path, monkeypatch, error):
    model, optimizer = state_of(2)
    new = 2, tensors_of(model, optimizer)
    last = {"replace": 3, "fsync": 5, "write_file": 1}  # from here on the new checkpoint is there; what fails is previous.json
    places = [(os, "replace"), (os, "fsync"), (safetensors.torch, "save_file"), (checkpoint, "write_file"), (checkpoint, "sha256_of")]
    failures = 0
    for owner, name in places:
        plain = getattr(owner, name)
        for number in range(9):
            remove(tmp_path)
            older, old, calls = saved(tmp_path, 0), saved(tmp_path, 1), []

            def failing(*args, **kwargs):
                calls.append(name)
                if len(calls) == number + 1:
                    raise InputError(str(error)) if name == "write_file" and isinstance(error, OSError) else error
                return plain(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                try:
                    save(tmp_path, model, optimizer, 2)
                    assert len(calls) <= number
                    break
                except (InputError, KeyboardInterrupt) as caught:
                    assert isinstance(caught, KeyboardInterrupt) == isinstance(error, KeyboardInterrupt)
                    assert isinstance(caught, KeyboardInterrupt) or "No space left on device" in str(caught)
            failures += 1
            assert same(loaded(tmp_path), new if number >= last.get(name, 9) else old)
            assert same(loaded(tmp_path, "previous.json"), old if (name, number) == ("fsync", 7) else older)  # 7: of the directory, after the rename
            assert not [path for path in os.listdir(tmp_path) if path.startswith(".")]
        assert same(loaded(tmp_path), new) and same(loaded(tmp_path, "previous.json"), old)  # without the failure it saves
    assert failures == 4 + 8 + 2 + 2 + 2


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model, optimizer = state_of(1)
    with pytest.raises(InputError) as error:
        save(tmp_path / "file" / "last", model, optimizer, 1)
    assert str(tmp_path / "file" / "last") in str(error.value)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_the_next_save_removes_the_temporary_file_of_a_killed_one(tmp_path):
    model, optimizer = state_of(1)
    assert dies_at(3, lambda: save(tmp_path, model, optimizer, 1))
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    saved(tmp_path, 2)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]


# ---------------------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_a_flipped_bit_or_a_cut_is_refused_with_the_files_name(tmp_path, kind):
    expected = saved(tmp_path, 1)
    path = tmp_path / read_meta(tmp_path)["files"][kind]["name"]
    whole = path.read_bytes()
    draw = random.Random(0)
    places = [0, 1, 7, 8, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]
    damaged = [whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :] for place in places]
    damaged += [whole[:end] for end in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1)] + [whole + b"\0"]
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            loaded(tmp_path)
        assert str(path) in str(error.value)
    path.unlink()
    with pytest.raises(InputError) as error:
        loaded(tmp_path)
    assert str(path) in str(error.value)
    path.write_bytes(whole)
    assert same(loaded(tmp_path), expected)


@pytest.mark.parametrize("bad", [b"", b"{", b"[]", b"7", b"null", b"{}", b"\xff", b'{"format": 2}', b'{"format": "1"}'])
def test_a_damaged_checkpoint_json_is_refused_by_name(tmp_path, bad):
    saved(tmp_path, 1)
    (tmp_path / "checkpoint.json").write_bytes(bad)
    with pytest.raises(InputError) as error:
        loaded(tmp_path)
    assert str(tmp_path / "checkpoint.json") in str(error.value)


@pytest.mark.parametrize("kind", ["checkpoint.json", "model", "optimizer"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(tmp_path, kind, damage, capsys):
    older, newer = saved(tmp_path, 1), saved(tmp_path, 2)
    meta = read_meta(tmp_path)
    path = tmp_path / (kind if kind == "checkpoint.json" else meta["files"][kind]["name"])
    whole = path.read_bytes()
    assert readable(tmp_path, "model", "optimizer") == meta and capsys.readouterr() == ("", "")
    path.write_bytes({"flip": whole[:100] + bytes([whole[100] ^ 4]) + whole[101:], "cut": whole[:-9], "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    found = readable(tmp_path, "model", "optimizer")
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and err.count("\n") == 1 and f"step 1 of {tmp_path / 'previous.json'}" in err and str(tmp_path) in err
    assert path.name in err and found == read_meta(tmp_path, "previous.json") and same(loaded(tmp_path, "previous.json"), older)
    if kind == "optimizer":  # which a reader of the weights does not need
        assert readable(tmp_path, "model") == meta and capsys.readouterr() == ("", "")
    settle(tmp_path, found)
    assert same(loaded(tmp_path), older)
    third = saved(tmp_path, 3)  # and the good one is kept, not the damaged one
    assert same(loaded(tmp_path), third) and same(loaded(tmp_path, "previous.json"), older) and not same(newer, older)


def test_where_both_are_damaged_both_are_named(tmp_path):
    saved(tmp_path, 1)
    saved(tmp_path, 2)
    names = [read_meta(tmp_path, name)["files"]["model"]["name"] for name in ("checkpoint.json", "previous.json")]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError) as error:
        readable(tmp_path, "model")
    assert all(str(tmp_path / name) in str(error.value) for name in names)


@pytest.mark.parametrize("key", ["files", "model", "step", "tokenizer", "kind", "format", "sha256"])
def test_a_checkpoint_json_without_a_key_is_refused(tmp_path, key):
    saved(tmp_path, 1)
    meta = json.loads((tmp_path / "checkpoint.json").read_text())
    del meta[key]
    (tmp_path / "checkpoint.json").write_text(json.dumps(meta))
    with pytest.raises(InputError) as error:
        load_model(tmp_path)
    assert str(tmp_path / "checkpoint.json") in str(error.value)


@pytest.mark.parametrize(
    "change", [{"files": []}, {"files": {"model": 3}}, {"files": {"model": {"name": 1}}}, {"model": {"n_layer": 2}}, {"model": 1}]
)
def test_a_checkpoint_json_of_another_form_is_refused_though_its_checksum_fits(tmp_path, change):
    saved(tmp_path, 1)
    rewrite(tmp_path, read_meta(tmp_path) | change)
    with pytest.raises(InputError):
        load_model(tmp_path)


def test_a_flipped_bit_in_checkpoint_json_is_refused(tmp_path):
    saved(tmp_path, 1)
    path = tmp_path / "checkpoint.json"
    whole, before = path.read_bytes(), read_meta(tmp_path)
    believed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded(tmp_path)
            if read_meta(tmp_path) != before:
                believed.append(place)
        except InputError as error:
            assert str(path) in str(error)
    assert believed == []


def test_another_format_is_refused_by_its_number(tmp_path):
    saved(tmp_path, 1)
    rewrite(tmp_path, read_meta(tmp_path) | {"format": 2})
    with pytest.raises(InputError, match="has format 2, this version reads 1"):
        loaded(tmp_path)


def test_checkpoint_json_is_read_as_utf8(tmp_path, monkeypatch):
    saved(tmp_path, 1)
    plain = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None, errors=None: plain(self, encoding or "latin-1", errors))  # a Latin-1 locale
    assert read_meta(tmp_path)["tokenizer"] == TOKENIZER


# ---------------------------------------------------------------------------------------------------------------------------------
# Nothing that is read can run


class Payload:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["model", "optimizer"])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_pickle_in_place_of_tensors_does_not_run(tmp_path, kind, form):
    saved(tmp_path / "last", 1)
    mark = tmp_path / "mark"
    meta = read_meta(tmp_path / "last")
    path = tmp_path / "last" / meta["files"][kind]["name"]
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(mark)))
        pickle.loads(path.read_bytes())
    else:
        torch.save(Payload(mark), path)
        with open(path, "rb") as file:  # by its name torch.load would take it for safetensors
            torch.load(file, weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    meta["files"][kind]["sha256"] = sha256_of(path)
    rewrite(tmp_path / "last", meta)
    with pytest.raises(InputError, match="cannot be read") as error:  # not for its sha256, which is right
        loaded(tmp_path / "last")
    assert str(path) in str(error.value) and not mark.exists()


def test_a_checkpoint_cannot_name_files_elsewhere(tmp_path):
    expected = saved(tmp_path / "last", 1)
    meta = read_meta(tmp_path / "last")
    name = meta["files"]["model"]["name"]
    os.rename(tmp_path / "last" / name, tmp_path / name)
    for elsewhere in (f"../{name}", str(tmp_path / name)):
        meta["files"]["model"]["name"] = elsewhere
        rewrite(tmp_path / "last", meta)
        with pytest.raises(InputError) as error:
            loaded(tmp_path / "last")
        assert str(tmp_path / "last" / name) in str(error.value)
    os.rename(tmp_path / name, tmp_path / "last" / name)
    assert same(loaded(tmp_path / "last"), expected)


# ---------------------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints


def nanogpt_checkpoint(path: Path, model: GPT, prefix: str = "_orig_mod.", /, **changes):
    """What nanoGPT's train.py writes with torch.save; its slow attention has a mask buffer in each layer."""
    c = model.config
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(c.n_layer):
        state[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(c.block_size, c.block_size).tril()[None, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    stored = {"model": state, "optimizer": optimizer.state_dict(), "model_args": {name: getattr(c, name) for name in names}, "iter_num": 1}
    torch.save(stored | {"best_val_loss": torch.tensor(2.5), "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3}} | changes, path)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["_orig_mod.", ""])
def test_init_from_nanogpt_gives_equal_logits(tmp_path, tokens_dir, bias, prefix):
    source = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=8, bias=bias))
    source.init_weights(5)
    idx = torch.arange(10)[None] * 3
    logits = source(idx, idx)[0].detach()
    nanogpt_checkpoint(tmp_path / "ckpt.pt", source, prefix)
    for arm in ({}, {"diffusion": True, "diffusion_alpha": 0.0}):
        config = TrainConfig(dataset=str(tokens_dir), init_from=str(tmp_path / "ckpt.pt"), block_size=12, max_iters=0, device="cpu", **arm)
        program = train.build(config.check(), find_place("cpu", "float32"))
        assert train.start_state(program, 0, tmp_path / "out") == (0, {})
        assert (program.model.config.n_layer, program.model.config.vocab_size, program.model.config.block_size) == (3, 50, 12)
        loaded = GPT(program.model.config)  # the plain modules, whatever train.py made of its own
        loaded.load_state_dict(program.model.state_dict())
        assert torch.equal(loaded(idx, idx)[0], logits)


def test_init_from_nanogpt_cannot_lengthen_the_context(tmp_path, tokens_dir):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY))
    config = TrainConfig(dataset=str(tokens_dir), init_from=str(tmp_path / "ckpt.pt"), block_size=9, device="cpu")
    with pytest.raises(InputError, match="--block_size=9 .* 8 positions"):
        train.build(config.check(), find_place("cpu", "float32"))


@pytest.mark.parametrize("changes", [{"model_args": {"n_layer": 2}}, {"model_args": None}, {"model": {}}, {"model": [1]}], ids=str)
def test_an_incomplete_nanogpt_checkpoint_is_refused(tmp_path, tokens_dir, changes):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(TINY), **changes)
    config = TrainConfig(dataset=str(tokens_dir), init_from=str(tmp_path / "ckpt.pt"), block_size=8, device="cpu")
    with pytest.raises(InputError) as error:
        train.build(config.check(), find_place("cpu", "float32"))
    assert f"--init_from={tmp_path / 'ckpt.pt'}" in str(error.value)


@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
def test_a_malicious_nanogpt_checkpoint_is_refused_without_running(tmp_path, place):
    path, mark = tmp_path / "ckpt.pt", tmp_path / "mark"
    nanogpt_checkpoint(path, GPT(TINY), **{place: Payload(mark)})
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload works
    mark.unlink()
    with pytest.raises(InputError) as error:
        read_nanogpt(path)
    assert f"--init_from={path}" in str(error.value) and "\n" not in str(error.value) and not mark.exists()


@pytest.mark.parametrize("bad", [b"", b"hello", pickle.dumps([1, 2]), b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "list", "zip"])
def test_a_file_that_is_no_nanogpt_checkpoint_is_named(tmp_path, bad):
    (tmp_path / "ckpt.pt").write_bytes(bad)
    with pytest.raises(InputError) as error:
        read_nanogpt(tmp_path / "ckpt.pt")
    assert f"--init_from={tmp_path / 'ckpt.pt'}" in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        read_nanogpt(tmp_path / "none.pt")
