"""What the cost model knows of each device: closed facts, the part of each peak that is reached, and why.

Units: FLOP/s (a multiplication and an addition are two), bytes, bytes/s, seconds, 32-bit registers. Peaks are
dense (no structured sparsity). Sources, one letter each, named in the entries:

- (a) NVIDIA A100 Tensor Core GPU Architecture whitepaper and A100 80GB SXM datasheet;
- (b) NVIDIA H100 Tensor Core GPU Architecture whitepaper and H100 SXM5 datasheet;
- (c) NVIDIA H200 datasheet;
- (d) NVIDIA DGX/HGX B200 datasheets, an eighth of the eight-GPU figures; L2 as ``cudaDeviceProp`` reports it;
- (e) AMD Instinct MI300X datasheet and CDNA 3 whitepaper; AMD's ROCm page on the MI300 microarchitecture;
- (f) CUDA C++ Programming Guide, table of technical specifications per compute capability.

What no vendor publishes is marked "assumed" and carries its reason. Fractions of peaks are judgements from
public benchmarks; this project has measured none of them. May be changed here: a figure, with its
source. This machine's processor is measured instead: :mod:`ttt_compiler.codegen.calibrate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ttt_compiler.errors import UnsupportedDeviceError

KIB, MIB, GB, TERA = 2**10, 2**20, 10**9, 10**12


@dataclass(frozen=True)
class Fraction:
    """Which part of a peak is reached, and why that and no other number.

    Attributes:
        value: above 0, at most 1.
        reason: why.
    """

    value: float
    reason: str

    def __post_init__(self) -> None:
        if not 0.0 < self.value <= 1.0:
            raise ValueError(f"a fraction of a peak lies above 0 and at most at 1, not at {self.value}")


@dataclass(frozen=True, eq=False)
class Device:
    """Closed facts of one device. Compared by identity: every device is one object.

    Attributes:
        name: as users type it.
        arch: compiler target, e.g. ``"sm_90"``.
        peaks: matrix FLOP/s by dtype of the operands, accumulating in fp32; fp32 is true fp32, not TF32.
        memory: bytes.
        hbm: bytes/s between memory and chip.
        l2: bytes of the last cache that all SMs share.
        l2_rate: bytes/s between it and the SMs.
        sms: streaming multiprocessors, or compute units.
        clock: Hz, boost.
        shared: bytes of shared memory per SM.
        shared_block: bytes of it that one program may take.
        shared_rate: bytes per clock and SM.
        registers: 32-bit registers per SM.
        registers_thread: most of them that one thread can hold.
        warp: threads of a warp.
        mma_rows: rows of the widest matrix instruction: an operand tile of fewer rows wastes the rest.
        launch: seconds from the end of one kernel to the start of the next in a stream.
        host: seconds the host needs to enqueue one kernel; 0 for a recorded graph of kernels.
        step: seconds that one dependent step of a resident program takes however small it is: wait for a
            copy, barrier, matrix unit start and drain.
        gemm: part of ``peaks`` that a large library GEMM reaches.
        scan: part of ``peaks`` that our kernel's main loop reaches, before its own limits are counted.
        attention: part of ``peaks`` that fused attention reaches on the prompt.
        hbm_part: part of ``hbm`` that a stream reaches.
        l2_part: part of ``l2_rate`` that a stream reaches.
        overlaps: whether arithmetic hides memory traffic inside of one kernel; a single core's do not.
        variants: further measured FLOP/s by name; only of a calibrated processor.
        sources: letters of the module's list, and what is assumed.
    """

    name: str
    arch: str
    peaks: Mapping[torch.dtype, float]
    memory: int
    hbm: float
    l2: int
    l2_rate: float
    sms: int
    clock: float
    shared: int
    shared_block: int
    shared_rate: float
    registers: int
    registers_thread: int
    warp: int
    mma_rows: int
    launch: float
    host: float
    step: float
    gemm: Fraction
    scan: Fraction
    attention: Fraction
    hbm_part: Fraction
    l2_part: Fraction
    overlaps: bool = True
    variants: Mapping[str, float] = field(default_factory=dict)
    sources: str = ""

    def peak(self, dtype: torch.dtype) -> float:
        """Matrix FLOP/s for operands of ``dtype``.

        Raises:
            UnsupportedDeviceError: the device's rate for it is not known here.
        """
        rate = self.peaks.get(dtype)
        if rate is None:
            name, *known = (str(d).removeprefix("torch.") for d in (dtype, *self.peaks))
            raise UnsupportedDeviceError(
                f"{self.name}: no matrix rate is known for {name}. Known: {', '.join(known)}"
            )
        return rate

    @property
    def hbm_reached(self) -> float:
        """Bytes/s that a stream from memory reaches."""
        return self.hbm * self.hbm_part.value

    @property
    def l2_reached(self) -> float:
        """Bytes/s that a stream from the shared cache reaches."""
        return self.l2_rate * self.l2_part.value


_GEMM = "cuBLAS and CUTLASS publish 65-80 % for K of thousands at power-limited clocks"
_SCAN = (
    "assumed: a Triton loop with two dependent matrix products per step reaches what fused attention "
    "forward reaches, not what a GEMM does"
)
_ATTENTION_2 = "FlashAttention-2 publishes 50-73 % of an A100 for causal prompts"
_ATTENTION_3 = "FlashAttention-3 publishes 60-75 % of an H100 for long causal prompts"
_HBM = "what copies and STREAM reach of the pin rate on HBM parts"
_L2 = "assumed: public micro-benchmarks reach about 5.5 of 9 TB/s on an H100"

A100 = Device(
    name="A100",
    arch="sm_80",
    peaks={
        torch.bfloat16: 312e12,
        torch.float16: 312e12,
        torch.float32: 19.5e12,
        torch.float64: 19.5e12,
    },
    memory=80 * GB,
    hbm=2.039 * TERA,
    l2=40 * MIB,
    l2_rate=5120 * 1.41e9,
    sms=108,
    clock=1.41e9,
    shared=164 * KIB,
    shared_block=163 * KIB,
    shared_rate=128,
    registers=65536,
    registers_thread=255,
    warp=32,
    mma_rows=16,
    launch=2e-6,
    host=5e-6,
    step=0.4e-6,
    gemm=Fraction(0.80, "cuBLAS reaches 250 of 312 TFLOP/s at K of thousands"),
    scan=Fraction(0.60, _SCAN),
    attention=Fraction(0.60, _ATTENTION_2),
    hbm_part=Fraction(0.87, _HBM),
    l2_part=Fraction(0.60, _L2),
    sources="(a) (f); L2: 5120 bytes per clock (a). launch, host, step: assumed",
)

H100 = Device(
    name="H100",
    arch="sm_90",
    peaks={
        torch.bfloat16: 989.4e12,
        torch.float16: 989.4e12,
        torch.float32: 66.9e12,
        torch.float64: 66.9e12,
    },
    memory=80 * GB,
    hbm=3.35 * TERA,
    l2=50 * MIB,
    l2_rate=5120 * 1.83e9,
    sms=132,
    clock=1.83e9,
    shared=228 * KIB,
    shared_block=227 * KIB,
    shared_rate=128,
    registers=65536,
    registers_thread=255,
    warp=32,
    mma_rows=64,
    launch=2e-6,
    host=5e-6,
    step=0.4e-6,
    gemm=Fraction(0.70, _GEMM),
    scan=Fraction(0.55, _SCAN),
    attention=Fraction(0.60, _ATTENTION_3),
    hbm_part=Fraction(0.90, _HBM),
    l2_part=Fraction(0.60, _L2),
    sources="(b) (f); L2 bytes per clock: assumed as (a), not published. launch, host, step: assumed",
)

H200 = replace(
    H100,
    name="H200",
    memory=141 * GB,
    hbm=4.8 * TERA,
    sources="(c): an H100 with other memory; the rest as there",
)

H800 = replace(
    H100,
    name="H800",
    sources=(
        "an H100 whose NVLink (400 GB/s) and fp64 are cut; on one GPU every figure used here is the H100's"
    ),
)

B200 = Device(
    name="B200",
    arch="sm_100",
    peaks={
        torch.bfloat16: 2250e12,
        torch.float16: 2250e12,
        torch.float32: 75e12,
        torch.float64: 37e12,
    },
    memory=180 * GB,
    hbm=7.7 * TERA,
    l2=126 * MIB,
    l2_rate=5120 / 132 * 148 * 1.85e9,
    sms=148,
    clock=1.85e9,
    shared=228 * KIB,
    shared_block=227 * KIB,
    shared_rate=128,
    registers=65536,
    registers_thread=255,
    warp=32,
    mma_rows=128,
    launch=2e-6,
    host=5e-6,
    step=0.4e-6,
    gemm=Fraction(0.70, "assumed: as on an H100"),
    scan=Fraction(0.45, "assumed: less than on an H100, whose loop does not use tensor memory either"),
    attention=Fraction(0.55, "assumed: exponentials and tensor memory traffic weigh more than on an H100"),
    hbm_part=Fraction(0.90, _HBM),
    l2_part=Fraction(0.60, _L2),
    sources="(d) (f); L2 bytes/s: assumed, an H100's bytes per clock and SM. launch, host, step: assumed",
)

MI300X = Device(
    name="MI300X",
    arch="gfx942",
    peaks={
        torch.bfloat16: 1307.4e12,
        torch.float16: 1307.4e12,
        torch.float32: 163.4e12,
        torch.float64: 163.4e12,
    },
    memory=192 * GB,
    hbm=5.3 * TERA,
    l2=256 * MIB,
    l2_rate=17.2 * TERA,
    sms=304,
    clock=2.1e9,
    shared=64 * KIB,
    shared_block=64 * KIB,
    shared_rate=128,
    registers=131072,
    registers_thread=512,
    warp=64,
    mma_rows=32,
    launch=3e-6,
    host=6e-6,
    step=0.5e-6,
    gemm=Fraction(0.50, "public hipBLASLt measurements: 600-700 of 1307 TFLOP/s, limited by power"),
    scan=Fraction(0.35, _SCAN),
    attention=Fraction(0.40, "public CK FlashAttention measurements: 450-550 TFLOP/s forward"),
    hbm_part=Fraction(0.80, "public STREAM measurements: 4.0-4.4 of 5.3 TB/s"),
    l2_part=Fraction(0.60, "assumed: as elsewhere"),
    sources=(
        "(e). The shared cache is the Infinity Cache: each die's L2 (4 MiB) is its own. launch, host, step: "
        "assumed"
    ),
)

DEVICES: tuple[Device, ...] = (A100, H100, H200, B200, MI300X, H800)


def device_named(name: str) -> Device:
    """The device of this name, in upper or lower case; ``"cpu"`` measures this machine's processor.

    Raises:
        UnsupportedDeviceError: there is none.
    """
    if name.lower() == "cpu":
        from ttt_compiler.codegen.calibrate import this_cpu

        return this_cpu()
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    known = ", ".join([*(d.name for d in DEVICES), "cpu"])
    raise UnsupportedDeviceError(f"nothing is known of a device called {name!r}. Known: {known}")


def device_of(reported: str) -> Device | None:
    """The device whose name is in what a driver reports, such as ``"NVIDIA H100 80GB HBM3"``."""
    return next((d for d in DEVICES if d.name in reported), None)
