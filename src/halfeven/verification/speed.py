"""The guard for speed: say where integers are slower than float in the target."""

from halfeven.verification.layer_times import LayerTimes

SLOWER_FILE = 1.05
"""Ratio to the float file from which a file counts as slower: less is the fluctuation of a measurement."""

MAX_NAMED_LAYERS = 8
"""Largest number of slow layers to name."""


def slower_than_float(times: LayerTimes) -> list[str]:
    """Return a sentence for a file that is slower than the float file, and for its layers that are."""
    layers = times.slower()
    found = []
    if times.deployed > SLOWER_FILE * times.float_default:
        found.append(
            f"The file takes {times.deployed:.3f} ms, and the float file {times.float_default:.3f} ms in the runtime's "
            "default precision: these integers make the model slower here."
        )
    if layers:
        lost = sum(layer.deployed - layer.floating for layer in layers)
        rows = [
            f"{layer.name} takes {layer.deployed:.3f} ms, and {layer.floating:.3f} ms in float"
            for layer in layers[:MAX_NAMED_LAYERS]
        ]
        more = f"; and {len(layers) - MAX_NAMED_LAYERS} more" if len(layers) > MAX_NAMED_LAYERS else ""
        found.append(
            f"Slower in integers than in float, by {lost:.3f} ms together: {'; '.join(rows)}{more}. A rule with "
            "quantize=False leaves a layer in float; halfeven.search(latency=...) finds which."
        )
    return found
