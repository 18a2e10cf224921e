"""The pages whose numbers the tests compare with the committed reports, and how numbers are written there."""

import json
from pathlib import Path

from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md", ROOT / "studies" / "README.md")
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in FILES}
# as they are, for rows of tables and commands, which are lines; and each as one line, for sentences, wrapped anywhere
README = PAGES["README.md"]
RESULTS, THEORY, BARRIER, SPEED = (PAGES[f"docs/{name}.md"] for name in ("results", "theory", "barrier", "speed"))
IN_README, IN_RESULTS, IN_THEORY, IN_BARRIER, IN_SPEED = (" ".join(page.split()) for page in (README, RESULTS, THEORY, BARRIER, SPEED))
IN_STUDIES = " ".join(PAGES["studies/README.md"].split())


def report_of(name: str) -> dict:
    return json.loads((ROOT / "results" / name / "report.json").read_text(encoding="utf-8"))


def words(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}".replace("-", "−")


def paired(a: dict, b: dict) -> tuple[float, float, float]:
    """Mean and 95 % t interval of b - a over the seeds of b, or of a where those are fewer."""
    seeds = min(a.keys(), b.keys(), key=len)
    low, high = stats.ttest_1samp([b[seed] - a[seed] for seed in seeds], 0).confidence_interval(0.95)
    return (low + high) / 2, low, high
