"""How fast are the Triton kernels on this machine's GPU?"""
