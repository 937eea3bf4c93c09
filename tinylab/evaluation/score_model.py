"""One model on one task under one profile: its identity, the pass through lm-eval, and the rows that are kept."""

from __future__ import annotations

import json
import sys
import time
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tinylab.catalog.reference import Reference, load_model, load_tokenizer
from tinylab.errors import EvaluationError
from tinylab.evaluation.profile import Profile
from tinylab.evaluation.records import Key, Record, ResultStore, items_hash
from tinylab.evaluation.scores import choice_scores
from tinylab.evaluation.tasks import EvaluationTask, quiet_lm_eval
from tinylab.runs.durable import read_lines
from tinylab.runs.manifest import MANIFEST, sha256_file

if TYPE_CHECKING:
    from tinylab.data.tokenizer.encode import Tokenizer
    from tinylab.evaluation.lm_eval_model import TinylabLM

WEIGHTS = "weights.jsonl"
"""File of a store: weight hash of each committed checkpoint, by the SHA-256 of its manifest."""


def say(progress: bool, text: str) -> None:
    """A line of progress on standard error."""
    if progress:
        print(text, file=sys.stderr, flush=True)


def stored_weight_hash(path: Path, store: ResultStore) -> str:
    """Weight hash of the model at `path`; for a committed checkpoint computed once and kept beside the results."""
    from tinylab.formats.identity import weight_hash
    from tinylab.formats.load import open_weights

    if not (path / MANIFEST).is_file():
        return weight_hash(open_weights(path))
    manifest = sha256_file(path / MANIFEST)
    known = {line["manifest"]: line["weights"] for line in read_lines(store.path / WEIGHTS)[0]}
    if manifest not in known:
        known[manifest] = weight_hash(open_weights(path))
        store.write(WEIGHTS, [{"manifest": m, "weights": w} for m, w in known.items()])
    return known[manifest]


class ModelScorer:
    """Scores one model on tasks into a store. The model is loaded only when the store lacks something."""

    def __init__(
        self,
        reference: Reference,
        store: ResultStore,
        profile: Profile,
        *,
        limit: int | None = None,
        device: str = "cpu",
        max_tokens: int = 8192,
        progress: bool = True,
    ) -> None:
        self.reference, self.store, self.profile = reference, store, profile
        self.limit, self.device, self.max_tokens, self.progress = limit, device, max_tokens, progress

    def record(self, task: EvaluationTask) -> Record:
        """The stored record of a task, computed now unless it is there."""
        documents = list(islice(task.task.eval_docs, self.limit))
        key = Key(
            weights=stored_weight_hash(self.reference.path, self.store),
            tokenizer=self.tokenizer.hash,
            profile=self.profile.hash,
            task=task.name,
            version=task.version,
            items=items_hash(_doc_hash(d) for d in documents),
        )
        if (kept := self.store.get(key)) is not None:
            say(self.progress, f"{self.reference.label}: {task.name}: {len(documents)} items, in the store already")
            return kept
        start = time.perf_counter()
        items, texts = run_task(self.lm, task, self.limit)
        if items_hash(item["doc_hash"] for item in items) != key.items:
            raise EvaluationError(
                f"lm-eval must score the {len(documents)} documents of {task.name} that it was given; it scored others"
            )
        seconds = time.perf_counter() - start
        self.store.put_documents(key, texts)
        record = self.store.put(key, self._header(task, items, seconds), items)
        cut = sum(item["truncated"] for item in items)
        note = f"; {cut} prompts cut on the left to {self.lm.max_length} tokens" if cut else ""
        say(self.progress, f"{self.reference.label}: {task.name}: {len(items)} items in {seconds:.1f} s{note}")
        return record

    def _header(self, task: EvaluationTask, items: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        import torch

        return {
            **{name: getattr(self.reference, name) for name in ("label", "step", "tokens", "stage")},
            "metric": task.metric,
            "metrics": list(choice_scores(items[0])),
            "chance": task.chance,
            "baseline": task.baseline,
            "profile": {"name": self.profile.name, **self.profile.fields()},
            "source": task.source,
            "limit": self.limit,
            "add_bos": self.lm.add_bos,
            "prefix_id": self.lm.prefix_id,
            "tokenizer_backend": self.tokenizer.backend,
            "device": self.device,
            "max_tokens": self.max_tokens,
            "seconds": round(seconds, 3),
            "torch": torch.__version__,
            "time": time.time(),
        }

    @cached_property
    def _trainer(self) -> dict[str, Any]:
        """`trainer.json` of the checkpoint; empty where there is none."""
        path = self.reference.path / "trainer" / "trainer.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises EvaluationError when the model was trained with another."""
        tokenizer = load_tokenizer(self.reference)
        for note in tokenizer.notes:
            say(self.progress, f"note: {self.reference.label}: {note}")
        trained_with = self._trainer.get("tokenizer_hash", tokenizer.hash)
        if trained_with != tokenizer.hash:
            raise EvaluationError(
                f"{self.reference.label} must be scored with the tokenizer of its training ({trained_with[:12]}…); "
                f"found another in {self.reference.path} ({tokenizer.hash[:12]}…). Restore its tokenizer files"
            )
        return tokenizer

    @cached_property
    def lm(self) -> TinylabLM:
        """lm-eval's view of the model, in the profile's precision."""
        import torch

        from tinylab.evaluation.lm_eval_model import TinylabLM

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.profile.dtype]
        add_bos = self.profile.add_bos
        return TinylabLM(
            load_model(self.reference, self.device, dtype),
            self.tokenizer,
            add_bos=_adds_bos(self.reference.path, self.tokenizer) if add_bos is None else add_bos,
            prefix_id=self.tokenizer.bos_id if self._trainer.get("boundary") == "bos" else None,
            max_tokens=self.max_tokens,
            progress=self.progress and sys.stderr.isatty(),
        )


def _adds_bos(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts BOS before a text by itself, as lm-eval's HFLM would ask transformers."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path if path.is_dir() else path.parent, local_files_only=True)
    return tokenizer.bos_id is not None and theirs("a")["input_ids"][:1] == [tokenizer.bos_id]


def run_task(
    lm: Any, task: EvaluationTask, limit: int | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(item rows, their texts) of a task, scored through lm-eval by any of its language models.

    A row: `doc_id, doc_hash, prompt_hash, target_hash, gold, loglikelihoods, greedy, unconditional, characters, bytes,
    truncated`. No global random state is touched: this also runs inside a training process.
    """
    from lm_eval.evaluator import evaluate as lm_evaluate

    truncated = getattr(lm, "truncated", set())
    truncated.clear()
    loaded = {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}
    with quiet_lm_eval():
        results: Any = lm_evaluate(lm, cast(Any, loaded), limit=limit, bootstrap_iters=0, log_samples=True)
    items, texts = [], []
    for sample in results["samples"][task.name]:
        choices = task.task.doc_to_choice(sample["doc"])
        answers, n = sample["filtered_resps"], len(choices)
        hashes = {k: sample[k] for k in ("doc_hash", "prompt_hash", "target_hash")}
        items.append(
            {"doc_id": sample["doc_id"], **hashes, "gold": _gold(task.task, sample["doc"], choices)}
            | {"loglikelihoods": [float(a[0]) for a in answers[:n]], "greedy": [bool(a[1]) for a in answers[:n]]}
            | {"unconditional": [float(a[0]) for a in answers[n:]] if len(answers) == 2 * n else None}
            | {"characters": [len(c) for c in choices], "bytes": [len(c.encode()) for c in choices]}
            | {"truncated": any(tuple(a) in truncated for a in sample["arguments"])}
        )
        prompts = [a[0] for a in sample["arguments"][:n]]
        text = {"doc_hash": sample["doc_hash"], "prompt": prompts[0], "choices": choices}
        if len(set(prompts)) > 1:
            text |= {"prompt": sample["arguments"][0][1], "choices": prompts}
        texts.append(text | {k: sample["doc"][k] for k in ("origin", "origins") if k in sample["doc"]})
    return items, texts


def _gold(task: Any, doc: dict[str, Any], choices: list[str]) -> int:
    """Index of the right choice, by lm-eval's own rule (ConfigurableTask.process_results)."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise EvaluationError(f"{task.config.task}: the answer must be one of {len(choices)} choices; found {gold!r}")
    return gold


def _doc_hash(doc: dict[str, Any]) -> str:
    """lm-eval's own hash of a document (evaluator.evaluate)."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))
