"""Jobs of several ranks, forked from one process: `python rank_jobs.py < jobs` prints one JSON answer per job and rank.

A job is a JSON object a line: `do` (a function below), `ranks`, and what that function takes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # these three would be imported in every child
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

from tinylab.checkpoint.building import build_model
from tinylab.checkpoint.state import build_state
from tinylab.config.architecture import Model
from tinylab.config.schema import Data, Optimizer, Parallel, RunConfig
from tinylab.config.stages import Schedule, Stage
from tinylab.dist.context import Context, open_context
from tinylab.dist.parallel import whole_tensor
from tinylab.errors import TinylabError
from tinylab.model.loss import MicroBatch, loss_sum
from tinylab.model.precision import resolve_precision
from tinylab.training.step import train_step

AWKWARD = Model(vocab_size=61, n_layer=2, d_model=20, n_head=5, n_kv_head=1, d_ff=52, seq_len=12)
"""Sizes that no number of ranks divides evenly, and whose slices end within a vector register."""
LARGE = Model(vocab_size=1000, n_layer=12, d_model=512, n_head=8, n_kv_head=8, d_ff=1536, seq_len=32)
"""166 MB of fp32 weights, the largest tensor 6 MB."""
SEQUENCES = 6


def configuration(model: Model, **parallel: Any) -> RunConfig:
    tokens = SEQUENCES * model.seq_len
    return RunConfig(
        model=model,
        seed=5,
        data=Data(vocab_size=model.vocab_size),
        stages=(Stage(tokens=3 * tokens, batch_tokens=tokens),),
        schedule=Schedule(warmup_tokens=tokens),
        optimizer=Optimizer(lr=1e-2, clip_norm=0.5),
        parallel=Parallel(**{"device": "cpu", "threads": 1, "precision": "fp32", "micro_batch": 2} | parallel),
    )


def digest(model: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for _, weight in model.named_parameters():
        found.update(whole_tensor(weight.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()


def first_weights(context: Context, config: RunConfig) -> Any:
    model = build_model(config, context, None)
    own = sum(getattr(w, "to_local", lambda w=w: w)().numel() for w in model.parameters())
    return {"digest": digest(model), "own": own, "head is embed": model.head.weight is model.embed.weight}


def train(context: Context, config: RunConfig, poison: bool = False) -> Any:
    """Three steps on fixed samples: hex losses and norms, digest of the weights."""
    state = build_state(config, context, None)
    precision = resolve_precision(context.device, config.parallel.precision)
    share, results = SEQUENCES // context.world, []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, config.model.vocab_size, (SEQUENCES, config.model.seq_len + 1), generator=generator)
        own = ids[share * context.rank : share * (context.rank + 1)].split(config.parallel.micro_batch)
        batches = [MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None) for rows in own]
        if poison and step == 2 and context.rank == context.world - 1:
            state.loss = lambda model, batch: loss_sum(model, batch) * torch.inf
        targets = SEQUENCES * config.model.seq_len
        try:
            found = train_step(state, batches, targets, lr=1e-2, clip_norm=0.5, precision=precision, context=context)
        except TinylabError:
            results.append(["refused"])
            break
        results.append([found.loss.hex(), found.grad_norm.hex()])
    return {"steps": results, "digest": digest(state.model)}


def peak_growth(context: Context, config: RunConfig) -> Any:
    """Bytes of memory that building the model took at its peak, beside the bytes of the whole model."""
    small = replace(configuration(AWKWARD), parallel=config.parallel)
    build_model(small, context, None)  # imports and buffers of the exchange
    Path("/proc/self/clear_refs").write_text("5")  # the peak restarts from what is used now
    before = _memory("VmRSS")
    model = build_model(config, context, None)
    return {"peak": _memory("VmHWM") - before, "whole": 4 * sum(w.numel() for w in model.parameters())}


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def run(job: dict[str, Any], folder: str) -> list[Any]:
    """What each rank of a job answers, or its error's text."""
    ranks = job.pop("ranks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            os.environ.update({"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)})
            machine = job.pop("machines", [ranks] * ranks)
            os.environ.update({"LOCAL_WORLD_SIZE": str(machine[rank])})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            try:
                what = globals()[job.pop("do")]
                more = {"poison": True} if job.pop("poison", False) else {}
                shape = replace(globals()[job.pop("model", "AWKWARD")], tie_embeddings=job.pop("tied", False))
                config = configuration(shape, **job)
                with open_context(config.parallel) as context:
                    answer = what(context, config, **more)
            except TinylabError as error:
                answer = str(error)
            Path(folder, str(rank)).write_text(json.dumps(answer))
            os._exit(0)
        pids.append(pid)
    failed = [rank for rank, pid in enumerate(pids) if os.waitpid(pid, 0)[1]]
    if failed:
        return [f"rank {rank} died" for rank in failed]
    return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as place:
            print(json.dumps(run(json.loads(line), place)), flush=True)
