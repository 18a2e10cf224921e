"""Does the interpretation last in training? Attention and token representations of a trained network, measured against the theory, layer by layer.

    python train.py config/quick.py --probe_interval=50 --out_dir=out-probe-a       records along training, in OUT_DIR/probe.jsonl
    python probe.py out-probe-a out-probe-b --out=probe.png                          the figure over training time and depth, a column per run
    python evaluate.py --out_dir=out-quick --probe=unrolled                          one checkpoint

Works for GPT and ViT, in both arms and every variant. Per layer and head, A is the head's attention matrix (of whatever kernel) and u = LN(x) is what
attention reads:

    cosine           between the head's update W_o^h y^h and the theory's direction (A - I) u, mean over tokens: 1 means the theory's step, and the
                     sign is free, since W_o may absorb it. A token without neighbours (the first, if causal) has no direction and is left out
    cosine_average   the same with A u, the direction of the ordinary transformer, for comparison
    entropy          of A's rows, as a share of log of the number of visible tokens: 1 is uniform. Mean over the tokens that have a choice
    diagonal         mean of A_ii
    dirichlet_in     tr(X^T L X) / tr(X^T X) with L = I - A, X the tokens before the block, normalised without gain: 0 is smooth on the head's graph
    dirichlet_out    the same graph, the tokens after the block: less than before means that the block smooths
    alpha            of a diffusing head, A - alpha I, with diffusion_learned alone

and per layer (0 is what enters the first block): cosine and cosine_average of the whole sub-layer's update, with the mean of the heads' A, and

    effective_rank   exp of the entropy of the singular values of a sequence's normalised tokens (T x C): how many directions they use
    stream_rms       root mean square of the tokens before the block
    attention_rms    of what the attention sub-layer adds to them, and
    mlp_rms          of what the feed-forward sub-layer adds
"""

import sys
from dataclasses import dataclass

from configurator import InputError, build, configure, field_names, one_line_errors, quit_on_interrupt, split_arguments


@dataclass(frozen=True)
class ProbeConfig:
    """Draw what --probe_interval has recorded: python probe.py OUT_DIR [OUT_DIR ...] [--out=FILE.png]"""

    out: str = "probe.png"  # the figure

    def check(self) -> "ProbeConfig":
        """Raises InputError for a value out of range; returns self."""
        if not self.out.endswith(".png"):
            raise InputError(f"--out={self.out} must be a file name that ends in .png")
        return self


def parse(arguments: list[str]) -> tuple[ProbeConfig, list[str]]:
    """Command line -> (options, run directories). Raises InputError."""
    words, options = split_arguments(arguments)
    config = build(ProbeConfig, [], options)
    if not words:
        raise InputError(f"no run is named: python probe.py OUT_DIR [OUT_DIR ...] (--key=value: {', '.join(field_names(ProbeConfig))})")
    return config, words


if __name__ == "__main__":  # before torch is imported
    with one_line_errors():
        quit_on_interrupt()
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(__doc__)
            configure(ProbeConfig, ["--help"])
        command_line = parse(sys.argv[1:])

import json
import math
from pathlib import Path
from typing import Iterable, Iterator

import torch
from torch.nn import functional as F

import theory
from checkpoint import copy_weights
from dataset import write_file
from model import GPT, ViT, attention_matrix

HEAD = ("cosine", "cosine_average", "entropy", "diagonal", "dirichlet_in", "dirichlet_out")
LAYER = ("effective_rank", "cosine", "cosine_average", "stream_rms", "attention_rms", "mlp_rms")
SEQUENCES, TOKENS = 16, 4096  # that train.py and evaluate.py look at: so many sequences, or fewer that have so many tokens


# ---------------------------------------------------------------------------------------------------------------------------------
# Measuring


def head_parts(attn, u):
    """One attention sub-layer taken apart at its input u (B, T, C): A (B, H, T, T) and each head's update W_o^h y^h (B, H, T, C), without bias."""
    B, T, C = u.shape
    H, d = attn.n_head, C // attn.n_head
    q, k, v = (part.view(B, T, H, d).transpose(1, 2) for part in attn.c_attn(u).split(C, dim=2))
    kernel = getattr(attn, "kernel", "softmax")
    if kernel == "softmax":
        A = attention_matrix(q, k, attn.causal)
    else:
        from variants import kernel_matrix

        A = kernel_matrix(q, k, attn.causal, kernel)
    y = attn.per_head(q, v, k, v, None, attn.causal)  # (B, H, T, d): the model's own, arm and variant included
    return A, torch.einsum("bhtd,chd->bhtc", y, attn.c_proj.weight.view(C, H, d))


def mean_cosine(a, b):
    """Mean over tokens of the cosine between (..., T, C) and (..., T, C) -> (...). Tokens where either is zero are left out; NaN if all are."""
    length = a.norm(dim=-1) * b.norm(dim=-1)
    there = length > 1e-6 * length.amax(dim=-1, keepdim=True)
    cosine = (a * b).sum(dim=-1) / length.where(there, torch.ones_like(length))
    return (cosine * there).sum(dim=-1) / there.sum(dim=-1)


def measure_block(block, x, x_next) -> tuple[torch.Tensor, torch.Tensor]:
    """One block on one sequence, x (1, T, C) -> x_next: the values of HEAD, (6, H), and of LAYER, (6,)."""
    u = block.ln_1(x)
    attention = block.attn(u)
    A, updates = head_parts(block.attn, u)
    A, updates, u = A[0], updates[0], u[0]
    H, T, _ = A.shape
    visible = torch.arange(1, T + 1, device=A.device) if block.attn.causal else torch.full((T,), T, device=A.device)
    choice = visible > 1
    entropy = theory.attention_entropy(A)[:, choice] / visible[choice].to(A.dtype).log()
    before, after = (F.layer_norm(part[0], part.shape[-1:]) for part in (x, x_next))
    average, diffusion = A @ u, A @ u - u
    heads = (mean_cosine(updates, diffusion), mean_cosine(updates, average), entropy.mean(dim=1), theory.diagonal_mass(A))
    heads += tuple(theory.dirichlet_energy(part.expand(H, -1, -1), A) for part in (before, after))
    whole = updates.sum(dim=0)
    layer = (theory.effective_rank(after), mean_cosine(whole, diffusion.mean(dim=0)), mean_cosine(whole, average.mean(dim=0)))
    layer += tuple(part.square().mean().sqrt() for part in (x, attention, x_next - x - attention))
    return torch.stack(heads), torch.stack(layer)


@torch.no_grad()
def probe(model, batches: Iterable, sequences: int = SEQUENCES) -> Iterator[tuple[str, float]]:
    """Yields (name, value): "layer L head H QUANTITY" and "layer L QUANTITY", averaged over the first `sequences` sequences of `batches`.

    `batches` yields what the model takes, inputs first: (B, T) token ids or (B, 3, S, S) pictures. The model itself is not touched: a plain copy in
    eval mode, in float32 at least and without autocast, is run with hooks on its blocks, one sequence at a time, so H T T numbers are stored, not
    B H T T. Layers and heads are counted from 0. Raises ValueError when there is no sequence, InputError for a model whose parameters are sharded.
    """
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise InputError("the probe needs a whole model: use --parallel=ddp, or probe the checkpoint afterwards")
    weights = dict(model.named_parameters())
    one = next(iter(weights.values()))
    wide = torch.promote_types(one.dtype, torch.float32)
    copied = (GPT if isinstance(model, GPT) else ViT)(model.config).to(one.device, wide).eval()  # its plain modules, whatever training made of them
    copy_weights(copied, weights, "the model")
    stream = []  # what enters each block, and the final LayerNorm
    blocks = copied.transformer.h
    for module in (*blocks, copied.transformer.ln_f):
        module.register_forward_pre_hook(lambda _, arguments: stream.append(arguments[0]))
    heads, layers, first, count = 0.0, 0.0, 0.0, 0
    for batch in batches:
        for x in batch[0].split(1):
            if count == sequences:
                break
            stream.clear()
            with torch.autocast(x.device.type, enabled=False):
                copied(x.to(wide) if x.is_floating_point() else x)
                found = [measure_block(block, *pair) for block, pair in zip(blocks, zip(stream, stream[1:]))]
                first = first + theory.effective_rank(F.layer_norm(stream[0][0], stream[0].shape[-1:])).double()
            heads = heads + torch.stack([part for part, _ in found]).double()  # (n_layer, 6, H)
            layers = layers + torch.stack([part for _, part in found]).double()
            count += 1
    if count == 0:
        raise ValueError("there is no sequence to probe")
    heads, layers, first = ((part / count).cpu() for part in (heads, layers, first))
    yield "layer 0 effective_rank", float(first)
    for layer in range(len(blocks)):
        for i, name in enumerate(LAYER):
            # the rank after block L is that of the tokens which enter block L + 1
            yield f"layer {layer + 1 if name == 'effective_rank' else layer} {name}", float(layers[layer, i])
        attn = blocks[layer].attn
        for head in range(heads.size(2)):
            if isinstance(attn.alpha, torch.Tensor) and (diffusing := head - attn.n_head + attn.diffusing_heads) >= 0:
                yield f"layer {layer} head {head} alpha", float(attn.alpha[diffusing])
            for i, name in enumerate(HEAD):
                yield f"layer {layer} head {head} {name}", float(heads[layer, i, head])


def sequences_of(data) -> int:
    """How many sequences of a data set the probe looks at."""
    return max(1, min(SEQUENCES, TOKENS // data.block_size))


def validation_sequences(data, sequences: int = SEQUENCES):
    """Inputs of so many sequences (or pictures) of the validation set, evenly spaced; rows that only fill up a batch or a window are left out."""
    for inputs, targets, _ in data.validation(sequences, sequences * data.block_size):
        yield (inputs[(targets.view(len(targets), -1) >= 0).all(dim=1)],)


# ---------------------------------------------------------------------------------------------------------------------------------
# The record of a run: OUT_DIR/probe.jsonl, {"step": ..., "values": {name: value}} a line


def start_record(out_dir: Path, resume_at: int | None) -> int:
    """Begins probe.jsonl anew, or keeps its rows up to step `resume_at`. Returns the last step that it holds, -1 for none. Raises InputError."""
    path, rows = Path(out_dir) / "probe.jsonl", []
    if resume_at is not None and path.is_file():
        rows = [row for row in read_record(out_dir) if row["step"] <= resume_at]
    if path.is_file() or rows:
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows[-1]["step"] if rows else -1


def measure(model, data) -> dict[str, float | None]:
    """The probe on sequences of the validation set, the same ones each time."""
    return {name: None if math.isnan(value) else value for name, value in probe(model, validation_sequences(data, sequences_of(data)))}


def append(out_dir: Path, step: int, values: dict):
    """Appends one row. Raises InputError when it cannot."""
    path = Path(out_dir) / "probe.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "values": values}) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def read_record(out_dir: Path) -> list[dict]:
    """The rows of probe.jsonl; a last line that a kill cut short is left out. Raises InputError."""
    path = Path(out_dir) / "probe.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{"step": int(row["step"]), "values": dict(row["values"])} for row in rows]
    except FileNotFoundError:
        raise InputError(f"{path} is missing: train with --probe_interval=N to record it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__})") from None


# ---------------------------------------------------------------------------------------------------------------------------------
# Figure

ROWS = (
    ("cosine", "cosine of a head's update\nwith (A − I) LN(x)"),
    ("cosine_average", "cosine of a head's update\nwith A LN(x)"),
    ("smoothing", "Dirichlet energy of the tokens\nafter − before the block"),
    ("effective_rank", "effective rank of the tokens"),
    ("entropy", "attention entropy\n(share of the most)"),
    ("diagonal", "diagonal mass of A"),
    ("attention_share", "RMS of what attention adds,\nas a share of the tokens'"),
    ("mlp_share", "RMS of what the feed-forward\nlayer adds, likewise"),
)


def curves(rows: list[dict], quantity: str) -> dict[int, list[float]]:
    """{depth: values over the rows}, a mean over heads if there are some. "smoothing" is dirichlet_out - dirichlet_in, a share is of stream_rms."""
    found: dict[int, list[float]] = {}
    for row in rows:
        values: dict[int, list[float]] = {}
        for name, value in row["values"].items():
            words = name.split()
            value = math.nan if value is None else value
            if quantity == "effective_rank" and words[2:] == ["effective_rank"]:
                values.setdefault(int(words[1]), []).append(value)
            elif quantity.endswith("_share") and words[2:] == [quantity.replace("_share", "_rms")]:
                values.setdefault(int(words[1]), []).append(value / row["values"][f"layer {words[1]} stream_rms"])
            elif len(words) == 5 and words[4] == quantity:
                values.setdefault(int(words[1]), []).append(value)
            elif quantity == "smoothing" and len(words) == 5 and words[4] == "dirichlet_out":
                values.setdefault(int(words[1]), []).append(value - row["values"][name.replace("_out", "_in")])
        for depth, several in values.items():
            found.setdefault(depth, []).append(sum(several) / len(several))
    return found


def draw(path: Path, runs: dict[str, list[dict]]):
    """One column per run, one row per quantity: curves over training time, one per layer, dark is shallow. Rows share their vertical axis."""
    from figures import plt, save_figure

    figure, grid = plt.subplots(
        len(ROWS), len(runs), figsize=(1.5 + 4.2 * len(runs), 2.0 * len(ROWS)), layout="constrained", squeeze=False, sharex="col", sharey="row"
    )
    deepest = max(max(curves(rows, "effective_rank")) for rows in runs.values())  # the number of blocks
    for column, (title, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        for axes, (quantity, label) in zip(grid[:, column], ROWS):
            for depth, values in sorted(curves(rows, quantity).items()):
                color = plt.get_cmap("viridis")(0.92 * depth / deepest)
                axes.plot(steps, values, color=color, linewidth=1.4, marker="." if len(steps) < 4 else None)
            axes.grid(alpha=0.3)
            if quantity in ("cosine", "cosine_average", "smoothing"):
                axes.axhline(0, color="black", linewidth=0.8)
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
        grid[0, column].set_title(title)
        grid[-1, column].set_xlabel("training step")
    levels = list(range(deepest + 1))
    bar = figure.colorbar(
        plt.cm.ScalarMappable(plt.Normalize(0, deepest / 0.92), "viridis"), ax=grid, shrink=0.4, boundaries=[i - 0.5 for i in range(deepest + 2)]
    )
    bar.set_ticks(levels[:: max(1, len(levels) // 12)])
    bar.set_label("layer, from 0; for the rank: blocks passed")
    save_figure(path, figure, dpi=100)


def table(values: dict[str, float]) -> str:
    """One probe as Markdown: a line per layer, means over heads."""
    from tabulate import tabulate

    rows = [{"step": 0, "values": values}]
    shown = (*HEAD, "attention_share", "mlp_share")
    columns = {quantity: curves(rows, quantity) for quantity in (*shown, "effective_rank")}
    depth = max(columns["cosine"]) + 1
    cells = [[layer, *(f"{columns[q][layer][0]:.3f}" for q in shown), f"{columns['effective_rank'][layer + 1][0]:.2f}"] for layer in range(depth)]
    return tabulate(cells, ["layer", *shown, "effective_rank after it"], tablefmt="github", disable_numparse=True)


def main(config: ProbeConfig, directories: list[str]):
    """Draws the figure and prints the last row of each run. Raises InputError."""
    runs = {}
    for directory in directories:
        rows = read_record(Path(directory))
        if not rows:
            raise InputError(f"{Path(directory) / 'probe.jsonl'} holds no row yet")
        name = Path(directory).name
        runs[directory if name in runs else name] = rows
    draw(Path(config.out), runs)
    for name, rows in runs.items():
        print(f"{name}, step {rows[-1]['step']}: means over heads\n\n{table(rows[-1]['values'])}\n")
    print(config.out)


if __name__ == "__main__":
    with one_line_errors():
        main(*command_line)
