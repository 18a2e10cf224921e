"""The readers of studies/ on made-up reports."""

import importlib.util
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from scipy import stats

from configurator import InputError

STUDIES = Path(__file__).resolve().parents[1] / "studies"
sys.path.append(str(STUDIES))  # as it is for a script of that directory


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = (
    "lambda_map",
    "alpha_curve",
    "map_select",
    "map_table",
    "tuned",
    "front_page",
    "steps_to_reach",
    "branches",
    "seeds_needed",
    "across",
    "scale",
    "repeats",
)
lambda_map, alpha_curve, map_select, map_table, tuned, front_page, steps_to_reach, branches, seeds_needed, across, scale, repeats = map(load, NAMES)


def report_of(cells) -> dict:
    """cells: (lambda, None for A, alpha, rate, batch size, steps, losses of the seeds, None for one that diverged)."""
    arms, configs = {}, {}
    for i, (lam, alpha, rate, batch, steps, losses) in enumerate(cells):
        runs = [{"seed": s, "best_val_loss": loss} if loss is not None else {"seed": s, "diverged_at": 9} for s, loss in enumerate(losses, 1)]
        arms[f"arm{i}"] = {"cells": runs}
        configs[f"arm{i}"] = {"diffusion": lam is not None, "diffusion_lambda": 1.0 if lam is None else lam, "diffusion_alpha": alpha}
        configs[f"arm{i}"] |= {"learning_rate": rate, "batch_size": batch, "gradient_accumulation_steps": 2, "max_iters": steps, "warmup_iters": 9}
    return {"arms": arms, "provenance": {"configs": configs}}


def test_a_map_of_every_cell(tmp_path, capsys):
    shapes, rates = {32: 100, 64: 50}, (1e-3, 2e-3)
    cells = [(None, 1.0, rate, batch, steps, (1.5, 1.7)) for rate in rates for batch, steps in shapes.items()]
    cells += [(lam, 1.0, rate, batch, steps, (1.4 + lam, 1.5 + lam)) for lam in (0.0, 1.0) for rate in rates for batch, steps in shapes.items()]
    cells += [(2.0, 1.0, 2e-3, 32, 100, (None, None)), (2.0, 1.0, 1e-3, 32, 100, (None, 1.8))]
    cells += [(1.0, alpha, 1e-3, 64, 50, (1.3, 1.4)) for alpha in (0.5, 0.25)]
    report = report_of(cells)
    found = lambda_map.read_cells(report)
    assert len(found) == len(cells) and {cell["batch"] for cell in found.values()} == {64, 128}
    assert math.isnan(found["arm12"]["loss"]) and (found["arm12"]["diverged"], found["arm12"]["runs"]) == (2, 2)
    one = {"lambda": 2.0, "alpha": 1.0, "rate": 1e-3, "batch": 64, "steps": 100, "losses": {2: 1.8}, "loss": 1.8, "diverged": 1, "runs": 2}
    assert found["arm13"] == one | {"plain": {1: 1.5, 2: 1.7}}
    difference = lambda_map.against_plain(found)
    assert difference["arm4"] == pytest.approx(-0.15) and difference["arm11"] == pytest.approx(0.85)
    assert difference["arm13"] == pytest.approx(0.1)  # of the seed that both have, not of the means
    assert "arm12" not in difference and "arm0" not in difference
    assert [(cell["alpha"], cell["loss"]) for cell in lambda_map.line_of(found)] == [(0, 1.6), (0.25, 1.35), (0.5, 1.35), (1.0, 2.45)]
    (tmp_path / "report.json").write_text(json.dumps(report))
    lambda_map.main([str(tmp_path)])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and "map.png" in capsys.readouterr().out
    text = (tmp_path / "map.md").read_text()
    assert "| 64      | 100     | 0.001  | 1.6000 | 1.4500 (-0.1500) | 2.4500 (+0.8500) | 1.8000, 1 of 2 diverged (+0.1000) |" in text
    assert "| 128     | 50      | 0.002  | 1.6000 | 1.4500 (-0.1500) | 2.4500 (+0.8500) | -" in text and "| 0.25 | 1.3500 |" in text
    assert json.loads((tmp_path / "map.json").read_text())["arm12"]["loss"] is None
    before = (tmp_path / "map.png").read_bytes()
    (tmp_path / "report.json").write_text(json.dumps(report_of(cells[:8])))
    with pytest.raises(InputError, match="arm"):  # a map of more arms is there
        lambda_map.main([str(tmp_path)])
    assert (tmp_path / "map.png").read_bytes() == before


def test_a_map_of_two_comparisons(tmp_path):
    """What the second adds is compared with its own A; the first's A is shown."""
    first = report_of([(None, 1.0, 1e-3, 32, 10, (1.5, 1.6)), (1.0, 1.0, 1e-3, 32, 10, (1.7, 1.7))])
    second = report_of([(None, 1.0, 1e-3, 32, 10, (1.25, 1.25)), (0.5, 1.0, 1e-3, 32, 10, (1.75, 2.25)), (None, 1.0, 2e-3, 32, 10, (3.0,))])
    for name in ("arms", "provenance"):
        arms = second[name] if name == "arms" else second[name]["configs"]
        arms |= {f"more {arm}": arms.pop(arm) for arm in list(arms)}
    for folder, report in (("one", first), ("two", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text(json.dumps(report))
    lambda_map.main([str(tmp_path / "one"), str(tmp_path / "two")])
    text = (tmp_path / "one" / "map.md").read_text()
    assert re.search(r"\| 1.5500 \| 2.0000 \(\+0.7500\*\) \| 1.7000 \(\+0.1500\) +\|", text) and "| 3.0000 |" in text
    assert "* from the A of its own report, which is not the one shown." in text
    assert set(json.loads((tmp_path / "one" / "map.json").read_text())) == {"arm0", "arm1", "more arm1", "more arm2"}
    second["arms"]["arm1"], second["provenance"]["configs"]["arm1"] = (
        part.pop("more arm1") for part in (second["arms"], second["provenance"]["configs"])
    )
    with pytest.raises(InputError, match="arm arm1 is in two of the reports with different recipes"):
        lambda_map.read_cells(first, second)
    with pytest.raises(InputError, match="same lambda, alpha, rate and batch"):
        lambda_map.read_cells(first, report_of([(None, 1.0, 1e-3, 32, 10, (1.5,)), (1.0, 1.0, 1e-3, 32, 10, (1.7,))]))
    other = report_of([(None, 1.0, 1e-3, 32, 10, (1.5,)), (2.0, 1.0, 1e-3, 32, 10, (1.7,))])
    other["arms"]["arm2"], other["provenance"]["configs"]["arm2"] = other["arms"].pop("arm1"), other["provenance"]["configs"].pop("arm1")
    other["provenance"]["data_sha256"] = {"train": "other"}
    with pytest.raises(InputError, match="differ in other keys too, data"):
        lambda_map.read_cells(first, other)


def test_a_map_whose_only_differences_are_without_attention(tmp_path):
    cells = [(None, 1.0, 1e-3, 32, 10, (1.5,)), (None, 1.0, 2e-3, 32, 10, (1.5,)), (0.0, 1.0, 1e-3, 32, 10, (2.5,)), (1.0, 1.0, 3e-3, 32, 10, (1.6,))]
    (tmp_path / "report.json").write_text(json.dumps(report_of(cells)))
    lambda_map.main([str(tmp_path)])
    assert "2.5000 (+1.0000)" in (tmp_path / "map.md").read_text() and (tmp_path / "map.png").is_file()


def test_what_cannot_be_mapped(tmp_path):
    for arguments in ([], ["a"] * 10, ["--seeds=2"]):
        with pytest.raises(InputError, match="name directories with a report.json"):
            lambda_map.main(arguments)
    with pytest.raises(InputError, match="report.json is not there: name a directory with"):
        lambda_map.main([str(tmp_path)])
    plain = report_of([(None, 1.0, 1e-3, 32, 10, (1.5,))])
    for report, words in (({"arms": {"a": {}}}, "is not one of compare"), ({"arms": {}}, "no arm"), (plain, "no arm"), ([], "is not one of compare")):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=words):
            lambda_map.main([str(tmp_path)])
    mixed = report_of([(1.0, 1.0, 1e-3, 32, 10, (1.5,)), (2.0, 1.0, 1e-3, 32, 10, (1.5,))])
    mixed["provenance"]["configs"]["arm1"]["weight_init"] = "unrolled"
    longer = report_of([(1.0, 1.0, 1e-3, 32, 10, (1.5,)), (1.0, 1.0, 1e-3, 64, 10, (1.5,)), (2.0, 1.0, 1e-3, 32, 20, (1.5,))])
    diverged = report_of([(1.0, 1.0, 1e-3, 32, 10, (None, None)), (None, 1.0, 1e-3, 32, 10, (1.5,))])
    twice = report_of([(1.0, 1.0, 1e-3, 32, 10, (1.5,)), (1.0, 1.0, 1e-3, 32, 10, (1.6,))])
    lines = report_of([(1.0, 1.0, 1e-3, 32, 10, (1.5,)), (1.0, 0.5, 1e-3, 32, 10, (1.6,)), (1.0, 0.5, 2e-3, 32, 10, (1.6,))])
    silent = report_of([(0.0, 1.0, 1e-3, 32, 10, (1.5,)), (None, 1.0, 1e-3, 32, 10, (1.6,))])
    for report, words in (
        (mixed, "differ in other keys"),
        (longer, "neither the same number of steps"),
        (diverged, "nothing to map"),
        (silent, "nothing to map"),
        (twice, "arms arm0 and arm1 have the same lambda"),
        (lines, "several rates or batch sizes"),
        (report_of([(1.0, 1.0, 1e-3, 32, 10, (math.nan,))]), "is not one of compare"),
        (report_of([(1.0, 1.0, "fast", 32, 10, (1.5,))]), "is not one of compare"),
        ({"arms": []}, "is not one of compare"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=words):
            lambda_map.main([str(tmp_path)])
    assert not (tmp_path / "map.png").exists()


def alphas(curves: dict) -> dict:
    """curves: {alpha: [curve of each seed]}."""
    arms = {f"arm{alpha}": {"diverged": [], "cells": [{"seed": i, "curve": c} for i, c in enumerate(some)]} for alpha, some in curves.items()}
    return {"arms": arms, "provenance": {"configs": {f"arm{alpha}": {"diffusion_alpha": alpha, "max_iters": 200} for alpha in curves}}}


def test_losses_by_alpha(tmp_path, capsys):
    report = alphas({1.0: [[[0, 4.0], [200, 2.0]], [[0, 5.0], [200, 2.2]]], 0.0: [[[0, 1.0], [200, 0.9]], [[0, 1.2], [200, 1.0]]]})
    (tmp_path / "report.json").write_text(json.dumps(report))
    alpha_curve.main([str(tmp_path)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (tmp_path / "alpha.md").read_text().splitlines()]
    assert rows[2] == ["0", "1.1000 ± 0.1414", "-", "0.9500 ± 0.0707", "-"]
    # differences 3.0 and 3.8: mean 3.4, standard error 0.4, and t for one degree of freedom 12.706
    assert rows[3][:3] == ["1", "4.5000 ± 0.7071", "+3.4000 (-1.6825 to +8.4825)"]
    assert "after 200 steps" in rows[0][3] and (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == (tmp_path / "alpha.md").read_text().strip()


def test_what_is_no_curve(tmp_path):
    diverged = alphas({0.0: [[[0, 1.0]]], 1.0: [[[0, 1.0]]]})
    diverged["arms"]["arm1.0"]["diverged"] = [{"seed": 1}]
    mixed = alphas({0.0: [[[0, 1.0]]], 1.0: [[[0, 1.0]]]})
    mixed["provenance"]["configs"]["arm1.0"]["learning_rate"] = 1.0
    for report, words in (
        (diverged, "diverged"),
        (alphas({0.0: [[[0, 1.0]], [[0, 1.0]]], 1.0: [[[0, 1.0]]]}), "is not one of compare.py"),
        (alphas({0.0: [[[0, [None]]]], 1.0: [[[0, 1.0]]]}), "is not one of compare.py"),
        (alphas({1.0: [[[0, 1.0]]]}), "diffusion_alpha=0"),
        ({}, "is not one of compare.py"),
        (mixed, "differ in more than diffusion_alpha, learning_rate: a curve"),
    ):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=words):
            alpha_curve.main([str(tmp_path)])
    with pytest.raises(InputError, match="name one directory"):
        alpha_curve.main([])
    assert not (tmp_path / "alpha.md").exists()


def selection(arms: dict) -> dict:
    """arms: {word: (changes of the config, clean change in per cent, gain)} after the baseline's."""
    plain = {
        "prior_lambda": 0.0,
        "prior_energy": 0.0,
        "prior_detach": False,
        "embed_noise": 0.0,
        "label_smoothing": 0.0,
        "dropout": 0.2,
        "weight_decay": 0.1,
    }
    words = ["config/text.py", *arms]
    configs = {f"arm{i}": plain | (arms[word][0] if word in arms else {}) for i, word in enumerate(words)}
    pairs = {
        f"arm{i + 1}": {"clean_percent": {"mean": cost}, "gains": {"noise 1 RMS": {"mean": gain}}} for i, (_, cost, gain) in enumerate(arms.values())
    }
    line = " ".join(["python", "compare.py", *(f"'{word}'" for word in words), "--seeds=2", "--out_dir=o"])
    return {"provenance": {"command": line, "configs": configs}, "pairs": pairs}


def test_the_settings_of_stage_two(tmp_path, capsys):
    barrier = {"prior_lambda": 1.0}
    arms = {
        "config/text_barrier.py --prior_lambda=1": (barrier, 1.0, 0.05),
        "config/text_barrier.py --prior_lambda=2": (barrier, 1.7, 0.10),
        "config/text_barrier.py --prior_lambda=3": (barrier, 1.8, 0.50),  # costs too much
        "config/text_barrier.py --prior_energy=0.1": (barrier | {"prior_energy": 0.1}, 0.5, 0.01),  # a form of its own
        "config/text_barrier_own.py --prior_lambda=4": (barrier, 3.0, 0.90),  # none of this form is cheap: the cheapest
        "config/text_barrier_own.py --prior_lambda=5": (barrier, 2.0, None),
        "config/text.py --embed_noise=0.25": ({"embed_noise": 0.25}, 0.1, 0.2),
        "config/text.py --embed_noise=0.5": ({"embed_noise": 0.5}, 0.2, 0.3),
        "config/text.py --dropout=0.3": ({"dropout": 0.3}, 1.5, 0.0),
        "config/text.py --weight_decay=0.3": ({"weight_decay": 0.3}, 5.0, 0.0),
        "config/text_barrier_tied.py --prior_lambda=1": (barrier, None, None),  # diverged
    }
    chosen = map_select.select(map_select.read_arms(selection(arms)))
    assert {group: arm["word"].split("=")[-1] for group, arm in chosen.items()} == {
        "barrier": "2", "barrier_energy": "0.1", "barrier_own": "5", "embed_noise": "0.5", map_select.REGULARISED: "0.3"
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(selection(arms)))
    map_select.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("taken") == 5 and 'python compare.py "config/wikitext2_char.py"' in printed
    assert '"config/text.py" "config/text_barrier.py --prior_lambda=2" "config/text_barrier.py --prior_energy=0.1" "config/' in printed


@pytest.mark.parametrize("strength, others", [("0.5", []), ("0.25", ["embed_noise, as strong"])])
def test_noise_alone_as_strong_as_the_variational_form(strength, others):
    arms = {f"config/text.py --embed_noise={s}": ({"embed_noise": float(s)}, 0.1, float(s)) for s in ("0.25", "0.5")}
    arms[f"config/text_barrier_noise.py --embed_noise={strength}"] = ({"prior_lambda": 1.0, "embed_noise": float(strength)}, 0.1, 0.3)
    chosen = map_select.select(map_select.read_arms(selection(arms)))
    assert list(chosen) == ["embed_noise", "barrier_noise", *others]
    assert all(chosen[name]["word"] == f"config/text.py --embed_noise={strength}" for name in others)


def test_reports_that_select_nothing(tmp_path):
    nothing = selection({"config/text.py --dropout=0.3": ({"dropout": 0.3}, 1.0, 0.1)})
    for report, words in (({}, "is not one of compare.py with --evaluate=perturb"), (nothing, "no arm of the report has a barrier")):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=words):
            map_select.main([str(tmp_path)])


def interval(mean, low, high):
    return {"mean": mean, "interval": None if low is None else [low, high]}


@pytest.mark.parametrize(
    "clean, noise, attack, expected",
    [
        ((1.7, 1.0, 2.4), (0.15, 0.01, 0.3), (0.2, 0.1, 0.3), "aim met"),
        ((1.8, 1.0, 2.4), (0.15, 0.01, 0.3), (0.2, 0.1, 0.3), "helps, aim missed"),  # costs too much
        ((0.0, -1.0, 1.0), (0.14, 0.01, 0.3), (0.2, 0.1, 0.3), "helps, aim missed"),
        ((0.0, -1.0, 1.0), (0.5, -0.01, 0.9), (0.2, 0.1, 0.3), "one of two"),
        ((0.0, -1.0, 1.0), (0.5, -0.01, 0.9), (0.2, -0.1, 0.3), "no gain shown"),
        ((0.0, -1.0, 1.0), (0.5, 0.4, 0.6), (-0.2, -0.3, -0.1), "harms"),
        ((0.0, None, None), (0.5, 0.4, 0.6), (0.2, 0.1, 0.3), "-"),
    ],
)
def test_the_verdict_of_an_arm(clean, noise, attack, expected):
    assert map_table.verdict(interval(*clean), [interval(*noise), interval(*attack)]) == expected


def test_the_table_of_the_barrier_study(tmp_path, capsys):
    baseline = {"prior_lambda": 0.0, "prior_form": "softplus", "prior_where": "embedding", "prior_tied": False, "prior_energy": 0.0}
    baseline |= {"prior_anneal": False, "prior_detach": False, "embed_noise": 0.0, "dropout": 0.2, "out_dir": "a"}
    configs = {
        "base": baseline,
        "own": baseline | {"prior_lambda": 10.0, "prior_where": "attention", "prior_form": "square", "prior_detach": True, "out_dir": "b"},
        "noise": baseline | {"embed_noise": 0.5, "prior_lambda": 0.05, "prior_tied": True},
        "dropout": baseline | {"dropout": 0.3},
    }
    configs["noise alone"] = baseline | {"embed_noise": 0.5}
    gains = {"noise 1 RMS": interval(0.2, 0.1, 0.3), "attack 0.1, 10 steps": interval(0.16, 0.001, 0.3)}
    pairs = {name: {"clean_percent": interval(-0.5, -1.0, 0.0), "gains": gains} for name in list(configs)[1:]}

    def cells(deltas):
        found = [{"clean": {"loss": 2.0}, "perturb": {name: {"delta": delta} for name in gains}} for delta in deltas]
        return {"cells": [{"seed": seed, "evaluation": evaluation} for seed, evaluation in enumerate(found)]}

    arms = {"noise alone": cells([0.4, 0.5, 0.45]), "noise": cells([0.2, 0.25, 0.27])}  # gains 0.5, 0.5, 0.4
    (tmp_path / "report.json").write_text(json.dumps({"provenance": {"configs": configs}, "pairs": pairs, "arms": arms}))
    map_table.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Variational against its noise of 0.5 alone: clean loss +0.00 %, gain, noise 1 RMS, +46.7 % (+32.3 to +61.0)" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:6]]
    names = ["barrier: own heads, square, λ 10, gradient cut", "barrier: variational, noise 0.5, softplus, λ 0.05", "control: dropout 0.3"]
    assert [row[0] for row in rows] == [*names, "control: embedding noise 0.5"]
    assert all(row[1:] == ["−0.50 % (−1.00 to +0.00)", "+20.0 % (+10.0 to +30.0)", "+16.0 % (+0.1 to +30.0)", "aim met"] for row in rows)
    (tmp_path / "report.json").write_text(json.dumps({"pairs": {"a": {}}, "provenance": {"configs": configs}}))
    with pytest.raises(InputError, match="--evaluate=perturb"):
        map_table.main([str(tmp_path)])


def rates_report(endpoint, means: dict[str, float | None]) -> dict:
    """A report whose arms have these means of the endpoint; None: all runs diverged. An arm without a rate has the file's, 5e-4."""
    key = {"best": "best_val_loss", "top1": "top1"}[endpoint]
    arms = {f"arm{i}": {"n": 2, "diverged": [] if mean else [{}, {}], key: {"mean": mean}} for i, mean in enumerate(means.values())}
    rates = {f"arm{i}": {"learning_rate": float((re.findall("rate[= ](\\S+)", name) or ["5e-4"])[0])} for i, name in enumerate(means)}
    command = shlex.join(["python", "compare.py", *means, "--seeds", "2"])
    return {"endpoint": endpoint, "arms": arms, "provenance": {"command": command, "configs": rates}}


def test_each_arm_at_its_best_rate(tmp_path, capsys):
    a, b = "config/a.py --learning_rate={}", "config/b.py --learning-rate {} --dropout=0.1"
    rates = ("1e-3", "2e-3", "4e-3")
    means = dict(zip(["config/a.py"] + [arm.format(rate) for arm in (a, b) for rate in rates], (1.6, 1.5, 1.4, 1.35, 1.6, 1.5, None)))
    (tmp_path / "report.json").write_text(json.dumps(rates_report("best", means)))
    tuned.main([str(tmp_path)])
    out, err = capsys.readouterr()
    assert out.splitlines() == ["config/a.py --learning_rate=4e-3", "config/b.py --dropout=0.1 --learning_rate=2e-3"]
    assert err.splitlines() == ["config/a.py: its best rate 4e-3 is the largest tried; next: config/a.py --learning_rate=8e-3"]  # b diverged at 4e-3
    arms, notes = tuned.best_rates(rates_report("top1", {name: mean for name, mean in means.items() if mean}))  # more is better
    assert arms == ["config/a.py --learning_rate=5e-4", "config/b.py --dropout=0.1 --learning_rate=1e-3"]
    assert [note.partition("next: ")[2].rpartition("=")[2] for note in notes] == ["2.5e-4", "5e-4"]
    assert [tuned.spelled(rate) for rate in (0.008, 1.6e-2, 5e-4, 1.0)] == ["8e-3", "1.6e-2", "5e-4", "1e0"]


def test_what_has_no_best_rate():
    good = rates_report("best", {"config/a.py --learning_rate=1": 1.0, "config/a.py --learning_rate=2": 2.0})
    tuned.best_rates(good)

    def changed(*path, value):
        report = json.loads(json.dumps(good))
        inner = report
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return report

    damaged = [
        [],
        {},
        changed("endpoint", value="x"),
        changed("arms", value=[1]),
        changed("arms", "arm0", value=3),
        changed("provenance", value=None),
    ]
    damaged += [changed("provenance", "command", value=value) for value in (None, 3, ["a"], "python compare.py 'a")]
    damaged += [changed("provenance", "configs", value={}), changed("provenance", "configs", "arm0", "learning_rate", value="abc")]
    damaged += [changed("arms", "arm0", "best_val_loss", "mean", value=value) for value in ("x", [1], None)]
    for report, words in (
        (rates_report("best", {"config/a.py": 1.0}), "arm 'config/a.py' has one rate, 5e-4: nothing to choose from"),
        (rates_report("best", dict.fromkeys(("config/a.py", "config/a.py --learning_rate=1"))), "every rate of arm 'config/a.py' has a run that div"),
        (rates_report("best", {}), "has no arms"),
        *((report, "is not one of compare.py") for report in damaged),
    ):
        with pytest.raises(InputError, match=words):
            tuned.best_rates(report)


def test_the_first_page_refuses_what_is_not_its_report(tmp_path, monkeypatch):
    reports = {directory: (front_page.RESULTS / directory / "report.json").read_text() for *_, some, _ in front_page.ROWS for directory in some}
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)
    for directory, text in reports.items():
        (tmp_path / directory).mkdir(exist_ok=True)
        (tmp_path / directory / "report.json").write_text(text)
    assert len(front_page.entries()) == len(front_page.ROWS)
    *_, (directory,), (_, name) = front_page.ROWS[0]
    for damage in (
        lambda report: report["arms"].pop(name),
        lambda report: report["arms"][name]["cells"].pop(),
        lambda report: report["arms"][name]["cells"][0].update(top1="x"),
        lambda report: report["arms"][name]["cells"][0].update(diverged_at=3),
        lambda report: report["provenance"].pop("command"),
        lambda report: report.update(endpoint="x"),
    ):
        report = json.loads(reports[directory])
        damage(report)
        (tmp_path / directory / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=f"results/{directory}/report.json"):
            front_page.entries()
    with pytest.raises(InputError, match="takes no arguments, not ''"):
        front_page.main([""])


def curves_report(arms: dict[str, dict[int, list]]) -> dict:
    """{arm: {seed: curve}}; an empty curve is a run that diverged."""
    cells = {name: [{"seed": s, "curve": c} if c else {"seed": s, "diverged_at": 3} for s, c in some.items()] for name, some in arms.items()}
    return {"arms": {name: {"cells": some} for name, some in cells.items()}}


def test_steps_to_a_common_loss(tmp_path, capsys):
    baseline = {1: [[0, 5.0], [100, 3.0], [200, 2.0]], 2: [[0, 5.0], [100, 3.0], [200, 2.0]], 3: [[0, 5.0], [200, 2.0]], 4: []}
    faster = {1: [[0, 5.0], [50, 3.0], [100, 1.0], [200, 0.5]], 2: [[0, 5.0], [100, 2.0], [200, 1.5]], 3: [], 4: [[0, 5.0], [200, 1.0]]}  # 75 and 100
    slower = {1: [[0, 5.0], [200, 3.5]], 2: [[0, 5.0], [100, 3.5], [200, 4.0]]}  # its best, 3.5, is what the baseline has at 75
    report = curves_report({"a": baseline, "b": faster, "c": slower})
    found = steps_to_reach.ratios(report)
    assert found["b"]["targets"] == [2.0, 2.0] and found["b"]["arm_steps"] == [75.0, 100.0] and found["b"]["baseline_steps"] == [200.0, 200.0]
    assert found["b"]["ratios"] == pytest.approx([200 / 75, 2.0]) and found["b"]["mean"] == pytest.approx((200 / 75 * 2) ** 0.5)
    half = 12.706204736 * abs(math.log(200 / 75) - math.log(2)) / 2  # t(0.975, 1) times the standard error of the logarithms
    assert found["b"]["interval"] == pytest.approx([found["b"]["mean"] * math.exp(sign * half) for sign in (-1, 1)], rel=1e-6)
    assert found["c"]["baseline_steps"] == [75.0, 75.0] and found["c"]["arm_steps"] == [200.0, 100.0]
    assert found["c"]["ratios"] == [0.375, 0.75], "the first time counts, and a slower arm is below 1"
    (tmp_path / "report.json").write_text(json.dumps(report))
    steps_to_reach.main([str(tmp_path)])
    assert json.loads((tmp_path / "steps.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "steps.md").read_text()
    assert capsys.readouterr().out == f"{text}\n{tmp_path / 'steps.md'}, steps.json\n" and "| 200, 100 " in text
    low = curves_report({"a": {1: [[0, 2.0], [100, 3.0]], 2: [[0, 5.0], [100, 1.0]]}, "b": {1: [[0, 5.0], [100, 1.0]], 2: [[0, 5.0], [100, 1.0]]}})
    assert steps_to_reach.ratios(low)["b"]["ratios"] == [1.0], "a curve that begins at the target has no number of steps"
    for damaged in ({}, [], {"arms": {}}, {"arms": {"a": {"cells": [{"seed": 1, "curve": [["x"]]}]}, "b": {"cells": [{"seed": 1, "curve": [[0]]}]}}}):
        with pytest.raises(InputError, match="is not one of compare.py"):
            steps_to_reach.ratios(damaged)


def test_power_is_the_noncentral_t_distributions_and_the_count_the_least():
    from scipy import stats

    for size, sd, n in ((0.01, 0.01, 5), (0.005, 0.018, 106), (0.3, 1.0, 40), (0.0, 1.0, 7)):
        edge, shift = stats.t.ppf(0.975, n - 1), size / sd * n**0.5
        exact = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
        assert seeds_needed.power(size, sd, n) == pytest.approx(exact, abs=1e-6)
    assert seeds_needed.power(1.0, 0.01, 3) == pytest.approx(1.0, abs=1e-6), "far out, where scipy's distribution gives nothing"
    # a planned comparison: 0.002, 0.003 and 0.005 at a standard deviation of 0.0019, paired
    counts = [seeds_needed.seeds(size, 0.0019) for size in (0.002, 0.003, 0.005)]
    assert counts == [10, 6, 4]
    assert all(seeds_needed.power(0.002, 0.0019, n) < 0.8 <= seeds_needed.power(0.002, 0.0019, n + 1) for n in (counts[0] - 1,))
    assert seeds_needed.seeds(1e-4, 1.0) is None
    pair = {"best": {"n": 3, "mean": -0.01, "sd": 1.0}, "last": {"n": 3, "mean": -0.01, "sd": 0.0019}}
    row = [cell.strip() for cell in seeds_needed.table({"endpoint": "last", "pairs": {"b": pair}}).splitlines()[2].split("|")[1:-1]]
    assert row == ["b", "3", "-0.0100", "0.0019", "4", *(str(seeds_needed.seeds(size, 0.0019)) for size in seeds_needed.SIZES[1:])]
    assert seeds_needed.seeds(0.05, 0.0019) == 2, "a difference of 26 standard deviations needs no third pair"
    for damaged, words in (({}, "is not one of"), ({"endpoint": "best", "pairs": {"b": {"best": {"sd": None}}}}, "no arm of the report")):
        with pytest.raises(InputError, match=words):
            seeds_needed.table(damaged)


def test_branches_by_kind_of_head(tmp_path):
    """Two layers of three heads, the last one diffusing: the first layer stands apart, and diagonals are those of the second layer alone."""
    values = {}
    for layer in (0, 1):
        values |= {f"layer {layer} stream_rms": 2.0 + 3 * layer, f"layer {layer} attention_rms": 4.0 + layer, f"layer {layer} mlp_rms": 1.0 + layer}
        values |= {f"layer {layer} head {head} diagonal": 0.1 * head + 0.5 * layer for head in range(3)}
    config = {"n_layer": 2, "n_head": 3, "diffusion": True, "diffusion_heads": [1]}
    measured = branches.measure(values, config)
    assert measured == pytest.approx(dict(zip(branches.QUANTITIES, (2.0, 1.0, 0.5, 0.4, 0.55, 0.7))))
    assert branches.measure(values, config | {"diffusion_heads": [0, 3]})["diagonal, plain heads"] is None
    assert branches.measure(values, config | {"diffusion_heads": []})["diagonal, diffusing heads"] == pytest.approx(0.6)
    assert branches.measure(values, config | {"diffusion": False})["diagonal, plain heads"] == pytest.approx(0.6)
    for seed, scale in ((1, 1.0), (2, 2.0)):
        cell = tmp_path / "cells" / "b" / f"seed-{seed}"
        cell.mkdir(parents=True)
        rows = [{"step": step, "values": values} for step in (0, 5)] + [{"step": 9, "values": values | {"layer 1 head 2 diagonal": 0.7 * scale}}]
        (cell / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [{"seed": 1}, {"seed": 2}, {"seed": 3, "diverged_at": 4}]
    report = {"arms": {"b": {"cells": cells}}, "provenance": {"configs": {"b": config}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    branches.main([str(tmp_path)])
    found = json.loads((tmp_path / "branches.json").read_text())["b"]
    assert (found["first"]["step"], found["last"]["step"]) == (0, 9) and found["first"]["diagonal, diffusing heads"]["mean"] == pytest.approx(0.7)
    assert found["last"]["diagonal, diffusing heads"] == pytest.approx({"n": 2, "mean": 1.05, "sd": 0.7 / 2**0.5})
    assert "1.050 ± 0.495" in (tmp_path / "branches.md").read_text()
    record = tmp_path / "cells" / "b" / "seed-2" / "probe.jsonl"
    record.write_text("".join(record.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="the first records of the runs of b are of different steps"):
        branches.main([str(tmp_path)])
    record.unlink()
    with pytest.raises(InputError, match="--probe_interval"):
        branches.main([str(tmp_path)])
    for damaged in ({}, {"arms": {"b": {"cells": [{}]}}, "provenance": {"configs": {"b": {}}}}):
        with pytest.raises(InputError, match="is not one of a comparison"):
            branches.read(tmp_path, damaged)


def comparison_of(arms: dict[str, dict], **changes) -> dict:
    """A report of {arm: {"config": keys that differ, seed: last loss or None}}."""
    config = {"diffusion": False, "learning_rate": 1.0, "max_iters": 9, "out_dir": "x"}
    report = {"endpoint": "last", "arms": {}, "provenance": {"configs": {}, "data_sha256": {"val_sha256": "v"}, "versions": {"torch": "2"}}}
    for name, arm in arms.items():
        made = {s: {"diverged_at": 1} if v is None else {"val_loss": v, "curve": [[0, 9.0], [9, v]]} for s, v in arm.items() if s != "config"}
        cells = [{"seed": s, **cell} for s, cell in made.items()]
        report["arms"][name], report["provenance"]["configs"][name] = {"cells": cells}, config | arm["config"]
    report["provenance"] |= {"device": "d", "code_sha256": "c", "command": "python compare.py"} | changes
    return report


def test_arms_of_several_comparisons(tmp_path, capsys):
    faster = {"config": {"diffusion": True, "learning_rate": 2.0}, 1: 5.0}
    first = comparison_of({"half": {"config": {"diffusion": True}, 1: 1.0, 2: 2.0, 3: None}, "half 2": faster})
    second = comparison_of({"all": {"config": {"diffusion": True}}, "A": {"config": {"out_dir": "y"}, 3: 3.0, 2: 2.5, 1: 1.25}}, code_sha256="other")
    for name, report in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    across.main([str(tmp_path / "one"), str(tmp_path / "two")])
    found = json.loads((tmp_path / "one" / "across.json").read_text())
    assert list(found["arms"]) == ["A", "half", "half 2", "all"] and not list((tmp_path / "two").glob("across*"))
    assert list(found["pairs"])[:4] == ["half − A", "half 2 − A", "all − A", "half 2 − half"] and found["pairs"]["all − A"]["mean"] is None
    assert found["pairs"]["half − A"]["seeds"] == [1, 2] and found["pairs"]["half − A"]["differences"] == [-0.25, -0.5]
    assert found["pairs"]["half 2 − half"]["mean"] == 4.0 and found["pairs"]["half 2 − half"]["interval"] is None
    text = (tmp_path / "one" / "across.md").read_text()
    assert (
        capsys.readouterr().out.startswith(text)
        and "different versions of the code" in text
        and re.search(r"\| half − A +\| 2 +\| -0\.3750 \|", text)
    )
    more = comparison_of({"all": faster, "half": {"config": {"diffusion": True, "learning_rate": 1.0}, 4: 7.0}})
    assert re.search(r"\| half +\| 2 \(\+ 1 diverged\) \|", text) and "](across.png)" in text
    assert "Arms without a seed that both have finished have no difference." in text and "| all − A " not in text
    assert "no pair is of two devices" not in text and found["devices"] == {"d": [1, 2, 3]}
    assert "one: code c, python compare.py" in text and "two: code other, python compare.py" in text
    assert "A difference of three pairs or fewer is a hint" in text
    assert (tmp_path / "one" / "across.png").read_bytes().startswith(b"\x89PNG")
    whole = across.together([first, more])
    assert len(set(whole["code"])) == 1 and across.endpoints(whole)["half"] == {1: 1.0, 2: 2.0, 4: 7.0}, "seeds of one arm from two reports"
    first["provenance"]["device"] = second["provenance"]["device"] = "e"
    for arm in (arm for report in (first, second) for arm in report["arms"].values()):
        arm["cells"] = [cell | {"seed": cell["seed"] + 4} for cell in arm["cells"]]
    both = across.together([json.loads((tmp_path / "one" / "report.json").read_text()), first])
    said = across.tables(both, across.endpoints(both), {}, [tmp_path, tmp_path])
    assert "The runs are from d on seeds 1, 2, 3 and e on seeds 5, 6, 7; no pair is of two devices." in said


@pytest.mark.parametrize("directory", sorted(path.parent.name for path in front_page.RESULTS.glob("*/across.json")))
def test_the_committed_tables_of_several_comparisons_are_those_of_their_reports(directory):
    committed = json.loads((front_page.RESULTS / directory / "across.json").read_text())
    folders = [front_page.RESULTS / name for name in committed["reports"]]
    whole = across.together([json.loads((folder / "report.json").read_text()) for folder in folders])
    arms = across.endpoints(whole)
    pairs = across.differences(arms)
    assert json.loads(json.dumps({"arms": arms, "pairs": pairs, "devices": whole["devices"]})) == {
        key: committed[key] for key in ("arms", "pairs", "devices")
    }
    assert across.tables(whole, arms, pairs, folders) == (front_page.RESULTS / directory / "across.md").read_text()


def test_comparisons_that_do_not_belong_together():
    one = comparison_of({"half": {"config": {"diffusion": True}, 1: 1.0}, "A": {"config": {}, 1: 1.0}})
    for other, message in (
        (comparison_of({"B": {"config": {"max_iters": 8}, 1: 1.0}}), "differ in max_iters: 9 and 8"),
        (comparison_of({"B": {"config": {"learning_rate": 2.0}, 1: 1.0}}), "differ in learning_rate: 1.0 and 2.0"),
        (comparison_of({"B": {"config": {}, 1: 1.0}}, device="e"), "differ in device on seed 1: d and e"),
        (comparison_of({"B": {"config": {}, 1: 1.0}}, versions={"torch": "3"}), "differ in torch: 2 and 3"),
        (
            comparison_of({"B": {"config": {}, 1: 1.0}}, data_sha256={"val_sha256": "w"}, data="x"),
            r"differ in data: None \(sha256 v\) and x \(sha256 w\)",
        ),
        (comparison_of({"B": {"config": {}, 1: 1.0}}) | {"endpoint": "best"}, "differ in endpoint: last and best"),
        (comparison_of({"A": {"config": {}, 1: 1.0}}), "arm A is in two of the reports on the same seed"),
        (comparison_of({"A": {"config": {"diffusion": True}, 2: 1.0}}), "arm A is in two of the reports with different recipes"),
        (comparison_of({"B": {"config": {"dropout": 0.5}, 1: 1.0}}), "differ in dropout: 0.0 and 0.5"),  # a key that the other is too old for
        ({}, "is not one of compare.py"),
        ([], "is not one of compare.py"),
    ):
        for both in ([one, other], [other, one]):
            with pytest.raises(InputError, match=message if "and" not in message or both[0] is one else "differ in|is in two"):
                across.together(both)
    named = [comparison_of({f"A_learning_rate={rate}": {"config": {"learning_rate": rate}, 1: 1.0}}) for rate in (1.0, 2.0)]
    assert len(across.together(named)["arms"]) == 2, "an arm that has the key in its name"
    alone = [comparison_of({name: {"config": {"diffusion": name == "B", "attention_kernel": "softmax"}, 1: 1.0}}) for name in "AB"]
    assert list(across.together(alone)["arms"]) == ["A", "B"], "one arm each, told apart by a key of attention"
    alone[1]["provenance"]["data"] = "another name"
    assert len(across.together(alone)["arms"]) == 2, "of the same data by another name"
    elsewhere = comparison_of({name: {"config": {"diffusion": name == "half"}, 2: 1.0} for name in ("half", "A")}, device="e")
    assert across.together([one, elsewhere])["devices"] == {"d": [1], "e": [2]}, "whose seeds are other ones"
    for curve in (None, [], [[0, "x"]], [[0]]):
        damaged = comparison_of({"B": {"config": {}, 1: 1.0}})
        damaged["arms"]["B"]["cells"][0]["curve"] = curve
        with pytest.raises(InputError, match="is not one of compare.py"):
            across.together([one, damaged])
    for value in (float("nan"), "x"):
        with pytest.raises(InputError, match="is not one of compare.py"):
            across.endpoints(across.together([one, comparison_of({"B": {"config": {}, 1: value}})]))
    for arguments in ([], ["a", "-b"], [str(STUDIES)]):
        with pytest.raises(InputError, match="name (a directory|directories) with a report.json"):
            across.main(arguments)


def test_every_pair_of_one_comparison(tmp_path):
    half = {"diffusion": True}
    arms = {"A": {"config": {}, 1: 1.0, 2: 2.0}, "one": {"config": half, 1: 1.5, 2: 2.0}, "two": {"config": half, 1: 3.0, 2: 4.0}}
    (tmp_path / "report.json").write_text(json.dumps(comparison_of(arms)))
    across.main([str(tmp_path)])
    pairs = json.loads((tmp_path / "across.json").read_text())["pairs"]
    found = {name: pair["differences"] for name, pair in pairs.items()}
    assert found == {"one − A": [0.5, 0.0], "two − A": [2.0, 2.0], "two − one": [1.5, 2.0]}


def test_what_a_repetition_moves(tmp_path, capsys):
    new = comparison_of({"A": {"config": {"out_dir": "y"}, 1: 1.0, 2: 2.5, 3: 3.0, 9: 9.0}, "B": {"config": {"diffusion": True}, 1: 5.0}})
    old = {"A": {"config": {"dropout": 0.0}, 3: 3.25, 1: 1.5, 2: 2.625, 4: 4.0}, "C": {"config": {"diffusion": True}, 1: 0.0}}
    old = comparison_of(old, code_sha256="other")  # whose report has a key, at its default, for which the other is too old
    for name, report in (("new", new), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    repeats.main([str(tmp_path / "new"), str(tmp_path / "old")])
    found = json.loads((tmp_path / "new" / "repeats.json").read_text())
    assert found["arms"] == {"A": {"seeds": [1, 2, 3], "first": [1.0, 2.5, 3.0], "again": [1.5, 2.625, 3.25]}}
    pair, moved = found["differences"]["A"], [-0.5, -0.125, -0.25]
    assert pair == found["pooled"] and pair["differences"] == moved
    assert pair["of_seeds"] == pytest.approx((stats.tvar([1.0, 2.5, 3.0]) + stats.tvar([1.5, 2.625, 3.25])) ** 0.5), "root of 2 times their mean"
    low, high = stats.ttest_1samp(moved, 0).confidence_interval(0.95)
    text = (tmp_path / "new" / "repeats.md").read_text()
    row = rf"\| A +\| 3 +\| -0\.2917 \({low:+.4f} to \{high:+.4f}\) +\| {stats.tstd(moved):.4f} +\| {pair['of_seeds']:.4f} +\| 0\.5000 +\|"
    assert re.search(row, text) and capsys.readouterr().out.startswith(text) and "- old: code other, torch" in text
    third = comparison_of({"A": {"config": {}, 1: 3.0}})
    assert repeats.repeated([new, old, third])["A"] == {"seeds": [1, 2, 3, 1], "first": [1.0, 2.5, 3.0, 1.0], "again": [1.5, 2.625, 3.25, 3.0]}
    two = {"a": {"first": [1.0, 2.0], "again": [3.0, 5.0]}, "b": {"first": [1.0], "again": [9.0]}}
    assert [entry["of_seeds"] for entry in repeats.measured(two)[0].values()] == [pytest.approx((0.5 + 2.0) ** 0.5), None]
    for other, said in (
        (comparison_of({"A": {"config": {"learning_rate": 7.0}, 1: 1.0}}), "arm A has other recipes in two of the reports: learning_rate"),
        (comparison_of({"A": {"config": {}, 1: None}}), "A diverged on seed 1"),
        (comparison_of({"A": {"config": {}, 4: 1.0}}), "no run is in two of the reports"),
        (comparison_of({"A": {"config": {}, 1: 1.0}}, data_sha256={"x": "another"}), "differ in data"),
        (comparison_of({"A": {"config": {}, 1: 1.0}}) | {"endpoint": "best"}, "differ in endpoint"),
        (json.loads(json.dumps(new)), "A on seed 1 is one run"),
        ({"endpoint": "last", "provenance": {"data_sha256": new["provenance"]["data_sha256"]}}, "not one of compare.py"),
    ):
        with pytest.raises(InputError, match=said):
            repeats.repeated([new, other])
    with pytest.raises(InputError, match="A on seed 1 is one run"):
        repeats.repeated([new, old, json.loads(json.dumps(old))])
    for damaged in ({}, {"provenance": {"code_sha256": 1}}, {"provenance": {"code_sha256": "c", "versions": None}}):
        with pytest.raises(InputError, match="not one of compare.py"):
            repeats.sources([(tmp_path, damaged)])
    for arguments in ([], [str(tmp_path / "new")], [str(tmp_path / "new")] * 2, [str(tmp_path / "new"), str(tmp_path / "gone")]):
        with pytest.raises(InputError):
            repeats.main(arguments)
    assert (tmp_path / "new" / "repeats.md").read_text() == text


@pytest.mark.parametrize("directory", sorted(path.parent.name for path in front_page.RESULTS.glob("*/repeats.json")))
def test_the_committed_table_of_repetitions_is_that_of_its_reports(directory):
    folder = front_page.RESULTS / directory
    committed = json.loads((folder / "repeats.json").read_text())
    reports = [json.loads((folder.parent / name / "report.json").read_text()) for name in committed["reports"]]
    found = repeats.repeated(reports)
    differences, pooled = repeats.measured(found)
    assert (found, differences, pooled) == (committed["arms"], committed["differences"], committed["pooled"])
    assert (folder / "repeats.md").read_text().startswith(repeats.table(differences, pooled))


def test_steps_of_several_comparisons_are_the_committed_table():
    reports = [json.loads((front_page.RESULTS / name / "report.json").read_text()) for name in front_page.GPT2]
    committed = json.loads((front_page.RESULTS / front_page.GPT2[0] / "steps.json").read_text())
    assert json.loads(json.dumps(steps_to_reach.ratios(across.together(reports)))) == committed
    assert json.loads((front_page.RESULTS / front_page.GPT2[0] / "across.json").read_text())["reports"] == list(front_page.GPT2)


def test_one_arm_has_nothing_to_reach(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(comparison_of({"A": {"config": {}, 1: 2.0}})))
    with pytest.raises(InputError, match="one arm alone has nothing to reach"):
        steps_to_reach.main([str(tmp_path)])
    assert not (tmp_path / "steps.json").exists()


def test_a_table_of_more_arms_is_not_written_over(tmp_path):
    for name, arms in (("one", ("A", "B")), ("two", ("C",))):
        (tmp_path / name).mkdir()
        report = comparison_of({arm: {"config": {}, 1: 2.0, 2: 3.0} for arm in arms})
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    both = [str(tmp_path / name) for name in ("one", "two")]
    steps_to_reach.main(both)
    before = (tmp_path / "one" / "steps.json").read_bytes(), (tmp_path / "one" / "steps.md").read_bytes()
    with pytest.raises(InputError, match=r"steps.json has 2 run\(s\) that this one lacks, as C on seed 1: name all directories"):
        steps_to_reach.main(both[:1])
    assert before == ((tmp_path / "one" / "steps.json").read_bytes(), (tmp_path / "one" / "steps.md").read_bytes())
    steps_to_reach.main(both)
    more = comparison_of({arm: {"config": {}, 5: 2.0, 6: 3.0} for arm in ("A", "B")})
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "report.json").write_text(json.dumps(more))
    every = [*both, str(tmp_path / "more")]
    for reader, name in ((steps_to_reach, "steps"), (across, "across")):
        reader.main(every)
        with pytest.raises(InputError, match=rf"{name}.json has \d run\(s\) that this one lacks, as ([AB]) on seed 5: name all directories"):
            reader.main(both)  # no arm less, but seeds
    (tmp_path / "two" / "across.json").write_text("[1]")
    with pytest.raises(InputError, match="across.json is there and is no table of this script"):
        across.main(both[::-1])
    assert (tmp_path / "two" / "across.json").read_text() == "[1]" and not (tmp_path / "two" / "across.md").exists()


def sized(arms: dict[str, dict], n_layer: int = 1, batch: int = 8, **changes) -> dict:
    """A comparison of a text model of so many layers; an arm's name ends in its rate."""
    recipe = {"n_layer": n_layer, "n_head": 4, "n_embd": 8, "vocab_size": 10, "block_size": 4, "batch_size": batch, "bias": False}
    recipe["gradient_accumulation_steps"] = 16 // batch
    heads = {"half": [2] * n_layer, "late": [0] * (n_layer - 1) + [4], "quarter": [1] * n_layer, "all": None}
    configs = {}
    for name in arms:
        what, rate = name.split()
        configs[name] = {"learning_rate": float(rate), "diffusion": what != "A", "diffusion_heads": heads.get(what)}
    return comparison_of({name: {"config": recipe | configs[name] | changes} | seeds for name, seeds in arms.items()})


def test_differences_by_size(tmp_path, capsys):
    first = {"A 1e-3": {1: 3.0, 2: 3.5}, "half 1e-3": {1: 2.5, 2: 3.25}, "A 2e-3": {1: 4.0, 2: 3.0}, "half 2e-3": {1: 2.0, 2: 2.5}}
    more = {"A 1e-3": {3: 9.0}, "half 0.001": {3: 8.0}, "all 1e-3": {3: 9.5}}  # one by another name
    larger = {"A 5e-4": {1: 1.0}, "half 5e-4": {1: 0.5}, "all 5e-4": {1: 2.0}, "quarter 5e-4": {1: 1.0}, "late 5e-4": {1: None}}
    reports = {"one": sized(first), "two": sized(more), "three": sized(larger, n_layer=3, batch=4)}
    for name, report in reports.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    scale.main([str(tmp_path / name) for name in reports])
    found = json.loads((tmp_path / "one" / "scale.json").read_text())
    assert found["reports"] == list(reports) and len(found["arms"]) == 7
    means = {(e["parameters"], e["arm"], e["rate"]): e["mean"] for e in found["arms"].values()}
    assert [e["rate"] for e in found["arms"].values() if e["at_best"]] == ["best: 1e-3 for A, 2e-3 for the arm"]
    small, large = (12 * n * 64 + (10 + 4 + 2 * n + 1) * 8 for n in (1, 3))
    half = "A − I in half of the heads"
    assert means == {
        (small, half, "1e-3"): pytest.approx((-0.5 - 0.25 - 1) / 3),
        (small, half, "2e-3"): -1.25,
        (small, half, "best: 1e-3 for A, 2e-3 for the arm"): -1.0,  # on seeds 1 and 2, which both rates have
        (small, "A − I", "1e-3"): 0.5,
        (large, half, "5e-4"): -0.5,
        (large, "A − I", "5e-4"): 1.0,
        (large, "A − I in 1/4 of the heads", "5e-4"): 0.0,
    }
    text = (tmp_path / "one" / "scale.md").read_text()
    assert capsys.readouterr().out.startswith(text) and re.search(r"\| A − I in half of the heads +\| 1, 2, 3 +\| 5\.1667", text)
    assert (tmp_path / "one" / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_rates_are_those_of_most_seeds():
    one, two, three = ({"A": {s: a for s in seeds}, "half": {s: b for s in seeds}} for seeds, a, b in (((1, 2), 3, 2), ((1, 2), 2, 4), ((1,), 1, 1)))
    assert scale.at_best({1e-3: one, 2e-3: two, 4e-3: three}, "half") == ("best: 2e-3 for A, 1e-3 for the arm", {1: 2, 2: 2}, {1: 2, 2: 2})
    assert scale.at_best({1e-3: one, 4e-3: three}, "half") == ("best: 4e-3 for A, 4e-3 for the arm", {1: 1}, {1: 1})
    assert scale.at_best({1e-3: one, 4e-3: {"A": {1: 0}}}, "half") is None and scale.at_best({1e-3: one}, "all") is None


def test_weights_are_counted_as_the_model_has_them():
    from model import GPT, GPTConfig

    recipe = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 11, "block_size": 5}
    assert scale.parameters(recipe) == sum(p.numel() for p in GPT(GPTConfig(**recipe)).parameters())


def test_sizes_that_cannot_be_compared():
    one = sized({"A 1": {1: 1.0}, "half 1": {1: 2.0}})
    for other, message in [
        (sized({"A 1": {1: 1.0}}, n_layer=2, max_iters=10), "differ in other keys too, max_iters"),
        (sized({"A 1": {1: 1.0}}, n_layer=2, gradient_accumulation_steps=1), "differ in other keys too, tokens a step"),
        (sized({"half 1": {2: 1.0}, "half 1.0": {1: 1.0}}), "two arms of .* diffuse alike at one rate.* both on seed 1"),
        ({"endpoint": "last"}, "not one of compare.py"),
    ]:
        with pytest.raises(InputError, match=message):
            scale.read_sizes([one, other])
    mixed = sized({"A 1": {1: 1.0}, "half 1": {1: 2.0}})
    mixed["provenance"]["configs"]["A 1"]["n_layer"] = 2
    with pytest.raises(InputError, match="arms of several sizes"):
        scale.read_sizes([mixed])
    with pytest.raises(InputError, match="are of one size"):
        scale.read_sizes([one])
    with pytest.raises(InputError, match="losses of text models"):
        scale.read_sizes([one | {"endpoint": "top1"}])
    with pytest.raises(InputError, match="no difference to show"):
        scale.entries(scale.read_sizes([sized({"half 1": {1: 1.0}}), sized({"A 1": {1: 1.0}}, n_layer=2)]))


@pytest.mark.parametrize("directory", sorted(path.parent.name for path in front_page.RESULTS.glob("*/scale.json")))
def test_the_committed_table_by_size_is_that_of_its_reports(directory):
    committed = json.loads((front_page.RESULTS / directory / "scale.json").read_text())
    reports = [json.loads((front_page.RESULTS / name / "report.json").read_text()) for name in committed["reports"]]
    entries = scale.entries(scale.read_sizes(reports))
    assert json.loads(json.dumps(entries)) == list(committed["arms"].values())
    assert scale.table(entries, reports) == (front_page.RESULTS / directory / "scale.md").read_text()
