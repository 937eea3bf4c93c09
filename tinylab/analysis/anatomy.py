"""Tables of a model's parts and costs, computed from its configuration and counted on the model itself."""

from collections.abc import Mapping
from typing import Any

import pandas

from tinylab.config.architecture import Model
from tinylab.model.accounting import FORMULAS, flops_per_token, parameter_counts

PARTS = ("embedding", "attention", "mlp", "norms", "head")


def parameter_parts(model: Model) -> dict[str, int]:
    """Parameters of each part, without totals."""
    counts = parameter_counts(model)
    return {name: counts[name] for name in PARTS}


def tensor_table(model: Model) -> pandas.DataFrame:
    """Tensors of the embedding, one layer, final norm and head: our name, the checkpoint's name, shape and share."""
    from tinylab.model.names import name_map

    total = parameter_counts(model)["total"]
    rows: list[dict[str, Any]] = []
    for ours, parts in name_map(model).items():
        if ours.startswith("blocks.") and not ours.startswith("blocks.0."):
            continue
        times = model.n_layer if ours.startswith("blocks.") else 1
        for theirs, shape, _ in parts:
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            row = {"in memory": ours, "in a checkpoint": theirs, "shape": " × ".join(map(str, shape))}
            rows.append({**row, "times": times, "parameters": size * times, "share": size * times / total})
    return pandas.DataFrame(rows)


def flops_table(models: Mapping[str, Model]) -> pandas.DataFrame:
    """Training GFLOP per token of each model by every named formula."""
    rows = []
    for name, meaning in FORMULAS.items():
        costs = {f"{label} (GFLOP)": flops_per_token(m, formula=name) / 1e9 for label, m in models.items()}
        rows.append({"formula": name, "is": meaning, **costs})
    return pandas.DataFrame(rows)


def measured_counts(model: Model) -> pandas.DataFrame:
    """Parameters and training FLOPs, computed from the configuration and counted on the model.

    Counted on torch's meta device: the parameters, and the FLOPs of a forward and backward pass of one sequence by
    torch.utils.flop_counter, which like formula F does not halve attention for the causal mask.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tinylab.model.transformer import Llama

    with torch.device("meta"):
        llama = Llama(model)
        ids = torch.zeros(1, model.seq_len, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with counter:
        llama(ids).sum().backward()
    computed = (parameter_counts(model)["total"], model.seq_len * flops_per_token(model))
    counted = (sum(p.numel() for p in llama.parameters()), counter.get_total_flops())
    what = ("parameters", f"FLOPs of a sequence of {model.seq_len} tokens, forward and backward")
    return pandas.DataFrame({"what": what, "computed": computed, "counted": counted})
