"""What interventions are made from: the arguments that they ask for, from stored arrays and seeded randomness.

In two steps, so that reading and random numbers go on while a device works: `fetch` brings what belongs to a
micro-batch into the CPU's memory, and `x_new` makes the rest and applies the intervention where the activation is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import h5py
import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from pipeline import batches, interventions, labels
from pipeline.errors import fold_of
from pipeline.tables import Run
from pipeline.types import Acts

NORMAL = ("noise", "act_noise", "error_noise")
# Arguments that are a row of a stage's sample.
SAMPLED = {"other": "moments", "another": "moments", "other_error": "errors"}
RANDOM = (*NORMAL, *SAMPLED)


def is_random(label: str) -> bool:
    return any(argument in RANDOM for argument in interventions.arguments(label))


@dataclass(frozen=True)
class Sources:
    """Open files at one hook (and of one SAE) by the stage that made them: "activations", and "reconstructions",
    "moments" and "errors" where they are asked for. `seed` is that of everything random; `heads` is how many the
    model has, which only what is done to one of them asks for."""

    files: dict[str, h5py.File]
    seed: int
    device: str = "cpu"
    heads: int | None = None

    def fetch(
        self, runs: Iterable[Run], first: int, last: int, positions: list[int] | None = None
    ) -> dict[object, Tensor]:
        """What the runs need of the sequences from `first` up to `last`, each `seq pos d` on the CPU, at all positions
        or at some; by the argument's name, or by (label, draw, argument) where it is random."""
        found: dict[object, Tensor] = {"first": torch.tensor(first)}
        runs = list(runs)
        wanted = {argument for label, _ in runs for argument in interventions.arguments(label)}
        if wanted & {"x_hat", "bias"}:
            file = self.files["reconstructions"]
            place = slice(first - int(file.attrs["first"]), last - int(file.attrs["first"]))
            whole = {"x_hat"} | ({"bias"} if "bias" in wanted and file["bias"].ndim == 3 else set())
            found |= {
                name: self._at(batches.filled(torch.from_numpy(file[name][place])), positions)
                for name in wanted & whole
            }
        for label, draw in runs:
            for argument in interventions.arguments(label):
                if argument in RANDOM:
                    rows = [self._random(label, argument, sequence, draw) for sequence in range(first, last)]
                    found[label, draw, argument] = batches.filled(
                        torch.stack([self._at(row, positions) for row in rows])
                    )
        return found

    @staticmethod
    def _at(rows: Tensor, positions: list[int] | None) -> Tensor:
        """Rows `... pos d` at some positions."""
        return rows if positions is None else rows[..., positions, :]

    def _random(self, label: str, argument: str, sequence: int, draw: int) -> Tensor:
        """`pos d` of one sequence. A strength does not change what is drawn."""
        name, shape = labels.parsed(label)[0], self.files["activations"]["activation"].shape[1:]
        if argument in NORMAL:
            return interventions.standard_normal(self.seed, name, sequence, draw, shape)
        return self._samples[SAMPLED[argument]][self._rows(name, argument, sequence, draw, shape[0])]

    def _rows(self, name: str, argument: str, sequence: int, draw: int, positions: int) -> Tensor:
        """Which row of the sample each position is given, ` pos`: another token's, never its own, and for `another` not
        that of `other` either, because the difference of a row with itself has no direction."""
        count = len(self._sequences)
        index = interventions.random_rows(self.seed, f"{name}/{argument}", sequence, draw, positions, count)
        other = self._rows(name, "other", sequence, draw, positions) if argument == "another" else None
        for _ in range(2):  # past at most two rows
            taken = (self._sequences[index] == sequence) & (self._positions[index] == torch.arange(positions))
            index = torch.where(taken if other is None else taken | (index == other), (index + 1) % count, index)
        return index

    @cached_property
    def _samples(self) -> dict[str, Tensor]:
        return {
            stage: torch.from_numpy(self.files[stage]["sample"][:])
            for stage in ("moments", "errors")
            if stage in self.files
        }

    @cached_property
    def _sequences(self) -> Tensor:
        return torch.from_numpy(self.files["moments"]["sample_place"][:, 0].astype(np.int64))

    @cached_property
    def _positions(self) -> Tensor:
        return torch.from_numpy(self.files["moments"]["sample_place"][:, 1].astype(np.int64))

    def x_new(self, run: Run, x: Acts, fetched: dict[object, Tensor]) -> Acts:
        """What an intervention writes for the activation x, with what was fetched for it."""
        label, draw = run

        def moved(key: object) -> Tensor:
            return fetched[key].to(self.device, non_blocking=True).to(x.dtype)

        made: dict[str, Callable[[], Tensor]] = {
            "x": lambda: x,
            "x_hat": lambda: moved("x_hat"),
            "mean": lambda: self._constants["moments", "mean"].to(x.dtype),
            "bias": lambda: moved("bias") if "bias" in fetched else self._bias.to(x.dtype).expand_as(x),
            "act_noise": lambda: moved((*run, "act_noise")) @ self._roots["moments"].to(x.dtype),
            "error_noise": lambda: moved((*run, "error_noise")) @ self._roots["errors"].to(x.dtype),
            "linear_error": lambda: self._fitted(x, int(fetched["first"]), "weight"),
            "simple_error": lambda: self._fitted(x, int(fetched["first"]), "slope"),
            "head": lambda: self._head(label, x),
        }
        for argument in ("noise", *SAMPLED):
            made[argument] = lambda argument=argument: moved((label, draw, argument))
        return interventions.x_new(label, made)

    def _fitted(self, x: Acts, first: int, kind: str) -> Acts:
        """The part of the error that a fit on the other fold foretells: linear in x, or its mean and shrinkage."""
        other = 1 - fold_of(first)
        mean_x, mean_error, factor = (
            self._constants["errors", name][other].to(x.dtype) for name in ("mean_x", "mean_error", kind)
        )
        return mean_error + ((x - mean_x) @ factor if factor.ndim else (x - mean_x) * factor)

    def _head(self, label: str, x: Acts) -> Bool[Tensor, " d"]:
        """Where an activation at `hook_z` belongs to the head that the label names."""
        return torch.arange(x.shape[-1], device=x.device) // (x.shape[-1] // self.heads) == labels.parsed(label)[1]

    @cached_property
    def _constants(self) -> dict[tuple[str, str], Tensor]:
        wanted = {"moments": ("mean",), "errors": ("mean_x", "mean_error", "slope", "weight")}
        return {
            (stage, name): torch.from_numpy(self.files[stage][name][:]).to(self.device)
            for stage, names in wanted.items()
            if stage in self.files
            for name in names
        }

    @cached_property
    def _bias(self) -> Tensor:
        return torch.from_numpy(self.files["reconstructions"]["bias"][:]).to(self.device)

    @cached_property
    def _roots(self) -> dict[str, Tensor]:
        """The symmetric square root of the covariance of each stage: the one root that no solver's signs change."""
        return {
            stage: torch.from_numpy(root(self.files[stage]["covariance"][:])).to(self.device)
            for stage in ("moments", "errors")
            if stage in self.files
        }


def root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance, `d d`."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
