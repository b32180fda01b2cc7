# A model's weights, processed once.
rule weights:
    input:
        inputs("weights"),
    output:
        PATTERNS["weights"],
    log:
        "results/logs/weights/{model}.log",
    benchmark:
        "results/benchmarks/weights/{model}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("weights"),
    shell:
        "python -m pipeline.weights --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
