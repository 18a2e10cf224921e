"""sample.py: a cached token is the token of the full forward pass, the draws follow softmax, and a checkpoint is all that it needs."""

import dataclasses
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

import checkpoint
import sample
import train
from configurator import InputError, TrainConfig, configure
from model import GPT, GPTConfig, ViT, ViTConfig
from sample import SampleConfig, StaticCache, candidates, choose, generate

ROOT = Path(__file__).resolve().parents[1]
CHARACTERS = "\nabcdefghé"
TINY = GPTConfig(block_size=8, vocab_size=len(CHARACTERS), n_layer=2, n_head=4, n_embd=16)
ARMS = {
    "A": {},
    "A - I": {"diffusion": True},
    "heads by layer": {"diffusion": True, "diffusion_heads": (1, 3), "diffusion_alpha": 0.5, "diffusion_lambda": 2.0, "bias": True},
}
DASHES = "-" * 15 + "\n"


def random_model(seed: int = 0, scale: float = 0.5, **changes) -> GPT:
    """Weights large enough that the next token depends on the whole context; those of init_weights repeat one token for ever."""
    model, generator = GPT(dataclasses.replace(TINY, **changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def save(directory: Path, model: GPT, characters: str = CHARACTERS) -> Path:
    checkpoint.save(directory, model, None, 7, tokenizer={"type": "char", "characters": characters})
    return directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """OUT_DIR with best/ and last/ of two different models. No test changes it."""
    directory = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("best", "last")):
        save(directory / name, random_model(seed))
    return directory


def text_of(capsys, **keys) -> str:
    """What main prints for these keys."""
    sample.main(SampleConfig(**keys).check())
    return capsys.readouterr().out


def drawn(logits, temperature, top_k, generator):
    return choose(candidates(logits, temperature, top_k), temperature, generator)


def greedy(model, prompt, count, **changes):
    arguments = {"temperature": 0.0, "top_k": 0, "generator": torch.Generator(), "vocabulary_size": model.config.vocab_size}
    return list(generate(model, prompt, count, **arguments | changes))


# ---------------------------------------------------------------------------------------------------------------------------------
# generate: the cache


@pytest.mark.parametrize("arm", [{}, {"diffusion": True}, {"diffusion": True, "diffusion_heads": (1,), "diffusion_alpha": 0.5}])
@torch.no_grad()
def test_one_token_into_the_cache_of_the_cuda_graph_equals_a_full_pass(arm):
    model = GPT(GPTConfig(block_size=12, vocab_size=20, n_layer=2, n_head=2, n_embd=8, **arm)).double().eval()
    torch.nn.init.normal_(model.transformer.wte.weight)
    cache = StaticCache(model.config, 1, torch.device("cpu"), torch.float64)
    cache.entries.fill_(7.0)  # left by whatever was read before
    tokens = torch.arange(12)[None] % 7
    model(tokens[:, :5], cache=cache)
    for i in range(5, 12):
        cache.position.fill_(i)
        logits, _ = model(tokens[:, i : i + 1], cache=cache)
        torch.testing.assert_close(logits, model(tokens[:, : i + 1])[0], rtol=0, atol=1e-12)
    assert cache.length == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("arm", [*ARMS.values(), {"attention_kernel": "rbf"}])
@pytest.mark.parametrize("prompt", [1, 3])
def test_generation_by_cuda_graph_equals_the_cpu(arm, prompt):
    torch.set_float32_matmul_precision("highest")
    model = random_model(block_size=32, vocab_size=50, **arm)
    keys = {"temperature": 2.0, "top_k": 20}  # a text that never repeats
    before = greedy(model, range(prompt), 80, **keys, generator=torch.Generator().manual_seed(1))
    text = greedy(model.cuda(), range(prompt), 80, **keys, generator=torch.Generator().manual_seed(1))
    after = greedy(model.cpu(), range(prompt), 80, **keys, generator=torch.Generator().manual_seed(1))
    assert text == before == after and len(set(text)) > 5


@torch.no_grad()
def plain(model, prompt, count, temperature, generator):
    """No cache: everything is read again for each token. A window that has grown beyond block_size falls back to its last half."""
    context, tokens = list(prompt)[-model.config.block_size :], []
    for _ in range(count):
        if len(context) > model.config.block_size:
            context = context[len(context) - model.config.block_size // 2 :]
        tokens.append(drawn(model(torch.tensor([context]))[0][0, -1], temperature, 0, generator))
        context.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("prompt", [1, 3, 7, 8, 13], ids="prompt {}".format)
@pytest.mark.parametrize("arm", ARMS)
def test_cached_decoding_equals_full_passes_beyond_the_context(arm, prompt):
    model = random_model(**ARMS[arm]).double()
    prompt = [i * 7 % 10 for i in range(prompt)]
    assert greedy(model, prompt, 40) == plain(model, prompt, 40, 0.0, None)
    drawn = greedy(model, prompt, 40, temperature=2.0, generator=torch.Generator().manual_seed(5))  # a text that never repeats
    assert drawn == plain(model, prompt, 40, 2.0, torch.Generator().manual_seed(5))
    assert len(set(drawn)) > 5


def test_a_context_of_one_token_works():
    model = random_model(block_size=1).double()
    by_token = [int(model(torch.tensor([[i]]))[0].argmax()) for i in range(10)]
    tokens = greedy(model, [3], 6)
    assert tokens == [by_token[i] for i in [3, *tokens[:-1]]]


@pytest.mark.parametrize("prompt, read", [(3, [3] + [1] * 5 + [4, 1, 1, 1, 1, 4, 1]), (8, [8, 4, 1, 1, 1, 1, 4]), (12, [8, 4, 1, 1, 1, 1, 4])])
def test_half_the_window_is_read_again_once_and_single_tokens_otherwise(prompt, read):
    model, lengths = random_model(), []
    model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].size(1)))
    greedy(model, [1] * prompt, len(read))
    assert lengths == read


def test_the_prompt_is_not_changed_and_tokens_come_one_by_one():
    model, prompt = random_model(), [1, 2, 3]
    tokens = generate(model, prompt, 10**9, 1.0, 0, torch.Generator(), 10)
    assert len([next(tokens) for _ in range(20)]) == 20 and prompt == [1, 2, 3]
    assert not torch.is_inference_mode_enabled(), "the caller's own mode is his between two tokens"


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    greedy(random_model(), [1], 20, temperature=1.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_1_is_greedy_and_a_large_top_k_is_all():
    model = random_model()

    def seeded(**changes):
        return greedy(model, [1], 60, generator=torch.Generator().manual_seed(4), **changes)

    assert seeded(temperature=1.5, top_k=1) == seeded(temperature=0.0) != seeded(temperature=1.5, top_k=2)
    ties = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    assert drawn(ties, 1.0, 1, torch.Generator()) == drawn(ties, 0.0, 0, torch.Generator()), "of equal logits both take the same"
    assert seeded(temperature=1.5, top_k=10) == seeded(temperature=1.5, top_k=0) == seeded(temperature=1.5, top_k=200)


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_padding_rows_are_never_drawn(temperature):
    model = random_model(vocab_size=16)
    with torch.no_grad():  # logits far above the others', of either sign
        model.lm_head.weight[12:16] = 50 * torch.randn(4, 16, generator=torch.Generator().manual_seed(2))

    def drawn(size):
        return greedy(model, [1], 300, temperature=temperature, generator=torch.Generator().manual_seed(1), vocabulary_size=size)

    assert max(drawn(10)) < 10
    assert max(drawn(16)) >= 12, "without the mask they are drawn"


# ---------------------------------------------------------------------------------------------------------------------------------
# choose: the law of the draws

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.9], dtype=torch.float64)


def p_value(temperature, top_k, expected) -> float:
    """Of the chi-square test of 20,000 draws against the probabilities `expected`; 0 when an impossible one was drawn."""
    generator = torch.Generator().manual_seed(11)
    counts = np.bincount([drawn(LOGITS, temperature, top_k, generator) for _ in range(20_000)], minlength=6)
    possible = expected > 0
    return stats.chisquare(counts[possible], 20_000 * expected[possible]).pvalue if counts[~possible].sum() == 0 else 0.0


def softmax(temperature, kept=range(6)):
    weights = np.array([np.exp(float(logit) / temperature) if i in kept else 0.0 for i, logit in enumerate(LOGITS)])
    return weights / weights.sum()


@pytest.mark.parametrize(
    "temperature, top_k, expected, wrong",
    [
        (1.0, 0, softmax(1.0), softmax(0.9)),
        (0.5, 0, softmax(0.5), softmax(1.0)),
        (3.0, 6, softmax(3.0), softmax(1 / 3)),
        (0.8, 3, softmax(0.8, kept=(1, 3, 5)), softmax(0.8)),
        (1e9, 4, softmax(1e9, kept=(0, 1, 3, 5)), softmax(1e9)),
    ],
)
def test_draws_follow_softmax(temperature, top_k, expected, wrong):
    assert p_value(temperature, top_k, expected) > 1e-3
    assert p_value(temperature, top_k, wrong) < 1e-6, "20,000 draws tell it from a law nearby"


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3])
def test_towards_zero_the_draws_become_the_largest(temperature):
    generator = torch.Generator().manual_seed(1)
    assert {drawn(1e3 * LOGITS, temperature, top_k, generator) for top_k in (0, 3) for _ in range(50)} == {1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_diverged_run_are_named(bad, temperature):
    with pytest.raises(InputError, match=f"largest logit is {bad}.*diverged"):
        drawn(torch.tensor([0.0, bad, 1.0]), temperature, 2, torch.Generator())


# ---------------------------------------------------------------------------------------------------------------------------------
# main: what is printed


def test_equal_seeds_give_equal_texts_and_a_sample_does_not_depend_on_their_number(run_dir, capsys):
    keys = {"out_dir": str(run_dir), "start": "ab", "max_new_tokens": 30}
    three = text_of(capsys, num_samples=3, **keys)
    texts = three.split("\n" + DASHES)
    assert len(texts) == 4 and texts[3] == "" and len({*texts[:3]}) == 3
    assert all(len(text) == 32 and text.startswith("ab") and set(text) <= set(CHARACTERS) for text in texts[:3])
    assert text_of(capsys, num_samples=3, **keys) == three
    assert text_of(capsys, num_samples=1, **keys) == texts[0] + "\n" + DASHES
    assert text_of(capsys, num_samples=1, seed=1, **keys) != texts[0] + "\n" + DASHES


def test_which_checkpoint(run_dir, capsys):
    keys = {"start": "ab", "num_samples": 1, "max_new_tokens": 30, "temperature": 0.0}
    best, last = (text_of(capsys, out_dir=str(run_dir), which=which, **keys) for which in ("best", "last"))
    assert best != last == text_of(capsys, out_dir=str(run_dir / "last"), **keys)
    with pytest.raises(InputError, match="last holds no checkpoint"):
        sample.main(SampleConfig(out_dir=str(run_dir / "best" / ".."), which="best/../../last"))


def test_the_empty_prompt_is_a_newline_that_is_not_printed(run_dir, capsys):
    keys = {"out_dir": str(run_dir), "num_samples": 5, "max_new_tokens": 20, "temperature": 3.0}
    empty, newline, letter = (text_of(capsys, start=start, **keys).split(DASHES) for start in ("", "\n", "a"))
    assert newline[:5] == ["\n" + text for text in empty[:5]]
    assert letter[:5] != ["a" + text for text in empty[:5]], "the first token does matter"


def test_a_prompt_longer_than_the_context_is_cut_with_a_note(run_dir, capsys):
    keys = {"out_dir": str(run_dir), "num_samples": 2, "max_new_tokens": 20}
    sample.main(SampleConfig(start="hgfedcbaabcdefgh", **keys))
    long = capsys.readouterr()
    assert long.err == "note: the prompt has 16 tokens, the model reads the last 8 of them\n"
    sample.main(SampleConfig(start="abcdefgh", **keys))
    short = capsys.readouterr()
    assert short.err == "" and long.out.replace("hgfedcba", "", 1).replace(DASHES + "hgfedcba", DASHES) == short.out


def test_a_foreign_character_is_named(run_dir):
    with pytest.raises(InputError, match="'z' at position 2 is not in the model's vocabulary of 10: abcdefghé"):
        sample.main(SampleConfig(out_dir=str(run_dir), start="abz"))


@pytest.mark.parametrize("content", ["ab\n".encode(), "ab\r\n".encode(), "\ufeffab\n".encode()], ids=["plain", "windows", "byte order mark"])
def test_a_prompt_from_a_file(run_dir, tmp_path, capsys, content):
    (tmp_path / "prompt.txt").write_bytes(content)
    keys = {"out_dir": str(run_dir), "num_samples": 1, "max_new_tokens": 20}
    assert text_of(capsys, start=f"FILE:{tmp_path / 'prompt.txt'}", **keys) == text_of(capsys, start="ab\n", **keys)


@pytest.mark.parametrize("name, words", [("missing.txt", "No such file"), (".", "Is a directory"), ("latin.txt", "not UTF-8 at byte 2")])
def test_a_file_that_gives_no_prompt_is_named(run_dir, tmp_path, name, words):
    (tmp_path / "latin.txt").write_bytes("abé".encode("latin-1"))
    with pytest.raises(InputError, match=words) as error:
        sample.main(SampleConfig(out_dir=str(run_dir), start=f"FILE:{tmp_path / name}"))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_the_data_folder_may_be_gone(tokens_dir, tmp_path, capsys):
    shutil.copytree(tokens_dir, tmp_path / "data")
    keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1, "max_iters": 2}
    keys |= {"decay_lr": False, "eval_tokens": 160, "vocab_size": 64, "device": "cpu"}
    assert train.main(TrainConfig(dataset=str(tmp_path / "data"), out_dir=str(tmp_path / "run"), **keys)) == 0
    shutil.rmtree(tmp_path / "data")
    capsys.readouterr()
    text = text_of(capsys, out_dir=str(tmp_path / "run"), start="The ", num_samples=1, max_new_tokens=40, temperature=100.0)
    assert len(text) == 4 + 40 + 1 + len(DASHES), "of 64 rows only those of the characters are drawn, and each prints as one"


def picture_checkpoint(tmp_path) -> ViT:
    """OUT_DIR with a random model of 4 x 4 pictures of 3 classes, and a data set of five validation pictures."""
    generator = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val.bin").write_bytes(generator.integers(0, 256, (5, 3, 4, 4), dtype=np.uint8).tobytes())
    (tmp_path / "data" / "val_labels.bin").write_bytes(np.array([0, 1, 2, 1, 0], dtype="<u2").tobytes())
    model = ViT(ViTConfig(image_size=4, patch_size=2, n_layer=1, n_head=1, n_embd=8, n_classes=3), seed=1)
    about = {"type": "pictures", "class_names": ["cat", "dog", "fox"], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "shape": [3, 4, 4]}
    checkpoint.save(tmp_path / "best", model, None, 1, tokenizer=about, config={"dataset": str(tmp_path / "data")})
    return model.double().eval()


def test_validation_pictures_get_the_models_classes(tmp_path, capsys):
    model = picture_checkpoint(tmp_path)
    sample.main(SampleConfig(out_dir=str(tmp_path), num_samples=4, device="cpu"))
    pictures = np.frombuffer((tmp_path / "data" / "val.bin").read_bytes(), dtype=np.uint8).reshape(5, 3, 4, 4)[:4]
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
    x = torch.from_numpy((pictures / 255 - mean[:, None, None]) / std[:, None, None])
    shares = model(x)[0].softmax(dim=1)
    lines = capsys.readouterr().out.splitlines()
    for i, label in enumerate(("cat", "dog", "fox", "dog")):
        order = shares[i].argsort(descending=True).tolist()
        told = ", ".join(f"{('cat', 'dog', 'fox')[k]} {shares[i, k].item():.1%}" for k in order)
        assert lines[i] == f"validation picture {i}, {label}: {told}"
    assert len(lines) == 5 and Image.open(tmp_path / "sheet.png").format == "PNG"


def test_a_picture_file_is_reduced_and_classified(tmp_path, capsys):
    model = picture_checkpoint(tmp_path)
    large = np.kron(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5, np.ones((3, 3, 1), dtype=np.uint8))  # BOX undoes the enlargement
    Image.fromarray(large).save(tmp_path / "file.png")
    sample.main(SampleConfig(out_dir=str(tmp_path), pictures=str(tmp_path / "file.png"), device="cpu"))
    small = (np.arange(48).reshape(4, 4, 3) * 5).transpose(2, 0, 1)
    x = (small / 255 - np.array([0.5, 0.4, 0.3])[:, None, None]) / np.array([0.2, 0.25, 0.3])[:, None, None]
    share, best = model(torch.from_numpy(x[None]))[0].softmax(dim=1)[0].max(dim=0)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'file.png'}: {('cat', 'dog', 'fox')[best]} {float(share):.1%}")


def test_pictures_and_text_are_not_mixed_up(tmp_path):
    picture_checkpoint(tmp_path)
    (tmp_path / "text").write_text("no picture")
    cases = {"start": ("x", "--start is for text"), "pictures": (str(tmp_path / "text"), "of no known format")}
    for key, (value, message) in cases.items():
        with pytest.raises(InputError, match=message):
            sample.main(SampleConfig(out_dir=str(tmp_path), device="cpu", **{key: value}))
    with pytest.raises(InputError, match="does not exist"):
        sample.main(SampleConfig(out_dir=str(tmp_path), device="cpu", pictures=str(tmp_path / "nowhere")))
    (tmp_path / "data" / "val.bin").unlink()
    with pytest.raises(InputError, match="not there"):
        sample.main(SampleConfig(out_dir=str(tmp_path), device="cpu"))


class Bytes:
    """A tokenizer whose token i is byte i."""

    type = "gpt2"

    class bpe:  # noqa: N801, named as Tokenizer's attribute
        n_vocab = 256

    def encode(self, text):
        self.seen = text
        return [0]

    def decode_bytes(self, token):
        return bytes([token])


def test_characters_cut_by_tokens_are_put_together_and_never_held_back(monkeypatch):
    tokenizer, printed, raw = Bytes(), [], io.BytesIO()
    text = "aé€😀".encode() + b"\xff" + "b€".encode()[:3]

    def tokens(*_):
        for token in text:
            yield token
            printed.append(raw.getvalue().decode())

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))  # buffered, as a pipe is
    monkeypatch.setattr(sample, "load_model", lambda *_: (random_model(), tokenizer, {}))
    monkeypatch.setattr(sample, "generate", tokens)
    sample.main(SampleConfig(num_samples=1))
    assert tokenizer.seen == "<|endoftext|>"
    pieces = ["a", "", "é", "", "", "€", "", "", "", "😀", "\ufffd", "b", "", ""]  # each as soon as it is whole
    assert printed == list(itertools.accumulate(pieces))
    assert raw.getvalue().decode() == "aé€😀\ufffdb\ufffd\n" + DASHES


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("start", ["", "a=b", "--x", "-x", "a b\nc", " ", "é", "None", "'\"", "1", "True", "@file", "file.py"])
def test_any_text_is_a_prompt(start):
    assert configure(SampleConfig, [f"--start={start}"]).start == start


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_samples", 0, "at least 1"),
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", -0.1, "finite"),
        ("temperature", float("inf"), "finite"),
        ("temperature", float("nan"), "finite"),
        ("top_k", -1, "or above"),
        ("which", "first", "best or last"),
        ("seed", -1, "negative"),
        ("seed", 2**63, "below"),
        ("device", "gpu", "must be auto"),
        ("dtype", "int8", "must be auto"),
        ("out_dir", "", "empty"),
    ],
)
def test_values_out_of_range_are_named(key, value, words):
    with pytest.raises(InputError, match=words) as error:
        SampleConfig(**{key: value}).check()
    assert f"--{key}" in str(error.value) and str(value) in str(error.value)


def start_process(*arguments, **options):
    """sample.py away from the repository, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **options
    )


def test_the_command_line_prints_what_main_prints(run_dir, tmp_path, capsys):
    arguments = ["--start", "bé", "--num_samples=2", "--max_new_tokens=25", "--top_k=3"]
    process = start_process(f"--out_dir={run_dir}", *arguments, cwd=tmp_path, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out == text_of(capsys, out_dir=str(run_dir), start="bé", num_samples=2, max_new_tokens=25, top_k=3)
    assert list(tmp_path.iterdir()) == [], "sampling writes no files"


def test_errors_are_one_line_with_status_2(run_dir, tmp_path):
    process = start_process(f"--out_dir={run_dir}", "--start=abz", cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "") and err.startswith("error: character 'z'") and err.count("\n") == 1


def test_help_and_a_misspelt_key_do_not_wait_for_torch():
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('LOADED', 'torch' in sys.modules)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for argument, status in (("--help", 0), ("--temprature=1", 2)):
        done = subprocess.run([sys.executable, "-c", code, ROOT / "sample.py", argument], capture_output=True, encoding="utf-8")
        assert done.returncode == status and done.stdout.endswith("LOADED False\n"), done.stderr
        if status:
            assert done.stderr == "error: unknown key 'temprature'; perhaps you meant 'temperature'\n"
        else:
            assert "FILE:PATH" in done.stdout and all(f"--{field.name} " in done.stdout for field in dataclasses.fields(SampleConfig))


def endless(run_dir, tmp_path):
    """A process that would run for hours, after its first 200 characters have arrived."""
    process = start_process(f"--out_dir={run_dir}", "--start=a", "--max_new_tokens=1000000000", cwd=tmp_path)
    assert len(process.stdout.read(200)) == 200, "text arrives while it is made"
    return process


def test_ctrl_c_ends_quietly_with_status_130(run_dir, tmp_path):
    process = endless(run_dir, tmp_path)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_a_closed_pipe_ends_it_without_a_word(run_dir, tmp_path):
    process = endless(run_dir, tmp_path)
    process.stdout.close()
    assert process.wait(timeout=20) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""


def test_a_fresh_process_knows_the_formats_of_pictures(tmp_path):
    """PIL knows none before it is initialised, which a test that has saved a picture would not notice."""
    Image.new("RGB", (20, 30), (200, 10, 10)).save(tmp_path / "red.png")
    code = (
        "import sys; from pathlib import Path; from pictures import reduce_picture; print(reduce_picture(Path(sys.argv[1]), 4)[0].mean(axis=(1, 2)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "red.png")], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[200.", "10.", "10.]"]


def test_more_validation_pictures_than_there_are(tmp_path):
    from classify import read_pictures

    np.zeros((3, 3, 4, 4), dtype=np.uint8).tofile(tmp_path / "val.bin")
    np.zeros(3, dtype="<u2").tofile(tmp_path / "val_labels.bin")
    meta = {"tokenizer": {"class_names": ["cat"], "shape": [3, 4, 4]}, "config": {"dataset": str(tmp_path)}}
    assert len(read_pictures("", 10**12, meta)[0]) == 3
