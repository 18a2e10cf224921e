"""Every kernel against float64: on a GPU where there is one, else in Triton's interpreter on the CPU (conftest.py)."""

import copy

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
CUDA = torch.cuda.is_available()
from test_fused_attention import exactly, mask  # noqa: E402

import dropout  # noqa: E402
import fused  # noqa: E402
import fused_attention  # noqa: E402
import fused_norm  # noqa: E402
import fused_products  # noqa: E402
import operators  # noqa: E402
from model import GPT, GPTConfig, ViT, ViTConfig, attention_matrix, attention_reference  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
HALF, ROUNDING = (torch.bfloat16, 2**-8) if CUDA else (torch.float16, 2**-10)  # the interpreter truncates to bfloat16, a GPU rounds
ARMS = [
    {},
    {"diffusion": True},
    {"diffusion": True, "diffusion_alpha": 0.5, "diffusion_lambda": 1.5},
    {"diffusion": True, "diffusion_heads": (1,), "diffusion_lambda": 0.5},
    {"diffusion": True, "diffusion_heads": (0, 2)},
]


def close(ours, reference, relative: float, absolute: float = 0.0):
    error = (ours.double() - reference.double()).abs()
    assert (error <= relative * reference.double().abs() + absolute).all(), float(error.max())


def normalised(x):
    """(..., C) with mean 0 and variance 1 in each row, and 1 / std (..., 1)."""
    rstd = (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
    return (x - x.mean(dim=-1, keepdim=True)) * rstd, rstd


def through_rounding(dy, gain, x):
    """Bounds of the errors of LN's gradients, of its gain (C,) and of x (..., C), where the normalised x was rounded to HALF, from dy, that of LN."""
    normal, rstd = normalised(x)
    error, g = ROUNDING * normal.abs() + 4e-5, dy * gain  # twice the rounding; half of float16's smallest step, 3e-8, over the least gain, 1 / 1024
    mean, doubt = (g * normal).mean(dim=-1, keepdim=True).abs(), (g.abs() * error).mean(dim=-1, keepdim=True)
    return (dy.abs() * error).flatten(0, -2).sum(dim=0), rstd * (error * mean + normal.abs() * doubt + error * doubt)


def test_gelu_and_its_derivative():
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([0.0, 1e-30, -100.0, 1e4]))).to(DEVICE).requires_grad_()
    y = fused_products.gelu(x)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    F.gelu(exact).sum().backward()
    close(y, F.gelu(exact), 2e-6, 1e-6)
    close(x.grad, exact.grad, 2e-6, 2e-6)
    half = x.detach().to(HALF)
    close(fused_products.gelu(half), F.gelu(half.double()), ROUNDING, 1e-6)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 96), (2, 384), (37, 768), (3, 1100)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("last", [True, False])
def test_residual_dropout_and_layer_norm(shape, bias, p, last):
    torch.manual_seed(0)
    x, branch = torch.randn(shape, device=DEVICE, requires_grad=True), torch.randn(shape, device=DEVICE, requires_grad=True)
    weight, offset = (torch.randn(shape[-1], device=DEVICE, requires_grad=True) for _ in range(2))
    seed = torch.randint(2**62, (1,), device=DEVICE) if p else None
    kept = dropout.kept(seed, 3, p, branch.numel() // shape[-1], shape[-1]).view(shape) if p else None
    directions = torch.randn(2, *shape, device=DEVICE)
    out, y = fused_norm.AddNorm.apply(x, branch, seed, 3, p, weight, offset if bias else None, last)
    ((0 if last else (out * directions[0]).sum()) + (y * directions[1]).sum()).backward()
    x64, branch64, weight64, offset64 = (t.detach().double().requires_grad_() for t in (x, branch, weight, offset))
    sum64 = x64 + (branch64 if kept is None else branch64 * kept / (1 - p))
    y64 = F.layer_norm(sum64, shape[-1:], weight64, offset64 if bias else None, 1e-5)
    ((0 if last else (sum64 * directions[0]).sum()) + (y64 * directions[1]).sum()).backward()
    pairs = [(out, sum64), (y, y64), (x.grad, x64.grad), (branch.grad, branch64.grad), (weight.grad, weight64.grad)]
    for ours, theirs in pairs + ([(offset.grad, offset64.grad)] if bias else []):
        close(ours, theirs, 2e-6, 2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("N, C", [(7, 24), (37, 768), (41, 384), (3, 1100)] + ([(32768, 384), (16384, 768)] if CUDA else []))
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "gains, from_y",
    [
        ("ordinary", True),
        (2.0**-10, True),
        (-(2.0**-10), True),
        (0.999 * 2.0**-10, False),
        (-0.999 * 2.0**-10, False),
        (0.0, False),
        ("with a bias", False),
    ],
)
def test_what_the_gradient_of_layer_norm_is_made_from(monkeypatch, N, C, p, gains, from_y):
    """Of a result in half precision, to its rounding, and the sum counts for nothing; of the sum, exactly, where a gain cannot be divided by. A
    program takes several tiles, one of which is not whole."""
    if N < 1000:
        monkeypatch.setattr(fused_norm, "processors", lambda device: 1)
    torch.manual_seed(0)
    x, branch, dout = torch.randn(N, C, device=DEVICE), torch.randn(N, C, device=DEVICE).to(HALF), torch.randn(N, C, device=DEVICE)
    gain = (0.01 + torch.rand(C, device=DEVICE)) * torch.randn(C, device=DEVICE).sign()
    dy, bias, site = torch.randn(N, C, device=DEVICE).to(HALF), gains == "with a bias", 3
    if isinstance(gains, float):
        gain[C // 2] = gains
    seed = torch.randint(2**62, (1,), device=DEVICE) if p else None
    kept = dropout.kept(seed, site, p, N, C) if p else torch.ones(N, C, dtype=torch.bool, device=DEVICE)
    offset = gain.clone() if bias else None
    out, y, mean, rstd = fused_norm.add_norm(x, branch, seed, site, p, gain, offset)
    assert y.dtype == HALF and (fused_norm.serves(y, offset) is None) == bias and fused_norm.serves(out, None) is None, "a bias, float32"
    exact, weight = out.double().requires_grad_(), gain.double().requires_grad_()
    F.layer_norm(exact, (C,), weight, None, 1e-5).backward(dy.double())
    dgain, dsum = through_rounding(dy.double(), gain.double(), exact.detach()) if from_y else (0.0, 0.0)

    def gradients(out, y):
        return fused_norm.add_norm_backward(dout, dy, out, y, seed, site, p, gain, bias, mean, rstd)

    dx, dbranch, dweight, _ = gradients(out, None if bias else y)
    whole = exact.grad + dout.double()
    assert ((dx - whole).abs() <= 4e-6 * whole.abs().max() + dsum).all()
    assert ((dweight - weight.grad).abs() <= 4e-6 * weight.grad.abs().max() + dgain).all()
    close(dbranch, dx.double() * kept / (1 - p), ROUNDING, 1e-6)
    if not bias:
        other = gradients(torch.full_like(out, float("nan")), y) if from_y else gradients(out, torch.full_like(y, float("nan")))
        assert torch.equal(dx, other[0]) and torch.equal(dbranch, other[1]) and torch.equal(dweight, other[2])


@pytest.mark.parametrize("B, T, C", [(3, 5, 24), (2, 7, 96), (1, 1, 40), (2, 17, 384)] + ([(512, 64, 384)] if CUDA else []))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("half", [False, True])
def test_the_mean_of_the_last_layer_norm(monkeypatch, B, T, C, bias, p, half):
    """At full size by all processors: sums over thousands of rows in a single program would be rounded more than is allowed here."""
    if B * T < 1000:
        monkeypatch.setattr(fused_norm, "processors", lambda device: 1)
    torch.manual_seed(0)
    x, branch = torch.randn(B, T, C, device=DEVICE, requires_grad=True), torch.randn(B, T, C, device=DEVICE)
    branch = branch.to(HALF if half else torch.float32).requires_grad_()
    weight, offset, direction = torch.randn(C, device=DEVICE), torch.randn(C, device=DEVICE), torch.randn(B, C, device=DEVICE)
    seed = torch.randint(2**62, (1,), device=DEVICE) if p else None
    leaves = x, branch, weight.requires_grad_(), *((offset.requires_grad_(),) if bias else ())
    y = fused_norm.AddNormMean.apply(x, branch, seed, 3, p, weight, offset if bias else None)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    dropped = exact[1] * dropout.kept(seed, 3, p, B * T, C).view(B, T, C) / (1 - p) if p else exact[1]
    reference = F.layer_norm(exact[0] + dropped, (C,), exact[2], exact[3] if bias else None, 1e-5).mean(dim=1)
    assert y.dtype == torch.float32
    close(y, reference, 2e-6, 2e-6)
    pairs = list(zip(torch.autograd.grad(y, leaves, direction), torch.autograd.grad(reference, exact, direction.double())))
    if not half:
        for ours, theirs in pairs:
            close(ours, theirs, 2e-6, 2e-6 * float(theirs.abs().max()))
        return
    dgain, dsum = through_rounding(direction.double()[:, None] / T, weight.detach().double(), (exact[0] + dropped).detach())
    for (ours, theirs), bound in zip(pairs, (dsum, dsum / (1 - p), dgain, 0.0)):
        rounded = ROUNDING * theirs.abs() + 1e-7 if ours.dtype == HALF else 0.0  # the branch's
        assert ((ours - theirs).abs() <= 2e-6 * theirs.abs().max() + bound + rounded).all()


@pytest.mark.parametrize("B, T, C", [(3, 5, 24), (2, 7, 96), (4, 16, 384)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.1, 0.4])
@pytest.mark.parametrize("placed", [True, False])
def test_embeddings_positions_dropout_and_layer_norm(B, T, C, bias, p, placed):
    """What comes in half precision gets its gradient in it; the stream and the positions' gradient are in float32."""
    torch.manual_seed(0)
    x = torch.randn(B, T, C, device=DEVICE).to(HALF).requires_grad_()
    positions, weight, offset = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((T, C), (C,), (C,)))
    seed, directions = torch.randint(2**62, (1,), device=DEVICE), torch.randn(2, B, T, C, device=DEVICE)
    kept = dropout.kept(seed, 3, p, B * T, C).view(B, T, C)
    out, y = fused_norm.StartNorm.apply(x, positions if placed else None, seed, 3, p, weight, offset if bias else None, HALF)
    assert (out.dtype, y.dtype) == (torch.float32, HALF)
    ((out * directions[0]).sum() + (y.float() * directions[1]).sum()).backward()
    x64, positions64, weight64, offset64 = (t.detach().double().requires_grad_() for t in (x, positions, weight, offset))
    out64 = (x64 + positions64 if placed else x64) * kept / (1 - p)
    y64 = F.layer_norm(out64, (C,), weight64, offset64 if bias else None, 1e-5)
    dy = directions[1].to(HALF).double()  # as it arrives
    ((out64 * directions[0]).sum() + (y64 * dy).sum()).backward()
    close(out, out64, 2e-6, 1e-6)
    close(y, y64, ROUNDING, 1e-5)
    dgain, dsum = (0.0, 0.0) if bias else through_rounding(dy, weight64.detach(), out64.detach())
    assert ((x.grad - x64.grad).abs() <= ROUNDING * x64.grad.abs() + 1e-6 + dsum * kept / (1 - p)).all()
    for ours, theirs, bound in ((weight, weight64, dgain), *(((offset, offset64, 0.0),) if bias else ())):
        assert ((ours.grad - theirs.grad).abs() <= 4e-6 * theirs.grad.abs().max() + bound).all()
    if placed:
        assert torch.equal(positions.grad, x.grad.float().sum(dim=0))
        close(positions.grad, positions64.grad, 0, B * ROUNDING * float(x64.grad.abs().max()))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients_are_those_of_the_stored_matrix(arm, causal):
    torch.manual_seed(0)
    config = GPTConfig(block_size=13, vocab_size=11, n_layer=2, n_head=3, n_embd=24, **arm)
    model = GPT(config).to(DEVICE)
    attention = model.transformer.h[1].attn
    attention.causal = causal
    torch.nn.init.normal_(attention.c_attn.weight, 0, 0.5)
    fused.accelerate(model, torch.float32)
    x = torch.randn(2, 13, 24, device=DEVICE, requires_grad=True)
    direction = torch.randn(2, 13, 24, device=DEVICE)
    y = attention.branch(x)
    y.backward(direction)
    exact, weight, output = (t.detach().double().requires_grad_() for t in (x, attention.c_attn.weight, attention.c_proj.weight))
    q, k, v = (part.view(2, 13, 3, 8).transpose(1, 2) for part in (exact @ weight.t()).split(24, dim=2))
    lam, alpha, heads = attention.lam, attention.alpha, attention.diffusing_heads
    reference = attention_reference(q, k, v, causal, heads > 0, alpha, lam, heads).transpose(1, 2).reshape(2, 13, 24) @ output.t()
    reference.backward(direction.double())
    close(y, reference, 1e-5, 1e-5)
    for ours, theirs in ((x.grad, exact.grad), (attention.c_attn.weight.grad, weight.grad), (attention.c_proj.weight.grad, output.grad)):
        close(ours, theirs, 1e-5, 1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("n_embd", [24, 48])  # heads of 8 channels by the framework's kernel, of 16 by fused_attention
def test_no_token_sees_the_future(arm, n_embd):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=80, vocab_size=31, n_layer=2, n_head=3, n_embd=n_embd, **arm)).to(DEVICE).eval()
    fused.accelerate(model, torch.float32)
    idx = torch.randint(31, (2, 80), device=DEVICE)
    other = torch.cat((idx[:, :50], (idx[:, 50:] + 1) % 31), dim=1)
    with torch.no_grad():
        before, after = model.body(*model.parts(idx)), model.body(*model.parts(other))
    assert torch.equal(before[:, :50], after[:, :50])
    assert (before[:, 50:] - after[:, 50:]).abs().amax(dim=2).min() > 1e-3, "and every later one sees what changed"


@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(7, 11, 100), (33, 8209, 8), (16, 64, 16), (9, 16403, 9), (6, 16384, 6), (7, 1000, 7)])
@pytest.mark.parametrize("ignored", [0, 5])
def test_output_layer_and_cross_entropy(monkeypatch, rows, vocabulary, chunk, ignored):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    monkeypatch.setattr(fused, "processors", lambda device: 1)  # so that a program has several rows
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, targets = torch.randn(rows, 16, device=DEVICE).to(dtype), torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[:ignored] = -1
    weight = torch.randn(vocabulary, 16, device=DEVICE).to(dtype).float()
    loss, dx, dweight = fused.output_loss(x, weight, targets, True)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = x64 @ w64.t()
    logits = logits + (logits.to(dtype).double() - logits).detach()  # the product's own rounding is not the kernel's
    reference = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    reference.backward()
    relative = 2**-7 if CUDA else 1e-5  # of the largest: softmax - one-hot is rounded to bfloat16
    close(loss, reference / (rows - ignored), 1e-5, 1e-5)
    close(dx, x64.grad, relative, relative * float(x64.grad.abs().max()))
    close(dweight, w64.grad, relative, relative * float(w64.grad.abs().max()))
    plain, *nothing = fused.output_loss(x, weight, targets, False)
    assert float(plain) == float(loss) and all(t.numel() == 0 for t in nothing)


@pytest.mark.parametrize("rows, C, shape", [(5, 24, (3, 40)), (50, 48, (4, 16)), (5000 if CUDA else 500, 130, (2, 7)), (3, 33, (1, 1))])
def test_gradient_of_the_token_table(rows, C, shape):
    torch.manual_seed(0)
    idx = torch.randint(rows - 1, shape, device=DEVICE)  # the last row occurs nowhere
    idx[0, 0] = rows - 2
    for dx in (torch.randn(*shape, C, device=DEVICE), torch.randn(C, *shape, device=DEVICE).movedim(0, -1)):
        exact = torch.zeros(rows, C, dtype=torch.float64, device=DEVICE).index_add_(0, idx.flatten(), dx.double().reshape(-1, C))
        close(fused.table_gradient(dx, idx, rows), exact, 1e-6, 2e-6)


def both(arm, device=DEVICE, dtype=torch.float32, **changes):
    """(model, the same model accelerated, inputs) for text and for pictures."""
    torch.manual_seed(0)
    text = torch.randint(50, (4, 17), device=device)
    pictures, labels = torch.randn(4, 3, 8, 8, device=device), torch.randint(10, (4,), device=device)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, **arm, **changes}
    for model, inputs in (
        (GPT(GPTConfig(block_size=16, vocab_size=50, **sizes), 1), (text[:, :-1], text[:, 1:])),
        (ViT(ViTConfig(image_size=8, n_classes=10, **sizes), 1), (pictures, labels)),
    ):
        fast = type(model)(model.config, 1).to(device)
        with torch.no_grad():
            for parameter in (*model.parameters(), *fast.parameters()):  # at GPT-2's scale most gradients are near rounding
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        fused.accelerate(fast, dtype)
        yield model.to(device), fast, inputs


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("bias, n_embd", [(True, 24), (False, 24), (False, 48)])  # heads of 16 channels: by fused_attention
def test_whole_models_keep_their_loss_and_gradients(arm, bias, n_embd):
    for model, fast, inputs in both(arm, bias=bias, n_embd=n_embd):
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in fast.named_parameters()] == names and isinstance(fast, type(model))
        plain_loss, fast_loss = model(*inputs)[1], fast(*inputs)[1]
        (3 * plain_loss).backward()
        (3 * fast_loss).backward()  # a factor, as accumulation and loss scaling have
        close(fast_loss, plain_loss, 1e-5)
        for name, ours, theirs in zip(names, fast.parameters(), model.parameters()):
            assert theirs.grad is not None and ours.grad is not None, name
            close(ours.grad, theirs.grad, 1e-5, 1e-5 * float(theirs.grad.abs().max()))
        with torch.no_grad():
            close(fast(*inputs)[1], plain_loss, 1e-5)


@pytest.mark.skipif(not CUDA, reason="needs a GPU: on a CPU nothing is summed in an order that changes")
@pytest.mark.parametrize("arm", ARMS)
def test_gradients_over_short_sequences_repeat_to_the_bit(arm):
    torch.manual_seed(0)
    text = torch.randint(50, (64, 257), device=DEVICE)
    model = GPT(GPTConfig(block_size=256, vocab_size=50, n_layer=2, n_head=3, n_embd=96, dropout=0.2, **arm), 1).to(DEVICE)
    fused.accelerate(model, torch.bfloat16)
    seen = []
    for _ in range(3):
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(text[:, :-1], text[:, 1:])[1].backward()
        seen.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for again in seen[1:] for one, other in zip(seen[0], again))


def test_without_copies_of_the_weights_the_linear_layers_stay():
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=3, n_embd=24))
    fused.accelerate(model, torch.bfloat16, shadows=False)
    assert not any(isinstance(module, fused.Linear) for module in model.modules())
    fused.cast_weights(model)


def test_weights_that_change_are_cast_again():
    for model, fast, inputs in both({"diffusion": True}):
        with torch.no_grad():
            for network in (model, fast):
                for parameter in network.parameters():
                    parameter.mul_(1.5)
            assert abs(float(fast(*inputs)[1] - model(*inputs)[1])) > 1e-4
            fused.cast_weights(fast)
            close(fast(*inputs)[1], model(*inputs)[1], 1e-5)


class Masked(torch.nn.Module):
    """Dropout with a given mask."""

    def __init__(self, kept, p: float):
        super().__init__()
        self.kept, self.p = kept, p

    def forward(self, x):
        return x * self.kept / (1 - self.p)


@pytest.mark.parametrize("arm", [{"diffusion": True}, {"diffusion": True, "diffusion_heads": (1,), "diffusion_lambda": 0.5}, {}])
def test_attention_over_short_sequences_drops_out_what_its_mask_says(monkeypatch, arm):
    """With heads of 16 channels: output and gradients are those of the stored matrix with that mask, and evaluation draws no seed."""
    p, seen, seed = 0.4, [], torch.tensor([2507], device=DEVICE)
    monkeypatch.setattr(fused, "dropout_seed", lambda x: seen.append(x.shape) or seed)
    for _, fast, inputs in both({"dropout": p, **arm}, n_embd=48):
        for layer, block in enumerate(fast.train().transformer.h):
            attn, x = block.attn, torch.randn(2, 16, 48, device=DEVICE)
            weights = attn.c_attn.weight, attn.c_proj.weight
            y = attn.branch(x, None, seed)
            qkv = F.linear(x, weights[0])
            kept = mask(qkv, seed, fused.sites(layer)[0], p, 3)
            exact = exactly(qkv, kept, 1 / (1 - p), 3, attn.alpha, attn.lam, attn.diffusing_heads, attn.causal) @ weights[1].t()
            close(y, exact, 1e-5, 1e-5 * float(exact.abs().max()))
            direction = torch.randn_like(y)
            for ours, theirs in zip(*(torch.autograd.grad((out * direction).sum(), weights) for out in (y, exact))):
                close(ours, theirs, 1e-5, 1e-5 * float(theirs.abs().max()))
        fast(*inputs)
        assert len(seen) == 1
        fast.eval()(*inputs)
        assert len(seen) == 1
        seen.clear()


def with_mask(attention, kept, p: float):
    """The model's attention as it is, with dropout by a given mask."""

    def attend(q, keys, values, mask, causal):
        A = attention_matrix(q, keys, causal)
        return (A if kept is None else A * kept / (1 - p)) @ values

    attention.attend = attend


@pytest.mark.parametrize("arm", [{}, {"diffusion": True}])
@pytest.mark.parametrize("n_embd", [24, 48])  # heads of 8 channels: dropout of A is the framework's, and left out; of 16: by fused_attention
@pytest.mark.parametrize("given", [False, True])
def test_dropout_everywhere(monkeypatch, arm, n_embd, given):
    """Loss and gradients are those of the plain model with the masks of the seed at every place, embeddings given or not; no two masks are alike."""
    p = 0.4
    for model, fast, inputs in both({"dropout": p, **arm}, n_embd=n_embd):
        seeds, draw = [], dropout.dropout_seed
        monkeypatch.setattr(fused, "dropout_seed", lambda x, seeds=seeds: seeds.append(draw(x)) or seeds[-1])
        for block in fast.transformer.h if n_embd == 24 else ():
            block.attn.dropout = 0.0
        more = {"embeddings": 3 * torch.randn(4, 16, n_embd, device=DEVICE)} if given else {}
        fast_loss = fast.train()(*inputs, **more)[1]
        (seed,), masks = seeds, []

        def kept(site, rows, columns, seed=seed, masks=masks):
            masks.append((site, dropout.kept(seed, site, p, rows, columns)))
            return masks[-1][1]

        model.transformer.drop = Masked(kept(fused.START, 64, n_embd).view(4, 16, n_embd), p)
        for i, block in enumerate(model.transformer.h):
            inside, attention, mlp = fused.sites(i)
            with_mask(block.attn, kept(inside, 4 * 3 * 16, 16).view(4, 3, 16, 16) if n_embd == 48 else None, p)
            block.attn.resid_dropout, block.mlp.dropout = (Masked(kept(site, 64, n_embd).view(4, 16, n_embd), p) for site in (attention, mlp))
        assert len({site for site, _ in masks}) == len(masks) >= 5
        assert not any(one.shape == other.shape and torch.equal(one, other) for i, (_, one) in enumerate(masks) for _, other in masks[:i])
        plain_loss = model.train()(*inputs, **more)[1]
        close(fast_loss, plain_loss, 1e-5)
        fast_loss.backward()
        plain_loss.backward()
        for (name, ours), theirs in zip(fast.named_parameters(), model.parameters()):
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                close(ours.grad, theirs.grad, 1e-5, 1e-5 * float(theirs.grad.abs().max()))
        with torch.no_grad():
            assert float(fast(*inputs, **more)[1]) != float(fast(*inputs, **more)[1])  # other masks
            model.transformer.drop = torch.nn.Identity()
            for block in model.transformer.h:
                with_mask(block.attn, None, p)
                block.attn.resid_dropout = block.mlp.dropout = torch.nn.Identity()
            close(fast.eval()(*inputs, **more)[1], model.eval()(*inputs, **more)[1], 1e-5)


def test_dropout_with_the_compiler_is_the_same():
    """Of one state of the generator: loss and gradients; and the next pass has others."""
    for _, fast, inputs in both({"dropout": 0.3, "diffusion": True}, n_embd=48):
        found = []
        for network in (fast.train(), torch.compile(fast, backend="aot_eager", fullgraph=True)):
            torch.manual_seed(1)
            fast.zero_grad()
            loss = network(*inputs)[1]
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in fast.parameters())])
            assert float(network(*inputs)[1].detach()) != float(loss.detach())
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs, 1e-5, 1e-5 * float(theirs.abs().max()))


@pytest.mark.skipif(not CUDA, reason="half precision by autocast needs a GPU")
@pytest.mark.parametrize("arm", ARMS)
def test_half_precision_and_the_compiler_are_as_exact_as_plain_autocast(arm):
    for model, fast, inputs in both(arm, dtype=torch.bfloat16, n_embd=192):
        exact = copy.deepcopy(model).double()
        exact(*(part.double() if part.is_floating_point() else part for part in inputs))[1].backward()
        for network in (lambda *batch: fast(*batch)[1], torch.compile(lambda *batch: fast(*batch)[1])):
            model.zero_grad()
            fast.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                plain_loss, fast_loss = model(*inputs)[1], network(*inputs)
            close(fast_loss, plain_loss, 2e-3)
            plain_loss.backward()
            fast_loss.backward()
            for ours, plain, reference in zip(fast.parameters(), model.parameters(), exact.parameters()):
                error, usual = (float((p.grad.double() - reference.grad).norm()) / float(reference.grad.norm()) for p in (ours, plain))
                assert usual < 0.1 and error < 1.5 * usual + 1e-3


def test_the_compiler_is_told_the_truth_about_shapes_and_strides():
    x = torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused_products.gelu, (x.contiguous(),), test_utils=checks)
    torch.library.opcheck(fused_products.gelu_backward, (x, x), test_utils=checks)
    torch.library.opcheck(fused.gather, (x, x, x, x, 1.0, 2), test_utils=checks)
    torch.library.opcheck(fused.gather, (x, x, x, None, 0.0, 0), test_utils=checks)
    torch.library.opcheck(fused.gather, (x, x, x, x, 1.0, 2, x, x, x), test_utils=checks)
    torch.library.opcheck(fused.subtract, (x, x, 1.0, 1.0, 2), test_utils=checks)
    wide = torch.randn(6, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE), torch.randint(9, (6,), device=DEVICE)
    torch.library.opcheck(fused.output_loss, (*wide, True), test_utils=checks)
    torch.library.opcheck(fused.output_loss, (*wide, False), test_utils=checks)
    torch.library.opcheck(fused.weight_gradient, (torch.randn(6, 4, device=DEVICE), wide[0]), test_utils=checks)
    four = [torch.randn(6, 4, device=DEVICE).bfloat16() for _ in range(4)]
    torch.library.opcheck(fused.weight_gradient_of_three, (*four[:3], four[3]), test_utils=checks)
    torch.library.opcheck(fused.table_gradient, (x, torch.randint(4, (2, 3, 5), device=DEVICE), 4), test_utils=checks)
    qkv = torch.randn(2, 5, 96, device=DEVICE)
    seed, dout = torch.tensor([5], device=DEVICE), torch.randn(2, 5, 32, device=DEVICE)
    for drop, heads in (((None, 0, 0.0), 0), ((seed, 3, 0.2), 1)):
        torch.library.opcheck(fused_attention.attend, (qkv, *drop, 2, 0.5, 1.5, heads, True), test_utils=checks)
        y, _, lse = fused_attention.attend(qkv, *drop, 2, 0.5, 1.5, heads, True)
        for given in (y, None):
            arguments = (dout, qkv, given, lse, *drop, 2, 0.5, 1.5, heads, True)
            torch.library.opcheck(fused_attention.attend_backward, arguments, test_utils=checks)
    rows, gain = torch.randn(6, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    torch.library.opcheck(fused_norm.add_norm, (rows, rows.clone(), None, 0, 0.0, gain, None), test_utils=checks)
    torch.library.opcheck(fused_norm.add_norm, (rows, rows.clone(), seed, 3, 0.2, gain, gain.clone()), test_utils=checks)
    statistics = torch.randn(6, device=DEVICE)
    for dout, bias in ((None, True), (rows.clone(), False)):
        arguments = (dout, rows.clone(), rows, None if bias else rows.clone(), seed, 3, 0.2, gain, bias, statistics, statistics.clone())
        torch.library.opcheck(fused_norm.add_norm_backward, arguments, test_utils=checks)
    stream, half = torch.randn(2, 3, 4, device=DEVICE), torch.float16
    for drop, bias in (((seed, 3, 0.2), None), ((None, 0, 0.0), gain.clone())):
        torch.library.opcheck(fused_norm.add_norm_mean, (stream, stream.to(half), *drop, gain, bias), test_utils=checks)
        arguments = (rows[:2].clone(), stream.to(half), *drop, gain, bias is not None, statistics)
        torch.library.opcheck(fused_norm.add_norm_mean_backward, arguments, test_utils=checks)
    for positions, bias in ((torch.randn(3, 4, device=DEVICE), None), (None, gain.clone())):
        torch.library.opcheck(fused_norm.start_norm, (stream.to(half), positions, seed, 3, 0.2, gain, bias, half), test_utils=checks)
        y = stream.to(half)
        arguments = (stream.clone(), y, stream, y.clone(), seed, 3, 0.2, gain, bias is not None, statistics, statistics.clone(), half)
        torch.library.opcheck(fused_norm.start_norm_backward, arguments, test_utils=checks)


@pytest.mark.skipif(torch.__version__ >= (2, 13), reason="mended in torch 2.13")
def test_compiling_deep_models_takes_no_exponential_time():
    from torch._inductor.lowering import lowerings

    import prior  # noqa: F401, which declares more

    operators.make_known()
    assert len(operators.OPERATORS) > 8 and all(known._opoverload in lowerings for known in operators.OPERATORS)
