"""Stage `tokens`: a corpus -> packed token ids, the mask of special tokens, and unigram counts."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline import corpora, hub, store
from pipeline.hooks import read_geometry
from pipeline.stage import Call, log, run

AXES = {"token": "seq pos", "special": "seq pos", "unigram": "v"}


def work(call: Call) -> None:
    from transformers import AutoTokenizer

    settings, folder = call.settings, hub.tokenizer(call.settings)
    d_vocab = read_geometry(folder).d_vocab
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token  # as TransformerLens does, and so every SAE trained with it
    if tokenizer.bos_token_id is None:
        raise ValueError(f"The tokenizer in '{folder}' has no BOS token. Set `bos_token` in its tokenizer_config.json.")
    tokens = _tokens(settings, tokenizer, d_vocab)
    special = np.isin(tokens, tokenizer.all_special_ids)
    unigram = np.bincount(tokens[~special], minlength=d_vocab)
    shapes = {"token": (tokens.shape, "int32"), "special": (tokens.shape, "bool"), "unigram": (unigram.shape, "int64")}
    with store.new_arrays(
        call.output, call.fingerprint, AXES, shapes, **call.key, **settings, bos=tokenizer.bos_token_id
    ) as file:
        file["token"][:], file["special"][:], file["unigram"][:] = tokens, special, unigram
    log.info("%s: %d contexts of %d tokens, %.1f %% special", call.key["corpus"], *tokens.shape, 100 * special.mean())


def _tokens(settings: dict, tokenizer, d_vocab: int) -> np.ndarray:
    """Packed ids `seq pos`, as many contexts as asked for."""
    if "dataset" in settings:
        return _of_dataset(settings, tokenizer)
    path, context, wanted = Path(settings["path"]), settings["context"], settings["contexts"]
    if path.suffix == ".npy":
        tokens = corpora.ready_tokens(path, context, d_vocab).astype(np.int32)
        missing = int((tokens[:, 0] != tokenizer.bos_token_id).sum())
        if settings["prepend_bos"] and missing:
            raise ValueError(
                f"{path}: {missing} of {len(tokens)} contexts do not start with BOS ({tokenizer.bos_token_id}). "
                "Say `prepend_bos: false` for this corpus, or put it there."
            )
    else:
        ids = _ids(corpora.documents(path, settings["column"]), tokenizer)
        tokens = corpora.pack(ids, context, tokenizer.bos_token_id, settings["prepend_bos"])
    _check_number(tokens, wanted, settings, str(path))
    # Spread over the corpus: neighbouring contexts share a document, and say less than distant ones.
    return tokens if wanted is None else tokens[np.linspace(0, len(tokens) - 1, wanted).round().astype(int)]


def _of_dataset(settings: dict, tokenizer) -> np.ndarray:
    """The first contexts of a dataset: no more of it is read than they take."""
    context, wanted = settings["context"], settings["contexts"]
    ids = _ids(corpora.streamed(settings, settings["column"]), tokenizer)
    ids = corpora.enough(ids, wanted * (context - settings["prepend_bos"]))
    tokens = corpora.pack(ids, context, tokenizer.bos_token_id, settings["prepend_bos"])
    _check_number(tokens, wanted, settings, f"'{settings['dataset']}'")
    return tokens[:wanted]


def _ids(documents: Iterable[str], tokenizer) -> Iterator[list[int]]:
    # The corpus is untrusted text: "<|endoftext|>" spelt out in it must not become a special token.
    tokenizer.backend_tokenizer.encode_special_tokens = True
    for text in documents:
        yield tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def _check_number(tokens: np.ndarray, wanted: int | None, settings: dict, what: str) -> None:
    if len(tokens) < max(1, wanted or 1):
        raise ValueError(
            f"{what} gives {len(tokens)} contexts of {settings['context']} tokens, but {wanted or 'at least 1'} are "
            "wanted. Use a longer text, a smaller `context`, or a smaller `contexts`."
        )


def main() -> None:
    run("tokens", work)


if __name__ == "__main__":
    main()
