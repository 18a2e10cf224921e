"""--init_from through transformers and export_hf.py: the same logits on both sides, and nothing read that could run code. No network."""

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import checkpoint
import export_hf
import sample
import train
from checkpoint import read_huggingface
from configurator import InputError, TrainConfig, build
from dataset import Tokenizer, gpt2_bpe
from model import GPT, GPTConfig, ViT, ViTConfig
from place import find_place

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
if CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed: pip install -r requirements-hf.txt"
)
CHARACTERS = "".join(sorted(set("\n abcdefghijklmnopqrstuvwxyzTé→!?.\u0301\U0001f600")))
TINY = GPTConfig(block_size=24, vocab_size=len(CHARACTERS), n_layer=3, n_head=4, n_embd=32)
ARMS = {
    "A": {},
    "A with biases": {"bias": True},
    "A - I": {"diffusion": True},
    "every key": {"diffusion": True, "diffusion_alpha": 0.3, "diffusion_lambda": 1.7, "diffusion_heads": (0, 4, 1), "bias": True},
    "two heads": {"diffusion": True, "diffusion_heads": (2,), "dropout": 0.1},
}


@pytest.fixture(autouse=True)
def own_modules_cache(tmp_path, monkeypatch):
    """Modelling files that trust_remote_code imports are copied into this test's folder, not into the user's."""
    if "transformers" in sys.modules or importlib.util.find_spec("transformers"):
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(sys, "path", [*sys.path])


class Payload:
    """A pickle of it makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def theirs(folder: Path, scale: float = 0.3, save: dict | None = None, **changes) -> torch.nn.Module:
    """A GPT2LMHeadModel with random weights and biases, in eval mode, saved to `folder`."""
    import transformers

    sizes = {"vocab_size": 60, "n_positions": 24, "n_layer": 3, "n_head": 4, "n_embd": 32, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, "activation_function": "gelu", **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator) + (1 if ".ln_" in name and name.endswith("weight") else 0))
    model.save_pretrained(folder, **(save or {}))
    return model.eval()


def rewrite(folder: Path, change):
    """The safetensors file of `folder` after `change` of the dict of its tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def reconfigure(folder: Path, **changes):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changes))


def ours_from(folder: Path, **changes) -> GPT:
    weights, architecture = read_huggingface(str(folder))
    model = GPT(GPTConfig(**architecture | changes))
    checkpoint.copy_weights(model, weights, folder)
    return model.eval()


def random_model(**changes) -> GPT:
    """Weights large enough that the next token depends on the whole context."""
    model, generator = GPT(dataclasses.replace(TINY, **changes)), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():  # small biases: those of the last LayerNorm favour the same token everywhere
            p.copy_((0.05 if name.endswith("bias") else 0.3) * torch.randn(p.shape, generator=generator))
    return model.eval()


def saved(directory: Path, model, tokenizer: dict | None = None) -> Path:
    checkpoint.save(directory, model, None, 7, tokenizer=tokenizer or {"type": "char", "characters": CHARACTERS})
    return directory


def exported(tmp_path: Path, model, tokenizer: dict | None = None) -> Path:
    """The folder that export_hf.py makes of `model`."""
    return export_hf.export(export_hf.ExportConfig(out_dir=str(saved(tmp_path / "checkpoint", model, tokenizer))))


def loaded(folder: Path, **keys):
    import transformers

    found = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=(folder / "hf_modeling.py").is_file(), **keys)
    return found if isinstance(found, tuple) else found.eval()


@torch.no_grad()
def difference(ours: GPT, other, idx=None) -> float:
    """The largest difference between the logits of the two."""
    idx = torch.randint(0, other.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1)) if idx is None else idx
    logits = other(idx).logits
    assert logits.dtype == torch.float32 and logits.std() > 0.1
    return float((ours(idx, idx)[0][..., : other.config.vocab_size] - logits).abs().max())


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


@needs_transformers
@pytest.mark.parametrize("scale, activation", [(0.3, "gelu"), (0.02, "gelu_new")])
def test_logits_of_a_folder_are_those_of_transformers(tmp_path, capsys, scale, activation):
    other = theirs(tmp_path / "hf", scale, activation_function=activation)
    assert difference(ours_from(tmp_path / "hf"), other) < 1e-4
    assert ("tanh approximation" in capsys.readouterr().err) == (activation == "gelu_new")


@needs_transformers
def test_files_as_the_hub_has_them_are_read(tmp_path):
    """Names without the prefix, mask buffers, half precision, and several files."""
    other = theirs(tmp_path / "hf")

    def as_of_old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(tmp_path / "hf", as_of_old)
    reconfigure(tmp_path / "hf", quantization_config={"quant_method": "bitsandbytes"}, transformers_weights="adapter_model.bin")
    assert difference(ours_from(tmp_path / "hf"), other) < 1e-4
    theirs(tmp_path / "parts", save={"max_shard_size": "20KB"})
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert difference(ours_from(tmp_path / "parts"), other) < 1e-4
    other.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    weights, _ = read_huggingface(str(tmp_path / "half"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@needs_transformers
def test_training_starts_from_a_folder(tmp_path, tokens_dir):
    """Through train.build: the folder's sizes win, dropout and diffusion stay the config's, and the validation loss is transformers'."""
    other = theirs(tmp_path / "hf", 0.2)
    losses = {}
    for alpha in (None, 0.0, 0.5):
        arm = {} if alpha is None else {"diffusion": True, "diffusion_alpha": alpha, "diffusion_heads": (0, 4, 1)}
        keys = {"init_from": str(tmp_path / "hf"), "vocab_size": 50304, "block_size": 16, "dropout": 0.25, "gradient_accumulation_steps": 1}
        config = TrainConfig(dataset=str(tokens_dir), device="cpu", **keys, **arm).check()
        program = train.build(config, find_place("cpu", "float32"))
        assert train.start_state(program, 0, tmp_path / "out") == (0, {})
        found = dataclasses.asdict(program.model.config)
        assert found == {**found, "vocab_size": 60, "n_layer": 3, "n_head": 4, "n_embd": 32, "bias": True, "block_size": 16, "dropout": 0.25} | arm
        losses[alpha] = program.evaluate()["val_loss"]
    total = count = 0
    with torch.no_grad():
        for x, y, n in program.data.validation(64):
            total += float(torch.nn.functional.cross_entropy(other(x).logits.flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum"))
            count += n
    assert losses[None] == pytest.approx(total / count, abs=1e-4) == losses[0.0]
    assert abs(losses[0.5] - losses[None]) > 0.01
    with pytest.raises(InputError, match="--block_size=25 .* 24 positions"):
        train.build(dataclasses.replace(config, block_size=25), find_place("cpu", "float32"))


@needs_transformers
@pytest.mark.parametrize(
    "changes, word",
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"model_type": None}, "None"),
        ({"n_inner": 100}, "n_inner=100"),
        ({"activation_function": "relu"}, "activation_function=relu"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"n_embd": 16}, "cannot be read"),
        ({"n_embd": "wide"}, "cannot be read"),
        ({"n_head": 5}, "cannot be read"),
        ({"n_layer": 4}, "h.3."),
        ({"n_layer": 2}, "h.2."),
    ],
    ids=str,
)
def test_what_this_model_cannot_be_is_refused(tmp_path, changes, word, capfd):
    theirs(tmp_path / "hf")
    reconfigure(tmp_path / "hf", **changes)
    capfd.readouterr()
    with pytest.raises(InputError) as error:
        read_huggingface(str(tmp_path / "hf"))
    assert f"--init_from={tmp_path / 'hf'}" in str(error.value) and word in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # the one line is all


@needs_transformers
def test_damage_is_one_line(tmp_path):
    def refused() -> str:
        with pytest.raises(InputError) as error:
            read_huggingface(str(tmp_path / "hf"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        return str(error.value)

    theirs(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    assert "h.1.mlp.c_fc.bias is missing" in refused()
    theirs(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": torch.ones(60, 32)}))
    assert "output layer" in refused()
    content = (tmp_path / "hf" / "model.safetensors").read_bytes()
    for damaged in (b"", content[:1000], b"\xff" * 100):
        (tmp_path / "hf" / "model.safetensors").write_bytes(damaged)
        refused()
    for damaged in ("", "[]", "{", '{"model_type": "gpt2", "n_layer": []}'):
        (tmp_path / "hf" / "config.json").write_text(damaged)
        refused()


@needs_transformers
@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model.safetensors", "model-1.bin", "model-2.safetensors"])
def test_pickles_and_files_elsewhere_are_never_read(tmp_path, name):
    folder, mark = tmp_path / "hf", tmp_path / "mark"
    theirs(folder)
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    for file in ("pytorch_model.bin", "model-1.bin"):
        (folder / file).write_bytes(pickle.dumps(Payload(mark)))
    pickle.loads((folder / file).read_bytes()).close()
    assert mark.exists()  # the payload works
    mark.unlink()
    if name != "pytorch_model.bin":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": name}}))
    with pytest.raises(InputError, match="pickles never"):
        read_huggingface(str(folder))
    for damaged in ("", "[]", '{"weight_map": 1}'):
        (folder / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            read_huggingface(str(folder))
    assert not mark.exists()


@needs_transformers
def test_an_exported_folder_states_its_tokenizer(tmp_path):
    assert checkpoint.starting_tokenizer(str(exported(tmp_path, random_model()))) == {"type": "char", "characters": CHARACTERS}


def test_code_of_a_folder_does_not_run(tmp_path):
    theirs(tmp_path / "hf")
    (tmp_path / "hf" / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    reconfigure(tmp_path / "hf", auto_map=classes, model_type="gpt2_graph_diffusion")
    ours_from(tmp_path / "hf")
    assert not (tmp_path / "mark").exists()


def test_without_transformers_the_requirements_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("gpt2", "gpt2-xl"):
        with pytest.raises(InputError, match="requirements-hf.txt"):
            checkpoint.starting_weights(TrainConfig(init_from=name))
    assert "transformers==" in (ROOT / "requirements-hf.txt").read_text()


def test_our_checkpoints_and_their_folders_are_told_apart(tmp_path, monkeypatch):
    """checkpoint.json is ours, whatever else is there; config.json alone is a folder of transformers."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    directory = saved(tmp_path / "ours", random_model())
    (directory / "config.json").write_text("{}")
    config, weights = checkpoint.starting_weights(TrainConfig(init_from=str(directory), block_size=24))
    assert config.n_layer == 3 and len(weights) == len(dict(random_model().named_parameters()))
    (directory / "checkpoint.json").unlink()
    with pytest.raises(InputError, match="requirements-hf.txt"):
        checkpoint.starting_weights(TrainConfig(init_from=str(directory), block_size=24))
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match="checkpoint.json is missing"):
        checkpoint.starting_weights(TrainConfig(init_from=str(directory), block_size=24))
    for name in ("gpt3", "openai-community/gpt2", str(tmp_path / "none")):
        with pytest.raises(InputError, match=f"--init_from={name} is neither a directory nor .*gpt2-medium"):
            checkpoint.starting_weights(TrainConfig(init_from=name))


def test_weights_that_state_their_tokenizer(tmp_path):
    ours = saved(tmp_path / "ours", random_model())
    assert checkpoint.starting_tokenizer(str(ours)) == {"type": "char", "characters": CHARACTERS}
    assert checkpoint.starting_tokenizer("gpt2-xl") == {"type": "gpt2"}
    assert [checkpoint.starting_tokenizer(name) for name in ("scratch", "resume", "nanogpt/ckpt.pt")] == [None] * 3
    folder = tmp_path / "theirs"
    folder.mkdir()
    for size, tokenizer in ((50257, {"type": "gpt2"}), (50258, None)):
        (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
        assert checkpoint.starting_tokenizer(str(folder)) == tokenizer
    (folder / "character_tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="the description of its tokenizer is damaged"):
        checkpoint.starting_tokenizer(str(folder))


@needs_transformers
def test_the_command_line_without_network_ends_in_one_line(tmp_path, tokens_dir):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", "config/eval_gpt2.py", f"--dataset={tokens_dir}", "--device=cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: --init_from=gpt2 cannot be downloaded")
    assert done.stderr.count("\n") == 1 and "--init_from=FOLDER" in done.stderr


def test_the_configs_are_what_they_say():
    names = {"eval_gpt2": "gpt2", "eval_gpt2_medium": "gpt2-medium", "eval_gpt2_large": "gpt2-large", "eval_gpt2_xl": "gpt2-xl"}
    for file, name in names.items():
        config = build(TrainConfig, [str(ROOT / "config" / f"{file}.py")], [])
        assert (config.init_from, config.eval_only, config.batch_size, config.dataset) == (name, True, 8, "openwebtext")
        assert name in checkpoint.PRETRAINED
    plain, other = (build(TrainConfig, [str(ROOT / "config" / f"finetune_shakespeare{end}.py")], []) for end in ("", "_laplacian"))
    assert (plain.init_from, plain.dataset, plain.diffusion) == ("gpt2", "shakespeare", False)
    assert dataclasses.replace(plain, diffusion=True, diffusion_alpha=0.0, out_dir=other.out_dir) == other


# ---------------------------------------------------------------------------------------------------------------------------------
# Exporting


@needs_transformers
@pytest.mark.parametrize("arm", ARMS)
def test_an_exported_model_is_ours(tmp_path, arm, capsys):
    """Logits, greedy continuation with and without the cache, and the way back."""
    import transformers

    ours = random_model(**ARMS[arm])
    folder = exported(tmp_path, ours)
    other, report = loaded(folder, output_loading_info=True)
    other.eval()
    assert not any(report.values())
    assert type(other).__name__ == ("GraphDiffusionLMHeadModel" if ours.config.diffusion else "GPT2LMHeadModel")
    assert (folder / "hf_modeling.py").is_file() == ours.config.diffusion == ("trust_remote_code" in capsys.readouterr().out)
    assert other.config.attn_pdrop == other.config.resid_pdrop == other.config.embd_pdrop == ours.config.dropout
    assert difference(ours, other) < 1e-4
    assert difference(ours, loaded(folder, attn_implementation="eager")) < 1e-4
    prompt, most = [3, 1, 4, 1, 5], 19  # up to block_size, beyond which the two treat the context differently
    keys = {"temperature": 0.0, "top_k": 0, "generator": torch.Generator(), "vocabulary_size": len(CHARACTERS)}
    expected = list(sample.generate(ours, prompt, most, **keys))
    assert len(set(expected)) > 3
    for cache in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
        made = other.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, **cache)
        assert made[0].tolist() == prompt + expected, cache
    back = ours_from(folder, **{key: value for key, value in ARMS[arm].items() if key != "bias"})
    idx = torch.randint(0, len(CHARACTERS), (4, 24), generator=torch.Generator().manual_seed(2))
    assert torch.allclose(back(idx, idx)[0], ours(idx, idx)[0], atol=1e-5)
    if not ours.config.diffusion:
        assert difference(ours, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()) < 1e-4


@needs_transformers
def test_graph_diffusion_works_as_a_model_of_transformers(tmp_path):
    """Left padding, saving again, attention weights, training, and that without trust_remote_code it is not taken for something else."""
    import transformers

    ours = random_model(**ARMS["every key"])
    folder = exported(tmp_path, ours)
    other = loaded(folder)
    alone = other.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=8, do_sample=False)[0, 3:]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    both = other.generate(torch.tensor([[0, 0, 7, 8, 9], [1, 2, 3, 4, 5]]), attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(both[0, 5:], alone)
    other.save_pretrained(tmp_path / "again")
    if not (tmp_path / "again" / "hf_modeling.py").is_file():
        shutil.copy(folder / "hf_modeling.py", tmp_path / "again")
    assert difference(ours, loaded(tmp_path / "again")) < 1e-4
    idx = torch.tensor([[1, 2, 3, 4]])
    attentions = loaded(folder, attn_implementation="eager")(idx, output_attentions=True).attentions
    assert len(attentions) == 3 and all(torch.allclose(A.sum(-1), torch.ones(1, 4, 4), atol=1e-5) for A in attentions)
    loss = other.train()(idx, labels=idx).loss
    loss.backward()
    assert loss.item() == pytest.approx(ours(idx[:, :-1], idx[:, 1:])[1].item(), abs=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in other.parameters())
    for block in other.transformer.h:
        block.attn.attn_dropout.p = 0.5
    assert not torch.equal(other(idx).logits, other(idx).logits) and torch.equal(other.eval()(idx).logits, other(idx).logits)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@needs_transformers
def test_rows_that_only_fill_up_the_table_are_left_out(tmp_path, capsys):
    ours = random_model(vocab_size=64)
    folder = exported(tmp_path, ours)
    assert f"{64 - len(CHARACTERS)} rows" in capsys.readouterr().out
    other = loaded(folder)
    assert other.config.vocab_size == len(CHARACTERS) and difference(ours, other) < 1e-4


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def export_refused(**keys) -> str:
    with pytest.raises(InputError) as error:
        export_hf.export(export_hf.ExportConfig(**keys).check())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = tmp_path / "run"
    for name in ("best", "last"):
        saved(run / name, random_model(diffusion=name == "last"))
    before = contents(tmp_path)
    for to in ("file", "folder", "link"):
        {"file": Path.touch, "folder": Path.mkdir, "link": lambda path: path.symlink_to("nowhere")}[to](tmp_path / to)
        assert f"--to={tmp_path / to} exists" in export_refused(out_dir=str(run), to=str(tmp_path / to))
    assert contents(tmp_path) == before | {"file", "folder", "link"} and not (tmp_path / "nowhere").exists()
    assert "cannot write" in export_refused(out_dir=str(run), to=str(tmp_path / "file" / "hf"))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for module, name in ((safetensors.torch, "save_file"), (export_hf, "put_in_place")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            assert "No space left" in export_refused(out_dir=str(run), to=str(tmp_path / "hf"))
        assert contents(tmp_path) == before | {"file", "folder", "link"}
    export_hf.export(export_hf.ExportConfig(out_dir=str(run), which="last"))
    assert {path.name for path in tmp_path.glob("run-hf/*")} >= {"config.json", "model.safetensors", "hf_modeling.py", "tokenizer.json"}
    export_hf.export(export_hf.ExportConfig(out_dir=str(run), to=str(tmp_path / "new" / "hf")))
    assert contents(tmp_path / "new" / "hf") == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "character_tokenizer.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "hf" / "config.json").read_text())["activation_function"] == "gelu"


def test_what_cannot_be_exported_is_named(tmp_path):
    vision = ViT(ViTConfig(image_size=8, patch_size=4, n_classes=3, n_layer=1, n_head=2, n_embd=8))
    saved(tmp_path / "vision", vision, {"type": "pictures"})
    assert "pictures" in export_refused(out_dir=str(tmp_path / "vision"))
    assert "not a directory" in export_refused(out_dir=str(tmp_path / "none"))
    assert "no checkpoint" in export_refused(out_dir=str(tmp_path))
    assert "--which=middle" in export_refused(which="middle")
    assert "--out_dir is empty" in export_refused(out_dir="")
    saved(tmp_path / "odd", random_model(), {"type": "odd"})
    assert "'odd'" in export_refused(out_dir=str(tmp_path / "odd"))
    assert {path.name for path in tmp_path.iterdir()} <= {"vision", "odd", "modules"}
    done = subprocess.run([sys.executable, "export_hf.py", f"--out_dir={tmp_path / 'none'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: --out_dir=")


# ---------------------------------------------------------------------------------------------------------------------------------
# Tokenizers


@needs_transformers
@pytest.mark.parametrize("unknown", [None, "?"])
def test_the_character_tokenizer_is_ours(tmp_path, capsys, unknown):
    import transformers

    description = {"type": "char", "characters": CHARACTERS} | ({"unknown": unknown} if unknown else {})
    folder, ours = exported(tmp_path, random_model(**ARMS["A - I"]), description), Tokenizer(description)
    assert f"AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)" in capsys.readouterr().out
    assert json.loads((folder / "character_tokenizer.json").read_text(encoding="utf-8")) == description
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.get_vocab() == transformers.PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() == ours.ids
    for text in ("The end.\n\n  of  it é→e\u0301\U0001f600!?", "", "\n", CHARACTERS, CHARACTERS[::-1] * 3):
        ids = tokenizer(text)["input_ids"]
        assert ids == ours.encode(text) and tokenizer.decode(ids) == text
    assert len(tokenizer) == len(CHARACTERS) and tokenizer.model_max_length == 24
    if unknown:
        assert tokenizer("aΩb")["input_ids"] == ours.encode("aΩb")
    else:
        with pytest.raises(Exception, match="WordLevel"):
            tokenizer("aΩb")


def vocabulary_or_skip():
    try:
        return gpt2_bpe()
    except InputError as error:
        pytest.skip(f"no GPT-2 vocabulary: {error}")


GPT2 = {"vocab_size": 50304, "n_embd": 8, "n_head": 2, "n_layer": 1}


@needs_transformers
def test_the_bpe_tokenizer_is_tiktokens(tmp_path):
    import transformers

    bpe = vocabulary_or_skip()
    folder = exported(tmp_path, random_model(**GPT2), {"type": "gpt2"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source = (ROOT / "README.md").read_text(encoding="utf-8") + "\n\n \t  é→e\u0301\U0001f600 'll  I'VE \u00a0\u3000x\r\n  123 a<|endoftext|>b"
    for text in (source, "", " ", "\n\n\n", "".join(map(chr, range(1, 3000)))):
        ids = tokenizer(text)["input_ids"]
        assert ids == bpe.encode(text, allowed_special="all") and tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"]) == (50257, 50256)


def test_merges_are_gpt2s_own():
    bpe = vocabulary_or_skip()
    model = export_hf.bpe_tokenizer(bpe._mergeable_ranks)["model"]
    assert len(model["vocab"]) == 50257 and len(model["merges"]) == 50000
    assert model["merges"][:3] == [["Ġ", "t"], ["Ġ", "a"], ["h", "e"]] and model["vocab"]["Ġthe"] == 262
    official = CACHE / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    if official.is_file():
        assert [" ".join(pair) for pair in model["merges"]] == official.read_text(encoding="utf-8").splitlines()[1:50001]


def test_without_tiktokens_vocabulary_the_output_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    def unreachable():
        raise InputError("no network")

    monkeypatch.setattr(export_hf, "gpt2_bpe", unreachable)
    folder = exported(tmp_path, random_model(**GPT2), {"type": "gpt2"})
    assert contents(folder) == {"config.json", "model.safetensors"}
    out = capsys.readouterr().out
    assert 'GPT2TokenizerFast.from_pretrained("gpt2")' in out and "AutoTokenizer" not in out


# ---------------------------------------------------------------------------------------------------------------------------------
# data/shakespeare


def test_shakespeare_in_bpe(tmp_path):
    bpe = vocabulary_or_skip()
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 20
    (tmp_path / "own.txt").write_text(text)
    script, out = ROOT / "data" / "shakespeare" / "prepare.py", tmp_path / "out"
    done = subprocess.run([sys.executable, script, f"--source={tmp_path / 'own.txt'}", f"--out_dir={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    meta, cut = json.loads((out / "meta.json").read_text()), len(text) * 9 // 10
    assert np.fromfile(out / "train.bin", dtype="<u2").tolist() == bpe.encode_ordinary(text[:cut])
    assert np.fromfile(out / "val.bin", dtype="<u2").tolist() == bpe.encode_ordinary(text[cut:])
    assert (meta["kind"], meta["vocab_size"], meta["tokenizer"]) == ("tokens", 50257, {"type": "gpt2"})
    assert (out / "input.txt").read_text() == text
    done = subprocess.run([sys.executable, script, f"--source={tmp_path / 'none'}", f"--out_dir={out}"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: --source=") and done.stderr.count("\n") == 1
