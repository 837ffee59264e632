"""FLOPs of the model, and peak FLOP/s of GPUs."""

import re

from model.gpt import GPTConfig

# Dense peaks in TFLOP/s: (float32, TF32, float16 and bfloat16 with float32 accumulation). None: the chip has no such
# unit. From NVIDIA's datasheets and architecture whitepapers of each GPU, halved where they count sparsity.
_PEAKS = {
    r"NVIDIA A100.*": (19.5, 156, 312),
    r"NVIDIA H100 80GB HBM3": (66.9, 494.7, 989.4),
    r"NVIDIA H100 PCIe": (51.2, 378, 756),
    r"NVIDIA H200": (66.9, 494.7, 989.4),
    r"NVIDIA B200": (75, 1125, 2250),
    r"NVIDIA L40S": (91.6, 183, 362),
    r"NVIDIA L4": (30.3, 60.5, 121),
    r"NVIDIA A10G?": (31.2, 62.5, 125),
    r"NVIDIA GeForce RTX 3090": (35.6, 35.6, 71),
    r"NVIDIA GeForce RTX 4090": (82.6, 82.6, 165.2),
    r"NVIDIA GeForce RTX 5090": (104.8, 104.8, 209.5),
    r"Tesla V100.*": (15.7, None, 125),
}


def flops_per_token(config: GPTConfig, sequence_length: int) -> int:
    """FLOPs of a forward and a backward pass for one token: 6N + 6·L·C·T.

    N counts the parameters without the position table (which is looked up, not multiplied); the second term is causal
    attention, half of the full matrix (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B, halved).
    """
    N = config.num_params() - config.block_size * config.n_embd
    return 6 * N + 6 * config.n_layer * config.n_embd * sequence_length


def peak_flops(gpu: str, dtype: str, tensorcores: int) -> float | None:
    """Dense peak of a GPU in FLOP/s, or None if it is not known for certain.

    Args:
        gpu: the name as torch.cuda.get_device_name gives it.
        dtype: float32, float16 or bfloat16.
        tensorcores: 1 if float32 matmuls run as TF32.
    """
    for pattern, (fp32, tf32, half) in _PEAKS.items():
        if re.fullmatch(pattern, gpu):
            peak = half if dtype != "float32" else tf32 if tensorcores else fp32
            if dtype == "bfloat16" and "V100" in gpu:
                peak = None
            return peak * 1e12 if peak else None
    return None
