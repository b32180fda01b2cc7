# A corpus, tokenised and packed.
rule tokens:
    output:
        PATTERNS["tokens"],
    log:
        "results/logs/tokens/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/tokens/{model}/{corpus}.tsv"
    params:
        job=as_json("tokens"),
    shell:
        "python -m pipeline.tokens --job {params.job:q} --out {output:q} > {log:q} 2>&1"
