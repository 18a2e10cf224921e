"""How fast is it here? Arms interleaved in one process, with the program and the loader of train.py.

    python bench.py --what=train --model=quick --arms=A,A-I
    python bench.py --what=train --model=gpt2 --batch_size=64 --profile=True
    python bench.py --what=sample --model=shakespeare_char
    python bench.py --what=train --model=quick --arms=plain,A,A-I
    python bench.py --model=imagenet16 --arms=products,A,A-I
    python bench.py --what=startup --model=quick
    python bench.py --what=loader --model=gpt2 --dataset=openwebtext
    torchrun --standalone --nproc_per_node=2 bench.py --what=ddp --model=gpt2 --batch_size=64

The arms take turns (A, A - I, A, A - I, ...), so that a machine whose speed drifts drifts under both; a row states the median over rounds with
the quartiles, and the ratio to the first arm is the median of the rounds' own ratios. Building, compiling and two warm-up turns are not counted.
With `products` first the ratio is how many times as long as its matrix products alone a training step takes: those of the linear layers, by the
library. Attention's own products are not among them; `products+attention` has them too, as batched products that write T x T matrices, which the
kernels of attention do not: a yardstick, no bound. The barrier's products are in neither.
Absolute times hold for one machine at one time: compare ratios within one run.
"""

import dataclasses
import functools
import os
import sys
from dataclasses import dataclass

from configurator import InputError, TrainConfig, configure, one_line_errors
from configurator import build as build_config

BARRIER = ("prior_lambda", "0.05")
ARMS = {  # an arm's name -> its options
    "A": [],
    "A-I": [("diffusion", "True")],
    "A+prior": [BARRIER],  # the log-barrier on the embeddings, and on the model's own heads
    "A+own": [BARRIER, ("prior_where", "attention")],
    "A-bf16": [("dtype", "bfloat16")],  # on a CPU, where --dtype=auto is float32
    "apart": [],  # on CUDA, A with plain products and the framework's attention, where A may have others (fused_products.py, fused_attention.py)
    "plain": [],  # A in nanoGPT's way, see `plain`
    "products": [],  # the matrix products of A's linear layers alone, forward and backward, see `products`
    "products+attention": [],  # and those of its attention
}
TRAINING = {"plain": "a training loop", "products": "a part of the training step", "products+attention": "a part of the training step"}


@dataclass(frozen=True)
class BenchConfig:
    """Speed of training, evaluation, sampling and start-up: python bench.py [--key=value ...]"""

    what: str = "train"  # train, eval, sample, startup, loader (drawn batches against a fixed one), ddp (all processes of torchrun against one)
    model: str = "quick"  # a recipe: config/MODEL.py
    arms: str = "A,A-I"  # comma-separated, of those in ARMS: A, A-I, ..., plain (nanoGPT's way), products; the others are compared with the first
    batch_size: int = 0  # sequences per step in one batch, of each process; 0: the recipe's batch and accumulation
    dataset: str = ""  # empty: the recipe's, or random data of its kind where that is not prepared
    rounds: int = 10  # turns of each arm that are counted
    steps: int = 0  # optimizer steps or evaluations per turn; 0: as many as take about half a second
    tokens: int = 500  # sample: tokens after a prompt of 100 (or block_size / 2, if that is less)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: bool | None = None  # None: on CUDA
    out: str = ""  # a JSON file for the figures
    transformers: bool = False  # sample: transformers' generate with its cache as well
    profile: bool = False  # train: a table of the kernels that take most time, per arm

    def check(self) -> "BenchConfig":
        """Raises InputError for a value out of range; returns self."""
        if self.what not in ("train", "eval", "sample", "startup", "loader", "ddp"):
            raise InputError(f"--what={self.what} must be train, eval, sample, startup, loader or ddp")
        if (self.what == "ddp") != (int(os.environ.get("WORLD_SIZE", 1)) > 1):
            example = "torchrun --standalone --nproc_per_node=2 bench.py --what=ddp ..."
            raise InputError(f"--what={self.what}: ddp is for several processes and the others are for one: {example}, or python bench.py ...")
        for arm in self.arms.split(","):
            if arm not in ARMS or self.arms.split(",").count(arm) > 1:
                raise InputError(f"--arms={self.arms}: {arm!r} is none of {', '.join(ARMS)}, or is there twice")
            if arm in TRAINING and self.what != "train":
                raise InputError(f"--arms={self.arms}: {arm} is {TRAINING[arm]}, for --what=train alone")
        for key, what in (("tokens", "sample"), ("transformers", "sample"), ("profile", "train")):
            if getattr(self, key) != getattr(BenchConfig, key) and self.what != what:
                raise InputError(f"--{key}={getattr(self, key)} is for --what={what}, this is --what={self.what}: take it out")
        for key, low in (("rounds", 1), ("tokens", 1), ("batch_size", 0), ("steps", 0)):
            if getattr(self, key) < low:
                raise InputError(f"--{key}={getattr(self, key)} must be at least {low}")
        return self


if __name__ == "__main__":  # before torch is imported
    with one_line_errors():
        command_line = configure(BenchConfig)

import json
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tabulate import tabulate

from dataset import ROOT, directory_of, load, write_file, write_tokens
from model import GPT, CausalSelfAttention, ViT
from optimizer import learning_rate, set_learning_rate
from parallel import gather
from pictures import PictureWriter
from place import Place, find_place, say
from sample import generate
from train import build, make_model

CLOCK = time.perf_counter
CHUNK = 32768  # rows of logits at a time: fused.CHUNK, which cannot be imported where there is no Triton
# kinds of kernels (CPU: operations) by their names, the first that fits
KERNELS = {
    "attention": r"sdpa|flash|fmha|cudnn::fusion|attention|_attend",
    "matrix products": r"gemm|nvjet|cutlass|cublas|mkldnn|^_product_alone$|aten::(add|b)?mm$",
    "products with GELU inside": r"^_product$",
    "products with LayerNorm inside": r"^_product_add_norm$",
    "whole branches": r"^_(Attention|MLP)Branch(Backward)?$",  # fused_cpu.c's
}


def recipe(bench: BenchConfig, arm: str, folder: Path) -> TrainConfig:
    """The training config of an arm, with data that exist. Raises InputError for an unknown recipe."""
    path = ROOT / "config" / f"{bench.model}.py"
    if not path.is_file():
        raise InputError(f"--model={bench.model}: there is no config/{bench.model}.py")
    config = build_config(TrainConfig, [str(path)], ARMS[arm])
    changes = {
        "device": bench.device,
        "dtype": config.dtype if bench.dtype == "auto" else bench.dtype,
        "compile": bench.compile,
        "dataset": bench.dataset or config.dataset,
    }
    if bench.batch_size:
        changes |= {"batch_size": bench.batch_size, "gradient_accumulation_steps": 1}
    if not bench.dataset and not (directory_of(config.dataset) / "meta.json").is_file():
        changes["dataset"] = str(random_data(folder, config))
    return dataclasses.replace(config, **changes).check()


def random_data(folder: Path, config: TrainConfig) -> Path:
    """Random data of the kind that the recipe reads: speed does not depend on what a token or a pixel is."""
    if (folder / "meta.json").is_file():
        return folder
    say(f"--dataset={config.dataset} is not prepared: random data instead")
    generator = np.random.default_rng(0)
    if config.dataset == "imagenet16":
        with PictureWriter(folder) as writer:
            labels = {}
            for name, count in (("train", 20000), ("val", 2000)):
                labels[name] = np.arange(count) % 200
                writer.add(name, generator.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8))
            writer.finish(labels, [str(i) for i in range(200)], "random", {})
    else:
        size = config.vocab_size or 65
        ids = [generator.integers(0, min(size, 50257), count) for count in (4_000_000, 200_000)]
        write_tokens(folder, *ids, {"vocab_size": min(size, 50257), "tokenizer": {"type": "gpt2"}})
    return folder


def synchronize(device: torch.device):
    """Waits for the device and the other processes, so that the clock sees finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    if dist.is_initialized():
        dist.barrier()


def take_turns(turns: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """{arm: function of no argument} -> {arm: seconds of each round}, the arms one after the other in every round."""
    seconds = {arm: [] for arm in turns}
    for i in range(rounds + 2):
        for arm, turn in turns.items():
            synchronize(device)
            start = CLOCK()
            turn()
            synchronize(device)
            if i >= 2:
                seconds[arm].append(CLOCK() - start)
    return seconds


def spread(values) -> dict:
    """Median and quartiles."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "quartiles": [float(low), float(high)]}


class Yardstick(NamedTuple):
    """What is measured beside the program in the same run: the parts of a train.Program that the benchmark reads, and the floating-point operations
    of a step."""

    config: TrainConfig
    place: Place
    model: GPT | ViT
    tokens: int
    step: Callable
    mode: str
    flops: float


def plain(config: TrainConfig, place: Place) -> Yardstick:
    """Sequences sliced one by one from the memory-mapped file, compiled where that is the default, the logits returned, AdamW as torch has it."""
    tokens, T, B = np.memmap(directory_of(config.dataset) / "train.bin", dtype=np.uint16, mode="r"), config.block_size, config.batch_size
    model = make_model(config, load(config, torch.device("cpu")))
    if not isinstance(model, GPT):
        raise InputError(f"--arms: plain is a loop for text, and --model of {config.dataset} is for pictures")
    model = model.to(place.device)
    cuda = place.device.type == "cuda"
    compiled = cuda if config.compile is None else config.compile
    network = torch.compile(model) if compiled else model
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) == decays], "weight_decay": config.weight_decay * decays} for decays in (1, 0)
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=cuda)

    def batch():
        starts = torch.randint(len(tokens) - T, (B,)).tolist()
        x, y = (torch.stack([torch.from_numpy(tokens[s + shift : s + shift + T].astype(np.int64)) for s in starts]) for shift in (0, 1))
        return [t.pin_memory().to(place.device, non_blocking=True) if cuda else t.to(place.device) for t in (x, y)]

    prefetched = [batch()]

    def step(seed: int, i: int):
        set_learning_rate(optimizer, learning_rate(config, i))
        for _ in range(config.gradient_accumulation_steps):
            with place.autocast():
                _, loss = network(*prefetched.pop())
            prefetched.append(batch())
            (loss / config.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    count = B * T * config.gradient_accumulation_steps
    return Yardstick(config, place, model, count, step, "compiled" if compiled else "eager", count * model.flops_per_token())


class Products:
    """The matrix products of a model's training step on one batch, by torch's matmul; calling it does them all, in the order of the step.

    Per linear layer, with N = batch_size x block_size rows (a ViT's classifier has batch_size): y = x W^T and dx = dy W in the arm's dtype, and
    dW = dy^T x, on CUDA in float32 from matrices in half precision. There is no dx where x are the data (a ViT's patches). A GPT's output layer has
    all three in pieces of CHUNK rows, as fused.output_loss has them. With `attention`, per head q k^T and A v and their four gradients as well, over
    all pairs of tokens: the causal half is not left out.

    Inputs are random, about 1 in size. Results of one shape share their memory, and so do the inputs. `flops` counts the operations (two for each
    multiplication and addition).
    """

    def __init__(self, model: GPT | ViT, batch_size: int, device: torch.device, dtype: torch.dtype, attention: bool):
        self.model, self.batch_size, self.device, self.dtype = model, batch_size, device, dtype
        self.on_gpu = device.type == "cuda" and dtype != torch.float32  # as fused._accumulate
        self.flops, self.matrices, self.forward, self.backward = 0, {}, [], []
        for module in model.modules():  # an attention comes before its own two layers
            if attention and isinstance(module, CausalSelfAttention):
                self._attention(module)
            if isinstance(module, nn.Linear):
                self._output(module) if isinstance(model, GPT) and module is model.lm_head else self._linear(module)

    def __call__(self):
        for product in (*self.forward, *reversed(self.backward)):
            product()

    def _matrix(self, role: str, *shape: int, dtype: torch.dtype | None = None):
        """The matrix (or batch of them) of a role and shape: normal numbers."""
        key = role, shape
        if key not in self.matrices:
            self.matrices[key] = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return self.matrices[key]

    def _weight(self, layer: nn.Linear, rows: int):
        """A layer's own random W, (out, in) with `rows` for out, so that x W^T are about 1 in size, and the memory of dW."""
        weight = torch.randn(rows, layer.in_features, device=self.device).mul_(layer.in_features**-0.5).to(self.dtype)
        return weight, self._matrix("dW", *weight.shape, dtype=torch.float32 if self.on_gpu else None)

    def _sum(self, dW, dy, x, add: bool = False):
        """dW (+)= dy^T x, to be done."""
        how = {"out_dtype": torch.float32} if self.on_gpu else {}
        return functools.partial(torch.addmm, dW, dy.t(), x, beta=float(add), out=dW, **how)

    def _linear(self, layer: nn.Linear):
        N, reads_data = self.batch_size * self.model.config.block_size, False
        if isinstance(self.model, ViT):
            N, reads_data = self.batch_size if layer is self.model.lm_head else N, layer is self.model.transformer.patch
        W, dW = self._weight(layer, layer.out_features)
        x, dy = self._matrix("x", N, layer.in_features), self._matrix("dy", N, layer.out_features)
        self.forward.append(functools.partial(torch.mm, x, W.t(), out=self._matrix("result", N, layer.out_features)))
        self.backward.append(self._sum(dW, dy, x))  # backward runs from the end: dx comes first, as in the step
        if not reads_data:
            self.backward.append(functools.partial(torch.mm, dy, W, out=self._matrix("result", N, layer.in_features)))
        self.flops += (2 if reads_data else 3) * 2 * N * W.numel()

    def _output(self, layer: nn.Linear):
        """As the step with pieces has it: a piece's logits are what its gradients are taken of, and W has rows added up to a multiple of 16."""
        N, V = self.batch_size * self.model.config.block_size, layer.out_features
        W, dW = self._weight(layer, V + -V % 16 if self.on_gpu else V)
        x, dx = self._matrix("x", N, layer.in_features), self._matrix("result", N, layer.in_features)
        logits = self._matrix("logits", min(N, CHUNK), len(W))
        for first in range(0, N, CHUNK):
            part, piece = slice(first, first + CHUNK), logits[: N - first]
            self.forward += [
                functools.partial(torch.mm, x[part], W.t(), out=piece),
                functools.partial(torch.mm, piece, W, out=dx[part]),
                self._sum(dW, piece, x[part], add=first > 0),
            ]
        self.flops += 3 * 2 * N * layer.weight.numel()  # the added rows are no work of the model's

    def _attention(self, layer: CausalSelfAttention):
        T, d = self.model.config.block_size, self.model.config.n_embd // layer.n_head
        heads = self.batch_size * layer.n_head
        q, k, v, dy = (self._matrix(role, heads, T, d) for role in ("q", "k", "v", "dy"))
        A, dS = self._matrix("A", heads, T, T), self._matrix("dS", heads, T, T)
        small, large = self._matrix("result", heads, T, d), self._matrix("result", heads, T, T)
        pairs = [(q, k.mT, large), (A, v, small)], [(dS.mT, q, small), (dS, k, small), (dy, v.mT, large), (A.mT, dy, small)]  # backward: see __call__
        for products, found in zip((self.forward, self.backward), pairs):
            products += [functools.partial(torch.bmm, a, b, out=out) for a, b, out in found]
        self.flops += 6 * 2 * heads * T * T * d


def products(config: TrainConfig, place: Place, data, attention: bool) -> Yardstick:
    """`Products` of the recipe's step, repeated for every micro-batch; on CUDA they are one CUDA graph. Nothing else of a step is in it: no data, no
    casts of weights, no optimizer."""
    model = make_model(config, data)
    multiply, count = Products(model, config.batch_size, place.device, place.dtype, attention), config.gradient_accumulation_steps

    def run():
        for _ in range(count):
            multiply()

    mode, graph = f"products of linear layers{' and attention' if attention else ''} alone, by the library", None
    if place.device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the library gets ready outside of the capture
            multiply()
            multiply()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        mode += ", one CUDA graph per step"

    def step(seed: int, i: int):  # holds `run`, and with it the matrices, which the graph uses and does not keep
        graph.replay() if graph else run()

    return Yardstick(config, place, model, config.batch_size * data.block_size * count, step, mode, count * multiply.flops)


class FixedBatch:
    """A data set whose every batch is the first one, already on the device: what a training step costs without its loader."""

    def __init__(self, data):
        self.data, self.kept = data, {}

    def __getattr__(self, name):
        return getattr(self.data, name)

    def draw(self, seed, step, rows):
        if rows not in self.kept:
            self.kept[rows] = self.data.draw(0, 0, rows)
        return self.kept[rows]

    def batch(self, drawn):
        if ("batch", len(drawn)) not in self.kept:
            self.kept["batch", len(drawn)] = self.data.batch(drawn)
        return self.kept["batch", len(drawn)]


def apart(config: TrainConfig, place: Place, data):
    """The program with plain products, what stands around them in passes of its own, and over long sequences the framework's attention. Raises
    InputError where there is nothing to tell apart."""
    if place.device.type != "cuda":
        raise InputError("--arms: apart is for CUDA, where fused_products.py has products with more in them")
    import fused_attention
    import fused_products

    kept = fused_products.applies, fused_attention.takes_long
    try:
        fused_products.applies = fused_attention.takes_long = lambda *_: False
        return build(config, place, data)
    finally:
        fused_products.applies, fused_attention.takes_long = kept


def programs(bench: BenchConfig, folder: Path) -> tuple[dict, dict, Place]:
    """{name: program}, {name: GiB at its peak while it was the only new one}, the place. A name is an arm's, with what else is compared."""
    built, memory = {}, {}
    for arm in bench.arms.split(","):
        config = recipe(bench, arm, folder)
        alone = find_place(config.device, config.dtype, distributed=False)
        data = load(config, alone.device)
        variants = {arm: (config, alone, data)}
        if bench.what == "loader":
            variants = {f"{arm}, a fixed batch": (config, alone, FixedBatch(data)), **variants}
        if bench.what == "ddp":
            together = find_place(config.device, config.dtype)
            rows = dataclasses.replace(config, gradient_accumulation_steps=config.gradient_accumulation_steps * together.world)
            variants = {f"{arm}, alone": (config, alone, data), f"{arm}, {together.world} processes": (rows, together, data)}
        cuda = alone.device.type == "cuda"
        for name, (config, place, data) in variants.items():
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if arm == "plain":
                built[name] = plain(config, place)
            elif arm in ("products", "products+attention"):
                built[name] = products(config, place, data, arm == "products+attention")
            else:
                built[name] = (apart if arm == "apart" else build)(config, place, data)
            built[name].model.init_weights(0)
            built[name].step(0, 0)
            synchronize(place.device)
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else None
    return built, memory, place


def bench_train_or_eval(bench: BenchConfig, folder: Path) -> tuple[list[dict], object]:
    """One row per arm: ms per step (or evaluation), tokens/s, TFLOP/s, MFU, peak memory, ratio to the first arm."""
    built, memory, place = programs(bench, folder)
    first = next(iter(built.values()))

    def work(program, count):
        for i in range(count):
            program.evaluate() if bench.what == "eval" else program.step(0, i)

    def steps_of_half_a_second():
        work(first, 2)
        synchronize(place.device)
        start = CLOCK()
        work(first, 2)
        synchronize(place.device)
        return max(1, round(0.5 / ((CLOCK() - start) / 2)))

    count = bench.steps or gather(steps_of_half_a_second(), place)[0]
    turns = {arm: (lambda program=program: work(program, count)) for arm, program in built.items()}
    seconds = take_turns(turns, bench.rounds, place.device)
    rows = []
    for arm, program in built.items():
        tokens = program.tokens
        if bench.what == "eval":
            tokens = sum(n for *_, n in program.data.validation(program.config.batch_size, program.config.eval_tokens))
            tokens *= 1 if isinstance(program.model, GPT) else program.data.block_size
        if isinstance(program, Yardstick):
            flops = program.flops / tokens
        else:
            flops = program.model.flops_per_token() * (1 / 3 if bench.what == "eval" else 1)
        ms = spread([1e3 * value / count for value in seconds[arm]])
        rate = tokens / ms["median"] * 1e3
        ratio = spread(np.array(seconds[arm]) / np.array(seconds[next(iter(built))]))
        if bench.what == "ddp":  # the same work for each process: its time alone by its time with the others is the scaling efficiency
            ratio = spread(np.array(seconds[arm.partition(",")[0] + ", alone"]) / np.array(seconds[arm]))
        peak = place.peak and place.peak * program.place.world
        row = {"arm": arm, "ms": ms, "tokens_per_s": rate, "tflops": rate * flops / 1e12, "mfu": rate * flops / peak if peak else None}
        rows.append(
            row | {"peak_gib": memory[arm], "ratio": ratio, "mode": program.mode, "turn": f"{count} per turn", "dtype": str(program.place.dtype)}
        )
        if bench.profile and bench.what == "train":
            rows[-1]["profile"], rows[-1]["kernels_ms"] = profile(program, place.device)
    return rows, place


def profile(program, device: torch.device) -> tuple[str, dict[str, float]]:
    """A table of the operations that take most time in three steps, and ms a step of the matrix products, of attention's kernels and of all."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as recorded:
        for i in range(3):
            program.step(0, i)
        synchronize(device)
    events = recorded.key_averages()
    sums = dict.fromkeys((*KERNELS, "all"), 0.0)
    for event in events:
        ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 3e3
        sums["all"] += ms
        kind = next((kind for kind, pattern in KERNELS.items() if re.search(pattern, event.key)), None)
        if kind:
            sums[kind] += ms
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return events.table(sort_by=by, row_limit=50, max_name_column_width=80), sums


def bench_sample(bench: BenchConfig, folder: Path) -> tuple[list[dict], object]:
    """Batch 1, random weights: sample.generate with its cache against nanoGPT's way, which reads the whole context again for every token, with
    float32 weights under autocast. Both draw from the 200 most probable tokens."""
    turns = {}
    for arm in bench.arms.split(","):
        config = recipe(bench, arm, folder)
        place = find_place(config.device, config.dtype, distributed=False)
        program = build(dataclasses.replace(config, compile=False, cuda_graph=None), place)
        if not isinstance(program.model, GPT):
            raise InputError(f"--what=sample writes text, and --model={bench.model} is for pictures")
        program.model.init_weights(0)
        masters = GPT(program.model.config).to(place.device).eval()
        model = program.model.eval().to(place.dtype)
        context = model.config.block_size
        size = model.config.vocab_size
        prompt = [i % size for i in range(min(100, context // 2))]

        def cached(model=model, prompt=prompt, size=size):
            for _ in generate(model, prompt, bench.tokens, 0.8, 200, torch.Generator(), size):
                pass

        @torch.inference_mode()
        def plain(model=masters, prompt=prompt, context=context, place=place):
            tokens = torch.tensor([prompt], device=place.device)
            for _ in range(bench.tokens):
                with place.autocast():
                    logits = model(tokens[:, -context:])[0][:, -1] / 0.8
                logits, kept = logits.topk(min(200, logits.size(-1)))
                drawn = torch.multinomial(logits.float().softmax(-1), 1)
                tokens = torch.cat((tokens, kept.gather(1, drawn)), dim=1)

        turns |= {f"{arm}, no cache": plain, arm: cached}
        if bench.transformers and arm == "A":
            turns["A, transformers"] = transformers_generate(model, prompt, bench.tokens)
    seconds = take_turns(turns, bench.rounds, place.device)
    base = np.array(seconds[next(iter(turns))])
    rows = []
    for name, values in seconds.items():
        ms = spread([1e3 * value / bench.tokens for value in values])
        rows.append({"arm": name, "ms": ms, "tokens_per_s": 1e3 / ms["median"], "ratio": spread(np.array(values) / base)})
    return rows, place


def transformers_generate(model: GPT, prompt: list[int], tokens: int) -> Callable:
    """The same decoding by transformers' GPT-2 of the same sizes with its cache, greedy; random weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise InputError("--transformers=True needs the package transformers: pip install -r requirements-hf.txt") from None
    c, weight = model.config, model.transformer.wte.weight
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "vocab_size": c.vocab_size, "n_positions": c.block_size}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None, bos_token_id=None)).eval().to(weight.device, weight.dtype)
    ids = torch.tensor([prompt], device=weight.device)

    @torch.inference_mode()
    def run():
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)
        assert made.size(1) == len(prompt) + tokens

    return run


def bench_startup(bench: BenchConfig, folder: Path) -> tuple[list[dict], object]:
    """Seconds from the command to the end of train.py --help, and to the first iteration's line of train.py, text prepared."""
    config = recipe(bench, bench.arms.split(",")[0], folder)
    path = str(ROOT / "config" / f"{bench.model}.py")
    script = [sys.executable, str(ROOT / "train.py")]
    rows = []
    for name, command in (("--help", [*script, "--help"]), ("first iteration", None)):
        seconds = []
        for i in range(bench.rounds):
            if command is None:
                options = {"out_dir": folder / f"start-{i}", "dataset": config.dataset, "device": bench.device, "log_interval": 1}
                run = [*script, path, "--eval_interval=1000000", "--eval_tokens=1", *(f"--{key}={value}" for key, value in options.items())]
            else:
                run = command
            start = CLOCK()
            with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                for line in process.stdout:
                    if command is None and line.startswith("iter 1:"):
                        break
                seconds.append(CLOCK() - start)
                process.kill()
        rows.append({"arm": name, "ms": spread([1e3 * value for value in seconds]), "ratio": None})
    return rows, find_place(bench.device, bench.dtype, distributed=False)


def check_out(path: Path):
    """Raises InputError, before anything is measured, where --out cannot be written or is not an earlier benchmark's."""
    try:
        if path.exists() and "rows" not in json.loads(path.read_text(encoding="utf-8")):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise InputError(f"--out={path} is there and is no figures of bench.py: name another file") from None
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"--out={path}: the directory {path.parent} is not there or cannot be written")


def main(bench: BenchConfig):
    """Runs one benchmark, prints its table and writes --out. Raises InputError."""
    if bench.out:
        check_out(Path(bench.out))
    with tempfile.TemporaryDirectory() as folder:
        function = {"sample": bench_sample, "startup": bench_startup}.get(bench.what, bench_train_or_eval)
        try:
            rows, place = function(bench, Path(folder))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"out of memory: the programs of all --arms are there at once, so name fewer, or lower --batch_size: {reason}") from None
    if place.rank > 0:
        return
    lines = []
    for row in rows:
        (low, high), ratio = row["ms"]["quartiles"], row["ratio"]
        cells = [row["arm"], f"{row['ms']['median']:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "-"]
        cells += [f"{row['tflops']:.2f}" if "tflops" in row else "-", f"{row['mfu']:.1%}" if row.get("mfu") else "-"]
        cells += [f"{row['peak_gib']:.2f}" if row.get("peak_gib") else "-", f"{ratio['median']:.3f}" if ratio else "-"]
        lines.append(cells)
    unit = {"eval": "ms an evaluation", "sample": "ms a token", "startup": "ms"}.get(bench.what, "ms a step")
    headers = ["arm", unit, "quartiles", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "efficiency" if bench.what == "ddp" else "ratio"]
    dtypes = " and ".join(dict.fromkeys(row.get("dtype", str(place.dtype)).removeprefix("torch.") for row in rows))
    modes = {}
    for row in rows:
        modes.setdefault(row.get("mode", "eager"), []).append(row["arm"])
    how = next(iter(modes)) if len(modes) == 1 else "; ".join(f"{', '.join(arms)}: {mode}" for mode, arms in modes.items())
    how = f"{place.name()}, {dtypes}, {how}"
    print(f"{bench.what}, {bench.model}, {how}, {bench.rounds} rounds, torch {torch.__version__}\n")
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True))
    for row in rows:
        if "profile" in row:
            sums = ", ".join(f"{name} {ms:.3f}" for name, ms in row["kernels_ms"].items())
            print(f"\n{row['arm']}\n{row['profile']}\nms a step: {sums}")
    if bench.out:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "device": place.name(), "dtype": dtypes}
        figures = {"bench": {key: value for key, value in dataclasses.asdict(bench).items() if key != "out"}, "versions": versions, "rows": rows}
        write_file(Path(bench.out), (json.dumps(figures, indent=1) + "\n").encode())


if __name__ == "__main__":
    with one_line_errors():
        main(command_line)
        if dist.is_initialized():
            dist.destroy_process_group()
