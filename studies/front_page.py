"""The first table and figure of README.md, from the committed reports: python studies/front_page.py

Prints the rows of the table for README.md, the commands of the reports for docs/results.md, and writes results/front_page.png: the difference
between A - I and A, for every seed, with its mean and 95 % t interval, one panel for each endpoint.
"""

from pathlib import Path

from across import endpoints, together
from reports import read_report, run

from configurator import InputError

RESULTS = Path(__file__).resolve().parents[1] / "results"
HINT = 3  # pairs or fewer: a hint, as compare.py says
GPT2 = ("gpt2_new", "gpt2_edge", "gpt2_edge_23", "gpt2_own_rates", "gpt2")
# the question of a row, in the table and short for the figure; the reports' directories; A and A - I in them, on the seeds of A - I
ROWS = [
    (
        "Pictures: ImageNet at 16 × 16, 200 classes, 10.7 M parameters, top-1 in per cent, each arm at the rate tuned for it (1e-3 for both)",
        "ImageNet 16 × 16, tuned",
        ("imagenet16",),
        ("imagenet16_learning_rate=1e-3", "imagenet16_laplacian_learning_rate=1e-3"),
    ),
    (
        "Text: GPT-2 124M, 100 M tokens of a corpus of 32 M, mostly film reviews, last validation loss, 1.2e-3 for both, seeds 1 to 3",
        "GPT-2 124M, all heads, 1.2e-3",
        GPT2,
        ("gpt2_100m_learning_rate=1.2e-3", "gpt2_100m_laplacian_learning_rate=1.2e-3"),
    ),
    (
        "the same with A − I in **half of the heads**, six of twelve in every layer, at 2.4e-3, its best of three rates; A is as good at 1.2e-3",
        "GPT-2 124M, half of the heads, 2.4e-3",
        GPT2,
        ("gpt2_100m_learning_rate=2.4e-3", "gpt2_100m_laplacian_diffusion_heads=6_learning_rate=2.4e-3"),
    ),
    (
        "half of the heads at 1.2e-3",
        "GPT-2 124M, half of the heads, 1.2e-3",
        GPT2,
        ("gpt2_100m_learning_rate=1.2e-3", "gpt2_100m_laplacian_diffusion_heads=6_learning_rate=1.2e-3"),
    ),
    (
        "Text: Shakespeare's characters, 10.65 M parameters, learning rate 1e-3 (nanoGPT's) for both",
        "Shakespeare, nanoGPT's rate",
        ("shakespeare_char_own_rate",),
        ("shakespeare_char", "shakespeare_char_laplacian"),
    ),
    (
        "the same, tuned: 4e-3 for A, 2e-3 for A − I",
        "Shakespeare, tuned",
        ("shakespeare_char_tuned",),
        ("shakespeare_char_learning_rate=4e-3", "shakespeare_char_laplacian_learning_rate=2e-3"),
    ),
    (
        "the same, the best of six schedules, 2500 steps at most: 1e-3, 2000 steps for A, 2500 for A − I",
        "Shakespeare, 2500 steps at most",
        ("shakespeare_char_in_time",),
        ("shakespeare_char_learning_rate=1e-3_max_iters=2000", "shakespeare_char_laplacian_learning_rate=1e-3_max_iters=2500"),
    ),
    (
        "the same, the best of twelve, 5000 steps at most: 1e-3, 2000 steps for A; 5e-4, 4000 for A − I",
        "Shakespeare, 5000 steps at most",
        ("shakespeare_char_lengths",),
        ("shakespeare_char_learning_rate=1e-3_max_iters=2000", "shakespeare_char_laplacian_learning_rate=5e-4_max_iters=4000"),
    ),
    (
        "the same two, the best of 24 too, on new seeds; sign-flip p = 0.053",
        "the same, new seeds",
        ("shakespeare_char_edges",),
        ("shakespeare_char_learning_rate=1e-3_max_iters=2000", "shakespeare_char_laplacian_learning_rate=5e-4_max_iters=4000"),
    ),
    (
        "a small model for 1000 steps on a CPU (the quick recipe below)",
        "small text model",
        ("heads_quick",),
        ("quick", "quick_laplacian"),
    ),
    (
        "the same small model, tuned: 8e-3 for A, 4e-3 for A − I",
        "small text model, tuned",
        ("alpha_quick_tuned",),
        ("quick_learning_rate=0.008", "quick_laplacian_learning_rate=0.004"),
    ),
    (
        "Pictures: scikit-learn's digits, 0.15 M parameters on a CPU, best validation loss, tuned: 4e-3 for A, 8e-3 for A − I",
        "digits, tuned",
        ("vision_quick",),
        ("quick_vision_learning_rate=4e-3", "quick_vision_laplacian_learning_rate=8e-3"),
    ),
]
# of an endpoint: factor and digits in the table, what the figure says about it, whether more is better
ENDPOINTS = {
    "top1": (100, 2, "top-1, percentage points (right: A − I is better)", True),
    "last": (1, 4, "last validation loss, nats (left: A − I is better)", False),
    "best": (1, 4, "best validation loss, nats (left: A − I is better)", False),
}


def entries() -> list[dict]:
    """What each row is made of, from the cells of its reports. Raises InputError when they do not hold what ROWS says."""
    from report import paired_difference, summary

    found = []
    for question, short, directories, names in ROWS:
        reports = [read_report([str(RESULTS / directory)], __doc__)[1] for directory in directories]
        where = " and ".join(f"results/{directory}/report.json" for directory in directories)
        try:
            whole = together(reports)
            values = endpoints(whole)
            a, b = (values[name] for name in names)
            paired = a.keys() >= b.keys() > set() and (len(reports) > 1 or a.keys() == b.keys())  # of several, one may have A on more seeds
            if not paired or any("diverged_at" in cell for name in names for cell in whole["arms"][name]["cells"]):
                raise InputError("a seed is without its pair, or a run has diverged")
            factor, digits, axis, more = ENDPOINTS[whole["endpoint"]]
            arms = [[factor * arm[seed] for seed in sorted(b)] for arm in (a, b)]
            difference = paired_difference(*arms)
            found.append(
                {
                    "question": question,
                    "short": short,
                    "link": f"results/{directories[0]}/{'report' if len(directories) == 1 else 'across'}.md",
                    "axis": axis,
                    "digits": digits,
                    "more": more,
                    "n": difference["n"],
                    "arms": [summary(arm) for arm in arms],
                    "mean": difference["mean"],
                    "interval": difference["interval"],
                    "seeds": difference["differences"],
                    "commands": whole["commands"],
                }
            )
            row(found[-1])  # whose numbers are numbers
        except (InputError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{where}: not what this table is made of ({type(error).__name__}: {error})") from None
    return found


def verdict(entry: dict) -> str:
    """better, worse or undecided: what the interval says of A - I."""
    low, high = entry["interval"]
    if low <= 0 <= high:
        return "undecided"
    return "better" if (low > 0) == entry["more"] else "worse"


def row(entry: dict) -> str:
    """A row of the table in Markdown."""
    from report import estimate, spread

    digits = entry["digits"]
    a, laplacian = (spread(of, digits) for of in entry["arms"])
    difference = f"**{estimate(entry, f'+.{digits}f')}**: {verdict(entry)}".replace("-", "−")
    difference += ", a hint" * (entry["n"] <= HINT)
    return f"| {entry['question']} | {entry['n']} | {a} | {laplacian} | {difference} | [report]({entry['link']}) |"


def draw(path: Path, found: list[dict]):
    """The figure: rows of studies, panels of endpoints."""
    import numpy as np

    from figures import plt, save_figure

    panels = list(dict.fromkeys(entry["axis"] for entry in found))
    counts = [sum(entry["axis"] == axis for entry in found) for axis in panels]
    figure, all_axes = plt.subplots(len(panels), 1, figsize=(8, 1.1 * len(panels) + 0.55 * len(found)), layout="constrained", height_ratios=counts)
    colours = {"better": "tab:green", "worse": "tab:red", "undecided": "tab:gray"}
    for axes, panel in zip(np.atleast_1d(all_axes), panels):
        shown = [entry for entry in found if entry["axis"] == panel][::-1]
        for y, entry in enumerate(shown):
            colour = colours[verdict(entry)]
            axes.plot(entry["seeds"], np.full(entry["n"], y - 0.22), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot(entry["interval"], [y, y], color=colour, linewidth=3)
            axes.plot(entry["mean"], y, "D", color=colour, markerfacecolor="white" if entry["n"] <= HINT else colour)
        axes.axvline(0, color="black", linestyle="--", linewidth=1)
        axes.set(
            yticks=range(len(shown)),
            yticklabels=[f"{entry['short']} (n = {entry['n']}{', a hint' * (entry['n'] <= HINT)})" for entry in shown],
            ylim=(-0.6, len(shown) - 0.4),
        )
        axes.set_xlabel(f"A − I minus A: {panel}")
        axes.locator_params(axis="x", nbins=7)
        axes.grid(alpha=0.3, axis="x")
    save_figure(path, figure)


def main(arguments: list[str]):
    """Raises InputError."""
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        raise SystemExit
    if arguments:
        raise InputError(f"front_page.py takes no arguments, not {arguments[0]!r}")
    found = entries()
    draw(RESULTS / "front_page.png", found)
    commands = dict.fromkeys(command for entry in found for command in entry["commands"])  # rows of one report have one
    print(*map(row, found), "", *commands, "", "results/front_page.png", sep="\n")


if __name__ == "__main__":
    run(main)
