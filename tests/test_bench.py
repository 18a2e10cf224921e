"""bench.py: the arms take turns, the figures follow from the clock, and each benchmark runs the program of train.py."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench
from bench import BenchConfig, spread, take_turns
from configurator import InputError
from dataset import ROOT, Tokens


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


def test_the_profile_tells_products_and_attention_apart(tokens_dir, tmp_path, capsys):
    out = tmp_path / "figures.json"
    bench.main(BenchConfig(arms="A", dataset=str(tokens_dir), rounds=1, steps=1, device="cpu", profile=True, out=str(out)))
    (row,) = json.loads(out.read_text())["rows"]
    kernels = row["kernels_ms"]
    assert 0 < kernels["attention"] < kernels["matrix products"] < kernels["all"]
    assert f"ms a step: attention {kernels['attention']:.3f}, matrix products" in capsys.readouterr().out


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
