"""Peak dense bfloat16 rates of known accelerators, for the share of peak on the progress line."""

import jax

# device_kind prefix -> FLOP/s of one device, dense bfloat16, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
    """FLOP/s of all devices together; None when a device is not in the table (a CPU, for one)."""
    total = 0.0
    for device in jax.devices() if devices is None else devices:
        rates = [rate for prefix, rate in PEAK_FLOPS.items() if device.device_kind.startswith(prefix)]
        if not rates:
            return None
        total += rates[0]
    return total
