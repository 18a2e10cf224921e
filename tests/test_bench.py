"""bench.py: the arms take turns, the figures follow from the clock, and each benchmark runs the program of train.py."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import fused_cpu
from bench import BenchConfig, Products, spread, take_turns
from configurator import InputError
from dataset import ROOT, Tokens
from model import GPT, GPTConfig, ViT, ViTConfig


def test_arms_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    seconds = take_turns({"A": lambda: calls.append("A"), "B": lambda: calls.append("B")}, 3, torch.device("cpu"))
    assert calls == ["A", "B"] * 5  # two rounds of warm-up
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_rates_follow_from_the_clock(monkeypatch, tokens_dir, tmp_path, capsys):
    """With a clock that says 0.25 s for a turn of arm A and 0.5 s for one of A - I."""
    ticks = iter(np.cumsum([0, *[0.25, 0, 0.5, 0] * 10]))  # begin and end of each turn
    monkeypatch.setattr(bench, "CLOCK", lambda: float(next(ticks)))
    bench.main(BenchConfig(dataset=str(tokens_dir), rounds=4, steps=2, device="cpu", out=str(tmp_path / "figures.json")))
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["A", "A-I"]
    assert [row["ms"]["median"] for row in rows] == pytest.approx([125, 250])
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([12 * 64 / 0.125, 12 * 64 / 0.25])
    assert [row["ratio"]["median"] for row in rows] == pytest.approx([1, 2])
    parameters = 4 * (12 * 128**2 + 2 * 128) + 128 + 128 * 24  # four blocks, the last LayerNorm, the tied table of the fixture's tokens
    tokens = json.loads((tokens_dir / "meta.json").read_text())["vocab_size"]
    flops = 6 * (parameters + 128 * (tokens - 24)) + 12 * 4 * 128 * 64
    assert rows[0]["tflops"] == pytest.approx(12 * 64 / 0.125 * flops / 1e12)
    assert "| A-I   | 250.000" in capsys.readouterr().out


def test_spread_is_median_and_quartiles():
    assert spread([5, 1, 2, 3, 4]) == {"median": 3, "quartiles": [2, 4]}


def test_sampling_with_and_without_a_cache(tokens_dir, capsys):
    bench.main(BenchConfig(what="sample", arms="A-I", dataset=str(tokens_dir), rounds=1, tokens=3, device="cpu"))
    out = capsys.readouterr().out
    assert "| A-I, no cache |" in out and "| A-I           |" in out


@pytest.mark.parametrize(
    "keys, message",
    [({"what": "x"}, "--what=x"), ({"arms": "A,B"}, "'B' is none of"), ({"rounds": 0}, "--rounds=0"), ({"tokens": 5}, "is for --what=sample")],
)
def test_bad_options_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**keys).check()


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(InputError, match="apart is for CUDA"):
        bench.main(BenchConfig(model="quick", arms="A,apart", device="cpu").check())
    with pytest.raises(InputError, match="there is no config/nothing.py"):
        bench.main(BenchConfig(model="nothing"))


@pytest.mark.parametrize(("what", "arms", "names"), [("loader", "A", ["A, a fixed batch", "A"]), ("train", "plain,A", ["plain", "A"])])
def test_yardsticks_in_the_same_run(what, arms, names, tokens_dir, tmp_path):
    out = tmp_path / "figures.json"
    bench.main(BenchConfig(what=what, arms=arms, dataset=str(tokens_dir), rounds=2, steps=1, device="cpu", out=str(out)))
    rows = json.loads(out.read_text())["rows"]
    assert [row["arm"] for row in rows] == names and all(row["tokens_per_s"] > 0 for row in rows)


# ---------------------------------------------------------------------------------------------------------------------------------
# Products alone

SIZES = dict(n_layer=2, n_head=2, n_embd=16)
MODELS = {
    "text": lambda: GPT(GPTConfig(**SIZES, block_size=8, vocab_size=21)),
    "pictures": lambda: ViT(ViTConfig(**SIZES, image_size=8, patch_size=2, n_classes=5)),
}
KINDS = {"mm": "linear", "addmm": "linear", "bmm": "attention"}


class Recorded(TorchDispatchMode):
    """The matrix products that are called: kind, the three sizes in order of length (their orientation is a matter of taste), operands and result."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in KINDS:
            a, b = args[-2:]
            self.calls.append(((KINDS[name], a.shape[:-2], *sorted((*a.shape[-2:], b.size(-1)))), a, b, result))
        return result

    def sizes(self) -> list:
        return sorted(call[0] for call in self.calls)


def recorded(work) -> Recorded:
    with Recorded() as calls:
        work()
    return calls


def products_of(model, batch_size: int, attention: bool, dtype=torch.float32) -> Products:
    torch.manual_seed(0)
    return Products(model, batch_size, torch.device("cpu"), dtype, attention)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_products_are_those_of_a_training_step(name, attention):
    """As the model itself calls them, forward and backward, with attention's matrix stored."""
    model = MODELS[name]()
    if name == "text":
        x, y = torch.randint(21, (3, 8)), torch.randint(21, (3, 8))
    else:
        x, y = torch.randn(3, 3, 8, 8), torch.randint(5, (3,))
    with sdpa_kernel(SDPBackend.MATH):
        step = recorded(lambda: model(x, y)[1].backward()).sizes()
    expected = [sizes for sizes in step if attention or sizes[0] == "linear"]
    assert len(expected) == (2 * 4 * 3 + 3 + 2 * (name == "pictures") + 2 * 6 * attention)
    # attention's batch is (B, H) there and B H here, in torch's own flat form
    assert recorded(products_of(model, 3, attention)).sizes() == expected


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_products_of_unit_size(name, dtype):
    products = products_of(MODELS[name](), 4, True, dtype)
    products.forward, products.backward = products.forward + products.backward[::-1], []
    for product in products.forward:  # one after the other: a later one may overwrite a result
        ((sizes, a, b, result),) = recorded(product).calls
        assert result.shape == (*a.shape[:-1], b.size(-1)) and result.dtype == dtype
        exact = a.double() @ b.double()
        assert (result.double() - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-8) * max(1, exact.abs().max())
    sizes = {role: matrix.double().square().mean().sqrt() for (role, *_), matrix in products.matrices.items() if role in ("x", "dy", "logits")}
    assert len(sizes) == 2 + (name == "text") and all(0.7 < size < 1.4 for size in sizes.values())


def test_an_output_layer_in_pieces_has_the_whole_gradient(monkeypatch):
    model = MODELS["text"]()
    whole = products_of(model, 3, False)
    monkeypatch.setattr(bench, "CHUNK", 10)  # 24 rows: 10, 10 and 4
    pieces = products_of(model, 3, False)
    assert len(pieces.forward) == len(whole.forward) + 6 and pieces.flops == whole.flops
    for products in (whole, pieces):
        for product in products.forward:
            product()
    assert torch.equal(whole.matrices["x", (24, 16)], pieces.matrices["x", (24, 16)])  # the same draws
    for key in (("dW", (21, 16)), ("result", (24, 16))):
        torch.testing.assert_close(pieces.matrices[key], whole.matrices[key])


def test_pieces_are_those_of_the_training_step():
    assert bench.CHUNK == pytest.importorskip("fused").CHUNK


@pytest.mark.parametrize("model, rows", [("quick", 2 * 64), ("imagenet16", 2 * 64)])
def test_products_beside_the_step_they_belong_to(model, rows, tokens_dir, tmp_path, capsys):
    """The operations counted: six for each weight and row, but the patches' own gradient; 12 C T more for each layer and row with attention."""
    out, dataset = tmp_path / "figures.json", {"dataset": str(tokens_dir)} if model == "quick" else {}
    config = BenchConfig(model=model, arms="products,products+attention,A", batch_size=2, rounds=1, steps=1, device="cpu", out=str(out), **dataset)
    bench.main(config.check())
    without, attention, step = json.loads(out.read_text())["rows"]
    if model == "quick":
        flops = 6 * rows * (4 * 12 * 128**2 + 128 * json.loads((tokens_dir / "meta.json").read_text())["vocab_size"])
        more = 12 * 4 * 128 * 64 * rows
    else:
        flops = 6 * rows * 6 * 12 * 384**2 + 4 * rows * 12 * 384 + 6 * 2 * 384 * 200  # two pictures' classes
        more = 12 * 6 * 384 * 64 * rows
    for row, expected in ((without, flops), (attention, flops + more)):
        assert row["tflops"] * 1e12 * row["ms"]["median"] / 1e3 == pytest.approx(expected)
        assert row["tokens_per_s"] * row["ms"]["median"] / 1e3 == pytest.approx(rows)
    alone = "alone, by the library"
    modes = [f"products of linear layers {alone}", f"products of linear layers and attention {alone}", "eager"]
    assert [row["mode"] for row in (without, attention, step)] == modes
    assert f"products: {modes[0]}; products+attention: {modes[1]}; A: eager, 1 rounds" in capsys.readouterr().out


def test_micro_batches_repeat_the_products(tokens_dir, tmp_path):
    config = bench.recipe(BenchConfig(dataset=str(tokens_dir), device="cpu"), "products", tmp_path)
    data, place = Tokens(str(tokens_dir), config.block_size, "cpu"), bench.find_place("cpu", "float32")
    one, three = (bench.products(dataclasses.replace(config, gradient_accumulation_steps=n), place, data, False) for n in (1, 3))
    assert (three.tokens, three.flops) == (3 * one.tokens, 3 * one.flops) and one.tokens == 12 * 64
    calls = [recorded(lambda: program.step(0, 0)).sizes() for program in (one, three)]
    assert len(calls[0]) == 3 * (4 * 4 + 1) and calls[1] == sorted(3 * calls[0])


@pytest.mark.parametrize("arm", ["products", "products+attention", "plain"])
@pytest.mark.parametrize("what", ["eval", "sample", "loader"])
def test_parts_of_training_are_for_training(arm, what):
    command = [sys.executable, "bench.py", f"--what={what}", f"--arms=A,{arm}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"{arm} is a " in done.stderr and "for --what=train alone" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------------------


def test_the_profile_tells_products_and_attention_apart(tokens_dir, tmp_path, capsys):
    out = tmp_path / "figures.json"
    bench.main(BenchConfig(arms="plain,A", dataset=str(tokens_dir), rounds=1, steps=1, device="cpu", profile=True, out=str(out)))
    plain, ours = (row["kernels_ms"] for row in json.loads(out.read_text())["rows"])
    assert 0 < plain["attention"] < plain["matrix products"] < plain["all"] and plain["whole branches"] == 0
    if fused_cpu.library() is not None:  # attention and most products are inside
        assert ours["attention"] == 0 < ours["matrix products"] < ours["whole branches"] < ours["all"]
    assert f"ms a step: attention {plain['attention']:.3f}, matrix products" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, kind",
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void cudnn::fusion::compute_dot_do_o_specialized<true, 64>", "attention"),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x64_32x6_nt_align4>", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("_MLPBranchBackward", "whole branches"),
        ("autograd::engine::evaluate_function: _MLPBranchBackward", None),
        ("_cross_entropy", None),
        ("aten::add", None),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", None),
    ],
)
def test_kinds_of_kernels_by_their_names(name, kind):
    assert next((kind for kind, pattern in bench.KERNELS.items() if re.search(pattern, name)), None) == kind


def test_the_fixed_batch_is_the_first_one(tokens_dir):
    data = Tokens(str(tokens_dir), 16, "cpu")
    fixed = bench.FixedBatch(data)
    first = data.batch(torch.from_numpy(data.draw(0, 0, 4)))
    for step in (0, 5):
        x, y = fixed.batch(torch.from_numpy(fixed.draw(3, step, 4)))
        assert torch.equal(x, first[0]) and torch.equal(y, first[1])


def test_processes_together_against_one_alone(tokens_dir, tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "bench.py", "--what=ddp", "--arms=A"]
    command += [f"--dataset={tokens_dir}", "--rounds=2", "--steps=1", "--device=cpu", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    alone, together = json.loads(out.read_text())["rows"]
    assert (alone["arm"], together["arm"]) == ("A, alone", "A, 2 processes")
    assert together["tokens_per_s"] * together["ms"]["median"] == pytest.approx(2 * alone["tokens_per_s"] * alone["ms"]["median"])


def test_several_processes_need_torchrun():
    with pytest.raises(InputError, match="torchrun"):
        BenchConfig(what="ddp").check()


@pytest.mark.parametrize("content", ["mine", "[]", '{"arms": 1}'])
def test_a_file_that_is_no_benchmark_is_never_replaced(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(InputError, match="no figures of bench.py"):
        bench.check_out(tmp_path / "mine.json")
    with pytest.raises(InputError, match="is not there or cannot be written"):
        bench.check_out(tmp_path / "none" / "mine.json")
    with pytest.raises(InputError, match="no figures of bench.py"):
        bench.check_out(tmp_path)
    assert (tmp_path / "mine.json").read_text() == content


def test_one_process_or_several(monkeypatch):
    for what, world in (("train", "2"), ("sample", "2"), ("ddp", "1")):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(InputError, match=f"--what={what}: ddp is for several processes"):
            bench.BenchConfig(what=what).check()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="'A' is none of .* or is there twice"):
        bench.BenchConfig(arms="A,A").check()
