"""`python -m sglang.launch_server`, except that the first process forks the others.

SGLang starts each as a new interpreter, which imports SGLang again: that is more than half of the
time until it serves.
"""

import multiprocessing
import runpy

multiprocessing.set_start_method("fork")
multiprocessing.set_start_method = lambda *method, **options: None  # SGLang asks for "spawn"
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
