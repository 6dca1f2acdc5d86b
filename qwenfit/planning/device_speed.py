"""What a device really reaches: bytes/s when reading weights, FLOP/s in large products, bytes/s over its links."""

from __future__ import annotations

from qwenfit.errors import UsageError
from qwenfit.hardware import Device, Hardware
from qwenfit.planning.constants import measured, read
from qwenfit.planning.stack import Stack

# Share of the peak bandwidth that a plain read was measured to reach, by card.
MEASURED_READ_SHARE = {
    "A100-SXM4-80GB": 0.834,  # about 1,700 of 2,039 GB/s at 330 W (gpt-fast README @32971d3)
    "H100-SXM5-80GB": 0.925,  # 3.10 of 3.352 TB/s, a large sum (our measurement, driver 580, torch 2.11)
    "H200-SXM-141GB": 0.90,  # 4.22 to 4.41 of 4.8 TB/s, a large sum (measurements/gpu-*-h200*.json)
}
READ_SHARE = 0.88  # cards that nobody measured: about the mean of the above
CHANNELS_BIND, CORES_BIND = 5.6e9, 7.5e9  # bytes/s a core: of whole Xeons at most (cpus.csv), of two in a guest
FEW_CORES = 4
A100_FP32_FLOPS = 19.5e12  # the card that the unpacking time was fitted on


def read_bandwidth(device: Device, stack: Stack) -> float:
    """Bytes/s at which a stack's matrix-vector products read weights."""
    if device.kind == "cpu":
        return device.bandwidth if device.detected and not device.bandwidth_estimated else device.bandwidth * READ_SHARE
    if stack.bandwidth_share is not None:
        return device.bandwidth * stack.bandwidth_share
    return device.bandwidth * MEASURED_READ_SHARE.get(device.name, READ_SHARE)


def cpu_read_share(device: Device, stack: Stack) -> float:
    """What decoding reads of what a plain read reaches on a CPU.

    More on cores that are too few for their memory's channels, as our kernels fetch ahead of themselves: more than all
    with AVX-512. Between CHANNELS_BIND and CORES_BIND a core it goes from one to the other. An estimate says nothing of
    many cores.
    """
    usual = measured("qwenfit_cpu_read")
    if stack.name != "qwenfit" or not device.units or (device.bandwidth_estimated and device.units > FEW_CORES):
        return usual
    wide = device.tensor_cores or "avx512f" in device.features
    ahead = measured("qwenfit_cpu_read_ahead" if wide else "qwenfit_cpu_read_ahead_avx2")
    few = (device.bandwidth / device.units - CHANNELS_BIND) / (CORES_BIND - CHANNELS_BIND)
    return usual + (ahead - usual) * min(1.0, max(0.0, few))


def matmul_flops(device: Device, precision: str) -> float:
    """FLOP/s of large products in the precision's compute type: 16-bit for int8 and int4 weights."""
    wanted = {"fp32": ("fp32",), "fp16": ("fp16", "fp32"), "bf16": ("bf16", "fp16", "fp32")}
    for dtype in wanted.get(precision, ("fp16", "bf16", "fp32")):
        if dtype in device.flops:
            tiles = device.kind == "cpu" and dtype == "bf16" and device.tensor_cores
            return device.flops[dtype] * (measured("qwenfit_cpu_tiles_share") if tiles else read("matmul_share"))
    raise UsageError(f"The arithmetic speed of {device.name} is not known, so its speed cannot be planned.")


def unpack_time(device: Device, stack: Stack) -> float:
    """Seconds to unpack one quantized weight: fitted on an A100, scaled by the plain cores' speed."""
    return stack.unpack * A100_FP32_FLOPS / device.flops.get("fp32", A100_FP32_FLOPS)


def link_bandwidth(hardware: Hardware) -> float:
    """Bytes/s of the slowest link between the devices, one direction, that large collectives reach."""
    inside = hardware.device.link_bandwidth or 16e9  # PCIe 3.0 x16 where a card's link is not known
    if hardware.nodes > 1:
        network = hardware.network_bandwidth or 12.5e9  # 100 Gb/s Ethernet when not given
        return min(inside, network) * read("link_share")
    return inside * read("link_share")
