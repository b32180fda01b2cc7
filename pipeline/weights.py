"""Stage `weights`: a model's folder or name -> its processed TransformerLens weights, so that no later stage imports
TransformerLens or processes weights again."""

from pipeline import models, store
from pipeline.stage import Call, log, run


def work(call: Call) -> None:
    weights = models.load_source(call.settings, call.settings["processing"])
    size = sum(tensor.nbytes for tensor in weights.state.values())
    with store.written(call.output, size) as part:
        models.save(weights, part, call.fingerprint)
    log.info("%s: %d layers, %.1f MiB", call.key["model"], weights.layers, size / 2**20)


def main() -> None:
    run("weights", work)


if __name__ == "__main__":
    main()
