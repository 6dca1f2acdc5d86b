"""The hardware catalog, looking names up in it, and detection against fake drivers and fake /proc and /sys trees."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from qwenfit.catalog import read_csv
from qwenfit.detect import cpu_host, detect_hardware, measure_bandwidth, nvidia_devices, read_limits
from qwenfit.detect.apple import apple_host
from qwenfit.detect.bandwidth import _Reader
from qwenfit.detect.cpu import read_cpuinfo
from qwenfit.errors import NotFound, QwenfitError, UsageError
from qwenfit.hardware import GIB, all_devices, capability_notes, cost_key, cpu_names, find_device, with_bandwidth
from qwenfit.planning.planner import plan, this_device

GUIDE_CARDS = [
    *("GTX 1660", "T4", "RTX 2080", "RTX 3060", "RTX 3060 12GB", "RTX 3060 Ti", "RTX 3070", "RTX 3080", "RTX 3090"),
    *("RTX 4090", "A100 40GB", "A100 80GB", "H100"),
]


# --- the catalog


def test_every_row_has_a_source_and_sane_figures() -> None:
    for row in read_csv("gpus.csv"):
        assert len(row["source"]) > 15, row["name"]
        assert bool(row["price_usd"]) == bool(row["price_source"]), row["name"]
    for device in all_devices():
        assert 4 * GIB <= device.memory_bytes <= 512 * GIB
        assert 60e9 < device.bandwidth <= 8e12
        assert device.flops["fp16"] >= device.flops["fp32"]
        assert all(1e12 < peak < 6e15 for peak in device.flops.values())
        assert 0.85 < device.usable_bytes / device.memory_bytes <= 1 or device.kind == "unified"
        assert (device.vendor == "nvidia") == (device.compute_capability is not None)


def test_published_dense_peaks() -> None:
    bf16 = {"A100-SXM4-80GB": 312e12, "H100-SXM5-80GB": 989.4e12, "RTX 4090": 165.2e12, "RTX 3090": 71.2e12}
    bf16 |= {"RTX 5090": 209.5e12, "L4": 121e12, "A10": 125e12, "MI300X": 1307.4e12, "B200": 2250e12}
    assert {name: find_device(name).flops["bf16"] for name in bf16} == bf16
    assert find_device("V100-SXM2-32GB").flops["fp16"] == 125e12
    assert find_device("A100-SXM4-80GB").bandwidth == 2039e9
    assert find_device("A100-PCIE-80GB").bandwidth == 1935e9
    assert find_device("A100-SXM4-80GB").link_bandwidth == 300e9  # NVLink 3: 600 GB/s both ways
    assert find_device("A100-SXM4-80GB").memory_bytes == 85_899_345_920
    assert find_device("A100-SXM4-80GB").usable_bytes == pytest.approx(79.15 * GIB, rel=1e-3)


# fp16 FLOP per SM and clock with fp32 accumulate, dense, of the whitepapers: full boards and GeForce ones.
FP16_RATE = {"7.0": (1024, 1024), "7.5": (1024, 512), "8.0": (2048, 2048), "8.6": (1024, 512), "8.9": (1024, 512)}
FP16_RATE |= {"9.0": (4096, 4096), "10.0": (8192, 8192), "12.0": (1024, 512)}
INT8_RATE = {"7.5": 2048, "8.0": 4096, "8.6": 2048, "8.9": 2048, "9.0": 8192, "10.0": 16384, "12.0": 2048}
OFF_CLOCK = {"H20", "H100-PCIE-80GB"}  # capped, and rated at another clock


def nvidia_rows() -> list[dict[str, str]]:
    rows = [row for row in read_csv("gpus.csv") if row["vendor"] == "nvidia"]
    return [row for row in rows if row["tensor_cores"] == "yes" and row["name"] not in OFF_CLOCK]


@pytest.mark.parametrize("row", nvidia_rows(), ids=lambda row: row["name"])
def test_nvidia_peaks_are_units_times_clock_times_the_dense_rate(row: dict[str, str]) -> None:
    units_hz = int(row["units"]) * float(row["boost_mhz"]) * 1e6
    cc, geforce = row["compute_capability"], row["name"].startswith("RTX") and row["name"] != "RTX A6000"
    assert float(row["fp16_tflops"]) * 1e12 == pytest.approx(units_hz * FP16_RATE[cc][geforce], rel=0.02)
    if row["int8_tops"]:
        assert float(row["int8_tops"]) * 1e12 == pytest.approx(units_hz * INT8_RATE[cc], rel=0.02)
    if cc >= "8" or cc.startswith("1"):
        assert row["bf16_tflops"] == row["fp16_tflops"]


def test_cpu_platform_bandwidth_is_channels_times_transfers_times_eight_bytes() -> None:
    expected = {"Desktop DDR4-3200": 51.2e9, "Desktop DDR5-5600": 89.6e9, "EPYC 9004": 460.8e9}
    expected |= {"EPYC 7003": 204.8e9, "Xeon Sapphire Rapids": 307.2e9}
    assert {name: find_device(f"{name} 64GB").bandwidth for name in expected} == expected
    assert all(row["source"] for row in read_csv("cpus.csv"))
    assert find_device("epyc genoa 768gb").memory_bytes == 768 * GIB


# --- names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("A100 80GB", "A100-SXM4-80GB"),
        ("a100-80g", "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIE-80GB"),
        ("a100 40gb", "A100-SXM4-40GB"),
        ("H100", "H100-SXM5-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM5-80GB"),
        ("h100 pcie", "H100-PCIE-80GB"),
        ("NVIDIA H200", "H200-SXM-141GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("4090", "RTX 4090"),
        ("rtx3060", "RTX 3060 12GB"),
        ("3060 Ti", "RTX 3060 Ti"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("Tesla T4", "T4"),
        ("A6000", "RTX A6000"),
        ("Ascend910B", "Ascend 910B"),
        ("Hygon DCU Z100", "DCU Z100"),
        ("Intel Arc A770", "Arc A770"),
        ("Apple M2 Max 96GB", "Apple M2 Max 96GB"),
        ("m4 pro 48g", "Apple M4 Pro 48GB"),
    ],
)
def test_a_device_is_found_as_people_write_it(written: str, meant: str) -> None:
    assert find_device(written).name == meant


@pytest.mark.parametrize("device", all_devices(), ids=lambda device: device.name)
def test_every_device_is_found_by_its_own_name(device) -> None:  # type: ignore[no-untyped-def]
    assert find_device(device.name) == device
    assert find_device(device.name.lower().replace("-", " ")) == device


@pytest.mark.parametrize("name", GUIDE_CARDS)
def test_every_card_of_the_guide_is_known(name: str) -> None:
    assert find_device(name).vendor == "nvidia"


@pytest.mark.parametrize("name", ["A100", "V100", "Apple M2 Max", "EPYC 9004"])
def test_a_memory_size_is_never_guessed(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_device(name)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("RTX 4095", "RTX 4090"),
        ("L40", "L40S"),
        ("A10G", "A10"),
        ("RTX 4090 48GB", "RTX 4090"),
        ("RTX 3060 Laptop GPU", "3060"),
        ("H2000", "H200-SXM-141GB"),
        ("EPYC 700", "EPYC 7003"),
    ],
)
def test_an_unknown_card_is_not_taken_for_another(name: str, near: str) -> None:
    with pytest.raises(NotFound) as caught:
        find_device(name)
    assert near in str(caught.value.hint)


@pytest.mark.parametrize("name", ["", "banana", "\x00", "9" * 5000, "80GB"])
def test_absurd_names_end_in_one_sentence(name: str) -> None:
    with pytest.raises(NotFound):
        find_device(name)


def test_cheapest_first_ranks_by_price_then_memory() -> None:
    ranked = [device.name for device in sorted(all_devices(), key=cost_key)]
    assert (
        ranked.index("GTX 1660") < ranked.index("RTX 3060 12GB") < ranked.index("RTX 3090") < ranked.index("RTX 5090")
    )
    assert ranked.index("A100-PCIE-40GB") < ranked.index("A100-SXM4-80GB") < ranked.index("B200")


# --- what a card cannot do


def test_bf16_starts_with_ampere() -> None:
    for name in ("GTX 1660", "T4", "RTX 2080 Ti", "V100 16GB"):
        assert not find_device(name).bf16
        assert any("No bf16" in note for note in capability_notes(find_device(name)))
    assert all(find_device(name).bf16 for name in ("RTX 3060", "A100 40GB", "L4", "H100", "MI300X", "Apple M3 16GB"))


def test_flash_attention_by_generation() -> None:
    versions = {"RTX 3090": 2, "H100": 2, "5090": 2, "MI300X": 2, "T4": 1, "RTX 2080": 1, "V100 32GB": 0, "GTX 1660": 0}
    assert {name: find_device(name).flash_attention for name in versions} == versions
    assert "FlashAttention 1" in " ".join(capability_notes(find_device("T4")))


def test_the_gtx_1660_has_no_tensor_cores_and_volta_no_int8_path() -> None:
    assert not find_device("GTX 1660").tensor_cores
    assert "no tensor cores" in " ".join(capability_notes(find_device("GTX 1660")))
    assert "int8" not in find_device("V100 16GB").flops
    assert "No int8" in " ".join(capability_notes(find_device("V100 16GB")))
    assert capability_notes(find_device("A100 80GB")) == []


# --- NVIDIA detection


class FakeError(Exception):
    pass


class FakeMissing(FakeError):
    pass


def fake_nvml(*cards: SimpleNamespace, error: Exception | None = None) -> ModuleType:
    """A pynvml with these cards: name, total, free, cc, and for cards off the catalog mem_mhz, bus, cores, sm_mhz."""
    nvml = ModuleType("fake_pynvml")

    def init() -> None:
        if error is not None:
            raise error

    def ask(field: str):  # type: ignore[no-untyped-def]
        def answer(card: SimpleNamespace) -> int:
            if not hasattr(card, field):
                raise FakeError("Not Supported")
            return int(getattr(card, field))

        return answer

    nvml.__dict__.update(
        NVMLError=FakeError,
        NVMLError_LibraryNotFound=FakeMissing,
        NVMLError_DriverNotLoaded=FakeMissing,
        NVML_CLOCK_MEM=2,
        NVML_CLOCK_SM=1,
        nvmlInit=init,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: cards[index],
        nvmlDeviceGetUUID=lambda card: card.uuid,
        nvmlDeviceGetName=lambda card: card.name,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(
            total=card.total, free=card.free, used=card.total - card.free
        ),
        nvmlDeviceGetCudaComputeCapability=lambda card: card.cc,
        nvmlDeviceGetMaxClockInfo=lambda card, which: ask("mem_mhz" if which == 2 else "sm_mhz")(card),
        nvmlDeviceGetMemoryBusWidth=ask("bus"),
        nvmlDeviceGetNumGpuCores=ask("cores"),
    )
    return nvml


A100 = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", uuid="GPU-aaaa-1", total=81920 << 20, free=70000 << 20, cc=(8, 0))
T4 = SimpleNamespace(name="Tesla T4", uuid="GPU-bbbb-2", total=15360 << 20, free=15000 << 20, cc=(7, 5))


def test_a_known_card_takes_the_catalogs_figures_and_the_drivers_memory() -> None:
    (device,) = nvidia_devices(fake_nvml(A100), {})
    assert (device.name, device.bandwidth, device.detected) == ("A100-SXM4-80GB", 2039e9, True)
    assert device.memory_bytes == 81920 << 20
    assert device.usable_bytes == 70000 << 20  # another process holds the rest


def test_cuda_visible_devices_selects_and_orders() -> None:
    def names(value: str) -> list[str]:
        return [device.name for device in nvidia_devices(fake_nvml(A100, T4), {"CUDA_VISIBLE_DEVICES": value})]

    assert names("1,0") == ["T4", "A100-SXM4-80GB"]
    assert names("GPU-bbbb") == ["T4"]
    assert names("0,7,1") == ["A100-SXM4-80GB"]  # as in CUDA: what follows an invalid entry is invisible
    assert names("") == names("-1") == []
    with pytest.raises(QwenfitError, match="MIG"):
        names("MIG-1234")


def test_an_unknown_card_gets_bandwidth_and_flops_from_its_clocks() -> None:
    card = SimpleNamespace(name="NVIDIA GeForce RTX 3080 Ti", uuid="GPU-c", total=12 * GIB, free=11 * GIB, cc=(8, 6))
    card.__dict__.update(mem_mhz=9501, bus=384, cores=10240, sm_mhz=1665)
    (device,) = nvidia_devices(fake_nvml(card), {})
    assert device.bandwidth == pytest.approx(912.4e9, rel=1e-3)  # its data sheet
    assert device.flops["fp32"] == pytest.approx(34.1e12, rel=1e-2)
    assert device.flops["bf16"] == pytest.approx(68.2e12, rel=1e-2)
    assert device.bandwidth_estimated and device.units == 80


def test_the_8_gb_variant_of_a_card_is_not_taken_for_the_12_gb_one() -> None:
    card = SimpleNamespace(name="NVIDIA GeForce RTX 3060", uuid="GPU-d", total=8 * GIB, free=7 * GIB, cc=(8, 6))
    card.__dict__.update(mem_mhz=7501, bus=128, cores=3584, sm_mhz=1777)
    (device,) = nvidia_devices(fake_nvml(card), {})
    assert device.bandwidth == pytest.approx(240e9, rel=1e-2)


def test_a_pascal_card_has_no_tensor_path() -> None:
    card = SimpleNamespace(name="NVIDIA GeForce GTX 1080 Ti", uuid="GPU-e", total=11 * GIB, free=11 * GIB, cc=(6, 1))
    card.__dict__.update(mem_mhz=5505, bus=352, cores=3584, sm_mhz=1911)
    (device,) = nvidia_devices(fake_nvml(card), {})
    assert not device.bf16 and not device.tensor_cores and "int8" not in device.flops
    assert device.flash_attention == 0
    assert device.flops["fp16"] < device.flops["fp32"]


def test_an_absent_driver_is_silent_and_a_broken_one_is_said() -> None:
    assert nvidia_devices(fake_nvml(error=FakeMissing()), {}) == []
    with pytest.raises(QwenfitError, match="version mismatch"):
        nvidia_devices(fake_nvml(error=FakeError("Driver/library version mismatch")), {})
    nameless = SimpleNamespace(name="GRID X", uuid="GPU-f", total=GIB, free=GIB, cc=(8, 0))
    with pytest.raises(QwenfitError, match="GRID X"):
        nvidia_devices(fake_nvml(nameless), {})


def test_real_nvml_has_every_function_that_the_fake_one_has() -> None:
    pynvml = pytest.importorskip("pynvml")
    assert [name for name in vars(fake_nvml()) if not name.startswith("__") and not hasattr(pynvml, name)] == []


# --- CPU and memory detection

CPUINFO = """processor\t: {n}
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9654 96-Core Processor
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu avx2 fma f16c avx512f avx512_vnni avx512_bf16

"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def host(root: Path, files: dict[str, str] | None = None, threads: int = 8) -> Path:
    """A Genoa host of 64 GiB, 60 available: `threads` processors, two to a core."""
    cpuinfo = "".join(CPUINFO.format(n=n, core=n // 2) for n in range(threads))
    meminfo = f"MemTotal: {64 * 1024**2} kB\nMemFree: 1 kB\nMemAvailable: {60 * 1024**2} kB\n"
    return write(root, {"proc/cpuinfo": cpuinfo, "proc/meminfo": meminfo, **(files or {})})


def test_cores_flags_memory_and_an_estimated_bandwidth(tmp_path: Path) -> None:
    device = cpu_host(host(tmp_path), affinity=range(8))
    assert (device.name, device.architecture) == ("AMD EPYC 9654 96-Core Processor", "zen4")
    assert device.units == 4  # hyper-threads counted once
    assert device.memory_bytes == 64 * GIB and device.free_bytes == 60 * GIB
    assert device.bandwidth == 4 * 10e9 and device.bandwidth_estimated  # four cores do not reach 460 GB/s
    assert device.flops["fp32"] == 4 * 3.5e9 * 32 and device.bf16
    assert device.features == ("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16")
    assert not with_bandwidth(device, 33e9).bandwidth_estimated


def test_a_guest_that_does_not_see_amx_has_no_tiles_and_not_their_speed(tmp_path: Path) -> None:
    xeon = CPUINFO.replace("AuthenticAMD", "GenuineIntel").replace("family\t: 25", "family\t: 6")
    xeon = xeon.replace("model\t\t: 17", "model\t\t: 207").format(n=0, core=0)
    without = cpu_host(host(tmp_path / "a", {"proc/cpuinfo": xeon}), affinity=[0])
    seen = xeon.replace("avx512_bf16", "avx512_bf16 amx_tile amx_bf16 amx_int8")
    with_tiles = cpu_host(host(tmp_path / "b", {"proc/cpuinfo": seen}), affinity=[0])
    assert without.architecture == with_tiles.architecture == "emerald-rapids"
    assert with_tiles.tensor_cores and not without.tensor_cores and without.bf16
    assert without.flops["bf16"] == 2 * without.flops["fp32"] < with_tiles.flops["bf16"] / 10
    assert without.flops["int8"] == 4 * without.flops["fp32"]


def test_affinity_leaves_fewer_cores(tmp_path: Path) -> None:
    assert cpu_host(host(tmp_path), affinity={0, 1, 4}).units == 2


def test_an_unknown_cpu_counts_as_a_plain_desktop_and_arm_without_a_model_name_works(tmp_path: Path) -> None:
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU part\t: 0xd40\n\n"
    device = cpu_host(host(tmp_path, {"proc/cpuinfo": arm}), affinity={0})
    assert device.source.startswith("Desktop DDR4-3200") and device.bandwidth == 10e9
    assert device.features == ("asimd", "asimddp", "i8mm", "bf16")


def test_an_unknown_cpu_has_the_instructions_that_it_shows(tmp_path: Path) -> None:
    """A guest with AMX said to be of family 6, model 167, a desktop's: its plan said that it had no bf16 at all."""
    guest = CPUINFO.replace("AuthenticAMD", "GenuineIntel").replace("family\t: 25", "family\t: 6")
    guest = guest.replace("model\t\t: 17", "model\t\t: 167").format(n=0, core=0)
    tiles = guest.replace("avx512_bf16", "avx512_bf16 amx_tile amx_bf16 amx_int8")
    device = cpu_host(host(tmp_path / "a", {"proc/cpuinfo": tiles}), affinity=[0])
    assert device.source.startswith("Xeon Sapphire Rapids (assumed") and device.bandwidth == 10e9
    assert device.bf16 and device.tensor_cores and not capability_notes(device)
    vectors = cpu_host(host(tmp_path / "b", {"proc/cpuinfo": guest}), affinity=[0])
    assert vectors.bf16 and "int8" in vectors.flops and not vectors.tensor_cores
    plain = cpu_host(host(tmp_path / "c", {"proc/cpuinfo": guest.split(" avx512f")[0] + "\n\n"}), affinity=[0])
    assert plain.source.startswith("Desktop DDR4-3200") and len(capability_notes(plain)) == 2


V2 = {
    "proc/self/cgroup": "0::/pod/box\n",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    "sys/fs/cgroup/pod/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/pod/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
    "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/pod/box/memory.max": "max\n",
    "sys/fs/cgroup/pod/box/memory.current": f"{4 * GIB}\n",
    "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
}


def test_cgroup_v2_limits_of_the_group_above_count(tmp_path: Path) -> None:
    limits = read_limits(write(tmp_path, V2))
    assert limits.memory == 8 * GIB
    assert limits.memory_free == 5 * GIB  # 8 - (5 used - 2 reclaimable)
    assert limits.cpus == 1.5
    device = cpu_host(host(tmp_path), affinity=range(8))
    assert (device.memory_bytes, device.usable_bytes, device.units) == (8 * GIB, 5 * GIB, 1.5)


def test_cgroup_v1_limits_and_its_word_for_unlimited(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n",
        "proc/self/mountinfo": (
            "41 23 0:31 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            "42 23 0:32 /docker/abc /sys/fs/cgroup/cpu rw master:1 - cgroup cgroup rw,cpu,cpuacct\n"
        ),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 9\ntotal_inactive_file {GIB}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    limits = read_limits(write(tmp_path, files))
    assert (limits.memory, limits.memory_free, limits.cpus) == (4 * GIB, 2 * GIB, 0.5)
    unlimited = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    }
    limits = read_limits(write(tmp_path, unlimited))
    assert (limits.memory, limits.memory_free, limits.cpus) == (None, None, None)


def test_a_group_over_its_limit_leaves_nothing_and_no_cgroups_leave_all(tmp_path: Path) -> None:
    over = V2 | {"sys/fs/cgroup/pod/memory.current": f"{20 * GIB}\n"}
    assert read_limits(write(tmp_path / "a", over)).memory_free == 0
    assert read_limits(tmp_path / "nothing").memory is None


def test_apple_silicon_from_sysctl() -> None:
    values = {"machdep.cpu.brand_string": "Apple M2 Max", "hw.memsize": str(64 * GIB)}
    device = apple_host(values.__getitem__, available=60 * GIB)
    assert (device.kind, device.bandwidth, device.memory_bytes) == ("unified", 400e9, 64 * GIB)
    assert device.usable_bytes == 48 * GIB  # macOS lets the GPU use three quarters
    with pytest.raises(NotFound, match="i7"):
        apple_host({**values, "machdep.cpu.brand_string": "Intel(R) Core(TM) i7"}.__getitem__, available=GIB)


@pytest.mark.timing
def test_this_machine_is_detected_quickly() -> None:
    detect_hardware()  # reads the catalog once
    start = time.perf_counter()
    devices = detect_hardware()
    elapsed = time.perf_counter() - start
    assert devices[-1].kind in ("cpu", "unified")
    assert 0 < devices[-1].usable_bytes <= devices[-1].memory_bytes
    if all(device.vendor != "nvidia" for device in devices):
        assert elapsed < 0.05


@pytest.mark.skipif(os.name == "nt", reason="sched_getaffinity")
def test_a_bandwidth_measurement_reads_what_it_counts() -> None:
    size = 8 << 20
    rate = measure_bandwidth(seconds=0.05, threads=1, buffer_bytes=size)
    assert 0.2e9 < rate < 1e12 and math.isfinite(rate)
    reader = _Reader(size)
    reader._view[size - 1] = b"\0"
    with pytest.raises(AssertionError):  # the last byte is read too
        reader.read()


def test_hardware_imports_nothing_heavy() -> None:
    code = (
        "import sys, qwenfit.hardware as h, qwenfit.detect as d; d.detect_hardware(); h.find_device('4090');"
        "print([m for m in ('torch','numpy','transformers','psutil') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cpu_platform_names_are_distinct() -> None:
    assert len(set(cpu_names())) == len(cpu_names())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux")
def test_a_pinned_main_thread_does_not_hide_the_other_cores() -> None:
    """OpenMP pins every thread of its pool to one core, the main thread with them."""
    before, mine = read_cpuinfo(), os.sched_getaffinity(0)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert read_cpuinfo() == before
    finally:
        os.sched_setaffinity(0, mine)
        done.set()
        other.join()


def test_several_gpus_of_this_machine_are_planned_for_the_fullest_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [replace(find_device("RTX 3090"), free_bytes=free, detected=True) for free in (9 * GIB, 20 * GIB, 14 * GIB)]
    cards.append(replace(find_device("RTX 4090"), free_bytes=18 * GIB, detected=True))
    monkeypatch.setattr("qwenfit.detect.detect_hardware", lambda: [*cards, cpu_host()])
    assert [this_device(n).usable_bytes // GIB for n in (1, 2, 3)] == [20, 14, 9]
    with pytest.raises(UsageError, match="3 x RTX 3090, 1 x RTX 4090, not 4 GPUs of a kind") as refused:
        this_device(4)
    assert refused.value.hint and "--gpu" in refused.value.hint
    assert plan("Qwen-7B", gpus=3, advise=False).capacity == 9 * GIB
