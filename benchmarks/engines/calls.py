"""How a worker process is asked: {"call": name, ...arguments} in, {"result": ...} out, by line."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def answer(start: Callable[..., Any]) -> Any:
    """Start an engine with the flags of the command line, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines log to standard output
    engine = start(**json.loads(sys.argv[1]))
    print(json.dumps({"result": "ready"}), file=answers)
    for line in sys.stdin:
        arguments = json.loads(line)
        result = getattr(engine, arguments.pop("call"))(**arguments)
        print(json.dumps({"result": result}), file=answers)
    return engine
