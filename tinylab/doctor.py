"""What works on this machine, what does not, and the remedy.

Every check gives findings. A `problem` stops something that tinylab needs; a `note` is worth knowing (no GPU, a slower
fallback, an optional program that is not there).
"""

import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tinylab.errors import TinylabError
from tinylab.runs.folder import home
from tinylab.runs.provenance import installed_version

FLOORS = {
    "torch": ("2.11", "sharded safetensors checkpoints, and CVE-2026-24747 below 2.10"),
    "jupyter-server": ("2.18.0", "CVE-2026-40934, CVE-2026-35397 and CVE-2026-40110 below it"),
    "transformers": ("5.3", "CVE-2026-4372 below it"),
}
"""Lowest versions, and why."""
SHOWN = ("numpy", "safetensors", "tokenizers", "datasets", "pandas", "matplotlib", "papermill", "jupyterlab", "lm-eval")
DISK_GB, MEMORY_GB = 2.0, 3.0
"""Room for the demo's data, run and checkpoints (10^9 bytes), and its peak memory with a margin."""
UNSAFE_LOAD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    check: str
    """What was looked at."""
    state: Literal["ok", "note", "problem"]
    """`problem` makes `tinylab doctor` end with exit code 1."""
    found: str
    """What was found, in words."""
    remedy: str = ""
    """What to do about a problem or a note; empty where nothing is to be done."""


def doctor(device: str = "auto") -> dict[str, Any]:
    """Examine this machine: `{"healthy": bool, "device": …, "findings": [{check, state, found, remedy}, …]}`.

    `device` is auto, cpu or cuda: where attention backends and the forward/backward are tried. Takes seconds.
    """
    findings: list[Finding] = [*_versions(), *_machine()]
    chosen, found = _devices(device)
    findings += found
    if chosen:
        for check in (_precision, _attention, _forward_backward):
            findings += _guarded(check, chosen)
    findings += _guarded(_corpus, "")
    healthy = all(f.state != "problem" for f in findings)
    return {"healthy": healthy, "device": chosen, "findings": [asdict(f) for f in findings]}


def _guarded(check: Callable[[str], Iterator[Finding]], argument: str) -> list[Finding]:
    """The check's findings; whatever it raises is a problem, not the end of the examination."""
    try:
        return list(check(argument))
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return [Finding(name, "problem", f"{type(error).__name__}: {error}", "install again: make clean setup")]


def _judged(
    check: str, holds: bool, good: str, bad: str, remedy: str, state: Literal["note", "problem"] = "problem"
) -> Finding:
    return Finding(check, "ok", good) if holds else Finding(check, state, bad, remedy)


def _versions() -> Iterator[Finding]:
    for name, (floor, why) in FLOORS.items():
        version = installed_version(name)
        found = f"{version or 'not installed'}; must be at least {floor} ({why})"
        good = version is not None and _release(version) >= _release(floor)
        remedy = f"pip install '{name}>={floor}' (make setup does)"
        yield _judged(name, good, f"{version} (at least {floor})", found, remedy)
    known = {name: installed_version(name) for name in SHOWN}
    missing = [name for name, version in known.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in known.items() if version)
    bad, remedy = f"missing: {', '.join(missing)}; found {text or 'none'}", "pip install -e '.[notebook,evaluate]'"
    yield _judged("packages", not missing, text, bad, f"{remedy} (make setup does)")


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the head of a version, `2.13.0+cpu` as (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("python", "ok", f"{sys.version.split()[0]} on {sys.platform}, {cores} CPU cores, {sys.prefix}")
    safe = os.environ.get(UNSAFE_LOAD, "0") in ("", "0")
    good, bad = f"{UNSAFE_LOAD} is not set; tinylab itself never unpickles", f"{UNSAFE_LOAD} is set: torch.load would "
    yield _judged("unpickling", safe, good, bad + "run code from files", f"unset {UNSAFE_LOAD}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text) / 1e9)
    good, bad = f"{total:.1f} GB", f"{total:.1f} GB of memory; the demo needs up to {MEMORY_GB:.0f} GB"
    yield _judged("memory", total >= MEMORY_GB, good, bad, "a smaller batch: --set parallel.micro_batch=4")
    yield _disk()
    remedy = f"{sys.executable} -m ipykernel install --sys-prefix --name tinylab (make setup does)"
    bad, kernel = "no Jupyter kernel named tinylab; python3 serves as well", "share/jupyter/kernels/tinylab/kernel.json"
    found = (Path(sys.prefix) / kernel).is_file()
    yield _judged("kernel", found, "Jupyter kernel tinylab", bad, remedy, "note")
    browsers = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next((p for p in map(shutil.which, browsers) if p), None)
    good, bad = f"{path} (browser tests can run)", "not found; only the browser tests need it, and skip"
    yield _judged("chromium", path is not None, good, bad, "install Chromium", "note")


def _disk() -> Finding:
    # os.path.exists is False where Path.exists raises: below a folder that cannot be searched, for an impossible name.
    place = next(p for p in (home(), *home().parents) if os.path.exists(p))
    free = shutil.disk_usage(place).free / 1e9
    if not place.is_dir():
        return Finding("disk", "problem", f"{place} is a file", "set TINYLAB_HOME to a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding("disk", "problem", f"{place} cannot be written", "set TINYLAB_HOME to a folder of yours")
    good = f"{free:.1f} GB free in {place} (data/ and runs/ go there)"
    bad = f"{free:.1f} GB free in {place}; the demo needs up to {DISK_GB:.0f} GB"
    return _judged("disk", free >= DISK_GB, good, bad, "make room, or set TINYLAB_HOME to another disk")


def _devices(wanted: str) -> tuple[str | None, list[Finding]]:
    try:
        import torch
    except Exception as error:
        return None, [Finding("devices", "problem", f"torch does not import: {error}", "make clean setup")]
    if torch.cuda.is_available():
        lines = []
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}")
        chosen = "cpu" if wanted == "cpu" else "cuda"
        return chosen, [Finding("devices", "ok", "; ".join(lines))]
    if wanted == "cuda" or shutil.which("nvidia-smi"):
        found = f"no CUDA device works with torch {torch.__version__} (built for CUDA {torch.version.cuda or 'none'})"
        remedy = "check nvidia-smi; then install a CUDA build of torch: make clean setup"
        return "cpu", [Finding("devices", "problem", found, remedy)]
    return "cpu", [Finding("devices", "note", f"cpu only, torch with {torch.get_num_threads()} threads")]


def _precision(device: str) -> Iterator[Finding]:
    from tinylab.model.precision import native_bf16, resolve_precision

    text = "bf16 in hardware" if native_bf16(device) else "no bf16 in hardware"
    yield Finding("precision", "ok", f"{device}: {text}; auto means {resolve_precision(device, 'auto').name}")


def _attention(device: str) -> Iterator[Finding]:
    import torch

    from tinylab.model.attention import BACKENDS
    from tinylab.model.attention_choice import why_not

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reasons = {name: why_not(name, device, dtype) for name in BACKENDS}
    live = [name for name, reason in reasons.items() if reason is None]
    state, remedy = ("ok", "") if live else ("problem", "make clean setup")
    yield Finding("attention", state, f"works on {device}: {', '.join(live) or 'no backend'}", remedy)
    for name, reason in reasons.items():
        if reason is None:
            continue
        remedy = ""
        if device == "cpu" and name not in ("torch", "flash", "math"):
            reason = "needs a CUDA device"
        elif reason.startswith("not installed"):
            reason, remedy = "not installed (optional)", "bash env/install-gpu-extras.sh"
        yield Finding(f"attention {name}", "note", reason, remedy)


def _forward_backward(device: str) -> Iterator[Finding]:
    """One forward and backward pass of a tiny model on random tokens; the loss of a fresh model is near ln(V)."""
    import torch

    from tinylab.config.presets import tiny
    from tinylab.model.loss import linear_cross_entropy
    from tinylab.model.transformer import Llama

    config = tiny().model
    model = Llama(config)
    model.init_weights(0)
    model.to(device)
    ids = torch.randint(config.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0)).to(device)
    start = time.perf_counter()
    loss = linear_cross_entropy(model.hidden(ids[:, :-1]), model.head.weight, ids[:, 1:]) / ids[:, 1:].numel()
    loss.backward()
    value, seconds = loss.item(), time.perf_counter() - start
    finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    wanted = math.log(config.vocab_size)
    good = finite and abs(value - wanted) < 1
    text = f"loss {value:.2f} nats (a fresh model: near {wanted:.2f}), gradients {'finite' if finite else 'not finite'}"
    text = f"{device}: {text}, {seconds:.2f} s"
    yield _judged("forward/backward", good, text, text, "report it with the output of tinylab doctor --json")


def _corpus(_: str) -> Iterator[Finding]:
    from tinylab.data.corpus.sources import open_corpus

    for spec in ("local:prose", "local:code"):
        try:
            origin = next(iter(open_corpus(spec))).origin
        except (StopIteration, TinylabError) as error:
            remedy = "use text of your own: tinylab prepare --source books=files:books/*.txt"
            yield Finding(f"corpus {spec}", "problem", f"no document: {error}", remedy)
        else:
            yield Finding(f"corpus {spec}", "ok", f"begins with {origin}")
