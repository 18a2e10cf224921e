"""matplotlib without a screen, and pictures that are written whole or not at all."""

import io
from pathlib import Path

import matplotlib

from dataset import write_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def png(figure, dpi: int = 150) -> bytes:
    """The figure as a PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def save_figure(path: Path, figure, dpi: int = 150):
    """The same in a file. Raises InputError where it cannot be written."""
    write_file(path, png(figure, dpi))
