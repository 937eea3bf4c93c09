"""Verbs `prepare` and `batch`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from tinylab.cli.output import Answer, table
from tinylab.config import presets
from tinylab.config.counts import format_bytes, format_count
from tinylab.config.io import load_run, override
from tinylab.config.schema import Data, Source
from tinylab.errors import ConfigError
from tinylab.runs.folder import Run


def prepare_verb(
    path: Annotated[str | None, arg(metavar="FOLDER")] = None,
    /,
    preset: str = "tiny",
    config: str | None = None,
    source: UseAppendAction[tuple[str, ...]] = (),
    limit_mb: float | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    set: UseAppendAction[tuple[str, ...]] = (),
) -> Answer:
    """Turn corpora into a tokenizer and token shards, or find them done.

    Args:
        path: folder of the shards; default: one below data/ in TINYLAB_HOME, named by a digest of the configuration.
        preset: configuration whose data section is taken.
        config: TOML file to take it from, instead of a preset.
        source: NAME=CORPUS instead of the preset's sources (once per source); CORPUS is local:prose, local:code,
            files:GLOB or hf:NAME.
        limit_mb: at most this many megabytes of text from each source.
        tokenizer: train, a folder or file that holds a tokenizer, or a Hub id (owner/name@revision).
        vocab_size: entries of the tokenizer.
        set: override of any key of the configuration, such as data.boundary=bos (once per key).
    """
    run = load_run(config) if config else presets.preset(preset)
    if set:
        run = override(run, set)
    data = _with_options(run.data, source, limit_mb, tokenizer, vocab_size)
    from tinylab.data.prepare import prepare

    shards = prepare(data, path=Path(path).expanduser().absolute() if path else None)
    rows = [
        {
            "split": split,
            "source": name,
            **{k: v[k] for k in ("tokens", "documents", "bytes")},
            "shards": len(v["shards"]),
        }
        for split, sources in shards.manifest["splits"].items()
        for name, v in sources.items()
    ]
    document = {
        "path": str(shards.path),
        "fingerprint": shards.fingerprint,
        "tokenizer": shards.manifest["tokenizer"],
        "splits": rows,
        "report": shards.manifest.get("report", {}),
    }
    train = [r for r in rows if r["split"] == "train"]
    tokens, size = sum(r["tokens"] for r in train), sum(r["bytes"] for r in train)
    summary = f"{format_count(tokens)} training tokens from {format_bytes(size)} of text"
    return Answer(document, f"{shards.path}: {summary}\nfingerprint {shards.fingerprint}\n\n{table(rows)}")


def _with_options(
    data: Data, source: tuple[str, ...], limit_mb: float | None, tokenizer: str | None, vocab_size: int | None
) -> Data:
    if source:
        pairs = [s.partition("=") for s in source]
        wrong = [text for text, parts in zip(source, pairs, strict=True) if not all(parts)]
        if wrong:
            raise ConfigError(
                f"--source must look like NAME=CORPUS, e.g. books=files:books/*.txt; found {', '.join(wrong)}"
            )
        data = replace(data, sources=tuple(Source(name=name, corpus=corpus) for name, _, corpus in pairs))
    if limit_mb is not None:
        data = replace(data, sources=tuple(replace(s, limit_mb=limit_mb) for s in data.sources))
    if tokenizer is not None:
        data = replace(data, tokenizer=tokenizer)
    return data if vocab_size is None else replace(data, vocab_size=vocab_size)


def batch_verb(
    run: Annotated[str, arg(metavar="RUN")], /, step: int, text: bool = False, limit: int | None = None
) -> Answer:
    """The samples of a step and the documents they come from: the same before, during and after the run.

    Args:
        run: run folder, or a name below runs/.
        step: optimizer step, from 1.
        text: also the decoded text of every sample.
        limit: show the first samples only.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be at least 1; found {limit}")
    config = Run(run).config
    stage = config.stages[config.stage_index(step)]
    from tinylab.data.trace import run_shards, trace_batch

    samples = trace_batch(config, run_shards(Run(run)), step, text=text)
    count, samples = len(samples), samples[:limit]
    document = {"run": str(Run(run).path), "step": step, "stage": stage.name, "samples": samples}
    lines = [f"step {step}, stage {stage.name}: {count} samples of {config.model.seq_len} tokens"]
    for sample in samples:
        place = f"{sample['source']}, epoch {sample['epoch']}, window {sample['window']}"
        lines.append(f"sample {sample['n']}: {place}, {len(sample['documents'])} documents")
        lines += [f"    {d['origin']}" for d in sample["documents"]]
        lines += ["    | " + line for line in sample.get("text", "").splitlines()]
    return Answer(document, "\n".join(lines))
