# One figure: picture and plotted data.
rule figures:
    input:
        inputs("figures"),
    output:
        PATTERNS["figures"],
        report(
            "results/figures/{figure}.svg",
            caption="../report/{figure}.rst",
            category="Figures",
        ),
        "results/figures/{figure}.png",
    log:
        "results/logs/figures/{figure}.log",
    benchmark:
        "results/benchmarks/figures/{figure}.tsv"
    conda:
        "../envs/faithful.yaml"
    params:
        job=as_json("figures"),
    shell:
        "python -m pipeline.figures --out {output:q} <<< {params.job:q} > {log:q} 2>&1"
