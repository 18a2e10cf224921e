"""studies/rounding.py: its rounding is the kernels', and what is not rounded is the framework's."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from configurator import InputError, configure
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "studies"))  # as it is for a script of that directory

import rounding


def away(ours, reference) -> float:
    """|ours - reference| / |reference|."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def gradients_of(function, *tensors, dy):
    """Gradients of function(*tensors) for a gradient dy of its result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, dy)


def test_eight_bits_are_those_of_the_kernel():
    triton = pytest.importorskip("triton")
    from test_fused_products import DEVICE, _there_and_back

    import fused_products

    h = torch.linspace(-6, 6, 20001, device=DEVICE)
    byte, theirs = torch.empty_like(h, dtype=torch.uint8), torch.empty_like(h)
    _there_and_back[(triton.cdiv(len(h), 1024),)](h, byte, theirs, len(h), BLOCK=1024)
    (slope,) = gradients_of(F.gelu, h, dy=torch.ones_like(h))
    tie = ((200 * slope.double()) % 1 - 0.5).abs() < 1e-4  # the kernel's formula is off by 1.5e-7: either step is right
    assert torch.equal(rounding.in_eight_bits(slope)[~tie], theirs[~tie]) and tie.double().mean() < 1e-3
    steps = fused_products.slope_of(torch.arange(253, dtype=torch.uint8))
    assert torch.equal(rounding.in_eight_bits(steps + 0.0024), steps) and torch.equal(rounding.in_eight_bits(steps - 0.0024), steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gelu_with_nothing_rounded_is_the_frameworks(dtype):
    torch.manual_seed(0)
    h, dy = (3 * torch.randn(2, 5000)).to(dtype)
    assert torch.equal(rounding.Gelu.apply(h, None), F.gelu(h))
    (exact,), (ours,) = gradients_of(F.gelu, h, dy=dy), gradients_of(lambda h: rounding.Gelu.apply(h, None), h, dy=dy)
    assert torch.equal(ours, exact)


def test_gelu_with_a_rounded_derivative():
    torch.manual_seed(0)
    h, dy = (3 * torch.randn(2, 5000)).bfloat16()
    slope = 0.5 * torch.erfc(-h.double() / 2**0.5) + h.double() * torch.exp(-(h.double() ** 2) / 2) / (2 * math.pi) ** 0.5
    known = dict(zip(rounding.WAYS, ((slope * 200).round() / 200, slope.half(), slope.bfloat16())))
    found = {way: gradients_of(lambda h: rounding.Gelu.apply(h, rounding.WAYS[way][0]), h, dy=dy)[0] for way in known}
    middle = h.abs() < 2.5  # in the left tail float32's derivative has few digits left
    for way, ours in found.items():
        same = ours == (dy.double() * known[way].double()).bfloat16()
        assert same[middle].double().mean() > 0.998, way  # all but where float32 and float64 are on two sides of a tie
    assert len({tuple(ours.tolist()) for ours in found.values()}) == 3


def norm_of(from_result):
    return lambda x, gain: rounding.Norm.apply(x, gain, from_result)


def test_norm_with_nothing_rounded_is_the_frameworks():
    torch.manual_seed(0)
    x, gain, dy = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 3, 40), (40,), (7, 3, 40)))
    assert torch.equal(rounding.Norm.apply(x, gain, True), F.layer_norm(x, (40,), gain))
    for ours, exact in zip(gradients_of(norm_of(False), x, gain, dy=dy), gradients_of(lambda x, gain: F.layer_norm(x, (40,), gain), x, gain, dy=dy)):
        assert away(ours, exact) < 1e-12


def test_norm_from_its_result_is_the_kernels():
    pytest.importorskip("triton")
    from test_fused import DEVICE

    import fused_norm

    assert rounding.LEAST_GAIN == fused_norm.LEAST_GAIN.value
    torch.manual_seed(0)
    x, gain, dy = torch.randn(50, 40, device=DEVICE) + 1, torch.randn(40, device=DEVICE), torch.randn(50, 40, device=DEVICE).bfloat16()
    gain += gain.sign() / 8
    for small, rounds in ((2.0**-10, True), (-(2.0**-11), False)):
        gain[3] = small
        _, mean, rstd = torch.native_layer_norm(x, (40,), gain, None, 1e-5)
        y = F.layer_norm(x, (40,), gain).bfloat16()  # Triton's interpreter cuts off where a GPU rounds
        form = fused_norm.serves(y, None), None, 0, 0.0, gain, False, mean.flatten(), rstd.flatten()
        dx, _, dgain, _ = fused_norm.add_norm_backward(None, dy, x, *form)
        ours, plain = (gradients_of(norm_of(from_result), x, gain, dy=dy.float()) for from_result in (True, False))
        for kernel, one, exact in zip((dx, dgain), ours, plain):
            assert away(one, kernel) < 2e-6
            assert away(exact, kernel) > 2e-4 if rounds else torch.equal(one, exact)


@pytest.fixture
def small():
    """A model with gains that are not 1, whose gradients are not those of its start, and a batch."""
    torch.manual_seed(0)
    network = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, diffusion=True), seed=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network, torch.randint(11, (2, 8, 16)).unbind()


def test_gradients_with_nothing_rounded_are_those_of_the_plain_model(small):
    """By autocast, where LayerNorm's may differ in float32's last bits; and in float64, where the two functions make no difference either."""
    network, batch = small
    half, whole = rounding.gradients(network, batch, (None, False)), rounding.gradients(network, batch, None)
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(*batch)[1]
    loss.backward()
    assert half.keys() == whole.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        assert away(half[name], parameter.grad) < 0.2 * away(half[name], whole[name]), name  # a bit of float32 may tip one of bfloat16
    network.zero_grad()
    network.double()
    rounding.substitute(network, None, False)
    network(*batch)[1].backward()
    for name, parameter in network.named_parameters():
        assert away(parameter.grad, whole[name]) < 1e-10, name  # both with the same cross-entropy in float32


def test_ratios_are_of_errors_against_float64(small, monkeypatch):
    """With nothing rounded all are 1. A derivative of 0 takes the first matrix of every MLP its gradient, an error of 1, and what is behind the last
    MLP has the gradient that it had."""
    network, batch = small
    ways = {"none": (None, False), "no derivative": (torch.zeros_like, False), "both": (rounding.in_eight_bits, True)}
    monkeypatch.setattr(rounding, "WAYS", ways)
    found = rounding.measure(network, batch)
    assert (found["none"]["median"], found["none"]["largest"]) == (1.0, 1.0) and 1e-4 < found["error"] < 0.1
    assert 0.5 < found["both"]["median"] < 1.5 and found["both"]["largest"] > 1
    reference, exact, without = (rounding.gradients(network, batch, way) for way in (None, ways["none"], ways["no derivative"]))
    errors = {name: (away(exact[name], g), away(without[name], g)) for name, g in reference.items()}
    assert all(error[1] == 1 for name, error in errors.items() if "c_fc" in name)
    ratios = {name: after / before for name, (before, after) in errors.items()}
    most = max(ratios, key=ratios.get)
    assert found["no derivative"]["of"] == most and found["no derivative"]["largest"] == pytest.approx(ratios[most])
    assert len(ratios) == 15 and found["no derivative"]["median"] == pytest.approx(sorted(ratios.values())[7])
    matrices = [ratios[f"transformer.h.{layer}.mlp.c_fc.weight"] for layer in (0, 1)]
    gains = [ratio for name, ratio in ratios.items() if re.search(r"\.ln_[12f]\.weight$", name)]
    assert found["no derivative"]["first matrices"] == pytest.approx(sum(matrices) / 2)
    assert len(gains) == 5 and found["no derivative"]["gains"] == pytest.approx(sum(gains) / 5)
    assert ratios["transformer.ln_f.weight"] == 1.0


def test_rounding_by_its_command(tmp_path, tokens_dir, capsys, monkeypatch):
    monkeypatch.setattr(rounding, "SIZES", {"n_layer": 1, "n_head": 2, "n_embd": 16})
    arguments = [f"--out_dir={tmp_path / 'new'}", f"--dataset={tokens_dir}", "--steps=3", "--sequences=2"]
    rounding.main(configure(rounding.RoundingConfig, [*arguments, "--seeds=2"]))
    found, text = json.loads((tmp_path / "new" / "rounding.json").read_text()), (tmp_path / "new" / "rounding.md").read_text()
    assert capsys.readouterr().out.startswith(text) and text == rounding.table(found) + "\n"
    vocabulary = json.loads((tokens_dir / "meta.json").read_text())["vocab_size"]
    assert found["provenance"]["parameters"] == 12 * 16 * 16 + (vocabulary + 3) * 16
    errors = {run["error"] for arm in ("A", "A − I") for run in found["arms"][arm]["seeds"].values()}
    assert len(errors) == 4 and all(1e-4 < error < 0.1 for error in errors)
    with pytest.raises(InputError, match=r"has 2 run\(s\) that this one lacks, as A on seed 2"):
        rounding.main(configure(rounding.RoundingConfig, [*arguments, "--seeds=1"]))
    assert json.loads((tmp_path / "new" / "rounding.json").read_text()) == found


def test_a_seed_is_trained_as_by_the_program(tokens_dir, tmp_path):
    """As train.train does it with the seed, and whatever was trained before."""
    from configurator import TrainConfig
    from place import find_place
    from train import build, train

    keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "max_iters": 5}
    config = TrainConfig(dataset=str(tokens_dir), eval_interval=5, warmup_iters=1, learning_rate=1e-2, **keys).check()
    program = build(config, find_place("cpu", "bfloat16", distributed=False))
    train(program, 2, tmp_path, save=False, quiet=True)
    expected = {name: tensor.clone() for name, tensor in program.model.state_dict().items()}
    rounding.trained(program, 1)
    found = rounding.trained(program, 2).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_table_of_growth():
    name, more = "GELU's derivative in eight bits", {"first matrices": 1.05, "gains": 0.99}
    run, other = (
        {way: {"median": middle, **more, "largest": most, "of": of} for way in rounding.WAYS} | {"error": error}
        for middle, most, of, error in ((1.01, 1.1, "transformer.h.0.ln_1.weight", 0.005), (1.03, 1.2, "lm_head.weight", 0.007))
    )
    made = {"command": "c", "torch": "t", "parameters": 1, "data": "d", "data_sha256": {"train": "0" * 64}}
    text = rounding.table({"arms": {"A": {"seeds": {"1": run, "2": other}}, "A − I": {"seeds": {"1": run}}}, "provenance": made})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| A")]
    # 2 +- t of one degree of freedom, 12.7, times sd / sqrt(2), which is 1; two equal numbers have no interval
    assert rows[0] == ["A", name, "2", "+2.0 (-10.7 to +14.7)", "+5.0", "-1.0", "1.20: `lm_head.weight`, seed 2"]
    assert rows[5] == ["A − I", name, "1", "+1.0", "+5.0", "-1.0", "1.10: `h.0.ln_1.weight`, seed 1"]
    assert "are 0.60 % (A) and 0.50 % (A − I)," in text


def test_rounding_names_what_it_cannot_use(tmp_path, monkeypatch):
    for key in ("seeds", "sequences"):
        with pytest.raises(InputError, match=f"--{key}=0 must be at least 1"):
            configure(rounding.RoundingConfig, [f"--{key}=0"])
    monkeypatch.setattr(rounding, "read_meta", lambda dataset: (tmp_path, {"kind": "pictures"}))
    monkeypatch.setattr(rounding, "prepare_if_missing", lambda dataset: None)
    with pytest.raises(InputError, match="--dataset=some has pictures: this is about a model of text"):
        rounding.main(rounding.RoundingConfig(dataset="some", out_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()
    ended = subprocess.run([sys.executable, str(ROOT / "studies" / "rounding.py"), "--seed=3"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "error: unknown key 'seed'; perhaps you meant 'seeds'\n")


def test_the_committed_table_of_rounding_is_its_figures():
    folder = ROOT / "results" / "rounding"
    assert (folder / "rounding.md").read_text() == rounding.table(json.loads((folder / "rounding.json").read_text())) + "\n"
