"""Text from a checkpoint, which is all it needs: the tokenizer is in it, so the data folder may be gone. Classes, if it is one of pictures.

    python sample.py --out_dir=out-quick
    python sample.py --out_dir=out-quick --start="The head" --num_samples=3 --temperature=0.5
    python sample.py --out_dir=out-gpt2 --start=FILE:prompt.txt --max_new_tokens=200
    python sample.py --out_dir=out-quick-vision --pictures=FILE,FOLDER

The text appears while it is made. Each sample has a generator of its own, from the seed and its number: sample k is the same however many follow.

Keys and values of the tokens read so far are kept, so a new token costs one position instead of the whole context. They hold positions, and cannot
slide: when block_size tokens are read, the last half of them is read again, once, into an empty cache, and the model goes on from there. (nanoGPT
slides its window by one and reads all of it again for each token.) So beyond block_size a token sees between block_size / 2 and block_size tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import InputError, TrainConfig, configure, one_line_errors


@dataclass(frozen=True)
class SampleConfig:
    """Text from a checkpoint: python sample.py --out_dir=OUT_DIR [--start=TEXT] [--key=value ...]"""

    out_dir: str = "out"  # directory of a run, or a checkpoint in it
    which: str = "best"  # the run's checkpoint: best or last
    start: str = ""  # the prompt, or FILE:PATH to read it; empty: a newline (character models) or <|endoftext|> (gpt2)
    pictures: str = ""  # for a model of pictures: files and folders, comma-separated; empty: the first validation pictures
    num_samples: int = 10  # texts, each after the same prompt; or pictures
    max_new_tokens: int = 500  # tokens per text, besides the prompt
    temperature: float = 0.8  # divides the logits: below 1 bolder, above 1 more random; 0: always the most probable token
    top_k: int = 200  # draw from the k most probable tokens only; 0: from all
    seed: int = 1337  # of the draws
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16: of weights and cache; auto is float32 on the CPU

    def check(self) -> "SampleConfig":
        """Raises InputError for a value out of range; returns self."""
        for key in ("num_samples", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise InputError(f"--{key}={getattr(self, key)} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature={self.temperature} must be a finite number, 0 (greedy) or above")
        if self.top_k < 0:
            raise InputError(f"--top_k={self.top_k} must be 0 (all tokens) or above")
        if self.which not in ("best", "last"):
            raise InputError(f"--which={self.which} must be best or last")
        TrainConfig(out_dir=self.out_dir, seed=self.seed, device=self.device, dtype=self.dtype).check()  # the same keys, the same limits
        return self


if __name__ == "__main__":  # before torch is imported, so that --help and a misspelt key answer at once
    with one_line_errors():
        command_line = configure(SampleConfig)

import codecs
import math
import sys

import numpy as np
import torch

import onednn
from checkpoint import load_model
from model import GPT, KVCache
from place import find_place

SAMPLE_STREAM = 3  # SeedSequence keys (seed, stream, sample): dataset.py's data order is stream 1, train.py's dropout is stream 2


def candidates(logits, temperature: float, top_k: int):
    """The logits (V,) that may be drawn and their indices as one (2, k) float64 tensor on their device: all that must come to the CPU.

    k is top_k, 1 for temperature 0, and V for top_k = 0.
    """
    k = 1 if temperature == 0 else min(top_k or len(logits), len(logits))
    values, indices = logits.topk(k) if k < len(logits) else (logits, torch.arange(k, device=logits.device))
    return torch.stack((values.double(), indices.double()))


def choose(candidates, temperature: float, generator: torch.Generator) -> int:
    """Draws from softmax(logits / temperature) over `candidates` (2, k), on the CPU in float64, or takes the largest for temperature 0.

    Raises InputError when the logits are not finite, as those of a run that diverged.
    """
    logits, indices = candidates.cpu()
    top = float(logits.max())
    if not math.isfinite(top):
        raise InputError(f"the model's largest logit is {top}: the weights are of a run that diverged, choose another checkpoint")
    if len(logits) == 1:
        return int(indices[0])
    probabilities = torch.softmax((logits - top) / temperature, dim=0)  # 0 at most, so that a tiny temperature cannot overflow
    return int(indices[torch.multinomial(probabilities, 1, generator=generator)])


class StaticCache(KVCache):
    """A cache whose next position is in a tensor, so that reading one token is the same work whatever came before: one CUDA graph."""

    def __init__(self, *args):
        super().__init__(*args)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.entries.device)
        self.span = torch.arange(self.entries.size(-2), device=self.entries.device)
        self.mask = self.entries.new_zeros(1, len(self.span))

    def positions(self, T: int):
        if T > 1:
            return super().positions(T)
        self.mask.zero_().masked_fill_(self.span > self.position, -math.inf)  # once per token, for all layers
        return self.position

    def extend(self, layer: int, k, v):
        if k.size(2) > 1:
            return super().extend(layer, k, v)
        keys, values = self.entries[layer]
        keys.index_copy_(2, self.position, k)
        values.index_copy_(2, self.position, v)
        return keys, values, self.mask, False


def one_token_of_model(model: GPT, token, cache: StaticCache):
    """(B, 1) ids at cache.position, which stays, as does cache.length -> logits (B, vocab_size)."""
    logits = model(token, cache=cache)[0][:, 0]
    cache.length -= 1
    return logits


def one_token(model: GPT):
    """The same by decode.py's kernels, or that, where they do not suit the model."""
    try:
        import decode  # needs Triton, which torch brings along on CUDA
    except ImportError:
        return one_token_of_model
    return decode.read_token if decode.suits(model) else one_token_of_model


def one_token_graph(model: GPT, cache: StaticCache, finish):
    """Captures one token -> finish(logits (V,)) for batch 1 as a CUDA graph. Returns read(token) -> that tensor on the CPU, overwritten each time.

    The copies from and to the CPU are in the graph: a token is one launch and one wait.
    """
    step, asked = one_token(model), torch.zeros(2, dtype=torch.int64, pin_memory=True)  # token and position
    here = asked.to(cache.position.device)
    token, cache.position = here[:1].view(1, 1), here[1:]

    def forward():
        here.copy_(asked, non_blocking=True)
        return finish(step(model, token, cache)[0])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward()
        result = forward()
    torch.cuda.current_stream().wait_stream(side)
    answer = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answer.copy_(forward(), non_blocking=True)
    ask = asked.numpy()  # the same memory; writing a tensor's element takes microseconds

    def read(value: int):
        ask[:] = value, cache.length
        cache.length += 1
        graph.replay()
        torch.cuda.current_stream().synchronize()
        return answer

    return read


@torch.inference_mode()
def generate(model: GPT, prompt_ids, max_new_tokens: int, temperature: float, top_k: int, generator: torch.Generator, vocabulary_size: int):
    """Yields max_new_tokens token ids after prompt_ids (one at least; the last block_size of them are read), with a cache (see the top of the file).

    The ids are below vocabulary_size: rows of the table beyond the tokenizer's are padding and never drawn. Drawing is on the CPU in float64,
    whatever the model's device, so `generator` is a CPU generator. The model must be in eval mode. On CUDA one token is one CUDA graph. Raises
    InputError for logits not finite.
    """
    block_size, weight = model.config.block_size, model.transformer.wte.weight
    graphed = weight.device.type == "cuda" and max_new_tokens > 1
    cache = (StaticCache if graphed else KVCache)(model.config, 1, weight.device, weight.dtype)

    def finish(logits):
        return candidates(logits[:vocabulary_size], temperature, top_k)

    read_one = one_token_graph(model, cache, finish) if graphed else None
    context = list(prompt_ids)[-block_size:]  # what the cache holds, and the tokens still to read
    unread = context
    for _ in range(max_new_tokens):
        if len(context) > block_size:
            context = unread = context[-max(1, block_size // 2) :]
            cache.length = 0
        if graphed and len(unread) == 1:
            drawable = read_one(unread[0])
        else:
            drawable = finish(model(torch.tensor([unread], device=weight.device), cache=cache)[0][0, 0])  # logits (1, 1, vocab_size)
        token = choose(drawable, temperature, generator)
        yield token
        context.append(token)
        unread = [token]


def read_start(start: str) -> str:
    """The prompt that --start gives or names. Raises InputError for a file that cannot be read or is not UTF-8."""
    if not start.startswith("FILE:"):
        return start
    try:
        return Path(start.removeprefix("FILE:")).read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except OSError as error:
        raise InputError(f"--start={start}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--start={start}: not UTF-8 at byte {error.start}, save the file as UTF-8") from None


def main(config: SampleConfig):
    """Prints num_samples texts, each followed by a line of dashes. Raises InputError."""
    text = read_start(config.start)
    place = find_place(config.device, config.dtype, distributed=False)
    model, tokenizer, meta = load_model(Path(config.out_dir), config.which)
    model.to(place.device, place.dtype)
    if place.device.type == "cpu":
        onednn.accelerate(model)
    if tokenizer is None:
        from classify import classify

        if config.start:
            raise InputError(f"--start is for text, and --out_dir={config.out_dir} holds a model of pictures: use --pictures=FILE,FOLDER,...")
        return classify(model, meta, config.pictures, config.num_samples, Path(config.out_dir) / "sheet.png", place)
    if config.pictures:
        raise InputError(f"--pictures is for a model of pictures, and --out_dir={config.out_dir} holds one of text")
    vocabulary_size = len(tokenizer.characters) if tokenizer.type == "char" else tokenizer.bpe.n_vocab
    prompt_ids = tokenizer.encode(text or ("\n" if tokenizer.type == "char" else "<|endoftext|>"))
    if len(prompt_ids) > model.config.block_size:
        print(f"note: the prompt has {len(prompt_ids)} tokens, the model reads the last {model.config.block_size} of them", file=sys.stderr)
    for sample in range(config.num_samples):
        key = np.random.SeedSequence([config.seed, SAMPLE_STREAM, sample]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key >> 1))
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a BPE token may end within a character
        print(text, end="", flush=True)
        for token in generate(model, prompt_ids, config.max_new_tokens, config.temperature, config.top_k, generator, vocabulary_size):
            print(decoder.decode(tokenizer.decode_bytes(token)), end="", flush=True)
        print(decoder.decode(b"", final=True) + "\n" + "-" * 15, flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks
    with one_line_errors():
        main(command_line)
