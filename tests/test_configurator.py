"""configurator.py: files and options into one checked config, and errors of one line with exit status 2."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import InputError, TrainConfig, build, check_diffusion_heads, configure, one_line_errors, read_config_file, split_arguments

ROOT = Path(__file__).resolve().parents[1]


def parsed(*args) -> TrainConfig:
    return configure(TrainConfig, [str(arg) for arg in args])


def message_of(*args) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(InputError) as error:
        parsed(*args)
    assert "\n" not in str(error.value) and str(error.value)
    return str(error.value)


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------------------------
# Values


def test_no_arguments_give_the_defaults():
    assert parsed() == TrainConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed().seed = 1


# the two places of the barrier, whose keys exclude each other
VARIANT = dict(
    head_combine="product", attention_kernel="rbf", diffusion_learned=True
)  # of which the barrier on the model's own attention knows nothing
EMBEDDING = dict(prior_form="square", prior_dim=4, prior_energy=0.5, prior_tied=True, prior_normalise=True, **VARIANT)
ATTENTION = dict(prior_where="attention", prior_positions=3, prior_layers=(0, 2))


@pytest.mark.parametrize("place, other", [(EMBEDDING, ATTENTION), (ATTENTION, EMBEDDING)])
def test_every_key_survives_the_command_line_and_a_file(place, other, tmp_path):
    values = dict(
        out_dir="o", overwrite=True, eval_interval=3, eval_tokens=7, log_interval=2, eval_only=True, always_save_checkpoint=False, init_from="resume",
        wandb_log=True, wandb_project="p", wandb_run_name="r", dataset="d", gradient_accumulation_steps=5, batch_size=6, block_size=8, patch_size=4,
        crop_pad=1, flip=False, n_layer=3, n_head=2, n_embd=10, vocab_size=99, dropout=0.25, bias=True, diffusion=True, diffusion_alpha=0.5,
        diffusion_lambda=1.5, diffusion_heads=(0, 1, 2), learning_rate=0.01, max_iters=50, weight_decay=0.2, beta1=0.8, beta2=0.9, grad_clip=2.0,
        decay_lr=False, warmup_iters=4, lr_decay_iters=40, min_lr=0.001, seed=5, device="cpu", dtype="bfloat16", compile=True, cuda_graph=False,
        probe_interval=6, weight_init="unrolled", parallel="fsdp", prior_lambda=0.1, prior_anneal=True, prior_detach=True, embed_noise=0.5,
        label_smoothing=0.1, **place,
    )  # fmt: skip
    expected = TrainConfig(**values)
    left_out = {field.name for field in dataclasses.fields(TrainConfig) if getattr(expected, field.name) == field.default}
    assert left_out == other.keys() - place.keys()
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    options = [f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in values.items()]
    assert parsed(*options) == parsed(written(tmp_path / "all.py", *lines)) == expected


@pytest.mark.parametrize("key", ["learning_rate", "weight_decay", "grad_clip", "diffusion_lambda", "min_lr"])
def test_a_whole_number_becomes_a_float(key, tmp_path):
    rest = ["--diffusion=True", "--learning_rate=2"]
    for config in (parsed(*rest, f"--{key}=1"), parsed(written(tmp_path / "c.py", "diffusion = True", "learning_rate = 2", f"{key} = 1"))):
        assert type(getattr(config, key)) is float and getattr(config, key) == 1.0


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "1", "false", "False", "FALSE", "0"])
def test_words_for_booleans(word):
    value = word.lower() in ("true", "1")
    assert parsed(f"--bias={word}").bias is value
    assert parsed(f"--decay_lr={word}").decay_lr is value
    assert parsed(f"--compile={word}").compile is value


@pytest.mark.parametrize("word", ["yes", "2", "", "None", "t"])
def test_other_words_are_no_booleans(word):
    assert message_of(f"--bias={word}") == f"--bias={word} is not of type bool"


def test_none_is_a_value_of_the_keys_that_have_it(tmp_path):
    file = written(tmp_path / "c.py", "min_lr = None", "lr_decay_iters = None", "compile = None")
    config = parsed("--min_lr=1e-5", "--lr_decay_iters=9000", "--compile=True", "--min_lr=None", "--lr_decay_iters=None", "--compile=None")
    assert config == parsed(file) == TrainConfig()


@pytest.mark.parametrize(
    "word, line, heads", [("", "()", ()), ("3", "3", (3,)), ("3", "(3,)", (3,)), ("0,2", "[0, 2]", (0, 2)), ("0, 2,", "(0, 2)", (0, 2))]
)
def test_diffusion_heads_of_all_forms(word, line, heads, tmp_path):
    rest = ["--n_layer=2", "--diffusion=True"]
    assert parsed(*rest, f"--diffusion_heads={word}").diffusion_heads == heads
    assert parsed(written(tmp_path / "c.py", f"diffusion_heads = {line}"), *rest).diffusion_heads == heads


def test_a_value_may_hold_an_equals_sign_or_be_odd():
    assert parsed("--out_dir=a=b").out_dir == "a=b"
    assert parsed("--out_dir", "a=b").out_dir == "a=b"
    assert parsed("--out_dir=--x y").out_dir == "--x y"
    assert parsed("--wandb_run_name=").wandb_run_name == ""
    assert parsed("--out_dir=[1]│").out_dir == "[1]│"


def test_value_after_a_space_and_hyphens():
    expected = dataclasses.replace(TrainConfig(), dropout=0.1, batch_size=3)
    assert parsed("--dropout", "0.1", "--batch-size", "3") == parsed("--dropout=0.1", "--batch-size=3") == expected
    assert split_arguments(["a.py", "--x-y", "-1", "b.py", "--z=--w"]) == (["a.py", "b.py"], [("x_y", "-1"), ("z", "--w")])


# ---------------------------------------------------------------------------------------------------------------------------------
# Files


def test_the_last_word_wins(tmp_path):
    one, two = written(tmp_path / "1.py", "seed = 1", "batch_size = 1"), written(tmp_path / "2.py", "seed = 2")
    assert (parsed(one, two).seed, parsed(one, two).batch_size) == (2, 1)
    assert parsed(two, one).seed == 1
    assert parsed("--seed=3", one, two).seed == 3
    assert parsed("--seed=3", one, "--seed", "4").seed == 4


def test_base_is_read_first_and_relative_to_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    written(tmp_path / "ground.py", "seed = 1", "batch_size = 1", "block_size = 1")
    written(tmp_path / "deep" / "middle.py", 'base = "../ground.py"', "seed = 2", "batch_size = 2")
    top = written(tmp_path / "top.py", "seed = 3", 'base = "deep/middle.py"')  # wherever the line stands
    ground, middle = tmp_path / "deep" / ".." / "ground.py", tmp_path / "deep" / "middle.py"
    layers = [(ground, {"seed": 1, "batch_size": 1, "block_size": 1}), (middle, {"seed": 2, "batch_size": 2}), (top, {"seed": 3})]
    assert read_config_file(top) == layers
    config = parsed(top, "--block_size=4")
    assert (config.seed, config.batch_size, config.block_size) == (3, 2, 4)


def test_a_diamond_of_bases_is_no_loop(tmp_path):
    written(tmp_path / "ground.py", "seed = 1")
    files = [written(tmp_path / f"{i}.py", 'base = "ground.py"', f"batch_size = {i}") for i in (2, 3)]
    assert (parsed(*files).seed, parsed(*files).batch_size) == (1, 3)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_loop_of_bases_is_refused(length, tmp_path):
    for i in range(length):
        written(tmp_path / f"{i}.py", f'base = "{(i + 1) % length}.py"')
    assert str(tmp_path / "0.py") in message_of(tmp_path / "0.py") and "base" in message_of(tmp_path / "0.py")


def test_missing_files_are_named(tmp_path):
    assert str(tmp_path / "no.py") in message_of(tmp_path / "no.py")
    assert str(tmp_path / "no.py") in message_of(written(tmp_path / "c.py", 'base = "no.py"'))
    (tmp_path / "dir.py").mkdir()
    assert str(tmp_path / "dir.py") in message_of(tmp_path / "dir.py")


@pytest.mark.parametrize(
    "lines, word, line",
    [(["seed = 1", "seed = ("], "SyntaxError", 2), (["", "1 / 0"], "ZeroDivisionError", 2), (["import no_such_module"], "ModuleNotFoundError", 1)],
)
def test_a_file_that_does_not_run_is_named_with_the_line(lines, word, line, tmp_path):
    message = message_of(written(tmp_path / "c.py", *lines))
    assert f"{tmp_path / 'c.py'}, line {line}: {word}" in message


def test_private_names_modules_and_functions_are_the_files_own(tmp_path):
    file = written(tmp_path / "c.py", "import math", "_width = 32", "def twice(x):", "    return 2 * x", "n_embd = twice(_width * 6)")
    assert read_config_file(file) == [(file, {"n_embd": 384})]


def test_a_file_runs_in_a_namespace_of_its_own(tmp_path):
    one = written(tmp_path / "1.py", "seed = 1", "_x = 2")
    two = written(tmp_path / "2.py", "batch_size = 3 if '_x' in globals() or 'seed' in globals() else 4")
    assert parsed(one, two).batch_size == 4


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "config").glob("*.py")))
def test_the_configs_of_the_repository_are_valid(file):
    assert parsed(ROOT / "config" / file) != TrainConfig()


def test_quick_laplacian_differs_in_the_arm_alone():
    plain, laplacian = (dataclasses.asdict(parsed(ROOT / "config" / name)) for name in ("quick.py", "quick_laplacian.py"))
    assert {key for key in plain if plain[key] != laplacian[key]} == {"out_dir", "diffusion"}


# ---------------------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("wrong, right", [("n_layr", "n_layer"), ("learning_rat", "learning_rate"), ("max_iter", "max_iters"), ("Seed", "seed")])
def test_misspelt_key_suggests_the_right_one(wrong, right, tmp_path):
    message = message_of(f"--{wrong}=3")
    assert repr(wrong) in message and f"perhaps you meant {right!r}" in message
    file = written(tmp_path / "c.py", f"{wrong} = 3")
    message = message_of(file)
    assert message.startswith(f"config file {file}: ") and repr(wrong) in message and f"perhaps you meant {right!r}" in message


def test_a_key_like_no_other_and_the_retired_ones():
    assert "'zzzzzzzz'" in message_of("--zzzzzzzz=3") and "--help" in message_of("--zzzzzzzz=3")
    assert "'eval_iters'" in message_of("--eval_iters=3") and "--eval_tokens" in message_of("--eval_iters=3")
    assert "'backend'" in message_of("--backend=nccl")


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("n_layer", "many", "int"), ("n_layer", 4.5, "int"), ("batch_size", True, "int"), ("learning_rate", "fast", "float"),
        ("bias", "maybe", "bool"), ("diffusion_heads", (1.5,), "int[,int...]"), ("seed", None, "int"), ("min_lr", "low", "float | None"),
        ("compile", "maybe", "bool | None"),
    ],
)  # fmt: skip
def test_a_wrong_type_names_key_value_and_file(key, value, wanted, tmp_path):
    file = written(tmp_path / "c.py", f"{key} = {value!r}")
    shown = str(value[0]) if isinstance(value, tuple) else str(value)
    assert message_of(file) == f"config file {file}: --{key}={shown} is not of type {wanted}"
    for among in ([f"--{key}={shown}"], ["--block_size=4", f"--{key}={shown}", "--dropout=0.5"]):
        assert message_of(*among) == f"--{key}={shown} is not of type {wanted}"


def test_a_good_option_does_not_hide_a_wrong_file(tmp_path):
    file = written(tmp_path / "c.py", "n_layer = 'x'")
    assert str(file) in message_of(file, "--n_layer=2")


@pytest.mark.parametrize("args", [["--seed"], ["--seed", "--batch_size=3"], ["--batch_size=3", "--seed"]], ids=" ".join)
def test_a_key_without_a_value_is_named(args):
    assert "--seed needs a value" in message_of(*args)


@pytest.mark.parametrize("word", ["quick", "config/quick.yaml", "-x", "seed=3"])
def test_a_word_that_is_neither_option_nor_file_is_named(word):
    assert repr(word) in message_of(word)


CROSS = [
    *[([f"--{key}=0"], [f"--{key}=0"]) for key in ("eval_interval", "log_interval", "gradient_accumulation_steps", "batch_size", "block_size")],
    *[([f"--{key}=0"], [f"--{key}=0"]) for key in ("n_layer", "n_head", "n_embd")],
    *[([f"--{key}=-1"], [f"--{key}=-1"]) for key in ("eval_tokens", "vocab_size", "max_iters", "warmup_iters", "seed", "weight_decay", "grad_clip")],
    (["--patch_size=0"], ["--patch_size=0"]),
    (["--crop_pad=-1"], ["--crop_pad=-1"]),
    *[([f"--{key}={bad}"], [f"--{key}={bad}"]) for key in ("learning_rate", "diffusion_lambda", "grad_clip") for bad in ("nan", "inf")],
    *[([f"--dropout={bad}"], [f"--dropout={bad}"]) for bad in ("-0.1", "1.0", "2.0")],
    (["--beta1=1.0"], ["--beta1=1.0"]),
    (["--beta2=-0.5"], ["--beta2=-0.5"]),
    (["--learning_rate=0"], ["--learning_rate=0"]),
    (["--seed=9223372036854775808"], ["--seed=9223372036854775808", "2**63"]),
    (["--n_embd=768", "--n_head=7"], ["--n_embd=768", "--n_head=7"]),
    (["--diffusion=True", "--diffusion_heads=1,2", "--n_layer=3"], ["--diffusion_heads=1,2", "(3)"]),
    (["--diffusion=True", "--diffusion_heads=13"], ["--diffusion_heads=13", "n_head=12"]),
    (["--diffusion=True", "--diffusion_heads=-1"], ["--diffusion_heads=-1"]),
    (["--diffusion_alpha=0.5"], ["diffusion_alpha", "--diffusion=True"]),
    (["--diffusion_lambda=0.5"], ["diffusion_lambda", "--diffusion=True"]),
    (["--diffusion_heads=2"], ["diffusion_heads", "--diffusion=True"]),
    (["--warmup_iters=100", "--max_iters=100"], ["--warmup_iters=100", "100 steps"]),
    (["--warmup_iters=60", "--lr_decay_iters=50"], ["--warmup_iters=60", "50 steps"]),
    (["--min_lr=1e-2", "--learning_rate=1e-3"], ["--min_lr=0.01", "--learning_rate=0.001"]),
    (["--min_lr=-1e-3"], ["--min_lr=-0.001"]),
    (["--dtype=half"], ["--dtype=half"]),
    (["--parallel=dp"], ["--parallel=dp", "ddp", "fsdp"]),
    (["--device=gpu"], ["--device=gpu"]),
    (["--device=cuda:"], ["--device=cuda:"]),
    (["--out_dir="], ["--out_dir"]),
]


@pytest.mark.parametrize("args, words", CROSS, ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "")
def test_cross_checks_are_one_line_that_names_key_and_value(args, words):
    message = message_of(*args)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "args",
    [
        ["--max_iters=0"], ["--eval_tokens=0", "--grad_clip=0", "--weight_decay=0"], ["--dropout=0.999"], ["--beta1=0", "--beta2=0"],
        ["--warmup_iters=99", "--max_iters=100"], ["--warmup_iters=100", "--max_iters=100", "--decay_lr=False"], ["--min_lr=0"], ["--min_lr=6e-4"],
        ["--diffusion=True", "--diffusion_heads=0"], ["--diffusion=True", "--diffusion_heads=12", "--diffusion_alpha=-1", "--diffusion_lambda=0"],
        ["--diffusion=False", "--diffusion_alpha=1"], ["--seed=9223372036854775807"], ["--device=cuda:3"], ["--n_head=1", "--n_embd=1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_values_on_the_right_side_of_each_limit_pass(args):
    assert parsed(*args).check() == parsed(*args)


@pytest.mark.parametrize("heads", [(0,), (4,), (0, 4, 2), ()])
def test_check_diffusion_heads_accepts(heads):
    assert check_diffusion_heads(heads, 3, 4) is None


def test_build_takes_dataclasses_without_a_check():
    @dataclasses.dataclass(frozen=True)
    class Two:
        """Two keys."""

        width: int = 3
        name: str = "x"

    assert build(Two, [], [("width", "4")]) == Two(4, "x")
    with pytest.raises(InputError, match="perhaps you meant 'width'"):
        build(Two, [], [("widht", "4")])


def test_one_line_errors_lets_others_through(capsys):
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise InputError("this and that")
    assert stop.value.code == 2 and capsys.readouterr() == ("", "error: this and that\n")


@pytest.mark.parametrize(
    "lines", [["batch_size = {3}"], ["from pathlib import Path", "out_dir = Path('x')"], ["import numpy", "batch_size = numpy.int64(3)"]], ids=str
)
def test_a_known_key_is_never_ignored(lines, tmp_path):
    file = written(tmp_path / "c.py", *lines)
    message = message_of(file)
    assert message.startswith(f"config file {file}: ") and lines[-1].split(" ")[0] in message


@pytest.mark.parametrize("line", ["n_layr = 3", "n_layer = 'x'"])
def test_a_mistake_in_a_base_names_the_base(line, tmp_path):
    ground = written(tmp_path / "ground.py", line)
    assert message_of(written(tmp_path / "top.py", 'base = "ground.py"')).startswith(f"config file {ground}: ")


def test_a_long_value_is_shown_as_it_was_given():
    assert message_of("--n_layer=" + "x" * 200) == f"--n_layer={'x' * 200} is not of type int"


def test_a_file_that_exits_is_named(tmp_path):
    file = written(tmp_path / "c.py", "raise SystemExit('gone')")
    assert message_of(file) == f"config file {file}, line 1: SystemExit: gone"


# ---------------------------------------------------------------------------------------------------------------------------------
# The real command line

WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("LOADED", *(name for name in ("torch", "numpy") if name in sys.modules))
"""


def watched(*args):
    """train.py with these arguments: (status, stdout, stderr), and the last line of stdout names the large packages it imported."""
    command = [sys.executable, "-c", WATCHED, str(ROOT / "train.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    return done.returncode, done.stdout, done.stderr


def test_help_prints_each_key_and_does_not_import_torch():
    status, out, err = watched("config/quick.py", "--help")
    assert status == 0 and err == ""
    assert out.endswith("LOADED\n")
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name} " in out, field.name
    assert "(default: 0.0006)" in out and "steps between evaluations (and checkpoints)" in out


def test_errors_of_the_command_line_are_one_line_with_status_2(tmp_path):
    file = written(tmp_path / "c.py", "n_layr = 3")
    cases = [
        (["--learning_rat=1"], "error: unknown key 'learning_rat'; perhaps you meant 'learning_rate'\n"),
        ([file], f"error: config file {file}: unknown key 'n_layr'; perhaps you meant 'n_layer'\n"),
        (["--n_layer=x"], "error: --n_layer=x is not of type int\n"),
        (["--n_head=7"], "error: --n_embd=768 is not divisible by --n_head=7: each head has n_embd / n_head channels\n"),
    ]
    for args, expected in cases:
        assert watched(*args) == (2, "LOADED\n", expected)
