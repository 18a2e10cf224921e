"""Trains a GPT on one CPU, one GPU or many, with A or with A - I.

    python train.py config/shakespeare_char_laplacian.py --learning_rate=2e-3
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_laplacian.py

Everything random is a pure function of (seed, step): the batch, dropout, and the initial weights of the seed alone. So resuming needs only the
step, evaluation cannot disturb training, and two arms with one seed see the same data and start from the same weights.

From top to bottom: the program (data, model, optimizer and the compiled step, built once), then the loop (one seed of that program).
compare.py builds one program per arm and runs the loop once per seed.
"""

from configurator import InputError, TrainConfig, configure, one_line_errors

if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(TrainConfig)

import dataclasses
import functools
import math
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import fused_cpu
from dataset import Pictures, Tokens, load, prepare_if_missing
from metrics import EVALUATION, Metrics
from model import GPT, GPTConfig, ViT, ViTConfig
from operators import make_known
from optimizer import learning_rate, make_optimizer, reset, set_learning_rate
from parallel import distribute, gather, gradient_sync, reshard, whole
from place import Place, find_place, say, seed_generators, warn_if_long
from signals import Interrupted, Signals

DROPOUT_STREAM = 2  # SeedSequence keys (seed, stream, step, rank): dataset.py's data order is stream 1
EVAL_TOKENS = 8192  # tokens of a validation batch at least, however small the training batch is
GRAPH_TOKENS = 65536  # tokens a step up to which launching kernels takes so long that a CUDA graph pays
# keys that an exact continuation must not change
CONTINUED = {"max_iters", "lr_decay_iters", "learning_rate", "min_lr", "decay_lr", "warmup_iters", "batch_size", "gradient_accumulation_steps"}
CONTINUED |= {"weight_decay", "beta1", "beta2", "grad_clip", "dtype", "flip", "crop_pad", "embed_noise", "label_smoothing"}
CONTINUED |= {field.name for field in dataclasses.fields(TrainConfig) if field.name.startswith("prior_")}
SCHEDULE = {"learning_rate", "min_lr", "decay_lr", "warmup_iters", "lr_decay_iters"}  # keys that a step reads anew
SMALLEST_SCALE = 2.0**-24  # of float16 losses: below it the smallest float16 number stands for the whole loss, and no step can succeed any more


class Diverged(Exception):
    """The loss or the gradient of `step` is no longer finite. `norms` is what layer_norms gives, `last` says which checkpoint is from before it,
    `signal` is the number of a signal that came meanwhile."""

    def __init__(self, step: int, what: str, norms: str, last: str, signal: int | None = None):
        super().__init__(f"step {step}: {what}, so training stops; norms of the parameters (gradients): {norms}; {last}")
        self.step, self.signal = step, signal


# ---------------------------------------------------------------------------------------------------------------------------------
# The program: what does not depend on the seed


class Program(NamedTuple):
    """A config made ready to run. `step(seed, i)` does optimizer step i (from 0) and returns (loss, gradient norm), tensors on the device.

    With a barrier it returns three more: the barrier, the margins, and where their determinants are negative (of the last micro-batch).
    """

    config: TrainConfig
    place: Place
    data: Tokens | Pictures
    model: GPT | ViT
    weights: dict | None  # given by init_from, None for init_weights(seed)
    prior: torch.nn.Module | None  # the parameters that only training needs, of prior.EmbeddingPrior
    tokens: int  # of the global batch
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: Callable
    evaluate: Callable
    mode: str


def rescheduled(program: Program, **changes) -> Program:
    """The same program with other values of keys that the loop reads, or a step anew (SCHEDULE): nothing is compiled again."""
    config = dataclasses.replace(program.config, **changes)
    return program._replace(config=config, step=functools.partial(program.step, schedule=config))


def make_model(config: TrainConfig, data: Tokens | Pictures) -> GPT | ViT:
    """A GPT for tokens, a ViT for pictures, on the CPU."""
    if isinstance(data, Pictures):
        kind, sizes = ViTConfig, {"image_size": data.image_size, "n_classes": data.n_classes}
    else:
        kind, sizes = GPTConfig, {"vocab_size": config.vocab_size or data.vocab_size}
        of_pictures = [key for key in ("patch_size", "crop_pad", "flip") if getattr(config, key) != getattr(TrainConfig, key)]
        if of_pictures:
            raise InputError(f"--{'/--'.join(of_pictures)} has no effect on text, which --dataset={config.dataset} is: take it out")
        if sizes["vocab_size"] < data.vocab_size:
            raise InputError(f"--vocab_size={config.vocab_size} is smaller than the {data.vocab_size} tokens of --dataset={config.dataset}")
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(kind) if field.name not in sizes}
    return (ViT if kind is ViTConfig else GPT)(kind(**shared, **sizes))


def check_prior(config: TrainConfig, pictures: bool):
    """Raises InputError for a barrier that is not for data of this kind."""
    if config.prior_lambda and config.prior_where == "embedding" and pictures:
        raise InputError("--prior_where=embedding is a causal model of text: use --prior_where=attention for pictures")


def make_objective(config: TrainConfig, model: GPT | ViT, place: Place) -> torch.nn.Module:
    """The model itself, or prior.Objective around it when a key asks for more than its cross-entropy. Raises InputError."""
    if not (config.prior_lambda or config.embed_noise or config.label_smoothing):
        return model
    if place.world > 1 and config.parallel == "fsdp":
        raise InputError("--parallel=fsdp shards what prior_lambda, embed_noise and label_smoothing look at: use --parallel=ddp")
    check_prior(config, isinstance(model, ViT))
    from prior import Objective

    return Objective(model, config).to(place.device)


def build(config: TrainConfig, place: Place, data: Tokens | Pictures | None = None) -> Program:
    """Data (unless given), model, optimizer, and the step compiled as far as the machine allows. Raises InputError for unusable data or keys."""
    if config.probe_interval and config.parallel == "fsdp" and place.world > 1:
        raise InputError(f"--probe_interval={config.probe_interval} needs whole models: use --parallel=ddp, or evaluate.py --probe afterwards")
    data = data or load(config, place.device)
    config, weights = checkpoint.starting_weights(config, "pictures" if isinstance(data, Pictures) else "text")
    model = make_model(config, data).to(place.device)
    compiled = place.device.type == "cuda" if config.compile is None else config.compile
    if place.device.type == "cpu" and not compiled:  # the compiler has its own way to all that
        fused_cpu.accelerate(model)
    cast_weights = None
    if place.device.type == "cuda" and compiled and place.dtype != torch.float32 and not config.label_smoothing:  # which needs the logits
        import fused  # needs Triton, which torch brings along on CUDA alone

        fused.accelerate(model, place.dtype, shadows=place.world == 1 or config.parallel != "fsdp", whole=place.world == 1)
        cast_weights = fused.cast_weights
    # The global batch has the same rows for any number of processes; this one takes its share, in micro-batches of at most batch_size rows.
    rows = config.batch_size * config.gradient_accumulation_steps
    objective = make_objective(config, model, place)  # the model alone, or one that adds to its loss
    network, extra = distribute(objective, config.parallel, place, rows, compiled), objective is not model
    prior = objective.prior if extra else None
    mine = np.array_split(np.arange(rows), place.world)[place.rank]
    micro_batches = np.array_split(mine, math.ceil(len(mine) / config.batch_size))
    drawn = [torch.from_numpy(data.draw(0, 0, len(micro_batch))).to(data.home) for micro_batch in micro_batches]

    tokens = rows * data.block_size
    graphed = place.device.type == "cuda" and place.world == 1 and compiled and place.dtype != torch.float16
    if config.cuda_graph and not graphed:
        raise InputError("--cuda_graph=True needs one CUDA device, compile, and bfloat16 or float32")
    graphed = graphed and (tokens <= GRAPH_TOKENS if config.cuda_graph is None else config.cuda_graph)
    optimizer = make_optimizer(config, objective, graphed)
    scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
    parameters = list(model.parameters())

    def loss_of(x, y):  # a batch -> its mean loss (what else an Objective says); the logits stay inside, where the compiler can fuse them
        with place.autocast():
            return network(x, y) if extra else network(x, y)[1:]

    def scores_of(x, y):  # a batch -> mean loss; for pictures also the numbers of labels that are first and among the first five
        with place.autocast():
            logits, loss = model(x, y)
        if isinstance(model, GPT):
            return loss[None]
        hits = logits.topk(min(5, logits.size(-1))).indices == y[:, None]
        return torch.stack((loss, hits[:, 0].sum(), hits.sum()))

    if compiled and place.world == 1:  # else the blocks are compiled one by one
        loss_of, scores_of = torch.compile(loss_of, dynamic=False), torch.compile(scores_of, dynamic=False)

    def update():
        """Forward, backward, clipping and AdamW on the examples that `drawn` names."""
        optimizer.zero_grad(set_to_none=True)
        if cast_weights:
            cast_weights(model)
        total, penalty, margins = torch.zeros((), device=place.device), 0, []
        for i, examples in enumerate(drawn):
            share = len(examples) / rows
            with gradient_sync(network, on=i == len(drawn) - 1):
                loss, *seen = loss_of(*data.batch(examples))
                loss = loss * share
                scaler.scale(loss * place.world).backward()  # the sum over processes is divided by their number
            total += seen[0] * share if seen else loss.detach()  # the cross-entropy, whatever else is minimised
            if len(seen) > 1:
                penalty = penalty + seen[1] * share
                margins = [penalty, *seen[2:]]
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        if prior is not None:  # apart, so that its gradients cannot shorten the model's steps
            torch.nn.utils.clip_grad_norm_(prior.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        return total, whole(norm), *margins

    run = update
    if compiled:  # on weights that the loop overwrites; compilation happens here, where it can still be given up
        try:
            make_known()
            update()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            warnings.warn(f"torch.compile FAILED here; going on without it, slower: {reason}", stacklevel=2)
            return build(dataclasses.replace(config, compile=False, cuda_graph=False), place, data)
    if graphed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            update()
            update()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = update()

        def run():
            graph.replay()
            return results

    def step(seed: int, i: int, schedule: TrainConfig = config):
        batch = data.draw(seed, i, rows)
        for examples, micro_batch in zip(drawn, micro_batches):
            fresh = torch.from_numpy(batch[micro_batch])
            examples.copy_(fresh.pin_memory() if examples.is_cuda else fresh, non_blocking=True)  # else the CPU waits here for the last step's end
        key = np.random.SeedSequence([seed, DROPOUT_STREAM, i, place.rank]).generate_state(1, np.uint64)[0]
        seed_generators(int(key >> 1), place)  # the global ones serve dropout, and with the keys of prior.py what is drawn there, first
        set_learning_rate(optimizer, learning_rate(schedule, i))
        if extra:
            objective.set_step(i)
        if not model.training:  # a walk over all modules
            model.train()
        return run()

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """val_loss, and top1 and top5 for pictures, over the validation set or eval_tokens of it: summed, reduced over processes, divided once."""
        model.eval()
        if cast_weights:
            cast_weights(model)
        batches = data.validation(max(config.batch_size, EVAL_TOKENS // data.block_size), config.eval_tokens, place.rank, place.world)
        parts = [(scores_of(x, y), count) for x, y, count in batches]
        reshard(network)
        names = EVALUATION[:1] if isinstance(model, GPT) else EVALUATION
        total = torch.zeros(len(names) + 1, dtype=torch.float64)
        for scores, count in zip(torch.stack([scores for scores, _ in parts]).cpu().double() if parts else [], [count for _, count in parts]):
            scores[0] *= count  # a mean, the others are counts
            if count:
                total += torch.cat((scores, torch.tensor([count])))
        if place.world > 1:
            total = total.to(place.device)
            dist.all_reduce(total)
        return {name: float(value / total[-1]) for name, value in zip(names, total)}

    mode = "eager" if not compiled else "compiled, one CUDA graph per step" if graphed else "compiled"
    return Program(config, place, data, model, weights, prior, tokens, optimizer, scaler, step, evaluate, mode)


# ---------------------------------------------------------------------------------------------------------------------------------
# The loop: one seed of a program


def start_state(program: Program, seed: int, out_dir: Path) -> tuple[int, dict]:
    """Puts the initial state into the program's tensors: init_from=resume > given weights > init_weights(seed).

    Returns the step to begin at and checkpoint.json of the run to continue ({} for a new one). Raises InputError.
    """
    config, model, last = program.config, program.model, out_dir / "last"
    if config.init_from == "resume":
        meta = checkpoint.readable(last)
        if (meta["kind"] == "pictures") != isinstance(model, ViT):
            raise InputError(f"{last} was trained on {meta['kind']}, --dataset={config.dataset} is of the other kind")
        if meta["data"] != program.data.checksum:
            words = f"the checksums of --dataset={config.dataset} differ, as they do when it was prepared anew from another source"
            raise InputError(f"{last} was trained on other data: {words}")
        for key, ours in dataclasses.asdict(model.config).items():
            theirs = meta["model"].get(key, getattr(type(model.config), key, None))  # a key younger than the checkpoint had its default then
            theirs = tuple(theirs) if isinstance(ours, tuple) else theirs
            if ours != theirs:
                raise InputError(f"{last} was trained with {key}={theirs}, this run has {key}={ours}: resume with the same config")
        if meta["config"]["seed"] != seed:
            raise InputError(f"{last} was trained with --seed={meta['config']['seed']}: with --seed={seed} it would be another run")
        now = {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()}  # as in the JSON
        changed = [f"{key} {old} -> {now[key]}" for key, old in meta["config"].items() if key in CONTINUED and now[key] != old]
        if changed and program.place.rank == 0:
            say(f"note: resuming with other values of {', '.join(changed)}: from here on not what an undisturbed run would be")
        checkpoint.load_into(last, meta, model, program.optimizer, program.prior)
        if meta["scaler"]:  # empty when the run so far was not in float16
            program.scaler.load_state_dict(meta["scaler"])
        return meta["step"], meta
    reset(program.optimizer)
    if program.scaler.is_enabled():  # as it was made: another seed may have changed it
        program.scaler.load_state_dict(torch.amp.GradScaler(program.place.device.type).state_dict())
    weights = program.weights
    if weights is None:
        fresh = type(model)(model.config, seed)  # on the CPU, so that a sharded model gets the same weights
        weights = dict(fresh.named_parameters())
    checkpoint.copy_weights(model, weights, config.init_from)
    if program.prior is not None:
        program.prior.init_weights(seed)
    return 0, {}


def layer_norms(model) -> str:
    """Norm of the parameters and, in brackets, of the gradients of each layer, as they are now. All processes of a run must call it."""
    sums = {}
    for name, p in model.named_parameters():
        layer = ".".join(name.split(".")[1:3] if ".h." in name else name.split(".")[-2:-1])  # h.0, wte, ln_f
        found = sums.setdefault(layer, [0.0, 0.0])
        for i, tensor in enumerate((p, p.grad)):
            found[i] += 0.0 if tensor is None else float(whole(tensor.detach().float().norm())) ** 2
    return ", ".join(f"{layer} {own**0.5:.3g} ({gradient**0.5:.3g})" for layer, (own, gradient) in sums.items())


def margins_of(seen: list, place: Place) -> dict[str, float]:
    """The log's figures of what a step returned about the barrier, over all processes (all must call it); the percentile is the mean of theirs."""
    from prior import statistics

    parts = gather(statistics(*seen), place)
    reduce = {"barrier": sum, "margin_min": min}  # each process has summed its own rows' share of the barrier
    return {name: reduce.get(name, lambda values: sum(values) / len(parts))([part[name] for part in parts]) for name in parts[0]}


def train(program: Program, seed: int, out_dir: Path, save: bool = True, quiet: bool = False, fingerprint: dict | None = None) -> dict:
    """Trains one seed of `program` to max_iters; logs to out_dir/metrics.jsonl, checkpoints in out_dir/last and out_dir/best.

    Without `save` there is a checkpoint only when a signal or an error of a file ends the run early. A `fingerprint`, JSON of a caller, is put into
    them. Returns step, best_val_loss, best_step, the last evaluation (val_loss; for pictures top1, top5), curve [[step, *evaluation], ...] of the
    whole run, resumed_at (the step; None for a run from its start), and since then seconds (all of it), ms (per iteration, without evaluation) and
    tokens_per_s (None without an iteration); signal is the number of one that came too late to stop this run, or None. Raises Diverged,
    Interrupted, InputError.
    """
    config, place, model = program.config, program.place, program.model
    main = place.rank == 0
    began = time.perf_counter()
    step, resumed = start_state(program, seed, out_dir)
    progress = {key: resumed.get(key) for key in ("val_loss", "best_val_loss", "best_step", "evaluated")}  # evaluated: the last step that was
    progress["curve"] = list(resumed.get("curve", []))  # none in checkpoints from before it was kept
    if main and not quiet and not config.eval_only and resumed and step >= config.max_iters and progress["evaluated"] == step:
        say(f"note: nothing to do, {out_dir / 'last'} is at step {step} of --max_iters={config.max_iters}: raise it")
    metrics = None
    if main and not config.eval_only:
        wandb = {"project": config.wandb_project, "name": config.wandb_run_name or str(out_dir), "config": dataclasses.asdict(config)}
        evaluated = -1 if progress["evaluated"] is None else progress["evaluated"]
        metrics = Metrics(out_dir, step if resumed else None, config.overwrite, wandb if config.wandb_log else None, evaluated)
        if config.probe_interval or (resumed and (out_dir / "probe.jsonl").exists()):
            import probe

            probed = probe.start_record(out_dir, step if resumed else None)
        if resumed:
            checkpoint.settle(out_dir / "last", resumed)
        else:  # a replaced run must not be taken for this one
            (out_dir / "probe.jsonl").unlink(missing_ok=True)
            checkpoint.remove(out_dir / "last")
            checkpoint.remove(out_dir / "best")
    saved_at = resumed.get("step")  # of OUT_DIR/last
    onward = "the same command continues" if fingerprint else "--init_from=resume continues"

    def record(**values):
        if metrics:
            metrics.record(**values)

    def write(name: str, early: bool = False):
        nonlocal saved_at
        if (save or early) and not config.eval_only:
            entries = {"config": dataclasses.asdict(config) | {"seed": seed}, "data": program.data.checksum, "tokenizer": program.data.tokenizer}
            entries |= {"generators": "batches and dropout are functions of (seed, step)", "scaler": program.scaler.state_dict(), **progress}
            entries |= {"fingerprint": fingerprint} if fingerprint else {}
            continues = {"optimizer": program.optimizer, "prior": program.prior} if name == "last" else {"optimizer": None}
            checkpoint.save(out_dir / name, model, step=step, main=main, **continues, **entries)
            saved_at = step if name == "last" else saved_at

    def diverged(at: int, what: str) -> Diverged:
        there = f"{out_dir / 'last'} of step {saved_at} is from before it" if saved_at is not None else "there is no checkpoint from before it"
        return Diverged(at, what, layer_norms(model), there, next(iter(signals.caught), None))

    signals = Signals(program.optimizer, impatient=place.world == 1 and program.data.device.type == "cpu")
    # loss and gradient norm of the steps not looked at yet: looking waits for the GPU
    losses = torch.zeros(max(1, min(config.log_interval, config.eval_interval, config.max_iters)), device=place.device)
    norms, unread, done, train_seconds, since = torch.zeros_like(losses), 0, 0, 0.0, began
    scores = dict(zip(EVALUATION, progress["curve"][-1][1:])) if progress["curve"] else {}
    seen_last, underflow = [], False
    bar = tqdm(total=config.max_iters, initial=step, disable=not main or not sys.stderr.isatty(), smoothing=0.05, leave=False)
    try:
        while True:
            at_eval = step % config.eval_interval == 0 or step == config.max_iters
            at_probe = config.probe_interval > 0 and (step % config.probe_interval == 0 or step == config.max_iters)
            at_log = step % config.log_interval == 0 or at_eval
            stop = signals.caught[:1]
            if place.world > 1 and at_log:  # all processes leave at the same step
                stop = sum(gather(signals.caught, place), [])[:1]
            elif place.world > 1:
                stop = []

            if unread and (at_log or stop):
                mine = losses[:unread].clone()
                if place.world > 1:
                    dist.all_reduce(mine)  # each process has summed its own rows
                seen = list(zip(mine.tolist(), norms[:unread].tolist()))
                seconds = time.perf_counter() - since
                for i, (loss, norm) in enumerate(seen):
                    if not math.isfinite(loss) or not (math.isfinite(norm) or program.scaler.is_enabled()):  # the scaler skips such a step
                        raise diverged(step - unread + i + 1, f"loss {loss}, gradient norm {norm}: not finite")
                if program.scaler.is_enabled() and (scale := program.scaler.get_scale()) < 1:
                    if scale < SMALLEST_SCALE:
                        raise diverged(step, f"the float16 scale fell to {scale:g}: the gradients are not finite at any scale")
                    if main and not underflow:
                        print(f"warning: step {step}: the float16 scale fell to {scale:g}, steps are skipped: try bfloat16", file=sys.stderr)
                    underflow = True
                loss = sum(loss for loss, _ in seen) / unread
                ms, rate, lr = seconds / unread * 1e3, unread * program.tokens / seconds, learning_rate(config, step - 1)
                mfu = rate * model.flops_per_token() / (place.peak * place.world) if place.peak else None
                margins = margins_of(seen_last, place) if seen_last else {}
                record(step=step, train_loss=loss, ms=round(ms, 4), tokens_per_s=round(rate), lr=lr, grad_norm=norm, mfu=mfu, **margins)
                done, train_seconds, unread = done + unread, train_seconds + seconds, 0
                if main and not quiet and step % config.log_interval == 0:
                    left = timedelta(seconds=round((config.max_iters - step) * train_seconds / done))
                    more = "".join(f"{name.replace('_', ' ')} {value:.4g}, " for name, value in margins.items()) + (f"mfu {mfu:.1%}, " if mfu else "")
                    say(f"iter {step}: loss {loss:.4f}, {ms:.2f} ms, {rate:,.0f} tok/s, {more}left {left}")

            if stop and (step < config.max_iters or signals.broken_off):  # an evaluation that is due is made up for after resuming
                write("last", early=True)
                saved = "" if config.eval_only else f", saved in {out_dir / 'last'}; {onward}"
                raise Interrupted(stop[0], f"stopped at step {step}{saved}")
            if config.eval_only or (at_eval and progress["evaluated"] != step):
                found = signals.attempt(program.evaluate)
                if found is None:
                    continue
                scores = found
                if not math.isfinite(scores["val_loss"]):
                    raise diverged(step, f"validation loss {scores['val_loss']}: not finite")
                record(step=step, **scores)  # before the progress: what could not be recorded is evaluated again after resuming
                progress |= {"val_loss": scores["val_loss"], "evaluated": step}
                if progress["best_val_loss"] is None or progress["val_loss"] < progress["best_val_loss"]:
                    progress |= {"best_val_loss": progress["val_loss"], "best_step": step}
                progress["curve"].append([step, *scores.values()])
                if main and not quiet:
                    more = "".join(f", {name} {share:.2%}" for name, share in scores.items() if name != "val_loss")
                    say(f"step {step}: val loss {progress['val_loss']:.4f}{more}")
                if progress["best_step"] == step > 0:
                    write("best")
                if step > 0 and (config.always_save_checkpoint or step == config.max_iters):
                    write("last")
            if at_probe and metrics and step > probed and bool(torch.isfinite(losses[:unread]).all()):  # else the next log line ends the run
                paused = time.perf_counter()
                found = signals.attempt(probe.measure, model, program.data)
                if found is None:
                    continue
                probe.append(out_dir, step, found)
                since += time.perf_counter() - paused
            if step >= config.max_iters or config.eval_only:
                break
            if unread == 0:
                since = time.perf_counter()
            found = signals.attempt(program.step, seed, step)
            if found is None:
                continue
            losses[unread], norms[unread], *seen_last = found
            step, unread = step + 1, unread + 1
            bar.update()
    except (InputError, BrokenPipeError) as error:  # a file cannot be written or read, or nobody reads stdout: what is there is saved if it can be
        if place.world > 1 or config.eval_only or saved_at == step:
            raise
        try:
            write("last", early=True)
        except InputError:
            raise error from None
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"{error}; stopped at step {step}, saved in {out_dir / 'last'}; {onward}") from None
    finally:
        signals.close()
        bar.close()
        if metrics:
            metrics.close()
    speed = {"ms": train_seconds / done * 1e3, "tokens_per_s": done * program.tokens / train_seconds} if done else {"ms": None, "tokens_per_s": None}
    result = {"step": step, **progress, **scores, "resumed_at": resumed.get("step"), "signal": next(iter(signals.caught), None)}
    return result | {"seconds": time.perf_counter() - began, **speed}


def main(config: TrainConfig) -> int:
    """One run from the command line. Returns the exit status: 0, 1 for divergence, 128 + the signal's number when interrupted. Raises InputError."""
    if not config.eval_only and (Path(config.out_dir) / "result.json").exists():
        raise InputError(f"--out_dir={config.out_dir} is a finished cell of compare.py: choose another")
    place = find_place(config.device, config.dtype)
    prepare_if_missing(config.dataset)
    try:
        return run(config, place)
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for CUDA alone
        if place.world > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"process {place.rank} of {place.world} lost the others, one of which may say why: {reason}") from None
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"out of memory, lower --batch_size (and raise --gradient_accumulation_steps) or the model's size: {reason}") from None


def run(config: TrainConfig, place: Place) -> int:
    """What main does once the place and the data are there."""
    program = build(config, place)
    if place.rank == 0:
        plain = (config.diffusion_alpha, config.diffusion_lambda) == (1, 1)
        arm = "A" if not config.diffusion else "A - I" if plain else f"{config.diffusion_lambda:g} (A - {config.diffusion_alpha:g} I)"
        arm += f", barrier {config.prior_lambda:g} x {config.prior_form} ({config.prior_where})" if config.prior_lambda else ""
        say(f"{program.model.num_params() / 1e6:.2f} M parameters, arm {arm}; {place.name()} x {place.world}, {place.dtype}, {program.mode}")
        if not config.eval_only:
            warn_if_long(program.model.flops_per_token() * config.max_iters * program.tokens, place)
        theirs, ours = checkpoint.starting_tokenizer(config.init_from), getattr(program.data, "tokenizer", None)
        if theirs and ours and theirs != ours:
            say(
                f"note: the tokens of {config.init_from} ({theirs.get('type')}) are not those of --dataset={config.dataset} ({ours.get('type')}): "
                "the same numbers mean other things, so the token table starts from nonsense"
            )
    status = 0
    try:
        result = train(program, config.seed, Path(config.out_dir))
    except Diverged as error:
        status = 1
        if place.rank == 0:
            lower = "--learning_rate, or a barrier with a lower --prior_lambda" if config.prior_lambda else "--learning_rate"
            print(f"error: {error}. Try a lower {lower}", file=sys.stderr)
    except Interrupted as error:
        status = 128 + error.signal
        if place.rank == 0:
            say(str(error))
    if place.world > 1:  # all processes come here or none: after any other exception this one must not wait for the others
        dist.destroy_process_group()
    if place.rank == 0 and not config.eval_only and status == 0:
        say(f"done: best val loss {result['best_val_loss']:.4f} at step {result['best_step']}, last {result['val_loss']:.4f}; see {config.out_dir}")
    return status


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(command_line))
