"""The numbers of docs/theory.md, docs/speed.md and docs/barrier.md are those of the committed reports and benchmarks."""

import json
import re
import runpy

import pytest
from pages import BARRIER, IN_BARRIER, IN_README, IN_THEORY, README, ROOT, SPEED, THEORY, report_of
from scipy import stats

from report import FRONTIER, robustness


def test_the_table_of_pictures_as_tokens_is_the_committed_report():
    report = json.loads((ROOT / "results" / "unroll_mnist" / "report.json").read_text())
    assert (report["n"], report["config"]["seeds"], report["config"]["steps"]) == (2000, 5, 8)
    labels = {"before": "before: a random linear map", "A, after": "A, 8 steps", "A − I, after": "A − I, 8 steps"}
    for name, entry in report["summary"].items():
        cells = [entry[key] for key in ("knn_2", "knn", "silhouette", "within_between")]
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(cell["mean"], *cell["interval"]).replace("-", "−") for cell in cells]
        assert f"| {labels.get(name, f'{name} of the pictures')} | {' | '.join(cells)} |\n" in THEORY
    before, a, laplacian = (report["summary"][key] for key in ("before", "A, after", "A − I, after"))
    two = [f"{entry['knn_2']['mean']:.3f}" for entry in (before, laplacian, a)]
    ends = [f"{entry['knn']['mean']:.3f}" for entry in (before, laplacian)]
    for page in (IN_README, IN_THEORY):
        assert "from {} to {} with A − I and to {} with A".format(*two) in page
    assert "in all dimensions it falls from {} to {} with A − I".format(*ends) in IN_README
    assert "in all dimensions the neighbours get worse, {} to {},".format(*ends) in IN_THEORY
    labels = {"A": "A", "A-I": "A − I", "-(A-I)": "−(A − I)", "gradient": "plain gradient of F"}
    for kind, runs in report["climb"].items():
        steps = [row for run in runs for row in run if "gain" in row]
        counts = [f"{sum(row[key] > 0 for row in steps)} of {len(steps)}" for key in ("gain_data", "gain")]
        ends = [f"{sum(run[end]['dirichlet'] for run in runs) / len(runs):.3f}" for end in (0, -1)]
        assert f"| {labels[kind]} | {' | '.join(counts)} | {' → '.join(ends)} |\n" in THEORY


def test_the_sentence_about_ten_thousand_pictures_is_the_committed_report():
    report = report_of("unroll_mnist_10000")
    assert (report["n"], report["config"]["seeds"]) == (10000, 3)
    before, a, laplacian = (report["summary"][key] for key in ("before", "A, after", "A − I, after"))
    two, all_dims = ([f"{entry[key]['mean']:.3f}" for entry in (before, laplacian, a)] for key in ("knn_2", "knn"))
    sentence = "from {} to {} with A − I and to {} with A, all dimensions from {} to {} and {}."
    assert sentence.format(*two, *all_dims) in IN_THEORY


def test_the_numbers_of_the_initial_weights_are_the_committed_report():
    report = json.loads((ROOT / "results" / "weight_init_quick" / "report.json").read_text())
    best = {name: [cell["best_val_loss"] for cell in arm["cells"]] for name, arm in report["arms"].items()}
    for name in ("quick", "quick_laplacian"):
        plain, unrolled = best[name], best[f"{name}_weight_init=unrolled"]
        difference = stats.ttest_1samp([b - a for a, b in zip(plain, unrolled, strict=True)], 0).confidence_interval(0.95)
        assert f"{sum(unrolled) / 3:.4f} against {sum(plain) / 3:.4f}" in IN_THEORY
        values = [f"{value:.3f}".replace("-", "−") for value in ((sum(unrolled) - sum(plain)) / 3, *difference)]
        middle = "95 % interval " if name == "quick" else ""
        assert "({}, {}{} to {})".format(values[0], middle, *values[1:]) in IN_THEORY


def test_the_speed_table_is_the_committed_benchmarks():
    row = next(line for line in SPEED.splitlines() if line.startswith("| a step of `quick`"))
    found = {}
    for file in ("cpu_quick", "cpu_sample_shakespeare_char", "cpu_sample_gpt2", "cpu_startup"):
        rows = json.loads((ROOT / "results" / "bench" / f"{file}.json").read_text())["rows"]
        found[file] = {entry["arm"]: f"{entry['ms']['median']:.1f}" for entry in rows}
    quick, text, gpt2, start = found.values()
    more = f"A in bf16 {quick['A-bf16']}, with the log-barrier {quick['A+prior']}"
    assert row == f"| a step of `quick`, float32 | {quick['plain']} | {quick['A']} | {quick['A-I']} | {more} |"
    assert f"| a character from the 10.65 M model | {text['A, no cache']} | {text['A']} | {text['A-I']} | |\n" in SPEED
    assert f"| a token from GPT-2 124M | {gpt2['A, no cache']} | {gpt2['A']} | | transformers with its cache {gpt2['A, transformers']} |\n" in SPEED
    assert f"to its first iteration | | {start['first iteration']} | | `--help` {start['--help']} |\n" in SPEED


def test_the_speed_of_gpus_is_the_committed_benchmarks():
    def rows(name):
        return {row["arm"]: row for row in json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())["rows"]}

    def ms(row, digits=1):
        return f"{row['ms']['median']:.{digits}f}"

    def rate(row):
        return f"{row['tokens_per_s'] / 1000:.0f}"

    small, gpt2, barrier, pictures = (rows(f"h200_{name}") for name in ("train_shakespeare_char", "train_gpt2", "prior_gpt2", "train_imagenet16"))
    cells = " | ".join(ms(small[arm], 2) for arm in ("plain", "A", "A-I"))
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | {cells} | |\n" in SPEED
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | {cells} |\n" in README
    embedding, own = rows("h200_prior_shakespeare_char"), rows("h200_own_shakespeare_char")
    pairs = [f"{ms(some[arm], 2)} against {ms(some['A'], 2)}" for some, arm in ((embedding, "A+prior"), (own, "A+own"))]
    assert "| the same with the log-barrier, earlier kernels | | | | on the embeddings {}, on the model's own heads {} |\n".format(*pairs) in SPEED
    plain, a, laplacian = (gpt2[arm] for arm in ("plain", "A", "A-I"))
    rates = f"{rate(plain)}, {rate(a)} and {rate(laplacian)} thousand tokens/s"
    memory = "{:.1f}, {:.1f} and {:.1f} GiB".format(*(row["peak_gib"] for row in (plain, a, laplacian)))
    assert f"| a step of GPT-2 124M (64 × 1024 tokens), ungathered | {ms(plain)} | {ms(a)} | {ms(laplacian)} | {rates}; {memory} |\n" in SPEED
    beside = rows("h200_ungathered_gpt2")["A-I"]["ratio"]["median"]
    more = [f"{100 * (ratio - 1):.1f} %" for ratio in (laplacian["ratio"]["median"] / a["ratio"]["median"], beside)]
    in_speed = " ".join(SPEED.split())
    assert "A − I costs {} more than A in the first ungathered row, {} beside A alone".format(*more) in in_speed
    alone = rows("h200_train_gpt2_alone")
    rates = f"{rate(alone['plain'])} and {rate(alone['A'])} thousand tokens/s"
    assert f"| the same on a host whose other GPUs are idle | {ms(alone['plain'])} | {ms(alone['A'])} | | {rates} |\n" in SPEED
    before = rows("h200_gathered_gpt2")
    extra = 100 * (before["A-I"]["ratio"]["median"] / before["A"]["ratio"]["median"] - 1)
    sentence = "nanoGPT's way, A and A − I took {}, {} and {} ms, {:.1f} % more,"
    assert sentence.format(*(ms(before[arm]) for arm in ("plain", "A", "A-I")), extra) in in_speed
    won = sorted(before["A"]["ms"]["median"] - row["ms"]["median"] for row in (a, alone["A"]))
    assert "won A {:.1f} to {:.1f} ms".format(*won) in in_speed
    shares = [f"{row['ratio']['median']:.3f}" for row in (before["A"], a, alone["A"], before["A-I"], laplacian)]
    assert "Of its time A took {} and takes {} and {}, A − I took {} and takes {}.".format(*shares) in in_speed
    more = f"on the embeddings {ms(barrier['A+prior'])}, on the model's own heads {ms(barrier['A+own'])}"
    assert f"| the same with the log-barrier, earlier kernels | | {ms(barrier['A'])} | | {more} |\n" in SPEED
    products = "matrix products {matrix products:.2f}, those with GELU inside {products with GELU inside:.2f}, attention {attention:.2f}"
    products = products.format_map(pictures["A"]["kernels_ms"])
    assert f"| a step of `imagenet16` (512 pictures), GELU inside | | {ms(pictures['A'], 2)} | {ms(pictures['A-I'], 2)} | {products} |\n" in SPEED
    text = rows("h200_sample_gpt2")
    cells = " | ".join(ms(text[arm], 2) for arm in ("A, no cache", "A", "A-I"))
    rates = f"{text['A']['tokens_per_s']:,.0f} and {text['A-I']['tokens_per_s']:,.0f} tokens/s"
    assert f"| a token from GPT-2 124M, one sequence, 500 after 100 | {cells} | {rates} |\n" in SPEED
    assert f"| a token from GPT-2 124M, one sequence, 500 after 100 | {cells} |\n" in README
    together = rows("h200_ddp2_gpt2")
    for arm, label in (("A", "A"), ("A-I", "A − I")):
        one, two = together[f"{arm}, alone"], together[f"{arm}, 2 processes"]
        cells = f"{ms(one)}, {ms(two)} | {rate(one)}, {rate(two)} | {two['ratio']['median']:.3f}"
        assert f"| {label}: one alone, two together | {cells} |\n" in SPEED


def test_the_speed_with_gelu_inside_is_the_committed_benchmarks():
    def rows(name):
        found = json.loads((ROOT / "results" / "bench" / f"h100_{name}.json").read_text())["rows"]
        return [(f"{row['ms']['median']:.{1 if 'gpt2' in name else 2}f}", f"{row['tokens_per_s'] / 1000:.0f}", row) for row in found]

    (apart, slow, _), (inside, fast, _) = rows("inside_gpt2")
    assert f"| a step of GPT-2 124M (64 × 1024 tokens) | | {apart} | {inside} | {slow} and {fast} thousand tokens/s |\n" in SPEED
    (plain, slow, one), (a, fast, other) = rows("plain_gpt2")
    memory = f"{one['peak_gib']:.1f} and {other['peak_gib']:.1f} GiB"
    assert f"| the same, other runs | {plain} | | {a} | {slow} and {fast} thousand tokens/s; {memory} |\n" in SPEED
    (a, _, _), (laplacian, _, row) = rows("train_gpt2")
    more = f"A − I {laplacian}, {100 * (row['ratio']['median'] - 1):.1f} % more; {row['peak_gib']:.1f} GiB"
    assert f"| the same, A against A − I | | | {a} | {more} |\n" in SPEED
    (apart, _, _), (inside, _, _) = rows("inside_shakespeare_char")
    assert f"| a step of `shakespeare_char` (64 × 256 characters) | | {apart} | {inside} | |\n" in SPEED
    (apart, _, row), (inside, _, _) = rows("inside_imagenet16")
    products = f"matrix products alone {row['kernels_ms']['matrix products']:.2f}"
    assert f"| a step of `imagenet16` (512 pictures) | | {apart} | {inside} | {products} |\n" in SPEED


def test_the_speed_with_fewer_bytes_is_the_committed_benchmarks():
    def rows(name):
        return {row["arm"]: row for row in json.loads((ROOT / "results" / "bench" / f"h100_{name}.json").read_text())["rows"]}

    for name, labels in (
        ("bytes", ("the same before", "the same before")),
        ("ahead", ("a step of `imagenet16` (512 pictures), ahead", "a step of GPT-2 124M (64 × 1024 tokens), ahead")),
    ):
        pictures, gpt2 = rows(f"{name}_imagenet16"), rows(f"{name}_gpt2")
        products, attention, a, laplacian = (pictures[arm] for arm in ("products", "products+attention", "A", "A-I"))
        ms = [f"{row['ms']['median']:.2f}" for row in (products, a, laplacian)]
        ratios = f"{a['ratio']['median']:.3f} and {laplacian['ratio']['median']:.3f} times its products"
        assert f"| {labels[0]} | {' | '.join(ms)} | {ratios}; {a['peak_gib']:.1f} and {laplacian['peak_gib']:.1f} GiB |\n" in SPEED
        one, two = gpt2["A"], gpt2["A-I"]
        rates = f"{one['tokens_per_s'] / 1e3:.0f} and {two['tokens_per_s'] / 1e3:.0f} thousand tokens/s"
        cells = f"{one['ms']['median']:.1f} | {two['ms']['median']:.1f} | {rates}; {one['peak_gib']:.1f} and {two['peak_gib']:.1f} GiB"
        assert f"| {labels[1]} | | {cells} |\n" in SPEED
    before, text = rows("inside_imagenet16")["A"], " ".join(SPEED.split())
    for name, words in (("bytes_again", "{:.3f} and {:.3f} times its products on a second one"), ("ahead_padded", "{:.3f} and {:.3f} on another")):
        found = rows(f"{name}_imagenet16")
        assert words.format(*(found[arm]["ratio"]["median"] for arm in ("A", "A-I"))) in text
    assert f"with attention's as batched products they take {attention['ms']['median']:.2f}." in text
    alone, all_of_it = products["kernels_ms"]["matrix products"], a["kernels_ms"]["all"]
    assert f"add up to {alone:.2f} for the products and {all_of_it:.2f} for the step, {all_of_it / alone:.2f} times as much" in text
    spreads = [f"at {row['ratio']['median']:.3f} ({{}}{{:.3f}} to {{:.3f}})" for row in (a, laplacian)]
    given = spreads[0].format("quartiles ", *a["ratio"]["quartiles"]), spreads[1].format("", *laplacian["ratio"]["quartiles"])
    assert f"A is {given[0]} and A − I {given[1]}" in text and laplacian["ratio"]["quartiles"][1] < 1.6
    assert f"`imagenet16` took {before['ms']['median']:.2f} on an H100 and {before['peak_gib']:.1f} GiB" in text


def test_the_speed_by_size_is_the_committed_benchmarks():
    for model, label in (("gpt2", "`gpt2`, 124M"), ("gpt2_350m", "`gpt2_350m`"), ("gpt2_774m", "`gpt2_774m`"), ("gpt2_1b3", "`gpt2_1b3`, 1.3B")):
        report = json.loads((ROOT / "results" / "bench" / f"h100_scale_{model}.json").read_text())
        rows = report["rows"]
        ms = [f"{row['ms']['median']:.1f}" for row in rows]
        found = [(f"{row['tokens_per_s'] / 1e3:.1f}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}") for row in rows]
        pairs = [", ".join(some) for some in zip(*found)]
        cells = [label, str(report["bench"]["batch_size"]), ms[0], f"{ms[1]}, {rows[1]['ratio']['median'] - 1:.1%} more", *pairs]
        assert f"| {' | '.join(cells)} |\n".replace("%", " %") in SPEED
    large = json.loads((ROOT / "results" / "bench" / "h100_attention_gpt2.json").read_text())["rows"][0]
    assert f"the MFU is {large['mfu']:.1%} (table above, {large['ms']['median']:.1f} ms)".replace("%", " %") in " ".join(SPEED.split())


def test_the_speed_of_attention_of_our_own_is_the_committed_benchmarks():
    def rows(name):
        found = json.loads((ROOT / "results" / "bench" / f"h100_attention_{name}.json").read_text())["rows"]
        return [(row, f"{row['ms']['median']:.1f}", f"{row['tokens_per_s'] / 1000:.0f}", f"{row['peak_gib']:.1f}") for row in found]

    in_speed = " ".join(SPEED.split())
    (a, ms, rate, memory), (laplacian, more_ms, more_rate, more_memory) = rows("gpt2")
    parts = [f"{row['kernels_ms']['attention']:.1f}" for row in (a, laplacian)]
    words = f"attention {parts[0]} and {parts[1]}; {rate} and {more_rate} thousand tokens/s; {memory} and {more_memory} GiB"
    assert f"| a step of GPT-2 124M (64 × 1024 tokens) | | {ms} | {more_ms} | {words} |\n" in SPEED
    ratio = laplacian["ratio"]
    low, high = (f"{100 * (value - 1):+.1f}".replace("-", "−") for value in ratio["quartiles"])
    assert f"A − I costs {100 * (ratio['median'] - 1):.1f} % more than A by the rounds' own ratios (quartiles {low} to {high} %)" in in_speed
    (_, plain_ms, plain_rate, plain_memory), (a, ms, rate, memory) = rows("plain_gpt2")
    words = f"{plain_rate} and {rate} thousand tokens/s; {plain_memory} and {memory} GiB"
    assert f"| the same against nanoGPT's way, the same machine | {plain_ms} | {ms} | | {words} |\n" in SPEED
    assert f"A takes {a['ratio']['median']:.3f} of the time of nanoGPT's way" in in_speed
    more = f"{100 * (ratio['median'] - 1):.1f} % more ({low} to {high})"
    assert f"| a step of GPT-2 124M (64 × 1024 tokens), on an H100 | {plain_ms} | {ms} | {more} |\n" in README


@pytest.mark.parametrize("text", ["wikitext2", "shakespeare"])
def test_the_table_of_the_barrier_is_the_committed_report(text, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    printed = runpy.run_path(str(ROOT / "studies" / "map_table.py"))["table"](report_of(f"map_{text}_char"))
    rows = [" | ".join(cell.strip() for cell in line.strip("| ").split("|")) for line in printed.splitlines()[2:] if line.startswith("|")]
    assert len(rows) == 8 and all(f"| {row} |\n" in BARRIER for row in rows)
    assert sum(line.startswith(("| barrier: ", "| control: ")) for line in BARRIER.splitlines()) == 16


def test_the_words_about_the_barrier_are_the_committed_reports():

    selection, texts = report_of("map_selection"), {text: report_of(f"map_{text}_char") for text in ("shakespeare", "wikitext2")}
    configs = selection["provenance"]["configs"]
    barriers = [name for name, config in configs.items() if config["prior_lambda"]]
    assert len(barriers) == 16 and len(configs) - len(barriers) == 1 + 6
    paper = {config["prior_lambda"]: selection["pairs"][name] for name, config in configs.items() if name.count("barrier_prior_lambda")}
    assert f"cost {1 - paper[0.05]['gains']['noise 1 RMS']['mean']:.1f} times as much with it at λ = 0.05" in IN_BARRIER
    assert f"the clean loss rose by {paper[0.5]['clean_percent']['mean']:.1f} % at 0.5" in IN_BARRIER

    def arm(text, words):
        (name,) = (name for name in texts[text]["pairs"] if name.endswith(words))
        return name, texts[text]["pairs"][name]["gains"]

    median = {
        name: sum(cell["evaluation"]["margins"]["margins, sum over layers and heads"]["quantiles"]["0.5"] for cell in entry["cells"]) / 5
        for name, entry in texts["wikitext2"]["arms"].items()
    }
    own = "own_prior_form=softplus_prior_lambda=0.02"
    assert f"from a median of {median['wikitext2_char']:.1f} to {median[arm('wikitext2', own)[0]]:.1f} on WikiText-2" in IN_BARRIER
    intervals = [
        (name, text, gain["mean"], gain["interval"])
        for text, report in texts.items()
        for name, pair in report["pairs"].items()
        for gain in pair["gains"].values()
        if "barrier" in name and "noise" not in name and gain["interval"]
    ]
    above = [(name, mean) for name, _, mean, (low, _) in intervals if low > 0]
    below = sum(high < 0 for *_, (_, high) in intervals)
    assert not any(own in name for name, _ in above) and all(mean < 0.01 for _, mean in above)
    assert f"{len(above)} of {len(intervals)} have an interval above 0 (neither reaches 1 %) and {below} one below, no more" in IN_BARRIER
    endpoints = {
        text: [pair["gains"][e]["interval"] for name, pair in report["pairs"].items() if "barrier" in name and "noise" not in name for e in FRONTIER]
        for text, report in texts.items()
    }
    assert all(high < 0.15 for _, high in endpoints["shakespeare"][1::2])
    assert [sum(low < 0.15 < high for low, high in some) for some in (endpoints["shakespeare"][::2], endpoints["wikitext2"])] == [3, 6]
    stage = {name.removeprefix("shakespeare_char_"): pair for name, pair in selection["pairs"].items()}
    assert f"does {1 - stage['embed_noise=1']['gains'][FRONTIER[1]]['mean']:.1f} times the damage (stage 1, two seeds, undecided)" in IN_BARRIER
    dropout = stage["dropout=0.3"]
    gains = [100 * dropout["gains"][e]["mean"] for e in FRONTIER]
    assert "(+{:.0f} % and +{:.0f} % at +{:.1f} % clean loss)".format(*gains, dropout["clean_percent"]["mean"]) in IN_BARRIER
    detached = report_of("map_detach")
    again = [report["arms"]["shakespeare_char"]["cells"][1] for report in (texts["shakespeare"], detached)]
    assert [cell["seed"] for cell in again] == [2, 2] and texts["shakespeare"]["provenance"]["code_sha256"] == detached["provenance"]["code_sha256"]
    assert "{} and {} for one seed".format(*sorted(f"{cell['best_val_loss']:.4f}" for cell in again)) in IN_BARRIER
    (cut,) = detached["pairs"].values()
    gain = cut["gains"]["noise 1 RMS"]
    assert (
        "GPU: {:+.1f} % ({:+.1f} to {:+.1f}) on noise of 1 RMS".format(*(100 * x for x in (gain["mean"], *gain["interval"]))).replace("-", "−")
        in IN_BARRIER
    )
    assert {len(pair["gains"]) for report in texts.values() for pair in report["pairs"].values()} == {25}
    noise = arm("shakespeare", "char_embed_noise=0.5")[1]["substitution 10%"]["mean"]
    smooth = [arm(text, "label_smoothing=0.05")[1]["substitution 10%"]["mean"] for text in texts]
    assert f"on Shakespeare {-100 * noise:.0f} % more damage from 10 % substituted" in IN_BARRIER
    assert (
        "takes {:.0f} % off the damage of substitutions on Shakespeare and {:.0f} % on WikiText-2".format(*(100 * value for value in smooth))
        in IN_BARRIER
    )
    costs = []
    for text in texts:
        names = [arm(text, words)[0] for words in ("char_embed_noise=0.5", "barrier_noise_embed_noise=0.5")]
        pair = robustness(list(zip(*(texts[text]["arms"][name]["cells"] for name in names))))
        assert all(low < 0 < high for low, high in (pair["gains"][e]["interval"] for e in FRONTIER))
        costs += [pair["clean_percent"]["mean"], *pair["clean_percent"]["interval"]]
    words = "costs {:.2f} % ({:.2f} to {:.2f}) of the clean loss on Shakespeare and {:.2f} % ({:.2f} to {:.2f}) on WikiText-2"
    assert words.format(*costs).replace("-", "−").replace("WikiText−2", "WikiText-2") in IN_BARRIER


def test_the_support_tokens_it_names_are_the_committed_ones():
    support = json.loads((ROOT / "results" / "margins_quick" / "report.json").read_text())["margins"]["support tokens"]
    names = [token for token in support if re.search(r"\n\n[A-Z]?$", token["before"]) and token["token"].isupper()]
    assert f"of the twenty lowest in 256 windows {len(names)} are the first or second letter" in IN_BARRIER and len(support) == 20
