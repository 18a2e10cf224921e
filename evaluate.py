"""A checkpoint under the microscope: clean loss, loss under perturbations of the input, worst cases, and the margins of its attention.

    python evaluate.py --out_dir=out-quick --perturb=True
    python evaluate.py --out_dir=out-quick --margins=True --eval_tokens=65536
    python evaluate.py --out_dir=out-quick --which=last --perturb=True --eval_tokens=65536 --out=figures/quick

Everything random is a pure function of (seed, perturbation, window), drawn on the CPU: two checkpoints see the same perturbations of the same
text or pictures, whatever the batch size or the device, so their figures are paired. Windows are those of train.py's own evaluation.

A perturbation's figure is delta = perturbed loss - clean loss over the same predictions, in nats. The input is perturbed and the target is not: the
model is asked for the true next token after a context with faults in it. Predictions that a perturbation makes unfair are left out on both sides:
a deleted token's own, and the one that a swap has put before the model's eyes.

A margin is log |det(I - M_h W_o^h)| of one head at one position (THEORY section 2, prior.py): how far the residual map e = u - W_o^h y^h is from
losing a direction there. Margins of heads and layers add (a product of experts); the positions with the lowest sums are the support tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import InputError, TrainConfig, configure, one_line_errors


@dataclass(frozen=True)
class EvaluateConfig:
    """A checkpoint under the microscope: python evaluate.py --out_dir=OUT_DIR [--perturb=True] [--margins=True] [--probe=unrolled] [--key=value]"""

    out_dir: str = "out"  # directory of a run, or a checkpoint in it
    which: str = "best"  # the run's checkpoint: best or last
    overwrite: bool = False  # replace a report of another checkpoint, or of other windows or perturbations
    perturb: bool = False  # noise on embeddings, faults in the text or the pictures, gradient attacks
    margins: bool = False  # stability margins of the model's own attention, and its support tokens
    probe: str = ""  # unrolled: attention and representations against the theory of graph diffusion, by layer and head (probe.py); empty: off
    dataset: str = ""  # validation set to use; empty: the one that the checkpoint was trained on
    eval_tokens: int = 0  # validation tokens to read, evenly spaced; 0: the whole validation set
    batch_size: int = 0  # windows per batch, which does not change what is measured; 0: about 8192 tokens
    seed: int = 1  # of the perturbations
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "float32"  # float32, or autocast to bfloat16 or float16
    out: str = ""  # directory for report.json and figures; empty: evaluate-WHICH in the run's directory

    def check(self) -> "EvaluateConfig":
        """Raises InputError for a value out of range; returns self."""
        if self.which not in ("best", "last"):
            raise InputError(f"--which={self.which} must be best or last")
        if self.probe not in ("", "unrolled"):
            raise InputError(f"--probe={self.probe} must be unrolled, or be left out")
        if self.batch_size < 0:
            raise InputError(f"--batch_size={self.batch_size} must be 0 (automatic) or above")
        keys = ("out_dir", "eval_tokens", "seed", "device", "dtype")
        TrainConfig(**{key: getattr(self, key) for key in keys}).check()  # the same keys, the same limits
        return self


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(EvaluateConfig)

import json
import math
import platform
import sys
import zlib
from typing import Callable, Iterator

import numpy as np
import torch
from tabulate import tabulate
from torch.nn import functional as F
from tqdm import tqdm

import fused_cpu
from checkpoint import load_model
from dataset import Pictures, Tokenizer, Tokens, prepare_if_missing, read_meta, write_file
from figures import plt, save_figure
from model import GPT, ViT, plain_attention
from place import Place, find_place, say
from prior import own_margins

PERTURB_STREAM = 4  # SeedSequence keys (seed, stream, perturbation, window): 1 is data order, 2 dropout, 3 sampling
BATCH_TOKENS = 8192
NOISE_RMS = (0.25, 0.5, 1.0, 2.0)  # standard deviations in units of the RMS of the embeddings
NOISE_ABSOLUTE = (0.02, 0.05, 0.1)  # and in the embeddings' own unit; GPT-2's initial weights have 0.02
SUBSTITUTED, FAULTY = (0.01, 0.03, 0.10), (0.03, 0.10)  # shares of the tokens
PIXEL_NOISE, BLUR, SHIFT, OCCLUDED = (0.25, 0.5, 1.0), (0.5, 1.0), (1, 2), (0.25, 0.5)
EPSILON, STEPS = (0.1, 0.25, 0.5), (1, 10)  # radius of the attacks and their numbers of steps
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
SUPPORT_TOKENS = 20  # of the table
PAIR_BYTES = 2**28  # memory that the keys of the (position, head) pairs treated at once may take


# ---------------------------------------------------------------------------------------------------------------------------------
# What is examined, and on what


class Subject:
    """A model with the windows (or pictures) that it is examined on, and its clean losses there.

    Attributes: model, data, tokenizer (None for pictures), place, seed, rms (of the embeddings that enter the first block, over everything read),
    clean (one tensor of losses per batch, (B, T) for text and (B,) for pictures, 0 where there is no target).
    """

    def __init__(self, model: GPT | ViT, data: Tokens | Pictures, place: Place, eval_tokens: int = 0, batch_size: int = 0, seed: int = 1):
        self.model, self.data, self.place, self.seed, self.eval_tokens = model, data, place, seed, eval_tokens
        self.tokenizer = Tokenizer(data.tokenizer) if isinstance(data, Tokens) else None
        self.batch_size = batch_size or max(1, BATCH_TOKENS // data.block_size)
        self.clean, squares, count = [], 0.0, 0
        with torch.no_grad():
            for _, x, y in self.batches():
                self.clean.append(self.losses(x, y))
                real = (y >= 0).view(len(y), -1).any(dim=1)  # the last batch is filled up with rows that have no target
                embeddings = model.embed(x)[real].double()
                squares, count = squares + float(embeddings.square().sum()), count + embeddings.numel()
        self.rms = math.sqrt(squares / count)

    def batches(self) -> Iterator[tuple]:
        """Yields (number of the batch's first window, inputs, targets) in order."""
        for i, (x, y, _) in enumerate(self.data.validation(self.batch_size, self.eval_tokens)):
            yield i * self.batch_size, x, y

    def losses(self, x, y, embeddings=None):
        """Loss of every prediction, in the shape of y, 0 where y is -1. `embeddings` take the place of the model's own."""
        with self.place.autocast():
            logits, _ = self.model(x, y, embeddings=embeddings)
        return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten(), ignore_index=-1, reduction="none").view(y.shape)

    def generator(self, perturbation: str, window: int) -> np.random.Generator:
        """The draws of one perturbation of one window."""
        return np.random.default_rng(np.random.SeedSequence([self.seed, PERTURB_STREAM, zlib.crc32(perturbation.encode()), window]))

    def normal(self, perturbation: str, first: int, shape):
        """Standard normal numbers of (B, ...), row by row of the generators of windows first, first + 1, ..."""
        rows = [self.generator(perturbation, first + row).standard_normal(shape[1:], dtype=np.float32) for row in range(shape[0])]
        return torch.from_numpy(np.stack(rows)).to(self.place.device)


class Totals:
    """Sums of clean and perturbed losses under names, in float64."""

    def __init__(self):
        self.sums = {}

    def add(self, name: str, clean, perturbed, targets):
        """Losses of the same shape; those whose target is -1 do not count."""
        counted = targets >= 0
        sums = [float((part.double() * counted).sum()) for part in (clean, perturbed)] + [int(counted.sum())]
        self.sums[name] = [old + new for old, new in zip(self.sums.get(name, [0.0, 0.0, 0]), sums)]

    def figures(self) -> Iterator[tuple[str, dict]]:
        """Yields (name, {clean, perturbed, delta: nats; predictions: their number}); a perturbation that left nothing to predict has none."""
        for name, (clean, perturbed, n) in self.sums.items():
            if n:
                yield name, {"clean": clean / n, "perturbed": perturbed / n, "delta": (perturbed - clean) / n, "predictions": n}


# ---------------------------------------------------------------------------------------------------------------------------------
# Evaluators: each yields (name, value)


def clean(subject: Subject) -> Iterator[tuple[str, float]]:
    """Mean loss over all predictions, their number, and the RMS of the embeddings."""
    total, count = 0.0, 0
    for losses, (_, _, y) in zip(subject.clean, subject.batches()):
        total, count = total + float(losses.double().sum()), count + int((y >= 0).sum())
    yield "loss", total / count
    yield "predictions", count
    yield "embedding RMS", subject.rms


@torch.no_grad()
def embedding_noise(subject: Subject) -> Iterator[tuple[str, dict]]:
    """Gaussian noise on what enters the first block, in units of its RMS and in absolute units; the same draws at every strength."""
    sigmas = {f"noise {scale:g} RMS": scale * subject.rms for scale in NOISE_RMS} | {f"noise {sigma:g}": sigma for sigma in NOISE_ABSOLUTE}
    totals = Totals()
    for undisturbed, (first, x, y) in zip(subject.clean, subject.batches()):
        embeddings = subject.model.embed(x).float()
        noise = subject.normal("noise", first, embeddings.shape)
        for name, sigma in sigmas.items():
            totals.add(name, undisturbed, subject.losses(x, y, embeddings + sigma * noise), y)
    yield from totals.figures()


def substitute(ids, draw: np.random.Generator, rate: float, vocab_size: int):
    """Tokens replaced by others, uniformly. See TEXT for what is returned."""
    chosen, others = draw.random(len(ids)) < rate, draw.integers(1, max(2, vocab_size), len(ids))
    return np.where(chosen, (ids + others) % vocab_size, ids), np.arange(len(ids))


def swap(ids, draw: np.random.Generator, rate: float):
    """Neighbours exchanged. The first of the two is not asked for the second, which it has become."""
    chosen = draw.random(len(ids)) < rate
    chosen[1:] &= ~chosen[:-1]  # pairs do not overlap
    chosen[-1] = False
    here = np.flatnonzero(chosen)
    ids, source = ids.copy(), np.arange(len(ids))
    ids[here], ids[here + 1] = ids[here + 1], ids[here]
    source[here] = -1
    return ids, source


def delete(ids, draw: np.random.Generator, rate: float):
    """Tokens left out and the rest moved up. Every token that is still there is asked for its own successor."""
    kept = np.flatnonzero(draw.random(len(ids)) >= rate)
    return ids[kept], kept


def keyboard(characters: str) -> np.ndarray:
    """(V, 6) ids of the keys around each character on a QWERTY keyboard, of its own case; a character without such keys has itself."""
    places = {letter: (row, column + 0.5 * row) for row, keys in enumerate(KEYBOARD) for column, letter in enumerate(keys)}
    ids = {character: i for i, character in enumerate(characters)}
    table = np.arange(len(characters))[:, None].repeat(6, axis=1)
    for character, i in ids.items():
        place = places.get(character.lower())
        if place is None:
            continue
        near = [k for k, (row, column) in places.items() if 0 < abs(row - place[0]) + abs(column - place[1]) <= 1.5]
        near = [ids[k] for k in (k.upper() if character.isupper() else k for k in sorted(near)) if k in ids]
        if near:
            table[i] = np.resize(near, 6)
    return table


def typo(ids, draw: np.random.Generator, rate: float, table: np.ndarray):
    """Characters replaced by a neighbour on the keyboard."""
    chosen, key = draw.random(len(ids)) < rate, draw.integers(0, table.shape[1], len(ids))
    return np.where(chosen, table[ids, key], ids), np.arange(len(ids))


@torch.no_grad()
def text_faults(subject: Subject) -> Iterator[tuple[str, dict]]:
    """Substituted, exchanged and deleted tokens, and, where tokens are characters, typing errors.

    A perturbation takes the ids of a window and returns the new ones, at most as many, and for each the place in the window whose target it is asked
    for, -1 for none. Draws are the same at every rate, so what is perturbed at 1 % is so at 3 %.
    """
    V = subject.data.vocab_size
    kinds: dict[str, tuple[Callable, tuple, tuple]] = {"substitution": (substitute, SUBSTITUTED, (V,)), "swap": (swap, FAULTY, ())}
    kinds["deletion"] = delete, FAULTY, ()
    if subject.tokenizer.type == "char":
        kinds["typo"] = typo, FAULTY, (keyboard(subject.tokenizer.characters),)
    totals = Totals()
    for undisturbed, (first, x, y) in zip(subject.clean, subject.batches()):
        ids, targets, losses = x.cpu().numpy(), y.cpu().numpy(), undisturbed.cpu()
        for kind, (function, rates, arguments) in kinds.items():
            for rate in rates:
                new, asked, before = np.zeros_like(ids), np.full_like(targets, -1), torch.zeros_like(losses)
                for row in range(len(ids)):
                    some, source = function(ids[row], subject.generator(kind, first + row), rate, *arguments)
                    new[row, : len(some)] = some
                    asked[row, : len(some)] = np.where(source >= 0, targets[row, source], -1)
                    before[row, : len(some)] = losses[row, source]  # where source is -1 nothing is asked
                asked = torch.from_numpy(asked).to(y.device)
                after = subject.losses(torch.from_numpy(new).to(x.device), asked)
                totals.add(f"{kind} {rate:.0%}", before.to(y.device), after, asked)
    yield from totals.figures()


def blur(pictures, sigma: float):
    """Gaussian blur of (B, 3, S, S) with a standard deviation in pixels; the border is reflected."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=pictures.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, -1)
    padded = F.pad(pictures, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, weights[:, :, None, :], groups=3), weights[:, :, :, None], groups=3)


@torch.no_grad()
def picture_faults(subject: Subject) -> Iterator[tuple[str, dict]]:
    """Noise (in standard deviations of the training pixels), blur, shifts and occlusion of the pictures; what is covered is the mean colour."""
    totals = Totals()
    side = subject.data.image_size
    for undisturbed, (first, x, y) in zip(subject.clean, subject.batches()):
        draws = [subject.generator("place", first + row).random(2) for row in range(len(x))]
        perturbed = {f"pixel noise {sigma:g}": x + sigma * subject.normal("pixels", first, x.shape) for sigma in PIXEL_NOISE}
        perturbed |= {f"blur {sigma:g} px": blur(x, sigma) for sigma in BLUR}
        for shift in SHIFT:
            moved = F.pad(x, (shift,) * 4)
            directions = [(int(a * 3), int(b * 3)) for a, b in draws]  # 0, 1, 2: backward, not at all, forward
            directions = [(row, column) if (row, column) != (1, 1) else (0, 1) for row, column in directions]
            parts = [moved[i, :, a * shift : a * shift + side, b * shift : b * shift + side] for i, (a, b) in enumerate(directions)]
            perturbed[f"shift {shift} px"] = torch.stack(parts)
        for share in OCCLUDED:
            covered, width = x.clone(), max(1, round(share * side))
            for i, (a, b) in enumerate(draws):
                top, left = int(a * (side - width + 1)), int(b * (side - width + 1))
                covered[i, :, top : top + width, left : left + width] = 0
            perturbed[f"occlusion {share:g} of the side"] = covered
        for name, pictures in perturbed.items():
            totals.add(name, undisturbed, subject.losses(pictures, y), y)
    yield from totals.figures()


def attack(subject: Subject, x, y, radius: float, steps: int):
    """Projected gradient ascent of the summed loss on the embeddings, every token within an L2 ball: losses (B, T) or (B,) at the worst point met.

    A step goes along each token's normalised gradient (the steepest direction of the ball), by the whole radius for one step and a quarter of it for
    more, and back to the ball. A window keeps the step at which its own loss was highest; windows do not see each other.
    """
    start = subject.model.embed(x).detach().float()
    size = radius if steps == 1 else radius / 4
    moved = torch.zeros_like(start)
    worst = worst_total = None
    for step in range(steps + 1):
        moved.requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            losses = subject.losses(x, y, start + moved)
            total = losses.view(len(y), -1).sum(dim=1)
        if worst is None:
            worst, worst_total = losses.detach(), total.detach()
        higher = total.detach() > worst_total
        worst = torch.where(higher.view(-1, *[1] * (losses.dim() - 1)), losses.detach(), worst)
        worst_total = torch.where(higher, total.detach(), worst_total)
        if step < steps:
            (gradient,) = torch.autograd.grad(total.sum(), moved)
            moved = moved.detach() + size * F.normalize(gradient, dim=-1)
            norm = moved.norm(dim=-1, keepdim=True)
            moved = moved * (radius / norm.clamp(min=radius))
    return worst


def attacks(subject: Subject) -> Iterator[tuple[str, dict | bool | int]]:
    """One-step and ten-step attacks on the embeddings within epsilon x (RMS x sqrt(C)), the length of a token of that RMS, and their sanity checks.

    The checks: more steps never help the defender, a larger ball never does, an attack does more than noise of the same length, and the number of
    windows on which ten steps found less than one.
    """
    totals, weaker = Totals(), 0
    length = subject.rms * math.sqrt(subject.model.config.n_embd)
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    for p in parameters:  # only the embeddings' gradient is wanted
        p.requires_grad_(False)
    for undisturbed, (first, x, y) in zip(subject.clean, subject.batches()):
        noise = F.normalize(subject.normal("direction", first, subject.model.embed(x).shape), dim=-1)
        for epsilon in EPSILON:
            found = {steps: attack(subject, x, y, epsilon * length, steps) for steps in STEPS}
            for steps, losses in found.items():
                totals.add(f"attack {epsilon:g}, {steps} step{'s' * (steps > 1)}", undisturbed, losses, y)
            one, ten = (losses.view(len(y), -1).double().sum(dim=1) for losses in found.values())
            weaker += int((ten < one).sum())
            with torch.no_grad():
                random = subject.losses(x, y, subject.model.embed(x).float() + epsilon * length * noise)
            totals.add(f"random direction {epsilon:g}", undisturbed, random, y)
    for p in parameters:
        p.requires_grad_(True)
    figures = dict(totals.figures())
    yield from figures.items()
    delta = {name: value["delta"] for name, value in figures.items()}
    rows = [[delta[f"attack {epsilon:g}, {steps} step{'s' * (steps > 1)}"] for epsilon in EPSILON] for steps in STEPS]
    yield "check: ten steps do at least what one does", all(ten >= one for one, ten in zip(*rows))
    yield "check: a larger ball does more", all(row == sorted(row) for row in rows)
    yield (
        "check: an attack does more than a random direction",
        all(one > delta[f"random direction {epsilon:g}"] for one, epsilon in zip(rows[0], EPSILON)),
    )
    yield "windows where ten steps found less than one", weaker


def perturbations(subject: Subject) -> Iterator[tuple[str, object]]:
    """All perturbations of text, or of pictures."""
    yield from embedding_noise(subject)
    yield from (text_faults if subject.tokenizer else picture_faults)(subject)
    yield from attacks(subject)


@torch.no_grad()
def all_margins(subject: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins (windows, layers, heads, T), where their determinants are negative, and which positions are read (windows, T).

    What lies beyond the end of the validation set, in the last window, is not read.
    """
    parts, signs, read = [], [], []
    for _, x, y in subject.batches():
        taps = []
        with subject.place.autocast():
            subject.model(x, y, taps=taps)
        B, H, T, d = taps[0][0].shape
        real = y >= 0 if y.dim() == 2 else (y >= 0)[:, None].expand(B, T)
        step = max(1, min(T, PAIR_BYTES // (4 * B * T * d)))
        rows = []
        for block, tap in zip(subject.model.transformer.h, taps):
            for head in range(H):
                for first in range(0, T, step):
                    positions = torch.arange(first, min(T, first + step), device=x.device).expand(B, -1)
                    rows.append(torch.stack([part.float() for part in own_margins(block.attn, *tap, positions, torch.full_like(positions, head))]))
        both = torch.cat(rows, dim=-1).view(2, B, len(taps), H, T).cpu().numpy()
        parts.append(both[0])
        signs.append(both[1] > 0)
        read.append(real.cpu().numpy())
    kept = np.concatenate(read)
    windows = kept.any(axis=1)  # the last batch is filled up with rows that have no target
    return np.concatenate(parts)[windows], np.concatenate(signs)[windows], kept[windows]


def check_margins(subject: Subject):
    """Raises InputError for a model with another attention than that of the margins' formula."""
    if not plain_attention(config := subject.model.config):
        keys = ("attention_kernel", "head_combine", "diffusion_learned")
        raise InputError(f"the margins' formula is not that of {', '.join(f'{key}={getattr(config, key)}' for key in keys)}: leave --margins out")


def margins(subject: Subject) -> Iterator[tuple[str, object]]:
    """Quantiles and histogram of the margins by layer, and of their sums over layers and heads; for text the support tokens and a passage."""
    check_margins(subject)
    values, negative, read = all_margins(subject)
    windows, layers, heads, T = values.shape
    total = values.sum(axis=(1, 2))  # (windows, T)
    shown = {f"layer {i}": values[:, i].transpose(0, 2, 1)[read] for i in range(layers)} | {"sum over layers and heads": total[read]}
    for name, some in shown.items():
        quantiles = {f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(some, QUANTILES))}
        low, high = np.quantile(some, (0.001, 0.999))
        counts, edges = np.histogram(some, bins=80, range=(low, max(high, low + 1e-6)))
        yield f"margins, {name}", {"mean": float(some.mean()), "quantiles": quantiles, "counts": counts.tolist(), "edges": edges.tolist()}
    for i in range(layers):
        yield f"negative determinants, layer {i}", float(negative[:, i].transpose(0, 2, 1)[read].mean())
    if subject.tokenizer is None or T == 1:
        return
    ids = np.concatenate([x.cpu().numpy() for _, x, _ in subject.batches()])[:windows]
    choice = read & (np.arange(T) > 0)  # a window's first token sees itself alone: with A - I its margin is 0, whatever the weights
    ranked = np.argsort(np.where(choice, total, np.inf), axis=None)[: min(SUPPORT_TOKENS, choice.sum())]

    def entry(window: int, i: int) -> dict:
        tokens = ids[window]
        words = {"before": tokens[max(0, i - 24) : i], "token": tokens[i : i + 1], "after": tokens[i + 1 : i + 9]}
        where = {"window": int(window), "position": int(i), "margin": float(total[window, i])}
        return where | {name: subject.tokenizer.decode(some) for name, some in words.items()}

    yield "support tokens", [entry(*divmod(int(place), T)) for place in ranked]
    lowest = int(ranked[0]) // T
    passage = {"window": lowest, "tokens": [subject.tokenizer.decode([token]) for token in ids[lowest][read[lowest]]]}
    yield "passage", passage | {"margins": total[lowest][read[lowest]].tolist()}


def unrolled(subject: Subject) -> Iterator[tuple[str, float | None]]:
    """Attention and representations against the theory, see probe.py, on its number of windows or eval_tokens. Where there is no direction: None."""
    from probe import probe, sequences_of, validation_sequences

    windows = max(1, subject.eval_tokens // subject.data.block_size) if subject.eval_tokens else sequences_of(subject.data)
    for name, value in probe(subject.model, validation_sequences(subject.data, windows), windows):
        yield name, None if math.isnan(value) else value


EVALUATORS = {"perturb": perturbations, "margins": margins, "probe": unrolled}  # the key that asks for each

# ---------------------------------------------------------------------------------------------------------------------------------
# Figures, drawn from the report alone


def draw_margins(path: Path, results: dict):
    """Histograms of the margins, one line per layer, and of their sums."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shown = {name.removeprefix("margins, "): value for name, value in results.items() if name.startswith("margins, ")}
    for name, value in shown.items():
        place = axes[0] if name.startswith("layer") else axes[1]
        counts, edges = np.array(value["counts"]), np.array(value["edges"])
        place.stairs(counts / (counts.sum() * np.diff(edges)), edges, label=name, fill=place is axes[1], alpha=0.8)
    for place, label in zip(axes, ("margin of a head, log |det(I − M W)|", "sum over layers and heads")):
        place.axvline(0, color="black", linewidth=0.8, linestyle="--")
        place.set(xlabel=label, ylabel="density")
        place.grid(alpha=0.3)
    axes[0].legend(ncols=2, fontsize="small")
    save_figure(path, figure)


def draw_passage(path: Path, passage: dict, width: int = 64, marked: int = 5):
    """The passage with the lowest margin: every token on a colour for its margin, the `marked` lowest in a frame."""
    tokens, values = passage["tokens"], np.array(passage["margins"])
    shown = [token.replace("\n", "↵").replace("\t", "→") or " " for token in tokens]
    places, row, column = [], 0, 0
    for token, word in zip(tokens, shown):
        if column + len(word) > width:
            row, column = row + 1, 0
        places.append((row, column))
        column += len(word)
        if "\n" in token:
            row, column = row + 1, 0
    rows = row + 1
    figure, axes = plt.subplots(figsize=(0.155 * width + 0.4, 0.3 * rows + 1.2), layout="constrained")
    low, high = np.quantile(values, (0.01, 0.99))
    colours = plt.cm.ScalarMappable(plt.Normalize(low, max(high, low + 1e-6)), "RdYlGn")
    lowest = set(np.argsort(values)[:marked].tolist())
    for i, (word, (y, x)) in enumerate(zip(shown, places)):
        edge = {"edgecolor": "black", "linewidth": 1.6, "zorder": 3} if i in lowest else {"edgecolor": "none"}
        axes.add_patch(plt.Rectangle((x, y), len(word), 0.92, facecolor=colours.to_rgba(values[i]), alpha=0.85, **edge))
        for j, character in enumerate(word):
            axes.text(x + j + 0.5, y + 0.5, character, ha="center", va="center", family="monospace", fontsize=9, zorder=4, parse_math=False)
    axes.set(xlim=(-0.3, width + 0.3), ylim=(rows, -0.2), title=f"window {passage['window']}: margin of each token, the {marked} lowest framed")
    axes.axis("off")
    bar = {"orientation": "horizontal", "fraction": 0.15 / rows + 0.02, "aspect": 50, "pad": 0.02}
    figure.colorbar(colours, ax=axes, label="sum of log |det| over layers and heads", **bar)
    save_figure(path, figure)


# ---------------------------------------------------------------------------------------------------------------------------------
# Report


def examine(subject: Subject, evaluators: dict[str, Callable], quiet: bool = False) -> dict[str, dict]:
    """Runs evaluators: {section: {name: value}}."""
    results = {}
    bar = tqdm(evaluators.items(), disable=quiet or not sys.stderr.isatty(), leave=False)
    for section, evaluator in bar:
        bar.set_description(section)
        if not quiet and not sys.stderr.isatty():
            say(f"{section} ...")
        results[section] = {}
        for name, value in evaluator(subject):
            results[section][name] = value
            bar.set_postfix_str(name[:40])
    return results


def load_subject(config: EvaluateConfig) -> tuple[Subject, dict]:
    """The checkpoint on its device with its validation set, and checkpoint.json. Raises InputError."""
    model, _, meta = load_model(Path(config.out_dir), config.which)
    place = find_place(config.device, config.dtype, distributed=False)
    dataset = config.dataset or meta["config"]["dataset"]
    prepare_if_missing(dataset)
    if read_meta(dataset)[1]["kind"] != meta["kind"]:
        raise InputError(f"--dataset={dataset} holds {read_meta(dataset)[1]['kind']}, the checkpoint is a model of {meta['kind']}")
    if isinstance(model, GPT):
        data = Tokens(dataset, model.config.block_size, place.device)
    else:
        data = Pictures(dataset, model.config.patch_size, 0, False, place.device)
        if (data.image_size, data.n_classes) != (model.config.image_size, model.config.n_classes):
            raise InputError(f"--dataset={dataset} has {data.n_classes} classes of {data.image_size} pixels, which the checkpoint was not made for")
    if data.tokenizer != meta["tokenizer"]:
        raise InputError(f"--dataset={dataset} is not written in the checkpoint's vocabulary (or classes): its losses would mean nothing")
    if not config.dataset and data.checksum["val"] != meta["data"]["val"]:
        raise InputError(f"--dataset={dataset} has changed since the checkpoint was trained: name it with --dataset to use it nevertheless")
    model = model.to(place.device).eval()
    if place.device.type == "cpu":
        fused_cpu.accelerate(model)
    return Subject(model, data, place, config.eval_tokens, config.batch_size, config.seed), meta


def table(results: dict[str, dict]) -> str:
    """The perturbations as a Markdown table, and what is no perturbation as lines."""
    rows, lines, quantiles = [], [], []
    for section in results.values():
        for name, value in section.items():
            if isinstance(value, dict) and "quantiles" in value:
                numbers = [value["mean"], *value["quantiles"].values()]
                quantiles.append([name.removeprefix("margins, "), *(f"{number:+.3f}" for number in numbers)])
            elif isinstance(value, dict) and "delta" in value:
                rows.append([name, f"{value['clean']:.4f}", f"{value['perturbed']:.4f}", f"{value['delta']:+.4f}", f"{value['predictions']:,}"])
            elif not isinstance(value, dict | list):
                lines.append(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    text = "\n".join(lines)
    headers = ["perturbation", "clean loss", "perturbed", "delta", "predictions"]
    text += "\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else ""
    headers = ["margins", "mean", *("min" if q == 0 else "max" if q == 1 else f"{q:.0%}" for q in QUANTILES)]
    text += "\n\n" + tabulate(quantiles, headers, tablefmt="github", disable_numparse=True) if quantiles else ""
    support = next((section["support tokens"] for section in results.values() if "support tokens" in section), [])
    rows = [[f"{s['margin']:+.3f}", s["window"], s["position"], repr(s["token"]), f"{s['before']}[{s['token']}]{s['after']}"] for s in support]
    for row in rows:
        row[-1] = row[-1].replace("\n", "↵").replace("|", "¦")
    headers = ["margin", "window", "position", "support token", "where"]
    return text + ("\n\n" + tabulate(rows, headers, tablefmt="github", disable_numparse=True) if rows else "")


def earlier_sections(path: Path, now: dict, overwrite: bool) -> dict:
    """What an earlier call measured of the same checkpoint in the same way, to be kept. Raises InputError for a report of something else."""
    if overwrite or not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report["measured"].setdefault("dtype", report["versions"]["dtype"].removeprefix("torch."))  # older reports have it there alone
        then, asked = ({"checkpoint": some["checkpoint"]["sha256"], **some["measured"]} for some in (report, now))
        other = [key for key in {**then, **asked} if then.get(key) != asked.get(key)]
    except (OSError, ValueError, KeyError, TypeError):
        then, asked, other = {}, {}, ["kind: it is no report of evaluate.py"]
    if other:
        told = [f"{key} ({then.get(key)}, now {asked.get(key)})" if key in then and key in asked and key != "checkpoint" else key for key in other]
        raise InputError(f"{path} differs in {', '.join(told)}: --overwrite=True replaces it, --out names another directory")
    return {section: values for section, values in report.items() if section not in now}


def main(config: EvaluateConfig):
    """Examines one checkpoint, prints the table and writes report.json. Raises InputError."""
    run, which = Path(config.out_dir), config.which
    if (run / "checkpoint.json").is_file():  # a checkpoint itself, whose directory the next one may replace
        run, which = run.resolve().parent, run.resolve().name
    out = Path(config.out or run / f"evaluate-{which}")
    subject, meta = load_subject(config)
    if config.margins:
        check_margins(subject)
    try:  # before the work, not after it
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in {out}: {error.strerror}; name another directory with --out") from None
    evaluators = {"clean": clean} | {name: EVALUATORS[name] for name in EVALUATORS if getattr(config, name)}
    checkpoint = {"out_dir": config.out_dir, "which": config.which, "step": meta["step"], "sha256": meta["sha256"], "model": meta["model"]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "device": subject.place.name(), "dtype": str(subject.place.dtype)}
    measured = {
        "windows": f"--eval_tokens={config.eval_tokens}",
        "seed": config.seed,
        "dtype": config.dtype,
        "data_sha256": subject.data.checksum["val"],
    }
    report = {"checkpoint": checkpoint, "measured": measured, "versions": versions}
    report |= earlier_sections(out / "report.json", report, config.overwrite)
    results = examine(subject, evaluators)
    report |= results
    write_file(out / "report.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    for figure, section in (("margins.png", report), ("passage.png", report.get("margins", {}))):  # of a report that this one replaces
        if config.overwrite and figure.removesuffix(".png") not in section:
            (out / figure).unlink(missing_ok=True)
    files = ["report.json"]
    if config.margins:
        draw_margins(out / "margins.png", results["margins"])
        files.append("margins.png")
        if "passage" in results["margins"]:
            draw_passage(out / "passage.png", results["margins"]["passage"])
            files.append("passage.png")
    print(table({section: values for section, values in results.items() if section != "probe"}))
    if config.probe:
        from probe import table as table_of_layers

        print(f"\nmeans over heads (probe.py says what they are):\n\n{table_of_layers(results['probe'])}")
    say(f"\n{out}: {', '.join(files)}")


if __name__ == "__main__":
    with one_line_errors():
        main(command_line)
