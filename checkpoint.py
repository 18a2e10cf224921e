"""Checkpoints: safetensors for the numbers, JSON for the rest; nothing that is loaded can run code.

A checkpoint is a directory

    checkpoint.json                step, losses, configuration, tokenizer, checksum of the data, and name and sha256 of the files below
    model-STEP-HASH.safetensors    parameters, float32, by nanoGPT's names; the tied output layer is stored once
    optimizer-STEP-HASH.safetensors   AdamW's moments and step counts (only where training can continue)

The two tensor files get new names each time, and replacing checkpoint.json is the one moment at which the new checkpoint takes the place of the
old one: whenever the process dies, checkpoint.json names complete files. Files of the old checkpoint are removed afterwards.
"""

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from configurator import InputError
from dataset import Tokenizer, sha256_of, write_file
from model import GPT, GPTConfig

FORMAT = 1


# ---------------------------------------------------------------------------------------------------------------------------------
# Writing


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as flat tensors named PARAMETER/exp_avg, PARAMETER/exp_avg_sq and PARAMETER/step."""
    return {f"{name}/{key}": value for name, parameter in model.named_parameters() for key, value in optimizer.state[parameter].items()}


def _write_tensors(directory: Path, kind: str, step: int, tensors: dict) -> dict:
    """Writes one safetensors file completely; returns its entry in checkpoint.json."""
    temporary = directory / f".{kind}.{os.getpid()}.tmp"
    try:
        safetensors.torch.save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        name = f"{kind}-{step:06d}-{digest[:8]}.safetensors"
        os.replace(temporary, directory / name)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": name, "sha256": digest}


def save(directory: Path, model, optimizer, step: int, **entries):
    """Writes a checkpoint of `model` (and of `optimizer` unless None) that replaces the one in `directory`, if any.

    `entries` must be JSON values; train.py passes config, data, tokenizer, val_loss, best_val_loss and best_step. Raises InputError when the
    directory cannot be written; the checkpoint that was there stays.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = {"model": _write_tensors(directory, "model", step, dict(model.named_parameters()))}
        if optimizer is not None:
            files["optimizer"] = _write_tensors(directory, "optimizer", step, optimizer_tensors(model, optimizer))
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write the checkpoint {directory}: {error}; the one before it, if any, is intact") from None
    meta = {
        "format": FORMAT,
        "step": step,
        "model": asdict(model.config),
        **entries,
        "files": files,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    write_file(directory / "checkpoint.json", (json.dumps(meta, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    current = {entry["name"] for entry in files.values()}
    for old in directory.glob("*.safetensors"):
        if old.name not in current:
            old.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


def read_meta(directory: Path) -> dict:
    """checkpoint.json as a dict. Raises InputError when there is none, it is damaged or of a newer format."""
    path = Path(directory) / "checkpoint.json"
    try:
        meta = json.loads(path.read_text())
        known = meta["format"] == FORMAT
    except FileNotFoundError:
        raise InputError(f"{directory} holds no checkpoint ({path.name} is missing)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not known:
        raise InputError(f"{path} has format {meta['format']}, this version reads {FORMAT}")
    return meta


def _read_tensors(directory: Path, meta: dict, kind: str) -> dict[str, torch.Tensor]:
    entry = meta["files"].get(kind)
    if entry is None:
        raise InputError(f"{directory} has no {kind} state: training can continue from last/, not from best/")
    path = Path(directory) / Path(entry["name"]).name
    try:
        if sha256_of(path) != entry["sha256"]:
            raise InputError(f"{path} is damaged: its sha256 is not the one in checkpoint.json")
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


@torch.no_grad()
def copy_weights(model, tensors: dict, origin):
    """Copies tensors into the parameters of equal name, in place. Raises InputError for a missing, superfluous or misshapen one."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise InputError(f"{origin}: parameter {name} is {'missing' if name in parameters else 'not one of this model'}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise InputError(f"{origin}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}")
        parameter.copy_(tensors[name])


@torch.no_grad()
def load_into(directory: Path, meta: dict, model, optimizer=None):
    """Copies a checkpoint's weights, and the optimizer's state unless None, into existing tensors. Raises InputError."""
    copy_weights(model, _read_tensors(directory, meta, "model"), directory)
    if optimizer is None:
        return
    stored, state = _read_tensors(directory, meta, "optimizer"), optimizer_tensors(model, optimizer)
    if stored.keys() != state.keys():
        raise InputError(f"{directory}: the optimizer's state is of another model: {sorted(stored.keys() ^ state.keys())[0]}")
    for name, tensor in state.items():
        tensor.copy_(stored[name])


def read_weights(directory: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A checkpoint's parameters by name and its architecture, on the CPU. Raises InputError."""
    meta = read_meta(directory)
    return _read_tensors(directory, meta, "model"), meta["model"]


def config_of(meta: dict) -> GPTConfig:
    """The architecture of a checkpoint."""
    return GPTConfig(**{**meta["model"], "diffusion_heads": tuple(meta["model"]["diffusion_heads"])})


def load_model(out_dir: Path, which: str = "best") -> tuple[GPT, Tokenizer, dict]:
    """Model (CPU, eval mode), tokenizer and checkpoint.json of OUT_DIR/best, OUT_DIR/last, or OUT_DIR itself when it is a checkpoint."""
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise InputError(f"--out_dir={out_dir} is not a directory: train first, or name a checkpoint directory")
    directory = out_dir if (out_dir / "checkpoint.json").is_file() else out_dir / which
    meta = read_meta(directory)
    model = GPT(config_of(meta))
    load_into(directory, meta, model)
    return model.eval(), Tokenizer(meta["tokenizer"]), meta


def read_nanogpt(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """nanoGPT's ckpt.pt -> (tensors by parameter name, its model_args), read with weights_only=True, so nothing in it can run.

    The prefix that torch.compile adds and the mask buffers of its slow attention are dropped. Raises InputError.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        tensors, arguments = stored["model"], stored["model_args"]
    except FileNotFoundError:
        raise InputError(f"--init_from={path} does not exist") from None
    except Exception as error:  # a damaged zip, a pickle that asks for code, other keys: torch names no common class
        raise InputError(f"--init_from={path} is no nanoGPT checkpoint that can be read safely ({type(error).__name__})") from None
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}
    dropped = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # lm_head is tied to transformer.wte
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped)}, arguments
