"""All that is timed, op by op."""

from bench import attention, cross_entropy, embedding, gelu, layer_norm

BENCHMARKS = (
    *gelu.BENCHMARKS,
    *layer_norm.BENCHMARKS,
    *attention.BENCHMARKS,
    *cross_entropy.BENCHMARKS,
    *embedding.BENCHMARKS,
)
