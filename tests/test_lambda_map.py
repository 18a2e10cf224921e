"""studies/lambda_map.py on a made-up report."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from configurator import InputError

path = Path(__file__).resolve().parents[1] / "studies" / "lambda_map.py"
spec = importlib.util.spec_from_file_location("lambda_map", path)
lambda_map = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lambda_map)


def report_of(cells) -> dict:
    """cells: (lambda, alpha, rate, batch size, loss or None, diverged)."""
    arms, configs = {}, {}
    for i, (lam, alpha, rate, batch, loss, diverged) in enumerate(cells):
        arms[f"arm{i}"] = {"best_val_loss": {"mean": loss}, "diverged": [{}] * diverged, "cells": [{}, {}]}
        configs[f"arm{i}"] = {"diffusion": True, "diffusion_lambda": lam, "diffusion_alpha": alpha, "learning_rate": rate, "batch_size": batch}
        configs[f"arm{i}"]["gradient_accumulation_steps"] = 2
    return {"arms": arms, "provenance": {"configs": configs}}


def test_a_map_of_every_cell(tmp_path, capsys):
    cells = [(lam, 1.0, rate, batch, 1.4 + lam / 10 + rate, 0) for lam in (0.0, 1.0) for rate in (1e-3, 2e-3) for batch in (32, 64)]
    cells += [(2.0, 1.0, 2e-3, 32, None, 2), (2.0, 1.0, 1e-3, 32, 1.7, 1)]
    cells += [(1.0, alpha, 1e-3, 64, 1.5, 0) for alpha in (0.0, 0.5)]
    report = report_of(cells)
    report["arms"]["A"] = report["arms"]["arm0"]
    report["provenance"]["configs"]["A"] = {"diffusion": False}
    found = lambda_map.read_cells(report)
    assert len(found) == len(cells) and {cell["batch"] for cell in found} == {64, 128}
    assert math.isnan(found[8]["loss"]) and (found[8]["diverged"], found[8]["runs"]) == (2, 2)
    assert found[9] == {"lambda": 2.0, "alpha": 1.0, "rate": 1e-3, "batch": 64, "loss": 1.7, "diverged": 1, "runs": 2}
    (tmp_path / "report.json").write_text(json.dumps(report))
    lambda_map.main([str(tmp_path)])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and "map.png" in capsys.readouterr().out


def test_what_cannot_be_mapped(tmp_path):
    for arguments in ([], ["a", "b"], ["--help"]):
        with pytest.raises(InputError, match="name one directory"):
            lambda_map.main(arguments)
    with pytest.raises(InputError, match="cannot be read"):
        lambda_map.main([str(tmp_path)])
    for report, words in (({"arms": {"a": {}}}, "lacks 'provenance'"), ({"arms": {}}, "no arm")):
        (tmp_path / "report.json").write_text(json.dumps(report))
        with pytest.raises(InputError, match=words):
            lambda_map.main([str(tmp_path)])
    assert not (tmp_path / "map.png").exists()
