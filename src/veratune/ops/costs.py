"""The cost of operations on a device, from which routes are chosen."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceProfile:
    """Constants of the cost model for a device and a dtype.

    Attributes:
        flops: floating-point operations per second in matrix products.
        bandwidth: bytes read or written per second.
        launch: minimum seconds that any operation takes.
        itemsize: bytes per element.
        device_type: "cpu" or "cuda".
        triton_flops: operations per second of the Triton kernel (`ops.triton_kernel`); 0 if it was not measured.
        wide_flops: operations per second of products in float32.
        returns_sums: whether products of half-precision operands can return their float32 sums at the same rate.
    """

    flops: float
    bandwidth: float
    launch: float
    itemsize: int
    device_type: str = "cpu"
    triton_flops: float = 0.0
    wide_flops: float = 5e10
    returns_sums: bool = False


@dataclass(frozen=True)
class LayerShape:
    """The dimensions of one call of a layer.

    Attributes:
        in_features, out_features: the layer's dimensions.
        rank: r.
        tokens: T, the product of all leading dimensions of the input.
        sharing: number of layers that share one x A^T.
        density: the fraction of A's and B's elements that their scheme stores; 1 for dense ones.
    """

    in_features: int
    out_features: int
    rank: int
    tokens: int
    sharing: int = 1
    density: float = 1.0
    key: str = field(init=False, repr=False, compare=False)
    """All fields except `tokens`, as a string, which a compiler treats as a constant."""

    def __post_init__(self) -> None:
        numbers = (self.in_features, self.out_features, self.rank, self.sharing, self.density)
        object.__setattr__(self, "key", " ".join(map(repr, numbers)))

    @classmethod
    def of_key(cls, key: str) -> "LayerShape":
        """Return the shape with this key and zero tokens."""
        *numbers, density = key.split(" ")
        in_features, out_features, rank, sharing = map(int, numbers)
        return cls(in_features, out_features, rank, 0, sharing, float(density))


class Cost:
    """A running sum of products and elementwise passes.

    Attributes:
        flops: operations of the matrix products.
        seconds: the estimated time.
        saved_bytes: bytes saved for the backward pass, in addition to the parameters.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self.flops = 0
        self.seconds = 0.0
        self.saved_bytes = 0

    def product(self, rows: int, columns: int, inner: int, *, share: int = 1, density: float = 1.0) -> None:
        """Add the product (rows, inner) times (inner, columns), divided among `share` layers."""
        profile = self.profile
        flops = 2 * rows * columns * inner * density
        touched = (rows * inner + inner * columns + rows * columns) * profile.itemsize
        self.flops += int(flops) // share
        self.seconds += (flops / profile.flops + touched / profile.bandwidth + profile.launch) / share

    def triton_kernel(self, flops: int) -> None:
        """Add a launch of the Triton kernel, and one to compute the vector that it reads."""
        self.flops += flops
        self.seconds += flops / self.profile.triton_flops + 2 * self.profile.launch

    def widen_product(self, rows: int, columns: int, inner: int, *, share: int = 1, density: float = 1.0) -> None:
        """Add the extra time of a product with a float32 result over one in the compute dtype (may be negative)."""
        profile = self.profile
        wider = 4 - profile.itemsize
        if profile.returns_sums:
            seconds = rows * columns * wider / profile.bandwidth
        else:
            flops = 2 * rows * columns * inner * density
            touched = (rows * inner + inner * columns + rows * columns) * wider
            seconds = flops * (1 / profile.wide_flops - 1 / profile.flops) + touched / profile.bandwidth
        self.seconds += seconds / share

    def pass_over(self, elements: float, width: int = 4) -> None:
        """Add a separate operation that reads or writes this many elements of `width` bytes."""
        self.seconds += elements * width / self.profile.bandwidth + self.profile.launch
