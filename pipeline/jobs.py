"""Jobs: one file to make each, or several in a batch; where the files are, and what a job tells its stage."""

import json
from dataclasses import dataclass, field
from functools import cached_property

from pipeline import fingerprint

PATTERNS = {
    "tokens": "results/tokens/{model}/{corpus}.h5",
    "weights": "results/weights/{model}.safetensors",
    "clean": "results/clean/{model}/{corpus}/{shard}.h5",
    "activations": "results/activations/{model}/{corpus}/{hook}/{shard}.h5",
    "moments": "results/moments/{model}/{corpus}/{hook}.h5",
    "reconstructions": "results/reconstructions/{sae}/{corpus}/{shard}.h5",
    "scores": "results/scores/{sae}/{corpus}/{shard}.h5",
    "errors": "results/errors/{sae}/{corpus}.h5",
    "effects": "results/effects/{experiment}/{sae}/{corpus}/{shard}.parquet",
    "ablations": "results/ablations/{experiment}/{model}/{corpus}/{hook}/{shard}.parquet",
    "compounds": "results/compounds/{experiment}/{model}/{corpus}/{shard}.parquet",
    "curvatures": "results/curvatures/{experiment}/{sae}/{corpus}.parquet",
    "extremes": "results/extremes/{experiment}/{sae}/{corpus}.parquet",
    "top_tokens": "results/top_tokens/{experiment}/{sae}/{corpus}.parquet",
    "checks": "results/checks/{experiment}/{model}/{corpus}.parquet",
    "summary": "results/summary/effects.parquet",
    "analyses": "results/summary/{analysis}.parquet",
    "paper": "results/paper/saes.parquet",
    "figures": "results/figures/{figure}.parquet",
    "report": "results/report.html",
}
# What a stage makes beside, with the same fingerprint.
BESIDE = {"summary": ["results/summary/saes.parquet"]}
# Stages whose jobs take several items at once, so that start-up and clean logits are paid for once. Each item is a file
# with its own fingerprint, made again only where it is missing or stale; the stamp says that the batch was looked at.
BATCHES = {
    "activations": "results/batches/activations/{model}/{corpus}/{shard}/{batch}.json",
    "reconstructions": "results/batches/reconstructions/{model}/{corpus}/{shard}/{batch}.json",
    "scores": "results/batches/scores/{model}/{corpus}/{shard}/{batch}.json",
    "errors": "results/batches/errors/{model}/{corpus}/{batch}.json",
    "effects": "results/batches/effects/{experiment}/{model}/{corpus}/{shard}/{batch}.json",
    "ablations": "results/batches/ablations/{experiment}/{model}/{corpus}/{shard}/{batch}.json",
    "curvatures": "results/batches/curvatures/{experiment}/{model}/{corpus}/{batch}.json",
    "extremes": "results/batches/extremes/{experiment}/{model}/{corpus}/{batch}.json",
    "top_tokens": "results/batches/top_tokens/{experiment}/{model}/{corpus}/{batch}.json",
}


# Large items that can be made again, and may be dropped when nothing needs them any more.
DROPPABLE = ("activations", "reconstructions")


@dataclass(frozen=True, eq=False)
class Job:
    """One file to make. `settings` is the job's own part of the configuration: only what it reads. `needed_by` holds,
    of an item that is to be dropped, the lasting items that are made from it (`Plan`)."""

    stage: str
    key: dict[str, str]
    settings: dict
    code: str
    inputs: tuple[tuple[str, "Job"], ...] = ()
    names: frozenset[str] = frozenset()
    needed_by: "dict[str, Job]" = field(default_factory=dict)

    @property
    def path(self) -> str:
        return PATTERNS[self.stage].format(**self.key)

    @cached_property
    def fingerprint(self) -> str:
        upstream = [[name, job.fingerprint] for name, job in self.inputs]
        return fingerprint.digest([self.stage, self.key, self.settings, self.code, upstream])

    @cached_property
    def told(self) -> dict:
        """What the stage is told: its settings, and what its inputs and its own code must be."""
        upstream = [[role, job.path, job.fingerprint] for role, job in self.inputs]
        told = {"stage": self.stage, "key": self.key, "settings": self.settings, "inputs": upstream, "path": self.path}
        told |= {"names": sorted(self.names), "code": self.code, "fingerprint": self.fingerprint}
        return told | {"needed_by": _marks(self), "drop": [[job.path, _marks(job)] for job in self.drop]}

    @cached_property
    def drop(self) -> "tuple[Job, ...]":
        """What may be dropped when this job was the last to need it: among its inputs, and theirs if dropped too."""
        found = [job for _, job in self.inputs if job.needed_by]
        return tuple(dict.fromkeys([*found, *(each for job in found for each in job.drop)]))

    @cached_property
    def jobs(self) -> tuple["Job", ...]:
        """The items to make: itself."""
        return (self,)

    @cached_property
    def json(self) -> str:
        return json.dumps([self.told], sort_keys=True)


def _marks(job: Job) -> list[list[str]]:
    """The items that need a job's file, each with its fingerprint."""
    return [[each.path, each.fingerprint] for each in job.needed_by.values()]


@dataclass(frozen=True, eq=False)
class Batch:
    """Several items of one stage that one process makes. Its own file is a stamp."""

    stage: str
    key: dict[str, str]
    jobs: tuple[Job, ...]

    @property
    def path(self) -> str:
        return BATCHES[self.stage].format(**self.key)

    @property
    def inputs(self) -> tuple[tuple[str, Job], ...]:
        """Those of all items, each once."""
        return tuple({job.path: (role, job) for item in self.jobs for role, job in item.inputs}.values())

    @cached_property
    def json(self) -> str:
        return json.dumps([job.told for job in self.jobs], sort_keys=True)
