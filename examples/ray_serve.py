"""Replicas behind Ray Serve, which sends each turn of a conversation where the earlier ones are.

    pip install ray grpcio-reflection pyarrow   # ray[llm] would bring another vLLM
    python examples/ray_serve.py examples/qwen3next-tiny --replicas 2

It answers as `vllm serve` does. On a Ray cluster (RAY_ADDRESS) replicas are spread over its
machines; each computes with all cores of its own.
"""

import os
from typing import Annotated

import ray
import typer
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter


def main(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the hub.")],
    replicas: Annotated[int, typer.Option(help="Engines, each with the whole model.")] = 2,
    drafts: Annotated[int, typer.Option(help="Tokens that MTP drafts, at most.")] = 3,
    port: Annotated[int, typer.Option(help="Where to answer.")] = 8000,
    max_model_len: Annotated[int, typer.Option(help="The longest context.")] = 4096,
) -> None:
    """Serve MODEL by Ray until Ctrl-C."""
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:  # two places for each replica and one for the router, whatever this machine has
        ray.init("local", num_cpus=2 * replicas + 1, include_dashboard=False)
    serve.start(http_options={"port": port})
    config = LLMConfig(
        model_loading_config={"model_id": model, "model_source": model},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        deployment_config={
            "num_replicas": replicas,
            "request_router_config": RequestRouterConfig(
                request_router_class=PrefixCacheAffinityRouter
            ),
        },
        engine_kwargs={
            "max_model_len": max_model_len,
            "speculative_config": {"method": "mtp", "num_speculative_tokens": drafts},
            "prefix_match_unit": 32,
            "enable_prompt_tokens_details": True,
        },
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    typer.run(main)
