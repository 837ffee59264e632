"""What the chips can do, from NVIDIA's datasheets and architecture whitepapers. A new GPU is a row here, and one of
peaks in training/flops.py."""

from typing import NamedTuple

from training.flops import peak_flops


class Chip(NamedTuple):
    """Limits of one GPU."""

    name: str
    gpu: str
    """as torch.cuda.get_device_name gives it"""
    capability: int
    bandwidth: float
    """of device memory, bytes a second"""
    l2_bytes: int
    n_sms: int
    shared_per_block: int
    """bytes"""
    shared_per_sm: int
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32
    registers_per_sm: int = 65536

    def peak(self, dtype: str = "bfloat16", tensorcores: int = 0) -> float | None:
        """Dense FLOP/s of matrix products, where known."""
        return peak_flops(self.gpu, dtype, tensorcores)


KIB, MIB = 1 << 10, 1 << 20
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("A100", "NVIDIA A100-SXM4-80GB", 80, 2.039e12, 40 * MIB, 108, 163 * KIB, 164 * KIB),
        Chip("RTX 3090", "NVIDIA GeForce RTX 3090", 86, 0.936e12, 6 * MIB, 82, 99 * KIB, 100 * KIB, 1536, 16),
        Chip("RTX 4090", "NVIDIA GeForce RTX 4090", 89, 1.008e12, 72 * MIB, 128, 99 * KIB, 100 * KIB, 1536, 24),
        Chip("H100", "NVIDIA H100 80GB HBM3", 90, 3.352e12, 50 * MIB, 132, 227 * KIB, 228 * KIB),
        Chip("H200", "NVIDIA H200", 90, 4.8e12, 50 * MIB, 132, 227 * KIB, 228 * KIB),
        Chip("B200", "NVIDIA B200", 100, 8.0e12, 126 * MIB, 148, 227 * KIB, 228 * KIB),
        Chip("RTX 5090", "NVIDIA GeForce RTX 5090", 120, 1.792e12, 96 * MIB, 170, 99 * KIB, 100 * KIB, 1536, 24),
    )
}


def occupancy(chip: Chip, registers: int, shared: int, n_warps: int) -> float:
    """Resident warps over the most that an SM holds: CUDA's occupancy calculator, without clusters.

    Args:
        chip: the limits.
        registers: of a thread; handed out to warps in units of 256.
        shared: bytes of a block; the system takes another KiB of each.
        n_warps: of a block.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = chip.registers_per_sm // per_warp // 4 * 4 // n_warps  # warps go to the SM's four quarters
    by_shared = chip.shared_per_sm // (shared + KIB)
    by_threads = chip.threads_per_sm // (32 * n_warps)
    return min(by_registers, by_shared, by_threads, chip.blocks_per_sm) * 32 * n_warps / chip.threads_per_sm
