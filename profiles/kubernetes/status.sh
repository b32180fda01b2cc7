#!/usr/bin/env bash
# status.sh NAME: running, success or failed. A job that is gone has failed; if the cluster does not answer, ask later.
if ! found=$(kubectl get job "$1" --ignore-not-found --output='jsonpath=there {.status.conditions[*].type}'); then
    echo running
elif [[ -z $found || $found == *Failed* ]]; then
    echo failed
elif [[ $found == *Complete* ]]; then
    echo success
else
    echo running
fi
