"""A vLLM engine in a process of its own, driven over a pipe: several may follow one another."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, NamedTuple

START_SECONDS = 300
CPUS = sorted(os.sched_getaffinity(0))
# One process, and one thread in it: at these sizes threads only cost time. The servers use all.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


class Output(NamedTuple):
    """One finished sequence."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each token, empty where none were asked for
    prompt_logprobs: tuple[float, ...]  # of each prompt token but the first
    cached: int  # prompt tokens that a prefix-cache hit spared
    finish_reason: str
    text: str  # empty without a tokenizer


def environment(tp_size: int = 1) -> dict[str, str]:
    """The environment a vLLM process gets: this one's, its threads bound to our cores."""
    share = max(1, len(CPUS) // tp_size)
    bind = "|".join(
        ",".join(map(str, CPUS[i * share % len(CPUS) :][:share])) for i in range(tp_size)
    )
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", bind) if tp_size == 1 else bind
    return os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Process:
    """A child in a process group of its own, its output in a file; stopped by its id."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        handle, self.log = tempfile.mkstemp(prefix="vllm-", suffix=".log")
        self.child = subprocess.Popen(
            arguments, env=env, stdout=handle, stderr=handle, start_new_session=True
        )
        os.close(handle)

    def text(self) -> str:
        """Everything the child has written."""
        return Path(self.log).read_text(errors="replace")

    def stop(self) -> None:
        """Terminate the group, kill what is left of it, and drop the log."""
        for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(patience)
        Path(self.log).unlink(missing_ok=True)


class Offline:
    """`vllm.LLM(model, **flags)` in a child; token ids in, plain values out."""

    def __init__(self, model: Path, *, env: dict[str, str] | None = None, **flags: Any) -> None:
        tp_size = flags.get("tensor_parallel_size", 1)
        with Listener(family="AF_UNIX") as listener:
            listener._listener._socket.settimeout(START_SECONDS)
            self.process = Process(
                [sys.executable, __file__, listener.address],
                environment(tp_size) | IN_PROCESS | (env or {}),
            )
            self.pipe: Connection = listener.accept()
        defaults = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
        }
        try:
            self._ask("start", defaults | flags)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[tuple[int, ...]], each: Sequence[dict[str, Any]] = ({},), **params: Any
    ) -> list[list[Output]]:
        """Run all prompts in one batch: n outputs each, through the LoRA `adapter` if given.

        `params` are vLLM's SamplingParams for all prompts, `each` holds more for each of them.
        """
        defaults = {"detokenize": False, "ignore_eos": True} | params
        params = [defaults | own for own in each]
        answers = self._ask("generate", prompts, params)
        return [[Output(**fields) for fields in answer] for answer in answers]

    def greedy(self, prompts: list[tuple[int, ...]], tokens: int, **params: Any) -> list[Output]:
        """Run all prompts in one batch, greedily."""
        outputs = self.generate(prompts, temperature=0.0, max_tokens=tokens, **params)
        return [output for (output,) in outputs]

    def counters(self) -> dict[str, float]:
        """vLLM's Prometheus counters by name, summed over labels."""
        return self._ask("counters")

    def cache(self) -> dict[str, Any]:
        """The block size and number of blocks that the engine settled on."""
        return self._ask("cache")

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._ask("forget")

    def decode_with_broken_page(self, prompts: list[tuple[int, ...]], row: int, layer: str) -> None:
        """Decode requests broken-0, broken-1 …; a page of one then says it stands elsewhere."""
        self._ask("decode_broken", prompts, row, layer, "page")

    def decode_with_broken_slot(self, prompts: list[tuple[int, ...]], row: int, layer: str) -> None:
        """The same; the block table then holds a slot that is none."""
        self._ask("decode_broken", prompts, row, layer, "slot")

    def close(self) -> None:
        self.pipe.close()
        self.process.stop()

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            self.pipe.send((name, args))
            ok, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.child.wait(20)
            raise AssertionError(f"the engine died:\n{self.process.text()[-8000:]}") from error
        if not ok:
            raise AssertionError(f"{answer}\n{self.process.text()[-8000:]}")
        return answer


class Host:
    """The child's side."""

    def start(self, flags: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**flags)

    def generate(
        self, prompts: list[tuple[int, ...]], params: list[dict[str, Any]]
    ) -> list[list[dict[str, Any]]]:
        from vllm.lora.request import LoRARequest

        adapter = params[0].pop("adapter", None)
        sampling = [_sampling_params(**own) for own in params]
        requests = self.llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            sampling if len(sampling) > 1 else sampling[0],
            lora_request=LoRARequest("adapter", 1, adapter) if adapter else None,
            use_tqdm=False,
        )
        return [[_plain(request, output) for output in request.outputs] for request in requests]

    def counters(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        for metric in self.llm.get_metrics():
            if hasattr(metric, "value"):
                sums[metric.name] = sums.get(metric.name, 0.0) + metric.value
        return sums

    def cache(self) -> dict[str, Any]:
        config = self.llm.llm_engine.vllm_config.cache_config
        return {"block_size": config.block_size, "num_blocks": config.num_gpu_blocks}

    def forget(self) -> None:
        assert self.llm.reset_prefix_cache()

    def decode_broken(
        self, prompts: list[tuple[int, ...]], row: int, layer: str, what: str
    ) -> None:
        engine = self.llm.llm_engine
        params = _sampling_params(temperature=0.0, max_tokens=50, detokenize=False, ignore_eos=True)
        names = [f"broken-{i}" for i in range(len(prompts))]
        for name, ids in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": list(ids)}, params)
        for _ in range(3):
            engine.step()
        runner = engine.model_executor.driver_worker.worker.model_runner
        groups = [group.layer_names for group in runner.kv_cache_config.kv_cache_groups]
        group = next(i for i, layers in enumerate(groups) if layer in layers)
        slots = runner.input_batch.block_table[group].block_table.np[row]
        if what == "page":
            pool = runner.compilation_config.static_forward_context[layer].pool
            pool.span[int(slots[0])] += 1000
        else:
            slots[0] = 1_000_000
        try:
            engine.step()
        finally:
            engine.abort_request(names)


def _sampling_params(structured_outputs: dict[str, Any] | None = None, **params: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    guide = StructuredOutputsParams(**structured_outputs) if structured_outputs else None
    return SamplingParams(structured_outputs=guide, **params)


def _plain(request: Any, output: Any) -> dict[str, Any]:
    """The fields of Output; the class itself is another one in this process."""
    prompt_logprobs = (request.prompt_logprobs or ())[1:]
    return {
        "token_ids": tuple(output.token_ids),
        "logprobs": _chosen(output.token_ids, output.logprobs),
        "prompt_logprobs": _chosen(request.prompt_token_ids[1:], prompt_logprobs),
        "cached": request.num_cached_tokens or 0,
        "finish_reason": output.finish_reason,
        "text": output.text,
    }


def _chosen(ids: Any, logprobs: Any) -> tuple[float, ...]:
    return tuple(entry[i].logprob for i, entry in zip(ids, logprobs or (), strict=False))


def main(address: str) -> None:
    """Serve one parent until it hangs up."""
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
    main(sys.argv[1])
