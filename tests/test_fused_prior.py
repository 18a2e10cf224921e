"""fused_prior.py against the plain barrier in float64: on a GPU where there is one, else in Triton's interpreter on the CPU (conftest.py)."""

import copy
import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install -r requirements-dev.txt")
import fused  # noqa: E402
import fused_prior  # noqa: E402
import prior  # noqa: E402
from configurator import TrainConfig  # noqa: E402
from model import GPT, CausalSelfAttention, GPTConfig  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ARMS = [
    {},
    {"diffusion": True, "diffusion_alpha": 0.6, "diffusion_lambda": 1.4},
    {"diffusion": True, "diffusion_alpha": 0.6, "diffusion_lambda": 1.4, "diffusion_heads": (0, 1)},
]


def close(ours, reference, relative: float):
    """Within `relative` of the largest entry."""
    error = float((ours.double() - reference.double()).abs().max())
    assert error <= relative * float(reference.abs().max()), error


def two_layers(d: int, H: int, T: int, B: int, n: int, causal: bool, arm: dict, dtype=torch.float32):
    """Two attentions with far from uniform weights, the packed (B, T, 3 C) projections q, k, v are views of, and pairs, of which two are the same."""
    generator = torch.Generator().manual_seed(d + T)
    config = GPTConfig(block_size=T, vocab_size=7, n_layer=2, n_head=H, n_embd=H * d, **arm)
    attentions = [CausalSelfAttention(config, layer).to(DEVICE) for layer in range(2)]
    packed = []
    for attention in attentions:
        attention.causal = causal
        for parameter in attention.parameters():
            with torch.no_grad():
                parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator) / math.sqrt(H * d))
        packed.append((1.5 * torch.randn(B, T, 3 * H * d, generator=generator)).to(DEVICE, dtype).requires_grad_())
    positions, heads = torch.randint(T, (2, B, n), generator=generator), torch.randint(H, (2, B, n), generator=generator)
    positions[..., 0], positions[0, 0, 1] = T - 1, 0  # the last and the first
    positions[..., -1], heads[..., -1] = positions[..., 0], heads[..., 0]
    return attentions, packed, positions.to(DEVICE), heads.to(DEVICE)


def results(margins_of, attentions, packed, positions, heads):
    """Margins, signs, and the gradients of a weighted sum: of q, k, v as one projection, of W_q, W_k, W_v and of W_o."""
    margins, negative = margins_of(attentions, [fused._heads(qkv, attentions[0].n_head) for qkv in packed], positions, heads)
    weights = torch.randn(margins.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(margins)
    parameters = [parameter for attention in attentions for parameter in attention.parameters()]
    return margins.detach(), negative, torch.autograd.grad((weights * margins).sum(), [*packed, *parameters])


def exactly(attentions, packed, positions, heads):
    """The same by the plain path in float64."""
    doubles = [copy.deepcopy(attention).double() for attention in attentions]
    packed = [qkv.detach().double().requires_grad_() for qkv in packed]
    return results(prior.margins_of_layers, doubles, packed, positions, heads)


def by_kernels(attentions, taps, positions, heads):
    return fused_prior.own_margins(attentions, taps, positions, heads, prior.FLOOR)


@pytest.mark.parametrize("p", [2, 3, 8, 11, 16, 32, 40, 49, 64, 100])
def test_the_kernel_eliminates_as_lapack_does(p):
    matrices = torch.randn(6, p, p, generator=torch.Generator().manual_seed(p))
    matrices[0] = torch.eye(p).flip(0)  # pivots off the diagonal throughout
    inverses, logs, signs = fused_prior.inverse(matrices.to(DEVICE), prior.FLOOR)
    exact = matrices.double()
    expected = torch.linalg.slogdet(exact)
    torch.testing.assert_close(logs.cpu().double(), expected.logabsdet, rtol=1e-4, atol=1e-4)
    assert torch.equal(signs.cpu().double(), expected.sign)
    product = inverses.cpu().double() @ exact
    scale = inverses.abs().amax(dim=(1, 2)).cpu().double()[:, None, None]
    assert ((product - torch.eye(p)).abs() < 1e-5 * p * scale.clamp(min=1)).all()


@pytest.mark.parametrize("d, H, T, B, n", [(16, 3, 37, 2, 5), (16, 2, 96, 1, 3), (32, 2, 33, 1, 3), (64, 2, 41, 1, 3), (16, 2, 1, 2, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("arm", ARMS, ids=str)
def test_margins_and_all_gradients_are_the_plain_ones(d, H, T, B, n, causal, arm):
    case = two_layers(d, H, T, B, n, causal, arm)
    margins, negative, gradients = results(by_kernels, *case)
    exact, exactly_negative, references = exactly(*case)
    assert exact.abs().max() > 0.01 and torch.equal(negative, exactly_negative)
    close(margins, exact, 1e-5)
    largest = max(float(theirs.abs().max()) for theirs in references)
    for ours, theirs in zip(gradients, references, strict=True):
        if theirs.abs().max() < 1e-12:  # what cancels in float64 does so in float32 up to its rounding: the gradient of a sequence of one token
            assert T == 1 and ours.abs().max() < 1e-6 * largest
        else:
            close(ours, theirs, 1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_costs_no_more_than_its_own_rounding(causal):
    """Kernels in half precision on inputs in half precision err by no more than the exact results change when the inputs are rounded to it."""
    dtype = torch.bfloat16 if CUDA else torch.float16  # the interpreter truncates to bfloat16, a GPU rounds
    sizes = 64 if CUDA else 16, 2, 70, 2, 4, causal, ARMS[1]
    case = two_layers(*sizes, dtype)
    margins, negative, gradients = results(by_kernels, *case)
    exact, exactly_negative, references = exactly(*case)
    unrounded, _, of_unrounded = exactly(*two_layers(*sizes))
    assert torch.equal(negative, exactly_negative)
    given = margins, *case[1], *(parameter for attention in case[0] for parameter in attention.parameters())
    for ours, theirs, before, like in zip((margins, *gradients), (exact, *references), (unrounded, *of_unrounded), given, strict=True):
        cost = float((theirs - before).abs().max())
        assert ours.dtype == like.dtype and 0 < cost < 0.02 * float(theirs.abs().max())
        assert float((ours.double() - theirs).abs().max()) <= cost


def test_more_than_one_group_and_heads_without_a_pair():
    """Pairs of some heads alone, more than GROUPS: every other head's gradient is exactly 0, and two runs agree to the last bit."""
    attentions, packed, positions, heads = two_layers(16, 4, 20, 5, 7, True, ARMS[1])
    heads = heads % 2 * 2 + 1  # 1 or 3
    assert heads[0].numel() > 2 * fused_prior.GROUPS and heads.numel() % fused_prior.GROUPS
    case = attentions, packed, positions, heads
    first, again = results(by_kernels, *case), results(by_kernels, *case)
    for ours, theirs, same in zip(first[2], exactly(*case)[2], again[2]):
        close(ours, theirs, 1e-5)
        assert torch.equal(ours, same)
    for gradient in first[2][:2]:
        used = gradient.view(5, 20, 3, 4, 16).abs().amax(dim=(0, 1, 4)) > 0  # of (q, k, v) and head
        assert torch.equal(used, torch.tensor([False, True, False, True], device=DEVICE).expand(3, 4))


def test_a_query_is_reached_at_its_position_alone_and_causal_keys_up_to_it():
    attentions, packed, positions, heads = two_layers(16, 2, 40, 1, 2, True, {})
    positions[:], heads[:] = 33, torch.tensor([0, 1], device=DEVICE)
    for gradient in results(by_kernels, attentions, packed, positions, heads)[2][:2]:
        rows = gradient.view(40, 3, 32).abs().amax(dim=2) > 0
        assert rows[:, 0].nonzero().tolist() == [[33]]
        assert rows[:34, 1:].all() and not rows[34:].any()


def objective_of(arm: dict, **changes):
    config = TrainConfig(prior_lambda=0.5, prior_where="attention", prior_form="logdet", prior_positions=2, **changes)
    model = GPT(GPTConfig(block_size=16, vocab_size=11, n_layer=2, n_head=2, n_embd=32, **arm), 1).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return prior.Objective(model, config).to(DEVICE)


@pytest.mark.parametrize("arm, detach", [(ARMS[0], False), (ARMS[1], True), (ARMS[2], False)], ids=str)
def test_the_whole_objective_with_and_without_the_compiler(monkeypatch, arm, detach):
    """Plain model and plain barrier, then fused.py's model with the kernels: eager and compiled."""
    x, y = torch.randint(11, (2, 2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for kernels, compiled in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(fused_prior, "applies", lambda q, weight, kernels=kernels: kernels)
        objective = objective_of(arm, prior_detach=detach)
        if kernels:
            fused.accelerate(objective.model, torch.float32)
        function = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else objective
        torch.manual_seed(7)
        total, *rest = function(x, y)
        total.backward()
        found.append([total.detach(), *rest, *(p.grad for p in objective.parameters())])
    for plain, eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_the_compiler_is_told_the_truth_about_shapes_and_strides():
    attentions, packed, positions, heads = two_layers(16, 2, 5, 2, 3, True, ARMS[1])
    q, k, v = (list(kind) for kind in zip(*(fused._heads(qkv.detach(), 2) for qkv in packed)))
    products = torch.randn(2, 2, 3, 16, 16, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    arguments = (q, k, v, products, positions, heads, [0, 1], 0.5, 1.5, True, prior.FLOOR)
    torch.library.opcheck(fused_prior.margins, arguments, test_utils=checks)
    logs, _, inverses, covariances, vectors, scalars = fused_prior.margins(*arguments)
    for_gradient = (torch.randn_like(logs), inverses, covariances, vectors, scalars, products, heads, False)
    torch.library.opcheck(fused_prior.margins_backward, for_gradient, test_utils=checks)
    _, *of_pairs = fused_prior.margins_backward(*for_gradient)
    torch.library.opcheck(fused_prior.moments_backward, (k, v, positions, heads, vectors, scalars, *of_pairs, True), test_utils=checks)


def test_what_the_kernels_take():
    weight = torch.zeros(3, 1, device=DEVICE)
    assert fused_prior.applies(torch.zeros(1, 1, 4, 64, device=DEVICE), weight) == CUDA
    for q, w in ((torch.zeros(1, 1, 4, 24), weight), (torch.zeros(1, 1, 4, 64).double(), weight), (torch.zeros(1, 1, 4, 64), weight.double())):
        assert not fused_prior.applies(q.to(DEVICE), w)
