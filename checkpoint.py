"""Checkpoints: safetensors for the numbers, JSON for the rest; nothing that is loaded can run code.

A checkpoint is a directory

    checkpoint.json                step, losses, configuration, tokenizer, checksum of the data, and name and sha256 of the files below
    model-STEP-HASH.safetensors    parameters, float32, by nanoGPT's names; the tied output layer is stored once
    optimizer-STEP-HASH.safetensors   AdamW's moments and step counts (only where training can continue)
    prior-STEP-HASH.safetensors    parameters of the latent-variable prior, which only training needs (likewise)

The tensor files get new names each time, and replacing checkpoint.json is the one moment at which the new checkpoint takes the place of the
old one: whenever the process dies, checkpoint.json names complete files.

Where training can continue, the checkpoint before is kept as well: its checkpoint.json becomes previous.json, and its files stay until the next
save. `readable` falls back to it when the current one is damaged. So last/ takes twice the space of a checkpoint, and three times during a save.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from configurator import InputError, TrainConfig, check_diffusion_heads
from dataset import Tokenizer, put_in_place, sha256_of, write_file
from model import GPT, GPTConfig, ViT, ViTConfig
from parallel import assign, whole

FORMAT = 1
PREVIOUS = "previous.json"


# ---------------------------------------------------------------------------------------------------------------------------------
# Writing


def optimizer_tensors(model, optimizer, prior=None) -> dict[str, torch.Tensor]:
    """AdamW's state as flat tensors named PARAMETER/exp_avg, PARAMETER/exp_avg_sq and PARAMETER/step; the prior's parameters are prior.NAME."""
    named = [*model.named_parameters(), *(prior.named_parameters(prefix="prior") if prior is not None else ())]
    return {f"{name}/{key}": value for name, parameter in named for key, value in optimizer.state[parameter].items()}


def _write_tensors(directory: Path, kind: str, step: int, tensors: dict) -> dict:
    """Writes one safetensors file completely; returns its entry in checkpoint.json."""
    temporary = directory / f".{kind}.{os.getpid()}.tmp"
    try:
        safetensors.torch.save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        digest = sha256_of(temporary)
        name = f"{kind}-{step:06d}-{digest[:8]}.safetensors"
        put_in_place(temporary, directory / name)
    finally:
        with contextlib.suppress(OSError):  # whatever went wrong above is the error to tell
            temporary.unlink()
    return {"name": name, "sha256": digest}


def _checksum(meta: dict) -> str:
    """SHA-256 of checkpoint.json without its own entry, in a form that does not depend on how it was written down."""
    text = json.dumps({key: value for key, value in meta.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def remove(directory: Path):
    """Removes a checkpoint that a new run replaces, and nothing else: a directory without checkpoint.json stays."""
    if (directory / "checkpoint.json").is_file() or (directory / PREVIOUS).is_file():
        shutil.rmtree(directory, ignore_errors=True)


def save(directory: Path, model, optimizer, step: int, main: bool = True, prior=None, **entries):
    """Writes a checkpoint of `model` (and of `optimizer` and `prior` unless None) that replaces the one in `directory`, if any.

    All processes of a run must call it, since sharded tensors are gathered here; the one with `main` writes.
    `entries` must be JSON values; train.py passes config, data, tokenizer, val_loss, best_val_loss and best_step. Raises InputError when the
    directory cannot be written; the checkpoint that was there stays. With an optimizer it becomes the previous one, see the top of the file.
    """
    directory = Path(directory)
    tensors = {"model": {name: whole(tensor.detach()) for name, tensor in model.named_parameters()}}
    if optimizer is not None:
        tensors["optimizer"] = {name: whole(tensor) for name, tensor in optimizer_tensors(model, optimizer, prior).items()}
    if prior is not None:
        tensors["prior"] = {name: tensor.detach() for name, tensor in prior.named_parameters()}
    if not main:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left_behind in directory.glob(".*.tmp"):  # by a process that was killed while it wrote
            left_behind.unlink()
        files = {kind: _write_tensors(directory, kind, step, some) for kind, some in tensors.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write the checkpoint {directory}: {error}; the one before it, if any, is intact") from None
    meta = {
        "format": FORMAT,
        "step": step,
        "kind": "pictures" if isinstance(model, ViT) else "tokens",
        "model": asdict(model.config),
        **entries,
        "files": files,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    meta["sha256"] = _checksum(meta)
    old = _intact(directory / "checkpoint.json")
    write_file(directory / "checkpoint.json", _text(meta))
    # Only now, so that at every moment the two are whole and different. The same state saved again is not its own predecessor.
    if optimizer is not None and old and old["files"] != files:
        write_file(directory / PREVIOUS, _text(old))
    kept = [meta, _intact(directory / PREVIOUS) if optimizer is not None else None]
    current = {entry["name"] for one in kept if one for entry in one["files"].values()}
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        if optimizer is None:
            (directory / PREVIOUS).unlink(missing_ok=True)
        for path in directory.glob("*.safetensors"):
            if path.name not in current:
                path.unlink(missing_ok=True)


def settle(directory: Path, meta: dict):
    """Makes the checkpoint that `readable` returned the current one, so that after a fallback the next save keeps it as the previous one."""
    if _intact(directory / "checkpoint.json") != meta:
        write_file(directory / "checkpoint.json", _text(meta))


def _text(meta: dict) -> bytes:
    return (json.dumps(meta, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _intact(path: Path) -> dict | None:
    """A checkpoint.json or previous.json, None unless it is whole."""
    try:
        return read_meta(path.parent, path.name)
    except InputError:
        return None


# ---------------------------------------------------------------------------------------------------------------------------------
# Reading


def read_meta(directory: Path, name: str = "checkpoint.json") -> dict:
    """checkpoint.json as a dict. Raises InputError when there is none, it is damaged or of a newer format."""
    directory = Path(directory)
    path = directory / name
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, intact = meta["format"], meta["sha256"] == _checksum(meta)
        if version == FORMAT and intact:  # a fitting checksum is no proof of a sensible content
            _ = int(meta["step"]), meta["kind"] + "", {**meta["model"]}, [entry["name"] + entry["sha256"] for entry in meta["files"].values()]
    except FileNotFoundError:
        others = [name for name in ("best", "last") for place in (directory, directory.parent) if (place / name / "checkpoint.json").is_file()]
        hint = f", but there is {' and '.join(sorted(set(others)))}" if others else ""
        if others == ["last"] and directory.name == "best":
            hint = ": no evaluation was better than the one before the first step; --which=last takes the last"
        elif not others and (directory.parent / "result.json").is_file():
            hint = f": {directory.parent} is a finished cell of compare.py, which keeps no weights without --save_checkpoints=True"
        elif not others and (directory.parent / "cells").is_dir():
            hint = f": {directory.parent} is a comparison, whose checkpoints, kept with --save_checkpoints=True, are in cells/ARM/seed-N"
        elif not others and (directory.parent / "metrics.jsonl").is_file():
            hint = f": {directory.parent} was stopped before its first; --overwrite=True starts it again"
        raise InputError(f"{directory} holds no checkpoint ({path.name} is missing){hint}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if version != FORMAT:
        raise InputError(f"{path} has format {version}, this version reads {FORMAT}")
    if not intact:
        raise InputError(f"{path} is damaged: its contents do not have the sha256 that it states")
    return meta


def readable(directory: Path, *kinds: str) -> dict:
    """checkpoint.json of a checkpoint whose files (of these kinds, if given) are whole: the current one, or with a warning the one before it.

    Raises InputError that says what is wrong with the current one when there is no previous one, or it is damaged too.
    """
    directory = Path(directory)

    def whole_one(name: str) -> dict:
        meta = read_meta(directory, name)
        for kind in kinds or meta["files"]:
            if kind in meta["files"]:
                _check(directory, meta["files"][kind])
        return meta

    try:
        return whole_one("checkpoint.json")
    except InputError as error:
        if not (directory / PREVIOUS).is_file():
            raise
        damage = error
    try:
        meta = whole_one(PREVIOUS)
    except InputError as error:
        raise InputError(f"{damage}; nor can the checkpoint before it be used: {error}") from None
    print(f"warning: {damage}; going on from the checkpoint before it, step {meta['step']} of {directory / PREVIOUS}", file=sys.stderr, flush=True)
    return meta


def _check(directory: Path, entry: dict) -> Path:
    """The path of a tensor file. Raises InputError unless it is what checkpoint.json states."""
    path = Path(directory) / Path(entry["name"]).name
    try:
        if sha256_of(path) != entry["sha256"]:
            raise InputError(f"{path} is damaged: its sha256 is not the one in checkpoint.json")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return path


def _read_tensors(directory: Path, meta: dict, kind: str) -> dict[str, torch.Tensor]:
    entry = meta["files"].get(kind)
    if entry is None:
        raise InputError(f"{directory} has no {kind} state: training can continue from last/, not from best/")
    path = _check(directory, entry)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def copy_weights(model, tensors: dict, origin):
    """Copies tensors into the parameters of equal name, in place. Raises InputError for a missing, superfluous or misshapen one."""
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise InputError(f"{origin}: parameter {name} is {'missing' if name in parameters else 'not one of this model'}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise InputError(f"{origin}: {name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(parameter.shape)}")
        assign(parameter, tensors[name])


def load_into(directory: Path, meta: dict, model, optimizer=None, prior=None):
    """Copies a checkpoint's weights, and the optimizer's state and the prior unless None, into existing tensors. Raises InputError."""
    copy_weights(model, _read_tensors(directory, meta, "model"), directory)
    if optimizer is None:
        return
    if (prior is not None) != ("prior" in meta["files"]):
        raise InputError(
            f"{directory} was trained {'without' if prior is not None else 'with'} a prior on the embeddings: resume with the same config"
        )
    if prior is not None:
        copy_weights(prior, _read_tensors(directory, meta, "prior"), directory)
    stored, state = _read_tensors(directory, meta, "optimizer"), optimizer_tensors(model, optimizer, prior)
    if stored.keys() != state.keys():
        raise InputError(f"{directory}: the optimizer's state is of another model: {sorted(stored.keys() ^ state.keys())[0]}")
    for name, tensor in state.items():
        assign(tensor, stored[name])


def read_weights(directory: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """A checkpoint's parameters by name and its architecture, on the CPU. Raises InputError."""
    meta = readable(directory, "model")
    return _read_tensors(directory, meta, "model"), meta["model"]


def config_of(meta: dict) -> GPTConfig | ViTConfig:
    """The architecture of a checkpoint."""
    kind = ViTConfig if meta["kind"] == "pictures" else GPTConfig
    try:
        return kind(**{**meta["model"], "diffusion_heads": tuple(meta["model"]["diffusion_heads"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"the checkpoint describes no model of this version ({error})") from None


def load_model(out_dir: Path, which: str = "best") -> tuple[GPT | ViT, Tokenizer | None, dict]:
    """Model (CPU, eval mode), tokenizer (None for pictures) and checkpoint.json of OUT_DIR/best, OUT_DIR/last, or OUT_DIR when it is a checkpoint."""
    out_dir = Path(out_dir)
    if not out_dir.is_dir():
        raise InputError(f"--out_dir={out_dir} is not a directory: train first, or name a checkpoint directory")
    directory = out_dir if (out_dir / "checkpoint.json").is_file() else out_dir / which
    meta = readable(directory, "model")
    pictures = meta["kind"] == "pictures"
    model = (ViT if pictures else GPT)(config_of(meta))
    load_into(directory, meta, model)
    return model.eval(), None if pictures else Tokenizer(meta["tokenizer"]), meta


def read_nanogpt(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """nanoGPT's ckpt.pt -> (tensors by parameter name, its model_args), read with weights_only=True, so nothing in it can run.

    The prefix that torch.compile adds and the mask buffers of its slow attention are dropped. Raises InputError.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in stored["model"].items()}
        arguments = {key: stored["model_args"][key] for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")}
        tensors["transformer.wpe.weight"].dim()  # every GPT has one
    except FileNotFoundError:
        raise InputError(f"--init_from={path} does not exist") from None
    except Exception as error:  # a damaged zip, a pickle that asks for code, other keys: torch names no common class
        raise InputError(f"--init_from={path} is no nanoGPT checkpoint that can be read safely ({type(error).__name__})") from None
    dropped = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # lm_head is tied to transformer.wte
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(dropped)}, arguments


PRETRAINED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # OpenAI's weights, in the hub's openai-community
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # in transformers (in, out): transposed nn.Linear
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def _huggingface_folder(name: str) -> Path:
    """The folder that `name` is, or the one of the hub's cache into which the weights of that name were downloaded. Raises InputError."""
    import huggingface_hub

    folder = Path(name)
    if name in PRETRAINED:
        try:
            folder = Path(huggingface_hub.snapshot_download(f"openai-community/{name}", allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:  # no network, no such host, a refusal, a full disk: the hub names no common class
            way_out = "without network copy a folder with its config.json and model.safetensors here and give --init_from=FOLDER"
            raise InputError(f"--init_from={name} cannot be downloaded ({type(error).__name__}): {way_out}") from None
    files = {"model.safetensors"}
    try:
        if not (folder / "model.safetensors").is_file() and (folder / "model.safetensors.index.json").is_file():
            files = set(json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--init_from={name}: model.safetensors.index.json is damaged ({type(error).__name__})") from None
    for file in sorted(map(str, files)):  # an index may name anything, a pickle or a path elsewhere too
        if not file.endswith(".safetensors") or Path(file).name != file or not (folder / file).is_file():
            raise InputError(f"--init_from={name} lacks {file}, or it is no safetensors file in that folder: only those are read, pickles never")
    return folder


def read_huggingface(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """One of PRETRAINED, or a folder of transformers' GPT2LMHeadModel -> (float32 tensors by our parameter names, architecture).

    The four names mean the hub, even beside a folder of that name (which is ./gpt2). Weights come from safetensors alone and no code of the folder
    runs, so a folder that export_hf.py wrote for A - I is read like any other: whether to diffuse is the config's business. GPT-2's own GELU is
    the tanh approximation and this model's the exact one, as in nanoGPT: that is said on stderr, other differences are refused. Raises InputError.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(f"--init_from={name} needs the package transformers: pip install -r requirements-hf.txt") from None
    folder, logging = _huggingface_folder(name), transformers.utils.logging
    keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon")
    keys += ("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention", "tie_word_embeddings")
    loud, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if stored.get("model_type") not in ("gpt2", "gpt2_graph_diffusion"):
            raise InputError(f"--init_from={name} is a model of type {stored.get('model_type')!r}: only GPT-2's architecture can be read")
        stored = {transformers.GPT2Config.attribute_map.get(key, key): value for key, value in stored.items()}
        # these keys and no others: a config.json can also ask for quantization, other file names or code
        about = transformers.GPT2Config(**{key: stored[key] for key in keys if key in stored}, bos_token_id=None, eos_token_id=None)
        differs = {
            "n_inner": about.n_inner not in (None, 4 * about.n_embd),
            "activation_function": about.activation_function not in ("gelu", *TANH_GELU),
            "layer_norm_epsilon": about.layer_norm_epsilon != 1e-5,
            "scale_attn_weights": not about.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": about.scale_attn_by_inverse_layer_idx,
            "add_cross_attention": about.add_cross_attention,
        }
        for key in (key for key, other in differs.items() if other):
            raise InputError(f"--init_from={name} has {key}={getattr(about, key)}, which this model cannot have")
        model, report = transformers.GPT2LMHeadModel.from_pretrained(
            folder, config=about, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except InputError:
        raise
    except Exception as error:  # a damaged file, a value of another type, misshapen tensors: transformers names no common class
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(f"--init_from={name} cannot be read by transformers ({type(error).__name__}: {cause})") from None
    finally:
        logging.set_verbosity(loud)
        if bars:
            logging.enable_progress_bar()
    superfluous = {key for key in report["unexpected_keys"] if not key.endswith(".attn.masked_bias")}  # a mask that old versions stored
    for key in sorted(report["missing_keys"] | superfluous):  # transformers would go on with random numbers
        raise InputError(f"--init_from={name}: parameter {key} is {'not one of GPT-2' if key in superfluous else 'missing'}")
    tensors = model.state_dict()
    if not torch.equal(tensors.pop("lm_head.weight"), tensors["transformer.wte.weight"]):
        raise InputError(f"--init_from={name} has an output layer of its own: this model's is the token table")
    if about.activation_function != "gelu" and int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {name} was trained with the tanh approximation of GELU, this model computes the exact one, as nanoGPT does", file=sys.stderr)
    architecture = {key: getattr(about, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    tensors = {key: tensor.t().contiguous() if key.endswith(CONV1D) else tensor for key, tensor in tensors.items()}
    return tensors, architecture | {"block_size": about.n_positions, "bias": True}


def starting_weights(config: TrainConfig, kind: str = "") -> tuple[TrainConfig, dict | None]:
    """The weights that init_from names, and the config with their architecture; (config, None) for scratch and resume. Raises InputError.

    init_from is nanoGPT's PATH/ckpt.pt, one of PRETRAINED, a checkpoint directory (checkpoint.json), or a folder of transformers (config.json).
    A `kind`, text or pictures, is what the weights must be of. Sizes, biases and vocabulary become the checkpoint's; dropout and the diffusion keys
    stay the config's, and block_size may be shorter.
    """
    if config.init_from in ("scratch", "resume"):
        return config, None
    folder = Path(config.init_from)
    if config.init_from.endswith(".pt"):
        weights, architecture = read_nanogpt(folder)
    elif config.init_from in PRETRAINED or ((folder / "config.json").is_file() and not (folder / "checkpoint.json").is_file()):
        weights, architecture = read_huggingface(config.init_from)
    elif folder.is_dir():
        weights, architecture = read_weights(folder)
    else:
        raise InputError(f"--init_from={config.init_from} is neither a directory nor one of scratch, resume, {', '.join(PRETRAINED)}, PATH/ckpt.pt")
    theirs = "text" if "block_size" in architecture else "pictures"
    if kind not in ("", theirs):
        raise InputError(f"--init_from={config.init_from} holds a model of {theirs}, --dataset={config.dataset} is {kind}")
    sizes = {key: architecture[key] for key in ("n_layer", "n_head", "n_embd", "bias", "vocab_size", "patch_size") if key in architecture}
    for key in sizes.keys() - {"vocab_size"}:  # padding rows of the table are nobody's wish; other sizes may be, if they are not the defaults
        if getattr(config, key) not in (sizes[key], getattr(TrainConfig, key)):
            raise InputError(f"{config.init_from} has {key}={sizes[key]}, this run asks for --{key}={getattr(config, key)}: take it out")
    if "block_size" in architecture:  # text
        if config.block_size > architecture["block_size"]:
            raise InputError(f"--block_size={config.block_size} is longer than the {architecture['block_size']} positions of {config.init_from}")
        weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][: config.block_size]
    check_diffusion_heads(config.diffusion_heads, sizes["n_layer"], sizes["n_head"])
    return replace(config, **sizes), weights


def starting_tokenizer(init_from: str) -> dict | None:
    """The tokenizer (dataset.Tokenizer's description) of the weights that init_from names; None where none is stated. Raises InputError."""
    folder = Path(init_from)
    if init_from in PRETRAINED:
        return {"type": "gpt2"}
    try:
        if (folder / "checkpoint.json").is_file():
            return read_meta(folder).get("tokenizer")
        if (folder / "character_tokenizer.json").is_file():  # of export_hf.py
            return json.loads((folder / "character_tokenizer.json").read_text(encoding="utf-8"))
        if (folder / "config.json").is_file():
            return {"type": "gpt2"} if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size") == 50257 else None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--init_from={init_from}: the description of its tokenizer is damaged ({type(error).__name__})") from None
    return None
