"""Study -> jobs: which files there are, what each is made from, and the fingerprint that says whether it is still true.

Pure functions of the configuration, of the content of its files and of the code; used by the Snakefile, the stages and
the tests alike. A job is handed to its stage as one JSON string, which is also what Snakemake compares between runs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

from pipeline import fingerprint
from pipeline.config import Experiment, Sae, Study
from pipeline.hooks import Hook

PATTERNS = {
    "tokens": "results/tokens/{model}/{corpus}.h5",
    "weights": "results/weights/{model}.safetensors",
    "clean": "results/clean/{model}/{corpus}/{shard}.h5",
    "activations": "results/activations/{model}/{corpus}/{hook}/{shard}.h5",
    "moments": "results/moments/{model}/{corpus}/{hook}.h5",
    "reconstructions": "results/reconstructions/{sae}/{corpus}/{shard}.h5",
    "effects": "results/effects/{experiment}/{sae}/{corpus}/{shard}.parquet",
    "ablations": "results/ablations/{experiment}/{model}/{corpus}/{hook}/{shard}.parquet",
    "checks": "results/checks/{experiment}/{model}/{corpus}.parquet",
    "summary": "results/summary/effects.parquet",
    "figures": "results/figures/{figure}.parquet",
    "report": "results/report.html",
}
# Stages whose jobs take several items at once, so that start-up and clean logits are paid for once. Each item is a file
# with its own fingerprint, made again only where it is missing or stale; the stamp says that the batch was looked at.
BATCHES = {
    "activations": "results/batches/activations/{model}/{corpus}/{shard}/{batch}.json",
    "reconstructions": "results/batches/reconstructions/{model}/{corpus}/{shard}/{batch}.json",
    "effects": "results/batches/effects/{experiment}/{model}/{corpus}/{shard}/{batch}.json",
    "ablations": "results/batches/ablations/{experiment}/{model}/{corpus}/{shard}/{batch}.json",
}
# The control of the patch and of the resume path: cheap, and every job that patches runs its own.
CONTROL = "identity"


@dataclass(frozen=True, eq=False)
class Job:
    """One file to make. `settings` is the job's own part of the configuration: only what it reads."""

    stage: str
    key: dict[str, str]
    settings: dict
    code: str
    inputs: tuple[tuple[str, "Job"], ...] = ()
    names: frozenset[str] = frozenset()

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
        return told | {"names": sorted(self.names), "code": self.code, "fingerprint": self.fingerprint}

    @cached_property
    def jobs(self) -> tuple["Job", ...]:
        """The items to make: itself."""
        return (self,)

    @cached_property
    def json(self) -> str:
        return json.dumps([self.told], sort_keys=True)


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


class Plan:
    """All jobs of a study, by path. The methods that make a job are its definition; `jobs` says which are wanted."""

    def __init__(self, study: Study):
        self.study = study
        self.interventions = fingerprint.registered("interventions", "INTERVENTIONS")
        self.figures = fingerprint.registered("figures", "FIGURES")
        self._made: dict[tuple, Job] = {}
        # Files and source are read once per plan, however many jobs depend on them.
        self._content, self._code = cache(fingerprint.file_digest), cache(fingerprint.code_digest)
        self.targets = self._targets()
        self.jobs = {job.path: job for job in self._made.values()}
        self._batch_of = {job.path: batch for batch in self._batches() for job in batch.jobs}
        self.steps: dict[str, Job | Batch] = {self.step(job).path: self.step(job) for job in self.jobs.values()}

    def __getitem__(self, path: str) -> Job:
        return self.jobs[path]

    def step(self, job: Job) -> Job | Batch:
        """What makes a job's file: its batch, where its stage works in batches, else itself."""
        return self._batch_of.get(job.path, job)

    def to_make(self, state: Callable[[str], str]) -> set[str]:
        """The steps that have to run, by path, given whether a file is "missing", "stale" or "current".

        An item is made where it is stale, or missing and either a result in its own right or asked for by an item that
        is made. What is missing and asked for by nothing (activations that were deleted to save space) is not.
        """
        made, asked = set(), {job.path for job in self.targets}
        for job in reversed(self.jobs.values()):  # each before its inputs
            found = state(job.path)
            if found == "stale" or (found == "missing" and job.path in asked):
                made.add(self.step(job).path)
                asked.update(upstream.path for _, upstream in job.inputs)
        return made

    def _targets(self) -> list[Job]:
        """The report, and every item below it: a lost or stale item is found even when the report looks finished."""
        report = self.report()
        return [*self._rows(), report]

    def _batches(self) -> list[Batch]:
        """Items of the same stage, model, corpus and shard (and experiment), in the order of the configuration, up to
        `batch` of them together."""
        groups: dict[tuple, list[Job]] = {}
        for job in self._made.values():
            if job.stage in BATCHES:
                names = [name for name in ("experiment", "corpus", "shard") if name in job.key]
                key = {"model": job.key.get("model") or job.settings["model"]} | {name: job.key[name] for name in names}
                groups.setdefault((job.stage, *key.items()), []).append(job)
        size = self.study.batch
        return [
            Batch(stage, dict(key) | {"batch": str(start // size)}, tuple(jobs[start : start + size]))
            for (stage, *key), jobs in groups.items()
            for start in range(0, len(jobs), size)
        ]

    @property
    def shards(self) -> list[str]:
        return [f"{shard}-of-{self.study.shards}" for shard in range(self.study.shards)]

    def _make(self, stage: str, key: dict, settings: dict, inputs: list[tuple[str, Job]], names=frozenset()) -> Job:
        """The job of that stage and key; made once, so that jobs that share an input share its fingerprint's work."""
        place = (stage, *key.values())
        if place not in self._made:
            code = self._code(stage, frozenset(names))
            self._made[place] = Job(stage, key, settings, code, tuple(inputs), frozenset(names))
        return self._made[place]

    # One method per stage, in the order of the data flow.

    def tokens(self, model: str, corpus: str) -> Job:
        entry, folder = self.study.corpora[corpus], self.study.models[model].path
        settings = {
            "path": str(entry.path),
            "tokenizer": str(folder),
            "content": self._content(entry.path),
            "tokenizer_content": [[file.name, self._content(file)] for file in tokenizer_files(folder)],
        }
        settings |= {name: getattr(entry, name) for name in ("column", "context", "contexts", "prepend_bos")}
        return self._make(
            "tokens", {"model": model, "corpus": corpus}, settings, [], [entry.path.suffix.removeprefix(".")]
        )

    def weights(self, model: str) -> Job:
        entry = self.study.models[model]
        settings = {
            "path": str(entry.path),
            "content": self._content(entry.path),
            "processing": dict(entry.processing),
        }
        return self._make("weights", {"model": model}, settings, [])

    def clean(self, model: str, corpus: str, shard: str) -> Job:
        inputs = [("tokens", self.tokens(model, corpus)), ("weights", self.weights(model))]
        return self._make("clean", {"model": model, "corpus": corpus, "shard": shard}, self._blocks(), inputs)

    def activations(self, model: str, corpus: str, hook: Hook, shard: str) -> Job:
        inputs = [("tokens", self.tokens(model, corpus)), ("weights", self.weights(model))]
        return self._make(
            "activations", {"model": model, "corpus": corpus, "hook": hook.name, "shard": shard}, self._blocks(), inputs
        )

    def moments(self, model: str, corpus: str, hook: Hook) -> Job:
        inputs = [("tokens", self.tokens(model, corpus))]
        inputs += [("activations", self.activations(model, corpus, hook, shard)) for shard in self.shards]
        return self._make("moments", {"model": model, "corpus": corpus, "hook": hook.name}, {}, inputs)

    def reconstructions(self, sae: Sae, corpus: str, shard: str) -> Job:
        inputs = [("read", self.activations(sae.model, corpus, sae.read, shard))]
        inputs += [("write", self.activations(sae.model, corpus, sae.write, shard))]
        inputs += [("tokens", self.tokens(sae.model, corpus))]
        settings = {"path": str(sae.path), "content": self._content(sae.path), "model": sae.model}
        settings |= {"read": sae.read.name, "write": sae.write.name}
        return self._make("reconstructions", {"sae": sae.id, "corpus": corpus, "shard": shard}, settings, inputs)

    def effects(self, experiment: Experiment, sae: Sae, corpus: str, shard: str) -> Job:
        names = self._sae_names(experiment)
        inputs = self._patching_inputs(sae.model, corpus, sae.write, shard)
        inputs += [("reconstructions", self.reconstructions(sae, corpus, shard))]
        inputs += self._mean_inputs(names, sae.model, corpus, sae.write)
        key = {"experiment": experiment.id, "sae": sae.id, "corpus": corpus, "shard": shard}
        settings = self._patching_settings(experiment, names) | {"model": sae.model, "hook": sae.write.name}
        return self._make("effects", key, settings, inputs, names)

    def ablations(self, experiment: Experiment, model: str, corpus: str, hook: Hook, shard: str) -> Job:
        names = self._ablation_names(experiment)
        inputs = self._patching_inputs(model, corpus, hook, shard)
        inputs += self._mean_inputs(names, model, corpus, hook)
        key = {"experiment": experiment.id, "model": model, "corpus": corpus, "hook": hook.name, "shard": shard}
        return self._make("ablations", key, self._patching_settings(experiment, names), inputs, names)

    def checks(self, experiment: Experiment, model: str, corpus: str) -> Job:
        """One SAE at every hook, and every ablation, on the first shard."""
        shard = self.shards[0]
        saes = [self.study.saes[sae] for sae in experiment.saes if self.study.saes[sae].model == model]
        made = []
        if self._sae_names(experiment):
            made += [
                self.effects(experiment, sae, corpus, shard) for sae in {sae.write: sae for sae in saes[::-1]}.values()
            ]
        if self._ablation_names(experiment):
            made += [self.ablations(experiment, model, corpus, hook, shard) for hook in {sae.write: 0 for sae in saes}]
        inputs = [(job.stage, job) for job in made]
        inputs += [pair for job in made for pair in job.inputs if pair[0] != "clean"]
        names = [*self._sae_names(experiment), *self._ablation_names(experiment)]
        key = {"experiment": experiment.id, "model": model, "corpus": corpus}
        settings = {"seed": self.study.seed if any(self._needs(name, "noise") for name in names) else 0}
        return self._make("checks", key, settings, list(dict.fromkeys(inputs)), names)

    def summary(self) -> Job:
        inputs = [("tokens", self.tokens(*pair)) for pair in self._pairs()]
        inputs += [(job.stage, job) for job in self._rows()]
        inputs += [("moments", self.moments(sae.model, corpus, sae.write)) for sae, corpus in self._sae_corpora()]
        settings = {"seed": self.study.seed, "bootstrap": dict(self.study.bootstrap)}
        return self._make("summary", {}, settings, list(dict.fromkeys(inputs)))

    def figure(self, figure: str) -> Job:
        inputs = [("summary", self.summary())]
        if "effects" in self.figures[figure]:
            inputs += [("effects", job) for job in self._effects()]
        return self._make("figures", {"figure": figure}, {}, inputs, [figure])

    def report(self) -> Job:
        figures = [name for name, needs in self.figures.items() if self._effects() or "effects" not in needs]
        inputs = [("summary", self.summary()), *(("figures", self.figure(figure)) for figure in figures)]
        inputs += [("checks", job) for job in self._checks()]
        study = self.study
        settings = {
            "seed": study.seed,
            "shards": study.shards,
            "precision": dict(study.precision),
            "bootstrap": dict(study.bootstrap),
            "models": [
                {"id": m.id, "path": str(m.path), "processing": dict(m.processing)} for m in study.models.values()
            ],
            "corpora": [vars(c) | {"path": str(c.path)} for c in study.corpora.values()],
            "saes": [{"id": s.id, "path": str(s.path), "model": s.model} for s in study.saes.values()],
            "experiments": [vars(e) for e in study.experiments.values()],
        }
        return self._make("report", {}, json.loads(json.dumps(settings)), inputs)

    def _blocks(self) -> dict:
        """The precision of a run that computes no differences."""
        return {"precision": {"blocks": self.study.precision["blocks"]}}

    def _needs(self, intervention: str, argument: str) -> bool:
        return argument in self.interventions[intervention]

    def _sae_names(self, experiment: Experiment) -> list[str]:
        """The experiment's interventions that need an SAE, after the control; none where there are none."""
        names = [name for name in experiment.interventions if self._needs(name, "x_hat")]
        return [CONTROL, *names] if names else []

    def _ablation_names(self, experiment: Experiment) -> list[str]:
        """The experiment's interventions that need no SAE, after the control; none where there are none."""
        names = [name for name in experiment.interventions if name != CONTROL and not self._needs(name, "x_hat")]
        return [CONTROL, *names] if names else []

    def _patching_inputs(self, model: str, corpus: str, hook: Hook, shard: str) -> list[tuple[str, Job]]:
        return [
            ("tokens", self.tokens(model, corpus)),
            ("weights", self.weights(model)),
            ("clean", self.clean(model, corpus, shard)),
            ("activations", self.activations(model, corpus, hook, shard)),
        ]

    def _mean_inputs(self, names: list[str], model: str, corpus: str, hook: Hook) -> list[tuple[str, Job]]:
        """The moments, where an intervention asks for the mean."""
        wanted = any(self._needs(name, "mean") for name in names)
        return [("moments", self.moments(model, corpus, hook))] if wanted else []

    def _patching_settings(self, experiment: Experiment, names: list[str]) -> dict:
        settings = {"interventions": names, "scope": experiment.scope, "patch_special": experiment.patch_special}
        settings["precision"] = dict(self.study.precision)
        if any(self._needs(name, "noise") for name in names):
            settings["seed"] = self.study.seed
        return settings

    def _rows(self) -> list[Job]:
        """Every job whose table has a row per token: effects, reconstructions (the SAE's own numbers) and ablations."""
        rows = {}
        for experiment in self.study.experiments.values():
            saes = [self.study.saes[sae] for sae in experiment.saes]
            for sae, corpus, shard in product(saes, experiment.corpora, self.shards):
                made = []
                if self._sae_names(experiment):
                    made += [self.effects(experiment, sae, corpus, shard), self.reconstructions(sae, corpus, shard)]
                if self._ablation_names(experiment):
                    made += [self.ablations(experiment, sae.model, corpus, sae.write, shard)]
                rows |= {job.path: job for job in made}
        return list(rows.values())

    def _checks(self) -> list[Job]:
        """The check of every experiment on every model and corpus that it uses."""
        places = {
            (experiment.id, self.study.saes[sae].model, corpus): None
            for experiment in self.study.experiments.values()
            for sae, corpus in product(experiment.saes, experiment.corpora)
        }
        return [self.checks(self.study.experiments[name], model, corpus) for name, model, corpus in places]

    def _effects(self) -> list[Job]:
        return [job for job in self._rows() if job.stage == "effects"]

    def _sae_corpora(self) -> list[tuple[Sae, str]]:
        experiments = self.study.experiments.values()
        pairs = [(sae, corpus) for e in experiments for sae, corpus in product(e.saes, e.corpora)]
        return [(self.study.saes[sae], corpus) for sae, corpus in dict.fromkeys(pairs)]

    def _pairs(self) -> list[tuple[str, str]]:
        return list(dict.fromkeys((sae.model, corpus) for sae, corpus in self._sae_corpora()))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model's folder that say how text becomes tokens, and which tokens are special."""
    kinds = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
    return sorted({file for kind in kinds for file in folder.glob(kind) if file.is_file()})
