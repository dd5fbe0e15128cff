"""Model FLOPs utilisation (MFU): the arithmetic that the model needs, by what the device could do in that time."""

PEAK = {
    # dense bf16 FLOP/s of one device as jax counts devices, from the makers' data sheets
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak(device_kind: str) -> float | None:
    """bf16 FLOP/s of a device, None where the table lacks it."""
    return PEAK.get(device_kind)


def mfu(forward_flops: float, examples_per_second: float, peak_flops: float) -> float:
    """Three times the forward pass (one forward, two backward; what remat computes again is not counted), by the peak.

    As Chowdhery et al. 2022, arXiv:2204.02311, appendix B, define it, but with attention as it is computed: causal
    attention counts the tiles that are not left out, where they count the whole square.
    """
    return 3 * forward_flops * examples_per_second / peak_flops
