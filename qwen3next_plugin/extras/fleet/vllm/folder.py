"""A prefix cache in memory and in a folder, which a restart finds again: vLLM's tiers, on a CPU.

vLLM's OffloadingConnector takes the spec by name. Its scheduler, managers and shared memory are
vLLM's; its worker, which copies by CUDA, is replaced here, and the tier of files is folder_tier.py.
"""

import os
from contextlib import suppress
from typing import Any

from torch import Tensor
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingManager,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.extras.fleet.vllm.folder_flags import OWN_REGION


class FolderSpec(TieringOffloadingSpec):
    """vLLM's tiers, with a worker that copies in memory."""

    def __init__(self, config: OffloadingConfig) -> None:
        if "secondary_tiers" not in config.extra_config:
            raise ConfigError("FolderSpec: only models of qwen3next_plugin are served with it")
        super().__init__(config)
        self._engine_id = f"{OWN_REGION}{config.engine_id}"
        self._own_worker: Worker | None = None
        if self.num_chunks < len(config.groups):
            raise ConfigError(
                f"cpu_bytes_to_use = {self.extra_config['cpu_bytes_to_use']}: must hold the blocks "
                f"of a prompt, of {self.kv_bytes_per_chunk} bytes each, and at least "
                f"{len(config.groups)} of them"
            )

    def get_manager(self) -> OffloadingManager:
        """vLLM's manager; then the shared memory loses its name, so that no kill leaves it behind.

        All workers have opened it before there is a scheduler.
        """
        try:
            return super().get_manager()
        finally:
            with suppress(FileNotFoundError):
                os.unlink(f"/dev/shm/vllm_offload_{self._engine_id}.mmap")

    @override(
        "vllm.v1.kv_offload.cpu.shared_offload_region.SharedOffloadRegion._creator",
        reason="vLLM's tiers leave their shared memory behind when a server is killed; ours has "
        "no name once all have opened it, so a worker has none to remove",
        remove_when="TieringOffloadingSpec removes the name, as CPUOffloadingSpec does",
        upstream="https://github.com/vllm-project/vllm/issues/57303",
    )
    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """A worker of this rank, once."""
        if self._own_worker is None:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            region._creator = False  # the scheduler removes the name
            self._own_worker = Worker(kv_caches, region)
        return self._own_worker


class Worker(OffloadingWorker):
    """Copies blocks between vLLM's cache and the shared memory, at once.

    A copy takes a few milliseconds for the tokens of a second's prefill, and between steps nothing
    else reads or writes a block.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self.region: SharedOffloadRegion | None = region
        self.finished: list[TransferResult] = []
        pairs = [
            (cache.tensor, region.create_next_worker_view(cache.page_size_bytes))
            for cache in kv_caches.tensors
        ]
        # For each group and layer: the cache's blocks, the memory's blocks, and bytes of a page.
        self.layers: list[list[tuple[Tensor, Tensor, int]]] = [
            [(*pairs[ref.tensor_idx], ref.page_size_bytes) for ref in refs]
            for refs in kv_caches.group_data_refs
        ]

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        """Copy blocks into memory."""
        return self._copy(job_id, src_spec, dst_spec, load=False)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy blocks from memory."""
        return self._copy(job_id, dst_spec, src_spec, load=True)

    def _copy(
        self, job_id: int, cached: GPULoadStoreSpec, kept: CPULoadStoreSpec, *, load: bool
    ) -> bool:
        groups = [g for g, size in enumerate(cached.group_sizes) for _ in range(size)]
        for group, block, chunk in zip(groups, cached.block_ids, kept.chunk_ids, strict=True):
            for cache, memory, nbytes in self.layers[group]:
                inside, outside = cache[block, :nbytes], memory[chunk, :nbytes]
                (inside if load else outside).copy_(outside if load else inside)
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Copies since the last call."""
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing: a copy has ended when it returns."""

    def shutdown(self) -> None:
        """Release the shared memory."""
        self.layers.clear()
        if self.region is not None:
            with suppress(FileNotFoundError):  # after a start that failed before `get_manager`
                os.unlink(self.region.mmap_path)
            self.region.cleanup()
            self.region = None
