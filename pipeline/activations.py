"""Stage `activations`: the activation at hooks over a shard, and the stream from which a patched run resumes.

One forward pass serves all hooks of a batch; each has its own file. A killed job goes on where its files were marked.
"""

from contextlib import ExitStack

import torch

from pipeline import batches, decoder, models, store
from pipeline.progress import tracked
from pipeline.stage import Call, log, run_batch

AXES = {"activation": "seq pos d", "stream": "seq pos d_model"}


def work(calls: list[Call]) -> None:
    call = calls[0]  # they differ in their hooks only
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    hooks = [decoder.hook_of(each.key["hook"], weights) for each in calls]
    with ExitStack() as stack:
        tokens = stack.enter_context(store.arrays(call.input("tokens"), {"token": "seq pos"}))["token"]
        start, stop = batches.shard_bounds(len(tokens), call.key["shard"])

        def read(first: int, last: int) -> list[dict[str, torch.Tensor]]:
            rows = batches.filled(torch.from_numpy(tokens[first:last]).to(call.device).long())
            found = model.read(rows, hooks)
            return [checked(first, hook.name, *pair) for hook, pair in zip(hooks, found, strict=True)]

        files = []
        for each, values in zip(calls, read(start, start + 1), strict=True):
            shapes = {name: (stop - start, *value.shape[1:]) for name, value in values.items()}
            new = store.resumed_arrays(each.output, each.fingerprint, AXES, shapes, **each.key, first=start)
            files.append(stack.enter_context(new))
        done = min(each.done for each in files)  # a multiple of the micro-batch, so that all rounds as in one go
        if done:
            log.info("going on at sequence %d of %d", done, stop - start)
        ranges = list(batches.ranges(start + done, stop))
        for first, last in tracked(ranges, [(last - first) * tokens.shape[1] for first, last in ranges]):
            for each, values in zip(files, read(first, last), strict=True):
                for name, value in values.items():
                    each.file[name][first - start : last - start] = value[: last - first].cpu().numpy()
                each.mark(last - start)
        for hook, each in zip(hooks, files, strict=True):
            log.info("%s: %d sequences of %s", hook.name, stop - start, " and ".join(each.file))


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
        run_batch("activations", work)


if __name__ == "__main__":
    main()
