# Config -> plan, and what every rule needs of it. No rules here.
import os
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(workflow.current_basedir.join("../..")))

from pipeline import config as configuration
from pipeline.plan import PATTERNS, Plan

try:
    PLAN = Plan(configuration.load(config))
except ValueError as error:
    raise WorkflowError(str(error)) from None
REPORT = Path(PATTERNS["report"])
HEADLINE = REPORT.with_name("headline.txt")

# Jobs find the package and the Python of this environment, whatever the working directory and whether it was activated.
root = str(Path(workflow.current_basedir.join("../..")).resolve())
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


wildcard_constraints:
    model="[^/]+",
    corpus="[^/]+",
    sae="[^/]+",
    experiment="[^/]+",
    hook=r"blocks\.\d+\.[a-z0-9_.]+",
    shard=r"\d+-of-\d+",
    figure="[a-z_]+",


def job(stage, wildcards):
    """The planned job of a rule's output; a file that no job makes is nobody's."""
    path = PATTERNS[stage].format(**dict(wildcards.items()))
    if path not in PLAN.jobs:
        raise ValueError(f"'{path}' is not part of this configuration.")
    return PLAN[path]


def inputs(stage):
    return lambda wildcards: [upstream.path for _, upstream in job(stage, wildcards).inputs]


def as_json(stage):
    return lambda wildcards: job(stage, wildcards).json
