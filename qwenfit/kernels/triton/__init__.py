"""Triton kernels for GPUs. Each runs in Triton's interpreter too, and is tested there against its PyTorch reference."""
