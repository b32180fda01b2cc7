"""Stage `ablations`: the effects of interventions that need no SAE; made once per hook, whatever SAEs are added."""

import torch

from pipeline import effects
from pipeline.stage import run_batch


def main() -> None:
    with torch.inference_mode():
        run_batch("ablations", effects.work)


if __name__ == "__main__":
    main()
