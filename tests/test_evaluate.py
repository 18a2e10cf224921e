"""evaluate.py: perturbations that are what they say, reproducible and paired; attacks that behave like attacks; margins; and refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import compare
import evaluate
import train
from configurator import InputError, TrainConfig, configure
from dataset import Pictures, Tokens
from evaluate import EvaluateConfig, Subject, all_margins, attack, blur, delete, keyboard, substitute, swap, table, typo
from model import GPT, ViT, ViTConfig
from pictures import PictureWriter
from place import find_place
from prior import own_margins
from report import robustness

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2, warmup_iters=5, max_iters=60,
    eval_interval=60, eval_tokens=320, log_interval=60, device="cpu", dtype="float32", compile=False,
)  # fmt: skip
PLACE = find_place("cpu", "float32")


@pytest.fixture(scope="module")
def runs(tokens_dir, tmp_path_factory) -> dict[str, Path]:
    """Two runs, A and A - I, of 60 steps. No test changes them."""
    found = {}
    for name, changes in {"A": {}, "A-I": {"diffusion": True, "seed": 2}}.items():
        found[name] = tmp_path_factory.mktemp("runs") / name
        config = TrainConfig(**TINY | {"dataset": str(tokens_dir), "out_dir": str(found[name])} | changes).check()
        train.train(train.build(config, PLACE), config.seed, found[name], quiet=True)
    return found


def subject_of(out_dir: Path, **changes) -> Subject:
    return evaluate.load_subject(EvaluateConfig(out_dir=str(out_dir), device="cpu", **{"eval_tokens": 320} | changes).check())[0]


@pytest.fixture(scope="module")
def subject(runs) -> Subject:
    return subject_of(runs["A"])


@pytest.fixture(scope="module")
def picture_subject(tmp_path_factory) -> Subject:
    """An untrained ViT on 9 pictures of 6 x 6."""
    directory, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    with PictureWriter(directory, (3, 6, 6)) as writer:
        labels = {}
        for name, count in (("train", 12), ("val", 9)):
            labels[name] = np.arange(count) % 3
            writer.add(name, draw.integers(0, 256, (count, 3, 6, 6), dtype=np.uint8))
        writer.finish(labels, ["a", "b", "c"], "random", {})
    model = ViT(ViTConfig(image_size=6, patch_size=2, n_classes=3, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return Subject(model, Pictures(str(directory), 2, 0, False, "cpu"), PLACE, batch_size=4)


def flat(results: dict) -> dict[str, float]:
    """Every number of a report under its path."""
    found = {}
    for key, value in results.items():
        found |= {f"{key}/{name}": v for name, v in flat(value).items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


# ---------------------------------------------------------------------------------------------------------------------------------
# Text


IDS = np.arange(40) % 11


@pytest.mark.parametrize("rate", [0.03, 0.3, 1.0])
def test_substituted_tokens_are_others_and_ask_for_the_same_targets(rate):
    new, source = substitute(IDS, np.random.default_rng(0), rate, 11)
    assert np.array_equal(source, np.arange(40)) and new.min() >= 0 and new.max() < 11
    assert rate < 1 or (new != IDS).all()
    more, _ = substitute(IDS, np.random.default_rng(0), min(1.0, 2 * rate), 11)
    changed = new != IDS
    assert np.array_equal(more[changed], new[changed]), "what is perturbed at one rate is so at a higher one"


def test_substitution_is_uniform_over_the_other_tokens():
    new, _ = substitute(np.zeros(30_000, dtype=int), np.random.default_rng(0), 0.5, 6)
    counts = np.bincount(new, minlength=6)
    assert abs(counts[0] / 30_000 - 0.5) < 0.02 and (abs(counts[1:] / 30_000 - 0.1) < 0.01).all()


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_swaps_exchange_disjoint_neighbours_and_hide_what_they_give_away(rate):
    ids = np.arange(40)
    new, source = swap(ids, np.random.default_rng(1), rate)
    here = np.flatnonzero(source < 0)
    assert len(here) and np.array_equal(np.sort(new), ids) and (np.diff(here) > 1).all() and 39 not in here
    assert np.array_equal(new[here], ids[here + 1]) and np.array_equal(new[here + 1], ids[here])
    targets = ids + 1
    asked = np.flatnonzero(source >= 0)
    assert not any(targets[source[i]] in new[: i + 1] for i in asked), "no target stands in its own context"


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_deletions_move_the_rest_up_with_its_own_targets(rate):
    ids = np.arange(40)
    new, source = delete(ids, np.random.default_rng(1), rate)
    assert 0 < len(new) < 40 and np.array_equal(new, ids[source]) and (np.diff(new) > 0).all()


def test_typos_hit_a_neighbour_of_the_same_case():
    characters = "\n ACQWaqswz,"
    neighbours = {c: {characters[i] for i in row} for c, row in zip(characters, keyboard(characters))}
    assert neighbours["a"] == {"q", "s", "w", "z"} and neighbours["q"] == {"a", "w"} and neighbours["A"] == {"Q", "W"}
    assert neighbours["C"] == {"C"} and neighbours[","] == {","} and neighbours["\n"] == {"\n"}
    ids = np.full(500, characters.index("q"))
    new, source = typo(ids, np.random.default_rng(0), 0.5, keyboard(characters))
    assert {characters[i] for i in new} == {"q", "a", "w"} and np.array_equal(source, np.arange(500))


def test_deltas_are_those_of_a_plain_loop(subject):
    """Substitution and deletion at 10 %, window by window, with the model's own loss."""
    found = dict(evaluate.text_faults(subject))
    clean_sum, sums, counts = {}, {}, {}
    for first, x, y in subject.batches():
        for row in range(len(x)):
            if not (y[row] >= 0).any():
                continue
            clean = F.cross_entropy(subject.model(x[row : row + 1], y[row : row + 1])[0][0], y[row], ignore_index=-1, reduction="none")
            for kind in ("substitution", "deletion"):
                draw = np.random.default_rng(np.random.SeedSequence([1, 4, evaluate.zlib.crc32(kind.encode()), first + row]))
                ids = x[row].numpy()
                new, source = substitute(ids, draw, 0.1, subject.data.vocab_size) if kind == "substitution" else delete(ids, draw, 0.1)
                targets = y[row][source]
                logits = subject.model(torch.from_numpy(new)[None], targets[None])[0][0]
                losses = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
                sums[kind] = sums.get(kind, 0) + float(losses.detach().double().sum())
                clean_sum[kind] = clean_sum.get(kind, 0) + float(clean.detach()[source].double().sum())
                counts[kind] = counts.get(kind, 0) + int((targets >= 0).sum())
    for kind in sums:
        entry = found[f"{kind} 10%"]
        assert entry["predictions"] == counts[kind] and (kind == "substitution") == (counts[kind] == 320)
        assert entry["perturbed"] == pytest.approx(sums[kind] / counts[kind], rel=1e-5)
        assert entry["clean"] == pytest.approx(clean_sum[kind] / counts[kind], rel=1e-5)
        assert entry["delta"] == pytest.approx(entry["perturbed"] - entry["clean"], abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------------------
# Everything


def test_clean_loss_is_the_trainings_own(subject, runs):
    results = dict(evaluate.clean(subject))
    meta = json.loads((runs["A"] / "best" / "checkpoint.json").read_text())
    assert results["loss"] == pytest.approx(meta["val_loss"], rel=1e-6) and results["predictions"] == 320
    embeddings = torch.cat([subject.model.embed(x) for _, x, _ in subject.batches()]).detach()[:20]
    assert results["embedding RMS"] == pytest.approx(float(embeddings.square().mean().sqrt()), rel=1e-5)


def test_perturbations_repeat_and_do_not_depend_on_the_batch(runs):
    reports = [flat(dict(evaluate.perturbations(subject_of(runs["A"], batch_size=size)))) for size in (0, 0, 7)]
    assert reports[0] == reports[1]
    assert reports[0].keys() == reports[2].keys()
    for key, value in reports[0].items():
        assert value == pytest.approx(reports[2][key], rel=1e-4, abs=2e-5), key
    other = flat(dict(evaluate.perturbations(subject_of(runs["A"], seed=2))))
    assert other["noise 1 RMS/perturbed"] != reports[0]["noise 1 RMS/perturbed"] and other["swap 3%/delta"] != reports[0]["swap 3%/delta"]


def test_two_checkpoints_see_the_same_perturbations(runs, monkeypatch):
    """The inputs of every forward pass that does not depend on gradients are equal for two models, and the noise before its scale."""
    seen = {}
    for name in runs:
        subject, inputs = subject_of(runs[name]), []
        losses = subject.losses
        monkeypatch.setattr(subject, "losses", lambda x, y, embeddings=None: inputs.append((x, y)) or losses(x, y, embeddings))
        dict(evaluate.text_faults(subject))
        seen[name] = [*inputs, (subject.normal("noise", 3, (2, 16, 16)), subject.normal("pixels", 0, (1, 3, 4, 4)))]
    assert len(seen["A"]) == len(seen["A-I"]) > 9
    assert all(torch.equal(a, b) for pair in zip(*seen.values()) for a, b in zip(*pair))


def test_noise_has_the_strength_that_it_states(subject, monkeypatch):
    given = []
    losses = subject.losses
    monkeypatch.setattr(
        subject, "losses", lambda x, y, embeddings=None: given.append(embeddings - subject.model.embed(x)) or losses(x, y, embeddings)
    )
    names = list(dict(evaluate.embedding_noise(subject)))
    strengths = dict(zip(names, (float(noise.detach().std()) for noise in given)))
    assert strengths["noise 2 RMS"] == pytest.approx(2 * subject.rms, rel=0.05) and strengths["noise 0.1"] == pytest.approx(0.1, rel=0.05)
    torch.testing.assert_close(given[0] * 4, given[2], rtol=1e-3, atol=1e-5)  # the same draws at every strength


def test_attacks_stay_in_the_ball_and_keep_the_worst(subject, monkeypatch):
    _, x, y = next(subject.batches())
    given, losses = [], subject.losses

    def spied(x, y, embeddings=None):
        given.append((embeddings - subject.model.embed(x)).detach())
        return losses(x, y, embeddings)

    monkeypatch.setattr(subject, "losses", spied)
    worst = attack(subject, x, y, 0.3, 10)
    norms = torch.stack(given).norm(dim=-1)[:, :20]  # the rest of the batch has no targets
    assert norms.max() <= 0.3 * (1 + 1e-4) and norms[0].max() == 0 and norms[-1].min() > 0.29 and len(given) == 11
    totals = torch.stack([losses(x, y, subject.model.embed(x) + moved).sum(dim=1) for moved in given])
    torch.testing.assert_close(worst.sum(dim=1), totals.max(dim=0).values.detach(), rtol=1e-5, atol=1e-5)


def test_one_step_is_the_steepest_direction_of_the_linearised_loss(subject, monkeypatch):
    _, x, y = next(subject.batches())
    embeddings = subject.model.embed(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(subject.losses(x, y, embeddings).sum(), embeddings)
    expected = subject.losses(x, y, embeddings + 0.01 * F.normalize(gradient, dim=-1))
    torch.testing.assert_close(attack(subject, x, y, 0.01, 1), expected.detach(), rtol=1e-5, atol=1e-6)
    gain = float((expected - subject.losses(x, y)).detach().sum())
    assert gain == pytest.approx(0.01 * float(gradient.norm(dim=-1).sum()), rel=0.2), "first order"


def test_the_sanity_checks_hold_and_can_fail(subject, monkeypatch):
    results = dict(evaluate.attacks(subject))
    checks = {name: value for name, value in results.items() if name.startswith("check")}
    assert len(checks) == 3 and all(checks.values()) and results["windows where ten steps found less than one"] <= 2
    assert all(p.requires_grad for p in subject.model.parameters())
    weak = lambda subject, x, y, radius, steps: subject.losses(x, y).detach() * (1 + radius / steps)  # noqa: E731
    monkeypatch.setattr(evaluate, "attack", weak)
    failed = dict(evaluate.attacks(subject))
    assert failed["check: ten steps do at least what one does"] is False and failed["windows where ten steps found less than one"] == 60
    monkeypatch.setattr(evaluate, "attack", lambda subject, x, y, radius, steps: subject.losses(x, y).detach() / radius)
    assert dict(evaluate.attacks(subject))["check: a larger ball does more"] is False


# ---------------------------------------------------------------------------------------------------------------------------------
# Pictures


def test_picture_faults(picture_subject, monkeypatch):
    results = dict(evaluate.perturbations(picture_subject))
    assert {"pixel noise 0.5", "blur 1 px", "shift 2 px", "occlusion 0.5 of the side", "attack 0.25, 10 steps", "noise 1 RMS"} <= results.keys()
    assert not any(name.startswith(("typo", "swap", "deletion")) for name in results)
    assert all(value["predictions"] == 9 for value in results.values() if isinstance(value, dict))
    seen, losses = [], picture_subject.losses
    monkeypatch.setattr(picture_subject, "losses", lambda x, y, embeddings=None: seen.append(x) or losses(x, y, embeddings))
    dict(evaluate.picture_faults(picture_subject))
    _, x, _ = next(picture_subject.batches())
    first = dict(
        zip([name for name, value in results.items() if isinstance(value, dict) and not name.startswith(("noise", "attack", "random"))], seen)
    )
    assert float((first["pixel noise 1"] - x).std()) == pytest.approx(1, rel=0.1)
    covered = (first["occlusion 0.5 of the side"] == 0).all(dim=1).flatten(1).sum(dim=1)
    assert torch.equal(covered, torch.full((4,), 9))
    for row in range(4):  # a shift by two pixels is one of the eight directions, and moves every picture
        shifts = [(a, b) for a in (-2, 0, 2) for b in (-2, 0, 2) if (a, b) != (0, 0)]
        options = [F.pad(x[row], (b, -b, a, -a)) if a or b else x[row] for a, b in shifts]
        assert sum(torch.equal(option, first["shift 2 px"][row]) for option in options) == 1


def test_blur_keeps_constants_and_matches_a_plain_convolution():
    picture = torch.randn(1, 3, 8, 8, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blur(torch.full((1, 3, 8, 8), 2.5), 1.0), torch.full((1, 3, 8, 8), 2.5))
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    weights /= weights.sum()
    padded = np.pad(picture[0, 1].numpy().astype(float), 3, mode="reflect")
    expected = sum(weights[i] * weights[j] * padded[2 + i, 5 + j] for i in range(7) for j in range(7))
    assert float(blur(picture, 1.0)[0, 1, 2, 5]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------------------
# Margins


@pytest.mark.parametrize("name", ["A", "A-I"])
def test_margins_of_every_head_and_position(runs, name, monkeypatch):
    subject = subject_of(runs[name], batch_size=6)
    monkeypatch.setattr(evaluate, "PAIR_BYTES", 4 * 6 * 16 * 8 * 5)  # five positions at a time
    values, negative, read = all_margins(subject)
    assert values.shape == (20, 2, 2, 16) and negative.shape == values.shape and read.all()
    taps, (_, x, y) = [], next(subject.batches())
    subject.model(x, y, taps=taps)
    for layer, head in ((0, 1), (1, 0)):
        positions = torch.arange(16).expand(6, 16)
        expected, _ = own_margins(subject.model.transformer.h[layer].attn, *taps[layer], positions, torch.full_like(positions, head))
        torch.testing.assert_close(torch.from_numpy(values[:6, layer, head]), expected.detach(), rtol=1e-4, atol=1e-5)


def test_support_tokens_are_the_lowest_and_stand_where_they_say(subject):
    results = dict(evaluate.margins(subject))
    values, _, _ = all_margins(subject)
    total = values.sum(axis=(1, 2))
    support = results["support tokens"]
    assert [s["margin"] for s in support] == pytest.approx(np.sort(total[:, 1:], axis=None)[:20].tolist(), rel=1e-5)  # not a window's first token
    assert all(s["position"] > 0 for s in support)
    text = np.concatenate([x.numpy() for _, x, _ in subject.batches()])
    for s in support:
        window = subject.tokenizer.decode(text[s["window"]])
        assert window[s["position"]] == s["token"] and (s["before"] + s["token"] + s["after"]) in window
    passage = results["passage"]
    assert passage["window"] == support[0]["window"] and min(passage["margins"][1:]) == support[0]["margin"] and len(passage["tokens"]) == 16
    everything = results["margins, sum over layers and heads"]
    assert everything["mean"] == pytest.approx(float(total.mean()), abs=1e-5) and everything["quantiles"]["0"] == pytest.approx(float(total.min()))
    assert sum(everything["counts"]) >= 0.99 * total.size
    assert json.loads(json.dumps(results)) == results, "plain numbers"


def test_margins_of_pictures_have_no_passage(picture_subject):
    results = dict(evaluate.margins(picture_subject))
    assert "support tokens" not in results and all_margins(picture_subject)[0].shape == (9, 2, 2, 9)


# ---------------------------------------------------------------------------------------------------------------------------------
# The program


def test_the_command_writes_report_and_figures(runs, tmp_path, capsys):
    keys = dict(perturb=True, margins=True, eval_tokens=320, device="cpu", out=str(tmp_path / "out"))
    evaluate.main(EvaluateConfig(out_dir=str(runs["A"]), **keys).check())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["checkpoint"]["step"] == 60 and report["clean"]["predictions"] == 320 and "noise 1 RMS" in report["perturb"]
    for name in ("margins.png", "passage.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| noise 1 RMS" in printed and "support token" in printed and f"loss: {report['clean']['loss']:.6g}" in printed
    assert f"{report['perturb']['swap 10%']['delta']:+.4f}" in table({"perturb": report["perturb"]})


def test_a_report_is_of_one_precision_and_its_figures_are_its_own(runs, tmp_path):
    keys = dict(out_dir=str(runs["A"]), eval_tokens=64, device="cpu", out=str(tmp_path))
    evaluate.main(EvaluateConfig(margins=True, **keys))
    before = (tmp_path / "report.json").read_bytes()
    for changed, what in (
        ({"dtype": "bfloat16"}, r"dtype \(float32, now bfloat16\)"),
        ({"eval_tokens": 80, "seed": 2}, r"windows \(.*64, now .*80\), seed \(1, now 2\)"),
    ):
        with pytest.raises(InputError, match=f"differs in {what}: --overwrite=True"):
            evaluate.main(EvaluateConfig(**(keys | changed)))
    assert (tmp_path / "report.json").read_bytes() == before and (tmp_path / "margins.png").is_file()
    older = json.loads(before)
    del older["measured"]["dtype"]  # as reports once were
    (tmp_path / "report.json").write_text(json.dumps(older))
    evaluate.main(EvaluateConfig(**keys))
    assert "margins" in json.loads((tmp_path / "report.json").read_text()) and (tmp_path / "margins.png").is_file()
    evaluate.main(EvaluateConfig(overwrite=True, **keys))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


REFUSALS = {
    "--out_dir=nowhere": "not a directory",
    "--which=first": "must be best or last",
    "--perturb=maybe": "is not of type bool",
    "--eval_tokens=-1": "must not be negative",
    "--dtype=float8": "must be auto",
    "--perturbb=True": "perhaps you meant",
    "--dataset=nowhere": "neither a directory",
}


@pytest.mark.parametrize("option", REFUSALS)
def test_what_cannot_be_done_ends_in_one_line(option, runs):
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--out_dir={runs['A']}", "--device=cpu", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and REFUSALS[option] in done.stderr


def test_help_needs_no_torch():
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "evaluate.py"), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--perturb" in done.stdout and "| torch" not in done.stderr


def test_another_vocabulary_is_refused(runs, tokens_dir, tmp_path):
    from dataset import write_tokens

    write_tokens(tmp_path, np.arange(100) % 5, np.arange(50) % 5, {"vocab_size": 5, "tokenizer": {"type": "char", "characters": "abcde"}})
    with pytest.raises(InputError, match="vocabulary"):
        subject_of(runs["A"], dataset=str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------------------
# compare.py --evaluate


def test_gains_are_one_minus_the_ratio_of_deltas_seed_by_seed():
    def cell(loss, **deltas):
        return {"evaluation": {"clean": {"loss": loss}, "perturb": {name: {"delta": value} for name, value in deltas.items()} | {"check": True}}}

    both = [(cell(2.0, a=0.5, b=0.1), cell(2.02, a=0.25, b=0.1)), (cell(2.5, a=0.5, b=-0.1), cell(2.5, a=0.375, b=0.1))]
    found = robustness(both)
    assert found["clean_percent"]["mean"] == pytest.approx(0.5) and found["clean_percent"]["differences"] == pytest.approx([1.0, 0.0])
    gain = found["gains"]["a"]
    assert gain["differences"] == [0.5, 0.25] and gain["of_means"] == pytest.approx(0.375) and gain["mean_deltas"] == [0.5, 0.3125]
    half = 12.706204736174698 * math.sqrt(0.03125 / 2)  # t(0.975, 1) sd / sqrt(n)
    assert gain["interval"] == pytest.approx([0.375 - half, 0.375 + half])
    assert found["gains"]["b"]["n"] == 0 and found["gains"].keys() == {"a", "b"}, "what does not hurt the baseline has no gain"


def test_a_comparison_examines_the_best_weights_of_every_cell(tokens_dir, tmp_path, monkeypatch, capsys):
    lines = [f"{key} = {value!r}" for key, value in (TINY | {"dataset": str(tokens_dir), "max_iters": 12, "eval_interval": 6}).items()]
    (tmp_path / "base.py").write_text("\n".join(lines))
    base, out = str(tmp_path / "base.py"), tmp_path / "out"
    arguments = [base, f"{base} --embed_noise=1.0", "--seeds=2", f"--out_dir={out}", "--evaluate=perturb,margins"]
    compare.main(*compare.parse(arguments))
    report = json.loads((out / "report.json").read_text())
    (pair,) = report["pairs"].values()
    cells = {name: arm["cells"] for name, arm in report["arms"].items()}
    for some in cells.values():
        for cell in some:
            assert cell["evaluation"]["clean"]["loss"] == pytest.approx(cell["best_val_loss"], rel=1e-6)
    deltas = [[cell["evaluation"]["perturb"]["noise 1 RMS"]["delta"] for cell in some] for some in cells.values()]
    assert pair["gains"]["noise 1 RMS"]["differences"] == pytest.approx([1 - b / a for a, b in zip(*deltas)])
    assert not list(out.rglob("*.safetensors")) and (out / "frontier.png").is_file()
    text = (out / "report.md").read_text()
    assert "gain: noise 1 RMS" in text and "margins, sum over heads" in text and "frontier.png" in text
    monkeypatch.setattr(compare, "train", None)  # nothing is trained again
    compare.main(*compare.parse(arguments))
    with pytest.raises(InputError, match="evaluate"):
        compare.main(*compare.parse(arguments[:-1]))


@pytest.mark.parametrize("word", ["noise", "perturb,perturb", "perturb,", ","])
def test_unknown_evaluators_are_refused(word):
    with pytest.raises(InputError, match="must be perturb, margins"):
        configure(compare.CompareConfig, [f"--evaluate={word}"])


def test_a_gpt_and_its_data_are_what_the_fixture_says(subject):
    assert isinstance(subject.model, GPT) and isinstance(subject.data, Tokens) and not subject.model.training
