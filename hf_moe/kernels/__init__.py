"""Fused operators of a layer of experts: Triton kernels for GPUs, compiled C++ for the CPU.

    layer_call.py   LayerCall, the record that a fused operator takes, and its flat form for torch
    layer_op.py     a fused operator of a layer as differentiable torch ops, whoever computes it
    linear_op.py    the same for one linear map per expert
    triton/         for every GPU that Triton compiles for
    cpu/            for Linux processors, built on first use

Rows, and sums over rows, have one fixed order everywhere: no atomics, so results repeat bit by bit. Rows of the
sentinel id E sort last, no kernel reads them, and they come out zero. This folder imports torch and triton only.
"""
