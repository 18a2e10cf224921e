"""evaluate.py --probe=unrolled: what probe.py yields, in the report; margins are refused where their formula does not hold."""

import json

import pytest
from runs import run, tiny

import evaluate
import probe
from checkpoint import load_model
from configurator import InputError, TrainConfig
from dataset import Tokens


def test_the_report_holds_the_probe(tokens_dir, tmp_path, capsys):
    run(tiny(tokens_dir, tmp_path, max_iters=6, attention_kernel="rbf"))
    evaluate.main(evaluate.EvaluateConfig(out_dir=str(tmp_path), which="last", probe="unrolled", eval_tokens=64, device="cpu"))
    found = json.loads((tmp_path / "evaluate-last" / "report.json").read_text())["probe"]
    sequences = probe.validation_sequences(Tokens(str(tokens_dir), 16, "cpu"), 4)
    for name, value in dict(probe.probe(load_model(tmp_path, "last")[0], sequences)).items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    assert "| layer   | cosine" in capsys.readouterr().out
    with pytest.raises(InputError, match="the margins' formula is not that of attention_kernel=rbf"):
        evaluate.main(evaluate.EvaluateConfig(out_dir=str(tmp_path), which="last", margins=True, device="cpu"))


def test_refusals():
    with pytest.raises(InputError, match="--probe=x must be unrolled"):
        evaluate.EvaluateConfig(probe="x").check()
    with pytest.raises(InputError, match="--prior_where=attention needs --attention_kernel=softmax"):
        TrainConfig(prior_lambda=0.1, prior_where="attention", head_combine="product").check()
