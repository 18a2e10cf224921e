"""The repository root on the path, so that the tests import the modules from any way of starting pytest, and a small data set of characters."""

import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # here and in what the tests start: sums in one order, whatever the machine

import numpy as np
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is first imported


def sentences(characters: int) -> str:
    """English-like text from a small grammar; the same at every call."""
    draw = random.Random(2507)
    nouns, verbs = ["head", "token", "value", "graph", "margin"], ["sees", "mixes", "moves", "keeps"]
    text = ""
    while len(text) < characters:
        text += f"The {draw.choice(nouns)} {draw.choice(verbs)} a {draw.choice(nouns)}{draw.choice('.!?')}\n"
    return text[:characters]


@pytest.fixture(scope="session")
def tokens_dir(tmp_path_factory) -> Path:
    """A prepared data set: 18,000 characters to train on and 2,000 to validate on. No test changes it."""
    from dataset import write_tokens

    text, directory = sentences(20_000), tmp_path_factory.mktemp("sentences")
    characters = "".join(sorted(set(text)))
    ids = np.array([characters.index(character) for character in text])
    meta = {"vocab_size": len(characters), "tokenizer": {"type": "char", "characters": characters}}
    write_tokens(directory, ids[:18_000], ids[18_000:], meta)
    return directory
