# What the tables need of reconstructions, without the vectors; several SAEs a job.
rule scores:
    input:
        inputs("scores"),
    output:
        BATCHES["scores"],
    log:
        "results/logs/scores/{model}/{corpus}/{shard}/{batch}.log",
    benchmark:
        "results/benchmarks/scores/{model}/{corpus}/{shard}/{batch}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("scores"),
    shell:
        "python -m pipeline.scores --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
