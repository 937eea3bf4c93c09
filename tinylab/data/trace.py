"""Which samples a step of a run consumes, and which documents they come from: before, during and after the run."""

from typing import Any

from tinylab.config.schema import RunConfig
from tinylab.data.order import DataOrder
from tinylab.data.prepare import data_path, prepare
from tinylab.data.shards.integrity import read_manifest
from tinylab.data.shards.reader import ShardSet
from tinylab.errors import DataError
from tinylab.runs.folder import Run


def run_shards(run: Run) -> ShardSet:
    """The data of a run, prepared now if they are not there yet.

    Raises DataError when the run has trained on others: their documents would be named for its samples.
    """
    return _trained_on(run, prepare(run.config.data))


def stored_shards(run: Run) -> ShardSet:
    """The data of a run if they are there; only their manifest is read, and a file when something asks for it.

    Raises DataError when there are none, and as `run_shards` does: the validation split of other data may hold
    documents that this run was trained on.
    """
    path = data_path(run.config.data)
    return _trained_on(run, ShardSet(path, read_manifest(path)))


def _trained_on(run: Run, shards: ShardSet) -> ShardSet:
    trained_on = [line["data_fingerprint"] for line in run.journal() if "data_fingerprint" in line]
    if trained_on and trained_on[-1] != shards.fingerprint:
        raise DataError(
            f"{shards.path} must hold the data that {run.path} was trained on, fingerprint {trained_on[-1]}; found "
            f"{shards.fingerprint}: its corpus or the tools have changed. Restore those data from a copy"
        )
    return shards


def trace_batch(config: RunConfig, shards: ShardSet, step: int, text: bool = False) -> list[dict[str, Any]]:
    """One dictionary per sample of step `step`, over all ranks, in order.

    `n`: number of the sample in the run, from 0. `source`, `epoch`, `window`: its address (source by name, epochs from
    0, windows of model.seq_len tokens). `first_token`: position of its first token in the source's stream.
    `documents`: of each document in it `origin`, `sha256` of its text, `document` (its number) and `tokens`.
    `text`: the sample decoded (with `text=True`).

    A sample reads seq_len + 1 tokens (inputs and last target), so the documents' `tokens` add up to that.
    Raises ConfigError for a step outside the run, DataError when the data do not fit the configuration.
    """
    from tinylab.data.tokenizer.load import load_tokenizer_file

    order = DataOrder.of(config, shards)
    samples = order.samples(step)
    seq_len = config.model.seq_len
    tokenizer = load_tokenizer_file(shards.tokenizer_path) if text else None
    rows = []
    for n, source, epoch, window in zip(samples.n, samples.source, samples.epoch, samples.window, strict=True):
        name, first = order.names[source], int(window) * seq_len
        stream = shards.stream("train", name)
        spans = stream.documents(first, seq_len + 1)
        row: dict[str, Any] = {
            "n": int(n),
            "source": name,
            "epoch": int(epoch),
            "window": int(window),
            "first_token": first,
            "documents": [
                {"origin": s.origin, "sha256": s.sha256, "document": s.document, "tokens": s.stop - s.start}
                for s in spans
            ],
        }
        if tokenizer:
            row["text"] = tokenizer.decode(stream.read(first, seq_len + 1).tolist())
        rows.append(row)
    return rows
