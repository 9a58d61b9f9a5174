"""N-gram baselines that a neural model must beat."""

from pathlib import Path

import numpy as np

BASELINE_TOKENS = 50_000_000  # training tokens that are counted, in whole shards, and validation tokens at most


def baselines(folder: Path, manifest: dict) -> dict:
    """Cross-entropy of a unigram and a bigram model on the validation slice (its first BASELINE_TOKENS), in nats per
    token, with the weight of the bigram's prior and the number of tokens counted. folder, manifest: a prepared folder
    and its manifest.

    Counts come from the first training shards that together reach BASELINE_TOKENS. Unigram: add-one smoothing. Bigram:
    interpolated with the unigram by a Dirichlet prior whose weight is the best of a small grid on the validation slice
    itself, in the baseline's favor.
    """
    vocab = manifest["tokenizer"]["vocab_size"]
    # A pair is a number below vocab**2. Only pairs of the validation slice are counted, which bounds memory.
    validation = np.concatenate([np.load(folder / s["name"]) for s in manifest["splits"]["validation"]["shards"]])[
        :BASELINE_TOKENS
    ].astype(np.int64)
    pairs, pair_of = np.unique(validation[:-1] * vocab + validation[1:], return_inverse=True)
    unigrams, bigrams, counted = np.zeros(vocab, np.int64), np.zeros(len(pairs), np.int64), 0
    for shard in manifest["splits"]["train"]["shards"]:
        tokens = np.load(folder / shard["name"], mmap_mode="r")
        for start in range(0, len(tokens), 2**22):
            block = tokens[start : start + 2**22 + 1].astype(np.int64)
            unigrams += np.bincount(block[:-1], minlength=vocab)
            seen = block[:-1] * vocab + block[1:]
            index = np.searchsorted(pairs, seen).clip(max=len(pairs) - 1)
            bigrams += np.bincount(index[pairs[index] == seen], minlength=len(pairs))
            counted += len(block) - 1
        if counted >= BASELINE_TOKENS:
            break
    unigram = (unigrams + 1) / (unigrams.sum() + vocab)
    first, second = validation[:-1], validation[1:]

    def bigram_loss(weight: float) -> float:
        """Cross-entropy with a prior of this weight, in nats per token."""
        likelihood = (bigrams[pair_of] + weight * unigram[second]) / (unigrams[first] + weight)
        return float(-np.log(likelihood).mean())

    losses = {weight: bigram_loss(weight) for weight in (10.0, 30.0, 100.0, 300.0, 1000.0)}
    best = min(losses, key=losses.get)
    return {
        "unigram": float(-np.log(unigram[second]).mean()),
        "bigram": losses[best],
        "bigram_prior": best,
        "counted_tokens": int(counted),
    }
