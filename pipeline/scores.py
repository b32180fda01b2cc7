"""Stage `scores`: how well an SAE reconstructs each token of a shard, and how often its features fire.

A copy of what `reconstructions` holds but for the vectors, which are a hundred times larger and may be dropped (`keep`
in the configuration). Needs no torch.
"""

from pipeline import store
from pipeline.stage import Call, run_batch

VECTORS = ("x_hat", "bias")


def work(calls: list[Call]) -> None:
    for call in calls:
        make(call)


def make(call: Call) -> None:
    with store.arrays(call.input("reconstructions"), {}) as given:
        names = [name for name in given if name not in VECTORS]
        shapes = {name: (given[name].shape, str(given[name].dtype)) for name in names}
        attributes = {name: value for name, value in given.attrs.items() if name not in ("fingerprint", "checksum")}
        axes = {name: given[name].attrs["axes"] for name in names}
        with store.new_arrays(call.output, call.fingerprint, axes, shapes, **attributes) as file:
            for name in names:
                file[name][:] = given[name][:]


def main() -> None:
    run_batch("scores", work)


if __name__ == "__main__":
    main()
