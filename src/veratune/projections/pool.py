"""The pool of projections: created on first use, shared by all layers of the same width, freed with the last of them.

Layers hold `ProjectionView`s as plain attributes, never as buffers. Projections are therefore not in state dicts, and
not moved by `.to()`, copied, pickled, sharded or broadcast. A layer requests its projection for a device and dtype.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from veratune.projections.base import Scheme, Side
from veratune.projections.structure import Matrix
from veratune.utils.torch_private import constant_while_compiling, outside_transformations

_DeviceDtype = tuple[torch.device, torch.dtype]
_numbers = itertools.count()


class _Backing:
    """A tensor that several views slice, in a wrapper that is freed with the last view."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Create ordinary tensors within this context, regardless of the caller's modes.

    A tensor created in inference mode cannot be saved for a backward pass, and a tensor created inside a torch.func
    transformation is invalid outside it.
    """
    with torch.inference_mode(False), torch.no_grad(), outside_transformations():
        yield


class Projection:
    """One side of a scheme at one width, rank-major: at most one tensor (rank, width) for each device and dtype."""

    def __init__(self, scheme: Scheme, side: Side, width: int, lock: threading.RLock) -> None:
        self.scheme = scheme
        self.side = side
        self.width = width
        self._lock = lock
        self._backings: WeakValueDictionary[_DeviceDtype, _Backing] = WeakValueDictionary()
        self._views: WeakSet[ProjectionView] = WeakSet()

    def join(self, view: "ProjectionView") -> None:
        with self._lock:
            self._views.add(view)

    def fill(self, view: "ProjectionView", device_dtype: _DeviceDtype) -> Tensor:
        """Set the view's tensor for this device and dtype, drawing only the rows that do not exist yet."""
        with self._lock, _plain_tensors():
            if device_dtype in view.tensors:
                return view.tensors[device_dtype]
            backing = self._backings.get(device_dtype)
            held = 0 if backing is None else backing.tensor.shape[0]
            if backing is None or held < view.rank:
                device, dtype = device_dtype
                drawn = self.scheme.draw(self.side, range(held, view.rank), self.width, device)
                tensor = view.structure.arrange(drawn, dim=0).to(dtype)
                if backing is not None:
                    tensor = torch.cat([backing.tensor, tensor])
                if type(tensor) is not Tensor:  # created under a tracing mode, and invalid outside it
                    return tensor[:, : view.columns]
                backing = self._install(device_dtype, tensor)
            part = view.part_of(backing)
            if type(part) is Tensor:
                view.attach(device_dtype, backing, part)
            return part

    def _install(self, device_dtype: _DeviceDtype, tensor: Tensor) -> _Backing:
        """Install the tensor for a device and dtype, and update every view that uses the previous one."""
        backing = _Backing(tensor)
        self._backings[device_dtype] = backing
        for view in self._views:
            if device_dtype in view.tensors:
                view.attach(device_dtype, backing, view.part_of(backing))
        return backing

    def trim(self) -> None:
        """Free the rows above the largest rank still in use."""
        with self._lock, _plain_tensors():
            for device_dtype, backing in list(self._backings.items()):
                rank = max((view.rank for view in self._views if device_dtype in view.tensors), default=0)
                if 0 < rank < backing.tensor.shape[0] and not self.scheme.ordered_by_rank:
                    self._install(device_dtype, backing.tensor[:rank].clone())

    def tensors(self) -> dict[_DeviceDtype, Tensor]:
        with self._lock:
            return {device_dtype: backing.tensor for device_dtype, backing in self._backings.items()}


class ProjectionView:
    """A layer's view of a projection: its first `rank` rows and `features` columns, created on first use.

    Attributes:
        rank: number of rows.
        features: the layer's width.
        structure: how the elements are stored.
        columns: how many elements are stored for each row; `features` for a dense projection.
        tensors: the tensors that exist now, by (device, dtype); filled by `values`.
    """

    def __init__(self, projection: Projection, rank: int, features: int) -> None:
        self.projection = projection
        self.rank = rank
        self.features = features
        self.structure = projection.scheme.structure(projection.side, rank, features)
        self.columns = projection.scheme.stored_columns(projection.side, features)
        self.tensors: dict[_DeviceDtype, Tensor] = {}
        self._held: dict[_DeviceDtype, _Backing] = {}
        # torch.compile treats strings as constants, but may make an int that differs between views symbolic.
        self._key = f"view {next(_numbers)}"
        _views[self._key] = self
        projection.join(self)

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Matrix:
        """Return the projection on a device and in a dtype, with its rows in the order of its structure."""
        return Matrix(self.values(device, dtype), self.structure)

    def values(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the stored elements, (rows, columns): a view of shared memory that must not be written to."""
        if torch.compiler.is_compiling():
            # Drawing cannot be traced, and need not be: it happens once, at trace time. The lookup below is guarded, so
            # that a change of device, dtype or adapter triggers recompilation.
            _fill_while_tracing(self._key, device, dtype)
            if (device, dtype) in self.tensors:
                return self.tensors[(device, dtype)]
        device_dtype = (device, dtype)
        held = self.tensors.get(device_dtype)
        return self.projection.fill(self, device_dtype) if held is None else held

    def drawn(self) -> Tensor:
        """Draw the projection, (rank, features), as a dense float32 tensor on the CPU, without caching it."""
        projection = self.projection
        values = projection.scheme.draw(projection.side, range(self.rank), projection.width, torch.device("cpu"))
        stored = self.structure.arrange(values[:, : self.columns], dim=0)
        return self.structure.restore(self.structure.dense(stored), dim=0)

    def part_of(self, backing: _Backing) -> Tensor:
        """Return this view's rows and columns of a backing tensor."""
        rows = backing.tensor if self.projection.scheme.ordered_by_rank else backing.tensor[: self.rank]
        return rows[:, : self.columns]

    def attach(self, device_dtype: _DeviceDtype, backing: _Backing, part: Tensor) -> None:
        self._held[device_dtype] = backing
        self.tensors[device_dtype] = part

    def keep_only(self, device: torch.device) -> None:
        """Release tensors on other devices, after the layer has been moved to this one."""
        for device_dtype in [device_dtype for device_dtype in self.tensors if device_dtype[0] != device]:
            del self.tensors[device_dtype], self._held[device_dtype]

    def release(self) -> None:
        """Release all tensors; the next use creates them again."""
        self.tensors.clear()
        self._held.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> "ProjectionView":
        return ProjectionView(self.projection, self.rank, self.features)

    def __reduce__(self) -> tuple[Callable[..., "ProjectionView"], tuple[Scheme, Side, int, int]]:
        return _restore_view, (self.projection.scheme, self.projection.side, self.rank, self.features)


_views: WeakValueDictionary[str, ProjectionView] = WeakValueDictionary()


@constant_while_compiling
def _fill_while_tracing(key: str, device: torch.device, dtype: torch.dtype) -> bool:
    view = _views[key]
    view.projection.fill(view, (device, dtype))
    return True


def _restore_view(scheme: Scheme, side: Side, rank: int, features: int) -> ProjectionView:
    return projection_pool.view(scheme, side, rank, features)


@dataclass(frozen=True)
class ProjectionInfo:
    """One tensor that the pool currently holds."""

    side: Side
    rank: int
    width: int
    device: torch.device
    dtype: torch.dtype
    nbytes: int


class ProjectionPool:
    """All projections of the process, each kept alive only by the layers that use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._projections: WeakValueDictionary[tuple[Scheme, Side, int, int | None], Projection] = WeakValueDictionary()

    def view(self, scheme: Scheme, side: Side, rank: int, features: int) -> ProjectionView:
        """Return a view of the shared projection of this scheme, side and width; nothing is drawn yet."""
        width = scheme.storage_width(side, features)
        key = (scheme, side, width, rank if scheme.ordered_by_rank else None)
        with self._lock:
            projection = self._projections.get(key)
            if projection is None:
                projection = Projection(scheme, side, width, self._lock)
                self._projections[key] = projection
        return ProjectionView(projection, rank, features)

    def trim(self) -> None:
        """Free rows above the largest rank in use, which remain when an adapter of a larger rank is deleted."""
        with self._lock:
            for projection in list(self._projections.values()):
                projection.trim()

    def summary(self) -> list[ProjectionInfo]:
        """List the existing tensors, largest first."""
        with self._lock:
            infos = [
                ProjectionInfo(projection.side, tensor.shape[0], projection.width, device, dtype, tensor.nbytes)
                for projection in list(self._projections.values())
                for (device, dtype), tensor in projection.tensors().items()
            ]
        return sorted(infos, key=lambda info: -info.nbytes)


projection_pool = ProjectionPool()
