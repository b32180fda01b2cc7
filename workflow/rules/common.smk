# Config -> plan, and what every rule needs of it. No rules here.
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(workflow.current_basedir.join("../..")))

from pipeline import config as configuration
from pipeline import store
from pipeline.plan import PATTERNS, Plan

try:
    PLAN = Plan(configuration.load(config))
except ValueError as error:
    raise WorkflowError(str(error)) from None
REPORT = Path(PATTERNS["report"])
HEADLINE = REPORT.with_name("headline.txt")

# Jobs find the package and the Python of this environment, whatever the working directory and whether it was activated.
bin, root = (
    shlex.quote(str(path)) for path in (Path(sys.executable).parent, Path(workflow.basedir))
)
shell.prefix(
    "set -euo pipefail; export PATH=%s:$PATH PYTHONPATH=%s:${{PYTHONPATH:-}}; " % (bin, root)
)


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
    """The planned inputs. On the way, an output without the planned fingerprint is marked to be made again.

    Snakemake compares with what it noted of earlier runs, and after a failed run or the loss of its notes it keeps what
    is stale; the files themselves know better.
    """

    def planned(wildcards):
        wanted = job(stage, wildcards)
        path = Path(wanted.path)
        if (
            workflow.is_main_process
            and path.exists()
            and not store.is_current(path, wanted.fingerprint)
        ):
            workflow.dag.forcefiles.add(wanted.path)
        return [upstream.path for _, upstream in wanted.inputs]

    return planned


def as_json(stage):
    return lambda wildcards: job(stage, wildcards).json
