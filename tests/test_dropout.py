"""dropout.py against Philox in numpy, and the laws of its decisions: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
import dropout  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def seeded(number: int):
    return torch.tensor([number], device=DEVICE)


def philox(seed: int, call, site: int):
    """Philox4x32-7 of the counters (call, site, 0, 0), (n,) -> (n, 4), from its definition (Salmon et al. 2011)."""
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    a, b, c, d = call.astype(np.uint64), np.full(len(call), site, np.uint64), *np.zeros((2, len(call)), np.uint64)
    first, second = np.uint64(seed & (2**32 - 1)), np.uint64(seed >> 32)
    for _ in range(7):
        x, y = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (y >> half) ^ b ^ first, y & low, (x >> half) ^ d ^ second, x & low
        first, second = (first + np.uint64(0x9E3779B9)) & low, (second + np.uint64(0xBB67AE85)) & low
    return np.stack((a, b, c, d), axis=1)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("seed, site", [(0, 0), (2**62 - 3, 1), (123456789 << 20, 29)])
@pytest.mark.parametrize("rows, C", [(3, 8), (37, 384), (5, 13), (70, 70), (1, 1)])
def test_every_element_has_the_decision_that_the_mapping_names(product, seed, site, rows, C):
    calls = -(-C // 8)
    words = philox(seed, np.arange(rows * calls), site)
    halves = np.stack((words & np.uint64(0xFFFF), words >> np.uint64(16)), axis=2).reshape(rows, 8 * calls)[:, :C]
    for p in (0.0, 0.2, 0.5):
        found = dropout.kept(seeded(seed), site, p, rows, C, product)
        assert np.array_equal(found.cpu().numpy(), halves >= round(p * 65536))


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_the_share_kept_and_independence(p):
    n, seed = (400, 104), seeded(2507)
    masks = [dropout.kept(seed, site, p, *n) for site in range(3)] + [dropout.kept(seed + 1, 0, p, *n), dropout.kept(seed + 2**32, 0, p, *n)]
    pairs = [(one, other) for i, one in enumerate(masks) for other in masks[:i]]
    one = masks[0]
    pairs += [(one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one[:, 2:], one[:, :-2]), (one[:, 8:], one[:, :-8])]
    for mask in masks:
        assert abs(float(mask.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    for one, other in pairs:
        both, usual = float((one & other).float().mean()), (1 - p) ** 2
        assert abs(both - usual) < 5 * (usual * (1 - usual) / one.numel()) ** 0.5 and not torch.equal(one, other)
    assert torch.equal(dropout.kept(seed, 0, p, *n), masks[0])
    assert torch.equal(dropout.kept(seed, 0, p, 7, n[1]), masks[0][:7]), "an element's decision does not depend on how many rows there are"


def test_a_seed_is_drawn_by_the_generator_and_anew():
    x = torch.randn(8, device=DEVICE)
    torch.manual_seed(1)
    first, second = dropout.dropout_seed(x), dropout.dropout_seed(x)
    torch.manual_seed(1)
    assert first.dtype == torch.int64 and first.shape == (1,) and first.device == x.device and int(first) != int(second)
    assert torch.equal(dropout.dropout_seed(x), first)
    torch.library.opcheck(dropout.dropout_seed, (x,), test_utils=("test_schema",))


def test_the_compiler_draws_every_seed_by_itself():
    def seeds(x, y):
        return dropout.dropout_seed(x), dropout.dropout_seed(y)

    compiled = torch.compile(seeds, backend="aot_eager", fullgraph=True)
    found = [int(seed) for function in (seeds, compiled, compiled) for seed in function(*torch.randn(2, 8, device=DEVICE))]
    assert len(set(found)) == len(found)
