"""The experiment at initialisation: pictures as tokens, one transformer block with the theory's weights, eight times, and no training.

    python unroll.py                                   scikit-learn's digits, both arms; figures, an animation and tables in out-unroll/
    python unroll.py --dataset=mnist --seeds=5         MNIST: data/mnist/prepare.py fetches it
    python unroll.py --dataset=mnist --n=10000 --device=cuda
    python unroll.py --sweep=True                      the table from which the defaults of latent_dim, temperature and eta were chosen

n flattened pictures form one sequence (n tokens). Their latents start as a random linear map of the pictures (minus the mean picture), and then the
same block of model.py is applied `steps` times: one head, full attention, identity q, k, v, o up to scale, LayerNorm as the projection

    X <- X + eta (A - I) LN(X)   (arm A-I)    or    X <- X + eta A LN(X)   (arm A),    A = softmax(cosine / temperature)

What is looked at is always LN(X), the latents on the constraint set, which is also what the next block sees. Labels are used to measure, never to
move a latent; but the three constants were chosen with labels in the sweep, on pictures and seeds that the reported runs do not use.

The second part asks whether a block is a step of inference: does it climb the lower bound F of the theory (theory.py) on the graph of that moment?
For A - I, A, -(A - I) and a plain gradient step of F, per step: F, its two terms and the Dirichlet energy.
"""

from dataclasses import dataclass

from configurator import InputError, TrainConfig, configure, one_line_errors


@dataclass(frozen=True)
class UnrollConfig:
    """Pictures as tokens through one untrained block: python unroll.py [--dataset=digits|mnist] [--key=value ...]"""

    dataset: str = "digits"  # digits (8x8, inside scikit-learn), or mnist (28x28)
    n: int = 2000  # pictures, drawn anew for each seed; all, where there are fewer
    steps: int = 8  # times that the block is applied
    arm: str = "both"  # A, A-I or both
    seeds: int = 3  # repetitions: other pictures and another random map
    first_seed: int = 1  # seeds are first_seed, first_seed + 1, ...
    latent_dim: int = 256  # channels of a latent (p)
    temperature: float = 0.1  # A = softmax(cosine / temperature)
    eta: float = 0.5  # step size of the attention sub-layer
    regulariser: float = 0.0  # the feed-forward sub-layer adds this times LN(X)
    neighbours: int = 10  # of the k-NN accuracy and of SpectralEmbedding's graph
    beta: float = 1.0  # of the lower bound: precision X X^T + beta I; nu is n
    out_dir: str = "out-unroll"  # figures, report.md and report.json
    overwrite: bool = False  # replace a report of other pictures or constants
    sweep: bool = False  # instead of the experiment: the table over constants, sweep.md and sweep.json
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps

    def check(self) -> "UnrollConfig":
        """Raises InputError for a value out of range; returns self."""
        for key, known in (("dataset", ("digits", "mnist")), ("arm", ("A", "A-I", "both"))):
            if getattr(self, key) not in known:
                raise InputError(f"--{key}={getattr(self, key)} must be {' or '.join(known)}")
        limits = {"n": (100, 70_000), "steps": (1, 1000), "seeds": (1, 1000), "first_seed": (0, 10**9)}
        limits |= {"latent_dim": (3, 4096), "neighbours": (1, 10**4)}
        for key, (low, high) in limits.items():
            if not low <= getattr(self, key) <= high:
                raise InputError(f"--{key}={getattr(self, key)} must be between {low} and {high}")
        for key in ("temperature", "eta", "beta"):
            if not 0 < getattr(self, key) < float("inf"):
                raise InputError(f"--{key}={getattr(self, key)} must be a positive, finite number")
        if not 0 <= self.regulariser < float("inf"):
            raise InputError(f"--regulariser={self.regulariser} must be a finite number, 0 or above")
        if self.neighbours >= self.n:
            raise InputError(f"--neighbours={self.neighbours} must be smaller than --n={self.n}")
        TrainConfig(out_dir=self.out_dir, device=self.device).check()  # the same keys, the same limits
        return self


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(UnrollConfig)

import dataclasses
import itertools
import json
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.manifold import SpectralEmbedding
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from tabulate import tabulate
from tqdm import tqdm

import theory
from dataset import Pictures, prepare_if_missing, write_file
from figures import plt, save_figure
from model import Block, ViTConfig, attention_matrix
from place import find_place, say
from report import estimate
from variants import add_theory_to_block

PICTURE_STREAM, MAP_STREAM = 4, 5  # SeedSequence keys (seed, stream); train.py and sample.py use 1 to 3
SWEEP_SEED = 1_000_000  # far from the seeds that are reported
MINUS = {"A": "A", "A-I": "A − I", "-(A-I)": "−(A − I)", "gradient": "plain gradient of F"}  # for figures and tables
MEASURES = {  # key -> heading, and whether more is better
    "knn_2": "k-NN accuracy, 2 dims",
    "knn": "k-NN accuracy, all dims",
    "silhouette_2": "silhouette, 2 dims",
    "silhouette": "silhouette, all dims",
    "within_between_2": "within/between variance, 2 dims",
    "within_between": "within/between variance, all dims",
}


# ---------------------------------------------------------------------------------------------------------------------------------
# Pictures, block, steps


def load_pictures(dataset: str) -> tuple[np.ndarray, np.ndarray]:
    """All pictures flattened, float32 in 0..1, and their digits: (N, D), (N,). Raises InputError."""
    if dataset == "digits":
        digits = sklearn.datasets.load_digits()
        return (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    prepare_if_missing(dataset)
    data = Pictures(dataset, patch_size=1, pad=0, flip=False, device="cpu")  # which checks the files
    pictures, labels = data.split["train"]
    return pictures[:, 0].flatten(1).numpy().astype(np.float32) / 255, labels.numpy()  # one of three equal channels


def draw_pictures(pictures, labels, n: int, seed: int):
    """n pictures of a seed, without repetition, minus their mean picture, and their digits; all of them where there are no more than n."""
    chosen = np.arange(len(labels))
    if n < len(labels):
        chosen = np.random.default_rng([seed, PICTURE_STREAM]).choice(len(labels), n, replace=False)
    return pictures[chosen] - pictures[chosen].mean(axis=0), labels[chosen]


def first_latents(pictures, latent_dim: int, seed: int) -> torch.Tensor:
    """X (n, p): a random linear map of the pictures, entries normal(0, 1), scaled to mean square 1."""
    matrix = np.random.default_rng([seed, MAP_STREAM]).standard_normal((pictures.shape[1], latent_dim))
    latents = pictures @ matrix.astype(np.float32)
    return torch.from_numpy(latents / np.sqrt(np.mean(latents**2)))


def theory_block(latent_dim: int, arm: str, temperature: float, eta: float, regulariser: float) -> Block:
    """model.Block with the theory's weights and nothing else: one head, full attention. `arm` is A, A-I or -(A-I)."""
    sign = -1.0 if arm == "-(A-I)" else 1.0
    block = Block(ViTConfig(n_layer=1, n_head=1, n_embd=latent_dim, diffusion=arm != "A", diffusion_lambda=sign), 0).eval()
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if not name.startswith("ln_"):
                parameter.zero_()
    add_theory_to_block(block, temperature, eta, regulariser)
    return block


@torch.no_grad()
def unroll(block: Block, X, steps: int) -> list[torch.Tensor]:
    """[LN(X) after 0, 1, ..., steps applications of the block], each (n, p)."""
    seen = [block.ln_1(X)]
    for _ in range(steps):
        X = block(X[None])[0]
        seen.append(block.ln_1(X))
    return seen


# ---------------------------------------------------------------------------------------------------------------------------------
# Measuring


def knn_accuracy(X, labels, neighbours: int) -> float:
    """Share of pictures whose digit is the most frequent one among their nearest neighbours (Euclidean, not themselves; ties: the smaller digit)."""
    near = NearestNeighbors(n_neighbors=neighbours).fit(X).kneighbors(return_distance=False)  # without an argument, a point is not its own neighbour
    votes = (labels[near][:, :, None] == np.arange(labels.max() + 1)).sum(axis=1)
    return float((votes.argmax(axis=1) == labels).mean())


def within_between(X, labels) -> float:
    """tr(S_W) / tr(S_B): mean squared distance to the class mean over that of the class means to the mean. Smaller is more clustered."""
    means = np.stack([X[labels == label].mean(axis=0) if (labels == label).any() else X.mean(axis=0) for label in range(labels.max() + 1)])
    return float(((X - means[labels]) ** 2).sum() / ((means[labels] - X.mean(axis=0)) ** 2).sum())


def measure(X, labels, neighbours: int) -> dict[str, float]:
    """The MEASURES of one set of latents (n, p). The silhouette is that of 5,000 of them where there are more."""
    X, result = np.asarray(X, dtype=np.float64), {}
    for suffix, part in (("_2", X[:, :2]), ("", X)):
        result[f"knn{suffix}"] = knn_accuracy(part, labels, neighbours)
        result[f"silhouette{suffix}"] = float(silhouette_score(part, labels, sample_size=5000 if len(X) > 5000 else None, random_state=0))
        result[f"within_between{suffix}"] = within_between(part, labels)
    return {key: result[key] for key in MEASURES}


def interval(values: list[float]) -> dict:
    """n, mean, standard deviation and 95 % t interval over seeds (None for one seed, or when all are equal)."""
    values = np.asarray(values, dtype=float)
    result = {"n": len(values), "mean": float(values.mean()), "sd": None, "interval": None, "values": values.tolist()}
    if len(values) > 1:
        result["sd"] = float(values.std(ddof=1))
        if np.ptp(values) > 1e-6 * abs(values.mean()):  # else all the same but for rounding, as PCA of the same pictures is
            low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            result["interval"] = [float(low), float(high)]
    return result


# ---------------------------------------------------------------------------------------------------------------------------------
# Is it inference?


@torch.no_grad()
def climb(X, kind: str, config: UnrollConfig) -> list[dict]:
    """F and the Dirichlet energy along the steps of one kind of update, one dict per step 0..steps, in float64. X (n, p) are the first latents.

    U = LN(X) are the latents at which everything is evaluated, A = A(U) the graph of that moment, nu = n. `gain` is F(U') - F(U) of the step that
    follows, with the graph held fixed, and gain_data and gain_log_det its two terms; dirichlet is that of the current graph. bound_first and
    dirichlet_first are taken on the graph of the first latents instead. "gradient" moves X by eta (gradient of F at U), both terms, L symmetrised.
    """
    X = X.double()
    nu, p = float(len(X)), X.size(1)
    block = theory_block(p, "A" if kind == "gradient" else kind, config.temperature, config.eta, config.regulariser).double().to(X.device)

    def graph(U):  # the block's own A
        q, k, _ = block.attn.c_attn(U).split(p, dim=-1)
        return attention_matrix(q, k, causal=False)

    def dirichlet(data, L):  # of the data term, which saves a product with the n x n matrix
        return -(2 * data + config.beta * L.trace()) / U.square().sum()

    rows, first, U = [], None, block.ln_1(X)
    for step in range(config.steps + 1):
        L = theory.laplacian(graph(U))
        first = L if first is None else first
        data, log_det = theory.bound_terms(U, L, nu, config.beta)
        data_first, _ = theory.bound_terms(U, first, nu, config.beta)
        row = {"step": step, "bound": data + log_det, "bound_first": data_first + log_det}
        row |= {"dirichlet": dirichlet(data, L), "dirichlet_first": dirichlet(data_first, first)}
        if step < config.steps:
            X = X + config.eta * sum(theory.gradient_terms(U, L, nu, config.beta)) if kind == "gradient" else block(X[None])[0]
            U = block.ln_1(X)
            data_next, log_det_next = theory.bound_terms(U, L, nu, config.beta)
            row |= {"gain": data_next + log_det_next - data - log_det, "gain_data": data_next - data, "gain_log_det": log_det_next - log_det}
        rows.append({key: float(value) for key, value in row.items()})
    return rows


# ---------------------------------------------------------------------------------------------------------------------------------
# Figures


def scatter(axes, X, labels, title: str):
    """The first two dimensions, coloured by digit, within the middle 99.5 % of each."""
    X = np.asarray(X)
    points = axes.scatter(X[:, 0], X[:, 1], c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=5, linewidths=0)
    for set_limits, values in ((axes.set_xlim, X[:, 0]), (axes.set_ylim, X[:, 1])):
        low, high = np.quantile(values, [0.0025, 0.9975])
        margin = 0.05 * (high - low) + 1e-9
        set_limits(low - margin, high + margin)
    axes.set(title=title, xticks=[], yticks=[])
    return points


def draw_latents(path: Path, panels: list[tuple[str, np.ndarray]], labels):
    """latents.png: one panel per embedding."""
    columns = 3
    figure, grid = plt.subplots(-(-len(panels) // columns), columns, figsize=(10.5, 3.6 * -(-len(panels) // columns)), layout="constrained")
    points = None
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.axis("off")
        else:
            points = scatter(axes, panel[1], labels, panel[0])
    figure.colorbar(points, ax=grid, ticks=range(10), label="digit", shrink=0.8)
    save_figure(path, figure, dpi=110)


def draw_steps(path: Path, seen: dict[str, list], labels):
    """steps.gif: the first two latent dimensions after each step, one panel per arm."""
    figure, grid = plt.subplots(1, len(seen), figsize=(4.2 * len(seen), 4.4), layout="constrained", squeeze=False)

    def frame(step):
        for axes, (arm, latents) in zip(grid.flat, seen.items()):
            axes.clear()
            scatter(axes, latents[step].cpu(), labels, f"{MINUS[arm]}, step {step}")
        return []

    steps = len(next(iter(seen.values())))
    animation = FuncAnimation(figure, frame, frames=[*range(steps), steps - 1, steps - 1])  # rests at the end
    with tempfile.TemporaryDirectory() as folder:
        animation.save(Path(folder) / "steps.gif", writer=PillowWriter(fps=2), dpi=80)
        plt.close(figure)
        write_file(path, (Path(folder) / "steps.gif").read_bytes())


def draw_accuracy(path: Path, curves: dict[str, dict[str, np.ndarray]], baselines: dict[str, dict]):
    """accuracy.png: k-NN accuracy over steps, mean and 95 % t interval over seeds; PCA and SpectralEmbedding as lines across."""
    figure, grid = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, key in zip(grid, ("knn_2", "knn")):
        for arm, curve in curves.items():
            values = curve[key]  # (seeds, steps + 1)
            mean, steps = values.mean(axis=0), np.arange(values.shape[1])
            (line,) = axes.plot(steps, mean, marker="o", markersize=4, label=MINUS[arm])
            if len(values) > 1:
                half = stats.t.ppf(0.975, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
                axes.fill_between(steps, mean - half, mean + half, alpha=0.25, color=line.get_color(), linewidth=0)
        for (name, entry), style in zip(baselines.items(), ("--", ":")):
            axes.axhline(entry[key]["mean"], color="gray", linestyle=style, label=name)
        axes.set(title=MEASURES[key], xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("share of pictures")
    grid[0].legend(loc="lower right", ncols=2, title=f"mean, 95 % interval, {len(values)} seed(s)" if len(values) > 1 else "one seed")
    save_figure(path, figure, dpi=110)


def draw_inference(path: Path, found: dict[str, list[list[dict]]], n: int):
    """inference.png: change of F and of its data term by each step, F on the first graph, Dirichlet energy; four updates, mean over seeds."""
    panels = (
        ("gain_data", "change of the data term by the step, graph held fixed, / n"),
        ("gain", "change of F by the step, graph held fixed, / n"),
        ("bound_first", "F on the graph of step 0, / n"),
        ("dirichlet", "Dirichlet energy, current graph"),
    )
    figure, grid = plt.subplots(2, 2, figsize=(10.5, 7), layout="constrained")
    for axes, (key, title) in zip(grid.flat, panels):
        for kind, runs in found.items():
            steps = [row["step"] for row in runs[0] if key in row]
            mean = np.mean([[row[key] for row in rows if key in row] for rows in runs], axis=0) / (1 if key == "dirichlet" else n)
            axes.plot(np.add(steps, 1) if key.startswith("gain") else steps, mean, marker="o", markersize=4, label=MINUS[kind])
        axes.set(title=title, xlabel="step")
        if key.startswith("gain"):
            axes.axhline(0, color="black", linewidth=1)
        axes.grid(alpha=0.3)
    grid[0, 0].legend()
    save_figure(path, figure, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------------------
# The experiment


def embeddings(pictures, config: UnrollConfig, seed: int) -> dict[str, np.ndarray]:
    """PCA and Laplacian Eigenmaps of the same pictures, by scikit-learn, with as many dimensions as the latents have."""
    dims = min(config.latent_dim, *pictures.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        spectral = SpectralEmbedding(min(dims, len(pictures) - 2), n_neighbors=config.neighbours, random_state=seed).fit_transform(pictures)
    return {"PCA": PCA(dims, random_state=seed).fit_transform(pictures), "SpectralEmbedding": spectral}


def table(entries: dict[str, dict]) -> str:
    """{row: {measure: interval(...)}} -> Markdown: mean and 95 % interval."""
    rows = [[name, *(estimate(entry[key], ".3f") for key in MEASURES)] for name, entry in entries.items()]
    return tabulate(rows, ["latents", *MEASURES.values()], tablefmt="github", disable_numparse=True)


def verdict(change: dict, key: str, arm: str) -> str:
    """One sentence on after − before of one measure."""
    what, entry = MEASURES[key], change[key]
    if entry["interval"] is None:
        return f"{MINUS[arm]}: {what} changes by {entry['mean']:+.3f} (no interval from {entry['n']} seed(s))."
    low, high = entry["interval"]
    word = "rises" if low > 0 else "falls" if high < 0 else "shows no change"
    return f"{MINUS[arm]}: {what} {word}, {entry['mean']:+.3f} (95 % interval {low:+.3f} to {high:+.3f}, {entry['n']} seeds)."


def experiment(config: UnrollConfig, out_dir: Path) -> dict:
    """Runs all seeds, draws the figures of the first one and returns the report, JSON values."""
    place = find_place(config.device, "float32", distributed=False)
    device = place.device
    pictures, digits = load_pictures(config.dataset)
    arms = ["A", "A-I"] if config.arm == "both" else [config.arm]
    measured: dict[str, list[dict]] = {}
    curves = {arm: {"knn_2": [], "knn": []} for arm in arms}
    climbs = {kind: [] for kind in MINUS} if device.type != "mps" else {}  # which has no float64
    if not climbs:
        say("note: no float64 on mps, so the part about the lower bound is left out: use --device=cpu for it")
    for seed in tqdm(range(config.first_seed, config.first_seed + config.seeds), unit="seed", leave=False, disable=not sys.stderr.isatty()):
        chosen, labels = draw_pictures(pictures, digits, config.n, seed)
        X = first_latents(chosen, config.latent_dim, seed).to(device)
        seen = {arm: unroll(theory_block(config.latent_dim, arm, config.temperature, config.eta, config.regulariser).to(device), X, config.steps)
                for arm in arms}  # fmt: skip
        for arm, latents in seen.items():
            arrays = [U.cpu().numpy() for U in latents]
            if not np.isfinite(arrays[-1]).all():
                raise InputError(f"the latents of {MINUS[arm]} are no longer finite: lower --eta={config.eta}")
            for key, part in (("knn_2", slice(2)), ("knn", slice(None))):
                curves[arm][key].append([knn_accuracy(U[:, part], labels, config.neighbours) for U in arrays])
            measured.setdefault(f"{MINUS[arm]}, after", []).append(measure(arrays[-1], labels, config.neighbours))
        others = {"before": seen[arms[0]][0].cpu().numpy(), **embeddings(chosen, config, seed)}
        for name, latents in others.items():
            measured.setdefault(name, []).append(measure(latents, labels, config.neighbours))
        for kind, runs in climbs.items():
            runs.append(climb(X, kind, config))
        if seed == config.first_seed:
            after = [(f"{MINUS[arm]}, after {config.steps} steps", latents[-1].cpu()) for arm, latents in seen.items()]
            panels = [("before", others["before"]), *after, *((name, others[name]) for name in ("PCA", "SpectralEmbedding"))]
            draw_latents(out_dir / "latents.png", panels, labels)
            draw_steps(out_dir / "steps.gif", seen, labels)
    order = ["before", *(f"{MINUS[arm]}, after" for arm in arms), "PCA", "SpectralEmbedding"]
    summary = {name: {key: interval([run[key] for run in measured[name]]) for key in MEASURES} for name in order}
    change = {
        arm: {key: interval([b[key] - a[key] for a, b in zip(measured["before"], measured[f"{MINUS[arm]}, after"])]) for key in MEASURES}
        for arm in arms
    }
    curves = {arm: {key: np.array(values) for key, values in curve.items()} for arm, curve in curves.items()}
    draw_accuracy(out_dir / "accuracy.png", curves, {name: summary[name] for name in ("PCA", "SpectralEmbedding")})
    if climbs:
        draw_inference(out_dir / "inference.png", climbs, len(labels))
    return {
        "n": len(labels), "pixels": pictures.shape[1], "device": place.name(), "summary": summary, "change": change, "climb": climbs,
        "curves": {arm: {key: values.tolist() for key, values in curve.items()} for arm, curve in curves.items()},
        "verdicts": [verdict(change[arm], key, arm) for arm in arms for key in ("knn_2", "knn", "silhouette_2")],
    }  # fmt: skip


def inference_table(climbs: dict[str, list[list[dict]]], n: int) -> str:
    """Per update, over all steps and seeds: how often F and its data term rose, by how much per token, and where the Dirichlet energy went."""
    rows = []
    for kind, runs in climbs.items():
        gain = {key: np.array([row[key] for run in runs for row in run if key in row]) / n for key in ("gain", "gain_data", "gain_log_det")}
        data, log_det = gain["gain_data"].mean(), gain["gain_log_det"].mean()
        rises = [f"{(gain[key] > 0).sum()} of {len(gain[key])}" for key in ("gain_data", "gain")]
        limit = f"ν < {-data / log_det:.3f} n" if data > 0 > log_det else f"ν > {-data / log_det:.3f} n" if data < 0 < log_det else "-"
        ends = [
            f"{np.mean([run[0][key] for run in runs]):.3f} → {np.mean([run[-1][key] for run in runs]):.3f}"
            for key in ("dirichlet", "dirichlet_first")
        ]
        rows.append([MINUS[kind], *rises, f"{data:+.3f}", f"{log_det:+.3f}", limit, *ends])
    headers = ["update", "steps that raise the data term", "steps that raise F", "change of the data term / n", "of the log det term / n"]
    headers += ["F would rise on average for", "Dirichlet energy, current graph", "on the first graph"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def report_of_another(config: UnrollConfig, out_dir: Path) -> str:
    """What the report in out_dir is of, in words; empty if there is none or it is of this very experiment (figures alone a killed one has left)."""
    name = "sweep" if config.sweep else "report"
    try:
        theirs = json.loads((out_dir / f"{name}.json").read_text(encoding="utf-8"))["config"]
        ours = json.loads(json.dumps(dataclasses.asdict(config)))
        other = sorted(key for key, value in ours.items() if key not in ("out_dir", "overwrite", "device") and theirs.get(key) != value)
        return f"other values of {', '.join(other)}" if other else ""
    except FileNotFoundError:
        return "something else" if (out_dir / f"{name}.md").exists() else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "something else"


def write_report(config: UnrollConfig, report: dict, seconds: float, out_dir: Path):
    """report.json and report.md."""
    command = shlex.join(["python", "unroll.py", *sys.argv[1:]])
    versions = {"torch": torch.__version__, "numpy": np.__version__, "scikit-learn": sklearn.__version__}
    origin = {"command": command, "config": dataclasses.asdict(config), "versions": versions, "seconds": round(seconds, 1)}
    write_file(out_dir / "report.json", (json.dumps(report | origin, indent=1, allow_nan=False) + "\n").encode())
    text = [f"# Pictures as tokens: {config.dataset}, n = {report['n']}, {config.steps} steps, {config.seeds} seed(s)", ""]
    text += [f"Latents of {config.latent_dim} channels, temperature {config.temperature:g}, eta {config.eta:g}, regulariser {config.regulariser:g};"]
    text += [f"k-NN with {config.neighbours} neighbours. Mean and 95 % t interval over seeds. No training.", "", table(report["summary"]), ""]
    text += [f"- {line}" for line in report["verdicts"]] + ["", "![latents](latents.png)", "![accuracy](accuracy.png)", "![steps](steps.gif)", ""]
    if report["climb"]:
        text += ["## Is it inference?", "", f"F is the lower bound with nu = n, beta = {config.beta:g}, at LN(X), on the graph before the step.", ""]
        text += [inference_table(report["climb"], report["n"]), "", "![inference](inference.png)", ""]
    text += [f"Made by `{command}` in {seconds:.0f} s on {report['device']}, torch {torch.__version__}, scikit-learn {sklearn.__version__}.", ""]
    write_file(out_dir / "report.md", "\n".join(text).encode())
    print("\n".join(line for line in text if not line.startswith("![")))


# ---------------------------------------------------------------------------------------------------------------------------------
# The sweep


def sweep(config: UnrollConfig, out_dir: Path):
    """k-NN accuracy after the steps over latent_dim, temperature and eta, for both arms, one seed that is never reported: sweep.md and sweep.json."""
    pictures, digits = load_pictures(config.dataset)
    chosen, labels = draw_pictures(pictures, digits, min(config.n, 1000), SWEEP_SEED)
    grid = list(itertools.product((16, 64, 256), (1.0, 0.3, 0.1, 0.05), (0.25, 0.5, 1.0)))
    rows = []
    for latent_dim, temperature, eta in tqdm(grid, leave=False, disable=not sys.stderr.isatty()):
        X = first_latents(chosen, latent_dim, SWEEP_SEED)
        row = {"latent_dim": latent_dim, "temperature": temperature, "eta": eta}
        for arm in ("A", "A-I"):
            seen = unroll(theory_block(latent_dim, arm, temperature, eta, config.regulariser), X, config.steps)
            for name, U in (("before", seen[0]), (arm, seen[-1])):
                U = U.numpy()
                row[f"{name}, 2 dims"], row[f"{name}, all"] = (knn_accuracy(part, labels, config.neighbours) for part in (U[:, :2], U))
        rows.append(row)
    columns = ["latent_dim", "temperature", "eta", *(f"{name}, {dims}" for dims in ("2 dims", "all") for name in ("before", "A", "A-I"))]
    cells = [[f"{row[c]:.3f}" if "," in c else f"{row[c]:g}" for c in columns] for row in rows]
    best = {arm: max(rows, key=lambda row: row[f"{arm}, 2 dims"]) for arm in ("A", "A-I")}
    text = [f"# k-NN accuracy after {config.steps} steps, {config.dataset}, n = {len(labels)}, one seed that no report uses", ""]
    text += [tabulate(cells, columns, tablefmt="github", disable_numparse=True), ""]
    for arm, row in best.items():
        constants = ", ".join(f"{key} {row[key]:g}" for key in ("latent_dim", "temperature", "eta"))
        text += [f"Highest in 2 dims for {MINUS[arm]}: {row[f'{arm}, 2 dims']:.3f} with {constants} (before: {row['before, 2 dims']:.3f})."]
    text += ["", f"Made by `{shlex.join(['python', 'unroll.py', *sys.argv[1:]])}`.", ""]
    write_file(out_dir / "sweep.json", (json.dumps({"config": dataclasses.asdict(config), "rows": rows}, indent=1) + "\n").encode())
    write_file(out_dir / "sweep.md", "\n".join(text).encode())
    print("\n".join(text))


def main(config: UnrollConfig):
    """The experiment, or the sweep. Raises InputError."""
    began, out_dir = time.perf_counter(), Path(config.out_dir)
    if (out_dir / "metrics.jsonl").exists():
        raise InputError(f"--out_dir={out_dir} holds a run of train.py: name another directory")
    if not config.overwrite and (what := report_of_another(config, out_dir)):
        raise InputError(f"--out_dir={out_dir} holds a report of {what}: --overwrite=True replaces it, or name another directory")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in --out_dir={out_dir}: {error.strerror}") from None
    if config.sweep:
        return sweep(config, out_dir)
    report = experiment(config, out_dir)
    write_report(config, report, time.perf_counter() - began, out_dir)
    print(f"{out_dir}: {', '.join(sorted(path.name for path in out_dir.iterdir()))}")


if __name__ == "__main__":
    with one_line_errors():
        main(command_line)
