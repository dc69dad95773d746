"""The reader on NVIDIA DALI: it decodes ahead, on its own threads or the GPU; order and crops are ours.

DALI is fed encoded bytes in our order. Crops are cut while decoding (on a CPU); resizing and mirroring are those of
`crops.py`, so that every reader makes the same pixels. Processes are not to be forked once a pipeline was built.
"""

import importlib.util
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.crops import Boxes, put, put_all, viewed
from synthkd.dfkd.decode import decode, is_cut_off, stored_size
from synthkd.dfkd.feed import ReadOptions, Request, Rows
from synthkd.dfkd.readers import AheadReader, Decoded, Encoded, common_size, thread_count
from synthkd.engine.errors import SynthkdError

_AHEAD = 2
_log = logging.getLogger("synthkd")
_FAILURES = (RuntimeError, IndexError, ValueError, TypeError)  # what DALI raises, by the C++ error's kind


def dali_available() -> bool:
    """Whether the package is there; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _dali() -> Any:
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except (ImportError, OSError) as error:
        raise SynthkdError("DALI is not installed: pip install 'synthkd[dali]'") from error
    return nvidia.dali


class _Decoder:
    """A pipeline that turns lists of files into uint8 images, in the order in which they were given.

    cut: each file comes with a crop (int32 top, left and height, width), which alone is decoded.
    """

    def __init__(self, most: int, threads: int, device: torch.device, cut: bool) -> None:
        """most: images of a batch."""
        dali = _dali()
        fn, types = dali.fn, dali.types
        gpu = device.type == "cuda"
        self._given: deque[tuple[Any, ...]] = deque()
        self.most, self.cut = most, cut
        self._pipe = dali.Pipeline(
            batch_size=most,
            num_threads=threads,
            device_id=(device.index or 0) if gpu else None,
            prefetch_queue_depth=_AHEAD + 1,
        )
        how = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        kinds, ranks = [types.UINT8, types.INT32, types.INT32], [1, 1, 1]
        with self._pipe:
            given = fn.external_source(
                source=self._next, num_outputs=3 if cut else 1, dtype=kinds[: 3 if cut else 1],
                ndim=ranks[: 3 if cut else 1], batch=True,
            )  # fmt: skip
            if cut:
                images = fn.decoders.image_slice(given[0], start=given[1], shape=given[2], axes=[0, 1], **how)
            else:
                images = fn.decoders.image(given[0], **how)
            self._pipe.set_outputs(images)
        self._pipe.build()

    def _next(self) -> tuple[Any, ...]:
        if not self._given:
            raise StopIteration
        return self._given.popleft()

    def put(self, files: list[bytes], boxes: NDArray[np.int32] | None) -> None:
        """Begin a batch; boxes: int32 [B,4] if cut."""
        encoded = [np.frombuffer(data, np.uint8) for data in files]
        given = (encoded,) if boxes is None else (encoded, boxes[:, :2].copy(), boxes[:, 2:].copy())
        self._given.append(given)
        self._pipe.reset()  # DALI took the pause since the last batch for the end of the data
        self._pipe.schedule_run()

    def wait(self, stream: Any = None) -> Any:
        """The oldest batch, as DALI's list of tensors, good until `release`; on a GPU for work on `stream`."""
        return self._pipe.share_outputs(cuda_stream=stream)[0]

    def release(self) -> None:
        """Let DALI write over the batch that was waited for."""
        self._pipe.release_outputs()


@dataclass
class _Job:
    """A request on its way; rows of positions that stay are what DALI was given."""

    request: Request
    readable: NDArray[np.bool_]
    boxes: NDArray[np.int64]
    files: dict[int, bytes] = field(default_factory=dict)
    given: bool = False

    @property
    def positions(self) -> Rows:
        """Those DALI decodes, ascending."""
        return np.flatnonzero(self.readable)


class DaliReader(AheadReader):
    """Decodes by DALI: on its threads (CPU), or on the GPU where batches are to be there."""

    name = "dali"

    def __init__(self, source: Encoded, size: tuple[int, int], options: ReadOptions) -> None:
        """Raises SynthkdError where DALI is not installed, or none of a set's first images can be read."""
        self.decoder = f"DALI {_dali().__version__}"
        self._threads = thread_count(options)
        super().__init__(source, size, options, _AHEAD, self._threads)
        self.source = source
        self.device, self.common = torch.device(options.device), common_size(source)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.decoder += ", GPU" if self.device.type == "cuda" else ""
        gpu = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if gpu else None  # type: ignore[no-untyped-call]
        self._sizes = np.zeros((len(source), 2), np.int32)  # stored height and width, 0 until an image was looked at
        self._jobs: deque[_Job] = deque()
        self._decoder: _Decoder | None = None

    def begin(self, request: Request) -> _Job:
        """Look at the files, hand them to DALI."""
        job = _Job(request, ~self.bad[request.rows], np.zeros((len(request.rows), 4), np.int64))
        boxes = Boxes(request.views.box, self.common)
        for i in job.positions.tolist():
            row = int(request.rows[i])
            try:
                job.files[i] = self._looked_at(row)
                job.boxes[i] = boxes.at(i, (int(self._sizes[row, 0]), int(self._sizes[row, 1])))
            except SynthkdError as error:
                job.readable[i] = False
                self.note(row, str(error))
        self._jobs.append(job)
        self._give(job)
        return job

    def finish(self, job: _Job) -> Decoded:
        """Wait for DALI; where it fails, find the images that are to blame and begin again without them."""
        if len(job.positions) and not job.given:
            self._restart()
        pixels = None
        while pixels is None and len(job.positions):
            try:
                pixels = self._taken(job)
            except _FAILURES as error:
                if not self._find_damage():
                    self._jobs.popleft()
                    return Decoded(self._by_hand(job, error), job.readable)
                self._restart()
        self._jobs.popleft()
        if pixels is None:
            pixels = torch.empty(len(job.readable), *self.size, 3, dtype=torch.uint8, device=self.device)
        return Decoded(pixels, job.readable)

    def abandon(self) -> None:
        """Forget requests that were begun; a new pipeline takes the next one."""
        if self._jobs:
            self._jobs.clear()
            self._decoder = None

    def close(self) -> None:
        """Give back DALI's threads and buffers."""
        super().close()
        self._decoder = None

    def _looked_at(self, row: int) -> bytes:
        """A file that DALI may see; at first sight its header is read, and a cut-off one is decoded to be sure."""
        data = self.source.encoded(row)
        if not self._sizes[row, 0]:
            where = self.source.where(row)
            found = stored_size(data, where)
            if is_cut_off(data):
                decode(data, where)
            self._sizes[row] = found
        return data

    def _give(self, job: _Job) -> None:
        """Hand a job to the pipeline, if there is one that takes it now; `finish` sees to it otherwise."""
        if not len(job.positions):
            return
        boxes = job.boxes[job.positions].astype(np.int32)
        sizes = self._sizes[job.request.rows[job.positions]]
        cut = self.device.type == "cpu" and bool((boxes[:, 2:] != sizes).any())
        fits = self._decoder is not None and len(boxes) <= self._decoder.most and (self._decoder.cut or not cut)
        if not fits:
            if any(other.given for other in self._jobs):
                return
            most = max([len(boxes)] + ([self._decoder.most] if self._decoder else []))
            cut = cut or (self._decoder is not None and self._decoder.cut)
            self._decoder = self._pipeline(most, cut)
        decoder = self._decoder
        assert decoder is not None
        try:
            decoder.put([job.files[i] for i in job.positions.tolist()], boxes if decoder.cut else None)
            job.given = True
        except _FAILURES:  # an earlier batch broke the pipeline
            job.given = False

    def _pipeline(self, most: int, cut: bool) -> _Decoder:
        """Raises SynthkdError where DALI cannot run, on a GPU that its driver does not show say."""
        try:
            return _Decoder(most, self._threads, self.device, cut)
        except _FAILURES as error:
            why = str(error).strip().partition("\n")[0]
            raise SynthkdError(f"DALI does not start on {self.device} ({why:.200}); choose reader 'torch'") from error

    def _restart(self) -> None:
        """A new pipeline at the oldest job that is not finished."""
        for job in self._jobs:
            job.given = False
        broken, self._decoder = self._decoder, None
        if broken is not None and self._jobs:
            cut = broken.cut
            del broken
            self._decoder = self._pipeline(max(len(j.request.rows) for j in self._jobs), cut)
        for job in self._jobs:
            self._give(job)
            if not job.given:
                return

    def _find_damage(self) -> bool:
        """Note every image on its way that our own decoder cannot read either; whether there is one."""
        found = False
        for job in self._jobs:
            for i in job.positions.tolist():
                row = int(job.request.rows[i])
                try:
                    decode(job.files[i], self.source.where(row))
                except SynthkdError as error:
                    job.readable[i], found = False, True
                    self.note(row, str(error))
        return found

    def _by_hand(self, job: _Job, error: Exception) -> Tensor:
        """A batch that DALI fails on and our own decoder reads; DALI goes on behind it."""
        if not self.quiet:
            _log.warning("DALI failed on a batch (%.200s); it was decoded without", str(error).partition("\n")[0])
        self._restart()
        out, flip = self.batch(len(job.readable)), job.request.views.flip
        for i in job.positions.tolist():
            pixels = decode(job.files[i], self.source.where(int(job.request.rows[i])))
            put(pixels, job.boxes[i].tolist(), bool(flip[i]), out[i].numpy())
        return self.placed(out)

    def _taken(self, job: _Job) -> Tensor:
        """uint8 [B,h,w,3]: DALI's images, resized and mirrored, in memory of our own."""
        if not job.given or self._decoder is None:
            raise RuntimeError("the pipeline was broken before this batch")
        images = self._decoder.wait(self._stream)
        try:
            return self._on_gpu(job, images) if self.device.type == "cuda" else self._on_cpu(job, images)
        finally:
            self._decoder.release()

    def _on_cpu(self, job: _Job, images: Any) -> Tensor:
        """images: cut to their crops already."""
        out, positions, flip = self.batch(len(job.readable)), job.positions, job.request.views.flip
        places = out.numpy()
        if images.is_dense_tensor() and tuple(images[0].shape()[:2]) == self.size:
            places[positions] = np.asarray(images.as_tensor())
            turned = positions[flip[positions]]
            places[turned] = places[turned][:, :, ::-1]
            return out
        parts = [images.at(k) for k in range(len(positions))]
        work = [(p, (0, 0, *p.shape[:2]), bool(flip[i]), places[i]) for p, i in zip(parts, positions, strict=True)]
        put_all(work, self.pool)
        return out

    def _on_gpu(self, job: _Job, images: Any) -> Tensor:
        """images: whole ones, on the GPU. Waits for its own stream alone: DALI's buffer is copied then."""
        views, users = job.request.views.take(job.positions), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            if images.is_dense_tensor():
                made = viewed(_owned(images.as_tensor(), self.device), views, self.size)
            else:
                singles = ((_owned(images[k], self.device), views.take([k])) for k in range(len(views)))
                made = torch.cat([viewed(image[None], view, self.size) for image, view in singles])
            if not job.readable.all():
                places, some = torch.from_numpy(job.positions).to(self.device), made
                made = torch.empty(len(job.readable), *self.size, 3, dtype=torch.uint8, device=self.device)
                made[places] = some
        assert self._stream is not None
        self._stream.synchronize()
        for stream in (users, torch.cuda.default_stream(self.device)):  # its memory is theirs until they are done
            made.record_stream(stream)
        return made


def _owned(image: Any, device: torch.device) -> Tensor:
    """A copy of DALI's tensor on the current stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    mine = torch.empty(tuple(image.shape()), dtype=torch.uint8, device=device)
    feed_ndarray(image, mine, cuda_stream=torch.cuda.current_stream(device))
    return mine
