"""Writes nf4.npz: what bitsandbytes makes of awkward weights in NF4.

pip install -e '.[oracle]' && python -m tests.goldens.make_nf4
"""

from pathlib import Path

import ml_dtypes
import numpy as np

BLOCK = 64


def weights() -> dict[str, np.ndarray]:
    """[out, in] as PyTorch has it, float32 or bfloat16; whole blocks of inputs."""
    rng = np.random.default_rng(2305_14314)
    normal = rng.standard_normal((24, 4 * BLOCK)).astype(np.float32)
    zeros = normal[:8].copy()
    zeros[::2] = 0
    zeros[1, BLOCK : 2 * BLOCK] = -0.0
    zeros[3, 1:] = 0  # all but one number
    # From 1e-30 to 1e30 in steps of ten, and the smallest normal number.
    scales = 10.0 ** np.arange(-30, 31).repeat(BLOCK).reshape(-1, BLOCK)
    extreme = (rng.standard_normal(scales.shape) * scales).astype(np.float32)
    extreme[0] = np.finfo(np.float32).tiny * rng.choice([-1, 1], BLOCK)
    return {
        "normal": normal,
        "bfloat16": (0.02 * normal).astype(ml_dtypes.bfloat16),
        "heavy_tails": rng.standard_t(2, (8, 2 * BLOCK)).astype(np.float32),
        "zeros": zeros,
        "ties": ties(),
        "extreme": extreme,
    }


def ties() -> np.ndarray:
    """The midpoints of neighbouring codes and the floats beside them, times powers of two."""
    from baichuan_jax.model.quantized import NF4_CODE

    code = np.array(NF4_CODE, np.float32)
    middle = (code[:-1] + code[1:]) / np.float32(2)
    row = np.concatenate(
        [code, middle, np.nextafter(middle, np.float32(-2)), np.nextafter(middle, np.float32(2))]
    )
    row = np.concatenate([row, np.full(BLOCK - len(row), 1, np.float32)])
    return np.stack([row * np.float32(factor) for factor in (1, 0.5, 4, -1)])


def quantized() -> dict[str, np.ndarray]:
    """NAME.codes [out, in/2], NAME.scales [out, in/64], NAME.values [out, in], by bitsandbytes."""
    import torch
    from bitsandbytes import functional

    arrays = {}
    for name, weight in weights().items():
        dtype = torch.float32 if weight.dtype == np.float32 else torch.bfloat16
        tensor = torch.from_numpy(weight.astype(np.float32)).to(dtype)
        codes, state = functional.quantize_4bit(tensor, blocksize=BLOCK, quant_type="nf4")
        state.dtype = torch.float32
        values = functional.dequantize_4bit(codes, state)
        arrays[f"{name}.codes"] = codes.numpy().reshape(len(weight), -1)
        arrays[f"{name}.scales"] = state.absmax.numpy().reshape(len(weight), -1)
        arrays[f"{name}.values"] = values.numpy()
    return arrays


if __name__ == "__main__":
    np.savez_compressed(Path(__file__).with_name("nf4.npz"), **quantized())
