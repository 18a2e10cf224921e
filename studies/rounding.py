"""What gradients lose where the way back keeps less: python studies/rounding.py --out_dir=results/rounding

In half precision on GPUs GELU's derivative is kept in eight bits (fused_products.py), and LayerNorm's gradient is made from its result in half
precision over the gain (fused_norm.py). Here plain torch rounds alike on a CPU: config/quick.py with six layers of 192 channels is trained for some
steps by train.py, A and A - I, and on a batch that it has not seen each parameter's gradient by bf16 autocast is compared with the plain model's in
float64 (but for the cross-entropy, which model.py has in float32). Of a parameter

    error       |g - g64| / |g64|, Euclidean norms
    ratio       its error over that with nothing rounded but what autocast rounds

Writes rounding.json and rounding.md: of every seed the median of the ratios over parameters, the largest, and the means over those parameters alone
whose gradients are the first to be made of what is rounded: the MLPs' first matrices and LayerNorm's gains. Not as on GPUs: the order of sums,
attention's kernel, and that autocast rounds the gradients of matrices to bfloat16, which adds to the errors compared with.
"""

from dataclasses import asdict, dataclass

from reports import write_table

from configurator import InputError, TrainConfig, build, configure, one_line_errors


@dataclass(frozen=True)
class RoundingConfig:
    """Errors of gradients by what is kept for the way back: python studies/rounding.py [--key=value ...]"""

    out_dir: str = "out-rounding"  # directory of rounding.json and rounding.md
    dataset: str = "shakespeare_char"  # of text: a name under data/, or a directory
    seeds: int = 8  # of weights and batches, from 1 on
    steps: int = 120  # of training before the gradients are compared
    sequences: int = 64  # of 64 tokens each, in the batch whose gradients are compared

    def check(self) -> "RoundingConfig":
        """Raises InputError for a value out of range; returns self."""
        for key, low in (("seeds", 1), ("steps", 0), ("sequences", 1)):
            if getattr(self, key) < low:
                raise InputError(f"--{key}={getattr(self, key)} must be at least {low}")
        return self


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(RoundingConfig)

import copy
import shlex
import sys
from pathlib import Path
from statistics import mean, median

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

from dataset import ROOT, prepare_if_missing, read_meta
from model import GPT, LayerNorm
from optimizer import reset
from place import find_place
from report import estimate, paired_difference
from train import Program
from train import build as build_program

ARMS = {"A": "False", "A − I": "True"}  # --diffusion
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 192}
NEAREST = {"first matrices": "mlp.c_fc.weight", "gains": ".ln_"}  # a part of the names of the parameters next to what is rounded
LEAST_GAIN = 2.0**-10  # fused_norm.LEAST_GAIN, which cannot be imported where there is no Triton


def in_eight_bits(slope):
    """The nearest steps of 1 / 200, as fused_products.to_byte and from_byte have them: float32 to the bit."""
    return (slope * 200).round() * 0.005


# how GELU's derivative is rounded, None for not at all, and whether LayerNorm's gradient is made from its result in bfloat16
WAYS = {
    "GELU's derivative in eight bits": (in_eight_bits, False),
    "the same in float16": (lambda slope: slope.half().to(slope.dtype), False),
    "the same in bfloat16": (lambda slope: slope.bfloat16().to(slope.dtype), False),
    "LayerNorm's result in bfloat16": (None, True),
    "eight bits, and LayerNorm's result": (in_eight_bits, True),
}


class Gelu(torch.autograd.Function):
    """GELU of h, any shape, whose gradient is dy times the derivative at h, which is computed in float32 at least and then rounded."""

    @staticmethod
    def forward(ctx, h, rounding):
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        slope = torch.ops.aten.gelu_backward(torch.ones_like(wide), wide)
        ctx.save_for_backward(rounding(slope) if rounding else slope)
        return F.gelu(h)

    @staticmethod
    def backward(ctx, dy):
        (slope,) = ctx.saved_tensors
        return (dy.to(slope.dtype) * slope).to(dy.dtype), None


class Norm(torch.autograd.Function):
    """LayerNorm of x (..., C) with a gain (C,) and no bias, both float32 or float64. Its gradient is made from the normalised rows or, with
    `from_result` unless a gain is too small for that, from what the result in bfloat16 says they are."""

    @staticmethod
    def forward(ctx, x, gain, from_result):
        y, mean, rstd = torch.native_layer_norm(x, gain.shape, gain, None, 1e-5)
        if from_result and gain.abs().min() >= LEAST_GAIN:
            normal = y.bfloat16().to(x.dtype) / gain
        else:
            normal = (x - mean) * rstd
        ctx.save_for_backward(normal, rstd, gain)
        return y

    @staticmethod
    def backward(ctx, dy):
        normal, rstd, gain = ctx.saved_tensors
        g = dy * gain
        dx = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) * rstd
        return dx, (dy * normal).flatten(0, -2).sum(0), None


def substitute(network: nn.Module, rounding, from_result: bool):
    """Puts the two functions into every GELU and LayerNorm of a model without biases, in place."""
    for module in network.modules():
        if isinstance(module, nn.GELU):
            module.forward = lambda h: Gelu.apply(h, rounding)
        elif isinstance(module, LayerNorm):
            module.forward = lambda x, gain=module.weight: Norm.apply(x, gain, from_result)


def gradients(network: GPT, batch, way: tuple | None) -> dict[str, torch.Tensor]:
    """Parameter -> gradient, float64, of the loss on batch (x, y): by bf16 autocast with the two functions; for None the plain model in float64."""
    network = copy.deepcopy(network)
    if way is None:
        network.double()
    else:
        substitute(network, *way)
    with torch.autocast("cpu", torch.bfloat16, enabled=way is not None):
        loss = network(*batch)[1]
    loss.backward()
    return {name: parameter.grad.double() for name, parameter in network.named_parameters()}


def measure(network: GPT, batch) -> dict:
    """{"error": median over parameters with nothing rounded by us, each of WAYS: {"median", each of NEAREST: mean, "largest" ratio, "of" what}}."""
    reference = gradients(network, batch, None)

    def errors(way: tuple) -> dict[str, float]:
        return {name: float((g - reference[name]).norm() / reference[name].norm()) for name, g in gradients(network, batch, way).items()}

    exact = errors((None, False))
    found = {"error": median(exact.values())}
    for name, way in WAYS.items():
        ratios = {parameter: error / exact[parameter] for parameter, error in errors(way).items()}
        most = max(ratios, key=ratios.get)
        means = {kind: mean(ratio for parameter, ratio in ratios.items() if part in parameter) for kind, part in NEAREST.items()}
        found[name] = {"median": median(ratios.values()), **means, "largest": ratios[most], "of": most}
    return found


def trained(program: Program, seed: int) -> GPT:
    """The program's model after all of its steps, in model.py's own modules, without a gradient."""
    program.model.init_weights(seed)
    reset(program.optimizer)
    for step in range(program.config.max_iters):
        program.step(seed, step)
    network = GPT(program.model.config)
    network.load_state_dict(program.model.state_dict())
    return network


def table(found: dict) -> str:
    """The contents of rounding.json as Markdown."""
    rows, levels, made = [], [], found["provenance"]
    for arm, entry in found["arms"].items():
        runs = entry["seeds"]
        for way in WAYS:
            growth = [[100 * (run[way][what] - 1) for run in runs.values()] for what in ("median", *NEAREST)]
            grows = [estimate(paired_difference([0.0] * len(runs), one), "+.1f") for one in growth]
            seed, most = max(((seed, run[way]) for seed, run in runs.items()), key=lambda pair: pair[1]["largest"])
            rows.append([arm, way, len(runs), *grows, f"{most['largest']:.2f}: `{most['of'].removeprefix('transformer.')}`, seed {seed}"])
        levels.append(f"{100 * mean(run['error'] for run in runs.values()):.2f} % ({arm})")
    headers = ["arm", "kept for the way back", "seeds", "all parameters, %", "MLPs' first matrices, %", "LayerNorm's gains, %", "largest ratio"]
    return f"""{tabulate(rows, headers, tablefmt="github", disable_numparse=True)}

By how much errors grow: of all parameters the median, of some the mean; then the mean over seeds with its 95 % t interval. The largest ratio is that
of all parameters and seeds. The errors that grow are {" and ".join(levels)}, median over parameters, mean over seeds.

Made by `{made["command"]}` with torch {made["torch"]} on a CPU: {made["parameters"]:,} parameters, {made["data"]}, train.bin's sha256
{made["data_sha256"]["train"][:12]}."""


def main(config: RoundingConfig):
    """Raises InputError."""
    prepare_if_missing(config.dataset)
    meta, folder, arms = read_meta(config.dataset)[1], Path(config.out_dir), {}
    if meta["kind"] != "tokens":
        raise InputError(f"--dataset={config.dataset} has {meta['kind']}: this is about a model of text")
    folder.mkdir(parents=True, exist_ok=True)
    changes = SIZES | {"max_iters": config.steps, "warmup_iters": config.steps // 10, "dataset": config.dataset}
    for arm, diffusion in ARMS.items():
        options = [(key, str(value)) for key, value in (changes | {"diffusion": diffusion}).items()]
        program = build_program(build(TrainConfig, [str(ROOT / "config" / "quick.py")], options), find_place("cpu", "bfloat16", distributed=False))
        arms[arm] = {"seeds": {}}
        for seed in range(1, config.seeds + 1):
            batch = program.data.batch(torch.from_numpy(program.data.draw(seed, config.steps, config.sequences)))  # of the step that would come next
            arms[arm]["seeds"][str(seed)] = measure(trained(program, seed), batch)
            print(f"{arm}, seed {seed} of {config.seeds}", file=sys.stderr)
    made = {"command": shlex.join(["python", "studies/rounding.py", *sys.argv[1:]]), "config": asdict(config), "torch": torch.__version__}
    made |= {"parameters": program.model.num_params(), "data": meta.get("source", config.dataset), "data_sha256": program.data.checksum}
    found = {"arms": arms, "provenance": made}
    write_table(folder, "rounding", found, table(found))


if __name__ == "__main__":
    with one_line_errors():
        main(command_line)
