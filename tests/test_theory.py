"""theory.py against automatic differentiation and plain loops, in float64."""

import math

import pytest
import torch

import theory

TIGHT = dict(rtol=1e-10, atol=1e-10)


def latents(n: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graph(n: int, seed: int = 1, symmetric: bool = False) -> torch.Tensor:
    """A row-stochastic matrix; symmetric: doubly stochastic."""
    A = latents(n, n, seed).softmax(dim=-1)
    if symmetric:
        for _ in range(500):  # Sinkhorn on a symmetric matrix
            A = (A + A.T) / 2
            A = A / A.sum(dim=1, keepdim=True)
    return A


@pytest.mark.parametrize("n,p", [(7, 3), (3, 7), (5, 5)])
@pytest.mark.parametrize("nu,beta", [(1.0, 1.0), (7.0, 0.3)])
def test_the_bound_is_its_definition_with_the_large_determinant(n, p, nu, beta):
    X, L = latents(n, p), theory.laplacian(graph(n))
    K = X @ X.T + beta * torch.eye(n, dtype=torch.float64)
    expected = -0.5 * torch.trace(L @ K) + 0.5 * nu * torch.linalg.slogdet(K).logabsdet
    torch.testing.assert_close(theory.bound(X, L, nu, beta), expected, **TIGHT)


@pytest.mark.parametrize("symmetric", [False, True])
def test_both_gradient_terms_are_those_of_autograd(symmetric):
    X, L = latents(9, 4).requires_grad_(), theory.laplacian(graph(9, symmetric=symmetric))
    for term, gradient in zip(theory.bound_terms(X, L, 3.0, 0.5), theory.gradient_terms(X.detach(), L, 3.0, 0.5)):
        torch.testing.assert_close(torch.autograd.grad(term, X, retain_graph=True)[0], gradient, **TIGHT)


def test_the_data_term_is_graph_diffusion_for_a_symmetric_graph_and_not_for_another():
    X, identity = latents(9, 4), torch.eye(9, dtype=torch.float64)
    A = graph(9, symmetric=True)
    torch.testing.assert_close(theory.gradient_terms(X, theory.laplacian(A), 1.0, 1.0)[0], (A - identity) @ X, **TIGHT)
    A = graph(9)
    assert ((theory.gradient_terms(X, theory.laplacian(A), 1.0, 1.0)[0] - (A - identity) @ X).abs() > 0.05).any()


def test_a_small_gradient_step_climbs_the_bound():
    X, L = latents(9, 4), theory.laplacian(graph(9))
    gradient = sum(theory.gradient_terms(X, L, 2.0, 1.0))
    risen = theory.bound(X + 1e-4 * gradient, L, 2.0, 1.0) - theory.bound(X, L, 2.0, 1.0)
    assert float(risen) == pytest.approx(1e-4 * float(gradient.square().sum()), rel=1e-2)


def test_dirichlet_energy_is_its_sum_over_pairs():
    X, A = torch.stack([latents(6, 3), latents(6, 3, seed=5)]), torch.stack([graph(6), graph(6, seed=7)])
    for x, a, found in zip(X, A, theory.dirichlet_energy(X, A), strict=True):
        total = sum(float(x[i] @ x[j]) * ((i == j) - float(a[i, j])) for i in range(6) for j in range(6))
        assert float(found) == pytest.approx(total / float((x * x).sum()), abs=1e-12)
    a = graph(6, symmetric=True)
    pairs = sum(0.5 * float(a[i, j]) * float((X[0, i] - X[0, j]).square().sum()) for i in range(6) for j in range(6))
    assert float(theory.dirichlet_energy(X[0], a)) == pytest.approx(pairs / float(X[0].square().sum()), abs=1e-9)


def test_dirichlet_energy_of_a_constant_is_0_and_of_no_graph_is_0():
    assert abs(float(theory.dirichlet_energy(torch.ones(6, 3, dtype=torch.float64), graph(6)))) < 1e-12
    assert abs(float(theory.dirichlet_energy(latents(6, 3), torch.eye(6, dtype=torch.float64)))) < 1e-12


def test_effective_rank_counts_equal_directions():
    basis = torch.linalg.qr(latents(8, 8)).Q
    for k in (1, 3, 8):
        assert float(theory.effective_rank(3 * basis[:, :k])) == pytest.approx(k, abs=1e-6)
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert float(theory.effective_rank(basis[:, :3] * shares)) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)), abs=1e-9)


def test_entropy_and_diagonal_mass_against_loops():
    A = graph(6).tril()
    A = A / A.sum(dim=1, keepdim=True)  # with exact zeros, as causal attention has
    expected = [-sum(float(a) * math.log(float(a)) for a in row if a > 0) for row in A]
    assert theory.attention_entropy(A).tolist() == pytest.approx(expected, abs=1e-12)
    assert float(theory.attention_entropy(torch.full((4, 8), 1 / 8))[0]) == pytest.approx(math.log(8), abs=1e-6)
    assert float(theory.diagonal_mass(A)) == pytest.approx(sum(float(A[i, i]) for i in range(6)) / 6, abs=1e-12)


def test_effective_rank_of_float32_tokens_is_not_raised_by_rounding():
    """Two directions among 200 tokens of 300 channels: what rounding leaves in the Gram matrix counts as nothing."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(300, 2, dtype=torch.float64, generator=draw)).Q
    tokens = torch.linalg.qr(torch.randn(200, 2, dtype=torch.float64, generator=draw)).Q @ basis.T
    for X in (tokens, tokens.T, torch.stack((tokens, 5 * tokens))):
        torch.testing.assert_close(theory.effective_rank(X), torch.full(X.shape[:-2], 2.0, dtype=torch.float64), rtol=1e-9, atol=0)
    whole = torch.randn(40, 60, generator=draw)
    share = torch.linalg.svdvals(whole.double())
    share = share / share.sum()
    assert float(theory.effective_rank(whole)) == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-6)
