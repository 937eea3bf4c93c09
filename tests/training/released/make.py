"""Makes the run folder beside this script that later commits must resume bit for bit.

    PYTHONPATH=CHECKOUT python make.py OUT

Run it with the commit whose checkpoints are to be kept readable (CHECKOUT is its root). It trains twelve steps of a
very small model: `OUT/run` is the run stopped after step 6, `OUT/shards` its shards, `OUT/expected.json` what that same
commit found when it went on to step 12. The environment makes every x86 processor take the same arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

SAME_ARITHMETIC = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
CONFIG = """
preset = "released"
seed = 7

[model]
vocab_size = 272
n_layer = 2
d_model = 16
n_head = 4
n_kv_head = 2
d_ff = 32
seq_len = 16

[data]
path = "shards"
vocab_size = 272
validation_fraction = 0.2

[[data.sources]]
name = "prose"
corpus = "files:corpus/prose.jsonl"

[[data.sources]]
name = "code"
corpus = "files:corpus/code.jsonl"

[[stages]]
name = "basic"
tokens = 512
batch_tokens = 64
mixture = { prose = 0.7, code = 0.3 }

[[stages]]
name = "cooldown"
tokens = 512
batch_tokens = 128
mixture = { prose = 0.5, code = 0.5 }
ramp_tokens = 128

[schedule]
warmup_tokens = 128

[optimizer]
lr = 0.01
clip_norm = 1.0

[parallel]
device = "cpu"
micro_batch = 2
precision = "fp32"
threads = 1

[saving]
every_tokens = 1000000
early = false

[validation]
every_tokens = 256
sequences = 4
"""
STOP_AFTER = 6


def write_corpus(path: Path, seed: int) -> None:
    """Sixty documents of random words, one JSON object a line."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 5))) for _ in range(30)]
    lines = [{"text": " ".join(generator.choices(words, k=generator.randint(6, 20)))} for _ in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(stop_after: int | None) -> None:
    """Start or resume the run `run` in the current folder."""
    code = (
        "import sys, tinylab\n"
        "from tinylab.config.io import load_run\n"
        "from tinylab.errors import RunStopped\n"
        "run, last = tinylab.Run('./run'), int(sys.argv[1])\n"
        "class Stop:\n"
        "    def start(self, config, step): pass\n"
        "    def step(self, record): record['step'] == last and (run.path / 'stop').touch()\n"
        "    def checkpoint(self, path): pass\n"
        "    def end(self): pass\n"
        "try: tinylab.train(load_run('config.toml'), run, progress=False, hooks=[Stop()])\n"
        "except RunStopped: pass\n"
    )
    command = [sys.executable, "-c", code, str(stop_after or 0)]
    subprocess.run(command, env=os.environ | SAME_ARITHMETIC, check=True)


def main(out: Path) -> None:
    shutil.rmtree(out / "run", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    Path("corpus").mkdir(exist_ok=True)
    for seed, name in enumerate(("prose", "code")):
        write_corpus(Path(f"corpus/{name}.jsonl"), seed)
    Path("config.toml").write_text(CONFIG)
    train(STOP_AFTER)
    kept = Path("kept")
    shutil.copytree("run", kept)
    train(None)
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    last = max(Path("run/checkpoints").iterdir())
    import torch

    expected = {
        "torch": torch.__version__,
        "losses": [m["loss"].hex() for m in metrics],
        "data_hashes": [m["data_hash"] for m in metrics],
        "sha256": {
            str(p.relative_to(last)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(last.rglob("*.safetensors"))
        },
    }
    shutil.rmtree("run")
    kept.rename("run")
    for file in (Path("config.toml"), *Path("run").glob("logs"), *Path("run").glob("lock*")):
        file.unlink() if file.is_file() else shutil.rmtree(file)
    provenance = Path("run/provenance.json")
    known = json.loads(provenance.read_text())
    known["machine"] = {"host": "removed"}
    known["command"] = []
    provenance.write_text(json.dumps(known, indent=1) + "\n")
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
