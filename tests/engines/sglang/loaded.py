"""SGLang with its plugins, imported once where the servers of tests are forked from.

ENVIRONMENT: what importing it has set.
"""

import gc
import os
from importlib import import_module

gc.disable()  # for nothing is garbage yet
_before = dict(os.environ)
import_module("sglang.srt.plugins").load_plugins()
import_module("sglang.srt.entrypoints.http_server")
ENVIRONMENT = {name: value for name, value in os.environ.items() if _before.get(name) != value}
gc.freeze()  # else each fork looks through all of that whenever it collects garbage
gc.enable()
