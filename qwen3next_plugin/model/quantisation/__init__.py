"""From what a checkpoint's files say to packed weights.

In the order of the data: `format`, how files and our parameters store a weight; `schemes` and
`fp4`, the schemes that files use; `modules`, the format of each module; `at_load`, that by
QWEN3NEXT_QUANTISE; `files`, all of these from a folder. Then `packing`, the bytes that kernels
read, `layers`, what engines load and pack, and `blanks`, empty parameters that take other weights.

`stacked`, `in_panels`, `original`: what is packed in files, in which format, and from what.
"""
