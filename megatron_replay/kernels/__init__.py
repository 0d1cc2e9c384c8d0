"""The compiled operators and their plain-torch twins: one layer below the maths (`ops`) and the optimizers (`optim`).

`schemas` lists the operators, `library` registers them and says which kernel answers, `loading` finds the extensions.
`torch_twins` is plain torch; `triton_launch` and `triton_programs` serve CUDA; `csrc/` serves the CPU and the NPU.
"""
