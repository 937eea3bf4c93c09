"""Parameters, FLOPs and bytes of a model, from its configuration alone (no torch).

Letters as in transformer.py: C width, F SwiGLU width, D head size, H query heads, K key-value heads, V vocabulary,
L layers, s tokens of a sequence.
"""

from tinylab.config.architecture import Model
from tinylab.config.schema import RunConfig
from tinylab.errors import ConfigError

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameter_counts(config: Model) -> dict[str, int]:
    """Parameters by part, over all layers; `head` is 0 when tied; `matmul` is what takes part in matrix products.

    `matmul` = attention + mlp + the head's matrix (tied or not); the embedding is a lookup.
    """
    C, D, L = config.d_model, config.head_size, config.n_layer
    matrix = config.vocab_size * C
    counts = {
        "embedding": matrix,
        "attention": L * C * D * (2 * config.n_head + 2 * config.n_kv_head),
        "mlp": L * 3 * C * config.d_ff,
        "norms": (2 * L + 1) * C,
        "head": 0 if config.tie_embeddings else matrix,
    }
    counts["total"] = sum(counts.values())
    counts["matmul"] = counts["attention"] + counts["mlp"] + matrix
    return counts


FORMULAS = {
    "F": "6·matmul + 12·L·H·D·s: embedding out, head in, attention not halved; the formula of tinylab's mfu",
    "P": "6·N + 12·L·H·D·s: all parameters, the embedding too (PaLM, appendix B; litgpt)",
    "C": "6·matmul + 6·L·H·D·s: the work of a causal kernel",
    "6N": "6·N: all parameters, no attention",
    "6N+C": "6·N + 6·L·H·D·s: all parameters, causal attention",
}
"""The formulas by name; H·D is the width of attention, d_model where the heads fill it. TinyLlama-1.1B at 2,048, in
GFLOP: F 7.314, P 7.708, C 6.760, 6N 6.600, 6N+C 7.154. Its 24k tokens/s on an A100 are its 56% only by F."""


def flops_per_token(config: Model, seq_len: int | None = None, formula: str = "F") -> int:
    """FLOPs of one token, forward and backward, by one of FORMULAS; seq_len: absent, the model's.

    Raises ConfigError for an unknown formula or seq_len < 1.
    """
    length = config.seq_len if seq_len is None else seq_len
    if length < 1:
        raise ConfigError(f"seq_len must be at least 1; found {length}")
    if formula not in FORMULAS:
        raise ConfigError(f"formula must be one of {', '.join(FORMULAS)}; found {formula!r}")
    counted = parameter_counts(config)["matmul" if formula in ("F", "C") else "total"]
    halves = {"F": 2, "P": 2, "6N": 0}.get(formula, 1)
    return 6 * counted + halves * 6 * config.n_layer * config.n_head * config.head_size * length


def kv_cache_bytes_per_token(config: Model, dtype: str = "bf16") -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers."""
    return 2 * config.n_layer * config.n_kv_head * config.head_size * _size(dtype)


def training_memory_bytes(
    config: Model,
    micro_batch: int,
    *,
    gpus: int = 1,
    shard: bool = True,
    precision: str = "bf16",
    recompute: str = "none",
) -> dict[str, int]:
    """Bytes on one GPU at the peak of a training step, by part, and their `total`.

    `weights`, `gradients` and `moments` are fp32, divided by the GPUs when sharded (FSDP2); `gathered` is the largest
    unit then whole in the compute dtype: one block, or embedding and head, twice for the one fetched ahead.
    `activations` counts what each layer keeps for its backward pass; `logits` one chunk of the loss. An estimate:
    fragmentation, communication buffers and the CUDA context (about 1 GB) come on top.
    """
    counts = parameter_counts(config)
    total = counts["total"]
    ranks = gpus if shard else 1
    compute = _size(precision)
    block = (counts["attention"] + counts["mlp"]) // config.n_layer
    outer = counts["embedding"] + counts["head"]
    tokens = micro_batch * config.seq_len
    parts = {
        "weights": -(-4 * total // ranks),
        "gradients": -(-4 * total // ranks),
        "moments": -(-8 * total // ranks),
        "compute copies": compute * (2 * block + outer) if ranks > 1 else (compute * total if compute < 4 else 0),
        "activations": tokens * activation_bytes_per_token(config, precision, recompute),
        "logits": logits_bytes(config, tokens, precision),
    }
    parts["total"] = sum(parts.values())
    return parts


def activation_bytes_per_token(config: Model, precision: str = "bf16", recompute: str = "none") -> int:
    """Bytes that one token keeps for the backward pass, at most at one time.

    A layer keeps, in the compute dtype: both normed inputs (2C), q, k, v before and q, k after rotation, attention's
    output (about 3·H·D + 3·K·D), gate and up, their silu and product (4F); in fp32: the residual stream twice (2C).
    Outside the layers the embedding, the last norm's input and output.

    `recompute` = `full`: a layer keeps its input (C in fp32); `selective`: also the results of its products (q, k, v,
    attention's, gate and up, down) and of attention in the compute dtype. Either way one layer at a time has all.
    """
    C, D, compute = config.d_model, config.head_size, _size(precision)
    heads = 3 * config.n_head * D + 3 * config.n_kv_head * D
    layer = compute * (2 * C + heads + 4 * config.d_ff) + 4 * 2 * C
    if recompute == "none":
        return config.n_layer * layer + 3 * 4 * C
    kept = 4 * C
    if recompute == "selective":
        kept += compute * (2 * C + 2 * (config.n_head + config.n_kv_head) * D + 2 * config.d_ff)
    return config.n_layer * kept + layer + 3 * 4 * C


def logits_bytes(config: Model, tokens: int, precision: str = "bf16", chunk_elements: int = 2**27) -> int:
    """Bytes of the logits that exist at once: a chunk's, in the compute dtype, fp32 and its gradient."""
    rows = min(tokens, max(128, chunk_elements // config.vocab_size))
    return rows * config.vocab_size * (4 + 2 * _size(precision)) + 4 * config.vocab_size * config.d_model


def inference_memory_bytes(
    config: Model, *, batch: int = 1, tokens: int | None = None, dtype: str = "bf16"
) -> dict[str, int]:
    """Bytes of generating with `tokens` of context (absent: the model's) per row: `weights`, `kv_cache`, `total`."""
    length = config.seq_len if tokens is None else tokens
    parts = {
        "weights": parameter_counts(config)["total"] * _size(dtype),
        "kv_cache": batch * length * kv_cache_bytes_per_token(config, dtype),
    }
    parts["total"] = sum(parts.values())
    return parts


def memory_bytes(run: RunConfig, *, gpus: int = 1) -> dict[str, int]:
    """`training_memory_bytes` of a run as configured: its micro-batch, precision and strategy on so many GPUs."""
    precision = "fp32" if run.parallel.precision == "fp32" else "bf16"  # `auto`: GPUs worth planning for have it
    micro_batch = min(run.parallel.micro_batch, -(-run.stages[0].batch_tokens // (run.model.seq_len * gpus)))
    shard = run.parallel.strategy != "ddp"
    return training_memory_bytes(
        run.model, micro_batch, gpus=gpus, shard=shard, precision=precision, recompute=run.parallel.recompute
    )


def _size(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}; found {dtype!r}")
    return DTYPE_BYTES[dtype]
