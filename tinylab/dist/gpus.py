"""The GPUs of this machine as a launch sees them, without a CUDA context in this process."""

from __future__ import annotations

import os
import subprocess


def gpus_here() -> int:
    """How many GPUs of this machine this process may use."""
    import torch

    return torch.cuda.device_count()


def full_gpus() -> list[str]:
    """A sentence for each GPU of which other processes use more than half, among those that CUDA_VISIBLE_DEVICES
    leaves; empty where nvidia-smi does not answer."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    sentences = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else []:
        index, uuid, name, used, total = (word.strip() for word in line.split(","))
        if visible is not None and not {index, uuid} & set(visible.split(",")):
            continue
        if used.isdecimal() and total.isdecimal() and int(used) > int(total) / 2:  # `[N/A]` where it is not known
            sentences.append(
                f"GPU {index} ({name}) already has {int(used):,} of {int(total):,} MiB in use: the run may not fit. "
                "nvidia-smi names the processes; CUDA_VISIBLE_DEVICES chooses other GPUs"
            )
    return sentences
