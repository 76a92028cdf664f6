"""VeRA for `torch.nn.Embedding`, treated as a linear layer whose input is one-hot."""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veratune.layers.base import TransparentLayer
from veratune.layers.geometry import Geometry
from veratune.layers.kind import Export
from veratune.ops.delta import delta_weight
from veratune.ops.factors import Factors, check_values
from veratune.projections.structure import Matrix
from veratune.utils.tensors import without_autocast
from veratune.utils.torch_private import transformations_active

# The number of rows of the delta to compute at a time when merging.
_ROWS = 4096
# The largest number of rows of an embedding that can be exported as a LoRA.
_LARGEST_TABLE = 1 << 20


class VeraEmbedding(TransparentLayer):
    """An embedding with VeRA adapters.

    Row e of the table becomes W0[e] + b * (B (d * A[:, e])). A has a column for each row of the table, but each call
    draws only the columns for the tokens in its input.
    """

    kind = "embedding"
    one_hot = True
    multiplies_lazily = False
    exports: ClassVar[frozenset[Export]] = frozenset(("lora", "gguf"))

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def why_not_adaptable(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "its max_norm rescales rows of the table in place when they are looked up"
        if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
            return f"it is a {type(module).__name__}, which does more than look up rows"
        return super().why_not_adaptable(module)

    @classmethod
    def geometry_of(cls, module: nn.Module) -> Geometry:
        assert isinstance(module, nn.Embedding)
        return Geometry(module.num_embeddings, module.embedding_dim)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def like_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def _columns(self, name: str, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return A[:, tokens]^T, (n, r), with the ranks in the order of B's rows."""
        entry = self.entries[name]
        scheme = entry.a.projection.scheme
        with torch.inference_mode(False), torch.no_grad():
            columns = scheme.one_hot_columns(entry.r, tokens.to(torch.int64)).t().to(dtype)
            return entry.b[0].structure.arrange(columns)

    def _rows(self, name: str, tokens: Tensor) -> Tensor:
        """Return an adapter's deltas for these rows of the table, (n, out), in float32 or wider."""
        vectors = self.vectors(name)
        b, d = vectors["b"], vectors["d"]
        dtype = torch.promote_types(b.dtype, torch.float32)
        entry = self.entries[name]
        columns = self._columns(name, tokens, dtype)
        check_values(columns, b, d)
        d = entry.b[0].structure.arrange(d)
        with without_autocast(self.device):  # autocast does not apply to embedding lookups either
            up = entry.b[0].matrix(self.device, dtype).matmul(columns * (d * entry.scale))
        return up * b

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_recomputation()
        output: Tensor = self.base_layer(input, *args, **kwargs)
        if not self.added_adapters:
            return output
        if (
            torch.compiler.is_compiling() or transformations_active()
        ):  # the number of distinct tokens is unknown while tracing
            tokens, inverse = input.flatten(), torch.arange(input.numel(), device=input.device).view(input.shape)
        else:
            tokens, inverse = torch.unique(input, return_inverse=True)
        padding: int | None = getattr(self.base_layer, "padding_idx", None)
        counts = self._counts(inverse, tokens)
        scale = getattr(self.base_layer, "embed_scale", 1.0)
        for name in self.added_adapters:
            rows = self._rows(name, tokens)
            if padding is not None:  # as in the table, the row of padding_idx gets no gradient
                rows = torch.where((tokens == padding)[:, None], rows.detach(), rows)
            if counts is not None:
                constant = rows.detach()
                rows = constant + (rows - constant) / counts.to(rows.dtype)
            # Round after the lookup, so that the gradients of a token that occurs often are summed in float32.
            looked_up = torch.nn.functional.embedding(inverse, rows).to(self.base_weight.dtype)
            output = output + looked_up * scale
        return output

    def _counts(self, inverse: Tensor, tokens: Tensor) -> Tensor | None:
        """Return how often each token occurs, (n, 1), if `scale_grad_by_freq` divides gradients by this; else None."""
        if not getattr(self.base_layer, "scale_grad_by_freq", False) or not torch.is_grad_enabled():
            return None
        ones = torch.ones(inverse.numel(), device=inverse.device)
        counts = torch.zeros(self.in_features, device=inverse.device).index_add(0, tokens[inverse.flatten()], ones)
        return counts[tokens, None]

    def factors(
        self, name: str, device: torch.device, dtype: torch.dtype, pair: tuple[Tensor, Tensor] | None = None
    ) -> Factors:
        """Return an adapter's factors with all columns of A, unlike `forward` and merging, which draw only some."""
        b, d = self._pair(name) if pair is None else pair
        entry = self.entries[name]
        columns = self._columns(name, torch.arange(self.in_features, device=device), dtype)
        d = entry.b[0].structure.arrange(d)
        return Factors(Matrix(columns.t()), entry.b[0].matrix(device, dtype), b, d, entry.scale)

    def added_up(self, base: Tensor) -> Tensor:
        tokens = torch.arange(self.in_features, device=base.device)
        for name in self.added_adapters:
            base = base + self._rows(name, tokens).to(self.base_weight.dtype)
        return base

    def _delta_matrices(self, name: str, dtype: torch.dtype) -> Tensor:
        entry, device = self.entries[name], self.device
        vectors = self.vectors(name)
        b, d = vectors["b"].to(dtype), entry.b[0].structure.arrange(vectors["d"].to(dtype))
        b_projection = entry.b[0].matrix(device, dtype)
        rows = torch.arange(self.in_features, device=device)
        return torch.cat(
            [
                delta_weight(Factors(Matrix(self._columns(name, some, dtype).t()), b_projection, b, d, entry.scale))
                for some in rows.chunk(-(-len(rows) // _ROWS))
            ],
            dim=1,
        )

    # Export as a LoRA: lora_A (r, rows), lora_B (out, r)

    def why_not_lora(self) -> str | None:
        if self.in_features > _LARGEST_TABLE:
            return f"lora_A would have a column for each of the {self.in_features} rows of the table"
        return super().why_not_lora()

    def lora_keys(self, name: str, beside: Collection[str]) -> tuple[str, str]:
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"

    def _drawn_a(self, name: str) -> Tensor:
        entry = self.entries[name]
        return entry.a.projection.scheme.one_hot_columns(entry.r, torch.arange(self.in_features))
