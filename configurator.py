"""Config files and --key=value options -> one typed, checked, frozen dataclass.

A config file is a Python file of plain assignments, nanoGPT's habit. It is read in a namespace of its own, every value is checked
against the dataclass exactly as an option is, and the options given on the command line win over the files:

    python train.py config/quick.py --max_iters=200

A file may start from another one: `base = "quick.py"` (a path relative to the file) is read first, then the file's own lines.
Config files are Python: they are as trusted as train.py itself, so run only those you have read.

This module imports neither torch nor numpy, so --help and a misspelt key answer at once.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import runpy
import signal
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

try:
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec
except ModuleNotFoundError as error:
    print(f"error: the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, which value, what to do. Ends in exit status 2."""


VARIANTS = {
    "weight_init": ("gpt2", "unrolled"),
    "head_combine": ("concat", "product"),
    "attention_kernel": ("softmax", "softmax1", "rbf", "student_t"),
}


# ---------------------------------------------------------------------------------------------------------------------------------
# The keys of a training run. Names and defaults are nanoGPT's where it has the key. The trailing comments are what --help prints.


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT: python train.py [config/FILE.py ...] [--key=value ...]"""

    # input and output
    out_dir: str = "out"  # directory of the run: last/, best/, metrics.jsonl
    overwrite: bool = False  # start anew in an out_dir that already holds a run
    eval_interval: int = 2000  # steps between evaluations (and checkpoints)
    eval_tokens: int = 0  # validation tokens read per evaluation, evenly spaced; 0: the whole validation set
    log_interval: int = 1  # steps between two lines of the log
    probe_interval: int = 0  # steps between two rows of OUT_DIR/probe.jsonl: attention against the theory (probe.py); 0: never
    eval_only: bool = False  # evaluate once and stop
    always_save_checkpoint: bool = True  # write last/ at every evaluation; False: only at the end and when interrupted
    init_from: str = "scratch"  # scratch, resume, OUT_DIR/best, nanoGPT's PATH/ckpt.pt, gpt2[-medium, -large, -xl], or a transformers folder
    wandb_log: bool = False  # log to Weights & Biases as well
    wandb_project: str = "graph-diffusion"  # project name there
    wandb_run_name: str = ""  # run name there; empty: out_dir
    # data
    dataset: str = "openwebtext"  # a name under data/, or a directory with train.bin, val.bin and meta.json
    gradient_accumulation_steps: int = 40  # batches per optimizer step, over all processes
    batch_size: int = 12  # sequences per batch
    block_size: int = 1024  # tokens per sequence of text (T)
    # pictures
    patch_size: int = 2  # side of a token in pixels
    crop_pad: int = 2  # augmentation: random shifts by up to so many pixels
    flip: bool = True  # augmentation: random horizontal flips
    # model
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels (C)
    vocab_size: int = 0  # rows of the token table; 0: the tokenizer's size
    dropout: float = 0.0  # on embeddings, attention weights and both branches
    bias: bool = False  # biases in Linear and LayerNorm
    # graph diffusion: y = lambda (A v - alpha v) instead of y = A v
    diffusion: bool = False  # A - I instead of A
    diffusion_alpha: float = 1.0  # weight of the identity
    diffusion_lambda: float = 1.0  # scale of the whole
    diffusion_heads: tuple[int, ...] = ()  # trailing heads that diffuse: empty all, 2 in each layer, 0,0,2,4 by layer
    diffusion_learned: bool = False  # alpha is a parameter of each diffusing head, which starts at diffusion_alpha
    # what else the theory suggests (variants.py)
    weight_init: str = "gpt2"  # gpt2, or unrolled: the theory's identity weights on top of GPT-2's noise
    head_combine: str = "concat"  # concat, or product: heads weighted by their precisions, a product of Gaussian experts
    attention_kernel: str = "softmax"  # softmax, softmax1 (1 more in the denominator), rbf (exp of -1/2 squared distance), student_t (T x T stored)
    # MAP log-barrier: prior_lambda x mean barrier(log |det de_i/du_i|) on top of the cross-entropy
    prior_lambda: float = 0.0  # its weight; 0: off
    prior_where: str = "embedding"  # embedding: a small attention of its own on the embeddings; attention: the model's own heads
    prior_form: str = "softplus"  # logdet (the paper's, unbounded), softplus (acts near the boundary alone) or square (both sides of det = 1)
    prior_anneal: bool = False  # prior_lambda falls to 0 along half a cosine over max_iters
    prior_detach: bool = False  # control: the barrier's gradient does not reach the embeddings (attention: nor q, k, v)
    prior_dim: int = 8  # embedding: channels of the latent variables (p)
    prior_energy: float = 0.0  # embedding: sigma of the energy |e|^2 / (2 sigma^2 p), which makes it the full prior; 0: margin only
    prior_tied: bool = False  # embedding: W_q = W_k
    prior_normalise: bool = False  # embedding: sees embeddings of mean 0 and variance 1
    prior_positions: int = 8  # attention: (position, head) pairs drawn per sequence and layer
    prior_layers: tuple[int, ...] = ()  # attention: layers that carry the barrier, counted from 0; empty: all
    embed_noise: float = 0.0  # control: Gaussian noise on the embeddings in training, in units of their RMS
    label_smoothing: float = 0.0  # control: share of the target's probability that is spread over all tokens
    # AdamW
    learning_rate: float = 6e-4  # after the warm-up
    max_iters: int = 600000  # optimizer steps
    weight_decay: float = 1e-1  # on matrices only
    beta1: float = 0.9  # AdamW's first moment
    beta2: float = 0.95  # AdamW's second moment
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    # schedule
    decay_lr: bool = True  # warm-up and cosine; False: constant
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # end of the cosine; None: max_iters
    min_lr: float | None = None  # at the end of the cosine; None: learning_rate / 10
    # where and how it runs
    seed: int = 1337  # of the initial weights, the data order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16 (autocast; weights stay float32)
    parallel: str = "ddp"  # several GPUs: ddp (a whole model on each) or fsdp (parameters, gradients and optimizer sharded)
    compile: bool | None = None  # torch.compile; None: on CUDA
    cuda_graph: bool | None = None  # the whole step as one CUDA graph; None: on one GPU, up to 64 k tokens a step

    @property
    def plain_attention(self) -> bool:
        """Whether the attention is model.py's own, without anything of variants.py."""
        return (self.head_combine, self.attention_kernel, self.diffusion_learned) == ("concat", "softmax", False)

    def check(self) -> "TrainConfig":
        """Cross-checks between keys. Returns self. Raises InputError with the key, its value and the way out."""

        def need(ok: bool, message: str):
            if not ok:
                raise InputError(message)

        counts = ("eval_interval", "log_interval", "gradient_accumulation_steps", "batch_size", "block_size", "patch_size")
        for key in (*counts, "n_layer", "n_head", "n_embd"):
            need(getattr(self, key) >= 1, f"--{key}={getattr(self, key)} must be at least 1")
        for key in ("eval_tokens", "vocab_size", "max_iters", "warmup_iters", "seed", "weight_decay", "grad_clip", "crop_pad", "probe_interval"):
            need(getattr(self, key) >= 0, f"--{key}={getattr(self, key)} must not be negative")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            finite = not isinstance(value, float) or abs(value) < float("inf")
            need(finite, f"--{field.name}={value} must be a finite number")
        tokens = self.batch_size * self.gradient_accumulation_steps * self.block_size
        need(tokens < 2**31, f"--batch_size={self.batch_size} makes a step of {tokens:,} tokens: lower it (or accumulation, or --block_size)")
        need(0 <= self.dropout < 1, f"--dropout={self.dropout} must be in [0, 1)")
        need(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, f"--beta1={self.beta1} and --beta2={self.beta2} must be in [0, 1)")
        need(self.learning_rate > 0, f"--learning_rate={self.learning_rate} must be positive")
        need(self.seed < 2**63, f"--seed={self.seed} must be below 2**63")
        need(
            self.n_embd % self.n_head == 0,
            f"--n_embd={self.n_embd} is not divisible by --n_head={self.n_head}: each head has n_embd / n_head channels",
        )
        if self.init_from in ("scratch", "resume"):  # else the sizes come from a checkpoint, and are checked when it is read
            check_diffusion_heads(self.diffusion_heads, self.n_layer, self.n_head)
        keys_of_arm = ("diffusion_alpha", "diffusion_lambda", "diffusion_heads", "diffusion_learned")
        changed = [key for key in keys_of_arm if getattr(self, key) != getattr(TrainConfig, key)]
        need(self.diffusion or not changed, f"--{'/--'.join(changed)} has no effect without --diffusion=True")
        self._check_prior(need)
        if self.decay_lr:
            end = self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters
            need(
                self.warmup_iters < end or self.max_iters == 0,
                f"--warmup_iters={self.warmup_iters} must be shorter than the schedule of {end} steps (lr_decay_iters, else max_iters): "
                f"add --warmup_iters={end // 10}",
            )
            if self.min_lr is not None:
                need(0 <= self.min_lr <= self.learning_rate, f"--min_lr={self.min_lr} must lie between 0 and --learning_rate={self.learning_rate}")
        for key, known in VARIANTS.items():
            need(getattr(self, key) in known, f"--{key}={getattr(self, key)} must be {' or '.join(known)}")
        given = self.init_from not in ("scratch", "resume")
        need(not given or self.weight_init == "gpt2", f"--weight_init={self.weight_init} has no effect: the weights are those of {self.init_from}")
        need(self.dtype in ("auto", "float32", "bfloat16", "float16"), f"--dtype={self.dtype} must be auto, float32, bfloat16 or float16")
        need(
            re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None,
            f"--device={self.device} must be auto, cpu, cuda, cuda:N or mps",
        )
        need(self.parallel in ("ddp", "fsdp"), f"--parallel={self.parallel} must be ddp or fsdp")
        need(self.out_dir != "", "--out_dir is empty: name a directory")
        return self

    def _check_prior(self, need):
        """The keys of the barrier and its controls, for `check`."""
        need(self.prior_lambda >= 0, f"--prior_lambda={self.prior_lambda} must be 0 (off) or above")
        need(self.prior_where in ("embedding", "attention"), f"--prior_where={self.prior_where} must be embedding or attention")
        need(self.prior_form in ("logdet", "softplus", "square"), f"--prior_form={self.prior_form} must be logdet, softplus or square")
        need(1 <= self.prior_dim <= 128, f"--prior_dim={self.prior_dim} must be between 1 and 128")
        need(self.prior_energy >= 0, f"--prior_energy={self.prior_energy} must be 0 (margin only) or above")
        need(self.prior_positions >= 1, f"--prior_positions={self.prior_positions} must be at least 1")
        need(self.embed_noise >= 0, f"--embed_noise={self.embed_noise} must be 0 (off) or above")
        need(0 <= self.label_smoothing < 1, f"--label_smoothing={self.label_smoothing} must be in [0, 1)")
        layers = self.prior_layers
        need(
            all(0 <= layer < self.n_layer for layer in layers) and len(set(layers)) == len(layers),
            f"--prior_layers={','.join(map(str, layers))} must be different numbers from 0 to n_layer - 1 = {self.n_layer - 1}",
        )
        changed = [key for key in field_names(TrainConfig) if key.startswith("prior_") and getattr(self, key) != getattr(TrainConfig, key)]
        need(self.prior_lambda > 0 or not changed, f"--{'/--'.join(changed)} has no effect without --prior_lambda=NUMBER")
        places = {"embedding": ("prior_dim", "prior_energy", "prior_tied", "prior_normalise"), "attention": ("prior_positions", "prior_layers")}
        places.pop(self.prior_where, None)
        idle = [key for keys in places.values() for key in keys if key in changed]
        need(not idle, f"--{'/--'.join(idle)} has no effect with --prior_where={self.prior_where}")
        need(
            self.plain_attention or self.prior_where == "embedding",
            "--prior_where=attention needs --attention_kernel=softmax, --head_combine=concat and --diffusion_learned=False",
        )


def check_diffusion_heads(heads: tuple[int, ...], n_layer: int, n_head: int):
    """Raises InputError unless `heads` is empty, one number, or one number per layer, each in 0..n_head."""
    if len(heads) not in (0, 1, n_layer):
        raise InputError(f"--diffusion_heads={','.join(map(str, heads))} has {len(heads)} numbers: give one, or one per layer ({n_layer})")
    if any(not 0 <= h <= n_head for h in heads):
        raise InputError(f"--diffusion_heads={','.join(map(str, heads))} must lie between 0 and n_head={n_head}")


# ---------------------------------------------------------------------------------------------------------------------------------
# Parsing

# nanoGPT keys that have no place here, and what to do instead
RETIRED = {
    "eval_iters": "evaluation reads a fixed part of the validation set: use --eval_tokens (0 = all of it)",
    "backend": "the backend follows from the device (nccl on CUDA, gloo elsewhere)",
}


def _bool_and_int_tuple_rule(type_info) -> PrimitiveConstructorSpec | None:
    """tyro rule: true/false in any case, and 0,0,2,4 for a tuple of int."""
    if type_info.type is bool:
        words = {"true": True, "1": True, "false": False, "0": False}

        def to_bool(strings):
            if strings[0].lower() not in words:
                raise ValueError(f"{strings[0]!r} is neither True nor False")
            return words[strings[0].lower()]

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{True,False}",
            instance_from_str=to_bool,
            is_instance=lambda x: isinstance(x, bool),
            str_from_instance=lambda x: [str(x)],
        )
    if type_info.type == tuple[int, ...]:
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT[,INT...]",
            instance_from_str=lambda strings: tuple(int(part) for part in strings[0].split(",") if part.strip()),
            is_instance=lambda x: isinstance(x, tuple) and all(isinstance(i, int) for i in x),
            str_from_instance=lambda x: [",".join(map(str, x))],
        )
    return None


_registry = ConstructorRegistry()
_registry.primitive_rule(_bool_and_int_tuple_rule)


def _parse(cls, args: list[str], origin: str):
    """Parses --key=value strings with tyro. Its boxed errors become one line that starts with `origin`; --help prints and exits."""

    def attempt(some: list[str]):
        with contextlib.redirect_stderr(io.StringIO()), _registry:
            return tyro.cli(cls, args=some, config=(tyro.conf.FlagConversionOff,), use_underscores=True)

    try:
        return attempt(args)
    except SystemExit as stop:
        if not stop.code:
            raise
    for arg in args:  # which one it was: keys are known to exist, so a value must be of the wrong type
        try:
            attempt([arg])
        except SystemExit:
            key, _, value = arg[2:].partition("=")
            wanted = typing.get_type_hints(cls)[key]
            wanted = getattr(wanted, "__name__", wanted) if isinstance(wanted, type) else str(wanted).replace("tuple[int, ...]", "int[,int...]")
            raise InputError(f"{origin}--{key}={value[:200]} is not of type {wanted}") from None
    raise InputError(f"{origin}cannot parse {' '.join(args)[:200]}")


def check_keys(keys: list[str], known: list[str], origin: str = ""):
    """Raises InputError for the first of `keys` that is not in `known`, with the nearest known one."""
    for key in keys:
        if key in known:
            continue
        if key in RETIRED:
            raise InputError(f"{origin}key {key!r} is not used here: {RETIRED[key]}")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"perhaps you meant {near[0]!r}" if near else "--help lists the keys"
        raise InputError(f"{origin}unknown key {key!r}; {hint}")


def field_names(cls) -> list[str]:
    """The keys of a config dataclass, in order."""
    return [field.name for field in dataclasses.fields(cls)]


def read_config_file(path: str | os.PathLike, _open: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, object]]]:
    """The plain values that a config file assigns: [(file, values)], that of its `base` first.

    Names with a leading underscore, modules, functions and classes are the file's own business. Raises InputError when the file is missing, fails,
    includes itself, or assigns what no option could say.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    if path.resolve() in _open:
        raise InputError(f"config file {path} includes itself through `base`")
    try:
        namespace = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever the user's file raises, its name and the line matter, not our stack
        where = getattr(error, "lineno", None)
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == str(path):
                where = traceback.tb_lineno
            traceback = traceback.tb_next
        raise InputError(f"config file {path}{f', line {where}' if where else ''}: {type(error).__name__}: {error}".replace("\n", " ")) from None
    values = {key: value for key, value in namespace.items() if not key.startswith("_") and not isinstance(value, types.ModuleType | type)}
    values = {key: value for key, value in values.items() if not isinstance(value, types.FunctionType)}
    for key, value in values.items():
        parts = value if isinstance(value, tuple | list) else [value]
        if not all(isinstance(part, bool | int | float | str | None) for part in parts):
            raise InputError(f"config file {path}: {key} is a {type(value).__name__}: it must be a plain number, text, truth value, or tuple of them")
    layers = []
    if "base" in values:
        layers = read_config_file(path.parent / str(values.pop("base")), (*_open, path.resolve()))
    return [*layers, (path, values)]


def _as_option(key: str, value) -> str:
    return f"--{key}={','.join(map(str, value)) if isinstance(value, tuple | list) else value}"


def split_arguments(args: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Command line -> (words that are not options, [(key, value), ...]).

    `--key=value` and `--key value` are the same; a hyphen in a key is an underscore. Raises InputError for a key without a value.
    """
    words, options = [], []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            words.append(arg)
            continue
        key, equals, value = arg[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--{key} needs a value: --{key}=VALUE")
            value = rest.pop(0)
        options.append((key.replace("-", "_"), value))
    return words, options


def build(cls, files: list[str], options: list[tuple[str, str]]):
    """Files, then options, into one checked instance of the dataclass `cls`. Raises InputError."""
    known = field_names(cls)
    args = []
    for file in files:
        for path, values in read_config_file(file):
            origin = f"config file {path}: "
            if cls is not TrainConfig and any(key not in known and key in field_names(TrainConfig) for key in values):
                raise InputError(f"{origin}this is a config of train.py; --help says what this script takes, as --out_dir of a run")
            check_keys(list(values), known, origin)
            file_args = [_as_option(key, value) for key, value in values.items()]
            _parse(cls, file_args, origin)  # alone first, so that a wrong type names the file
            args += file_args
    check_keys([key for key, _ in options], known)
    config = _parse(cls, args + [f"--{key}={value}" for key, value in options], "")
    for key, value in vars(config).items():
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= c <= "\udfff" for c in value)):  # neither a file's name nor JSON can hold it
            raise InputError(f"--{key}={value[:200]} is no text: it has a zero byte or is not UTF-8")
    return config.check() if hasattr(config, "check") else config


def quit_on_interrupt():
    """From here on Ctrl-C ends the process with one line and status 130, also while torch is being imported; train.py's loop has its own way."""

    def leave(number, _):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + number)  # files are written whole or not at all, so there is nothing to tidy up

    signal.signal(signal.SIGINT, leave)


def configure(cls, args: list[str] | None = None):
    """The command line of a script -> one checked, frozen `cls`. Prints the help and exits 0 for --help. Raises InputError."""
    if args is None:
        quit_on_interrupt()
    args = sys.argv[1:] if args is None else list(args)
    if "--help" in args or "-h" in args:
        _parse(cls, ["--help"], "")
    words, options = split_arguments(args)
    for word in words:
        if not word.endswith(".py"):
            raise InputError(f"{word!r} is neither an option (--key=value) nor a config file (FILE.py)")
    return build(cls, words, options)


@contextlib.contextmanager
def one_line_errors():
    """Around a script's main: an InputError, and what the operating system refuses, prints as one line on stderr and exits with status 2."""
    try:
        yield
    except BrokenPipeError:  # `| head` has read enough: nothing more to say, nor to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (InputError, OSError) as error:
        text = str(error) if isinstance(error, InputError) else f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        # a value or a file's name may hold anything: line feeds, terminal codes, half a surrogate pair
        print("error: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text), file=sys.stderr)
        sys.exit(2)
