"""How fast are the CPU kernels, compared with the operators that upstream calls?"""
