"""Peak figures of devices that are not here, from their makers' data sheets."""

from __future__ import annotations

from sfkt_cli.errors import ConfigError
from sfkt_cli.training.roofline import (
    DEPTHWISE,
    LARGE_DEPTHWISE,
    LARGE_DEPTHWISE_WEIGHTS,
    MIDDLING,
    NARROW,
    WIDE,
    Machine,
)

# Name: TFLOP/s of dense matrix products in the precision that `auto` takes (bf16 with fp32 sums;
# the T4 has none: fp32), GB/s, GB of memory. NVIDIA data sheets of H200, H100 SXM, A100 80GB SXM,
# L4, T4 and the Ada whitepaper (RTX 4090); figures with sparsity are halved.
PEAKS = {
    "H200": (989.0, 4800.0, 141.0),
    "H100": (989.0, 3350.0, 80.0),
    "A100": (312.0, 2039.0, 80.0),
    "L4": (121.0, 300.0, 24.0),
    "T4": (8.1, 320.0, 16.0),
    "RTX4090": (165.2, 1008.0, 24.0),
}
REACHED = {
    NARROW: 0.05, MIDDLING: 0.2, WIDE: 0.4,
    DEPTHWISE: 0.02, LARGE_DEPTHWISE: 0.02, LARGE_DEPTHWISE_WEIGHTS: 0.02,
}  # fmt: skip
"""Share of the peak that each kind of convolution reaches: assumed, not measured."""
REACHED_BANDWIDTH = 0.7
LAUNCH_SECONDS = 8e-6
"""Of one operation started from Python: assumed; it hides behind longer ones."""


def named_machine(name: str) -> Machine:
    """A device by name; the estimate for it was never checked against one.

    Raises:
        ConfigError: The name is not in PEAKS.
    """
    key = name.upper().replace(" ", "").replace("-", "")
    if key not in PEAKS:
        raise ConfigError(f"--device {name!r}: choose one of {', '.join(PEAKS)}")
    peak, bandwidth, memory = PEAKS[key]
    return Machine(
        key,
        {kind: 1e12 * peak * share for kind, share in REACHED.items()},
        (0.0, 0.0),
        1e9 * bandwidth * REACHED_BANDWIDTH,
        LAUNCH_SECONDS,
        1e9 * memory,
        measured=False,
    )
