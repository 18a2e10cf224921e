"""Attention over short sequences against the stored matrix in float64: on a GPU where there is one, else in Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
import dropout  # noqa: E402
import fused  # noqa: E402
import fused_attention  # noqa: E402
import fused_products  # noqa: E402
from fused_attention import PackedAttention  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def mask(qkv, seed, site, p, H):
    """What attention's dropout keeps of A, bool (B, H, T, T); None without dropout."""
    B, T, _ = qkv.shape
    return dropout.kept(seed, site, p, B * H * T, T).view(B, H, T, T) if p else None


def exactly(qkv, kept, factor, H, alpha, lam, heads, causal):
    """The same by its formula, in the dtype given."""
    B, T, C3 = qkv.shape
    q, k, v = (part.view(B, T, H, -1).transpose(1, 2) for part in qkv.split(C3 // 3, dim=2))
    logits = q @ k.mT / q.size(-1) ** 0.5
    if causal:
        logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1), float("-inf"))
    a = logits.softmax(dim=-1)
    y = (a if kept is None else a * kept * factor) @ v
    y = torch.cat((y[:, : H - heads], lam * (y - alpha * v)[:, H - heads :]), dim=1)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "T, d",
    [(1, 16), (5, 16), (40, 128), (64, 64), (70, 32), (129, 128), (256, 64)] if CUDA else [(1, 16), (5, 16), (9, 128), (64, 64), (70, 16), (130, 32)],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("heads, alpha, lam", [(0, 1.0, 1.0), (3, 1.0, 1.0), (2, 0.5, 1.5), (2, 1.0, 0.0)])
@pytest.mark.parametrize("ahead", [True, False])
def test_values_and_gradients_are_those_of_the_stored_matrix(monkeypatch, T, d, causal, p, heads, alpha, lam, ahead):
    """The way back of one block by programs of three heads each, which load ahead, and by one of its own for each, as where there is no room."""
    if ahead:
        monkeypatch.setattr(fused_attention, "processors", lambda device: 1)
    elif T > 64 or d > 64:
        pytest.skip("there is no loading ahead")
    else:
        monkeypatch.setattr(fused_attention, "_ahead", lambda device, d: False)
    torch.manual_seed(T)
    B, H = 2, 3
    dtype = torch.bfloat16 if CUDA else torch.float32  # the interpreter truncates to bfloat16; here its arithmetic is checked, on a GPU the rounding
    qkv = (1.5 * torch.randn(B, T, 3 * H * d, device=DEVICE)).to(dtype).requires_grad_()
    seed = torch.randint(2**62, (1,), device=DEVICE) if p else None
    direction = torch.randn(B, T, H * d, device=DEVICE).to(dtype)
    form = H, alpha, lam, heads, causal
    y = PackedAttention.apply(qkv, seed, 7, p, *form)
    y.backward(direction)
    exact = qkv.detach().double().requires_grad_()
    reference = exactly(exact, mask(qkv, seed, 7, p, H), 1 / (1 - p), *form)
    reference.backward(direction.double())
    bound = 2**-6 if CUDA else 2e-6
    for ours, theirs in ((y, reference), (qkv.grad, exact.grad)):
        assert ours.dtype == dtype and ours.isfinite().all()
        error = float((ours.double() - theirs).abs().max())
        assert error <= bound * max(float(theirs.abs().max()), float(direction.abs().max()) if T == 1 else 0), error


HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: Triton's interpreter knows no Gluon")


def draw(B, T, H, dtype):
    torch.manual_seed(T)
    qkv = torch.randn(B, T, 3, H, 64, device=DEVICE)
    qkv[:, :, 0] *= 2  # logits of some size
    return qkv.flatten(2).to(dtype).requires_grad_(), torch.randn(B, T, 64 * H, device=DEVICE).to(dtype)


@needs_hopper
@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("B, T, H", [(1, 384, 2), (2, 1024, 3), (33, 512, 12)])  # the last: several tiles for each program
@pytest.mark.parametrize("heads, alpha, lam", [(0, 1.0, 1.0), (-1, 1.0, 1.0), (1, 0.5, 1.5), (2, 1.0, 0.0)])
def test_long_sequences(B, T, H, dtype, rounding, heads, alpha, lam):
    """Against the stored matrix in float64; and again, to the bit."""
    qkv, direction = draw(B, T, H, dtype)
    form = H, alpha, lam, heads % (H + 1), True
    assert fused_attention.applies(T, 64, True, 0.0, fused_attention.takes_long(qkv.device, dtype, heads != 0))
    y = PackedAttention.apply(qkv, None, 0, 0.0, *form)
    (y * direction).sum().backward()  # not y.backward(direction): in a thread of its own, a launch by TMA may not be the first
    exact = qkv.detach().double().requires_grad_()
    reference = exactly(exact, None, 1.0, *form)
    reference.backward(direction.double())
    for ours, theirs in ((y, reference), *zip(qkv.grad.split(64 * H, -1), exact.grad.split(64 * H, -1))):
        assert ours.dtype == dtype and ours.isfinite().all()
        error, size = ours.double() - theirs, theirs.double()
        assert float(error.norm()) <= rounding * float(size.norm()) and float(error.abs().max()) <= 2 * rounding * float(size.abs().max())
    first, qkv.grad = qkv.grad, None
    again = PackedAttention.apply(qkv, None, 0, 0.0, *form)
    (again * direction).sum().backward()
    assert torch.equal(y, again) and torch.equal(first, qkv.grad)


@needs_hopper
def test_what_long_diffusing_heads_give_is_the_pass_to_the_bit():
    qkv, _ = draw(2, 512, 4, torch.bfloat16)
    y, out, lse = fused_attention.attend(qkv.detach(), None, 0, 0.0, 4, 0.7, 1.3, 3, True)
    kept, nothing, sums = fused_attention.attend(qkv.detach(), None, 0, 0.0, 4, 1.0, 1.0, 0, True)
    assert torch.equal(kept, y) and torch.equal(sums, lse) and nothing.numel() == 0
    y, v = (part.view(2, 512, 4, 64).transpose(1, 2) for part in (y, qkv.detach()[..., 512:]))
    assert torch.equal(out, fused.subtract(y, v, 0.7, 1.3, 3).transpose(1, 2).flatten(2))


@needs_hopper
def test_no_long_query_sees_the_future():
    qkv, direction = draw(1, 512, 2, torch.bfloat16)
    y = PackedAttention.apply(qkv, None, 0, 0.0, 2, 1.0, 1.0, 1, True)
    (y * direction)[:, :300].sum().backward()
    assert not qkv.grad[:, 300:].any() and qkv.grad[:, :300].any()
    other = qkv.detach().clone()
    other[:, 300:] = 7
    assert torch.equal(PackedAttention.apply(other, None, 0, 0.0, 2, 1.0, 1.0, 1, True)[:, :300], y[:, :300])


@pytest.mark.parametrize("arm", [{}, {"diffusion": True}, {"diffusion": True, "diffusion_heads": (1,), "diffusion_alpha": 0.5}])
@pytest.mark.parametrize(
    "on_gpu", [pytest.param(False, marks=pytest.mark.skipif(HOPPER, reason="for elsewhere")), pytest.param(True, marks=needs_hopper)]
)
def test_a_network_of_long_sequences(monkeypatch, arm, on_gpu):
    """Takes them where Hopper's kernels are; its gradients are those of the model in float64 up to the rounding."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=384, vocab_size=40, n_layer=2, n_head=2, n_embd=128, **arm)
    network, exact, calls = GPT(config).to(DEVICE), GPT(config).to(DEVICE).double(), []
    fused.accelerate(network, torch.bfloat16 if on_gpu else torch.float32)
    kept = fused_attention._backward_long
    monkeypatch.setattr(fused_attention, "_backward_long", lambda *given, **most: calls.append((given[0].dtype, *most)) or kept(*given, **most))
    idx = torch.randint(40, (3, 384), device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=on_gpu):
        loss = network(idx, idx)[1]
        loss.backward()
    reference = exact(idx, idx)[1]
    reference.backward()
    assert [call for call in calls if len(call) == 1] == [(torch.bfloat16,)] * (2 * on_gpu)  # beside the trial's
    assert abs(float(loss) - float(reference)) < (2e-3 if on_gpu else 1e-5)
    for (name, ours), theirs in zip(network.named_parameters(), exact.parameters(), strict=True):
        error = float((ours.grad - theirs.grad).norm() / theirs.grad.norm())
        assert error < (0.02 if on_gpu else 1e-4), (name, error)


@pytest.mark.skipif(HOPPER, reason="for elsewhere")
def test_long_sequences_are_the_framework_s_elsewhere():
    assert not fused_attention.takes_long(torch.device(DEVICE), torch.bfloat16, True)
    qkv, direction = draw(1, 320, 1, torch.float32)
    y = PackedAttention.apply(qkv, None, 0, 0.0, 1, 1.0, 1.0, 1, True)  # asked for all the same, it is by the kernels for short ones
    assert torch.allclose(y, exactly(qkv, None, 1.0, 1, 1.0, 1.0, 1, True), atol=1e-5)


@pytest.mark.skipif(CUDA, reason="with the kernels for short sequences in the place of Hopper's, in the interpreter")
def test_long_sequences_in_float32_are_the_framework_s(monkeypatch):
    """As without autocast; and none in half precision with taps, whose gradients come from elsewhere."""
    network = GPT(GPTConfig(block_size=384, vocab_size=8, n_layer=1, n_head=1, n_embd=64)).to(DEVICE)
    fused.accelerate(network, torch.float32)
    attention, calls = network.transformer.h[0].attn, []
    attention.long = True
    monkeypatch.setattr(fused_attention, "_long", lambda *_: True)
    short = fused_attention._forward
    monkeypatch.setattr(fused_attention, "_forward_long", lambda qkv, *form: calls.append(1) or short(qkv, None, 0, 0.0, *form, True))
    x = torch.randn(1, 384, 64, device=DEVICE)
    reference = attention.branch(x)
    assert not calls
    monkeypatch.setattr(fused, "_half", lambda x: torch.bfloat16)
    ours = attention.branch(x)
    assert calls == [1] and float((ours - reference).detach().abs().max()) < 1e-5
    attention.branch(x, taps=[])
    assert calls == [1]


@pytest.mark.parametrize("wrong", ["", "y", "out", "lse", "dqkv", "raises"])
@pytest.mark.parametrize("diffuses", [False, True])
def test_long_sequences_are_the_framework_s_where_the_trial_fails(monkeypatch, capsys, wrong, diffuses):
    """With the kernels for short sequences in the place of Hopper's, in the interpreter on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device, made, tried = type("Device", (), {"type": "cuda"})(), torch.arange, []
    monkeypatch.setattr(torch, "arange", lambda n, device: made(n, device=DEVICE, dtype=torch.float32))

    def off(name, x):
        """x with one block of it off, if it is the wrong one."""
        if name == wrong:
            x[..., 64:128, :] += 0.1
        return x

    def forward(qkv, *form, most):
        tried.append((form[3], most))
        if wrong == "raises":
            raise RuntimeError("no such instruction\nand more")
        y, out, lse = fused_attention._forward(qkv, None, 0, 0.0, *form, True)
        return off("y", y), off("out", out) if form[3] else out, off("lse", lse[..., None])[..., 0]

    def backward(dout, qkv, y, lse, *form, most):
        return off("dqkv", fused_attention._backward(dout, qkv, y, lse, None, 0, 0.0, *form, True))

    monkeypatch.setattr(fused_attention, "_forward_long", forward)
    monkeypatch.setattr(fused_attention, "_backward_long", backward)
    fails = bool(wrong) and (wrong != "out" or diffuses)
    assert fused_attention.takes_long.__wrapped__(device, torch.float16, diffuses) is not fails
    assert tried == [(int(diffuses), 2)]
    said = capsys.readouterr().out
    assert said.count("\n") == fails
    assert not fails or ("RuntimeError: no such instruction" if wrong == "raises" else "its results are wrong") in said


@pytest.mark.parametrize(
    "changes, long",
    [({}, True), ({"block_size": 320}, False), ({"block_size": 256}, False), ({"dropout": 0.1}, False), ({"n_head": 4}, False)],
)
def test_which_networks_take_long_sequences(monkeypatch, changes, long):
    """And whether the trial is one with diffusing heads, by layer; bench.py's arm `apart` has none."""
    import bench

    tried = []
    monkeypatch.setattr(fused_attention, "takes_long", lambda device, dtype, diffuses: tried.append(diffuses) or True)
    config = {"block_size": 384, "vocab_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 128, "diffusion": True, "diffusion_heads": (0, 2)} | changes

    def build(*_):
        network = GPT(GPTConfig(**config))
        fused.accelerate(network, torch.bfloat16)
        return [block.attn.long for block in network.transformer.h]

    assert build() == [long] * 2 and tried == [False, True] * long
    monkeypatch.setattr(bench, "build", build)
    place = type("Place", (), {"device": torch.device("cuda")})()
    kept = fused_products.applies, fused_attention.takes_long
    assert bench.apart(None, place, None) == [False, False]
    assert (fused_products.applies, fused_attention.takes_long) == kept


@needs_hopper
def test_the_compiler_is_told_the_truth_about_long_sequences():
    qkv, direction = draw(1, 384, 2, torch.bfloat16)
    qkv, checks = qkv.detach(), ("test_schema", "test_faketensor")
    for heads in (0, 1):
        torch.library.opcheck(fused_attention.attend, (qkv, None, 0, 0.0, 2, 0.5, 1.5, heads, True), test_utils=checks)
        y, _, lse = fused_attention.attend(qkv, None, 0, 0.0, 2, 0.5, 1.5, heads, True)
        given = direction, qkv, y, lse, None, 0, 0.0, 2, 0.5, 1.5, heads, True
        torch.library.opcheck(fused_attention.attend_backward, given, test_utils=checks)


@pytest.mark.parametrize("T, heads", [(64, 0), (64, 1), (65, 0), (65, 1)])
def test_what_is_kept_for_the_way_back(T, heads):
    """Within one block neither y nor, where heads diffuse, a place for it; then y may be anything."""
    qkv, dout, form = torch.randn(1, T, 96, device=DEVICE), torch.randn(1, T, 32, device=DEVICE), (2, 0.5, 1.5, heads, True)
    y, out, lse = fused_attention.attend(qkv, None, 0, 0.0, *form)
    whole = T == 64
    assert (y.numel() == 0) == (whole and heads > 0) and (out.numel() == 0) == (heads == 0)
    PackedAttention.apply(qkv.requires_grad_(), None, 0, 0.0, *form).backward(dout)
    given = None if whole else y
    assert torch.equal(fused_attention.attend_backward(dout, qkv.detach(), given, lse, None, 0, 0.0, *form), qkv.grad)


def test_which_sequences_it_takes():
    assert fused_attention.applies(256, 64, False, 0.1, False) and not fused_attention.applies(64, 8, True, 0.0, True)
    assert fused_attention.applies(384, 64, True, 0.0, True)
    for reason in (
        (384, 64, True, 0.0, False),
        (384, 64, True, 0.1, True),
        (384, 64, False, 0.0, True),
        (384, 128, True, 0.0, True),
        (320, 64, True, 0.0, True),
    ):
        assert not fused_attention.applies(*reason)
