"""Where a run runs: process, device, precision, and what the device could do at best."""

import os
import re
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import InputError

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets. MFU is left out where the device is not listed.
PEAK_FLOPS = {
    "H100 NVL": 835e12,
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10G": 70e12, "A10": 125e12, "V100": 125e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


class Place(NamedTuple):
    """Process (rank of world), device and autocast dtype of a run; `peak` is the device's bf16 FLOP/s, None where unknown."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    peak: float | None

    def autocast(self):
        """Autocast to `dtype`; nothing at all for float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def name(self) -> str:
        """The device in words, for reports."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads" if self.device.type == "cpu" else self.device.type


def find_place(device: str, dtype: str, distributed: bool = True) -> Place:
    """Keys --device and --dtype -> Place; under torchrun it joins the process group.

    `distributed=False` leaves the processes of torchrun independent: each has its own device and is rank 0 of 1. Raises InputError for a device
    that is not there and for float16 outside CUDA.
    """
    kind, _, index = device.partition(":")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        kind = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[kind]:
        raise InputError(f"--device={device}: this machine or this torch build has no {kind}; --device=auto takes what is there")
    found, peak = torch.device(kind), None
    if kind == "cuda":
        count = torch.cuda.device_count()
        number = int(index) if index else int(os.environ.get("LOCAL_RANK", 0)) % count
        if number >= count:
            raise InputError(f"--device={device}: this machine has {count} CUDA device(s), counted from 0")
        found = torch.device(kind, number)
        torch.cuda.set_device(found)
        torch.set_float32_matmul_precision("high")
        peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", torch.cuda.get_device_name(found))), None)
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "float16" if kind == "cuda" and not torch.cuda.is_bf16_supported() else "bfloat16"
    if dtype == "float16" and kind != "cuda":
        raise InputError(f"--dtype=float16 needs a gradient scaler, which is for CUDA alone: use float32 or bfloat16 on {kind}")
    rank, world = 0, 1
    if distributed and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=30))
        rank, world = dist.get_rank(), dist.get_world_size()
    return Place(rank, world, found, getattr(torch, dtype), peak)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 on a CPU, where kernels run in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def seed_generators(seed: int, place: Place):
    """Seeds torch's global generators. On a CPU that device's alone: torch.manual_seed would note down, at each step, a call for a CUDA to come."""
    torch.default_generator.manual_seed(seed) if place.device.type == "cpu" else torch.manual_seed(seed)


def say(message: str):
    """One line to the person, without tearing a progress bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


def warn_if_long(flops: float, place: Place):
    """On a CPU: says how long so many floating-point operations take at the rate of a matrix product measured now, when that is over half an hour."""
    if place.device.type != "cpu":
        return
    a, seconds = torch.randn(512, 512), []
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    hours = flops * min(seconds) / (2 * 512**3) / 3600 / place.world
    if hours > 0.5:
        length = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
        say(f"note: at least {length} on this CPU; config/quick.py and config/quick_laplacian.py are for CPUs and take a minute each")
