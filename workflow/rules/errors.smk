# Moments of the errors of SAEs and their linear part, several SAEs a job.
rule errors:
    input:
        inputs("errors"),
    output:
        BATCHES["errors"],
    log:
        "results/logs/errors/{model}/{corpus}/{batch}.log",
    benchmark:
        "results/benchmarks/errors/{model}/{corpus}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("errors"),
    shell:
        "python -m pipeline.errors --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
