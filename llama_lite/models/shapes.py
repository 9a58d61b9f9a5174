"""Model sizes as LAYERSxWIDTH: the LLaMA config of a size, and the size, vocabulary, step and learning rate that fit a
text and the available compute.

The constants come from our own runs on a CPU (benchmarks/shapes.py; those in benchmarks/shapes.json, and earlier ones
of up to 8M tokens whose records are not kept) and extend, where stated, to the paper's 1.7B model. The value of
repeated text follows Muennighoff et al., "Scaling Data-Constrained Language Models" (arXiv 2305.16264).
"""

import math
import re

from ..errors import Refusal

SHAPE = re.compile(r"(\d+)x(\d+)")

# (layers, width), from smallest to largest
LADDER = (
    *(
        (2, 64),
        (3, 64),
        (3, 96),
        (4, 96),
        (4, 128),
        (5, 160),
        (6, 192),
        (6, 256),
        (8, 256),
        (8, 320),
        (8, 384),
        (10, 448),
        (10, 512),
        (12, 640),
    ),
    *((12, 768), (16, 896), (18, 1024), (20, 1280), (24, 1536), (28, 1792), (36, 2048)),
)

NARROW = 384  # smaller widths have a head dimension of 32, others of 64

# parameters of `expected_loss`, fitted to 22 runs of 3x64 to 8x256 over 0.5 to 8M tokens
FIT = {"E": 1.0, "B": 131.0, "beta": 0.348, "K": 110.0}
PARAMETERS_PER_TOKEN = 13  # that is read: the most of those runs, 8x256 over 0.5M tokens
REPEATS = 15.4  # Muennighoff et al.: after this many repetitions, another one is worth 1/e of new text


def is_shape(name: str) -> bool:
    """Whether a name is LAYERSxWIDTH."""
    return bool(SHAPE.fullmatch(name))


def parse(name: str) -> tuple[int, int]:
    """(layers, width) of `6x256`. Raises Refusal for a width that heads do not divide."""
    layers, width = map(int, SHAPE.fullmatch(name).groups())
    if layers < 1 or width < 32 or width % 32:
        below, above = max(32, width // 32 * 32), (width // 32 + 1) * 32
        raise Refusal(
            f"--model_config {name}: the width must be a multiple of 32 and the layers at least 1, e.g."
            f" {max(1, layers)}x{below} or {max(1, layers)}x{above}."
        )
    return layers, width


def config(shape: tuple[int, int], vocab_size: int, context: int):
    """The LlamaConfig of (layers, width). From a width of 625 on, its initial weights have the paper's standard
    deviation; below, a larger one.
    """
    from transformers import LlamaConfig

    layers, width = shape
    heads = width // (32 if width < NARROW or width % 64 else 64)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=width,
        intermediate_size=round(width * 8 / 3 / 16) * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        initializer_range=round(max(0.02, 0.5 / math.sqrt(width)), 3),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def layer_parameters(shape: tuple[int, int]) -> int:
    """Number of weights in the layers, without embedding and output layer."""
    layers, width = shape
    return layers * (4 * width * width + 3 * width * round(width * 8 / 3 / 16) * 16)


def parameters(shape: tuple[int, int], vocab_size: int) -> int:
    """Number of weights, with embedding and output layer."""
    return layer_parameters(shape) + 2 * vocab_size * shape[1]


def flops_per_token(shape: tuple[int, int], vocab_size: int, context: int) -> float:
    """Training FLOPs per token, forward and backward, attention included."""
    layers, width = shape
    return 6 * (layer_parameters(shape) + vocab_size * width) + 12 * layers * width * context / 2


def context_of(width: int) -> int:
    """Default context in tokens of a model of this width: 256 to the paper's 1,024."""
    return 256 if width < 320 else 512 if width < 640 else 1024


def vocabulary_for(size: float) -> int:
    """Vocabulary size for `size` bytes of text: 1,024 for 200 KB, 4,096 for 30 MB, 32,768 from 7 GB on."""
    return 2 ** min(15, max(10, round(10 + (math.log2(max(size, 1)) - 18.5) / 3)))


def affordable_tokens(flops: float) -> float:
    """Training tokens for a compute-optimal model at `flops`: 20 per weight (Hoffmann et al., arXiv 2203.15556)."""
    return math.sqrt(flops * 20 / 6)


def tokens_per_step(reads: float) -> int:
    """Tokens per step for `reads` training tokens: 2,048 for 2M, the paper's 524,288 for its 20e9; a power of two."""
    return 2 ** min(19, max(10, round(11 + 0.6 * math.log2(max(reads, 1) / 2e6))))


def learning_rate(width: int) -> float:
    """Peak learning rate: 5e-3 at a width of 96, 3e-3 at 192, the paper's 6e-4 at 2,048."""
    return float(f"{6e-4 * (2048 / width) ** 0.69:.2g}")


def most_epochs(unique: float) -> float:
    """How many epochs over `unique` tokens are useful before the validation loss rises: 4 for 100,000 tokens (measured:
    the best of 2, 4 and 8), more for longer texts: 7 for a million, 16 at most (not measured; Muennighoff et al. found
    gains up to there).
    """
    return min(16.0, max(4.0, 4 * (unique / 1e5) ** 0.25))


def expected_loss(shape: tuple[int, int], reads: float, unique: float) -> float:
    """Expected loss in bits per byte of a shape on our documentation text after `reads` tokens, of a text of `unique`
    tokens.

    By FIT, the loss falls with a power of the number of tokens, and a model that is too small for them loses with the
    square of the tokens per weight. The runs of benchmarks/shapes.json over new text are within 0.11 of it; a short
    text that is read eight times ends up to 0.5 above.
    """
    repeated = max(0.0, reads / unique - 1)
    effective_tokens = unique * (1 + REPEATS * (1 - math.exp(-repeated / REPEATS))) if repeated else reads
    excess = reads / (FIT["K"] * layer_parameters(shape))
    return FIT["E"] + FIT["B"] / max(effective_tokens, 1) ** FIT["beta"] * (1 + excess**2)
