"""The manager of continuous batching: requests, and the adapters that each batch is computed with."""

import copy
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.continuous_batching.utils import WorkloadHints, stream_context

from veratune.bank import AdapterBank, BankError
from veratune.bank.layer_call import serving
from veratune.bank.registry import AdapterNames
from veratune.bank.resident import Lease, Version
from veratune.integrations.continuous_batching.output_head import OutputHead
from veratune.integrations.continuous_batching.request_checks import (
    check_generation,
    check_room,
    check_settings,
    checked_prompt,
    checked_prompts,
)


class BankManager(ContinuousBatchingManager):
    """A `ContinuousBatchingManager` of transformers whose requests have adapters of a bank.

    Use it in a `with` statement, which starts it and, at the end, waits for what was asked for and lets go of
    everything. A request keeps the version of its adapter that it was added with until it is finished, has failed or
    was cancelled; of an adapter that is replaced or removed meanwhile, it sees nothing. Where transformers shares
    memory between requests whose prompts begin the same, it does so among those of the same adapter only.
    """

    def __init__(
        self,
        bank: AdapterBank,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
    ) -> None:
        """Make a manager; nothing is computed yet.

        Args:
            bank: a bank on a causal language model of transformers.
            generation_config: how all requests are generated; the model's own by default.
            continuous_batching_config: sizes and the like. On a CPU, give at least `num_blocks` and
                `max_batch_tokens`: by default most of the memory is taken.
            workload_hints: the expected workload, from which unset sizes are chosen.

        Raises:
            BankError: a model that has no continuous batching, or a setting that is not supported with a bank.
        """
        model: Any = bank.model.base_model
        if not callable(getattr(model, "init_continuous_batching", None)):
            raise BankError(
                f"{type(model).__name__} has no continuous batching: it takes a generating transformers model"
            )
        generation_config = copy.deepcopy(generation_config or model.generation_config)
        config = copy.deepcopy(continuous_batching_config or ContinuousBatchingConfig())
        check_generation(generation_config)
        check_settings(config, model)
        config.use_cuda_graph, config.use_async_batching = (False, False), False
        super().__init__(model, generation_config, config, workload_hints)
        self.bank = bank
        self.output_router = _Router(self)
        self._leases: dict[str, Lease] = {}
        self._leases_lock = threading.Lock()
        self._head = OutputHead(model)

    # Requests

    def add_request(  # type: ignore[override]
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter: str | None,
        **logit_processor_kwargs: Any,
    ) -> str:
        """Add a request.

        Args:
            input_ids: the prompt.
            request_id: a name for it, which no request at work has; made up by default.
            max_new_tokens: as transformers has it, like those that follow.
            streaming: whether tokens are delivered one by one.
            record_timestamps: whether the output has the time of each token.
            eos_token_id: what ends the text.
            logit_processor_kwargs: settings of this request's logits processors.
            adapter: the adapter's name, or None for the base model.

        Returns:
            the request's id; with `num_return_sequences`, further outputs have `<id>__child#<number>`.

        Raises:
            BankError: an unknown adapter, more different adapters at work than the bank has room for, an empty prompt,
                one of what are no tokens of the model, an id that is in use, or a request that could come to be longer
                than the whole cache. One that was added before the manager began fails with this instead.
            RuntimeError: the manager is stopping or has failed.
        """
        with self.bank.lease([adapter]) as lease:
            return self._add(
                checked_prompt(self.bank, input_ids, self.num_return_sequences),
                lease.versions[0],
                request_id,
                max_new_tokens=max_new_tokens,
                streaming=streaming,
                record_timestamps=record_timestamps,
                eos_token_id=eos_token_id,
                **logit_processor_kwargs,
            )

    def add_requests(  # type: ignore[override]
        self, inputs: Sequence[Sequence[int]], *, adapters: AdapterNames, **settings: Any
    ) -> list[str]:
        """Add several requests, which see the versions that their adapters have at one moment.

        Args:
            inputs: the prompts.
            adapters: an adapter's name for each, or None for the base model.
            settings: as for `add_request`, the same for all.

        Returns:
            their ids, in the order of `inputs`.

        Raises:
            BankError, RuntimeError: as for `add_request`; nothing is added if an adapter or a prompt is at fault.
        """
        with self.bank.lease(adapters) as lease:
            return self._add_all(checked_prompts(self.bank, inputs, lease, self.num_return_sequences), lease, settings)

    def _add_all(self, prompts: list[list[int]], lease: Lease, settings: dict[str, Any]) -> list[str]:
        # Prompts that begin the same follow each other, so that the first one's memory is there for the next.
        order = sorted(range(len(prompts)), key=lambda i: (lease.digests[i], prompts[i]), reverse=True)
        ids = [self._new_id() for _ in prompts]
        for i in order:
            self._add(prompts[i], lease.versions[i], ids[i], **settings)
        return ids

    def _add(self, prompt: list[int], version: Version | None, request_id: str | None, **settings: Any) -> str:
        if self.batch_processor is not None:  # otherwise nobody knows yet how large the cache will be
            most = settings.get("max_new_tokens")
            check_room(self.batch_processor, prompt, self.generation_config.max_new_tokens if most is None else most)
        request_id = self._new_id() if request_id is None else request_id
        # Sequences that the request forks into outlive it.
        ids = [request_id, *children(request_id, self.num_return_sequences - 1)]
        with self._leases_lock:
            taken = [one for one in ids if one in self._leases]
            if taken:
                raise BankError(f"request_id={taken[0]!r} is that of a request at work: give another one, or none")
            self._leases.update({one: self.bank.lease_versions([version]) for one in ids})
        try:
            added: str | None = super().add_request(prompt, request_id, **settings)
        except BaseException:
            self._release(ids)
            raise
        if added is None:
            self._release(ids)
            reason = self.background_thread_status.can_accept_new_requests()
            raise RuntimeError(f"the request was not added: {reason}") from self.background_thread_status.fatal_error
        return added

    def _new_id(self) -> str:
        with self._request_lock:
            while True:  # a user may have given such a name to a request
                self._request_counter += 1
                made = f"req_{self._request_counter - 1}"
                if made not in self._leases:
                    return made

    def _release(self, ids: Sequence[str]) -> None:
        """Let go of the adapters of requests that are over; a second time does nothing."""
        for one in ids:
            with self._leases_lock:
                lease = self._leases.pop(one, None)
            if lease is not None:
                lease.release()

    # Beginning and end

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(block=True, hard_stop=kind is not None)
        self.destroy()

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """Stop, as transformers does; what came too late for the last batch has failed after that."""
        super().stop(*args, **kwargs)
        if not self.is_running():
            self._fail_all_remaining_requests(RuntimeError("the manager was stopped before this request began"), None)
            self._release(list(self._leases))  # of those that a hard stop has dropped without a word

    def destroy(self) -> None:
        """Let go of everything. The manager cannot be used any more."""
        super().destroy()
        self._head.remove()

    # Computing

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        kept = self.batch_processor
        processor = super()._create_batch_processor()
        if processor is not kept:
            self._attach(processor)
        return processor

    def _attach(self, processor: ContinuousBatchProcessor) -> None:
        """Let a new processor's batches be computed with adapters, and its memory be kept apart by adapter."""
        runner: Any = processor.model_runner
        scheduler: Any = processor.scheduler
        compute, clear = runner.compute_batch, scheduler.clear_cancelled_requests
        add_waiting = scheduler.add_waiting_request

        def compute_batch(model: nn.Module, batch_data: dict[str, Any]) -> None:
            # transformers would set it in the model's config for the time of the call, where calls of other threads see
            # it and compute without a causal mask. With a mask, or with flash attention, it changes nothing.
            batch_data.pop("is_causal", None)
            with self._serving(processor, batch_data):
                compute(model, batch_data)

        def clear_cancelled_requests() -> list[RequestState]:
            cancelled: list[RequestState] = clear()
            for state in cancelled:
                # It has children still to come if it was not forked yet.
                self._release([state.request_id, *children(state.request_id, state.num_children)])
            return cancelled

        def add_waiting_request(state: RequestState) -> None:
            # A request that cannot be in the cache even alone would end all others; an error here ends it alone.
            check_room(processor, state.initial_tokens, state.max_new_tokens)
            add_waiting(state)

        runner.compute_batch = compute_batch
        scheduler.add_waiting_request = add_waiting_request
        scheduler.clear_cancelled_requests = clear_cancelled_requests
        self._keep_apart(processor.cache)

    @contextmanager
    def _serving(self, processor: ContinuousBatchProcessor, batch_data: dict[str, Any]) -> Iterator[None]:
        """Let the layers know which adapter each token of the batch belongs to."""
        io: Any = processor.inputs_and_outputs
        requests = io.requests_in_batch
        versions = [self._leases[one.state.request_id].versions[0] for one in requests]
        # Leased once more, as the bank may have moved to a larger tensor since the requests were added.
        with self.bank.lease_versions(versions) as lease, stream_context(io.compute_stream):
            call = self.bank.call_of(lease, [one.query_length for one in requests])
            if self._head.needs_own and processor.model_runner.supports_logits_to_keep(self.model):
                # The output head is given only the tokens whose successors are wanted, filled up with the first token
                # to the number of requests.
                last = [version for version, one in zip(versions, requests, strict=True) if one.has_new_token]
                last += [versions[0]] * (batch_data["logits_indices"].shape[0] - len(last))
                with self.bank.lease_versions(last) as last_lease:
                    self._head.prepare(call, self.bank.call_of(last_lease, [1] * len(last)))
            with serving(call):
                yield

    def _keep_apart(self, cache: Any) -> None:
        """Let blocks of keys and values be shared among requests of the same adapter only.

        transformers knows a block by a hash of its tokens and of the block before. Here the first block's tokens have
        the adapter's digest before them, so that all that follow differ as well.

        Args:
            cache: a `PagedAttentionCache`.
        """
        search = cache.search_prefix_match

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            found: int = search(request_id, self._marked(request_id, prompt_ids))
            return found

        cache.search_prefix_match = search_prefix_match
        for allocator in cache.cache_allocators.values():
            mark = allocator.mark_complete_blocks

            def mark_complete_blocks(request_id: str, token_ids: list[int], blocks: int, mark: Any = mark) -> None:
                mark(request_id, self._marked(request_id, token_ids), blocks)

            allocator.mark_complete_blocks = mark_complete_blocks

    def _marked(self, request_id: str, tokens: list[int]) -> "_MarkedTokens":
        return _MarkedTokens(tokens, self._leases[request_id].digests[0])


class _MarkedTokens(list[int]):
    """Tokens whose first block also has a digest in it.

    A block is what is cut out from the beginning in full; a shorter piece is no block and stays as it is.
    """

    def __init__(self, tokens: Sequence[int], digest: str) -> None:
        super().__init__(tokens)
        raw = bytes.fromhex(digest)
        self._mark = list(struct.unpack(f"<{len(raw) // 4}i", raw))

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(index, slice) and index.start == 0 and len(found) == index.stop:
            return self._mark + found
        return found


class _Router(OutputRouter):
    """Lets go of a request's adapter before its last output is delivered."""

    def __init__(self, manager: BankManager) -> None:
        super().__init__()
        self._manager = manager

    def fail_and_deliver(self, state: RequestState, error: Exception) -> None:
        # What it was still to fork into does not come.
        self._manager._release(children(state.request_id, state.num_children))
        super().fail_and_deliver(state, error)

    def deliver(self, output: GenerationOutput) -> None:
        self._note([output])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._note(outputs)
        super().deliver_batch(outputs)

    def _note(self, outputs: Sequence[GenerationOutput]) -> None:
        self._manager._release([output.request_id for output in outputs if output.is_finished()])


def children(request_id: str, number: int) -> list[str]:
    """Return the ids that transformers gives the sequences that a request forks into."""
    return [f"{request_id}__child#{i}" for i in range(number)]
