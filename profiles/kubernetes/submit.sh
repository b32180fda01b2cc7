#!/usr/bin/env bash
# submit.sh CPUS MEMORY GPUS MINUTES SCRIPT: makes a Kubernetes job that runs a script of Snakemake's; prints its name.
set -euo pipefail
sed -e '/^ *#/d' -e "s|CPUS|'$1'|; s|MEMORYM|$2M|g; s|GPUS|$3|; s|SECONDS|$(($4 * 60))|; s|SCRIPT|$5|; s|FOLDER|$PWD|" \
    "$(dirname "$0")/job.yaml" | kubectl create --filename=- --output='jsonpath={.metadata.name}'
