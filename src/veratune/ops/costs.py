"""What operations cost on a device: the numbers that routes are chosen by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceProfile:
    """What the cost model knows about a device and a dtype.

    Attributes:
        flops: operations of matrix products per second.
        bandwidth: bytes read or written per second.
        launch: seconds that any operation takes at least.
        itemsize: bytes of one element.
        device_type: "cpu" or "cuda".
    """

    flops: float
    bandwidth: float
    launch: float
    itemsize: int
    device_type: str = "cpu"


@dataclass(frozen=True)
class LayerShape:
    """The dimensions of one call of a layer.

    Attributes:
        in_features, out_features: of the layer.
        rank: r.
        tokens: T, all leading dimensions of the input multiplied.
        sharing: how many layers share one x A^T.
        density: the fraction of A's and B's elements that their scheme stores; 1 for dense ones.
    """

    in_features: int
    out_features: int
    rank: int
    tokens: int
    sharing: int = 1
    density: float = 1.0


class Cost:
    """A running sum of products and elementwise passes.

    Attributes:
        flops: operations of the matrix products.
        seconds: the estimated time.
        saved_bytes: what is kept from the forward to the backward pass, besides the parameters.
    """

    def __init__(self, profile: DeviceProfile) -> None:
        self.profile = profile
        self.flops = 0
        self.seconds = 0.0
        self.saved_bytes = 0

    def product(self, rows: int, columns: int, inner: int, *, share: int = 1, density: float = 1.0) -> None:
        """Add (rows, inner) times (inner, columns), of which this layer bears 1 / share."""
        profile = self.profile
        flops = 2 * rows * columns * inner * density
        touched = (rows * inner + inner * columns + rows * columns) * profile.itemsize
        self.flops += int(flops) // share
        self.seconds += (flops / profile.flops + touched / profile.bandwidth + profile.launch) / share

    def pass_over(self, elements: float, width: int = 4) -> None:
        """Add reading or writing this many elements of `width` bytes, in an operation of its own."""
        self.seconds += elements * width / self.profile.bandwidth + self.profile.launch
