# One table of results.
rule analyses:
    input:
        inputs("analyses"),
    output:
        PATTERNS["analyses"],
    log:
        "results/logs/analyses/{analysis}.log",
    benchmark:
        "results/benchmarks/analyses/{analysis}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("analyses"),
    shell:
        "python -m pipeline.analyses --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
