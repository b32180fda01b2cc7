#!/usr/bin/env bash
# cancel.sh NAME...: stops jobs.
exec kubectl delete job --wait=false --ignore-not-found "$@"
