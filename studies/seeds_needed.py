"""How many seeds an answer needs: python studies/seeds_needed.py results/gpt2 [results/...]

Reads report.json of a comparison, or of several that belong together (across.py), and prints, from the standard deviation of each pair's differences
of the endpoint, the number of paired seeds at which the two-sided paired t test at 5 % finds a true difference of a given size, in the endpoint's
unit (nats; accuracies as shares), with a probability of 80 %. A standard deviation from few seeds is itself uncertain: of three, its 95 % interval
goes from half to six times of what is stated, and the counts with its square.
"""

from across import differences, endpoints, together
from reports import read_reports, run

from configurator import InputError

SIZES, POWER, MOST = (0.005, 0.01, 0.02, 0.05), 0.8, 1000


def power(size: float, sd: float, n: int) -> float:
    """Probability that the two-sided paired t test at 5 % rejects, for n pairs whose differences are normal with this mean and sd.

    Over the sample's standard deviation, a chi variable, since scipy's noncentral t distribution fails for large means.
    """
    from scipy import integrate, stats

    edge, shift, spread = stats.t.ppf(0.975, n - 1), size / sd * n**0.5, stats.chi(n - 1, scale=(n - 1) ** -0.5)

    def rejected(s):
        return (stats.norm.sf(edge * s - shift) + stats.norm.cdf(-edge * s - shift)) * spread.pdf(s)

    return integrate.quad(rejected, 0, spread.isf(1e-9), limit=200)[0]


def seeds(size: float, sd: float) -> int | None:
    """The least n at which the power is POWER; None beyond MOST. By halving, since the power grows with n."""
    low, high = 1, MOST  # the power is too low at low, or nothing is known of it
    if power(size, sd, MOST) < POWER:
        return None
    while high - low > 1:
        n = (low + high) // 2
        low, high = (low, n) if power(size, sd, n) >= POWER else (n, high)
    return high


def table(report: dict) -> str:
    """A row per arm as Markdown. Raises InputError."""
    from tabulate import tabulate

    rows = []
    try:
        for name, pair in report["pairs"].items():
            entry = pair[report["endpoint"]]
            if entry["sd"]:
                counts = [seeds(size, entry["sd"]) for size in SIZES]
                rows.append([name, entry["n"], f"{entry['mean']:+.4f}", f"{entry['sd']:.4f}", *(count or f"> {MOST}" for count in counts)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the report is not one of compare.py ({type(error).__name__}: {error})") from None
    if not rows:
        raise InputError("no arm of the report has two pairs of seeds that differ: there is no standard deviation to go by")
    headers = ["arm", "pairs", "difference", "its sd", *(f"seeds for {size:g}" for size in SIZES)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(arguments: list[str]):
    """Raises InputError."""
    found = [report for _, report in read_reports(arguments, __doc__, 1, 9)]
    report = found[0]
    if len(found) > 1:
        whole = together(found)
        pairs = differences(endpoints(whole))
        report = {"endpoint": whole["endpoint"], "pairs": {name: {whole["endpoint"]: pair} for name, pair in pairs.items()}}
    print(table(report))


if __name__ == "__main__":
    run(main)
