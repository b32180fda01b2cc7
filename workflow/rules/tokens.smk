# A corpus, tokenised and packed.
rule tokens:
    input:
        inputs("tokens"),
    output:
        PATTERNS["tokens"],
    log:
        "results/logs/tokens/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/tokens/{model}/{corpus}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("tokens"),
    shell:
        "python -m pipeline.tokens --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
