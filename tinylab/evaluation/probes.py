"""Multiple-choice probes from held-out documents: a model of any size can be scored on them without a download.

`continuation`: which of four passages continues this text? `code`: which of four blocks continues this source file?
`docstring`: which of four docstrings belongs to this code? The group `probes` is the first two; `docstring` must be
named, as models of a few million parameters stay near chance on it. Items depend only on the data's fingerprint and
the seed. Wrong answers are the right answers of other items, from other documents if those have three.
"""

import ast
import contextlib
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tinylab.data.shards.reader import ShardSet
from tinylab.data.tokenizer.encode import Tokenizer
from tinylab.data.tokenizer.load import load_tokenizer_file
from tinylab.errors import CheckpointError, DataError
from tinylab.runs.durable import read_lines, write_atomic

PROBES = ("continuation", "code", "docstring")
VERSION = 2
"""Version of the construction below; scores of different versions are not comparable."""
N_ITEMS = 200
MIN_ITEMS = 20
N_CHOICES = 4
CONTEXT_TOKENS = 80
CHOICE_TOKENS = 40
"""Their sum is far below the 256 tokens of the smallest preset, so that a longer encoding also fits."""
MIN_CONTEXT_TOKENS, MIN_CHOICE_TOKENS = 32, 24
MIN_DOCSTRING_TOKENS = 6
WINDOWS_PER_DOCUMENT = 32
"""Enough that a handful of long source files makes a full probe; each document contributes one before any a second."""
NEAR_IN_LENGTH = 12
"""Wrong answers are drawn from this many that are nearest in length."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"(?<=\S) (?=\S)")
_LINE_END = re.compile(r"(?<=\S)\n(?=[^\S\n]*\S)")
"""A line break between two lines that are not blank; the indent stays with the second."""


@dataclass(frozen=True)
class Passage:
    """A context, its right answer, and where both come from."""

    context: str
    answer: str
    origin: str
    document: str
    """Key of the document; wrong answers come from other documents if possible."""
    answer_tokens: int


def build_probe(shards: ShardSet, task: str, n_items: int = N_ITEMS, seed: int = 0) -> list[dict[str, Any]]:
    """Items of one probe, read from DATA/probes if built before; a small split has fewer than `n_items`.

    Raises DataError with the number of items when fewer than 20 are possible.
    """
    path = shards.path / "probes" / f"v{VERSION}-n{n_items}-seed{seed}" / f"{task}.jsonl"
    if path.is_file():
        return read_lines(path)[0]
    rng = random.Random(f"{shards.fingerprint}:{task}:{seed}:{VERSION}")
    tokenizer = load_tokenizer_file(shards.tokenizer_path)
    passages = _spread(list(_PASSAGES[task](documents(shards, tokenizer), tokenizer)), n_items, rng)
    if len(passages) < MIN_ITEMS:
        raise DataError(
            f"the probe {task} needs at least {MIN_ITEMS} items from the validation split of {shards.path}; "
            f"it has {len(passages)}. Prepare more data, or raise data.validation_fraction"
        )
    items = _items(task, passages, rng)
    _keep(path, task, items)
    return items


def probe_config(name: str) -> dict[str, Any]:
    """The lm-eval configuration of a probe without its documents, as plain values for its YAML file."""
    return {
        "task": name,
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "context",  # names of fields, as a template would be compiled again for every item
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "\n" if name == "code" else " ",
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True}
            for m in ("acc", "acc_norm", "acc_mutual_info")
        ],
        "metadata": {"version": VERSION},
    }


def word_overlap(items: list[dict[str, Any]]) -> float:
    """Accuracy without a model, by choosing the answer that shares the most distinct words with the context.

    Ties count as fractions. A model that does no better has learned only topics.
    """
    right = 0.0
    for item in items:
        known = set(_WORD.findall(item["context"].lower()))
        shared = [len(known & set(_WORD.findall(choice.lower()))) for choice in item["choices"]]
        right += (shared[item["gold"]] == max(shared)) / shared.count(max(shared))
    return right / len(items)


def documents(shards: ShardSet, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(text, origin) of every validation document, in the order of the shards."""
    boundary = {shards.manifest["tokenizer"]["bos_id"], shards.manifest["tokenizer"]["eos_id"]}
    for name in shards.sources:
        stream = shards.stream("validation", name)
        for i in range(stream.n_documents):
            ids = [int(t) for t in stream.document_text_ids(i)]
            yield tokenizer.decode([t for t in ids if t not in boundary]), stream.document_line(i)["origin"]


def _continuations(texts: Iterator[tuple[str, str]], tokenizer: Tokenizer, *, code: bool) -> Iterator[Passage]:
    """Windows of Python source cut at the ends of lines, or of everything else cut at single spaces."""
    for text, origin in texts:
        is_code = origin.endswith(".py") or bool(_definitions(text))
        if is_code == code:
            yield from _windows(text, origin, _LINE_END if code else _SPACE, tokenizer)


def _windows(text: str, origin: str, cut: re.Pattern[str], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Consecutive windows: a context of 32 to 80 tokens and the 24 to 40 that follow it, each ending at a cut.

    `cut` matches the single character between two pieces; the one between context and answer is dropped.
    """
    ends = [-1, *(m.start() for m in cut.finditer(text)), len(text)]
    costs = [len(ids) for ids in tokenizer.encode_batch([text[a + 1 : b] for a, b in pairwise(ends)])]
    first = windows = 0
    while windows < WINDOWS_PER_DOCUMENT and first < len(costs):
        middle = _advance(costs, first, CONTEXT_TOKENS)
        stop = _advance(costs, middle, CHOICE_TOKENS)
        answer_cost = sum(costs[middle:stop])
        if sum(costs[first:middle]) < MIN_CONTEXT_TOKENS or answer_cost < MIN_CHOICE_TOKENS:
            first += 1  # a long line, or the end of the document
            continue
        context, answer = text[ends[first] + 1 : ends[middle]], text[ends[middle] + 1 : ends[stop]]
        yield Passage(context, answer, origin, origin, answer_cost)
        first, windows = stop, windows + 1


def _advance(costs: list[int], start: int, budget: int) -> int:
    """The index after the last piece that `budget` tokens reach from piece `start`."""
    while start < len(costs) and costs[start] <= budget:
        budget -= costs[start]
        start += 1
    return start


def _definitions(text: str) -> list[Definition]:
    """Definitions in a Python text; none when it does not parse."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return [n for n in ast.walk(tree) if isinstance(n, Definition)]


def _docstrings(texts: Iterator[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Functions and classes without their docstring, and as the answer its first paragraph, of 6 to 40 tokens."""
    for text, origin in texts:
        for node in _definitions(text):
            answer = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            cost = len(tokenizer.encode(answer))
            if not MIN_DOCSTRING_TOKENS <= cost <= CHOICE_TOKENS:
                continue
            lines, left = [], CONTEXT_TOKENS
            for line in _without_docstring(text, node):
                left -= len(tokenizer.encode(line)) + 1
                if left < 0:
                    break
                lines.append(line)
            if len(lines) < 2 or answer in "\n".join(lines):
                continue
            context = "\n".join(lines) + "\n\nDocstring:"
            yield Passage(context, answer, f"{origin}:{node.lineno} {node.name}", origin, cost)


def _without_docstring(text: str, node: Definition) -> list[str]:
    """Source lines of a definition, dedented, without its docstring and blank lines."""
    lines = text.splitlines()
    first, doc = node.lineno - 1, node.body[0]
    kept = lines[first : doc.lineno - 1] + lines[doc.end_lineno or doc.lineno : node.end_lineno]
    return [line[node.col_offset :] for line in kept if line.strip()]


_PASSAGES: dict[str, Callable[[Iterator[tuple[str, str]], Tokenizer], Iterator[Passage]]] = {
    "continuation": partial(_continuations, code=False),
    "code": partial(_continuations, code=True),
    "docstring": _docstrings,
}


def _spread(passages: list[Passage], count: int, rng: random.Random) -> list[Passage]:
    """Up to `count` passages with distinct answers; every document contributes one before any contributes a second."""
    by_document: dict[str, list[Passage]] = {}
    seen: set[str] = set()
    for passage in passages:
        if passage.answer not in seen:
            seen.add(passage.answer)
            by_document.setdefault(passage.document, []).append(passage)
    groups = list(by_document.values())
    rng.shuffle(groups)
    for group in groups:
        rng.shuffle(group)
    rounds = max((len(g) for g in groups), default=0)
    return [g[r] for r in range(rounds) for g in groups if r < len(g)][:count]


def _items(task: str, passages: list[Passage], rng: random.Random) -> list[dict[str, Any]]:
    """Each passage with three wrong answers near in length, the right one equally often at each place."""
    places = [i % N_CHOICES for i in range(len(passages))]
    rng.shuffle(places)
    items = []
    for passage, gold in zip(passages, places, strict=True):
        others = [p for p in passages if p.document != passage.document]
        if len(others) < N_CHOICES - 1:
            others = [p for p in passages if p is not passage]
        others.sort(key=lambda p: (abs(p.answer_tokens - passage.answer_tokens), p.origin, p.answer))
        chosen = rng.sample(others[:NEAR_IN_LENGTH], N_CHOICES - 1)
        chosen.insert(gold, passage)
        identity = hashlib.sha256(json.dumps([p.answer for p in chosen] + [passage.context]).encode()).hexdigest()
        items.append(
            {"id": f"{task}-{identity[:12]}", "context": passage.context, "choices": [p.answer for p in chosen]}
            | {"gold": gold, "origin": passage.origin, "origins": [p.origin for p in chosen]}
        )
    return items


def _keep(path: Path, task: str, items: list[dict[str, Any]]) -> None:
    """Write items and YAML beside the data; if the folder is not writable, they are built again next time."""
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    config = probe_config(task) | {"dataset_kwargs": {"data_files": {"validation": str(path)}}}
    with contextlib.suppress(OSError, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path.with_suffix(".yaml"), json.dumps(config, indent=1) + "\n")  # JSON is YAML
        write_atomic(path, lines)
