"""GPUs by name: what kernels bound by memory or by arithmetic reach on them, and what Inductor asks of one."""

import types
from dataclasses import dataclass

# What large copies and large bf16 products reach of an H200's 4.8 TB/s and 989 TFLOP/s: 4.3 and 790.
COPY_SHARE, PRODUCT_SHARE = 4.3 / 4.8, 790 / 989
# No kernel takes less than this, however little it does.
SECONDS_OF_LAUNCH = 2e-6


@dataclass(frozen=True)
class Gpu:
    """Numbers of a data sheet; rates in bytes and operations a second, dense bf16."""

    name: str
    capability: tuple[int, int]
    peak_bandwidth: float
    peak_product: float
    memory: int
    multiprocessors: int
    shared_memory: int
    """Bytes of a multiprocessor."""
    l2: int

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a large copy."""
        return COPY_SHARE * self.peak_bandwidth

    @property
    def product(self) -> float:
        """Operations a second (2 a multiply-add) of a large bf16 product."""
        return PRODUCT_SHARE * self.peak_product

    def seconds(self, moved: int, operations: int) -> float:
        """The least time of one launch that moves so many bytes."""
        return max(moved / self.bandwidth, operations / self.product, SECONDS_OF_LAUNCH)

    def properties(self) -> types.SimpleNamespace:
        """What torch.cuda.get_device_properties would return, as far as Inductor reads it."""
        return types.SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory,
            multi_processor_count=self.multiprocessors,
            shared_memory_per_multiprocessor=self.shared_memory,
            # A block can have all but 1 KiB of it.
            shared_memory_per_block_optin=self.shared_memory - 1024,
            shared_memory_per_block=48 << 10,
            L2_cache_size=self.l2,
            # The same from A100 to H200 (CUDA C++ Programming Guide, "Technical Specifications").
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            regs_per_multiprocessor=65536,
            warp_size=32,
            is_integrated=0,
            is_multi_gpu_board=0,
            gcnArchName="",
            uuid="0",
        )


# Bandwidth, product, memory: NVIDIA's data sheets "H200 Tensor Core GPU", "H100 Tensor Core GPU" (SXM) and "A100 80GB"
# (SXM). Multiprocessors, shared memory, L2: white papers "H100 Tensor Core GPU Architecture" and "A100 Tensor Core GPU
# Architecture"; the H200's L2 is what its driver reports.
GPUS = {
    "h200": Gpu("NVIDIA H200", (9, 0), 4.8e12, 989e12, 141 * 10**9, 132, 228 << 10, 60 << 20),
    "h100": Gpu("NVIDIA H100", (9, 0), 3.35e12, 989e12, 80 * 10**9, 132, 228 << 10, 50 << 20),
    "a100": Gpu("NVIDIA A100", (8, 0), 2.039e12, 312e12, 80 * 10**9, 108, 164 << 10, 40 << 20),
}
