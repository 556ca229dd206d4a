"""Graphics cards as XLA knows them when it compiles for one that isn't there, and the figures of the roofline.

A card is the fields of XLA's GpuTargetConfig that its compiler asks for, from NVIDIA's data sheets and tuning guides.
What planning needs of them is in `device_memory.CARDS`.
"""

import json
from typing import NamedTuple

from jaxgpt.training import device_memory
from jaxgpt.training.flops import PEAKS

CUDNN = (9, 12)  # the version for which XLA compiles
FP8 = (8, 9)  # the first with products of 8 bits; in the data sheets these are twice as fast as bfloat16's, dense too
CUDA = "12.8.0"  # of its runtime: where it isn't told, XLA takes it to be one without products of 8 bits


class Card(NamedTuple):
    name: str  # as JAX names such a device; its peak is the entry of `peaks.PEAKS` that it begins with
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each
    threads: int  # on each at once
    clock: float  # GHz
    shared_kib: int  # shared memory of each
    block_kib: int  # the most of it for one block
    cache_mib: int  # level 2
    memory: int  # bytes
    bandwidth: float  # bytes a second
    link: float  # bytes a second to the other cards, one way: NVLink, or PCIe

    def peak(self, dtype: str) -> float:
        """Returns the operations a second of products whose factors are of this dtype."""
        name = max((name for name in PEAKS if self.name.startswith(name)), key=len)
        bfloat16, float32 = PEAKS[name]
        assert bfloat16 is not None
        if dtype.startswith("f8"):
            assert self.capability >= FP8, f"{self.name} has no products of 8 bits"
            return 2e12 * bfloat16
        return 1e12 * (bfloat16 if dtype in ("bf16", "f16") else float32)

    def target(self) -> str:
        """Returns the text of its GpuTargetConfig."""
        major, minor = self.capability
        device = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_block_optin": self.block_kib * 1024,
            "shared_memory_per_core": self.shared_kib * 1024,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.cache_mib * 2**20,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "runtime_version": json.dumps(CUDA),
        }
        fields = " ".join(f"{name}: {value}" for name, value in device.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
            f'platform_name: "CUDA" dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }} '
            f'device_description_str: "{self.name}"'
        )


def _card(short: str, *chip: float) -> Card:
    """Returns the card of this short name, whose chip has these figures, in the order of the fields."""
    known = device_memory.CARDS[short]
    return Card(known.kind, known.capability, *chip, known.memory, known.bandwidth, known.link)  # type: ignore[arg-type]


CARDS = {
    "a100": _card("a100", 108, 64, 2048, 1.41, 164, 163, 40),
    "h100": _card("h100", 132, 128, 2048, 1.98, 228, 227, 50),
    "h200": _card("h200", 132, 128, 2048, 1.98, 228, 227, 50),
    "b200": _card("b200", 148, 128, 2048, 1.965, 228, 227, 126),
    "4090": _card("4090", 128, 128, 1536, 2.52, 100, 99, 72),
}
