"""The numbers of docs/speed.md, and of README.md's part of it, are those of the committed benchmarks."""

import json
import re

from pages import IN_README, IN_SPEED, README, ROOT, SPEED, report_of

LOOPS = ("h200_train_shakespeare_char", "h200_own_shakespeare_char", "h200_ahead_shakespeare_char", "h100_ahead_shakespeare_char")  # with plain


def bench_rows(name: str) -> dict[str, dict]:
    """{arm: its row} of a committed benchmark."""
    return {row["arm"]: row for row in json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())["rows"]}


def ms(row: dict, digits: int) -> str:
    return f"{row['ms']['median']:.{digits}f}"


def thousands(*rows: dict) -> str:
    *first, last = (f"{row['tokens_per_s'] / 1000:.0f}" for row in rows)
    return f"{', '.join(first)} and {last} thousand tokens/s"


def memory(*rows: dict) -> str:
    *first, last = (f"{row['peak_gib']:.1f}" for row in rows)
    return f"{', '.join(first)} and {last} GiB"


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


def test_the_speed_of_a_gpu_is_the_committed_benchmarks():
    text, gpt2, pair, pictures = (bench_rows(f"h200_ahead_{name}") for name in ("shakespeare_char", "plain_gpt2", "gpt2", "imagenet16"))
    plain, a, laplacian = (text[arm] for arm in ("plain", "A", "A-I"))
    label, cells = "a step of `shakespeare_char` (64 × 256 characters)", [ms(row, 2) for row in (plain, a, laplacian)]
    shares = f"{a['ratio']['median']:.3f} and {laplacian['ratio']['median']:.3f} of the time of nanoGPT's way"
    alone = ms(text["products"], 2)
    assert f"| {label} | {cells[0]} | {alone} | {cells[1]} | {cells[2]} | {shares}; {memory(plain, a, laplacian)} |\n" in SPEED
    assert f"| {label} | {' | '.join(cells)} |\n" in README
    short = f"takes {a['ms']['median']:.1f} ms for A and for A − I: {5 * a['ms']['median']:.0f} s"
    assert f"{a['ms']['median']:.1f}" == f"{laplacian['ms']['median']:.1f}" and short.rpartition(":")[0] in IN_README
    plain, a, laplacian = (gpt2[arm] for arm in ("plain", "A", "A-I"))
    label, cells = "a step of GPT-2 124M (64 × 1024 tokens)", [ms(row, 1) for row in (plain, a, laplacian)]
    rates = f"{thousands(plain, a, laplacian)}; {memory(plain, a, laplacian)}"
    assert f"| {label} | {cells[0]} | | {cells[1]} | {cells[2]} | {rates} |\n" in SPEED and f"| {label} | {' | '.join(cells)} |\n" in README
    a, laplacian = pair.values()
    assert f"{a['mfu']:.1%}" == f"{laplacian['mfu']:.1%}"
    words = f"{thousands(a, laplacian)}, {100 * a['mfu']:.1f} % MFU"
    assert f"| the same without nanoGPT's way | | | {ms(a, 1)} | {ms(laplacian, 1)} | {words} |\n" in SPEED
    elsewhere = bench_rows("h100_ahead_gpt2")["A-I"]["ratio"]
    low, high = (f"{100 * (end - 1):+.1f}".replace("-", "−") for end in elsewhere["quartiles"])
    words = "{:.3f} times A's step, by the rounds' own ratios (quartiles {:.3f} to {:.3f}), on the H200; on an H100 {:.1f} % ({} to {})"
    ratio = laplacian["ratio"]
    assert words.format(ratio["median"], *ratio["quartiles"], 100 * (elsewhere["median"] - 1), low, high) in IN_SPEED
    products, attention, a, laplacian = pictures.values()
    ratios = f"{a['ratio']['median']:.3f} and {laplacian['ratio']['median']:.3f} times its products; {memory(a, laplacian)}"
    cells = " | ".join(ms(row, 2) for row in (products, a, laplacian))
    assert f"| a step of `imagenet16` (512 pictures) | | {cells} | {ratios} |\n" in SPEED
    words = "the quartiles are {:.3f} to {:.3f} (A) and {:.3f} to {:.3f} (A − I)"
    assert words.format(*a["ratio"]["quartiles"], *laplacian["ratio"]["quartiles"]) in IN_SPEED
    assert f"With attention's as batched products the products take {ms(attention, 2)} ms." in IN_SPEED
    h100s = [bench_rows(f"h100_{name}_imagenet16")[arm]["ratio"]["median"] for name in ("ahead", "ahead_again") for arm in ("A", "A-I")]
    assert "A and A − I are at {:.3f} and {:.3f} times their products, on another at {:.3f} and {:.3f}.".format(*h100s) in IN_SPEED
    found = bench_rows("h200_sample_gpt2")
    loop, a, laplacian = (found[arm] for arm in ("A, no cache", "A", "A-I"))
    label, cells = "a token from GPT-2 124M, one sequence, 500 after 100", [ms(row, 2) for row in (loop, a, laplacian)]
    rates = f"{a['tokens_per_s']:,.0f} and {laplacian['tokens_per_s']:,.0f} tokens/s"
    assert f"| {label} | {cells[0]} | | {cells[1]} | {cells[2]} | {rates} |\n" in SPEED and f"| {label} | {' | '.join(cells)} |\n" in README


def test_the_speed_of_whole_runs_is_the_committed_reports():
    before, now = report_of("shakespeare_char_own_rate"), report_of("shakespeare_char_lengths_rates")["arms"]
    arms = (now[f"shakespeare_char{arm}_learning_rate=1e-3_max_iters=5000"]["seconds"]["mean"] for arm in ("", "_laplacian"))
    a, laplacian = arms
    assert f"takes {a:.1f} s for A and {laplacian:.1f} s for A − I" in IN_SPEED and 7.25 < 10 * (a + laplacian) / 60 < 7.75
    old = "{:.1f} and {:.1f} s".format(*(arm["seconds"]["mean"] for arm in before["arms"].values()))
    minutes, seconds = divmod(round(before["provenance"]["seconds_of_this_call"]), 60)
    assert f"it was {old}, and the twenty runs {minutes} min {seconds} s of wall clock" in IN_SPEED


def test_the_speed_with_the_barrier_is_the_committed_benchmarks():
    embedding, own, gpt2 = (bench_rows(f"h200_{name}") for name in ("prior_shakespeare_char", "own_shakespeare_char", "prior_gpt2"))
    words = [f"{ms(rows[arm], 2)} against {ms(rows['A'], 2)}" for rows, arm in ((embedding, "A+prior"), (own, "A+own"))]
    words.append(f"{ms(gpt2['A+prior'], 1)} and {ms(gpt2['A+own'], 1)} against {ms(gpt2['A'], 1)}")
    assert "on the embeddings {}, on the model's own heads {}; GPT-2 124M {}.".format(*words) in IN_SPEED


def test_the_speed_by_stage_is_the_committed_benchmarks():
    """Every figure of a row is in one of the files that the row names, and the row has all arms of them that it is about."""
    table = SPEED[SPEED.index("| | GPU | `shakespeare_char`, A |") :].partition("\n\n")[0].splitlines()[2:]
    names = [re.findall(r"results/bench/(\w+)\.json", row) for row in table]
    assert len(table) == 8 and all(all(name.startswith(gpu) for name in some) for some, gpu in zip(names, ("h100", "h100", "h200", "h200")))
    for stage, (row, files) in enumerate(zip(table, names)):
        _, _, gpu, text, gpt2, pictures, _, _ = (cell.strip() for cell in row.split("|"))
        arm = "A" if stage else "apart"
        assert all(name.startswith(gpu.lower()) for name in files)
        for cell, model in ((text, "shakespeare_char"), (pictures, "imagenet16")):
            assert cell == "".join(ms(bench_rows(name)[arm], 2) for name in files if name.endswith(model))
        runs = [bench_rows(name) for name in files if name.endswith("gpt2")]
        assert gpt2 == "; ".join(", ".join(ms(rows[one], 1) if one in rows else "–" for one in ("plain", arm, "A-I")) for rows in runs)

    def more(name: str) -> float:
        rows = bench_rows(name)
        return 100 * (rows["A-I"]["ratio"]["median"] / rows["A"]["ratio"]["median"] - 1)

    costs = [more(name) for name in ("h100_train_gpt2", "h200_ungathered_gpt2", "h200_train_gpt2", "h200_gathered_gpt2", "h100_attention_gpt2")]
    words = "A − I cost {:.1f} % more than A on an H100 and {:.1f} to {:.1f} % on an H200 with the framework's attention ({:.1f} %"
    assert words.format(*costs) in IN_SPEED and f"{costs[4]:.1f} % with our own" in IN_SPEED
    loops = [bench_rows(name)["plain"]["ms"]["median"] for name in LOOPS]
    assert f"({min(loops):.1f} to {max(loops):.1f} ms in our runs)" in IN_SPEED


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
