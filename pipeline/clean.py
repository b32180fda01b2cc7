"""Stage `clean`: the clean run of a model over a shard, stored once so that no later job runs it again."""

import numpy as np
import torch

from pipeline import batches, decoder, engine, models, store
from pipeline.progress import tracked
from pipeline.stage import Call, log, run

AXES = {"final": "seq pos d_model", "ce": "seq pos", "entropy": "seq pos", "top1": "seq pos"}


def work(call: Call) -> None:
    torch.set_num_threads(call.threads)
    weights = models.load(call.input("weights"), call.device)
    model = decoder.in_precision(weights, call.settings["precision"], call.device)
    with store.arrays(call.input("tokens"), {"token": "seq pos"}) as tokens:
        start, stop = batches.shard_bounds(len(tokens["token"]), call.key["shard"])
        shape = (stop - start, tokens["token"].shape[1])
        shapes = {
            "final": (*shape, weights.settings["d_model"]),
            "ce": shape,
            "entropy": shape,
            "top1": (shape, "int32"),
        }
        ce = []
        with store.new_arrays(
            call.output, call.fingerprint, AXES, shapes, **call.key, first=start, unit="nats"
        ) as file:
            ranges = list(batches.ranges(start, stop))
            for first, last in tracked(ranges, [(last - first) * tokens["token"].shape[1] for first, last in ranges]):
                batch = batches.filled(torch.from_numpy(tokens["token"][first:last]).to(call.device).long())
                values = engine.clean_values(model, batch, call.budget)
                for name, value in values.items():
                    file[name][first - start : last - start] = value[: last - first].cpu().numpy()
                ce.append(values["ce"][: last - first, :-1].cpu().numpy())
    log.info(
        "clean cross-entropy %.4f nats over %d sequences", np.concatenate(ce).mean() if ce else np.nan, stop - start
    )


def main() -> None:
    with torch.inference_mode():
        run("clean", work)


if __name__ == "__main__":
    main()
