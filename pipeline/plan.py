"""Study -> jobs: which files there are, what each is made from, and the fingerprint that says whether it is still true.

Pure functions of the configuration, of the content of its files and of the code; used by the Snakefile, the stages and
the tests alike. A job is handed to its stage as one JSON string, which is also what Snakemake compares between runs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache, wraps
from itertools import product
from pathlib import Path

from pipeline import fingerprint, outcomes
from pipeline.config import BATCH, Study
from pipeline.experiments import Experiment, sets_of
from pipeline.hooks import Hook
from pipeline.inputs import Sae
from pipeline.jobs import BATCHES, DROPPABLE, Batch, Job
from pipeline.labels import ARGUMENTS, COMPONENTS, OF_A_HEAD, OF_AN_SAE, PAIR, label, parsed

# The control of the patch and of the resume path: cheap, and every job that patches runs its own.
CONTROL = "identity"
# How many of the clean run's most probable tokens are shown.
TOP = 25
# Which features are dense is told from the corpus's first contexts: so many, whatever shard is made.
DENSE_CONTEXTS = 64


def once(method: Callable[..., Job]) -> Callable[..., Job]:
    """The job of the same models, SAEs, hooks and shards is described once: jobs ask for their inputs again and again,
    and with many shards that would be most of planning."""

    @wraps(method)
    def known(plan: "Plan", *about: Experiment | Sae | Hook | str) -> Job:
        place = (method.__name__, *(each if isinstance(each, (str, Hook)) else each.id for each in about))
        if place not in plan.described:
            plan.described[place] = method(plan, *about)
        return plan.described[place]

    return known


class Plan:
    """All jobs of a study, by path. The methods that make a job are its definition; `jobs` says which are wanted."""

    def __init__(self, study: Study):
        self.study = study
        self.interventions = fingerprint.registered("interventions", "INTERVENTIONS")
        self.analyses = fingerprint.registered("analyses", "ANALYSES")
        self.figures = fingerprint.registered("figures", "FIGURES")
        self._made: dict[tuple, Job] = {}
        self.described: dict[tuple, Job] = {}
        # Files and source are read once per plan, however many jobs depend on them.
        self._content, self._code = cache(fingerprint.file_digest), cache(fingerprint.code_digest)
        self._tokenizer, self._rows = cache(self._tokenizer_of), cache(self._rows_of)
        self.targets = self._targets()
        self.jobs = {job.path: job for job in self._made.values()}
        self._note_needs()
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

    def _note_needs(self) -> None:
        """Of every item that is to be dropped, what lasts of all that is made from it."""
        dropped = set(DROPPABLE) - set(self.study.keep)
        for job in reversed(self.jobs.values()):  # each before its inputs
            lasting = job.needed_by if job.stage in dropped else {job.path: job}
            for _, upstream in job.inputs:
                if upstream.stage in dropped:
                    upstream.needed_by.update(lasting)

    def _targets(self) -> list[Job]:
        """The report, and every item below it: a lost or stale item is found even when the report looks finished."""
        report = self.report()
        return [*self.rows(self.study.experiments.values()), report]

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

    def make(self, stage: str, key: dict, settings: dict, inputs: list[tuple[str, Job]], names=frozenset()) -> Job:
        """The job of that stage and key; made once, so that jobs that share an input share its fingerprint's work."""
        place = (stage, *key.values())
        if place not in self._made:
            code = self._code(stage, frozenset(names))
            self._made[place] = Job(stage, key, settings, code, tuple(inputs), frozenset(names))
        return self._made[place]

    # One method per stage, in the order of the data flow.

    @once
    def tokens(self, model: str, corpus: str) -> Job:
        entry = self.study.corpora[corpus]
        settings = self._source(entry.source) | self._tokenizer(model)
        settings |= {name: getattr(entry, name) for name in ("column", "context", "contexts", "prepend_bos")}
        kind = Path(entry.source.get("path", "")).suffix.removeprefix(".")
        return self.make("tokens", {"model": model, "corpus": corpus}, settings, [], [kind] if kind else [])

    @once
    def weights(self, model: str) -> Job:
        entry = self.study.models[model]
        settings = self._source(entry.source) | {"processing": dict(entry.processing)}
        return self.make("weights", {"model": model}, settings, [])

    @once
    def clean(self, model: str, corpus: str, shard: str) -> Job:
        inputs = [("tokens", self.tokens(model, corpus)), ("weights", self.weights(model))]
        return self.make("clean", {"model": model, "corpus": corpus, "shard": shard}, self._blocks(), inputs)

    @once
    def activations(self, model: str, corpus: str, hook: Hook, shard: str) -> Job:
        inputs = [("tokens", self.tokens(model, corpus)), ("weights", self.weights(model))]
        return self.make(
            "activations", {"model": model, "corpus": corpus, "hook": hook.name, "shard": shard}, self._blocks(), inputs
        )

    @once
    def moments(self, model: str, corpus: str, hook: Hook) -> Job:
        inputs = [("tokens", self.tokens(model, corpus))]
        inputs += [("activations", self.activations(model, corpus, hook, shard)) for shard in self.shards]
        return self.make("moments", {"model": model, "corpus": corpus, "hook": hook.name}, {}, inputs)

    @once
    def reconstructions(self, sae: Sae, corpus: str, shard: str) -> Job:
        inputs = [("read", self.activations(sae.model, corpus, sae.read, shard))]
        inputs += [("write", self.activations(sae.model, corpus, sae.write, shard))]
        inputs += [("density", self.activations(sae.model, corpus, sae.read, each)) for each in self._first(corpus)]
        inputs += [("tokens", self.tokens(sae.model, corpus))]
        settings = self._source(sae.source) | {"model": sae.model, "dense_contexts": DENSE_CONTEXTS}
        settings |= {"read": sae.read.name, "write": sae.write.name}
        return self.make("reconstructions", {"sae": sae.id, "corpus": corpus, "shard": shard}, settings, inputs)

    def _first(self, corpus: str) -> list[str]:
        """The shards that hold the first contexts, from which dense features are told."""
        batches = (self.study.corpora[corpus].contexts or math.inf) / BATCH
        if math.isinf(batches):
            return self.shards
        starts = (BATCH * (math.ceil(batches) * i // self.study.shards) for i in range(self.study.shards))
        return [shard for shard, start in zip(self.shards, starts, strict=True) if start < DENSE_CONTEXTS]

    @once
    def scores(self, sae: Sae, corpus: str, shard: str) -> Job:
        inputs = [("reconstructions", self.reconstructions(sae, corpus, shard))]
        return self.make("scores", {"sae": sae.id, "corpus": corpus, "shard": shard}, {"model": sae.model}, inputs)

    @once
    def errors(self, sae: Sae, corpus: str) -> Job:
        inputs = [("tokens", self.tokens(sae.model, corpus)), ("moments", self.moments(sae.model, corpus, sae.write))]
        for shard in self.shards:
            inputs += [("activations", self.activations(sae.model, corpus, sae.write, shard))]
            inputs += [("reconstructions", self.reconstructions(sae, corpus, shard))]
        settings = {"model": sae.model, "hook": sae.write.name}
        return self.make("errors", {"sae": sae.id, "corpus": corpus}, settings, inputs)

    @once
    def effects(self, experiment: Experiment, sae: Sae, corpus: str, shard: str) -> Job:
        labels = self._sae_labels(experiment)
        inputs = self._patching_inputs(sae.model, corpus, sae.write, shard)
        inputs += [("reconstructions", self.reconstructions(sae, corpus, shard))]
        inputs += self._corpus_inputs(labels, sae.model, corpus, sae.write)
        if self._made_from(labels, "errors"):
            inputs += [("errors", self.errors(sae, corpus))]
        key = {"experiment": experiment.id, "sae": sae.id, "corpus": corpus, "shard": shard}
        settings = self._patching_settings(experiment, labels) | {"model": sae.model, "hook": sae.write.name}
        return self.make("effects", key, settings, inputs, _names(labels))

    @once
    def ablations(self, experiment: Experiment, model: str, corpus: str, hook: Hook, shard: str) -> Job:
        labels = self._ablation_labels(experiment, model, hook)
        inputs = self._patching_inputs(model, corpus, hook, shard)
        inputs += self._corpus_inputs(labels, model, corpus, hook)
        key = {"experiment": experiment.id, "model": model, "corpus": corpus, "hook": hook.name, "shard": shard}
        return self.make("ablations", key, self._patching_settings(experiment, labels), inputs, _names(labels))

    @once
    def compounds(self, experiment: Experiment, model: str, corpus: str, shard: str) -> Job:
        sets, labels = self._sets(experiment, model), [name for name in experiment.interventions if name != CONTROL]
        used = {sae for each in sets for sae in each["saes"]}
        saes = [sae for sae in self._by_layer(experiment, model) if sae.id in used]
        inputs = [("tokens", self.tokens(model, corpus)), ("weights", self.weights(model))]
        inputs += [("clean", self.clean(model, corpus, shard))]
        if experiment.encode == "clean":
            hooks = dict.fromkeys(hook for sae in saes for hook in (sae.read, sae.write))
            inputs += [("activations", self.activations(model, corpus, hook, shard)) for hook in hooks]
        for hook in dict.fromkeys(sae.write for sae in saes):
            inputs += self._corpus_inputs(labels, model, corpus, hook)
        settings = {
            "interventions": labels,
            "encode": experiment.encode,
            "saes": [
                {"id": sae.id, "read": sae.read.name, "write": sae.write.name} | self._source(sae.source)
                for sae in saes
            ],
            "sets": sets,
            "seed": self.study.seed if self._made_from(labels, "seed") else 0,
            "patch_special": experiment.patch_special,
            "precision": dict(self.study.precision),
            "contexts": experiment.contexts,
        }
        key = {"experiment": experiment.id, "model": model, "corpus": corpus, "shard": shard}
        return self.make("compounds", key, settings, inputs, _names(labels))

    @once
    def curvatures(self, experiment: Experiment, sae: Sae, corpus: str) -> Job:
        shard, labels = self.shards[0], [name for name in experiment.interventions if name in PAIR]
        inputs = [("tokens", self.tokens(sae.model, corpus)), ("weights", self.weights(sae.model))]
        inputs += [("activations", self.activations(sae.model, corpus, sae.write, shard))]
        inputs += [("reconstructions", self.reconstructions(sae, corpus, shard))]
        inputs += [("effects", self.effects(experiment, sae, corpus, shard))]
        settings = {"model": sae.model, "hook": sae.write.name, "interventions": labels}
        settings |= {"contexts": experiment.curvature, "patch_special": experiment.patch_special}
        settings |= {"seed": self.study.seed if self._made_from(labels, "seed") else 0}
        key = {"experiment": experiment.id, "sae": sae.id, "corpus": corpus}
        return self.make("curvatures", key, settings, inputs, _names(labels))

    @once
    def extremes(self, experiment: Experiment, sae: Sae, corpus: str) -> Job:
        inputs = [("tokens", self.tokens(sae.model, corpus))]
        inputs += [("effects", self.effects(experiment, sae, corpus, shard)) for shard in self.shards]
        settings = {"count": experiment.examples, "chosen": [list(pair) for pair in experiment.chosen]}
        settings |= self._tokenizer(sae.model) | {"model": sae.model}
        return self.make("extremes", {"experiment": experiment.id, "sae": sae.id, "corpus": corpus}, settings, inputs)

    @once
    def top_tokens(self, experiment: Experiment, sae: Sae, corpus: str) -> Job:
        labels = [name for name in experiment.interventions if name in PAIR]
        inputs = [("extremes", self.extremes(experiment, sae, corpus)), ("tokens", self.tokens(sae.model, corpus))]
        inputs += [("weights", self.weights(sae.model))]
        for shard in self.shards:
            inputs += [("clean", self.clean(sae.model, corpus, shard))]
            inputs += [("activations", self.activations(sae.model, corpus, sae.write, shard))]
            inputs += [("reconstructions", self.reconstructions(sae, corpus, shard))]
        settings = {"model": sae.model, "hook": sae.write.name, "interventions": labels, "top": TOP}
        settings |= {"patch_special": experiment.patch_special, "precision": dict(self.study.precision)}
        settings |= {"seed": self.study.seed if self._made_from(labels, "seed") else 0} | self._tokenizer(sae.model)
        key = {"experiment": experiment.id, "sae": sae.id, "corpus": corpus}
        return self.make("top_tokens", key, settings, inputs, _names(labels))

    @once
    def checks(self, experiment: Experiment, model: str, corpus: str) -> Job:
        """One SAE at every hook, and every ablation, on the first shard."""
        shard, hooks = self.shards[0], self._hooks(experiment, model)
        made, labels = [], self._sae_labels(experiment)
        if labels:
            one_each = {sae.write: sae for sae in self._saes(experiment, model)[::-1]}
            made += [self.effects(experiment, sae, corpus, shard) for sae in one_each.values()]
        for hook in hooks:
            if wanted := self._ablation_labels(experiment, model, hook):
                made, labels = [*made, self.ablations(experiment, model, corpus, hook, shard)], [*labels, *wanted]
        inputs = [(job.stage, job) for job in made]
        inputs += [pair for job in made for pair in job.inputs if pair[0] != "clean"]
        key = {"experiment": experiment.id, "model": model, "corpus": corpus}
        settings = {"seed": self.study.seed if self._made_from(labels, "seed") else 0}
        return self.make("checks", key, settings, list(dict.fromkeys(inputs)), _names(labels))

    def _blocks(self) -> dict:
        """The precision of a run that computes no differences."""
        return {"precision": {"blocks": self.study.precision["blocks"]}}

    def _saes(self, experiment: Experiment, model: str) -> list[Sae]:
        return [self.study.saes[sae] for sae in experiment.saes if self.study.saes[sae].model == model]

    def _hooks(self, experiment: Experiment, model: str) -> list[Hook]:
        """Where an experiment replaces activations of a model: where SAEs write, or every component of the atlas."""
        if experiment.scope != "atlas":
            return list(dict.fromkeys(sae.write for sae in self._saes(experiment, model)))
        geometry = self.study.models[model].geometry
        names = [name for name in experiment.components if not (geometry.parallel and name == "resid_mid")]
        layers = range(geometry.n_layers) if experiment.layers is None else experiment.layers
        return [Hook(layer, COMPONENTS[name]) for layer in layers for name in names]

    def _by_layer(self, experiment: Experiment, model: str) -> list[Sae]:
        return sorted(self._saes(experiment, model), key=lambda sae: sae.write.layer)

    def _sets(self, experiment: Experiment, model: str) -> list[dict]:
        """The sets of SAEs of a model that an experiment runs; none where it has no SAE of that model."""
        return sets_of([sae.id for sae in self._by_layer(experiment, model)], experiment.sets)

    def _source(self, source: Mapping) -> dict:
        """Where something is loaded from, with a digest of its content; that of a repository is its commit."""
        return dict(source) | ({"content": self._content(Path(source["path"]))} if "path" in source else {})

    def _tokenizer_of(self, model: str) -> dict:
        source = self.study.models[model].source
        if "path" not in source:
            return {"tokenizer": source["repo"], "tokenizer_commit": source["commit"]}
        folder = Path(source["path"])
        contents = [[file.name, self._content(file)] for file in tokenizer_files(folder)]
        return {"tokenizer": str(folder), "tokenizer_content": contents}

    def _made_from(self, labels: list[str], source: str) -> bool:
        """Whether one of the interventions asks for something that is made from a stage, or the seed."""
        return any(source in ARGUMENTS[argument] for name in _names(labels) for argument in self.interventions[name])

    def _of_an_sae(self, label: str) -> bool:
        return any(self._made_from([label], source) for source in OF_AN_SAE)

    def has_effects(self, experiment: Experiment) -> bool:
        return bool(self._sae_labels(experiment))

    def _sae_labels(self, experiment: Experiment) -> list[str]:
        """The experiment's interventions that belong to an SAE, after the control; none where there are none."""
        labels = [label for label in experiment.interventions if self._of_an_sae(label)]
        return [CONTROL, *labels] if labels and experiment.scope != "compound" else []

    def _ablation_labels(self, experiment: Experiment, model: str, hook: Hook) -> list[str]:
        """The experiment's interventions that need no SAE, after the control; none where there are none. The atlas
        ablates `hook_z` head by head."""
        labels = [label for label in experiment.interventions if label != CONTROL and not self._of_an_sae(label)]
        if experiment.scope == "atlas" and hook.site == COMPONENTS["z"]:
            heads = range(self.study.models[model].geometry.n_heads)
            labels = [label(OF_A_HEAD[name], head) for name, head in product(labels, heads)]
        return [CONTROL, *labels] if labels and experiment.scope != "compound" else []

    def _patching_inputs(self, model: str, corpus: str, hook: Hook, shard: str) -> list[tuple[str, Job]]:
        return [
            ("tokens", self.tokens(model, corpus)),
            ("weights", self.weights(model)),
            ("clean", self.clean(model, corpus, shard)),
            ("activations", self.activations(model, corpus, hook, shard)),
        ]

    def _corpus_inputs(self, labels: list[str], model: str, corpus: str, hook: Hook) -> list[tuple[str, Job]]:
        """The moments, where an intervention asks for something of the whole corpus."""
        wanted = self._made_from(labels, "moments")
        return [("moments", self.moments(model, corpus, hook))] if wanted else []

    def _patching_settings(self, experiment: Experiment, labels: list[str]) -> dict:
        # To a stage, the atlas is an experiment like any other.
        scope = "all" if experiment.scope == "atlas" else experiment.scope
        settings = {"interventions": labels, "scope": scope, "patch_special": experiment.patch_special}
        settings["precision"] = dict(self.study.precision)
        if self._made_from(labels, "seed"):
            settings |= {"seed": self.study.seed, "draws": experiment.draws}
        if experiment.positions:
            settings |= {"positions": list(experiment.positions), "horizon": experiment.horizon}
        if experiment.positions or experiment.contexts is not None:
            settings |= {"contexts": experiment.contexts}
        return settings

    def rows(self, experiments: Iterable[Experiment]) -> list[Job]:
        """Every job of some experiments whose table has rows of tokens: what figures and summaries are made from."""
        return list({job.path: job for experiment in experiments for job in self._rows(experiment)}.values())

    def _rows_of(self, experiment: Experiment) -> list[Job]:
        if experiment.scope == "atlas":
            return [
                self.ablations(experiment, model, corpus, hook, shard)
                for model, corpus, shard in product(experiment.models, experiment.corpora, self.shards)
                for hook in self._hooks(experiment, model)
            ]
        saes = [self.study.saes[sae] for sae in experiment.saes]
        places = product(experiment.corpora, self.shards, saes)
        return [job for corpus, shard, sae in places for job in self._rows_at(experiment, sae, corpus, shard)]

    def _rows_at(self, experiment: Experiment, sae: Sae, corpus: str, shard: str) -> list[Job]:
        if experiment.scope == "compound":
            wanted = self._sets(experiment, sae.model)
            return [self.compounds(experiment, sae.model, corpus, shard)] if wanted else []
        made = []
        if self._sae_labels(experiment):
            made += [self.effects(experiment, sae, corpus, shard), self.scores(sae, corpus, shard)]
            made += [self.curvatures(experiment, sae, corpus)] if experiment.curvature else []
            made += [self.extremes(experiment, sae, corpus)] if experiment.examples else []
            made += [self.top_tokens(experiment, sae, corpus)] if experiment.examples else []
        if self._ablation_labels(experiment, sae.model, sae.write):
            made += [self.ablations(experiment, sae.model, corpus, sae.write, shard)]
        return made

    def places(self, experiment: Experiment) -> list[tuple[str, str]]:
        """(model, corpus) of an experiment."""
        models = dict.fromkeys(self.study.saes[sae].model for sae in experiment.saes)
        return list(product(experiment.models or models, experiment.corpora))

    def report(self) -> Job:
        return outcomes.report(self)


def _names(labels: Iterable[str]) -> list[str]:
    """The interventions' own names, each once, without strengths."""
    return list(dict.fromkeys(parsed(label)[0] for label in labels))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model's folder that say how text becomes tokens, and which tokens are special."""
    kinds = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
    return sorted({file for kind in kinds for file in folder.glob(kind) if file.is_file()})
