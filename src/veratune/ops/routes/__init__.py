"""The routes: exact ways to compute an adapted layer, one per file. `veratune.ops.planning` chooses among them.

With T tokens and rank r:

    scaled   u = x A^T, then b * ((d * u) B^T): the vectors scale activations. For few tokens.
    folded   u = x A^T, then u C with C = d b^T * B computed once. For a moderate number of tokens.
    dense    W0 + C^T A, then one product as in an ordinary layer; vector gradients from g^T x. For many tokens; in
             training, for high ranks.
    triton   like scaled, in one kernel on a GPU. For devices on which `calibrate` measured the kernel.
    mixed    the output of `dense`, the vector gradients of `folded`. For training with many tokens.

To add a route, write a class with the methods of `Route` in a file here and add it to `ROUTES`.
"""

from veratune.ops.routes.base import Gradients, LinearInputs, MemoryName, Route, Wanted
from veratune.ops.routes.dense import Dense
from veratune.ops.routes.folded import Folded
from veratune.ops.routes.mixed import Mixed
from veratune.ops.routes.scaled import Scaled
from veratune.ops.routes.triton import Triton

ROUTES: dict[str, Route] = {route.name: route for route in (Scaled(), Folded(), Triton(), Dense(), Mixed())}

__all__ = ["ROUTES", "Gradients", "LinearInputs", "MemoryName", "Route", "Wanted"]
