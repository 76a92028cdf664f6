"""Cost model of operations on a device, used to choose routes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DeviceProfile:
    """Constants of the cost model for a device and a dtype.

    Attributes:
        flops: floating-point operations per second in matrix products.
        bandwidth: bytes read or written per second.
        launch: minimum time of an operation in seconds.
        itemsize: bytes per element.
        device_type: "cpu" or "cuda".
        triton_flops: operations per second of the Triton kernel (`ops.triton_kernel`); 0 if not measured.
        wide_flops: operations per second of products in float32.
        returns_sums: whether products of half-precision operands can return their float32 accumulators at full speed.
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
    """The dimensions of one layer call.

    Attributes:
        in_features, out_features: the layer's dimensions.
        r: the rank.
        tokens: T, the product of all leading dimensions of the input.
        sharing: number of layers that share one x A^T.
        density: the fraction of the elements of A and B that the scheme stores; 1 if they are dense.
    """

    in_features: int
    out_features: int
    r: int
    tokens: int
    sharing: int = 1
    density: float = 1.0
    key: str = field(init=False, repr=False, compare=False)
    """All fields except `tokens`, as a string, because torch.compile treats strings as constants."""

    def __post_init__(self) -> None:
        numbers = (self.in_features, self.out_features, self.r, self.sharing, self.density)
        object.__setattr__(self, "key", " ".join(map(repr, numbers)))

    @classmethod
    def of_key(cls, key: str) -> "LayerShape":
        """Return the shape with this key and zero tokens."""
        *numbers, density = key.split(" ")
        in_features, out_features, r, sharing = map(int, numbers)
        return cls(in_features, out_features, r, 0, sharing, float(density))


class Cost:
    """Running total of the cost of matrix products and elementwise operations.

    Attributes:
        flops: floating-point operations of the matrix products.
        seconds: the estimated time.
        saved_bytes: bytes saved for the backward pass, in addition to the parameters.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self.flops = 0
        self.seconds = 0.0
        self.saved_bytes = 0

    def product(self, rows: int, columns: int, inner: int, *, share: int = 1, density: float = 1.0) -> None:
        """Add a (rows, inner) x (inner, columns) product, whose cost is divided among `share` layers."""
        profile = self.profile
        flops = 2 * rows * columns * inner * density
        touched = (rows * inner + inner * columns + rows * columns) * profile.itemsize
        self.flops += int(flops) // share
        self.seconds += (flops / profile.flops + touched / profile.bandwidth + profile.launch) / share

    def triton_kernel(self, flops: int) -> None:
        """Add a launch of the Triton kernel and of the operation that computes its vector scale * d."""
        self.flops += flops
        self.seconds += flops / self.profile.triton_flops + 2 * self.profile.launch

    def widen_product(self, rows: int, columns: int, inner: int, *, share: int = 1, density: float = 1.0) -> None:
        """Add the time by which a product with a float32 result exceeds one in the compute dtype (may be negative)."""
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
        """Add an elementwise operation that reads or writes this many elements of `width` bytes each."""
        self.seconds += elements * width / self.profile.bandwidth + self.profile.launch
