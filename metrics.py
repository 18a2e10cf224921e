"""The log of a run: OUT_DIR/metrics.jsonl, one JSON object a line, and Weights & Biases when asked for."""

import contextlib
import errno
import fcntl
import json
import math
import os
from pathlib import Path

from configurator import InputError

EVALUATION = ("val_loss", "top1", "top5")  # the last two of pictures alone
KEYS = ("step", "train_loss", *EVALUATION, "ms", "tokens_per_s", "lr", "grad_norm", "mfu")
BARRIER = ("barrier", "margin_min", "margin_mean", "margin_p05", "negative_share")  # in the rows of runs with a log-barrier


class Metrics:
    """Rows with the keys of KEYS, null where a row does not have the value; each row is on disk when `record` returns.

    train_loss: mean over the steps since the last row (nats); val_loss: mean over the validation set;
    top1, top5: share of validation pictures whose class is the first, or among the first five, of the model; ms: per iteration, without evaluation.
    barrier: mean penalty of the row's last step, before its weight; margin_*: log |det| of its last micro-batch, minimum, mean and 5th percentile;
    negative_share: share of its determinants that are negative.
    The open file is locked, so that two trainings cannot share a directory; a dead process holds no lock. (A file system without locks gives none.)
    """

    def __init__(
        self, out_dir: Path, resume_at: int | None = None, overwrite: bool = False, wandb_options: dict | None = None, evaluated: int | None = None
    ):
        """`resume_at` keeps the rows up to that step and drops later ones; None starts a new log, over an old one only with `overwrite`.

        `evaluated` is the last step whose evaluation the checkpoint knows of: that of a later one is dropped too, since it will be made again.

        `wandb_options` are the arguments of wandb.init. Raises InputError: directory not writable, in use, or holding a run; wandb not working.
        """
        path = out_dir / "metrics.jsonl"
        with contextlib.ExitStack() as undo:  # a refusal changes nothing and leaves no lock
            try:
                out_dir.mkdir(parents=True, exist_ok=True)
                self.path, self.file = path, undo.enter_context(open(path, "ab+", buffering=0))
            except OSError as error:
                raise InputError(f"cannot write in --out_dir={out_dir}: {error.strerror}") from None
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another training is writing to --out_dir={out_dir}: choose another") from None
            except OSError:
                pass
            taken = path.stat().st_size > 0 or any((out_dir / name / "checkpoint.json").exists() for name in ("last", "best"))
            if taken and resume_at is None and not overwrite:
                resumable = "" if not (self.path.parent / "last").is_dir() else "--init_from=resume continues it, "
                raise InputError(f"--out_dir={out_dir} holds a run: {resumable}--overwrite=True replaces it, or choose another")
            self.wandb = None
            if wandb_options is not None:
                try:
                    import wandb

                    self.wandb = wandb.init(dir=out_dir, **wandb_options)
                except Exception as error:  # wandb's errors have no common class
                    hint = "pip install wandb; WANDB_MODE=offline needs no account"
                    raise InputError(f"--wandb_log=True: {type(error).__name__}: {error} ({hint})") from None
            self.file.seek(0)
            keep = 0
            for line in self.file.read().splitlines(keepends=True) if resume_at is not None else []:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else {"step": math.inf}
                    again = evaluated is not None and row["step"] > evaluated and row.get("val_loss") is not None
                    if row["step"] > resume_at or again:
                        break
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(f"{path} is damaged at byte {keep}: move it away to continue the run without its log") from None
                keep += len(line)
            self.file.truncate(keep)
            undo.pop_all()

    def record(self, **values):
        """Appends one row; a number that is not finite becomes null. Raises InputError when it cannot; the file then ends with the row before."""
        row = {key: values.get(key) for key in KEYS} | {key: values[key] for key in BARRIER if key in values}
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        content, before = (json.dumps(row, allow_nan=False) + "\n").encode(), None
        try:
            if os.fstat(self.file.fileno()).st_nlink == 0:
                raise FileNotFoundError(errno.ENOENT, "it was removed while the training ran")
            before = self.file.seek(0, os.SEEK_END)
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                if before is not None:
                    self.file.truncate(before)
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from None
        if self.wandb:
            self.wandb.log(values)

    def close(self):
        """Closes the file, which releases the lock, and ends the wandb run."""
        with contextlib.suppress(OSError):  # nothing is buffered
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(out_dir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    lines = (Path(out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
