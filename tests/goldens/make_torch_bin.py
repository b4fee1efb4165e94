"""Writes torch_save.bin: a state dict as the real `torch.save` stores it.

pip install -e '.[oracle]' && python -m tests.goldens.make_torch_bin
"""

from pathlib import Path

import ml_dtypes
import numpy as np


def tensors() -> dict[str, np.ndarray]:
    """What the file holds: every dtype, a transposed view, and two parts of one storage."""
    base = np.arange(24, dtype=np.float32).reshape(4, 6) / 8 - 1
    return {
        "bfloat16": base.astype(ml_dtypes.bfloat16),
        "float16": base.astype(np.float16),
        "float32": base.reshape(2, 3, 4),
        "transposed": base.T,
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "linear.weight": base[:2, :3].copy(),
    }


def write(path: Path) -> None:
    """Saves `tensors` with PyTorch, through a module's state dict with its metadata."""
    import torch

    base = torch.tensor(tensors()["rows"].base)
    module = torch.nn.Module()
    module.linear = torch.nn.Linear(3, 2, bias=False)
    module.linear.weight.data = base[:2, :3].clone()
    state = module.state_dict()
    state["bfloat16"] = base.to(torch.bfloat16)
    state["float16"] = base.to(torch.float16)
    state["float32"] = base.clone().reshape(2, 3, 4)
    state["transposed"] = base.T
    state["rows"], state["columns"] = base[1:3], base[:, 2:5]
    torch.save(state, path)


if __name__ == "__main__":
    write(Path(__file__).with_name("torch_save.bin"))
