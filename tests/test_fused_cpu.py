"""fused_cpu.py's blocks against the model's own in float64, and laws that they keep."""

import math

import pytest
import torch

import fused_cpu
import onednn
from model import GPT, Block, CausalSelfAttention, GPTConfig, ViT, ViTConfig

usable = pytest.mark.skipif(fused_cpu.library() is None, reason="no Linux on x86-64 with AVX-512, or no C compiler")
DIFFUSION = [{}, {"diffusion": True}, {"diffusion": True, "diffusion_heads": (1,), "diffusion_alpha": 0.7, "diffusion_lambda": 1.3}]
SHAPES = [(4, 128, 64, 12), (3, 120, 37, 5), (2, 34, 70, 3), (1, 5, 1, 1), (2, 96, 130, 2)]  # heads, channels, tokens, sequences
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
    bound = 4 * 2**-8 if half else 2e-6  # some roundings of bfloat16; float32's, growing with the square root of the sums' length
    worst = errors(model, exact, idx, half=half)
    assert len(worst) == 2 + 2 * 6 and {name: error for name, error in worst.items() if not error < bound} == {}
    forward, backward = ["attention_forward", "mlp_forward"] * 2, ["mlp_backward", "attention_backward"] * 2
    assert calls == forward + backward


@usable
@pytest.mark.parametrize("keys", DIFFUSION)
def test_every_token_attends_to_every_other_in_a_vision_transformer(keys):
    model, exact = pair(ViTConfig(n_classes=10, n_layer=2, n_head=2, n_embd=48, **keys), ViT)
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
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
def test_saturated_softmax_and_gelu_are_those_of_float64():
    model, exact = pair(GPTConfig(block_size=40, vocab_size=65, n_layer=1, n_head=2, n_embd=64), size=400.0)
    with torch.no_grad():
        for network in (model, exact):
            network.transformer.h[0].mlp.c_fc.weight.mul_(1e25)  # the square of what enters the GELU is beyond float32
            network.transformer.h[0].mlp.c_proj.weight.mul_(1e-25)
    idx = torch.randint(65, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = (network.transformer.h[0](network.embed(idx)) for network in (model, exact))
    assert ours.isfinite().all() and float((ours - theirs).norm() / theirs.norm()) < 1e-4  # logits of hundreds have errors that exp enlarges


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
def test_the_library_is_compiled_once_and_whole(elsewhere):
    first = fused_cpu.compiled(fused_cpu.has_bfloat16())
    made = first.stat().st_mtime_ns
    assert fused_cpu.compiled(fused_cpu.has_bfloat16()) == first and first.stat().st_mtime_ns == made
    assert [path for path in first.parent.iterdir()] == [first] and fused_cpu.library() is not None
    elsewhere.write_text(elsewhere.read_text() + "\n/* another */\n")
    assert fused_cpu.compiled(fused_cpu.has_bfloat16()) != first


@usable
@pytest.mark.parametrize("fault", ["no compiler", "an error in the file"])
def test_without_the_library_a_note_says_why_and_blocks_stay(elsewhere, monkeypatch, capsys, fault):
    if fault == "no compiler":
        monkeypatch.setenv("CC", "there-is-no-such-compiler")
    else:
        elsewhere.write_text("int broken(")
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    fused_cpu.accelerate(model)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("note: training on this CPU is slower than it could be, since fused_cpu.c cannot be compiled: ")
    assert ("there-is-no-such-compiler" if fault == "no compiler" else "error") in said
    assert all(type(block) is Block for block in model.transformer.h)
    assert not any(path.suffix == ".so" for path in elsewhere.parent.rglob("*"))


def test_parameters_and_their_names_stay():
    model = GPT(GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=16))
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    fused_cpu.accelerate(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    swapped = onednn.available()
    assert isinstance(model.transformer.h[0].attn, CausalSelfAttention) and (type(model.lm_head) is onednn.Linear) == swapped
