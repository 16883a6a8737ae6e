"""The main program of a child that holds a vLLM engine: offline.py is at the pipe's other end."""

import contextlib
import sys
from importlib import import_module
from multiprocessing.connection import Client
from typing import Any


class Host:
    """What a parent may call."""

    def start(self, flags: dict[str, Any]) -> None:
        import torch
        from vllm import LLM

        if flags["enforce_eager"]:
            torch.compiler.set_stance("force_eager")  # see loaded.py
        self.llm = LLM(**flags)
        self.adapters: dict[str, int] = {}  # path → number

    def generate(
        self, prompts: list[tuple[int, ...] | dict[str, Any]], params: list[dict[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        from vllm.lora.request import LoRARequest

        path = params[0].pop("adapter", None)
        number = self.adapters.setdefault(path, len(self.adapters) + 1) if path else 0
        sampling = [_sampling_params(**own) for own in params]
        requests = self.llm.generate(
            [p if isinstance(p, dict) else {"prompt_token_ids": list(p)} for p in prompts],
            sampling if len(sampling) > 1 else sampling[0],
            lora_request=LoRARequest(path, number, path) if path else None,
            use_tqdm=False,
        )
        each = sampling if len(sampling) > 1 else sampling * len(requests)
        return [
            [_plain(request, output, asked) for output in request.outputs]
            for request, asked in zip(requests, each, strict=True)
        ]

    def counters(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            values = {metric.name: metric.value} if hasattr(metric, "value") else {}
            if hasattr(metric, "values"):
                values = {f"{metric.name}[{i}]": value for i, value in enumerate(metric.values)}
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    def cache(self) -> dict[str, Any]:
        config = self.llm.llm_engine.vllm_config.cache_config
        return {"block_size": config.block_size, "num_blocks": config.num_gpu_blocks}

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()

    def inside(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        inside = import_module("engines.vllm.inside" if __package__ else "inside")
        return getattr(inside, name)(self.llm, *args, **options)


def _sampling_params(structured_outputs: dict[str, Any] | None = None, **params: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    guide = StructuredOutputsParams(**structured_outputs) if structured_outputs else None
    return SamplingParams(structured_outputs=guide, **params)


def _plain(request: Any, output: Any, asked: Any) -> dict[str, Any]:
    """The fields of Output; the class itself is another one in this process."""
    of_answer = of_prompt = None
    if asked.logprobs is not None or asked.logprob_token_ids:
        of_answer = _chosen(output.token_ids, output.logprobs)
    if asked.prompt_logprobs is not None:
        of_prompt = _chosen(request.prompt_token_ids[1:], request.prompt_logprobs[1:])
    return {
        "token_ids": tuple(output.token_ids),
        "logprobs": of_answer,
        "prompt_logprobs": of_prompt,
        "cached": request.num_cached_tokens or 0,
        "finish_reason": output.finish_reason,
        "text": output.text,
    }


def _chosen(ids: Any, logprobs: Any) -> tuple[float, ...]:
    return tuple(entry[i].logprob for i, entry in zip(ids, logprobs, strict=True))


def main(address: str, *first: str) -> None:
    """Serve one parent until it hangs up; import the modules `first` before all else."""
    for name in first:
        import_module(name)
    from traceback import format_exc

    host = Host()
    with Client(address) as pipe, contextlib.suppress(EOFError):
        while True:
            name, args = pipe.recv()
            try:
                pipe.send((True, getattr(host, name)(*args)))
            except Exception:  # whatever it is, the parent raises it with this text
                pipe.send((False, format_exc()))


if __name__ == "__main__":
    main(*sys.argv[1:])
