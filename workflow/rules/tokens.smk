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
        "python -m pipeline.tokens --job {params.job:q} --out {output:q} > {log:q} 2>&1"
