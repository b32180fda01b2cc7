# The first tokens of every hook against an evaluation in float64 that shares nothing with the engine.
rule checks:
    input:
        inputs("checks"),
    output:
        PATTERNS["checks"],
    log:
        "results/logs/checks/{experiment}/{model}/{corpus}.log",
    benchmark:
        "results/benchmarks/checks/{experiment}/{model}/{corpus}.tsv"
    conda:
        "../envs/faithful.yaml"
    resources:
        device="cpu",
    params:
        job=as_json("checks"),
    shell:
        "python -m pipeline.checks --out {output:q} --threads {threads} --device {resources.device} <<< {params.job:q} > {log:q} 2>&1"
