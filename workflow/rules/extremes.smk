# The worst and best tokens of SAEs, several SAEs a job.
rule extremes:
    input:
        inputs("extremes"),
    output:
        BATCHES["extremes"],
    log:
        "results/logs/extremes/{experiment}/{model}/{corpus}/{batch}.log",
    benchmark:
        "results/benchmarks/extremes/{experiment}/{model}/{corpus}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("extremes"),
    shell:
        "python -m pipeline.extremes --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
