"""Each arm at its best learning rate: python studies/tuned.py results/imagenet16_rates

Reads report.json of a comparison whose arms name their rates, "config/x.py --learning_rate=1e-3", and prints one line per arm, for the next
command line: the arm at the rate with the best mean of the endpoint. Rates with a run that diverged do not count. An arm whose best rate is the
largest or the smallest tried gets a note on stderr, with the rate to try next.
"""

import re
import shlex
import sys

from reports import read_report

from configurator import InputError, one_line_errors

RATE = re.compile(r" --learning_rate=(\S+)")


def read_rates(report: dict) -> dict[str, dict[str, float]]:
    """{arm without its rate: {rate: mean of the endpoint, turned so that more is better}}, in the order of the report. Raises InputError."""
    from compare import ENDPOINTS

    found = {}
    try:
        _, key, _, sign = ENDPOINTS[report["endpoint"]]
        texts = [word for word in shlex.split(report["provenance"]["command"])[2:] if not word.startswith("--")]
        for text, arm in zip(texts, report["arms"].values(), strict=True):
            if not RATE.search(text):
                raise InputError(f"arm {text!r} does not name a --learning_rate: nothing to choose from")
            rates = found.setdefault(RATE.sub("", text), {})
            if not arm["diverged"]:
                rates[RATE.search(text)[1]] = sign * arm[key]["mean"]
    except (KeyError, TypeError, ValueError):
        raise InputError("the report is not one of compare.py") from None
    return found


def best_rates(report: dict) -> tuple[list[str], list[str]]:
    """(arms at their best rates, notes on those at the edge). Raises InputError."""
    arms, notes = [], []
    for arm, rates in read_rates(report).items():
        if not rates:
            raise InputError(f"every rate of arm {arm!r} has a run that diverged: try smaller ones")
        best = max(rates, key=rates.get)
        arms.append(f"{arm} --learning_rate={best}")
        others = sorted(map(float, rates))
        if float(best) in (others[0], others[-1]):
            factor, which = (2, "largest") if float(best) == others[-1] else (0.5, "smallest")
            notes.append(f"{arm}: its best rate {best} is the {which} without divergence; next: {arm} --learning_rate={factor * float(best):g}")
    return arms, notes


def main(arguments: list[str]):
    """Raises InputError."""
    _, report = read_report(arguments, __doc__)
    arms, notes = best_rates(report)
    print(*arms, sep="\n")
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
