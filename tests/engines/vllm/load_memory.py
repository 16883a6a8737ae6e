"""Imported first by a fork: measures the memory that loading a model takes."""

from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from engines.load_memory import Loaded, measured

found: list[Loaded] = []
BaseModelLoader.load_model = measured(BaseModelLoader.load_model, found.append)
