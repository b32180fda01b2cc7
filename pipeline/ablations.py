"""Stage `ablations`: the effects of interventions that need no SAE; made once per hook, whatever SAEs are added."""

from contextlib import ExitStack

import torch

from pipeline import effects, store
from pipeline.stage import Call, run


def work(call: Call) -> None:
    torch.set_num_threads(call.threads)
    with ExitStack() as stack:
        files = {
            role: stack.enter_context(store.arrays(call.input(role), axes))
            for role, axes in effects.wanted(call).items()
        }
        values = effects.measure(call, files, call.key["hook"])
        effects.write(call, files, values, {}, call.key)


def main() -> None:
    with torch.inference_mode():
        run("ablations", work)


if __name__ == "__main__":
    main()
