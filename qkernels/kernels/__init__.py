"""The Triton kernels: one file a kernel, each with its jit helpers, its jit kernel and one launcher.

Room: launchers take checked tensors and a configuration; they neither validate users' input nor choose.  With
`TRITON_INTERPRET=1` set before the import, the same source runs on CPU tensors in Triton's interpreter.
Every launch says `enable_fp_fusion=False`: the roundings of the format are those of single operations.
"""
