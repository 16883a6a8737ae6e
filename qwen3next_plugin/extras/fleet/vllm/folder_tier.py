"""The tier of vLLM's prefix cache whose blocks are files in a folder (block_files.py)."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.extras.fleet.block_files import BlockFiles, least_limit, writer

logger = init_logger(LOGGER)


class Running(NamedTuple):
    """A job in a thread."""

    job: TransferJob
    began: float
    done: "Future[list[OffloadKey]]"  # the keys whose files were read or written


class FolderTier(SecondaryTierManager):
    """Writes each block once, in the background, and reads those that a prompt begins with."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any,
        *,
        folder: str,
        folder_bytes: int,
        space: str,
    ) -> None:
        """Open the folder; `space` names the subfolder of what may be read here."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        blocks = 2 * len(offloading_spec.config.groups)  # with drafts a hit is one block shorter
        least = least_limit(blocks, self.block_size_bytes)
        if folder_bytes < least:
            raise ConfigError(
                f"folder_bytes = {folder_bytes}: must hold the shortest prefix that can be found "
                f"again, so at least {least} bytes; better a hundred times as many"
            )
        self.files = BlockFiles(Path(folder), folder_bytes)
        self.space = FileMapper.from_offloading_spec(space, offloading_spec).base_path
        self.lookups = Lookups(tier_type, self.holds)
        self.readers = ThreadPoolExecutor(2, "folder-read")
        self.writer = writer()
        self.running: dict[int, Running] = {}

    def name(self, key: OffloadKey) -> str:
        """The file of a block, below the folder."""
        return f"{self.space}/{key.hex()}"

    def holds(self, key: OffloadKey) -> bool:
        """Whether there is a file of a block."""
        return self.files.holds(self.name(key), self.block_size_bytes)

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a block can be read; a thread looks for it."""
        found = self.lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Read blocks into memory, in a thread."""
        self._submit(self.readers, self._read, job_metadata)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Write blocks from memory, in a thread."""
        self._submit(self.writer, self._write, job_metadata)

    def _submit(
        self,
        pool: ThreadPoolExecutor,
        move: Callable[[OffloadKey, memoryview], bool],
        job: TransferJob,
    ) -> None:
        memory, size = self._primary_kv_view.cast("B"), self.block_size_bytes
        contents = [memory[chunk * size : (chunk + 1) * size] for chunk in job.chunk_ids.tolist()]

        def run() -> list[OffloadKey]:
            blocks = zip(job.keys, contents, strict=True)
            return [key for key, content in blocks if move(key, content)]

        self.running[job.job_id] = Running(job, monotonic(), pool.submit(run))

    def _read(self, key: OffloadKey, content_: memoryview) -> bool:
        return self.files.read(self.name(key), content_)

    def _write(self, key: OffloadKey, content: memoryview) -> bool:
        """Write one block. Each kind of failure is logged once; what is read goes on."""
        try:
            self.files.write(self.name(key), content)
        except OSError as error:
            logger.warning_once(
                "qwen3next_plugin: some prefixes are not kept: %s: %s",
                *(self.files.folder, error.strerror),
            )
            return False
        return True

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that have ended since the last call."""
        for job_id, (job, began, done) in list(self.running.items()):
            if not done.done():
                continue
            del self.running[job_id]
            moved = done.result()
            missed = set(job.keys).difference(moved)
            if job.is_promotion:
                self.lookups.mark_miss(missed)
            yield JobResult(
                job_id,
                success=not missed,
                successful_keys=moved,
                transfer_time=monotonic() - began,
                transfer_bytes=len(moved) * self.block_size_bytes,
            )

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Only new blocks of a request are stored."""
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Drop the request's look-ups."""
        self.lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Start the look-ups that this step asked for."""
        self.lookups.flush()

    def drain_jobs(self) -> None:
        """Wait for all jobs."""
        for running in self.running.values():
            running.done.exception()

    def shutdown(self) -> None:
        """Write what waits, then end the threads."""
        self.lookups.shutdown()
        self.readers.shutdown()
        self.writer.shutdown()


class Lookups(AsyncLookupManager):
    """Looks for files in a thread: a folder may be on a slow or distant disk."""

    def __init__(self, tier_type: str, holds: Callable[[OffloadKey], bool]) -> None:
        self.holds = holds
        super().__init__(tier_type)

    def batch_lookup(self, keys: list[OffloadKey], req_context: ReqContext) -> Iterable[bool]:
        """Whether each block is there."""
        return map(self.holds, keys)
