"""The chips: memory, arithmetic, bandwidths of one JAX device, as published.

    flops      dense bfloat16 with float32 sums a second, float16 where marked; NVIDIA prints most
               of these doubled, "with sparsity"
    memory     GiB as the maker counts it; what a program may use is some hundred MiB less
    bandwidth  bytes a second to and from that memory
    link       bytes a second that one link carries one way; where links meet in a switch, all of a
               device's links together

0: not published here. Sources: TPUs, docs.cloud.google.com/tpu/docs/{v2,v3,v4,v5e,v5p,v6e,tpu7x},
and their links, jax-ml.github.io/scaling-book/tpus (one way, measured by its authors; a chip of v2,
v3 and TPU7x is two devices in JAX, each with half of the chip); GPUs, NVIDIA's datasheet of each.
Held by: tests/test_metrics.py, tests/test_aot.py.
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device, of a `device_kind` that `pattern` matches whole."""

  name: str
  pattern: str
  flops: float
  memory: float
  bandwidth: float
  link: float

  @property
  def memory_bytes(self) -> int:
    return int(self.memory * GIB)


# The first pattern that matches counts; no match (a CPU, a slice of a GPU, a chip not listed) is no
# chip.
#        name         device_kind                     flops       memory  bandwidth  link
CHIPS = tuple(Chip(*row) for row in (
    ('v2',        r'TPU v2',                      45e12 / 2,   8,      350e9,     0),
    ('v3',        r'TPU v3',                      123e12 / 2,  16,     450e9,     100e9),
    ('v4',        r'TPU v4',                      275e12,      32,     1228e9,    45e9),
    ('v5e',       r'TPU v5( lite|e)',             197e12,      16,     819e9,     45e9),
    ('v5p',       r'TPU v5p?',                    459e12,      95,     2765e9,    90e9),
    ('v6e',       r'TPU v6( lite|e)',             918e12,      32,     1640e9,    90e9),
    ('tpu7x',     r'TPU7x',                       2307e12 / 2, 96,     3690e9,    90e9),
    ('MIG',       r'.*\bMIG\b.*',                 0,           0,      0,         0),
    ('GB200',     r'NVIDIA GB200.*',              2500e12,     186,    8000e9,    900e9),
    ('B200',      r'NVIDIA B200.*',               2250e12,     180,    8000e9,    900e9),
    ('H200 NVL',  r'NVIDIA H200 NVL.*',           835.5e12,    141,    4800e9,    450e9),
    ('H100 NVL',  r'NVIDIA H100 NVL.*',           835.5e12,    94,     3900e9,    300e9),
    ('H200',      r'NVIDIA H200.*',               989e12,      141,    4800e9,    450e9),
    ('GH200',     r'NVIDIA GH200.*',              989e12,      96,     4000e9,    450e9),
    ('H100 PCIe', r'NVIDIA H100 PCIe.*',          756e12,      80,     2000e9,    300e9),
    ('H100',      r'NVIDIA H100.*HBM3.*',         989e12,      80,     3350e9,    450e9),
    ('A100 40GB', r'NVIDIA A100.*40GB.*',         312e12,      40,     1555e9,    300e9),
    ('A100',      r'NVIDIA A100.*',               312e12,      80,     1935e9,    300e9),
    ('L40S',      r'NVIDIA L40S',                 362e12,      48,     864e9,     32e9),
    ('L4',        r'NVIDIA L4',                   121e12,      24,     300e9,     32e9),
    ('A10',       r'NVIDIA A10',                  125e12,      24,     600e9,     32e9),
    ('RTX 4090',  r'NVIDIA GeForce RTX 4090',     165.2e12,    24,     1008e9,    32e9),
    ('RTX 3090',  r'NVIDIA GeForce RTX 3090',     71e12,       24,     936e9,     32e9),
    ('V100 SXM',  r'(Tesla|NVIDIA) V100-SXM.*',   125e12,      16,     900e9,     150e9),  # float16
    ('V100 PCIe', r'(Tesla|NVIDIA) V100-PCIE.*',  112e12,      16,     900e9,     16e9),   # float16
    ('T4',        r'(Tesla|NVIDIA) T4',           65e12,       16,     300e9,     16e9),   # float16
))


def chip_of(kind: str) -> Chip | None:
  """The chip of a device by its `device_kind`; None where unknown."""
  found = next((chip for chip in CHIPS if re.fullmatch(chip.pattern, kind)), None)
  return found if found and found.flops else None


def peak_flops(kind: str) -> float | None:
  """Published FLOP/s of a device by its `device_kind`; None where unknown."""
  chip = chip_of(kind)
  return chip.flops if chip else None
