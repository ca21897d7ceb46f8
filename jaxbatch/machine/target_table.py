"""The figures of accelerators, with their sources. :mod:`jaxbatch.machine.targets` makes targets from them.

Peaks are those of dense matrices; data sheets also print twice as much for sparse ones. Each is what the device can do at most.
"""

XLA_SPECS = (
    "the target files of the XLA compiler (openxla/xla, xla/backends/gpu/target_config/specs), or for cards without one the CUDA device properties"
)

_CARD = "CUDA device properties of the card"


def _sources(sheet: str, memory: str = XLA_SPECS) -> dict[str, str]:
    return {"memory": memory, "bandwidth": memory, "cache": memory, "peak": sheet, "interconnect": sheet, "usable": "JAX's page on GPU memory: 75%"}


def _peaks(float32: float, tensorfloat32: float | None = None, bfloat16: float | None = None, float16: float | None = None):
    """Peaks from TFLOP/s. Where tensor cores do not know a type, the cores for float32 compute it."""
    peaks = {
        "float32": float32,
        "tensorfloat32": tensorfloat32 or float32,
        "bfloat16": bfloat16 or float32,
        "float16": float16 or bfloat16 or float32,
    }
    return {name: 1e12 * value for name, value in peaks.items()}


# name: title, compute capability, cores (SMs), threads a core, float32 lanes a core, shared memory (a core, a block at most),
# clock in GHz, memory, bandwidth, L2 cache, peaks, interconnect, sources
NVIDIA = {
    "gtx1080ti": ("NVIDIA GTX 1080 Ti", (6, 1), 28, 2048, 128, (98304, 49152), 1.582, 11721506816, 484.4e9, 2883584,
                  _peaks(11.34), 31.5e9, _sources("GeForce GTX 1080 Ti specifications; PCIe 3.0 × 16", _CARD)),
    "p100": ("NVIDIA P100 SXM2 16 GB", (6, 0), 56, 2048, 64, (65536, 49152), 1.4805, 17066885120, 732.16e9, 4194304,
             _peaks(10.6, float16=21.2), 160e9, _sources("Tesla P100 data sheet; NVLink")),
    "v100": ("NVIDIA V100 SXM2 16 GB", (7, 0), 80, 2048, 64, (98304, 98304), 1.53, 16935682048, 898.048e9, 6291456,
             _peaks(15.7, float16=125), 300e9, _sources("Tesla V100 data sheet; NVLink")),
    "t4": ("NVIDIA T4 16 GB", (7, 5), 40, 1024, 64, (65536, 65536), 1.59, 15843721216, 320.064e9, 4194304,
           _peaks(8.1, float16=65), 31.5e9, _sources("T4 data sheet; PCIe 3.0 × 16", _CARD)),
    "a10g": ("NVIDIA A10G 24 GB", (8, 6), 80, 1536, 128, (102400, 101376), 1.71, 23609475072, 600.096e9, 6291456,
             _peaks(35.0, 35.0, 70.0), 63e9, _sources("A10G data sheet (AWS edition); PCIe 4.0 × 16", _CARD)),
    "rtx3090": ("NVIDIA RTX 3090 24 GB", (8, 6), 82, 1536, 128, (102400, 101376), 1.695, 25447170048, 936.096e9, 6291456,
                _peaks(35.6, 35.6, 71.0), 63e9, _sources("GA102 white paper, appendix A; PCIe 4.0 × 16", _CARD)),
    "rtx4090": ("NVIDIA RTX 4090 24 GB", (8, 9), 128, 1536, 128, (102400, 101376), 2.52, 25386352640, 1008.096e9, 75497472,
                _peaks(82.6, 82.6, 165.2), 63e9, _sources("Ada GPU architecture paper, appendix A; PCIe 4.0 × 16", _CARD)),
    "a6000": ("NVIDIA A6000 48 GB", (8, 6), 84, 1536, 128, (102400, 101376), 1.8, 51041271808, 768.096e9, 6291456,
              _peaks(38.7, 77.4, 154.8), 63e9, _sources("RTX A6000 data sheet; PCIe 4.0 × 16")),
    "l4": ("NVIDIA L4 24 GB", (8, 9), 58, 1536, 128, (102400, 101376), 2.04, 23663935488, 300.096e9, 50331648,
           _peaks(30.3, 60.0, 121.0), 63e9, _sources("L4 data sheet; PCIe 4.0 × 16", _CARD)),
    "a100-40": ("NVIDIA A100 SXM 40 GB", (8, 0), 108, 2048, 64, (167936, 166912), 1.41, 42331013120, 1555.2e9, 41943040,
                _peaks(19.5, 156, 312), 600e9, _sources("A100 data sheet; NVLink")),
    "a100-80": ("NVIDIA A100 SXM 80 GB", (8, 0), 108, 2048, 64, (167936, 166912), 1.41, 85100068864, 2039.04e9, 41943040,
                _peaks(19.5, 156, 312), 600e9, _sources("A100 data sheet; NVLink")),
    "h100": ("NVIDIA H100 SXM 80 GB", (9, 0), 132, 2048, 128, (233472, 232448), 1.98, 84942979072, 3352.32e9, 52428800,
             _peaks(67, 494.7, 989.4), 900e9, _sources("H100 data sheet; NVLink")),
    "h200": ("NVIDIA H200 SXM 141 GB", (9, 0), 132, 2048, 128, (233472, 232448), 1.98, 151397597184, 4800e9, 52428800,
             _peaks(67, 494.7, 989.4), 900e9, _sources("H200 data sheet; NVLink")),
    "b200": ("NVIDIA B200 SXM 180 GB", (10, 0), 148, 2048, 128, (233472, 232448), 1.965, 191514411008, 7672.32e9, 132644864,
             _peaks(80, 1125, 2250), 1800e9, _sources("DGX B200 data sheet, an eighth of the system; NVLink")),
}  # fmt: skip


def _tpu_sources(page: str) -> dict[str, str]:
    return {
        "memory": page,
        "bandwidth": page,
        "peak": page,
        "interconnect": page,
        "usable": "what the TPU compiler (libtpu 0.0.41) says it can hand out when a program does not fit",
        "topology": "the names that libtpu knows",
    }


_GIB = 2**30
_ONE_CORE = "Cloud TPU documentation, TPU v4, divided by 2: the compiler here compiles for one of a chip's two cores"
# name: title, topology of 4 chips, memory, bytes the compiler hands out, bandwidth, peak in bfloat16, interconnect, sources
TPU = {
    "v4": ("TPU v4, one of two cores", "v4:2x2x1", 16 * _GIB, int(15.25 * _GIB), 600e9, 137.5e12, 150e9, _tpu_sources(_ONE_CORE)),
    "v5e": ("TPU v5e", "v5e:2x2", 16 * _GIB, int(15.75 * _GIB), 819e9, 197e12, 400e9, _tpu_sources("Cloud TPU documentation, TPU v5e")),
    "v5p": ("TPU v5p", "v5p:2x2x1", 95 * _GIB, int(95.74 * _GIB), 2765e9, 459e12, 1200e9, _tpu_sources("Cloud TPU documentation, TPU v5p")),
    "v6e": ("TPU v6e", "v6e:2x2", 32 * _GIB, int(31.25 * _GIB), 1640e9, 918e12, 800e9, _tpu_sources("Cloud TPU documentation, TPU v6e")),
}
