"""Verbs `demo`, `doctor`, `plan` and `bench`."""

from typing import Annotated, Literal

from tyro.conf import arg

from tinylab.cli.output import Answer, table
from tinylab.config.counts import parse_count
from tinylab.errors import EXIT_FAILED, ConfigError


def demo_verb(
    run: str = "demo", tokens: str | None = None, again: Literal["nothing", "notebooks"] = "nothing"
) -> Answer:
    """Everything once on this machine, offline: corpus, tokenizer, shards, a two-stage run, scores, notebooks, report.

    Finished parts are not repeated; after an interrupt, the same command continues.

    Args:
        run: run folder, or a name below runs/.
        tokens: length of the run, such as 500K; default: that of the preset demo.
        again: "notebooks" executes them even if nothing changed.
    """
    from tinylab.demo import demo

    done = demo(run, tokens=None if tokens is None else parse_count(tokens, "--tokens"), again=again == "notebooks")
    rows = [{"part": p["part"], "seconds": p["seconds"], "what": p["what"]} for p in done["parts"]]
    look = "\n".join(f"  {what}: {path}" for what, path in done["look"].items())
    return Answer(done, f"{table(rows)}\n\nWhere to look:\n{look}\n  in a browser: make lab")


def doctor_verb(device: Literal["auto", "cpu", "cuda"] = "auto") -> Answer:
    """What works on this machine, what does not, and the remedy. Exit code 1 if something necessary does not work.

    Args:
        device: where attention backends and a forward/backward pass are tried.
    """
    from tinylab.doctor import doctor

    found = doctor(device)
    lines, width = [], max(len(f["check"]) for f in found["findings"])
    for finding in found["findings"]:
        lines.append(f"{finding['state']:<8} {finding['check'].ljust(width)}  {finding['found']}")
        if finding["remedy"]:
            lines.append(f"{'':<8} {'':<{width}}  remedy: {finding['remedy']}")
    problems = sum(f["state"] == "problem" for f in found["findings"])
    lines.append("everything that tinylab needs works" if found["healthy"] else f"problems: {problems}")
    return Answer(found, "\n".join(lines), 0 if found["healthy"] else EXIT_FAILED)


def plan_verb(
    preset: str | None = None,
    config: str | None = None,
    gpu: str = "a100-40g",
    gpus: int = 1,
    tokens: str | None = None,
    tokens_per_s: float | None = None,
    mfu: float | None = None,
    micro_batch: int | None = None,
    price: float | None = None,
) -> Answer:
    """Memory, speed, days and cost of a run before it starts.

    Args:
        preset: configuration to plan: tinyllama_1b (default), tinyllama_v1_1, tinyllama_120m, tiny, demo.
        config: TOML file to plan instead of a preset.
        gpu: a100-40g, a100-80g, h100, h200, …
        gpus: number of GPUs.
        tokens: length of the run, such as 3T; default: that of the configuration.
        tokens_per_s: measured speed of one GPU; default: computed from mfu.
        mfu: share of the peak by FLOPs formula F, such as 0.4; default: that of TinyLlama on an A100.
        micro_batch: sequences per forward pass and GPU; default: that of the configuration.
        price: price of one GPU hour, in any currency.
    """
    from tinylab.config.io import load_run
    from tinylab.planner import plan

    if preset is not None and config is not None:
        raise ConfigError("give --preset or --config, not both: each is a complete configuration")
    found = plan(
        load_run(config) if config else preset or "tinyllama_1b",
        gpu,
        gpus,
        None if tokens is None else parse_count(tokens, "--tokens"),
        tokens_per_s=tokens_per_s,
        mfu=mfu,
        price_per_gpu_hour=price,
        micro_batch=micro_batch,
    )
    return Answer(found, found.text())


def bench_verb(
    what: Annotated[
        Literal["train", "parity", "opening", "decoding", "checkpoint", "scaling"],
        arg(metavar="{train,parity,opening,decoding,checkpoint,scaling}"),
    ],
    /,
    preset: str | None = None,
    against: str = "transformers",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    windows: int = 5,
) -> Answer:
    """Measure tinylab and a named peer in turns.

    Args:
        what: train: tokens/s of full optimizer steps. parity: differences of logits and generated tokens. opening:
            seconds and peak memory to open a bf16 folder, each time in a fresh process. decoding: tokens/s of greedy
            decoding on the CPU. checkpoint: seconds that a save holds up the steps; the peer is torch's async_save.
            scaling: tokens/s of launched runs on 1 and 2 ranks by ddp and fsdp; the peer is one rank (notebook 09 has
            other layouts).
        preset: configuration of both sides; default: tinyllama_1b for opening, else tiny. Not for parity.
        against: the peer: transformers.
        device: where train, checkpoint and scaling are measured.
        windows: measurements of each side, in turns. Not for parity and scaling.
    """
    if against != "transformers":
        raise ConfigError(f"against must be transformers; found {against!r}")
    if what == "parity":
        from tinylab.bench.parity import bench_parity

        found = bench_parity()
        return Answer(found, f"against {found['peer']}\n\n{table(found['rows'])}", 0 if found["holds"] else EXIT_FAILED)
    if what == "scaling":
        from tinylab.bench.scaling import bench_scaling

        found = bench_scaling(preset or "tiny", device=device)
        return Answer(found, table(found))
    if what == "opening":
        from tinylab.bench.opening import bench_opening

        found = bench_opening(preset or "tinyllama_1b", windows)
        shape, rows = f"{found['bytes']:,} bytes", found["medians"]
    elif what == "decoding":
        from tinylab.bench.decoding import bench_decoding

        found = bench_decoding(preset or "tiny", windows)
        shape = f"{found['new_tokens']} tokens after {found['prompt_tokens']}, the same from both"
        rows = {name: {"tokens/s": row["median"]} for name, row in found["tokens_per_s"].items()}
    elif what == "checkpoint":
        from tinylab.bench.checkpoint import bench_checkpoint

        found = bench_checkpoint(preset or "tiny", windows, device=device)
        share = f"{found['share']:.2%} of a run of {found['steps']:,} steps with {found['saves']} checkpoints"
        shape, rows = f"{found['bytes']:,} bytes, {found['device']}, {share}", found["medians"]
    else:
        from tinylab.bench.train import bench_train

        found = bench_train(preset or "tiny", against, windows, device=device)
        shape = f"{found['seq_len']} tokens x {found['micro_batch']} sequences per pass, {found['device']}"
        rows = {
            name: {"precision": row["precision"], "tokens/s": row["median"], "best": row["best"]}
            for name, row in found["tokens_per_s"].items()
        }
    place = f"{found['threads']} threads, load {found['load_average']:.1f}"
    ratios = "\n".join(f"{name}: {value:.3f}" for name, value in found.items() if name.startswith("ratio"))
    sides = table([{"contender": name} | row for name, row in rows.items()])
    head = f"against {found['against']}\n{found['parameters']:,} parameters, {shape}\n{place}"
    return Answer(found, f"{head}\n\n{sides}\n\n{ratios}")
