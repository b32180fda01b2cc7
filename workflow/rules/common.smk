# Config -> plan, and what every rule needs of it. No rules here.
import shlex
import sys
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

# Of this workflow, also where another one includes it as a module.
ROOT = Path(str(workflow.current_basedir.join("../.."))).resolve()
sys.path.insert(0, str(ROOT))

from pipeline import config as configuration
from pipeline import estimate, locks, store
from pipeline.jobs import BATCHES, BESIDE, PATTERNS
from pipeline.plan import Plan
from pipeline.stage import drop

# Snakemake merges what is given into config.yaml. A study of one's own, with models or SAEs, takes nothing from the demo's;
# single settings (`--config seed=1`) change the demo.
given = workflow.config_settings.overwrite_config
if "models" in given or "saes" in given:
    config = given
try:
    for path in workflow.config_settings.configfiles:
        configuration.check_plain(Path(path))
    PLAN = Plan(configuration.load(config))
except (ValueError, OSError) as error:
    raise WorkflowError(str(error)) from None
# Of a workflow that includes this one, Snakemake's locks are its own business.
if workflow.is_main_process and Path(str(workflow.main_snakefile)).resolve() == ROOT / "Snakefile":
    ALIVE = locks.unlocked(Path(".snakemake"))
REPORT = Path(PATTERNS["report"])
HEADLINE = REPORT.with_name("headline.txt")

# Jobs find the package and the Python of this environment, whatever the working directory and whether it was activated.
bin, root = (shlex.quote(str(path)) for path in (Path(sys.executable).parent, ROOT))
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
    batch=r"\d+",
    analysis="[a-z_]+",
    figure="[a-z0-9_]+",


def step(stage, wildcards):
    """The planned job or batch of a rule's output; a file that no job makes is nobody's."""
    path = (PATTERNS | BATCHES)[stage].format(**dict(wildcards.items()))
    if path not in PLAN.steps:
        raise ValueError(f"'{path}' is not part of this configuration.")
    return PLAN.steps[path]


def state(path):
    """Of a planned item: "missing", "stale" or "current"."""
    if not Path(path).exists():
        return "missing"
    paths = [path, *BESIDE.get(PLAN[path].stage, [])]
    current = all(store.is_current(Path(each), PLAN[path].fingerprint) for each in paths)
    return "current" if current else "stale"


@cache
def to_make():
    """The steps that have to run, as the files stand when the run starts. A cluster's job is told, and does not ask."""
    return PLAN.to_make(state) if workflow.is_main_process else set()


def inputs(stage):
    """The planned inputs. On the way, what has to be made is forced, and nothing else is started for its sake.

    Snakemake compares with what it noted of earlier runs, and after a failed run or the loss of its notes it keeps what
    is stale; the files themselves know better. So times do not count (`ancient`), except for the inputs of forced jobs:
    Snakemake does not look at a job behind one that has to run, and would leave it out.
    """

    def planned(wildcards):
        wanted = step(stage, wildcards)
        paths = list(dict.fromkeys(PLAN.step(job).path for _, job in wanted.inputs))
        if wanted.path not in to_make():
            return [ancient(path) for path in paths]
        workflow.dag.forcefiles.add(wanted.path)
        return paths

    return planned


def as_json(stage):
    return lambda wildcards: step(stage, wildcards).json
