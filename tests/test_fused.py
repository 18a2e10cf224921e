"""Every kernel against float64: on a GPU where there is one, else in Triton's interpreter on the CPU (conftest.py)."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
CUDA = torch.cuda.is_available()
import fused  # noqa: E402
from model import GPT, GPTConfig, ViT, ViTConfig, attention_reference  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
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


def test_gelu_and_its_derivative():
    x = torch.cat((torch.linspace(-12, 12, 5001), torch.tensor([0.0, 1e-30, -100.0, 1e4]))).to(DEVICE).requires_grad_()
    y = fused.gelu(x)
    y.sum().backward()
    exact = x.detach().double().requires_grad_()
    F.gelu(exact).sum().backward()
    close(y, F.gelu(exact), 2e-6, 1e-6)
    close(x.grad, exact.grad, 2e-6, 2e-6)
    dtype, rounding = (torch.bfloat16, 2**-8) if CUDA else (torch.float16, 2**-10)  # the interpreter truncates to bfloat16, a GPU rounds
    half = x.detach().to(dtype)
    close(fused.gelu(half), F.gelu(half.double()), rounding, 1e-6)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_dropout_keeps_the_share_it_should_and_draws_anew(p):
    torch.manual_seed(1)
    x = torch.ones(41, 1000, device=DEVICE)
    first, second = fused.keep(x, p), fused.keep(x, p)
    n = x.numel()
    for mask in (first, second):
        assert abs(float(mask.float().mean()) - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    both = float((first & second).float().mean())
    assert abs(both - (1 - p) ** 2) < 5 * ((1 - p) ** 2 / n) ** 0.5  # independent
    neighbours = float((first[:, 1:] & first[:, :-1]).float().mean())
    assert abs(neighbours - (1 - p) ** 2) < 5 * ((1 - p) ** 2 / n) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(fused.keep(x, p), first)
    module = fused.Dropout(p)
    assert torch.equal(module.eval()(x), x)
    y = module.train()(x)
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / (1 - p)], device=DEVICE))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients_are_those_of_the_stored_matrix(arm, causal):
    torch.manual_seed(0)
    config = GPTConfig(block_size=13, vocab_size=11, n_layer=2, n_head=3, n_embd=24, **arm)
    attention = GPT(config).transformer.h[1].attn.to(DEVICE)
    attention.causal = causal
    torch.nn.init.normal_(attention.c_attn.weight, 0, 0.5)
    fused.accelerate(attention)
    assert type(attention) is fused.Attention
    x = torch.randn(2, 13, 24, device=DEVICE, requires_grad=True)
    direction = torch.randn(2, 13, 24, device=DEVICE)
    y = attention(x)
    y.backward(direction)
    exact, weight, output = (t.detach().double().requires_grad_() for t in (x, attention.c_attn.weight, attention.c_proj.weight))
    q, k, v = (part.view(2, 13, 3, 8).transpose(1, 2) for part in (exact @ weight.t()).split(24, dim=2))
    lam, alpha, heads = attention.lam, attention.alpha, attention.diffusing_heads
    reference = attention_reference(q, k, v, causal, heads > 0, alpha, lam, heads).transpose(1, 2).reshape(2, 13, 24) @ output.t()
    reference.backward(direction.double())
    tolerance = 2e-3 if CUDA else 1e-5  # TF32 products on the GPU
    close(y, reference, tolerance, tolerance)
    for ours, theirs in ((x.grad, exact.grad), (attention.c_attn.weight.grad, weight.grad), (attention.c_proj.weight.grad, output.grad)):
        close(ours, theirs, tolerance, tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize(("rows", "vocabulary", "chunk"), [(7, 11, 100), (33, 4097, 8), (16, 64, 16)])
@pytest.mark.parametrize("ignored", [0, 5])
def test_output_layer_and_cross_entropy(monkeypatch, rows, vocabulary, chunk, ignored):
    monkeypatch.setattr(fused, "CHUNK", chunk)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    x, targets = torch.randn(rows, 16, device=DEVICE).to(dtype), torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[:ignored] = -1
    weight = torch.randn(vocabulary, 16, device=DEVICE).to(dtype).float()
    loss, dx, dweight = fused.output_loss(x, weight, targets, True)
    x64, w64 = x.double().requires_grad_(), weight.double().requires_grad_()
    reference = F.cross_entropy(x64 @ w64.t(), targets, ignore_index=-1, reduction="sum")
    reference.backward()
    count = rows - ignored
    relative = 2**-7 if CUDA else 1e-5  # of the largest: logits and their gradient are rounded to bfloat16
    close(loss, reference / count, relative, relative)
    close(dx, x64.grad, relative, relative * float(x64.grad.abs().max()))
    close(dweight, w64.grad, relative, relative * float(w64.grad.abs().max()))
    plain, *nothing = fused.output_loss(x, weight, targets, False)
    assert float(plain) == float(loss) and all(t.numel() == 0 for t in nothing)


@pytest.mark.parametrize("arm", ARMS)
def test_whole_models_keep_their_loss_and_gradients(arm):
    torch.manual_seed(0)
    text = torch.randint(50, (4, 17), device=DEVICE)
    pictures, labels = torch.randn(4, 3, 8, 8, device=DEVICE), torch.randint(10, (4,), device=DEVICE)
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 24, **arm}
    for model, inputs in (
        (GPT(GPTConfig(block_size=16, vocab_size=50, **sizes), 1), (text[:, :-1], text[:, 1:])),
        (ViT(ViTConfig(image_size=8, n_classes=10, **sizes), 1), (pictures, labels)),
    ):
        fast = type(model)(model.config, 1).to(DEVICE)
        model, names = model.to(DEVICE), [name for name, _ in model.named_parameters()]
        fused.accelerate(fast)
        assert [name for name, _ in fast.named_parameters()] == names and isinstance(fast, type(model))
        plain_loss, fast_loss = model(*inputs)[1], fast(*inputs)[1]
        (3 * plain_loss).backward()
        (3 * fast_loss).backward()  # a factor, as accumulation and loss scaling have
        tolerance = 5e-3 if CUDA else 1e-5
        close(fast_loss, plain_loss, tolerance)
        for name, ours, theirs in zip(names, fast.parameters(), model.parameters()):
            assert theirs.grad is not None and ours.grad is not None, name
            close(ours.grad, theirs.grad, tolerance, tolerance * float(theirs.grad.abs().max()))
        with torch.no_grad():
            close(fast(*inputs)[1], plain_loss, tolerance)


def test_the_compiler_is_told_the_truth_about_shapes_and_strides():
    x = torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.gelu, (x.contiguous(),), test_utils=checks)
    torch.library.opcheck(fused.gelu_backward, (x, x), test_utils=checks)
    torch.library.opcheck(fused.gather, (x, x, x, x, 1.0, 2), test_utils=checks)
    torch.library.opcheck(fused.subtract, (x, x, 1.0, 1.0, 2), test_utils=checks)
    wide = torch.randn(6, 4, device=DEVICE), torch.randn(9, 4, device=DEVICE), torch.randint(9, (6,), device=DEVICE)
    torch.library.opcheck(fused.output_loss, (*wide, True), test_utils=checks)
    torch.library.opcheck(fused.output_loss, (*wide, False), test_utils=checks)
