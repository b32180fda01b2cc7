# Means, quantiles and ratios with intervals.
rule summary:
    input:
        inputs("summary"),
    output:
        PATTERNS["summary"],
        BESIDE["summary"],
    log:
        "results/logs/summary/summary.log",
    benchmark:
        "results/benchmarks/summary/summary.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("summary"),
    shell:
        "python -m pipeline.summary --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
