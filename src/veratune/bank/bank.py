"""`AdapterBank`: many adapters of one base model, stored as rows of a tensor; each sequence in a batch selects one."""

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import base_modules
from veratune.adapters.plan import plan_adapter
from veratune.adapters.surgery import undone_on_error
from veratune.bank.bank_config import config_for_adapters, config_of_layout
from veratune.bank.call_building import make_call, trial_call
from veratune.bank.installation import Installation
from veratune.bank.isolation import check_batch_first, check_isolation
from veratune.bank.layer_call import BankCall
from veratune.bank.layout import AdapterRow, BankError, Layout, make_layout, saved_row, scheme_to_json
from veratune.bank.model import BankModel
from veratune.bank.projections import BankProjections
from veratune.bank.registry import AdapterInfo, AdapterNames, Registry
from veratune.bank.resident import Lease, ResidentRows, Version
from veratune.bank.row_maker import RowMaker
from veratune.bank.schema import check_spelling
from veratune.bank.store import AdapterGoneError, BankStore, open_store
from veratune.config import VeraConfig
from veratune.model import check_bare
from veratune.ops.calibration import load_calibration
from veratune.utils.atomic import is_there

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdapterBank:
    """Hold many adapters of one base model for inference, a different one for each sequence in a batch.

    The layers that the configuration selects are replaced once; adding an adapter only copies its vectors. An adapter
    with a smaller rank, or on fewer layers, is represented exactly. Methods are thread-safe.

    Attributes:
        model: the model to call: `bank.model(**batch, adapters=["anna", None])`.
        layout: the order of the values in an adapter's row.
        dtype: the dtype of stored vectors.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: VeraConfig,
        *,
        capacity: int = 64,
        dtype: torch.dtype = torch.float32,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        """Install the bank's layers in a model.

        Args:
            model: the base model, without adapters; modified in place until `unload`, and set to eval mode.
            peft_config: the layers that adapters may adapt (`target_modules` and related fields), `modules_to_save`,
                and `r`, the largest rank. `route` works as in training: "auto" computes W0 + delta W for an adapter
                with many tokens in the batch; "factored" never does, so the time does not depend on the number of
                adapters. Projections are set by each adapter; initial values and dropout are ignored.
            capacity: the number of adapters to hold on the model's device. When full, a bank without a file grows by
                copying its tensors; a bank with a file evicts the least recently used adapter.
            dtype: the dtype of stored vectors: float32, bfloat16 or float16.
            file: a file that holds all adapters (see `veratune.bank.store`), created if it does not exist.

        Raises:
            BankError: a layer or module cannot differ between sequences, or the file has another layout.
            TargetError: the configuration matches nothing in this model. The model is unchanged.
        """
        if capacity < 1:
            raise BankError(f"capacity={capacity} is not allowed: it must be at least 1")
        if dtype not in DTYPES:
            raise BankError(f"dtype={dtype} is not allowed: it must be one of {', '.join(map(str, DTYPES))}")
        check_bare(model)
        check_batch_first(model)
        plan = plan_adapter(model, peft_config)
        if plan.bias_owners:
            raise BankError(f"bias={peft_config.bias!r}: a bank does not support per-adapter biases; use bias='none'")
        modules = base_modules(model)
        rank = max(target.r for target in plan.targets)
        saved_modules = {name: modules[name] for name in plan.config.modules_to_save or []}
        self.layout: Layout = make_layout(plan.targets, rank, saved_modules)
        self.dtype = dtype
        base_saved = saved_row(self.layout, modules)
        cpu_saved = None if base_saved is None else base_saved.cpu()
        self._installation = Installation(model, modules, plan.targets, self.layout, plan.config.route)
        device = self._installation.device
        saved_dtype = None if base_saved is None else base_saved.dtype
        self._store = None if file is None else open_store(Path(file), self.layout, dtype, saved_dtype)
        self._resident = ResidentRows.empty(
            capacity, self.layout.numbers, dtype, device, base_saved, grows=file is None
        )
        self._projections = BankProjections(plan.targets, self._installation.layers, rank)
        self._registry = Registry(self._resident, self._projections, self._store)
        self._compiled = False
        self._changes = threading.RLock()  # serializes changes without blocking calls during disk writes
        self.refresh()
        with undone_on_error(model):
            self._installation.install()
            named = [target.name for target in plan.targets]
            self._rows = RowMaker(model, modules, plan.config, named, self.layout, dtype, cpu_saved)
            load_calibration(device)
            self.model = BankModel(model, self).eval()

    @classmethod
    def for_adapters(
        cls, model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], **settings: Any
    ) -> "AdapterBank":
        """Create the smallest bank that can hold all of these adapters, and load them.

        Args:
            model: as for the constructor.
            adapters: adapter names, mapped to directories or Hub repositories.
            settings: `capacity`, `dtype`, `file` and, for a larger bank, `peft_config`, as for the constructor.

        Raises:
            BankError: a bank does not support one of the adapters, or a name is invalid. The model is unchanged.
            CheckpointError: an adapter's files are missing, damaged, or for another model.
        """
        if not isinstance(adapters, Mapping):
            raise BankError(f"adapters={adapters!r} is not allowed: pass a dictionary of names to directories")
        check_bare(model)
        for name in adapters:
            check_spelling(name)
        settings.setdefault("capacity", max(64, len(adapters)))
        file = settings.get("file")
        new_file = None if file is None or is_there(Path(file)) else Path(file)
        config = settings.pop("peft_config", None) or config_for_adapters(model, adapters)
        bank = cls(model, config, **settings)
        try:
            if held := [name for name in adapters if name in bank]:  # check before writing any of the others
                raise BankError(
                    f"{file} already contains {held[0]!r}: use AdapterBank.open(model, {str(file)!r}) for a bank of all"
                    " adapters in the file, and load(..., replace=True) to replace one"
                )
            with nullcontext() if new_file is None or bank._store is None else bank._store.batch():
                for name, path_or_repo in adapters.items():
                    bank.load(name, path_or_repo)
        except BaseException:
            bank.unload()
            if new_file is not None:
                new_file.unlink(missing_ok=True)
            raise
        return bank

    @classmethod
    def open(cls, model: nn.Module, file: str | os.PathLike[str], *, capacity: int = 64) -> "AdapterBank":
        """Create a bank with the layout, dtype and adapters in a file.

        Args:
            model: the base model of the file's adapters; otherwise as for the constructor.
            file: an existing bank file.
            capacity: as for the constructor.

        Raises:
            BankError: the file is missing, damaged, or for another model. The model is unchanged.
        """
        stored = BankStore(Path(file))
        stored.close()
        config = config_of_layout(model, stored.header.layout, str(file))
        return cls(model, config, capacity=capacity, dtype=stored.header.dtype, file=file)

    # Inspecting adapters

    def __len__(self) -> int:
        return len(self._registry.names)

    def __repr__(self) -> str:
        layout = self.layout
        saved = f", modules_to_save: {', '.join(layout.modules_to_save)}" if layout.modules_to_save else ""
        return (
            f"AdapterBank({len(self)} adapters of {self.capacity} at a time, r <= {layout.rank}, {len(layout.layers)}"
            f" layers{saved}, {self.dtype}, {self.nbytes / 1e6:.1f} MB)"
        )

    @property
    def capacity(self) -> int:
        """The number of adapters that fit on the device; a bank without a file grows when it is full."""
        with self._resident.lock:
            return self._resident.capacity

    @property
    def nbytes(self) -> int:
        """The size in bytes of all rows on the device, including free rows and the values of modules_to_save."""
        with self._resident.lock:
            return self._resident.slab.nbytes + (0 if self._resident.saved is None else self._resident.saved.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.names

    def names(self) -> list[str]:
        """Return the names of all adapters, in the order in which they were added."""
        with self._resident.lock:
            return list(self._registry.names)

    def info(self, name: str) -> AdapterInfo:
        """Return information about an adapter.

        Raises:
            BankError: the name is unknown.
        """
        return self._registry.info(name)

    # Adding, replacing and removing

    def load(
        self, name: str, model_id: str | os.PathLike[str], *, replace: bool = False, **location: Any
    ) -> AdapterInfo:
        """Read a saved adapter into the bank.

        Args:
            name: the adapter's name in the bank: printable characters, up to 256 bytes in UTF-8.
            model_id: the adapter's directory, in veratune's or PEFT's format, or its Hub repository.
            replace: whether to replace the existing adapter of that name; in-flight calls keep using the old one.
            location: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            BankError: the name is taken (or, with `replace`, unknown), or the adapter does not fit this bank.
            CheckpointError: the files are missing, damaged, or for another model.
        """
        self._registry.check_name(name, replace)
        return self._put(name, self._rows.saved(model_id, location), replace)

    def check(self, model_id: str | os.PathLike[str], **location: Any) -> None:
        """Run the checks of `load` on a saved adapter without adding it.

        Args:
            model_id, location: as for `load`.

        Raises:
            BankError, CheckpointError: as for `load`.
        """
        row = self._rows.saved(model_id, location)
        if self._store is not None:
            scheme_to_json(row.scheme)

    def add(
        self, name: str, model: AdaptedModel, adapter_name: str | None = None, *, replace: bool = False
    ) -> AdapterInfo:
        """Copy an adapter from another model of the same architecture into the bank.

        Args:
            name, replace: as for `load`.
            model: the model that has the adapter, for example from `get_peft_model`.
            adapter_name: the adapter's name in `model`; by default, the active adapter.

        Raises:
            BankError: as for `load`.
            CheckpointError: the adapter's layers do not match those of this model.
        """
        self._registry.check_name(name, replace)
        return self._put(name, self._rows.active(model, adapter_name), replace)

    def remove(self, name: str) -> None:
        """Remove a name. In-flight calls are unaffected.

        Raises:
            BankError: the name is unknown.
        """
        with self._changes:
            with self._resident.lock:
                version = self._registry.version(name)
            if self._store is not None:
                self._store.remove(name, version.digest)
            self._registry.remove(name)

    def refresh(self) -> None:
        """Apply the changes that other processes have made to the bank's file.

        Raises:
            BankError: the file is damaged.
        """
        if self._store is not None:
            with self._changes:
                self._store.refresh()
                self._registry.follow(self._store.names, self._store.adapters)

    def _put(self, name: str, row: AdapterRow, replace: bool) -> AdapterInfo:
        with self._changes:
            with self._resident.lock:
                before = self._registry.check_name(name, replace)
            if self._store is not None:
                self._store.add(name, row, replacing=None if before is None else before.digest)
            try:
                return self._registry.put(name, row)
            except BaseException:
                if self._store is not None:  # the adapter is already in the file
                    self._registry.follow(self._store.names, self._store.adapters)
                raise

    # Serving

    def lease(self, names: AdapterNames) -> Lease:
        """Lease adapters, which stay unchanged until `release` is called or a `with` block ends.

        Args:
            names: the adapter name of each sequence; None for the base model.

        Raises:
            BankError: a name is unknown, or there is no room for this many different adapters at once.
        """
        try:
            return self._registry.lease(names)
        except AdapterGoneError:  # another process has replaced or removed it
            self.refresh()
            return self._registry.lease(names)

    def lease_versions(self, versions: Sequence[Version | None]) -> Lease:
        """Return another lease of versions that are already leased, even if their names now refer to other versions.

        Args:
            versions: the version of each sequence, from leases that are still held; None for the base model.

        Raises:
            BankError: there is no room for this many different adapters at once.
        """
        return self._registry.lease_versions(versions)

    def lease_again(self, lease: Lease) -> Lease:
        """Return another lease of the same versions, which may outlive the first one.

        Raises:
            BankError: the lease was released, or belongs to another bank.
        """
        return self._registry.lease_again(lease)

    def call_of(
        self,
        lease: Lease,
        lengths: Sequence[int] | None = None,
        *,
        copies: tuple[int, ...] = (1,),
        flattened: bool = True,
    ) -> BankCall:
        """Return the `BankCall` that the layers read.

        Args:
            lease: the adapters of the sequences.
            lengths: for packed sequences, the number of tokens in each.
            copies, flattened: as in `BankCall`.

        Raises:
            BankError: there are no sequences, or `lengths` does not have one entry per sequence.
        """
        schemes = self._projections.numbers() if self._compiled else None
        return make_call(self._installation.owner, lease, lengths, schemes, copies=copies, flattened=flattened)

    def check_isolation(self, **inputs: Any) -> None:
        """Check that the outputs for each sequence depend on its adapter and on no other adapter.

        Layers assume that the first dimension of their input is the batch. Shapes do not reveal time-first inputs or
        sorted tokens, but this test does: a random adapter on one sequence must change that sequence's outputs and
        leave all others bit-identical. Run it once for a model with an unusual architecture.

        Args:
            inputs: the model's arguments, with a batch of at least two sequences.

        Raises:
            BankError: the model mixes sequences.
        """
        with self._resident.lock:
            scheme, saved = self._projections.any_number(), self._resident.saved
        row = 0.5 * torch.randn(self.layout.numbers, generator=torch.Generator().manual_seed(0))
        slab = torch.stack([torch.zeros_like(row), row]).to(self._resident.slab)

        def call(rows: Tensor) -> BankCall:
            return trial_call(self._installation.owner, scheme, slab, saved, rows.to(slab.device))

        check_isolation(self.model.base_model, call, inputs)

    def compile(self, **settings: Any) -> None:
        """Compile the model with `torch.compile`; using other adapters does not trigger recompilation."""
        self._compiled = True
        self.model.base_model.compile(**settings)

    def follow_model(self) -> None:
        """Move the vectors to the model's device; called after the model was moved."""
        with self._resident.lock:
            self._resident.move(self._installation.current_device())

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise BankError("a bank cannot be copied or pickled: create another, or open its file again")

    def unload(self) -> nn.Module:
        """Remove the bank's layers, close its file, and return the base model.

        Raises:
            BankError: requests are running, or leases are held.
        """
        self._registry.close()
        self._installation.undo()
        if self._store is not None:
            self._store.close()
        return self.model.base_model
