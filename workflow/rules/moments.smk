# Mean and covariance of the activations at a hook.
rule moments:
    input:
        inputs("moments"),
    output:
        PATTERNS["moments"],
    log:
        "results/logs/moments/{model}/{corpus}/{hook}.log",
    benchmark:
        "results/benchmarks/moments/{model}/{corpus}/{hook}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("moments"),
    shell:
        "python -m pipeline.moments --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
