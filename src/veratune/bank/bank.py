"""`AdapterBank`: many adapters of one base model, resident as rows of one tensor, each row of a batch with its own."""

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from veratune.adapters.adapted_model import AdaptedModel
from veratune.adapters.names import base_modules
from veratune.adapters.plan import plan_adapter
from veratune.adapters.surgery import undone_on_error
from veratune.bank.calls import make_call, trial_call
from veratune.bank.configs import config_for_adapters, config_of_layout
from veratune.bank.installation import Installation
from veratune.bank.layer_call import BankCall
from veratune.bank.layout import AdapterRow, BankError, Layout, head_row, make_layout, scheme_to_json
from veratune.bank.model import BankModel
from veratune.bank.projections import BankProjections
from veratune.bank.registry import AdapterInfo, AdapterNames, Registry
from veratune.bank.rowmaker import RowMaker
from veratune.bank.rows import check_kept_apart, check_order
from veratune.bank.schema import check_spelling
from veratune.bank.slots import Lease, Slots, Version
from veratune.bank.store import AdapterGoneError, BankStore, open_store
from veratune.config import VeraConfig
from veratune.model import check_bare
from veratune.ops.calibration import load_calibration
from veratune.utils.atomic import is_there

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AdapterBank:
    """Many adapters of one base model, of which each row of a batch has its own: for inference.

    All layers that the configuration names are put in place once; adding an adapter is a copy of its vectors. Adapters
    of smaller ranks, and of fewer layers, are held exactly. Methods may be called by several threads at once, while
    others compute.

    Attributes:
        model: what to call: `bank.model(**batch, adapters=["anna", None])`.
        layout: the order of an adapter's numbers.
        dtype: the dtype in which vectors are held.
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
        """Put the bank's layers into a model.

        Args:
            model: the base model, without adapters; it is changed in place until `unload`, and put in eval mode.
            peft_config: what may be adapted: `target_modules` and what belongs to them, `modules_to_save`, and `r`, the
                largest rank. `route` as in training: "auto" adds up the weights of adapters that have many tokens in a
                batch, "factored" never does, so that the time does not depend on how many adapters there are.
                Projections are each adapter's own; initial values and dropout do not matter.
            capacity: how many adapters to have room for on the model's device. In memory, a bank that is full grows, by
                copying what it holds; with a file, the adapter that has not been used for longest makes room.
            dtype: how to hold the vectors: float32, bfloat16 or float16.
            file: a file that holds all adapters (see `veratune.bank.store`): made if it does not exist.

        Raises:
            BankError: a layer or head that cannot be given vectors for each row, or a file for another layout.
            TargetError: the configuration matches nothing in this model, which is unchanged then.
        """
        if capacity < 1:
            raise BankError(f"capacity={capacity} is not allowed: it must be at least 1")
        if dtype not in DTYPES:
            raise BankError(f"dtype={dtype} is not allowed: vectors are held as {', '.join(map(str, DTYPES))}")
        check_bare(model)
        check_order(model)
        plan = plan_adapter(model, peft_config)
        if plan.bias_owners:
            raise BankError(f"bias={peft_config.bias!r}: a bank does not hold biases for each adapter; use bias='none'")
        modules = base_modules(model)
        rank = max(target.r for target in plan.targets)
        heads = {name: modules[name] for name in plan.config.modules_to_save or []}
        self.layout: Layout = make_layout(plan.targets, rank, heads)
        self.dtype = dtype
        base_heads = head_row(self.layout, modules)
        cpu_heads = None if base_heads is None else base_heads.cpu()
        self._installation = Installation(model, modules, plan.targets, self.layout, plan.config.route)
        device = self._installation.device
        head_dtype = None if base_heads is None else base_heads.dtype
        self._store = None if file is None else open_store(Path(file), self.layout, dtype, head_dtype)
        self._slots = Slots.empty(capacity, self.layout.numbers, dtype, device, base_heads, grows=file is None)
        self._projections = BankProjections(plan.targets, self._installation.layers, rank)
        self._registry = Registry(self._slots, self._projections, self._store)
        self._compiled = False
        self._changes = threading.RLock()  # one change at a time, without keeping calls waiting for the disk
        self.refresh()
        with undone_on_error(model):
            self._installation.install()
            named = [target.name for target in plan.targets]
            self._rows = RowMaker(model, modules, plan.config, named, self.layout, dtype, cpu_heads)
            load_calibration(device)
            self.model = BankModel(model, self).eval()

    @classmethod
    def for_adapters(
        cls, model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], **settings: Any
    ) -> "AdapterBank":
        """Make the smallest bank that holds all of these adapters, and load them.

        Args:
            model: as for the class.
            adapters: name to directory of the adapter, or to its repository on the hub.
            settings: `capacity`, `dtype` and `file`, as for the class.

        Raises:
            BankError: an adapter that no bank holds, or a name that is not allowed; the model is unchanged then.
            CheckpointError: files that are missing or damaged, or for another model.
        """
        if not isinstance(adapters, Mapping):
            raise BankError(f"adapters={adapters!r} is not allowed: give a dictionary of names to directories")
        for name in adapters:
            check_spelling(name)
        settings.setdefault("capacity", max(64, len(adapters)))
        file = settings.get("file")
        is_new = file is not None and not is_there(Path(file))
        bank = cls(model, config_for_adapters(model, adapters), **settings)
        try:
            if held := [name for name in adapters if name in bank]:  # before the file gets any of the others
                raise BankError(
                    f"{file} holds {held[0]!r} already: AdapterBank.open(model, {str(file)!r}) makes a bank of all that"
                    " is in it, and load(..., replace=True) gives a name another adapter"
                )
            for name, place in adapters.items():
                bank.load(name, place)
        except BaseException:
            bank.unload()
            if is_new and file is not None:
                Path(file).unlink(missing_ok=True)
            raise
        return bank

    @classmethod
    def open(cls, model: nn.Module, file: str | os.PathLike[str], *, capacity: int = 64) -> "AdapterBank":
        """Make a bank of a file's layout and dtype, with the adapters in it.

        Args:
            model: as for the class: the base model that the file's adapters are for.
            file: the file, which has to exist.
            capacity: as for the class.

        Raises:
            BankError: the file is missing or damaged, or for another model; the model is unchanged then.
        """
        stored = BankStore(Path(file))
        stored.close()
        config = config_of_layout(model, stored.header.layout, str(file))
        return cls(model, config, capacity=capacity, dtype=stored.header.dtype, file=file)

    # Looking at adapters

    def __len__(self) -> int:
        return len(self._registry.names)

    def __repr__(self) -> str:
        layout = self.layout
        heads = f", heads: {', '.join(layout.heads)}" if layout.heads else ""
        return (
            f"AdapterBank({len(self)} adapters of {self.capacity} at a time, r <= {layout.rank}, {len(layout.layers)}"
            f" layers{heads}, {self.dtype}, {self.nbytes / 1e6:.1f} MB)"
        )

    @property
    def capacity(self) -> int:
        """How many adapters there is room for on the device; in memory, a bank that is full grows."""
        with self._slots.lock:
            return self._slots.capacity

    @property
    def nbytes(self) -> int:
        """The bytes of all rows on the device, free ones included; each adapter's vectors and heads are one row."""
        with self._slots.lock:
            return self._slots.slab.nbytes + (0 if self._slots.heads is None else self._slots.heads.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.names

    def names(self) -> list[str]:
        """Return the names of all adapters, in the order in which they were added."""
        with self._slots.lock:
            return list(self._registry.names)

    def info(self, name: str) -> AdapterInfo:
        """Return what the bank knows of an adapter.

        Raises:
            BankError: an unknown name.
        """
        return self._registry.info(name)

    # Adding, replacing and removing

    def load(
        self, name: str, model_id: str | os.PathLike[str], *, replace: bool = False, **location: Any
    ) -> AdapterInfo:
        """Read a saved adapter into the bank.

        Args:
            name: its name here: any text of printable characters, up to 256 bytes in UTF-8.
            model_id: directory of the adapter, in veratune's or PEFT's format, or its repository on the hub.
            replace: whether to replace an adapter of that name; calls in flight keep using the old one.
            location: `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            BankError: the name is taken (or, with `replace`, unknown), or the adapter does not fit this bank.
            CheckpointError: the files are missing or damaged, or for another model.
        """
        self._registry.check_name(name, replace)
        return self._put(name, self._rows.saved(model_id, location), replace)

    def check(self, model_id: str | os.PathLike[str], **location: Any) -> None:
        """Read a saved adapter and raise what `load` would raise for it, without adding it.

        Args:
            model_id: as for `load`.
            location: as for `load`.

        Raises:
            BankError, CheckpointError: as for `load`.
        """
        row = self._rows.saved(model_id, location)
        if self._store is not None:
            scheme_to_json(row.scheme)

    def add(
        self, name: str, model: AdaptedModel, adapter_name: str | None = None, *, replace: bool = False
    ) -> AdapterInfo:
        """Copy an adapter of another model, which is of the same kind as this one, into the bank.

        Args:
            name: as for `load`.
            model: the model that has the adapter, such as `get_peft_model` returns.
            adapter_name: which of its adapters; the active one by default.
            replace: as for `load`.

        Raises:
            BankError: as for `load`.
            CheckpointError: the adapter is for a model of other layers.
        """
        self._registry.check_name(name, replace)
        return self._put(name, self._rows.active(model, adapter_name), replace)

    def remove(self, name: str) -> None:
        """Let a name mean nothing any more. Calls that have begun are not disturbed.

        Raises:
            BankError: an unknown name.
        """
        with self._changes:
            with self._slots.lock:
                version = self._registry.version(name)
            if self._store is not None:
                self._store.remove(name, version.digest)
            self._registry.remove(name)

    def refresh(self) -> None:
        """Take in what other processes have written to the bank's file since.

        Raises:
            BankError: the file is damaged.
        """
        if self._store is None:
            return
        with self._changes:
            self._store.refresh()
            self._registry.follow(self._store.names, self._store.adapters)

    def _put(self, name: str, row: AdapterRow, replace: bool) -> AdapterInfo:
        with self._changes:
            with self._slots.lock:
                before = self._registry.check_name(name, replace)
            if self._store is not None:
                self._store.add(name, row, replacing=None if before is None else before.digest)
            try:
                return self._registry.put(name, row)
            except BaseException:
                if self._store is not None:  # the file has it
                    self._registry.follow(self._store.names, self._store.adapters)
                raise

    # Serving

    def lease(self, names: AdapterNames) -> Lease:
        """Keep adapters as they are for a request, in a `with` statement or until `release`.

        Args:
            names: a name for each row, or None for the base model.

        Raises:
            BankError: an unknown name, or more different adapters at once than there is room for.
        """
        try:
            return self._registry.lease(names)
        except AdapterGoneError:  # another process has replaced or removed it
            self.refresh()
            return self._registry.lease(names)

    def lease_versions(self, versions: Sequence[Version | None]) -> Lease:
        """Return one more lease of versions that are leased already, whatever their names mean by now.

        Args:
            versions: the version of each row, from other leases that are held meanwhile; None for the base model.

        Raises:
            BankError: more different adapters at once than there is room for.
        """
        return self._registry.lease_versions(versions)

    def lease_again(self, lease: Lease) -> Lease:
        """Return one more lease of what a lease holds, which it keeps even if that one is released meanwhile.

        Raises:
            BankError: a lease that has been released, or is another bank's.
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
        """Return what the layers have to know of a call.

        Args:
            lease: the adapters of the rows.
            lengths: for packed sequences, the number of tokens of each.
            copies: as in `BankCall`.
            flattened: as in `BankCall`.

        Raises:
            BankError: no rows, or lengths that are not one for each row.
        """
        kinds = self._projections.numbers() if self._compiled else None
        return make_call(self._installation.owner, lease, lengths, kinds, copies=copies, flattened=flattened)

    def check_rows(self, **inputs: Any) -> None:
        """Find out whether each row of this model's outputs depends on its own adapter and on no other row's.

        A layer does not know what the model has done to its input. What could not be told apart by its shape (an input
        with time before rows, tokens that were sorted) shows here: a made-up adapter in one row must change that row
        and no other, to the bit. Run it once for a model of an unusual architecture.

        Args:
            inputs: the model's arguments, a batch of at least two rows.

        Raises:
            BankError: the model does not keep rows apart.
        """
        with self._slots.lock:
            number, heads = self._projections.any_number(), self._slots.heads
        row = 0.5 * torch.randn(self.layout.numbers, generator=torch.Generator().manual_seed(0))
        slab = torch.stack([torch.zeros_like(row), row]).to(self._slots.slab)

        def call(slots: Tensor) -> BankCall:
            slots = slots.to(slab.device)
            return trial_call(self._installation.owner, number, slab, heads, slots)

        check_kept_apart(self.model.base_model, call, inputs)

    def compile(self, **settings: Any) -> None:
        """Compile the model with `torch.compile`; other adapters in a call do not make it compile again."""
        self._compiled = True
        self.model.base_model.compile(**settings)

    def follow_model(self) -> None:
        """Bring the vectors to the device on which the model is; called when it moves."""
        with self._slots.lock:
            self._slots.move(self._installation.current_device())

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise BankError("a bank can neither be copied nor pickled: make another one, on the same file")

    def unload(self) -> nn.Module:
        """Take the bank's layers out again, close its file, and return the model as it was.

        Raises:
            BankError: requests are running, or hold adapters by a lease.
        """
        self._registry.close()
        self._installation.undo()
        if self._store is not None:
            self._store.close()
        return self.model.base_model
