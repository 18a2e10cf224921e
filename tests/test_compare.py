"""compare.py: statistics against scipy's and an enumeration, pairs that are pairs, and cells that survive kills and are never mixed."""

import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compare
import train
from checkpoint import load_model
from compare import CompareConfig, parse
from configurator import InputError, TrainConfig, build
from dataset import sha256_of, write_tokens
from metrics import read_metrics
from report import paired_difference, verdict

ROOT = Path(__file__).resolve().parents[1]
BASE = """
n_layer, n_head, n_embd, block_size = 2, 2, 16, 16
batch_size, gradient_accumulation_steps = 8, 1
max_iters, eval_interval, eval_tokens, log_interval = 12, 4, 320, 3
learning_rate, warmup_iters, dropout = 1e-2, 2, 0.1
device = "cpu"
"""
SEEDS = 3


@pytest.fixture(scope="module")
def arms(tmp_path_factory, tokens_dir) -> tuple[str, str]:
    """Paths of two config files, base.py and laplacian.py, for a data set of characters."""
    directory = tmp_path_factory.mktemp("config")
    (directory / "base.py").write_text(f"dataset = {str(tokens_dir)!r}\n{BASE}")
    (directory / "laplacian.py").write_text('base = "base.py"\ndiffusion = True\n')
    return str(directory / "base.py"), str(directory / "laplacian.py")


def run(out_dir, *arguments, seeds=SEEDS) -> dict:
    """A comparison in this process; returns report.json."""
    compare.main(*parse([*arguments, f"--seeds={seeds}", f"--out_dir={out_dir}"]))
    return json.loads((Path(out_dir) / "report.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, arms) -> tuple[Path, dict]:
    """A finished comparison of both arms: its directory and report.json. No test changes it."""
    out_dir = tmp_path_factory.mktemp("undisturbed")
    return out_dir, run(out_dir, *arms)


def losses(report: dict) -> dict:
    """Every evaluation of every cell."""
    return {(name, cell["seed"]): cell["curve"] for name, arm in report["arms"].items() for cell in arm["cells"]}


def cells_in(out_dir: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of every finished cell."""
    return {str(path.relative_to(out_dir)): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out_dir.rglob("result.json"))}


def refuses_to_train(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a cell was trained")

    monkeypatch.setattr(compare, "train", refused)


@pytest.mark.parametrize(
    "words, command, only",
    [
        (["--report_only=True", "--seeds=2"], "python compare.py a.py --seeds=2", True),
        (["--report-only", "True", "--seeds=2"], "python compare.py a.py --seeds=2", True),
        (["--seeds=2", "--report_only=False"], "python compare.py a.py --seeds=2", False),
    ],
)
def test_the_recorded_command_makes_the_cells(monkeypatch, words, command, only):
    monkeypatch.setattr(sys, "argv", ["compare.py", "a.py", *words])
    origin = compare.provenance({}, {"code": "c", "torch": "t", "device": "d"}, only, "text", {})
    assert (origin["command"], origin["report_only"], origin["code_sha256"]) == (command, only, "c")
    assert set(origin["versions"]) == ({"torch", "report"} if only else {"torch", "python", "numpy", "scipy"}) and origin["versions"]["torch"] == "t"
    assert (origin["git_revision"] is None) or not only


def test_it_says_how_long_the_runs_take_that_are_not_there(undisturbed, arms, tmp_path, monkeypatch):
    """Of each program, before its first run; of 12 steps with 8 sequences of 16 tokens."""
    shutil.copytree(undisturbed[0] / "cells", tmp_path / "cells")
    for seed in (1, 2):
        (tmp_path / "cells" / "laplacian" / f"seed-{seed}" / "result.json").unlink()
    said = []
    monkeypatch.setattr(compare, "warn_if_long", lambda flops, place: said.append(flops))
    built = []
    kept = compare.build
    monkeypatch.setattr(compare, "build", lambda *arguments: built.append(kept(*arguments)) or built[-1])
    run(tmp_path, *arms)
    assert said == [built[0].model.flops_per_token() * 2 * 12 * 8 * 16] and len(built) == 1


def rewritten(out_dir: Path, change) -> None:
    """Changes the fingerprint of every cell."""
    for path in sorted(out_dir.rglob("result.json")):
        cell = json.loads(path.read_text())
        change(path, cell["fingerprint"])
        path.write_text(json.dumps(cell))


def test_a_report_of_cells_from_elsewhere(tmp_path, undisturbed, arms, monkeypatch, capsys):
    """They are refused, unless the report alone is asked for, which then names their torch, code and device."""
    refuses_to_train(monkeypatch)
    original, report = undisturbed
    out_dir = tmp_path / "collected"
    shutil.copytree(original / "cells", out_dir / "cells")
    rewritten(out_dir, lambda path, made: made.update(torch="2.11.0+cu130", code="c0de", device="Some GPU"))
    with pytest.raises(InputError, match="was made with"):
        run(out_dir, *arms)
    made = run(out_dir, *arms, "--report_only=True")
    assert losses(made) == losses(report) and made["pairs"] == report["pairs"]
    origin = made["provenance"]
    assert (origin["device"], origin["versions"]["torch"], origin["code_sha256"]) == ("Some GPU", "2.11.0+cu130", "c0de")
    assert origin["report_only"] and not report["provenance"]["report_only"] and "report_only" not in origin["command"]
    assert origin["git_revision"] is None and "on Some GPU, torch 2.11.0+cu130" in (out_dir / "report.md").read_text()
    run(out_dir, *arms, "--report_only=True", seeds=1)
    assert f"note: the report in {out_dir} will be one without seed 2, seed 3; what was trained stays" in capsys.readouterr().out
    before = (out_dir / "report.json").read_bytes()
    rewritten(out_dir, lambda path, made: made.update(device="Another" if path.parent.name == "seed-2" else made["device"]))
    with pytest.raises(
        InputError, match="seed-2/result.json was made with device=Another, another or the command with Some GPU: one report is of one"
    ):
        run(out_dir, *arms, "--report_only=True")
    rewritten(out_dir, lambda path, made: made.update(device="Some GPU", learning_rate=5))
    with pytest.raises(InputError, match="was made with learning_rate=5"):
        run(out_dir, *arms, "--report_only=True")
    with pytest.raises(InputError, match="take out --save_checkpoints"):
        parse([*arms, "--report_only=True", "--save_checkpoints=True"])
    for damage, message in (
        (b"{", "is damaged"),
        (b'{"fingerprint": {"code": 1}}', "is damaged"),
        (None, "is not there; run the comparison without it"),
    ):
        for path in sorted(out_dir.rglob("result.json")):
            path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(InputError, match=message):
            run(out_dir, *arms, "--report_only=True")
    shutil.rmtree(out_dir / "cells")
    shutil.copytree(original / "cells", out_dir / "cells")
    one, two = ((out_dir / "cells" / "base" / f"seed-{seed}" / "result.json") for seed in (1, 2))
    two.write_bytes(one.read_bytes())
    with pytest.raises(InputError, match="seed-2/result.json is that of arm base, seed 1: put it where it belongs"):
        run(out_dir, *arms, "--report_only=True")
    two.write_bytes((original / two.relative_to(out_dir)).read_bytes())
    next((out_dir / "cells").rglob("seed-3/result.json")).unlink()
    with pytest.raises(InputError, match="seed-3/result.json is not there"):
        run(out_dir, *arms, "--report_only=True")
    assert (out_dir / "report.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------------------
# The command line


def test_arms_names_and_whose_option_wins(arms):
    base, laplacian = arms
    own = f"{laplacian} --learning_rate=2e-3 --diffusion_heads 0,2"
    comparison, parsed = parse([base, "--seeds=5", own, "--max_iters", "50", "--learning_rate=0.5", "--first_seed=7", "--endpoint=last"])
    assert comparison == CompareConfig(5, 7, "last", "out-compare-base-laplacian_learning_rate=2e-3_diffusion_heads=0,2")
    assert list(parsed) == ["base", "laplacian_learning_rate=2e-3_diffusion_heads=0,2"]
    first, second = parsed.values()
    assert (first.diffusion, first.learning_rate, first.max_iters, first.n_embd) == (False, 0.5, 50, 16)
    assert (second.diffusion, second.learning_rate, second.max_iters, second.n_embd) == (True, 2e-3, 50, 16)
    assert second.diffusion_heads == (0, 2)


def test_an_arm_may_take_several_files_and_the_first_arm_is_the_baseline(arms, tmp_path):
    (tmp_path / "long.py").write_text("max_iters = 99")
    _, parsed = parse([f"{arms[1]} {tmp_path / 'long.py'}", arms[0], f"{arms[0]} --dropout=0.2"])
    assert [(name, config.max_iters) for name, config in parsed.items()] == [("laplacian_long", 99), ("base", 12), ("base_dropout=0.2", 12)]


def test_names_are_names_of_directories(arms):
    _, parsed = parse([arms[0], f"{arms[1]} '--wandb_project=../a b/c'"])
    assert list(parsed)[1] == "laplacian_wandb_project=.._a_b_c"


BASE_ARM, OTHER = "BASE", "OTHER"  # stand for the two files
REFUSED = [
    ([], "no arm given"),
    ([BASE_ARM, BASE_ARM], "arm 'base' is given twice"),
    ([BASE_ARM, OTHER, OTHER + " --dropout=0.1", OTHER + " --dropout=0.1"], "arm 'laplacian_dropout=0.1' is given twice"),
    ([BASE_ARM, "laplacian"], "'laplacian' does not begin with a config file"),
    ([BASE_ARM, "no/such.py"], "no/such.py does not exist"),
    ([BASE_ARM, OTHER, "--learning_rat=1"], "'learning_rat'; perhaps you meant 'learning_rate'"),
    ([BASE_ARM, OTHER + " --learning_rat=1"], "'learning_rat'; perhaps you meant 'learning_rate'"),
    ([BASE_ARM, OTHER, "--enpoint=last"], "'enpoint'; perhaps you meant 'endpoint'"),
    ([BASE_ARM, OTHER, "--eval_iters=4"], "'eval_iters' is not used here: .*--eval_tokens"),
    ([BASE_ARM, OTHER + " --eval_iters=4"], "'eval_iters' is not used here: .*--eval_tokens"),
    ([BASE_ARM, OTHER, "--seed=4"], "--seed is not for an arm: the comparison has --seeds, --first_seed"),
    ([BASE_ARM, f"{OTHER} --seeds=4"], "--seeds is for the whole comparison: give it outside the quotes of arm"),
    ([BASE_ARM, OTHER, "--init_from=resume"], "--init_from is not an option of a comparison"),
    ([BASE_ARM, OTHER + " --init_from=resume"], "take out init_from='resume'"),
    ([BASE_ARM, OTHER, "--eval_only=True"], "trains every cell"),
    ([BASE_ARM, OTHER, "--seeds=0"], "--seeds=0 must be between"),
    ([BASE_ARM, OTHER, "--seeds=two"], "--seeds"),
    ([BASE_ARM, OTHER, "--first_seed=-1"], "--first_seed=-1 must not be negative"),
    ([BASE_ARM, OTHER, "--endpoint=worst"], "--endpoint=worst must be"),
    ([BASE_ARM, OTHER, "--max_iters"], "--max_iters needs a value"),
    ([BASE_ARM, OTHER, "--max_iters=-1"], "--max_iters=-1 must not be negative"),
    ([BASE_ARM, OTHER, "--diffusion_alpha=0.5"], "no effect without --diffusion=True"),
]


def with_files(arguments, arms):
    return [argument.replace(BASE_ARM, arms[0]).replace(OTHER, arms[1]) for argument in arguments]


@pytest.mark.parametrize("arguments, words", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_command_lines_that_are_refused(arms, arguments, words):
    with pytest.raises(InputError, match=words) as error:
        parse(with_files(arguments, arms))
    assert "\n" not in str(error.value)


def test_help_and_errors_do_not_wait_for_torch(arms):
    code = (
        "import atexit, runpy, sys; atexit.register(lambda: print('LOADED', 'torch' in sys.modules)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for arguments, status, err in ((["--help"], 0, ""), ([arms[0], arms[1], "--seed=1"], 2, "error: --seed is not for an arm")):
        done = subprocess.run([sys.executable, "-c", code, ROOT / "compare.py", *arguments], capture_output=True, encoding="utf-8")
        assert done.returncode == status and done.stdout.endswith("LOADED False\n"), done.stderr
        assert done.stderr.startswith(err) and done.stderr.count("\n") == (status > 0)
        assert status or all(f"--{field.name} " in done.stdout for field in dataclasses.fields(CompareConfig))


# ---------------------------------------------------------------------------------------------------------------------------------
# A finished comparison


def test_the_report_holds_every_cell_and_the_table_its_means(undisturbed, arms, monkeypatch, capsys):
    out_dir, report = undisturbed
    assert report.keys() == {"endpoint", "arms", "pairs", "provenance"} and report["endpoint"] == "best"
    assert list(report["arms"]) == ["base", "laplacian"] and list(report["pairs"]) == ["laplacian"]
    refuses_to_train(monkeypatch)
    monkeypatch.chdir(out_dir.parent)
    assert losses(run(out_dir.name, *arms)) == losses(report), "a finished comparison is reported again, not run again"
    printed = capsys.readouterr().out
    assert f"{2 * SEEDS} runs, {2 * SEEDS} of them finished before" in printed
    for name, arm in report["arms"].items():
        assert arm["cells"] == [json.loads((out_dir / "cells" / name / f"seed-{seed}" / "result.json").read_text())["result"] for seed in (1, 2, 3)]
        best, last = ([cell[key] for cell in arm["cells"]] for key in ("best_val_loss", "val_loss"))
        assert len(set(last)) == 3, "seeds differ"
        columns = [name, "3", *(f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}" for values in (best, last))]
        row = next(line for line in printed.splitlines() if line.startswith(f"| {name} "))
        assert [cell.strip() for cell in row.split("|")[1:5]] == columns
    pair = report["pairs"]["laplacian"]
    ours = paired_difference(*([cell["best_val_loss"] for cell in report["arms"][name]["cells"]] for name in ("base", "laplacian")))
    assert pair["best"] == ours and pair["baseline"] == "base" and pair["seeds"] == [1, 2, 3] and pair["pairs_lost_to_divergence"] == 0
    assert pair["verdict"] == verdict("laplacian", "base", "best", ours)
    row = next(line for line in printed.splitlines() if line.startswith("| laplacian − base | best validation loss "))
    assert [cell.strip() for cell in row.split("|")[3:7]] == [
        "3", f"{ours['mean']:+.4f}", "{:+.4f} to {:+.4f}".format(*ours["interval"]), f"{ours['sign_flip_p']:.4f}",
    ]  # fmt: skip
    markdown = (out_dir / "report.md").read_text()
    table = printed[printed.index("| arm ") : printed.index(f"**{pair['verdict']}**")]
    assert markdown.startswith("# base against laplacian\n") and table in markdown and f"**{pair['verdict']}**" in markdown
    assert all(f"]({name})" in markdown for name in ("curves.png", "paired.png")) and "best validation loss" in markdown


def test_provenance_is_what_a_reader_needs(undisturbed, arms, tokens_dir):
    provenance = undisturbed[1]["provenance"]
    assert list(provenance["data_sha256"].values()) == [sha256_of(tokens_dir / f"{name}.bin") for name in ("train", "val")]
    _, parsed = parse([*arms])
    assert provenance["configs"] == json.loads(json.dumps({name: dataclasses.asdict(config) for name, config in parsed.items()}))
    assert provenance["versions"].keys() >= {"python", "torch", "numpy", "scipy"} and provenance["device"].startswith("cpu")
    assert provenance["command"].startswith("python compare.py") and {"git_revision", "git_modified"} <= provenance.keys()


@pytest.mark.parametrize("name", ["curves.png", "paired.png"])
def test_figures_are_whole_and_show_something(undisturbed, name):
    with Image.open(undisturbed[0] / name) as image:
        pixels = np.asarray(image.convert("L"))
    assert image.format == "PNG" and min(pixels.shape) > 400
    assert 0.005 < (pixels < 200).mean() < 0.5, "lines on white"


def test_a_cell_is_the_run_that_train_makes(undisturbed, arms, tmp_path):
    out_dir, report = undisturbed
    _, parsed = parse([*arms])
    for name, seed in (("laplacian", 3), ("base", 2)):
        assert train.main(dataclasses.replace(parsed[name], seed=seed, out_dir=str(tmp_path / name))) == 0
        rows = [[row[key] for key in ("step", "train_loss", "val_loss")] for row in read_metrics(tmp_path / name)]
        assert rows == [[row[key] for key in ("step", "train_loss", "val_loss")] for row in read_metrics(out_dir / "cells" / name / f"seed-{seed}")]
        assert losses(report)[name, seed] == [[step, loss] for step, _, loss in rows if loss is not None]


def test_arms_that_are_equal_differ_by_exactly_nothing(arms, tmp_path, undisturbed):
    """lambda (A - alpha I) with alpha = 0 and lambda = 1 is A: same weights, same batches, same dropout leave nothing to differ by."""
    report = run(tmp_path, arms[0], f"{arms[1]} --diffusion_alpha=0")
    name = "laplacian_diffusion_alpha=0"
    assert [losses(report)[name, seed] for seed in (1, 2, 3)] == [losses(report)["base", seed] for seed in (1, 2, 3)]
    assert [report["pairs"][name][endpoint]["differences"] for endpoint in ("best", "last")] == [[0.0] * 3] * 2
    assert report["pairs"][name]["verdict"] == f"{name} against base: the best validation loss differs by exactly 0 in each of the 3 pairs."
    assert 0.0 not in undisturbed[1]["pairs"]["laplacian"]["last"]["differences"], "alpha = 1 does differ"


def test_checkpoints_are_kept_on_request_alone(arms, tmp_path, undisturbed):
    assert not list(undisturbed[0].rglob("*.safetensors"))
    run(tmp_path, *arms, "--save_checkpoints=True", "--max_iters=4", seeds=1)
    for name in ("base", "laplacian"):
        model, _, meta = load_model(tmp_path / "cells" / name / "seed-1", "last")
        assert meta["step"] == 4 and model.config.diffusion == (name == "laplacian")


# ---------------------------------------------------------------------------------------------------------------------------------
# Cells: resumed, extended, refused

KILLED = """
import os, runpy, sys
import metrics
record, signal, rows = metrics.Metrics.record, int(sys.argv[1]), [int(sys.argv[2])]
def recorded(self, **values):
    record(self, **values)
    rows[0] -= 1
    if rows[0] == 0:
        os.kill(os.getpid(), signal)
metrics.Metrics.record = recorded
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_each_seed_of_an_arm_may_start_from_weights_of_its_own(arms, tmp_path):
    """Before its first step a cell has the loss that its checkpoint had; another checkpoint in a seed's place is another cell."""
    before = run(tmp_path / "before", *arms, "--save_checkpoints=True", seeds=2)
    weights = str(tmp_path / "before" / "cells" / "base" / "seed-{seed}" / "best")
    own = [f"{arms[0]} --init_from={weights}", f"{arms[1]} --init_from={weights} --diffusion_alpha=0.5"]
    after = run(tmp_path / "after", *own, "--max_iters=6", "--warmup_iters=1", seeds=2)
    best = [cell["best_val_loss"] for cell in before["arms"]["base"]["cells"]]
    plain, halfway = ([cell["curve"][0] for cell in arm["cells"]] for arm in after["arms"].values())
    assert plain == [[0, loss] for loss in best] and best[0] != best[1]
    assert all(abs(one[1] - other[1]) > 1e-4 for one, other in zip(plain, halfway))
    cells = tmp_path / "before" / "cells" / "base"
    shutil.rmtree(cells / "seed-2" / "best")
    shutil.copytree(cells / "seed-1" / "best", cells / "seed-2" / "best")
    with pytest.raises(InputError, match="seed-2.* was made with init_sha256"):
        run(tmp_path / "after", *own, "--max_iters=6", "--warmup_iters=1", seeds=2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "kill"])
def test_a_killed_comparison_goes_on_with_the_cells_that_are_missing(undisturbed, arms, tmp_path, number, capsys):
    finished, report = undisturbed
    rows = sum(len(read_metrics(finished / "cells" / "base" / f"seed-{seed}")) for seed in (1, 2, 3)) + 5  # in the middle of the fourth cell
    command = [sys.executable, "-c", KILLED, number.value, rows, ROOT / "compare.py", *arms, f"--seeds={SEEDS}", f"--out_dir={tmp_path}"]
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == (-9 if number == signal.SIGKILL else 128 + number) and done.stderr == ""
    assert ("finished runs are kept" in done.stdout) == (number == signal.SIGTERM)
    before = cells_in(tmp_path)
    assert list(before) == [f"cells/base/seed-{seed}/result.json" for seed in (1, 2, 3)]
    whole = len(read_metrics(finished / "cells" / "laplacian" / "seed-1"))
    assert 5 <= len(read_metrics(tmp_path / "cells" / "laplacian" / "seed-1")) < whole, "the fourth cell had begun"
    assert not (tmp_path / "report.json").exists()

    cell = tmp_path / "cells" / "laplacian" / "seed-1"
    assert (cell / "last").is_dir() == (number == signal.SIGTERM)
    resumed = run(tmp_path, *arms)
    assert "6 runs, 3 of them finished before" in capsys.readouterr().out
    inside = [cell["resumed_at"] for cell in resumed["arms"]["laplacian"]["cells"]]
    assert inside[1:] == [None, None] and (0 < inside[0] < 12 if number == signal.SIGTERM else inside[0] is None)
    assert resumed["arms"]["laplacian"]["seconds"]["n"] == (2 if number == signal.SIGTERM else 3), "of a part of a run they would mislead"
    assert sorted(path.name for path in cell.iterdir()) == ["metrics.jsonl", "result.json"]
    after = cells_in(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) == 6
    assert losses(resumed) == losses(report)
    for endpoint in ("best", "last"):
        assert resumed["pairs"]["laplacian"][endpoint] == report["pairs"]["laplacian"][endpoint]
    assert [path.name for path in tmp_path.rglob(".*")] == [], "no temporary files"


def stopped(monkeypatch, out_dir, *arguments, at: int, seeds=1, cell=lambda config: True):
    """A comparison that is interrupted in optimizer step `at`, counted from 1, of the first cell that comes there and whose config fits."""
    rate, sent = train.learning_rate, []

    def interrupting(config, i):
        if i + 1 == at and not sent and cell(config):
            sent.append(os.kill(os.getpid(), signal.SIGINT))
        return rate(config, i)

    with monkeypatch.context() as patch, pytest.raises(train.Interrupted):
        patch.setattr(train, "learning_rate", interrupting)
        run(out_dir, *arguments, seeds=seeds)


@pytest.mark.parametrize("damaged", [True, False])
def test_an_interrupted_cell_goes_on_from_a_whole_checkpoint(arms, tmp_path, monkeypatch, undisturbed, damaged):
    stopped(monkeypatch, tmp_path, *arms, at=7)
    if damaged:
        next((tmp_path / "cells" / "base" / "seed-1" / "last").glob("model-*")).write_bytes(b"damaged")
    report = run(tmp_path, *arms, seeds=1)
    assert report["arms"]["base"]["cells"][0]["resumed_at"] == (None if damaged else 7)
    assert losses(report) == {(name, 1): losses(undisturbed[1])[name, 1] for name in ("base", "laplacian")}


def test_an_interrupted_cell_of_a_shared_program_goes_on_with_its_own_schedule(arms, tmp_path, monkeypatch):
    both = arms[0], f"{arms[0]} --learning_rate=3e-2 --warmup_iters=4", f"{arms[0]} --min_lr=5e-3"
    whole = run(tmp_path / "whole", *both, seeds=2)
    stopped(monkeypatch, tmp_path / "out", *both, at=7, seeds=2, cell=lambda config: config.learning_rate == 3e-2)
    report = run(tmp_path / "out", *both, seeds=2)
    assert losses(report) == losses(whole) and len(set(map(json.dumps, losses(whole).values()))) == 6
    assert [cell["resumed_at"] for arm in report["arms"].values() for cell in arm["cells"]] == [None, None, 7, None, None, None]
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["configs"]
    assert [config["learning_rate"] for config in kept.values()] == [1e-2, 3e-2, 1e-2]


def test_an_interrupted_cell_is_neither_gone_on_with_nor_lost_by_another_run(arms, tmp_path, monkeypatch):
    """Three calls in one directory, the second with another rate and in the second arm: it is refused before anything runs."""
    whole = run(tmp_path / "whole", *arms, seeds=1)
    stopped(monkeypatch, tmp_path / "out", *arms, at=3, cell=lambda config: config.diffusion)
    with (
        monkeypatch.context() as patch,
        pytest.raises(InputError, match=r"cell .*laplacian/seed-1 was interrupted at step 3 with learning_rate=0.01, now"),
    ):
        refuses_to_train(patch)
        shutil.move(tmp_path / "out" / "cells" / "base", tmp_path / "base")  # which would be refused before
        run(tmp_path / "out", *arms, "--learning_rate=5e-3", seeds=1)
    shutil.move(tmp_path / "base", tmp_path / "out" / "cells" / "base")
    report = run(tmp_path / "out", *arms, seeds=1)
    assert losses(report) == losses(whole) and report["arms"]["laplacian"]["cells"][0]["resumed_at"] == 3


def test_a_cell_interrupted_twice_at_an_evaluation_has_it_once(arms, tmp_path, monkeypatch, undisturbed):
    """The signal comes in the step before an evaluation that is due; the second call dies behind that evaluation, before its own checkpoint."""
    stopped(monkeypatch, tmp_path, *arms, at=4)
    cell = tmp_path / "cells" / "base" / "seed-1"
    kept = tmp_path / "kept"
    shutil.copytree(cell / "last", kept)
    stopped(monkeypatch, tmp_path, *arms, at=6)
    shutil.rmtree(cell / "last")  # as if that checkpoint had not been written: kill -9 at step 6
    shutil.copytree(kept, cell / "last")
    report = run(tmp_path, *arms, seeds=1)
    assert losses(report)["base", 1] == losses(undisturbed[1])["base", 1]
    assert [row["step"] for row in read_metrics(cell) if row["val_loss"] is not None] == [0, 4, 8, 12]


def test_a_comparison_of_pictures_goes_on_inside_a_cell(tmp_path, monkeypatch):
    config = ROOT / "config" / "quick_vision.py"
    arguments = [str(config), f"{config} --diffusion=True", "--max_iters=6", "--warmup_iters=1", "--eval_interval=3", "--eval_tokens=512"]
    arguments += ["--n_layer=1", "--n_embd=16", "--n_head=2", "--batch_size=8", "--device=cpu", "--endpoint=top1"]
    whole = run(tmp_path / "whole", *arguments, seeds=1)
    stopped(monkeypatch, tmp_path / "out", *arguments, at=5)
    report = run(tmp_path / "out", *arguments, seeds=1)
    assert losses(report) == losses(whole) and len(losses(whole)["quick_vision", 1][0]) == 4, "step, loss, top-1, top-5"
    ours, theirs = (found["arms"]["quick_vision"]["cells"][0] for found in (report, whole))
    assert ours["resumed_at"] == 5 and [ours[key] for key in ("val_loss", "top1", "top5")] == [theirs[key] for key in ("val_loss", "top1", "top5")]


def test_a_signal_behind_the_last_evaluation_leaves_the_evaluators_to_the_next_call(arms, tmp_path, monkeypatch):
    """Neither what they would take is waited for, nor does a cell without a step of its own break the table."""
    arguments = [*arms, "--evaluate=perturb", "--max_iters=4"]
    with monkeypatch.context() as patch:
        patch.setattr(compare, "examine", lambda *_: pytest.fail("examined after the signal"))
        stopped(monkeypatch, tmp_path, *arguments, at=4)
    cell = tmp_path / "cells" / "base" / "seed-1"
    assert not (cell / "result.json").exists() and (cell / "last").is_dir()
    report = run(tmp_path, *arguments, seeds=1)
    base = report["arms"]["base"]
    assert base["cells"][0]["resumed_at"] == 4 and base["cells"][0]["ms"] is None and base["tokens_per_s"]["n"] == base["seconds"]["n"] == 0
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| base "))
    assert row.count("| - ") == 2
    assert sorted(path.name for path in cell.iterdir()) == ["metrics.jsonl", "result.json"], "no checkpoint that nobody asked for"


def test_a_cell_whose_best_weights_were_not_kept_starts_again_where_they_are_asked_for(arms, tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path, *arms, at=11)
    report = run(tmp_path, *arms, "--save_checkpoints=True", seeds=1)
    cell = report["arms"]["base"]["cells"][0]
    assert cell["resumed_at"] is None and cell["best_step"] > 0 and (tmp_path / "cells" / "base" / "seed-1" / "best").is_dir()


@pytest.mark.parametrize("step", [2, 11])  # before best/ and after
def test_a_cell_interrupted_with_its_weights_kept_is_not_finished_without(arms, tmp_path, monkeypatch, step):
    stopped(monkeypatch, tmp_path, *arms, "--save_checkpoints=True", at=step)
    cell, before = tmp_path / "cells" / "base" / "seed-1", cells_in(tmp_path)
    assert (cell / "best").is_dir() is (step == 11)
    with pytest.raises(InputError, match=f"cell {cell} was interrupted with --save_checkpoints=True: give it again, or remove the cell"):
        run(tmp_path, *arms, seeds=1)
    assert cells_in(tmp_path) == before and (cell / "last").is_dir()
    assert run(tmp_path, *arms, "--save_checkpoints=True", seeds=1)["arms"]["base"]["cells"][0]["resumed_at"] == step
    assert (cell / "best").is_dir() and (cell / "last").is_dir()


def test_a_signal_in_a_step_that_diverges_ends_the_comparison_behind_that_cell(arms, tmp_path, monkeypatch):
    arguments = [*arms, "--learning_rate=1e30", "--warmup_iters=0", "--grad_clip=0"]
    stopped(monkeypatch, tmp_path, *arguments, at=2)
    cells = cells_in(tmp_path)
    assert list(cells) == ["cells/base/seed-1/result.json"] and b"diverged_at" in cells["cells/base/seed-1/result.json"][0]


def test_a_signal_in_the_last_step_of_a_cell_ends_the_comparison_behind_it(arms, tmp_path, monkeypatch, undisturbed):
    stopped(monkeypatch, tmp_path, *arms, at=12)
    assert list(cells_in(tmp_path)) == ["cells/base/seed-1/result.json"] and not (tmp_path / "cells" / "laplacian").exists()
    report = run(tmp_path, *arms, seeds=1)
    assert losses(report) == {(name, 1): losses(undisturbed[1])[name, 1] for name in ("base", "laplacian")}
    assert all("signal" not in cell and cell["resumed_at"] is None for arm in report["arms"].values() for cell in arm["cells"])


def test_more_seeds_and_a_third_arm_extend_a_comparison(undisturbed, arms, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    before = cells_in(tmp_path / "out")
    report = run(tmp_path / "out", *arms, f"{arms[1]} --diffusion_heads=1", seeds=4)
    assert "12 runs, 6 of them finished before" in capsys.readouterr().out
    after = cells_in(tmp_path / "out")
    assert {name: after[name] for name in before} == before and len(after) == 12
    assert all(losses(report)[cell] == curve for cell, curve in losses(undisturbed[1]).items())
    assert list(report["pairs"]) == ["laplacian", "laplacian_diffusion_heads=1"]
    assert "The 2 intervals are each at 95 %" in (tmp_path / "out" / "report.md").read_text()


def test_one_arm_has_its_mean_and_spread_and_no_verdict(undisturbed, arms, tmp_path, capsys):
    shutil.copytree(undisturbed[0] / "cells" / "base", tmp_path / "cells" / "base")
    report = run(tmp_path, arms[0])
    printed, (text, both) = capsys.readouterr().out, ((path / "report.md").read_text() for path in (tmp_path, undisturbed[0]))
    assert "note: one arm" in printed and f"{SEEDS} runs, {SEEDS} of them finished before" in printed
    assert report["pairs"] == {} and report["arms"]["base"] == undisturbed[1]["arms"]["base"]
    row = re.search(r"^\| base .*", text, re.M).group().split("|")[2:5]
    assert [cell.strip() for cell in row] == [cell.strip() for cell in re.search(r"^\| base .*", both, re.M).group().split("|")[2:5]]
    assert text.startswith("# base\n") and "nothing that it is compared with" in text and "difference" not in text
    assert (tmp_path / "curves.png").is_file() and not (tmp_path / "paired.png").exists() and "paired.png" not in text


def test_a_report_of_fewer_arms_says_what_it_leaves_out(undisturbed, arms, tmp_path, capsys):
    shutil.copytree(undisturbed[0], tmp_path / "out")
    assert list(run(tmp_path / "out", arms[0])["arms"]) == ["base"]
    assert f"note: the report in {tmp_path / 'out'} will be one without laplacian; what was trained stays" in capsys.readouterr().out
    assert losses(run(tmp_path / "out", *arms)) == losses(undisturbed[1])


def test_first_seed_moves_all_seeds(undisturbed, arms, tmp_path):
    report = run(tmp_path, *arms, "--first_seed=3", "--endpoint=last", seeds=1)
    assert losses(report) == {(name, 3): losses(undisturbed[1])[name, 3] for name in ("base", "laplacian")}
    pair = report["pairs"]["laplacian"]
    assert report["endpoint"] == "last" and pair["last"]["interval"] is None
    assert pair["verdict"] == "laplacian against base: 1 pair(s) of seeds give no interval, so nothing can be said about the last validation loss."


@pytest.mark.parametrize(
    "option, words",
    [
        ("--max_iters=13", "max_iters=12, now it is 13"),
        ("--dropout=0.2", "dropout=0.1, now it is 0.2"),
        ("--eval_tokens=160", "eval_tokens=320, now it is 160"),
        ("--dtype=bfloat16", "dtype=auto, now it is bfloat16"),
    ],
)
def test_cells_made_with_other_keys_are_refused_by_name(undisturbed, arms, option, words, monkeypatch):
    refuses_to_train(monkeypatch)
    before = cells_in(undisturbed[0])
    with pytest.raises(InputError, match=f"seed-1/result.json was made with {words}"):
        run(undisturbed[0], *arms, option)
    assert cells_in(undisturbed[0]) == before


def test_keys_that_cannot_matter_are_not_asked_for(undisturbed, arms, monkeypatch):
    refuses_to_train(monkeypatch)
    assert losses(run(undisturbed[0], *arms, "--log_interval=1", "--always_save_checkpoint=False")) == losses(undisturbed[1])


def test_cells_of_other_code_are_refused(undisturbed, arms, monkeypatch):
    refuses_to_train(monkeypatch)
    monkeypatch.setattr(compare, "code_sha256", lambda: "0" * 64)
    with pytest.raises(InputError, match="was made with code=[0-9a-f]{64}, now it is 0000"):
        run(undisturbed[0], *arms)


def test_cells_of_other_data_are_refused(arms, tokens_dir, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(tokens_dir, data)
    arguments = [*arms, f"--dataset={data}", "--max_iters=3"]
    run(tmp_path / "out", *arguments, seeds=1)
    meta = json.loads((data / "meta.json").read_text())
    train_ids, val_ids = (np.fromfile(data / f"{name}.bin", "<u2") for name in ("train", "val"))
    train_ids[17] ^= 1
    write_tokens(data, train_ids, val_ids, {key: meta[key] for key in ("vocab_size", "tokenizer")})
    refuses_to_train(monkeypatch)
    with pytest.raises(InputError, match="was made with train[^ ]*=[0-9a-f]{64}, now it is"):
        run(tmp_path / "out", *arguments, seeds=1)


def test_arms_with_different_data_are_refused(arms, tokens_dir, tmp_path, monkeypatch):
    ids = np.fromfile(tokens_dir / "val.bin", "<u2")
    meta = json.loads((tokens_dir / "meta.json").read_text())
    (tmp_path / "data").mkdir()
    write_tokens(tmp_path / "data", ids, ids, {key: meta[key] for key in ("vocab_size", "tokenizer")})
    refuses_to_train(monkeypatch)
    with pytest.raises(InputError, match="reads other data than 'base'"):
        run(tmp_path / "out", arms[0], f"{arms[1]} --dataset={tmp_path / 'data'}")


@pytest.mark.parametrize("content", ["", "{", "null", "[]", "{}", '{"fingerprint": {}}', b"\xff\xfe"], ids=repr)
def test_a_damaged_cell_is_refused_by_name(undisturbed, arms, tmp_path, content, monkeypatch):
    shutil.copytree(undisturbed[0] / "cells", tmp_path / "cells")
    path = tmp_path / "cells" / "laplacian" / "seed-2" / "result.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses_to_train(monkeypatch)
    with pytest.raises(InputError, match=f"cell {path} is damaged.*remove it"):
        run(tmp_path, *arms)
    assert not (tmp_path / "report.json").exists()


LATE = """
import glob, os, runpy, sys, time
if os.environ["RANK"] == "1":
    began = time.time()
    while not glob.glob("cells/*/*/result.json") and time.time() < began + 8:
        time.sleep(0.05)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(False, id="together"),
        pytest.param(True, id="one is late"),
    ],
)
def test_processes_of_torchrun_share_the_cells_and_get_the_same_losses(undisturbed, arms, tmp_path, late):
    """Also when one of them starts after another has finished a cell."""
    (tmp_path / "late.py").write_text(LATE)
    script = [tmp_path / "late.py", ROOT / "compare.py"] if late else [ROOT / "compare.py"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script, *arms, f"--seeds={SEEDS}", "--out_dir=."]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert losses(report) == losses(undisturbed[1])
    assert report["pairs"]["laplacian"]["best"] == undisturbed[1]["pairs"]["laplacian"]["best"]
    assert done.stdout.count("| arm ") == 1, "one process reports"
    assert done.stdout.count("/3] ") == 6, "each has run three of the six cells"
    assert report["provenance"]["command"].startswith("python compare.py ") and "--seeds=3" in report["provenance"]["command"]
    origins = [some["provenance"] for some in (report, undisturbed[1])]
    assert [origin["processes_of_this_call"] for origin in origins] == [2, 1] and origins[1]["finished"] < origins[0]["finished"]
    assert "in 2 processes of torchrun on cpu" in (tmp_path / "report.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------------------
# Divergence


def test_an_arm_that_diverges_is_reported_as_such(arms, tmp_path, capsys):
    name = "laplacian_learning_rate=1e30"
    report = run(tmp_path, arms[0], f"{arms[1]} --learning_rate=1e30", seeds=2)
    arm, pair = report["arms"][name], report["pairs"][name]
    assert arm["n"] == 0 and arm["diverged"] == [{"seed": 1, "step": 2}, {"seed": 2, "step": 2}] and arm["best_val_loss"]["mean"] is None
    assert report["arms"]["base"]["n"] == 2 and pair["best"]["n"] == 0 and pair["pairs_lost_to_divergence"] == 2
    assert pair["verdict"].endswith(f"Runs that diverged and are left out of it: base: 0 of 2, {name}: 2 of 2.")
    assert f"| {name} | 0 (+ 2 diverged) | - " in capsys.readouterr().out
    for figure in ("curves.png", "paired.png"):
        with Image.open(tmp_path / figure) as image:
            image.load()


# ---------------------------------------------------------------------------------------------------------------------------------
# Known faults


def test_a_run_that_diverges_in_its_last_step_is_counted_too(arms, tmp_path):
    report = run(tmp_path, arms[0], f"{arms[1]} --learning_rate=1e30 --max_iters=1 --decay_lr=False", seeds=2)
    assert [arm["diverged"] for arm in report["arms"].values()] == [[], [{"seed": 1, "step": 1}, {"seed": 2, "step": 1}]]


@pytest.mark.filterwarnings("error")
def test_a_comparison_of_which_nothing_is_left_is_reported(arms, tmp_path):
    report = run(tmp_path, *(f"{arm} --learning_rate=1e30" for arm in arms), seeds=1)
    assert [len(arm["diverged"]) for arm in report["arms"].values()] == [1, 1]


@pytest.mark.parametrize("option", ["--seed=3", "--out_dir=x"])
def test_an_arms_own_option_is_never_ignored(arms, option):
    with pytest.raises(InputError, match=option.partition("=")[0]):
        parse([arms[0], f"{arms[1]} {option}"])


def test_an_open_quote_in_an_arm_is_one_line(arms):
    with pytest.raises(InputError, match="quot"):
        parse([arms[0], f"{arms[1]} --wandb_project='x"])


@pytest.mark.parametrize("change", [{"fingerprint": []}, {"result": {}}, {"result": None}], ids=str)
def test_a_cell_of_another_form_is_refused_by_name(undisturbed, arms, tmp_path, change, monkeypatch):
    shutil.copytree(undisturbed[0] / "cells", tmp_path / "cells")
    path = tmp_path / "cells" / "laplacian" / "seed-2" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refuses_to_train(monkeypatch)
    with pytest.raises(InputError, match=f"cell {path} is damaged"):
        run(tmp_path, *arms)


@pytest.mark.parametrize("endpoint", ["top1", "top5"])
def test_accuracy_of_text_is_refused_before_anything_is_trained(arms, tmp_path, endpoint, monkeypatch):
    refuses_to_train(monkeypatch)
    with pytest.raises(InputError, match=f"--endpoint={endpoint} is for pictures"):
        run(tmp_path, *arms, f"--endpoint={endpoint}")


def test_a_barrier_that_is_not_for_the_data_is_told_before_any_cell_is_run(arms, tmp_path, monkeypatch):
    refuses_to_train(monkeypatch)
    read_meta = compare.read_meta
    monkeypatch.setattr(compare, "read_meta", lambda dataset: (read_meta(dataset)[0], read_meta(dataset)[1] | {"kind": "pictures"}))
    with pytest.raises(InputError, match="--prior_where=embedding is a causal model of text"):
        run(tmp_path / "out", arms[0], f"{arms[1]} --prior_lambda=0.1")


def test_margins_of_a_variant_are_refused_before_any_run():
    with pytest.raises(InputError, match="--evaluate=margins is for attention_kernel=softmax"):
        parse(["config/quick.py", "config/quick.py --attention_kernel=rbf", "--evaluate=margins"])


def test_given_weights_are_part_of_the_fingerprint(tmp_path):
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"one")
    first = compare.given_weights(str(file))
    file.write_bytes(b"two")
    assert compare.given_weights(str(file)) != first and first["init_sha256"]
    (tmp_path / "checkpoint.json").write_text("{}")
    assert compare.given_weights(str(tmp_path)) != compare.given_weights(str(file))
    assert compare.given_weights("scratch") == compare.given_weights("gpt2") == {}


def test_weights_that_are_missing_are_told_before_any_cell_is_run(undisturbed, arms, tmp_path, monkeypatch):
    refuses_to_train(monkeypatch)
    for path in (str(tmp_path / "none"), str(tmp_path / "seed-{sed}")):
        with pytest.raises(InputError, match="of an arm does not exist"):
            run(tmp_path / "out", arms[0], f"{arms[1]} --init_from={path}")


@pytest.mark.parametrize("name", ["report.md", "report.json"])
def test_a_report_of_something_else_is_never_replaced(arms, tmp_path, name, monkeypatch):
    refuses_to_train(monkeypatch)
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(InputError, match=f"holds a {name} of something else"):
        run(tmp_path, *arms)
    with pytest.raises(InputError, match="is a file: name a directory"):
        run(tmp_path / name, *arms)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_report_whose_cells_are_gone_may_be_made_again_and_by_nothing_less(undisturbed, arms, tmp_path, monkeypatch):
    """As a committed one: with the same arms, recipes and seeds, or more seeds."""
    shutil.copy(undisturbed[0] / "report.json", tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    with monkeypatch.context() as patch:
        refuses_to_train(patch)
        for arguments, seeds, message in (
            ([arms[0], f"{arms[1]} --dropout=0"], SEEDS, "holds a report of other arms, base, laplacian, and not its cells"),
            ([*arms, "--max_iters=4", "--dropout=0"], SEEDS, "holds a report of these arms with other values of dropout, max_iters, and"),
            (arms, SEEDS - 1, f"holds a report of more seeds, {SEEDS}, and"),
        ):
            with pytest.raises(InputError, match=message):
                run(tmp_path, *arguments, seeds=seeds)
        other = json.loads(before)
        other["provenance"] |= {"data_sha256": {"train_sha256": "0", "val_sha256": "1"}, "data": "another text"}
        (tmp_path / "report.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=r"holds a report of other data \(another text\), and not its cells"):
            run(tmp_path, *arms)
        (tmp_path / "report.json").write_bytes(before)
        with pytest.raises(AssertionError):  # allowed, and would train
            run(tmp_path, *arms, seeds=SEEDS + 1)
    assert (tmp_path / "report.json").read_bytes() == before
    assert losses(run(tmp_path, *arms)) == losses(undisturbed[1])
    assert len(run(tmp_path, *arms, seeds=2)["arms"]["base"]["cells"]) == 2, "its cells are there now"


def test_a_finished_cell_is_not_trained_over_and_says_that_it_has_no_weights(undisturbed, arms, tmp_path, monkeypatch):
    cell = tmp_path / "cell"
    shutil.copytree(undisturbed[0] / "cells" / "base" / "seed-1", cell)
    before = {path.name: path.read_bytes() for path in cell.iterdir()}
    with pytest.raises(InputError, match="is a finished cell of compare.py, which keeps no weights without --save_checkpoints=True"):
        load_model(cell, "best")
    with pytest.raises(InputError, match="is a finished cell of compare.py: choose another"):
        train.main(build(TrainConfig, [arms[0]], [("out_dir", str(cell)), ("overwrite", "True")]))
    assert before == {path.name: path.read_bytes() for path in cell.iterdir()}


def test_default_directories_of_different_arms_differ(arms):
    long = [f"{arm} --learning_rate=1e-3 --weight_decay=0.1 --warmup_iters=1" for arm in arms]
    names = [parse([*long, f"{arms[0]} --beta2=0.9{i}"])[0].out_dir for i in range(3)]
    assert len(set(names)) == 3 and max(map(len, names)) == 120
    assert parse([*arms])[0].out_dir == "out-compare-base-laplacian"


def test_the_verdict_says_when_more_than_the_arm_differs_and_the_start_when_nothing_does(arms, tmp_path, capsys):
    report = run(tmp_path, arms[0], f"{arms[1]} --max_iters=8 --batch_size=4", f"{arms[0]} --dropout=0.1", seeds=1)
    unequal, same = (pair["verdict"] for pair in report["pairs"].values())
    assert unequal.endswith("The two differ in max_iters (12 and 8), batch_size (8 and 4): this is not the arm alone.") and "differ in" not in same
    assert "note: base and base_dropout=0.1 are the same recipe by two names" in capsys.readouterr().out


def test_arms_that_differ_in_their_schedule_share_a_program_and_come_out_as_alone(tmp_path, arms, monkeypatch):
    base, laplacian = arms
    rates = [f"{arm} --learning_rate={rate}" for rate in (1e-2, 3e-2) for arm in (base, laplacian)] + [f"{base} --warmup_iters=5 --min_lr=1e-3"]
    built, kept = [], compare.build
    monkeypatch.setattr(compare, "build", lambda config, place: built.append(config.diffusion) or kept(config, place))
    together = run(tmp_path / "together", *rates, seeds=2)
    assert built == [False, True], "five arms, two programs"
    for i, arm in enumerate(rates):
        alone = run(tmp_path / str(i), arm, base + " --max_iters=4" if i else laplacian, seeds=2)
        name = list(together["arms"])[i]
        ours, theirs = (report["arms"][n]["cells"] for report, n in ((together, name), (alone, next(iter(alone["arms"])))))
        assert [cell["curve"] for cell in ours] == [cell["curve"] for cell in theirs] and {cell["arm"] for cell in ours} == {name}
    curves = [json.dumps([cell["curve"] for cell in arm["cells"]]) for arm in together["arms"].values()]
    assert len(set(curves)) == len(rates), "and differ from each other"


@pytest.mark.parametrize(
    "key, value",
    [("weight_decay", 0.2), ("batch_size", 4), ("dropout", 0.2), ("diffusion_alpha", 0.5), ("max_iters", 8), ("eval_tokens", 64), ("grad_clip", 0.5)]
    + [("beta1", 0.8), ("beta2", 0.9), ("init_from", "gpt2"), ("prior_lambda", 0.1), ("compile", False), ("device", "auto")],
)
def test_arms_that_differ_in_what_a_program_is_made_of_have_one_each(arms, key, value):
    _, configs = parse([arms[1], f"{arms[1]} --{key}={value}"])
    assert [len(names) for names in compare.sharing(configs)] == [1, 1]
