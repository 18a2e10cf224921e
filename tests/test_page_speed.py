"""The numbers of docs/speed.md, and of README.md's part of it, are those of the committed benchmarks."""

import json
import re
from statistics import mean

from pages import IN_README, IN_SPEED, README, ROOT, SPEED, report_of

LOOPS = ("h200_train_shakespeare_char", "h200_own_shakespeare_char", "h200_ahead_shakespeare_char", "h100_ahead_shakespeare_char")  # with plain
CPU = ("quick", "sample_shakespeare_char", "sample_gpt2", "startup")


def bench_rows(name: str) -> dict[str, dict]:
    """{arm: its row} of a committed benchmark."""
    return {row["arm"]: row for row in json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())["rows"]}


def ms(row: dict, digits: int) -> str:
    return f"{row['ms']['median']:.{digits}f}"


def test_the_speed_of_cpus_is_the_committed_benchmarks():
    for kind in ("cpu_narrow", "cpu"):
        quick, text, gpt2, start = (bench_rows(f"{kind}_{name}") for name in CPU)
        cells = " | ".join(ms(quick[arm], 1) for arm in ("plain", "A", "A-I"))
        more = f"A in bf16 {ms(quick['A-bf16'], 1)}, with the log-barrier {ms(quick['A+prior'], 1)}"
        assert f"| a step of `quick`, float32 | {cells} | {more} |\n" in SPEED
        cells = " | ".join([ms(text[arm], 1) if arm in text else "" for arm in ("A, no cache", "A", "A-I")]).strip()
        assert f"| a character from the 10.65 M model | {cells} | |\n" in SPEED
        cells = " | ".join(ms(gpt2[arm], 1) for arm in ("A, no cache", "A"))
        assert f"| a token from GPT-2 124M | {cells} | | transformers with its cache {ms(gpt2['A, transformers'], 1)} |\n" in SPEED
        assert f"to its first iteration | | {ms(start['first iteration'], 1)} | | `--help` {ms(start['--help'], 1)} |\n" in SPEED
    narrow, wide, before, intel = (bench_rows(name) for name in ("cpu_narrow_quick", "cpu_quick", "cpu_narrow_onednn_quick", "intel_quick"))
    steps = [rows[arm]["ms"]["median"] for rows in (narrow, wide) for arm in ("A", "A-I")]
    words = f"a step of `quick` (1000 of 768) takes {min(steps):.0f} to {max(steps):.0f} ms: less than a minute a run"
    assert words in IN_README and max(steps) < 55
    for words, rows, arms in (
        ("a step takes {:.2f} of the time of nanoGPT's way, for A − I {:.2f}, and in bf16 {:.2f};", narrow, ("A", "A-I", "A-bf16")),
        ("A takes {:.2f} and A − I {:.2f}: not there yet. In bf16 it took {:.2f} there", intel, ("A", "A-I", "A-bf16")),
        ("The steps there are {:.2f} of nanoGPT's way and in bf16 {:.2f}.", wide, ("A", "A-bf16")),
        ("On the first processor oneDNN alone gave {:.2f} and {:.2f}:", before, ("A", "A-bf16")),
    ):
        assert words.format(*(rows[arm]["ratio"]["median"] for arm in arms)) in IN_SPEED
    best = report_of("bf16_quick")["pairs"]["quick_dtype=bfloat16"]["best"]
    low, high = (f"{end:+.4f}".replace("-", "−") for end in best["interval"])
    assert f"by {best['mean']:+.4f} ({low} to {high}) nats, five pairs" in IN_SPEED and best["n"] == 5


def of_row(rows: list[dict]) -> str:
    """The last two cells of a row of the first table: thousand tokens/s and GiB of its arms."""
    rates, memory = [f"{row['tokens_per_s'] / 1000:.0f}" for row in rows], [f"{row['peak_gib']:.1f}" for row in rows]
    return f"{', '.join(rates)} | {', '.join(memory)}"


def test_the_speed_of_a_gpu_is_the_committed_benchmarks():
    text, gpt2, pair, pictures = (bench_rows(f"h200_ahead_{name}") for name in ("shakespeare_char", "plain_gpt2", "gpt2", "imagenet16"))
    arms = [text[arm] for arm in ("plain", "A", "A-I")]
    label, cells = "`shakespeare_char` (64 × 256 characters)", [ms(row, 2) for row in arms]
    assert f"| {label} | {cells[0]} | {ms(text['products'], 2)} | {cells[1]} | {cells[2]} | {of_row(arms)} |\n" in SPEED
    loops = [bench_rows(name) for name in LOOPS]
    waits = sorted(rows["plain"]["ms"]["median"] for rows in loops)
    assert f"{waits[0]:.1f} to {waits[-1]:.1f} ms in our runs" in IN_SPEED
    shares = sorted(rows["A"]["ms"]["median"] / rows["plain"]["ms"]["median"] for rows in loops)
    assert f"of which A took {shares[0]:.2f} to {shares[-1]:.2f}." in IN_SPEED
    beside = f"{cells[0]} ({waits[0]:.1f} on another host)"
    assert f"| a step of {label} | {beside} | {cells[1]} | {cells[2]} |\n" in README
    arms = [gpt2[arm] for arm in ("plain", "A", "A-I")]
    label, cells = "GPT-2 124M (64 × 1024 tokens)", [ms(row, 1) for row in arms]
    assert f"| {label} | {cells[0]} | | {cells[1]} | {cells[2]} | {of_row(arms)} |\n" in SPEED
    assert f"| a step of {label} | {' | '.join(cells)} |\n" in README
    a, laplacian = pair.values()
    assert f"| the same, both arms alone | | | {ms(a, 1)} | {ms(laplacian, 1)} | {of_row([a, laplacian])} |\n" in SPEED
    assert f"{a['mfu']:.1%}" == f"{laplacian['mfu']:.1%}" and f"step reaches {100 * a['mfu']:.1f} % of the GPU's peak of 989 TFLOP/s" in IN_SPEED
    elsewhere, together = bench_rows("h100_ahead_gpt2")["A-I"]["ratio"], bench_rows("h200_ahead_ddp4_gpt2")
    low, high = (f"{100 * (end - 1):+.1f}".replace("-", "−") for end in elsewhere["quartiles"])
    fourth = together["A-I, alone"]["ms"]["median"] / together["A, alone"]["ms"]["median"]
    ratio, more = laplacian["ratio"], [100 * (one - 1) for one in (fourth, elsewhere["median"])]
    words = (
        "{:.3f} times A's step by the rounds' own ratios (quartiles {:.3f} to {:.3f}) in the row of both arms, {:.1f} % more in the run of four GPUs"
    )
    assert words.format(ratio["median"], *ratio["quartiles"], more[0]) in IN_SPEED
    small = [100 * (rows["A-I"]["ratio"]["median"] / rows["A"]["ratio"]["median"] - 1) for rows in (pictures, text)]
    words = "and {:.1f} % ({} to {}) on an H100. In `imagenet16` {:.1f} %, in `shakespeare_char` {:.1f} %."
    assert words.format(more[1], low, high, *small) in IN_SPEED
    products, attention, a, laplacian = pictures.values()
    cells, memory = " | ".join(ms(row, 2) for row in (products, a, laplacian)), of_row([a, laplacian]).partition(" | ")[2]
    assert f"| `imagenet16` (512 pictures) | | {cells} | | {memory} |\n" in SPEED
    ratios = [value for row in (a, laplacian) for value in (row["ratio"]["median"], *row["ratio"]["quartiles"])]
    assert "A is at {:.3f} (quartiles {:.3f} to {:.3f}), A − I at {:.3f} ({:.3f} to {:.3f})".format(*ratios) in IN_SPEED and max(ratios) < 1.6
    assert f"as batched products, the products take {ms(attention, 2)} ms" in IN_SPEED
    h100s = [bench_rows(f"h100_{name}_imagenet16")[arm]["ratio"]["median"] for name in ("ahead", "ahead_again") for arm in ("A", "A-I")]
    assert "they are at {:.3f} and {:.3f}, on another at {:.3f} and {:.3f}.".format(*h100s) in IN_SPEED
    found = bench_rows("h200_sample_gpt2")
    loop, a, laplacian = (found[arm] for arm in ("A, no cache", "A", "A-I"))
    rates = f"{a['tokens_per_s']:,.0f} and {laplacian['tokens_per_s']:,.0f} a second"
    words = f"takes {ms(a, 2)} ms for A and {ms(laplacian, 2)} ms for A − I, {rates}; in a loop without a cache, nanoGPT's way, {ms(loop, 2)} ms"
    assert words in IN_SPEED
    cells = " | ".join(ms(row, 2) for row in (loop, a, laplacian))
    assert f"| a token from GPT-2 124M, one sequence, 500 after 100 | {cells} |\n" in README


def test_the_speed_of_whole_runs_is_the_committed_reports():
    before, now = report_of("shakespeare_char_own_rate"), report_of("shakespeare_char_lengths_rates")["arms"]
    a, laplacian = (now[f"shakespeare_char{arm}_learning_rate=1e-3_max_iters=5000"]["seconds"]["mean"] for arm in ("", "_laplacian"))
    minutes = 10 * (a + laplacian) / 60
    assert f"takes {a:.1f} s for A and {laplacian:.1f} s for A − I" in IN_SPEED and f"so ten pairs {minutes:.1f} minutes" in IN_SPEED
    text = bench_rows("h200_ahead_shakespeare_char")
    steps = {f"{text[arm]['ms']['median']:.1f}" for arm in ("A", "A-I")}
    assert f"takes {steps.pop()} ms for A and for A − I; a run with its evaluations {a:.0f} and {laplacian:.0f} s" in IN_README and not steps
    old = "{:.1f} and {:.1f} s".format(*(arm["seconds"]["mean"] for arm in before["arms"].values()))
    minutes, seconds = divmod(round(before["provenance"]["seconds_of_this_call"]), 60)
    assert f"it was {old}, and the twenty runs {minutes} min {seconds} s of wall clock" in IN_SPEED


def test_the_speed_with_the_barrier_is_the_committed_benchmarks():
    embedding, own, gpt2 = (bench_rows(f"h200_{name}") for name in ("prior_shakespeare_char", "own_shakespeare_char", "prior_gpt2"))
    words = [f"{ms(rows[arm], 2)} against {ms(rows['A'], 2)}" for rows, arm in ((embedding, "A+prior"), (own, "A+own"))]
    words.append(f"{ms(gpt2['A+prior'], 1)} and {ms(gpt2['A+own'], 1)} against {ms(gpt2['A'], 1)}")
    assert "{} with the barrier on the embeddings, {} with it on the model's own heads; GPT-2 124M {}.".format(*words) in IN_SPEED


def test_what_rounding_costs_is_the_committed_figures():
    found = json.loads((ROOT / "results" / "rounding" / "rounding.json").read_text())["arms"]
    runs = [list(found[arm]["seeds"].values()) for arm in ("A", "A − I")]
    assert all(len(some) == 8 for some in runs)
    both = [[run["eight bits, and LayerNorm's result"] for run in some] for some in runs]
    grown = [f"{100 * (mean(run[what] for run in some) - 1):.1f}" for what in ("median", "first matrices", "gains") for some in both]
    sentence = (
        "together by {} % (A) and {} % (A − I) in the median over parameters; in the MLPs' first matrices, which the derivative goes into, by {} "
    )
    sentence += "and {} %, and in LayerNorm's gains by {} and {} %. The errors that grow so are {:.2f} % and {:.2f} % of the gradient"
    assert sentence.format(*grown, *(100 * mean(run["error"] for run in some) for some in runs)) in IN_SPEED


def test_the_speed_by_stage_is_the_committed_benchmarks():
    """Every cell of a row is of the files that the row names, and every arm of them that has a column is there."""
    table = SPEED[SPEED.index("| | GPU | `shakespeare_char`, A |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == 11
    for stage, row in enumerate(table):
        _, _, gpu, *cells, _, _ = (cell.strip() for cell in row.split("|"))
        files, arm, shown = re.findall(r"results/bench/(\w+)\.json", row), "A" if stage else "apart", []
        assert files and all(name.startswith(f"{gpu.lower()}_") for name in files)
        for model, arms, digits in (("shakespeare_char", [arm], 2), ("gpt2", ["plain", arm, "A-I"], 1), ("imagenet16", [arm], 2)):
            rows = next((bench_rows(name) for name in files if name.endswith(model)), {})
            shown += [ms(rows[one], digits) if one in rows else "" for one in arms]
        assert cells == shown

    def more(name: str) -> float:
        rows = bench_rows(name)
        return 100 * (rows["A-I"]["ratio"]["median"] / rows["A"]["ratio"]["median"] - 1)

    costs = [more(name) for name in ("h100_train_gpt2", "h200_ungathered_gpt2", "h200_train_gpt2", "h200_gathered_gpt2", "h100_attention_gpt2")]
    words = "A − I cost {:.1f} % more than A on an H100 and {:.1f} to {:.1f} % on an H200 with the framework's attention ({:.1f} %"
    assert words.format(*costs) in IN_SPEED and f"{costs[4]:.1f} % with our own on an H100" in IN_SPEED
    others = [bench_rows(f"h100_{name}_imagenet16")[arm]["ratio"]["median"] for name in ("bytes_again", "ahead_padded") for arm in ("A", "A-I")]
    assert "at {:.3f} and {:.3f} times its products with fewer bytes, at {:.3f} and {:.3f} with copies ahead and padded".format(*others) in IN_SPEED


def test_the_speed_of_several_gpus_is_the_committed_benchmark():
    found, before = bench_rows("h200_ahead_ddp4_gpt2"), bench_rows("h200_ddp2_gpt2")
    for arm, label in (("A", "A"), ("A-I", "A − I")):
        one, four = found[f"{arm}, alone"], found[f"{arm}, 4 processes"]
        rates = ", ".join(f"{row['tokens_per_s'] / 1000:.0f}" for row in (one, four))
        assert f"| {label}: one alone, four together | {ms(one, 1)}, {ms(four, 1)} | {rates} | {four['ratio']['median']:.3f} |\n" in SPEED
    earlier = [before[f"{arm}, 2 processes"]["ratio"]["median"] for arm in ("A", "A-I")]
    words = "of a step of {:.0f} ms, were at {:.3f} (A) and {:.3f} (A − I)"
    assert words.format(before["A, alone"]["ms"]["median"], *earlier) in IN_SPEED


def test_the_speed_by_size_is_the_committed_benchmarks():
    for model, label in (("gpt2", "`gpt2`, 124M"), ("gpt2_350m", "`gpt2_350m`"), ("gpt2_774m", "`gpt2_774m`"), ("gpt2_1b3", "`gpt2_1b3`, 1.3B")):
        report = json.loads((ROOT / "results" / "bench" / f"h100_scale_{model}.json").read_text())
        rows = report["rows"]
        found = [(f"{row['tokens_per_s'] / 1e3:.1f}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}") for row in rows]
        pairs = [", ".join(some) for some in zip(*found)]
        more = f"{ms(rows[1], 1)}, {rows[1]['ratio']['median'] - 1:.1%} more"
        cells = [label, str(report["bench"]["batch_size"]), ms(rows[0], 1), more, *pairs]
        assert f"| {' | '.join(cells)} |\n".replace("%", " %") in SPEED
    large = bench_rows("h100_attention_gpt2")
    assert f"124M with 64 sequences had {large['A']['mfu']:.1%} MFU on an H100".replace("%", " %") in IN_SPEED
    assert f"where it cost {large['A-I']['ratio']['median'] - 1:.1%} with 64".replace("%", " %") in IN_SPEED
