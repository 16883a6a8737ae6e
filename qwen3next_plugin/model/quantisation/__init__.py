"""From what a checkpoint's files say to packed weights.

In the order of the data: `schemes`, how files store a module; `format`, how our parameters do;
`modules`, the format of each module; `at_load`, that by QWEN3NEXT_QUANTISE, in which `rounding`
puts a weight; `plain`, modules of a GPU that have none; `files`, all of these from a folder. Then
`packed`, the bytes that kernels read, and `layers`, what engines load and pack.

`stacked`, `in_panels`: what is packed in files, and their format.
"""
