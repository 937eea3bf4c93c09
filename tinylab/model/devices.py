"""What GPUs can do: dense bf16 peak and memory, by name (no torch)."""

import re
from dataclasses import dataclass

from tinylab.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    """Name in full."""
    bf16_tflops: float | None
    """Peak of dense bf16 matrix products with fp32 sums, the denominator of MFU; absent: none in hardware."""
    memory_gb: float
    """Memory as sold, in 10^9 bytes."""
    pattern: str
    """Regular expression for the name that the driver reports."""


# NVIDIA's data sheets (products/data-center and the GeForce architecture white papers), figures without sparsity.
GPUS: dict[str, Gpu] = {
    "a100-40g": Gpu(name="NVIDIA A100 40 GB", bf16_tflops=312, memory_gb=40, pattern=r"A100.*40G"),
    "a100-80g": Gpu(name="NVIDIA A100 80 GB", bf16_tflops=312, memory_gb=80, pattern=r"A100.*80G"),
    "h100-sxm": Gpu(name="NVIDIA H100 SXM 80 GB", bf16_tflops=989, memory_gb=80, pattern=r"H100(?!.*(PCIe|NVL)).*"),
    "h100-pcie": Gpu(name="NVIDIA H100 PCIe 80 GB", bf16_tflops=756, memory_gb=80, pattern=r"H100.*PCIe"),
    "h200": Gpu(name="NVIDIA H200 SXM 141 GB", bf16_tflops=989, memory_gb=141, pattern=r"H200(?!.*NVL).*"),
    "b200": Gpu(name="NVIDIA B200 180 GB", bf16_tflops=2250, memory_gb=180, pattern=r"\bB200"),
    "l40s": Gpu(name="NVIDIA L40S 48 GB", bf16_tflops=362, memory_gb=48, pattern=r"L40S"),
    "l4": Gpu(name="NVIDIA L4 24 GB", bf16_tflops=121, memory_gb=24, pattern=r"\bL4\b"),
    "rtx-4090": Gpu(name="NVIDIA GeForce RTX 4090 24 GB", bf16_tflops=165, memory_gb=24, pattern=r"RTX 4090(?! D)"),
    "rtx-3090": Gpu(name="NVIDIA GeForce RTX 3090 24 GB", bf16_tflops=71, memory_gb=24, pattern=r"RTX 3090(?! Ti)"),
    "v100-32g": Gpu(name="NVIDIA V100 32 GB", bf16_tflops=None, memory_gb=32, pattern=r"V100.*32G"),
    "v100-16g": Gpu(name="NVIDIA V100 16 GB", bf16_tflops=None, memory_gb=16, pattern=r"V100.*16G"),
    "t4": Gpu(name="NVIDIA T4 16 GB", bf16_tflops=None, memory_gb=16, pattern=r"\bT4\b"),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of a short name such as `a100-40g`. Raises ConfigError naming the known ones."""
    key = name.lower().replace("_", "-").replace(" ", "-")
    key = {"h100": "h100-sxm", "4090": "rtx-4090", "3090": "rtx-3090"}.get(key, key)
    if key not in GPUS:
        raise ConfigError(f"gpu must be one of {', '.join(GPUS)}; found {name!r}. {did_you_mean(key, GPUS)}".strip())
    return GPUS[key]


def bf16_peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by the name its driver reports (`NVIDIA A100-SXM4-40GB`); None if unknown."""
    for gpu in GPUS.values():
        if gpu.bf16_tflops is not None and re.search(gpu.pattern, device_name, re.IGNORECASE):
            return gpu.bf16_tflops * 1e12
    return None
