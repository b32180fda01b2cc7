"""Stage `activations`: the activation at a hook over a shard, and the stream from which a patched run resumes."""

import torch

from pipeline import batches, decoder, models, store
from pipeline.stage import Call, log, run

AXES = {"activation": "seq pos d", "stream": "seq pos d_model"}


def work(call: Call) -> None:
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.decoder(weights)
    hook = decoder.hook_of(call.key["hook"], weights)
    with store.arrays(call.input("tokens"), {"token": "seq pos"}) as tokens:
        start, stop = batches.shard_bounds(len(tokens["token"]), call.key["shard"])

        def read(first: int, last: int) -> dict[str, torch.Tensor]:
            rows = batches.filled(torch.from_numpy(tokens["token"][first:last]).to(call.device).long())
            return checked(first, hook.name, *model.read(rows, hook))

        shapes = {name: (stop - start, *value.shape[1:]) for name, value in read(0, 1).items()}
        with store.new_arrays(call.output, call.fingerprint, AXES, shapes, **call.key, first=start) as file:
            for first, last in batches.ranges(start, stop):
                for name, value in read(first, last).items():
                    file[name][first - start : last - start] = value[: last - first].cpu().numpy()
    log.info(
        "%s: %d sequences of %s",
        hook.name,
        stop - start,
        "activation and stream" if "stream" in shapes else "activation",
    )


def checked(first: int, name: str, x: torch.Tensor, stream: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The arrays to store. ValueError says at which sequence and position the activation is not finite."""
    bad = (~torch.isfinite(x).all(-1)).nonzero()
    if len(bad):
        sequence, position = bad[0].tolist()
        raise ValueError(
            f"The activation at '{name}' is not finite at sequence {first + sequence}, "
            f"position {position} (and at {len(bad) - 1} more tokens "
            "of its batch). The model overflows there, or its weights are damaged."
        )
    return {"activation": x} if stream is None else {"activation": x, "stream": stream}


def main() -> None:
    with torch.inference_mode():
        run("activations", work)


if __name__ == "__main__":
    main()
