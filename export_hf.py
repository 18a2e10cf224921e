"""A checkpoint -> a folder that transformers loads.

    python export_hf.py --out_dir=out-quick                 writes the folder out-quick-hf
    python export_hf.py --out_dir=out-gpt2 --which=last --to=FOLDER

Arm A becomes a plain GPT2LMHeadModel. A - I, with whatever alpha, lambda and heads, comes with its own modelling file (hf_modeling.py) and is
loaded with trust_remote_code=True, as the output says. Logits are those of this repository's model, and generate works as usual, up to
block_size tokens.

    config.json, model.safetensors      float32; biases that the checkpoint does not have are zeros
    tokenizer.json                      for transformers.AutoTokenizer; for gpt2 only where tiktoken's vocabulary can be had
    character_tokenizer.json            character models: this repository's description of the tokenizer, see dataset.Tokenizer
    hf_modeling.py                      A - I only

Rows of the token table beyond the tokenizer's vocabulary, which only fill it up, are left out: no text can contain them. Writing needs no
transformers; reading needs the version in requirements-hf.txt or a compatible one.
"""

from dataclasses import dataclass

from configurator import InputError, configure, one_line_errors


@dataclass(frozen=True)
class ExportConfig:
    """A checkpoint for transformers: python export_hf.py --out_dir=OUT_DIR [--which=best|last] [--to=FOLDER]"""

    out_dir: str = "out"  # directory of a run, or a checkpoint in it
    which: str = "best"  # the run's checkpoint: best or last
    to: str = ""  # the folder to write, which must not exist; empty: OUT_DIR-hf

    def check(self) -> "ExportConfig":
        """Raises InputError for a value out of range; returns self."""
        if self.which not in ("best", "last"):
            raise InputError(f"--which={self.which} must be best or last")
        if not self.out_dir:
            raise InputError("--out_dir is empty: name a directory")
        return self


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(ExportConfig)

import json
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch

from checkpoint import CONV1D, config_of, read_meta, read_weights
from dataset import ROOT, gpt2_bpe, put_in_place, write_file
from model import GPTConfig, diffusing_heads

MODELLING = "hf_modeling.py"
GPT2_VOCABULARY = 50257
END_OF_TEXT = "<|endoftext|>"


# ---------------------------------------------------------------------------------------------------------------------------------
# The model


def config_json(config: GPTConfig, vocab_size: int, end: int | None) -> dict:
    """config.json. `end` is the id of the token that ends a text, None for character models, which have none."""
    about = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu",  # the exact one; GPT-2's default there is the tanh approximation
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "bos_token_id": end,
        "eos_token_id": end,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    if not config.diffusion:
        return about
    module = MODELLING.removesuffix(".py")
    return about | {
        "architectures": ["GraphDiffusionLMHeadModel"],
        "model_type": "gpt2_graph_diffusion",
        "auto_map": {"AutoConfig": f"{module}.GraphDiffusionConfig", "AutoModelForCausalLM": f"{module}.GraphDiffusionLMHeadModel"},
        "diffusion_alpha": config.diffusion_alpha,
        "diffusion_lambda": config.diffusion_lambda,
        "diffusion_heads": [diffusing_heads(config, layer) for layer in range(config.n_layer)],
    }


def to_huggingface(weights: dict[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """Our parameters -> transformers': Conv1D weights transposed, zero biases where there are none, the token table cut to vocab_size rows."""
    tensors = {name: (tensor.t() if name.endswith(CONV1D) else tensor).contiguous() for name, tensor in weights.items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:vocab_size].clone()
    for name, tensor in list(tensors.items()):
        part, _, kind = name.rpartition(".")
        if kind == "weight" and not part.endswith((".wte", ".wpe")):
            tensors.setdefault(f"{part}.bias", torch.zeros(tensor.shape[-1]))
    return tensors


# ---------------------------------------------------------------------------------------------------------------------------------
# The tokenizer, in the file format of the library `tokenizers`


def tokenizer_json(**parts) -> dict:
    """tokenizer.json with these parts; nothing is normalised, cut or filled up."""
    nothing = {"truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None}
    return {"version": "1.0", **nothing, **parts}


def character_tokenizer(description: dict) -> dict:
    """tokenizer.json of a character model: each character is a word. Characters outside the vocabulary become the unknown one, or an error."""
    model = {"type": "WordLevel", "vocab": {character: i for i, character in enumerate(description["characters"])}}
    model["unk_token"] = description.get("unknown") or ""  # "" is no character, so an unknown one cannot be encoded
    pieces = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return tokenizer_json(pre_tokenizer=pieces, decoder={"type": "Fuse"}, model=model)


def byte_characters() -> dict[int, str]:
    """How GPT-2's files write each byte: visible Latin-1 characters as themselves, the other 68 bytes as U+0100, U+0101, ... in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge is `token` (two bytes at least): what is left when all merges of a lower rank are done. Raises ValueError."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        if rank >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    first, second = parts
    return first, second


def bpe_tokenizer(ranks: dict[bytes, int]) -> dict:
    """tokenizer.json of GPT-2's BPE from tiktoken's {token: rank}, where the rank is also the id."""
    shown = byte_characters()

    def show(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    tokens = sorted(ranks, key=ranks.get)
    merges = [[show(part) for part in merge_of(token, ranks)] for token in tokens if len(token) > 1]
    vocabulary = {show(token): ranks[token] for token in tokens} | {END_OF_TEXT: len(ranks)}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return tokenizer_json(
        added_tokens=[{"id": len(ranks), "content": END_OF_TEXT, **flags}],
        pre_tokenizer=bytes_only,
        decoder=bytes_only,
        model={"type": "BPE", "vocab": vocabulary, "merges": merges},
    )


def tokenizer_files(description: dict, block_size: int) -> tuple[dict[str, dict], str]:
    """{file name: content} for the tokenizer, and a sentence about it. Raises InputError for a description that is none."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size, "clean_up_tokenization_spaces": False}
    if description.get("type") == "char":
        files = {"character_tokenizer.json": description, "tokenizer.json": character_tokenizer(description)}
        return files | {"tokenizer_config.json": about}, f"tokenizer: {len(description['characters'])} characters"
    if description.get("type") != "gpt2":
        raise InputError(f"tokenizer {description} is unknown: type must be 'char' or 'gpt2'")
    try:
        ranks = gpt2_bpe()._mergeable_ranks
    except InputError as error:
        return {}, f'no tokenizer in it ({error}); with network: GPT2TokenizerFast.from_pretrained("gpt2")'
    about |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {"tokenizer.json": bpe_tokenizer(ranks), "tokenizer_config.json": about}, "tokenizer: GPT-2's BPE"


# ---------------------------------------------------------------------------------------------------------------------------------


def write_folder(to: Path, tensors: dict[str, torch.Tensor], texts: dict[str, str]):
    """Writes the folder whole or not at all: under a temporary name beside it, then a rename. Raises InputError, also when `to` exists."""
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    if os.path.lexists(to):
        raise InputError(f"--to={to} exists: name a folder that does not")
    try:
        temporary.mkdir(parents=True)
        safetensors.torch.save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        with open(temporary / "model.safetensors", "rb+") as file:
            os.fsync(file.fileno())
        for name, text in texts.items():
            write_file(temporary / name, text.encode())
        if os.path.lexists(to):  # meanwhile; a rename would replace an empty folder
            raise InputError(f"--to={to} exists: name a folder that does not")
        put_in_place(temporary, to)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot write --to={to}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def export(config: ExportConfig) -> Path:
    """Writes the folder, says on stdout what it holds and how to load it, and returns it. Raises InputError; nothing is left then."""
    out_dir = Path(config.out_dir)
    if not out_dir.is_dir():
        raise InputError(f"--out_dir={out_dir} is not a directory: train first, or name a checkpoint directory")
    directory = out_dir if (out_dir / "checkpoint.json").is_file() else out_dir / config.which
    to = Path(config.to or f"{out_dir.resolve()}-hf")
    if os.path.lexists(to):  # before the work
        raise InputError(f"--to={to} exists: name a folder that does not")
    meta = read_meta(directory)
    if meta["kind"] == "pictures":
        raise InputError(f"--out_dir={out_dir} holds a model of pictures: transformers' GPT-2 is for text")
    ours, tokenizer = config_of(meta), meta["tokenizer"]
    for key in ("head_combine", "attention_kernel", "diffusion_learned"):
        if getattr(ours, key) != getattr(GPTConfig, key):
            raise InputError(f"--out_dir={out_dir} was trained with {key}={getattr(ours, key)}, which the exported model cannot express")
    weights, _ = read_weights(directory)
    files, about_tokenizer = tokenizer_files(tokenizer, ours.block_size)
    known = len(tokenizer["characters"]) if tokenizer["type"] == "char" else GPT2_VOCABULARY
    vocab_size = min(known, ours.vocab_size)
    end = GPT2_VOCABULARY - 1 if tokenizer["type"] == "gpt2" and vocab_size == GPT2_VOCABULARY else None
    files["config.json"] = config_json(ours, vocab_size, end)
    texts = {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in files.items()}
    if ours.diffusion:
        texts[MODELLING] = (ROOT / MODELLING).read_text(encoding="utf-8")
    write_folder(to, to_huggingface(weights, vocab_size), texts)
    print(f"{to}: {directory} at step {meta['step']}, {', '.join(sorted([*texts, 'model.safetensors']))}")
    if vocab_size < ours.vocab_size:
        print(f"{ours.vocab_size - vocab_size} rows of the token table beyond the tokenizer's {vocab_size} tokens are left out")
    print(about_tokenizer)
    # transformers asks for the permission for the tokenizer too, since it reads config.json there
    arguments = f"({str(to)!r}{', trust_remote_code=True' if ours.diffusion else ''})"
    for name in ("AutoModelForCausalLM", *(["AutoTokenizer"] if "tokenizer.json" in texts else [])):
        print(f"{name}.from_pretrained{arguments}")
    return to


if __name__ == "__main__":
    with one_line_errors():
        export(command_line)
