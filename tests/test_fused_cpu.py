"""fused_cpu.py's blocks against the model's own in float64, and laws that they keep."""

import math
import re

import pytest
import torch

import fused_cpu
import onednn
from model import GPT, Block, CausalSelfAttention, GPTConfig, ViT, ViTConfig

usable = pytest.mark.skipif(fused_cpu.library() is None, reason="no Linux on x86-64 with AVX-512, or no C compiler")
DIFFUSION = [{}, {"diffusion": True}, {"diffusion": True, "diffusion_heads": (1,), "diffusion_alpha": 0.7, "diffusion_lambda": 1.3}]
SHAPES = [(4, 128, 64, 12), (3, 120, 37, 5), (2, 34, 70, 3), (1, 5, 1, 1), (2, 96, 130, 2), (3, 72, 100, 17)]  # heads, channels, tokens, sequences
HALF = [False, pytest.param(True, marks=pytest.mark.skipif(not fused_cpu.has_bfloat16(), reason="no AVX512_BF16, or AMX beside it"))]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The names of the C functions that are called."""
    made, call = [], fused_cpu.call
    monkeypatch.setattr(fused_cpu, "call", lambda name, *arguments: (made.append(name), call(name, *arguments)))
    return made


def scrambled(model, size: float = 3.0):
    """`model` with larger weights than at the start, so that its softmax and GELU are not linear, and with gains that differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.3, generator=generator)
            parameter.mul_(size) if parameter.dim() > 1 else parameter.add_(noise)
    return model


def pair(config, kind=GPT, size: float = 3.0):
    """(accelerated model, the same model in float64)."""
    model, exact = scrambled(kind(config, 1), size), kind(config).double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    fused_cpu.accelerate(model)
    assert all(type(block) is fused_cpu.FusedBlock for block in model.transformer.h)
    return model, exact


def errors(model, exact, *inputs, half: bool = False) -> dict[str, float]:
    """Norms of the errors of the blocks' output and of every gradient, relative to the exact ones."""
    found, expected = [], []
    for network, results in ((model, found), (exact, expected)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half and network is model):
            x = network.embed(*inputs)
            y = x
            for block in network.transformer.h:
                y = block(y)
        upstream = torch.linspace(0, 40, y.numel(), dtype=torch.float64).sin().view(y.shape)
        x.retain_grad()
        (y * upstream.to(y.dtype)).sum().backward()
        results += [("output", y), ("input", x.grad)]
        results += [(name, parameter.grad) for name, parameter in network.transformer.h.named_parameters()]
    sizes = [float(theirs.detach().norm()) or 1.0 for _, theirs in expected]  # of one token A - I makes nothing
    return {name: float((ours.double() - theirs).detach().norm()) / size for (name, ours), (_, theirs), size in zip(found, expected, sizes)}


@usable
@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", DIFFUSION)
def test_output_and_gradients_equal_float64(calls, keys, shape, half):
    heads, channels, T, B = shape
    model, exact = pair(GPTConfig(block_size=T, vocab_size=65, n_layer=2, n_head=heads, n_embd=channels, **keys))
    idx = torch.randint(65, (B, T), generator=torch.Generator().manual_seed(2))
    bound = 4 * 2**-8 if half else 1.5e-6  # some roundings of bfloat16; float32's, growing with the square root of the sums' length
    worst = errors(model, exact, idx, half=half)
    assert len(worst) == 2 + 2 * 6 and {name: error for name, error in worst.items() if not error < bound} == {}
    forward, backward = ["attention_forward", "mlp_forward"] * 2, ["mlp_backward", "attention_backward"] * 2
    assert calls == forward + backward


@usable
@pytest.mark.parametrize("size", [14, 16])  # 49 tokens, and 64, which fill the panels
@pytest.mark.parametrize("keys", DIFFUSION)
def test_every_token_attends_to_every_other_in_a_vision_transformer(keys, size):
    model, exact = pair(ViTConfig(image_size=size, n_classes=10, n_layer=2, n_head=2, n_embd=48, **keys), ViT)
    pictures = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    model.double().transformer.h.float()  # the patches are embedded exactly, so that both blocks get the same
    model.embed = lambda images: ViT.embed(model, images).float()
    worst = errors(model, exact, pictures.double())
    assert {name: error for name, error in worst.items() if not error < 2e-6} == {}


@usable
@pytest.mark.parametrize("half", HALF)
def test_repeats_to_the_bit_with_any_number_of_threads(half):
    config = GPTConfig(block_size=50, vocab_size=65, n_layer=1, n_head=3, n_embd=96, diffusion=True)
    model, results = pair(config)[0], []
    idx = torch.randint(65, (5, 50), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = model.transformer.h[0](model.embed(idx))
        y.square().sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in model.transformer.h.parameters())])
    torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], others))


@usable
def test_saturated_softmax_is_that_of_float64():
    model, exact = pair(GPTConfig(block_size=40, vocab_size=65, n_layer=1, n_head=2, n_embd=64), size=400.0)
    idx = torch.randint(65, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = (network.transformer.h[0](network.embed(idx)) for network in (model, exact))
    assert ours.isfinite().all() and float((ours - theirs).norm() / theirs.norm()) < 1e-4  # logits of hundreds have errors that exp enlarges


@usable
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])  # logits up to 1e20
def test_the_softmax_of_any_finite_logits_is_finite(size):
    model = pair(GPTConfig(block_size=40, vocab_size=65, n_layer=1, n_head=2, n_embd=64))[0]
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:128].mul_(size)
    x = model.embed(torch.randint(65, (2, 40), generator=torch.Generator().manual_seed(2)))
    y = model.transformer.h[0](x)
    y.sum().backward()
    assert y.isfinite().all() and all(parameter.grad.isfinite().all() for parameter in model.transformer.h.parameters())


@usable
def test_gelu_and_its_derivative_of_any_number():
    """Of one row the gradient of the second matrix is GELU(u), that of the first one GELU'(u) times what LayerNorm gives."""
    far = torch.tensor([20.0, 1e2, 1e4, 1e8, 1e15, 1e25])
    at = torch.cat((torch.linspace(-15, 15, 4001), far, -far))
    w_in, w_out = torch.stack((at, torch.zeros_like(at)), dim=1).requires_grad_(), torch.ones(2, len(at), requires_grad=True)
    y = fused_cpu._MLPBranch.apply(torch.tensor([[[1.0, -1.0]]]), torch.ones(2, requires_grad=True), w_in, w_out, False)
    *_, n, _, u = y.grad_fn.saved_tensors
    (y * torch.tensor([1.0, 0.0])).sum().backward()
    u, value, slope = u[0].double(), w_out.grad[0].double(), w_in.grad[:, 0].double() / n[0, 0].double()
    below = torch.special.erfc(-u / math.sqrt(2)) / 2
    assert float(((value - u * below) / u.abs().clamp(min=1)).abs().max()) < 1.5e-7
    assert float((slope - below - u * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)).abs().max()) < 4e-7
    assert torch.equal(value[-12:-6], u[-12:-6]) and torch.equal(value[-6:], torch.zeros(6).double())


@usable
def test_nan_stays_in_its_sequence():
    model = pair(GPTConfig(block_size=40, vocab_size=65, n_layer=1, n_head=2, n_embd=64))[0]
    x = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(2))
    clean = model.transformer.h[0](x)
    x[1, 25, 7] = math.nan
    y = model.transformer.h[0](x)
    assert y[1, 25:].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


@usable
def test_strided_inputs_and_gradients_are_taken():
    model = pair(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16))[0]
    block, results = model.transformer.h[0], []
    straight = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    for x in (straight, straight.transpose(0, 1).contiguous().transpose(0, 1)):
        x = x.requires_grad_()
        y = block(x)
        (y.transpose(1, 2) * torch.arange(8.0)).sum().backward()
        results.append((y.detach(), x.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


@usable
@pytest.mark.parametrize("case", ["dropout", "cache", "taps", "float64", "float16", "tiles", "empty"])
def test_where_the_functions_do_not_apply_the_block_is_the_models_own(calls, monkeypatch, case):
    config = GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16, dropout=0.5 if case == "dropout" else 0.0)
    block, own = (GPT(config).transformer.h[0] for _ in range(2))
    fused_cpu.accelerate(block)
    x = torch.randn(0 if case == "empty" else 2, 8, 16, generator=torch.Generator().manual_seed(2))
    arguments = {"taps": []} if case == "taps" else {}
    if case == "float64":
        block, own, x = block.double(), own.double(), x.double()
    if case == "cache":
        from model import KVCache

        arguments = {"cache": KVCache(config, 2, "cpu", torch.float32)}
    autocast = {"float16": torch.float16, "tiles": torch.bfloat16}.get(case)
    if case == "tiles":  # a processor whose bfloat16 torch multiplies faster
        monkeypatch.setattr(fused_cpu, "has_bfloat16", lambda: False)
        onednn.accelerate(own)
    results = []
    for module in (block, own):
        torch.manual_seed(0)  # of dropout
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            results.append(module(x, **arguments))
    torch.testing.assert_close(*results)
    assert calls == [] and results[0].dtype == x.dtype and (case != "taps" or len(arguments["taps"]) == 2)
    if case == "dropout":
        block.eval()(x)
        assert calls == ["attention_forward", "mlp_forward"]


@usable
@pytest.mark.parametrize("keys", [{"bias": True}, {"head_combine": "product"}, {"diffusion_learned": True, "diffusion": True}])
def test_blocks_with_biases_or_variants_stay_as_they_are(keys):
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16, **keys))
    fused_cpu.accelerate(model)
    assert type(model.transformer.h[0]) is Block


def other_width(block):
    block.mlp.c_fc, block.mlp.c_proj = torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(24, 16, bias=False)


@usable
@pytest.mark.parametrize(
    ("change", "fused"),
    [
        (other_width, True),
        (lambda block: setattr(block.attn.c_attn, "weight", torch.nn.Parameter(block.attn.c_attn.weight.t().contiguous().t())), False),
        (lambda block: setattr(block.mlp.dropout, "p", 0.5), False),
        (lambda block: setattr(block.attn.resid_dropout, "p", 0.5), False),
    ],
)
def test_what_changes_after_the_swap_is_seen(calls, change, fused):
    block = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16)).transformer.h[0]
    fused_cpu.accelerate(block)
    change(block)
    x, results = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2)), []
    for forward in (fused_cpu.FusedBlock.forward, Block.forward):
        torch.manual_seed(0)
        results.append(forward(block, x))
    torch.testing.assert_close(*results)
    assert (calls != []) == fused


@usable
@pytest.mark.parametrize("wrong", [lambda block: block.mlp.bfloat16(), lambda block: block.ln_2.double()])
def test_weights_of_several_dtypes_are_refused_by_torch(calls, wrong):
    block = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16)).transformer.h[0]
    fused_cpu.accelerate(block)
    wrong(block)
    for x in (torch.randn(2, 8, 16), torch.randn(2, 8, 12)):  # and channels that do not fit
        with pytest.raises(RuntimeError):
            block(x)
    assert calls == []


@usable
@pytest.mark.parametrize("frozen", [".*", r"attn\.c_attn", r"ln_1|mlp\.c_fc", r"c_proj|ln_2"])
@pytest.mark.parametrize("half", HALF)
def test_frozen_weights_leave_the_other_gradients_as_they_are(frozen, half):
    block, results = pair(GPTConfig(block_size=9, vocab_size=65, n_layer=1, n_head=2, n_embd=40))[0].transformer.h[0], []
    x = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for pattern in ("nothing", frozen):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(re.search(pattern, name) is None)
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = block(x)
        x.grad = None
        y.square().sum().backward()
        results.append({"x": x.grad} | {name: parameter.grad for name, parameter in block.named_parameters()})
    whole, partial = results
    assert all(gradient is not None for gradient in whole.values())
    assert {name for name, gradient in partial.items() if gradient is None} == {name for name in whole if name != "x" and re.search(frozen, name)}
    assert all(torch.equal(gradient, whole[name]) for name, gradient in partial.items() if gradient is not None)


@usable
def test_a_second_derivative_is_refused():
    block = pair(GPTConfig(block_size=8, vocab_size=65, n_layer=1, n_head=2, n_embd=16))[0].transformer.h[0]
    x = torch.randn(2, 8, 16, requires_grad=True)
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The C file in a folder of its own, nothing compiled yet, and `library` without memory."""
    source = tmp_path / "fused_cpu.c"
    source.write_bytes(fused_cpu.SOURCE.read_bytes())
    monkeypatch.setattr(fused_cpu, "SOURCE", source)
    fused_cpu.library.cache_clear()
    yield source
    fused_cpu.library.cache_clear()


@usable
def test_the_library_is_compiled_once_and_whole(elsewhere, monkeypatch):
    half = fused_cpu.has_bfloat16()
    fused_cpu.compiled(half)
    (first,) = (elsewhere.parent / "__pycache__").iterdir()
    made = first.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(fused_cpu.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
        assert fused_cpu.library() is not None
    first.unlink()  # what is loaded stays as it is
    first.write_bytes(b"no library")  # is made again
    assert fused_cpu.compiled(half).mlp_forward and first.stat().st_mtime_ns > made
    elsewhere.write_text(elsewhere.read_text() + "\n/* another */\n")
    fused_cpu.compiled(half)
    monkeypatch.setenv("CC", "env LC_ALL=C cc")  # a command with arguments
    fused_cpu.compiled(half)
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".so"] * 3


@usable
@pytest.mark.parametrize(("fault", "why"), [("compiler", "there-is-no-such-compiler"), ("syntax", "error: "), ("symbol", "no_such_function")])
def test_without_the_library_a_note_says_why_and_blocks_stay(elsewhere, monkeypatch, capsys, fault, why):
    added = {
        "compiler": "",
        "syntax": "int f(void) { return g; }",
        "symbol": "int no_such_function(void); int f(void) { return no_such_function(); }",
    }
    elsewhere.write_text(elsewhere.read_text() + added[fault])
    if fault == "compiler":
        monkeypatch.setenv("CC", "there-is-no-such-compiler")
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    fused_cpu.accelerate(model)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and why in said
    assert said.startswith("note: training on this CPU is slower than it could be, since fused_cpu.c cannot be used: ")
    assert all(type(block) is Block for block in model.transformer.h)
    assert not any(path.suffix == ".so" for path in elsewhere.parent.rglob("*"))


def test_parameters_and_their_names_stay():
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    fused_cpu.accelerate(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    swapped = onednn.available()
    assert isinstance(model.transformer.h[0].attn, CausalSelfAttention) and (type(model.lm_head) is onednn.Linear) == swapped
