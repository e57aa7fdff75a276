"""Fetches bases and frozen parts: chunk by chunk, checked, resumable, one after the other."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.bulk import BulkStub, Chunk
from protos.chunks import ChunkFile
from protos.digest import digest as digest_of
from protos.errors import DataCorrupt, FarflungError, OutOfSpace, Unavailable
from protos.faults import reach
from protos.hang_up import hang_up
from protos.manifest import Index, Manifest
from protos.rpc import from_rpc_error
from protos.spares import Spares
from protos.v1 import common_pb2, site_pb2
from site_agent.link.journal import Journal
from site_agent.link.policy import Policy
from site_agent.link.wire import Wire, backoff

WANTED_S = 1.0
"""While no window is open, it is looked this often whether the model is still wanted."""

SPARE_BYTES = 64 << 20
"""Free space that a download leaves on the disk."""

MOST_CAME = 8
"""So many small models that came with plans are kept until they are wanted; others are fetched."""


@dataclass(frozen=True)
class Want:
    """Something to fetch.

    Attributes:
        digest: Of its index.
        manifest: Digest of the manifest that it must have; empty for any.
        wanted: Whether somebody still waits for it.
        progress: Called with bytes here and bytes in all.
        done: Called with the file, or with what went wrong.
    """

    digest: str
    manifest: str
    wanted: Callable[[], bool]
    progress: Callable[[int, int], None]
    done: Callable[[Path | FarflungError], None]


class Fetcher:
    """The downloads of a site, one at a time, in the order of the plans.

    Args:
        wire: Connections.
        cache: Folder: ``<digest>.data`` and ``.index``; ``<its own digest>.manifest``, one for all
            models that have it. What came with a plan has no index there: after a restart it comes again.
        policy: Bounds the size.
        keep: How many files stay.
        spares: Files to write over.
        journal: Log.
    """

    def __init__(
        self,
        wire: Wire,
        cache: Path,
        policy: Policy,
        keep: int,
        spares: Spares,
        journal: Journal,
    ) -> None:
        self._wire, self._cache, self._policy = wire, cache, policy
        self._keep, self._spares, self._journal = keep, spares, journal
        self._queue: queue.SimpleQueue[Want | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._channel: grpc.Channel | None = None
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self._came: dict[str, site_pb2.SmallModel] = {}
        self._seen: set[str] = set()  # what this process has verified since it started
        self._whole: dict[str, Index] = {}  # what it knows to be here whole
        self._manifests: dict[str, int] = {}  # that it has written, and the size of their models
        self._used = _oldest_first(cache)  # digests of the files, the one used last at the end
        self.received_bytes = 0

    busy = False
    """Whether a download is under way."""

    def want(self, want: Want) -> None:
        """Ask for a file; the answer comes from the fetcher's thread."""
        self._queue.put(want)

    def came(self, digest: str, model: site_pb2.SmallModel) -> None:
        """A small model came with a plan; it is checked as one that is fetched."""
        with self._lock:
            self._came[digest] = model
            while len(self._came) > MOST_CAME:
                del self._came[next(iter(self._came))]

    def stop(self) -> None:
        """End the thread; a download goes on where it was the next time."""
        self._stop.set()
        self._queue.put(None)
        self.reconnect()

    def reconnect(self) -> None:
        """Use a new connection from now on (new keys, another cap, or an end)."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            hang_up(channel)

    def allowed(self, allowed: bool) -> None:
        """Whether models may move now; one that is on its way stops, and goes on later."""
        if allowed:
            self._open.set()
        else:
            self._open.clear()
            self.reconnect()

    def run(self) -> None:
        """Fetch until stopped."""
        while (want := self._queue.get()) is not None and not self._stop.is_set():
            try:
                path = self._obtain(want)
            except (FarflungError, OSError) as error:
                want.done(why_not(error))
                continue
            if path is not None:
                want.done(path)

    # -- one file --------------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """Where a fetched file lies."""
        return self._cache / f"{digest}.data"

    def keep(self, digest: str) -> None:
        """Something fetched earlier is still in use."""
        with self._lock:
            if digest in self._used:
                self._use(digest)

    def at_hand(self, digest: str, manifest: str) -> Path | None:
        """A file that is here, or came with its plan, and need not be fetched; for any thread.

        Raises:
            DataCorrupt: What came is not what the plan names.
            OSError: It can't be written.
        """
        path = self.path(digest)
        with self._lock:
            model = self._came.pop(digest, None)
            index = self._whole.get(digest)
        if index is None and model is not None:
            index = self._unpack(digest, path, model)
        if index is None or not _has_size(path, index.nbytes):
            return None
        _check_manifest(index, manifest)
        with self._lock:
            self._use(digest)
            self._prune()
        return path

    def _unpack(self, digest: str, path: Path, model: site_pb2.SmallModel) -> Index | None:
        """Write down what came with a plan; None if that is not all of it."""
        index = self._announced(digest, model.head)
        if len(model.data) != index.nbytes:
            return None
        for number, chunk in enumerate(index.chunks):
            start, stop = index.span(number)
            if digest_of(model.data[start:stop]) != chunk:
                raise DataCorrupt(f"model {digest[:12]}: chunk {number} is not the announced one")
        path.write_bytes(model.data)
        reach("fetch.unpacked")
        self.received_bytes += len(model.data)
        with self._lock:
            self._whole[digest] = index
        return index

    def _obtain(self, want: Want) -> Path | None:
        path = self.path(want.digest)
        if not self._is_here(path):
            waits, before = backoff(), self.received_bytes
            while not self._download(want, path):
                if self.received_bytes > before:  # cut often, but it does carry something
                    waits, before = backoff(), self.received_bytes
                if self._stop.wait(next(waits)) or not want.wanted():
                    return None
                while not self._open.wait(WANTED_S):
                    if self._stop.is_set() or not want.wanted():
                        return None
        index = self._known(path)
        if index is not None:
            _check_manifest(index, want.manifest)
        with self._lock:
            if index is not None:
                self._whole[want.digest] = index
            self._use(want.digest)
            self._prune()
        return path

    def _is_here(self, path: Path) -> bool:
        """Whether a file is here whole; the first time in a process it is verified, not believed."""
        index = self._known(path)
        if index is None or not _has_size(path, index.nbytes):
            return False
        if path.stem in self._seen:
            return True
        with self._part(path, index) as file:
            if file.complete:
                file.finish()
        return path.exists()

    def _download(self, want: Want, path: Path) -> bool:
        """One attempt; False if the connection broke."""
        index = self._known(path)
        file = self._part(path, index) if index is not None else None
        if file is not None and file.complete:  # all came, and the agent ended before it knew
            file.finish()
            return True
        missing = file.missing() if file is not None else []
        request = site_pb2.FetchRequest(
            digest=want.digest,
            missing=[common_pb2.ChunkRange(first=a, end=b) for a, b in missing],
        )
        try:
            self.busy = True
            reach("fetch.asking")
            replies = self._stub().FetchModel(request)
            for reply in replies:
                if not want.wanted() or self._stop.is_set():
                    replies.cancel()
                    return False
                if isinstance(reply, Chunk):
                    if file is None:
                        raise DataCorrupt(f"model {want.digest[:12]}: a chunk came before the head")
                    file.write(reply.number, reply.data)
                    reach("fetch.chunk.written")
                    self.received_bytes += len(reply.data)
                    want.progress(file.received_bytes, file.index.nbytes)
                elif file is None:
                    reach("fetch.head.heard")
                    index = self._announced(want.digest, reply.head)
                    path.with_suffix(".index").write_bytes(index.encoded)
                    reach("fetch.index.written")
                    file = self._part(path, index)
            if file is None:
                raise DataCorrupt(f"model {want.digest[:12]}: the orchestrator sent no head")
            if not file.complete:
                return False
            file.finish()
        except ValueError:  # another thread closed the channel between two lines
            return False
        except grpc.RpcError as error:
            problem = from_rpc_error(error)
            self.reconnect()
            if not isinstance(problem, Unavailable):
                raise problem from None
            self._journal.warning("fetch interrupted", model=want.digest, reason=problem.message)
            return False
        finally:
            self.busy = False
            if file is not None and not file.complete:
                file.close()
        return True

    def _announced(self, digest: str, head: site_pb2.ArtefactHead) -> Index:
        """The index of what is about to be written, if it is the right one and fits."""
        index = Index.decode(head.index)
        if index.digest != digest:
            raise DataCorrupt(f"model {digest[:12]}: another index came than was asked for")
        if index.manifest not in self._manifests:
            manifest = Manifest.decode(head.manifest)
            # Not synced: whoever reads it looks at its digest, and what is torn is fetched again.
            self._manifest(manifest.digest).write_bytes(manifest.encoded)
            reach("fetch.manifest.written")
            self._manifests[manifest.digest] = manifest.nbytes
        if self._manifests.get(index.manifest) != index.nbytes:
            raise DataCorrupt(f"model {digest[:12]}: its manifest is not the one of its index")
        self._policy.check_size(index.nbytes, "a model")
        free = shutil.disk_usage(self._cache).free
        if free < index.nbytes + SPARE_BYTES:
            free += self._spares.clear()
        if free < index.nbytes + SPARE_BYTES:
            raise OutOfSpace(
                f"a model of {index.nbytes} bytes does not fit: {free} bytes are free at this site, and"
                f" {SPARE_BYTES} are to stay free",
                needed=index.nbytes + SPARE_BYTES,
                free=free,
            )
        return index

    def _part(self, path: Path, index: Index) -> ChunkFile:
        verify = path.stem not in self._seen
        file = ChunkFile(path, index, self._spares, verify=verify, durable=False)
        self._seen.add(path.stem)
        return file

    def _stub(self) -> BulkStub:
        with self._lock:
            if not self._open.is_set():
                raise ValueError("no window is open")  # as if the connection had just been closed
            if self._channel is None:
                self._channel = self._wire.open_bulk()
            return BulkStub(self._channel)

    # -- cache -----------------------------------------------------------------------------------

    def _manifest(self, digest: str) -> Path:
        return self._cache / f"{digest}.manifest"

    def _known(self, path: Path) -> Index | None:
        """The index of a file that is here at least in part, if its manifest is here too."""
        try:
            index = Index.decode(path.with_suffix(".index").read_bytes())
            manifest = digest_of(self._manifest(index.manifest).read_bytes())
        except (FarflungError, OSError):
            return None
        return index if index.digest == path.stem and manifest == index.manifest else None

    def _use(self, digest: str) -> None:
        self._used.pop(digest, None)
        self._used[digest] = None

    def _prune(self) -> None:
        """Remove what was used longest ago, but neither of the last two: they may be one plan's."""
        for old in list(self._used)[: -max(self._keep, 2)]:
            del self._used[old]
            self._whole.pop(old, None)
            path = self.path(old)
            path.with_suffix(".index").unlink(missing_ok=True)
            reach("fetch.unnamed")
            self._spares.give(path)
            reach("fetch.pruned")


def why_not(error: FarflungError | OSError) -> FarflungError:
    """What keeps a file from being here, as it is told."""
    if isinstance(error, FarflungError):
        return error
    return OutOfSpace(f"cache: {error.strerror or error}")


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except FileNotFoundError:
        return False


def _check_manifest(index: Index, manifest: str) -> None:
    if manifest not in ("", index.manifest):
        raise DataCorrupt(f"model {index.digest[:12]}: its manifest is not the one of the plan")


def _oldest_first(cache: Path) -> dict[str, None]:
    """Digests of the files in a cache; removes manifests that none of them needs."""
    needed = set()
    for path in cache.glob("*.index"):
        try:
            needed.add(Index.decode(path.read_bytes()).manifest)
        except (FarflungError, OSError):
            continue
    for path in cache.glob("*.manifest"):
        if path.stem not in needed:
            path.unlink(missing_ok=True)
    return {
        path.stem: None for path in sorted(cache.glob("*.data"), key=lambda f: f.stat().st_mtime)
    }
